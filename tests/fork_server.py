"""
Processes that start at once: forks of a process that has imported torch and other packages, which takes seconds.

``run`` and ``Popen`` take commands of Python, as ``subprocess`` does: ``[sys.executable, "-m", "sb3_mrq.zoo", "train"]``, with
``-c`` or with a script. ``shell_command`` does the same for a command in a shell. Each process imports the package itself
anew, from its ``PYTHONPATH`` and folder.

A fork differs from a fresh process: the packages in ``PRELOADED`` are imported already, and of the variables that Python reads
when it starts only ``PYTHONPATH`` counts. Tests that depend on either, or that measure memory, start real processes. Without
Linux, or with ``SB3_MRQ_REAL_PROCESSES=1``, all processes are real.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from threading import Thread

# Nothing that reads MUJOCO_GL when it is imported
SCRIPTS = [
    *("torch", "torch._dynamo", "torch.utils.tensorboard", "stable_baselines3", "sb3_contrib"),
    *("matplotlib.pyplot", "pandas", "moviepy"),
]
PRELOADED = {
    "scripts": SCRIPTS,
    # rl-zoo3 registers environments, ALE's too, which other scripts must do themselves
    "zoo": [*SCRIPTS, "rl_zoo3", "optuna", "huggingface_sb3", "seaborn", "scipy.stats"],
}
ENABLED = sys.platform == "linux" and os.environ.get("SB3_MRQ_REAL_PROCESSES", "0") == "0"

# -- the side of the tests ---------------------------------------------------------------------------------------------

_servers = {}


def _path_of(kind):
    """The address of a server, which is started if necessary and ends with this process."""
    if kind not in _servers:
        # In the abstract namespace of Linux: there is no file to delete
        path = f"\0sb3-mrq-tests-{os.getpid()}-{kind}"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(64)
            command = [sys.executable, os.path.abspath(__file__), "--serve", str(listener.fileno()), kind]
            # The pipe at its standard input is closed when this process ends
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        _servers[kind] = path, process
    return _servers[kind][0]


def _request(path, command, fds, **settings):
    """Ask for a process. The connection, on which its id and its status come."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    text = json.dumps({"command": [os.fspath(part) for part in command], "numbers": list(fds), **settings}).encode()
    socket.send_fds(connection, [len(text).to_bytes(8, "big")], list(fds.values()))
    connection.sendall(text)
    return connection


def _receive(connection):
    """One line that is a number."""
    text = b""
    while not text.endswith(b"\n"):
        part = connection.recv(1)
        if not part:
            raise RuntimeError("The fork server ended.")
        text += part
    return int(text)


class Popen:
    """The part of ``subprocess.Popen`` that tests use."""

    def __init__(
        self,
        command,
        *,
        cwd=None,
        env=None,
        stdin=None,
        stdout=None,
        stderr=None,
        pass_fds=(),
        start_new_session=False,
        ignore_ctrl_c=False,
        kind="scripts",
    ):
        self.args, self.returncode = command, None
        theirs, to_close = {}, []
        self.stdout = self.stderr = None
        for number, name, given in ((0, "stdin", stdin), (1, "stdout", stdout), (2, "stderr", stderr)):
            if given is None:
                theirs[number] = number
            elif given == subprocess.PIPE:
                assert name != "stdin"
                ours, end = os.pipe()
                setattr(self, name, open(ours, encoding="utf-8"))
                to_close.append(end)
                theirs[number] = end
            elif given == subprocess.STDOUT:
                theirs[number] = theirs[1]
            elif given == subprocess.DEVNULL:
                theirs[number] = os.open(os.devnull, os.O_RDWR)
                to_close.append(theirs[number])
            else:
                theirs[number] = given if isinstance(given, int) else given.fileno()
        self._connection = _request(
            _path_of(kind),
            command,
            theirs | {number: number for number in pass_fds},
            cwd=os.fspath(cwd or os.getcwd()),
            env=dict(os.environ if env is None else env),
            new_session=start_new_session,
            ignore_ctrl_c=ignore_ctrl_c,
        )
        for number in to_close:
            os.close(number)
        self.pid = _receive(self._connection)

    def poll(self):
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = os.waitstatus_to_exitcode(_receive(self._connection))
            self._connection.close()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def communicate(self, timeout=None):
        """Standard output and error from now on."""
        end = None if timeout is None else time.monotonic() + timeout
        streams = [stream for stream in (self.stdout, self.stderr) if stream is not None]
        texts = {}
        threads = [Thread(target=lambda s=s: texts.update({s: s.read()}), daemon=True) for s in streams]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(None if end is None else max(0, end - time.monotonic()))
            if thread.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(None if end is None else max(0, end - time.monotonic()))
        for stream in streams:
            stream.close()
        return texts.get(self.stdout), texts.get(self.stderr)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def __del__(self):
        for stream in (getattr(self, "stdout", None), getattr(self, "stderr", None)):
            if stream is not None:
                stream.close()

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(command, *, timeout=600, kind="scripts", cwd=None, env=None):
    """As ``subprocess.run``, with all output captured as text."""
    if not ENABLED:
        return subprocess.run(command, timeout=timeout, cwd=cwd, env=env, capture_output=True, text=True)
    process = Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd, env=env, kind=kind
    )
    try:
        output, errors = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def shell_command(kind="scripts"):
    """The prefix of a Python command in a shell."""
    if not ENABLED:
        return []
    # Without site-packages, which take longer to find than all else
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), "--ask", _path_of(kind)[1:]]


