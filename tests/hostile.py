"""
What the fuzz tests draw from: spaces of every supported kind, rewards of every magnitude, and environments that go wrong.
"""

import os
import traceback
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import DummyVecEnv
from stable_baselines3.common.vec_env.subproc_vec_env import _stack_obs

import sb3_mrq
from sb3_mrq.buffers.slots import ENDED, HAS_TRANSITION

# Cases are many times as many in the long profile, which searches for longer
TIMES = 20 if os.environ.get("SB3_MRQ_HYPOTHESIS_PROFILE") == "long" else 1

# -- spaces ------------------------------------------------------------------------------------------------------------

SHAPES = st.sampled_from([(1,), (3,), (2, 3), (2, 1, 2)])
FLOATS = [np.float16, np.float32, np.float64]
INTEGERS = [np.int8, np.int32, np.int64, np.uint16]


@st.composite
def boxes(draw):
    """Vectors of floats or integers."""
    shape = draw(SHAPES)
    if draw(st.booleans()):
        low, high = draw(st.sampled_from([(-1, 1), (-np.inf, np.inf), (0, np.inf), (-1e4, 3e4)]))
        return spaces.Box(low, high, shape, dtype=draw(st.sampled_from(FLOATS)))
    dtype = draw(st.sampled_from([*INTEGERS, np.uint8, np.bool_]))
    low, high = (0, 1) if dtype is np.bool_ else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    if dtype is np.uint8 and len(shape) == 3:
        high -= 1  # else it would be an image, and too small
    return spaces.Box(low, high, shape, dtype=dtype)


def images(side, first):
    """
    :param side: pixels of the shorter side
    :param first: whether the channels are the first axis, or the last
    """

    def image(channels, width):
        shape = (channels, side, width) if first else (side, width, channels)
        return spaces.Box(0, 255, shape, dtype=np.uint8)

    return st.builds(image, st.sampled_from([1, 3, 4]), st.sampled_from([side, side + 3]))


def discretes():
    """Everything that is one of finitely many values."""
    starts = st.sampled_from([0, 0, 1, -3, 1000])
    return st.one_of(
        st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 6), starts),
        st.lists(st.tuples(st.integers(1, 4), starts), min_size=1, max_size=3).map(
            lambda pairs: spaces.MultiDiscrete([n for n, _ in pairs], start=[start for _, start in pairs])
        ),
        st.integers(1, 4).map(spaces.MultiBinary),
    )


@st.composite
def observation_spaces(draw, side=31):
    """
    Observation spaces of all supported kinds.

    :param side: pixels of the shorter side of images
    """
    some_images = images(side, draw(st.booleans()))  # SB3 takes no Dict of both kinds
    parts = st.one_of(boxes(), boxes(), discretes(), st.just(spaces.MultiBinary((2, 2))), some_images)
    if draw(st.integers(0, 3)):
        return draw(parts)
    keys = draw(st.lists(st.sampled_from(["a", "pop", "with.dot", "état"]), min_size=1, max_size=3, unique=True))
    return spaces.Dict({key: draw(parts) for key in keys})


@st.composite
def action_spaces(draw):
    """Action spaces of all supported kinds, Box with odd bounds."""
    if draw(st.booleans()):
        return draw(discretes())
    dtype = draw(st.sampled_from([np.float32, np.float32, np.float64]))
    shape = draw(st.sampled_from([(1,), (2,), (2, 2)]))
    bounds = st.floats(float(np.finfo(np.float32).min), float(np.finfo(np.float32).max), width=32)
    low, high = draw(st.tuples(bounds, bounds).filter(lambda pair: pair[0] < pair[1]))
    return spaces.Box(low, high, shape, dtype=dtype)


# -- rewards -----------------------------------------------------------------------------------------------------------

MAGNITUDES = st.sampled_from([0.0, 5e-324, 1e-45, 1e-38, 1e-8, 1.0, 2.5e4, 1e10, 1e25, 1e30])
REWARDS = st.one_of(
    MAGNITUDES.map(lambda reward: [reward]),
    st.lists(st.builds(lambda size, sign: sign * size, MAGNITUDES, st.sampled_from([1, -1])), min_size=2, max_size=6),
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=6),
    # Large ones that leave a small buffer again
    st.builds(lambda n, size: [size] * n + [0.0] * 200, st.integers(1, 10), st.sampled_from([1.0, 1e10, 1e30, -1e30])),
)
LENGTHS = st.lists(st.one_of(st.integers(1, 3), st.integers(1, 20), st.just(10**9)), min_size=1, max_size=4)
ENDS = st.lists(st.sampled_from(["terminated", "truncated", "both"]), min_size=1, max_size=3)


