"""
What cannot work is refused at once, by an error that names the value and the remedy, and nothing that was learned is lost.
"""

import json
import re
import threading
import warnings
from functools import partial
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch as th
from envs import (
    BOX,
    IMAGE,
    TINY,
    TINY_POLICY,
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
from helpers import make_policy, same, snapshot
from stable_baselines3 import PPO, SAC, TD3, HerReplayBuffer
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise, VectorizedActionNoise
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage
from torch import nn

from sb3_mrq import MRQ, CnnPolicy, MlpPolicy, MultiInputPolicy
from sb3_mrq.action_noise import check_action_noise
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.buffers.frames import ObservationStorage
from sb3_mrq.checks import BadValueError
from sb3_mrq.extractors import MLPExtractor
from sb3_mrq.learner import Learner
from sb3_mrq.persist.checkpoints import get_generators
from sb3_mrq.policies import MRQPolicy

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
        pytest.importorskip("cv2")
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
    ("action_noise", "n_envs", "message"),
    [
        (NormalActionNoise(np.zeros(3), np.ones(3)), 1, r"noise of the shape \(3,\).* shape of the actions, \(2,\)"),
        (NormalActionNoise(np.zeros(3), np.ones(3)), 2, r"noise of the shape \(3,\)"),
        (NormalActionNoise(np.zeros(4), np.ones(4)), 2, r"noise of the shape \(4,\)"),
        (NormalActionNoise(0.0, 0.1), 1, "cannot be sampled: AttributeError.* arrays of one number"),
        (NormalActionNoise(np.zeros(2), -np.ones(2)), 1, "cannot be sampled: ValueError: scale < 0"),
        (
            VectorizedActionNoise(NormalActionNoise(np.zeros(2), np.ones(2)), 1),
            2,
            "for 1 environments, but there are 2.*base_noise",
        ),
        (VectorizedActionNoise(NormalActionNoise(np.zeros(1), np.ones(1)), 2), 1, "for 2 environments, but there are 1"),
        (VectorizedActionNoise(NormalActionNoise(np.zeros(3), np.ones(3)), 2), 2, r"noise of the shape \(3,\)"),
        (0.1, 1, "action_noise is 0.1.*NormalActionNoise.*exploration_noise"),
    ],
)
def test_action_noise_that_does_not_fit(action_noise, n_envs, message):
    """Not found out after the warm-up."""
    env = make_vec_env(SpaceEnv, n_envs)
    with pytest.raises(ValueError, match=message):
        tiny_model(env, action_noise=action_noise)
    model = tiny_model(env)
    model.action_noise = action_noise
    with pytest.raises(ValueError, match=message):
        model.learn(5)


def test_loaded_with_noise_for_another_number_of_environments(tmp_path):
    """It can act, and learns with the noise that is asked for."""
    noise = NormalActionNoise(np.zeros(2), np.ones(2))
    tiny_model(make_vec_env(SpaceEnv, 2), action_noise=noise).learn(20).save(tmp_path / "m")
    model = MRQ.load(tmp_path / "m", SpaceEnv(), device="cpu")
    model.predict(VECTOR.sample())
    with pytest.raises(ValueError, match="set action_noise to its base_noise"):
        model.learn(5)
    model.action_noise = model.action_noise.base_noise
    learn_and_check(model, 20)


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


class Features(BaseFeaturesExtractor):
    """An extractor of a user's own, with a fault or none."""

    def __init__(self, observation_space, fault=None):
        super().__init__(observation_space, 8)
        self.fault = fault
        self.norm = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 7 if fault == "size" else 8)

    def forward(self, observations):
        features = self.linear(self.norm(observations) if self.fault == "batch norm" else observations)
        if self.fault == "in place":
            hidden = features.exp()
            return hidden.add_(1)
        return features[:, None] if self.fault == "axis" else features


class BadBuffer(SubtrajectoryReplayBuffer):
    def read(self, slots, starts, n_steps, ends_only=False):
        raise KeyError("goal")


class BadLearner(Learner):
    def value_loss(self, z_sa, target):
        return super().value_loss(z_sa, target)[0].expand(2), target  # not a scalar


class BadAlgorithm(MRQ):
    learner_class = BadLearner


class BadPolicy(MRQPolicy):
    def act(self, observation, sample):
        raise NotImplementedError("planner")


def extractor(fault):
    return {"policy_kwargs": {"features_extractor_class": Features, "features_extractor_kwargs": {"fault": fault}}}


@pytest.mark.parametrize(
    ("algorithm", "policy", "kwargs", "message"),
    [
        (MRQ, "MlpPolicy", extractor("size"), "shapes cannot be multiplied"),
        (MRQ, "MlpPolicy", extractor("axis"), "RuntimeError"),
        (MRQ, "MlpPolicy", extractor("in place"), "inplace operation"),
        (MRQ, "MlpPolicy", extractor("batch norm") | {"batch_size": 1}, "more than 1 value per channel"),
        (MRQ, "MlpPolicy", {"policy_kwargs": {"activation_fn": nn.GLU}}, "RuntimeError"),
        (MRQ, "MlpPolicy", {"policy_kwargs": {"optimizer_class": th.optim.LBFGS}}, "closure"),
        (MRQ, "MlpPolicy", {"policy_kwargs": {"optimizer_class": th.optim.SparseAdam}}, "dense gradients"),
        (MRQ, "MlpPolicy", {"policy_kwargs": {"optimizer_kwargs": {"differentiable": True}}}, "RuntimeError"),
        (MRQ, "MlpPolicy", {"replay_buffer_class": BadBuffer}, "KeyError: 'goal'"),
        (MRQ, BadPolicy, {}, "NotImplementedError: planner"),
        (BadAlgorithm, "MlpPolicy", {}, "scalar outputs"),
    ],
)
def test_fault_after_the_warm_up(algorithm, policy, kwargs, message):
    """It shows before the first step."""
    kwargs = TINY | kwargs | {"policy_kwargs": TINY_POLICY | kwargs.get("policy_kwargs", {}), "learning_starts": 1000}
    model = algorithm(policy, SpaceEnv(), **kwargs)
    with pytest.raises(ValueError, match=f"(?s)fail after the warm-up.*{message}"):
        model.learn(2000)
    assert model.num_timesteps == model.replay_buffer.size() == 0


