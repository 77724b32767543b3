"""Import path of version 0.1, see :mod:`sb3_mrq.persist.replay_files`."""

from sb3_mrq.persist.replay_files import ReplayFileError

__all__ = ["ReplayFileError"]
