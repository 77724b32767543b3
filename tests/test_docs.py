"""
The documentation site: it builds strictly and without the network, its links are valid, its code runs, and its tables of
arguments are right.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urljoin, urlsplit

import fork_server
import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.dqn.policies import DQNPolicy
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy

from sb3_mrq import DRQ, MRQ, drq
from sb3_mrq.policies import MRQPolicy

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))

# Maximum number of steps of each `learn` on a page
STEPS = int(os.environ.get("SB3_MRQ_DOCS_STEPS", "30"))
SHORTEN = f"""
from sb3_mrq import MRQ

def shorten(init=MRQ.__init__, learn=MRQ.learn):
    small = dict(net_arch=dict(encoder=[8], qf=[8], pi=[8]), z_s_dim=8, z_sa_dim=8, z_a_dim=4)

    def short_init(self, *args, _init_setup_model=True, **kwargs):
        if _init_setup_model:
            kwargs |= dict(learning_starts={STEPS // 2}, batch_size=8, target_update_interval=2)
            kwargs["policy_kwargs"] = small | (kwargs.get("policy_kwargs") or {{}})
        init(self, *args, _init_setup_model=_init_setup_model, **kwargs)

    def short_learn(self, total_timesteps, *args, **kwargs):
        return learn(self, min(total_timesteps, {STEPS}), *args, **kwargs)

    MRQ.__init__, MRQ.learn = short_init, short_learn

shorten()
"""


class Page(HTMLParser):
    """Links, resources and anchors of a built page."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        elif tag in ("script", "img", "iframe", "source") and attributes.get("src"):
            self.resources.append(attributes["src"])
        elif tag == "link" and attributes.get("href"):
            self.resources.append(attributes["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the site, and its pages by their path in it."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ".mkdocs.yml", "--site-dir", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.relative_to(folder).as_posix(): Page(path.read_text("utf-8")) for path in folder.rglob("*.html")}
    return folder, pages


def test_every_page_is_built(site):
    _, pages = site
    assert {f"{page.stem}.html" for page in PAGES} <= pages.keys()


def test_nothing_comes_from_elsewhere(site):
    folder, pages = site
    for name, page in pages.items():
        external = [resource for resource in page.resources if urlsplit(resource).netloc]
        assert not external, f"{name} loads {external}"
    for sheet in folder.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text("utf-8")), sheet


def test_links(site):
    folder, pages = site
    broken = []
    for name, page in pages.items():
        if name == "404.html":  # its links assume a site at the root of a server
            continue
        for link in page.links + page.resources:
            target = urlsplit(urljoin(name, link))
            if target.scheme or target.netloc:
                continue
            path, anchor = unquote(target.path) or name, unquote(target.fragment)
            if path.endswith("/") or path == ".":
                path = urljoin(path, "index.html")
            if not (folder / path).is_file() or (anchor and path in pages and anchor not in pages[path].ids):
                broken.append(f"{name}: {link}")
    assert not broken


def test_roles_of_docstrings_are_references(site):
    """Sphinx's roles have become links, and every parameter has its description."""
    folder, _ = site
    text = (folder / "api.html").read_text("utf-8")
    assert ":class:" not in text and ":func:" not in text and ":param" not in text


def test_figure_is_up_to_date():
    path = DOCS / "figures" / "draw_algorithm.py"
    spec = importlib.util.spec_from_file_location("draw_algorithm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "figures" / "algorithm.svg").read_text("utf-8") == module.draw(), f"run python {path}"


@pytest.mark.parametrize(
    ("figure", "report"), [("results", "report"), ("results-discrete", "report-discrete")], ids=["results", "discrete"]
)
def test_figures_are_the_reports(figure, report):
    """The site shows copies, because it takes files from its own folder only."""
    original = ROOT / "benchmarks" / "results" / report / "curves_steps.png"
    assert (DOCS / "figures" / f"{figure}.png").read_bytes() == original.read_bytes()


TEXTS = [*PAGES, *ROOT.glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), *(ROOT / ".github").glob("*.md")]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.stem)
def test_no_number_becomes_a_list(page):
    """No line in the middle of a paragraph begins with a number and a full stop, which Markdown takes for a list."""
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", text):
        first, *others = paragraph.strip("\n").splitlines() or [""]
        if not re.match(r"\s*\d+\.\s", first):
            assert not [line for line in others if re.match(r"\s*\d+\.(\s|$)", line)], paragraph


def code_of(page: Path) -> list[str]:
    """The blocks of Python on a page, without those that begin with "# not run"."""
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [block for block in blocks if not block.startswith("# not run")]


def run_code(page: Path, folder: Path) -> None:
    """Run the blocks of a page in a folder, one after the other in one process, as a reader would type them."""
    script = folder / "page.py"
    script.write_text(SHORTEN + "\n".join(code_of(page)), "utf-8")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = fork_server.run([sys.executable, str(script)], cwd=folder, env=os.environ | {"PYTHONPATH": path})
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.stem)
def test_code_runs(page, tmp_path):
    run_code(page, tmp_path)


