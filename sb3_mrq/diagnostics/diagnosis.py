"""
Diagnosis of a trained model from evaluation episodes: numbers, arrays and flags.

Shapes: ``N`` transitions, ``H`` encoder horizon, ``Z`` size of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch as th
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_mrq.action_spaces import CategoricalActions
from sb3_mrq.arguments import Number, check_argument
from sb3_mrq.checks import DivergedError
from sb3_mrq.diagnostics import measures
from sb3_mrq.diagnostics.episodes import Episode, no_side_effects, play, wrap_env
from sb3_mrq.diagnostics.results import (
    TAIL_WEIGHT,
    EmbeddingHealth,
    EmbeddingMap,
    LinearProbe,
    ModelAccuracy,
    ReturnComparison,
)
from sb3_mrq.diagnostics.verdicts import Verdict, judge
from sb3_mrq.hyperparameters import COUNT, NOT_NEGATIVE, STEPS
from sb3_mrq.learner import effective_rank
from sb3_mrq.losses import infonce_loss
from sb3_mrq.mrq import MRQ

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Batch size of forward passes
_CHUNK = 1024
# Batch size of values of all actions, states times actions
_CHUNK_OF_ALL = 16_384


@dataclass(frozen=True)
class Diagnosis:
    """
    Result of :func:`diagnose`. ``docs/diagnostics.md`` explains how to read it.

    :param env_id: name of the environment
    :param num_timesteps: training timesteps of the model
    :param gamma: discount factor
    :param reward_unit: unit of rewards, returns and values: "reward" or "normalised reward"
    :param episode_returns: undiscounted return of each episode, before normalisation
    :param episode_lengths: number of transitions of each episode
    :param n_terminated: number of terminated episodes
    :param model: accuracy of the linear model
    :param probe: linear probe of Q
    :param z_s: collapse indicators of the state embedding
    :param z_sa: collapse indicators of the state-action embedding
    :param map: embeddings in a plane
    :param returns: predicted and realised returns
    :param agreement: share of the states in which the policy takes the action of the highest value; NaN for Box actions and
        where there are too many discrete ones
    :param notes: limitations of the numbers, a sentence each
    """

    env_id: str
    num_timesteps: int
    gamma: float
    reward_unit: str
    episode_returns: np.ndarray
    episode_lengths: np.ndarray
    n_terminated: int
    model: ModelAccuracy
    probe: LinearProbe
    z_s: EmbeddingHealth
    z_sa: EmbeddingHealth
    map: EmbeddingMap
    returns: ReturnComparison
    agreement: float = float("nan")
    notes: list[str] = field(default_factory=list)

    @property
    def flags(self) -> list[str]:
        """A sentence for each limit that an embedding exceeds."""
        return [*self.z_s.flags, *self.z_sa.flags]

    @property
    def collapsed(self) -> bool:
        """Whether an embedding is flagged."""
        return bool(self.flags)

    @property
    def verdicts(self) -> list[Verdict]:
        """Green, amber or red for each item, with its number and what to do."""
        return judge(self)

    def numbers(self) -> dict[str, float]:
        """
        :return: all numbers by name, ``group/name``; NaN if undefined
        """
        numbers = {
            "episodes/n": float(len(self.episode_returns)),
            "episodes/n_terminated": float(self.n_terminated),
            "episodes/transitions": float(self.episode_lengths.sum()),
            "episodes/mean_return": float(self.episode_returns.mean()),
            "episodes/std_return": float(self.episode_returns.std()),
            "episodes/mean_length": float(self.episode_lengths.mean()),
        }
        for name in ("reward", "termination", "embedding"):
            for measure in ("r2", "rmse", "r2_unchanged"):
                for i, value in enumerate(getattr(self.model, f"{name}_{measure}", ())):
                    numbers[f"model/{name}_{measure}_{i + 1}"] = float(value)
        for i, value in enumerate(self.model.information):
            numbers[f"model/information_{i + 1}"] = float(value)
        numbers["probe/z_sa_r2"] = self.probe.z_sa_r2
        numbers["probe/raw_r2"] = self.probe.raw_r2
        for health in (self.z_s, self.z_sa):
            numbers |= {
                f"{health.name}/norm": float(health.norms.mean()),
                f"{health.name}/norm_std": float(health.norms.std()),
                f"{health.name}/variation": health.variation,
                f"{health.name}/effective_rank": health.effective_rank,
                f"{health.name}/dormant_share": health.dormant_share,
                f"{health.name}/flags": float(len(health.flags)),
            }
        if not np.isnan(self.agreement):
            numbers["policy/agreement"] = self.agreement
        counted = self.returns.counted
        numbers |= {
            "map/variance_share_1": float(self.map.variance_shares[0]),
            "map/variance_share_2": float(self.map.variance_shares[1]),
            "returns/bias": self.returns.bias,
            "returns/rmse": self.returns.rmse,
            "returns/r2": self.returns.r2,
            "returns/correlation": self.returns.correlation,
            "returns/mean_predicted": float(self.returns.predicted[counted].mean()) if counted.any() else float("nan"),
            "returns/mean_realised": float(self.returns.realised[counted].mean()) if counted.any() else float("nan"),
        }
        return numbers

    def figures(self) -> dict[str, Figure]:
        """
        Draw the figures. They are not registered with pyplot and need not be closed.

        :return: figures by name: model, probe, collapse, map and returns
        :raises ImportError: if matplotlib is not installed
        """
        from sb3_mrq.diagnostics.figures import draw

        return draw(self)

    def report(self, folder: str | Path) -> Path:
        """
        Write the figures (PNG and SVG), the numbers (``diagnosis.json``) and a page that shows both (``index.html``).

        :param folder: output folder, created if it does not exist
        :return: path of the page
        :raises ImportError: if matplotlib is not installed
        """
        from sb3_mrq.diagnostics.report import write

        return write(self, Path(folder))


class _Networks:
    """
    The networks of a model as functions on arrays, evaluated in batches.

    :param model: the model
    """

    def __init__(self, model: MRQ):
        self.policy = model.policy
        self.device = model.device
        self.reward_scale = model.reward_scale

    def _chunks(self, *arrays: np.ndarray) -> list[list[th.Tensor]]:
        pieces = range(0, len(arrays[0]), _CHUNK)
        return [[th.as_tensor(a[i : i + _CHUNK], dtype=th.float32, device=self.device) for a in arrays] for i in pieces]

    def embed(self, z_s: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """
        :param z_s: (N, Z)
        :param actions: (N, A)
        :return: z_sa, (N, ZSA)
        """
        parts = [self.policy.encoder.state_action(z, a).cpu().numpy() for z, a in self._chunks(z_s, actions)]
        return np.concatenate(parts)

    def q(self, z_sa: np.ndarray) -> np.ndarray:
        """
        :param z_sa: (N, ZSA)
        :return: mean of the value heads, in units of the rewards, (N,)
        """
        parts = [self.policy.critic(z).mean(dim=1).cpu().numpy() for (z,) in self._chunks(z_sa)]
        return np.concatenate(parts).astype(np.float64) * self.reward_scale

    def best_actions(self, z_s: np.ndarray) -> np.ndarray:
        """
        :param z_s: (N, Z)
        :return: action vectors of the policy, (N, A)
        """
        actions = self.policy.actions
        chosen = [actions.decode(self.policy.choose(z)) for (z,) in self._chunks(z_s)]
        return np.concatenate([actions.encode(stored).cpu().numpy() for stored in chosen])

    def agreement(self, z_s: np.ndarray) -> float:
        """
        :param z_s: (N, Z)
        :return: share of the states in which the policy takes the action of the highest value, NaN if actions cannot be listed
        """
        actions = self.policy.actions
        if not isinstance(actions, CategoricalActions) or actions.n_actions > actions.MAX_LISTED:
            return float("nan")
        size = max(1, _CHUNK_OF_ALL // actions.n_actions)
        chosen = self.best_actions(z_s)
        agree = []
        for i in range(0, len(z_s), size):
            z, vectors = (th.as_tensor(array[i : i + size], device=self.device) for array in (z_s, chosen))
            values = self.policy.all_values(self.policy.encoder, self.policy.critic, z.float()).mean(dim=2)
            own = (vectors.unsqueeze(1) == actions.list_all(vectors.device)).all(dim=2)
            agree.append((values.masked_fill(~own, -th.inf).amax(dim=1) >= values.amax(dim=1)).cpu().numpy())
        return float(np.concatenate(agree).mean())

    def predict(self, z_s: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        :param z_s: (N, Z)
        :param actions: (N, A)
        :return: expected reward (N,), termination (N,), next embedding (N, Z)
        """
        predictor = self.policy.encoder.predictor
        parts = []
        for z, a in self._chunks(z_s, actions):
            terminated, next_z, logits = predictor(self.policy.encoder.state_action(z, a))
            # In float64, as small probabilities of the outer bins have a large effect
            rewards = (logits.double().softmax(dim=-1) * predictor.bins).sum(dim=-1)
            parts.append([part.cpu().numpy() for part in (rewards, terminated.squeeze(-1).double(), next_z)])
        rewards, terminated, next_z = (np.concatenate(column) for column in zip(*parts, strict=True))
        return rewards, terminated, next_z


