"""
Hindsight experience replay: new goals come from the same episode, after the start, and rewards follow them.

Each observation is numbered by environment, episode and step, and its achieved goal is this number, so a goal says where it
was achieved.
"""

import pickle
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import recorded_graph
import torch as th
from envs import SpaceEnv, tiny_model
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3 import HerReplayBuffer
from stable_baselines3.common.envs import BitFlippingEnv
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecNormalize

from sb3_mrq import DRQ, MRQ
from sb3_mrq.accelerate.graphs import Graph
from sb3_mrq.arguments import UnsupportedSpaceError
from sb3_mrq.buffers import HerSubtrajectoryReplayBuffer

GOAL = spaces.Box(-np.inf, np.inf, (3,), dtype=np.float32)
SPACE = spaces.Dict(observation=GOAL, achieved_goal=GOAL, desired_goal=GOAL)
# The desired goal of stored transitions, which no observation achieves
OWN_GOAL = np.float32([-1, -1, -1])
# First goal that each strategy may choose, of a start at a step in an episode of a length
FIRST_GOAL = {
    "future": lambda step, length: step + 1,
    "final": lambda step, length: length,
    "episode": lambda step, length: 1,
}
HORIZON = 3


class NumberedEnv(gym.Env):
    """Episodes of given lengths, again from the beginning after the last one."""

    observation_space = SPACE
    action_space = spaces.Discrete(2)

    def __init__(self, number, lengths):
        self.number, self.lengths = number, lengths
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.n_steps = self.episode + 1, 0
        return self.observe(), {}

    def length(self, episode):
        return self.lengths[int(episode) % len(self.lengths)]

    def observe(self):
        place = np.float32([self.number, self.episode, self.n_steps])
        return {"observation": place, "achieved_goal": place, "desired_goal": OWN_GOAL}

    def step(self, action):
        self.n_steps += 1
        ended, terminates = self.n_steps == self.length(self.episode), self.episode % 2 == 0
        return self.observe(), -1.0, ended and terminates, ended and not terminates, {"weight": float(self.n_steps)}

    @staticmethod
    def compute_reward(achieved, desired, infos):
        """A number that tells both goals, and the infos if there are some."""
        weights = np.array([info.get("weight", 1.0) for info in infos])
        return weights * (1 + achieved @ [1e4, 1e2, 1] + 0.001 * (desired @ [1e4, 1e2, 1]))


def make_env(*lengths):
    """:param lengths: lengths of the episodes of each environment"""
    return DummyVecEnv([lambda number=number: NumberedEnv(number, lengths[number]) for number in range(len(lengths))])


def filled_buffer(env, n_steps, size=100, **kwargs):
    n_envs = env.num_envs
    kwargs = dict(horizon=HORIZON, n_steps=2) | kwargs
    buffer = HerSubtrajectoryReplayBuffer(size * n_envs, SPACE, env.action_space, "cpu", n_envs, **kwargs)
    buffer.set_env(env)
    add_steps(buffer, env, n_steps)
    return buffer


def add_steps(buffer, env, n_steps):
    obs = env.reset()
    for _ in range(n_steps):
        new_obs, rewards, dones, infos = env.step([0] * env.num_envs)
        next_obs = {key: value.copy() for key, value in new_obs.items()}
        for i in np.flatnonzero(dones):
            for key in next_obs:
                next_obs[key][i] = infos[i]["terminal_observation"][key]
        buffer.add(obs, next_obs, np.zeros((env.num_envs, 1)), rewards, dones, infos)
        obs = new_obs


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from([*FIRST_GOAL]),
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4), min_size=1, max_size=3),
    n_steps=st.integers(1, 60),
    size=st.integers(8, 30),
    infos=st.booleans(),
)
def test_goals_and_rewards(strategy, lengths, n_steps, size, infos):
    env = make_env(*lengths)
    buffer = filled_buffer(env, n_steps, size, goal_selection_strategy=strategy, copy_info_dict=infos)
    if buffer.n_sampleable == 0:
        return
    batch = buffer.sample(100)
    desired = batch.observations["desired_goal"].numpy()
    assert (desired == desired[:, :1]).all(), "one goal for a whole sub-trajectory"
    for places, goal, mask, rewards in zip(
        batch.observations["achieved_goal"].numpy(), desired[:, 0], batch.mask.numpy(), batch.rewards.numpy(), strict=True
    ):
        number, episode, step = places[0]
        assert episode < env.envs[int(number)].episode, "running episodes wait"
        length = env.envs[int(number)].length(episode)
        n = int(min(HORIZON, length - step))
        assert mask.tolist() == [1] * n + [0] * (HORIZON - n)
        expected = np.full(n, -1.0)
        if (goal != OWN_GOAL).any():
            assert (goal[:2] == (number, episode)).all()
            assert FIRST_GOAL[strategy](step, length) <= goal[2] <= length
            given_infos = [{"weight": place[2]} if infos else {} for place in places[1 : n + 1]]
            expected = NumberedEnv.compute_reward(places[1 : n + 1], goal[None], given_infos)
        np.testing.assert_allclose(rewards, [*expected, *[0.0] * (HORIZON - n)], rtol=1e-6)


