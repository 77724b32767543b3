"""
How updates and actions are computed: from the replay buffer on the host, or whole steps on a device as CUDA graphs.
"""

import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.vec_env import VecNormalize

from sb3_mrq.accelerate.compilation import CompiledFunction
from sb3_mrq.accelerate.device_copy import DeviceCopy
from sb3_mrq.accelerate.graphs import CaptureError, Graph, Staging, free_cached_memory
from sb3_mrq.accelerate.metrics import MetricMeans, Scalars
from sb3_mrq.accelerate.precision import tf32_products
from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.checks import DivergedError
from sb3_mrq.learner import Learner

NETWORKS = ("encoder", "critic", "actor")


def restore_groups(groups: list[dict[str, Any]], optimizer: th.optim.Optimizer) -> None:
    """
    Undo what capturing has changed in an optimiser's settings.

    :param groups: ``param_groups`` of the optimiser or of its state dict, changed in place
    :param optimizer: the optimiser
    """
    for group in groups:
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = optimizer.defaults["capturable"]


class Updates:
    """
    One encoder update, one value and policy update, and acting in a rollout.

    On a CUDA device each becomes a graph that is captured once and replayed, if it can be: replay buffer, weights, learning
    rates and everything random are on the device then, and a step of the environment takes one small copy there, of the new
    transition, one of the observation, and one back, of the action. If capturing fails, updates run uncaptured from then on,
    after a warning, with the same results.

    :param learner: computes the updates
    :param device: of the networks
    :param capture: whether to capture graphs: True, False, or ``"auto"``, which does not warn if it is clear from the outset
        that they cannot be captured
    :param verbose: Verbosity level
    """

    # Share of the memory that is free on a device that the replay buffer may take there
    SHARE_OF_DEVICE = 0.7

    def __init__(self, learner: Learner, device: th.device, capture: bool | str = "auto", verbose: int = 0):
        self.learner = learner
        self.device = device
        self.capture = capture
        self.verbose = verbose
        self.encoder_metrics = MetricMeans(device)
        self.value_policy_metrics = MetricMeans(device)
        # Whether the losses are compiled, and whether that has failed
        self.compiled = False
        self.compiling_failed = False
        self.may_capture = capture is not False and Graph.can_capture(device)
        self._weights: dict[str, list[th.Tensor]] = {}
        for name in NETWORKS:
            both = [getattr(learner, name), getattr(learner, f"{name}_target")]
            self._weights[name] = [tensor for network in both for tensor in (*network.parameters(), *network.buffers())]
        self.replay_buffer: SubtrajectoryReplayBuffer
        self.batch_size = 0
        self._vec_normalize: VecNormalize | None = None
        self._copy: DeviceCopy | None = None
        self._learning_rates = Scalars(device)
        self._noise = Scalars(device)
        self._observation: Staging | None = None
        self._observation_shapes: Any = None
        self._action: th.Tensor | None = None
        self._encoder = Graph(self._encoder_step, device, lambda: self._captured_constants("encoder"))
        self._value = Graph(self._value_step, device, lambda: self._captured_constants(*NETWORKS))
        self._act = Graph(self._act_step, device, lambda: self._weight_addresses("encoder", "actor"))

    # Choosing how

    def compile(self, compiled: bool) -> None:
        """
        Choose whether the losses are compiled from now on, which takes a while when they are next needed.

        :param compiled: whether to compile them
        """

        def transform(function: Callable[..., Any]) -> Callable[..., Any]:
            trial = self.learner.preserve_buffers_and_rng
            return CompiledFunction(function, self._give_up_compiling, trial) if compiled else function

        self.compiled = compiled
        self.learner.transform_losses(transform)

    def compile_on_a_cpu(self) -> None:
        """
        Compile the losses if the device is a CPU, unless that has failed before. The compiler is not meant for several threads
        at once, such as those of a hyperparameter search.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self.device.type == "cpu" and in_main_thread and not (self.compiled or self.compiling_failed):
            self.compile(True)

    def _give_up_compiling(self, error: Exception) -> None:
        self.compile(False)
        self.compiling_failed = True
        warnings.warn(
            f"The updates could not be compiled, so they run uncompiled, slower but with the same results. Set "
            f"compile_updates=False to do so from the start. {type(error).__name__}: {error}",
            stacklevel=2,
        )

    def prepare(
        self, replay_buffer: SubtrajectoryReplayBuffer, batch_size: int, vec_normalize: VecNormalize | None = None
    ) -> None:
        """
        Get ready for updates: copy new transitions and learning rates to the device, and throw away graphs of tensors that
        have been replaced, for example by ``load_state_dict`` of an optimiser.

        :param replay_buffer: what to learn from, with at least one transition
        :param batch_size: Minibatch size for each gradient update
        :param vec_normalize: normalizes observations and rewards of the buffer
        """
        changed = batch_size != self.batch_size
        self.replay_buffer, self.batch_size, self._vec_normalize = replay_buffer, batch_size, vec_normalize
        if not self.may_capture:
            return
        try:
            if vec_normalize is not None:
                raise CaptureError("VecNormalize works on the host.")
            if threading.current_thread() is not threading.main_thread():
                raise CaptureError("Torch captures one graph at a time, here only in the main thread.")
            if th.are_deterministic_algorithms_enabled():
                raise CaptureError("torch.use_deterministic_algorithms excludes the sums by which indices are drawn there.")
            self._update_copy(changed)
            for name in NETWORKS:
                self._prepare_optimizer(name, getattr(self.learner, name).optimizer)
            for graph in (self._encoder, self._value, self._act):
                graph.check()
            assert self._copy is not None
            self._copy.flush()
        except (CaptureError, TypeError, th.OutOfMemoryError) as error:
            self._give_up_capturing(error, warn=self.capture is True)

    def _update_copy(self, batch_size_changed: bool) -> None:
        """Copy the replay buffer to the device, unless it is there."""
        if self._copy is None or not self._copy.is_current(self.replay_buffer):
            free, size = self.free_memory(), DeviceCopy.size_of(self.replay_buffer)
            if self._copy is None and size > self.SHARE_OF_DEVICE * free:
                raise CaptureError(f"The replay buffer takes {size / 1e9:.3g} GB, of {free / 1e9:.3g} GB free there.")
            self._copy = DeviceCopy(self.replay_buffer, self.device)
            batch_size_changed = True
        if batch_size_changed:
            self._encoder.reset()
            self._value.reset()

    def _prepare_optimizer(self, name: str, optimizer: th.optim.Optimizer) -> None:
        """Let an optimiser read its learning rate from the device; SB3 sets it as a number."""
        if not isinstance(optimizer, th.optim.Adam):
            raise CaptureError(f"{type(optimizer).__name__} is not Adam or AdamW.")
        # Silences Adam's warning about ``capturable``: the warm-up calls are not captured on purpose
        optimizer._warned_capturable_if_run_uncaptured = True
        for i, group in enumerate(optimizer.param_groups):
            key = f"{name} {i}"
            # A tensor is the one set here before, by this object or by another one
            if not isinstance(group["lr"], th.Tensor) or key not in self._learning_rates:
                self._learning_rates.set(**{key: float(group["lr"])})
            group["lr"] = self._learning_rates[key]
            if self.device.type == "cuda" and not group["capturable"]:
                group["capturable"] = True
                for state in optimizer.state.values():
                    state["step"] = state["step"].to(self.device)

    def _captured_constants(self, *names: str) -> list[Any]:
        """What graphs of updates take for constant: hyperparameters, weights, and the state and settings of optimisers."""
        constants: list[Any] = [self.learner.hyperparameters, *self._weight_addresses(*names)]
        for name in names:
            optimizer = getattr(self.learner, name).optimizer
            for state in optimizer.state.values():
                constants += [value.data_ptr() if isinstance(value, th.Tensor) else value for value in state.values()]
            for group in optimizer.param_groups:
                constants += [value for key, value in group.items() if key not in ("params", "lr")]
        return constants

    def _weight_addresses(self, *names: str) -> list[int]:
        return [tensor.data_ptr() for name in names for tensor in self._weights[name]]

    @property
    def on_device(self) -> bool:
        """Whether updates run on a copy of the replay buffer on the device, captured or about to be."""
        return self._copy is not None

    @property
    def captured(self) -> bool:
        """Whether both updates are replayed."""
        return self._encoder.captured and self._value.captured

    def free_memory(self) -> float:
        """
        :return: bytes that are free on the device, after memory that earlier models have left behind is freed
        """
        free_cached_memory(self.device)
        return th.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else np.inf

    def _give_up_capturing(self, error: Exception, warn: bool = True) -> None:
        """Run uncaptured from now on; with ``warn=False`` that is not a warning, but information."""
        if warn:
            warnings.warn(
                f"Training steps could not be captured as CUDA graphs, so they run uncaptured, slower but with the same "
                f"results. Set compile_updates=False to do so from the start. {error}",
                stacklevel=2,
            )
        elif self.verbose >= 1:
            print(f"Training steps are not captured as CUDA graphs: {error}")
        self.may_capture = False
        self.release()

    def release(self) -> None:
        """Give up the copy on the device, and leave optimisers as they would be without captured updates."""
        for name in NETWORKS:
            optimizer = getattr(self.learner, name).optimizer
            restore_groups(optimizer.param_groups, optimizer)
        if self._copy is not None:
            self.replay_buffer.detach_copy()
        self._copy = None
        for graph in (self._encoder, self._value, self._act):
            graph.reset()
        free_cached_memory(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Updates":
        """A copy of the model compiles and captures on its own."""
        updates = memo[id(self)] = object.__new__(type(self))
        updates.__init__(deepcopy(self.learner, memo), self.device, self.capture, self.verbose)  # type: ignore[misc]
        updates.compile(self.compiled)
        return updates

    # Doing it

    def encoder(self) -> None:
        """One encoder update on a new batch."""
        self._run(self._encoder)

    def value_and_policy(self) -> None:
        """
        One value and one policy update on a new batch, whose transitions take new priorities.

        :raises DivergedError: if TD errors are not finite, unless the update is captured
        """
        self._run(self._value)

    def _run(self, graph: Graph) -> None:
        if self._copy is not None:
            try:
                return graph()
            except CaptureError as error:
                self._give_up_capturing(error)
        graph.function()

    def _matmul_precision(self) -> AbstractContextManager[None]:
        # Set elsewhere in another way, it may not even be readable by this setting
        return tf32_products() if self.learner.hyperparameters.precision == "tf32" else nullcontext()

    def _encoder_step(self) -> None:
        samples = (self._copy or self.replay_buffer).sample(self.batch_size, self._vec_normalize)
        with self._matmul_precision():
            self.encoder_metrics.add(self.learner.update_encoder(samples))

    def _value_step(self) -> None:
        samples = self.sample_n_step()
        with self._matmul_precision():
            priorities, metrics = self.learner.update_value_and_policy(samples)
        if self._copy is None and not th.isfinite(priorities).all():
            raise DivergedError("TD errors are not finite")
        assert samples.indices is not None
        (self._copy or self.replay_buffer).update_priorities(samples.indices, priorities)
        self.value_policy_metrics.add(metrics)

    def sample_n_step(self) -> Any:
        """
        :return: a batch of n-step samples, as the next value and policy update draws one
        """
        return (self._copy or self.replay_buffer).sample_n_step(self.batch_size, self._vec_normalize)

    def act(self, observation: np.ndarray | dict[str, np.ndarray], noise: float) -> np.ndarray:
        """
        Act in a rollout, with exploration noise.

        :param observation: of all environments, (n_envs, ...) or a dict of these
        :param noise: standard deviation of the exploration noise, in units of a Box scaled to [-1, 1]
        :return: Box actions scaled to [-1, 1], others as integers of the space, (n_envs, action_dim)
        :raises DivergedError: if the networks give numbers that are not finite
        """
        action = self._explore(observation, noise)
        # The largest of them would be a discrete action all the same
        if not th.isfinite(action).all():
            raise DivergedError(f"the policy's action is {action.tolist()}")
        return self.learner.actions.decode(action).numpy()

    def _explore(self, observation: np.ndarray | dict[str, np.ndarray], noise: float) -> th.Tensor:
        if self._copy is not None:
            try:
                return self._explore_captured(observation, noise)
            except CaptureError as error:
                self._give_up_capturing(error)
        policy = self.learner.policy
        return policy.explore(policy.obs_to_tensor(observation)[0], noise).cpu()

    def _explore_captured(self, observation: np.ndarray | dict[str, np.ndarray], noise: float) -> th.Tensor:
        self._noise.set(std=noise)
        values: dict[Any, np.ndarray] = observation if isinstance(observation, dict) else {None: observation}
        shapes = {key: (value.shape, th.from_numpy(value[:0]).dtype) for key, value in values.items()}
        if self._observation is None or shapes != self._observation_shapes:
            self._observation_shapes = shapes
            self._observation = Staging(shapes, self.device)
            self._act.reset()
        staged = self._observation.begin()
        for key, value in values.items():
            staged[key][:] = value
        self._observation.send()
        action = self._act()
        if self._action is None or self._action.shape != action.shape:
            self._action = th.empty(action.shape, dtype=action.dtype, pin_memory=self.device.type == "cuda")
        self._action.copy_(action, non_blocking=True)
        if self.device.type == "cuda":
            th.cuda.current_stream(self.device).synchronize()
        return self._action.clone()

    def _act_step(self) -> th.Tensor:
        assert self._observation is not None
        values: Any = self._observation.device_arrays
        return self.learner.policy.explore(values[None] if None in values else values, self._noise["std"])
