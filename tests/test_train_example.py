"""
The training script writes everything that it promises.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import fork_server
import imageio_ffmpeg
import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from stable_baselines3.common.monitor import load_results

from sb3_mrq import MRQ

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "train.py"


def train(folder: Path, env_id: str, steps: int, **environment: str) -> str:
    """Run the script in a fork and return its output. tests/test_readme.py runs it in a real process."""
    command = [sys.executable, str(SCRIPT), "--env", env_id, "--steps", str(steps), "--seed", "3", "--out", str(folder)]
    result = fork_server.run(command, cwd=folder.parent, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """Folder and output of a run of 1000 random steps and three steps of training."""
    folder = tmp_path_factory.mktemp("runs") / "pendulum"
    return folder, train(folder, "Pendulum-v1", 1003)


def test_says_where_everything_is(pendulum):
    folder, output = pendulum
    evaluation, last = output.strip().splitlines()[-2:]
    assert evaluation.startswith("Pendulum-v1 after 1003 steps: ")
    assert evaluation.endswith(" over 20 episodes (not solved: -200 is asked for)")
    assert last == f"Everything is in {folder}"


def test_model_loads(pendulum):
    model = MRQ.load(pendulum[0] / "model.zip")
    assert model.num_timesteps == 1003
    assert model.seed == 3
    assert model.action_space.contains(model.predict(np.zeros(3, dtype=np.float32))[0])


def test_evaluation(pendulum):
    evaluation = json.loads((pendulum[0] / "evaluation.json").read_text())
    assert (evaluation["env"], evaluation["steps"]) == ("Pendulum-v1", 1003)
    assert len(evaluation["returns"]) == len(evaluation["lengths"]) >= 10
    assert evaluation["mean_return"] == pytest.approx(np.mean(evaluation["returns"]))
    assert evaluation["std_return"] == pytest.approx(np.std(evaluation["returns"]))
    assert set(evaluation["lengths"]) == {200}


def test_course_of_training(pendulum):
    episodes = load_results(str(pendulum[0]))
    assert episodes["l"].sum() == 1000
    evaluations = pd.read_csv(pendulum[0] / "evaluations.csv", index_col="steps")
    assert list(evaluations.index) == list(range(50, 1003, 50))
    assert evaluations.shape[1] == 10 and evaluations.notna().all(axis=None)


def test_picture(pendulum):
    pixels = image.imread(pendulum[0] / "learning_curve.png")
    assert min(pixels.shape[:2]) >= 500
    assert pixels.std() > 0.01  # not blank


def test_video(pendulum):
    (video,) = pendulum[0].glob("*.mp4")
    frames = imageio_ffmpeg.read_frames(str(video))
    meta = next(frames)
    assert meta["codec"] == "h264"
    assert meta["duration"] == pytest.approx(500 / 30, abs=1)  # frames, frames a second
    width, height = meta["size"]
    frame = np.frombuffer(next(frames), dtype=np.uint8).reshape(height, width, 3)
    frames.close()
    assert frame.std() > 5  # not blank


def test_diagnosis(pendulum):
    numbers = json.loads((pendulum[0] / "diagnosis" / "diagnosis.json").read_text())["numbers"]
    assert numbers["episodes/n"] == 20
    assert "<img" in (pendulum[0] / "diagnosis" / "index.html").read_text()


@pytest.mark.parametrize(
    ("env_id", "policy", "steps"),
    [("dmc/walker-walk-v0", "MlpPolicy", 500_000), ("ALE/Pong-v5", "CnnPolicy", 2_500_000)],
)
def test_other_suites(env_id, policy, steps):
    pytest.importorskip("ale_py" if env_id.startswith("ALE/") else "dm_control")
    script = runpy.run_path(str(SCRIPT))
    env = script["make_env"](env_id, render_mode="rgb_array")
    assert env.reset(seed=0)[0].shape == env.observation_space.shape
    assert env.render().ndim == 3
    assert script["choose_policy"](env.observation_space) == policy
    assert script["choose_steps"](env_id) == steps
    env.close()


def test_finishes_without_a_renderer(tmp_path):
    pytest.importorskip("mujoco")
    folder = tmp_path / "run"
    output = train(folder, "InvertedPendulum-v5", 40, MUJOCO_GL="disable")
    assert "No video: InvertedPendulum-v5 cannot be rendered here" in output
    assert output.strip().endswith(f"Everything is in {folder}")
    assert not list(folder.glob("*.mp4"))
    for name in ("model.zip", "evaluation.json", "evaluations.csv", "monitor.csv", "learning_curve.png"):
        assert (folder / name).stat().st_size > 0, name
