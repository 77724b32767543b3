"""
Policies of MR.Q: networks for an observation and an action space, their optimisers, and acting.
"""

import inspect
from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_mrq.action_spaces import CategoricalActions, check_can_list, make_actions
from sb3_mrq.arguments import check_argument, explain_foreign
from sb3_mrq.extractors import CNNExtractor, MLPExtractor, MultiInputExtractor
from sb3_mrq.hyperparameters import POLICY_REQUIREMENTS, UNITS
from sb3_mrq.networks import (
    Actor,
    Critic,
    Encoder,
    EnsembleLinear,
    LayerNormActivation,
    MDPPredictor,
    StateActionEncoder,
    StateEncoder,
)
from sb3_mrq.observations import map_observation


def complete_net_arch(
    net_arch: list[int] | dict[str, list[int]] | None, default: dict[str, list[int]]
) -> dict[str, list[int]]:
    """
    :param net_arch: hidden layers of ``encoder``, ``qf`` and ``pi``; a list sets ``qf`` and ``pi``, as in TD3
    :param default: hidden layers for missing keys
    :return: hidden layers of all three
    :raises ValueError: if a key is unknown, a size is no integer or below 2, or the encoder has no hidden layers
    """
    given: Any = {} if net_arch is None else net_arch
    if isinstance(given, (list, tuple, np.ndarray)):
        given = {"qf": given, "pi": given}
    if not isinstance(given, Mapping):
        raise ValueError(f"net_arch is {given!r}, but must be a list such as [256, 256], or a dict of lists.")
    unknown = given.keys() - default
    if unknown:
        raise ValueError(f"net_arch has the keys {', '.join(default)}, not {', '.join(sorted(map(str, unknown)))}.")
    complete = {}
    for key, sizes in (default | dict(given)).items():
        layers = list(sizes) if isinstance(sizes, (list, tuple, np.ndarray)) else None
        if layers is None or not all(map(UNITS.accepts, layers)) or (key == "encoder" and not layers):
            raise ValueError(
                f"net_arch[{key!r}] is {sizes!r}, but must be a list of integers: each layer needs at least two units, and "
                "the encoder at least one layer."
            )
        complete[key] = [int(size) for size in layers]
    return complete


