"""
Train every task, algorithm and seed of a study, several at once, and gather the results in one table.

    python -m benchmarks.study --suite dmc --algos mrq,td3,sac --seeds 3 --steps 30000 --out runs/dmc
    python -m benchmarks.study --tasks CartPole-v1 Acrobot-v1 --algos mrq,dqn,qrdqn --seeds 2 --steps 30000 --out runs/discrete

Each run is rl-zoo3's training script, with its hyperparameters, in a process of its own; it evaluates every so many steps,
before the first one too. When the same command is given again, runs that are finished are skipped, and those that were broken
off go on from their last checkpoint (those of other algorithms than MRQ begin anew). Runs that fail are named at the end.
``<out>/results.csv`` holds a row for every evaluation of every finished run in the folder, those of other commands too.

``--backend ray`` distributes the runs over a Ray cluster whose machines share the folder ``--out``.
"""

import argparse
import csv
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import rl_zoo3
import yaml
from tqdm import tqdm

from benchmarks.evaluation import COLUMNS
from sb3_mrq.checkpoints import list_checkpoints
from sb3_mrq.envs import ATARI_GAMES, DMC_TASKS, DMC_VISUAL_TASKS, GYM_LOCOMOTION
from sb3_mrq.zoo.configuration import closest
from sb3_mrq.zoo.exp_manager import CHECKPOINTS

#: tasks, training steps of the paper and steps between two evaluations
SUITES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "gym": (GYM_LOCOMOTION, 1_000_000, 5_000),
    "dmc": (DMC_TASKS, 500_000, 5_000),
    "dmc-visual": (DMC_VISUAL_TASKS, 500_000, 5_000),
    "atari": (ATARI_GAMES, 2_500_000, 100_000),
}

#: names of algorithms beside those of rl-zoo3: the algorithm, and hyperparameters as rl-zoo3's command line takes them
VARIANTS: dict[str, tuple[str, dict[str, str]]] = {
    "mrq-bfloat16": ("mrq", {"precision": "'bfloat16'"}),
    "mrq-no-encoder-loss": (
        "mrq",
        {"dynamics_loss_weight": "0.0", "reward_loss_weight": "0.0", "termination_loss_weight": "0.0"},
    ),
    "mrq-1-step": ("mrq", {"n_steps": "1"}),
    "mrq-uniform-replay": ("mrq", {"priority_alpha": "0.0"}),
}

#: section of rl-zoo3's configuration for continuous control that it has none for
ZOO_DEFAULTS = "HalfCheetah-v4"

RESULT_COLUMNS = ("task", "algorithm", "seed", "step", "return", "return_std", "length", "seconds", "versions", "machine")


