"""
Time

- updates, compared with their matrix products alone and with a plain implementation,
- sampling from a large buffer, compared with a small one,
- acting and the loop around the updates, compared with SB3's TD3,

and measure the memory of the replay buffer, compared with SB3's.

    python -m benchmarks.speed --out benchmarks/results/speed.json
    python -m benchmarks.speed --device cuda --train HalfCheetah-v5 ALE/Pong-v5

The sizes are HalfCheetah's: 17 observations, 6 actions, batch 256. Images are three of 84 x 84 in colour. Every ratio is of
two figures of the same run.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3 import TD3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import resident
from benchmarks.plain import Plain
from sb3_mrq import MRQ
from sb3_mrq.accelerate.device_copy import DeviceCopy
from sb3_mrq.accelerate.precision import fast_precisions
from sb3_mrq.buffers import NStepSamples, SubtrajectoryReplayBuffer, SubtrajectorySamples
from sb3_mrq.compare.versions import processor
from sb3_mrq.envs import AtariWrapper
from sb3_mrq.losses import n_step_return

OBSERVATIONS = spaces.Box(-np.inf, np.inf, (17,), np.float32)
ACTIONS = spaces.Box(-1, 1, (6,), np.float32)
EPISODE_LENGTH = 1000
# Training steps before the timed ones. After the second replacement of the targets everything is compiled and captured.
TRAIN_WARM_UP = 255


class NoiseEnv(gym.Env):
    """Spaces of HalfCheetah, with random observations and rewards."""

    observation_space = OBSERVATIONS
    action_space = ACTIONS

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        return self._observe(), float(self.np_random.normal()), False, self.steps >= EPISODE_LENGTH, {}

    def _observe(self) -> np.ndarray:
        return self.np_random.normal(size=OBSERVATIONS.shape).astype(np.float32)


class ImageNoiseEnv(NoiseEnv):
    """Random images with the shape of the DeepMind Control suite's."""

    observation_space = spaces.Box(0, 255, (9, 84, 84), np.uint8)

    def _observe(self) -> np.ndarray:
        return self.np_random.integers(0, 256, self.observation_space.shape, dtype=np.uint8)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if th.cuda.is_available():
        th.cuda.synchronize()


def fastest(function: Callable[[], Any], seconds: float = 3.0, at_least: int = 5) -> float:
    """
    :param function: function to time
    :param seconds: time in which to repeat it
    :param at_least: fewest calls
    :return: seconds of the fastest call, including work on the GPU
    """
    function()
    synchronize()
    end = time.perf_counter() + seconds
    times: list[float] = []
    while time.perf_counter() < end or len(times) < at_least:
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def matmul_rate(dtype: th.dtype, device: str, seconds: float) -> float:
    """
    :param dtype: data type of the matrices
    :param device: device of the matrices
    :param seconds: time to measure
    :return: floating-point operations a second of 256 x 512 x 512 products
    """
    a, b = (th.randn(shape, device=device).to(dtype) for shape in ((256, 512), (512, 512)))
    n = 20 if device == "cpu" else 1000

    def products() -> None:
        for _ in range(n):
            a @ b

    return n * 2 * 256 * 512 * 512 / fastest(products, seconds)


def time_plain(model: MRQ, subtrajectories: SubtrajectorySamples, n_step: NStepSamples, seconds: float) -> float:
    """
    :param model: model with the discount factor and the device
    :param subtrajectories: batch of the encoder update
    :param n_step: batch of the value and policy update
    :param seconds: time to measure
    :return: seconds of the two updates by the plain implementation
    """
    plain = Plain(OBSERVATIONS.shape[0], ACTIONS.shape[0], model.device)
    noise = th.randn(len(n_step.indices), ACTIONS.shape[0], device=model.device)
    returns, discount = n_step_return(n_step.rewards, n_step.terminated, n_step.mask, model.gamma)

    def update() -> None:
        plain.update_encoder(
            subtrajectories.observations,  # type: ignore[arg-type]
            subtrajectories.actions.float(),
            subtrajectories.rewards,
            subtrajectories.terminated,
            subtrajectories.mask,
        )
        obs, next_obs = n_step.observations, n_step.next_observations
        plain.update_value_and_policy(obs, n_step.actions.float(), returns, discount, next_obs, 1.0, 1.0, noise)  # type: ignore

    return fastest(update, seconds)


