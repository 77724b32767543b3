"""
Hindsight experience replay (HER; Andrychowicz et al., 2017, arXiv 1707.01495) for sub-trajectories.
"""

from copy import deepcopy
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_mrq.arguments import UnsupportedSpaceError
from sb3_mrq.buffers.replay_buffer import SubtrajectoryReplayBuffer
from sb3_mrq.buffers.samples import SubtrajectorySamples
from sb3_mrq.buffers.slots import SAMPLEABLE, Slots

STRATEGIES = ("future", "final", "episode")


class SharedEnv:
    """
    Environments, which copies of a buffer share and pickles leave out.
    """

    def __init__(self) -> None:
        self.env: VecEnv | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedEnv":
        return self

    def __reduce__(self) -> tuple[type["SharedEnv"], tuple[()]]:
        return SharedEnv, ()


class HerSubtrajectoryReplayBuffer(SubtrajectoryReplayBuffer):
    """
    Replay buffer that replaces desired goals by achieved ones, like SB3's ``HerReplayBuffer``, for whole sub-trajectories.

    A start is drawn by priority. With probability n / (n + 1), where n is ``n_sampled_goal``, the desired goal of all
    observations of its sub-trajectory becomes one that was achieved in the same episode, and the environment's
    ``compute_reward`` gives the rewards anew. Terminations stay as they were stored.

    Transitions can be sampled once their episode has ended. Sampling is always on the host.

    :param buffer_size: Number of slots, over all environments
    :param observation_space: Observation space, a Dict with the keys ``observation``, ``achieved_goal`` and ``desired_goal``
    :param action_space: Action space
    :param args: further arguments of :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer`
    :param n_sampled_goal: Number of sub-trajectories with a new goal for each one with its own, on average
    :param goal_selection_strategy: Goals achieved after the start (``"future"``), at the end of the episode (``"final"``), or
        anywhere in it (``"episode"``)
    :param copy_info_dict: Whether to keep the ``info`` of each transition for ``compute_reward``. Files of the buffer do not
        contain them, so sub-trajectories from a file keep their own goals.
    :param kwargs: further arguments of :class:`~sb3_mrq.buffers.SubtrajectoryReplayBuffer`
    :raises UnsupportedSpaceError: if the space is no Dict with these keys
    """

    observation_space: spaces.Dict
    only_on_host = True
    waits_for_end = True
    # Sub-trajectories from which the mean absolute reward is estimated
    REWARDS_SAMPLED = 10_000

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *args: Any,
        n_sampled_goal: int = 4,
        goal_selection_strategy: str = "future",
        copy_info_dict: bool = False,
        **kwargs: Any,
    ):
        keys = ("observation", "achieved_goal", "desired_goal")
        if not isinstance(observation_space, spaces.Dict) or any(key not in observation_space.spaces for key in keys):
            raise UnsupportedSpaceError(
                f"Goals are replaced in Dict observations with the keys {', '.join(keys)}, not in {observation_space}: use "
                "the default replay buffer."
            )
        achieved, desired = observation_space["achieved_goal"], observation_space["desired_goal"]
        if achieved.shape != desired.shape:
            raise UnsupportedSpaceError(f"An achieved goal must have the shape of a desired one: {achieved}, {desired}.")
        if goal_selection_strategy not in STRATEGIES:
            raise ValueError(f"goal_selection_strategy is {goal_selection_strategy!r}, but must be one of {STRATEGIES}.")
        if n_sampled_goal < 0:
            raise ValueError(f"n_sampled_goal is {n_sampled_goal}, but must be at least 0.")
        self.n_sampled_goal = n_sampled_goal
        self.goal_selection_strategy = goal_selection_strategy
        self.copy_info_dict = copy_info_dict
        self._shared = SharedEnv()
        super().__init__(buffer_size, observation_space, action_space, *args, **kwargs)

    def reset(self) -> None:
        super().reset()
        # Of the transition in a slot: number of transitions of its episode before it, and from it to the end
        self.steps_before = np.zeros(0, dtype=np.int32)
        self.steps_left = np.zeros(0, dtype=np.int32)
        self.infos = np.zeros(0, dtype=object)

    def _allocate(self) -> None:
        n_slots = self.buffer_size * self.n_envs
        self.steps_before = np.zeros(n_slots, dtype=np.int32)
        self.steps_left = np.zeros(n_slots, dtype=np.int32)
        self.infos = np.full(n_slots if self.copy_info_dict else 0, None)
        super()._allocate()

    def set_env(self, env: VecEnv | None) -> None:
        """
        :param env: environments whose ``compute_reward`` gives the rewards for new goals, all in the same way
        :raises ValueError: if there is no such method, or if its result is not one reward for each goal
        """
        self._shared.env = env
        if env is None:
            return
        if not env.has_attr("compute_reward"):
            raise ValueError(
                "The environment has no compute_reward, which gives the rewards for new goals: add it, or use the default "
                "replay buffer."
            )
        if not self.copy_info_dict:
            space = self.observation_space["desired_goal"]
            goals = np.zeros((2, *get_obs_shape(space)), dtype=space.dtype)
            try:
                self.compute_rewards(goals, goals, [{}, {}])
            except KeyError as error:
                raise ValueError(
                    f"compute_reward looks up {error} in the infos of transitions, which are not kept: pass "
                    "copy_info_dict=True in replay_buffer_kwargs."
                ) from error
            except AttributeError:
                # Before its first reset, an environment may lack what compute_reward needs
                pass

    def compute_rewards(self, achieved: np.ndarray, desired: np.ndarray, infos: list[dict[str, Any]]) -> np.ndarray:
        """
        :param achieved: goals achieved by transitions, (N, ...)
        :param desired: their desired goals, (N, ...)
        :param infos: their infos, empty without ``copy_info_dict``
        :return: their rewards by the environment, (N,)
        :raises ValueError: if there is no environment, or if the result has another shape
        """
        env = self._shared.env
        if env is None:
            raise ValueError("New goals need the environment's compute_reward: pass env when loading, or call set_env.")
        rewards = np.asarray(env.env_method("compute_reward", achieved, desired, infos, indices=[0])[0], dtype=np.float32)
        if rewards.shape != (len(achieved),):
            raise ValueError(
                f"compute_reward must give one reward for each goal, but gave the shape {rewards.shape} for {len(achieved)}."
            )
        return rewards

    def _store_infos(self, slots: np.ndarray, infos: list[dict[str, Any]]) -> None:
        if self.copy_info_dict:
            self.infos[slots] = [deepcopy(info) for info in infos]

    def _close(self, envs: np.ndarray) -> None:
        for env in np.flatnonzero(envs):
            # A longer episode has overwritten its own beginning
            length = min(int(self._length[env]), self.buffer_size - 1)
            steps_left = np.arange(length, 0, -1)
            slots = self._ring[env] + (self._write_pos[env] - steps_left) % self.buffer_size
            self.steps_before[slots] = length - steps_left
            self.steps_left[slots] = steps_left
        super()._close(envs)

    def read(self, slots: Slots, starts: th.Tensor, n_steps: int, ends_only: bool = False) -> SubtrajectorySamples:
        """
        Read sub-trajectories, of which some get a new goal.

        :param slots: the slots on the host
        :param starts: slots of the first transitions, (B,)
        :param n_steps: number of transitions, H
        :param ends_only: whether to read only the observations s_0 and s_H, (B, 2, ...)
        :return: the sub-trajectories
        """
        samples = super().read(slots, starts, n_steps, ends_only)
        replaced = th.from_numpy(np.random.random(len(starts))) < self.n_sampled_goal / (self.n_sampled_goal + 1)
        if self.copy_info_dict:
            replaced &= th.tensor([self.infos[slot] is not None for slot in starts])
        rows = replaced.nonzero()[:, 0]
        if len(rows) == 0:
            return samples
        observation_slots, transition_slots, mask, _ = slots.follow(starts[rows], n_steps)
        achieved = slots.observation("achieved_goal", observation_slots[:, 1:])
        goals = slots.observation("achieved_goal", self._goal_slots(slots, starts[rows])).to(achieved.dtype)
        infos = self.infos[transition_slots.numpy()].ravel() if self.copy_info_dict else [{} for _ in range(mask.numel())]
        rewards = self.compute_rewards(
            achieved.flatten(0, 1).numpy(),
            goals[:, None].expand_as(achieved).flatten(0, 1).numpy(),
            list(infos),
        )
        new_rewards = th.from_numpy(rewards).view(mask.shape) * mask
        desired = samples.observations["desired_goal"]
        desired[rows] = goals[:, None].expand(-1, *desired.shape[1:]).to(desired.dtype)
        return samples._replace(rewards=samples.rewards.index_copy(0, rows, new_rewards))

    def _goal_slots(self, slots: Slots, starts: th.Tensor) -> th.Tensor:
        """
        :param slots: the slots on the host
        :param starts: slots of the first transitions, (B,)
        :return: slots of observations whose achieved goals become the desired ones, (B,)
        """
        left = th.from_numpy(self.steps_left)[starts].long()
        if self.goal_selection_strategy == "final":
            return slots.back(starts, -left)
        before = th.zeros_like(left)
        if self.goal_selection_strategy == "episode":
            # Without transitions that have been overwritten
            oldest = th.from_numpy(self._write_pos + self._running)[starts // self.buffer_size]
            older = (starts - oldest) % self.buffer_size
            before = th.minimum(th.from_numpy(self.steps_before)[starts].long(), older)
        steps = (th.from_numpy(np.random.random(len(starts))) * (before + left)).long() + 1
        return slots.back(starts, before - steps)

    def mean_abs_reward(self, env: VecNormalize | None = None) -> float:
        """
        :param env: VecNormalize to normalize rewards with
        :return: mean absolute reward of transitions drawn uniformly, some with a new goal; 0 if none can be sampled
        """
        if self.n_sampleable == 0:
            return 0.0
        starts = np.flatnonzero(self._flags & SAMPLEABLE)
        if len(starts) > self.REWARDS_SAMPLED:
            starts = np.random.choice(starts, self.REWARDS_SAMPLED)
        rewards = self.read(self.slots, th.from_numpy(starts), 1, ends_only=True).rewards.numpy()
        return float(np.abs(rewards if env is None else self._normalize_reward(rewards, env)).mean())

    def _slot_arrays(self) -> dict[str, np.ndarray]:
        arrays = super()._slot_arrays()
        return arrays and arrays | {"steps_before": self.steps_before, "steps_left": self.steps_left}
