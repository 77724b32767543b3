"""
MuJoCo renders without a display in the tests, also where they are not started by the Makefile. Hypothesis
generates the same cases each time, so that a change fails for what it changes; HYPOTHESIS_PROFILE=random looks for new ones.
Several workers share the tests by what these share.
"""

import os
import sys

import pytest

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

# Files whose tests go to any worker one by one, but for those with one of these fixtures, which takes long to set up.
# The tests of any other file stay together.
APART = {
    "test_compare_example": [],
    "test_docs": ["site"],
    "test_envs_rendering": [],
    "test_examples": [],
    "test_fast": [],
    "test_readme": ["folder"],
    "test_study": [],
    "test_zoo_scripts": ["env_id", "visual"],
}


def group_of(item):
    """What a test stays together with, None if with nothing."""
    file = item.path.stem
    if file not in APART:
        return file
    for name in APART[file]:
        if name in item.fixturenames:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            return f"{file}-{parameters.get(name, name)}"
    return None


def pytest_collection_modifyitems(items):
    """For ``--dist loadgroup``."""
    for item in items:
        group = group_of(item)
        if group is not None and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group))
