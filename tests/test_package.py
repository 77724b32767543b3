"""
The installed package.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata
from importlib.resources import files
from pathlib import Path

from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

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
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= modules else names | {node.module}
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
    """No module reaches for an underscore name of another one's classes."""
    defined, used = {}, []
    for path in Path(sb3_mrq.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                defined.setdefault(node.name, set()).add(path.stem)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                if owner == "self" and isinstance(node.ctx, ast.Store):
                    defined.setdefault(node.attr, set()).add(path.stem)
                elif owner not in ("self", "cls", "super()"):
                    used.append((path.stem, owner, node.attr))
    # Overridden names of Stable-Baselines3
    theirs = set(dir(OffPolicyAlgorithm)) | {"_last_obs", "_last_original_obs", "_n_updates"}
    assert len(defined) > 100
    assert not [use for use in used if use[2] in defined.keys() - theirs and use[0] not in defined[use[2]]]
