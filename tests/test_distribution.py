"""
The published files: wheel, sdist, and the files for users and contributors.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import sb3_mrq

ROOT = Path(__file__).resolve().parents[1]
VERSION = sb3_mrq.__version__


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints, if it succeeds."""
    # A package that PYTHONPATH leads to would count as installed
    environment = os.environ | {"PYTHONPATH": ""}
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Folder with wheel and sdist of the working tree, built in a copy of it and without the network."""
    pytest.importorskip("build")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("git tells which files belong to the sdist")
    copy = tmp_path_factory.mktemp("tree")
    for name in run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT).split("\0"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    identity = ("-c", "user.name=test", "-c", "user.email=test", "-c", "commit.gpgsign=false")
    run("git", "init", "--quiet", cwd=copy)
    run("git", "add", "--all", cwd=copy)
    run("git", *identity, "commit", "--quiet", "--message", "all", cwd=copy)
    # The sdist, and the wheel from the sdist
    run(sys.executable, "-m", "build", "--no-isolation", cwd=copy)
    return copy / "dist"


def test_twine_check(dist):
    pytest.importorskip("twine")
    output = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *sorted(dist.iterdir()), cwd=dist)
    assert output.count("PASSED") == 2


def test_sdist(dist):
    with tarfile.open(dist / f"sb3_mrq-{VERSION}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "CHANGELOG.md", ".github/CITATION.cff", "Makefile", "pyproject.toml", "setup.cfg"} <= names
    assert {"hyperparams/mrq.yml", "sb3_mrq/py.typed", "docs/index.md", ".ci/constraints.txt", ".mkdocs.yml"} <= names
    for folder in ("tests", "sb3_mrq", "examples", "benchmarks"):
        assert {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).glob("*.py")} <= names


def test_wheel(dist):
    """Nothing but the package."""
    with zipfile.ZipFile(dist / f"sb3_mrq-{VERSION}-py3-none-any.whl") as archive:
        names = set(archive.namelist())
    assert {"sb3_mrq/py.typed", "sb3_mrq/version.txt", "sb3_mrq/hyperparams/mrq.yml"} <= names
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "sb3_mrq").rglob("*.py")} <= names
    assert {name.partition("/")[0] for name in names} == {"sb3_mrq", f"sb3_mrq-{VERSION}.dist-info"}


def test_wheel_installs(dist, tmp_path):
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    scripts = venv / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    (wheel,) = dist.glob("*.whl")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    # The dependencies of this environment, but not what its .pth files add, such as an editable installation
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = """
from importlib.resources import files
import sb3_mrq
assert files("sb3_mrq.hyperparams").joinpath("mrq.yml").is_file()
sb3_mrq.MRQ("MlpPolicy", "CartPole-v1")
print(sb3_mrq.__version__, files("sb3_mrq"), sep="\\n")
"""
    version, folder = run(python, "-c", code, cwd=tmp_path).splitlines()
    assert version == VERSION
    assert Path(folder).resolve().is_relative_to(venv.resolve())
    assert list(scripts.glob("sb3-mrq*"))


def test_citation():
    citation = yaml.safe_load((ROOT / ".github" / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == VERSION
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text("utf-8")
    assert paper["title"] in readme and paper["identifiers"][0]["value"] in readme
    assert all(f"{author['family-names']}, {author['given-names']}" in readme for author in paper["authors"])


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.stem)
def test_yaml(path):
    content = yaml.safe_load(path.read_text("utf-8"))
    assert content["name"]
    if path.parent.name == "workflows":
        assert all(job["runs-on"] and job["steps"] for job in content["jobs"].values())
    else:
        assert content["description"] and content["body"]


def test_tests_run_on_every_supported_python():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text("utf-8"))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    for version in workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]:
        assert f"Python :: {version}" in project
    assert project.count("Programming Language :: Python :: 3.") == 4


def test_contributing_names_what_is_there():
    """The files and targets of make that a contributor is sent to."""
    text = (ROOT / ".github" / "CONTRIBUTING.md").read_text("utf-8")
    words = {word.strip("`,.:;()") for word in text.split()}
    for word in words:
        if word.startswith(("tests/", "docs/", "sb3_mrq/", ".ci/")):
            assert (ROOT / word).exists(), word
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in ("setup", "test", "lint", "type", "format", "docs"):
        assert f"\n{target}:" in makefile