def _rmse(true: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.sqrt(np.square(predicted - true).mean())) if len(true) else float("nan")


def information(predicted_z_s: np.ndarray, target_z_s: np.ndarray, temperature: float) -> float:
    """
    :param predicted_z_s: predicted embeddings, (N, Z)
    :param target_z_s: embeddings of the next observations, (N, Z)
    :param temperature: temperature of InfoNCE
    :return: lower bound on their mutual information, in nats: the logarithm of the batch size minus InfoNCE, which is averaged
        over random batches
    """
    batch_size = min(len(predicted_z_s), 256)
    n_batches = len(predicted_z_s) // batch_size
    order = np.random.default_rng(0).permutation(len(predicted_z_s))[: n_batches * batch_size]
    predicted, target = (
        th.as_tensor(z_s[order], dtype=th.float32).view(batch_size, n_batches, -1) for z_s in (predicted_z_s, target_z_s)
    )
    loss = infonce_loss(predicted, target, th.ones(batch_size, n_batches), temperature)
    return float(np.log(batch_size) - loss / n_batches)


def model_accuracy(model: MRQ, episodes: list[Episode]) -> ModelAccuracy:
    """
    Unroll the linear model from every state with the actions taken, as in the encoder loss, and compare with the episodes.

    :param model: the model
    :param episodes: episodes from :func:`sb3_mrq.diagnostics.episodes.play`
    :return: accuracy for each number of steps ahead
    """
    networks = _Networks(model)
    # One row per observation of all episodes
    z_s, target_z_s = (np.concatenate([getattr(e, name) for e in episodes]) for name in ("z_s", "target_z_s"))
    lengths = np.array([len(e) for e in episodes])
    ends = np.cumsum(lengths + 1) - 1
    actions = np.zeros((len(z_s), episodes[0].actions.shape[1]), dtype=np.float32)
    rewards, terminated = np.zeros(len(z_s)), np.zeros(len(z_s))
    for episode, end in zip(episodes, ends, strict=True):
        actions[end - len(episode) : end] = episode.actions
        rewards[end - len(episode) : end] = episode.rewards
        terminated[end - 1] = episode.terminated
    end_of = np.repeat(ends, lengths + 1)
    starts = np.setdiff1d(np.arange(len(z_s)), ends)

    rows = []
    predicted_z = z_s[starts]
    for step in range(model.encoder_horizon):
        inside = starts + step < end_of[starts]
        starts, predicted_z = starts[inside], predicted_z[inside]
        if len(starts) == 0:
            rows.append([float("nan")] * 7 + [0, 0])
            continue
        now = starts + step
        predicted_rewards, predicted_terminated, predicted_z = networks.predict(predicted_z, actions[now])
        rows.append(
            [
                measures.explained_variance(rewards[now], predicted_rewards),
                _rmse(rewards[now], predicted_rewards),
                measures.explained_variance(terminated[now], predicted_terminated),
                _rmse(terminated[now], predicted_terminated),
                measures.explained_variance(target_z_s[now + 1], predicted_z),
                measures.explained_variance(target_z_s[now + 1], target_z_s[starts]),
                information(predicted_z, target_z_s[now + 1], model.infonce_temperature),
                len(now),
                int(terminated[now].sum()),
            ]
        )
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return ModelAccuracy(*columns)


