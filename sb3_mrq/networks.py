"""
Networks of MR.Q: state encoder f, state-action encoder g, linear MDP predictor m, value heads Q and actor.

Shapes: ``B`` batch, ``Z`` size of z_s (512), ``ZSA`` size of z_sa (512), ``A`` size of the action vector.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_mrq import losses
from sb3_mrq.observations import Observation, images_to_floats, split_observation


def init_weights(module: nn.Module) -> None:
    """
    Initialise linear layers and convolutions with Xavier-uniform weights (gain sqrt(2)) and zero biases. For use with
    ``Module.apply``.

    :param module: a module; other types do not change
    """
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight, gain=math.sqrt(2))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def make_activation(activation_fn: type[nn.Module]) -> nn.Module:
    """
    :param activation_fn: activation function
    :return: the activation, in place if possible; its input must not be used elsewhere
    """
    # In place is faster, as memory limits the speed; the gradient of ELU needs only the output
    return nn.ELU(inplace=True) if activation_fn is nn.ELU else activation_fn()


class LayerNormActivation(nn.Module):
    """
    Layer normalisation without learnable scale or bias, then an activation.

    :param activation_fn: activation function
    """

    def __init__(self, activation_fn: type[nn.Module]):
        super().__init__()
        self.activation = make_activation(activation_fn)

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (..., features)
        :return: same shape
        """
        return self.activation(F.layer_norm(x, x.shape[-1:]))


def layer_norm_mlp(input_dim: int, net_arch: list[int], activation_fn: type[nn.Module], output_dim: int = 0) -> nn.Sequential:
    """
    Linear layer, layer norm and activation for each hidden layer, then a linear output layer.

    :param input_dim: size of the input
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function
    :param output_dim: size of the output, 0 for no output layer
    :return: the network
    """
    layers: list[nn.Module] = []
    for hidden in net_arch:
        layers += [nn.Linear(input_dim, hidden), LayerNormActivation(activation_fn)]
        input_dim = hidden
    if output_dim > 0:
        layers.append(nn.Linear(input_dim, output_dim))
    return nn.Sequential(*layers)


class StateEncoder(nn.Module):
    """
    State encoder f: a features extractor, then a linear layer, z_s = act(LN(Linear(extractor(s)))).

    On a CPU, the extractor processes a batch of images in small parts. Intermediate results then stay in the processor's
    cache, which takes a third of the time and a fraction of the memory.

    :param features_extractor: network from preprocessed observations to (B, features_dim)
    :param features_dim: size of the extractor's output
    :param z_s_dim: size of the state embedding
    :param activation_fn: activation function
    :param images_at_once: number of observations per thread that the extractor processes at once on a CPU, None for the whole
        batch. None is required if observations of a batch affect each other, as in batch normalisation.
    """

    # Number of parts of a batch in compiled code, which compiles each of them
    COMPILED_PARTS = 8

    def __init__(
        self,
        features_extractor: nn.Module,
        features_dim: int,
        z_s_dim: int,
        activation_fn: type[nn.Module],
        images_at_once: int | None = None,
    ):
        super().__init__()
        self.images_at_once = images_at_once
        self.features_extractor = features_extractor
        self.head = nn.Sequential(nn.Linear(features_dim, z_s_dim), LayerNormActivation(activation_fn))
        self.head.apply(init_weights)

    def forward(self, obs: Observation) -> th.Tensor:
        """
        :param obs: preprocessed observations, (B, ...) or a dict of these; images may be uint8
        :return: z_s, (B, Z)
        """
        features = [self.features_extractor(images_to_floats(part)) for part in self._split(obs)]
        return self.head(features[0] if len(features) == 1 else th.cat(features))

    def _split(self, obs: Observation) -> list[Observation]:
        if self.images_at_once is None or self.head[0].weight.device.type != "cpu":
            return [obs]
        if th.jit.is_tracing() or th.compiler.is_exporting():
            return [obs]
        if th.compiler.is_compiling():
            batch_size = len(next(iter(obs.values()))) if isinstance(obs, dict) else len(obs)
            n = math.ceil(batch_size / self.COMPILED_PARTS)
        else:
            n = self.images_at_once * th.get_num_threads()
        return split_observation(obs, n)