@pytest.mark.parametrize("strategy, expected", [("future", [4, 5, 6, 7]), ("final", [7]), ("episode", [1, 2, 3, 4, 5, 6, 7])])
def test_goals_are_equally_likely(strategy, expected):
    np.random.seed(0)
    buffer = filled_buffer(make_env([7]), 7, goal_selection_strategy=strategy)
    goals = buffer.get_n_step(np.full(8000, 3)).observations["desired_goal"][:, 2].numpy()
    shares = {value: np.mean(goals == value) for value in np.unique(goals)}
    assert shares.pop(-1) == pytest.approx(0.2, abs=0.02)
    assert shares == {step: pytest.approx(0.8 / len(expected), abs=0.02) for step in expected}


def test_goals_that_are_overwritten():
    """The first steps of the episode are gone, so no goal may be read from their slots."""
    buffer = filled_buffer(make_env([8, 3]), 11, size=10, goal_selection_strategy="episode")
    batch = buffer.sample(2000)
    goals, episodes = batch.observations["desired_goal"][:, 0, 1:].numpy(), batch.observations["observation"][:, 0, 1].numpy()
    of_first = goals[(episodes == 0) & (goals[:, 0] >= 0)]
    assert of_first[:, 0].max() == 0
    assert of_first[:, 1].min() > 1


def test_n_sampled_goal_0_keeps_all():
    env = make_env([5])
    buffer = filled_buffer(env, 20, n_sampled_goal=0)
    batch = buffer.sample(100)
    assert (batch.observations["desired_goal"].numpy() == OWN_GOAL).all()
    assert buffer.mean_abs_reward() == 1.0


def test_n_step_targets():
    """The last observation of an n-step target has the new goal, too."""
    batch = filled_buffer(make_env([5]), 20).sample_n_step(100)
    first, last = batch.observations["desired_goal"], batch.next_observations["desired_goal"]
    assert (first == last).all()
    assert len(np.unique(first[:, 2])) > 2


def test_mean_abs_reward_is_of_what_is_sampled():
    np.random.seed(0)
    buffer = filled_buffer(make_env([5, 9]), 60)
    batch = buffer.get_n_step(np.resize(np.flatnonzero(buffer.sampleable(np.arange(100))), 20_000))
    assert buffer.mean_abs_reward() == pytest.approx(batch.rewards[:, 0].abs().mean().item(), rel=0.2)


def test_pickle_and_copy():
    buffer = filled_buffer(make_env([5]), 20)
    again = pickle.loads(pickle.dumps(buffer))
    with pytest.raises(ValueError, match="compute_reward"):
        again.sample(100)
    again.set_env(make_env([5]))
    set_random_seed(1)
    expected = buffer.sample(50)
    set_random_seed(1)
    assert all(th.equal(a, b) for a, b in zip(again.sample(50)[1:5], expected[1:5], strict=True))
    # A copy shares the environment
    add_steps(copied := buffer.empty_copy(20), make_env([5]), 10)
    assert copied.sample(10).rewards.abs().max() > 1


# -- models ------------------------------------------------------------------------------------------------------------


def goal_model(algorithm=MRQ, env=None, **kwargs):
    env = BitFlippingEnv(n_bits=3, continuous=False, max_steps=6) if env is None else env
    kwargs = dict(replay_buffer_class=HerSubtrajectoryReplayBuffer) | kwargs
    return tiny_model(env, algorithm=algorithm, policy="MultiInputPolicy", **kwargs)


@pytest.mark.parametrize("algorithm", [MRQ, DRQ])
@pytest.mark.parametrize("strategy", FIRST_GOAL)
def test_training_and_loading(algorithm, strategy, tmp_path):
    kwargs = dict(replay_buffer_kwargs=dict(goal_selection_strategy=strategy, n_sampled_goal=2))
    model = goal_model(algorithm, **kwargs).learn(60)
    assert model._n_updates > 0
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "buffer")
    loaded = algorithm.load(tmp_path / "model", env=model.get_env())
    loaded.load_replay_buffer(tmp_path / "buffer")
    rewards = []
    for buffer in (model.replay_buffer, loaded.replay_buffer):
        assert (buffer.n_sampled_goal, buffer.goal_selection_strategy) == (2, strategy)
        set_random_seed(0)
        rewards.append(buffer.sample(64).rewards)
    assert th.equal(*rewards)
    assert 0 < rewards[0].abs().mean() < 1
    loaded.learn(20, reset_num_timesteps=False)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("image_obs_space", [True, False])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_full_buffer_of_bits(continuous, image_obs_space, n_envs):
    """As in SB3's tests of its own buffer: the last episodes alone are kept, and images are goals too."""

    def make():
        return BitFlippingEnv(n_bits=4, continuous=continuous, max_steps=5, image_obs_space=image_obs_space)

    model = goal_model(env=DummyVecEnv([make] * n_envs), buffer_size=20 * n_envs).learn(80)
    assert model.replay_buffer.full and model._n_updates > 0
    samples = model.replay_buffer.sample(64)
    achieved, desired = (samples.observations[key].flatten(2) for key in ("achieved_goal", "desired_goal"))
    matched = (achieved[:, 1:] == desired[:, 1:]).all(dim=2)
    valid = samples.mask == 1
    assert th.equal(samples.rewards[valid], matched[valid].float() - 1)
    assert matched[valid].any()