def embedding_health(name: str, embeddings: np.ndarray) -> EmbeddingHealth:
    """
    :param name: name of the embedding
    :param embeddings: (N, Z)
    :return: its collapse indicators
    """
    embeddings = embeddings.astype(np.float64)
    square = np.square(embeddings).mean()
    variance = np.square(embeddings - embeddings.mean(axis=0)).mean()
    spectrum = measures.singular_values(embeddings)
    deviations = measures.relative_deviations(embeddings)
    return EmbeddingHealth(
        name,
        np.linalg.norm(embeddings, axis=1),
        float(np.sqrt(variance / square)) if square > 0 else 0.0,
        spectrum,
        float(effective_rank(th.from_numpy(spectrum))),
        deviations,
        float((deviations <= measures.DORMANT).mean()),
    )


def env_name(env: VecEnv) -> str:
    """
    :param env: environments
    :return: id of the environment, or the name of its class if it is not registered
    """
    try:
        spec = env.get_attr("spec")[0]
        return spec.id if spec is not None else type(env.get_attr("unwrapped")[0]).__name__
    except Exception:
        # Only used as a title
        return type(env.unwrapped).__name__


def _notes(
    model: MRQ, episodes: list[Episode], accuracy: ModelAccuracy, returns: ReturnComparison, max_steps: int
) -> list[str]:
    """Limitations of the numbers, a sentence each."""
    notes = []
    if model._n_updates == 0:
        notes.append("The model has not been trained yet.")
    if sum(map(len, episodes)) >= max_steps:
        notes.append(f"Episodes were cut off after a total of {max_steps} transitions.")
    if not accuracy.n_terminated.any():
        notes.append(
            "No episode terminated, so the prediction of termination cannot be judged. It is not trained until an episode has "
            "terminated."
        )
    if np.isnan(accuracy.reward_r2).all():
        notes.append("All rewards are the same, so there is no variance of rewards to explain; see their error instead.")
    if not returns.counted.any():
        notes.append(
            f"All episodes were truncated so early that the bootstrapped value has a weight of more than {TAIL_WEIGHT:.0%}: "
            "too little of each return was realised to judge the predictions."
        )
    elif not returns.counted.all():
        notes.append(
            f"Predicted and realised return are compared in {returns.counted.mean():.0%} of the steps; in the others, close "
            f"to a truncation, the bootstrapped value has a weight of more than {TAIL_WEIGHT:.0%}."
        )
    return notes


