"""
The Hugging Face Hub: a model card whose commands know the algorithms of this package.
"""

import argparse
import contextlib
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
from huggingface_sb3 import EnvironmentName, ModelName

from sb3_mrq.zoo.configuration import ALGORITHMS

PAPERS = {"mrq": "[MR.Q](https://arxiv.org/abs/2501.16142)", "drq": "[DR.Q](https://arxiv.org/abs/2605.11711)"}
CARD = """
# {algorithm} agent for {env_id}

An agent of {paper} for the task `{env_id}`, trained with `sb3-mrq`, which brings this algorithm to
[Stable-Baselines3](https://github.com/DLR-RM/stable-baselines3) and the
[RL Zoo](https://github.com/DLR-RM/rl-baselines3-zoo). RL Zoo alone does not know the algorithm.

## Usage

Install `sb3-mrq` with the extra{extras}, then download the agent and watch it:

```bash
sb3-mrq load_from_hub {task} {repository} -f logs
sb3-mrq enjoy {task} -f logs
```

In Python:

```python
from huggingface_sb3 import load_from_hub

from sb3_mrq import {algorithm}

model = {algorithm}.load(load_from_hub("{repo_id}", "{file}"))
```

Like all models of Stable-Baselines3, the file contains pickles: only load models that you trust.

## Training

```bash
sb3-mrq train {task} -f logs
sb3-mrq push_to_hub {task} {repository} -f logs
```

{hyperparameters}"""


def _extras(env_id: str) -> str:
    """
    :param env_id: id of a task
    :return: the extras that the task and the scripts need, in words
    """
    entry_point = str(getattr(gym.registry.get(env_id), "entry_point", ""))
    extras = {"sb3_mrq.envs": "dmc", "mujoco": "mujoco", "ale_py": "atari", "box2d": "box2d"}
    needed = [extra for module, extra in extras.items() if module in entry_point]
    return f"s `zoo` and `{needed[0]}`" if needed else " `zoo`"


def model_card(theirs: str, arguments: list[str]) -> str:
    """
    :param theirs: the model card of rl-zoo3, of which the hyperparameters are kept
    :param arguments: arguments of ``push_to_hub``
    :return: the model card, theirs for other algorithms
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--algo")
    parser.add_argument("--env", type=EnvironmentName)
    parser.add_argument("-orga", "--organization")
    parser.add_argument("-name", "--repo-name")
    # Or -n would be taken for an abbreviation of -name
    parser.add_argument("-n", "--n-timesteps")
    options = parser.parse_known_args(arguments)[0]
    if options.algo not in ALGORITHMS:
        return theirs
    algo, env_id = options.algo, options.env.gym_id
    name = ModelName(algo, options.env)
    repository = f"-orga {shlex.quote(options.organization)}"
    if options.repo_name is not None:
        repository += f" -name {shlex.quote(options.repo_name)}"
    hyperparameters = re.search(r"^## Hyperparameters.*", theirs, flags=re.MULTILINE | re.DOTALL)
    return CARD.format(
        algorithm=ALGORITHMS[algo].__name__,
        env_id=env_id,
        paper=PAPERS[algo],
        extras=_extras(env_id),
        task=f"--algo {algo} --env {shlex.quote(env_id)}",
        repository=repository,
        repo_id=f"{options.organization}/{options.repo_name or name}",
        file=name.filename,
        hyperparameters=hyperparameters[0] if hyperparameters else "",
    )


def _supply_generate_metadata() -> None:
    """
    Provide the function ``generate_metadata`` for ``push_to_hub``, which huggingface_sb3 3.2 has renamed.
    """
    hub = importlib.import_module("huggingface_sb3.push_to_hub")
    if not hasattr(hub, "generate_metadata"):

        def generate_metadata(*args: Any) -> dict[str, Any]:
            return hub._generate_metadata(*args).to_dict()

        hub.generate_metadata = generate_metadata  # type: ignore[attr-defined]


@contextlib.contextmanager
def patched_hub(arguments: list[str]) -> Iterator[None]:
    """
    Patch ``push_to_hub``, so that it works with huggingface_sb3 3.2, and so that its model card names commands that work. The
    card is replaced when rl-zoo3 adds the metadata to it.

    :param arguments: arguments of ``push_to_hub``
    """
    _supply_generate_metadata()
    repocard = importlib.import_module("huggingface_hub.repocard")
    save = repocard.metadata_save

    def save_card(path: str | Path, metadata: dict[str, Any]) -> None:
        Path(path).write_text(model_card(Path(path).read_text("utf-8"), arguments), "utf-8")
        save(path, metadata)

    repocard.metadata_save = save_card  # type: ignore[attr-defined]
    try:
        yield
    finally:
        repocard.metadata_save = save  # type: ignore[attr-defined]
