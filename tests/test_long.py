"""
What takes minutes: kills at random moments, and a replay buffer of a million frames. Run with ``pytest -m long``; the figures
go to the file that the environment variable ``MRQ_FIGURES`` names, if any.
"""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from envs import SpaceEnv, tiny_model
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mrq import MRQ
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.callbacks import ResumableCheckpointCallback
from sb3_mrq.persist.checkpoints import TEMPORARY, list_checkpoints
from sb3_mrq.persist.replay_files import ReplayFileError, load_replay_buffer, save_replay_buffer

pytestmark = [pytest.mark.long, pytest.mark.skipif(sys.platform != "linux", reason="signals and /proc of Linux")]

KILLS = int(os.environ.get("MRQ_KILLS", "50"))
FRAMES = int(os.environ.get("MRQ_FRAMES", "1000000"))


def report(**figures):
    """Print figures, and append them to a file."""
    line = json.dumps(figures)
    print(line)
    if "MRQ_FIGURES" in os.environ:
        with open(os.environ["MRQ_FIGURES"], "a") as file:
            file.write(line + "\n")


def make_env():
    # Observations large enough that writing the buffer takes a while
    return VecNormalize(make_vec_env(lambda: SpaceEnv(spaces.Box(-1, 1, (2_000,), dtype=np.float32)), 2))


def train(folder, progress):
    """The process to kill: training from the newest checkpoint, recording steps reached and checkpoints written."""

    class Noting(ResumableCheckpointCallback):
        def note(self, word):
            os.write(file, f"{word} {self.model.num_timesteps}\n".encode())

        def _on_rollout_start(self):
            if self.model.num_timesteps % 10 == 0:
                self.note("step")
            super()._on_rollout_start()

        def _save(self):
            super()._save()
            self.note("saved")

    file = os.open(progress, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        if list_checkpoints(folder):
            model = MRQ.resume(folder, make_env(), device="cpu")
            os.write(file, f"resumed {model.num_timesteps}\n".encode())
        else:
            model = tiny_model(make_env(), buffer_size=600)
        model.learn(10**6, callback=Noting(20, folder), reset_num_timesteps=False)
    except BaseException:
        os.write(file, f"failed {traceback.format_exc()}\n".encode())
        raise


def notes(progress):
    return [line.split(maxsplit=1) for line in progress.read_text().splitlines()] if progress.exists() else []


def wait_for(condition, timeout=120):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.002)


def temporary_folders(folder):
    """Names and identities of incomplete checkpoints."""
    with os.scandir(folder) as entries:
        return {(entry.name, entry.inode()) for entry in entries if entry.name.startswith(TEMPORARY)}


