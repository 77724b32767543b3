"""
One encoder update and one value and policy update, from the batch to the new weights.

Small agents in float64 are compared with the same computation in NumPy, gradients with finite differences of it.
"""

import copy
from dataclasses import replace

import numpy as np
import numpy_agent as reference
import pytest
import torch as th
from envs import BOX
from gymnasium import spaces
from helpers import (
    NETWORKS,
    TARGETS,
    make_learner,
    make_policy,
    read_weights,
    same,
    set_scales,
    snapshot,
    update_encoder,
    update_value_and_policy,
    write_weights,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sb3_mrq.learner import Noise
from sb3_mrq.networks import EnsembleLinear
from sb3_mrq.policies import CnnPolicy, MultiInputPolicy

OBS_DIM = 3
HORIZON, N_STEPS = 5, 3
SMALL = dict(
    net_arch=dict(encoder=[4, 5], qf=[5, 3, 4], pi=[4, 6]),
    z_s_dim=5,
    z_a_dim=3,
    z_sa_dim=4,
    n_reward_bins=7,
    reward_bins_limit=3,
)
BINS = np.array([np.sign(x) * (np.exp(abs(x)) - 1) for x in np.linspace(-3, 3, 7)])
# Large steps, so that results from old weights differ a lot from results from new ones
RATES = dict(lr=3e-2, encoder_lr=1e-2)
# Number of values of each dimension, None for a Box
SPACES = {
    "box": (spaces.Box(-1, 1, (2,)), None),
    "discrete": (spaces.Discrete(3), [3]),
    "multidiscrete": (spaces.MultiDiscrete([2, 4, 3]), [2, 4, 3]),
}
# A row for each way in which an episode can end within the horizon, or not
ENCODER_ENDS = [None, (1, "terminated"), (2, "truncated"), (0, "terminated"), (4, "terminated")]
VALUE_ENDS = [None, (1, "terminated"), (1, "truncated"), (0, "truncated"), (2, "terminated")]
REWARD_SCALE, TARGET_REWARD_SCALE = 0.7, 1.3


@pytest.fixture
def float64():
    """New tensors are float64, also in networks and reward bins."""
    before = th.get_default_dtype()
    th.set_default_dtype(th.float64)
    yield
    th.set_default_dtype(before)


@pytest.fixture(params=SPACES)
def case(request):
    return SPACES[request.param]


def tensors(*arrays):
    return [None if array is None else th.as_tensor(array) for array in arrays]


class Agent:
    """A small agent whose targets differ from its online networks, with its weights as NumPy sees them."""

    def __init__(self, action_space, n_critics=2, seed=0, **kwargs):
        th.manual_seed(seed)
        rng = np.random.default_rng(seed)
        self.policy = make_policy(spaces.Box(-np.inf, np.inf, (OBS_DIM,)), action_space, n_critics=n_critics, **RATES, **SMALL)
        self.learner = make_learner(self.policy, **kwargs)
        for name in NETWORKS + TARGETS:
            network = getattr(self.policy, name)
            weights = read_weights(network)
            # Biases are zero at first, and targets equal
            write_weights(network, {key: value + 0.2 * rng.normal(size=value.shape) for key, value in weights.items()})
        set_scales(self.policy, REWARD_SCALE, TARGET_REWARD_SCALE)

    def networks(self, names=NETWORKS):
        return {name: getattr(self.policy, name) for name in names}

    @property
    def weights(self):
        return {key: value for network in self.networks().values() for key, value in read_weights(network).items()}

    @property
    def target_weights(self):
        return {key: value for network in self.networks(TARGETS).values() for key, value in read_weights(network).items()}


def random_actions(rng, sizes, *shape):
    if sizes is None:
        return rng.uniform(-1, 1, size=(*shape, 2))
    return np.concatenate([reference.one_hot(rng.integers(size, size=shape), size) for size in sizes], axis=-1)


def flags(ends, horizon):
    """Terminations and mask; past the end of an episode there are terminations of others, for the mask to hide."""
    mask = reference.alive(ends, horizon)
    return reference.ended(ends, horizon, kinds=("terminated",)) + (1 - mask), mask


class EncoderBatch:
    def __init__(self, sizes, seed):
        rng = np.random.default_rng(seed)
        self.observations = rng.normal(size=(len(ENCODER_ENDS), HORIZON + 1, OBS_DIM))
        self.actions = random_actions(rng, sizes, len(ENCODER_ENDS), HORIZON)
        # Some lie beyond the outer bins
        self.rewards = rng.normal(scale=10, size=(len(ENCODER_ENDS), HORIZON))
        self.terminated, self.mask = flags(ENCODER_ENDS, HORIZON)

    def update(self, agent, **kwargs):
        batch = tensors(self.observations, self.actions, self.rewards, self.terminated, self.mask)
        return update_encoder(agent.learner, *batch, **kwargs)

    def terms(self, weights, target_weights):
        return reference.encoder_terms(
            weights, target_weights, self.observations, self.actions, self.rewards, ENCODER_ENDS, BINS
        )


class ValueBatch:
    def __init__(self, sizes, seed):
        rng = np.random.default_rng(seed)
        self.sizes = sizes
        self.observations, self.next_observations = rng.normal(size=(2, len(VALUE_ENDS), OBS_DIM))
        self.actions = random_actions(rng, sizes, len(VALUE_ENDS))
        self.rewards = rng.normal(size=(len(VALUE_ENDS), N_STEPS))
        self.terminated, self.mask = flags(VALUE_ENDS, N_STEPS)
        self.normal = rng.normal(scale=2, size=self.actions.shape)
        self.target_gumbel, self.policy_gumbel = (None, None) if sizes is None else rng.gumbel(size=(2, *self.actions.shape))

    def update(self, agent):
        batch = (self.observations, self.actions, self.rewards, self.terminated, self.mask, self.next_observations)
        noise = Noise(*tensors(self.normal, self.target_gumbel, self.policy_gumbel))
        return update_value_and_policy(agent.learner, *tensors(*batch), noise)

    def target(self, target_weights):
        noise = (self.normal, self.target_gumbel)
        return reference.value_target(
            target_weights,
            self.rewards,
            VALUE_ENDS,
            self.next_observations,
            REWARD_SCALE,
            TARGET_REWARD_SCALE,
            noise,
            self.sizes,
        )

    def value_loss_function(self, weights, y):
        """The value loss as a function of the weights of the heads; embeddings come from the online encoder."""
        z_sa = reference.g(weights, reference.f(weights, self.observations), self.actions)
        return lambda weights: reference.value_loss(reference.q(weights, z_sa), y)

    def policy_loss_function(self, weights):
        """The policy loss as a function of all weights except f's."""
        z_s = reference.f(weights, self.observations)
        return lambda weights: reference.policy_loss(weights, z_s, self.policy_gumbel, self.sizes)


def assert_close(ours, expected, rtol=1e-10, atol=1e-12):
    """Numbers, arrays, or dicts of arrays."""
    if isinstance(expected, dict):
        assert ours.keys() == expected.keys()
        for name in expected:
            np.testing.assert_allclose(ours[name], expected[name], rtol=rtol, atol=atol, err_msg=name)
    else:
        np.testing.assert_allclose(np.asarray(ours), expected, rtol=rtol, atol=atol)


def assert_gradient(ours, differences):
    """Finite differences are good to about seven digits."""
    assert reference.norm(differences) > 1e-3
    assert_close(ours, differences, rtol=1e-5, atol=1e-8 + 1e-7 * max(np.abs(value).max() for value in differences.values()))


# --------------------------------------------------------------------------------------------------------------------
# Against NumPy
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("termination_switch", [0.0, 1.0])
def test_encoder_update(float64, case, termination_switch):
    """Section 3: losses, the gradients of f, g and m (of the first update), and their weights after each of two updates."""
    action_space, sizes = case
    agent = Agent(action_space)
    optimiser = reference.AdamW(RATES["encoder_lr"])
    for seed in (1, 2):
        batch, weights, target_weights = EncoderBatch(sizes, seed), agent.weights, agent.target_weights
        terms = batch.terms(weights, target_weights)
        if seed == 1:
            differences = reference.numeric_gradient(
                lambda weights, batch=batch, target=target_weights: reference.encoder_loss(
                    batch.terms(weights, target), termination_switch
                ),
                weights,
                read_weights(agent.policy.encoder),
            )

        metrics = batch.update(agent, termination_switch=termination_switch)

        assert_close(metrics.encoder_loss, reference.encoder_loss(terms, termination_switch))
        for name in ("dynamics", "reward"):
            assert_close(getattr(metrics, f"{name}_loss"), terms[name])
        gradients = read_weights(agent.policy.encoder, "grad")
        if seed == 1:
            assert_gradient(gradients, differences)
        assert_close(read_weights(agent.policy.encoder), optimiser.step(weights, gradients))


def test_termination_term(float64):
    """Section 3: the termination term is always reported, and is in the loss only if it is switched on."""
    action_space, sizes = SPACES["box"]
    batch = EncoderBatch(sizes, seed=1)
    agents = [Agent(action_space) for _ in range(2)]
    expected = batch.terms(agents[0].weights, agents[0].target_weights)["termination"]
    without, with_term = [
        batch.update(agent, termination_switch=switch) for agent, switch in zip(agents, (0.0, 1.0), strict=True)
    ]
    assert_close(with_term.termination_loss, expected)
    assert_close(with_term.encoder_loss - without.encoder_loss, 0.1 * expected)


def test_termination_switch_may_be_a_tensor(float64):
    """A graph that was captured reads the switch from memory."""
    action_space, sizes = SPACES["discrete"]
    weights = []
    for switch in (0.0, th.tensor(0.0), 1.0, th.tensor(1.0)):
        agent = Agent(action_space)
        EncoderBatch(sizes, seed=1).update(agent, termination_switch=switch)
        weights.append(read_weights(agent.policy.encoder)["m.weight"])
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[2], weights[3])
    assert np.abs(weights[0] - weights[2]).max() > 1e-3


