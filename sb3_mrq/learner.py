"""
The two steps of training, each a batch in and new weights out: one encoder update, one value and policy update.

Everything random (batch, noise, augmentation) is an argument, shapes are static and nothing waits for the device: what
compiling or capturing a step asks for. What has a gradient is a function from tensors to losses, one for each loss; these are
compiled, and run under autocast where the matrix products are to be in bfloat16. Backward passes and optimisers are outside of
them: autocast keeps the bfloat16 copy of a weight for as long as its region lasts, also when the weight has changed.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch as th
from torch import nn
from torch.func import functional_call

from sb3_mrq import losses
from sb3_mrq.compilation import CompiledFunction
from sb3_mrq.hyperparameters import UpdateHyperparameters
from sb3_mrq.observations import Observation
from sb3_mrq.policies import MRQPolicy
from sb3_mrq.precision import tf32_products


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


class Learner:
    """
    Updates the networks of a policy, by means of their optimisers (``.optimizer`` of each online network).

    :param policy: holds the networks and their targets
    :param hyperparameters: of the updates
    :param compiled: whether to compile the losses
    """

    def __init__(self, policy: MRQPolicy, hyperparameters: UpdateHyperparameters, compiled: bool = False):
        self.encoder, self.encoder_target = policy.encoder, policy.encoder_target
        self.critic, self.critic_target = policy.critic, policy.critic_target
        self.actor, self.actor_target = policy.actor, policy.actor_target
        self.actions = policy.actions
        self.hyperparameters = hyperparameters
        # Whether that was tried, in vain
        self.compiling_failed = False
        self.set_compiled(compiled)

    def set_compiled(self, compiled: bool) -> None:
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
        self.set_compiled(False)
        self.compiling_failed = True
        warnings.warn(
            f"The updates could not be compiled, so they run as they are, slower but with the same results. Set "
            f"compile_updates=False to do so from the start. {type(error).__name__}: {error}",
            stacklevel=2,
        )

    def _autocast(self) -> th.autocast:
        device = self.encoder.predictor.bins.device
        return th.autocast(device.type, th.bfloat16, enabled=self.hyperparameters.precision == "bfloat16")

    def _matmul_precision(self) -> AbstractContextManager[None]:
        """Backward passes included, hence not a part of the losses."""
        # What was set elsewhere may not even be readable by way of this setting
        return tf32_products() if self.hyperparameters.precision == "tf32" else nullcontext()

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