def test_kills(tmp_path):
    """Whenever the process is killed, the newest complete checkpoint is there, loads, and is the last one that was written."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    context = multiprocessing.get_context("forkserver")
    # The last one is imported by the first optimizer
    context.set_forkserver_preload(["conftest", "envs", "sb3_mrq.callbacks", "torch._dynamo"])
    rng = random.Random(0)
    in_save, cut_short, reached = 0, 0, 0
    for kill in range(KILLS):
        progress = tmp_path / f"progress{kill}"
        old = temporary_folders(folder)
        process = context.Process(target=train, args=(folder, progress), daemon=True)
        process.start()
        while process.is_alive() and not any(word == "step" for word, _ in notes(progress)):
            time.sleep(0.01)
        aimed = kill % 2 == 0
        if aimed:
            # While a checkpoint is being written or an old one deleted
            time.sleep(rng.uniform(0, 0.5))
            wait_for(lambda old=old: temporary_folders(folder) - old)
            time.sleep(rng.uniform(0, 0.05))
        else:
            time.sleep(rng.uniform(0, 2))
        assert process.is_alive(), progress.read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        remains = temporary_folders(folder) - old
        in_save += aimed
        cut_short += bool(remains)

        saved = [int(step) for word, step in notes(progress) if word == "saved"]
        resumed = [int(step) for word, step in notes(progress) if word == "resumed"]
        assert "failed" not in [word for word, _ in notes(progress)]
        assert resumed == ([reached] if reached else [])
        newest = list_checkpoints(folder)[0].num_timesteps if list_checkpoints(folder) else 0
        # The last recorded one, or the next one, which the kill kept from being recorded
        last = max([reached, *saved])
        assert newest in (last, last - last % 20 + 20)
        reached = newest
        if reached:
            model = MRQ.resume(folder, make_env(), device="cpu")
            assert model.num_timesteps == reached
            assert model.replay_buffer.size() == min(reached, model.replay_buffer.size()) > min(reached, 600) - 150
            assert all(np.isfinite(value).all() for value in vars(model.get_vec_normalize_env().obs_rms).values())
    report(kills=KILLS, aimed_at_a_save=in_save, saves_cut_short=cut_short, steps_reached=reached)
    assert reached > 0 and cut_short > KILLS // 5


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def copy_in_seconds(source, target):
    """A plain copy, on the disk when it is done."""
    start = time.monotonic()
    with open(source, "rb") as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy, 4 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    return time.monotonic() - start


class PeakMemory:
    """Highest resident memory of this process above that at the start, looked at by another thread."""

    def __enter__(self):
        import threading

        self.start = self.peak = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.done.wait(0.01):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.extra = max(self.peak, resident()) - self.start


def test_a_million_frames(tmp_path):
    """Saving and loading take little memory on top of the buffer, and no more than twice the time of a copy."""
    folder = Path(os.environ.get("MRQ_FRAMES_FOLDER", tmp_path))
    space = spaces.Box(0, 255, (4, 84, 84), dtype=np.uint8)

    def make():
        return SubtrajectoryReplayBuffer(FRAMES, space, spaces.Discrete(18), device="cpu")

    buffer = make()
    frames = np.random.default_rng(0).integers(0, 255, (1000, 84, 84), dtype=np.uint8)
    obs = np.repeat(frames[None, :1], 4, axis=1)
    zeros, nothing = np.zeros(1), [{}]
    done = np.zeros(1, dtype=bool)
    for i in range(FRAMES + 100):
        next_obs = np.concatenate([obs[:, 1:], frames[None, [(7 * i) % 1000]]], axis=1)
        buffer.add(obs, next_obs, zeros, zeros, done, nothing)
        obs = next_obs
    size = resident()
    path, copy = folder / "frames.pkl", folder / "copy.pkl"
    figures = {"frames": FRAMES, "resident_gb": round(size / 1e9, 2)}
    try:
        saves, copies, loads = [], [], []
        for _ in range(3):
            path.unlink(missing_ok=True)
            with PeakMemory() as memory:
                start = time.monotonic()
                save_replay_buffer(path, buffer)
                saves.append(time.monotonic() - start)
            assert memory.extra < 300e6
            figures["extra_mb_saving"] = round(max(memory.extra / 1e6, figures.get("extra_mb_saving", 0)), 1)
            copies.append(copy_in_seconds(path, copy))
            copy.unlink()
        indices = np.random.default_rng(1).integers(0, FRAMES - 100, 1000)
        state = buffer.get_state()
        numbers = state.numbers
        expected = buffer.get_n_step(indices)
        memory_of_buffer = sum(array.nbytes for array in state.slots.values())
        del buffer, state
        for _ in range(2):
            with PeakMemory() as memory:
                start = time.monotonic()
                loaded = load_replay_buffer(path, make())
                loads.append(time.monotonic() - start)
            assert memory.extra - memory_of_buffer < 300e6
            figures["extra_mb_loading"] = round((memory.extra - memory_of_buffer) / 1e6, 1)
            if len(loads) == 1:
                del loaded
        assert loaded.get_state().numbers == numbers
        for one, other in zip(loaded.get_n_step(indices), expected, strict=True):
            np.testing.assert_array_equal(one, other)
        n_bytes = path.stat().st_size
        rates = {name: round(n_bytes / min(t) / 1e6) for name, t in (("copy", copies), ("save", saves), ("load", loads))}
        figures |= {"file_gb": round(n_bytes / 1e9, 2), "mb_per_second": rates}
        figures["seconds"] = {n: [round(x, 2) for x in t] for n, t in (("copy", copies), ("save", saves), ("load", loads))}
        report(**figures)
        assert min(saves) < 2 * min(copies) and min(loads) < 2 * min(copies)
    finally:
        path.unlink(missing_ok=True)
        copy.unlink(missing_ok=True)


def test_corrupted_files(tmp_path):
    """Every flipped bit and every truncation is refused."""
    buffer = SubtrajectoryReplayBuffer(200, spaces.Box(-1, 1, (30,)), spaces.Discrete(3), device="cpu", n_envs=2)
    rng = np.random.default_rng(0)
    for _ in range(80):
        obs = rng.normal(size=(2, 30))
        buffer.add(obs, obs + 1, np.zeros(2), rng.normal(size=2), rng.random(2) < 0.1, [{}, {}])
    path = tmp_path / "buffer.pkl"
    save_replay_buffer(path, buffer)
    data = path.read_bytes()
    refused = {"flipped": 0, "truncated": 0, "overwritten": 0}
    for i in range(6000):
        damaged = bytearray(data)
        position = int(rng.integers(len(data)))
        how = list(refused)[i % 3]
        if how == "flipped":
            damaged[position] ^= 1 << int(rng.integers(8))
        elif how == "truncated":
            del damaged[position:]
        else:
            n = int(rng.integers(1, 2000))
            damaged[position : position + n] = rng.bytes(len(damaged[position : position + n]))
        path.write_bytes(damaged)
        if bytes(damaged) != data:
            with pytest.raises(ReplayFileError):
                load_replay_buffer(path, buffer)
            refused[how] += 1
    report(corrupted_files_refused=refused)