@pytest.mark.parametrize("n_critics", [2, 3])
def test_value_and_policy_update(float64, case, n_critics):
    """Sections 4 to 7: losses, gradients of Q and pi, their weights after each of two updates, and priorities."""
    action_space, sizes = case
    agent = Agent(action_space, n_critics)
    optimisers = {name: reference.AdamW(RATES["lr"]) for name in ("critic", "actor")}
    errors = []
    for seed in (1, 2):
        batch, weights = ValueBatch(sizes, seed), agent.weights
        y = batch.target(agent.target_weights)
        values = reference.q(weights, reference.g(weights, reference.f(weights, batch.observations), batch.actions))
        value_loss = batch.value_loss_function(weights, y)
        critic_differences = reference.numeric_gradient(value_loss, weights, read_weights(agent.policy.critic))

        priorities, metrics = batch.update(agent)

        errors.append(np.abs(values - y))
        assert_close(priorities, reference.priority(values, y))
        assert_close(metrics.critic_loss, value_loss(weights))
        assert_close(metrics.q_value, values.mean())
        assert_close(metrics.td_error, np.abs(values - y).mean())
        assert_close(metrics.critic_grad_norm, reference.norm(critic_differences), rtol=1e-6)
        # Without the gradient of the policy loss
        critic_gradients = read_weights(agent.policy.critic, "grad")
        assert_gradient(critic_gradients, critic_differences)
        new_critic = read_weights(agent.policy.critic)
        assert_close(new_critic, optimisers["critic"].step(weights, critic_gradients))

        # The policy loss uses the heads as just updated
        policy_loss = batch.policy_loss_function(weights)
        assert_close(metrics.actor_loss, policy_loss(weights | new_critic))
        assert abs(policy_loss(weights | new_critic) - policy_loss(weights)) > 1e-3
        actor_differences = reference.numeric_gradient(policy_loss, weights | new_critic, read_weights(agent.policy.actor))
        actor_gradients = read_weights(agent.policy.actor, "grad")
        assert_gradient(actor_gradients, actor_differences)
        assert_close(read_weights(agent.policy.actor), optimisers["actor"].step(weights, actor_gradients))
    # Both parts of the Huber loss were there
    assert np.min(errors) < 1 < np.max(errors)


