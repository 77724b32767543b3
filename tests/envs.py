"""
Toy environments, a model small enough for tests, and what several test files ask of a trained model.
"""

import itertools
import os
from copy import deepcopy
from typing import ClassVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from helpers import NETWORKS, TARGETS, snapshot
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.preprocessing import is_image_space

from sb3_mrq import MRQ

TINY_POLICY = {"net_arch": {"encoder": [16], "qf": [16], "pi": [16]}, "z_s_dim": 16, "z_a_dim": 8, "z_sa_dim": 16}
TINY = {
    "buffer_size": 500,
    "learning_starts": 10,
    "batch_size": 8,
    "target_update_interval": 5,
    "seed": 0,
    "device": "cpu",
}

VECTOR = spaces.Box(-1, 1, (3,), dtype=np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 3), dtype=np.uint8)
BOX = spaces.Box(-1, 1, (2,), dtype=np.float32)


def policy_for(observation_space):
    """Name of the policy that takes such observations."""
    if isinstance(observation_space, spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation_space) else "MlpPolicy"


def tiny_model(env, policy="MlpPolicy", policy_kwargs=None, algorithm=MRQ, **kwargs):
    """A model with networks and intervals that make it fast, not good."""
    return algorithm(policy, env, policy_kwargs={**TINY_POLICY, **(policy_kwargs or {})}, **{**TINY, **kwargs})


def note_deterministic(model, monkeypatch):
    """A list of how ``predict`` is called from now on, deterministically or not."""
    seen = []
    predict = model.predict

    def noted(*args, deterministic, **kwargs):
        seen.append(deterministic)
        return predict(*args, deterministic=deterministic, **kwargs)

    monkeypatch.setattr(model, "predict", noted)
    return seen


class SpaceEnv(gym.Env):
    """
    Random observations of any space, whatever the action, which must lie in the action space. Rewards are drawn from
    [0, reward). Episodes are truncated after ``length`` steps.
    """

    def __init__(self, observation_space=VECTOR, action_space=BOX, length=6, reward=1.0):
        self.observation_space = deepcopy(observation_space)
        self.action_space = deepcopy(action_space)
        self.length = length
        self.reward = reward

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.t += 1
        reward = self.reward * float(self.np_random.random())
        return self.observation_space.sample(), reward, False, self.t >= self.length, {"is_success": True}


class Wandering(SpaceEnv):
    """Changes the working directory when it is made and at every reset, as some simulators do."""

    metadata: ClassVar = {"render_modes": ["rgb_array"]}
    elsewhere: ClassVar

    def __init__(self, render_mode=None):
        super().__init__()
        os.chdir(self.elsewhere)

    def reset(self, **kwargs):
        os.chdir(self.elsewhere)
        return super().reset(**kwargs)


def wandering_env(folder, monkeypatch):
    """
    Register ``Wandering``.

    :return: the working directory from here to the first of these environments, and their id
    """
    monkeypatch.setitem(gym.registry, "Wandering-v0", EnvSpec("Wandering-v0", f"{__name__}:Wandering"))
    monkeypatch.setattr(Wandering, "elsewhere", folder / "elsewhere", raising=False)
    for path in (folder / "elsewhere", folder / "start"):
        path.mkdir()
    monkeypatch.chdir(folder / "start")
    return folder / "start", "Wandering-v0"


class SwingEnv(gym.Env):
    """
    Observations and rewards are functions of the time and the actions of the episode, and nothing is random. Episodes take
    ``length`` steps, and those with a positive sum of actions terminate.
    """

    def __init__(self, observation_space=VECTOR, action_space=BOX, length=7):
        self.observation_space = deepcopy(observation_space)
        self.action_space = deepcopy(action_space)
        self.length = length

    def observation(self):
        shape = self.observation_space.shape
        wave = np.sin(np.arange(np.prod(shape)).reshape(shape) + self.t + self.position)
        return (127 * (1 + wave)).astype(np.uint8) if self.observation_space.dtype == np.uint8 else wave.astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.position = 0, 0.0
        return self.observation(), {}

    def step(self, action):
        self.t += 1
        self.position += float(np.mean(action))
        done = self.t == self.length
        terminated = done and self.position > 0
        return self.observation(), float(np.sin(3 * self.position)), terminated, done and not terminated, {}


