"""
What cannot work is refused at once, by an error that names the value and the remedy, and nothing that was learned is lost.
"""

import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from envs import (
    BOX,
    IMAGE,
    VECTOR,
    CounterEnv,
    Faulty,
    SpaceEnv,
    check_counter_transitions,
    learn_and_check,
    policy_for,
    tiny_model,
)
from gymnasium import spaces
from gymnasium.wrappers import FlattenObservation, ResizeObservation, TransformObservation
from stable_baselines3 import PPO, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_mrq import MRQ, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.buffers.frames import ObservationStorage
from sb3_mrq.checks import BadValueError

DICT = spaces.Dict(image=IMAGE, vector=VECTOR)
COUNTS = ("n_steps", "encoder_horizon", "batch_size", "target_update_interval")


def box(low, high):
    return spaces.Box(np.array(low, dtype=np.float32), np.array(high, dtype=np.float32))


@pytest.mark.parametrize(
    ("action_space", "value", "remedy"),
    [
        (box([-1, -np.inf], [1, np.inf]), "from -inf to inf", "give bounds"),
        (box([-1, -1], [1, np.inf]), "from -1.0 to inf", "give bounds"),
        (box([-1, 2], [1, 2]), "from 2.0 to 2.0", "remove this dimension"),
        (spaces.Box(0, 5, (2,), dtype=np.int64), "int64", "MultiDiscrete"),
        (spaces.Tuple([BOX, BOX]), "Tuple", "convert it"),
        (spaces.Dict(a=BOX), "Dict", "convert it"),
        (spaces.MultiDiscrete([[2, 3], [3, 2]]), "(2, 2)", "flatten"),
        (spaces.MultiBinary((2, 2)), "(2, 2)", "flatten"),
    ],
)
def test_action_space(action_space, value, remedy):
    with pytest.raises(ValueError, match=re.escape(value)) as info:
        tiny_model(SpaceEnv(action_space=action_space))
    assert remedy in str(info.value)
    model = tiny_model(SpaceEnv())
    with pytest.raises(ValueError, match=re.escape(value)):
        model.set_env(SpaceEnv(action_space=action_space))


@pytest.mark.parametrize("space", [spaces.Tuple([VECTOR, VECTOR]), spaces.Dict(a=spaces.Dict(b=VECTOR))])
def test_observation_space(space):
    with pytest.raises(ValueError, match=r"(Tuple|Dict).* not supported|not supported.*(Tuple|Dict)"):
        tiny_model(SpaceEnv(space), "MultiInputPolicy")


def test_observation_space_without_entries():
    with pytest.raises(ValueError, match=r"observation space Dict\(\) has no entries"):
        tiny_model(SpaceEnv(spaces.Dict({})), "MultiInputPolicy")


@pytest.mark.parametrize(
    ("algorithm", "policy", "spaces_of_env"),
    [
        (TD3, "MultiInputPolicy", {"observation_space": spaces.Dict(a=spaces.Dict(b=VECTOR))}),
        (TD3, "MlpPolicy", {"observation_space": spaces.Tuple([VECTOR, VECTOR])}),
        (TD3, "MlpPolicy", {"observation_space": spaces.MultiDiscrete([[2, 3], [3, 2]])}),
        (TD3, "CnnPolicy", {"observation_space": VECTOR}),
        (TD3, "MlpPolicy", {"action_space": box([-1, -1], [1, np.inf])}),
        (TD3, "MlpPolicy", {"action_space": spaces.Tuple([BOX, BOX])}),
        (PPO, "MlpPolicy", {"action_space": spaces.MultiBinary((2, 2))}),
    ],
)
def test_spaces_raise_what_stable_baselines3_raises(algorithm, policy, spaces_of_env):
    """And a ValueError in any case, as everything that is refused."""
    with pytest.raises((ValueError, NotImplementedError, AssertionError)) as info:
        algorithm(policy, SpaceEnv(**spaces_of_env))
    with pytest.raises(info.type) as ours:
        tiny_model(SpaceEnv(**spaces_of_env), policy)
    assert isinstance(ours.value, ValueError)