@pytest.mark.parametrize("n_envs", [1, 2])
@pytest.mark.parametrize("space", [VECTOR, IMAGE, DICT, spaces.Discrete(4)], ids=["vector", "image", "Dict", "Discrete"])
@pytest.mark.parametrize("action_space", [BOX, spaces.MultiDiscrete([2, 3])], ids=["Box", "MultiDiscrete"])
def test_rehearsal_changes_nothing(space, action_space, n_envs):
    noise = OrnsteinUhlenbeckActionNoise(np.zeros(2), np.ones(2)) if action_space is BOX else None
    model = tiny_model(make_vec_env(lambda: SpaceEnv(space, action_space), n_envs), policy_for(space), action_noise=noise)
    obs = model.env.reset()

    def everything():
        optimizers = [getattr(model, name).optimizer.state_dict() for name in ("encoder", "critic", "actor")]
        gradients = [parameter.grad for parameter in model.policy.parameters()]
        others = [optimizers, gradients, model.policy.training, model.replay_buffer.pos, model.replay_buffer.size()]
        return snapshot(model.policy), json.dumps(get_generators(model)), repr(others)

    before = everything()
    model.updates.rehearse(model.replay_buffer, obs, 8)
    check_action_noise(model.action_noise, model.action_space, model.n_envs)
    after = everything()
    assert same(before[0], after[0]) and before[1:] == after[1:]
    if noise is not None:
        np.testing.assert_array_equal(noise.noise_prev, 0)


def test_rehearsal_leaves_methods_that_were_replaced_alone():
    """They may be bound to the learner itself, which would be trained on what the rehearsal has made up."""
    model = tiny_model(SpaceEnv())
    update, calls = model.learner.update_encoder, []
    model.learner.update_encoder = lambda samples: (calls.append(model.num_timesteps), update(samples))[1]
    model.learn(12)
    assert calls and min(calls) > 10


def test_rehearsal_of_what_cannot_be_copied():
    """It is left out: such a model learns."""

    class Locked(MRQPolicy):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.lock = threading.Lock()

    learn_and_check(tiny_model(SpaceEnv(), Locked), 20)


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        ("LstmPolicy", "'LstmPolicy'"),
        (SAC.policy_aliases["MlpPolicy"], "stable_baselines3.sac.policies.SACPolicy"),
        (MLPExtractor, "sb3_mrq.extractors.MLPExtractor"),
        (make_policy(VECTOR, BOX), "an object of the class MRQPolicy"),
        (None, "None"),
    ],
    ids=["name", "SAC", "extractor", "object", "None"],
)
def test_unknown_policy(policy, shown):
    names = "'MlpPolicy', 'CnnPolicy', 'MultiInputPolicy'"
    expected = f"policy is {shown}, but must be one of the names {names}, or a subclass of sb3_mrq.policies.MRQPolicy."
    with pytest.raises(ValueError, match=re.escape(expected)):
        MRQ(policy, SpaceEnv())


@pytest.mark.parametrize("policy", [MRQPolicy, partial(MlpPolicy, z_a_dim=4)])
def test_policies_of_a_subclass(policy):
    """It has a policy of its own, but those of MRQ work as well."""

    class Own(MRQ):
        policy_aliases: ClassVar = {"MlpPolicy": CnnPolicy}

    assert isinstance(Own(policy, SpaceEnv(), policy_kwargs=TINY_POLICY | {"z_a_dim": 4}, **TINY).policy, MRQPolicy)


def test_warning_if_nothing_will_be_learned():
    model = tiny_model(SpaceEnv(), learning_starts=20)
    with pytest.warns(UserWarning, match="it ends at step 20, which is not above learning_starts=20"):
        model.learn(20)
    assert model._n_updates == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(1, reset_num_timesteps=False)
    assert model._n_updates == 1


def test_warning_once_if_learn_is_called_for_one_step_at_a_time():
    model = tiny_model(SpaceEnv(), learning_starts=20)
    with pytest.warns(UserWarning, match="learned in this call of learn: it ends at step 1,") as warned:
        for _ in range(10):
            model.learn(1, reset_num_timesteps=False)
        model.learn(10)
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("n_envs", "kwargs", "steps"),
    [(3, {}, 20), (1, {"train_freq": 7}, 15), (1, {"train_freq": (1, "episode")}, 20)],
    ids=["environments", "rollouts", "episodes"],
)
def test_no_warning_where_the_last_rollout_is_learned_from(n_envs, kwargs, steps):
    """It goes on beyond the last step."""
    model = tiny_model(make_vec_env(lambda: SpaceEnv(length=7), n_envs), learning_starts=20, **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.learn(steps)
    assert model._n_updates > 0


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
