"""
The example that compares algorithms trains them all alike, notes every evaluation and draws it.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "compare.py"


@pytest.mark.parametrize(
    "env_id, algorithms", [("Pendulum-v1", ["MRQ", "TD3", "SAC"]), ("CartPole-v1", ["MRQ", "DQN", "QR-DQN"])]
)
def test_compare(env_id, algorithms, tmp_path):
    arguments = f"--env {env_id} --steps 40 --seeds 2 --eval-freq 20 --eval-episodes 1 --threads 1 --out {tmp_path}"
    process = subprocess.run(
        [sys.executable, SCRIPT, *arguments.split()], capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    assert process.returncode == 0, process.stderr
    rows = list(csv.DictReader((tmp_path / "compare.csv").open()))
    assert [(row["algorithm"], row["seed"], row["step"]) for row in rows] == [
        (algorithm, seed, step) for algorithm in algorithms for seed in "01" for step in ("0", "20", "40")
    ]
    for row in rows:
        assert float(row["seconds"]) >= 0
        assert -2000 < float(row["return"]) < 0 if env_id == "Pendulum-v1" else 1 <= float(row["return"]) <= 500
    assert process.stdout.splitlines()[-1] == str(tmp_path / "compare.png")
    assert image.imread(tmp_path / "compare.png").std() > 0.01
    assert (tmp_path / "compare.svg").stat().st_size > 1000