@pytest.mark.parametrize("shape", [(3, 30, 31), (3, 31, 30), (8, 8, 3)])
def test_images_too_small(shape):
    image = spaces.Box(0, 255, shape, dtype=np.uint8)
    size = "30x31|31x30|8x8"
    for space, policy in ((image, "CnnPolicy"), (spaces.Dict(image=image), "MultiInputPolicy")):
        with pytest.raises(ValueError, match=size) as info:
            tiny_model(SpaceEnv(space), policy)
        assert "31x31" in str(info.value) and "features_extractor_class" in str(info.value)


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy"])
def test_ways_to_learn_from_small_images(policy):
    """Both policies name them, and they work."""
    small = spaces.Box(0, 255, (7, 7, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"31x31.*features_extractor_class=FlattenExtractor.*FlattenObservation"):
        tiny_model(SpaceEnv(small), policy)
    learn_and_check(tiny_model(SpaceEnv(small), policy, {"features_extractor_class": FlattenExtractor}), 30)
    if policy == "CnnPolicy":
        learn_and_check(tiny_model(ResizeObservation(SpaceEnv(small), (32, 32)), policy), 30)


def test_way_to_learn_from_small_images_in_a_dict():
    env = SpaceEnv(spaces.Dict(image=spaces.Box(0, 255, (7, 7, 3), dtype=np.uint8), direction=spaces.Discrete(4)))
    with pytest.raises(ValueError, match=r"in a Dict, gymnasium.wrappers.FlattenObservation with MlpPolicy"):
        tiny_model(env, "MultiInputPolicy")
    learn_and_check(tiny_model(FlattenObservation(env)), 30)


def test_float_images_whose_channels_come_last():
    last = spaces.Box(0, 1, (36, 36, 3), dtype=np.float32)
    kwargs = {"normalize_images": False}
    for space, policy in ((last, "CnnPolicy"), (spaces.Dict(image=last), "MultiInputPolicy")):
        with pytest.raises(ValueError, match=r"channels of the images in .* come last, but must come first.*Transform"):
            tiny_model(SpaceEnv(space), policy, kwargs)
    first = spaces.Box(0, 1, (3, 36, 36), dtype=np.float32)
    env = TransformObservation(SpaceEnv(last), lambda image: np.moveaxis(image, -1, 0), first)
    learn_and_check(tiny_model(env, "CnnPolicy", kwargs), 30)


@pytest.mark.parametrize(
    ("policy", "space", "remedy"),
    [
        ("MlpPolicy", IMAGE, "CnnPolicy"),
        (MlpPolicy, IMAGE, "CnnPolicy"),
        ("MlpPolicy", DICT, "MultiInputPolicy"),
        (MlpPolicy, DICT, "MultiInputPolicy"),
        ("CnnPolicy", VECTOR, "MlpPolicy"),
        (CnnPolicy, VECTOR, "MlpPolicy"),
        ("CnnPolicy", DICT, "MultiInputPolicy"),
        (CnnPolicy, DICT, "MultiInputPolicy"),
        ("CnnPolicy", spaces.Box(0, 1, (3, 36, 36), dtype=np.float32), "normalize_images=False"),
        ("MultiInputPolicy", VECTOR, "MlpPolicy"),
        (MultiInputPolicy, VECTOR, "MlpPolicy"),
    ],
)
def test_policy_for_other_observations(policy, space, remedy):
    with pytest.raises(ValueError, match=remedy):
        tiny_model(SpaceEnv(space), policy)


@pytest.mark.parametrize("n_envs", [1, 3])
def test_buffer_too_small(n_envs):
    """Only where learning starts: a model may be loaded with a small buffer to act with it."""
    env = make_vec_env(SpaceEnv, n_envs)
    smallest = 7 * n_envs
    model = tiny_model(env, buffer_size=smallest - 1)
    model.predict(env.reset())
    with pytest.raises(ValueError, match=f"buffer_size of {smallest} or more"):
        model.learn(20)
    assert model.num_timesteps == 0
    enough = tiny_model(env, buffer_size=smallest, gradient_steps=1)
    learn_and_check(enough, 20 * n_envs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in COUNTS),
        *((name, -1) for name in COUNTS),
        ("exploration_noise", -0.1),
        ("target_policy_noise", -0.1),
        ("target_noise_clip", -0.1),
        ("priority_alpha", -0.1),
        ("random_shift_pad", -1),
        ("random_shift_pad", 1.5),
        ("batch_size", 8.0),
        ("target_update_interval", 5.0),
        ("buffer_size", 1e3),
        ("dynamics_loss_weight", -0.1),
        ("reward_loss_weight", -0.1),
        ("termination_loss_weight", -0.1),
        ("pre_activation_weight", -0.1),
        ("compile_updates", 1),
        ("max_grad_norm", 0.0),
        ("min_td_error", 0.0),
        ("gamma", 1.01),
        ("gamma", -0.01),
    ],
)
def test_hyperparameters(name, value):
    with pytest.raises(ValueError, match=rf"{name} is {re.escape(str(value))}, but must"):
        tiny_model(SpaceEnv(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 1) for name in COUNTS),
        ("exploration_noise", 0.0),
        ("target_policy_noise", 0.0),
        ("target_noise_clip", 0.0),
        ("priority_alpha", 0.0),
        ("random_shift_pad", 0),
        ("gamma", 1.0),
        ("gamma", 0.0),
    ],
)
def test_hyperparameters_at_their_limits(name, value):
    learn_and_check(tiny_model(SpaceEnv(), **{name: value}), 20)


