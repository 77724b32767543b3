"""
Train every task, algorithm and seed of a study, several at once, and collect the results in one table.

    python -m benchmarks.study --suite dmc --algos mrq,td3,sac --seeds 3 --steps 30000
    python -m benchmarks.study --tasks CartPole-v1 Acrobot-v1 --algos mrq,dqn,qrdqn --seeds 2 --steps 30000 --out runs/discrete

Each run is rl-zoo3's training script, with its hyperparameters, in its own process, evaluated before the first step and at a
fixed interval. Repeating a command skips finished runs and resumes interrupted ones from their last checkpoint (MRQ) or from
the beginning (other algorithms). Results of other settings are never deleted: their folder is renamed. Failed runs are listed
at the end. ``<out>/results.csv`` has a row for every evaluation of every finished run in the folder, also of other commands.

SIGTERM, Ctrl-C and closing the terminal end the study and its runs. Runs of MRQ write a checkpoint first.

``--backend ray`` distributes the runs over a Ray cluster whose machines share the folder ``--out``.
"""

import argparse
import contextlib
import csv
import fcntl
import io
import itertools
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import rl_zoo3
import torch as th
import yaml
from tqdm import tqdm

from sb3_mrq.envs import ATARI_GAMES, DMC_TASKS, DMC_VISUAL_TASKS, GYM_LOCOMOTION, AtariWrapper
from sb3_mrq.persist.checkpoints import newest_with_model
from sb3_mrq.persist.files import atomic_file
from sb3_mrq.zoo.configuration import ALGORITHMS, closest
from sb3_mrq.zoo.exp_manager import CHECKPOINTS

#: tasks, training steps in the paper and steps between two evaluations
SUITES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "gym": (GYM_LOCOMOTION, 1_000_000, 5_000),
    "dmc": (DMC_TASKS, 500_000, 5_000),
    "dmc-visual": (DMC_VISUAL_TASKS, 500_000, 5_000),
    "atari": (ATARI_GAMES, 2_500_000, 100_000),
}

#: networks for classic control, a quarter of the default width
SMALL = "dict(net_arch=dict(encoder=[128, 128], qf=[128, 128, 128], pi=[128, 128]), z_s_dim=128, z_a_dim=64, z_sa_dim=128)"

#: further algorithm names: the algorithm in rl-zoo3, and hyperparameters in the format of rl-zoo3's command line
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "mrq-float32": ("mrq", {"precision": "'float32'"}),
    "mrq-bfloat16": ("mrq", {"precision": "'bfloat16'"}),
    "mrq-greedy-small": ("mrq", {"discrete_policy": "'greedy'", "precision": "'float32'", "policy_kwargs": SMALL}),
    "mrq-actor-small": ("mrq", {"discrete_policy": "'actor'", "precision": "'float32'", "policy_kwargs": SMALL}),
    "mrq-no-encoder-loss": (
        "mrq",
        {"dynamics_loss_weight": "0.0", "reward_loss_weight": "0.0", "termination_loss_weight": "0.0"},
    ),
    "mrq-1-step": ("mrq", {"n_steps": "1"}),
    "mrq-uniform-replay": ("mrq", {"priority_alpha": "0.0"}),
    "mrq-infonce-fade": ("mrq", {"infonce_loss_weight": "0.1", "replay_fade": "0.9999"}),
    "drq-float32": ("drq", {"precision": "'float32'"}),
    "drq-bfloat16": ("drq", {"precision": "'bfloat16'"}),
    "drq-no-infonce": ("drq", {"infonce_loss_weight": "0.0"}),
    "drq-no-fade": ("drq", {"replay_fade": "1.0"}),
    "drq-mrq-optimisation": (
        "drq",
        {
            "encoder_learning_rate": "1e-4",
            "policy_kwargs": "dict(net_arch=dict(encoder=[512, 512]), optimizer_kwargs=dict(weight_decay=1e-4))",
        },
    ),
}

#: preprocessing of the Atari games, for every algorithm
ATARI_WRAPPER = f"sb3_mrq.envs.{AtariWrapper.__name__}"
#: section of rl-zoo3's configuration for continuous control tasks without one
ZOO_DEFAULTS = "HalfCheetah-v4"

#: runs that share a GPU, which is busy for most of a training step and serves one process at a time
RUNS_PER_GPU = 2
#: seconds for runs on Ray to write their last checkpoint when the study is stopped
CHECKPOINT_SECONDS = 300
#: folder of the benchmarks package, which is not installed
ROOT = Path(__file__).resolve().parents[1]

