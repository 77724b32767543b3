"""
MuJoCo renders without a display in the tests, also where they are not started by the Makefile.
"""

import os
import sys

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported
