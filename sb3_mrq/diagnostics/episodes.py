"""
Evaluation episodes of a trained model with their embeddings. The model and the global random generators do not change.
"""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.utils import check_for_correct_spaces
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, unwrap_vec_normalize
from torch.nn import functional as F

from sb3_mrq.action_noise import hold_noise
from sb3_mrq.checks import DivergedError, copy_observation
from sb3_mrq.mrq import MRQ
from sb3_mrq.observations import images_to_floats, map_observation
from sb3_mrq.vec_env import make_env

# Batch size of the encoder
_CHUNK = 128
# Maximum number of values of a downsampled image, for the probe on raw observations
_IMAGE_VALUES = 1024


@dataclass
class Episode:
    """
    One episode of m transitions, possibly cut off.

    :param z_s: embeddings of the observations, (m + 1, Z)
    :param target_z_s: embeddings by the target encoder, (m + 1, Z)
    :param observations: preprocessed and flattened observations, images downsampled, (m, D)
    :param actions: action vectors, (m, A)
    :param rewards: rewards, normalised if they are in training, (m,)
    :param original_return: undiscounted return before normalisation
    :param terminated: whether the episode terminated, False if it was truncated or cut off
    """

    z_s: np.ndarray
    target_z_s: np.ndarray
    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    original_return: float
    terminated: bool

    def __len__(self) -> int:
        return len(self.rewards)


@contextmanager
def no_side_effects(model: BaseAlgorithm) -> Iterator[None]:
    """
    Restore everything that an evaluation changes outside the environment: the random generators of Python, NumPy, torch and
    the action space, and the training mode of the policy.

    :param model: the model that is evaluated
    """
    python, numpy = random.getstate(), np.random.get_state()
    devices = [model.device] if model.device.type == "cuda" else []
    # The generator of the space, which several environments may share
    space = model.action_space._np_random
    space_state = None if space is None else space.bit_generator.state
    training = model.policy.training
    try:
        with th.random.fork_rng(devices=devices), th.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        if space is not None:
            space.bit_generator.state = space_state
            model.action_space._np_random = space
        model.policy.set_training_mode(training)


def wrap_env(model: MRQ, env: GymEnv | str) -> VecEnv:
    """
    :param model: the model that acts in the environment
    :param env: an environment, a ``VecEnv`` or an environment id
    :return: the environment, wrapped for the model
    :raises ValueError: if its spaces do not match the model, or if it is not wrapped in ``VecNormalize`` as in training
    """
    vec_env = model._wrap_env(make_env(env), monitor_wrapper=False)
    check_for_correct_spaces(vec_env, model.observation_space, model.action_space)
    if model.get_vec_normalize_env() is not None and unwrap_vec_normalize(vec_env) is None:
        raise ValueError(
            "The model is trained with VecNormalize, but the environment of the diagnosis is not wrapped: wrap it in "
            "VecNormalize(env, training=False). The statistics of the training environment are used."
        )
    return vec_env


@contextmanager
def _normalization_of_training(model: MRQ, env: VecEnv) -> Iterator[VecNormalize | None]:
    """
    Normalise as in the training environment, without updating statistics.

    :param model: the model; without a training environment, the statistics of ``env`` are used
    :param env: the environment
    :return: context that returns its ``VecNormalize``, None if it has none
    """
    normalization = unwrap_vec_normalize(env)
    if normalization is None:
        yield None
        return
    names = ["training", "obs_rms", "ret_rms", "norm_obs", "norm_reward", "clip_obs", "clip_reward", "epsilon"]
    before = {name: getattr(normalization, name) for name in names if hasattr(normalization, name)}
    source = model.get_vec_normalize_env()
    if source is not None:
        for name in before:
            setattr(normalization, name, getattr(source, name))
    normalization.training = False
    try:
        yield normalization
    finally:
        for name, value in before.items():
            setattr(normalization, name, value)


class _Recorder:
    """
    Records the running episode of one environment. Observations are embedded in batches and then discarded, as images of long
    episodes would not fit into memory.

    :param model: the model that acts
    """

    def __init__(self, model: MRQ):
        self.model = model
        self.pending: list[Any] = []
        self.embedded: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.actions: list[np.ndarray] = []
        self.rewards: list[float] = []
        self.original_return = 0.0

    def observe(self, obs: Any) -> None:
        """
        :param obs: the next observation, without batch dimension
        """
        self.pending.append(obs)
        if len(self.pending) == _CHUNK:
            self.embed()

    def embed(self) -> None:
        """Embed the pending observations."""
        if not self.pending:
            return
        if isinstance(self.pending[0], dict):
            obs: Any = {key: np.stack([step[key] for step in self.pending]) for key in self.pending[0]}
        else:
            obs = np.stack(self.pending)
        self.pending = []
        policy = self.model.policy
        preprocessed = policy.preprocess(policy.obs_to_tensor(obs)[0])
        self.embedded.append(
            (
                policy.encoder.state(preprocessed).float().cpu().numpy(),
                policy.encoder_target.state(preprocessed).float().cpu().numpy(),
                flatten_observations(self.model, preprocessed).cpu().numpy(),
            )
        )

    def finish(self, obs: Any, terminated: bool) -> Episode:
        """
        :param obs: the final observation
        :param terminated: whether the episode terminated
        :return: the episode
        """
        self.observe(obs)
        self.embed()
        z_s, target_z_s, observations = (np.concatenate(part) for part in zip(*self.embedded, strict=True))
        actions = th.as_tensor(np.stack(self.actions), device=self.model.device)
        return Episode(
            z_s,
            target_z_s,
            observations[:-1],
            self.model.policy.actions.encode(actions).float().cpu().numpy(),
            np.array(self.rewards, dtype=np.float64),
            self.original_return,
            terminated,
        )


