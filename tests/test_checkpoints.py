"""
There is always a complete checkpoint: none is lost to a full disk, a signal or a kill, and incomplete ones are not taken for
complete.
"""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch as th
from envs import IMAGE, SpaceEnv, policy_for, tiny_model, wandering_env
from helpers import file_size_limit, snapshot
from stable_baselines3 import TD3
from stable_baselines3.common.callbacks import (
    BaseCallback,
    CallbackList,
    EvalCallback,
    EveryNTimesteps,
    StopTrainingOnMaxEpisodes,
)
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_mrq import MRQ
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.checks import DivergedError
from sb3_mrq.persist import checkpoints
from sb3_mrq.persist.checkpoints import CheckpointError, DamagedCheckpointError, list_checkpoints, write_checkpoint

linux = pytest.mark.skipif(sys.platform != "linux", reason="limits and signals of Linux")


def steps(folder, **kwargs):
    """Numbers of steps of the checkpoints in a folder, newest first, after making sure that nothing else is there."""
    found = list_checkpoints(folder, **kwargs)
    assert sorted(path.name for path in Path(folder).iterdir()) == sorted(c.path.name for c in found)
    return [checkpoint.num_timesteps for checkpoint in found]


def learn(model, folder, total=20, save_freq=10, **kwargs):
    return model.learn(total, callback=ResumableCheckpointCallback(save_freq, folder, **kwargs), reset_num_timesteps=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained model, and a folder with checkpoints of it, neither to be changed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = tiny_model(VecNormalize(make_vec_env(SpaceEnv, 2)))
    learn(model, folder, 40, 10, keep_last=None)
    return model, folder


def resume(folder):
    return MRQ.resume(folder, VecNormalize(make_vec_env(SpaceEnv, 2)), device="cpu")


def test_when_checkpoints_are_written(trained):
    # The last one is where learning ended
    _, folder = trained
    assert steps(folder) == [40, 30, 20, 10]
    for path in folder.iterdir():
        assert {p.name for p in path.iterdir()} == {"checkpoint.json", "model.zip", "replay_buffer.pkl", "vecnormalize.pkl"}


def test_model_and_buffer_are_of_the_same_step(trained):
    """Also with several steps in a rollout, and where steps of the callback and of the model differ."""
    _, folder = trained
    for checkpoint in list_checkpoints(folder):
        model = resume(checkpoint.path)
        assert model.num_timesteps == model.replay_buffer.size() == checkpoint.num_timesteps


def test_several_steps_in_a_rollout(tmp_path):
    model = tiny_model(SpaceEnv(), train_freq=7, gradient_steps=1)
    learn(model, tmp_path, 40, 5, keep_last=None)
    assert steps(tmp_path) == [42, 35, 28, 21, 14, 7]


def test_at_episode_end(tmp_path):
    model = tiny_model(SpaceEnv(length=6))
    learn(model, tmp_path, 40, 10, keep_last=None, at_episode_end=True)
    assert steps(tmp_path) == [40, 30, 24, 12]


def test_episodes_that_never_end_together(tmp_path):
    """There are checkpoints all the same, once each environment has ended several episodes."""

    class OddFirst(SpaceEnv):
        """Episodes of 6 steps after one of 5: none ends where a rollout of two steps does."""

        n_resets = 0

        def reset(self, **kwargs):
            self.n_resets += 1
            self.length = 5 if self.n_resets == 1 else 6
            return super().reset(**kwargs)

    message = "never all between episodes before a rollout"
    for folder, env, kwargs in (
        (tmp_path / "apart", make_vec_env_of([6, 7, 11]), {}),
        (tmp_path / "within", OddFirst(), {"train_freq": 2}),
    ):
        model = tiny_model(env, gradient_steps=1, **kwargs)
        with pytest.warns(UserWarning, match=message) as warned:
            learn(model, folder, 800, 60, keep_last=None, at_episode_end=True)
        assert len(steps(folder)) >= 3
        assert len([w for w in warned if message in str(w.message)]) == 1
    # Those that end together are waited for
    folder = tmp_path / "together"
    learn(tiny_model(make_vec_env_of([30, 30])), folder, 150, 10, keep_last=None, at_episode_end=True)
    assert steps(folder) == [150, 120, 60]


def make_vec_env_of(lengths):
    return DummyVecEnv([lambda length=length: SpaceEnv(length=length) for length in lengths])


def test_keep_last(tmp_path):
    model = tiny_model(SpaceEnv())
    learn(model, tmp_path, 60, 10, keep_last=2)
    assert steps(tmp_path) == [60, 50]
    learn(model, tmp_path, 20, 10, keep_last=1)
    assert steps(tmp_path) == [80]
    # The count goes on where the numbers of steps do not
    assert list_checkpoints(tmp_path)[0].number == 8


def test_schedule_does_not_depend_on_interruptions(tmp_path):
    model = tiny_model(SpaceEnv())
    learn(model, tmp_path, 25, 10, keep_last=None)
    resumed = MRQ.resume(tmp_path, SpaceEnv(), device="cpu")
    learn(resumed, tmp_path, 20, 10, keep_last=None)
    assert steps(tmp_path) == [45, 40, 30, 25, 20, 10]


def test_checkpoints_of_another_run_are_left(tmp_path):
    learn(tiny_model(SpaceEnv()), tmp_path, 30, 10)
    learn(tiny_model(SpaceEnv()), tmp_path, 25, 10, keep_last=1)
    # The last one written is the newest
    assert steps(tmp_path) == [25, 30, 20]
    assert MRQ.resume(tmp_path, SpaceEnv(), device="cpu").num_timesteps == 25
    learn(tiny_model(SpaceEnv()), tmp_path, 5, 10, name_prefix="other")
    assert [c.num_timesteps for c in list_checkpoints(tmp_path)] == [25, 30, 20]
    assert MRQ.resume(tmp_path, SpaceEnv(), device="cpu", name_prefix="other").num_timesteps == 5


@pytest.mark.parametrize("reset", [False, True])
def test_run_from_the_weights_of_a_checkpoint(tmp_path, reset):
    """It is another one: the checkpoints that its weights come from stay."""
    model = tiny_model(SpaceEnv())
    learn(model, tmp_path, 20, 10)
    if reset:
        other = model
    else:
        other = MRQ.load(list_checkpoints(tmp_path)[0].path / "model.zip", env=SpaceEnv(), device="cpu")
    other.learn(30, callback=ResumableCheckpointCallback(10, tmp_path, keep_last=1))
    assert steps(tmp_path) == [30, 20, 10]
    # Of a resumed one they do not
    learn(MRQ.resume(tmp_path, SpaceEnv(), device="cpu"), tmp_path, 10, 10, keep_last=1)
    assert steps(tmp_path) == [40, 20, 10]


def test_within_another_callback(tmp_path):
    """That would tell it too little, and signals would be lost."""
    nested = EveryNTimesteps(5, ResumableCheckpointCallback(10, tmp_path))
    with pytest.raises(ValueError, match="not to EveryNTimesteps"):
        tiny_model(SpaceEnv()).learn(20, callback=nested)
    with pytest.raises(ValueError, match="not to EvalCallback"):
        best = ResumableCheckpointCallback(10, tmp_path)
        tiny_model(SpaceEnv()).learn(20, callback=EvalCallback(SpaceEnv(), callback_on_new_best=best))
    in_list = CallbackList([CallbackList([ResumableCheckpointCallback(10, tmp_path)])])
    tiny_model(SpaceEnv()).learn(20, callback=in_list)
    assert steps(tmp_path) == [20, 10]


def test_none_of_a_model_that_has_diverged(tmp_path):
    """It would replace one from which training can go on."""
    model = tiny_model(SpaceEnv())
    learn(model, tmp_path, 20, 10, keep_last=1)
    with th.no_grad():
        next(model.critic.parameters()).fill_(th.nan)
    with pytest.raises(DivergedError, match="weights are not finite"):
        write_checkpoint(model, tmp_path, keep_last=1)
    assert steps(tmp_path) == [20]


def test_wrong_arguments(tmp_path):
    for kwargs in ({"save_freq": 0}, {"keep_last": 0}, {"name_prefix": ""}, {"name_prefix": "a/b"}):
        with pytest.raises(ValueError, match="must be"):
            ResumableCheckpointCallback(**{"save_freq": 1, "save_path": tmp_path} | kwargs)
    with pytest.raises(ValueError, match="save_path"):
        tiny_model(SpaceEnv()).learn(20, callback=ResumableCheckpointCallback(10))
    with pytest.raises(TypeError, match="MRQ"):
        TD3("MlpPolicy", SpaceEnv(), buffer_size=10).learn(1, callback=ResumableCheckpointCallback(10, tmp_path))


def test_stopped_by_another_callback(tmp_path):
    model = tiny_model(SpaceEnv(length=6))
    model.learn(99, callback=[ResumableCheckpointCallback(10, tmp_path), StopTrainingOnMaxEpisodes(4)])
    assert steps(tmp_path) == [24, 20]
    resumed = MRQ.resume(tmp_path, SpaceEnv(), device="cpu")
    resumed.learn(10, reset_num_timesteps=False)


# Damage


def damaged(folder, tmp_path, edit):
    """A copy of the checkpoints whose newest was edited."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(list_checkpoints(copy)[0].path)
    return copy


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["checkpoint.json", "model.zip", "replay_buffer.pkl", "vecnormalize.pkl"])
@pytest.mark.parametrize("how", ["missing", "flipped", "truncated", "empty"])
def test_damaged_checkpoint_is_passed_over(trained, tmp_path, file, how):
    _, folder = trained
    edits = {
        "missing": lambda path: (path / file).unlink(),
        "flipped": lambda path: flip(path / file),
        "truncated": lambda path: (path / file).write_bytes((path / file).read_bytes()[:-1]),
        "empty": lambda path: (path / file).write_bytes(b""),
    }
    copy = damaged(folder, tmp_path, edits[how])
    with pytest.warns(UserWarning, match="000004_40_steps is damaged"):
        model = resume(copy)
    assert model.num_timesteps == 30


def test_training_goes_on_over_a_damaged_checkpoint(trained, tmp_path):
    """The one that can be used is kept until there are as many others."""
    copy = damaged(trained[1], tmp_path, lambda path: flip(path / "model.zip"))
    with pytest.warns(UserWarning, match="is damaged"):
        model = resume(copy)
    learn(model, copy, 10, 10, keep_last=2)
    assert [c.num_timesteps for c in list_checkpoints(copy)] == [40, 40, 30]
    assert resume(copy).num_timesteps == 40
    learn(model, copy, 10, 10, keep_last=2)
    assert [c.num_timesteps for c in list_checkpoints(copy)][:2] == [50, 40]
    assert 30 not in [c.num_timesteps for c in list_checkpoints(copy)]


def test_unreadable_replay_buffer_is_passed_over(trained, tmp_path, monkeypatch):
    """A bad sector is an error of the disk, not wrong bits."""
    _, folder = trained
    load = MRQ.load_replay_buffer
    models = []

    def fail_first(self, path):
        models.append(weakref.ref(self))
        if len(models) == 1:
            raise OSError(errno.EIO, "Input/output error")
        # The memory of the one before is free again
        assert models[0]() is None
        load(self, path)

    monkeypatch.setattr(MRQ, "load_replay_buffer", fail_first)
    with pytest.warns(UserWarning, match="damaged, going back.*Input/output error"):
        assert resume(folder).num_timesteps == 30


@linux
def test_file_systems_that_cannot_sync_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    learn(tiny_model(SpaceEnv()), tmp_path)
    assert steps(tmp_path) == [20, 10]


def test_all_damaged(trained, tmp_path):
    _, folder = trained
    copy = damaged(folder, tmp_path, lambda path: [flip(c.path / "model.zip") for c in list_checkpoints(path.parent)])
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(DamagedCheckpointError, match=r"No checkpoint in .* can be used"),
    ):
        resume(copy)


def test_another_version(trained, tmp_path):
    def edit(path):
        info = json.loads((path / "checkpoint.json").read_text())["info"] | {"version": 9}
        (path / "checkpoint.json").write_text(json.dumps({"crc32": checkpoints._checksum(info), "info": info}))

    with pytest.raises(ValueError, match="version 9"):
        resume(damaged(trained[1], tmp_path, edit))


# Writing that fails or is cut short


class Killed(BaseException):
    """As if the process ended here: nothing that follows is run."""


def write_functions():
    """Everything that changes the disk while a checkpoint is written and an old one deleted."""
    return [
        (Path, "mkdir"),
        (Path, "write_bytes"),
        (Path, "write_text"),
        (Path, "rename"),
        (Path, "unlink"),
        (os, "replace"),
        (os, "fsync"),
        (VecNormalize, "save"),
        (shutil, "rmtree"),
    ]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_ended_at_any_step_of_writing(trained, tmp_path, monkeypatch, after):
    """Whichever call is the last: the newest complete checkpoint is this one or the one before, and the next is written."""
    _, folder = trained
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = resume(copy)
    model.num_timesteps += 2
    calls, last = [], None

    def watch(function):
        def watched(*args, **kwargs):
            if last is not None and len(calls) > last:
                raise Killed
            calls.append(function.__name__)
            if len(calls) - 1 == last:
                if after:
                    function(*args, **kwargs)
                raise Killed
            return function(*args, **kwargs)

        return watched

    for module, name in write_functions():
        monkeypatch.setattr(module, name, watch(getattr(module, name)))
    for _ in range(2):
        calls.clear()
        write_checkpoint(model, copy, keep_last=2)
    n_calls = len(calls)
    assert n_calls > 15 and set(calls) >= {"mkdir", "rename", "replace", "fsync", "rmtree"}
    before = {c.path.name for c in list_checkpoints(copy)}
    newest = []
    for last in range(n_calls):
        calls.clear()
        with pytest.raises(Killed):
            write_checkpoint(model, copy, keep_last=2)
        last = None
        found = list_checkpoints(copy)
        newest.append(found[0].path.name not in before)
        for checkpoint in found:
            checkpoints._check_files(checkpoint.path)
        assert len(found) in (2, 3)
        assert write_checkpoint(model, copy, keep_last=2) == list_checkpoints(copy)[0].path
        assert len(steps(copy)) == 2
        before = {c.path.name for c in list_checkpoints(copy)}
    # From some call on it is the new one
    assert not newest[0] and newest[-1] and newest == sorted(newest)


def assert_still_usable(model, folder, expected):
    """After an error: the checkpoints are as they were, and the model learns and saves once there is room again."""
    assert steps(folder) == expected
    assert MRQ.resume(folder, model.env, device="cpu").num_timesteps == expected[0]
    learn(model, folder, 10, 1000)
    assert steps(folder)[0] == model.num_timesteps
    assert all(th.isfinite(value).all() for value in snapshot(model.policy).values())


@linux
@pytest.mark.parametrize("limit", [1_000, 50_000])
def test_full_disk(limit, tmp_path):
    """Of a file that may not grow as large, the error is the same but for its number."""
    model = tiny_model(SpaceEnv(IMAGE), policy_for(IMAGE))
    learn(model, tmp_path, 20)
    with file_size_limit(limit), pytest.raises(CheckpointError, match="File too large") as error:
        learn(model, tmp_path, 20)
    assert error.value.errno == errno.EFBIG
    assert str(tmp_path) in str(error.value) and "newest complete checkpoint is mrq_000002_20_steps" in str(error.value)
    assert_still_usable(model, tmp_path, [20, 10])


@linux
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can mount")
def test_full_tmpfs(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        model = tiny_model(SpaceEnv())
        learn(model, folder, 10, 1000)
        with (folder / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x" * 1000)
        with pytest.raises(CheckpointError, match=r"No space left on device.*mrq_000001_10_steps"):
            learn(model, folder, 10, 1000)
        (folder / "filler").unlink()
        assert_still_usable(model, folder, [10])
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def without_root(path):
    """As a user who may read a folder but not write to it."""
    parents = [parent for parent in path.parents if len(parent.parts) > 2]
    modes = [(p, p.stat().st_mode) for p in [*parents, path, *path.rglob("*")]]
    for p, mode in modes:
        p.chmod(mode | 0o555 if p != path else 0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        for p, mode in modes:
            if p.exists():
                p.chmod(mode)


@linux
def test_read_only_folder(tmp_path):
    folder = tmp_path / "checkpoints"
    model = tiny_model(SpaceEnv())
    learn(model, folder, 10, 1000)
    with without_root(folder), pytest.raises(CheckpointError, match=r"Permission denied.*mrq_000001_10_steps") as error:
        learn(model, folder, 10, 1000)
    assert str(folder) in str(error.value)
    assert_still_usable(model, folder, [10])


def test_vanished_folder(tmp_path):
    model = tiny_model(SpaceEnv())

    class Vanish(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == 15:
                (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
            return True

    with pytest.raises(
        CheckpointError, match=r"The checkpoint could not be written to .*checkpoints: No such file.*cannot be read"
    ):
        model.learn(30, callback=[ResumableCheckpointCallback(10, tmp_path / "checkpoints"), Vanish()])
    assert model.num_timesteps == 20
    assert not (tmp_path / "checkpoints").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints")
    assert_still_usable(model, tmp_path / "checkpoints", [10])


# Signals


def send(number, at_step):
    """A callback that sends a signal to this process in the middle of a rollout."""

    class Send(BaseCallback):
        def _on_step(self):
            if self.num_timesteps == at_step:
                os.kill(os.getpid(), number)
            return True

    return Send()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal(number, tmp_path):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    model = tiny_model(SpaceEnv())
    callback = ResumableCheckpointCallback(1000, tmp_path)
    model.learn(100, callback=[send(number, 15), callback])
    assert callback.stopped_by == number
    assert steps(tmp_path) == [15]
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    resumed = MRQ.resume(tmp_path, SpaceEnv(), device="cpu")
    # The transition during which the signal came is stored, and learned from now
    assert resumed.replay_buffer.size() == 15 and resumed._n_updates == 4
    assert resumed.remaining_timesteps == 85
    learn(resumed, tmp_path, 5)
    # Nothing is left of the signal
    assert resumed.num_timesteps == 20 and resumed._n_updates == 10


class KillsIn(SpaceEnv):
    """Sends SIGTERM to this process in one of its steps, counted from 1."""

    def __init__(self, at_step):
        super().__init__()
        self.n_steps, self.at_step = 0, at_step

    def step(self, action):
        self.n_steps += 1
        if self.n_steps == self.at_step:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(action)


def test_signal_in_an_evaluation(tmp_path):
    """
    It is finished, and training ends after the step.
    """
    model = tiny_model(SpaceEnv())
    observation = model.observation_space.sample()
    env = KillsIn(3)
    callback = ResumableCheckpointCallback(1000, tmp_path)
    evaluation = EvalCallback(Monitor(env), eval_freq=15, n_eval_episodes=5, verbose=0)
    assert model.learn(100, callback=[callback, evaluation]) is model
    assert env.n_steps == 30 and evaluation.last_mean_reward > 0
    assert callback.stopped_by == signal.SIGTERM and steps(tmp_path) == [15]
    resumed = MRQ.resume(tmp_path, SpaceEnv(), device="cpu")
    assert resumed.replay_buffer.size() == 15 and resumed._n_updates == 4
    assert resumed.remaining_timesteps == 85
    for after in (resumed, model):
        after.predict(observation)
        after.learn(5, reset_num_timesteps=False)
        assert after.num_timesteps == 20 and after._n_updates == 10


def test_signal_where_the_environment_predicts(tmp_path):
    """As where an agent plays against itself: the step is completed."""
    played = []

    class SelfPlay(SpaceEnv):
        def step(self, action):
            played.append(model.predict(model.observation_space.sample()))
            if len(played) == 15:
                os.kill(os.getpid(), signal.SIGTERM)
                played.append(model.predict(model.observation_space.sample()))
            return super().step(action)

    model = tiny_model(SelfPlay())
    learn(model, tmp_path, 100, 1000)
    assert model.num_timesteps == 15 and len(played) == 16
    assert steps(tmp_path) == [15]


def test_handlers_are_restored_after_an_error(tmp_path):
    class Fails(SpaceEnv):
        def step(self, action):
            raise RuntimeError("broken")

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    model = tiny_model(Fails())
    callback = ResumableCheckpointCallback(1000, tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        model.learn(20, callback=callback)
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    # As rl-zoo3 does: no checkpoint of what may be half an update
    callback.on_training_end()
    assert steps(tmp_path) == []


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts, also where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_left_alone(tmp_path, interruptible):
    model = tiny_model(SpaceEnv())
    with pytest.raises(KeyboardInterrupt):
        model.learn(30, callback=[ResumableCheckpointCallback(10, tmp_path, handle_signals=False), send(signal.SIGINT, 15)])
    assert steps(tmp_path) == [10]


def test_second_interrupt(tmp_path, monkeypatch):
    model = tiny_model(SpaceEnv(), train_freq=50)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Later(BaseCallback):
        def _on_step(self):
            now[0] += 0.4
            return True

    callbacks = [Later(), ResumableCheckpointCallback(10, tmp_path), *(send(signal.SIGINT, step) for step in (20, 21, 24))]
    with pytest.raises(KeyboardInterrupt):
        model.learn(100, callback=callbacks)
    assert model.num_timesteps == 24


def test_not_in_the_main_thread(tmp_path):
    model = tiny_model(SpaceEnv())
    errors = []

    def run():
        try:
            with pytest.warns(UserWarning, match="main thread"):
                learn(model, tmp_path)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not errors
    assert steps(tmp_path) == [20, 10]


def test_dead_workers_without_a_signal(tmp_path):
    """Is an error, not an end."""

    class Dead(SpaceEnv):
        def step(self, action):
            raise EOFError

    with pytest.raises(EOFError):
        learn(tiny_model(Dead()), tmp_path)


@linux
def test_ctrl_c_with_worker_processes(tmp_path):
    """The signal goes to the processes of the environments too, which die of it."""
    code = """
    import os
    import signal
    import sys
    from envs import SpaceEnv, tiny_model
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import SubprocVecEnv
    from sb3_mrq.callbacks import ResumableCheckpointCallback

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
        env = make_vec_env(SpaceEnv, 2, vec_env_cls=SubprocVecEnv, vec_env_kwargs={"start_method": "fork"})
        model = tiny_model(env, compile_updates=False)
        callback = ResumableCheckpointCallback(20, sys.argv[1], verbose=1)
        model.learn(1_000_000, callback=callback)
        for process in env.processes:
            process.join(20)  # an exit takes a while on a busy machine
        alive = any(process.is_alive() for process in env.processes)
        print("stopped by", callback.stopped_by.name, "alive" if alive else "dead", model.num_timesteps, flush=True)
        os._exit(0)
    """
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-u", "-c", textwrap.dedent(code), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        assert "Saved" in process.stdout.readline()
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 0
    last = output.splitlines()[-1].split()
    assert last[:4] == ["stopped", "by", "SIGINT", "dead"]
    model = MRQ.resume(tmp_path, make_vec_env(SpaceEnv, 2), device="cpu")
    assert model.replay_buffer.size() == min(model.num_timesteps, 500)
    assert int(last[4]) - 2 <= model.num_timesteps <= int(last[4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keep_last": 1.0}, r"keep_last is 1\.0, but must be an integer of at least 1, or None\. Write 1\."),
        ({"keep_last": 0}, "keep_last is 0, but must be at least 1, or None"),
        ({"keep_last": True}, "keep_last is True, but must be an integer"),
        ({"save_freq": "1e3"}, "save_freq is '1e3', but must be a number of at least 1. YAML reads 1e3 as text: write 1000"),
        ({"save_freq": 0}, "save_freq is 0, but must be at least 1"),
    ],
)
def test_arguments_that_cannot_work(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        ResumableCheckpointCallback(**{"save_freq": 10, "save_path": tmp_path, **arguments})


def test_arguments_of_numpy_and_floats(tmp_path):
    learn(tiny_model(SpaceEnv()), tmp_path, 40, 1e1, keep_last=np.int64(2))
    assert len(list_checkpoints(tmp_path)) == 2


def test_relative_paths_where_the_working_directory_changes(tmp_path, monkeypatch):
    start, env_id = wandering_env(tmp_path, monkeypatch)
    checkpoints = ResumableCheckpointCallback(10, "checkpoints")
    tiny_model(env_id).learn(20, callback=checkpoints)
    assert Path.cwd() != start
    assert steps(start / "checkpoints") == [20, 10] and steps(checkpoints.save_path) == [20, 10]
    os.chdir(start)
    assert MRQ.resume("checkpoints", env_id, device="cpu").num_timesteps == 20


def test_folder_is_a_link(tmp_path):
    """What it points to need not be there yet, such as a folder on another disk."""
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "checkpoints")
    learn(tiny_model(SpaceEnv()), tmp_path / "link")
    assert steps(tmp_path / "disk" / "checkpoints") == [20, 10]
