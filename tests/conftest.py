"""
MuJoCo renders without a display in the tests, also where they are not started by the Makefile. Small networks take the paths
that are there for large ones.
"""

import os
import sys

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported

from sb3_mrq.networks import ELU

ELU.LARGE = 0
