"""Action spaces as the vectors that the encoder sees, and both kinds of noise (section 6)."""

import warnings

import gymnasium as gym
import numpy as np
import numpy_agent as reference
import pytest
import torch as th
from gymnasium import spaces
from helpers import make_policy
from scipy import stats

from sb3_mrq import MRQ
from sb3_mrq.action_spaces import BoxActions, CategoricalActions, make_actions

OBSERVATION_SPACE = spaces.Box(-np.inf, np.inf, (3,))
SMALL = dict(net_arch=dict(encoder=[4], qf=[4], pi=[4]), z_s_dim=4, z_a_dim=4, z_sa_dim=4)
LARGEST = float(np.finfo(np.float32).max)


def box_from(low, high):
    """A float32 Box with bounds of their own for each dimension."""
    return spaces.Box(np.array(low, dtype=np.float32), np.array(high, dtype=np.float32))


BOXES = {
    "symmetric": spaces.Box(-1, 1, (3,)),
    "asymmetric": spaces.Box(-2, 6, (2,)),
    "positive": spaces.Box(3.0, 3.5, (1,)),
    "per dimension": box_from([-1.0, 0.0, -200.0], [1.0, 1e-3, 50.0]),
    "not flat": spaces.Box(-3, 1, (2, 3)),
    "float64": spaces.Box(-0.7, 1.3, (2,), dtype=np.float64),
    "as wide as float32 goes": spaces.Box(-LARGEST, LARGEST, (2,)),
    "wide on one side": box_from([0.0, -1.0], [LARGEST, 1.0]),
    "wider than float32": spaces.Box(-1e300, 1e300, (2,), dtype=np.float64),
}
# The space, the number of values of each dimension, and the smallest one
CATEGORICAL = {
    "Discrete": (spaces.Discrete(4), [4], [0]),
    "Discrete from 3": (spaces.Discrete(3, start=3), [3], [3]),
    "Discrete from -2": (spaces.Discrete(5, start=-2), [5], [-2]),
    "Discrete of one": (spaces.Discrete(1), [1], [0]),
    "MultiDiscrete": (spaces.MultiDiscrete([2, 5, 3]), [2, 5, 3], [0, 0, 0]),
    "MultiDiscrete from elsewhere": (spaces.MultiDiscrete([3, 2], start=[1, -4]), [3, 2], [1, -4]),
    "MultiBinary": (spaces.MultiBinary(3), [2, 2, 2], [0, 0, 0]),
}


@pytest.fixture(autouse=True)
def seed():
    th.manual_seed(0)


@pytest.fixture(params=BOXES)
def box(request):
    return BOXES[request.param]


@pytest.fixture(params=CATEGORICAL)
def categorical(request):
    return CATEGORICAL[request.param]


def sample(space, n, seed=0):
    space.seed(seed)
    return np.array([space.sample() for _ in range(n)])


def stored_form(space, n):
    """Actions as the replay buffer keeps them, (n, D)."""
    return th.as_tensor(sample(space, n).reshape(n, -1))


def normal(*shape, seed=1):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def constant_policy(space, pre_activation):
    """A policy that gives this pre-activation whatever it sees."""
    policy = make_policy(OBSERVATION_SPACE, space, **SMALL)
    layers = [layer for layer in policy.actor.modules() if isinstance(layer, th.nn.Linear)]
    for layer in layers:
        layer.weight.data.zero_()
        layer.bias.data.zero_()
    layers[-1].bias.data.copy_(th.as_tensor(pre_activation))
    return policy


# --------------------------------------------------------------------------------------------------------------------
# Box
# --------------------------------------------------------------------------------------------------------------------


def test_box_activation_is_tanh(box):
    actions = make_actions(box)
    assert isinstance(actions, BoxActions)
    assert actions.dim == np.prod(box.shape)
    u = normal(20, actions.dim)
    np.testing.assert_allclose(actions.activation(th.as_tensor(u)).numpy(), np.tanh(u), rtol=1e-6)