@dataclass(frozen=True)
class Run:
    """
    One training run.

    :param task: id of the environment
    :param algorithm: of rl-zoo3, or one of ``VARIANTS``
    :param seed: seed of the run
    :param steps: of the environment
    :param eval_freq: steps between two evaluations
    :param eval_episodes: episodes of an evaluation
    :param out: folder of the study
    :param threads: threads of torch
    :param device: of torch
    :param hyperparams: in place of those of the configuration, ``name:value`` as for rl-zoo3
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
        """What its results depend on."""
        settings = asdict(self)
        for name in ("out", "threads"):
            del settings[name]
        return json.loads(json.dumps(settings))

    def command(self) -> list[str]:
        """The command that trains, which also takes what ``sb3-mrq train`` takes."""
        algo, hyperparams = VARIANTS.get(self.algorithm, (self.algorithm, {}))
        command = [sys.executable, "-m", "benchmarks.study_run", str(self.folder)]
        command += [str(self.eval_freq), str(self.eval_episodes)]
        command += ["--algo", algo, "--env", self.task, "--seed", str(self.seed), "--n-timesteps", str(self.steps)]
        command += ["--num-threads", str(self.threads), "--device", self.device, "--log-folder", str(self.folder / "zoo")]
        command += ["--eval-freq", "-1", "--verbose", "0"]
        if self.can_go_on():
            command += ["--trained-agent", str(self.folder / CHECKPOINTS)]
        section = zoo_section(algo, self.task)
        if section is not None:
            command += ["--conf-file", str(self.folder / "hyperparams.yml")]
        given = [*(f"{name}:{value}" for name, value in hyperparams.items()), *self.hyperparams]
        return command + (["--hyperparams", *given] if given else [])

    def can_go_on(self) -> bool:
        """
        :return: whether there is a checkpoint of a run with these settings
        """
        settings, checkpoints = self.folder / "settings.json", self.folder / CHECKPOINTS
        same = settings.exists() and json.loads(settings.read_text()) == self.settings
        return same and checkpoints.is_dir() and bool(list_checkpoints(checkpoints))

    def finished(self) -> bool:
        """
        :return: whether it has been run to its end, with these settings
        """
        record = self.folder / "run.json"
        return record.exists() and json.loads(record.read_text()).get("settings") == self.settings


def zoo_section(algo: str, task: str) -> dict[str, Any] | None:
    """
    :param algo: algorithm of rl-zoo3
    :param task: id of an environment
    :return: hyperparameters for a task that rl-zoo3 has none for: those of the same task in an older version, or those of
        ``ZOO_DEFAULTS`` for the DeepMind Control suite. None where its own are to be used.
    """
    if algo == "mrq" or task.startswith("ALE/"):
        return None
    sections = yaml.safe_load((Path(rl_zoo3.__file__).parent / "hyperparams" / f"{algo}.yml").read_text())
    base, _, number = task.rpartition("-v")
    if task in sections:
        return None
    for older in range(int(number) - 1, -1, -1) if number.isdigit() else ():
        if f"{base}-v{older}" in sections:
            return sections[f"{base}-v{older}"]
    return sections[ZOO_DEFAULTS] if task.startswith("dmc/") and ZOO_DEFAULTS in sections else None


def execute(run: Run) -> str | None:
    """
    :param run: what to run, in a new process
    :return: None, or what went wrong
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "run.json").unlink(missing_ok=True)
    if not run.can_go_on():
        (run.folder / "evaluations.csv").unlink(missing_ok=True)
        shutil.rmtree(run.folder / CHECKPOINTS, ignore_errors=True)
        (run.folder / "settings.json").write_text(json.dumps(run.settings, indent=2) + "\n")
    command = run.command()
    section = zoo_section(VARIANTS.get(run.algorithm, (run.algorithm,))[0], run.task)
    if section is not None:
        (run.folder / "hyperparams.yml").write_text(yaml.safe_dump({run.task: section}))
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads)}
    log = run.folder / "log.txt"
    with log.open("a") as file:
        print(shlex.join(command), file=file, flush=True)
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        with running_lock:
            running.add(process)
        try:
            code = process.wait()
        finally:
            with running_lock:
                running.discard(process)
    if code:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1]
        return f"exit status {code}: {last} (see {log})"
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({"settings": run.settings, **record}, indent=2) + "\n")
    return None


running: set[subprocess.Popen] = set()
running_lock = threading.Lock()