# -- environments ------------------------------------------------------------------------------------------------------


def random_value(space, rng):
    """An observation of any space; where a Box has no bounds, of any magnitude up to 1e18."""
    if isinstance(space, spaces.Dict):
        return {key: random_value(part, rng) for key, part in space.spaces.items()}
    if isinstance(space, spaces.Box) and space.dtype.kind == "f":
        largest = min(1e18, 0.5 * float(np.finfo(space.dtype).max))
        size = rng.choice([0.0, 1e-45, 1.0, 1.0, 1.0, largest])
        return np.clip(size * rng.uniform(-1, 1, space.shape), space.low, space.high).astype(space.dtype)
    if isinstance(space, spaces.Box) and space.dtype == np.int64:
        return rng.integers(np.maximum(space.low, -(10**18)), np.minimum(space.high, 10**18), endpoint=True)
    if isinstance(space, spaces.Box):
        return rng.integers(space.low, space.high, endpoint=True, dtype=space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return rng.integers(0, 2, space.shape).astype(space.dtype)
    size = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return np.asarray(space.start + rng.integers(size))


class HostileEnv(gym.Env):
    """
    Random observations, whatever the action, which must lie in the action space.

    :param lengths: of the episodes, one after the other, over and over
    :param ends: how these end, "terminated", "truncated" or "both" at once
    :param rewards: one after the other, over and over
    :param fault: name of what goes wrong, see ``spoil`` and ``FAULTS``
    :param fault_step: when, counted in steps over all episodes
    """

    def __init__(
        self, observation_space, action_space, lengths=(6,), ends=("truncated",), rewards=(1.0,), fault=None, fault_step=0
    ):
        self.observation_space, self.action_space = deepcopy(observation_space), deepcopy(action_space)
        self.lengths, self.ends, self.rewards = lengths, ends, rewards
        self.fault, self.fault_step = fault, fault_step
        self.episode, self.steps = -1, 0
        self.faults = 0  # how often it went wrong
        self.ended_by_fault = False  # whether the episode ended with it
        self.rng = np.random.default_rng(0)

    def observe(self):
        return random_value(self.observation_space, self.rng)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.episode += 1
        self.left = self.lengths[self.episode % len(self.lengths)]
        if self.fault == "reset raises" and self.steps >= self.fault_step:
            self.faults += 1
            raise RuntimeError("The simulator could not be reset.")
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is not in {self.action_space}"
        self.steps += 1
        self.left -= 1
        end = self.ends[self.episode % len(self.ends)] if self.left == 0 else ""
        reward = self.rewards[self.steps % len(self.rewards)]
        result = self.observe(), reward, end in ("terminated", "both"), end in ("truncated", "both"), {}
        if self.steps == self.fault_step and self.fault != "reset raises":
            self.faults += 1
            result = FAULTS[self.fault](*result)
            self.ended_by_fault = any(result[2:4])
        return result


def worker():
    """An environment for its own process."""
    return HostileEnv(spaces.Box(-1, 1, (2,), dtype=np.float32), spaces.Discrete(2), lengths=(3, 5))


def spoil(obs, function):
    """An observation of which an array, the first of a dict, went through a function."""
    if isinstance(obs, dict):
        key = sorted(obs)[0]
        return {**obs, key: function(np.asarray(obs[key]))}
    return function(np.asarray(obs))


def put(value):
    """A function that puts a value at the end of a copy of an array."""

    def function(array):
        array = array.astype(np.promote_types(array.dtype, np.float64))
        array.reshape(-1)[-1] = value
        return array

    return function


def fail(*_):
    raise RuntimeError("The simulator exploded.")


def of_observation(function):
    return lambda obs, *rest: (spoil(obs, function), *rest)


def of_final_observation(function):
    return lambda obs, reward, _, __, info: (spoil(obs, function), reward, True, False, info)


def of_reward(value):
    return lambda obs, _, *rest: (obs, value, *rest)


# Values that no training should ever see
BAD_NUMBERS = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "too large": 1e31}
FAULTS = {
    "step raises": fail,
    "reset raises": None,
    **{f"observation {name}": of_observation(put(value)) for name, value in BAD_NUMBERS.items()},
    **{f"final observation {name}": of_final_observation(put(value)) for name, value in BAD_NUMBERS.items()},
    **{f"reward {name}": of_reward(value) for name, value in BAD_NUMBERS.items()},
    "observation longer": of_observation(lambda array: np.concatenate([array.reshape(-1)] * 2)),
    "observation with an axis more": of_observation(lambda array: np.stack([array] * 2)),
    "observation without its axes": of_observation(lambda array: array.reshape(-1)[:0]),
    "final observation longer": of_final_observation(lambda array: np.concatenate([array.reshape(-1)] * 2)),
    "observation of text": of_observation(lambda array: np.full(array.shape, "left")),
    "observation of objects": of_observation(lambda array: np.full(array.shape, None)),
    "observation None": lambda obs, *rest: (None, *rest),
    "reward None": of_reward(None),
    "reward of text": of_reward("much"),
    "two rewards": of_reward(np.ones(2)),
    "four results": lambda *result: result[:4],
}
# Faults that only integers of a finite range have, and that floats have not
INDEX_FAULTS = {
    "observation out of range": of_observation(lambda array: array + 5000),
    "observation below the range": of_observation(lambda array: array - 5000),
}
FAULTS |= INDEX_FAULTS


