"""Import path of version 0.1, see :mod:`sb3_mrq.persist.checkpoints`."""

from sb3_mrq.persist.checkpoints import CheckpointError, DamagedCheckpointError

__all__ = ["CheckpointError", "DamagedCheckpointError"]