def modes(device: str, without_compiling: bool) -> list[str]:
    """
    :param device: cpu or cuda
    :param without_compiling: whether to leave out compiled updates, each of which takes half a minute to compile
    :return: ways to run updates. Captured ones also draw their batches and set priorities.
    """
    ways = ["eager", "compiled"] if device == "cpu" else ["eager", "captured", "compiled and captured"]
    return [way for way in ways if not (without_compiling and "compiled" in way)]


def time_updates(device: str, seconds: float, without_compiling: bool = False, images: bool = False) -> dict[str, Any]:
    """
    :param device: cpu or cuda
    :param seconds: time to measure each figure
    :param without_compiling: see ``modes``
    :param images: whether observations are images, for which there is no plain implementation
    :return: milliseconds of the two updates in each of ``fast_precisions`` and ``modes``, the ratio of the floor to them, and
        their speed relative to the plain implementation. The floor is the time of matrix products with as many operations.
    """
    policy, env = ("CnnPolicy", ImageNoiseEnv()) if images else ("MlpPolicy", NoiseEnv())
    model = MRQ(
        policy,
        env,
        buffer_size=1000,
        learning_starts=500,
        target_update_interval=5,
        seed=0,
        device=device,
        compile_updates=False,
    )
    model.learn(501, log_interval=None)  # type: ignore[arg-type]
    assert model.replay_buffer is not None
    subtrajectories = model.replay_buffer.sample(model.batch_size)
    n_step = model.replay_buffer.sample_n_step(model.batch_size)

    def update_encoder() -> None:
        if model.updates.on_device:
            model.updates.encoder()
        else:
            model.learner.update_encoder(subtrajectories)

    def update_value_and_policy() -> None:
        if model.updates.on_device:
            model.updates.value_and_policy()
        else:
            model.learner.update_value_and_policy(n_step)

    gflop = {}
    for name, update in (("encoder", update_encoder), ("value_and_policy", update_value_and_policy)):
        with FlopCounterMode(display=False) as counter:
            update()
        gflop[name] = counter.get_total_flops() / 1e9
    figures: dict[str, Any] = {"gflop": gflop}
    if not images:
        figures["plain_ms"] = 1e3 * time_plain(model, subtrajectories, n_step, seconds)
    for precision in fast_precisions(th.device(device)):
        th.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        rate = matmul_rate(th.bfloat16 if precision == "bfloat16" else th.float32, device, seconds)
        th.set_float32_matmul_precision("highest")
        floor = 1e12 * sum(gflop.values()) / rate
        row: dict[str, Any] = {"matmul_gflops": rate / 1e9, "floor_ms": floor}
        for mode in modes(device, without_compiling):
            model.learner.hyperparameters = replace(model.learner.hyperparameters, precision=precision)
            model.updates.compile("compiled" in mode)
            model.updates.release()
            model.updates.may_capture = "captured" in mode
            start = time.perf_counter()
            model.updates.prepare(model.replay_buffer, model.batch_size)
            for _ in range(5):
                update_encoder()
                update_value_and_policy()
            synchronize()
            if "captured" in mode and not model.updates.captured:
                sys.exit("The updates could not be captured.")
            first = time.perf_counter() - start
            encoder, value = 1e3 * fastest(update_encoder, seconds), 1e3 * fastest(update_value_and_policy, seconds)
            row[mode] = {
                "first_s": first,
                "encoder_ms": encoder,
                "value_and_policy_ms": value,
                "update_ms": encoder + value,
                "floor_to_update": floor / (encoder + value),
            }
            if "plain_ms" in figures:
                row[mode]["plain_to_update"] = figures["plain_ms"] / (encoder + value)
        figures[precision] = row
    return figures


