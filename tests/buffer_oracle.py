"""
A second, naive implementation of the replay buffer: plain lists, whole observations, no index arithmetic.

Each environment is a list of segments (uninterrupted pieces of an episode), each segment a list of transitions, each
transition a dict that holds everything about it. Tests drive it and ``SubtrajectoryReplayBuffer`` with the same calls and
compare what both can give back.
"""

from copy import deepcopy
from typing import Any

import numpy as np

Observation = np.ndarray | dict[str, np.ndarray]
Transition = dict[str, Any]


def take_env(observation: Observation, env: int) -> Observation:
    """The observation of one environment out of a batched one, copied."""
    if isinstance(observation, dict):
        return {key: take_env(value, env) for key, value in observation.items()}
    return np.array(observation[env])


def same_observation(first: Observation, second: Observation) -> bool:
    if isinstance(first, dict):
        return all(same_observation(first[key], second[key]) for key in first)
    return bool(np.array_equal(first, second))


def content_key(observation: Observation) -> bytes:
    """The bytes of an observation: tests give every observation a running number, so they name a transition."""
    if isinstance(observation, dict):
        return b"".join(content_key(observation[key]) for key in sorted(observation))
    return np.ascontiguousarray(observation).tobytes()


def numbered_frame(number: int, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture whose channels differ from each other and from every other number's channels."""
    frame = (np.arange(np.prod(shape)) * 31 + number * 17) % 251 + 1
    frame = frame.reshape(shape).astype(np.uint8)
    frame[:, 0, 0] = number % 256
    frame[:, 0, 1] = number // 256
    return frame


class Segment:
    """Transitions of one environment that follow each other without a gap."""

    def __init__(self, first_slot: int, first_observation: Observation):
        self.first_slot = first_slot
        self.newest_observation = first_observation
        self.transitions: list[Transition] = []
        self.running = True


class OracleEnv:
    """What one environment has stored, oldest first. Slots are counted up for ever; only the newest ``slots`` exist."""

    def __init__(self) -> None:
        self.segments: list[Segment] = []
        self.slots_written = 0

    @property
    def running(self) -> Segment | None:
        return self.segments[-1] if self.segments and self.segments[-1].running else None


class BufferOracle:
    """
    :param buffer_size: slots over all environments; each environment has ``buffer_size // n_envs``
    :param n_envs: number of parallel environments
    :param horizon: length of the sub-trajectories
    :param n_steps: length of the n-step returns
    :param frames: frames in a stack that is stored as single frames (1: observations are stored whole). A transition
        leaves with the oldest frame that its observation needs
    :param fade: factor of a transition's probability for each one that is stored after it
    :param fade_min: the factor falls no lower
    """

    def __init__(
        self,
        buffer_size: int,
        n_envs: int,
        horizon: int,
        n_steps: int,
        frames: int = 1,
        fade: float = 1.0,
        fade_min: float = 1.0,
    ):
        self.slots = buffer_size // n_envs
        self.n_envs = n_envs
        self.horizon = horizon
        self.n_steps = n_steps
        self.frames = frames
        self.fade = fade
        self.fade_min = fade_min
        self.reset()

    def reset(self) -> None:
        self.envs = [OracleEnv() for _ in range(self.n_envs)]
        self.max_priority = 1.0
        self.n_added = 0
        self.has_terminated = False

    # -- storing -------------------------------------------------------------------------------------------------------

    def add(
        self,
        obs: Observation,
        next_obs: Observation,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        for index, env in enumerate(self.envs):
            timed_out = infos[index].get("TimeLimit.truncated", False)
            self._add_one(
                env,
                take_env(obs, index),
                take_env(next_obs, index),
                np.array(action[index]),
                float(reward[index]),
                ended=bool(done[index]),
                terminated=bool(done[index]) and not timed_out,
            )
            self._evict(env)
            self._give_priorities(env)

    def _add_one(
        self,
        env: OracleEnv,
        obs: Observation,
        next_obs: Observation,
        action: np.ndarray,
        reward: float,
        ended: bool,
        terminated: bool,
    ) -> None:
        segment = env.running
        if segment is not None and not same_observation(obs, segment.newest_observation):
            segment.running = False
            segment = None
        if segment is None:
            segment = Segment(env.slots_written, obs)
            env.segments.append(segment)
            env.slots_written += 1  # the first observation of the segment
        slot = env.slots_written - 1  # slot of the newest observation
        env.slots_written += 1  # next_obs
        self.n_added += 1
        segment.transitions.append(
            {
                "observation": obs,
                "action": action,
                "reward": reward,
                "terminated": terminated,
                "next_observation": next_obs,
                "priority": None,
                "number": self.n_added,
                "oldest_slot": max(segment.first_slot, slot - self.frames + 1),
            }
        )
        segment.newest_observation = next_obs
        segment.running = not ended
        self.has_terminated = self.has_terminated or terminated

    def _evict(self, env: OracleEnv) -> None:
        oldest_existing = env.slots_written - self.slots
        for segment in env.segments:
            segment.transitions = [t for t in segment.transitions if t["oldest_slot"] >= oldest_existing]
        env.segments = [segment for segment in env.segments if segment.transitions or segment.running]

    def _give_priorities(self, env: OracleEnv) -> None:
        for segment in env.segments:
            for index, transition in enumerate(segment.transitions):
                complete = index + max(self.horizon, self.n_steps) <= len(segment.transitions)
                if transition["priority"] is None and (complete or not segment.running):
                    transition["priority"] = self.max_priority

    def update_priorities(self, priorities: dict[bytes, float]) -> None:
        """:param priorities: new priority by ``content_key`` of the first observation"""
        starts = self.sampleable()
        for key, priority in priorities.items():
            starts[key][0]["priority"] = priority
            self.max_priority = max(self.max_priority, priority)

    # -- reading -------------------------------------------------------------------------------------------------------

    def stored(self) -> list[Transition]:
        return [t for env in self.envs for segment in env.segments for t in segment.transitions]

    def size(self) -> int:
        return len(self.stored())

    def mean_abs_reward(self) -> float:
        rewards = [abs(transition["reward"]) for transition in self.stored()]
        return sum(rewards) / len(rewards)

    def sampleable(self) -> dict[bytes, list[Transition]]:
        """Every start that can be sampled, with all that follows it in its segment, by the content of its observation."""
        starts = {}
        for env in self.envs:
            for segment in env.segments:
                for index, transition in enumerate(segment.transitions):
                    if transition["priority"] is not None:
                        key = content_key(transition["observation"])
                        assert key not in starts, "tests must make observations unique"
                        starts[key] = segment.transitions[index:]
        return starts

    def probabilities(self) -> dict[bytes, float]:
        weights = {}
        for key, (transition, *_) in self.sampleable().items():
            age = self.n_added - transition["number"]
            weights[key] = transition["priority"] * max(self.fade**age, self.fade_min)
        total = sum(weights.values())
        return {key: weight / total for key, weight in weights.items()}

    def subtrajectory(self, following: list[Transition], length: int) -> dict[str, list]:
        """
        :param following: a start and the transitions after it
        :return: ``length`` + 1 observations and ``length`` of everything else, padded past the end of the segment
        """
        existing = following[:length]
        padding = length - len(existing)
        observations = [t["observation"] for t in existing] + [existing[-1]["next_observation"]] * (padding + 1)
        return {
            "observations": observations,
            "actions": [t["action"] for t in existing],
            "rewards": [t["reward"] for t in existing] + [0.0] * padding,
            "terminated": [float(t["terminated"]) for t in existing] + [0.0] * padding,
            "mask": [1.0] * len(existing) + [0.0] * padding,
        }

    def n_step(self, following: list[Transition], gamma: float) -> tuple[float, float, Observation]:
        """:return: the discounted sum of rewards, the factor of the bootstrap, and the observation to bootstrap from"""
        total, discount = 0.0, 1.0
        for transition in following[: self.n_steps]:
            total += discount * transition["reward"]
            discount *= gamma
            last = transition
        if last["terminated"]:
            discount = 0.0
        return total, discount, deepcopy(last["next_observation"])
