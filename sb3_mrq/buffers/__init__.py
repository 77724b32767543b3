"""
Replay buffer of MR.Q, which samples sub-trajectories by priority.
"""

from sb3_mrq.buffers.her import HerSubtrajectoryReplayBuffer
from sb3_mrq.buffers.replay_buffer import SubtrajectoryReplayBuffer
from sb3_mrq.buffers.samples import NStepSamples, SubtrajectorySamples
from sb3_mrq.buffers.storage import BufferState

__all__ = ["BufferState", "HerSubtrajectoryReplayBuffer", "NStepSamples", "SubtrajectoryReplayBuffer", "SubtrajectorySamples"]
