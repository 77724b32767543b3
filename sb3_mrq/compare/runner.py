"""
Runs of a comparison side by side on this machine, or on a Ray cluster.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict

import torch as th
from joblib import cpu_count
from tqdm import tqdm

from sb3_mrq.compare.runs import Run

#: runs that share a GPU, which is busy for most of a training step and serves one process at a time
RUNS_PER_GPU = 2
#: set when no further runs should start, and running ones should end
stopping = threading.Event()

Futures = dict[Future, Run]


def execute(run: Run) -> str | None:
    """
    :param run: run to execute in a new process
    :return: None, or a description of the failure
    """
    if threading.current_thread() is threading.main_thread():
        # Ray cancels by SIGINT, which its workers ignore if the comparison was started in the background of a script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder / "log.txt"
    command = [sys.executable, "-m", "sb3_mrq.compare.train", json.dumps(asdict(run))]
    environment = os.environ | {"OMP_NUM_THREADS": str(run.threads)}
    with path.open("a") as log:
        # In its own session: on Ctrl-C or a closed terminal it gets a single SIGTERM from here
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        # Not process.wait(), which Ray cannot cancel
        while process.poll() is None and not stopping.wait(0.1):
            pass
    finally:
        process.terminate()
        process.wait()
    if process.returncode == 0:
        return None
    last = [line for line in path.read_text().splitlines() if line.strip()][-1:]
    return f"exit status {process.returncode}: {''.join(last)} (see {path})"


@contextlib.contextmanager
def local_runs(runs: Sequence[Run], jobs: int | None) -> Iterator[Futures]:
    """
    :param runs: runs to execute on this machine
    :param jobs: number of runs side by side, None for one per processor, but at most ``RUNS_PER_GPU`` on a GPU
    :return: context manager that starts the runs, and ends those that are left
    """
    stopping.clear()
    processors = max(1, cpu_count() // max((run.threads for run in runs), default=1))
    on_gpu = any(run.device.startswith("cuda") or (run.device == "auto" and th.cuda.is_available()) for run in runs)
    # All runs use the same GPU, even if there are several
    pool = ThreadPoolExecutor(jobs or (min(processors, RUNS_PER_GPU) if on_gpu else processors))
    try:
        yield {pool.submit(execute, run): run for run in runs}
    finally:
        stopping.set()
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def ray_runs(runs: Sequence[Run], address: str | None) -> Iterator[Futures]:
    """
    :param runs: runs to execute on a Ray cluster, as many side by side as it has processors for
    :param address: address of the cluster, None to start one on this machine
    :return: context manager that starts the runs, and ends those that are left
    """
    import ray

    ray.init(address=address, ignore_reinit_error=True, log_to_driver=False)
    # Ray hides all GPUs from a task that requests no share of one
    gpus = 1 / RUNS_PER_GPU if ray.cluster_resources().get("GPU", 0) > 0 else 0.0
    remote = ray.remote(execute)
    tasks = [
        remote.options(num_cpus=run.threads, num_gpus=0.0 if run.device == "cpu" else gpus, max_retries=0).remote(run)
        for run in runs
    ]
    try:
        yield {task.future(): run for task, run in zip(tasks, runs, strict=True)}
    finally:
        for task in tasks:
            ray.cancel(task)
        # Runs of MR.Q write a checkpoint
        ray.wait(tasks, num_returns=len(tasks), timeout=300)
        ray.shutdown()


def run_all(runs: Sequence[Run], started: contextlib.AbstractContextManager[Futures]) -> dict[str, str]:
    """
    Execute runs with a progress bar of their steps.

    :param runs: all runs of the comparison, also finished ones
    :param started: context manager that starts those that are not finished
    :return: failures by name of the run
    :raises KeyboardInterrupt: on Ctrl-C, SIGTERM and SIGHUP, after the runs have ended
    """
    failures = {}
    n_steps, n_done = sum(run.steps for run in runs), sum(run.steps_done for run in runs)
    with started as futures, tqdm(total=n_steps, initial=n_done, unit=" steps", unit_scale=True) as bar:
        # After Ray, which installs its own handlers
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, signal.default_int_handler)
        pending = set(futures)
        while pending:
            done, pending = wait(pending, timeout=2, return_when=FIRST_COMPLETED)
            for future in done:
                run, error = futures[future], future.exception()
                failure = future.result() if error is None else repr(error)
                if failure is not None:
                    name = f"{run.algorithm} on {run.task}, seed {run.seed}"
                    failures[name] = failure
                    bar.write(f"{name} failed")
            bar.update(sum(run.steps_done for run in runs) - bar.n)
    return failures
