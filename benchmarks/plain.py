"""
MR.Q's two updates without optimisation: layers of ``torch.nn`` in float32, eager. A reference for speed, and an independent
implementation to compare results with.
"""

import math
from copy import deepcopy

import torch as th
from torch import nn
from torch.nn import functional as F

N_BINS, BINS_LIMIT = 65, 10.0
GAMMA = 0.99


def xavier(module: nn.Module) -> None:
    """Initialise linear layers as section A of the paper says."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
        nn.init.zeros_(module.bias)


def norm(x: th.Tensor) -> th.Tensor:
    """Layer normalisation without weights."""
    return F.layer_norm(x, x.shape[-1:])


class MLP(nn.Module):
    """Linear, LN, activation; linear, LN, activation; linear."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, activation):
        super().__init__()
        self.first = nn.Linear(input_dim, hidden_dim)
        self.second = nn.Linear(hidden_dim, hidden_dim)
        self.last = nn.Linear(hidden_dim, output_dim)
        self.activation = activation

    def forward(self, x: th.Tensor) -> th.Tensor:
        x = self.activation(norm(self.first(x)))
        x = self.activation(norm(self.second(x)))
        return self.last(x)


class Encoder(nn.Module):
    """f, g and m."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.f = MLP(obs_dim, 512, 512, F.elu)
        self.action = nn.Linear(action_dim, 256)
        self.g = MLP(512 + 256, 512, 512, F.elu)
        self.m = nn.Linear(512, 1 + 512 + N_BINS)
        self.apply(xavier)

    def state(self, obs: th.Tensor) -> th.Tensor:
        return F.elu(norm(self.f(obs)))

    def state_action(self, z_s: th.Tensor, action: th.Tensor) -> th.Tensor:
        return self.g(th.cat([z_s, F.elu(self.action(action))], dim=1))

    def predict(self, z_s: th.Tensor, action: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        prediction = self.m(self.state_action(z_s, action))
        return prediction[:, :1], prediction[:, 1:513], prediction[:, 513:]


class Head(nn.Module):
    """A value head."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP(512, 512, 512, F.elu)
        self.value = nn.Linear(512, 1)

    def forward(self, z_sa: th.Tensor) -> th.Tensor:
        return self.value(F.elu(norm(self.mlp(z_sa))))


class Critic(nn.Module):
    """Two value heads."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(), Head()])
        self.apply(xavier)

    def forward(self, z_sa: th.Tensor) -> th.Tensor:
        return th.cat([head(z_sa) for head in self.heads], dim=1)


class Plain:
    """
    Networks, targets and optimisers for Box actions, and the two updates.

    :param obs_dim: size of the observations
    :param action_dim: size of the actions
    :param device: device of the networks
    """

    def __init__(self, obs_dim: int, action_dim: int, device: th.device | str = "cpu"):
        self.encoder, self.critic = Encoder(obs_dim, action_dim).to(device), Critic().to(device)
        self.actor = MLP(512, 512, action_dim, F.relu).apply(xavier).to(device)
        self.encoder_target, self.critic_target, self.actor_target = map(deepcopy, (self.encoder, self.critic, self.actor))
        self.encoder_optimizer = th.optim.AdamW(self.encoder.parameters(), lr=1e-4, weight_decay=1e-4)
        self.critic_optimizer = th.optim.AdamW(self.critic.parameters(), lr=3e-4, weight_decay=1e-4)
        self.actor_optimizer = th.optim.AdamW(self.actor.parameters(), lr=3e-4, weight_decay=1e-4)
        x = th.linspace(-BINS_LIMIT, BINS_LIMIT, N_BINS, dtype=th.float64)
        self.bins = (x.sign() * x.abs().expm1()).float().to(device)

    def two_hot(self, reward: th.Tensor) -> th.Tensor:
        """(B, 1) to (B, bins)"""
        reward = reward.clamp(self.bins[0], self.bins[-1])
        lower = (th.searchsorted(self.bins, reward, right=True) - 1).clamp(0, N_BINS - 2)
        upper_weight = (reward - self.bins[lower]) / (self.bins[lower + 1] - self.bins[lower])
        weights = th.zeros(len(reward), N_BINS, device=reward.device)
        weights.scatter_(1, lower, 1 - upper_weight)
        return weights.scatter_(1, lower + 1, upper_weight)

    def update_encoder(
        self, obs: th.Tensor, actions: th.Tensor, rewards: th.Tensor, terminated: th.Tensor, mask: th.Tensor
    ) -> float:
        """
        :param obs: (B, H + 1, obs)
        :param actions: (B, H, A)
        :param rewards: (B, H)
        :param terminated: (B, H)
        :param mask: (B, H)
        :return: the loss
        """
        with th.no_grad():
            targets = [self.encoder_target.state(obs[:, t + 1]) for t in range(actions.shape[1])]
        z_s = self.encoder.state(obs[:, 0])
        loss = th.zeros((), device=obs.device)
        for t, target in enumerate(targets):
            predicted_terminated, z_s, logits = self.encoder.predict(z_s, actions[:, t])
            m = mask[:, t : t + 1]
            cross_entropy = -(self.two_hot(rewards[:, t : t + 1]) * F.log_softmax(logits, dim=1)).sum(dim=1, keepdim=True)
            loss = loss + (m * (z_s - target) ** 2).mean() + 0.1 * (m * cross_entropy).mean()
            loss = loss + 0.1 * (m * (predicted_terminated - terminated[:, t : t + 1]) ** 2).mean()
        self.encoder_optimizer.zero_grad()
        loss.backward()
        self.encoder_optimizer.step()
        return loss.item()

    def update_value_and_policy(
        self,
        obs: th.Tensor,
        action: th.Tensor,
        returns: th.Tensor,
        discount: th.Tensor,
        next_obs: th.Tensor,
        reward_scale: float,
        target_reward_scale: float,
        noise: th.Tensor,
    ) -> tuple[float, float]:
        """
        :param obs: (B, obs)
        :param action: (B, A)
        :param returns: discounted sum of rewards, (B, 1)
        :param discount: factor of the bootstrap value, (B, 1)
        :param next_obs: (B, obs)
        :param reward_scale: rbar
        :param target_reward_scale: rbar'
        :param noise: standard normal, (B, A)
        :return: both losses
        """
        with th.no_grad():
            next_z_s = self.encoder_target.state(next_obs)
            next_action = self.actor_target(next_z_s).tanh() + (0.2 * noise).clamp(-0.3, 0.3)
            next_q = self.critic_target(self.encoder_target.state_action(next_z_s, next_action.clamp(-1, 1)))
            target = (returns + discount * target_reward_scale * next_q.min(dim=1, keepdim=True).values) / reward_scale
            z_s = self.encoder.state(obs)
            z_sa = self.encoder.state_action(z_s, action)

        critic_loss = F.smooth_l1_loss(self.critic(z_sa), target.expand(-1, 2))
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), 20.0)
        self.critic_optimizer.step()

        pre_activation = self.actor(z_s)
        q = self.critic(self.encoder.state_action(z_s, pre_activation.tanh()))
        actor_loss = -q.mean() + 1e-5 * pre_activation.square().mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        return critic_loss.item(), actor_loss.item()