class StateActionEncoder(nn.Module):
    """
    State-action encoder g: z_a = act(Linear(a)), z_sa = LNMLP([z_s, z_a]) without an activation of the output.

    The first layer on [z_s, z_a] has two matrices, one for z_s and one for z_a, whose outputs are added. The function is the
    same, but the outputs for the actions of a whole horizon can be computed at once, and the policy loss needs no gradient of
    the matrix for z_s.

    :param z_s_dim: size of the state embedding
    :param action_dim: size of the action vector
    :param z_a_dim: size of the action embedding
    :param z_sa_dim: size of the state-action embedding
    :param net_arch: sizes of the hidden layers, at least one
    :param activation_fn: activation function
    """

    def __init__(
        self, z_s_dim: int, action_dim: int, z_a_dim: int, z_sa_dim: int, net_arch: list[int], activation_fn: type[nn.Module]
    ):
        super().__init__()
        self.action_embedding = nn.Sequential(nn.Linear(action_dim, z_a_dim), make_activation(activation_fn))
        self.state_input = nn.Linear(z_s_dim, net_arch[0])
        self.action_input = nn.Linear(z_a_dim, net_arch[0], bias=False)
        self.layers = nn.Sequential(
            LayerNormActivation(activation_fn), *layer_norm_mlp(net_arch[0], net_arch[1:], activation_fn, z_sa_dim)
        )
        self.apply(init_weights)
        # Xavier's bound for the matrix of both parts, whose input is [z_s, z_a]
        bound = math.sqrt(2) * math.sqrt(6 / (z_s_dim + z_a_dim + net_arch[0]))
        for part in (self.state_input, self.action_input):
            nn.init.uniform_(part.weight, -bound, bound)

    def project_action(self, action: th.Tensor) -> th.Tensor:
        """
        Output of the part of the first layer that depends only on the action.

        :param action: (..., A)
        :return: (..., net_arch[0])
        """
        return self.action_input(self.action_embedding(action))

    def join(self, z_s: th.Tensor, projected_action: th.Tensor) -> th.Tensor:
        """
        :param z_s: (..., Z)
        :param projected_action: output of ``project_action``, (..., net_arch[0]), with leading axes that broadcast
        :return: z_sa, (..., ZSA)
        """
        return self.layers(self.state_input(z_s) + projected_action)

    def embed_all(self, z_s: th.Tensor, actions: th.Tensor) -> th.Tensor:
        """
        :param z_s: (B, Z)
        :param actions: actions that are all embedded with each state, (K, A)
        :return: z_sa, (B * K, ZSA)
        """
        return self.join(z_s.unsqueeze(1), self.project_action(actions)).flatten(0, 1)

    def forward(self, z_s: th.Tensor, action: th.Tensor) -> th.Tensor:
        """
        :param z_s: (B, Z)
        :param action: (B, A)
        :return: z_sa, (B, ZSA)
        """
        return self.join(z_s, self.project_action(action))


