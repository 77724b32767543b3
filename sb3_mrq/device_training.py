"""
Whole training steps on the device: batch, augmentation, updates and priorities, captured as CUDA graphs.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch as th

from sb3_mrq.graphs import CaptureError, Graph, Staging
from sb3_mrq.metrics import Scalars

if TYPE_CHECKING:
    from sb3_mrq.mrq import MRQ


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


def release(model: "MRQ") -> None:
    """
    Leave optimisers and replay buffer as they would be without captured training steps, also where these failed halfway.

    :param model: the model
    """
    for name in ("encoder", "critic", "actor"):
        optimizer = getattr(model, name).optimizer
        restore_groups(optimizer.param_groups, optimizer)
    if model.replay_buffer is not None:
        model.replay_buffer.drop_mirror()


class DeviceTraining:
    """
    What a model does over and over, as graphs: one encoder update, one value and policy update, and acting where transitions
    are collected. Replay buffer, weights, learning rates and everything random are on the device; a step of the environment
    takes one small copy there, of the new transition, one of the observation, and one back, of the action.

    :param model: whose networks, optimisers and replay buffer these are
    :param batch_size: Minibatch size for each gradient update
    :raises CaptureError: if an optimiser cannot be captured
    """

    def __init__(self, model: "MRQ", batch_size: int):
        assert model.replay_buffer is not None
        self.model = model
        self.batch_size = batch_size
        self.device = model.device
        self.replay = model.replay_buffer.mirror(self.device)
        self._learning_rates = Scalars(self.device)
        self._weights: dict[str, list[th.Tensor]] = {}
        for name in ("encoder", "critic", "actor"):
            both = [getattr(model, name), getattr(model, f"{name}_target")]
            self._weights[name] = [tensor for network in both for tensor in (*network.parameters(), *network.buffers())]
        self._encoder = Graph(self._encoder_step, self.device, lambda: self._places("encoder"))
        self._value = Graph(self._value_step, self.device, lambda: self._places("encoder", "critic", "actor"))
        self._act = Graph(
            self._act_step, self.device, lambda: [*self._weight_places("encoder"), *self._weight_places("actor")]
        )
        self._noise = Scalars(self.device)
        self._observation: Staging | None = None
        self._observation_shapes: Any = None
        self._action: th.Tensor | None = None
        self.prepare()

    def _places(self, *names: str) -> list[Any]:
        """Hyperparameters, places of weights and targets of networks and of the state of optimisers, and settings of these."""
        places: list[Any] = [self.model.learner.hyperparameters, self.model.random_shift_pad]
        for name in names:
            places += self._weight_places(name)
            optimizer = getattr(self.model, name).optimizer
            for state in optimizer.state.values():
                places += [value.data_ptr() if isinstance(value, th.Tensor) else value for value in state.values()]
            for group in optimizer.param_groups:
                places += [value for key, value in group.items() if key not in ("params", "lr")]
        return places

    def _weight_places(self, name: str) -> list[int]:
        return [tensor.data_ptr() for tensor in self._weights[name]]

    def prepare(self) -> None:
        """
        Bring over new transitions and learning rates, and throw away graphs of tensors that have been replaced, as by
        ``load_state_dict`` of an optimiser. To be called before updates.
        """
        assert self.model.replay_buffer is not None
        replay = self.model.replay_buffer.mirror(self.device)
        if replay is not self.replay:
            self.replay = replay
            self._encoder.reset()
            self._value.reset()
        for name in ("encoder", "critic", "actor"):
            self._prepare_optimizer(name, getattr(self.model, name).optimizer)
        for graph in (self._encoder, self._value, self._act):
            graph.check()
        self.replay.flush()

    def _prepare_optimizer(self, name: str, optimizer: th.optim.Optimizer) -> None:
        """Let an optimiser read its learning rate from the device; SB3 sets it as a number."""
        if not isinstance(optimizer, th.optim.Adam):
            raise CaptureError(f"{type(optimizer).__name__} is not Adam or AdamW")
        # Silences Adam's warning about ``capturable``: the warm-up calls are not captured on purpose
        optimizer._warned_capturable_if_run_uncaptured = True
        for i, group in enumerate(optimizer.param_groups):
            key = f"{name} {i}"
            # A tensor is that of before, of this object or of another one
            if not isinstance(group["lr"], th.Tensor) or key not in self._learning_rates:
                self._learning_rates.set(**{key: float(group["lr"])})
            group["lr"] = self._learning_rates[key]
            if self.device.type == "cuda" and not group["capturable"]:
                group["capturable"] = True
                for state in optimizer.state.values():
                    state["step"] = state["step"].to(self.device)

    @property
    def captured(self) -> bool:
        """Whether both updates are replayed."""
        return self._encoder.captured and self._value.captured

    def update_encoder(self) -> None:
        """One encoder update."""
        self._encoder()

    def _encoder_step(self) -> None:
        metrics = self.model._update_encoder(self.replay.sample(self.batch_size))
        self.model._encoder_metrics.add(metrics)

    def update_value_and_policy(self) -> None:
        """One value and one policy update, and new priorities."""
        self._value()

    def _value_step(self) -> None:
        samples = self.replay.sample_n_step(self.batch_size)
        priorities, metrics = self.model._update_value_and_policy(samples)
        assert isinstance(samples.indices, th.Tensor)
        self.replay.update_priorities(samples.indices, priorities)
        self.model._value_policy_metrics.add(metrics)

    def act(self, observation: np.ndarray | dict[str, np.ndarray], noise: float) -> np.ndarray:
        """
        :param observation: of all environments, (n_envs, ...) or a dict of these
        :param noise: standard deviation of the exploration noise
        :return: as ``MRQPolicy.explore``
        """
        self._noise.set(std=noise)
        values: dict[Any, np.ndarray] = observation if isinstance(observation, dict) else {None: observation}
        shapes = {key: (value.shape, th.from_numpy(value[:0]).dtype) for key, value in values.items()}
        if self._observation is None or shapes != self._observation_shapes:
            self._observation_shapes = shapes
            self._observation = Staging(shapes, self.device)
            self._act.reset()
        slots = self._observation.begin()
        for key, value in values.items():
            slots[key][:] = value
        self._observation.send()
        action = self._act()
        if self._action is None or self._action.shape != action.shape:
            self._action = th.empty(action.shape, dtype=action.dtype, pin_memory=self.device.type == "cuda")
        self._action.copy_(action, non_blocking=True)
        if self.device.type == "cuda":
            th.cuda.current_stream(self.device).synchronize()
        return self._action.numpy().copy()

    def _act_step(self) -> th.Tensor:
        assert self._observation is not None
        values: Any = self._observation.device_arrays
        return self.model.policy.explore_tensor(values[None] if None in values else values, self._noise["std"])

    def __deepcopy__(self, memo: Any) -> None:
        """A copy of the model captures graphs of its own."""
        return
