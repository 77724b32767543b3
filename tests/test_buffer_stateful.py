"""
Any sequence of calls gives the same result as the naive oracle in ``buffer_oracle.py``.

``SB3_MRQ_HYPOTHESIS_PROFILE=long`` searches for longer.
"""

import io
import os
import pickle
import warnings

import numpy as np
import pytest
import torch as th
from buffer_oracle import BufferOracle, Observation, content_key, numbered_frame
from gymnasium import spaces
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.losses import n_step_return
from sb3_mrq.persist.replay_files import read_replay_buffer, write_replay_buffer

LONG = os.environ.get("SB3_MRQ_HYPOTHESIS_PROFILE") == "long"
SETTINGS = settings(
    max_examples=2000 if LONG else 100,
    stateful_step_count=60 if LONG else 25,
    deadline=None,
    phases=[phase for phase in Phase if phase is not Phase.explain],  # it takes minutes and says nothing here
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

GAMMA = 0.9
MAX_ENVS = 4
# What happens to one environment in one step. "cut": it was reset without a word. "in_place": the next episode starts
# from the very observation that this one ended with
STEP, TERMINATE, TRUNCATE, CUT, CUT_TERMINATE, CUT_TRUNCATE, TERMINATE_IN_PLACE = range(7)
EVENTS = st.sampled_from([STEP] * 8 + [TERMINATE, TRUNCATE, CUT, CUT_TERMINATE, CUT_TRUNCATE, TERMINATE_IN_PLACE])
STEPS = st.lists(st.tuples(*[EVENTS] * MAX_ENVS), min_size=1, max_size=8)


# -- environments: every observation they give is the only one of its content ------------------------------------------


class VectorWorld:
    """Float vectors."""

    frames = 1
    can_start_anywhere = True  # an episode may start from any observation
    observation_space: spaces.Space = spaces.Box(-np.inf, np.inf, (3,), dtype=np.float32)
    action_space: spaces.Space = spaces.Box(-1, 1, (2,), dtype=np.float32)

    def __init__(self) -> None:
        self.counter = 0

    def count(self) -> int:
        self.counter += 1
        return self.counter

    def start(self, env: int) -> Observation:
        return self.step(env)

    def step(self, env: int) -> Observation:
        number = self.count()
        return np.array([number, env, -0.1 * number], dtype=np.float32)

    def action(self) -> np.ndarray:
        return np.array([np.sin(self.counter), np.cos(self.counter)], dtype=np.float32)

    def reward(self) -> float:
        return (self.counter * 37 % 129 - 64) / 8  # exact in float32


class StackWorld(VectorWorld):
    """
    The last ``frames`` pictures stacked on the channel axis.

    :param zeros: whether what comes before the first picture is black, or else copies of the first picture
    """

    can_start_anywhere = False

    def __init__(self, frames: int, frame_shape: tuple[int, int, int], zeros: bool):
        super().__init__()
        self.frames = frames
        self.frame_shape = frame_shape
        self.zeros = zeros
        self.stacks: dict[int, list[np.ndarray]] = {}
        shape = (frames * frame_shape[0], *frame_shape[1:])
        self.observation_space = spaces.Box(0, 255, shape, dtype=np.uint8)

    def start(self, env: int) -> Observation:
        first = numbered_frame(self.count(), self.frame_shape)
        before = np.zeros_like(first) if self.zeros else first
        self.stacks[env] = [before] * (self.frames - 1) + [first]
        return np.concatenate(self.stacks[env])

    def step(self, env: int) -> Observation:
        self.stacks[env] = [*self.stacks[env][1:], numbered_frame(self.count(), self.frame_shape)]
        return np.concatenate(self.stacks[env])


class DictWorld(StackWorld):
    """
    An image and a vector.

    :param stacked: whether the image is a stack of two pictures, or else unrelated channels
    """

    action_space = spaces.Discrete(7)

    def __init__(self, stacked: bool, zeros: bool):
        super().__init__(frames=2 if stacked else 1, frame_shape=(1, 5, 5) if stacked else (2, 5, 5), zeros=zeros)
        self.can_start_anywhere = not stacked
        vector_space = VectorWorld.observation_space
        self.observation_space = spaces.Dict({"image": self.observation_space, "vector": vector_space})

    def start(self, env: int) -> Observation:
        return {"image": super().start(env), "vector": np.array([self.counter, env, 0.5], dtype=np.float32)}

    def step(self, env: int) -> Observation:
        return {"image": super().step(env), "vector": np.array([self.counter, env, 0.25], dtype=np.float32)}

    def action(self) -> np.ndarray:
        return np.array(self.counter % 7)


class MessyWorld(VectorWorld):
    """
    Images that are sometimes a stack of frames, sometimes not, together with a vector of the running number.

    ``style`` may change at any time.
    """

    styles = ("zeros", "copies", "black", "still", "unstacked", "middle", "colours")
    channels = 6

    def __init__(self, frame_channels: int):
        super().__init__()
        self.frame_shape = (frame_channels, 7, 7)
        self.frames = self.channels // frame_channels
        self.style = "zeros"
        self.stacks: dict[int, np.ndarray] = {}
        self.observation_space = spaces.Dict(
            {
                "image": spaces.Box(0, 255, (self.channels, 7, 7), dtype=np.uint8),
                "vector": VectorWorld.observation_space,
            }
        )

    def frame(self) -> np.ndarray:
        if self.style == "black":
            return np.zeros(self.frame_shape, dtype=np.uint8)
        if self.style == "still":
            return np.full(self.frame_shape, 200, dtype=np.uint8)
        if self.style == "colours":  # still, but the channels of a picture differ
            return numbered_frame(1, self.frame_shape)
        return numbered_frame(self.count(), self.frame_shape)

    def start(self, env: int) -> Observation:
        if self.style in ("middle", "unstacked"):
            frames = [self.frame() for _ in range(self.frames)]
        else:
            first = self.frame()
            before = np.zeros_like(first) if self.style == "zeros" else first
            frames = [before] * (self.frames - 1) + [first]
        return self.observe(env, np.concatenate(frames))

    def step(self, env: int) -> Observation:
        if self.style == "unstacked":
            return self.start(env)
        return self.observe(env, np.concatenate([self.stacks[env][self.frame_shape[0] :], self.frame()]))

    def observe(self, env: int, stack: np.ndarray) -> Observation:
        self.stacks[env] = stack
        return {"image": stack, "vector": VectorWorld.step(self, env)}


# -- the machine -------------------------------------------------------------------------------------------------------


def batch(observations: list[Observation]) -> Observation:
    if isinstance(observations[0], dict):
        return {key: batch([observation[key] for observation in observations]) for key in observations[0]}
    return np.stack(observations)


def rows(observations: th.Tensor | dict[str, th.Tensor]) -> Observation:
    if isinstance(observations, dict):
        return {key: value.numpy() for key, value in observations.items()}
    return observations.numpy()


def take(observations: Observation, index) -> Observation:
    if isinstance(observations, dict):
        return {key: value[index] for key, value in observations.items()}
    return observations[index]


def assert_same_observations(actual: Observation, expected: Observation) -> None:
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)
    else:
        np.testing.assert_array_equal(actual, expected)


