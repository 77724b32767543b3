"""
Every observation space with a Box and a discrete action space: the algorithms learn, and their actions lie in the space.
"""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import BOX, VECTOR, SpaceEnv, learn_and_check, policy_for, tiny_model
from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecFrameStack, VecTransposeImage

from sb3_mrq import DRQ, MRQ

OBSERVATION_SPACES = {
    "flat": VECTOR,
    "one number": spaces.Box(-np.inf, np.inf, (1,), dtype=np.float32),
    "2-D": spaces.Box(-1, 1, (2, 3), dtype=np.float32),
    "3-D floats": spaces.Box(-1, 1, (2, 3, 2), dtype=np.float32),
    "float64": spaces.Box(-5, 5, (3,), dtype=np.float64),
    "float16": spaces.Box(-1, 1, (3,), dtype=np.float16),
    "int64": spaces.Box(-3, 9, (3,), dtype=np.int64),
    "uint8 vector": spaces.Box(0, 255, (5,), dtype=np.uint8),
    "image, channels first": spaces.Box(0, 255, (3, 31, 31), dtype=np.uint8),
    "image, channels last": spaces.Box(0, 255, (31, 31, 3), dtype=np.uint8),
    "grey image": spaces.Box(0, 255, (40, 36, 1), dtype=np.uint8),
    "large image": spaces.Box(0, 255, (100, 70, 3), dtype=np.uint8),
    "Discrete": spaces.Discrete(4),
    "Discrete from 2": spaces.Discrete(4, start=2),
    "Discrete from -3": spaces.Discrete(4, start=-3),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiDiscrete with start": spaces.MultiDiscrete([3, 2], start=[-1, 7]),
    "MultiBinary": spaces.MultiBinary(4),
    "2-D MultiBinary": spaces.MultiBinary((2, 3)),
    "Dict of vectors": spaces.Dict(box=VECTOR, matrix=spaces.Box(-1, 1, (2, 2), dtype=np.float64)),
    "Dict of everything": spaces.Dict(
        {
            "image": spaces.Box(0, 255, (36, 31, 3), dtype=np.uint8),
            "another image": spaces.Box(0, 255, (31, 36, 1), dtype=np.uint8),
            "box": VECTOR,
            "matrix": spaces.Box(-1, 1, (2, 2), dtype=np.float64),
            "discrete": spaces.Discrete(4, start=-3),
            "multi.discrete": spaces.MultiDiscrete([3, 2], start=[-1, 7]),
            "pop": spaces.MultiBinary((2, 3)),
        }
    ),
    "Dict of an image": spaces.Dict(image=spaces.Box(0, 255, (3, 36, 36), dtype=np.uint8)),
}
ACTION_SPACES = {
    "Box": BOX,
    "asymmetric Box": spaces.Box(np.float32([-3, 0, 5]), np.float32([1, 1e6, 5.5])),
    "2-D Box": spaces.Box(-2, 1, (2, 3), dtype=np.float32),
    "float64 Box": spaces.Box(-0.1, 0.7, (2,), dtype=np.float64),
    "Discrete": spaces.Discrete(3),
    "Discrete from 5": spaces.Discrete(3, start=5),
    "Discrete from -2": spaces.Discrete(3, start=-2),
    "MultiDiscrete": spaces.MultiDiscrete([3, 2]),
    "MultiDiscrete with start": spaces.MultiDiscrete([3, 1, 2], start=[4, -2, 0]),
    "MultiBinary": spaces.MultiBinary(3),
}


def batch_of(space, n):
    """Random observations, stacked."""
    samples = [space.sample() for _ in range(n)]
    if isinstance(space, spaces.Dict):
        return {key: np.stack([sample[key] for sample in samples]) for key in space.spaces}
    return np.stack(samples)