def test_box_vectors_are_what_is_stored(box):
    actions = make_actions(box)
    stored = th.as_tensor(normal(4, 5, actions.dim))
    assert th.equal(actions.encode(stored), stored)


def test_box_has_no_gumbel_noise(box):
    actions = make_actions(box)
    assert actions.sample_gumbel(th.empty(4, actions.dim)) is None


@pytest.mark.parametrize("std, clip", [(0.2, 0.3), (0.5, 0.1)])
def test_box_smoothing(std, clip):
    """Noise is clipped first, then the action."""
    action = np.random.default_rng(0).uniform(-1, 1, (500, 3)).astype(np.float32)
    noise = normal(500, 3)
    smoothed = make_actions(BOXES["symmetric"]).smooth(th.as_tensor(action), th.as_tensor(noise), std, clip).numpy()
    np.testing.assert_allclose(smoothed, np.clip(action + np.clip(std * noise, -clip, clip), -1, 1), atol=1e-6)
    assert np.abs(smoothed).max() == 1
    # Both bounds of the noise were reached
    assert np.isclose((smoothed - action).max(), clip, atol=1e-6)
    assert np.isclose((smoothed - action).min(), -clip, atol=1e-6)


def act(actions, u, deterministic):
    """Stored form of the action for pre-activations, as policies compute it."""
    return actions.decode(actions.activation(u, None if deterministic else actions.sample_gumbel(u)))


def explore(actions, u, std):
    """The same in a rollout."""
    return actions.decode(actions.add_noise(actions.activation(u, actions.sample_gumbel(u)), std))


def test_box_exploration_noise():
    """Normal with the given standard deviation around tanh(u), independent in every entry."""
    u = np.array([-0.4, 0.0, 0.3])
    explored = explore(make_actions(BOXES["symmetric"]), th.as_tensor(u).float().expand(20_000, 3), 0.2).numpy()
    noise = explored - np.tanh(u)
    for dim in range(3):
        assert abs(noise[:, dim].mean()) < 0.006
        assert abs(noise[:, dim].std() / 0.2 - 1) < 0.02
    # The clipping to [-1, 1] does not reach this one
    assert stats.kstest(noise[:, 1], stats.norm(0, 0.2).cdf).pvalue > 1e-3
    assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03


def test_box_exploration_stays_in_the_space():
    u = th.tensor([-2.0, 2.0, 0.0]).expand(10_000, 3)
    explored = explore(make_actions(BOXES["symmetric"]), u, 0.2).numpy()
    assert explored[:, 0].min() == -1
    assert explored[:, 1].max() == 1
    assert np.abs(explored).max() == 1
    # Clipped, not drawn again or folded back
    assert abs((explored[:, 1] == 1).mean() - stats.norm.sf(1 - np.tanh(2.0), scale=0.2)) < 0.02


@pytest.mark.parametrize("deterministic", [True, False])
def test_box_acting_is_tanh(box, deterministic):
    actions = make_actions(box)
    u = normal(20, actions.dim)
    np.testing.assert_allclose(act(actions, th.as_tensor(u), deterministic).numpy(), np.tanh(u), rtol=1e-6)


def test_box_scaling_there_and_back(box):
    """Every action of the space comes back, in [-1, 1] in between."""
    policy = make_policy(OBSERVATION_SPACE, box, **SMALL)
    actions = np.concatenate([sample(box, 200), [box.low, box.high]])
    # In two steps: the difference of the bounds may not be representable
    expected = (actions.astype(np.float64) / 2 - box.low / 2.0) / (box.high / 2.0 - box.low / 2.0) * 2 - 1
    scaled = policy.scale_action(actions)
    assert scaled.dtype == np.float32
    assert np.abs(scaled).max() <= 1
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    back = policy.unscale_action(scaled)
    assert (back.shape, back.dtype) == (actions.shape, box.dtype)
    assert all(box.contains(action) for action in back)
    tolerance = np.broadcast_to(1e-6 * (box.high.astype(np.float64) / 2 - box.low / 2.0), actions.shape)
    assert (np.abs(back.astype(np.float64) - actions) <= tolerance + 1e-6 * np.abs(actions)).all()