#: environment variable with the id of the process that waits for a run
STUDY_PROCESS = "SB3_MRQ_STUDY_PROCESS"

#: file with the package versions of a run, one line for each part of a resumed run
VERSIONS = "versions.txt"

RESULT_COLUMNS = ("task", "algorithm", "seed", "step", "return", "return_std", "length", "seconds", "versions", "machine")


@dataclass(frozen=True)
class Run:
    """
    One training run.

    :param task: id of the environment
    :param algorithm: algorithm of rl-zoo3, or one of ``VARIANTS``
    :param seed: seed of the run
    :param steps: number of environment steps
    :param eval_freq: steps between two evaluations
    :param eval_episodes: episodes per evaluation
    :param out: folder of the study
    :param threads: number of torch threads
    :param device: torch device
    :param hyperparams: overrides of the configuration, ``name:value`` as for rl-zoo3
    """

    task: str
    algorithm: str
    seed: int
    steps: int
    eval_freq: int
    eval_episodes: int
    out: str
    threads: int = 1
    device: str = "auto"
    hyperparams: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        return f"{self.algorithm} on {self.task}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return Path(self.out) / "runs" / self.algorithm / self.task.replace("/", "_") / f"seed{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines the results, up to rounding."""
        return result_settings(json.loads(json.dumps(asdict(self))))

    def recorded_settings(self) -> dict[str, Any] | None:
        """
        :return: the settings of the results in its folder, None if unknown
        """
        settings = (read_json(self.folder / "run.json") or {}).get("settings") or read_json(self.folder / "settings.json")
        return None if settings is None else result_settings(settings)

    def other_results(self) -> bool:
        """
        :return: whether its folder has evaluations of other, or unknown, settings
        """
        return (self.folder / "evaluations.csv").exists() and self.recorded_settings() != self.settings

    def command(self) -> list[str]:
        """The training command, which takes the arguments of ``sb3-mrq train`` after its own."""
        algo, hyperparams = VARIANTS.get(self.algorithm, (self.algorithm, {}))
        command = [sys.executable, "-m", "benchmarks.study_run", str(self.folder)]
        command += [str(self.eval_freq), str(self.eval_episodes)]
        command += ["--algo", algo, "--env", self.task, "--seed", str(self.seed), "--n-timesteps", str(self.steps)]
        command += ["--num-threads", str(self.threads), "--device", self.device, "--log-folder", str(self.folder / "zoo")]
        command += ["--eval-freq", "-1", "--verbose", "0"]
        if self.can_resume():
            command += ["--trained-agent", str(self.folder / CHECKPOINTS)]
        section = zoo_section(algo, self.task)
        if section is not None:
            command += ["--conf-file", str(self.folder / "hyperparams.yml")]
        given = [*(f"{name}:{value}" for name, value in hyperparams.items()), *self.hyperparams]
        return command + (["--hyperparams", *given] if given else [])

    def can_resume(self) -> bool:
        """
        :return: whether there is a checkpoint with these settings
        """
        checkpoints = self.folder / CHECKPOINTS
        same = self.recorded_settings() == self.settings
        return same and checkpoints.is_dir() and newest_with_model(checkpoints) is not None

    def finished(self) -> bool:
        """
        :return: whether it was completed with these settings
        """
        settings = (read_json(self.folder / "run.json") or {}).get("settings")
        return settings is not None and result_settings(settings) == self.settings


def result_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """
    :param settings: settings of a run
    :return: the settings that determine its results, without output folder, threads and device
    """
    return {name: value for name, value in settings.items() if name not in ("out", "threads", "device")}


def read_json(path: Path) -> dict[str, Any] | None:
    """
    :param path: a file that may be missing or truncated
    :return: its content, None if it cannot be read
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def zoo_section(algo: str, task: str) -> dict[str, Any] | None:
    """
    Hyperparameters for tasks that rl-zoo3 does not configure, from an older version of the task, or from ``ZOO_DEFAULTS``
    for the DeepMind Control suite. Atari games use rl-zoo3's hyperparameters, but MR.Q's preprocessing: rl-zoo3's wrappers
    would repeat what the games do themselves.

    :param algo: algorithm of rl-zoo3
    :param task: id of an environment
    :return: the section, None to use rl-zoo3's own
    """
    if algo in ALGORITHMS:
        return None
    sections = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml").read_text())
    if task.startswith("ALE/"):
        section = sections.get(task, sections.get("atari"))
        wrappers = ("env_wrapper", "vec_env_wrapper", "frame_stack", "env_kwargs")
        kept = {name: value for name, value in (section or {}).items() if name not in wrappers}
        return None if section is None else {**kept, "env_wrapper": ATARI_WRAPPER}
    base, _, number = task.rpartition("-v")
    if task in sections:
        return None
    for older in range(int(number) - 1, -1, -1) if number.isdigit() else ():
        if f"{base}-v{older}" in sections:
            return sections[f"{base}-v{older}"]
    return sections[ZOO_DEFAULTS] if task.startswith("dmc/") and ZOO_DEFAULTS in sections else None


class InUseError(Exception):
    """Another process is working on the same run."""


def lock(folder: Path) -> IO[str]:
    """
    Lock a run against other studies. The lock is held by every process that has the returned file open. The process of the
    run inherits it, since it may outlive a study that was killed.

    :param folder: folder of the run
    :return: the locked file, next to the folder, which may be renamed
    :raises InUseError: if another process holds the lock
    """
    file = folder.with_name(f"{folder.name}.lock").open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "another study"
        file.close()
        raise InUseError(f"{folder} is in use by {holder}, which must end first.") from error
    file.truncate(0)
    return file


def prepare(run: Run) -> None:
    """
    Prepare the folder of a run. Checkpoints that it can resume from are kept, results of other settings are renamed.

    :param run: the run
    """
    if run.other_results():
        names = (run.folder.with_name(f"{run.folder.name}.old-{n}") for n in itertools.count(1))
        run.folder.rename(next(name for name in names if not name.exists()))
    run.folder.mkdir(parents=True, exist_ok=True)
    if not run.can_resume():
        (run.folder / "evaluations.csv").unlink(missing_ok=True)
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
        (run.folder / VERSIONS).unlink(missing_ok=True)
        with atomic_file(run.folder / "settings.json") as file:
            file.write(json.dumps(run.settings, indent=2).encode())
    (run.folder / "run.json").unlink(missing_ok=True)
    section = zoo_section(VARIANTS.get(run.algorithm, (run.algorithm,))[0], run.task)
    if section is not None:
        (run.folder / "hyperparams.yml").write_text(yaml.safe_dump({run.task: section}))


def execute(run: Run) -> str | None:
    """
    :param run: run to execute in a new process
    :return: None, or a description of the failure
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = run.folder / "log.txt"
    try:
        locked = lock(run.folder)
    except InUseError as error:
        return str(error)
    with locked:
        if run.finished():  # by another study in the meantime
            return None
        prepare(run)
        command = run.command()
        # Workers of Ray may have been started in any folder
        python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {
            "PYTHONPATH": python_path,
            "OMP_NUM_THREADS": str(run.threads),
            STUDY_PROCESS: str(os.getpid()),
        }
        with log.open("a") as file:
            print(shlex.join(command), file=file, flush=True)
            process = start(command, stdout=file, stderr=subprocess.STDOUT, env=environment, pass_fds=[locked.fileno()])
        if process is None:
            return "not started, as the study was stopped"
        print(f"process {process.pid} on {platform.node()}", file=locked, flush=True)
    try:
        # Not process.wait(), which Ray cannot cancel
        while (code := process.poll()) is None:
            time.sleep(0.1)
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        with running_lock:
            running.discard(process)
    if code:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1]
        return f"exit status {code}: {last} (see {log})"
    return None if run.finished() else f"it ended without writing run.json (see {log})"


def start(command: list[str], **kwargs: Any) -> subprocess.Popen | None:
    """
    :param command: command of a run
    :param kwargs: arguments of ``subprocess.Popen``
    :return: its process, None if the study is being stopped
    """
    with running_lock:
        if stopping.is_set():
            return None
        # In its own session: on Ctrl-C or a closed terminal it gets a single SIGTERM from the study
        process = subprocess.Popen(command, start_new_session=True, **kwargs)
        running.add(process)
        return process


def stop() -> None:
    """Start no further runs and terminate those that are running, MRQ with a checkpoint."""
    with running_lock:
        stopping.set()
        for process in running:
            process.terminate()


running: set[subprocess.Popen] = set()
running_lock = threading.Lock()
stopping = threading.Event()


def run_locally(runs: list[Run], jobs: int) -> Generator[tuple[Run, str | None], None, None]:
    """
    :param runs: runs to execute
    :param jobs: number of parallel runs
    :return: runs and their failures, or None, in order of completion
    """
    stopping.clear()
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        try:
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], future.result() if error is None else repr(error)
        except BaseException:
            # Ctrl-C, or an error of the caller
            pool.shutdown(wait=False, cancel_futures=True)
            stop()
            raise


def run_on_ray(runs: list[Run], address: str | None, jobs: int | None) -> Generator[tuple[Run, str | None], None, None]:
    """
    Like ``run_locally``, on a Ray cluster.

    :param runs: runs to execute
    :param address: address of the cluster, None to start one on this machine
    :param jobs: number of parallel runs, None for as many as there are processors for
    :return: runs and their failures, or None, in order of completion
    """
    import ray

    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    # Ray hides all GPUs from a task that requests no share of one
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    remote = ray.remote(execute_on_ray)

    def submit(run: Run) -> Any:
        gpus = gpu_share(run.device, has_gpus)
        return remote.options(num_cpus=run.threads, num_gpus=gpus, max_retries=0).remote(run)

    queue = iter(runs)
    waiting = {submit(run): run for run in itertools.islice(queue, jobs)}
    try:
        # Again, as ray.init has installed its own handlers, which would end the study at once
        with signals_as_ctrl_c():
            while waiting:
                (done,), _ = ray.wait(list(waiting))
                run = waiting.pop(done)
                waiting |= {submit(following): following for following in itertools.islice(queue, 1)}
                try:
                    yield run, ray.get(done)
                except ray.exceptions.RayError as error:
                    yield run, str(error)
    finally:
        for task in waiting:
            ray.cancel(task)
        if waiting:
            # Runs of MRQ write a checkpoint
            ray.wait(list(waiting), num_returns=len(waiting), timeout=CHECKPOINT_SECONDS)
        ray.shutdown()


def execute_on_ray(run: Run) -> str | None:
    """
    Like ``execute``, but cancellable by Ray. Ray sends SIGINT, which its workers ignore if the study was started in the
    background of a script.

    :param run: run to execute
    :return: None, or a description of the failure
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return execute(run)


def gpu_share(device: str, has_gpus: bool) -> float:
    """
    :param device: device of a run
    :param has_gpus: whether the cluster has GPUs
    :return: fraction of a GPU that it needs
    """
    return 1 / RUNS_PER_GPU if device.startswith("cuda") or (device == "auto" and has_gpus) else 0.0


def jobs_here(threads: int, device: str) -> int:
    """
    :param threads: number of threads of each run
    :param device: device of the runs
    :return: number of parallel runs on this machine: one per processor, at most ``RUNS_PER_GPU`` on a GPU
    """
    jobs = max(1, len(os.sched_getaffinity(0)) // threads)
    # All runs use the same GPU, even if there are several
    return min(jobs, RUNS_PER_GPU) if gpu_share(device, th.cuda.is_available()) else jobs


def finished_runs(out: Path) -> dict[Run, dict[str, Any]]:
    """
    :param out: folder of a study
    :return: finished runs in the folder, of any command, and their records
    """
    runs = {}
    out = out.resolve()
    for path in out.glob("runs/*/*/*/run.json"):
        record = read_json(path) or {}
        settings = record.get("settings")
        if settings is not None:
            run = Run(**settings | {"out": str(out), "hyperparams": tuple(settings["hyperparams"])})
            # Not the renamed ones
            if run.folder == path.parent:
                runs[run] = record
    return dict(sorted(runs.items(), key=lambda item: (item[0].task, item[0].algorithm, item[0].seed)))


def gather(runs: Iterable[Run], out: Path) -> int:
    """
    Write the results of all finished runs in a folder to its table, ``results.csv``.

    :param runs: runs of the current command; older results of these with other settings are left out
    :param out: folder of the study
    :return: number of runs in the table
    """
    now = {run.folder: run for run in runs}
    finished = {run: record for run, record in finished_runs(out).items() if now.get(run.folder, run).settings == run.settings}
    table = io.StringIO()
    writer = csv.DictWriter(table, RESULT_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run, record in finished.items():
        of_run = {"algorithm": run.algorithm, "versions": record["versions"], "machine": record["machine"]}
        with (run.folder / "evaluations.csv").open(newline="") as evaluations:
            # A rollout may end beyond the requested number of steps
            writer.writerows(row | of_run for row in csv.DictReader(evaluations) if int(row["step"]) <= run.steps)
    # Another study may be writing the same table
    with atomic_file(out / "results.csv") as file:
        file.write(table.getvalue().encode())
    return len(finished)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[Run]]:
    """
    :param arguments: arguments of the command line, None for ``sys.argv``
    :return: parsed arguments, and all runs of the study
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=SUITES, help="tasks of the paper")
    what.add_argument("--tasks", nargs="+", help="ids of environments")
    parser.add_argument("--algos", default="mrq", help="mrq, drq, algorithms of rl-zoo3, and " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="environment steps (default: the paper's)")
    parser.add_argument("--eval-freq", type=int, help="steps between two evaluations (default: the paper's)")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument(
        "--hyperparams", nargs="+", default=[], metavar="NAME:VALUE", help="hyperparameters of all runs, as for rl-zoo3"
    )
    parser.add_argument("--out", type=Path, help="folder of the study (default: runs/study-<suite>, runs/study for --tasks)")
    parser.add_argument(
        "--jobs", type=int, help=f"parallel runs (default: one per processor, but at most {RUNS_PER_GPU} on a GPU)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", choices=["local", "ray"], default="local")
    parser.add_argument("--ray-address", help="address of a Ray cluster (default: start one on this machine)")
    args = parser.parse_args(arguments)
    args.out = args.out or Path("runs", f"study-{args.suite}" if args.suite else "study")

    # No duplicates: two runs cannot share a folder
    algorithms = list(dict.fromkeys(name.strip() for name in args.algos.split(",")))
    tasks = SUITES[args.suite][0] if args.suite else tuple(dict.fromkeys(args.tasks))
    known = {*rl_zoo3.ALGOS, *VARIANTS, *ALGORITHMS}
    for algorithm in algorithms:
        if algorithm not in known:
            parser.error(f"there is no algorithm {algorithm}.{closest(algorithm, known)}")
    runs = []
    # Seeds in the outer loop: an interrupted study has results of every task
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for task in tasks:
            _, papers, eval_freq = next((suite for suite in SUITES.values() if task in suite[0]), (None, None, 5_000))
            steps = args.steps or papers
            if steps is None:
                parser.error(f"--steps is needed for {task}, which is not among the paper's tasks.")
            for algorithm in algorithms:
                runs.append(
                    Run(
                        task,
                        algorithm,
                        seed,
                        steps,
                        args.eval_freq or min(eval_freq, steps),
                        args.eval_episodes,
                        str(args.out.resolve()),
                        args.threads,
                        args.device,
                        tuple(args.hyperparams),
                    )
                )
    return args, runs


@contextlib.contextmanager
def signals_as_ctrl_c() -> Iterator[None]:
    """
    Raise ``KeyboardInterrupt`` on SIGTERM and SIGHUP, unless they are ignored, as under nohup.
    """

    def interrupt(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    numbers = (signal.SIGTERM, signal.SIGHUP) if threading.current_thread() is threading.main_thread() else ()
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            # None is a handler that was not installed from Python and cannot be restored
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def collect(
    outcomes: Generator[tuple[Run, str | None], None, None], runs: list[Run], n_to_do: int, out: Path
) -> dict[str, str]:
    """
    Update the table after each run.

    :param outcomes: runs and their failures, or None, in order of completion
    :param runs: all runs of the study
    :param n_to_do: number of runs to execute
    :param out: folder of the study
    :return: failures by name of the run
    """
    failures = {}
    with contextlib.closing(outcomes), tqdm(total=n_to_do, unit="run") as progress:
        for run, failure in outcomes:
            progress.update()
            if failure is not None:
                failures[run.name] = failure
                progress.write(f"{run.name} failed")
            try:
                gather(runs, out)
            except Exception as error:  # such as a full disk, for now: the other runs continue
                progress.write(f"{out / 'results.csv'} could not be written: {error!r}")
    return failures


def main(arguments: list[str] | None = None) -> None:
    args, runs = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    to_do = [run for run in runs if not run.finished()]
    table = args.out / "results.csv"
    print(f"{len(runs)} runs, {len(runs) - len(to_do)} of them already finished. Results go to {table}.")
    for run in to_do:
        if run.other_results():
            print(f"{run.folder} has results of other settings and will be renamed to {run.folder.name}.old-<n>.")
    jobs = args.jobs or jobs_here(args.threads, args.device)
    outcomes = run_on_ray(to_do, args.ray_address, args.jobs) if args.backend == "ray" else run_locally(to_do, jobs)
    try:
        with signals_as_ctrl_c():
            failures = collect(outcomes, runs, len(to_do), args.out)
    except KeyboardInterrupt:
        print(f"Stopped. {gather(runs, args.out)} runs are in {table}. Repeat the command to continue.", flush=True)
        sys.exit(128 + signal.SIGINT)
    n_in_table = gather(runs, args.out)
    n_finished = sum(run.finished() for run in runs)
    before = f", and {n_in_table - n_finished} of other commands" if n_in_table > n_finished else ""
    print(f"{n_finished} of {len(runs)} runs are in {table}{before}.")
    for name, failure in failures.items():
        print(f"FAILED {name}: {failure}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    # Under its own name, from which the workers of Ray can import
    from benchmarks import study

    study.main()