def run_locally(runs: list[Run], jobs: int) -> Iterator[tuple[Run, str | None]]:
    """
    :param runs: what to run
    :param jobs: how many at once
    :return: each with what went wrong, in the order in which they end
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(execute, run): run for run in runs}
        try:
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], future.result() if error is None else repr(error)
        except BaseException:
            # Ctrl-C: nothing new is started, and what is running ends, MRQ with a checkpoint
            pool.shutdown(wait=False, cancel_futures=True)
            with running_lock:
                for process in running:
                    process.terminate()
            raise


def run_on_ray(runs: list[Run], address: str | None) -> Iterator[tuple[Run, str | None]]:
    """
    As ``run_locally``, on a Ray cluster, as many at once as it has processors for.

    :param runs: what to run
    :param address: of the cluster, None for one on this machine
    """
    import ray

    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    remote = ray.remote(execute)
    gpus = 0.25 if any(run.device == "cuda" for run in runs) else 0
    waiting = {remote.options(num_cpus=run.threads, num_gpus=gpus, max_retries=0).remote(run): run for run in runs}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting))
            run = waiting.pop(done)
            try:
                yield run, ray.get(done)
            except ray.exceptions.RayError as error:
                yield run, str(error)
    finally:
        ray.shutdown()


def finished_runs(out: Path) -> dict[Run, dict[str, Any]]:
    """
    :param out: folder of a study
    :return: the runs in it that were finished, whichever command began them, with what they wrote down at their end
    """
    runs = {}
    for path in out.glob("runs/*/*/*/run.json"):
        record = json.loads(path.read_text())
        settings = record.get("settings")
        if settings is not None:
            run = Run(**settings | {"out": str(out.resolve()), "hyperparams": tuple(settings["hyperparams"])})
            runs[run] = record
    return dict(sorted(runs.items(), key=lambda item: (item[0].task, item[0].algorithm, item[0].seed)))


def gather(runs: Iterable[Run], out: Path) -> int:
    """
    Write the results of all finished runs in a folder to its table, ``results.csv``.

    :param runs: of the study as given now; those that are still to be made with other settings than before are left out
    :param out: folder of the study
    :return: number of runs in the table
    """
    now = {run.folder: run for run in runs}
    finished = {run: record for run, record in finished_runs(out).items() if now.get(run.folder, run).settings == run.settings}
    temporary = out / "results.tmp"
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(RESULT_COLUMNS)
        for run, record in finished.items():
            with (run.folder / "evaluations.csv").open(newline="") as evaluations:
                for row in csv.DictReader(evaluations):
                    measured = [row[name] for name in COLUMNS if name not in ("env", "seed", "timesteps")]
                    # A rollout may go on beyond the last step that was asked for
                    if int(row["timesteps"]) <= run.steps:
                        where = (record["versions"], record["machine"])
                        writer.writerow([run.task, run.algorithm, run.seed, row["timesteps"], *measured, *where])
    temporary.replace(out / "results.csv")
    return len(finished)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[Run]]:
    """
    :param arguments: of the command line, None for those of the process
    :return: the arguments, and all runs of the study
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--suite", choices=SUITES, help="tasks of the paper")
    what.add_argument("--tasks", nargs="+", help="ids of environments")
    parser.add_argument("--algos", default="mrq", help="of rl-zoo3, mrq, and " + ", ".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=10, help="number of seeds, from 0 on (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of the environment (default: the paper's)")
    parser.add_argument("--eval-freq", type=int, help="steps between two evaluations (default: the paper's)")
    parser.add_argument("--eval-episodes", type=int, default=10)
    parser.add_argument("--hyperparams", nargs="+", default=[], metavar="NAME:VALUE", help="for all runs, as for rl-zoo3")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--jobs", type=int, help="runs at once (default: one for each processor)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--backend", choices=["local", "ray"], default="local")
    parser.add_argument("--ray-address", help="of a Ray cluster (default: one on this machine)")
    args = parser.parse_args(arguments)

    algorithms = args.algos.split(",")
    known = {*rl_zoo3.ALGOS, *VARIANTS, "mrq"}
    for algorithm in algorithms:
        if algorithm not in known:
            parser.error(f"there is no algorithm {algorithm}.{closest(algorithm, known)}")
    runs = []
    # Seeds before tasks: a study that is broken off has something of every task
    for seed in range(args.seeds):
        for task in SUITES[args.suite][0] if args.suite else args.tasks:
            _, steps, eval_freq = next((suite for suite in SUITES.values() if task in suite[0]), (None, None, 5_000))
            if args.steps is None and steps is None:
                parser.error(f"--steps is needed for {task}")
            for algorithm in algorithms:
                runs.append(
                    Run(
                        task,
                        algorithm,
                        seed,
                        args.steps or steps,
                        args.eval_freq or min(eval_freq, args.steps or eval_freq),
                        args.eval_episodes,
                        str(args.out.resolve()),
                        args.threads,
                        args.device,
                        tuple(args.hyperparams),
                    )
                )
    return args, runs


def main(arguments: list[str] | None = None) -> None:
    args, runs = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    to_do = [run for run in runs if not run.finished()]
    print(f"{len(runs)} runs, {len(runs) - len(to_do)} of them finished before.")
    jobs = args.jobs or max(1, len(os.sched_getaffinity(0)) // args.threads)
    outcomes = run_on_ray(to_do, args.ray_address) if args.backend == "ray" else run_locally(to_do, jobs)
    failures = {}
    with tqdm(total=len(to_do), unit="run") as progress:
        for run, failure in outcomes:
            progress.update()
            if failure is not None:
                failures[run.name] = failure
                progress.write(f"{run.name} failed")
            gather(runs, args.out)
    n_in_table = gather(runs, args.out)
    n_finished = sum(run.finished() for run in runs)
    before = f", and {n_in_table - n_finished} of other commands" if n_in_table > n_finished else ""
    print(f"{n_finished} of {len(runs)} runs are in {args.out / 'results.csv'}{before}.")
    for name, failure in failures.items():
        print(f"FAILED {name}: {failure}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