def test_box_unscaling_reaches_the_bounds_and_stays_in_the_space(box):
    policy = make_policy(OBSERVATION_SPACE, box, **SMALL)
    ends = np.stack([np.full(box.shape, -1, dtype=np.float32), np.full(box.shape, 1, dtype=np.float32)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(policy.unscale_action(ends), [box.low, box.high])
        scaled = np.random.default_rng(0).uniform(-1, 1, (200, *box.shape)).astype(np.float32)
        scaled = np.concatenate([scaled, np.nextafter(ends, 0), np.zeros((1, *box.shape), dtype=np.float32)])
        actions = policy.unscale_action(scaled)
    assert all(box.contains(action) for action in actions)


def test_box_predictions_are_in_the_space(box):
    """In its shape, dtype and bounds, tanh(u) of the way through it."""
    u = np.linspace(-3, 3, int(np.prod(box.shape)))
    policy = constant_policy(box, u)
    for deterministic in (True, False):
        actions, _ = policy.predict(np.zeros((5, 3), dtype=np.float32), deterministic=deterministic)
        assert (actions.shape, actions.dtype) == ((5, *box.shape), box.dtype)
        assert all(box.contains(action) for action in actions)
        scaled = policy.scale_action(actions).reshape(5, -1)
        np.testing.assert_allclose(scaled, np.tile(np.tanh(u), (5, 1)), atol=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Discrete, MultiDiscrete, MultiBinary
# --------------------------------------------------------------------------------------------------------------------


def test_categorical_vectors_are_concatenated_one_hots(categorical):
    space, sizes, starts = categorical
    actions = make_actions(space)
    assert isinstance(actions, CategoricalActions)
    assert actions.dim == sum(sizes)
    stored = stored_form(space, 60)
    encoded = actions.encode(stored)
    assert encoded.dtype == th.float32
    expected = [reference.one_hot(stored[:, i].numpy() - starts[i], sizes[i]) for i in range(len(sizes))]
    np.testing.assert_array_equal(encoded.numpy(), np.concatenate(expected, axis=1))
    # A batch of horizons, and what the policy gives: whatever the type of integers
    for other in (stored.to(th.int32), stored.to(th.float32)):
        np.testing.assert_array_equal(actions.encode(other.reshape(4, 15, -1)).flatten(0, 1).numpy(), encoded.numpy())


@pytest.mark.parametrize("temperature", [10.0, 0.5])
def test_categorical_activation_is_a_gumbel_softmax_for_each_dimension(categorical, temperature):
    space, sizes, _ = categorical
    actions = make_actions(space, temperature)
    u, gumbel = 5 * normal(20, actions.dim), np.random.default_rng(0).gumbel(size=(20, actions.dim)).astype(np.float32)
    soft = actions.activation(th.as_tensor(u), th.as_tensor(gumbel)).numpy()
    np.testing.assert_allclose(soft, reference.activation(u, gumbel, sizes, temperature), rtol=1e-5)
    without = actions.activation(th.as_tensor(u)).numpy()
    np.testing.assert_allclose(without, reference.activation(u, np.zeros_like(u), sizes, temperature), rtol=1e-5)
    for part in reference.by_dimension(soft, sizes):
        np.testing.assert_allclose(part.sum(axis=1), 1, rtol=1e-5)


def test_categorical_temperature_is_ten():
    """As in the paper, unless the policy is told otherwise."""
    u = normal(5, 4)
    soft = reference.activation(u, np.zeros_like(u), [4], 10.0)
    for actions in (make_actions(spaces.Discrete(4)), make_policy(OBSERVATION_SPACE, spaces.Discrete(4), **SMALL).actions):
        np.testing.assert_allclose(actions.activation(th.as_tensor(u)).numpy(), soft, rtol=1e-5)
    policy = make_policy(OBSERVATION_SPACE, spaces.Discrete(4), gumbel_temperature=2.0, **SMALL)
    soft = reference.activation(u, np.zeros_like(u), [4], 2.0)
    np.testing.assert_allclose(policy.actions.activation(th.as_tensor(u)).numpy(), soft, rtol=1e-5)


def test_gumbel_noise_is_standard_gumbel(categorical):
    """Also in its tails."""
    space, _, _ = categorical
    actions = make_actions(space)
    like = th.empty(60_000 // actions.dim, actions.dim)
    gumbel = actions.sample_gumbel(like)
    assert (gumbel.shape, gumbel.dtype) == (like.shape, like.dtype)
    assert stats.kstest(gumbel.numpy().ravel(), stats.gumbel_r.cdf).pvalue > 1e-3
    assert gumbel.isfinite().all()
    assert gumbel.min() < -1.8
    assert gumbel.max() > 8


@pytest.mark.parametrize("std, clip", [(0.2, 0.3), (0.6, 0.1)])
def test_categorical_smoothing(categorical, std, clip):
    """One-hots of the largest entries after half of the noise, clipped at half of the bound."""
    space, sizes, _ = categorical
    actions = make_actions(space)
    action = reference.activation(normal(300, actions.dim), np.zeros(1), sizes, 1.0).astype(np.float32)
    noise = 2 * normal(300, actions.dim, seed=2)
    smoothed = actions.smooth(th.as_tensor(action), th.as_tensor(noise), std, clip).numpy()
    np.testing.assert_array_equal(smoothed, reference.smooth(action, noise, sizes, std, clip))
    if sum(sizes) > 1:
        assert (smoothed != reference.smooth(action, 0 * noise, sizes, std, clip)).any()
        assert (smoothed != reference.smooth(action, noise, sizes, 2 * std, 2 * clip)).any()


@pytest.mark.parametrize("u", [[5.0, 0.0], [0.0, 3.0, -4.0]])
@pytest.mark.parametrize("std", [0.2, 0.8])
def test_categorical_exploration_noise(u, std):
    """The argmax of a Gumbel-softmax plus normal noise of half the standard deviation, against the same drawn in NumPy."""
    n, size, rng = 100_000, len(u), np.random.default_rng(0)
    chosen = explore(make_actions(spaces.Discrete(size)), th.tensor(u).expand(n, size), std)
    assert chosen.shape == (n, 1)
    ours = np.bincount(chosen.flatten(), minlength=size) / n

    def frequencies(std):
        soft = reference.activation(np.array(u), rng.gumbel(size=(n, size)), [size])
        noisy = soft + std * rng.normal(size=(n, size))
        return np.bincount(noisy.argmax(axis=1), minlength=size) / n

    # Five standard errors of a difference
    assert np.abs(ours - frequencies(std / 2)).max() < 0.011
    assert np.abs(ours - frequencies(std)).max() > 0.02
    assert np.abs(ours - frequencies(0.0)).max() > 0.02


def test_categorical_exploration_is_in_the_space(categorical):
    """Every value of every dimension is tried."""
    space, sizes, starts = categorical
    actions = make_actions(space)
    chosen = explore(actions, th.zeros(500, actions.dim), 0.2).numpy()
    for i, (size, start) in enumerate(zip(sizes, starts, strict=True)):
        assert set(chosen[:, i].tolist()) == set(range(start, start + size))


def test_categorical_acting_is_argmax_when_deterministic(categorical):
    space, sizes, starts = categorical
    actions = make_actions(space)
    u = normal(50, actions.dim)
    expected = [part.argmax(axis=1) + start for part, start in zip(reference.by_dimension(u, sizes), starts, strict=True)]
    for _ in range(2):
        np.testing.assert_array_equal(act(actions, th.as_tensor(u), deterministic=True).numpy(), np.stack(expected, axis=1))


def test_categorical_acting_is_a_sample_from_softmax_otherwise(categorical):
    """Of u itself, not divided by the temperature; dimensions are independent."""
    space, sizes, starts = categorical
    actions = make_actions(space)
    n, u = 20_000, np.linspace(-1, 1, actions.dim) ** 3
    chosen = act(actions, th.as_tensor(u).float().expand(n, actions.dim), deterministic=False).numpy() - starts
    assert chosen.shape == (n, len(sizes))
    for i, part in enumerate(reference.by_dimension(u, sizes)):
        counts = np.bincount(chosen[:, i], minlength=len(part))
        assert len(counts) == len(part)
        if len(part) > 1:
            assert stats.chisquare(counts, n * reference.softmax(part)).pvalue > 1e-3
    if len(sizes) > 1:
        table = np.zeros(sizes[:2])
        np.add.at(table, tuple(chosen[:, :2].T), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_categorical_predictions_are_in_the_space(categorical):
    """In its shape; deterministic ones are the argmax."""
    space, sizes, starts = categorical
    u = np.random.default_rng(3).normal(size=sum(sizes))
    policy = constant_policy(space, u)
    expected = np.array(
        [part.argmax() + start for part, start in zip(reference.by_dimension(u, sizes), starts, strict=True)]
    ).reshape(space.shape)
    for deterministic in (True, False):
        actions, _ = policy.predict(np.zeros((200, 3), dtype=np.float32), deterministic=deterministic)
        assert actions.shape == (200, *space.shape)
        for action in actions:
            assert space.contains(action.astype(space.dtype))
        assert (actions == expected).all() == (deterministic or sum(sizes) == 1)


# --------------------------------------------------------------------------------------------------------------------
# Spaces that cannot be learned
# --------------------------------------------------------------------------------------------------------------------

ERRORS = {
    "Tuple": (spaces.Tuple([spaces.Discrete(2), spaces.Discrete(3)]), r"not Tuple.*TransformAction"),
    "Dict": (spaces.Dict(a=spaces.Discrete(2)), r"not Dict.*TransformAction"),
    "unbounded": (spaces.Box(-np.inf, np.inf, (2,)), r"finite bounds.*from -inf to inf.*TransformAction"),
    "unbounded above": (
        box_from([0, -2], [1, np.inf]),
        r"finite bounds.*from -2\.0 to inf.*TransformAction",
    ),
    "equal bounds": (
        box_from([-1, 2.5], [1, 2.5]),
        r"from 2\.5 to 2\.5.*remove this dimension",
    ),
    "integer Box": (spaces.Box(0, 7, (2,), dtype=np.int64), r"not int64.*MultiDiscrete"),
    "byte Box": (spaces.Box(0, 255, (2,), dtype=np.uint8), r"not uint8.*MultiDiscrete"),
    "MultiDiscrete of two axes": (spaces.MultiDiscrete([[2, 3], [4, 5]]), r"one axis.*\(2, 2\).*flatten"),
    "MultiBinary of two axes": (spaces.MultiBinary([2, 3]), r"one axis.*\(2, 3\).*flatten"),
}


class EnvWith(gym.Env):
    observation_space = OBSERVATION_SPACE

    def __init__(self, action_space):
        self.action_space = action_space


@pytest.mark.parametrize("space, message", ERRORS.values(), ids=ERRORS)
def test_unsupported_spaces_raise_an_error_at_construction(space, message):
    """It names the value and the remedy, wherever the space comes in."""
    with pytest.raises(ValueError, match=message):
        make_actions(space)
    with pytest.raises(ValueError, match=message):
        make_policy(OBSERVATION_SPACE, space, **SMALL)
    with pytest.raises(ValueError, match=message):
        MRQ("MlpPolicy", EnvWith(space), device="cpu")
