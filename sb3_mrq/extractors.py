"""
Features extractors of MR.Q's state encoder, for SB3's ``features_extractor_class``.

Shapes: ``B`` batch, images (C, H, W). Inputs are preprocessed observations: floats, images in [0, 1], one-hot vectors.
"""

import math

import torch as th
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_flattened_obs_dim, is_image_space
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn

from sb3_mrq.arguments import UnsupportedSpaceError, explain_foreign
from sb3_mrq.networks import init_weights, layer_norm_mlp, make_activation

MIN_SIZE = "31x31"
# Works for images of any size
FLATTEN = (
    "Small ones can be flattened: policy_kwargs=dict(features_extractor_class=FlattenExtractor), from "
    "stable_baselines3.common.torch_layers; or, in a Dict, gymnasium.wrappers.FlattenObservation with MlpPolicy."
)


def check_observation_space(space: spaces.Space) -> None:
    """
    :param space: the observation space
    :raises UnsupportedSpaceError: if the space is not supported
    """
    if isinstance(space, spaces.Dict) and not space.spaces:
        raise UnsupportedSpaceError(f"The observation space {space} has no entries: nothing can be learned from it.")
    for part in space.spaces.values() if isinstance(space, spaces.Dict) else [space]:
        supported = isinstance(part, (spaces.Box, spaces.Discrete, spaces.MultiBinary)) or (
            isinstance(part, spaces.MultiDiscrete) and part.nvec.ndim == 1
        )
        if not supported or 0 in part.shape or (isinstance(part, spaces.Box) and part.shape == ()):  # type: ignore[operator]
            raise UnsupportedSpaceError(
                f"The observation space {space} is not supported. MRQ supports Box, Discrete, MultiDiscrete with one axis, "
                "MultiBinary, and a Dict of these: convert it, for example with gymnasium.wrappers.FlattenObservation."
            )


def vector_mlp(input_dim: int, net_arch: tuple[int, ...], activation_fn: type[nn.Module]) -> nn.Sequential:
    """
    Linear layer, layer norm and activation for each hidden layer, with initialised weights.

    With zero biases, layer norm divides out a factor common to the whole input: of one number, only the sign would remain. So
    for inputs of one or two elements, the biases of the first layer are random, as if a constant 1 were one more element.

    :param input_dim: size of the input
    :param net_arch: sizes of the hidden layers
    :param activation_fn: activation function
    :return: the network
    """
    layers = layer_norm_mlp(input_dim, list(net_arch), activation_fn)
    layers.apply(init_weights)
    first = layers[0]
    if input_dim <= 2 and isinstance(first, nn.Linear):
        bound = math.sqrt(2) * math.sqrt(6 / (input_dim + 1 + first.out_features))
        nn.init.uniform_(first.bias, -bound, bound)
    return layers


