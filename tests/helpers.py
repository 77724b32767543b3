"""Small agents, and their weights under the names of the formulas, for several test modules."""

import resource
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch as th
from torch import nn

from sb3_mrq.accelerate.updates import Updates
from sb3_mrq.buffers import NStepSamples, SubtrajectorySamples
from sb3_mrq.hyperparameters import UpdateHyperparameters
from sb3_mrq.learner import Learner
from sb3_mrq.networks import Actor, Critic, Encoder
from sb3_mrq.policies import MlpPolicy

# The paper's constants, section by section as in the docstrings of the tests
PAPER = dict(
    gamma=0.99,
    max_grad_norm=20.0,
    target_policy_noise=0.2,
    target_noise_clip=0.3,
    dynamics_loss_weight=1.0,
    reward_loss_weight=0.1,
    termination_loss_weight=0.1,
    infonce_loss_weight=0.0,
    infonce_temperature=0.1,
    pre_activation_weight=1e-5,
    bc_weight=0.0,
    priority_alpha=0.4,
    min_td_error=1.0,
    random_shift_pad=0,
    precision="float32",
)
# Where DR.Q has others
DRQ_PAPER = PAPER | dict(max_grad_norm=None, termination_loss_weight=0.0, infonce_loss_weight=0.1, pre_activation_weight=0.0)
NETWORKS = ("encoder", "critic", "actor")
TARGETS = ("encoder_target", "critic_target", "actor_target")


def make_policy(observation_space, action_space, policy_class=MlpPolicy, lr=3e-4, encoder_lr=1e-4, **kwargs):
    """A policy with constant learning rates."""
    return policy_class(observation_space, action_space, lambda _: lr, encoder_lr_schedule=lambda _: encoder_lr, **kwargs)


def make_learner(policy, compiled=False, preprocessed=True, **hyperparameters):
    """
    A learner on the networks of a policy, with the paper's constants where none are given.

    :param preprocessed: whether the observations that it gets are preprocessed already
    """
    learner = Learner(policy, UpdateHyperparameters(**(PAPER | hyperparameters)))
    if preprocessed:
        learner.prepare_observation = as_they_are
    if compiled:
        UPDATES[learner] = Updates(learner, th.device("cpu"))
        UPDATES[learner].compile(True)
    return learner


# The updates of each compiled learner
UPDATES = {}


def as_they_are(obs):
    return obs


def continuation_mask(ended):
    """M_0 = 1, M_{t+1} = M_t (1 - ended_t): one up to and including the step that ends the episode, zero after it, (B, H)."""
    return th.cat([th.ones_like(ended[:, :1]), th.cumprod(1 - ended[:, :-1], dim=1)], dim=1)


def stored(learner, actions):
    """Action vectors, (..., A), in the form of the replay buffer."""
    return learner.actions.decode(actions.flatten(0, -2)).unflatten(0, actions.shape[:-1])


def update_encoder(learner, obs, actions, rewards, terminated, mask, termination_switch=1.0):
    """One encoder update, with the observations s_0 to s_H in one tensor, (B, H + 1, ...), and action vectors."""
    learner.termination_switch = th.as_tensor(termination_switch)
    samples = SubtrajectorySamples(obs, stored(learner, actions), rewards, terminated, mask)
    return SimpleNamespace(**learner.update_encoder(samples))


def update_value_and_policy(learner, obs, actions, rewards, terminated, mask, next_obs, noise=None):
    """One value and policy update, with action vectors."""
    samples = NStepSamples(obs, stored(learner, actions), rewards, terminated, mask, next_obs)
    priorities, metrics = learner.update_value_and_policy(samples, noise)
    return priorities, SimpleNamespace(**metrics)


def set_scales(policy, reward_scale, target_reward_scale):
    """Set rbar and rbar'."""
    policy.critic.reward_scale.fill_(reward_scale)
    policy.critic_target.reward_scale.fill_(target_reward_scale)


def layout(network):
    """
    Where a network keeps its layers.

    The names are f.0 f.1 ... (f.conv0 ... f.out for images), g.action g.0 g.1 ..., m, q1.0 q1.1 ... q2.0 ..., pi.0 pi.1 ...,
    each with ``.weight`` and ``.bias`` in the shapes of torch's own layers.

    :return: for each name pairs of a parameter and the view of it that is meant, to be concatenated along the last axis
    """
    layers = {}

    def whole(parameter):
        return parameter

    def add(name, weights, bias):
        layers[f"{name}.weight"] = weights
        layers[f"{name}.bias"] = [bias]

    def add_modules(names, modules):
        for name, module in zip(names, modules, strict=True):
            add(name, [(module.weight, whole)], (module.bias, whole))

    def linear_layers(module):
        return [layer for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]

    if isinstance(network, Encoder):
        extractor, head = linear_layers(network.state.features_extractor), linear_layers(network.state.head)
        if isinstance(extractor[0], nn.Conv2d):
            names = [*(f"f.conv{i}" for i in range(len(extractor))), "f.out"]
        else:
            names = [f"f.{i}" for i in range(len(extractor) + 1)]
        add_modules(names, extractor + head)
        g = network.state_action
        add_modules(["g.action"], linear_layers(g.action_embedding))
        add("g.0", [(g.state_input.weight, whole), (g.action_input.weight, whole)], (g.state_input.bias, whole))
        rest = linear_layers(g.layers)
        add_modules([f"g.{i + 1}" for i in range(len(rest))], rest)
        add_modules(["m"], linear_layers(network.predictor))
    elif isinstance(network, Critic):
        stacked = [layer for layer in network.layers if hasattr(layer, "weight")]
        for head in range(network.n_critics):
            for i, layer in enumerate(stacked):
                # Held as (heads, inputs, outputs)
                weight, bias = (lambda p, head=head: p[head].T), (lambda p, head=head: p[head, 0])
                add(f"q{head + 1}.{i}", [(layer.weight, weight)], (layer.bias, bias))
    else:
        assert isinstance(network, Actor)
        modules = linear_layers(network)
        add_modules([f"pi.{i}" for i in range(len(modules))], modules)
    in_layout = {id(parameter) for parts in layers.values() for parameter, _ in parts}
    assert in_layout == {id(parameter) for parameter in network.parameters()}, "A parameter is missing here"
    return layers


def read_weights(network, attribute="data"):
    """Copies of the weights, or with ``attribute="grad"`` of their gradients, as a dict of arrays."""
    return {
        name: np.concatenate([view(getattr(parameter, attribute)).numpy() for parameter, view in parts], axis=-1)
        for name, parts in layout(network).items()
    }


def write_weights(network, values):
    """Set the weights from a dict of arrays, which may have others too."""
    for name, parts in layout(network).items():
        views = [view(parameter.data) for parameter, view in parts]
        ends = np.cumsum([view.shape[-1] for view in views])
        assert values[name].shape == (*views[0].shape[:-1], ends[-1]), name
        for view, piece in zip(views, np.split(values[name], ends[:-1], axis=-1), strict=True):
            view.copy_(th.as_tensor(piece))


def snapshot(module):
    """Copies of all parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(first, second):
    """Whether two snapshots are equal to the last bit."""
    return first.keys() == second.keys() and all(th.equal(first[name], second[name]) for name in first)


@contextmanager
def file_size_limit(n):
    """Limit the size of files in bytes, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