def ask(path, command):
    """Run a command with the descriptors of this process, and exit with its status."""
    fds = {number: number for number in range(3)}
    settings = dict(cwd=os.getcwd(), env=dict(os.environ), new_session=False, ignore_ctrl_c=False)
    connection = _request("\0" + path, command, fds, **settings)
    _receive(connection)
    code = os.waitstatus_to_exitcode(_receive(connection))
    sys.exit(code if code >= 0 else 128 - code)


# -- the side of the server --------------------------------------------------------------------------------------------


def serve(number, kind):
    """Import slow packages, and fork for each connection."""
    import importlib

    for name in PRELOADED[kind]:
        try:
            importlib.import_module(name)
        except ImportError:  # the script that needs it will report this
            pass
    import torch

    # Threads would not survive a fork
    torch.set_num_threads(1)
    assert len(os.listdir("/proc/self/task")) == 1, "a preloaded package has started threads"
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    base_path = [entry for entry in sys.path[1:] if entry not in given]
    listener = socket.socket(fileno=number)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        ready = select.select([listener, 0], [], [])[0]
        if 0 in ready:
            return
        connection = listener.accept()[0]
        if os.fork() == 0:
            listener.close()
            supervise(connection, base_path)
        connection.close()


def supervise(connection, base_path):
    """Fork once more, and send the id and then the status of the process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    header, fds, _, _ = socket.recv_fds(connection, 8, 64)
    length, text = int.from_bytes(header, "big"), b""
    while len(text) < length:
        text += connection.recv(length - len(text))
    request = json.loads(text)
    pid = os.fork()
    if pid == 0:
        connection.close()
        become(request, fds, base_path)
    for number in (0, 1, 2, *fds):
        os.close(number)
    try:
        connection.sendall(b"%d\n" % pid)
        connection.sendall(b"%d\n" % os.waitpid(pid, 0)[1])
    finally:
        os._exit(0)


def become(request, fds, base_path):
    """Become the requested process."""
    import importlib
    import random

    import numpy as np
    import torch

    if request["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN if request["ignore_ctrl_c"] else signal.default_int_handler)
    # Not on the numbers that they are to get
    import fcntl

    fds = [fcntl.fcntl(number, fcntl.F_DUPFD, 500) for number in fds]
    for number, source in zip(request["numbers"], fds, strict=True):
        os.dup2(source, number)
    os.closerange(500, 600)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))))
    random.seed()
    np.random.seed()
    if "MPLBACKEND" in os.environ and "matplotlib" in sys.modules:
        sys.modules["matplotlib"].rcParams["backend"] = os.environ["MPLBACKEND"]

    _, *arguments = request["command"]
    if arguments[0] == "-u":
        arguments = arguments[1:]
        sys.stdout.reconfigure(write_through=True)
    what = arguments.pop(0)
    first, argv0 = {"-c": ("", "-c"), "-m": (os.getcwd(), "-m")}.get(what, (os.path.dirname(os.path.realpath(what)), what))
    paths = os.environ.get("PYTHONPATH", "")
    sys.path[:] = [first, *filter(None, paths.split(os.pathsep)), *base_path]
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()
    end(what, [argv0, *arguments])


def execute(what, argv):
    """The program itself."""
    import runpy
    import types

    if what == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    elif what == "-c":
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), vars(module))
    else:
        sys.argv = argv
        runpy.run_path(what, run_name="__main__")


def end(what, argv):
    """Run the program, and end as Python ends."""
    import atexit
    import threading

    code = 0
    try:
        execute(what, argv)
    except SystemExit as error:
        if isinstance(error.code, int | None):
            code = error.code or 0
        else:
            print(error.code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if code < 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        ask(sys.argv[2], sys.argv[3:])