class MDPPredictor(nn.Module):
    """
    MDP predictor m: a linear layer from z_sa to termination, next z_s and reward logits. It is linear so that z_sa becomes
    linearly related to the value (theorem 1 of the paper).

    :param z_sa_dim: size of the state-action embedding
    :param z_s_dim: size of the state embedding
    :param n_bins: number of reward bins
    :param bins_limit: see :func:`sb3_mrq.losses.reward_bins`
    """

    bins: th.Tensor

    def __init__(self, z_sa_dim: int, z_s_dim: int, n_bins: int, bins_limit: float):
        super().__init__()
        self.split_sizes = [1, z_s_dim, n_bins]
        self.linear = nn.Linear(z_sa_dim, sum(self.split_sizes))
        self.linear.apply(init_weights)
        self.register_buffer("bins", losses.reward_bins(n_bins, bins_limit), persistent=False)

    def forward(self, z_sa: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param z_sa: (B, ZSA)
        :return: predicted termination (B, 1), next z_s (B, Z), reward logits (B, n_bins)
        """
        terminated, z_s, reward_logits = self.linear(z_sa).split(self.split_sizes, dim=-1)
        return terminated, z_s, reward_logits


class Predictions(NamedTuple):
    """
    Predictions of the encoder over a horizon.

    :param terminated: (B, H)
    :param z_s: embeddings of the next observations, (B, H, Z)
    :param reward_logits: (B, H, n_bins)
    """

    terminated: th.Tensor
    z_s: th.Tensor
    reward_logits: th.Tensor


class Encoder(nn.Module):
    """
    The networks that the encoder loss trains.

    :param state: state encoder f
    :param state_action: state-action encoder g
    :param predictor: MDP predictor m
    """

    def __init__(self, state: StateEncoder, state_action: StateActionEncoder, predictor: MDPPredictor):
        super().__init__()
        self.state = state
        self.state_action = state_action
        self.predictor = predictor
        # Set by the policy, as in SB3's TD3
        self.optimizer: th.optim.Optimizer

    def unroll(self, z_s: th.Tensor, actions: th.Tensor) -> Predictions:
        """
        Predict a horizon from the first embedding and the actions. Each predicted embedding is the input of the next step
        (equation 13 of the paper).

        :param z_s: embedding of the first observation, (B, Z)
        :param actions: (B, H, A)
        :return: the predictions
        """
        predictions = []
        for projected_action in self.state_action.project_action(actions.transpose(0, 1)).unbind():
            prediction = self.predictor(self.state_action.join(z_s, projected_action))
            z_s = prediction[1]
            predictions.append(prediction)
        terminated, next_z_s, reward_logits = (th.stack(part).transpose(0, 1) for part in zip(*predictions, strict=True))
        return Predictions(terminated.squeeze(-1), next_z_s, reward_logits)


class EnsembleLinear(nn.Module):
    """
    Linear layers of several independent networks, computed as one batched matrix product.

    :param n: number of networks
    :param input_dim: size of the input
    :param output_dim: size of the output
    """

    def __init__(self, n: int, input_dim: int, output_dim: int):
        super().__init__()
        # (inputs, outputs), transposed relative to nn.Linear: the batched product returns gradients in this layout
        self.weight = nn.Parameter(th.empty(n, input_dim, output_dim))
        self.bias = nn.Parameter(th.zeros(n, 1, output_dim))
        for weight in self.weight.data:
            nn.init.xavier_uniform_(weight, gain=math.sqrt(2))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: (n, B, input_dim)
        :return: (n, B, output_dim)
        """
        return th.baddbmm(self.bias, x, self.weight)


class Critic(nn.Module):
    """
    Q: independent value heads on z_sa. Each has a linear layer, layer norm and activation for each hidden layer, then a linear
    layer with one output.

    This output layer computes in float32 even if autocast enables bfloat16. A bfloat16 value has a resolution of half a per
    cent, which hides the differences between actions in a state, so that learning would start late.

    :param z_sa_dim: size of the state-action embedding
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function
    :param n_critics: number of heads
    """

    # Unit of the values: mean absolute reward of the buffer when the targets were last replaced. Replacing the targets copies
    # it, so the target critic has the scale that it was trained with.
    reward_scale: th.Tensor

    def __init__(self, z_sa_dim: int, net_arch: list[int], activation_fn: type[nn.Module], n_critics: int = 2):
        super().__init__()
        self.n_critics = n_critics
        sizes = [z_sa_dim, *net_arch]
        layers: list[nn.Module] = []
        for input_dim, hidden in pairwise(sizes):
            layers += [EnsembleLinear(n_critics, input_dim, hidden), LayerNormActivation(activation_fn)]
        self.layers = nn.Sequential(*layers, EnsembleLinear(n_critics, sizes[-1], 1))
        self.register_buffer("reward_scale", th.ones(()))
        # Set by the policy, as in SB3's TD3
        self.optimizer: th.optim.Optimizer

    def forward(self, z_sa: th.Tensor) -> th.Tensor:
        """
        :param z_sa: (B, ZSA)
        :return: values in units of the reward scale, (B, n_critics)
        """
        x = z_sa.expand(self.n_critics, *z_sa.shape)
        *hidden_layers, output_layer = self.layers
        assert isinstance(output_layer, EnsembleLinear)
        for layer in hidden_layers:
            x = layer(x)
        with th.autocast(x.device.type, enabled=False):
            q_values = output_layer(x.to(output_layer.weight.dtype))
        return q_values.squeeze(-1).transpose(0, 1)

    def value(self, output: th.Tensor) -> th.Tensor:
        """
        :param output: output of ``forward``
        :return: values, (B, n_critics)
        """
        return output

    def loss(self, output: th.Tensor, target: th.Tensor) -> th.Tensor:
        """
        :param output: output of ``forward``
        :param target: (B, 1)
        :return: 0-d
        """
        return losses.value_loss(output, target)


class Actor(nn.Module):
    """
    Policy pi without its final activation: an LNMLP on z_s. The final activation depends on the action space, see
    :mod:`sb3_mrq.action_spaces`.

    :param z_s_dim: size of the state embedding
    :param action_dim: size of the action vector
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function
    """

    def __init__(self, z_s_dim: int, action_dim: int, net_arch: list[int], activation_fn: type[nn.Module]):
        super().__init__()
        self.layers = layer_norm_mlp(z_s_dim, net_arch, activation_fn, action_dim)
        self.layers.apply(init_weights)
        # Set by the policy, as in SB3's TD3
        self.optimizer: th.optim.Optimizer

    def forward(self, z_s: th.Tensor) -> th.Tensor:
        """
        :param z_s: (B, Z)
        :return: pre-activation u, (B, A)
        """
        return self.layers(z_s)
