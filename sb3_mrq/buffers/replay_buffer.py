"""
Replay buffer of MR.Q, which samples sub-trajectories by priority.
"""

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mrq.buffers.samples import NStepSamples, SubtrajectorySamples
from sb3_mrq.buffers.slots import SAMPLEABLE, Slots
from sb3_mrq.buffers.storage import SegmentStorage
from sb3_mrq.observations import map_observation, unbind_time


class SubtrajectoryReplayBuffer(SegmentStorage):
    """
    Replay buffer that samples sub-trajectories by priority (LAP, Fujimoto et al., 2020, arXiv 2007.06049).

    Each environment has a ring of ``buffer_size // n_envs`` slots. A slot holds an observation, and action, reward and flags
    of the transition that starts there. The next observation is in the next slot. The final observation of an episode has its
    own slot, so an episode of m transitions takes m + 1 slots. Frame stacks are stored as single frames (see
    :class:`sb3_mrq.buffers.frames.ObservationStorage`), and a transition is removed together with its oldest frame.

    A segment is an unbroken run of transitions of one episode. If the observation of an ``add`` is not the next observation of
    the previous ``add`` of that environment, the environment was reset in between, and the previous segment is truncated.

    A transition can be sampled once the sub-trajectory of ``max(horizon, n_steps)`` transitions that starts there is stored,
    or once its episode has ended. It then gets the largest priority ever assigned. Sub-trajectories are masked after the end
    of an episode.

    Memory is reserved by the first ``add``, and used once it is written to.

    A subclass may change how priorities work by ``priorities_class``, and what a batch holds by ``read``.

    :param buffer_size: Number of slots, over all environments
    :param observation_space: Observation space
    :param action_space: Action space
    :param device: PyTorch device of the samples
    :param n_envs: Number of parallel environments
    :param optimize_memory_usage: No effect, for compatibility with SB3's buffers: observations are always stored once
    :param handle_timeout_termination: Whether to distinguish truncation from termination. If not, truncated episodes count as
        terminated.
    :param horizon: Transitions in a sub-trajectory
    :param n_steps: Transitions of the n-step samples
    :param fade: Factor by which the probability of a transition falls with each one stored after it
    :param fade_min: Lower bound on the product of these factors
    """

    def _draw(self, batch_size: int) -> th.Tensor:
        if self.n_sampleable == 0:
            raise ValueError(
                "No transition can be sampled yet: add transitions until a horizon is complete or an episode has ended."
            )
        self._pull_priorities()
        return self._priorities.sample(batch_size)

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> SubtrajectorySamples:  # type: ignore[override]
        """
        Sample sub-trajectories of ``horizon`` transitions by the priority of their first transition.

        :param batch_size: Number of sub-trajectories
        :param env: VecNormalize to normalize observations and rewards with
        :return: the sub-trajectories
        :raises ValueError: if there is none yet
        """
        return self.get_subtrajectories(self._draw(batch_size), env)

    def sample_n_step(self, batch_size: int, env: VecNormalize | None = None) -> NStepSamples:
        """
        Sample transitions by priority, with the rewards and the observation of an ``n_steps`` target.

        :param batch_size: Number of transitions
        :param env: VecNormalize to normalize observations and rewards with
        :return: the transitions
        :raises ValueError: if there is none yet
        """
        return self.get_n_step(self._draw(batch_size), env)

    def read(self, slots: Slots, starts: th.Tensor, n_steps: int, ends_only: bool = False) -> SubtrajectorySamples:
        """
        Read sub-trajectories without normalisation. A subclass may override this, for example to change rewards.

        :param slots: the slots on the host, or their copy on a device
        :param starts: slots of the first transitions, (B,)
        :param n_steps: number of transitions, H
        :param ends_only: whether to read only the observations s_0 and s_H, (B, 2, ...)
        :return: the sub-trajectories, on the device of the slots; ``indices`` are the starts
        """
        observation_slots, transition_slots, mask, terminated = slots.follow(starts, n_steps)
        if ends_only:
            observation_slots = observation_slots[:, :: observation_slots.shape[1] - 1]
        return SubtrajectorySamples(
            slots.observations(observation_slots),
            slots.read("actions", transition_slots),
            slots.read("rewards", transition_slots) * mask,
            terminated.float(),
            mask.float(),
            starts,
        )

    def read_n_step(self, slots: Slots, starts: th.Tensor) -> NStepSamples:
        """
        :param slots: the slots on the host, or their copy on a device
        :param starts: slots of the transitions, (B,)
        :return: the transitions, with rewards and last observation of an ``n_steps`` target
        """
        return n_step_samples(self.read(slots, starts, self.n_steps, ends_only=True))

    def get_subtrajectories(self, indices: np.ndarray | th.Tensor, env: VecNormalize | None = None) -> SubtrajectorySamples:
        """
        :param indices: slots of the first transitions, (B,)
        :param env: VecNormalize to normalize observations and rewards with
        :return: the sub-trajectories of ``horizon`` transitions, with ``indices`` as a NumPy array
        """
        return self._deliver(self.read(self.slots, th.as_tensor(indices), self.horizon), env)

    def get_n_step(self, indices: np.ndarray | th.Tensor, env: VecNormalize | None = None) -> NStepSamples:
        """
        :param indices: slots of the transitions, (B,)
        :param env: VecNormalize to normalize observations and rewards with
        :return: the transitions, with rewards and last observation of an ``n_steps`` target, and ``indices`` as a NumPy array
        """
        ends = self.read(self.slots, th.as_tensor(indices), self.n_steps, ends_only=True)
        return n_step_samples(self._deliver(ends, env))

    def _deliver(self, samples: SubtrajectorySamples, env: VecNormalize | None) -> SubtrajectorySamples:
        """Normalise samples and move them to the device of the buffer."""
        if env is not None:
            obs = self._normalize_obs(map_observation(lambda value: value.numpy(), samples.observations), env)
            rewards = self._normalize_reward(samples.rewards.numpy(), env)
            samples = samples._replace(observations=map_observation(th.as_tensor, obs), rewards=th.as_tensor(rewards))
        assert isinstance(samples.indices, th.Tensor)
        indices = samples.indices.numpy()
        if self.device.type != "cpu":
            on_device = {name: getattr(samples, name).to(self.device) for name in ("actions", "rewards", "terminated", "mask")}
            obs = map_observation(lambda value: value.to(self.device), samples.observations)
            return SubtrajectorySamples(obs, **on_device, indices=indices)
        return samples._replace(indices=indices)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> SubtrajectorySamples:
        return self.get_subtrajectories(batch_inds, env)

    def update_priorities(self, indices: np.ndarray | th.Tensor, priorities: np.ndarray | th.Tensor) -> None:
        """
        :param indices: ``indices`` of a batch, (B,); slots that cannot be sampled any more are ignored
        :param priorities: new priorities, positive and finite, (B,)
        :raises ValueError: if a priority is not positive and finite
        """
        if self.n_sampleable == 0:
            return
        self._pull_priorities()
        slots, values = np.asarray(indices), th.as_tensor(priorities).to("cpu", th.float64)
        if not (values.isfinite().all() and (values > 0).all()):
            raise ValueError(f"Priorities must be positive and finite, but range from {values.min()} to {values.max()}.")
        sampleable = self.sampleable(slots)
        if not sampleable.all():
            slots, values = slots[sampleable], values[th.from_numpy(sampleable)]
        if len(slots) == 0:
            return
        self._priorities.set(th.from_numpy(slots), values)
        self._max_priority = max(self._max_priority, float(values.max()))
        if self._copy is not None:
            self._copy.write_priorities(slots, self._priorities.get(th.from_numpy(slots)), self._max_priority)

    def sampling_probabilities(self) -> tuple[np.ndarray, np.ndarray]:
        """
        :return: slots of all transitions that can be sampled, and their probabilities, (n,) each
        """
        self._pull_priorities()
        indices = np.flatnonzero(self._flags & SAMPLEABLE)
        weights = self._priorities.weight(th.from_numpy(indices)).numpy()
        return indices, weights / weights.sum()

    def mean_abs_reward(self, env: VecNormalize | None = None) -> float:
        """
        :param env: VecNormalize to normalize rewards with
        :return: mean absolute reward of all stored transitions, 0 if there are none
        """
        if self._n_stored == 0:
            return 0.0
        rewards = self.rewards
        if env is not None:
            # The zeros of slots without a transition stay zero, as normalisation of rewards is a division
            rewards = self._normalize_reward(rewards, env)
        return float(np.abs(rewards).sum(dtype=np.float64)) / self._n_stored


def n_step_samples(ends: SubtrajectorySamples) -> NStepSamples:
    """
    :param ends: sub-trajectories of n transitions with two observations each, (B, 2, ...)
    :return: n-step samples
    """
    first, last = unbind_time(ends.observations)
    return NStepSamples(first, ends.actions[:, 0], ends.rewards, ends.terminated, ends.mask, last, ends.indices)
