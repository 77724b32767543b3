"""
The package as it is installed.
"""

import subprocess
import sys
from importlib import metadata
from importlib.resources import files

import sb3_mrq


def test_version_matches_metadata():
    assert sb3_mrq.__version__ == metadata.version("sb3-mrq")


def test_typed():
    assert files("sb3_mrq").joinpath("py.typed").is_file()


def test_import_needs_no_extra():
    extras = {"ale_py", "dm_control", "mujoco", "rl_zoo3", "sb3_contrib", "shimmy"}
    code = f"import sys, sb3_mrq; print(*sorted({extras!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.split() == []
