"""
rl-zoo3's training command writes checkpoints and goes on from them.
"""

import argparse
import contextlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rl_zoo3.exp_manager
import yaml
from envs import wandering_env
from stable_baselines3 import TD3
from test_zoo import SMALL

import sb3_mrq.zoo
from sb3_mrq.persist.checkpoints import list_checkpoints
from sb3_mrq.zoo.configuration import ConfigurationError
from sb3_mrq.zoo.scripts import _newest_checkpoint, run

CALLBACK = "sb3_mrq.callbacks.ResumableCheckpointCallback"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A configuration with checkpoints."""
    path = tmp_path_factory.mktemp("config") / "config.yml"
    section = SMALL | dict(
        policy="MlpPolicy",
        n_timesteps=90,
        learning_starts=20,
        normalize=True,
        target_update_interval=10,
        buffer_size=500,
        callback=[{CALLBACK: {"save_freq": 30, "keep_last": None}}],
    )
    path.write_text(yaml.safe_dump({"Pendulum-v1": section}))
    return path


def train(config, folder, *arguments):
    base = ["--algo", "mrq", "--env", "Pendulum-v1", "-conf", str(config), "--eval-freq", "-1", "--device", "cpu"]
    run("train", [*base, "-f", str(folder), *arguments])
    return max((folder / "mrq").iterdir(), key=lambda path: int(path.name.split("_")[-1]))


@pytest.fixture
def trained(cut_short, tmp_path):
    """The folder of a run of rl-zoo3 that was cut short."""
    return shutil.copytree(cut_short, tmp_path / "trained" / cut_short.name)


@pytest.fixture(scope="module")
def cut_short(config, tmp_path_factory):
    """Not to be changed."""
    return train(config, tmp_path_factory.mktemp("logs"), "-n", "70", "--seed", "7")


def steps(folder):
    return [checkpoint.num_timesteps for checkpoint in list_checkpoints(folder / "checkpoints")]


def test_checkpoints_in_the_folder_of_the_run(trained):
    assert steps(trained) == [70, 60, 30]
    assert (trained / "Pendulum-v1.zip").exists()


def test_resumed_by_the_training_command(trained, config, tmp_path, monkeypatch):
    models = []
    learn = sb3_mrq.MRQ.learn

    def recorded(self, *args, **kwargs):
        models.append((self, self.num_timesteps, self.replay_buffer.size()))
        return learn(self, *args, **kwargs)

    monkeypatch.setattr(sb3_mrq.MRQ, "learn", recorded)
    # From a folder of checkpoints, up to the number of steps asked for
    folder = train(config, tmp_path, "-i", str(trained), "-n", "100")
    ((model, before, size),) = models
    assert (before, size, model.num_timesteps, model.seed) == (70, 70, 100, 7)
    assert model._n_updates == 80
    assert model.get_vec_normalize_env().obs_rms.count > 100
    # Its checkpoints follow those that it goes on from, so that the same command resumes it again
    assert steps(trained) == [100, 90, 70, 60, 30] and not (folder / "checkpoints").exists()
    # From one checkpoint, up to where the run was to end
    folder = train(config, tmp_path, "-i", str(list_checkpoints(trained / "checkpoints")[-1].path / "model.zip"))
    assert models[1][1] == 30 and models[1][0].num_timesteps == 70
    assert steps(folder) == [70, 60]


def test_damaged_checkpoint_is_passed_over(trained, config, tmp_path):
    for file in ("checkpoint.json", "replay_buffer.pkl", "model.zip"):
        copy = shutil.copytree(trained, tmp_path / file / "copy")
        (list_checkpoints(copy / "checkpoints")[0].path / file).unlink()
        with contextlib.nullcontext() if file == "model.zip" else pytest.warns(UserWarning, match="damaged, going back"):
            train(config, tmp_path / file, "-i", str(copy), "-n", "75")
        assert steps(copy)[:3] == [75, 70, 60]
    # Not from another one than was asked for
    oldest = list_checkpoints(copy / "checkpoints")[-1].path
    (oldest / "checkpoint.json").unlink()
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        train(config, tmp_path, "-i", str(oldest / "model.zip"))


def test_normalised_run_is_not_resumed_without(trained, config, tmp_path):
    section = yaml.safe_load(config.read_text())["Pendulum-v1"] | {"normalize": False}
    other = tmp_path / "other.yml"
    other.write_text(yaml.safe_dump({"Pendulum-v1": section}))
    with pytest.raises(ConfigurationError, match="set 'normalize: true', as in that run"):
        train(other, tmp_path, "-i", str(trained))


def test_what_can_be_continued_with(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.zip").touch()
    newest = str(list_checkpoints(trained / "checkpoints")[0].path / "model.zip")
    for folder in (trained, trained / "checkpoints", list_checkpoints(trained / "checkpoints")[0].path):
        for option in ("-i", "--trained-agent"):
            assert _newest_checkpoint(["-n", "5", option, str(folder)]) == ["-n", "5", option, newest]
        assert _newest_checkpoint([f"--trained-agent={folder}"]) == ["--trained-agent", newest]
    for arguments in ([], ["-i"], ["-i", "model.zip"], ["-n", str(trained)]):
        assert _newest_checkpoint(arguments) == arguments
    with pytest.raises(ConfigurationError, match="no complete checkpoint"):
        _newest_checkpoint(["-i", str(tmp_path)])


def test_search_writes_none(config, tmp_path):
    experiment = rl_zoo3.exp_manager.ExperimentManager(
        argparse.Namespace(env="Pendulum-v1"),
        "mrq",
        "Pendulum-v1",
        str(tmp_path),
        verbose=0,
        config=str(config),
        optimize_hyperparameters=True,
        n_trials=1,
        n_timesteps=25,
        n_evaluations=1,
        n_eval_episodes=1,
        no_optim_plots=True,
        sampler="random",
    )
    experiment.setup_experiment()
    experiment.hyperparameters_optimization()
    assert not list(tmp_path.rglob("mrq_0*"))


def test_relative_paths_where_the_working_directory_changes(tmp_path, monkeypatch):
    """Of the log folder, the model to continue with, TensorBoard's folder and the report."""
    start, env_id = wandering_env(tmp_path, monkeypatch)
    section = SMALL | dict(policy="MlpPolicy", n_timesteps=40, learning_starts=10, target_update_interval=10, buffer_size=500)
    section["callback"] = [{CALLBACK: {"save_freq": 20}}]
    Path("config.yml").write_text(yaml.safe_dump({env_id: section}))
    arguments = [
        "--algo",
        "mrq",
        "--env",
        env_id,
        "-conf",
        "config.yml",
        "--device",
        "cpu",
        "--eval-episodes",
        "1",
        "-f",
        "logs",
    ]
    run("train", [*arguments, "--eval-freq", "20", "--tensorboard-log", "tb"])
    trained = start / "logs" / "mrq" / f"{env_id}_1"
    assert steps(trained) == [40, 20]
    assert {f"{env_id}.zip", "best_model.zip", "evaluations.npz"} <= {path.name for path in trained.iterdir()}
    assert (start / "tb" / env_id / "MRQ_1").is_dir()
    for agent in (f"logs/mrq/{env_id}_1/{env_id}.zip", f"logs/mrq/{env_id}_1"):
        os.chdir(start)
        run("train", [*arguments, "--eval-freq", "-1", "-i", agent, "-n", "60"])
    assert steps(trained) == [60, 40]
    os.chdir(start)
    monkeypatch.setattr(
        "sb3_mrq.zoo.diagnose.diagnose",
        lambda *_, **__: SimpleNamespace(report=reports.append, verdicts=[], episode_returns=np.zeros(1)),
    )
    reports = []
    run("diagnose", ["--env", env_id, "-f", "logs", "--exp-id", "1", "-o", "report", "--device", "cpu"])
    os.chdir(start)
    run("diagnose", ["--env", env_id, "--model", f"logs/mrq/{env_id}_1/{env_id}.zip", "--device", "cpu"])
    assert reports == [start / "report", trained / "diagnosis"]
    assert not list((tmp_path / "elsewhere").iterdir())


def test_model_of_another_algorithm(trained, config, tmp_path):
    """In the log folder, to continue with, and to report on."""
    path = trained / "Pendulum-v1.zip"
    TD3("MlpPolicy", "Pendulum-v1", device="cpu", buffer_size=10).save(path)
    logs = shutil.copytree(trained.parent, tmp_path / "logs" / "mrq").parent
    for script, arguments in (
        ("enjoy", ["--algo", "mrq", "-f", str(logs), "--no-render", "--exp-id", "1"]),
        ("train", ["--algo", "mrq", "-f", str(tmp_path / "new"), "-conf", str(config), "-i", str(path)]),
        ("diagnose", ["--model", str(path)]),
        ("diagnose", ["-f", str(logs), "--exp-id", "1"]),
    ):
        with pytest.raises(ValueError, match=r"Pendulum-v1.zip holds a model of TD3, not of MRQ\."):
            run(script, ["--env", "Pendulum-v1", "--device", "cpu", *arguments])