def time_training(env_id: str, device: str, steps: int, without_compiling: bool) -> dict[str, float]:
    """
    :param env_id: environment
    :param device: cpu or cuda
    :param steps: environment steps, each with a training step
    :param without_compiling: whether to train uncompiled, on a GPU still captured
    :return: steps a second of whole training, simulation included, in the last of ``fast_precisions``
    """
    precision = fast_precisions(th.device(device))[-1]
    atari = env_id.startswith("ALE/")
    env = make_vec_env(lambda: AtariWrapper(gym.make(env_id)) if atari else gym.make(env_id), seed=0)
    policy = "CnnPolicy" if atari else "MlpPolicy"
    without: bool | str = False if device == "cpu" else "auto"
    compile_updates = without if without_compiling else True
    model = MRQ(policy, env, learning_starts=500, seed=0, device=device, compile_updates=compile_updates, precision=precision)
    model.learn(500 + TRAIN_WARM_UP)
    start = time.perf_counter()
    model.learn(steps, reset_num_timesteps=False)
    synchronize()
    return {"steps_per_second": steps / (time.perf_counter() - start)}


def time_parallel_training(device: str, steps: int, n_envs: int) -> dict[str, float]:
    """
    :param device: cpu or cuda
    :param steps: training steps to time, a multiple of ``n_envs`` and of the interval of the targets below
    :param n_envs: number of environments
    :return: training steps a second with one environment and with ``n_envs``, simulation included, in the last of
        ``fast_precisions``, uncompiled
    """
    interval, figures = 8, {}
    for n in (1, n_envs):
        model = MRQ(
            "MlpPolicy",
            DummyVecEnv([NoiseEnv] * n),
            learning_starts=512,
            target_update_interval=interval,
            seed=0,
            device=device,
            precision=fast_precisions(th.device(device))[-1],
            compile_updates=False,
        )
        model.learn(512 + interval)
        start = time.perf_counter()
        model.learn(steps, reset_num_timesteps=False)
        synchronize()
        figures[f"{n}_per_second"] = steps / (time.perf_counter() - start)
    return {**figures, "ratio": figures[f"{n_envs}_per_second"] / figures["1_per_second"]}


def time_acting(device: str, seconds: float) -> dict[str, float]:
    """
    :param device: cpu or cuda
    :param seconds: time to measure
    :return: microseconds of ``predict`` for one observation, by MRQ and by TD3
    """
    obs = np.zeros(OBSERVATIONS.shape, dtype=np.float32)
    figures = {}
    for name, algorithm in (("mrq", MRQ), ("td3", TD3)):
        model = algorithm("MlpPolicy", NoiseEnv(), buffer_size=1000, device=device)
        figures[f"{name}_us"] = 1e6 * fastest(lambda model=model: model.predict(obs, deterministic=True), seconds, 100)
    return {**figures, "mrq_to_td3": figures["mrq_us"] / figures["td3_us"]}


def time_loop(device: str, steps: int, n_envs: int) -> dict[str, float]:
    """
    :param device: cpu or cuda
    :param steps: steps of the environments
    :param n_envs: number of environments
    :return: microseconds of a step of training without its updates (acting, stepping, storing), by MRQ and by TD3, with random
        actions and when acting
    """
    figures = {}
    for phase, learning_starts in (("random", steps), ("acting", 0)):
        for name, algorithm in (("mrq", MRQ), ("td3", TD3)):
            env = DummyVecEnv([NoiseEnv] * n_envs)
            model = algorithm("MlpPolicy", env, learning_starts=learning_starts, gradient_steps=0, device=device, seed=0)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Nothing will be learned")
                model.learn(100)
                forward = time_forward(model)
                start = time.perf_counter()
                model.learn(steps)
            figures[f"{name}_{phase}_us"] = 1e6 * (time.perf_counter() - start) / steps
            if phase == "acting":
                figures[f"{name}_networks_us"] = 1e6 * sum(forward) / steps
        figures[f"mrq_to_td3_{phase}"] = figures[f"mrq_{phase}_us"] / figures[f"td3_{phase}_us"]
    return figures


def time_forward(model: Any) -> list[float]:
    """
    :param model: MRQ or TD3
    :return: list to which each forward pass of the networks that act adds its seconds from now on
    """
    seconds: list[float] = []
    networks = [model.encoder.state, model.actor] if hasattr(model, "encoder") else [model.actor]
    for network in networks:

        def timed(*args: Any, forward: Callable[..., Any] = network.forward) -> Any:
            start = time.perf_counter()
            output = forward(*args)
            seconds.append(time.perf_counter() - start)
            return output

        network.forward = timed
    return seconds