class CounterEnv(gym.Env):
    """
    An observation is (a number, the action before it). The number goes up by one each step, and every episode of any
    of these environments begins at another multiple of 100, so that transitions can be told to be true or false. The reward is
    the last digit of the number it leads to.

    :param end: how episodes of ``length`` steps end, "terminated" or "truncated"
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), dtype=np.float32)
    action_space = spaces.Discrete(3)
    episodes = itertools.count()

    def __init__(self, length=7, end="truncated"):
        self.length = length
        self.end = end

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = 100 * next(self.episodes)
        return np.array([self.number, -1], dtype=np.float32), {}

    def step(self, action):
        self.number += 1
        done = self.number % 100 == self.length
        obs = np.array([self.number, action], dtype=np.float32)
        return obs, float(self.number % 10), done and self.end == "terminated", done and self.end == "truncated", {}


def check_counter_transitions(buffer, length, end):
    """
    Assert that a buffer holds nothing but true transitions of :class:`CounterEnv` with the same ``length`` and ``end``.

    :return: the numbers that the sub-trajectories start at, in the order of their slots
    """
    samples = buffer.get_subtrajectories(buffer.sampling_probabilities()[0])
    mask = samples.mask.numpy().astype(bool)
    numbers, last_actions = np.moveaxis(samples.observations.numpy(), -1, 0)
    np.testing.assert_array_equal(np.diff(numbers)[mask], 1)
    np.testing.assert_array_equal(samples.actions[..., 0].numpy()[mask], last_actions[:, 1:][mask])
    np.testing.assert_array_equal(samples.rewards.numpy()[mask], (numbers[:, 1:] % 10)[mask])
    ended = numbers[:, 1:] % 100 == length
    np.testing.assert_array_equal(samples.terminated.numpy()[mask], ended[mask] & (end == "terminated"))
    return numbers[:, 0].astype(int)


class Faulty(gym.Wrapper):
    """
    Gives one bad observation or reward.

    :param fault: "observation", "reward", or "final observation", with which the episode is truncated, or "first observation",
        by the first reset after ``step``
    :param value: the bad value
    :param step: number of the step, counted from 1 over all episodes
    """

    def __init__(self, env, fault, value, step):
        super().__init__(env)
        self.fault, self.value, self.fault_step = fault, value, step
        self.steps = 0
        self.spoilt = False

    def spoil(self, obs):
        """A copy of an observation in which one number is the bad value."""
        self.spoilt = True
        obs = deepcopy(obs)
        array = obs["vector"] if isinstance(obs, dict) else obs
        array[1] = self.value
        return obs

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        due = self.fault == "first observation" and self.steps >= self.fault_step and not self.spoilt
        return self.spoil(obs) if due else obs, info

    def step(self, action):
        self.steps += 1
        obs, reward, terminated, truncated, info = super().step(action)
        if self.steps == self.fault_step:
            if self.fault == "reward":
                reward = self.value
            elif self.fault != "first observation":
                obs = self.spoil(obs)
                truncated = self.fault == "final observation"
        return obs, reward, terminated, truncated, info


class RecordingWriter(KVWriter):
    """Keeps every dump of a logger in ``rows``."""

    def __init__(self):
        self.rows = []

    def write(self, key_values, key_excluded, step=0):
        self.rows.append(dict(key_values))

    def close(self):
        pass


def record_log(model):
    """
    Give a model a logger that writes to memory.

    :return: list to which a dict of values is appended at every dump
    """
    writer = RecordingWriter()
    model.set_logger(Logger(folder=None, output_formats=[writer]))
    return writer.rows


def changed(before, after, prefix):
    """Whether one of the weights whose names start with ``prefix`` differs between two snapshots."""
    names = [name for name in before if name.startswith(prefix)]
    assert names, f"no weights called {prefix}..."
    return any(not th.equal(before[name], after[name]) for name in names)


def learn_and_check(model, total_timesteps, **kwargs):
    """
    Let a model learn, and assert that all networks and targets have changed and are finite.

    :return: rows of the log, one for each episode
    """
    before = snapshot(model.policy)
    rows = record_log(model)
    model.learn(total_timesteps, log_interval=1, **kwargs)
    after = snapshot(model.policy)
    assert all(th.isfinite(value).all() for value in after.values())
    for network in (*NETWORKS, *TARGETS):
        assert changed(before, after, f"{network}."), network
    return rows
