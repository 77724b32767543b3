"""
The two steps of training, each a batch in and new weights out: one encoder update, one value and policy update.

Everything random (batch, noise, augmentation) is an argument, shapes are static and nothing waits for the device: what
compiling or capturing a step as a whole asks for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch as th
from torch import nn

from sb3_mrq import losses
from sb3_mrq.action_spaces import BoxActions, CategoricalActions
from sb3_mrq.networks import Actor, Critic, Encoder

Observation = th.Tensor | dict[str, th.Tensor]


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
    :param gamma: discount factor
    :param max_grad_norm: bound on the gradient norm of the critic, over all heads together
    :param target_policy_noise: standard deviation of the target policy's smoothing noise
    :param target_noise_clip: bound on it
    :param dynamics_weight: weight of the embedding term in the encoder loss
    :param reward_weight: weight of the reward term
    :param termination_weight: weight of the termination term
    :param pre_activation_weight: weight of the penalty on the policy's pre-activations
    :param priority_alpha: exponent of the priorities
    :param min_td_error: errors below this have one priority
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
        *,
        gamma: float,
        max_grad_norm: float,
        target_policy_noise: float,
        target_noise_clip: float,
        dynamics_weight: float,
        reward_weight: float,
        termination_weight: float,
        pre_activation_weight: float,
        priority_alpha: float,
        min_td_error: float,
    ):
        self.encoder, self.encoder_target = encoder, encoder_target
        self.critic, self.critic_target = critic, critic_target
        self.actor, self.actor_target = actor, actor_target
        self.actions = actions
        self.gamma = gamma
        self.max_grad_norm = max_grad_norm
        self.target_policy_noise = target_policy_noise
        self.target_noise_clip = target_noise_clip
        self.dynamics_weight = dynamics_weight
        self.reward_weight = reward_weight
        self.termination_weight = termination_weight
        self.pre_activation_weight = pre_activation_weight
        self.priority_alpha = priority_alpha
        self.min_td_error = min_td_error

    def sample_noise(self, batch_size: int) -> Noise:
        """
        :param batch_size: B
        :return: the noise of one value and policy update, on the device of the networks
        """
        like = self.encoder.predictor.bins.new_empty((batch_size, self.actions.dim))
        return Noise(th.randn_like(like), self.actions.sample_gumbel(like), self.actions.sample_gumbel(like))

    @th.no_grad()
    def replace_targets(self) -> None:
        """Copy all online networks to their targets, parameters and buffers."""
        for online, target in (
            (self.encoder, self.encoder_target),
            (self.critic, self.critic_target),
            (self.actor, self.actor_target),
        ):
            for source, copy in zip(online.state_dict().values(), target.state_dict().values(), strict=True):
                copy.copy_(source)

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
        with th.no_grad():
            # A batch at a time: intermediate results stay in the processor's cache, and images take a fraction of the memory
            target_z_s = th.stack([self.encoder_target.state(obs) for obs in next_obs], dim=1)

        predicted_terminated, predicted_z_s, reward_logits = self.encoder.unroll(self.encoder.state(first_obs), actions)
        loss = losses.encoder_loss(
            predicted_z_s,
            target_z_s,
            reward_logits,
            rewards,
            predicted_terminated,
            terminated,
            mask,
            self.encoder.predictor.bins,
            dynamics_weight=self.dynamics_weight,
            reward_weight=self.reward_weight,
            termination_weight=self.termination_weight * termination_switch,
        )

        self.encoder.optimizer.zero_grad()
        loss.total.backward()
        self.encoder.optimizer.step()
        return EncoderMetrics(*(term.detach() for term in loss))

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
        # Value target
        with th.no_grad():
            next_z_s = self.encoder_target.state(next_obs)
            next_action = self.actions.activation(self.actor_target(next_z_s), noise.target_gumbel)
            next_action = self.actions.smooth(
                next_action, noise.target_normal, self.target_policy_noise, self.target_noise_clip
            )
            next_q = self.critic_target(self.encoder_target.state_action(next_z_s, next_action))
            returns, discount = losses.n_step_return(rewards, terminated, mask, self.gamma)
            target = losses.value_target(returns, discount, next_q, reward_scale, target_reward_scale)

            # Embeddings of the online encoder, into which no gradient flows
            z_s = self.encoder.state(obs)
            z_sa = self.encoder.state_action(z_s, actions)

        # Value step
        q = self.critic(z_sa)
        critic_loss = losses.value_loss(q, target)
        self.critic.optimizer.zero_grad()
        critic_loss.backward()
        critic_grad_norm = nn.utils.clip_grad_norm_(self.critic.parameters(), self.max_grad_norm)
        self.critic.optimizer.step()
        q = q.detach()

        # Policy step, through g and Q but for the weights of pi alone: no other weight gradient is computed
        pre_activation = self.actor(z_s)
        policy_action = self.actions.activation(pre_activation, noise.policy_gumbel)
        policy_q = self.critic(self.encoder.state_action(z_s, policy_action))
        actor_loss = losses.policy_loss(policy_q, pre_activation, self.pre_activation_weight)
        self.actor.optimizer.zero_grad()
        actor_loss.backward(inputs=list(self.actor.parameters()))
        self.actor.optimizer.step()

        priorities = losses.td_priority(q, target, self.priority_alpha, self.min_td_error)
        metrics = ValuePolicyMetrics(
            critic_loss=critic_loss.detach(),
            actor_loss=actor_loss.detach(),
            q_value=q.mean(),
            td_error=(q - target).abs().mean(),
            critic_grad_norm=critic_grad_norm,
        )
        return priorities, metrics
