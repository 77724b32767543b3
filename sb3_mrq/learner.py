"""
The two steps of training, each a batch in and new weights out: one encoder update, one value and policy update.

Everything random (batch, noise, augmentation) is an argument, shapes are static and nothing waits for the device: what
compiling or capturing a step asks for. What has a gradient is a function from tensors to losses, one for each loss; these are
compiled, and run under autocast where the matrix products are to be in bfloat16. Backward passes and optimisers are outside of
them: autocast keeps the bfloat16 copy of a weight for as long as its region lasts, also when the weight has changed.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.func import functional_call

from sb3_mrq import losses
from sb3_mrq.action_spaces import BoxActions, CategoricalActions
from sb3_mrq.networks import Actor, Critic, Encoder
from sb3_mrq.observations import Observation


class EncoderMetrics(NamedTuple):
    """What one encoder update reports, 0-d tensors."""

    encoder_loss: th.Tensor
    dynamics_loss: th.Tensor
    reward_loss: th.Tensor
    termination_loss: th.Tensor


class ValuePolicyMetrics(NamedTuple):
    """What one value and policy update reports, 0-d tensors."""

    critic_loss: th.Tensor
    actor_loss: th.Tensor
    q_value: th.Tensor
    td_error: th.Tensor
    critic_grad_norm: th.Tensor


class MetricMeans:
    """
    Means of what updates report, summed up on the device until they are asked for.

    :param names: of the metrics
    :param device: of the metrics
    """

    def __init__(self, names: Sequence[str], device: th.device):
        self.names = names
        # The last one counts
        self._sums = th.zeros(len(names) + 1, device=device)
        self._one = th.ones((), device=device)

    def add(self, metrics: Sequence[th.Tensor]) -> None:
        """
        :param metrics: 0-d tensors, in the order of the names
        """
        self._sums.add_(th.stack([*metrics, self._one]))

    def take(self) -> dict[str, float]:
        """
        :return: the means of what was added since the last call, none if that was nothing
        """
        *sums, count = self._sums.tolist()
        self._sums.zero_()
        return {name: value / count for name, value in zip(self.names, sums, strict=True)} if count else {}


class Scalars:
    """
    Numbers as 0-d tensors that stay where they are, for code that is compiled or captured and would take a number for a
    constant.

    :param device: of the tensors
    """

    def __init__(self, device: th.device):
        self.device = device
        self._values: dict[str, float] = {}
        self._tensors: dict[str, th.Tensor] = {}

    def set(self, **values: float) -> None:
        """
        :param values: numbers by name
        """
        for name, value in values.items():
            if name not in self._tensors:
                self._tensors[name] = th.full((), float(value), device=self.device)
            elif self._values[name] != value:
                self._tensors[name].fill_(value)
            self._values[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> th.Tensor:
        return self._tensors[name]


class Noise(NamedTuple):
    """
    The noise of one value and policy update, (B, A) each; the two Gumbel noises are None for Box actions.

    :param target_normal: standard normal, for the smoothing of the target policy
    :param target_gumbel: standard Gumbel, for the target policy
    :param policy_gumbel: standard Gumbel, for the policy
    """

    target_normal: th.Tensor
    target_gumbel: th.Tensor | None
    policy_gumbel: th.Tensor | None


def grad_norm(module: nn.Module) -> th.Tensor:
    """
    :param module: a network after a backward pass
    :return: Euclidean norm of all its gradients, 0-d
    """
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def step(optimizer: th.optim.Optimizer) -> None:
    """
    :param optimizer: makes a step
    """
    optimizer.step()
    # Under a user's own autocast the bfloat16 copies of the weights would outlive it
    th.clear_autocast_cache()


def with_fixed_weights(module: nn.Module, *args: th.Tensor) -> th.Tensor:
    """
    :param module: a network
    :param args: its arguments
    :return: its output, through which gradients flow to the arguments, but not to the weights, so that none are computed
    """
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, args)


class CompiledFunction:
    """
    A function compiled by ``torch.compile`` when it is first called, or the function itself where that fails: for want of a
    C++ compiler, say, or because a user's network cannot be compiled.

    :param function: from tensors to tensors
    :param give_up: called with the error where it fails; like the function it may be a method of what is copied with this
    :param trial: context in which it is called for the first time, only to see whether it works
    """

    def __init__(
        self,
        function: Callable[..., Any],
        give_up: Callable[[Exception], None],
        trial: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.function = function
        self.give_up = give_up
        self.trial = trial
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        with self._settings():
            if self.compiled is None:
                with self.trial():
                    self.compiled = self._compile(args)
            try:
                return self.compiled(*args)
            except Exception as error:
                # Compiled anew for what has changed, perhaps; an error of a user's network comes again
                outputs = self.function(*args)
                self.give_up(error)
                return outputs

    @staticmethod
    def _settings() -> contextlib.AbstractContextManager:
        # Takes a second, and many never compile
        from torch._dynamo import config

        # Models of a kind share what is compiled. Hooks on networks count, also those that were added later, or to another one
        # of the models. There is a variant for every kind and for every value of what counts as a constant; beyond the limit
        # torch would run them uncompiled without saying so.
        return config.patch(skip_nnmodule_hook_guards=False, recompile_limit=64, fail_on_recompile_limit_hit=True)

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled works on the networks of the original, also in a copy
        return self.__dict__ | {"compiled": None}

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        try:
            with warnings.catch_warnings():
                # Of torch's own code
                warnings.simplefilter("ignore", DeprecationWarning)
                compiled = th.compile(self.function, dynamic=False)
                outputs = compiled(*args)
                # The backward pass is compiled when it is first run
                losses_of_it = [output for output in _leaves(outputs) if output.requires_grad]
                if losses_of_it:
                    losses_of_it[0].sum().backward()
        except Exception as error:
            self.give_up(error)
            return self.function
        return compiled


def _leaves(outputs: Any) -> list[th.Tensor]:
    """
    :param outputs: a tensor or nested tuples of these
    :return: the tensors, in order
    """
    return [outputs] if isinstance(outputs, th.Tensor) else [leaf for output in outputs for leaf in _leaves(output)]


@dataclass(frozen=True)
class UpdateHyperparameters:
    """
    Hyperparameters of the updates, under the names that they have in ``MRQ``.

    :param gamma: discount factor
    :param max_grad_norm: bound on the gradient norm of the critic, over all heads together
    :param target_policy_noise: standard deviation of the target policy's smoothing noise
    :param target_noise_clip: bound on it
    :param priority_alpha: exponent of the priorities
    :param min_td_error: errors below this have one priority
    :param dynamics_loss_weight: weight of the embedding term in the encoder loss
    :param reward_loss_weight: weight of the reward term
    :param termination_loss_weight: weight of the termination term
    :param pre_activation_weight: weight of the penalty on the policy's pre-activations
    :param precision: "bfloat16" where networks are to compute matrix products, and keep activations, in bfloat16 (values
        and their targets, weights, losses and optimisers are in float32 in any case); "tf32" where float32 matrix products may
        be computed in TF32 if the device can (``torch.set_float32_matmul_precision("high")`` during updates)
    """

    gamma: float
    max_grad_norm: float
    target_policy_noise: float
    target_noise_clip: float
    priority_alpha: float
    min_td_error: float
    dynamics_loss_weight: float
    reward_loss_weight: float
    termination_loss_weight: float
    pre_activation_weight: float
    precision: str


class Learner:
    """
    Holds the networks, their targets and optimisers (``.optimizer`` of each online network), and updates them.

    :param encoder: f, g and m
    :param encoder_target: target copy
    :param critic: Q
    :param critic_target: target copy
    :param actor: pi
    :param actor_target: target copy
    :param actions: conversions of the action space
    :param hyperparameters: of the updates
    :param compiled: whether to compile the losses
    """

    def __init__(
        self,
        encoder: Encoder,
        encoder_target: Encoder,
        critic: Critic,
        critic_target: Critic,
        actor: Actor,
        actor_target: Actor,
        actions: BoxActions | CategoricalActions,
        hyperparameters: UpdateHyperparameters,
        compiled: bool = False,
    ):
        self.encoder, self.encoder_target = encoder, encoder_target
        self.critic, self.critic_target = critic, critic_target
        self.actor, self.actor_target = actor, actor_target
        self.actions = actions
        self.hyperparameters = hyperparameters
        # Whether that was tried, in vain
        self.compiling_failed = False
        self.compile(compiled)

    def compile(self, compiled: bool) -> None:
        """
        Choose how the losses are computed from now on.

        :param compiled: whether to compile them, which takes a while when they are next needed
        """

        def choose(function: Callable[..., Any]) -> Callable[..., Any]:
            return CompiledFunction(function, self._give_up_compiling, self._unchanged) if compiled else function

        self.compiled = compiled
        self._encoder_loss = choose(self.encoder_loss)
        self._value_target = choose(self.value_target)
        self._value_loss = choose(self.value_loss)
        self._policy_loss = choose(self.policy_loss)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """What is called in this context changes neither buffers of networks, such as running means, nor random generators."""
        device = self.encoder.predictor.bins.device
        buffers = [buffer for online, target in self._pairs for network in (online, target) for buffer in network.buffers()]
        before = [buffer.clone() for buffer in buffers]
        with th.random.fork_rng([device] if device.type == "cuda" else []):
            yield
        with th.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    def _give_up_compiling(self, error: Exception) -> None:
        self.compile(False)
        self.compiling_failed = True
        warnings.warn(
            f"The updates could not be compiled, so they run as they are, slower but with the same results. Set "
            f"compile_updates=False to do so from the start. {type(error).__name__}: {error}",
            stacklevel=2,
        )

    def _autocast(self) -> th.autocast:
        device = self.encoder.predictor.bins.device
        return th.autocast(device.type, th.bfloat16, enabled=self.hyperparameters.precision == "bfloat16")

    @contextmanager
    def _matmul_precision(self) -> Iterator[None]:
        """Backward passes included, hence not a part of the losses."""
        if self.hyperparameters.precision != "tf32":
            # What was set elsewhere may not even be readable this way
            yield
            return
        before = th.get_float32_matmul_precision()
        th.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            th.set_float32_matmul_precision(before)

    def sample_noise(self, batch_size: int) -> Noise:
        """
        :param batch_size: B
        :return: the noise of one value and policy update, on the device of the networks
        """
        like = self.encoder.predictor.bins.new_empty((batch_size, self.actions.dim))
        return Noise(th.randn_like(like), self.actions.sample_gumbel(like), self.actions.sample_gumbel(like))

    @property
    def _pairs(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """Online networks and their targets."""
        return (self.encoder, self.encoder_target), (self.critic, self.critic_target), (self.actor, self.actor_target)

    @th.no_grad()
    def replace_targets(self) -> None:
        """Copy all online networks to their targets, parameters and buffers."""
        for online, target in self._pairs:
            sources, copies = ([*network.parameters(), *network.buffers()] for network in (online, target))
            for source, copy in zip(sources, copies, strict=True):
                copy.copy_(source)

    def encoder_loss(
        self,
        first_obs: Observation,
        next_obs: Sequence[Observation],
        actions: th.Tensor,
        rewards: th.Tensor,
        terminated: th.Tensor,
        mask: th.Tensor,
        termination_switch: th.Tensor | float,
    ) -> losses.EncoderLoss:
        """
        :return: the loss of f, g and m; for the parameters see ``update_encoder``
        """
        with self._autocast():
            with th.no_grad():
                # A batch at a time: intermediate results stay in the processor's cache, and images take a fraction of the
                # memory
                target_z_s = th.stack([self.encoder_target.state(obs) for obs in next_obs], dim=1)
            predicted_terminated, predicted_z_s, reward_logits = self.encoder.unroll(self.encoder.state(first_obs), actions)
        return losses.encoder_loss(
            predicted_z_s.to(rewards.dtype),
            target_z_s.to(rewards.dtype),
            reward_logits.to(rewards.dtype),
            rewards,
            predicted_terminated.to(rewards.dtype),
            terminated,
            mask,
            self.encoder.predictor.bins,
            dynamics_weight=self.hyperparameters.dynamics_loss_weight,
            reward_weight=self.hyperparameters.reward_loss_weight,
            termination_weight=self.hyperparameters.termination_loss_weight * termination_switch,
        )

    def update_encoder(
        self,
        first_obs: Observation,
        next_obs: Sequence[Observation],
        actions: th.Tensor,
        rewards: th.Tensor,
        terminated: th.Tensor,
        mask: th.Tensor,
        termination_switch: th.Tensor | float = 1.0,
    ) -> EncoderMetrics:
        """
        One step on the encoder loss, for f, g and m (equations 13 to 17 of the paper).

        :param first_obs: preprocessed observations s_0, (B, ...)
        :param next_obs: preprocessed observations s_1 to s_H, (B, ...) each
        :param actions: action vectors, (B, H, A)
        :param rewards: (B, H)
        :param terminated: (B, H)
        :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, H)
        :param termination_switch: 1, or 0 to leave out the termination term
        :return: the losses before the step
        """
        with self._matmul_precision():
            loss = self._encoder_loss(first_obs, next_obs, actions, rewards, terminated, mask, termination_switch)
            self.encoder.optimizer.zero_grad()
            if loss.total.requires_grad:  # unless all of it was frozen
                loss.total.backward()
        step(self.encoder.optimizer)
        return EncoderMetrics(*(term.detach() for term in loss))

    @th.no_grad()
    def value_target(
        self,
        obs: Observation,
        actions: th.Tensor,
        rewards: th.Tensor,
        terminated: th.Tensor,
        mask: th.Tensor,
        next_obs: Observation,
        reward_scale: th.Tensor | float,
        target_reward_scale: th.Tensor | float,
        noise: Noise,
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :return: the target y (B, 1), and the embeddings z_s (B, Z) and z_sa (B, ZSA) of the online encoder, into which no
            gradient flows; for the parameters see ``update_value_and_policy``
        """
        with self._autocast():
            next_z_s = self.encoder_target.state(next_obs)
            next_action = self.actions.activation(self.actor_target(next_z_s).to(rewards.dtype), noise.target_gumbel)
            next_action = self.actions.smooth(
                next_action,
                noise.target_normal,
                self.hyperparameters.target_policy_noise,
                self.hyperparameters.target_noise_clip,
            )
            next_q = self.critic_target(self.encoder_target.state_action(next_z_s, next_action))
            z_s = self.encoder.state(obs)
            z_sa = self.encoder.state_action(z_s, actions)
        returns, discount = losses.n_step_return(rewards, terminated, mask, self.hyperparameters.gamma)
        target = losses.value_target(returns, discount, next_q, reward_scale, target_reward_scale)
        return target, z_s, z_sa

    def value_loss(self, z_sa: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param z_sa: (B, ZSA)
        :param target: (B, 1)
        :return: the loss of Q, 0-d, and Q, (B, n_critics)
        """
        with self._autocast():
            q = self.critic(z_sa)
        return losses.value_loss(q, target), q.detach()

    def policy_loss(self, z_s: th.Tensor, gumbel: th.Tensor | None) -> th.Tensor:
        """
        :param z_s: (B, Z)
        :param gumbel: standard Gumbel noise, (B, A), None for Box actions
        :return: the loss of pi, 0-d
        """
        dtype = self.encoder.predictor.bins.dtype
        with self._autocast():
            pre_activation = self.actor(z_s).to(dtype)
            action = self.actions.activation(pre_activation, gumbel)
            q = with_fixed_weights(self.critic, with_fixed_weights(self.encoder.state_action, z_s, action))
        return losses.policy_loss(q, pre_activation, self.hyperparameters.pre_activation_weight)

    def update_value_and_policy(
        self,
        obs: Observation,
        actions: th.Tensor,
        rewards: th.Tensor,
        terminated: th.Tensor,
        mask: th.Tensor,
        next_obs: Observation,
        reward_scale: th.Tensor | float,
        target_reward_scale: th.Tensor | float,
        noise: Noise,
    ) -> tuple[th.Tensor, ValuePolicyMetrics]:
        """
        One step on the value loss, for Q, then one on the policy loss, for pi, on the same batch (equations 18 to 20 of the
        paper).

        :param obs: preprocessed observations s_0, (B, ...)
        :param actions: action vectors a_0, (B, A)
        :param rewards: (B, n)
        :param terminated: (B, n)
        :param mask: 1 up to and including the last transition of the episode, 0 after it, (B, n)
        :param next_obs: preprocessed observations s_n, or the final ones of episodes that end before, (B, ...)
        :param reward_scale: rbar, mean absolute reward of the buffer
        :param target_reward_scale: rbar', the one that the target networks were trained under
        :param noise: from ``sample_noise``
        :return: new priorities (B,), and the losses before the step
        """
        with self._matmul_precision():
            target, z_s, z_sa = self._value_target(
                obs, actions, rewards, terminated, mask, next_obs, reward_scale, target_reward_scale, noise
            )

            # Value step
            critic_loss, q = self._value_loss(z_sa, target)
            self.critic.optimizer.zero_grad()
            critic_loss.backward()
            critic_grad_norm = nn.utils.clip_grad_norm_(self.critic.parameters(), self.hyperparameters.max_grad_norm)
            step(self.critic.optimizer)

            # Policy step, through g and Q but for the weights of pi alone
            actor_loss = self._policy_loss(z_s, noise.policy_gumbel)
            self.actor.optimizer.zero_grad()
            actor_loss.backward()
            step(self.actor.optimizer)

        priorities = losses.td_priority(q, target, self.hyperparameters.priority_alpha, self.hyperparameters.min_td_error)
        metrics = ValuePolicyMetrics(
            critic_loss=critic_loss.detach(),
            actor_loss=actor_loss.detach(),
            q_value=q.mean(),
            td_error=(q - target).abs().mean(),
            critic_grad_norm=critic_grad_norm,
        )
        return priorities, metrics
