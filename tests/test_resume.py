"""
A run that is resumed from a checkpoint in a new process ends like one that was never interrupted, to the last bit.
"""

import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from envs import BOX, IMAGE, VECTOR, SpaceEnv, SwingEnv, policy_for, tiny_model
from gymnasium import spaces
from helpers import snapshot
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import OrnsteinUhlenbeckActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize, VecTransposeImage

from sb3_mrq import DRQ, MRQ
from sb3_mrq.accelerate.updates import Updates
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.persist.checkpoints import get_generators, list_checkpoints

ACTIONS = {"Box": BOX, "Discrete": spaces.Discrete(3)}
OBSERVATIONS = {"vector": VECTOR, "pixels": IMAGE, "frames": spaces.Box(0, 255, (36, 36, 1), dtype=np.uint8)}
# Number of steps of the whole run, over all environments, and between checkpoints
TOTAL, SAVE_FREQ = 49, 20

CASES = {
    "-".join(map(str, case)): case
    for case in [
        *itertools.product(["vector"], ["Box", "Discrete"], [1, 2], ["plain", "normalized"]),
        ("pixels", "Box", 2, "normalized"),
        ("pixels", "Discrete", 1, "plain"),
        ("frames", "Discrete", 1, "plain"),
        ("vector", "Box", 1, "warm-up"),
        ("vector", "Box", 2, "noise"),
        ("vector", "Box", 1, "episodes"),
        ("vector", "Box", 1, "unseeded"),
        ("vector", "Box", 2, "drq"),
        ("frames", "Discrete", 1, "drq"),
        ("vector", "Discrete", 2, "greedy"),
    ]
}


def make_env(observation, action, n_envs, kind):
    def one():
        return SwingEnv(OBSERVATIONS[observation], ACTIONS[action])

    env = make_vec_env(one, n_envs)
    if observation == "frames":
        env = VecFrameStack(env, 3)
    if observation != "vector":
        env = VecTransposeImage(env)
    if kind == "normalized":
        env = VecNormalize(env, norm_obs=observation == "vector")
    return env


def make_model(env, observation, kind, **kwargs):
    kwargs |= {"learning_starts": 30 if kind == "warm-up" else 12, "min_td_error": 1e-3}
    if kind == "noise":
        kwargs["action_noise"] = OrnsteinUhlenbeckActionNoise(np.zeros(2), 0.1 * np.ones(2))
    if kind == "episodes":
        kwargs["train_freq"] = (1, "episode")
    if kind == "unseeded":
        kwargs["seed"] = None
    if kind == "greedy":
        kwargs["discrete_policy"] = "greedy"
    if kind == "drq":
        kwargs |= {"algorithm": DRQ, "replay_fade": 0.9}
    return tiny_model(env, policy_for(OBSERVATIONS[observation]), learning_rate=lambda p: 1e-3 * p, **kwargs)


def outcome(model):
    """All that a run has led to."""
    state = model.replay_buffer.get_state()
    result = {
        "weights": snapshot(model.policy),
        "optimizers": [getattr(model, name).optimizer.state_dict() for name in model.policy.networks],
        "returns": [(info["r"], info["l"]) for info in model.ep_info_buffer],
        "numbers": (model._n_updates, model.num_timesteps, model._episode_num, model._current_progress_remaining),
        "scales": (model.reward_scale, model.target_reward_scale),
        "buffer": [state.numbers, state.slots, state.environments],
        "generators": get_generators(model),
        "last_obs": (model._last_obs, model._last_original_obs if model.get_vec_normalize_env() else None),
    }
    normalize = model.get_vec_normalize_env()
    if normalize is not None:
        result["statistics"] = [
            vars(normalize.obs_rms) if normalize.norm_obs else None,
            vars(normalize.ret_rms),
            normalize.returns,
        ]
    return result


def assert_same(one, other, where=""):
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(one, th.Tensor):
        assert th.equal(one, other), where
    else:
        np.testing.assert_array_equal(one, other, err_msg=where)