class MLPExtractor(BaseFeaturesExtractor):
    """
    Flatten, then linear layer, layer norm and activation for each hidden layer.

    :param observation_space: any supported space except images and Dict
    :param net_arch: sizes of the hidden layers, of which the last one is ``features_dim``
    :param activation_fn: activation function
    :raises UnsupportedSpaceError: if the space is an image space or a Dict
    """

    @explain_foreign("MLPExtractor")
    def __init__(
        self, observation_space: spaces.Space, net_arch: tuple[int, ...] = (512, 512), activation_fn: type[nn.Module] = nn.ELU
    ):
        if is_image_space(observation_space):
            raise UnsupportedSpaceError(
                f"MlpPolicy does not take images ({observation_space}): use CnnPolicy for {MIN_SIZE} pixels or more. {FLATTEN}"
            )
        if isinstance(observation_space, spaces.Dict):
            raise UnsupportedSpaceError(
                f"MlpPolicy does not take Dict observations ({observation_space}): use MultiInputPolicy."
            )
        super().__init__(observation_space, net_arch[-1])
        self.layers = vector_mlp(get_flattened_obs_dim(observation_space), net_arch, activation_fn)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: (B, ...)
        :return: (B, features_dim)
        """
        return self.layers(observations.flatten(1))


class CNNExtractor(BaseFeaturesExtractor):
    """
    Shift images to [-0.5, 0.5], then four 3x3 convolutions (32 channels, strides 2, 2, 2 and 1, no padding), then flatten.

    :param observation_space: channel-first images, at least 31x31
    :param activation_fn: activation function
    :param normalized_image: whether images are normalised already (``normalize_images=False``)
    :raises UnsupportedSpaceError: if the space is not an image space, or if the images are too small
    """

    CHANNELS = 32
    STRIDES = (2, 2, 2, 1)
    # See StateEncoder; None in a subclass whose output for an image depends on the other images of the batch
    images_at_once: int | None = 8

    @explain_foreign("CNNExtractor")
    def __init__(
        self, observation_space: spaces.Space, activation_fn: type[nn.Module] = nn.ELU, normalized_image: bool = False
    ):
        if not is_image_space(observation_space, normalized_image=normalized_image):
            raise UnsupportedSpaceError(
                f"CnnPolicy takes images (Box spaces with three axes, uint8, from 0 to 255), not {observation_space}: use "
                "MlpPolicy for vectors, MultiInputPolicy for a Dict, or normalize_images=False in policy_kwargs for "
                "channel-first float images that are already in [0, 1]."
            )
        assert observation_space.shape is not None
        channels, height, width = observation_space.shape
        size = height, width
        for stride in self.STRIDES:
            size = (size[0] - 3) // stride + 1, (size[1] - 3) // stride + 1
        if width < min(channels, height):
            raise UnsupportedSpaceError(
                f"The channels of the images in {observation_space} come last, but must come first: transpose them, with "
                "gymnasium.wrappers.TransformObservation."
            )
        if min(size) < 1:
            raise UnsupportedSpaceError(
                f"Images of {height}x{width} pixels are too small for the convolutions, which need at least {MIN_SIZE} (space "
                f"{observation_space}): enlarge them, for example with gymnasium.wrappers.ResizeObservation, or pass your own "
                f"features_extractor_class in policy_kwargs. {FLATTEN}"
            )
        super().__init__(observation_space, self.CHANNELS * size[0] * size[1])
        layers: list[nn.Module] = []
        for stride in self.STRIDES:
            layers += [nn.Conv2d(channels, self.CHANNELS, kernel_size=3, stride=stride), make_activation(activation_fn)]
            channels = self.CHANNELS
        # Channels last in memory nearly halves the time of the convolutions on a CPU
        self.layers = nn.Sequential(*layers, nn.Flatten()).to(memory_format=th.channels_last)  # type: ignore[call-overload]
        self.layers.apply(init_weights)

    def forward(self, observations: th.Tensor) -> th.Tensor:
        """
        :param observations: images in [0, 1], (B, C, H, W)
        :return: (B, features_dim)
        """
        return self.layers((observations - 0.5).contiguous(memory_format=th.channels_last))


class MultiInputExtractor(BaseFeaturesExtractor):
    """
    A CNN for each image of a Dict and one MLP for all other observations, with concatenated features.

    :param observation_space: Dict of images and vectors
    :param net_arch: sizes of the hidden layers of the MLP
    :param activation_fn: activation function
    :param normalized_image: whether images are normalised already (``normalize_images=False``)
    :raises UnsupportedSpaceError: if the space is not a Dict, or if an image is too small
    """

    images_at_once = CNNExtractor.images_at_once

    @explain_foreign("MultiInputExtractor")
    def __init__(
        self,
        observation_space: spaces.Dict,
        net_arch: tuple[int, ...] = (512, 512),
        activation_fn: type[nn.Module] = nn.ELU,
        normalized_image: bool = False,
    ):
        if not isinstance(observation_space, spaces.Dict):
            raise UnsupportedSpaceError(
                f"MultiInputPolicy takes Dict observations, not {observation_space}: use MlpPolicy or CnnPolicy."
            )
        cnns: dict[str, nn.Module] = {}
        vector_dim = 0
        features_dim = 0
        for key, space in observation_space.spaces.items():
            if is_image_space(space, normalized_image=normalized_image):
                cnn = CNNExtractor(space, activation_fn, normalized_image)
                cnns[key] = cnn
                features_dim += cnn.features_dim
            else:
                vector_dim += get_flattened_obs_dim(space)
        if vector_dim > 0:
            features_dim += net_arch[-1]
        super().__init__(observation_space, features_dim)
        # Not an nn.ModuleDict, which rejects some valid keys of a space ("pop", or names with a dot)
        self.image_keys = list(cnns)
        if not cnns:
            self.images_at_once = None
        self.cnns = nn.ModuleList(cnns.values())
        self.vector_keys = [key for key in observation_space.spaces if key not in cnns]
        self.mlp = vector_mlp(vector_dim, net_arch, activation_fn) if vector_dim > 0 else None

    def forward(self, observations: dict[str, th.Tensor]) -> th.Tensor:
        """
        :param observations: observations by key, (B, ...) each
        :return: (B, features_dim)
        """
        features = [cnn(observations[key]) for key, cnn in zip(self.image_keys, self.cnns, strict=True)]
        if self.mlp is not None:
            features.append(self.mlp(th.cat([observations[key].flatten(1) for key in self.vector_keys], dim=1)))
        return th.cat(features, dim=1)
