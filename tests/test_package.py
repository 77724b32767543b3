"""
The package as it is installed.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from importlib.resources import files
from pathlib import Path

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


def imports(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a module imports anywhere, in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & modules


def test_no_circle_of_imports():
    root = Path(sb3_mrq.__file__).parent
    paths = {}
    for path in root.rglob("*.py"):
        parts = ("sb3_mrq", *path.relative_to(root).with_suffix("").parts)
        paths[".".join(parts).removesuffix(".__init__")] = path
    graph = {name: imports(path, paths.keys()) - {name} for name, path in paths.items()}
    assert len(graph) > 40 and "sb3_mrq.losses" in graph["sb3_mrq.learner"]
    # Raises CycleError
    list(TopologicalSorter(graph).static_order())


def test_private_names_are_private():
    """Nothing in the package reaches for an underscore name of another object."""
    root = Path(sb3_mrq.__file__).parent
    # Of Stable-Baselines3, whose attributes its subclasses share, and of torch
    shared = {"_last_obs", "_last_original_obs", "_last_episode_starts", "_n_updates", "_wrap_env", "_is_amx_tile_supported"}
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if owner not in ("self", "cls", "super()", "OffPolicyAlgorithm", "ResumableOffPolicyAlgorithm"):
                    found.add((path.name, owner, node.attr))
    assert {attr for _, _, attr in found} <= shared, sorted(found)