def test_replay_buffer_class_by_name():
    with pytest.raises(ValueError, match=r"'HerReplayBuffer' .*SubtrajectoryReplayBuffer"):
        tiny_model(SpaceEnv(), replay_buffer_class="HerReplayBuffer")


@pytest.mark.parametrize("replay_buffer_class", [ReplayBuffer, HerReplayBuffer])
def test_replay_buffer_class(replay_buffer_class):
    with pytest.raises(ValueError, match=f"{replay_buffer_class.__name__} .*SubtrajectoryReplayBuffer"):
        tiny_model(SpaceEnv(), replay_buffer_class=replay_buffer_class)


def test_replay_buffer_class_of_ones_own():
    class MyBuffer(SubtrajectoryReplayBuffer):
        pass

    model = tiny_model(SpaceEnv(), replay_buffer_class=MyBuffer, encoder_horizon=4)
    assert type(model.replay_buffer) is MyBuffer
    assert model.replay_buffer.horizon == 4
    learn_and_check(model, 20)


@pytest.mark.parametrize("action_space", [spaces.Discrete(3), spaces.MultiBinary(2)])
def test_action_noise_is_for_box_actions(action_space):
    with pytest.raises(ValueError, match=r"action_noise is for Box actions.*exploration_noise"):
        tiny_model(SpaceEnv(action_space=action_space), action_noise=NormalActionNoise(np.zeros(1), np.ones(1)))


