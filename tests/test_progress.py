"""
What training tells its user: messages, progress bars and the log, by a clock that the test sets.
"""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch as th
from envs import SpaceEnv, record_log, tiny_model
from helpers import snapshot
from stable_baselines3.common.callbacks import CallbackList, ProgressBarCallback
from stable_baselines3.common.env_util import make_vec_env

from sb3_mrq import progress
from sb3_mrq.progress import TrainingProgress, duration, milliseconds, progress_bars

ENCODER, VALUE, STEP = 0.04, 0.01, 0.002


class Bar(ProgressBarCallback):
    """Records what a progress bar would show, with the time."""

    def __init__(self, clock):
        super().__init__()
        self.clock, self.shown = clock, []

    def _on_training_start(self):
        self.pbar = SimpleNamespace(set_description=lambda text: self.shown.append((self.clock.now, text)))

    def _on_step(self):
        return True

    def _on_training_end(self):
        pass


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the functions of ``timed`` advance."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def timed(clock, seconds, function):
    def call(*args, **kwargs):
        clock.now += seconds
        return function(*args, **kwargs)

    return call


def timed_model(clock, n_envs=1, slow_first=0.0, **kwargs):
    """A model whose updates take the times above and do nothing else, and whose environments take theirs."""
    env = make_vec_env(lambda: SpaceEnv(length=40), n_envs)
    model = tiny_model(env, learning_starts=100, **{"target_update_interval": 250, "batch_size": 2} | kwargs)
    first = iter([slow_first])

    def encoder():
        clock.now += ENCODER + next(first, 0.0)

    model.updates.encoder = encoder
    model.updates.value_and_policy = timed(clock, VALUE, lambda: None)
    model.env.step_async = timed(clock, n_envs * STEP, model.env.step_async)
    return model


def lines(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("Warm-up", "Training"))]


@pytest.mark.parametrize("n_envs", [1, 4])
def test_messages(clock, capsys, n_envs):
    """Compiling in the first update is not taken for the speed."""
    timed_model(clock, n_envs, slow_first=60.0, verbose=1).learn(1000, log_interval=None)
    begins, speed = lines(capsys)
    assert begins == (
        "Warm-up done after 100 steps. Training begins with a burst of 250 encoder updates. "
        "Another follows every 250 training steps."
    )
    # 60 training steps after the first one
    seconds = float(re.fullmatch(r"Training: 52 ms per step, (\d+) s remain\.", speed)[1])
    assert seconds == pytest.approx(0.052 * 838, abs=0.052 * 5 + 0.5)


def test_silent(clock, capsys):
    timed_model(clock).learn(400, log_interval=None)
    assert capsys.readouterr().out == ""


def test_short_cycles(clock, capsys):
    """Whole cycles are measured if they are shorter than the first measurement. A later call of learn has no warm-up."""
    model = timed_model(clock, target_update_interval=5, verbose=1)
    model.learn(300, log_interval=None)
    assert [line[:21] for line in lines(capsys)] == ["Warm-up done after 10", "Training: 52 ms per s"]
    model.learn(300, log_interval=None, reset_num_timesteps=False)
    (speed,) = lines(capsys)
    assert speed.startswith("Training: 52 ms per step, 12 s")


def test_training_after_episodes(clock, capsys):
    model = timed_model(clock, target_update_interval=10, train_freq=(1, "episode"), verbose=1)
    model.learn(1000, log_interval=None)
    assert lines(capsys)[1].startswith("Training: 52 ms per step")


def test_progress_bar(clock):
    bar = Bar(clock)
    model = timed_model(clock)
    model.learn(500, [CallbackList([bar])], log_interval=None)
    texts = [text for _, text in bar.shown]
    assert texts[:2] == ["warm-up", "encoder 0/250"]
    assert "encoder 250/250" in texts and "training" in texts
    assert texts[-1] in ("0 s remain", "1 s remain")
    # It moves throughout a burst, which takes ten seconds
    burst = [time for time, text in bar.shown if text.startswith("encoder")][:40]
    assert max(after - before for before, after in itertools.pairwise(burst)) < 0.3
    assert progress_bars(bar) == [bar] and model.progress.bars == []


def test_log(clock):
    """The time that remains is the one of whole cycles, and the recent speed that since the last line of the log."""
    model = timed_model(clock)
    rows = record_log(model)
    model.learn(1400, log_interval=1)
    rows = [row for row in rows if "time/total_timesteps" in row]
    assert [row["time/total_timesteps"] for row in rows] == list(range(40, 1401, 40))
    assert all(row["time/fps"] > 0 for row in rows)
    assert "time/remaining_s" not in rows[3] and "time/remaining_s" in rows[4]
    for row in rows[4:]:
        assert row["time/remaining_s"] == pytest.approx(0.052 * (1400 - row["time/total_timesteps"]), abs=0.6)
    assert rows[1]["time/fps_recent"] == pytest.approx(1 / STEP)
    burst = 40 / (40 * (STEP + VALUE) + 250 * ENCODER)
    assert min(row["time/fps_recent"] for row in rows[4:]) == pytest.approx(burst, rel=0.05)
    assert max(row["time/fps_recent"] for row in rows[4:]) == pytest.approx(1 / (STEP + VALUE))


@pytest.mark.parametrize("log_interval", [1000, None])
def test_log_without_episodes(clock, log_interval):
    """After a minute, unless logging is off."""
    model = timed_model(clock)
    rows = record_log(model)
    model.learn(5000, log_interval=log_interval)
    steps = [row["time/total_timesteps"] for row in rows]
    if log_interval is None:
        assert not steps
        return
    # 258 seconds of training
    assert len(steps) == 4
    assert all("time/remaining_s" in row for row in rows)


def test_offline(clock, capsys):
    model = timed_model(clock)
    with pytest.warns(UserWarning, match="Nothing will be learned"):
        model.learn(100, log_interval=None)
    model.verbose = 1
    model.train_offline(300)
    begins, speed = lines(capsys)
    assert begins.startswith("Training begins with a burst of 250 encoder updates.")
    assert speed.startswith("Training: 50 ms per step, 12 s")


def test_no_effect_on_training(monkeypatch):
    """However often it reports."""
    weights = []
    for seconds in (60.0, 0.0):
        monkeypatch.setattr(TrainingProgress, "LOG_SECONDS", seconds)
        model = tiny_model(SpaceEnv(), seed=3)
        record_log(model)
        model.learn(60)
        weights.append(snapshot(model.policy))
    assert all(th.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_words():
    assert [duration(seconds) for seconds in (0.4, 99, 100, 3540, 4620, 4e6)] == [
        "0 s",
        "99 s",
        "2 min",
        "59 min",
        "1 h 17 min",
        "1,111 h 7 min",
    ]
    assert [milliseconds(seconds) for seconds in (0.00123, 0.0521, 1.5)] == ["1.2 ms", "52 ms", "1,500 ms"]
