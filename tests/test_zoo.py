"""
MRQ as an algorithm of rl-zoo3: registration, configuration, schedules, search, and the environments of a run.
"""

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import optuna
import pytest
import rl_zoo3
import yaml
from rl_zoo3.exp_manager import ExperimentManager
from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER
from rl_zoo3.utils import SimpleLinearSchedule, create_test_env
from stable_baselines3 import TD3

import sb3_mrq.zoo
from sb3_mrq import MRQ
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.zoo.configuration import ALGORITHMS, GIVEN_BY_ZOO, ConfigurationError, default_configuration
from sb3_mrq.zoo.exp_manager import MRQExperimentManager
from sb3_mrq.zoo.scripts import _evaluation_arguments, _folder_names, _known_options, _our_command

SMALL = dict(policy_kwargs=dict(net_arch=dict(encoder=[8], qf=[8], pi=[8]), z_s_dim=8, z_sa_dim=8, z_a_dim=4), batch_size=8)


def manager(folder, env_id="Pendulum-v1", algo="mrq", **kwargs):
    return rl_zoo3.exp_manager.ExperimentManager(
        argparse.Namespace(env=env_id), algo, env_id, str(folder), verbose=0, **kwargs
    )


def write(folder, text):
    path = folder / "config.yml"
    path.write_text(text)
    return str(path)


class TestRegistration:
    def test_everywhere_in_rl_zoo3(self):
        assert rl_zoo3.ALGOS["mrq"] is MRQ
        assert "mrq" in HYPERPARAMS_SAMPLER and "mrq" in HYPERPARAMS_CONVERTER
        assert rl_zoo3.exp_manager.ExperimentManager is MRQExperimentManager
        for script in ("train", "enjoy"):
            assert importlib.import_module(f"rl_zoo3.{script}").ExperimentManager is MRQExperimentManager

    def test_again(self):
        before = dict(rl_zoo3.ALGOS), dict(HYPERPARAMS_SAMPLER), dict(HYPERPARAMS_CONVERTER)
        sb3_mrq.zoo.register()
        sb3_mrq.zoo.register()
        assert (rl_zoo3.ALGOS, HYPERPARAMS_SAMPLER, HYPERPARAMS_CONVERTER) == before
        assert MRQExperimentManager.__mro__.count(MRQExperimentManager) == 1
        assert MRQExperimentManager.__bases__ == (sb3_mrq.zoo.exp_manager.ExperimentManager,)

    def test_after_a_script_was_imported(self):
        train = importlib.import_module("rl_zoo3.train")
        train.ExperimentManager = MRQExperimentManager.__bases__[0]
        sb3_mrq.zoo.register()
        assert train.ExperimentManager is MRQExperimentManager

    def test_other_algorithms_keep_their_configuration(self, tmp_path):
        assert manager(tmp_path, algo="td3").config.endswith("rl_zoo3/hyperparams/td3.yml")
        assert manager(tmp_path).config == str(default_configuration("mrq"))


@pytest.fixture(scope="module", params=ALGORITHMS)
def sections(request):
    """A configuration of the package."""
    return yaml.safe_load(default_configuration(request.param).read_text())