@pytest.mark.parametrize("n_critics", [2, 3])
@pytest.mark.parametrize("strength", ["all heads together", "every head"])
def test_clipping(float64, n_critics, strength):
    """Section 4: the gradient norm is bounded over all heads together, also where no single head exceeds the bound."""
    action_space, sizes = SPACES["box"]
    agent, batch = Agent(action_space, n_critics), ValueBatch(sizes, seed=1)
    weights = agent.weights
    value_loss = batch.value_loss_function(weights, batch.target(agent.target_weights))
    unclipped = reference.numeric_gradient(value_loss, weights, read_weights(agent.policy.critic))
    heads = [
        reference.norm({name: value for name, value in unclipped.items() if name.startswith(f"q{head + 1}.")})
        for head in range(n_critics)
    ]
    bound = 0.5 * (max(heads) + reference.norm(unclipped)) if strength == "all heads together" else 0.1 * min(heads)
    assert bound < reference.norm(unclipped)
    agent.learner.hyperparameters = replace(agent.learner.hyperparameters, max_grad_norm=bound)

    _, metrics = batch.update(agent)

    assert_close(metrics.critic_grad_norm, reference.norm(unclipped), rtol=1e-6)
    gradients = read_weights(agent.policy.critic, "grad")
    assert_close(reference.norm(gradients), bound, rtol=1e-4)
    assert_close(gradients, reference.clip(unclipped, bound), rtol=1e-4, atol=1e-6 * bound)
    assert_close(read_weights(agent.policy.critic), reference.AdamW(RATES["lr"]).step(weights, gradients))