class OperationCounter(TorchDispatchMode):
    """Counts the operations of torch, without views. On a GPU each is a kernel or more."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += (
            not func.is_view and func._schema.name.startswith("aten::") and func is not th.ops.aten._unsafe_view.default
        )
        return func(*args, **(kwargs or {}))


def count_operations() -> dict[str, int]:
    """
    :return: operations of the two updates in float32, with the replay buffer on a device, counted on the host
    """
    sizes = dict(buffer_size=100, learning_starts=50, target_update_interval=2)
    model = MRQ("MlpPolicy", NoiseEnv(), **sizes, device="cpu", precision="float32", compile_updates=False)
    model.learn(52, log_interval=None)  # type: ignore[arg-type]
    assert model.replay_buffer is not None
    copy = DeviceCopy(model.replay_buffer, th.device("cpu"))
    copy.flush()
    model.updates._copy = copy
    figures = {}
    for name, update in (("encoder", model.updates._encoder_step), ("value_and_policy", model.updates._value_step)):
        with OperationCounter() as counter:
            update()
        figures[name] = counter.count
    return figures


def full_buffer(size: int, buffer_class: type[ReplayBuffer] = SubtrajectoryReplayBuffer, n_envs: int = 10) -> Any:
    """
    :param size: number of slots
    :param buffer_class: class of the buffer
    :param n_envs: number of environments
    :return: a buffer with a transition, or a final observation, in each slot
    """
    buffer = buffer_class(size, OBSERVATIONS, ACTIONS, device="cpu", n_envs=n_envs)
    random = np.random.default_rng(0)
    obs = random.normal(size=(n_envs, *OBSERVATIONS.shape)).astype(np.float32)
    step = 0
    while not buffer.full:
        step += 1
        next_obs = random.normal(size=obs.shape).astype(np.float32)
        done = np.full(n_envs, step % EPISODE_LENGTH == 0)
        buffer.add(
            obs,
            next_obs,
            random.uniform(-1, 1, (n_envs, *ACTIONS.shape)),
            random.normal(size=n_envs),
            done,
            [{"TimeLimit.truncated": bool(done[0])}] * n_envs,
        )
        obs = random.normal(size=obs.shape).astype(np.float32) if done[0] else next_obs
    return buffer


def time_sampling(small: int, large: int) -> dict[str, float]:
    """
    :param small: slots of the small buffer
    :param large: slots of the large buffer
    :return: milliseconds of the two batches of a training step from each, and their ratio
    """
    buffers = [full_buffer(size) for size in (small, large)]
    # Alternately, so that both see the same load of the machine
    times: list[list[float]] = [[], []]
    for _ in range(400):
        for index, buffer in enumerate(buffers):
            start = time.perf_counter()
            buffer.sample(256)
            buffer.sample_n_step(256)
            times[index].append(time.perf_counter() - start)
    small_ms, large_ms = (1e3 * float(np.median(values)) for values in times)
    return {"small_ms": small_ms, "large_ms": large_ms, "large_to_small": large_ms / small_ms}


def measure_memory(size: int) -> dict[str, float]:
    """
    :param size: slots of the buffers
    :return: resident megabytes of a full replay buffer, and of SB3's with as many transitions
    """
    figures = {}
    for name, buffer_class in (("mrq", SubtrajectoryReplayBuffer), ("sb3", ReplayBuffer)):
        before = resident()
        buffer = full_buffer(size, buffer_class)
        figures[f"{name}_mb"] = (resident() - before) / 1e6
        del buffer
    # A small buffer may fit into memory that earlier ones left
    return {**figures, "mrq_to_sb3": figures["mrq_mb"] / max(figures["sb3_mb"], 0.001)}


def table(figures: dict[str, Any]) -> str:
    """
    :param figures: all figures
    :return: a table of the most important ones
    """
    lines = [f"{'':44} {'this':>10} {'reference':>10} {'ratio':>7}"]

    def line(what: str, this: float, reference: float, unit: str) -> None:
        ratio = this / max(reference, 0.001)
        lines.append(f"{what:44} {this:7.1f} {unit} {reference:7.1f} {unit} {ratio:7.2f}")

    fastest_update: dict[str, float] = {}
    for name, update in (("update", figures["update"]), ("update, images", figures["image_update"])):
        for precision, row in update.items():
            for mode, timed in row.items() if precision not in ("gflop", "plain_ms") else ():
                if isinstance(timed, dict):
                    fastest_update[name] = min(timed["update_ms"], fastest_update.get(name, math.inf))
                    line(f"{name}, {precision}, {mode} / floor", timed["update_ms"], row["floor_ms"], "ms")
                    if "plain_ms" in update:
                        line("    / plain implementation", timed["update_ms"], update["plain_ms"], "ms")
    if "bfloat16" not in figures["update"]:
        lines.append("update, bfloat16: left out, as this device has no instructions for it")
    for name, this, reference, unit in (
        ("sampling, large / small buffer", "large_ms", "small_ms", "ms"),
        ("memory / SB3's replay buffer", "mrq_mb", "sb3_mb", "MB"),
        ("acting / TD3", "mrq_us", "td3_us", "us"),
    ):
        row = figures[name.split(",")[0].split(" /")[0]]
        line(name, row[this], row[reference], unit)
    line("sampling / fastest update", figures["sampling"]["large_ms"], fastest_update["update"], "ms")
    row = figures["parallel_training"]
    line("training steps a second, 8 environments / 1", row["8_per_second"], row["1_per_second"], "/s")
    for n_envs, row in figures["loop"].items():
        for phase in ("random", "acting"):
            line(f"loop, {n_envs} environments, {phase} / TD3", row[f"mrq_{phase}_us"], row[f"td3_{phase}_us"], "us")
        without = (row[f"{name}_acting_us"] - row[f"{name}_networks_us"] for name in ("mrq", "td3"))
        line("    acting, without the networks", *without, "us")
    lines.append(f"operations: {figures['operations']}")
    for env_id, row in figures["training"].items():
        lines.append(f"training, {env_id}: {row['steps_per_second']:.1f} steps a second")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch")
    parser.add_argument("--large", type=int, default=1_000_000, help="slots of the large buffer (default: %(default)s)")
    parser.add_argument("--small", type=int, default=10_000, help="slots of the small buffer (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to measure each figure (default: %(default)s)")
    parser.add_argument("--without-compiling", action="store_true", help="leave out compiled updates")
    parser.add_argument("--train", nargs="*", default=[], metavar="ENV", help="environments in which to time whole training")
    parser.add_argument(
        "--train-steps", type=int, default=2_000, help="environment steps of whole training (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write the figures to")
    args = parser.parse_args(arguments)
    if args.threads:
        th.set_num_threads(args.threads)
    gpu = f", {th.cuda.get_device_name()}" if args.device == "cuda" else ""
    figures: dict[str, Any] = {
        "command": f"python -m benchmarks.speed {shlex.join(sys.argv[1:] if arguments is None else arguments)}",
        "machine": f"{processor()}, {th.get_num_threads()} threads of torch{gpu}",
        "versions": {"python": platform.python_version(), "torch": version("torch"), "numpy": version("numpy")},
    }
    parts: dict[str, Callable[[], Any]] = {
        # First, while the memory of this process is its own
        "memory": lambda: measure_memory(args.large),
        "sampling": lambda: time_sampling(args.small, args.large),
        "update": lambda: time_updates(args.device, args.seconds, args.without_compiling),
        "image_update": lambda: time_updates(args.device, args.seconds, args.without_compiling, images=True),
        "operations": count_operations,
        "acting": lambda: time_acting(args.device, args.seconds),
        "loop": lambda: {n_envs: time_loop(args.device, int(1000 * args.seconds), n_envs) for n_envs in (1, 8)},
        "parallel_training": lambda: time_parallel_training(args.device, 16 * max(1, int(args.seconds)), 8),
        "training": lambda: {
            env_id: time_training(env_id, args.device, args.train_steps, args.without_compiling) for env_id in args.train
        },
    }
    for name, measure in parts.items():
        figures[name] = measure()
        if args.out:
            # After each part, as a later one may fail
            args.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(table(figures))


if __name__ == "__main__":
    main()