@pytest.mark.parametrize(
    ("policy_kwargs", "message"),
    [
        ({"net_arch": {"encoder": [16], "vf": [16]}}, "encoder, qf, pi, not vf"),
        ({"net_arch": {"encoder": []}}, "encoder"),
        ({"net_arch": {"pi": [16, 0]}}, "pi"),
        ({"net_arch": {"qf": [1]}}, "qf.*at least two units"),
        ({"z_s_dim": 1}, "z_s_dim is 1, but must be at least 2"),
        ({"n_critics": 0}, "n_critics is 0"),
    ],
)
def test_policy_kwargs(policy_kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(SpaceEnv(), policy_kwargs=policy_kwargs)


def test_unknown_policy():
    with pytest.raises(ValueError, match="LstmPolicy"):
        MRQ("LstmPolicy", SpaceEnv())


def test_warning_if_nothing_will_be_learned():
    model = tiny_model(SpaceEnv(), learning_starts=20)
    with pytest.warns(UserWarning, match="20 steps .*learning_starts=20"):
        model.learn(20)
    assert model._n_updates == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("fault", ["observation", "final observation", "first observation", "reward"])
@pytest.mark.parametrize("observation_space", [VECTOR, spaces.Dict(vector=VECTOR)], ids=["Box", "Dict"])
def test_values_that_are_not_finite(observation_space, fault, value):
    """The environment with the index 1 fails at its 14th step, with which an episode ends; it is the model's 28th."""
    fine = SpaceEnv(observation_space, length=7)
    faulty = Faulty(SpaceEnv(observation_space, length=7), fault, value, 14)
    env = DummyVecEnv([lambda: fine, lambda: faulty])
    model = tiny_model(env, policy_for(observation_space))
    name = {"first observation": "observation"}.get(fault, fault)
    if fault == "observation":
        faulty.fault_step = 13  # in the middle of an episode
    step = 2 * faulty.fault_step
    with pytest.raises(ValueError, match=f"Environment 1 gave the {name} {value}.* at step {step}") as info:
        model.learn(60)
    assert ("'vector'" in str(info.value)) == (isinstance(observation_space, spaces.Dict) and fault != "reward")
    assert model.replay_buffer.size() == step - 2
    model.predict(env.reset())
    learn_and_check(model, 20)
    assert model.replay_buffer.size() == step - 2 + 20


@pytest.mark.parametrize("fault", ["observation", "final observation", "first observation", "reward"])
@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_buffer_keeps_what_came_before_a_bad_value(fault, reset_num_timesteps):
    """The step that was not stored leaves no false transition behind."""
    model = tiny_model(Faulty(CounterEnv(length=7), fault, np.nan, 21 if fault == "first observation" else 20))
    with pytest.raises(ValueError, match="nan"):
        model.learn(40)
    before = check_counter_transitions(model.replay_buffer, 7, "truncated")
    model.learn(20, reset_num_timesteps=reset_num_timesteps)
    after = check_counter_transitions(model.replay_buffer, 7, "truncated")
    assert set(before) < set(after)


@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_first_observation_of_all_that_is_not_finite(reset_num_timesteps):
    model = tiny_model(Faulty(SpaceEnv(), "first observation", np.inf, 0))
    with pytest.raises(ValueError, match="Environment 0 gave the observation inf at step 0"):
        model.learn(20)
    assert model.replay_buffer.size() == 0
    learn_and_check(model, 20, reset_num_timesteps=reset_num_timesteps)


@pytest.mark.parametrize(
    ("fault", "value"),
    [("observation", np.nan), ("observation", np.inf), ("final observation", np.nan), ("reward", np.nan), ("reward", np.inf)],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_values_that_are_not_finite_behind_vec_normalize(training, fault, value):
    """VecNormalize clips, so that an infinite value may look like a finite one. The original value is stored."""
    env = VecNormalize(make_vec_env(lambda: Faulty(SpaceEnv(), fault, value, 15), 1), training=training)
    model = tiny_model(env)
    with pytest.raises(ValueError, match=f"Environment 0 gave the {fault} .* at step 15"):
        model.learn(30)
    assert model.replay_buffer.size() == 14
    assert np.isfinite(model.replay_buffer.mean_abs_reward())


def test_final_observations_of_integers_behind_vec_normalize():
    """It normalises them, and what its inverse gives is a hair off a whole number."""
    space = spaces.Box(0, 255, (4,), dtype=np.uint8)
    finals = []

    class Noted(SpaceEnv):
        def step(self, action):
            obs, *others = super().step(action)
            if self.t == self.length:
                finals.append(obs)
            return obs, *others

    model = tiny_model(VecNormalize(make_vec_env(lambda: Noted(space), 1), clip_obs=1e6))
    model.learn(48)
    ends = np.arange(1, 9) * 7 - 1  # an episode of 6 steps takes 7 slots
    np.testing.assert_array_equal(model.replay_buffer.arrays()["observations None"][ends], np.stack(finals))


@pytest.mark.parametrize("value", [300.0, -1.0, np.nan])
def test_final_observations_of_integers_out_of_range(value):
    """They are not truncated to a byte."""

    class OutOfRange(SpaceEnv):
        def step(self, action):
            obs, *others = super().step(action)
            return np.full(3, value) if self.t == self.length else obs, *others

    with pytest.raises(BadValueError, match=r"final observation .* which is not in"):
        tiny_model(OutOfRange(spaces.Box(0, 255, (3,), dtype=np.uint8))).learn(30)


def test_final_observation_of_one_number():
    """It is not taken for all numbers of an observation."""

    class Short(SpaceEnv):
        def step(self, action):
            obs, *others = super().step(action)
            return obs[:1] if self.t == self.length else obs, *others

    with pytest.raises(BadValueError, match=r"final observation of the type float32 and the shape \(1,\), which is not in"):
        tiny_model(Short()).learn(30)


def test_too_little_memory_is_told(monkeypatch):
    buffer = SubtrajectoryReplayBuffer(10_000, VECTOR, BOX)
    psutil = SimpleNamespace(virtual_memory=lambda: SimpleNamespace(available=100_000))
    monkeypatch.setattr("sb3_mrq.buffers.storage.psutil", psutil)
    obs = np.zeros((1, 3), dtype=np.float32)
    with pytest.warns(UserWarning, match=r"enough memory to store the complete replay buffer 0\.00GB > 0\.00GB"):
        buffer.add(obs, obs, np.zeros((1, 2)), np.zeros(1), np.zeros(1, dtype=bool), [{}])


def test_memory_that_is_not_there_is_told(monkeypatch):
    """Reserving more than there can be fails at once."""
    monkeypatch.setattr(ObservationStorage, "allocate", lambda *_: np.zeros(1 << 55))
    with pytest.raises(MemoryError, match=r"500 slots of the replay buffer take more memory.*smaller buffer_size"):
        tiny_model(SpaceEnv()).learn(5)


@pytest.mark.parametrize("name", ["horizon", "n_steps"])
def test_replay_buffer_kwargs_that_the_model_must_know(name):
    with pytest.raises(ValueError, match=f"replay_buffer_kwargs sets {name}.*pass "):
        tiny_model(SpaceEnv(), replay_buffer_kwargs={name: 4})


def test_stacks_around_vec_normalize():
    with pytest.raises(ValueError, match=r"around VecNormalize changes .* from \(3,\) to \(6,\): put VecNormalize around"):
        tiny_model(VecFrameStack(VecNormalize(make_vec_env(SpaceEnv, 1)), 2))


def test_reward_bins_that_float32_cannot_hold():
    with pytest.raises(ValueError, match=r"reward_bins_limit is 100"):
        tiny_model(SpaceEnv(), policy_kwargs={"reward_bins_limit": 100.0})


@pytest.mark.parametrize(("fault", "value"), [("observation", np.inf), ("reward", np.inf)])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_vec_normalize_that_a_bad_value_has_spoilt(fault, value):
    """Its statistics stay infinite or not a number, and so would be all that it normalises."""
    env = VecNormalize(make_vec_env(lambda: Faulty(SpaceEnv(), fault, value, 15), 1))
    model = tiny_model(env)
    with pytest.raises(ValueError, match=fault):
        model.learn(30)
    updates = model._n_updates
    with pytest.raises(ValueError, match=r"statistics of VecNormalize are not finite.*set_env"):
        model.learn(30)
    assert model._n_updates == updates
    model.set_env(VecNormalize(make_vec_env(SpaceEnv, 1)))
    learn_and_check(model, 30)


@pytest.mark.parametrize("value", [1e19, -1e38])
@pytest.mark.parametrize("fault", ["observation", "final observation", "first observation"])
def test_observations_too_large_for_float32(fault, value):
    """Layer normalisation would square them to infinity, and make zeros or nan of all features."""
    model = tiny_model(Faulty(SpaceEnv(), fault, value, 15))
    name = {"first observation": "observation"}.get(fault, fault)
    with pytest.raises(ValueError, match=f"Environment 0 gave the {name} .*largest allowed is 1e.18.*clip"):
        model.learn(30)
    assert all(th.isfinite(weight).all() for weight in model.policy.state_dict().values())
    learn_and_check(model, 20)


def test_integers_too_large_for_float32():
    space = spaces.Box(np.iinfo(np.int64).min, np.iinfo(np.int64).max, (3,), dtype=np.int64)
    env = SpaceEnv(space)
    with pytest.raises(ValueError, match=r"Environment 0 gave the observation .*largest allowed is 1e\+18.*clip"):
        tiny_model(env).learn(30)


@pytest.mark.parametrize("reward", [1e30, -1e30])
def test_largest_reward(reward):
    learn_and_check(tiny_model(SpaceEnv(reward=reward)), 30)


@pytest.mark.parametrize("reward", [2e30, -1e38])
def test_reward_too_large_for_float32(reward):
    model = tiny_model(Faulty(SpaceEnv(), "reward", reward, 15))
    with pytest.raises(ValueError, match=r"Environment 0 gave the reward .*largest allowed is 1e\+30"):
        model.learn(30)
    learn_and_check(model, 20)


def test_huge_rewards_that_leave_the_buffer():
    """With the last of them the reward scale falls from 1e30 to 1e-8: values in the new units do not fit into float32."""
    env = SpaceEnv(reward=1e30, length=4)
    model = tiny_model(env, buffer_size=30, target_update_interval=2)
    model.learn(30)
    env.reward = 0.0
    model.learn(60, reset_num_timesteps=False)
    assert model.target_reward_scale == model.reward_scale == pytest.approx(1e-8)
    assert all(th.isfinite(weight).all() for weight in model.policy.state_dict().values())
    assert np.isfinite(model.replay_buffer.max_priority)


@pytest.mark.parametrize("value", [4, -1])
@pytest.mark.parametrize(
    "space", [spaces.Discrete(4), spaces.MultiDiscrete([3, 4]), spaces.Dict(vector=spaces.Discrete(4))], ids=str
)
def test_discrete_observation_that_is_not_in_the_space(space, value):
    """It would be the index of nothing, and stay in the buffer."""

    class OutOfRange(SpaceEnv):
        steps = 0

        def step(self, action):
            obs, *rest = super().step(action)
            self.steps += 1
            if self.steps == 15:
                obs = {"vector": value} if isinstance(obs, dict) else np.full_like(obs, value)
            return obs, *rest

    model = tiny_model(OutOfRange(space), policy_for(space))
    with pytest.raises(ValueError, match=f"gave the observation {value}.* not in .*Discrete.* at step 15"):
        model.learn(30)
    learn_and_check(model, 20)


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1,)])
def test_observations_of_another_shape_than_the_space(shape):
    """As ``SubprocVecEnv`` stacks whatever it is given."""
    buffer = SubtrajectoryReplayBuffer(50, VECTOR, BOX, "cpu", n_envs=2)
    good = np.zeros((2, 3)), np.ones((2, 3)), np.zeros((2, 2)), np.ones(2), np.zeros(2, dtype=bool), [{}, {}]
    buffer.add(*good)
    flags = buffer._flags.copy()
    wrong = np.zeros((2, *shape))
    with pytest.raises(ValueError, match=re.escape(f"observations of the shape {wrong.shape}, not (2, 3)")):
        buffer.add(good[1], wrong, *good[2:])
    with pytest.raises(ValueError, match=re.escape("rewards of the shape (2, 1), not (2,)")):
        buffer.add(good[1], good[1], good[2], np.ones((2, 1)), *good[4:])
    np.testing.assert_array_equal(buffer._flags, flags)
    assert buffer.size() == 2