# --------------------------------------------------------------------------------------------------------------------
# What an update leaves alone
# --------------------------------------------------------------------------------------------------------------------


def test_encoder_update_changes_the_encoder_alone(float64, case):
    """Section 3: no target gets a gradient, values and policy are not touched."""
    action_space, sizes = case
    agent = Agent(action_space)
    networks = agent.networks(NETWORKS + TARGETS)
    before = {name: snapshot(network) for name, network in networks.items()}
    EncoderBatch(sizes, seed=1).update(agent)
    after = {name: snapshot(network) for name, network in networks.items()}
    assert [name for name in networks if not same(before[name], after[name])] == ["encoder"]
    assert [name for name in networks if any(p.grad is not None for p in networks[name].parameters())] == ["encoder"]


def test_value_and_policy_update_changes_values_and_policy_alone(float64, case):
    """Sections 4 and 5: nothing is accumulated into f, g and m, not even onto a gradient that is there already."""
    action_space, sizes = case
    agent = Agent(action_space)
    networks = agent.networks(NETWORKS + TARGETS)
    for parameter in networks["encoder"].parameters():
        parameter.grad = th.full_like(parameter, 7.0)
    before = {name: snapshot(network) for name, network in networks.items()}
    ValueBatch(sizes, seed=1).update(agent)
    after = {name: snapshot(network) for name, network in networks.items()}
    assert [name for name in networks if not same(before[name], after[name])] == ["critic", "actor"]
    assert all((parameter.grad == 7).all() for parameter in networks["encoder"].parameters())
    assert all(parameter.grad is None for name in TARGETS for parameter in networks[name].parameters())


def test_gradients_of_earlier_updates_are_forgotten(float64):
    """Sections 3 to 5: what lies in ``.grad`` before an update is of no effect on it."""
    action_space, sizes = SPACES["box"]
    agent = Agent(action_space)
    disturbed = copy.deepcopy(agent)
    for network in disturbed.networks().values():
        for parameter in network.parameters():
            parameter.grad = th.full_like(parameter, 7.0)
    for each in (agent, disturbed):
        EncoderBatch(sizes, seed=1).update(each)
        ValueBatch(sizes, seed=2).update(each)
    assert_close(agent.weights, disturbed.weights)


@pytest.mark.parametrize("fill", [0.0, 1e6, -1e6])
def test_nothing_past_the_end_of_an_episode_matters(float64, fill):
    """Sections 3 and 4: observations, actions and rewards of later steps have no effect."""
    action_space, sizes = SPACES["box"]
    encoder_batch, value_batch = EncoderBatch(sizes, seed=1), ValueBatch(sizes, seed=2)
    agent = Agent(action_space)
    other = copy.deepcopy(agent)
    encoder_batch.update(agent)
    value_batch.update(agent)

    hidden = encoder_batch.mask == 0
    encoder_batch.rewards[hidden] = fill
    encoder_batch.actions[hidden] = np.sign(fill)
    encoder_batch.observations[:, 1:][hidden] = fill
    value_batch.rewards[value_batch.mask == 0] = fill
    # Not used if the episode terminates
    value_batch.next_observations[[1, 4]] = fill
    encoder_batch.update(other)
    value_batch.update(other)
    assert_close(agent.weights, other.weights)


