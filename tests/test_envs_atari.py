"""
AtariWrapper against the emulator itself.
"""

import pickle

import cv2
import gymnasium as gym
import numpy as np
import pytest
from envs import CounterEnv
from gymnasium.wrappers import AtariPreprocessing
from stable_baselines3.common.monitor import Monitor

from sb3_mrq.envs import AtariWrapper

GAME = "ALE/MsPacman-v5"


def resized(screen):
    return cv2.resize(screen, (84, 84), interpolation=cv2.INTER_AREA)


@pytest.mark.filterwarnings("error")
def test_against_emulator():
    """Observations, rewards and ends of an episode, computed here frame by frame."""
    env = AtariWrapper(Monitor(gym.make(GAME)))
    raw = gym.make(GAME, frameskip=1)
    ale = raw.unwrapped.ale
    obs, info = env.reset(seed=5)
    raw.reset(seed=5)
    assert info["episode_frame_number"] == 0  # no no-ops
    frames = [resized(ale.getScreenGrayscale())] * 4
    np.testing.assert_array_equal(obs, frames)

    rng = np.random.default_rng(0)
    lives, rewards = [info["lives"]], []
    over = False
    while not over:
        action = int(rng.integers(env.action_space.n))
        obs, reward, terminated, truncated, info = env.step(action)
        screens, expected = [], 0.0
        for _ in range(4):
            _, raw_reward, over, _, _ = raw.step(action)
            screens.append(ale.getScreenGrayscale())
            expected += raw_reward
            if over:
                break
        assert (reward, terminated, truncated) == (expected, over, False)
        if not over:
            frames = [*frames[1:], resized(np.maximum(screens[-1], screens[-2]))]
            np.testing.assert_array_equal(obs, frames)
        lives.append(info["lives"])
        rewards.append(reward)
    assert sorted(set(lives)) == [0, 1, 2, 3]  # the episode outlived the loss of two lives
    assert max(rewards) > 1  # not clipped
    assert info["episode"]["r"] == sum(rewards)
    assert info["episode"]["l"] > 4 * (len(rewards) - 1)  # raw frames


@pytest.mark.parametrize(
    ("env_id", "kwargs", "sticky"),
    [
        ("ALE/Pong-v5", {}, 0.25),
        ("ALE/Pong-v5", {"frameskip": 1}, 0.25),
        ("ALE/Pong-v5", {"frameskip": (2, 5)}, 0.25),
        ("ALE/Pong-v5", {"obs_type": "grayscale"}, 0.25),
        ("PongNoFrameskip-v4", {}, 0),
        ("Pong-v4", {}, 0),
    ],
)
def test_frame_skip(env_id, kwargs, sticky):
    env = AtariWrapper(gym.make(env_id, **kwargs))
    env.reset(seed=0)
    for step in range(1, 6):
        obs, *_, info = env.step(0)
        assert info["episode_frame_number"] == 4 * step
    assert env.observation_space.contains(obs)
    ale = env.unwrapped.ale
    assert ale.getFloat("repeat_action_probability") == sticky
    assert ale.getInt("max_num_frames_per_episode") == 108_000
    assert env.unwrapped._action_set == ale.getMinimalActionSet()
    assert env.action_space.n == 6 < len(ale.getLegalActionSet())


def test_sticky():
    """With sticky actions, what an action does depends on the seed."""

    def rewards(**kwargs):
        env = AtariWrapper(gym.make(GAME, **kwargs))
        trajectories = []
        for seed in (1, 2, 1):
            env.reset(seed=seed)
            trajectories.append([env.step(1 + step // 5 % 4)[1] for step in range(150)])
        return trajectories

    first, other, again = rewards()
    assert first == again != other
    first, other, again = rewards(repeat_action_probability=0)
    assert first == other == again


def test_longest_episode():
    env = AtariWrapper(gym.make("ALE/Pong-v5", max_num_frames_per_episode=400))
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(100)]
    assert ends == [(False, False)] * 99 + [(False, True)]


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (lambda: gym.make("CartPole-v1"), r"ALE/Pong-v5, not for <.*CartPole"),
        (CounterEnv, "not for <CounterEnv"),
        (lambda: gym.make("ALE/Pong-v5", obs_type="ram"), "obs_type='ram'"),
        (lambda: AtariWrapper(gym.make("ALE/Pong-v5")), r"changes them\. Apply AtariWrapper before"),
        (lambda: AtariPreprocessing(gym.make("ALE/Pong-v5", frameskip=1)), r"changes them\. Apply AtariWrapper before"),
    ],
)
def test_wrong_environment(env, message):
    with pytest.raises(TypeError, match=message):
        AtariWrapper(env())


@pytest.mark.parametrize("copy", [lambda env: pickle.loads(pickle.dumps(env)), lambda env: env.spec.make()])
def test_copies(copy):
    """A copy is a new emulator with the same preprocessing."""
    env = AtariWrapper(gym.make(GAME))
    env.reset(seed=0)
    env.step(1)
    other = copy(env)
    for start in zip(env.reset(seed=3)[0], other.reset(seed=3)[0], strict=True):
        np.testing.assert_array_equal(*start)
    for step in range(50):
        (obs, *rest), (other_obs, *other_rest) = env.step(step % 5), other.step(step % 5)
        np.testing.assert_array_equal(obs, other_obs)
        assert rest == other_rest
    assert other.unwrapped.ale.getEpisodeFrameNumber() == 200
