"""Transitions from elsewhere are stored as if an environment had given them."""

import numpy as np
import pytest
from envs import BOX, VECTOR, SpaceEnv, tiny_model
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_mrq import DRQ, MRQ
from sb3_mrq.buffers import HerSubtrajectoryReplayBuffer, SubtrajectoryReplayBuffer
from sb3_mrq.datasets import load_minari

STACK = spaces.Box(0, 255, (3, 8, 8), np.uint8)
DICT = spaces.Dict(observation=VECTOR, achieved_goal=VECTOR, desired_goal=VECTOR)


def random_episode(space, length, rng):
    """Observations (length + 1, ...), actions, rewards."""
    if isinstance(space, spaces.Dict):
        obs = {key: random_episode(part, length, rng)[0] for key, part in space.spaces.items()}
    elif space is STACK:
        frames = rng.integers(1, 255, (length + 1, 8, 8), dtype=np.uint8)
        padded = np.concatenate([frames[:1], frames[:1], frames])
        obs = np.stack([padded[i : i + 3] for i in range(length + 1)])
    else:
        obs = rng.normal(size=(length + 1, *space.shape)).astype(np.float32)
    return obs, rng.uniform(-1, 1, (length, 2)).astype(np.float32), rng.normal(size=length).astype(np.float32)


def rows(obs, part):
    return {key: value[part] for key, value in obs.items()} if isinstance(obs, dict) else obs[part]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.booleans(), st.booleans()), min_size=1, max_size=8),
    size=st.integers(12, 40),
    kind=st.sampled_from(["vector", "stack", "goal", "fade"]),
)
def test_as_one_by_one(lengths, size, kind):
    """
    :param lengths: of the episodes, whether they are terminated, and whether they are given at once
    """
    rng = np.random.default_rng(0)
    space = {"stack": STACK, "goal": DICT}.get(kind, VECTOR)
    buffer_class = HerSubtrajectoryReplayBuffer if kind == "goal" else SubtrajectoryReplayBuffer
    kwargs = dict(horizon=4, n_steps=2) | (dict(fade=0.7, fade_min=0.2) if kind == "fade" else {})
    one_by_one, at_once = (buffer_class(size, space, BOX, "cpu", 1, **kwargs) for _ in range(2))
    for length, terminated, whole in lengths:
        obs, actions, rewards = random_episode(space, length, rng)
        for buffer in (one_by_one, at_once):
            if buffer is at_once and whole:
                buffer.add_episode(0, obs, actions, rewards, terminated)
                continue
            for i in range(length):
                done = i == length - 1
                infos = [{"TimeLimit.truncated": done and not terminated}]
                part = slice(i, i + 1), slice(i + 1, i + 2)
                buffer.add(rows(obs, part[0]), rows(obs, part[1]), actions[part[0]], rewards[part[0]], np.array([done]), infos)
    states = [buffer.get_state() for buffer in (one_by_one, at_once)]
    assert states[0].numbers == states[1].numbers
    for first, second in ((states[0].slots, states[1].slots), (states[0].environments, states[1].environments)):
        assert first.keys() == second.keys()
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for first, second in zip(one_by_one.sampling_probabilities(), at_once.sampling_probabilities(), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-12)


def transitions(lengths=(5, 7, 3), terminated=(0, 1, 0), observation_space=VECTOR, action_space=BOX):
    """Episodes as arrays, with actions as the environment takes them."""
    rng = np.random.default_rng(1)
    episodes = [random_episode(observation_space, length, rng) for length in lengths]
    n = sum(lengths)
    ends = np.cumsum(lengths) - 1
    data = dict(
        observations=np.concatenate([obs[:-1] for obs, *_ in episodes]),
        actions=np.stack([action_space.sample() for _ in range(n)]),
        rewards=np.concatenate([rewards for *_, rewards in episodes]),
        next_observations=np.concatenate([obs[1:] for obs, *_ in episodes]),
        terminated=np.zeros(n, bool),
        truncated=np.zeros(n, bool),
    )
    data["terminated"][ends] = terminated
    data["truncated"][ends] = np.logical_not(terminated)
    return data


