"""
The runs of a comparison and their folders.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sb3_mrq.zoo.configuration import ConfigurationError

EVALUATIONS = "evaluations.csv"
#: empty file in the folder of a finished run
FINISHED = "finished"


@dataclass(frozen=True)
class Run:
    """
    One training run.

    :param task: id of the environment
    :param algorithm: name of the algorithm, see :func:`sb3_mrq.compare.algorithms.resolve`
    :param seed: seed of the run
    :param steps: number of environment steps
    :param eval_freq: steps between two evaluations
    :param eval_episodes: episodes per evaluation
    :param out: folder of the comparison
    :param threads: number of torch threads
    :param device: torch device
    :param gym_packages: packages that register environments, separated by spaces
    """

    task: str
    algorithm: str
    seed: int
    steps: int
    eval_freq: int
    eval_episodes: int
    out: str
    threads: int
    device: str
    gym_packages: str

    @property
    def folder(self) -> Path:
        parts = (self.algorithm, self.task, f"seed{self.seed}")
        return Path(self.out, "runs", *(part.replace("/", "_") for part in parts))

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the results, up to rounding."""
        return {name: getattr(self, name) for name in ("task", "algorithm", "seed", "steps", "eval_freq", "eval_episodes")}

    @property
    def finished(self) -> bool:
        return (self.folder / FINISHED).exists()

    @property
    def steps_done(self) -> int:
        """Steps up to the last evaluation."""
        path = self.folder / EVALUATIONS
        fields = path.read_text().splitlines()[-1].split(",") if path.exists() else []
        # The header until the first evaluation
        return int(fields[3]) if len(fields) > 3 and fields[3].isdigit() else 0

    def check_settings(self) -> None:
        """
        :raises ConfigurationError: if its folder has results of other settings
        """
        path = self.folder / "settings.json"
        before = json.loads(path.read_text()) if path.exists() else self.settings
        for name, value in self.settings.items():
            if before[name] != value:
                raise ConfigurationError(
                    f"{self.folder} has results of another comparison, in which {name} was {before[name]}, not {value}. "
                    "Choose another folder with --out."
                )
