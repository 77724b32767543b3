"""
What the replay buffer and its priorities promise, one property a test. Any sequence of calls: test_buffer_stateful.py.

Unless a test says otherwise an observation is one running number, so a sub-trajectory without fault counts up by one.
"""

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from buffer_oracle import numbered_frame
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim, get_obs_shape
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize
from torch.utils._python_dispatch import TorchDispatchMode

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.buffers.priorities import PriorityTree
from sb3_mrq.losses import n_step_return

NUMBER = spaces.Box(-np.inf, np.inf, (1,), dtype=np.float32)
BOX_ACTION = spaces.Box(-1, 1, (1,), dtype=np.float32)
ENDS = ("terminated", "truncated", "cut")


def make_buffer(buffer_size=100, observation_space=NUMBER, action_space=BOX_ACTION, **kwargs):
    kwargs = {"device": "cpu", "horizon": 5, "n_steps": 3, **kwargs}
    return SubtrajectoryReplayBuffer(buffer_size, observation_space, action_space, **kwargs)


def add(buffer, obs, next_obs, reward=1.0, end=None, action=None):
    """Add one transition of the only environment. ``end``: None, "terminated" or "truncated"."""
    action = np.zeros(buffer.action_space.shape, dtype=buffer.action_space.dtype) if action is None else action
    buffer.add(
        np.array([obs]),
        np.array([next_obs]),
        np.array([action]),
        np.array([reward], dtype=np.float32),
        np.array([end is not None]),
        [{"TimeLimit.truncated": end == "truncated"}],
    )


def add_episode(buffer, first, length, end=None):
    """
    Observations ``first``, ``first`` + 1, ... ``first`` + ``length``; the reward of a transition is the number it starts at.

    :param end: "terminated", "truncated", or None if the episode goes on, or is cut by the next call
    """
    for number in range(first, first + length):
        last = number == first + length - 1
        obs, next_obs = np.array([number], dtype=np.float32), np.array([number + 1], dtype=np.float32)
        add(buffer, obs, next_obs, reward=number, end=end if last and end != "cut" else None)
    if end == "cut":  # another episode of one transition, far away, that cuts this one off
        far = np.array([1e6], dtype=np.float32)
        add(buffer, far, far + 1, reward=1e6, end="truncated")


def all_samples(buffer, env=None):
    """Every sub-trajectory that can be sampled, sorted by its first reward."""
    indices, _ = buffer.sampling_probabilities()
    samples = buffer.get_subtrajectories(indices, env=env)
    order = samples.rewards[:, 0].argsort().numpy()
    return buffer.get_subtrajectories(indices[order], env=env)


def all_n_step(buffer, env=None):
    """Every n-step sample that can be drawn, sorted by its first reward."""
    indices, _ = buffer.sampling_probabilities()
    samples = buffer.get_n_step(indices, env=env)
    order = samples.rewards[:, 0].argsort().numpy()
    return buffer.get_n_step(indices[order], env=env)


def starts(buffer):
    """The numbers of the observations at which a sub-trajectory can start."""
    return all_samples(buffer).observations[:, 0].flatten().tolist()


