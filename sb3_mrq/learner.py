"""
The two updates of training, samples in and new weights out: one of the encoder, one of the value heads and the policy.

Shapes are static and nothing waits for the device, so updates can be compiled and captured. Each loss is a function of
samples. These functions can be compiled, and run under autocast for matrix products in bfloat16. Backward passes and optimiser
steps are outside of autocast, which would otherwise keep bfloat16 copies of weights that have changed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch as th
from gymnasium import spaces
from torch import nn
from torch.func import functional_call

from sb3_mrq import losses
from sb3_mrq.augmentation import random_shift
from sb3_mrq.buffers.samples import NStepSamples, SubtrajectorySamples
from sb3_mrq.checks import DivergedError
from sb3_mrq.hyperparameters import UpdateHyperparameters
from sb3_mrq.networks import Predictions
from sb3_mrq.observations import Observation, map_observation, unbind_time
from sb3_mrq.policies import MRQPolicy

# Attributes that ``Learner.transform_losses`` sets
TRANSFORMED = ("_encoder_loss", "_value_target", "_value_loss", "_policy_loss")


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


class ValueTarget(NamedTuple):
    """
    Inputs of the value and the policy update, without gradients.

    :param target: y, (B, 1)
    :param z_s: state embedding by the online encoder, (B, Z)
    :param z_sa: state-action embedding by the online encoder, (B, ZSA)
    """

    target: th.Tensor
    z_s: th.Tensor
    z_sa: th.Tensor


def grad_norm(module: nn.Module) -> th.Tensor:
    """
    :param module: a network after a backward pass
    :return: Euclidean norm of the gradients of all its parameters, 0-d
    """
    return nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])


def singular_values(matrix: th.Tensor) -> th.Tensor:
    """
    Singular values by the eigenvalues of the smaller Gram matrix, which on a GPU takes a fraction of the time of an SVD.

    :param matrix: (B, D)
    :return: ascending, float64, (min(B, D),)
    """
    rows = matrix.double() if len(matrix) <= matrix.shape[1] else matrix.double().T
    return th.linalg.eigvalsh(rows @ rows.T).clamp_min(0).sqrt()


def effective_rank(singular_values: th.Tensor) -> th.Tensor:
    """
    Exponential of the entropy of the normalised singular values (Roy and Vetterli, "The effective rank", EUSIPCO 2007).

    :param singular_values: of centred embeddings, (D,)
    :return: between 1 and D, 0 if nothing varies, 0-d
    """
    total = singular_values.sum()
    return th.special.entr(singular_values / total.clamp_min(1e-12)).sum().exp() * (total > 0)


def optimizer_step(optimizer: th.optim.Optimizer) -> None:
    """
    :param optimizer: optimiser whose step to do
    """
    optimizer.step()
    # If the user has enabled autocast, its cached bfloat16 copies of the weights are outdated now
    th.clear_autocast_cache()


def with_fixed_weights(module: nn.Module, *args: th.Tensor) -> th.Tensor:
    """
    Call a network without computing gradients of its weights. Gradients flow to its arguments.

    :param module: the network
    :param args: its arguments
    :return: its output
    """
    return functional_call(module, {name: p.detach() for name, p in module.named_parameters()}, args)


class Learner:
    """
    Updates the networks of a policy with their optimisers (attribute ``optimizer`` of each online network).

    A subclass may override ``encoder_terms``, ``next_value``, ``bootstrap``, ``value_loss``, ``policy_loss`` and
    ``priorities``.

    :param policy: policy with the networks and their targets
    :param hyperparameters: hyperparameters of the updates
    """

    def __init__(self, policy: MRQPolicy, hyperparameters: UpdateHyperparameters):
        self.policy = policy
        self.encoder, self.encoder_target = policy.encoder, policy.encoder_target
        self.critic, self.critic_target = policy.critic, policy.critic_target
        self.actor, self.actor_target = policy.actor, policy.actor_target
        self.actions = policy.actions
        self.hyperparameters = hyperparameters
        # 0 or 1, factor of the termination term. A tensor, because a Python number would be a constant in compiled code.
        self.termination_switch = th.ones((), device=policy.device)
        # Factor of ``bc_weight``, from 0 to 1
        self.cloning_scale = th.ones((), device=policy.device)
        self.transform_losses(lambda function: function)

    def transform_losses(self, transform: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """
        Transform the functions that compute the losses, for example compile them.

        :param transform: called with each function, returns the function to use instead
        """
        # Keep in step with TRANSFORMED
        self._encoder_loss = transform(self.encoder_loss)
        self._value_target = transform(self.value_target)
        self._value_loss = transform(self.value_loss)
        self._policy_loss = transform(self.policy_loss)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled functions refer to the networks of this learner, so a copy must not share them
        return {name: value for name, value in self.__dict__.items() if name not in TRANSFORMED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.transform_losses(lambda function: function)

    @property
    def _pairs(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """Pairs of online network and target network."""
        return tuple((getattr(self, name), getattr(self, f"{name}_target")) for name in self.policy.networks)

    @contextmanager
    def preserve_buffers_and_rng(self) -> Iterator[None]:
        """Restore buffers of networks, such as running means, and random generators at the end of the context."""
        device = self.policy.device
        buffers = [buffer for online, target in self._pairs for network in (online, target) for buffer in network.buffers()]
        before = [buffer.clone() for buffer in buffers]
        with th.random.fork_rng([device] if device.type == "cuda" else []):
            yield
        with th.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)

    @th.no_grad()
    def replace_targets(self) -> None:
        """Copy parameters and buffers of all online networks to their targets."""
        for online, target in self._pairs:
            sources, copies = ([*network.parameters(), *network.buffers()] for network in (online, target))
            for source, copy in zip(sources, copies, strict=True):
                copy.copy_(source)

    def _autocast(self) -> th.autocast:
        enabled = self.hyperparameters.precision == "bfloat16"
        return th.autocast(self.encoder.predictor.bins.device.type, th.bfloat16, enabled=enabled)

    def sample_noise(self, batch_size: int) -> Noise:
        """
        :param batch_size: B
        :return: the noise of one value and policy update, on the device of the networks
        """
        like = self.encoder.predictor.bins.new_empty((batch_size, self.actions.dim))
        return Noise(th.randn_like(like), self.actions.sample_gumbel(like), self.actions.sample_gumbel(like))

    def prepare_observation(self, obs: Observation) -> Observation:
        """
        Shift images randomly, and preprocess.

        :param obs: sampled observations, (B, ...) or a dict of these
        :return: input of the state encoder
        """
        if self.hyperparameters.random_shift_pad > 0:
            obs = map_observation(self._augment, obs, self.policy.observation_space)
        return self.policy.preprocess(obs)

    def _augment(self, obs: th.Tensor, space: spaces.Space) -> th.Tensor:
        return random_shift(obs, self.hyperparameters.random_shift_pad) if self.policy.is_image(space) else obs

    def update_encoder(self, samples: SubtrajectorySamples) -> dict[str, th.Tensor]:
        """
        Do one gradient step on the encoder loss, for f, g and m (equations 13 to 17 of the paper).

        :param samples: samples from the replay buffer
        :return: ``encoder_loss`` before the step and its unweighted terms, by name, 0-d each
        """
        samples = samples._replace(
            observations=[self.prepare_observation(obs) for obs in unbind_time(samples.observations)],
            actions=self.actions.encode(samples.actions),
            indices=None,
        )
        loss, terms = self._encoder_loss(samples)
        self.encoder.optimizer.zero_grad()
        if loss.requires_grad:  # not if the user has frozen the whole encoder
            loss.backward()
        optimizer_step(self.encoder.optimizer)
        return {"encoder_loss": loss.detach()} | {f"{name}_loss": term.detach() for name, term in terms.items()}

    def encoder_loss(self, samples: SubtrajectorySamples) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        :param samples: prepared samples, see :class:`~sb3_mrq.buffers.SubtrajectorySamples`
        :return: the loss of f, g and m, and its unweighted terms by name, 0-d each
        """
        first_obs, *next_obs = samples.observations
        dtype = samples.rewards.dtype
        with self._autocast():
            with th.no_grad():
                all_next_obs = map_observation(lambda *parts: th.cat(parts), *next_obs)
                target_z_s = self.encoder_target.state(all_next_obs).unflatten(0, (len(next_obs), -1)).transpose(0, 1)
            predictions = self.encoder.unroll(self.encoder.state(first_obs), samples.actions)
        predictions = Predictions(*(part.to(dtype) for part in predictions))
        terms = self.encoder_terms(samples, predictions, target_z_s.to(dtype))
        total = reduce(add, (weight * term for weight, term in terms.values()))
        return total, {name: term for name, (_, term) in terms.items()}

    def encoder_terms(
        self, samples: SubtrajectorySamples, predictions: Predictions, target_z_s: th.Tensor
    ) -> dict[str, tuple[float | th.Tensor, th.Tensor]]:
        """
        Terms of the encoder loss (equation 17 of the paper). A subclass may add and remove terms. Each is logged as
        ``{name}_loss``.

        :param samples: prepared samples, see :class:`~sb3_mrq.buffers.SubtrajectorySamples`
        :param predictions: predictions of the online encoder
        :param target_z_s: embeddings of s_1 to s_H by the target encoder, without gradients, (B, H, Z)
        :return: weight and unweighted term (0-d) by name
        """
        hyperparameters, mask = self.hyperparameters, samples.mask
        reward = losses.reward_loss(predictions.reward_logits, samples.rewards, mask, self.encoder.predictor.bins)
        terms: dict[str, tuple[float | th.Tensor, th.Tensor]] = {
            "dynamics": (hyperparameters.dynamics_loss_weight, losses.dynamics_loss(predictions.z_s, target_z_s, mask)),
            "reward": (hyperparameters.reward_loss_weight, reward),
        }
        if hyperparameters.termination_loss_weight > 0:
            termination = losses.termination_loss(predictions.terminated, samples.terminated, mask)
            terms["termination"] = hyperparameters.termination_loss_weight * self.termination_switch, termination
        if hyperparameters.infonce_loss_weight > 0:
            infonce = losses.infonce_loss(predictions.z_s, target_z_s, mask, hyperparameters.infonce_temperature)
            terms["infonce"] = hyperparameters.infonce_loss_weight, infonce
        return terms

    def update_value_and_policy(
        self, samples: NStepSamples, noise: Noise | None = None
    ) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        """
        Do one gradient step on the value loss, for Q, then one on the policy loss, for pi, with the same batch (equations 18
        to 20 of the paper).

        :param samples: samples from the replay buffer
        :param noise: noise of this update, sampled if None; of no effect if the policy is greedy
        :return: new priorities (B,), and metrics by name, 0-d each; losses are computed before the steps
        """
        max_grad_norm = self.hyperparameters.max_grad_norm
        samples = samples._replace(
            observations=self.prepare_observation(samples.observations),
            next_observations=self.prepare_observation(samples.next_observations),
            actions=self.actions.encode(samples.actions),
            indices=None,
        )
        if noise is None and self.actor is not None:
            noise = self.sample_noise(len(samples.rewards))
        target, z_s, z_sa = self._value_target(samples, noise)

        # Value step
        critic_loss, q = self._value_loss(z_sa, target)
        self.critic.optimizer.zero_grad()
        critic_loss.backward()
        if max_grad_norm is None:
            critic_grad_norm = grad_norm(self.critic)
        else:
            critic_grad_norm = nn.utils.clip_grad_norm_(self.critic.parameters(), max_grad_norm)
        optimizer_step(self.critic.optimizer)
        metrics = {
            "critic_loss": critic_loss.detach(),
            "q_value": q.mean(),
            "td_error": (q - target).abs().mean(),
            "critic_grad_norm": critic_grad_norm,
        }

        # Policy step: gradients flow through g and Q, but only the weights of pi are updated
        if self.actor is not None:
            assert noise is not None
            actor_loss = self._policy_loss(z_s, noise.policy_gumbel, samples.actions)
            self.actor.optimizer.zero_grad()
            actor_loss.backward()
            optimizer_step(self.actor.optimizer)
            metrics["actor_loss"] = actor_loss.detach()

        return self.priorities(q, target), metrics

    @th.no_grad()
    def value_target(self, samples: NStepSamples, noise: Noise | None) -> ValueTarget:
        """
        Value target (equation 19 of the paper).

        :param samples: prepared samples, see :class:`~sb3_mrq.buffers.NStepSamples`
        :param noise: noise of this update, None if the policy is greedy
        :return: the target, and the embeddings of s_0 and a_0
        """
        with self._autocast():
            next_value = self.next_value(self.encoder_target.state(samples.next_observations), noise)
            z_s = self.encoder.state(samples.observations)
            z_sa = self.encoder.state_action(z_s, samples.actions)
        returns, discount = losses.n_step_return(samples.rewards, samples.terminated, samples.mask, self.hyperparameters.gamma)
        scales = self.critic.reward_scale, self.critic_target.reward_scale
        return ValueTarget(losses.value_target(returns, discount, next_value, *scales), z_s, z_sa)

    def next_value(self, next_z_s: th.Tensor, noise: Noise | None) -> th.Tensor:
        """
        :param next_z_s: embedding of the last observation by the target encoder, (B, Z)
        :param noise: noise of this update, None if the policy is greedy
        :return: value of the target policy's smoothed action, or the highest of all actions if the policy is greedy, (B, 1)
        """
        if self.actor_target is None:
            next_q = self.policy.all_values(self.encoder_target, self.critic_target, next_z_s)
            return self.bootstrap(next_q.flatten(0, 1)).view(len(next_q), -1).amax(dim=1, keepdim=True)
        assert noise is not None
        pre_activation = self.actor_target(next_z_s).to(noise.target_normal.dtype)
        action = self.actions.activation(pre_activation, noise.target_gumbel)
        std, clip = self.hyperparameters.target_policy_noise, self.hyperparameters.target_noise_clip
        action = self.actions.smooth(action, noise.target_normal, std, clip)
        return self.bootstrap(self.critic_target.value(self.critic_target(self.encoder_target.state_action(next_z_s, action))))

    def bootstrap(self, next_q: th.Tensor) -> th.Tensor:
        """
        :param next_q: values of actions for the last observation, by the target heads, (B, n_critics)
        :return: minimum of the heads, (B, 1)
        """
        return next_q.amin(dim=1, keepdim=True)

    def value_loss(self, z_sa: th.Tensor, target: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param z_sa: (B, ZSA)
        :param target: (B, 1)
        :return: the loss of Q, 0-d, and Q, (B, n_critics)
        """
        with self._autocast():
            output = self.critic(z_sa)
        return self.critic.loss(output, target), self.critic.value(output).detach()

    def policy_loss(self, z_s: th.Tensor, gumbel: th.Tensor | None, actions: th.Tensor) -> th.Tensor:
        """
        :param z_s: (B, Z)
        :param gumbel: standard Gumbel noise, (B, A), None for Box actions
        :param actions: action vectors of the batch, (B, A)
        :return: the loss of pi, 0-d
        """
        assert self.actor is not None
        dtype = self.encoder.predictor.bins.dtype
        with self._autocast():
            pre_activation = self.actor(z_s).to(dtype)
            action = self.actions.activation(pre_activation, gumbel)
            q = self.critic.value(with_fixed_weights(self.critic, with_fixed_weights(self.encoder.state_action, z_s, action)))
        if self.hyperparameters.bc_weight == 0:
            return losses.policy_loss(q, pre_activation, self.hyperparameters.pre_activation_weight)
        # TD3+BC (Fujimoto and Gu, 2021, arXiv 2106.06860): values are divided by their mean size
        q = q / q.detach().abs().mean().clamp_min(1e-8)
        loss = losses.policy_loss(q, pre_activation, self.hyperparameters.pre_activation_weight)
        cloning = self.actions.cloning_loss(pre_activation, actions)
        return loss + self.hyperparameters.bc_weight * self.cloning_scale * cloning

    def priorities(self, q: th.Tensor, target: th.Tensor) -> th.Tensor:
        """
        :param q: (B, n_critics)
        :param target: (B, 1)
        :return: new priorities, (B,)
        """
        return losses.td_priority(q, target, self.hyperparameters.priority_alpha, self.hyperparameters.min_td_error)

    @th.no_grad()
    def embedding_metrics(self, samples: NStepSamples) -> dict[str, th.Tensor]:
        """
        :param samples: samples from the replay buffer
        :return: norm and effective rank of the embeddings z_s, and norm of the last gradient of the encoder, 0-d each
        :raises DivergedError: if an embedding is not finite
        """
        self.policy.set_training_mode(False)
        z_s = self.encoder.state(self.policy.preprocess(samples.observations))
        self.policy.set_training_mode(True)
        if not th.isfinite(z_s).all():
            raise DivergedError("embeddings are not finite")
        return {
            "encoder_grad_norm": grad_norm(self.encoder),
            "z_s_norm": z_s.norm(dim=1).mean(),
            "z_s_effective_rank": effective_rank(singular_values(z_s - z_s.mean(dim=0))),
        }