class StackingVecEnv(DummyVecEnv):
    """Stacks whatever observations the environments give, as ``SubprocVecEnv`` does; ``DummyVecEnv`` casts and broadcasts."""

    def _save_obs(self, env_idx, obs):
        self.latest = {**getattr(self, "latest", {}), env_idx: obs}

    def _obs_from_buf(self):
        return deepcopy(_stack_obs([self.latest[i] for i in range(self.num_envs)], self.observation_space))


# -- what is asked of a model and of its buffer -------------------------------------------------------------------------


def assert_clear(error):
    """
    Assert that an error says something, and that it was raised on purpose if it comes from inside of the package: not by an
    array operation that met with something unexpected.
    """
    assert str(error).strip(), f"{type(error).__name__} without a message"
    package = str(Path(sb3_mrq.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename.startswith(package)]
    # These call SB3, which calls the environment
    above = ("mrq.py", "off_policy_algorithm.py")
    if any(Path(frame.filename).name not in above for frame in inside) or frames[-1] in inside:
        assert frames[-1] in inside and frames[-1].line.startswith("raise "), "".join(traceback.format_tb(error.__traceback__))


def check_buffer(buffer):
    """Assert what must hold of a replay buffer at any time."""
    if not buffer._storages:
        assert buffer.size() == buffer.n_sampleable == 0
        return
    stored = np.flatnonzero(buffer._flags & HAS_TRANSITION)
    slots, probabilities = buffer.sampling_probabilities()
    assert buffer.size() == len(stored)
    assert buffer.n_sampleable == len(slots)
    assert set(slots) <= set(stored)
    assert len(slots) == 0 or abs(probabilities.sum() - 1) < 1e-9
    # What waits is the end of an episode that is running
    waiting = np.setdiff1d(stored, slots)
    assert len(waiting) <= buffer.n_envs * (buffer.lookahead - 1)
    assert not (buffer._flags[waiting] & ENDED).any()
    for level, above in pairwise(buffer._priorities.levels):
        np.testing.assert_array_equal(level.numpy().sum(axis=1), above.view(-1)[: len(level)])
    assert np.isfinite(buffer.mean_abs_reward())
    if len(slots):
        for samples in (buffer.get_subtrajectories(slots), buffer.get_n_step(slots)):
            for tensor in (*tensors(samples.observations), samples.rewards, samples.actions):
                assert th.isfinite(tensor).all()
            assert (samples.rewards[samples.mask == 0] == 0).all()
            assert (samples.mask[:, 0] == 1).all() and (samples.mask.diff(dim=1) <= 0).all()


def tensors(obs):
    return list(obs.values()) if isinstance(obs, dict) else [obs]


def assert_finite(model):
    """Assert that all weights, and all that the optimisers keep, are finite."""
    for name, value in model.policy.state_dict().items():
        assert th.isfinite(value).all(), name
    for network in (model.encoder, model.critic, model.actor):
        for state in network.optimizer.state.values():
            assert all(th.isfinite(value).all() for value in state.values())


def assert_acts(model, env):
    """Assert that a model gives actions of the space."""
    for deterministic in (True, False):
        action, _ = model.predict(env.observe(), deterministic=deterministic)
        assert env.action_space.contains(action), action