class MRQPolicy(BasePolicy):
    """
    Policy class of MR.Q: encoder, value heads and actor with their target copies and optimisers. A greedy policy has no actor.

    :param observation_space: Observation space
    :param action_space: Action space
    :param lr_schedule: Learning rate schedule of value heads and actor
    :param net_arch: Hidden layers as a dict with the keys ``encoder``, ``qf`` and ``pi`` (missing keys keep their
        defaults), or as a list for ``qf`` and ``pi``. ``encoder`` sets the layers of both the extractor of vector observations
        and the state-action encoder.
    :param activation_fn: Activation function of encoder and value heads
    :param actor_activation_fn: Activation function of the actor
    :param z_s_dim: Size of the state embedding
    :param z_a_dim: Size of the action embedding
    :param z_sa_dim: Size of the state-action embedding
    :param n_reward_bins: Number of bins of the two-hot reward encoding
    :param reward_bins_limit: The outermost bins are rewards of plus and minus ``exp(reward_bins_limit) - 1``
    :param gumbel_temperature: Temperature of the Gumbel-softmax of discrete actions
    :param features_extractor_class: Features extractor of the state encoder, trained with the encoder loss. It has a target
        copy like the rest of the encoder.
    :param features_extractor_kwargs: Keyword arguments to pass to the features extractor.
    :param normalize_images: Whether to normalize images or not, dividing by 255.0 (True by default)
    :param optimizer_class: The optimizer to use, ``th.optim.AdamW`` by default
    :param optimizer_kwargs: Additional keyword arguments, excluding the learning rate, to pass to the optimizer. The
        default weight decay of AdamW is 1e-4.
    :param n_critics: Number of value heads
    :param greedy: Whether to take the action of the highest value, which requires discrete actions, instead of an actor's
    :param encoder_lr_schedule: Learning rate schedule of the encoder, ``lr_schedule`` if None
    """

    encoder: Encoder
    encoder_target: Encoder
    critic: Critic
    critic_target: Critic
    actor: Actor | None
    actor_target: Actor | None

    default_net_arch: ClassVar[dict[str, list[int]]] = {"encoder": [512, 512], "qf": [512, 512, 512], "pi": [512, 512]}
    default_weight_decay = 1e-4

    @explain_foreign("MRQPolicy")
    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.ELU,
        actor_activation_fn: type[nn.Module] = nn.ReLU,
        z_s_dim: int = 512,
        z_a_dim: int = 256,
        z_sa_dim: int = 512,
        n_reward_bins: int = 65,
        reward_bins_limit: float = 10.0,
        gumbel_temperature: float = 10.0,
        features_extractor_class: type[BaseFeaturesExtractor] = MLPExtractor,
        features_extractor_kwargs: dict[str, Any] | None = None,
        normalize_images: bool = True,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        n_critics: int = 2,
        greedy: bool = False,
        encoder_lr_schedule: Schedule | None = None,
    ):
        given = dict(locals())
        for name, requirement in POLICY_REQUIREMENTS.items():
            check_argument(name, given[name], requirement)
        super().__init__(
            observation_space,
            action_space,
            features_extractor_class,
            features_extractor_kwargs,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
            squash_output=True,
            normalize_images=normalize_images,
        )
        self.net_arch = complete_net_arch(net_arch, self.default_net_arch)
        self.activation_fn = activation_fn
        self.actor_activation_fn = actor_activation_fn
        self.z_s_dim = z_s_dim
        self.z_a_dim = z_a_dim
        self.z_sa_dim = z_sa_dim
        self.n_reward_bins = n_reward_bins
        self.reward_bins_limit = reward_bins_limit
        self.gumbel_temperature = gumbel_temperature
        self.n_critics = n_critics
        self.greedy = greedy
        #: names of the networks that are trained
        self.networks = ("encoder", "critic") if greedy else ("encoder", "critic", "actor")
        self.actions = make_actions(action_space, gumbel_temperature)
        if greedy:
            check_can_list(self.actions, action_space)
        if isinstance(action_space, spaces.Box):
            # In float64, as the difference of the bounds may overflow float32
            self._low, self._high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
        self._build(lr_schedule, encoder_lr_schedule or lr_schedule)

    def _build(self, lr_schedule: Schedule, encoder_lr_schedule: Schedule) -> None:
        self.encoder = self.make_encoder()
        self.critic = self.make_critic()
        self.actor = None if self.greedy else self.make_actor()
        self.encoder_target = deepcopy(self.encoder).requires_grad_(False)
        self.critic_target = deepcopy(self.critic).requires_grad_(False)
        self.actor_target = None if self.actor is None else deepcopy(self.actor).requires_grad_(False)
        self.encoder.optimizer = self.make_optimizer(self.encoder, encoder_lr_schedule(1))
        self.critic.optimizer = self.make_optimizer(self.critic, lr_schedule(1))
        if self.actor is not None:
            self.actor.optimizer = self.make_optimizer(self.actor, lr_schedule(1))
        # The initial targets have not learned any values yet
        self.critic_target.reward_scale.zero_()
        self._mode_dependent = {network: mode_dependent_modules(getattr(self, network)) for network in self.networks}
        super().train(False)

    @property
    def device(self) -> th.device:
        """Device of the networks, faster than in BasePolicy, which searches all parameters at each action."""
        return self.encoder.predictor.bins.device

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """
        Create the features extractor. The extractors of this package and their subclasses get ``net_arch``, ``activation_fn``
        and ``normalize_images`` from the policy, if their constructors have these arguments and ``features_extractor_kwargs``
        does not set them.
        """
        kwargs: dict[str, Any] = {}
        if issubclass(self.features_extractor_class, (MLPExtractor, CNNExtractor, MultiInputExtractor)):
            kwargs["activation_fn"] = self.activation_fn
        if issubclass(self.features_extractor_class, (MLPExtractor, MultiInputExtractor)):
            kwargs["net_arch"] = self.net_arch["encoder"]
        if issubclass(self.features_extractor_class, (CNNExtractor, MultiInputExtractor)):
            kwargs["normalized_image"] = not self.normalize_images
        parameters = inspect.signature(self.features_extractor_class).parameters
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            kwargs = {name: value for name, value in kwargs.items() if name in parameters}
        return self.features_extractor_class(self.observation_space, **(kwargs | self.features_extractor_kwargs))

    def make_encoder(self) -> Encoder:
        """Create the state encoder, the state-action encoder and the linear MDP predictor."""
        extractor = self.make_features_extractor()
        images_at_once = extractor.images_at_once if isinstance(extractor, (CNNExtractor, MultiInputExtractor)) else None
        state_action = StateActionEncoder(
            self.z_s_dim, self.actions.dim, self.z_a_dim, self.z_sa_dim, self.net_arch["encoder"], self.activation_fn
        )
        if self.greedy:
            # Xavier's rule counts all inputs, but only one per dimension is not zero. At default sizes, actions would be a
            # hundredth of the variance in the first layer of g, and values would be late to tell them apart.
            layer = state_action.action_embedding[0]
            assert isinstance(self.actions, CategoricalActions) and isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, std=len(self.actions.sizes) ** -0.5)
        return Encoder(
            StateEncoder(extractor, extractor.features_dim, self.z_s_dim, self.activation_fn, images_at_once),
            state_action,
            MDPPredictor(self.z_sa_dim, self.z_s_dim, self.n_reward_bins, self.reward_bins_limit),
        )

    def make_critic(self) -> Critic:
        """Create the value heads."""
        return Critic(self.z_sa_dim, self.net_arch["qf"], self.activation_fn, self.n_critics)

    def make_actor(self) -> Actor:
        """Create the actor."""
        return Actor(self.z_s_dim, self.actions.dim, self.net_arch["pi"], self.actor_activation_fn)

    def make_optimizer(self, network: nn.Module, learning_rate: float) -> th.optim.Optimizer:
        """
        :param network: network whose parameters to optimise
        :param learning_rate: initial learning rate
        :return: the optimiser
        """
        optimizer_class: Any = self.optimizer_class
        kwargs = dict(self.optimizer_kwargs)
        if isinstance(optimizer_class, partial):
            optimizer_class, kwargs = optimizer_class.func, optimizer_class.keywords | kwargs
        if "lr" in kwargs:
            raise ValueError("optimizer_kwargs sets lr: pass MRQ learning_rate and encoder_learning_rate instead.")
        if issubclass(optimizer_class, th.optim.AdamW):
            kwargs.setdefault("weight_decay", self.default_weight_decay)
        if optimizer_class is th.optim.AdamW:
            kwargs.setdefault("fused", not {"foreach", "capturable", "differentiable"} & kwargs.keys())
        return optimizer_class(network.parameters(), lr=learning_rate, **kwargs)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        data = super()._get_constructor_parameters()
        data.update(
            dict(
                lr_schedule=self._dummy_schedule,  # dummy lr schedule, not needed for loading policy alone
                net_arch=self.net_arch,
                activation_fn=self.activation_fn,
                actor_activation_fn=self.actor_activation_fn,
                z_s_dim=self.z_s_dim,
                z_a_dim=self.z_a_dim,
                z_sa_dim=self.z_sa_dim,
                n_reward_bins=self.n_reward_bins,
                reward_bins_limit=self.reward_bins_limit,
                gumbel_temperature=self.gumbel_temperature,
                features_extractor_class=self.features_extractor_class,
                features_extractor_kwargs=self.features_extractor_kwargs,
                optimizer_class=self.optimizer_class,
                optimizer_kwargs=self.optimizer_kwargs,
                n_critics=self.n_critics,
                greedy=self.greedy,
            )
        )
        return data

    def is_image(self, space: spaces.Space) -> bool:
        """
        :param space: the observation space, or a subspace of a Dict
        :return: whether its observations are processed as images
        """
        as_vector = issubclass(self.features_extractor_class, MLPExtractor)
        return not as_vector and is_image_space(space, normalized_image=not self.normalize_images)

    def preprocess(self, obs: PyTorchObs) -> PyTorchObs:
        """
        :param obs: observations of the environment, (B, ...) or a dict of these
        :return: input of the state encoder: floats, with discrete observations as one-hot vectors. uint8 images do not change;
            the state encoder divides them by 255.
        """
        return map_observation(self._preprocess, obs, self.observation_space)

    def _preprocess(self, obs: th.Tensor, space: spaces.Space) -> th.Tensor:
        if obs.dtype == th.uint8 and self.normalize_images and is_image_space(space):
            return obs
        # SB3 expects spaces that start at zero
        if isinstance(space, spaces.Discrete) and space.start != 0:
            obs = obs - int(space.start)
        elif isinstance(space, spaces.MultiDiscrete) and np.any(space.start):
            # Created on the device, as a copy from the host could not be captured
            start = th.stack([obs.new_full((), int(value)) for value in space.start.flat])
            obs = obs - start.view(space.start.shape)
        return preprocess_obs(obs, space, normalize_images=self.normalize_images)  # type: ignore[return-value]

    def pre_activation(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: observations of the environment, (B, ...) or a dict of these
        :return: output of the actor before the final activation, (B, A)
        """
        assert self.actor is not None, "A greedy policy has no actor"
        return self.actor(self.encoder.state(self.preprocess(obs)))

    def forward(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._predict(observation, deterministic=deterministic)

    def act(self, observation: PyTorchObs, sample: bool) -> th.Tensor:
        """
        Compute action vectors, before exploration noise, decoding and scaling. Subclasses may override this.

        :param observation: observations of the environment, (B, ...) or a dict of these
        :param sample: whether to sample discrete actions from the Gumbel-softmax; no effect on Box actions
        :return: action vectors a, (B, A)
        """
        return self.choose(self.encoder.state(self.preprocess(observation)), sample)

    def choose(self, z_s: th.Tensor, sample: bool = False) -> th.Tensor:
        """
        :param z_s: embeddings of observations, (B, Z)
        :param sample: whether to sample discrete actions from the Gumbel-softmax; no effect on Box actions and greedy policies
        :return: action vectors a; of a greedy policy, of the actions of the highest value, mean over the heads, (B, A)
        """
        if self.actor is None:
            return self.best_action(z_s)
        pre_activation = self.actor(z_s)
        return self.actions.activation(pre_activation, self.actions.sample_gumbel(pre_activation) if sample else None)

    def best_action(self, z_s: th.Tensor, noise: float | th.Tensor = 0.0) -> th.Tensor:
        """
        :param z_s: embeddings of observations, (B, Z)
        :param noise: noise on the values, in units of the reward scale, 0 or (B, n_actions)
        :return: vectors of the actions of the highest value, mean over the heads, (B, A)
        """
        assert isinstance(self.actions, CategoricalActions)
        values = self.all_values(self.encoder, self.critic, z_s).mean(dim=2) + noise
        return self.actions.list_all(z_s.device).index_select(0, values.argmax(dim=1))

    def all_values(self, encoder: Encoder, critic: Critic, z_s: th.Tensor) -> th.Tensor:
        """
        :param encoder: encoder, or its target
        :param critic: value heads, or their targets
        :param z_s: embeddings of observations by this encoder, (B, Z)
        :return: values of all discrete actions in units of the reward scale, (B, n_actions, n_critics)
        """
        assert isinstance(self.actions, CategoricalActions)
        z_sa = encoder.state_action.embed_all(z_s, self.actions.list_all(z_s.device))
        return critic.value(critic(z_sa)).unflatten(0, (len(z_s), self.actions.n_actions))

    def explore(self, observation: PyTorchObs, noise: float | th.Tensor) -> th.Tensor:
        """
        Compute action vectors with exploration noise, before decoding and scaling.

        :param observation: observations of the environment, (B, ...) or a dict of these
        :param noise: standard deviation of the noise on Box actions scaled to [-1, 1], halved for discrete actions. For a
            greedy policy, the noise itself, see ``best_action``.
        :return: action vectors, (B, A)
        """
        with th.no_grad():
            if self.greedy:
                return self.best_action(self.encoder.state(self.preprocess(observation)), noise)
            return self.actions.add_noise(self.act(observation, sample=True), noise)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.actions.decode(self.act(observation, sample=not deterministic))

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """
        Get the policy action from an observation, without exploration noise. Box actions are tanh(u). Discrete actions are the
        most likely ones if deterministic, else samples from softmax(u). A greedy policy takes the action of the highest value.

        :param observation: the input observation, one or a batch
        :param state: unused, the policy is not recurrent
        :param episode_start: unused
        :param deterministic: Whether or not to return deterministic actions.
        :return: the action in the action space, and the unchanged state
        """
        actions, state = super().predict(observation, state, episode_start, deterministic)
        return np.asarray(actions, dtype=self.action_space.dtype), state

    def q_values(self, observations: np.ndarray | dict[str, np.ndarray], actions: np.ndarray | None = None) -> np.ndarray:
        """
        The values of all heads, in units of the reward (of the normalised one behind a ``VecNormalize`` that normalises
        rewards). The policy and the value target go by their mean and their minimum.

        :param observations: one or a batch, as ``predict`` takes them
        :param actions: an action for each observation, as the environment takes them; None for all actions of a Discrete
            space, in ascending order
        :return: (B, n_critics), or (B, n_actions, n_critics) without ``actions``; without the first axis for one observation
        :raises ValueError: if the actions do not fit the observations or the space, or are missing for another space
        """
        if isinstance(observations, tuple):  # type: ignore[unreachable]
            raise ValueError("observations is a tuple, perhaps what reset returned: pass its first part, the observations.")
        self.set_training_mode(False)
        with th.no_grad():
            obs, is_batch = self.obs_to_tensor(observations)
            z_s = self.encoder.state(self.preprocess(obs))
            if actions is not None:
                vectors = self.action_vectors(actions if is_batch else np.asarray(actions)[None])
                if len(vectors) != len(z_s):
                    raise ValueError(f"There are {len(vectors)} actions for {len(z_s)} observations: pass one for each.")
                q = self.critic.value(self.critic(self.encoder.state_action(z_s, vectors))) * self.critic.reward_scale
            elif isinstance(self.action_space, spaces.Discrete):
                q = self.all_values(self.encoder, self.critic, z_s) * self.critic.reward_scale
            else:
                raise ValueError(f"The actions of {self.action_space} cannot be listed: pass actions.")
        return (q if is_batch else q[0]).cpu().numpy()

    def action_vectors(self, actions: np.ndarray) -> th.Tensor:
        """
        :param actions: as the environment takes them, (B, ...)
        :return: action vectors a, as the state-action encoder takes them, (B, A)
        :raises ValueError: for another shape, or discrete actions that are not in the space
        """
        actions, space = np.asarray(actions), self.action_space
        if space.shape == () and actions.ndim == 2 and actions.shape[1] == 1:
            # As replay buffers store them
            actions = actions[:, 0]
        if actions.ndim == 0 or actions.shape[1:] != space.shape:
            raise ValueError(f"An action has the shape {actions.shape[1:]}, but must have {space.shape}, as in {space}.")
        if isinstance(space, spaces.Box):
            actions = self.scale_action(actions)
        elif not all(map(space.contains, actions)):
            raise ValueError(f"The actions {actions.tolist()} are not all in the action space {space}.")
        return self.actions.encode(th.as_tensor(actions.reshape(len(actions), -1), device=self.device))

    def scale_action(self, action: np.ndarray) -> np.ndarray:
        """
        Rescale the action from [low, high] to [-1, 1], in float64.

        :param action: Action to scale
        :return: Scaled action, float32
        """
        assert isinstance(self.action_space, spaces.Box), f"{self.action_space} is not a Box"
        return (2.0 * ((action - self._low) / (self._high - self._low)) - 1.0).astype(np.float32)

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """
        Rescale the action from [-1, 1] to [low, high], in float64, and clip rounding errors to the bounds.

        :param scaled_action: Action to un-scale
        :return: Action in the action space, with its dtype
        """
        assert isinstance(self.action_space, spaces.Box), f"{self.action_space} is not a Box"
        action = self._low + 0.5 * (np.asarray(scaled_action, dtype=np.float64) + 1.0) * (self._high - self._low)
        return np.minimum(np.maximum(action.astype(self.action_space.dtype), self.action_space.low), self.action_space.high)

    def set_training_mode(self, mode: bool) -> None:
        """
        Put the policy in either training or evaluation mode. Targets are always in evaluation mode.

        This affects certain modules, such as batch normalisation and dropout.

        :param mode: if true, set to training mode, else set to evaluation mode
        """
        self.training = mode
        for name, modules in self._mode_dependent.items():
            getattr(self, name).training = mode
            for module in modules:
                module.train(mode)

    def train(self, mode: bool = True) -> "MRQPolicy":
        """
        Put the policy in either training or evaluation mode, see ``set_training_mode``.

        :param mode: if true, set to training mode, else set to evaluation mode
        :return: the policy
        """
        self.set_training_mode(mode)
        return self


def mode_dependent_modules(network: nn.Module) -> list[nn.Module]:
    """
    Find the modules that may behave differently in training and evaluation mode. Most networks have none, so switching the
    mode costs nothing.

    :param network: a network
    :return: the network itself or modules in it, without the known types that ignore the mode
    """
    if type(network) not in MODE_INDEPENDENT_TYPES:
        return [network]
    return [module for child in network.children() for module in mode_dependent_modules(child)]


# Exact types: a subclass may override ``train`` or read ``training``
MODE_INDEPENDENT_TYPES = frozenset(
    {
        *(Encoder, StateEncoder, StateActionEncoder, MDPPredictor, Critic, Actor, EnsembleLinear, LayerNormActivation),
        *(MLPExtractor, CNNExtractor, MultiInputExtractor, FlattenExtractor),
        *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Identity, nn.Linear, nn.Conv2d, nn.LayerNorm),
        *(nn.ELU, nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Mish, nn.MaxPool2d, nn.AvgPool2d),
    }
)


MlpPolicy = MRQPolicy


class CnnPolicy(MRQPolicy):
    """
    Policy class of MR.Q for images, with the parameters of :class:`MRQPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = CNNExtractor,
        **kwargs: Any,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )


class MultiInputPolicy(MRQPolicy):
    """
    Policy class of MR.Q for Dict observations of images and vectors, with the parameters of :class:`MRQPolicy`.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        *,
        features_extractor_class: type[BaseFeaturesExtractor] = MultiInputExtractor,
        **kwargs: Any,
    ):
        super().__init__(
            observation_space, action_space, lr_schedule, features_extractor_class=features_extractor_class, **kwargs
        )
