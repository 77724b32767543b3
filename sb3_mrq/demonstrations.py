"""
Demonstrations in addition to the agent's own transitions.
"""

import pathlib
from copy import deepcopy
from typing import Any, TypeVar

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mrq.arguments import Number, check_argument
from sb3_mrq.buffers import NStepSamples, SubtrajectoryReplayBuffer, SubtrajectorySamples
from sb3_mrq.observations import map_observation
from sb3_mrq.persist.replay_files import describe_replay_buffer, load_replay_buffer

Samples = TypeVar("Samples", SubtrajectorySamples, NStepSamples)


def join_samples(first: Samples, second: Samples) -> Samples:
    """
    :param first: samples of B sub-trajectories or transitions, with indices as arrays
    :param second: further samples
    :return: both, one after the other
    """
    parts: dict[str, Any] = {}
    for name, value in first._asdict().items():
        other = getattr(second, name)
        if isinstance(value, np.ndarray):
            parts[name] = np.concatenate([value, other])
        else:
            parts[name] = map_observation(lambda *both: th.cat(both), value, other)
    return type(first)(**parts)


class DemonstrationReplayBuffer(SubtrajectoryReplayBuffer):
    """
    Replay buffer that draws a part of each batch from demonstrations (RLPD; Ball et al., 2023, arXiv 2302.02948). Both have
    priorities of their own, and demonstrations do not fade. They stay in memory, are never overwritten, and do not count as
    stored transitions.

    Sampling is always on the host.

    :param args: arguments of :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer`, ``n_envs`` and ``fade`` by keyword
    :param demonstration_buffer: file of a replay buffer (``save_replay_buffer``), of any number of environments. It must
        still be there when the model is loaded.
    :param demonstration_share: part of each batch that is drawn from it
    :param kwargs: further arguments of :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer`
    :raises ValueError: if the file is for other spaces, or has no transitions that can be sampled
    """

    only_on_host = True

    def __init__(
        self,
        *args: Any,
        demonstration_buffer: str | pathlib.Path,
        demonstration_share: float = 0.5,
        **kwargs: Any,
    ):
        check_argument("demonstration_share", demonstration_share, Number(least=0, most=1))
        self.demonstration_share = demonstration_share
        n, has_ages = describe_replay_buffer(demonstration_buffer)
        like = SubtrajectoryReplayBuffer(*args, **kwargs | dict(n_envs=n, fade=0.5 if has_ages else 1.0))
        self.demonstrations = load_replay_buffer(demonstration_buffer, like)
        self.demonstrations.stop_fading()
        if self.demonstrations.n_sampleable == 0:
            raise ValueError(f"The replay buffer in {demonstration_buffer} has no transitions that can be sampled.")
        super().__init__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "DemonstrationReplayBuffer":
        # Copies share the demonstrations, which may take much memory
        memo[id(self.demonstrations)] = self.demonstrations
        buffer = memo[id(self)] = object.__new__(type(self))
        buffer.__dict__.update(deepcopy(self.__getstate__(), memo))
        return buffer

    def _n_demonstrations(self, batch_size: int) -> int:
        return round(self.demonstration_share * batch_size)

    def _join(self, own: Samples, demonstrated: Samples) -> Samples:
        # Slots of demonstrations are numbered after the slots of the buffer
        indices = demonstrated.indices
        assert indices is not None
        return join_samples(own, demonstrated._replace(indices=indices + self.buffer_size * self.n_envs))

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SubtrajectorySamples:  # type: ignore[override]
        n = self._n_demonstrations(batch_size)
        return self._join(super().sample(batch_size - n, env), self.demonstrations.sample(n, env))

    def sample_n_step(self, batch_size: int, env: VecNormalize | None = None) -> NStepSamples:
        n = self._n_demonstrations(batch_size)
        return self._join(super().sample_n_step(batch_size - n, env), self.demonstrations.sample_n_step(n, env))

    def update_priorities(self, indices: np.ndarray | th.Tensor, priorities: np.ndarray | th.Tensor) -> None:
        slots, values = np.asarray(indices), th.as_tensor(priorities)
        n_slots = self.buffer_size * self.n_envs
        own = slots < n_slots
        super().update_priorities(slots[own], values[th.from_numpy(own)])
        self.demonstrations.update_priorities(slots[~own] - n_slots, values[th.from_numpy(~own)])

    def mean_abs_reward(self, env: VecNormalize | None = None) -> float:
        """
        :param env: VecNormalize to normalize rewards with
        :return: mean absolute reward, weighted by the share of demonstrations
        """
        share = self.demonstration_share
        return (1 - share) * super().mean_abs_reward(env) + share * self.demonstrations.mean_abs_reward(env)

    @property
    def has_terminated(self) -> bool:
        """Whether an episode has terminated, here or in the demonstrations."""
        return self._own_has_terminated or self.demonstrations.has_terminated

    @has_terminated.setter
    def has_terminated(self, value: bool) -> None:
        self._own_has_terminated = value

    def _environment_arrays(self) -> dict[str, np.ndarray]:
        # For exact resuming
        return {
            **super()._environment_arrays(),
            "demonstration priorities": self.demonstrations.get_state().slots["priorities"],
        }

    def _rebuild_priorities(self) -> None:
        super()._rebuild_priorities()
        self.demonstrations._rebuild_priorities()