class TestConfiguration:
    def test_no_section_sets_a_hyperparameter_of_the_algorithm(self, sections):
        ours = set(inspect.signature(MRQ.__init__).parameters) - {"policy", "replay_buffer_class"}
        for section, body in sections.items():
            assert not ours & set(body), section
            assert set(body) <= {"policy", "n_timesteps", "env_wrapper", "replay_buffer_class"}, section
            # rl-zoo3 looks up the name in its module
            buffer_class = getattr(rl_zoo3.exp_manager, body.get("replay_buffer_class", "HerSubtrajectoryReplayBuffer"))
            assert issubclass(buffer_class, SubtrajectoryReplayBuffer)

    def test_published_lengths(self, sections):
        lengths = {"ALE": 2.5e6, "dmc": 5e5, "dmc-visual": 5e5}
        policies = {"ALE": "CnnPolicy", "dmc-visual": "CnnPolicy"}
        for task in sb3_mrq.envs.BENCHMARK_TASKS:
            suite = task.split("/")[0] if "/" in task else "gym"
            section = sections["atari"] if suite == "ALE" else sections[task]
            assert section["n_timesteps"] == lengths.get(suite, 1e6), task
            assert section["policy"] == policies.get(suite, "MlpPolicy"), task
            # gymnasium knows v4 and v5 of the locomotion tasks
            if suite == "gym":
                assert sections[task[:-1] + "4"] == section

    def test_every_section_is_a_task(self, sections):
        elsewhere = ("Panda", "Fetch", "AntBullet", "HalfCheetahBullet", "HopperBullet", "Walker2DBullet", "ReacherBullet")
        unknown = {name for name in sections if not name.startswith(elsewhere)} - set(gym.registry)
        assert unknown == {"default", "atari"}

    @pytest.mark.parametrize(
        "text, message",
        [
            (
                "default:\n  policy: MlpPolicy\n  n_timesteps: 10\n  batchsize: 3\n",
                "line 4: .* batchsize. Did you mean batch_size",
            ),
            ("default:\n  policy: MlpPolicy\n  n_timestep: 10\n", "line 3: .* n_timestep. Did you mean n_timesteps"),
            ("default:\n  policy: MlpPolicy\n  n_timesteps: 10\n  seed: 1\n", "line 4: seed is not set here"),
            ("default:\n  policy: MlpPolicy\n", "n_timesteps is missing"),
            ("default:\n  n_timesteps: 10\n", "policy is missing"),
            ("default:\n  policy: 'MlpPolicy\n  n_timesteps: 10\n", "line 4: found unexpected end of stream"),
            ("default:\n  policy: MlpPolicy\n n_timesteps: 10\n", "line 3: "),
            ("default: MlpPolicy\n", "line 1: section default holds no"),
            ("a: &a\n  policy: p\n\ndefault:\n- MlpPolicy\n", "line 4: section default holds no"),
            ("a: &a\n  gama: 1\ndefault:\n  <<: *a\n  n_timesteps: 1\n", "line 2: .* gama. Did you mean gamma"),
            ("a: &a\n  gama: 1\nb: &b\n  n_steps: 1\ndefault:\n  <<: [*b, *a]\n", "line 2: .* gama"),
            ("default:\n  gama: 1\nPendulum-v1:\n  policy: p\n", "line 2: .* gama"),
            ("default:\n  policy: p\nPendulum-v1:\n  gama: 1\n", "line 4: .* gama"),
            ("CartPole-v1:\n  policy: MlpPolicy\n  n_timesteps: 10\n", "has no section Pendulum-v1 or default"),
            ("- default\n", "line 1: there are no sections"),
            ("", "line 1: there are no sections"),
            ("default: *base\n", "line 1: found undefined alias"),
        ],
    )
    def test_corrupt(self, tmp_path, text, message):
        path = write(tmp_path, text)
        with pytest.raises(ConfigurationError, match=message) as error:
            manager(tmp_path, config=path).read_hyperparameters()
        assert str(error.value).startswith(path)

    def test_merged_sections(self, tmp_path):
        path = write(tmp_path, "base: &b\n  policy: MlpPolicy\ndefault:\n  <<: *b\n  n_timesteps: 10\n")
        hyperparams, _ = manager(tmp_path, config=path).read_hyperparameters()
        assert hyperparams == {"policy": "MlpPolicy", "n_timesteps": 10}

    def test_sections_of_other_tasks_are_not_checked(self, tmp_path):
        """rl-zoo3's own file of SAC, with a section for MRQ."""
        text = (Path(rl_zoo3.__file__).parent / "hyperparams" / "sac.yml").read_text()
        sections = yaml.safe_load(text)
        assert any("ent_coef" in body for body in sections.values())
        text = re.sub(r"^Pendulum-v1:\n(?: .*\n)*", "Pendulum-v1:\n  policy: MlpPolicy\n  n_timesteps: 10\n", text, flags=re.M)
        path = write(tmp_path, text)
        hyperparams, _ = manager(tmp_path, config=path).read_hyperparameters()
        assert hyperparams == {"policy": "MlpPolicy", "n_timesteps": 10}
        with pytest.raises(ConfigurationError, match="no hyperparameter ent_coef"):
            manager(tmp_path, "BipedalWalker-v3", config=path).read_hyperparameters()

    def test_section_of_an_atari_game(self, tmp_path):
        section = "  policy: CnnPolicy\n  n_timesteps: 10\n"
        path = write(tmp_path, f"ALE/Pong-v5:\n{section}atari:\n{section}  gama: 1\n")
        assert manager(tmp_path, "ALE/Pong-v5", config=path).read_hyperparameters()[0]["n_timesteps"] == 10
        with pytest.raises(ConfigurationError, match=r"line 7: .* gama"):
            manager(tmp_path, "ALE/Breakout-v5", config=path).read_hyperparameters()
        # rl-zoo3 takes no default for these
        path = write(tmp_path, f"default:\n{section}")
        with pytest.raises(ConfigurationError, match="has no section ALE/Pong-v5 or atari"):
            manager(tmp_path, "ALE/Pong-v5", config=path).read_hyperparameters()

    def test_unknown_on_the_command_line(self, tmp_path):
        with pytest.raises(ConfigurationError, match="command line: MRQ has no hyperparameter horizon"):
            manager(tmp_path, hyperparams={"horizon": 3}).read_hyperparameters()
        with pytest.raises(ConfigurationError, match=r"no hyperparameter tau\. target_update_interval takes its place"):
            manager(tmp_path, hyperparams={"tau": 0.005}).read_hyperparameters()
        with pytest.raises(ConfigurationError, match="device is not set here"):
            manager(tmp_path, hyperparams={"device": "cpu"}).read_hyperparameters()

    def test_other_algorithms_are_not_checked(self, tmp_path):
        path = write(tmp_path, "default:\n  policy: MlpPolicy\n  n_timesteps: 10\n  unknown: 1\n")
        hyperparams, _ = manager(tmp_path, algo="td3", config=path).read_hyperparameters()
        assert hyperparams["unknown"] == 1

    def test_names_given_by_the_zoo_exist(self):
        assert set(inspect.signature(MRQ.__init__).parameters) >= GIVEN_BY_ZOO

    def test_all_hyperparameters_reach_the_model(self, tmp_path):
        """Every argument of the constructor that is not given by rl-zoo3 is accepted in a section."""
        values = {
            name: parameter.default
            for name, parameter in inspect.signature(MRQ.__init__).parameters.items()
            if name not in GIVEN_BY_ZOO and parameter.default is not inspect.Parameter.empty
        } | {"buffer_size": 1234, "n_steps": 2}
        experiment = manager(tmp_path, hyperparams=values, eval_freq=-1)
        model, saved = experiment.setup_experiment()
        assert (model.replay_buffer.buffer_size, model.n_steps) == (1234, 2)
        assert saved["n_steps"] == 2


