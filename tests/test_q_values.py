"""
``q_values``: the critic's values of observations and actions as a user has them, in units of the reward.
"""

from copy import deepcopy

import numpy as np
import pytest
import torch as th
from envs import BOX, IMAGE, VECTOR, SpaceEnv, policy_for, tiny_model
from gymnasium import spaces
from helpers import same, snapshot
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

OBSERVATIONS = {
    "vector": VECTOR,
    "image": IMAGE,
    "discrete": spaces.Discrete(4, start=2),
    "dict": spaces.Dict(image=IMAGE, vector=VECTOR, discrete=spaces.Discrete(3)),
}
WIDE = spaces.Box(np.float32([[-3, 0, 5]]), np.float32([[1, 1e3, 5.5]]))


def one_hot(numbers, sizes):
    return np.concatenate([np.eye(size)[number] for number, size in zip(numbers, sizes, strict=True)])


# Action space, and the vector for one of its actions, written down by hand
ACTIONS = {
    "box": (WIDE, lambda a: (2 * (a - WIDE.low) / (WIDE.high - WIDE.low) - 1).ravel()),
    "discrete": (spaces.Discrete(3, start=5), lambda a: one_hot([a - 5], [3])),
    "multi": (spaces.MultiDiscrete([3, 2], start=[4, -2]), lambda a: one_hot(a - [4, -2], [3, 2])),
    "binary": (spaces.MultiBinary(3), lambda a: one_hot(a, [2, 2, 2])),
}


def batch_of(space, n):
    rows = [space.sample() for _ in range(n)]
    return {key: np.stack([row[key] for row in rows]) for key in space} if isinstance(space, spaces.Dict) else np.stack(rows)


def by_hand(model, obs, vectors):
    """The values of single networks, from observations in the order of axes of the environment."""

    def tensor(value):
        return th.as_tensor(np.moveaxis(value, -1, 1) if value.ndim == 4 else value)

    obs = {key: tensor(value) for key, value in obs.items()} if isinstance(obs, dict) else tensor(obs)
    with th.no_grad():
        z_s = model.encoder.state(model.policy.preprocess(obs))
        z_sa = model.encoder.state_action(z_s, th.as_tensor(np.stack(vectors), dtype=th.float32))
        return model.critic(z_sa).numpy() * model.reward_scale


def make_model(observation_space, action_space):
    for space in (observation_space, action_space):
        space.seed(0)
    model = tiny_model(SpaceEnv(observation_space, action_space), policy_for(observation_space), {"n_critics": 3})
    model.reward_scale, model.target_reward_scale = 3.5, 100.0
    return model


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_values_of_actions(observation, action):
    observation_space, (action_space, vector) = OBSERVATIONS[observation], ACTIONS[action]
    model = make_model(observation_space, action_space)
    obs, actions = batch_of(observation_space, 4), batch_of(action_space, 4)
    q = model.q_values(obs, actions)
    assert q.shape == (4, 3) and q.dtype == np.float32
    np.testing.assert_allclose(q, by_hand(model, obs, [vector(action) for action in actions]), rtol=1e-4, atol=1e-5)
    one = {key: value[1] for key, value in obs.items()} if isinstance(obs, dict) else obs[1]
    np.testing.assert_allclose(model.q_values(one, actions[1]), q[1], rtol=1e-4, atol=1e-5)
    # What predict gives it takes
    assert model.q_values(obs, model.predict(obs)[0]).shape == (4, 3)
    assert model.q_values(one, model.predict(one)[0]).shape == (3,)