def test_reset_that_fails():
    """The state of the environment is unknown then, so the next ``learn`` begins with a reset, whatever its arguments."""

    class Unreliable(CounterEnv):
        broken = False

        def reset(self, **kwargs):
            obs = super().reset(**kwargs)
            if self.broken:
                raise RuntimeError("The simulator could not be reset.")
            return obs

    env = Unreliable(length=50)
    model = tiny_model(env)
    model.learn(15)
    env.broken = True
    with pytest.raises(RuntimeError, match="could not be reset"):
        model.learn(15)
    env.broken = False
    model.learn(15, reset_num_timesteps=False)
    check_counter_transitions(model.replay_buffer, 50, "truncated")


def test_box_action_whose_range_does_not_fit():
    largest = np.finfo(np.float64).max
    with pytest.raises(ValueError, match="give bounds"):
        tiny_model(SpaceEnv(action_space=spaces.Box(-largest, largest, (2,), dtype=np.float64)))


def test_episode_without_a_final_observation():
    """Without a final observation SB3 takes the first one of the next episode."""

    class NoFinal(SpaceEnv):
        def step(self, action):
            obs, *rest = super().step(action)
            return (None if self.t == self.length else obs), *rest

    model = tiny_model(NoFinal(length=6))
    with pytest.raises(ValueError, match="Environment 0 gave no final observation at step 6"):
        model.learn(20)
    assert model.replay_buffer.size() == 5


@pytest.mark.parametrize(
    ("space", "settings"),
    [(IMAGE, {"norm_obs": False}), (DICT, {"norm_obs_keys": ["vector"]})],
    ids=["image", "dict"],
)
def test_vec_normalize_around_images_to_be_transposed(space, settings):
    """The statistics of VecNormalize have their axes in the environment's order, not in the policy's."""
    policy = policy_for(space)
    with pytest.raises(ValueError, match=r"VecNormalize\(VecTransposeImage\(env\)\)"):
        tiny_model(VecNormalize(make_vec_env(lambda: SpaceEnv(space), 1), **settings), policy)
    env = VecTransposeImage(make_vec_env(lambda: SpaceEnv(space), 1))
    learn_and_check(tiny_model(VecNormalize(env, **settings), policy), 30)
