"""
MR.Q once more, in plain float64 NumPy, written from the formulas of the paper: networks, losses, gradients, optimiser.

Weights are a dict of arrays under the names of ``helpers.layout``. Gradients are central finite differences.
"""

import numpy as np

GAMMA = 0.99
ENCODER_WEIGHTS = {"dynamics": 1.0, "reward": 0.1, "termination": 0.1}

# --------------------------------------------------------------------------------------------------------------------
# Networks
# --------------------------------------------------------------------------------------------------------------------


def elu(x):
    return np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)


def relu(x):
    return np.maximum(x, 0)


def layer_norm(x):
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + 1e-5)


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def lnmlp(weights, name, x, activation):
    """Linear-LN-activation for all layers but the last, which is linear alone."""
    last = max(i for i in range(10) if f"{name}.{i}.weight" in weights)
    for i in range(last):
        x = activation(layer_norm(linear(weights, f"{name}.{i}", x)))
    return linear(weights, f"{name}.{last}", x)


def f(weights, s):
    return elu(layer_norm(lnmlp(weights, "f", s, elu)))


def g(weights, z_s, a):
    z_a = elu(linear(weights, "g.action", a))
    return lnmlp(weights, "g", np.concatenate([z_s, z_a], axis=-1), elu)


def m(weights, z_sa):
    """Termination (B,), next z_s (B, Z), reward logits (B, bins)."""
    out = linear(weights, "m", z_sa)
    z_dim = weights["f.2.bias"].size
    return out[:, 0], out[:, 1 : 1 + z_dim], out[:, 1 + z_dim :]


def q(weights, z_sa):
    """A column for each head."""
    n_critics = sum(name.endswith(".0.bias") and name.startswith("q") for name in weights)
    return np.concatenate([lnmlp(weights, f"q{head + 1}", z_sa, elu) for head in range(n_critics)], axis=1)


def pi(weights, z_s):
    """The pre-activation u."""
    return lnmlp(weights, "pi", z_s, relu)


# --------------------------------------------------------------------------------------------------------------------
# Actions: `sizes` holds the number of values of each discrete dimension, and is None for a Box
# --------------------------------------------------------------------------------------------------------------------


def softmax(x):
    exp = np.exp(x - x.max(axis=-1, keepdims=True))
    return exp / exp.sum(axis=-1, keepdims=True)


def by_dimension(x, sizes):
    return np.split(x, np.cumsum(sizes)[:-1], axis=-1)


def one_hot(indices, size):
    return np.eye(size)[indices]


def activation(u, gumbel, sizes, temperature=10.0):
    """tanh, or a Gumbel-softmax for each dimension."""
    if sizes is None:
        return np.tanh(u)
    return np.concatenate([softmax(part) for part in by_dimension((u + gumbel) / temperature, sizes)], axis=-1)


def smooth(a, normal, sizes, std=0.2, clip=0.3):
    """Target policy smoothing; one-hots of the largest entries, and half of the noise, for discrete actions."""
    if sizes is None:
        return np.clip(a + np.clip(std * normal, -clip, clip), -1, 1)
    noisy = a + np.clip(std / 2 * normal, -clip / 2, clip / 2)
    return np.concatenate([one_hot(part.argmax(axis=-1), part.shape[-1]) for part in by_dimension(noisy, sizes)], axis=-1)


# --------------------------------------------------------------------------------------------------------------------
# Losses. `ends` holds for each row the step at which its episode ends, and how: (2, "terminated"), or None
# --------------------------------------------------------------------------------------------------------------------


def ended(ends, horizon, kinds=("terminated", "truncated")):
    """1 where an episode ends, (B, H)."""
    flags = np.zeros((len(ends), horizon))
    for row, end in enumerate(ends):
        if end is not None and end[0] < horizon and end[1] in kinds:
            flags[row, end[0]] = 1
    return flags


def alive(ends, horizon):
    """The mask M: M_0 = 1 and M_{t+1} = M_t (1 - d_t), (B, H)."""
    d = ended(ends, horizon)
    mask = np.ones((len(ends), horizon))
    for t in range(horizon - 1):
        mask[:, t + 1] = mask[:, t] * (1 - d[:, t])
    return mask


def two_hot(rewards, bins):
    """Each weight is a hat function: one on its bin, linear to zero on the neighbours, constant beyond the ends."""
    return np.stack([np.interp(rewards, bins, hat) for hat in np.eye(len(bins))], axis=-1)