def diagnose(
    model: MRQ,
    env: GymEnv | str,
    n_episodes: int = 20,
    seed: int | None = 0,
    exploration_noise: float = 0.0,
    max_steps: int = 20_000,
) -> Diagnosis:
    """
    Play episodes with a trained model and measure the quality of its embeddings, its linear model and its values. The model
    and the global random generators do not change; the environment is reset and stepped.

    With ``VecNormalize``, observations and rewards are normalised with the statistics of the model's training environment. A
    model without a training environment uses the statistics of ``env``.

    :param model: The model
    :param env: The environment, a ``VecEnv`` or an environment id, preferably not the training environment
    :param n_episodes: Number of episodes
    :param seed: Seed of the environment, None to leave it unseeded
    :param exploration_noise: Standard deviation of exploration noise as in training (0.2 by default there), to cover states
        and actions off the policy's path; 0 for none. For a greedy policy, the scale of the noise on values.
    :param max_steps: Maximum number of transitions; episodes still running are cut off
    :return: The diagnosis
    :raises ValueError: if the environment does not match the model, if a number is out of range, or if actions, embeddings or
        values of the model are not finite
    :raises ImportError: if scikit-learn is not installed
    """
    if not isinstance(model, MRQ):
        raise ValueError(f"diagnose is for models of MRQ, not of {type(model).__name__}.")
    n_episodes = check_argument("n_episodes", n_episodes, COUNT)
    seed = check_argument("seed", seed, Number(integer=True, least=0, optional=True))
    exploration_noise = check_argument("exploration_noise", exploration_noise, NOT_NEGATIVE)
    max_steps = check_argument("max_steps", max_steps, STEPS)
    measures.check_sklearn()
    vec_env = wrap_env(model, env)
    with no_side_effects(model):
        model.policy.set_training_mode(False)
        try:
            episodes = play(model, vec_env, n_episodes, seed, exploration_noise, max_steps)
        finally:
            training_env = model.get_env()
            if training_env is not None and training_env.unwrapped is vec_env.unwrapped:
                # Further training starts from a reset
                model._last_obs = None
        diagnosis = _diagnose(model, vec_env, episodes, max_steps)
    if isinstance(env, str):
        vec_env.close()
    return diagnosis


