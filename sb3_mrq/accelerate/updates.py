"""
Updates and actions, computed with the replay buffer on the host, or on a device as CUDA graphs.
"""

import threading
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any, NoReturn

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

# Key of the exploration noise among the observations that are sent to a device; keys of a space are strings
NOISE = 0


def restore_groups(groups: list[dict[str, Any]], optimizer: th.optim.Optimizer) -> None:
    """
    Undo the changes that capturing has made to the settings of an optimiser.

    :param groups: ``param_groups`` of the optimiser or of its state dict, changed in place
    :param optimizer: the optimiser
    """
    for group in groups:
        group["lr"] = float(group["lr"])
        if "capturable" in group:
            group["capturable"] = optimizer.defaults["capturable"]


class Updates:
    """
    Encoder updates, value and policy updates, and actions in rollouts.

    On a CUDA device, each of the three is captured as a graph and replayed, if possible. Replay buffer, weights, learning
    rates and random generators are then on the device. A step of the environment needs three small transfers: the new
    transition and the observation to the device, and the action from it. If capturing fails, everything continues without
    graphs, with the same results, after a warning.

    :param learner: learner that computes the updates
    :param device: device of the networks
    :param capture: whether to capture graphs: True, False, or ``"auto"``, which does not warn if capturing is impossible from
        the start
    :param verbose: Verbosity level
    """

    # Largest fraction of the free memory of a device for the copy of the replay buffer
    MAX_MEMORY_FRACTION = 0.7

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
        for name in learner.policy.networks:
            both = [getattr(learner, name), getattr(learner, f"{name}_target")]
            self._weights[name] = [tensor for network in both for tensor in (*network.parameters(), *network.buffers())]
        # A weak reference, so that the memory is freed if the model drops the buffer
        self._replay_buffer: weakref.ref[SubtrajectoryReplayBuffer]
        self.batch_size = 0
        self._vec_normalize: VecNormalize | None = None
        self._copy: DeviceCopy | None = None
        self._learning_rates = Scalars(device)
        self._observation: Staging | None = None
        self._observation_shapes: Any = None
        self._action: th.Tensor | None = None
        self._encoder = Graph(self._encoder_step, device, lambda: self._captured_constants("encoder"))
        self._value = Graph(self._value_step, device, lambda: self._captured_constants(*learner.policy.networks))
        self._act = Graph(self._act_step, device, lambda: self._weight_addresses(*learner.policy.networks))

    # Settings

    def compile(self, compiled: bool) -> None:
        """
        Choose whether the losses are compiled. Compiling takes place at the next update.

        :param compiled: whether to compile the losses
        """

        def transform(function: Callable[..., Any]) -> Callable[..., Any]:
            trial = self.learner.preserve_buffers_and_rng
            return CompiledFunction(function, self._disable_compiling, trial) if compiled else function

        self.compiled = compiled
        self.learner.transform_losses(transform)

    def compile_on_cpu(self) -> None:
        """
        Compile the losses if the device is a CPU, unless compiling has failed before. The compiler does not support several
        threads at once, so it is only used in the main thread.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        if self.device.type == "cpu" and in_main_thread and not (self.compiled or self.compiling_failed):
            self.compile(True)

    def _disable_compiling(self, error: Exception) -> None:
        self.compile(False)
        self.compiling_failed = True
        warnings.warn(
            f"The updates could not be compiled. Training continues uncompiled, which is slower but gives the same results. "
            f"Set compile_updates=False to avoid this warning. {type(error).__name__}: {error}",
            stacklevel=2,
        )

    def prepare(
        self, replay_buffer: SubtrajectoryReplayBuffer, batch_size: int, vec_normalize: VecNormalize | None = None
    ) -> None:
        """
        Prepare updates: copy new transitions and learning rates to the device, and discard graphs of tensors that have been
        replaced, for example by ``load_state_dict`` of an optimiser.

        :param replay_buffer: replay buffer with at least one transition
        :param batch_size: Minibatch size for each gradient update
        :param vec_normalize: VecNormalize to normalize observations and rewards with
        """
        changed = batch_size != self.batch_size
        self._replay_buffer = weakref.ref(replay_buffer)
        self.batch_size, self._vec_normalize = batch_size, vec_normalize
        if not self.may_capture:
            return
        try:
            if vec_normalize is not None:
                raise CaptureError("VecNormalize is not supported on a device.")
            if replay_buffer.only_on_host:
                raise CaptureError(f"A {type(replay_buffer).__name__} samples only on the host.")
            if threading.current_thread() is not threading.main_thread():
                raise CaptureError("Torch captures one graph at a time, so capturing works only in the main thread.")
            if th.are_deterministic_algorithms_enabled():
                raise CaptureError("torch.use_deterministic_algorithms does not allow the cumulative sums of sampling.")
            self._update_copy(changed)
            for name in self.learner.policy.networks:
                self._prepare_optimizer(name, getattr(self.learner, name).optimizer)
            for graph in (self._encoder, self._value, self._act):
                graph.check()
            assert self._copy is not None
            self._copy.flush()
        except (CaptureError, TypeError, th.OutOfMemoryError) as error:
            self._disable_capturing(error, warn=self.capture is True)

    @property
    def replay_buffer(self) -> SubtrajectoryReplayBuffer:
        """Replay buffer that was passed to ``prepare``."""
        replay_buffer = self._replay_buffer()
        assert replay_buffer is not None, "The replay buffer is gone"
        return replay_buffer

    def _update_copy(self, batch_size_changed: bool) -> None:
        """Copy the replay buffer to the device, unless there is a current copy."""
        if self._copy is None or not self._copy.is_current(self.replay_buffer):
            free, size = self.free_memory(), DeviceCopy.size_of(self.replay_buffer)
            if self._copy is None and size > self.MAX_MEMORY_FRACTION * free:
                raise CaptureError(
                    f"The replay buffer takes {size / 1e9:.3g} GB, but the device has {free / 1e9:.3g} GB free."
                )
            self._copy = DeviceCopy(self.replay_buffer, self.device)
            batch_size_changed = True
        if batch_size_changed:
            self._encoder.reset()
            self._value.reset()

    def _prepare_optimizer(self, name: str, optimizer: th.optim.Optimizer) -> None:
        """Replace the learning rate of an optimiser, which SB3 sets as a number, by a tensor on the device."""
        if not isinstance(optimizer, th.optim.Adam):
            raise CaptureError(f"The optimiser {type(optimizer).__name__} is not supported, only Adam and AdamW are.")
        # Suppresses Adam's warning about ``capturable``, as warm-up calls are not captured
        optimizer._warned_capturable_if_run_uncaptured = True
        for i, group in enumerate(optimizer.param_groups):
            key = f"{name} {i}"
            # A tensor was set here, by this object or by another one
            if not isinstance(group["lr"], th.Tensor) or key not in self._learning_rates:
                self._learning_rates.set(**{key: float(group["lr"])})
            group["lr"] = self._learning_rates[key]
            if self.device.type == "cuda" and not group["capturable"]:
                group["capturable"] = True
                for state in optimizer.state.values():
                    state["step"] = state["step"].to(self.device)

    def _captured_constants(self, *names: str) -> list[Any]:
        """Constants of captured updates: hyperparameters, addresses of weights, state and settings of optimisers."""
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
        """Whether updates use a copy of the replay buffer on the device."""
        return self._copy is not None

    @property
    def captured(self) -> bool:
        """Whether both updates replay graphs."""
        return self._encoder.captured and self._value.captured

    def free_memory(self) -> float:
        """
        :return: number of free bytes on the device, after freeing memory of deleted models
        """
        free_cached_memory(self.device)
        return th.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else np.inf

    def _disable_capturing(self, error: Exception, warn: bool = True) -> None:
        """Continue without graphs, with a warning, or only a message at ``verbose=1`` if ``warn=False``."""
        if warn:
            warnings.warn(
                "Training steps could not be captured as CUDA graphs. Training continues uncaptured, slower but with "
                f"the same results. Set compile_updates=False to avoid this warning. {error}",
                stacklevel=2,
            )
        elif self.verbose >= 1:
            print(f"Training steps are not captured as CUDA graphs: {error}")
        self.may_capture = False
        self.release()

    def release(self) -> None:
        """Free the copy on the device, and restore the settings of the optimisers."""
        for name in self.learner.policy.networks:
            optimizer = getattr(self.learner, name).optimizer
            restore_groups(optimizer.param_groups, optimizer)
        if self._copy is not None:
            self.replay_buffer.detach_copy()
        self._copy = None
        for graph in (self._encoder, self._value, self._act):
            graph.reset()
        free_cached_memory(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Updates":
        """Copy without compiled functions and graphs, which refer to the networks of the original."""
        updates = memo[id(self)] = object.__new__(type(self))
        updates.__init__(deepcopy(self.learner, memo), self.device, self.capture, self.verbose)  # type: ignore[misc]
        updates.compile(self.compiled)
        return updates

    # Updates and actions

    def rehearse(
        self, replay_buffer: SubtrajectoryReplayBuffer | None, observation: Any, batch_size: int, vec_normalize: Any = None
    ) -> None:
        """
        Act and do one update of each kind with copies, to raise errors before the warm-up instead of after it. Weights,
        optimisers, replay buffer and random generators do not change. Nothing is done if the replay buffer holds transitions.

        :param replay_buffer: the replay buffer
        :param observation: of all environments, normalised, (n_envs, ...) or a dict of these
        :param batch_size: Minibatch size for each gradient update
        :param vec_normalize: VecNormalize to normalize observations and rewards of the buffer with, or None
        :raises ValueError: if acting or an update fails
        """
        if replay_buffer is None or replay_buffer.size() > 0:
            return
        if any(hasattr(type(original), name) for original in (self.learner, replay_buffer) for name in vars(original)):
            # A method that was replaced on the object, for example by a profiler, may act on the original
            return
        n_envs = replay_buffer.n_envs
        numpy_state = np.random.get_state()
        try:
            with th.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                try:
                    learner = deepcopy(self.learner)
                    buffer = deepcopy(replay_buffer).empty_copy(replay_buffer.lookahead + 2)
                    stored = observation if vec_normalize is None else vec_normalize.get_original_obs()
                    action = learner.actions.decode(th.zeros(n_envs, learner.actions.dim)).numpy()
                    for step in range(buffer.lookahead):
                        done = np.full(n_envs, step == buffer.lookahead - 1)
                        buffer.add(stored, stored, action, np.zeros(n_envs), done, [{} for _ in range(n_envs)])
                except Exception:
                    # A custom policy may not support copying, and a custom buffer may need other infos
                    return
                learner.policy.set_training_mode(False)
                learner.policy.explore(learner.policy.obs_to_tensor(observation)[0], 0.0)
                learner.policy.set_training_mode(True)
                learner.update_encoder(buffer.sample(min(batch_size, 2), vec_normalize))
                learner.update_value_and_policy(buffer.sample_n_step(min(batch_size, 2), vec_normalize))
        except Exception as error:
            raise ValueError(
                f"Training would fail after the warm-up: a trial of it raised {type(error).__name__}: {error}. Check the "
                "custom classes in policy_kwargs and other arguments: a features extractor must return (batch, features_dim), "
                "and an optimizer must work without a closure."
            ) from error
        finally:
            np.random.set_state(numpy_state)

    def encoder(self) -> None:
        """Do one encoder update with a new batch."""
        self._run(self._encoder)

    def value_and_policy(self) -> None:
        """
        Do one value and one policy update with a new batch, and update its priorities.

        :raises DivergedError: if TD errors are not finite and the replay buffer is on the host
        :raises ValueError: if priorities are zero or infinite because of ``priority_alpha``, with the buffer on the host
        """
        self._run(self._value)

    def _run(self, graph: Graph) -> None:
        if self._copy is not None:
            try:
                return graph()
            except CaptureError as error:
                self._disable_capturing(error)
        graph.function()

    def _matmul_precision(self) -> AbstractContextManager[None]:
        # Only touched for tf32: if the user has set it through another interface, reading it may fail
        return tf32_products() if self.learner.hyperparameters.precision == "tf32" else nullcontext()

    def _encoder_step(self) -> None:
        samples = (self._copy or self.replay_buffer).sample(self.batch_size, self._vec_normalize)
        with self._matmul_precision():
            self.encoder_metrics.add(self.learner.update_encoder(samples))

    def _value_step(self) -> None:
        samples = self.sample_n_step()
        with self._matmul_precision():
            priorities, metrics = self.learner.update_value_and_policy(samples)
        if self._copy is None and not ((priorities > 0) & (priorities < th.inf)).all():
            self._explain_priorities(priorities)
        assert samples.indices is not None
        (self._copy or self.replay_buffer).update_priorities(samples.indices, priorities)
        self.value_policy_metrics.add(metrics)

    def _explain_priorities(self, priorities: th.Tensor) -> NoReturn:
        """Raise an error for priorities that are not positive and finite."""
        if priorities.isnan().any():
            raise DivergedError("TD errors are not finite")
        # TD errors are clamped to finite numbers: the power alone makes infinity or zero of them
        of = self.learner.hyperparameters
        raise ValueError(
            f"Priorities from {priorities.min().item():g} to {priorities.max().item():g} leave the range of float32, as "
            f"priority_alpha is {of.priority_alpha} and min_td_error {of.min_td_error}. Set priority_alpha to a value between "
            "0 and 1, 0.4 by default."
        )

    def sample_n_step(self) -> Any:
        """
        :return: a new batch of n-step samples
        """
        return (self._copy or self.replay_buffer).sample_n_step(self.batch_size, self._vec_normalize)

    def act(self, observation: np.ndarray | dict[str, np.ndarray], noise: float | np.ndarray) -> np.ndarray:
        """
        Compute actions with exploration noise.

        :param observation: observations of all environments, (n_envs, ...) or a dict of these
        :param noise: standard deviation of the exploration noise on Box actions scaled to [-1, 1]. For a greedy policy, the
            noise on values, (n_envs, n_actions).
        :return: Box actions scaled to [-1, 1], discrete actions as integers of the space, (n_envs, action_dim)
        :raises DivergedError: if an action vector is not finite
        """
        action = self._explore(observation, np.atleast_1d(np.float32(noise)))
        # Checked before decoding, which would return a valid discrete action in any case
        if not np.isfinite(action.numpy()).all():
            raise DivergedError(f"the policy's action is {action.tolist()}")
        return self.learner.actions.decode(action).numpy()

    def _explore(self, observation: np.ndarray | dict[str, np.ndarray], noise: np.ndarray) -> th.Tensor:
        if self._copy is not None:
            try:
                return self._explore_captured(observation, noise)
            except CaptureError as error:
                self._disable_capturing(error)
        policy = self.learner.policy
        return policy.explore(policy.obs_to_tensor(observation)[0], th.as_tensor(noise, device=self.device)).cpu()

    def _explore_captured(self, observation: np.ndarray | dict[str, np.ndarray], noise: np.ndarray) -> th.Tensor:
        values: dict[Any, np.ndarray] = dict(observation) if isinstance(observation, dict) else {None: observation}
        values[NOISE] = noise
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
        values: Any = dict(self._observation.device_arrays)
        noise = values.pop(NOISE)
        return self.learner.policy.explore(values[None] if None in values else values, noise)