PARSE = """
import argparse, shlex, sys
from sb3_mrq.compare import command
from sb3_mrq.speed import speed_script
from sb3_mrq.zoo.scripts import run

class Parsed(Exception): pass

def parse_and_stop(self, *args, parse=argparse.ArgumentParser.parse_args):
    raise Parsed(parse(self, *args))

argparse.ArgumentParser.parse_args = parse_and_stop
for line in sys.stdin:
    _, script, *arguments = shlex.split(line)
    try:
        speed_script(arguments) if script == "speed" else run(script, arguments)
    except Parsed as parsed:
        script == "compare" and command.plan(parsed.args[0])
    else:
        sys.exit(f"not parsed: {line}")
"""


def commands_of(page: Path) -> list[str]:
    """The calls of ``sb3-mrq`` in the indented blocks of a page."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    return re.findall(r"^    (sb3-mrq \w.*)$", text, flags=re.MULTILINE)


# tests/test_readme.py runs those on the page of the command line
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands_of(page) and page.stem != "command-line"], ids=lambda page: page.stem
)
def test_commands(page, tmp_path):
    """Their arguments are accepted. tests/test_zoo_resume.py continues a run with ``-i``."""
    commands = [re.sub(r" -i \S+", "", command) for command in commands_of(page)]
    reading, writing = os.pipe()
    os.write(writing, "\n".join(commands).encode())
    os.close(writing)
    with open(reading) as text:
        process = fork_server.Popen(
            [sys.executable, "-c", PARSE], cwd=tmp_path, stdin=text, stderr=subprocess.PIPE, kind="zoo"
        )
    assert (process.communicate()[1], process.returncode) == ("", 0)


def rows(page: str, heading: str) -> list[list[str]]:
    """The cells of all tables of a page from a heading of the second level to the next, titles left out."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for line in section.group(1).splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def parameters_of(function) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor but for self."""
    parameters = dict(inspect.signature(function).parameters)
    del parameters["self"]
    return parameters


def check_default(name: str, cell: str, parameter: inspect.Parameter) -> None:
    default = parameter.default
    if default is inspect.Parameter.empty:
        assert cell == "required", name
    elif isinstance(default, type):
        assert cell == f"`{default.__name__}`", name
    else:
        value = ast.literal_eval(cell.strip("`"))
        assert value == default and type(value) in (type(default), int), f"{name} is {default}, not {cell}"


@pytest.mark.parametrize(
    ("heading", "owner", "sibling"), [("MRQ and DRQ", MRQ, DRQ), ("policy_kwargs", MRQPolicy, drq.MlpPolicy)]
)
def test_hyperparameters(heading, owner, sibling):
    """Each argument of the constructor has one line, with its default and another one of DR.Q, and there are no others."""
    parameters, others = parameters_of(owner.__init__), parameters_of(sibling.__init__)
    table = rows("hyperparameters.md", heading)
    names = [row[0].strip("`") for row in table]
    assert len(names) == len(set(names))
    assert set(names) == parameters.keys()
    for name, (_, default, meaning, *_) in zip(names, table, strict=True):
        default, _, other = default.rstrip(")").partition(" (")
        check_default(name, default, parameters[name])
        check_default(name, other or default, others[name])
        assert meaning, name


def test_what_differs_in_drq():
    """The table of differences names all of them, and the defaults that it speaks of."""
    (table,) = [re.findall(r"`(\w+)`", row) for row in [(DOCS / "drq.md").read_text("utf-8").partition("Age is")[0]]]
    ours, theirs = parameters_of(MRQ.__init__), parameters_of(DRQ.__init__)
    assert ours.keys() == theirs.keys()
    different = {name for name in ours if ours[name].default != theirs[name].default}
    assert different | {"infonce_temperature", "replay_fade_min"} == set(table) & ours.keys() - {"policy_kwargs"}


