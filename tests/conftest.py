"""
MuJoCo renders without a display in the tests, also where they are not started by the Makefile. Hypothesis
generates the same cases each time, so that a change fails for what it changes; HYPOTHESIS_PROFILE=random looks for new ones.
"""

import os
import sys

if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported

try:
    from hypothesis import settings
except ImportError:  # as in the environment of `make test-oldest`, whose tests do without
    pass
else:
    settings.register_profile("repeatable", derandomize=True)
    settings.register_profile("random", print_blob=True)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
