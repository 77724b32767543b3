"""
The 118 tasks of the benchmark: their list, their registration, and each of them made as a user would.
"""

import importlib
import subprocess
import sys
from collections import Counter

import gymnasium as gym
import numpy as np
import pytest
from envs import CounterEnv
from gymnasium.error import DependencyNotInstalled, NameNotFound
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.preprocessing import is_image_space, is_image_space_channels_first
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_mrq.envs
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.envs import ATARI_GAMES, BENCHMARK_TASKS, DMC_TASKS, DMC_VISUAL_TASKS, GYM_LOCOMOTION, ActionRepeat, AtariWrapper

# Length of an observation of the state and of an action, as published with the suite (Tassa et al. 2018, table 1, with the
# dog of dm_control 1.0) and in the documentation of gymnasium
STATE = {
    "acrobot": (6, 1),
    "ball_in_cup": (8, 2),
    "cartpole": (5, 1),
    "cheetah": (17, 6),
    "dog": (223, 38),
    "finger": (9, 2),
    "finger-turn": (12, 2),
    "fish": (24, 5),
    "hopper": (15, 4),
    "humanoid": (67, 21),
    "pendulum": (3, 1),
    "quadruped": (78, 12),
    "reacher": (6, 2),
    "walker": (24, 6),
    "Ant": (105, 8),
    "HalfCheetah": (17, 6),
    "Hopper": (11, 3),
    "Humanoid": (348, 17),
    "Walker2d": (17, 6),
}


def sizes(env_id):
    """Length of an observation of the state and of an action."""
    name = env_id.split("/")[-1]
    return STATE["finger-turn" if name.startswith("finger-turn") else name.split("-")[0]]


def test_list():
    assert (len(GYM_LOCOMOTION), len(DMC_TASKS), len(DMC_VISUAL_TASKS), len(ATARI_GAMES)) == (5, 28, 28, 57)
    assert len(set(BENCHMARK_TASKS)) == 118
    assert set(BENCHMARK_TASKS) <= set(gym.registry)
    assert Counter(gym.spec(env_id).max_episode_steps for env_id in (*DMC_TASKS, *DMC_VISUAL_TASKS)) == {500: 56}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("env_id", BENCHMARK_TASKS)
def test_every_task(env_id):
    env = gym.make(env_id)
    if env_id in ATARI_GAMES:
        env = AtariWrapper(Monitor(env))
        shape, dtype = (4, 84, 84), np.uint8
        assert isinstance(env.action_space, gym.spaces.Discrete)
    else:
        assert env.action_space.shape == (sizes(env_id)[1],)
        assert env.action_space.dtype == np.float32
        shape, dtype = ((9, 84, 84), np.uint8) if env_id in DMC_VISUAL_TASKS else (sizes(env_id)[:1], np.float64)
    assert (env.observation_space.shape, env.observation_space.dtype) == (shape, dtype)
    if dtype == np.uint8:
        assert is_image_space(env.observation_space)
        assert is_image_space_channels_first(env.observation_space)
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    assert env.observation_space.contains(obs)
    assert env_id not in DMC_VISUAL_TASKS or obs.std() > 10  # a picture of something
    for _ in range(3):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        assert env.observation_space.contains(obs)
        assert isinstance(reward, float)
        assert (terminated, truncated) == (False, False)
    env.close()


def test_import_is_cheap():
    heavy = {"dm_control", "mujoco", "rl_zoo3", "shimmy"}
    code = f"import sys, sb3_mrq.envs; print(*sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (result.stdout.split(), result.stderr) == ([], "")


@pytest.mark.filterwarnings("error")
def test_registered_twice():
    before = {env_id: gym.registry[env_id] for env_id in BENCHMARK_TASKS}
    importlib.reload(sb3_mrq.envs)
    assert {env_id: gym.registry[env_id] for env_id in BENCHMARK_TASKS} == before


def test_not_taken_for_atari():
    """rl-zoo3 takes its Atari hyperparameters where it finds "AtariEnv" in the entry point."""
    atari = {env_id for env_id in BENCHMARK_TASKS if "AtariEnv" in gym.registry[env_id].entry_point}
    assert atari == set(ATARI_GAMES)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("dmc/walker-wlak-v0", "walker-walk"), ("dmc-visual/cheetah-runs-v0", "cheetah-run"), ("ALE/Pongg-v5", "Pong")],
)
def test_unknown_task(wrong, right):
    with pytest.raises(NameNotFound, match=f"Did you mean: `{right}`"):
        gym.make(wrong)


@pytest.mark.parametrize("missing", ["dm_control", "shimmy"])
@pytest.mark.parametrize("env_id", ["dmc/walker-walk-v0", "dmc-visual/walker-walk-v0"])
def test_missing_dm_control(env_id, missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # which makes an import of it fail
    monkeypatch.setitem(sys.modules, "shimmy.dm_control_compatibility", None)
    monkeypatch.delitem(sys.modules, "sb3_mrq.envs.dm_control", raising=False)
    with pytest.raises(DependencyNotInstalled, match=r'pip install "sb3-mrq\[dmc\]"'):
        gym.make(env_id)


def test_missing_ale_py(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ale_py", None)
        for env_id in ATARI_GAMES:
            patch.delitem(gym.registry, env_id)
        importlib.reload(sb3_mrq.envs)
        assert set(BENCHMARK_TASKS) <= set(gym.registry)
        test_not_taken_for_atari()
        with pytest.raises(DependencyNotInstalled, match=r'pip install "sb3-mrq\[atari\]"'):
            gym.make("ALE/Pong-v5")
    gym.make("ALE/Pong-v5").close()


def test_missing_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with gym.make("ALE/Pong-v5") as env, pytest.raises(DependencyNotInstalled, match=r'pip install "sb3-mrq\[atari\]"'):
        AtariWrapper(env)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("make", "n_stack"),
    [
        (lambda: Monitor(gym.make("dmc-visual/reacher-easy-v0", max_episode_steps=6)), 3),
        (lambda: AtariWrapper(Monitor(gym.make("ALE/Pong-v5", max_num_frames_per_episode=40))), 4),
    ],
)
def test_stored_as_single_frames(make, n_stack):
    env = DummyVecEnv([make] * 2)
    buffer = SubtrajectoryReplayBuffer(100, env.observation_space, env.action_space, n_envs=2)
    env.seed(0)
    env.action_space.seed(0)
    obs = env.reset()
    n_episodes = 0
    for _ in range(25):
        actions = np.array([env.action_space.sample() for _ in range(2)])
        new_obs, rewards, dones, infos = env.step(actions)
        next_obs = new_obs.copy()
        for index in np.flatnonzero(dones):
            next_obs[index] = infos[index]["terminal_observation"]
            n_episodes += 1
        buffer.add(obs, next_obs, actions, rewards, dones, infos)
        obs = new_obs
    assert n_episodes >= 4
    assert [storage.n_stack for storage in buffer._storages.values()] == [n_stack]


class TestActionRepeat:
    """CounterEnv counts steps up from a multiple of 100; the reward is the last digit."""

    def test_sum(self):
        env = ActionRepeat(CounterEnv(length=9), 3)
        start = env.reset()[0][0]
        obs, reward, terminated, truncated, _ = env.step(2)
        assert obs.tolist() == [start + 3, 2]
        assert (reward, terminated, truncated) == (1 + 2 + 3, False, False)

    @pytest.mark.parametrize("end", ["terminated", "truncated"])
    def test_stops_at_the_end(self, end):
        env = ActionRepeat(CounterEnv(length=4, end=end), 3)
        start = env.reset()[0][0]
        env.step(0)
        obs, reward, terminated, truncated, _ = env.step(1)
        assert obs.tolist() == [start + 4, 1]
        assert (reward, terminated, truncated) == (4, end == "terminated", end == "truncated")

    def test_frame_rate(self):
        env = CounterEnv()
        env.metadata = {"render_modes": [], "render_fps": 50}
        assert ActionRepeat(env, 2).metadata == {"render_modes": [], "render_fps": 25}
        assert env.metadata["render_fps"] == 50

    def test_number(self):
        with pytest.raises(ValueError, match="n_repeats must be at least 1, not 0"):
            ActionRepeat(CounterEnv(), 0)
