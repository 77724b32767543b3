"""Import path of version 0.1, see :mod:`sb3_mrq.command_line` and :mod:`sb3_mrq.zoo.scripts`."""

from sb3_mrq.command_line import main
from sb3_mrq.zoo.scripts import run

__all__ = ["main", "run"]