def encoder_terms(weights, target_weights, observations, actions, rewards, ends, bins):
    """
    The three sums over t, each of a mean over the batch at every t.

    :param observations: (B, H + 1, obs)
    """
    horizon = actions.shape[1]
    mask, d = alive(ends, horizon), ended(ends, horizon, kinds=("terminated",))
    terms = dict.fromkeys(ENCODER_WEIGHTS, 0.0)
    z_s = f(weights, observations[:, 0])
    for t in range(horizon):
        termination, z_s, logits = m(weights, g(weights, z_s, actions[:, t]))
        target = f(target_weights, observations[:, t + 1])
        cross_entropy = -(two_hot(rewards[:, t], bins) * np.log(softmax(logits))).sum(axis=-1)
        terms["dynamics"] += np.mean(mask[:, t, None] * (z_s - target) ** 2)
        terms["reward"] += np.mean(mask[:, t] * cross_entropy)
        terms["termination"] += np.mean(mask[:, t] * (termination - d[:, t]) ** 2)
    return terms


def encoder_loss(terms, termination_switch=1.0):
    switches = {"dynamics": 1.0, "reward": 1.0, "termination": termination_switch}
    return sum(switches[name] * ENCODER_WEIGHTS[name] * term for name, term in terms.items())


def value_target(target_weights, rewards, ends, next_observations, reward_scale, target_reward_scale, noise, sizes):
    """
    y (B, 1), walking each row until its episode ends.

    :param noise: normal and Gumbel noise of the target policy
    """
    n_steps = rewards.shape[1]
    z_s = f(target_weights, next_observations)
    action = smooth(activation(pi(target_weights, z_s), noise[1], sizes), noise[0], sizes)
    next_q = q(target_weights, g(target_weights, z_s, action)).min(axis=1)
    y = np.zeros((len(rewards), 1))
    for row, end in enumerate(ends):
        total, discount = 0.0, GAMMA**n_steps
        for i in range(n_steps):
            total += GAMMA**i * rewards[row, i]
            if end is not None and end[0] == i:
                discount = 0.0 if end[1] == "terminated" else GAMMA ** (i + 1)
                break
        y[row] = (total + discount * target_reward_scale * next_q[row]) / reward_scale
    return y


def value_loss(values, y):
    error = np.abs(values - y)
    return np.mean(np.where(error < 1, error**2 / 2, error - 0.5))


def policy_loss(weights, z_s, gumbel, sizes):
    u = pi(weights, z_s)
    return -q(weights, g(weights, z_s, activation(u, gumbel, sizes))).mean() + 1e-5 * np.mean(u**2)


def priority(values, y):
    return np.maximum(np.abs(values - y).max(axis=1), 1) ** 0.4


# --------------------------------------------------------------------------------------------------------------------
# Gradients and optimiser
# --------------------------------------------------------------------------------------------------------------------


def numeric_gradient(function, weights, names, epsilon=1e-5):
    """Central finite differences of a function of all weights with respect to some of them."""
    gradients = {}
    for name in names:
        gradients[name] = np.zeros_like(weights[name])
        for index in np.ndindex(weights[name].shape):
            values = []
            for shift in (epsilon, -epsilon):
                moved = weights[name].copy()
                moved[index] += shift
                values.append(function(weights | {name: moved}))
            gradients[name][index] = (values[0] - values[1]) / (2 * epsilon)
    return gradients


def norm(gradients):
    """Euclidean norm over all of them together."""
    return np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))


def clip(gradients, max_norm):
    scale = min(1.0, max_norm / norm(gradients))
    return {name: scale * gradient for name, gradient in gradients.items()}


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), betas 0.9 and 0.999, epsilon 1e-8, decay 1e-4."""

    def __init__(self, lr):
        self.lr = lr
        self.t = 0
        self.first, self.second = {}, {}

    def step(self, weights, gradients):
        """The new weights."""
        self.t += 1
        new = {}
        for name, gradient in gradients.items():
            self.first[name] = 0.9 * self.first.get(name, 0.0) + 0.1 * gradient
            self.second[name] = 0.999 * self.second.get(name, 0.0) + 0.001 * gradient**2
            direction = self.first[name] / (1 - 0.9**self.t)
            scale = np.sqrt(self.second[name] / (1 - 0.999**self.t)) + 1e-8
            new[name] = weights[name] - self.lr * 1e-4 * weights[name] - self.lr * direction / scale
        return new