SAME_EVERYWHERE = {
    *("policy", "env", "gamma", "policy_kwargs"),
    *("stats_window_size", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model"),
}


def test_migrating_from_all_three():
    theirs = [parameters_of(algorithm.__init__) for algorithm in (TD3, SAC, DQN)]
    table = {row[0].strip("`"): row[1:] for row in rows("migrating.md", "What all three have")}
    shared = theirs[0].keys() & theirs[1].keys() & theirs[2].keys()
    assert table.keys() == shared - SAME_EVERYWHERE
    ours = parameters_of(MRQ.__init__)
    for name, cells in table.items():
        if name == "replay_buffer_class":
            continue
        for cell, parameters in zip(cells, [*theirs, ours], strict=False):
            if cell not in ("none", "no effect"):
                check_default(name, cell, parameters[name])
        assert (cells[3] == "none") == (name not in ours)


@pytest.mark.parametrize("algorithm", [TD3, SAC, DQN], ids=lambda algorithm: algorithm.__name__)
def test_migrating(algorithm):
    """Each argument that only some of the three have is listed, with its default and MRQ's."""
    parameters = parameters_of(algorithm.__init__)
    table = {row[0].strip("`"): row[1:] for row in rows("migrating.md", algorithm.__name__)}
    others = {row[0].strip("`") for row in rows("migrating.md", "What all three have")}
    assert table.keys() == parameters.keys() - SAME_EVERYWHERE - others
    ours = parameters_of(MRQ.__init__)
    for name, (default, counterpart, *_) in table.items():
        check_default(name, default, parameters[name])
        if counterpart != "none":
            our_name, our_default = counterpart.strip("`").split("=")
            check_default(our_name, our_default, ours[our_name])


def test_migrating_policies():
    table = {row[0].strip("`"): row[1:] for row in rows("migrating.md", "policy_kwargs")}
    for i, policy in enumerate((TD3Policy, SACPolicy, DQNPolicy)):
        parameters = parameters_of(policy.__init__)
        for name, cells in table.items():
            if name == "net_arch":
                continue
            if cells[i] == "none":
                assert name not in parameters
            else:
                check_default(name, cells[i], parameters[name])


@pytest.fixture(scope="module")
def owners():
    """The owners of the names with a dot on the developers' page."""
    model = MRQ("MlpPolicy", "Pendulum-v1", policy_kwargs={"net_arch": {"encoder": [8], "qf": [8], "pi": [8]}})
    return {
        "MRQ": model,  # with the attributes that are set when it is made
        "OffPolicyAlgorithm": OffPolicyAlgorithm,
        "env": gym.Env,
        "encoder": model.encoder,
        "encoder_target": model.encoder_target,
        "critic": model.critic,
        "actor": model.actor,
        "actions": model.policy.actions,
        "updates": model.updates,
        "learner": model.learner,
        "replay": model.replay_buffer,
    }


ROOMS = ("accelerate", "buffers", "persist")


def modules() -> dict[str, ModuleType]:
    """The modules of the package itself and of its rooms, by name."""
    package = ROOT / "sb3_mrq"
    paths = [*package.glob("[a-z]*.py"), *(path for room in ROOMS for path in (package / room).glob("[a-z]*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    return {name.rpartition(".")[2]: importlib.import_module(name) for name in names}


def test_contributors_find_what_is_named(owners):
    """Names on the developers' page exist: names with a dot in their owner, others in the package or one of its classes."""
    text = (DOCS / "developers.md").read_text("utf-8")
    names = re.findall(r"`([A-Za-z_][A-Za-z_.]*)`", text)
    files = {path.name for folder in ("sb3_mrq", "tests") for path in (ROOT / folder).rglob("*.py")}
    spaces = vars(gym.spaces)
    defined = {name: value for module in modules().values() for name, value in vars(module).items()}
    classes = [value for value in defined.values() if inspect.isclass(value)]
    elsewhere = {"backward", "clip_grad_norm_", "terminal_observation", "VecNormalize", "train/size_loss"}
    assert len(names) > 60
    for name in set(names) - elsewhere:
        owner, _, rest = name.partition(".")
        if name.endswith(".py"):
            assert name in files, name
        elif name == "CONTRIBUTING.md":
            assert (ROOT / ".github" / name).exists()
        elif rest:
            value = owners.get(owner) or modules().get(owner) or defined[owner]
            for attribute in rest.split("."):
                assert hasattr(value, attribute), name
                value = getattr(value, attribute)
        else:
            assert name in defined or name in spaces or any(hasattr(each, name) for each in (*classes, owners["MRQ"])), name


def imports_of(path: Path) -> set[str]:
    """The modules and packages in the package that a module imports when it is imported itself."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sb3_mrq":
            parts = node.module.split(".")[1:2]
            found |= set(parts or (alias.name for alias in node.names))
    return found


def test_tree_of_modules():
    """The developers' page lists every module once, and each imports only what is listed below it."""
    tree = re.search(r"^```text\n(.*?)^```", (DOCS / "developers.md").read_text("utf-8"), re.MULTILINE | re.DOTALL).group(1)
    listed = [line.split()[0] for line in tree.splitlines()]
    package = ROOT / "sb3_mrq"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert sorted(listed) == sorted({path.name for path in package.glob("[a-z]*.py")} | folders)
    order = {name.removesuffix(".py").removesuffix("/"): line for line, name in enumerate(listed)}
    assert order["learner"] > order["mrq"]
    for name, line in order.items():
        path = package / name
        for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            imported = imports_of(file) - {name, "DRQ", "MRQ"}
            assert all(order[other] > line for other in imported), f"{file.name} imports {imported}"


def attribute_of(model, path: str):
    """An attribute of an attribute, or None if there is none."""
    return functools.reduce(lambda owner, name: getattr(owner, name, None), path.split("."), model)


@pytest.fixture(scope="module", params=["Pendulum-v1", "CartPole-v1"])
def migrated(request):
    """What the recipes of the migration page are about: a model, and what the code above them defines."""
    tiny = {"net_arch": {"encoder": [8], "qf": [8], "pi": [8]}}
    model = MRQ("MlpPolicy", request.param, learning_starts=20, batch_size=8, policy_kwargs=tiny, seed=0)
    model.learn(40)
    model.reward_scale = 2.5
    section = (DOCS / "migrating.md").read_text("utf-8").partition("\n## Attributes\n")[2]
    names = {"model": model}
    exec(re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL).group(1), names)
    return names


RECIPES = [[cell.strip("`") for cell in row] for row in rows("migrating.md", "Attributes")]


@pytest.mark.parametrize(("path", "owners", "recipe"), [row[:3] for row in RECIPES], ids=[row[0] for row in RECIPES])
def test_migrating_attributes(path, owners, recipe, migrated):
    """Each attribute is one of theirs, is not one of ours with that meaning, and its recipe gives something of that kind."""
    path, _, arguments = path.partition("(")
    algorithms = {"TD3": TD3, "SAC": SAC, "DQN": DQN}
    for name in owners.split(", "):
        env = "CartPole-v1" if name == "DQN" else "Pendulum-v1"
        model = algorithms[name]("MlpPolicy", env, policy_kwargs={"net_arch": [8]}, buffer_size=10)
        if path != "ent_coef":  # an argument, which is an attribute only if it is a number
            assert attribute_of(model, path) is not None, name
    model = migrated["model"]
    if recipe == "none":
        assert attribute_of(model, path) is None
        return
    is_box = isinstance(model.action_space, gym.spaces.Box)
    if path == "q_net" and is_box:
        with pytest.raises(ValueError, match="cannot be listed"):
            eval(recipe, migrated)
        return
    value = eval(recipe, migrated)
    n, starts = 4, len(migrated["starts"])
    shape = {
        "critic": (n, 2),
        "critic.q1_forward": (n,),
        "q_net": (n, 2, 2),
        "critic_target": (n, 2),
        "q_net_target": (n, 2),
        "actor": (n, 1 if is_box else 2),
        "actor_target": (n, 1 if is_box else 2),
        "replay_buffer.observations": (starts, *model.observation_space.shape),
        "replay_buffer.next_observations": (starts, *model.observation_space.shape),
        "replay_buffer.actions": (starts, 1),
        "replay_buffer.rewards": (starts,),
        "replay_buffer.dones": (starts,),
    }.get(path)
    assert bool(arguments) <= bool(shape)
    if shape is not None:
        assert value.shape == shape


def test_recipes_are_of_the_same_values(migrated):
    """What the page says to be the same is."""
    model, q = migrated["model"], eval("model.q_values(obs, actions)", migrated)
    with_gradient = eval("model.critic(z_sa) * model.reward_scale", migrated)
    assert with_gradient.requires_grad
    np.testing.assert_allclose(with_gradient.detach().numpy(), q, rtol=1e-4)
    vectors = eval("model.policy.act(obs_tensor, sample=False)", migrated)
    actions = model.policy.actions.decode(vectors).detach().numpy()
    if isinstance(model.action_space, gym.spaces.Box):
        actions = model.policy.unscale_action(actions)
    np.testing.assert_allclose(actions.reshape(migrated["actions"].shape), migrated["actions"], rtol=1e-4)