class TestSchedules:
    @pytest.mark.parametrize("value, at_half", [("lin_1e-4", 5e-5), ("lin_0.002", 1e-3), ("1e-4", 1e-4), (3e-4, 3e-4)])
    def test_encoder_learning_rate(self, tmp_path, value, at_half):
        experiment = manager(tmp_path, hyperparams={"encoder_learning_rate": value, **SMALL}, eval_freq=-1)
        model, saved = experiment.setup_experiment()
        assert model.encoder_lr_schedule(0.5) == pytest.approx(at_half)
        # Saved as it was given
        assert saved["encoder_learning_rate"] == value

    @pytest.mark.parametrize("value", ["cos_1e-4", "lin_fast", "fast", "lin_-1", "lin_nan"])
    def test_wrong(self, tmp_path, value):
        with pytest.raises(ConfigurationError, match=f"encoder_learning_rate is {value}"):
            manager(tmp_path, hyperparams={"encoder_learning_rate": value}).setup_experiment()

    def test_learning_rate(self, tmp_path):
        model, _ = manager(tmp_path, hyperparams={"learning_rate": "lin_1e-3", **SMALL}, eval_freq=-1).setup_experiment()
        assert model.lr_schedule(0.5) == pytest.approx(5e-4)
        model, _ = manager(tmp_path, hyperparams={"learning_rate": "3e-4", **SMALL}, eval_freq=-1).setup_experiment()
        assert model.lr_schedule(0.5) == 3e-4
        with pytest.raises(ConfigurationError, match="learning_rate is cos_1e-3"):
            manager(tmp_path, hyperparams={"learning_rate": "cos_1e-3", **SMALL}).setup_experiment()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 60 steps, 40 of them random, with its replay buffer."""
    folder = tmp_path_factory.mktemp("logs")
    experiment = manager(
        folder, n_timesteps=60, hyperparams={"learning_starts": 40, **SMALL}, eval_freq=-1, save_replay_buffer=True
    )
    model, _ = experiment.setup_experiment()
    experiment.learn(model)
    experiment.save_trained_model(model)
    assert (model._n_updates, model.learning_starts) == (20, 40)
    return folder / "mrq" / "Pendulum-v1_1" / "Pendulum-v1.zip"


class TestContinuing:
    def test_no_second_warm_up(self, run):
        experiment = manager(run.parents[2], n_timesteps=15, trained_agent=str(run), eval_freq=-1)
        model, _ = experiment.setup_experiment()
        assert model.replay_buffer.size() == 60
        experiment.learn(model)
        assert model._n_updates == 20 + 15
        # The model keeps its own value
        assert model.learning_starts == 40

    def test_rest_of_the_warm_up(self, run, tmp_path):
        experiment = manager(
            run.parents[2], n_timesteps=15, trained_agent=str(run), hyperparams={"learning_starts": 65}, eval_freq=-1
        )
        model, _ = experiment.setup_experiment()
        experiment.learn(model)
        assert model._n_updates == 20 + 10

    def test_warm_up_without_a_replay_buffer(self, run, tmp_path):
        alone = tmp_path / run.name
        alone.write_bytes(run.read_bytes())
        experiment = manager(tmp_path, n_timesteps=15, trained_agent=str(alone), eval_freq=-1)
        model, _ = experiment.setup_experiment()
        with pytest.warns(UserWarning, match="Nothing will be learned"):
            experiment.learn(model)
        assert model._n_updates == 20

    def test_unknown_hyperparameter(self, run):
        experiment = manager(run.parents[2], trained_agent=str(run), hyperparams={"gama": 0.9}, eval_freq=-1)
        with pytest.raises(ConfigurationError, match=r"gama\. Did you mean gamma"):
            experiment.setup_experiment()

    def test_changed_hyperparameter(self, run):
        experiment = manager(run.parents[2], trained_agent=str(run), hyperparams={"gamma": 0.9}, eval_freq=-1)
        model, _ = experiment.setup_experiment()
        assert model.gamma == model.learner.hyperparameters.gamma == 0.9


class TestSearch:
    def test_sampled_hyperparameters_fit(self):
        """Sampled hyperparameters are arguments of MRQ, and cover the ranges."""
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        drawn = []
        for _ in range(200):
            trial = study.ask()
            hyperparams = HYPERPARAMS_SAMPLER["mrq"](trial, 1, 1, {})
            # How --trial-id makes hyperparameters of a study's
            assert HYPERPARAMS_CONVERTER["mrq"](trial.params) == hyperparams
            drawn.append(hyperparams)
        assert set(drawn[0]) == {
            "gamma",
            "batch_size",
            "learning_rate",
            "encoder_learning_rate",
            "n_steps",
            "encoder_horizon",
            "target_update_interval",
            "exploration_noise",
            "target_policy_noise",
            "priority_alpha",
        }
        defaults = {name: parameter.default for name, parameter in inspect.signature(MRQ.__init__).parameters.items()}
        for name in drawn[0]:
            values = [hyperparams[name] for hyperparams in drawn]
            # The default lies inside of the searched range
            assert min(values) < defaults[name] < max(values), name
        for hyperparams in drawn[:5]:
            MRQ("MlpPolicy", "Pendulum-v1", policy_kwargs=SMALL["policy_kwargs"], **hyperparams)

    def test_journal_shared_by_two_workers(self, tmp_path):
        for _ in range(2):
            experiment = manager(
                tmp_path,
                n_timesteps=30,
                hyperparams={"learning_starts": 20, "policy_kwargs": SMALL["policy_kwargs"]},
                optimize_hyperparameters=True,
                storage=str(tmp_path / "study" / "journal.log"),
                study_name="mrq",
                n_trials=1,
                sampler="random",
                no_optim_plots=True,
            )
            experiment.setup_experiment()
            experiment.hyperparameters_optimization()
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study" / "journal.log"))
        study = optuna.load_study(storage=optuna.storages.JournalStorage(backend), study_name="mrq")
        assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE"]
        assert "encoder_horizon" in study.best_params

    def test_trial_becomes_hyperparameters(self, tmp_path):
        path = str(tmp_path / "journal.log")
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))
        study = optuna.create_study(storage=storage, study_name="mrq")
        trials = [study.ask() for _ in range(2)]
        wanted = [HYPERPARAMS_SAMPLER["mrq"](trial, 1, 1, {}) for trial in trials][1]
        experiment = manager(tmp_path, storage=path, study_name="mrq", trial_id=1)
        hyperparams, _ = experiment.read_hyperparameters()
        assert {name: hyperparams[name] for name in wanted} == wanted


def rollout(env, steps=25):
    """Observations and rewards of one environment under fixed actions, and the wrappers around it."""
    env.seed(3)
    observations, rewards = [env.reset()], []
    for step in range(steps):
        obs, reward, _, _ = env.step(np.array([step % env.action_space.n]))
        observations.append(obs)
        rewards.append(reward)
    wrappers = []
    inner = env.envs[0]
    while isinstance(inner, gym.Wrapper):
        wrappers.append(type(inner).__name__)
        inner = inner.env
    env.close()
    return np.array(observations), np.array(rewards), wrappers


def test_one_atari_game_everywhere(tmp_path):
    """Training, evaluation, enjoy and video see the same game."""
    experiment = manager(tmp_path, "ALE/Pong-v5", eval_freq=-1, hyperparams={"buffer_size": 100})
    experiment.setup_experiment()
    saved = rl_zoo3.get_saved_hyperparams(experiment.params_path, test_mode=True)
    envs = [experiment.create_envs(1), experiment.create_envs(1, eval_env=True)]
    for env_kwargs in ({}, {"render_mode": "rgb_array"}):
        hyperparams, stats_path = rl_zoo3.get_saved_hyperparams(experiment.params_path, test_mode=True)
        envs.append(
            create_test_env(
                "ALE/Pong-v5", stats_path=stats_path, should_render=False, hyperparams=hyperparams, env_kwargs=env_kwargs
            )
        )
    assert "env_kwargs" not in saved[0] and "frame_stack" not in saved[0]
    training, *others = [rollout(env) for env in envs]
    assert training[0].shape == (26, 1, 4, 84, 84) and training[0].dtype == np.uint8
    assert training[0].std() > 0
    for other in others:
        np.testing.assert_array_equal(other[0], training[0])
        np.testing.assert_array_equal(other[1], training[1])
        assert other[2] == training[2]
    # The emulator repeats no action by itself, and keeps those that stick
    ale = experiment.create_envs(1).envs[0].unwrapped
    assert (ale._frameskip, ale.ale.getFloat("repeat_action_probability")) == (1, 0.25)
    assert not experiment.deterministic_eval


class TestCommandLine:
    @pytest.mark.parametrize(
        "arguments, supplied",
        [
            (["--env", "Pendulum-v1"], ["--eval-freq", "5000", "--eval-episodes", "10"]),
            (["--env", "dmc/walker-walk-v0"], ["--eval-freq", "5000", "--eval-episodes", "10"]),
            (["--env=ALE/Pong-v5"], ["--eval-freq", "100000", "--eval-episodes", "10"]),
            ([], ["--eval-freq", "5000", "--eval-episodes", "10"]),
            (["--env", "Pendulum-v1", "--eval-freq", "-1"], ["--eval-episodes", "10"]),
            (["--eval-fre=7", "--eval-epi", "3", "-params", "gamma:0.9", "n_steps:2"], []),
        ],
    )
    def test_evaluation_as_published(self, arguments, supplied):
        assert _evaluation_arguments(_known_options(arguments)) == supplied

    def test_names_of_folders(self):
        arguments = ["-e", "ALE/Pong-v5", "dmc/walker-walk-v0", "CartPole-v1", "-f", "logs/ALE"]
        assert _folder_names(arguments) == ["-e", "ALE-Pong-v5", "dmc-walker-walk-v0", "CartPole-v1", "-f", "logs/ALE"]

    def test_commands_of_scripts(self):
        ours = [sys.executable, "-m", "sb3_mrq.zoo"]
        video = ["python", "-m", "rl_zoo3.record_video", "--env", "ALE/Pong-v5"]
        assert _our_command(video) == [*ours, "record_video", "--env", "ALE/Pong-v5"]
        enjoy = ["python", "enjoy.py", "--env", rl_zoo3.utils.EnvironmentName("ALE/Pong-v5")]
        assert _our_command(enjoy) == [*ours, "enjoy", "--env", "ALE/Pong-v5"]
        assert _our_command(["ffmpeg", "-i", "a"]) == ["ffmpeg", "-i", "a"]


def test_td3_still_trains(tmp_path):
    experiment = manager(tmp_path, algo="td3", n_timesteps=20, eval_freq=-1)
    model, _ = experiment.setup_experiment()
    experiment.learn(model)
    assert type(model) is TD3 and model.num_timesteps == 20
    assert isinstance(experiment, ExperimentManager)
    assert not isinstance(model.learning_rate, SimpleLinearSchedule)