BOX_ACTIONS = [name for name, space in ACTION_SPACES.items() if isinstance(space, spaces.Box)]
DISCRETE_ACTIONS = [name for name in ACTION_SPACES if name not in BOX_ACTIONS]
# Observations and actions meet only in the replay buffer and in g, so not every pair is needed: each observation space has one
# Box and one discrete action space, in turn, one of them with MRQ and the other with DRQ
CASES = [
    (observation, actions[i % len(actions)], (MRQ, DRQ)[(i // 4 + j) % 2])
    for i, observation in enumerate(OBSERVATION_SPACES)
    for j, actions in enumerate((BOX_ACTIONS, DISCRETE_ACTIONS))
]


def test_every_pair_is_in_a_case():
    everything = itertools.product((MRQ, DRQ), ACTION_SPACES)
    assert {(algorithm, action) for _, action, algorithm in CASES} == set(everything)


@pytest.mark.parametrize(("observation", "action", "algorithm"), CASES)
def test_learns_and_acts(observation, action, algorithm):
    env = SpaceEnv(OBSERVATION_SPACES[observation], ACTION_SPACES[action], length=4)
    settings = dict(target_update_interval=3, batch_size=4)
    model = tiny_model(env, policy_for(env.observation_space), algorithm=algorithm, **settings)
    learn_and_check(model, 15)
    for deterministic in (True, False):
        single, state = model.predict(env.observation_space.sample(), deterministic=deterministic)
        assert state is None
        assert env.action_space.contains(single), single
        batch, _ = model.predict(batch_of(env.observation_space, 3), deterministic=deterministic)
        assert batch.shape == (3, *env.action_space.shape)
        assert all(env.action_space.contains(one) for one in batch), batch


@pytest.mark.parametrize(
    ("observation", "action"),
    [
        ("flat", "MultiDiscrete with start"),
        ("Discrete from 2", "2-D Box"),
        ("image, channels last", "Discrete from 5"),
        ("Dict of everything", "MultiBinary"),
        ("Dict of everything", "2-D Box"),
    ],
)
def test_several_environments(observation, action):
    space = OBSERVATION_SPACES[observation]
    env = make_vec_env(lambda: SpaceEnv(space, ACTION_SPACES[action], length=5), 3)
    learn_and_check(tiny_model(env, policy_for(space), gradient_steps=1, learning_starts=15), 36)


@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_predict_is_the_same_alone_and_in_a_batch(observation):
    space = OBSERVATION_SPACES[observation]
    space.seed(0)
    model = tiny_model(SpaceEnv(space), policy_for(space))
    batch = batch_of(space, 4)
    actions = model.predict(batch, deterministic=True)[0]
    for i, action in enumerate(actions):
        one = {key: value[i] for key, value in batch.items()} if isinstance(batch, dict) else batch[i]
        np.testing.assert_allclose(model.predict(one, deterministic=True)[0], action, atol=1e-5)


@pytest.mark.parametrize("observation", OBSERVATION_SPACES)
def test_predict_depends_on_the_observation(observation):
    space = OBSERVATION_SPACES[observation]
    space.seed(0)
    model = tiny_model(SpaceEnv(space), policy_for(space))
    actions = model.predict(batch_of(space, 8), deterministic=True)[0]
    assert np.ptp(actions, axis=0).max() > 1e-3


def test_start_of_an_observation_space_does_not_matter():
    shifted, plain = (tiny_model(SpaceEnv(spaces.Discrete(4, start=start))) for start in (-3, 0))
    obs = np.arange(4)
    np.testing.assert_array_equal(shifted.predict(obs - 3, deterministic=True)[0], plain.predict(obs, deterministic=True)[0])


def test_start_of_an_action_space_is_added_to_the_action():
    plain = tiny_model(SpaceEnv(action_space=spaces.Discrete(6)))
    shifted = tiny_model(SpaceEnv(action_space=spaces.Discrete(6, start=5)))
    obs = batch_of(VECTOR, 50)
    actions = plain.predict(obs, deterministic=True)[0]
    assert len(np.unique(actions)) > 1
    np.testing.assert_array_equal(shifted.predict(obs, deterministic=True)[0], actions + 5)


@pytest.mark.parametrize("action", ["Box", "asymmetric Box", "2-D Box", "float64 Box"])
def test_box_actions_reach_their_bounds_and_no_further(action):
    space = ACTION_SPACES[action]
    model = tiny_model(SpaceEnv(action_space=space))
    for sign, bound in ((-1, space.low), (1, space.high)):
        last = [module for module in model.actor.modules() if isinstance(module, th.nn.Linear)][-1]
        th.nn.init.constant_(last.bias, sign * 100.0)
        prediction = model.predict(VECTOR.sample())[0]
        assert space.contains(prediction)
        np.testing.assert_array_equal(prediction, bound)


@pytest.mark.parametrize("action", ["Discrete from 5", "MultiDiscrete with start", "MultiBinary"])
def test_discrete_actions_are_random_only_if_not_deterministic(action):
    model = tiny_model(SpaceEnv(action_space=ACTION_SPACES[action]))
    obs = VECTOR.sample()

    def different(deterministic):
        return len({tuple(np.ravel(model.predict(obs, deterministic=deterministic)[0])) for _ in range(60)})

    assert different(deterministic=True) == 1
    assert different(deterministic=False) > 1


def test_box_actions_are_never_random():
    model = tiny_model(SpaceEnv())
    obs = VECTOR.sample()
    first, second, third = (model.predict(obs, deterministic=deterministic)[0] for deterministic in (False, False, True))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, third)


def test_images_are_seen_channels_first():
    space = spaces.Box(0, 255, (40, 36, 3), dtype=np.uint8)
    model = tiny_model(SpaceEnv(space), "CnnPolicy")
    assert isinstance(model.get_env(), VecTransposeImage)
    assert model.observation_space.shape == (3, 40, 36)
    obs = space.sample()
    np.testing.assert_array_equal(
        model.predict(obs, deterministic=True)[0], model.predict(obs.transpose(2, 0, 1), deterministic=True)[0]
    )


@pytest.mark.parametrize(("space", "wrong"), [(VECTOR, np.zeros(4)), (spaces.Discrete(4), np.zeros((2, 3), dtype=int))])
def test_observation_of_another_shape(space, wrong):
    with pytest.raises(ValueError, match="shape"):
        tiny_model(SpaceEnv(space)).predict(wrong)


@pytest.mark.parametrize("n_envs", [1, 2])
def test_frame_stacks(n_envs):
    """Stacks of SB3 and of gymnasium, which begin an episode with zeros and with copies."""
    space = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
    of_sb3 = VecFrameStack(make_vec_env(lambda: SpaceEnv(space), n_envs), 4)
    grey = spaces.Box(0, 255, (36, 36), dtype=np.uint8)
    of_gymnasium = make_vec_env(lambda: FrameStackObservation(SpaceEnv(grey), 4), n_envs)
    for env, shape in ((of_sb3, (12, 36, 36)), (of_gymnasium, (4, 36, 36))):
        model = tiny_model(env, "CnnPolicy")
        assert model.observation_space.shape == shape
        learn_and_check(model, 24)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "Taxi", "Blackjack-v1"])
def test_toy_text(env_id):
    """Discrete observations; Blackjack's are a Tuple, which gymnasium's FlattenObservation makes a vector."""
    env = gym.make(env_id, max_episode_steps=10)
    if isinstance(env.observation_space, spaces.Tuple):
        env = gym.wrappers.FlattenObservation(env)
    learn_and_check(tiny_model(env), 30)