def _diagnose(model: MRQ, env: VecEnv, episodes: list[Episode], max_steps: int) -> Diagnosis:
    """Diagnosis of a model from its episodes."""
    networks = _Networks(model)
    lengths = np.array([len(e) for e in episodes])
    z_s = np.concatenate([e.z_s for e in episodes])
    values = networks.q(networks.embed(z_s, networks.best_actions(z_s)))
    z_sa = networks.embed(np.concatenate([e.z_s[:-1] for e in episodes]), np.concatenate([e.actions for e in episodes]))
    q = networks.q(z_sa)
    if not all(np.isfinite(array).all() for array in (z_s, z_sa, values, q)):
        raise DivergedError("embeddings or values are not finite")

    order = np.argsort([e.original_return for e in episodes], kind="stable")
    shown = int(order[(len(episodes) - 1) // 2])
    first_step, first_row = int(lengths[:shown].sum()), int((lengths[:shown] + 1).sum())

    realised, tail_weight = [], []
    for episode, end in zip(episodes, np.cumsum(lengths + 1) - 1, strict=True):
        last_value = 0.0 if episode.terminated else float(values[end])
        realised.append(measures.discounted_returns(episode.rewards, model.gamma, last_value))
        tail_weight.append((not episode.terminated) * model.gamma ** np.arange(len(episode), 0, -1.0))
    returns = ReturnComparison(
        q, np.concatenate(realised), np.concatenate(tail_weight), slice(first_step, first_step + int(lengths[shown]))
    )

    episode_of = np.repeat(np.arange(len(episodes)), lengths)
    observations = np.concatenate([np.concatenate([e.observations, e.actions], axis=1) for e in episodes])
    linear, raw = (measures.ridge_probe(features, q, episode_of) for features in (z_sa, observations))
    mean, components, shares = measures.principal_components(z_s)
    accuracy = model_accuracy(model, episodes)
    normalization = model.get_vec_normalize_env() or unwrap_vec_normalize(env)
    normalised = normalization is not None and normalization.norm_reward
    return Diagnosis(
        env_id=env_name(env),
        num_timesteps=model.num_timesteps,
        gamma=model.gamma,
        reward_unit="normalised reward" if normalised else "reward",
        episode_returns=np.array([e.original_return for e in episodes]),
        episode_lengths=lengths,
        n_terminated=sum(e.terminated for e in episodes),
        model=accuracy,
        probe=LinearProbe(q, linear.r2, linear.predictions, raw.r2, raw.predictions),
        z_s=embedding_health("z_s", z_s),
        z_sa=embedding_health("z_sa", z_sa),
        map=EmbeddingMap((z_s - mean) @ components.T, values, slice(first_row, first_row + int(lengths[shown]) + 1), shares),
        returns=returns,
        agreement=networks.agreement(z_s),
        notes=_notes(model, episodes, accuracy, returns, max_steps),
    )