@pytest.mark.parametrize("vec_env_class", [DummyVecEnv, SubprocVecEnv])
def test_several_environments(vec_env_class):
    env = VecNormalize(vec_env_class([partial(NumberedEnv, number, [5]) for number in range(2)]))
    model = goal_model(env=env).learn(80)
    # compute_reward gets goals, and the agent observations and rewards that are normalised
    stored, normalised = (model.replay_buffer.sample(64, normalize) for normalize in (None, env))
    assert stored.rewards.max() > 1e3
    assert normalised.rewards.max() <= env.clip_reward
    assert normalised.observations["desired_goal"].abs().max() <= env.clip_obs
    env.close()


def test_set_env_reaches_the_buffer(tmp_path):
    goal_model().save(tmp_path / "model")
    model = MRQ.load(tmp_path / "model")
    model.set_env(BitFlippingEnv(n_bits=3, continuous=False, max_steps=6))
    model.learn(40)
    assert model.replay_buffer.sample(64).rewards.max() == 0


def test_learns_from_new_goals_alone():
    """No sub-trajectory keeps its own goal, so an agent that matches patterns has learned it from what happened by chance."""
    model = goal_model(
        env=BitFlippingEnv(n_bits=4, continuous=False, max_steps=4),
        replay_buffer_kwargs=dict(n_sampled_goal=10**6),
        discrete_policy="greedy",
        policy_kwargs=dict(net_arch=dict(encoder=[64, 64], qf=[64] * 3), z_s_dim=64, z_a_dim=64, z_sa_dim=64),
        gamma=0.9,
        buffer_size=5000,
        batch_size=64,
        learning_rate=1e-3,
        encoder_learning_rate=1e-3,
        dynamics_loss_weight=0.1,
        reward_loss_weight=1.0,
        learning_starts=300,
        target_update_interval=50,
        seed=0,
    )
    model.learn(1200)
    # Chance succeeds in a tenth of the episodes
    assert np.mean([*model.ep_success_buffer][-50:]) > 0.8


def test_uncaptured_on_a_device(monkeypatch):
    monkeypatch.setattr(Graph, "can_capture", staticmethod(lambda device: True))
    monkeypatch.setattr(Graph, "capture", staticmethod(recorded_graph.capture))
    # Compiling takes long, and has its own tests
    monkeypatch.setattr("sb3_mrq.accelerate.updates.CompiledFunction", lambda function, *_: function)
    with pytest.warns(UserWarning, match="HerSubtrajectoryReplayBuffer samples only on the host") as warned:
        goal_model(compile_updates=True).learn(60)
    assert len([w for w in warned if "captured" in str(w.message)]) == 1


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_refuses_other_spaces():
    with pytest.raises(UnsupportedSpaceError, match="achieved_goal"):
        tiny_model(SpaceEnv(), replay_buffer_class=HerSubtrajectoryReplayBuffer)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(goal_selection_strategy="past"), "goal_selection_strategy is 'past'"),
        (dict(n_sampled_goal=-1), "n_sampled_goal is -1"),
    ],
)
def test_refuses_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        goal_model(replay_buffer_kwargs=kwargs)


class NoRewardEnv(NumberedEnv):
    compute_reward = None

    def __getattribute__(self, name):
        if name == "compute_reward":
            raise AttributeError(name)
        return super().__getattribute__(name)


class OneRewardEnv(NumberedEnv):
    @staticmethod
    def compute_reward(achieved, desired, infos):
        return np.float32(0.0)


class InfoEnv(NumberedEnv):
    @staticmethod
    def compute_reward(achieved, desired, infos):
        return np.array([info["weight"] for info in infos])


@pytest.mark.parametrize(
    "env_class, message",
    [
        (NoRewardEnv, "no compute_reward"),
        (OneRewardEnv, "one reward for each goal"),
        (InfoEnv, r"looks up 'weight' in the infos .* copy_info_dict=True"),
    ],
)
def test_refuses_environments(env_class, message):
    with pytest.raises(ValueError, match=message):
        goal_model(env=env_class(0, [5]))


def test_refuses_the_buffer_of_sb3():
    with pytest.raises(ValueError, match="HerSubtrajectoryReplayBuffer"):
        goal_model(replay_buffer_class=HerReplayBuffer)
