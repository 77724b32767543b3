"""
Data from elsewhere: arrays of transitions and Minari datasets into the replay buffer.
"""

from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_mrq.buffers import SubtrajectoryReplayBuffer
from sb3_mrq.checks import LARGEST_OBSERVATION, LARGEST_REWARD, in_discrete_range, subspaces_of
from sb3_mrq.observations import map_observation


def check_values(values: Any, name: str, space: spaces.Space | None, n: int, largest: float) -> np.ndarray:
    """
    :param values: an array of numbers
    :param name: what they are, for the message
    :param space: space of each entry, None for single numbers
    :param n: number of entries
    :param largest: largest allowed absolute value
    :return: the values as an array, (n, ...)
    :raises ValueError: if their number, shape or type is another one, or if one is not finite, too large or not in the space
    """
    array = np.asarray(values)
    shape = (n,) if space is None else (n, *space.shape)  # type: ignore[misc]
    if array.dtype.kind not in "biuf":
        raise ValueError(f"The {name} are of the type {array.dtype}, but must be numbers.")
    if array.shape != shape and not (space is not None and space.shape == () and array.shape == (n, 1)):
        raise ValueError(f"The {name} have the shape {array.shape}, but must have {shape}.")
    if array.dtype.kind == "f":
        # False for NaN
        valid = (array >= -largest) & (array <= largest)
        if not valid.all():
            index = tuple(np.argwhere(~valid)[0])
            raise ValueError(f"The {name} hold {array[index]} in row {index[0]}: remove or replace it.")
    valid = np.ones(array.shape, dtype=bool)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)):
        valid = in_discrete_range(array, space)
    elif isinstance(space, spaces.MultiBinary):
        valid = (array >= 0) & (array <= 1)
    elif isinstance(space, spaces.Box) and name == "actions":
        valid = (array >= space.low) & (array <= space.high)
    if not valid.all():
        row = int(np.argwhere(~valid)[0][0])
        raise ValueError(f"The {name} hold {array[row].tolist()} in row {row}, which is not in {space}.")
    return array


def check_observations(values: Any, name: str, space: spaces.Space, n: int) -> Any:
    """
    :param values: observations, (n, ...) or a dict of these
    :param name: what they are, for the message
    :param space: the observation space
    :param n: number of observations
    :return: the observations as arrays
    :raises ValueError: if they do not fit the space
    """
    parts = subspaces_of(space)
    if isinstance(space, spaces.Dict):
        if not isinstance(values, dict) or not parts.keys() <= values.keys():
            raise ValueError(f"The {name} must be a dict with the keys {', '.join(map(repr, parts))}.")
        return {key: check_values(values[key], f"{name} {key!r}", part, n, LARGEST_OBSERVATION) for key, part in parts.items()}
    return check_values(values, name, space, n, LARGEST_OBSERVATION)


def add_transitions(
    model: Any,
    observations: Any,
    actions: Any,
    rewards: Any,
    next_observations: Any,
    terminated: Any,
    truncated: Any,
    first_env: int = 0,
) -> None:
    """
    Store whole episodes in the replay buffer of a model, in turn in the parts of its environments. After an error, nothing is
    stored.

    :param model: an ``MRQ``
    :param observations: of all episodes, one after the other, (N, ...) or a dict of these
    :param actions: as the environment takes them, (N, ...)
    :param rewards: (N,)
    :param next_observations: in an episode equal to the observations of the next row, (N, ...) or a dict of these
    :param terminated: (N,)
    :param truncated: (N,); each episode, also the last one, must be terminated or truncated
    :param first_env: environment in whose part the first episode is stored, counted on beyond the last one
    :raises ValueError: if the data are empty, do not fit each other or the spaces, or an episode does not fit into the buffer
    """
    buffer: SubtrajectoryReplayBuffer = model.replay_buffer
    n = len(rewards)
    if n == 0:
        raise ValueError("There are no transitions in the data.")
    space = model.observation_space
    observations = check_observations(observations, "observations", space, n)
    next_observations = check_observations(next_observations, "next observations", space, n)
    actions = check_values(actions, "actions", model.action_space, n, np.inf)
    rewards = check_values(rewards, "rewards", None, n, LARGEST_REWARD)
    terminated, truncated = (
        check_values(value, name, None, n, 1).astype(bool)
        for name, value in (("terminations", terminated), ("truncations", truncated))
    )
    ends = np.flatnonzero(terminated | truncated)
    if len(ends) == 0 or ends[-1] != n - 1:
        raise ValueError("The last episode has no end: mark its last transition as truncated.")
    inside = np.ones(n, dtype=bool)
    inside[ends] = False
    inside = np.flatnonzero(inside)
    for key in subspaces_of(space):
        obs, next_obs = (value if key is None else value[key] for value in (observations, next_observations))
        same = (obs[inside + 1].reshape(len(inside), -1) == next_obs[inside].reshape(len(inside), -1)).all(axis=1)
        if not same.all():
            raise ValueError(
                f"The observation in row {inside[~same][0] + 1} is not the next observation of the row before it: mark the "
                "ends of episodes as truncated."
            )
    starts = np.append(0, ends[:-1] + 1)
    longest = int((ends - starts).max()) + 1
    if longest >= buffer.buffer_size:
        raise ValueError(
            f"An episode has {longest} transitions, for which the replay buffer needs {longest + 1} slots per environment. It "
            f"has {buffer.buffer_size}: use a larger buffer_size."
        )
    for env, (start, end) in enumerate(zip(starts, ends, strict=True), start=first_env):
        rows = slice(start, end + 1)
        stored = actions[rows]
        if isinstance(model.action_space, spaces.Box):
            stored = model.policy.scale_action(stored)
        episode = map_observation(
            lambda value, following, rows=rows, end=end: np.concatenate([value[rows], following[end : end + 1]]),
            observations,
            next_observations,
        )
        buffer.add_episode(env % buffer.n_envs, episode, stored, rewards[rows], bool(terminated[end]))


def load_minari(dataset: Any, model: Any) -> None:
    """
    Store all episodes of a Minari dataset in the replay buffer of a model.

    :param dataset: a ``minari.MinariDataset``, or the id of one on this machine
    :param model: an ``MRQ``
    :raises ValueError: if the model has other spaces, or as in :func:`add_transitions`
    """
    if isinstance(dataset, str):
        try:
            import minari
        except ImportError:
            raise ImportError('Datasets need Minari. Install it with: pip install "sb3-mrq[minari]"') from None
        dataset = minari.load_dataset(dataset)
    for name in ("observation_space", "action_space"):
        ours, theirs = getattr(model, name), getattr(dataset, name)
        if ours != theirs:
            raise ValueError(f"The dataset has the {name.replace('_', ' ')} {theirs}, but the model has {ours}.")
    if dataset.total_episodes == 0:
        raise ValueError("There are no transitions in the data.")
    for i, episode in enumerate(dataset.iterate_episodes()):
        n = len(episode.rewards)
        truncated = episode.truncations.copy()
        # An episode that was not finished when the collection ended
        truncated[-1] |= not episode.terminations[-1]
        add_transitions(
            model,
            map_observation(lambda value: np.asarray(value)[:n], episode.observations),  # noqa: B023
            episode.actions,
            episode.rewards,
            map_observation(lambda value: np.asarray(value)[1 : n + 1], episode.observations),  # noqa: B023
            episode.terminations,
            truncated,
            first_env=i,
        )