def first_checkpoint(folder):
    """The first checkpoint, from which there are two more to come."""
    return list_checkpoints(folder)[-1]


def resume_all(folder):
    """The new process: resume every run, and write the results to a file."""
    for name, case in CASES.items():
        # Generators are in another state than where the run began, and are drawn from before learning starts
        random.seed(99)
        np.random.seed(98)
        th.manual_seed(97)
        algorithm = DRQ if case[-1] == "drq" else MRQ
        model = algorithm.resume(first_checkpoint(folder / name).path, make_env(*case), device="cpu")
        SpaceEnv().reset(seed=5)
        random.random(), np.random.rand(), th.rand(1)
        model.learn(model.remaining_timesteps, reset_num_timesteps=False)
        with (folder / f"{name}.outcome").open("wb") as file:
            pickle.dump(outcome(model), file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Outcomes of all cases: a run never interrupted, and one resumed in another process."""
    folder = tmp_path_factory.mktemp("runs")
    outcomes = {}
    for name, (observation, action, n_envs, kind) in CASES.items():
        model = make_model(make_env(observation, action, n_envs, kind), observation, kind)
        checkpoints = ResumableCheckpointCallback(SAVE_FREQ, folder / name, at_episode_end=True, keep_last=None)
        model.learn(TOTAL, callback=checkpoints)
        outcomes[name] = outcome(model)
    code = f"import pathlib, conftest, test_resume; test_resume.resume_all(pathlib.Path({str(folder)!r}))"
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    # Weights are the same with the same number of threads only
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(th.get_num_threads())}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=here.parent)
    resumed = {}
    for name in CASES:
        with (folder / f"{name}.outcome").open("rb") as file:
            resumed[name] = pickle.load(file)
    return folder, outcomes, resumed


@pytest.mark.parametrize("name", CASES)
def test_as_if_never_interrupted(runs, name):
    folder, outcomes, resumed = runs
    before = first_checkpoint(folder / name).num_timesteps
    assert SAVE_FREQ <= before < 30 and before % 7 == 0
    assert outcomes[name]["numbers"][1] >= TOTAL
    assert outcomes[name]["numbers"][0] > 15
    assert_same(resumed[name], outcomes[name])


def test_not_the_same_without_what_is_restored(tmp_path):
    """The comparison can fail: plain loading, after which generators begin anew, leads elsewhere."""
    case = CASES["vector-Box-1-plain"]
    model = make_model(make_env(*case), case[0], case[3])
    model.learn(TOTAL, callback=ResumableCheckpointCallback(SAVE_FREQ, tmp_path, at_episode_end=True, keep_last=None))
    path = first_checkpoint(tmp_path).path
    loaded = MRQ.load(path / "model.zip", env=make_env(*case), device="cpu")
    loaded.load_replay_buffer(path / "replay_buffer.pkl")
    loaded.learn(loaded.remaining_timesteps, reset_num_timesteps=False)
    assert not th.equal(*(th.cat([v.flatten() for v in snapshot(m.policy).values()]) for m in (model, loaded)))


EPISODES = {"train_freq": (1, "episode"), "gradient_steps": -1}


def plain_env():
    """Whose episodes have seven steps."""
    return make_env(*CASES["vector-Box-1-plain"])


def plain_model(**kwargs):
    return make_model(plain_env(), "vector", "plain", **kwargs)


def resume_to_the_end(folder):
    resumed = MRQ.resume(folder, plain_env(), device="cpu")
    return resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)


def signal_in_call(monkeypatch, learner, name, when, n_calls):
    """SIGTERM in a call of an update of the learner, counted from 1 among those for which ``when()``."""
    update, calls = getattr(learner, name), []

    def update_with_signal(*args, **kwargs):
        if when():
            calls.append(args)
            if len(calls) == n_calls:
                os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    monkeypatch.setattr(learner, name, update_with_signal)
    return calls


@pytest.mark.parametrize("total", [28, TOTAL], ids=["last", "not the last"])
@pytest.mark.parametrize(
    "kwargs, n_calls, left, of_the_burst", [({}, 3, 1, 3), (EPISODES, 5, 5, 5), (EPISODES, 8, 1, 3)], ids=str
)
def test_stopped_in_training_steps(kwargs, n_calls, left, of_the_burst, total, tmp_path, monkeypatch):
    """
    A signal in a burst of encoder updates, or between several training steps, does not wait for their end. The rest is done
    first when training goes on, so that nothing changes.
    """
    straight = plain_model(**kwargs)
    straight.learn(total)
    stopped = plain_model(**kwargs)
    calls = signal_in_call(monkeypatch, stopped.learner, "update_encoder", lambda: stopped.num_timesteps == 28, n_calls)
    stopped.learn(total, callback=ResumableCheckpointCallback(1000, tmp_path))
    assert len(calls) == n_calls
    (checkpoint,) = list_checkpoints(tmp_path)
    resumed = MRQ.resume(checkpoint.path, plain_env(), device="cpu")
    assert resumed.num_timesteps == 28
    assert (resumed.gradient_steps_left, resumed._n_encoder_updates) == (left, of_the_burst)
    # A signal at once puts them off again, and there is a checkpoint of this, too
    signal_in_call(monkeypatch, resumed.learner, "update_value_and_policy", lambda: True, 1)
    callback = ResumableCheckpointCallback(1000, tmp_path, keep_last=None)
    resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False, callback=callback)
    assert callback.stopped_by == signal.SIGTERM and resumed.gradient_steps_left == left - 1
    assert [c.num_timesteps for c in list_checkpoints(tmp_path)] == [28, 28]
    finished = resume_to_the_end(tmp_path)
    assert finished.gradient_steps_left == 0
    assert_same(outcome(finished), outcome(straight))


class SignalInEvaluation(BaseCallback):
    """SIGTERM while a callback evaluates the model."""

    def __init__(self, event, at_step):
        super().__init__()
        self.at, self.finished = (event, at_step), False

    def evaluate(self, event):
        if (event, self.model.num_timesteps) == self.at:
            observation = self.model.observation_space.sample()
            self.model.predict(observation)
            os.kill(os.getpid(), signal.SIGTERM)
            self.model.predict(observation)
            self.finished = True

    def _on_rollout_start(self):
        self.evaluate("rollout start")

    def _on_step(self):
        self.evaluate("step")
        return True

    def _on_rollout_end(self):
        self.evaluate("rollout end")


ORDER = pytest.mark.parametrize("first", [True, False], ids=["evaluation first", "checkpoints first"])


def stop_in_an_evaluation(event, at_step, first, total, folder, **kwargs):
    evaluation, checkpoints = SignalInEvaluation(event, at_step), ResumableCheckpointCallback(1000, folder)
    model = plain_model(**kwargs)
    model.learn(total, callback=[evaluation, checkpoints] if first else [checkpoints, evaluation])
    assert evaluation.finished
    assert checkpoints.stopped_by == signal.SIGTERM and model.num_timesteps == model.replay_buffer.size()
    assert list_checkpoints(folder)[0].num_timesteps == model.num_timesteps
    return model


@ORDER
@pytest.mark.parametrize("event", ["step", "rollout end"])
@pytest.mark.parametrize(
    "total, kwargs",
    [(28, {}), (TOTAL, {}), (TOTAL, {"train_freq": 14, "gradient_steps": 14}), (28, EPISODES), (TOTAL, EPISODES)],
    ids=str,
)
def test_stopped_in_an_evaluation(kwargs, total, event, first, tmp_path):
    """Collected transitions are stored, and learned from when training goes on."""
    straight = plain_model(**kwargs).learn(total)
    model = stop_in_an_evaluation(event, 28, first, total, tmp_path, **kwargs)
    assert model.num_timesteps == 28 and model.gradient_steps_left > 0
    assert_same(outcome(resume_to_the_end(tmp_path)), outcome(straight))


@ORDER
@pytest.mark.parametrize("at_step", [0, 28])
def test_stopped_in_an_evaluation_before_a_rollout(at_step, first, tmp_path):
    """There are one more step, and a checkpoint, also where there was nothing yet."""
    model = stop_in_an_evaluation("rollout start", at_step, first, TOTAL, tmp_path)
    assert model.num_timesteps == at_step + 1
    assert resume_to_the_end(tmp_path).num_timesteps == TOTAL


def test_training_steps_of_callbacks_are_put_off_too(tmp_path, monkeypatch):
    class TrainsMore(BaseCallback):
        def _on_step(self):
            return True

        def _on_rollout_end(self):
            if self.num_timesteps == 28:
                self.model.train(20, self.model.batch_size)

    straight = plain_model().learn(TOTAL, callback=TrainsMore())
    stopped = plain_model()
    signal_in_call(monkeypatch, stopped.learner, "update_value_and_policy", lambda: stopped.num_timesteps == 28, 3)
    stopped.learn(TOTAL, callback=[ResumableCheckpointCallback(1000, tmp_path), TrainsMore()])
    assert stopped.gradient_steps_left == 18
    # After learn has ended, a training step is complete again
    left, before = stopped.gradient_steps_left, stopped._n_updates
    stopped.train(2, stopped.batch_size)
    assert stopped.gradient_steps_left == 0 and stopped._n_updates == before + left + 2
    assert_same(outcome(resume_to_the_end(tmp_path)), outcome(straight))


class Recorder(gym.Wrapper):
    """Notes the first observations of all episodes."""

    def __init__(self, env):
        super().__init__(env)
        self.first = []

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        self.first.append(obs.copy())
        return obs, info


def test_random_environments_go_on_with_other_episodes(tmp_path):
    env = Recorder(SpaceEnv())
    model = tiny_model(env, seed=3)
    model.learn(30, callback=ResumableCheckpointCallback(12, tmp_path, keep_last=None))
    beginnings = []
    for _ in range(2):
        again = Recorder(SpaceEnv())
        resumed = MRQ.resume(list_checkpoints(tmp_path)[-1].path, again, device="cpu")
        resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)
        assert len(again.first) > 2
        assert not any((obs == old).all() for obs in again.first for old in env.first)
        beginnings.append(again.first)
    # But they are the same whenever it is resumed from there
    np.testing.assert_array_equal(*beginnings)
    # And others from elsewhere
    elsewhere = Recorder(SpaceEnv())
    MRQ.resume(tmp_path, elsewhere, device="cpu")
    assert not any((obs == elsewhere.first[0]).all() for obs in beginnings[0])


def test_running_episode_is_truncated(tmp_path):
    model = tiny_model(SwingEnv())
    model.learn(18, callback=ResumableCheckpointCallback(100, tmp_path))
    resumed = MRQ.resume(tmp_path, SwingEnv(), device="cpu")
    assert resumed.num_timesteps == 18 and resumed.replay_buffer.size() == 18
    resumed.learn(20, reset_num_timesteps=False)
    samples = resumed.replay_buffer.get_n_step(np.arange(15, 20))
    # 2 episodes of 8 slots, then 4 transitions of the one cut short
    assert samples.mask.sum(dim=1).tolist()[1:4] == [3, 3, 2]
    assert resumed.num_timesteps == 38 and resumed.replay_buffer.size() == 38


@pytest.mark.parametrize("wrapped", ["env", "VecEnv", "VecNormalize"])
def test_statistics_of_vec_normalize(wrapped, tmp_path):
    env = VecNormalize(make_vec_env(SpaceEnv, 1), clip_obs=3.0, gamma=0.9)
    model = tiny_model(env)
    model.learn(30, callback=ResumableCheckpointCallback(100, tmp_path))
    given = {
        "env": SpaceEnv,
        "VecEnv": lambda: DummyVecEnv([SpaceEnv]),
        "VecNormalize": lambda: VecNormalize(DummyVecEnv([SpaceEnv]), clip_obs=10.0),
    }[wrapped]()
    resumed = MRQ.resume(tmp_path, given, device="cpu")
    normalize = resumed.get_vec_normalize_env()
    np.testing.assert_array_equal(normalize.obs_rms.mean, env.obs_rms.mean)
    assert (normalize.obs_rms.count, normalize.ret_rms.var) == (env.obs_rms.count, env.ret_rms.var)
    assert (normalize.clip_obs, normalize.gamma, normalize.training) == (3.0, 0.9, True)
    np.testing.assert_array_equal(resumed._last_obs, normalize.normalize_obs(resumed._last_original_obs))
    resumed.learn(10, reset_num_timesteps=False)
    assert normalize.obs_rms.count > env.obs_rms.count


def test_statistics_that_were_not_there(tmp_path):
    model = tiny_model(SpaceEnv())
    model.learn(20, callback=ResumableCheckpointCallback(100, tmp_path))
    with pytest.raises(ValueError, match="VecNormalize"):
        MRQ.resume(tmp_path, VecNormalize(make_vec_env(SpaceEnv, 1)), device="cpu")


@pytest.mark.parametrize(
    ("env", "match"),
    [
        (lambda: SpaceEnv(spaces.Box(-1, 1, (9,))), "spaces do not match"),
        (lambda: SpaceEnv(action_space=spaces.Discrete(2)), "spaces do not match"),
        (lambda: make_vec_env(SpaceEnv, 2), "number of environments"),
    ],
)
@pytest.mark.parametrize("normalised", [False, True])
def test_another_environment(env, match, normalised, tmp_path):
    """An error of the user is not taken for a damaged checkpoint."""
    model = tiny_model(VecNormalize(make_vec_env(SpaceEnv, 1)) if normalised else SpaceEnv())
    model.learn(20, callback=ResumableCheckpointCallback(10, tmp_path, keep_last=None))
    if normalised and "spaces" in match:
        match += "|spaces must have the same shape"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=match):
            MRQ.resume(tmp_path, env(), device="cpu")


def test_changed_while_resuming(tmp_path):
    model = tiny_model(SpaceEnv())
    model.learn(20, callback=ResumableCheckpointCallback(10, tmp_path))
    resumed = MRQ.resume(tmp_path, SpaceEnv(), device="cpu", learning_rate=0.5, verbose=1)
    resumed.learn(5, reset_num_timesteps=False)
    assert resumed.actor.optimizer.param_groups[0]["lr"] == 0.5


def test_environment_by_its_id(tmp_path):
    tiny_model("Pendulum-v1").learn(20, callback=ResumableCheckpointCallback(10, tmp_path))
    assert MRQ.resume(tmp_path, "Pendulum-v1", device="cpu").num_timesteps == 20


def test_another_buffer_size_is_told(tmp_path):
    model = tiny_model(SpaceEnv())
    model.learn(20, callback=ResumableCheckpointCallback(10, tmp_path))
    with pytest.warns(UserWarning, match="keeps its 500 slots. buffer_size=900"):
        resumed = MRQ.resume(tmp_path, SpaceEnv(), device="cpu", buffer_size=900)
    assert resumed.buffer_size == resumed.replay_buffer.buffer_size == 500


def test_remaining_timesteps(tmp_path):
    model = tiny_model(SpaceEnv())
    model.learn(41, callback=ResumableCheckpointCallback(20, tmp_path, keep_last=None))
    assert model.remaining_timesteps == 0
    resumed = MRQ.resume(list_checkpoints(tmp_path)[-1].path, SpaceEnv(), device="cpu")
    assert resumed.num_timesteps == 20 and resumed.remaining_timesteps == 21
    resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)
    assert resumed.num_timesteps == 41 and resumed._total_timesteps == 41


@pytest.mark.parametrize("compile_from", [15, 25])
def test_compiled_where_it_was_compiled(tmp_path, monkeypatch, compile_from):
    """
    The planned length of the whole run decides, so that the short rest of a run is compiled if the run was: otherwise results
    would differ in the last bits.
    """
    monkeypatch.setattr(MRQ, "COMPILE_FROM", compile_from)
    monkeypatch.setattr(Updates, "compile", lambda self, compiled: setattr(self, "compiled", compiled))
    monkeypatch.setattr(MRQ, "train", lambda *_, **__: None)
    model = tiny_model(SpaceEnv(), compile_updates="auto")
    model.learn(30, callback=ResumableCheckpointCallback(20, tmp_path, keep_last=None))
    # 20 steps after the warm-up
    assert model.updates.compiled is (compile_from == 15)
    resumed = MRQ.resume(list_checkpoints(tmp_path)[-1].path, SpaceEnv(), device="cpu")
    assert not resumed.updates.compiled
    resumed.learn(resumed.remaining_timesteps, reset_num_timesteps=False)
    assert resumed.updates.compiled is model.updates.compiled
    # Calls of ``learn`` that continue the run add to its length
    resumed.learn(4, reset_num_timesteps=False)
    assert resumed.updates.compiled is model.updates.compiled
    resumed.learn(1, reset_num_timesteps=False)
    assert resumed.updates.compiled


@pytest.mark.parametrize("there", [True, False])
def test_on_a_processor_with_another_precision(tmp_path, monkeypatch, there):
    """The automatic choice may be another one, which is said, and may be overruled."""
    names = {True: "bfloat16", False: "float32"}
    monkeypatch.setattr("sb3_mrq.accelerate.precision.processor_has_bfloat16", lambda: there)
    tiny_model(SpaceEnv()).learn(20, callback=ResumableCheckpointCallback(20, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MRQ.resume(tmp_path, SpaceEnv(), device="cpu")
    monkeypatch.setattr("sb3_mrq.accelerate.precision.processor_has_bfloat16", lambda: not there)
    with pytest.warns(UserWarning, match=f"computed in {names[there]} before, and continues in {names[not there]}") as record:
        resumed = MRQ.resume(tmp_path, SpaceEnv(), device="cpu")
    assert resumed.learner.hyperparameters.precision == names[not there]
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed = MRQ.resume(tmp_path, SpaceEnv(), device="cpu", precision=names[there])
    assert resumed.learner.hyperparameters.precision == names[there]


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        MRQ.resume(tmp_path, SpaceEnv())
    with pytest.raises(FileNotFoundError):
        MRQ.resume(tmp_path / "nowhere", SpaceEnv())


def test_resuming_without_an_environment(tmp_path):
    """It is said what is missing, before a checkpoint is read."""
    tiny_model(SpaceEnv()).learn(20, callback=ResumableCheckpointCallback(10, tmp_path))
    with pytest.raises(ValueError, match=r"env is None: pass an environment or a registered id.*model\.zip"):
        MRQ.resume(tmp_path, None)


def test_resuming_from_a_model_file(tmp_path):
    """As ``-i`` of the zoo's scripts: the checkpoint that the file belongs to."""
    tiny_model(SpaceEnv()).learn(40, callback=ResumableCheckpointCallback(20, tmp_path, keep_last=None))
    oldest = list_checkpoints(tmp_path)[-1].path
    for path in (oldest / "model.zip", str(oldest / "model.zip")):
        model = MRQ.resume(path, SpaceEnv(), device="cpu")
        assert model.num_timesteps == 20 and model.replay_buffer.size() == 20


@pytest.mark.parametrize("path", ["nowhere", "nowhere/model.zip", "file.txt"])
def test_resuming_from_nothing(tmp_path, path):
    (tmp_path / "file.txt").touch()
    with pytest.raises(FileNotFoundError, match="There is no complete checkpoint"):
        MRQ.resume(tmp_path / path, SpaceEnv())
