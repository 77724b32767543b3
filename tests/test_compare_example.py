"""
The example that compares algorithms trains them all alike, records every evaluation and draws it. tests/test_readme.py runs it
with continuous actions.
"""

import csv
import runpy
import sys
from pathlib import Path

import fork_server
import pytest
from envs import VECTOR, SpaceEnv, note_deterministic, tiny_model
from gymnasium import spaces
from matplotlib import image
from stable_baselines3.common.monitor import Monitor

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "compare.py"


def test_compare(tmp_path):
    arguments = f"--env CartPole-v1 --steps 45 --seeds 2 --eval-freq 20 --eval-episodes 1 --threads 1 --out {tmp_path}"
    process = fork_server.run([sys.executable, SCRIPT, *arguments.split()], timeout=300)
    assert process.returncode == 0, process.stderr
    rows = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert [(row["algorithm"], row["seed"], row["step"]) for row in rows] == [
        (algorithm, seed, step) for algorithm in ("MRQ", "DQN", "QR-DQN") for seed in "01" for step in ("0", "20", "40", "45")
    ]
    for row in rows:
        assert float(row["seconds"]) >= 0
        assert 1 <= float(row["return"]) <= 500
    assert process.stdout.splitlines()[-1] == str(tmp_path / "compare.png")
    assert image.imread(tmp_path / "compare.png").std() > 0.01
    assert (tmp_path / "compare.svg").stat().st_size > 1000


@pytest.mark.parametrize("actions, deterministic", [(spaces.Discrete(3), False), (spaces.Box(-1, 1, (2,)), True)])
def test_discrete_policies_are_evaluated_by_samples(actions, deterministic, monkeypatch):
    """As in the benchmarks, and in the paper."""
    evaluation = runpy.run_path(str(SCRIPT))["Evaluation"]("Pendulum-v1", 10, 1, 0)
    evaluation.env = Monitor(SpaceEnv(VECTOR, actions))
    model = tiny_model(SpaceEnv(VECTOR, actions))
    seen = note_deterministic(model, monkeypatch)
    evaluation.init_callback(model)
    evaluation.on_training_start({}, {})
    assert set(seen) == {deterministic}