@pytest.mark.parametrize("observation", OBSERVATIONS)
def test_values_of_all_actions(observation):
    observation_space, action_space = OBSERVATIONS[observation], spaces.Discrete(4, start=-1)
    model = make_model(observation_space, action_space)
    obs = batch_of(observation_space, 3)
    q = model.q_values(obs)
    assert q.shape == (3, 4, 3)
    for i in range(4):
        np.testing.assert_allclose(q[:, i], model.q_values(obs, np.full(3, i - 1)), rtol=1e-4, atol=1e-5)
        # A column, as replay buffers store them
        np.testing.assert_allclose(q[:, i], model.q_values(obs, np.full((3, 1), i - 1)), rtol=1e-4, atol=1e-5)
    one = {key: value[1] for key, value in obs.items()} if isinstance(obs, dict) else obs[1]
    np.testing.assert_allclose(model.q_values(one), q[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("action_space", [WIDE, spaces.Discrete(3, start=5)], ids=["Box", "Discrete"])
def test_same_as_in_an_update(action_space):
    """In units of the reward, as the update's are of the reward scale."""
    model = tiny_model(SpaceEnv(action_space=action_space, reward=20.0), precision="float32")
    model.learn(40)
    assert model.reward_scale > 5
    samples = model.replay_buffer.sample_n_step(16)
    seen = []
    value_loss = model.learner.value_loss

    def noted(*args):
        seen.append(value_loss(*args))
        return seen[-1]

    model.learner.value_loss = noted
    model.learner.transform_losses(lambda function: function)
    actions = samples.actions.numpy().reshape(16, *action_space.shape)
    q = model.q_values(samples.observations.numpy(), model.policy.unscale_action(actions) if action_space is WIDE else actions)
    model.learner.update_value_and_policy(samples)
    ((_, q_of_update),) = seen
    np.testing.assert_allclose(q, q_of_update.numpy() * model.reward_scale, rtol=1e-3, atol=1e-4)
    # They have changed with the update
    assert not np.allclose(model.q_values(samples.observations.numpy()[0], model.action_space.sample()), q[0], rtol=1e-6)


def test_nothing_is_changed():
    env = VecNormalize(make_vec_env(SpaceEnv, 2))
    model = tiny_model(env, policy_kwargs={"activation_fn": th.nn.RReLU})
    model.learn(30)
    obs = env.reset()
    statistics, weights = deepcopy(vars(env.obs_rms) | {"return": vars(env.ret_rms)}), snapshot(model.policy)
    model.policy.set_training_mode(True)
    state = th.get_rng_state()
    first = model.q_values(obs, np.zeros((2, 2)))
    # Activations that are random in training are not random here
    np.testing.assert_array_equal(first, model.q_values(obs, np.zeros((2, 2))))
    assert th.equal(th.get_rng_state(), state)
    np.testing.assert_equal(vars(env.obs_rms) | {"return": vars(env.ret_rms)}, statistics)
    assert same(weights, snapshot(model.policy))


def test_without_an_environment(tmp_path):
    model = make_model(VECTOR, spaces.Discrete(3))
    obs = batch_of(VECTOR, 2)
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model", device="cpu")
    np.testing.assert_array_equal(loaded.q_values(obs), model.q_values(obs))


@pytest.mark.parametrize(
    ("action_space", "obs", "actions", "message"),
    [
        (BOX, np.zeros((2, 3)), None, r"actions of Box.* cannot be listed: pass actions"),
        (spaces.MultiBinary(2), np.zeros(3), None, r"cannot be listed: pass actions"),
        (BOX, np.zeros((2, 3)), np.zeros((3, 2)), "3 actions for 2 observations"),
        (BOX, np.zeros((2, 3)), np.zeros((1, 2)), "1 actions for 2 observations"),
        (BOX, np.zeros((2, 3)), np.zeros(2), r"shape \(\), but must have \(2,\)"),
        (BOX, np.zeros(3), np.zeros((1, 2)), r"shape \(1, 2\), but must have \(2,\)"),
        (BOX, np.zeros((2, 3)), np.zeros((2, 1)), r"shape \(1,\), but must have \(2,\)"),
        (spaces.Discrete(3), np.zeros((2, 3)), np.array([0, 3]), r"\[0, 3\] are not all in the action space Discrete\(3\)"),
        (spaces.Discrete(3), np.zeros((2, 3)), np.array([0.0, 1.5]), r"are not all in the action space"),
        (spaces.Discrete(3), np.zeros((2, 3)), 1, r"must have \(\)|actions for 2|shape"),
        (spaces.MultiDiscrete([3, 2]), np.zeros(3), np.array([0, 2]), r"are not all in the action space"),
        (BOX, (np.zeros(3), {}), np.zeros(2), "tuple, perhaps what reset returned"),
    ],
)
def test_what_does_not_fit(action_space, obs, actions, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(SpaceEnv(action_space=action_space)).q_values(obs, actions)
