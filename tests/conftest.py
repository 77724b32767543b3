"""
MuJoCo renders without a display in the tests, also where they are not started by the Makefile. Tests draw the same random
numbers each time, and Hypothesis generates the same cases. HYPOTHESIS_PROFILE=random generates new ones.
Several workers share the tests by what these share.
"""

import itertools
import os
import random
import re
import sys

import numpy as np
import pytest
import torch as th

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


@pytest.fixture(autouse=True)
def same_random_numbers(monkeypatch):
    """Each test draws the same random numbers in each run. Unseeded spaces and environments get seeds that differ."""
    import envs
    from gymnasium.utils import seeding

    np_random, seeds = seeding.np_random, itertools.count(1000)
    monkeypatch.setattr(seeding, "np_random", lambda seed=None: np_random(next(seeds) if seed is None else seed))
    for space in (envs.VECTOR, envs.IMAGE, envs.BOX):
        space.seed(0)
    random.seed(0)
    np.random.seed(0)
    th.manual_seed(0)


# Tests that share nothing with others go to any worker one by one, for ``--dist loadscope``: their files, and how their names
# begin there. All other tests of a file stay together.
APART = {
    "test_docs.py": "test_code_runs",
    "test_envs_rendering.py": "",
    "test_examples.py": "",
    "test_fast.py": "(?!test_many_updates)",
    "test_readme.py": "test_(snippets|extras|links)",
    "test_compare.py": "",
    "test_zoo_scripts.py": "test_(?!subproc|record_training|benchmark)",
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    if config.getvalue("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path, _, name = nodeid.partition("::")
            pattern = APART.get(path.rpartition("/")[2])
            return path if pattern is None or not re.match(pattern, name) else nodeid

    return Scheduling(config, log)