# --------------------------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------------------------


def paper_policy(suite):
    if suite == "HalfCheetah":
        return make_policy(spaces.Box(-np.inf, np.inf, (17,)), spaces.Box(-1, 1, (6,)))
    return make_policy(spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(18), CnnPolicy)


def random_batches(policy, batch_size):
    """Arguments of an encoder update and of a value and policy update, vector observations."""
    obs_dim, action_dim = policy.observation_space.shape[0], policy.actions.dim
    rewards, mask = th.randn(batch_size, HORIZON), th.ones(batch_size, HORIZON)
    terminated, actions = th.zeros(batch_size, HORIZON), th.rand(batch_size, HORIZON, action_dim)
    obs = th.randn(batch_size, HORIZON + 1, obs_dim)
    encoder_batch = (obs, actions, rewards, terminated, mask)
    short = (rewards[:, :N_STEPS], terminated[:, :N_STEPS], mask[:, :N_STEPS])
    return encoder_batch, (obs[:, 0], actions[:, 0], *short, obs[:, N_STEPS])


def test_arithmetic_of_an_update():
    """
    Sections 5 and 12: products of matrices at the sizes of HalfCheetah. Weight gradients of the encoder or of the heads in the
    policy loss, computed and thrown away, would be too much.
    """
    policy = paper_policy("HalfCheetah")
    learner = make_learner(policy)
    encoder_batch, value_batch = random_batches(policy, 256)
    with FlopCounterMode(display=False) as encoder_counter:
        update_encoder(learner, *encoder_batch)
    with FlopCounterMode(display=False) as value_counter:
        update_value_and_policy(learner, *value_batch)
    # Far fewer would mean that they are not counted
    assert 9e9 < encoder_counter.get_total_flops() <= 11.6e9
    assert 6e9 < value_counter.get_total_flops() <= 8.0e9


def linear_size(inputs, outputs):
    return inputs * outputs + outputs


@pytest.mark.parametrize("suite, n_actions, millions", [("HalfCheetah", 6, 3.86), ("Atari", 18, 4.16)])
def test_number_of_parameters(suite, n_actions, millions):
    """Section 2: the published sizes, and the same layer by layer."""
    if suite == "HalfCheetah":
        extractor = linear_size(17, 512) + linear_size(512, 512) + linear_size(512, 512)
    else:
        extractor = linear_size(4 * 9, 32) + 3 * linear_size(32 * 9, 32) + linear_size(1568, 512)
    g = linear_size(n_actions, 256) + linear_size(512 + 256, 512) + 2 * linear_size(512, 512)
    m = linear_size(512, 1 + 512 + 65)
    heads = 2 * (3 * linear_size(512, 512) + linear_size(512, 1))
    pi = 2 * linear_size(512, 512) + linear_size(512, n_actions)
    expected = {"encoder": extractor + g + m, "critic": heads, "actor": pi}

    policy = paper_policy(suite)
    sizes = {name: sum(p.numel() for p in getattr(policy, name).parameters() if p.requires_grad) for name in NETWORKS}
    assert sizes == expected
    assert round(sum(sizes.values()) / 1e6, 2) == millions
    assert not any(p.requires_grad for name in TARGETS for p in getattr(policy, name).parameters())


@pytest.mark.parametrize("suite", ["HalfCheetah", "Atari"])
def test_initialisation(suite):
    """Section 2: Xavier-uniform weights with gain sqrt(2), zero biases, in every layer and every head."""
    th.manual_seed(0)
    policy = paper_policy(suite)
    layers = {key: value for name in NETWORKS for key, value in read_weights(getattr(policy, name)).items()}
    for name, value in layers.items():
        if name.endswith("bias"):
            assert not value.any(), name
            continue
        fan_out, fan_in = (size * int(np.prod(value.shape[2:])) for size in value.shape[:2])
        bound = np.sqrt(2) * np.sqrt(6 / (fan_in + fan_out))
        assert 0.97 * bound < np.abs(value).max() <= bound * (1 + 1e-6), name
        tolerance = 4 / np.sqrt(value.size)
        assert abs(value.mean()) < tolerance * bound, name
        assert abs(value.std() / (bound / np.sqrt(3)) - 1) < tolerance, name
    assert np.abs(layers["q1.1.weight"] - layers["q2.1.weight"]).max() > 0


