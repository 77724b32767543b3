"""
A long run on a small network, behind the marker ``long``: ``pytest -m long -s tests/test_soak.py`` prints its figures.
``MRQ_SOAK_STEPS`` shortens it.
"""

import os
import sys
import time
from itertools import pairwise

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import TINY_POLICY, tiny_model
from gymnasium import spaces
from scipy import stats
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.buffers.slots import ENDED, HAS_TRANSITION

STEPS = int(os.environ.get("MRQ_SOAK_STEPS", 300_000))
BUFFER_SIZE = STEPS // 15
CHUNK = STEPS // 150  # environment steps between two measurements
N_ENVS = 2


class Wander(gym.Env):
    """Episodes of 1 to 200 steps, some of which terminate; rewards of several magnitudes."""

    observation_space = spaces.Box(-np.inf, np.inf, (5,), dtype=np.float32)
    action_space = spaces.Box(-1, 1, (2,), dtype=np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 201))
        self.terminates = bool(self.np_random.random() < 0.5)
        self.position = self.np_random.normal(size=5)
        return self.position.astype(np.float32), {}

    def step(self, action):
        self.left -= 1
        self.position = 0.9 * self.position + 0.3 * self.np_random.normal(size=5)
        self.position[:2] += 0.1 * action
        reward = float(-np.square(self.position).sum() + 100.0 * (self.np_random.random() < 0.001))
        ended = self.left == 0
        return self.position.astype(np.float32), reward, ended and self.terminates, ended and not self.terminates, {}


class RecordingBuffer(SubtrajectoryReplayBuffer):
    """Also keeps the last priority of each slot in ``assigned``."""

    def _allocate(self):
        super()._allocate()
        self.assigned = np.zeros(self.buffer_size * self.n_envs)

    def _activate(self, slots):
        super()._activate(slots)
        self.assigned[slots] = self.max_priority

    def update_priorities(self, indices, priorities):
        super().update_priorities(indices, priorities)
        self.assigned[indices] = priorities


def resident_memory():
    """Of this process, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Meter(BaseCallback):
    """
    Takes the memory and the processor time of each chunk, the latter in units of a yardstick timed with it: the same updates
    of another learner each time, which tell how fast the machine is at that moment.
    """

    def __init__(self):
        super().__init__()
        self.seconds, self.yardstick, self.memory, self.wraps = [], [], [], []

    def _on_training_start(self):
        self.other = tiny_model(make_vec_env(Wander, N_ENVS), buffer_size=1000, batch_size=32, seed=1)
        self.other.learn(400)
        self.batch = self.other.replay_buffer.sample_n_step(32)
        for network in (self.other.critic, self.other.actor):
            for group in network.optimizer.param_groups:
                group["lr"] = 0.0  # so that it stays the same
        self.slot, self.times_around = 0, 0
        self.start = time.process_time()

    def _on_step(self):
        buffer = self.model.replay_buffer
        self.times_around += buffer.pos < self.slot
        self.slot = buffer.pos
        if self.num_timesteps % CHUNK == 0:
            now = time.process_time()
            self.seconds.append(now - self.start)
            self.memory.append(resident_memory())
            self.wraps.append(self.times_around)
            before = time.process_time()
            for _ in range(100):
                self.other.learner.update_value_and_policy(self.batch)
            self.start = time.process_time()
            self.yardstick.append(self.start - before)
        return True


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_soak():
    env = make_vec_env(Wander, N_ENVS, seed=0)
    model = tiny_model(
        env,
        buffer_size=BUFFER_SIZE,
        replay_buffer_class=RecordingBuffer,
        learning_starts=1000,
        batch_size=32,
        target_update_interval=250,
        train_freq=4,
        gradient_steps=4,
        policy_kwargs=TINY_POLICY,
    )
    meter = Meter()
    model.learn(STEPS, callback=meter)
    buffer = model.replay_buffer
    assert model.num_timesteps >= STEPS and model._n_updates > 0.4 * (STEPS - model.learning_starts)

    times = np.array(meter.seconds) / np.array(meter.yardstick)
    memory = np.array(meter.memory)
    settled = np.flatnonzero(np.array(meter.wraps) >= 2)  # since the first wrap, of each slot: the chunks to compare
    third = len(settled) // 3
    early, late = settled[:third], settled[-third:]
    slowdown = np.median(times[late]) / np.median(times[early]) - 1
    growth = memory[late].max() - memory[early].max()

    # Sampling: sums of the tree, its leaves, and draws from it
    levels = buffer._priorities.levels
    leaves = buffer._priorities.leaves.numpy()
    for children, parents in pairwise(levels):
        np.testing.assert_array_equal(children.numpy().sum(axis=1), parents.view(-1)[: len(children)])
    slots, probabilities = buffer.sampling_probabilities()
    np.testing.assert_array_equal(leaves[slots], buffer.assigned[slots])
    np.testing.assert_allclose(probabilities, leaves[slots] / leaves.sum(), rtol=1e-12)
    stored = np.flatnonzero(buffer._flags & HAS_TRANSITION)
    assert buffer.n_sampleable == len(slots) and buffer.size() == len(stored)
    # All but the last of the running episodes, whose horizon is not complete
    waiting = np.setdiff1d(stored, slots)
    assert set(slots) <= set(stored) and len(waiting) < N_ENVS * buffer.lookahead
    assert not (buffer._flags[waiting] & ENDED).any()
    draws = np.bincount(np.concatenate([buffer._priorities.sample(10_000).numpy() for _ in range(200)]), minlength=len(leaves))
    assert draws.sum() == draws[slots].sum()
    p_value = stats.chisquare(draws[slots], probabilities * draws.sum()).pvalue

    print(
        f"\n{STEPS} steps, {model._n_updates} training steps, {meter.times_around + buffer.full - 1} wraps of {BUFFER_SIZE} "
        f"slots; memory {memory[early].max():.1f} MB after the first wrap, {memory[late].max():.1f} MB at the end "
        f"({growth:+.2f} MB); time of a chunk of {CHUNK} steps {np.median(np.array(meter.seconds)[early]):.2f} s early, "
        f"{np.median(np.array(meter.seconds)[late]):.2f} s late, relative to the yardstick {slowdown:+.2%}; priorities "
        f"{leaves[slots].min():.3g} to {leaves[slots].max():.3g}, {len(slots)} starts, chi-square p = {p_value:.3f}; "
        f"process time {time.process_time():.0f} s"
    )
    assert all(th.isfinite(value).all() for value in model.policy.state_dict().values())
    assert len(np.unique(leaves[slots])) > 100, "nothing to tell from uniform sampling"
    assert p_value > 1e-4
    assert meter.times_around >= 5
    if STEPS >= 100_000:  # figures of a short run are no more than noise
        assert growth < 1.0
        assert slowdown < 0.05
