"""
The script ``speed``: a row for each precision, with what training takes there.
"""

import re
import subprocess
import sys
from functools import partial

import pytest
import torch as th
from envs import TINY_POLICY

from sb3_mrq import DRQ, MRQ, speed
from sb3_mrq.accelerate.precision import fast_precisions
from sb3_mrq.command_line import main


@pytest.fixture
def command(monkeypatch, capsys):
    """Call the script with small networks; its status and what it prints."""
    monkeypatch.setattr(speed, "INTERVAL", 5)
    monkeypatch.setattr(speed, "RANDOM_STEPS", 30)
    # Compiling has its own tests
    monkeypatch.setattr(MRQ, "COMPILE_FROM", 10 * speed.PLANNED_STEPS)
    tiny = dict(policy_kwargs=TINY_POLICY, batch_size=8)
    monkeypatch.setattr(speed, "ALGORITHMS", {"mrq": partial(MRQ, **tiny), "drq": partial(DRQ, **tiny)})

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sb3-mrq", "speed", "--device", "cpu", "--seconds", "0", *arguments])
        try:
            main()
        except SystemExit as error:
            return error.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


@pytest.mark.parametrize("arguments", [[], ["--env", "CartPole-v1", "--algo", "drq"], ["--env", "dmc/cartpole-balance-v0"]])
def test_table(command, arguments):
    if "dmc" in str(arguments):
        pytest.importorskip("dm_control")
    status, output, _ = command(*arguments)
    assert status == 0
    rows = re.findall(r"^(\w+) +plain +([\d.]+) +([\d.,]+) ms +(\d.*?)$", output, flags=re.MULTILINE)
    assert [row[0] for row in rows] == fast_precisions(th.device("cpu"))
    for _, rate, milliseconds, whole in rows:
        # The three are the same number, rounded
        assert float(rate) * float(milliseconds.replace(",", "")) == pytest.approx(1000, rel=0.1)
        assert re.fullmatch(r"(\d+ h )?\d+ min( +automatic choice)?", whole)
    automatic = MRQ("MlpPolicy", "Pendulum-v1", policy_kwargs=TINY_POLICY, device="cpu").automatic_precision
    assert [row[0] for row in rows if row[3].endswith("automatic choice")] == [automatic]
    assert f"The automatic choice is {automatic}, plain. A full replay buffer takes 0.0" in output
    assert "load average" in output


def test_whole_cycles_are_timed():
    """Not the first ones, in which updates are compiled and captured."""
    stopwatch = speed.Stopwatch(seconds=10)
    for burst in [(0.0, 10), (50.0, 20), (54.0, 40)]:
        assert stopwatch._on_step()
        stopwatch.bursts.append(burst)
    assert stopwatch._on_step()
    stopwatch.bursts.append((60.0, 60))
    assert not stopwatch._on_step()
    assert stopwatch.seconds_per_step == 0.25


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--env", "Pendulm-v1"], "Environment `Pendulm` doesn't exist. Did you mean: `Pendulum`?"),
        (["--env", "dmc/walker-wlk-v0"], "Environment `walker-wlk` doesn't exist in namespace dmc."),
        (["--env", "nothing/Pendulum-v1"], "Namespace nothing not found."),
        (["--device", "foo"], "The device foo cannot be used: Expected one of cpu, cuda"),
        (["--algo", "sac"], "argument --algo: invalid choice: 'sac'"),
        (["--seconds", "-1"], "seconds is -1.0, but must be at least 0"),
    ],
)
def test_mistakes(command, arguments, message):
    status, _, errors = command(*arguments)
    assert status == 2
    assert errors.splitlines()[-1].startswith(f"sb3-mrq speed: error: {message}")


def test_without_rl_zoo3():
    code = "import sys; sys.modules['rl_zoo3'] = None; sys.argv[1:] = ['speed', '--help']"
    code += "; from sb3_mrq.command_line import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "usage: sb3-mrq speed" in result.stdout