def flatten_observations(model: MRQ, obs: th.Tensor | dict[str, th.Tensor]) -> th.Tensor:
    """
    :param model: the model
    :param obs: preprocessed observations, (B, ...), or a dict of these
    :return: flattened observations, images downsampled to about a thousand values, (B, D)
    """
    obs = images_to_floats(obs)
    space = model.observation_space
    if isinstance(obs, dict):
        assert isinstance(space, spaces.Dict)
        parts = [(value, space[key]) for key, value in obs.items()]
    else:
        parts = [(obs, space)]
    flat = []
    for value, part in parts:
        if model.policy.is_image(part):
            side = max(math.isqrt(_IMAGE_VALUES // value.shape[1]), 4)
            value = F.adaptive_avg_pool2d(value, (min(side, value.shape[2]), min(side, value.shape[3])))
        flat.append(value.flatten(1))
    return th.cat(flat, dim=1)


def _act(model: MRQ, obs: Any, n_envs: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """
    :param model: the model
    :param obs: observations of all environments
    :param n_envs: number of environments
    :param noise: standard deviation of the exploration noise, 0 for the deterministic action
    :return: actions in the space, and in the format of the replay buffer, (n_envs, action_dim)
    :raises DivergedError: if an action is not finite
    """
    is_box = isinstance(model.action_space, spaces.Box)
    if noise > 0:
        added: Any = noise
        if model.policy.greedy:
            added = th.as_tensor(
                noise * hold_noise(None, (n_envs, model.policy.actions.n_actions)), dtype=th.float32, device=model.device
            )
        vectors = model.policy.explore(model.policy.obs_to_tensor(obs)[0], added)
        if not th.isfinite(vectors).all():
            raise DivergedError(f"the policy's action is {vectors.tolist()}")
        stored = model.policy.actions.decode(vectors).cpu().numpy().reshape(n_envs, *model.action_space.shape)  # type: ignore[misc]
        actions = model.policy.unscale_action(stored) if is_box else stored.astype(model.action_space.dtype)
    else:
        actions, _ = model.predict(obs, deterministic=True)
        stored = model.policy.scale_action(actions) if is_box else actions
    if not np.isfinite(stored).all():
        raise DivergedError(f"the policy's action is {stored}")
    return actions, stored.reshape(n_envs, -1)


def play(
    model: MRQ, env: VecEnv, n_episodes: int, seed: int | None, exploration_noise: float, max_steps: int
) -> list[Episode]:
    """
    Play episodes. They are divided evenly among several environments, to avoid a bias towards short episodes.

    :param model: the model that acts
    :param env: environments from ``wrap_env``
    :param n_episodes: number of episodes
    :param seed: seed of the environments and of the noise, None to leave them unseeded
    :param exploration_noise: standard deviation of the exploration noise, 0 for the deterministic action
    :param max_steps: maximum number of transitions; episodes still running are cut off
    :return: the episodes
    """
    n_envs = env.num_envs
    wanted = [(n_episodes + i) // n_envs for i in range(n_envs)]
    recorders = [_Recorder(model) for _ in range(n_envs)]
    episodes: list[list[Episode]] = [[] for _ in range(n_envs)]
    n_steps = 0

    def at(obs: Any, i: int) -> Any:
        # A copy, as a view would keep the observations of all environments
        return map_observation(lambda value: np.copy(value[i]), obs)

    with _normalization_of_training(model, env) as normalization:
        if seed is not None:
            env.seed(seed)
            th.manual_seed(seed)
        # Copies: in the next step the environments may write to what they gave in this one
        obs = copy_observation(env.reset(), model.observation_space)
        while True:
            running = [i for i in range(n_envs) if len(episodes[i]) < wanted[i]]
            if not running or n_steps >= max_steps:
                break
            actions, stored = _act(model, obs, n_envs, exploration_noise)
            next_obs, rewards, dones, infos = env.step(actions)
            original = rewards if normalization is None else normalization.get_original_reward()
            for i in running:
                recorder = recorders[i]
                recorder.observe(at(obs, i))
                recorder.actions.append(stored[i])
                recorder.rewards.append(float(rewards[i]))
                recorder.original_return += float(original[i])
                n_steps += 1
                if dones[i]:
                    terminated = not infos[i].get("TimeLimit.truncated", False)
                    episodes[i].append(recorder.finish(infos[i]["terminal_observation"], terminated))
                    recorders[i] = _Recorder(model)
            obs = copy_observation(next_obs, model.observation_space)
        for i in range(n_envs):
            if len(episodes[i]) < wanted[i] and recorders[i].rewards:
                episodes[i].append(recorders[i].finish(at(obs, i), terminated=False))
    return [episode for env_episodes in episodes for episode in env_episodes]