# What every machine draws at the start
SHAPE = {
    "n_envs": st.integers(1, MAX_ENVS),
    "horizon": st.integers(1, 5),
    "n_steps": st.integers(1, 5),
    "spare_slots": st.integers(0, 14),
    "remainder": st.integers(0, MAX_ENVS - 1),
}


class BufferMachine(RuleBasedStateMachine):
    """Drives a buffer and an oracle together. Subclasses say with which observations."""

    world: VectorWorld
    keeps_frames = True  # whether it is known from the start that stacks are stored as single frames

    def set_up(self, n_envs: int, horizon: int, n_steps: int, spare_slots: int, remainder: int, **fading: float) -> None:
        self.n_envs = n_envs
        self.horizon = horizon
        self.n_steps = n_steps
        # A ring too small for a stack may hold whole observations instead: then what leaves when is no property to test
        slots = max(horizon, n_steps) + 1 + (self.world.frames if self.keeps_frames else 1) + spare_slots
        self.buffer_size = slots * n_envs + remainder % n_envs
        self.buffer = SubtrajectoryReplayBuffer(
            self.buffer_size,
            self.world.observation_space,
            self.world.action_space,
            device="cpu",
            n_envs=n_envs,
            horizon=horizon,
            n_steps=n_steps,
            **fading,
        )
        self.fading = fading
        self.oracles = self.make_oracles()
        self.newest: list[Observation | None] = [None] * n_envs  # None: the next observation starts an episode
        self.seen_indices: set[int] = set()

    def make_oracles(self) -> list[BufferOracle]:
        return [BufferOracle(self.buffer_size, self.n_envs, self.horizon, self.n_steps, self.world.frames, **self.fading)]

    @rule(steps=STEPS)
    def add(self, steps):
        for events in steps:
            obs, next_obs, actions, rewards, dones, infos = [], [], [], [], [], []
            for env, event in enumerate(events[: self.n_envs]):
                if event in (CUT, CUT_TERMINATE, CUT_TRUNCATE):
                    self.newest[env] = None
                if self.newest[env] is None:
                    self.newest[env] = self.world.start(env)
                obs.append(self.newest[env])
                next_obs.append(self.world.step(env))
                actions.append(self.world.action())
                rewards.append(self.world.reward())
                truncated = event in (TRUNCATE, CUT_TRUNCATE)
                dones.append(truncated or event in (TERMINATE, CUT_TERMINATE, TERMINATE_IN_PLACE))
                infos.append({"TimeLimit.truncated": truncated})
                in_place = event == TERMINATE_IN_PLACE and self.world.can_start_anywhere
                self.newest[env] = None if dones[-1] and not in_place else next_obs[-1]
            transition = (
                batch(obs),
                batch(next_obs),
                np.stack(actions),
                np.array(rewards, dtype=np.float32),
                np.array(dones),
                infos,
            )
            self.buffer_add(*transition)
            for oracle in self.oracles:
                oracle.add(*transition)

    def buffer_add(self, *transition) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.buffer.add(*transition)

    @rule(batch_size=st.integers(1, 12))
    def sample(self, batch_size):
        if self.buffer.n_sampleable == 0:
            return
        sampleable = set(self.buffer.sampling_probabilities()[0].tolist())
        samples = self.buffer.sample(batch_size)
        n_step_samples = self.buffer.sample_n_step(batch_size)
        for drawn, looked_up in (
            (samples, self.buffer.get_subtrajectories(samples.indices)),
            (n_step_samples, self.buffer.get_n_step(n_step_samples.indices)),
        ):
            assert drawn.indices.shape == (batch_size,)
            assert set(drawn.indices.tolist()) <= sampleable
            np.testing.assert_array_equal(drawn.indices, looked_up.indices)
            assert_same_observations(rows(drawn.observations), rows(looked_up.observations))
            for field in ("actions", "rewards", "terminated", "mask"):
                assert th.equal(getattr(drawn, field), getattr(looked_up, field)), field
        assert_same_observations(rows(n_step_samples.next_observations), rows(looked_up.next_observations))

    @rule(certain=st.sampled_from([False] * 9 + [True]))
    def reset(self, certain):
        if certain:
            self.buffer.reset()
            for oracle in self.oracles:
                oracle.reset()
            if not self.world.can_start_anywhere:
                self.newest = [None] * self.n_envs

    @rule()
    def save_and_load(self):
        self.buffer = pickle.loads(pickle.dumps(self.buffer))

    @invariant()
    def same_as_oracle(self):
        (oracle,) = self.oracles
        starts = oracle.sampleable()
        assert self.buffer.size() == oracle.size()
        assert self.buffer.n_sampleable == len(starts)
        assert self.buffer.max_priority == pytest.approx(oracle.max_priority, rel=1e-12)
        assert self.buffer.has_terminated == oracle.has_terminated
        if oracle.size() > 0:
            assert self.buffer.mean_abs_reward() == pytest.approx(oracle.mean_abs_reward(), rel=1e-6)
        keys, probabilities = self.same_contents(oracle)
        assert keys.keys() == starts.keys()
        expected = oracle.probabilities()
        assert probabilities == pytest.approx(np.array([expected[key] for key in keys]), rel=1e-12)

    def same_contents(self, oracle: BufferOracle) -> tuple[dict[bytes, int], np.ndarray]:
        """
        Compare all that can be sampled with the oracle.

        :return: the index of each start by content, in the order of the probabilities, and the probabilities
        """
        indices, probabilities = self.buffer.sampling_probabilities()
        assert len(set(indices.tolist())) == len(indices) == len(probabilities)
        self.seen_indices.update(indices.tolist())
        if len(indices) == 0:
            return {}, probabilities
        samples = self.buffer.get_subtrajectories(indices)
        n_step_samples = self.buffer.get_n_step(indices)
        np.testing.assert_array_equal(samples.indices, indices)
        np.testing.assert_array_equal(n_step_samples.indices, indices)
        observations, n_step_observations = rows(samples.observations), rows(n_step_samples.observations)
        keys = [content_key(take(observations, (row, 0))) for row in range(len(indices))]
        starts = oracle.sampleable()
        assert set(keys) <= starts.keys()

        expected = [oracle.subtrajectory(starts[key], self.horizon) for key in keys]
        assert_same_observations(observations, batch([batch(row["observations"]) for row in expected]))
        expected_n_step = [oracle.subtrajectory(starts[key], self.n_steps) for key in keys]
        for actual, wanted in ((samples, expected), (n_step_samples, expected_n_step)):
            for field in ("rewards", "terminated", "mask"):
                np.testing.assert_array_equal(getattr(actual, field).numpy(), [row[field] for row in wanted], field)
        for row, wanted in enumerate(expected):
            actions = np.array(wanted["actions"]).reshape(len(wanted["actions"]), -1)
            np.testing.assert_array_equal(samples.actions[row, : len(actions)].numpy(), actions)
            np.testing.assert_array_equal(n_step_samples.actions[row].numpy(), actions[0])

        returns, discounts = n_step_return(
            n_step_samples.rewards.double(), n_step_samples.terminated.double(), n_step_samples.mask.double(), GAMMA
        )
        wanted_returns, wanted_discounts, wanted_next = zip(*(oracle.n_step(starts[key], GAMMA) for key in keys), strict=True)
        assert_same_observations(n_step_observations, take(observations, (slice(None), 0)))
        assert_same_observations(rows(n_step_samples.next_observations), batch(list(wanted_next)))
        np.testing.assert_allclose(returns[:, 0].numpy(), wanted_returns, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(discounts[:, 0].numpy(), wanted_discounts, rtol=1e-12)
        return dict(zip(keys, indices.tolist(), strict=True)), probabilities


class PriorityMachine(BufferMachine):
    """Adds updates of priorities."""

    @rule(
        batch_size=st.integers(1, 8),
        priorities=st.lists(st.floats(1e-3, 1e3), min_size=8, max_size=8),
    )
    def update_priorities(self, batch_size, priorities):
        if self.buffer.n_sampleable == 0:
            return
        samples = self.buffer.sample(batch_size)
        observations = rows(samples.observations)
        chosen = {}
        for row, index in enumerate(samples.indices.tolist()):
            chosen[content_key(take(observations, (row, 0)))] = (index, priorities[row])
        self.buffer.update_priorities(
            np.array([index for index, _ in chosen.values()]), np.array([priority for _, priority in chosen.values()])
        )
        (oracle,) = self.oracles
        oracle.update_priorities({key: priority for key, (_, priority) in chosen.items()})

    @rule()
    def update_departed(self):
        departed = self.seen_indices - set(self.buffer.sampling_probabilities()[0].tolist())
        if departed:
            self.buffer.update_priorities(np.array(sorted(departed)), np.full(len(departed), 1e4))


class VectorMachine(PriorityMachine):
    @initialize(**SHAPE)
    def start(self, **shape):
        self.world = VectorWorld()
        self.set_up(**shape)


class FadingMachine(PriorityMachine):
    """Priorities fade with age, so fast that transitions reach the lowest factor within the buffer, or never."""

    @initialize(fade=st.sampled_from([0.3, 0.9, 0.98]), fade_min=st.sampled_from([0.0, 0.1, 0.5, 0.95]), **SHAPE)
    def start(self, **shape):
        self.world = VectorWorld()
        self.set_up(**shape)

    @rule()
    def save_to_a_file(self):
        file = io.BytesIO()
        write_replay_buffer(file, self.buffer)
        file.seek(0)
        self.buffer = read_replay_buffer(file, self.buffer)

    @invariant()
    def sums_are_right(self):
        """What draws are made from, level by level."""
        tree = self.buffer._priorities
        weights = tree.weight(th.arange(tree.capacity))
        for level in range(len(tree.levels)):
            nodes = th.arange(len(tree.levels[level]))
            expected = th.zeros(tree.levels[level].shape, dtype=th.float64).view(-1)
            expected[: len(weights)] = weights
            ours = tree._weights(level, nodes)
            np.testing.assert_allclose(ours.view(-1), expected, rtol=1e-9)
            weights = ours.sum(dim=1)


class DictMachine(PriorityMachine):
    @initialize(stacked=st.booleans(), zeros=st.booleans(), **SHAPE)
    def start(self, stacked, zeros, **shape):
        self.world = DictWorld(stacked, zeros)
        self.set_up(**shape)


class StackMachine(PriorityMachine):
    @initialize(
        frames=st.sampled_from([(4, (1, 5, 5)), (2, (3, 4, 4)), (3, (3, 9, 10)), (2, (1, 2, 3))]),
        zeros=st.booleans(),
        **SHAPE,
    )
    def start(self, frames, zeros, **shape):
        self.world = StackWorld(*frames, zeros)
        self.set_up(**shape)


class MessyMachine(BufferMachine):
    """
    Whether images are stored as single frames, and so when a transition leaves, depends on the data here. Contents must be
    right all the same, and what leaves lies between storing whole observations and storing single channels.
    """

    keeps_frames = False

    @initialize(frame_channels=st.sampled_from([1, 2, 3]), **SHAPE)
    def start(self, frame_channels, **shape):
        self.world = MessyWorld(frame_channels)
        self.set_up(**shape)

    def make_oracles(self) -> list[BufferOracle]:
        shape = (self.buffer_size, self.n_envs, self.horizon, self.n_steps)
        return [BufferOracle(*shape, frames=1), BufferOracle(*shape, frames=MessyWorld.channels)]

    @rule(style=st.sampled_from(MessyWorld.styles))
    def change_style(self, style):
        self.world.style = style

    def buffer_add(self, *transition) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error")
            warnings.filterwarnings("ignore", category=UserWarning)
            self.buffer.add(*transition)

    @invariant()
    def same_as_oracle(self):
        whole, frames = self.oracles
        keys, probabilities = self.same_contents(whole)
        assert frames.sampleable().keys() <= keys.keys()
        assert frames.size() <= self.buffer.size() <= whole.size()
        assert self.buffer.n_sampleable == len(keys)
        assert self.buffer.has_terminated == whole.has_terminated
        assert probabilities == pytest.approx(np.full(len(keys), 1 / max(len(keys), 1)), rel=1e-12)


TestVector = VectorMachine.TestCase
TestFading = FadingMachine.TestCase
TestDict = DictMachine.TestCase
TestStack = StackMachine.TestCase
TestMessy = MessyMachine.TestCase

for test_case in (TestVector, TestFading, TestDict, TestStack, TestMessy):
    test_case.settings = SETTINGS
del test_case