@pytest.mark.parametrize("size, keeps_scale", [(1, True), (2, True), (3, False)])
@pytest.mark.parametrize("in_dict", [False, True])
def test_scale_of_small_observations(size, keeps_scale, in_dict):
    """Layer norm of W x is the same for x and 10 x, so observations of one or two numbers have random biases."""
    space = spaces.Box(-10, 10, (size,))
    th.manual_seed(0)
    policy = make_policy(spaces.Dict(x=space), BOX, MultiInputPolicy) if in_dict else make_policy(space, BOX)
    obs = th.linspace(0.3, 0.9, size).repeat(2, 1) * th.tensor([[1.0], [10.0]])
    with th.no_grad():
        small, large = policy.encoder.state({"x": obs} if in_dict else obs)
    difference = (small - large).norm() / small.norm()
    assert difference > 0.1 if keeps_scale else difference < 1e-3


# --------------------------------------------------------------------------------------------------------------------
# Nothing waits for the device
# --------------------------------------------------------------------------------------------------------------------


class NoHostSynchronisation(TorchDispatchMode):
    """Raises where the host needs a value, or a shape that depends on values."""

    FORBIDDEN = (
        th.ops.aten._local_scalar_dense,
        th.ops.aten.is_nonzero,
        th.ops.aten.equal,
        th.ops.aten.nonzero,
        th.ops.aten.masked_select,
        th.ops.aten.unique_dim,
        th.ops.aten._unique2,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        selects = func.overloadpacket in (th.ops.aten.index, th.ops.aten.index_put, th.ops.aten.index_put_)
        by_mask = selects and any(index is not None and index.dtype == th.bool for index in args[1])
        if func.overloadpacket in self.FORBIDDEN or by_mask:
            raise RuntimeError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("read", [th.Tensor.item, bool, float, th.nonzero, lambda x: x[x > 0]])
def test_host_synchronisation_is_noticed(read):
    """The mode does what the next test relies on."""
    with pytest.raises(RuntimeError, match="waits"), NoHostSynchronisation():
        read(th.ones(1))


def test_updates_do_not_wait_for_the_device(case):
    """No ``.item()``, no ``if tensor``, no shape that depends on values, from the noise to the priorities."""
    action_space, _ = case
    policy = make_policy(spaces.Box(-np.inf, np.inf, (OBS_DIM,)), action_space, **SMALL)
    learner = make_learner(policy)
    encoder_batch, value_batch = random_batches(policy, 4)
    for _ in range(2):  # the first update also sets the optimisers up
        with NoHostSynchronisation():
            learner.replace_targets()
            metrics = update_encoder(learner, *encoder_batch, termination_switch=th.ones(()))
            priorities, more_metrics = update_value_and_policy(learner, *value_batch)
    entries = [*vars(metrics).values(), *vars(more_metrics).values()]
    assert all(entry.shape == () for entry in entries)
    assert not any(entry.requires_grad for entry in (*entries, priorities))


def test_replacing_the_targets_copies_every_network(float64):
    """Section 2: wholesale, no averaging, and into memory of their own."""
    agent = Agent(SPACES["box"][0])
    before = {name: snapshot(network) for name, network in agent.networks().items()}
    agent.learner.replace_targets()
    for name, target in zip(NETWORKS, TARGETS, strict=True):
        assert same(snapshot(getattr(agent.policy, target)), before[name])
    EncoderBatch(None, seed=1).update(agent)
    ValueBatch(None, seed=1).update(agent)
    for name, target in zip(NETWORKS, TARGETS, strict=True):
        assert same(snapshot(getattr(agent.policy, target)), before[name])
        assert not same(snapshot(getattr(agent.policy, name)), before[name])


def test_ensemble_layers_are_independent():
    """Section 2: each head sees its own weights and its own input alone."""
    layer = EnsembleLinear(3, 4, 2)
    x = th.randn(3, 5, 4, requires_grad=True)
    out = layer(x)
    for head in range(3):
        gradient, weight_gradient = th.autograd.grad(out[head].sum(), [x, layer.weight], retain_graph=True)
        assert [bool(part.any()) for part in gradient] == [i == head for i in range(3)]
        assert [bool(part.any()) for part in weight_gradient] == [i == head for i in range(3)]