@pytest.mark.parametrize("algorithm", [MRQ, DRQ])
@pytest.mark.parametrize("n_envs", [1, 2])
def test_model(algorithm, n_envs):
    space = spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))
    model = tiny_model(DummyVecEnv([lambda: SpaceEnv(action_space=space)] * n_envs), algorithm=algorithm)
    data = transitions(action_space=space)
    model.add_transitions(**data)
    buffer = model.replay_buffer
    assert buffer.size() == buffer.n_sampleable == 15
    assert buffer.has_terminated
    # Each transition is there once, and its action in [-1, 1]
    batch = buffer.get_subtrajectories(buffer.sampling_probabilities()[0])
    order = [int(np.flatnonzero((data["observations"] == obs.numpy()).all(axis=1))[0]) for obs in batch.observations[:, 0]]
    assert sorted(order) == list(range(15))
    np.testing.assert_allclose(batch.actions[:, 0], ((data["actions"] - [0, 5]) / [2, 5])[order], atol=1e-6)
    np.testing.assert_array_equal(batch.rewards[:, 0], data["rewards"][order])
    # Training needs no environment steps, and collecting goes on afterwards
    model.train(3, batch_size=4)
    model.learn(30, reset_num_timesteps=False)
    assert model._n_updates > 3


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=5), spaces.MultiDiscrete([3, 2]), spaces.MultiBinary(2)])
def test_discrete_actions(space):
    model = tiny_model(SpaceEnv(action_space=space))
    data = transitions(action_space=space)
    model.add_transitions(**data)
    stored = model.replay_buffer.get_n_step(np.arange(5)).actions.numpy()
    np.testing.assert_array_equal(stored.reshape(data["actions"][:5].shape), data["actions"][:5])


def with_(name, value):
    def change(data):
        data[name] = value(data[name]) if callable(value) else value

    return change


def set_entry(row, value):
    def change(array):
        array = array.copy()
        array[row] = value
        return array

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (with_("observations", set_entry(3, np.nan)), "observations hold nan in row 3"),
        (with_("next_observations", set_entry(3, np.inf)), "next observations hold inf in row 3"),
        (with_("rewards", set_entry(2, np.nan)), "rewards hold nan in row 2"),
        (with_("actions", set_entry(1, 1.5)), r"actions hold \[1.5, 1.5\] in row 1, which is not in Box"),
        (with_("actions", lambda a: a[:-1]), r"actions have the shape \(14, 2\), but must have \(15, 2\)"),
        (with_("observations", lambda a: a[:, :2]), r"observations have the shape \(15, 2\), but must have \(15, 3\)"),
        (with_("terminated", lambda a: a[:-1]), "terminations have the shape"),
        (with_("truncated", set_entry(-1, False)), "last episode has no end"),
        (with_("truncated", set_entry(4, False)), "row 5 is not the next observation"),
        (with_("rewards", []), "no transitions"),
        (with_("rewards", lambda a: a.astype(str)), "must be numbers"),
    ],
)
def test_bad_data(change, message):
    model = tiny_model(SpaceEnv())
    data = transitions()
    change(data)
    with pytest.raises(ValueError, match=message):
        model.add_transitions(**data)
    assert model.replay_buffer.size() == 0


def test_too_long_for_the_buffer():
    model = tiny_model(SpaceEnv(), buffer_size=20)
    with pytest.raises(ValueError, match=r"An episode has 20 transitions, .* needs 21 slots .* It has 20"):
        model.add_transitions(**transitions((5, 20), (0, 0)))
    model.add_transitions(**transitions((19, 19), (0, 0)))
    assert model.replay_buffer.n_sampleable == 19


@pytest.fixture
def minari_dataset(tmp_path, monkeypatch):
    """A dataset of 12 episodes, made by Minari's own collector."""
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def make(action_space=BOX):
        env = minari.DataCollector(SpaceEnv(action_space=action_space))
        for episode in range(12):
            env.reset(seed=episode)
            ended = False
            while not ended:
                *_, terminated, truncated, _ = env.step(env.action_space.sample())
                ended = terminated or truncated
        return env.create_dataset("test/random-v0", algorithm_name="random", code_permalink="", author="", author_email="")

    return make


@pytest.mark.parametrize("action_space", [BOX, spaces.Discrete(3)])
def test_minari(minari_dataset, action_space):
    dataset = minari_dataset(action_space)
    model = tiny_model(SpaceEnv(action_space=action_space))
    load_minari("test/random-v0", model)
    assert model.replay_buffer.n_sampleable == dataset.total_steps == 72
    episode = next(dataset.iterate_episodes())
    stored = model.replay_buffer.get_subtrajectories(np.array([0]))
    np.testing.assert_array_equal(stored.observations[0, 0], episode.observations[0])
    np.testing.assert_allclose(
        stored.rewards[0, : len(episode.rewards)], episode.rewards[: stored.rewards.shape[1]], rtol=1e-6
    )
    model.train_offline(3)


def test_minari_in_turn(minari_dataset):
    """Episodes are spread over the environments."""
    model = tiny_model(DummyVecEnv([SpaceEnv] * 3))
    load_minari(minari_dataset(), model)
    starts = model.replay_buffer.sampling_probabilities()[0]
    assert np.bincount(starts // model.replay_buffer.buffer_size).tolist() == [24, 24, 24]


def test_minari_of_other_spaces(minari_dataset):
    dataset = minari_dataset()
    model = tiny_model(SpaceEnv(action_space=spaces.Discrete(3)))
    with pytest.raises(ValueError, match=r"has the action space Box.*, but the model has Discrete\(3\)"):
        load_minari(dataset, model)
    assert model.replay_buffer.size() == 0