def array_bytes(thing, seen=None):
    """Bytes of all NumPy arrays and tensors that can be reached from an object, each memory counted once."""
    seen = {} if seen is None else seen
    stack = [thing]
    visited = set()
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, np.ndarray):
            while isinstance(item.base, np.ndarray):
                item = item.base
            seen[item.ctypes.data] = item.nbytes
            if item.dtype == object:
                stack.extend(item.flat)
        elif isinstance(item, th.Tensor):
            seen[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            stack.extend(vars(item).values())
    return sum(seen.values())


def largest_array_bytes(thing):
    seen = {}
    array_bytes(thing, seen)
    return max(seen.values(), default=0)


def assert_frequencies(draws, probabilities):
    """Chi-square, at five standard deviations on both sides: draws more even than independent ones fail as well."""
    counts = np.bincount(draws, minlength=len(probabilities))
    assert counts[probabilities == 0].sum() == 0
    expected = len(draws) * probabilities[probabilities > 0]
    assert expected.min() > 10, "too few draws for this test"
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


# -- what can be sampled -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ENDS)
def test_last_transitions_of_an_episode_are_sampled(end):
    buffer = make_buffer(horizon=5)
    add_episode(buffer, 0, 20, end)
    everything = [*range(20)] + ([1e6] if end == "cut" else [])
    assert starts(buffer) == everything
    np.random.seed(0)
    drawn = buffer.sample(2000).observations[:, 0].flatten().tolist()
    assert set(drawn) == set(everything)
    drawn = buffer.sample_n_step(2000).observations.flatten().tolist()
    assert set(drawn) == set(everything)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_episode_shorter_than_the_horizon_is_sampled(length, end):
    buffer = make_buffer(horizon=5)
    add_episode(buffer, 10, length, end)
    samples = all_samples(buffer)
    for row in range(length):
        existing = length - row
        assert samples.observations[row].flatten().tolist() == [min(10 + row + t, 10 + length) for t in range(6)]
        assert samples.mask[row].tolist() == [1] * existing + [0] * (5 - existing)
        assert samples.rewards[row].tolist() == [10 + row + t for t in range(existing)] + [0] * (5 - existing)
        ended = [0] * (existing - 1) + [float(end == "terminated")] + [0] * (5 - existing)
        assert samples.terminated[row].tolist() == ended


def test_every_transition_of_closed_episodes_is_sampleable():
    buffer = make_buffer(buffer_size=200)
    number = 0
    for length, end in [(1, "truncated"), (7, "terminated"), (3, "cut"), (2, "terminated"), (12, "cut"), (5, "truncated")]:
        add_episode(buffer, number, length, end)
        number += length + 1
    assert buffer.n_sampleable == buffer.size() == 1 + 7 + 3 + 2 + 12 + 5 + 2  # and those that cut others off


@pytest.mark.parametrize(("horizon", "n_steps"), [(5, 3), (2, 4), (1, 1)])
def test_running_episode_waits_for_its_horizon(horizon, n_steps):
    buffer = make_buffer(horizon=horizon, n_steps=n_steps)
    for number in range(12):
        add_episode(buffer, number, 1)
        assert buffer.size() == number + 1
        complete = max(number + 2 - max(horizon, n_steps), 0)
        assert buffer.n_sampleable == complete
        if complete:
            assert starts(buffer) == [*range(complete)]
    add_episode(buffer, 12, 1, "truncated")
    assert buffer.n_sampleable == 13


@pytest.mark.parametrize("end", [None, "terminated", "truncated"])
def test_nothing_leaks_into_the_next_episode(end):
    # Numbers jump by 100 between episodes, where an episode ended and where it was cut off without a word
    buffer = make_buffer(buffer_size=1000, horizon=4, n_steps=5)
    for episode in range(8):
        add_episode(buffer, 100 * episode, 6, end)
    samples, n_step_samples = all_samples(buffer), all_n_step(buffer)
    assert len(samples.mask) == 8 * 6 - (4 if end is None else 0)  # the last episode is still running
    for observations in (*samples.observations.squeeze(-1), *n_step_samples.next_observations):
        episode = (observations[0] // 100).item()
        assert ((observations // 100) == episode).all()
    first = n_step_samples.observations
    assert ((n_step_samples.rewards // 100 == first // 100) | (n_step_samples.mask == 0)).all()
    assert (n_step_samples.next_observations[:, 0] == first[:, 0] + n_step_samples.mask.sum(dim=1)).all()


def test_restart_without_done_is_a_truncation():
    buffer = make_buffer()
    add_episode(buffer, 0, 2)
    assert buffer.n_sampleable == 0
    add_episode(buffer, 50, 1)
    samples = all_n_step(buffer)
    assert samples.observations.flatten().tolist() == [0, 1]
    assert samples.next_observations.flatten().tolist() == [2, 2]
    assert samples.terminated.sum() == 0
    assert not buffer.has_terminated


def test_episode_that_starts_where_the_last_one_ended_is_another_one():
    buffer = make_buffer(horizon=3, n_steps=3)
    add_episode(buffer, 0, 2, "terminated")
    add_episode(buffer, 2, 2, "terminated")
    samples = all_samples(buffer)
    assert samples.mask.sum(dim=1).tolist() == [2, 1, 2, 1]
    assert samples.observations[1].flatten().tolist() == [1, 2, 2, 2]


def test_termination_and_time_limit():
    for end in ("terminated", "truncated"):
        buffer = make_buffer(horizon=3, n_steps=2)
        assert not buffer.has_terminated
        add_episode(buffer, 1, 3, end)
        assert buffer.has_terminated == (end == "terminated")
        flag = float(end == "terminated")
        assert all_samples(buffer).terminated.tolist() == [[0, 0, flag], [0, flag, 0], [flag, 0, 0]]
        assert all_n_step(buffer).terminated.tolist() == [[0, 0], [0, flag], [flag, 0]]


def test_done_without_info_is_a_termination():
    buffer = make_buffer()
    obs = np.zeros((1, 1), dtype=np.float32)
    buffer.add(obs, obs + 1, np.zeros((1, 1)), np.zeros(1), np.array([True]), [{}])
    assert buffer.has_terminated
    assert all_samples(buffer).terminated[0].tolist() == [1, 0, 0, 0, 0]


def test_has_terminated_remembers_what_left():
    buffer = make_buffer(buffer_size=10)
    add_episode(buffer, 0, 1, "terminated")
    add_episode(buffer, 100, 50)
    assert starts(buffer)[0] > 100
    assert buffer.has_terminated


@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_n_step_return_at_the_end_of_an_episode(end):
    # Rewards 1, 2, 3, 4; the transition that ends the episode counts, what follows does not
    buffer = make_buffer(horizon=1, n_steps=3)
    add_episode(buffer, 1, 4, end)
    add_episode(buffer, 100, 5, end)
    samples = all_n_step(buffer)
    returns, discount = n_step_return(samples.rewards.double(), samples.terminated.double(), samples.mask.double(), 0.5)
    assert returns[:4, 0].tolist() == [1 + 2 / 2 + 3 / 4, 2 + 3 / 2 + 4 / 4, 3 + 4 / 2, 4]
    bootstrap = 1.0 if end == "truncated" else 0.0
    assert discount[:4, 0].tolist() == [1 / 8, bootstrap / 8, bootstrap / 4, bootstrap / 2]
    assert samples.next_observations[:4].flatten().tolist() == [4, 5, 5, 5]


def test_samples_have_the_documented_shapes():
    buffer = make_buffer(observation_space=spaces.Box(-1, 1, (7,)), action_space=spaces.Box(-1, 1, (2,)), horizon=4, n_steps=2)
    obs = np.zeros(7, dtype=np.float32)
    for _ in range(10):
        add(buffer, obs, obs)
    samples = buffer.sample(6)
    assert samples.observations.shape == (6, 5, 7)
    assert samples.actions.shape == (6, 4, 2)
    assert samples.rewards.shape == samples.terminated.shape == samples.mask.shape == (6, 4)
    n_step_samples = buffer.sample_n_step(6)
    assert n_step_samples.observations.shape == n_step_samples.next_observations.shape == (6, 7)
    assert n_step_samples.actions.shape == (6, 2)
    assert n_step_samples.rewards.shape == n_step_samples.terminated.shape == n_step_samples.mask.shape == (6, 2)
    for batch in (samples, n_step_samples):
        assert batch.indices.shape == (6,) and batch.indices.dtype == np.int64
        tensors = (batch.observations, batch.actions, batch.rewards, batch.terminated, batch.mask)
        assert all(tensor.dtype == th.float32 for tensor in tensors)


# -- wrap-around and capacity ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("episode_length", [1, 3, 7, 19, 20, 1000])
def test_nothing_crosses_the_write_position(episode_length):
    buffer = make_buffer(buffer_size=20, horizon=5, n_steps=3)
    number = 0
    for step in range(90):
        if step % episode_length == 0:
            number += 100
        add_episode(buffer, number, 1, "truncated" if step % episode_length == episode_length - 1 else None)
        number += 1
        if buffer.n_sampleable == 0:
            continue
        for samples in (all_samples(buffer), all_n_step(buffer)):
            steps = th.arange(samples.mask.shape[1])
            expected = (samples.rewards[:, :1] + steps) * samples.mask
            assert th.equal(samples.rewards, expected)
        whole = all_samples(buffer)
        existing = whole.mask.cumsum(dim=1)
        assert th.equal(whole.observations[:, 1:, 0], whole.observations[:, 0] + existing)
        assert th.equal(whole.observations[:, 0, 0], whole.rewards[:, 0])


def test_running_episode_longer_than_the_ring():
    buffer = make_buffer(buffer_size=20, horizon=5, n_steps=3)
    add_episode(buffer, 0, 100)
    # 20 slots: 19 transitions and the newest observation; the last four wait for their horizon
    assert buffer.size() == 19
    assert starts(buffer) == [*range(81, 96)]


def test_capacity_counts_observations():
    # Episodes of 3 transitions take 4 of 20 slots
    buffer = make_buffer(buffer_size=20)
    for episode in range(5):
        add_episode(buffer, 10 * episode, 3, "terminated")
        assert buffer.size() == 3 * (episode + 1)
    add_episode(buffer, 50, 1)  # writes two slots: the first two transitions leave
    assert buffer.size() == 14
    assert starts(buffer)[0] == 2


@pytest.mark.parametrize("n_envs", [2, 3])
def test_environments_keep_apart(n_envs):
    """Each environment has its own numbers, its own episode lengths and its own ring."""
    buffer = make_buffer(buffer_size=30 * n_envs + 1, n_envs=n_envs, horizon=4, n_steps=6)
    lengths = [5, 7, 1000][:n_envs]
    numbers = np.array([10_000 * (env + 1) for env in range(n_envs)])
    for step in range(1, 100):
        obs = numbers[:, None].astype(np.float32)
        done = np.array([step % length == 0 for length in lengths])
        infos = [{"TimeLimit.truncated": True} if env == 1 else {} for env in range(n_envs)]
        infos = [info if ended else {} for info, ended in zip(infos, done, strict=True)]
        buffer.add(obs, obs + 1, np.zeros((n_envs, 1)), numbers.astype(np.float32), done, infos)
        numbers += np.where(done, 100, 1)
    samples = all_samples(buffer)
    env_of = samples.observations // 10_000
    assert (env_of == env_of[:, :1]).all()
    assert set((env_of.flatten() - 1).int().tolist()) == set(range(n_envs))
    assert th.equal(samples.observations[:, 1:, 0], samples.observations[:, 0] + samples.mask.cumsum(dim=1))
    terminated_envs = set(env_of[samples.terminated.any(dim=1), 0].flatten().int().tolist())
    assert terminated_envs == {1}  # the second is truncated, the third never ends
    # 99 steps, rings of 30 slots. Newest first: the first environment holds 4 steps of a running episode in 5 slots and four
    # whole episodes of 5 in 6 slots each; the second 1 step in 2 slots, three whole episodes of 7 in 8 slots each and the
    # last 3 steps of another one; the third 29 steps and an observation. The newest 5 steps wait while their episode runs
    stored, waiting = [4 + 4 * 5, 1 + 3 * 7 + 3, 29][:n_envs], [4, 1, 5][:n_envs]
    assert buffer.size() == sum(stored)
    per_env = np.bincount(env_of[:, 0].flatten().int().numpy() - 1, minlength=n_envs)
    assert per_env.tolist() == [have - wait for have, wait in zip(stored, waiting, strict=True)]


def test_one_environment_ends_while_others_run():
    buffer = make_buffer(n_envs=3, horizon=5, n_steps=3)
    numbers = np.array([0, 100, 200])
    for step in range(3):
        obs = numbers[:, None].astype(np.float32)
        done = np.array([False, step == 2, False])
        buffer.add(obs, obs + 1, np.zeros((3, 1)), numbers.astype(np.float32), done, [{}, {}, {}])
        numbers += 1
    assert buffer.size() == 9
    assert starts(buffer) == [100, 101, 102]


@pytest.mark.parametrize("n_envs", [1, 4])
@pytest.mark.parametrize(("horizon", "n_steps"), [(5, 3), (2, 6)])
def test_too_small_buffer_is_refused(horizon, n_steps, n_envs):
    enough = (max(horizon, n_steps) + 2) * n_envs
    obs = np.zeros((n_envs, 1), dtype=np.float32)
    transition = (obs, obs + 1, np.zeros((n_envs, 1)), np.zeros(n_envs), np.zeros(n_envs, dtype=bool), [{}] * n_envs)
    too_small = make_buffer(buffer_size=enough - 1, n_envs=n_envs, horizon=horizon, n_steps=n_steps)
    with pytest.raises(ValueError):
        too_small.add(*transition)
    buffer = make_buffer(buffer_size=enough, n_envs=n_envs, horizon=horizon, n_steps=n_steps)
    buffer.add(*transition)
    assert buffer.size() == n_envs


# -- priorities in the buffer ------------------------------------------------------------------------------------------


def test_draws_follow_the_probabilities():
    buffer = make_buffer(buffer_size=300, n_envs=1)
    for episode in range(10):
        add_episode(buffer, 20 * episode, 12, "truncated")
    indices, probabilities = buffer.sampling_probabilities()
    np.testing.assert_allclose(probabilities, 1 / 120)
    np.random.seed(1)
    buffer.update_priorities(indices, np.random.uniform(0.1, 2, size=120))
    indices, probabilities = buffer.sampling_probabilities()
    assert probabilities.sum() == pytest.approx(1)
    by_index = np.zeros(indices.max() + 1)
    by_index[indices] = probabilities
    assert_frequencies(buffer.sample(50_000).indices, by_index)
    assert_frequencies(buffer.sample_n_step(50_000).indices, by_index)


def test_sampling_uses_the_global_generator():
    buffer = make_buffer()
    add_episode(buffer, 0, 50, "truncated")
    np.random.seed(3)
    first, then = buffer.sample(32).indices, buffer.sample(32).indices
    assert not np.array_equal(first, then)
    np.random.seed(3)
    np.testing.assert_array_equal(buffer.sample(32).indices, first)


def test_priorities_are_those_assigned():
    buffer = make_buffer()
    add_episode(buffer, 0, 4, "truncated")
    buffer.update_priorities(all_samples(buffer).indices, np.array([1.0, 2.0, 3.0, 4.0]))
    indices, probabilities = buffer.sampling_probabilities()
    by_start = dict(zip(buffer.get_n_step(indices).rewards[:, 0].tolist(), probabilities, strict=True))
    assert by_start == pytest.approx({0.0: 0.1, 1.0: 0.2, 2.0: 0.3, 3.0: 0.4}, rel=1e-12)


def test_new_transitions_take_the_largest_priority_ever():
    buffer = make_buffer()
    assert buffer.max_priority == 1
    add_episode(buffer, 0, 1, "truncated")
    index = buffer.sampling_probabilities()[0]
    buffer.update_priorities(index, np.array([8.0]))
    buffer.update_priorities(index, np.array([2.0]))
    assert buffer.max_priority == 8
    add_episode(buffer, 10, 1, "truncated")
    probabilities = dict(zip(*buffer.sampling_probabilities(), strict=True))
    assert probabilities.pop(index.item()) == pytest.approx(0.2)
    assert [*probabilities.values()] == pytest.approx([0.8])


def test_priorities_smaller_than_one_do_not_lower_the_maximum():
    buffer = make_buffer()
    add_episode(buffer, 0, 1, "truncated")
    buffer.update_priorities(buffer.sampling_probabilities()[0], np.array([0.25]))
    assert buffer.max_priority == 1


def test_update_of_an_evicted_transition_is_ignored():
    buffer = make_buffer(buffer_size=20)
    add_episode(buffer, 0, 10, "truncated")
    oldest = all_samples(buffer).indices[:3]
    # 20 more slots are written: 9 + 1 of old, 10 of new ones, so the slots of `oldest` now hold a running episode
    add_episode(buffer, 100, 8, "truncated")
    add_episode(buffer, 200, 3)
    assert not set(oldest) & set(buffer.sampling_probabilities()[0])
    before = buffer.sampling_probabilities()
    buffer.update_priorities(oldest, np.full(3, 100.0))
    for actual, expected in zip(buffer.sampling_probabilities(), before, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert buffer.n_sampleable == len(before[0])
    np.random.seed(0)
    assert not set(oldest) & set(buffer.sample(1000).indices)
    # Their slots become sampleable later, at the largest priority that anything was really given
    add_episode(buffer, 203, 5, "truncated")
    assert buffer.max_priority == 1
    np.testing.assert_allclose(buffer.sampling_probabilities()[1], 1 / buffer.n_sampleable)


def test_update_mixes_evicted_and_present():
    buffer = make_buffer(buffer_size=20)
    add_episode(buffer, 0, 10, "truncated")
    oldest, newest = all_samples(buffer).indices[[0, 9]]
    add_episode(buffer, 100, 10)
    assert 0 not in starts(buffer) and 9 in starts(buffer)
    buffer.update_priorities(np.array([oldest, newest]), np.array([50.0, 3.0]))
    probabilities = dict(zip(*buffer.sampling_probabilities(), strict=True))
    assert oldest not in probabilities
    assert probabilities[newest] == pytest.approx(3 / (3 + buffer.n_sampleable - 1))
    assert buffer.max_priority == 3


# -- rewards, normalisation --------------------------------------------------------------------------------------------


def test_mean_abs_reward_covers_all_that_is_stored():
    buffer = make_buffer(buffer_size=100)
    rewards = [-3.0, 1.0, 0.0, 2.0]
    for number, reward in enumerate(rewards):  # a running episode: none of them can be sampled yet
        add(buffer, [np.float32(number)], [np.float32(number + 1)], reward=reward)
    assert buffer.n_sampleable == 0
    assert buffer.mean_abs_reward() == pytest.approx(1.5)


def test_mean_abs_reward_forgets_what_left():
    buffer = make_buffer(buffer_size=10)
    add_episode(buffer, 1_000_000, 9, "truncated")
    add_episode(buffer, 0, 30)
    assert starts(buffer)[-1] < 30
    assert buffer.mean_abs_reward() == pytest.approx(np.mean(range(21, 30)))


def test_small_rewards_do_not_drown():
    buffer = make_buffer(buffer_size=1000)
    add_episode(buffer, 0, 1, "truncated")
    obs = np.zeros(1, dtype=np.float32)
    add(buffer, obs, obs, reward=1e9, end="terminated")
    for _ in range(1100):
        add(buffer, obs, obs, reward=1e-3)
    assert buffer.mean_abs_reward() == pytest.approx(1e-3, rel=1e-5)


class NumberEnv(gym.Env):
    """Only its spaces matter: it carries the statistics of VecNormalize."""

    action_space = BOX_ACTION

    def __init__(self, observation_space=NUMBER):
        self.observation_space = observation_space

    def reset(self, **kwargs):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


def test_vec_normalize_with_current_statistics():
    env = VecNormalize(DummyVecEnv([NumberEnv]), clip_reward=4.0, clip_obs=2.0)
    buffer = make_buffer(horizon=3, n_steps=2)
    add_episode(buffer, 0, 6, "truncated")
    raw, raw_n_step = all_samples(buffer), all_n_step(buffer)
    for mean, variance, reward_variance in [(2.0, 4.0, 0.25), (-1.0, 100.0, 16.0)]:
        env.obs_rms.mean[:], env.obs_rms.var[:], env.ret_rms.var = mean, variance, reward_variance
        scaled = np.clip((np.arange(7) - mean) / np.sqrt(variance), -2, 2)
        scaled_rewards = np.clip(np.arange(6) / np.sqrt(reward_variance), -4, 4)

        samples, n_step_samples = all_samples(buffer, env=env), all_n_step(buffer, env=env)
        # Compare by the raw number: it says which value is meant
        np.testing.assert_allclose(samples.observations, scaled[raw.observations.int()], rtol=1e-5)
        np.testing.assert_allclose(n_step_samples.observations, scaled[raw_n_step.observations.int()], rtol=1e-5)
        np.testing.assert_allclose(n_step_samples.next_observations, scaled[raw_n_step.next_observations.int()], rtol=1e-5)
        for batch, raw_batch in ((samples, raw), (n_step_samples, raw_n_step)):
            expected = scaled_rewards[raw_batch.rewards.int()] * raw_batch.mask.numpy()
            np.testing.assert_allclose(batch.rewards, expected, rtol=1e-5)
            assert batch.observations.dtype == batch.rewards.dtype == th.float32
        assert buffer.mean_abs_reward(env) == pytest.approx(np.abs(scaled_rewards).mean(), rel=1e-5)
        assert buffer.mean_abs_reward() == pytest.approx(2.5)

        np.random.seed(0)
        drawn = buffer.sample(4, env=env)
        np.testing.assert_array_equal(drawn.observations, buffer.get_subtrajectories(drawn.indices, env=env).observations)
        drawn = buffer.sample_n_step(4, env=env)
        np.testing.assert_array_equal(drawn.rewards, buffer.get_n_step(drawn.indices, env=env).rewards)


def test_vec_normalize_of_some_keys():
    space = spaces.Dict({"image": spaces.Box(0, 255, (1, 8, 8), dtype=np.uint8), "vector": spaces.Box(-9, 9, (2,))})
    env = VecNormalize(DummyVecEnv([lambda: NumberEnv(space)]), norm_obs_keys=["vector"])
    env.obs_rms["vector"].mean[:] = 1.0
    env.obs_rms["vector"].var[:] = 4.0
    buffer = make_buffer(observation_space=space)
    observations = [
        {"image": numbered_frame(number, (1, 8, 8))[None], "vector": np.full((1, 2), number, dtype=np.float32)}
        for number in range(5)
    ]
    for number in range(4):
        obs, next_obs = observations[number], observations[number + 1]
        buffer.add(obs, next_obs, np.zeros((1, 1)), np.array([number]), np.array([number == 3]), [{}])
    samples = all_samples(buffer, env=env)
    assert samples.observations["image"].dtype == th.uint8
    for start in range(4):
        for step in range(6):
            number = min(start + step, 4)
            np.testing.assert_array_equal(samples.observations["image"][start, step], observations[number]["image"][0])
            np.testing.assert_allclose(samples.observations["vector"][start, step], [(number - 1) / 2] * 2, rtol=1e-5)


# -- spaces ------------------------------------------------------------------------------------------------------------

OBSERVATION_SPACES = {
    "box": spaces.Box(-1, 1, (3,), dtype=np.float32),
    "matrix": spaces.Box(-1, 1, (2, 3), dtype=np.float32),
    "bytes": spaces.Box(0, 255, (4,), dtype=np.uint8),
    "integers": spaces.Box(-1000, 1000, (4,), dtype=np.int32),
    "discrete": spaces.Discrete(6),
    "multi_discrete": spaces.MultiDiscrete([3, 4, 5]),
    "multi_binary": spaces.MultiBinary(4),
    "multi_binary_matrix": spaces.MultiBinary((2, 3)),
    "image": spaces.Box(0, 255, (3, 12, 10), dtype=np.uint8),
    "dict": spaces.Dict(
        {
            "image": spaces.Box(0, 255, (3, 12, 10), dtype=np.uint8),
            "vector": spaces.Box(-1, 1, (2,), dtype=np.float32),
            "discrete": spaces.Discrete(5),
            "multi_binary": spaces.MultiBinary(3),
        }
    ),
}
ACTION_SPACES = {
    "box": spaces.Box(-1, 1, (2,), dtype=np.float32),
    "box_matrix": spaces.Box(-1, 1, (2, 2), dtype=np.float32),
    "discrete": spaces.Discrete(5),
    "multi_discrete": spaces.MultiDiscrete([3, 4]),
    "multi_binary": spaces.MultiBinary(3),
}


def sample_batch(space, n_envs):
    """Random elements of a space, in the arrays that a VecEnv of SB3 gives."""
    if isinstance(space, spaces.Dict):
        return {key: sample_batch(subspace, n_envs) for key, subspace in space.spaces.items()}
    return np.stack([space.sample() for _ in range(n_envs)])


def assert_content(actual, expected, space):
    """:param actual: tensors of one environment. :param expected: arrays of one environment"""
    if isinstance(space, spaces.Dict):
        assert actual.keys() == space.spaces.keys()
        for key, subspace in space.spaces.items():
            assert_content(actual[key], expected[key], subspace)
        return
    assert tuple(actual.shape) == get_obs_shape(space)
    np.testing.assert_array_equal(actual.numpy(), np.reshape(expected, get_obs_shape(space)))


def at(observations, *index):
    if isinstance(observations, dict):
        return {key: value[index] for key, value in observations.items()}
    return observations[index]


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(
    ("observation_name", "action_name"),
    [(name, "box") for name in OBSERVATION_SPACES] + [("box", name) for name in ACTION_SPACES] + [("dict", "discrete")],
)
def test_spaces(observation_name, action_name, n_envs):
    observation_space, action_space = OBSERVATION_SPACES[observation_name], ACTION_SPACES[action_name]
    observation_space.seed(0), action_space.seed(0)
    n_steps, horizon, length = 2, 3, 8
    buffer = make_buffer(100, observation_space, action_space, n_envs=n_envs, horizon=horizon, n_steps=n_steps)
    observations = [sample_batch(observation_space, n_envs) for _ in range(length + 1)]
    actions = [sample_batch(action_space, n_envs) for _ in range(length)]
    for step in range(length):
        rewards = 100 * np.arange(n_envs) + step  # says which transition it is
        buffer.add(
            observations[step],
            observations[step + 1],
            actions[step],
            rewards.astype(np.float32),
            np.full(n_envs, step == length - 1),
            [{} for _ in range(n_envs)],
        )
    samples, n_step_samples = all_samples(buffer), all_n_step(buffer)
    assert len(samples.mask) == n_envs * length
    assert samples.actions.shape == (n_envs * length, horizon, get_action_dim(action_space))
    for row in range(n_envs * length):
        env, start = divmod(row, length)
        for step in range(horizon + 1):
            expected = at(observations[min(start + step, length)], env)
            assert_content(at(samples.observations, row, step), expected, observation_space)
        for step in range(min(horizon, length - start)):
            np.testing.assert_array_equal(samples.actions[row, step], actions[start + step][env].flatten())
        assert_content(at(n_step_samples.observations, row), at(observations[start], env), observation_space)
        expected = at(observations[min(start + n_steps, length)], env)
        assert_content(at(n_step_samples.next_observations, row), expected, observation_space)
        np.testing.assert_array_equal(n_step_samples.actions[row], actions[start][env].flatten())
    if action_name.startswith("box"):
        assert samples.actions.dtype == n_step_samples.actions.dtype == th.float32
    if observation_name in ("image", "bytes"):
        assert samples.observations.dtype == n_step_samples.next_observations.dtype == th.uint8


def test_float64_observations_become_float32():
    space = spaces.Box(-np.inf, np.inf, (2,), dtype=np.float64)
    buffer = make_buffer(observation_space=space, horizon=5)
    observations = np.random.RandomState(0).normal(size=(11, 2))  # not representable in float32
    for step in range(10):
        add(buffer, observations[step], observations[step + 1], reward=step, end="truncated" if step == 9 else None)
    samples = all_samples(buffer)
    assert samples.observations.dtype == th.float32
    # One episode of ten: rounding is not mistaken for a restart
    assert samples.mask.sum(dim=1).tolist() == [5] * 6 + [4, 3, 2, 1]
    assert buffer.size() == 10
    for start in range(10):
        expected = observations[np.minimum(start + np.arange(6), 10)].astype(np.float32)
        np.testing.assert_array_equal(samples.observations[start], expected)


def test_arrays_are_copied():
    buffer = make_buffer()
    obs, next_obs, action = (np.full((1, 1), value, dtype=np.float32) for value in (1, 2, 0.5))
    reward, done = np.ones(1, dtype=np.float32), np.ones(1, dtype=bool)
    buffer.add(obs, next_obs, action, reward, done, [{}])
    for array in (obs, next_obs, action, reward):
        array[:] = -7
    samples = all_samples(buffer)
    assert samples.observations.flatten().tolist() == [1, 2, 2, 2, 2, 2]
    assert samples.actions[0, 0].item() == 0.5
    assert samples.rewards[0, 0].item() == 1
    samples.observations[:] = -7
    assert all_samples(buffer).observations[0, 0].item() == 1


# -- memory ------------------------------------------------------------------------------------------------------------


def test_an_observation_is_stored_once():
    space = spaces.Box(-np.inf, np.inf, (1000,), dtype=np.float32)
    buffer = make_buffer(1010, space)
    for number in range(1000):
        obs, next_obs = np.full(1000, number, dtype=np.float32), np.full(1000, number + 1, dtype=np.float32)
        add(buffer, obs, next_obs, reward=number, end="truncated" if number % 250 == 249 else None)
    assert buffer.size() == 1000
    assert array_bytes(buffer) < 1.3 * 1000 * 1000 * 4


def test_memory_is_allocated_when_used():
    space = spaces.Box(0, 255, (4, 84, 84), dtype=np.uint8)
    buffer = make_buffer(10**8, space)  # 2.8 TB of observations
    assert largest_array_bytes(buffer) < 1e6


# -- stacks of frames --------------------------------------------------------------------------------------------------


def stack_space(n_frames, frame_shape):
    return spaces.Box(0, 255, (n_frames * frame_shape[0], *frame_shape[1:]), dtype=np.uint8)


def stacked_episode(first_number, length, n_frames, frame_shape, zeros):
    """``length`` + 1 stacks of numbered frames. ``zeros``: black before the first frame, or else copies of it."""
    frames = [numbered_frame(first_number + step, frame_shape) for step in range(length + 1)]
    before = np.zeros_like(frames[0]) if zeros else frames[0]
    frames = [before] * (n_frames - 1) + frames
    return [np.concatenate(frames[step : step + n_frames]) for step in range(length + 1)]


def add_observations(buffer, observations, first_reward=0, end="truncated"):
    """One episode with these observations; rewards count up from ``first_reward``."""
    last = len(observations) - 2
    for step in range(last + 1):
        end_here = end if step == last else None
        add(buffer, observations[step], observations[step + 1], reward=first_reward + step, end=end_here)


def assert_stored(buffer, episodes):
    """
    :param episodes: by their first reward, the observations of all episodes. What can be sampled must be as in them
    :return: the number of sampleable transitions
    """
    by_reward = {}
    for first_reward, observations in episodes.items():
        for step in range(len(observations) - 1):
            by_reward[first_reward + step] = (observations, step)
    samples = all_samples(buffer)
    for row, reward in enumerate(samples.rewards[:, 0].int().tolist()):
        observations, start = by_reward[reward]
        expected = [observations[min(start + step, len(observations) - 1)] for step in range(buffer.horizon + 1)]
        np.testing.assert_array_equal(samples.observations[row], np.stack(expected), err_msg=f"transition {reward}")
    return len(samples.mask)


@pytest.mark.parametrize("zeros", [False, True], ids=["copies", "zeros"])
@pytest.mark.parametrize(("n_frames", "channels"), [(4, 1), (3, 3), (2, 3)])
def test_stacked_frames_are_stored_once(n_frames, channels, zeros):
    frame_shape = (channels, 42, 42)
    buffer = make_buffer(420, stack_space(n_frames, frame_shape))
    episodes = {}
    for episode in range(4):
        episodes[100 * episode] = stacked_episode(100 * episode, 99, n_frames, frame_shape, zeros)
        add_observations(buffer, episodes[100 * episode], first_reward=100 * episode)
    assert assert_stored(buffer, episodes) == 4 * 99
    frame_bytes = channels * 42 * 42
    assert array_bytes(buffer) < 1.3 * 420 * frame_bytes


@pytest.mark.parametrize("zeros", [False, True], ids=["copies", "zeros"])
def test_a_transition_leaves_with_the_oldest_frame_it_needs(zeros):
    buffer = make_buffer(30, stack_space(4, (1, 8, 8)))
    episodes = {0: stacked_episode(0, 20, 4, (1, 8, 8), zeros), 100: stacked_episode(100, 12, 4, (1, 8, 8), zeros)}
    add_observations(buffer, episodes[0])
    add_observations(buffer, episodes[100], first_reward=100)
    # 21 + 13 of 30 slots: four frames are overwritten, and the three after them are short of a frame
    assert buffer.size() == 20 - 4 - 3 + 12
    assert assert_stored(buffer, episodes) == buffer.size()
    assert all_samples(buffer).rewards[0, 0] == 7


class PictureEnv(gym.Env):
    """Numbered pictures; episodes of ``length`` steps."""

    action_space = spaces.Discrete(3)

    def __init__(self, env, length, frame_shape=(3, 8, 8)):
        self.number = 10_000 * env
        self.length = length
        self.observation_space = spaces.Box(0, 255, frame_shape, dtype=np.uint8)

    def observe(self):
        self.number += 1
        return numbered_frame(self.number, self.observation_space.shape)

    def reset(self, **kwargs):
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), float(self.number), False, self.steps == self.length, {}


def test_vec_frame_stack():
    n_envs, n_stack = 3, 3
    envs = [lambda env=env: PictureEnv(env, length=7 + env) for env in range(n_envs)]
    env = VecFrameStack(DummyVecEnv(envs), n_stack, channels_order="first")
    buffer = make_buffer(60 * n_envs, env.observation_space, env.action_space, n_envs=n_envs, horizon=3)
    whole = {}  # reward: (observation, next observation)
    last_obs = env.reset().copy()
    for _ in range(50):
        actions = np.zeros(n_envs, dtype=np.int64)
        obs, rewards, dones, infos = env.step(actions)
        next_obs = obs.copy()
        for index in np.flatnonzero(dones):
            next_obs[index] = infos[index]["terminal_observation"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            buffer.add(last_obs, next_obs, actions, rewards, dones, infos)
        for index in range(n_envs):
            whole[rewards[index]] = (last_obs[index].copy(), next_obs[index].copy())
        last_obs = obs.copy()
    samples = all_samples(buffer)
    assert len(samples.mask) > 100
    assert (samples.mask.sum(dim=1) < 3).any()
    for row in range(len(samples.mask)):
        for step in range(int(samples.mask[row].sum())):
            observation, next_observation = whole[samples.rewards[row, step].item()]
            np.testing.assert_array_equal(samples.observations[row, step], observation)
            np.testing.assert_array_equal(samples.observations[row, step + 1], next_observation)


def test_stack_in_a_dict():
    space = spaces.Dict({"image": stack_space(4, (1, 40, 40)), "vector": NUMBER})
    buffer = make_buffer(210, space)
    images = stacked_episode(0, 200, 4, (1, 40, 40), zeros=False)
    for step in range(200):
        obs, next_obs = (
            {"image": images[number][None], "vector": np.full((1, 1), number, dtype=np.float32)} for number in (step, step + 1)
        )
        buffer.add(obs, next_obs, np.zeros((1, 1)), np.array([step]), np.array([step == 199]), [{}])
    samples = all_samples(buffer)
    assert len(samples.mask) == 200
    for start in range(200):
        numbers = np.minimum(start + np.arange(6), 200)
        np.testing.assert_array_equal(samples.observations["vector"][start, :, 0], numbers)
        np.testing.assert_array_equal(samples.observations["image"][start], np.stack([images[n] for n in numbers]))
    assert array_bytes(buffer) < 1.5 * 210 * 40 * 40


@pytest.mark.parametrize("zeros", [False, True], ids=["copies", "zeros"])
@pytest.mark.parametrize("black_steps", [1, 2, 3, 10])
def test_still_start_of_a_colour_stack(black_steps, zeros):
    """While the picture is black, a stack of three colour pictures looks like any other stack."""
    buffer = make_buffer(200, stack_space(3, (3, 10, 10)))
    black = np.zeros((3, 10, 10), dtype=np.uint8)
    frames = [black] * (3 + black_steps) + [numbered_frame(number, (3, 10, 10)) for number in range(30)]
    episodes = {0: [np.concatenate(frames[step : step + 3]) for step in range(len(frames) - 2)]}
    episodes[100] = stacked_episode(500, 20, 3, (3, 10, 10), zeros)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        add_observations(buffer, episodes[0])
        add_observations(buffer, episodes[100], first_reward=100)
    assert buffer.size() == len(episodes[0]) - 1 + 20
    assert assert_stored(buffer, episodes) == buffer.size()


@pytest.mark.parametrize("how", ["middle", "start", "unstacked"])
def test_stack_that_breaks_later_warns_once(how):
    """A frame is missing in the middle of an episode; an episode starts in the middle; there are no stacks any more."""
    frame_shape = (1, 12, 12)
    buffer = make_buffer(300, stack_space(4, frame_shape))
    episodes = {reward: stacked_episode(reward, 20, 4, frame_shape, zeros=False) for reward in (0, 100)}
    for broken in (200, 300):
        observations = stacked_episode(broken, 30, 4, frame_shape, zeros=False)
        if how == "middle":
            del observations[10]
        elif how == "start":
            del observations[:10]
        else:
            observations = [numbered_frame(broken + step, (4, 12, 12)) for step in range(20)]
        episodes[broken] = observations
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reward in (0, 100):
            add_observations(buffer, episodes[reward], first_reward=reward)
    assert array_bytes(buffer) < 2 * 300 * 12 * 12
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for reward in (200, 300):
            add_observations(buffer, episodes[reward], first_reward=reward)
            assert_stored(buffer, episodes)
    (warning,) = caught
    assert issubclass(warning.category, UserWarning)
    assert "GB" in str(warning.message) or "MB" in str(warning.message)
    assert assert_stored(buffer, episodes) == buffer.size() == sum(len(observations) - 1 for observations in episodes.values())


def test_broken_stack_after_wrap_around():
    """What the single frames still hold is kept, whole, where it was."""
    frame_shape = (1, 12, 12)
    buffer = make_buffer(40, stack_space(4, frame_shape))
    episodes = {reward: stacked_episode(reward, 17, 4, frame_shape, zeros=True) for reward in (0, 100, 200)}
    for reward, observations in episodes.items():
        add_observations(buffer, observations, first_reward=reward)
    before = all_samples(buffer).rewards[:, 0].tolist()
    assert before[0] > 0
    episodes[300] = [numbered_frame(300 + step, (4, 12, 12)) for step in range(6)]
    with pytest.warns(UserWarning, match="[GM]B"):
        add_observations(buffer, episodes[300], first_reward=300)
    after = all_samples(buffer).rewards[:, 0].tolist()
    assert after[-5:] == [300, 301, 302, 303, 304]
    # Six slots are written anew; what is whole by then does not need the frames before it
    assert set(before[6:]) <= set(after)
    assert assert_stored(buffer, episodes) == len(after) == buffer.size()


def test_image_that_is_no_stack():
    buffer = make_buffer(60, stack_space(4, (1, 12, 12)))
    episodes = {reward: [numbered_frame(reward + step, (4, 12, 12)) for step in range(21)] for reward in (0, 100)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reward, observations in episodes.items():
            add_observations(buffer, observations, first_reward=reward)
    assert assert_stored(buffer, episodes) == buffer.size() == 40


# -- reset, saving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refill", ["vector", "stack"])
def test_reset(refill):
    space = NUMBER if refill == "vector" else stack_space(4, (1, 8, 8))
    buffer = make_buffer(50, space)

    def fill(first):
        if refill == "vector":
            episode = [np.array([first + step], dtype=np.float32) for step in range(13)]
        else:
            episode = stacked_episode(first, 12, 4, (1, 8, 8), zeros=False)
        add_observations(buffer, episode, first_reward=first, end="terminated")
        return episode

    for first in range(0, 100, 20):
        fill(first)
    running = fill(200)
    add(buffer, running[0], running[1])
    buffer.update_priorities(buffer.sampling_probabilities()[0], np.full(buffer.n_sampleable, 5.0))
    buffer.reset()
    assert buffer.size() == buffer.n_sampleable == 0
    assert len(buffer.sampling_probabilities()[0]) == 0
    assert not buffer.has_terminated
    assert buffer.max_priority == 1
    episode = fill(300)
    assert assert_stored(buffer, {300: episode}) == buffer.size() == 12
    np.testing.assert_allclose(buffer.sampling_probabilities()[1], 1 / 12)


def test_update_after_a_reset_is_ignored():
    buffer = make_buffer(buffer_size=1000)
    add_episode(buffer, 0, 900, "truncated")
    indices, _ = buffer.sampling_probabilities()
    buffer.reset()
    buffer.update_priorities(indices, np.full(len(indices), 2.0))
    assert buffer.n_sampleable == 0
    assert buffer.max_priority == 1


@pytest.mark.parametrize("stacked", [False, True], ids=["vector", "stack"])
def test_save_and_load(tmp_path, stacked):
    """A loaded buffer goes on exactly as the saved one, even in the middle of an episode and after a wrap-around."""
    space = stack_space(4, (1, 8, 8)) if stacked else NUMBER
    observations = (
        stacked_episode(0, 60, 4, (1, 8, 8), zeros=False)
        if stacked
        else [np.array([number], dtype=np.float32) for number in range(61)]
    )
    buffer = make_buffer(30, space)
    for step in range(45):
        add(buffer, observations[step], observations[step + 1], reward=step)
    indices, _ = buffer.sampling_probabilities()
    buffer.update_priorities(indices, np.linspace(0.5, 3, len(indices)))
    save_to_pkl(tmp_path / "buffer.pkl", buffer)
    loaded = load_from_pkl(tmp_path / "buffer.pkl")

    for step in range(45, 60):
        for actual, expected in zip(loaded.sampling_probabilities(), buffer.sampling_probabilities(), strict=True):
            np.testing.assert_array_equal(actual, expected)
        assert loaded.size() == buffer.size()
        assert loaded.max_priority == buffer.max_priority == 3
        assert loaded.mean_abs_reward() == buffer.mean_abs_reward()
        batches = []
        for one in (loaded, buffer):
            np.random.seed(step)
            batches.append((*one.sample(20), *one.sample_n_step(20)))
        for actual, expected in zip(*batches, strict=True):
            np.testing.assert_array_equal(actual, expected)
        for one in (loaded, buffer):
            add(one, observations[step], observations[step + 1], reward=step)
    assert loaded.n_sampleable == buffer.n_sampleable > 10


# -- the tree of priorities --------------------------------------------------------------------------------------------


class NumpyTree:
    """The tree with arrays instead of tensors."""

    def __init__(self, capacity):
        self.tree = PriorityTree(capacity)

    @property
    def total(self):
        return self.tree.total

    def get(self, indices):
        return self.tree.get(th.from_numpy(indices)).numpy()

    def set(self, indices, priorities):
        self.tree.set(th.from_numpy(indices), th.as_tensor(priorities, dtype=th.float64))

    def sample(self, n):
        return self.tree.sample(n).numpy()


@pytest.mark.parametrize("capacity", [100, 31, 32, 33, 1024, 1025, 40_000])
def test_tree_draws_in_proportion(capacity):
    generator = np.random.RandomState(capacity)
    used = generator.choice(capacity, size=min(capacity, 300), replace=False)
    priorities = np.zeros(capacity)
    priorities[used] = generator.uniform(0.1, 3, size=len(used))
    priorities[used[::7]] = 0
    tree = NumpyTree(capacity)
    tree.set(np.arange(capacity), priorities)
    np.testing.assert_array_equal(tree.get(np.arange(capacity)), priorities)
    assert tree.total == pytest.approx(priorities.sum(), rel=1e-12)
    np.random.seed(4)
    draws = tree.sample(200_000)
    assert draws.shape == (200_000,)
    assert_frequencies(draws, priorities / priorities.sum())


def test_tree_draws_change_with_the_priorities():
    tree = NumpyTree(200)
    tree.set(np.arange(200), 1.0)
    np.random.seed(5)
    assert_frequencies(tree.sample(50_000), np.full(200, 1 / 200))
    tree.set(np.arange(100), 0.0)
    tree.set(np.arange(100, 150), 3.0)
    expected = np.repeat([0, 0, 3, 1], 50) / 200
    assert_frequencies(tree.sample(50_000), expected)


def test_tree_uses_the_global_generator():
    tree = NumpyTree(1000)
    tree.set(np.arange(1000), 1.0)
    np.random.seed(6)
    first, then = tree.sample(10), tree.sample(10)
    np.random.seed(6)
    np.testing.assert_array_equal(tree.sample(10), first)
    assert not np.array_equal(first, then)


@pytest.mark.parametrize("capacity", [2, 33, 1000])
@pytest.mark.parametrize("only", ["first", "middle", "last"])
def test_tree_never_draws_priority_zero(capacity, only):
    index = {"first": 0, "middle": capacity // 2, "last": capacity - 1}[only]
    tree = NumpyTree(capacity)
    tree.set(np.array([index]), np.array([0.3]))
    np.random.seed(7)
    assert (tree.sample(20_000) == index).all()
    # Sums of thirds are not exact, so rounding may point past the last of them
    alive = np.arange(0, capacity, 2)
    tree.set(np.arange(capacity), 0.0)
    tree.set(alive, 1 / 3)
    assert set(tree.sample(100_000).tolist()) <= set(alive.tolist())


def test_tree_with_extreme_ratios():
    capacity = 2000
    exponents = np.random.RandomState(8).permutation(np.linspace(-30, 30, capacity))
    priorities = 10.0**exponents
    tree = NumpyTree(capacity)
    tree.set(np.arange(capacity), priorities)
    assert tree.total == pytest.approx(priorities.sum(), rel=1e-9)
    np.random.seed(8)
    assert (exponents[tree.sample(10_000)] > 20).all()
    # The smallest come out unharmed when everything above them goes
    for limit in (20, 0, -25):
        tree.set(np.flatnonzero(exponents > limit), 0.0)
        left = np.where(exponents > limit, 0, priorities)
        assert tree.total == pytest.approx(left.sum(), rel=1e-9)
        draws = tree.sample(10_000)
        assert (exponents[draws] <= limit).all()
        assert (exponents[draws] > limit - 10).all()
    tree.set(np.arange(capacity), 0.0)
    assert tree.total == 0


def test_tree_takes_the_last_of_duplicates():
    tree = NumpyTree(100)
    tree.set(np.array([3, 70, 3, 3, 70]), np.array([9.0, 1.0, 8.0, 2.0, 5.0]))
    assert tree.get(np.array([70, 3, 3, 4])).tolist() == [5, 2, 2, 0]
    assert tree.total == 7


def test_tree_of_one():
    tree = NumpyTree(1)
    assert tree.total == 0
    tree.set(np.array([0]), np.array([0.7]))
    assert tree.total == 0.7
    assert tree.sample(5).tolist() == [0] * 5


@pytest.mark.parametrize("capacity", [5, 32, 100, 1023, 1024, 1025, 33_000])
def test_tree_does_not_drift(capacity):
    """Each sum is the sum of its leaves after 100,000 updates."""
    generator = np.random.RandomState(9)
    expected = np.zeros(capacity)
    tree = NumpyTree(capacity)
    for _ in range(1000):
        indices = generator.randint(capacity, size=100)
        priorities = generator.uniform(0, 1, size=100) * 10.0 ** generator.randint(-8, 8, size=100)
        expected[indices] = priorities
        tree.set(indices, priorities)
    np.testing.assert_array_equal(tree.get(np.arange(capacity)), expected)
    assert tree.total == pytest.approx(expected.sum(), rel=1e-9)
    tree.set(np.arange(1, capacity), 0.0)
    assert tree.total == pytest.approx(expected[0], rel=1e-9)


class Counted(TorchDispatchMode):
    """Counts the numbers in the results of all operations, but for views."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            self.numbers += out.numel()
        return out


def test_sampling_makes_no_pass_over_all_priorities():
    """Drawing a batch takes as much work from a million as from ten thousand."""
    counts = []
    for capacity in (10_000, 1_000_000):
        tree = NumpyTree(capacity)
        tree.set(np.arange(capacity), 1.0)
        with Counted() as counted:
            tree.sample(256)
        counts.append(counted.numbers)
    # Numbers of all results: a few operations on the children of a node, for each level
    assert 256 * PriorityTree.HOST_FAN_OUT < counts[0] == counts[1] < 256 * PriorityTree.HOST_FAN_OUT * 4 * 5


def test_setting_makes_no_pass_over_all_priorities():
    """Priorities of other nodes are not looked at."""
    tree = NumpyTree(1_000_000)
    tree.set(np.arange(1_000_000), 1.0)
    tree.tree.leaves[256:] = np.nan
    tree.set(np.arange(256), 2.0)
    assert tree.total == 1_000_256


@pytest.mark.parametrize("capacity", [1, 40, 5000])
def test_empty_tree(capacity):
    tree = NumpyTree(capacity)
    assert tree.total == 0
    np.testing.assert_array_equal(tree.get(np.arange(capacity)), np.zeros(capacity))
    tree.set(np.array([0]), np.array([2.0]))
    assert tree.get(np.arange(capacity)).sum() == 2


def test_a_refused_first_add_leaves_the_buffer_usable():
    buffer = make_buffer(buffer_size=20)
    with pytest.raises(ValueError, match="Environment 0 gave the reward nan"):
        add(buffer, np.zeros(1, dtype=np.float32), np.ones(1, dtype=np.float32), reward=np.nan)
    assert buffer.size() == 0
    add_episode(buffer, 0, 3, "truncated")
    assert buffer.size() == buffer.n_sampleable == 3


@pytest.mark.parametrize("told_apart", [True, False])
def test_timeouts(told_apart):
    """Without ``handle_timeout_termination`` an episode that is cut off counts as terminated, as in SB3's buffers."""
    space, actions = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 1, (1,))
    buffer = SubtrajectoryReplayBuffer(50, space, actions, device="cpu", handle_timeout_termination=told_apart)
    for t in range(12):
        obs, next_obs = np.full((1, 2), t / 20, np.float32), np.full((1, 2), (t + 1) / 20, np.float32)
        done = np.array([t == 9])
        buffer.add(obs, next_obs, np.zeros((1, 1)), np.ones(1), done, [{"TimeLimit.truncated": bool(done[0])}])
    assert buffer.has_terminated is not told_apart
    samples = buffer.get_n_step(np.array([9]))
    assert samples.terminated[0, 0] == (not told_apart)
