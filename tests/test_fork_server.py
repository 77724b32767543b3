"""
Forks behave as the processes that they stand for: each case is run both ways, with the same outcome.
"""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import fork_server
import pytest

HERE = Path(__file__).resolve().parent
PROGRAMS = {
    "arguments": "import sys; print(sys.argv, __name__, sys.path[0]); print('error', file=sys.stderr)",
    "environment": "import os; print(os.getcwd(), sorted(os.environ.items()), os.getpgrp())",
    "exit": "import sys; sys.exit(3)",
    "message": "import sys; sys.exit('wrong')",
    "exception": "1 / 0",
    "import": "import sb3_mrq.nothing",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "ctrl-c": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "at the end": "import atexit, threading, time; atexit.register(print, 'last')\n"
    "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()",
    "the package": "import sys; print([name for name in sys.modules if name.startswith('sb3_mrq')]); import sb3_mrq\n"
    "print(sb3_mrq.__file__, 'sb3_mrq.envs' in sys.modules)",
    "environments": "import gymnasium; print([name for name in gymnasium.registry if '/' in name])",
    "threads": "import torch; print(torch.get_num_threads())",
    "worker": "import multiprocessing\nif __name__ == '__main__':\n"
    "    process = multiprocessing.get_context('spawn').Process(target=print, args=('from a worker',))\n"
    "    process.start(); process.join(); print(process.exitcode)",
}

pytestmark = pytest.mark.skipif(not fork_server.ENABLED, reason="all processes are real")


def last_lines(text):
    """Tracebacks differ in their first lines."""
    return text.splitlines()[-1:]


# In these a script or a module differs from a command
EACH_WAY = ("arguments", "import", "at the end", "worker")


@pytest.mark.parametrize(
    "name, how", [(name, how) for name in PROGRAMS for how in ("-c", "script", "-m") if how == "-c" or name in EACH_WAY]
)
def test_as_a_real_process(name, how, tmp_path):
    path = tmp_path / "folder" / "program.py"
    path.parent.mkdir()
    path.write_text(PROGRAMS[name])
    what = {"-c": ["-c", PROGRAMS[name]], "script": [str(path)], "-m": ["-m", "program"]}[how]
    command = [sys.executable, *what, "--an", "argument"]
    paths = [str(path.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    settings = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"})
    forked = fork_server.run(command, **settings)
    # Ctrl-C may be ignored here, as in jobs in the background of a shell
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    real = subprocess.run(command, capture_output=True, text=True, preexec_fn=default, **settings)
    assert (forked.returncode, forked.stdout) == (real.returncode, real.stdout)
    assert last_lines(forked.stderr) == last_lines(real.stderr)


def test_signals_and_sessions():
    code = "import os, time; print(os.getpgrp(), flush=True); time.sleep(100)"
    process = fork_server.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    assert int(process.stdout.readline()) == process.pid
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    process.terminate()
    assert process.communicate(60) == ("", None)
    assert process.returncode == -signal.SIGTERM


def test_descriptors():
    reading, writing = os.pipe()
    code = f"import os; os.write({writing}, b'here'); os.fstat({reading})"
    process = fork_server.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL, pass_fds=[writing])
    os.close(writing)
    assert os.read(reading, 10) == b"here"
    os.close(reading)
    process.wait(60)


def test_in_a_shell(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print(input(), sys.argv[1:]); sys.exit(5)")
    command = [*fork_server.shell_command(), sys.executable, str(script), "a b"]
    result = subprocess.run(command, input="typed\n", capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (5, "typed ['a b']\n")


def test_time_limit():
    with pytest.raises(subprocess.TimeoutExpired):
        fork_server.run([sys.executable, "-c", "import time; time.sleep(100)"], timeout=0.5)
