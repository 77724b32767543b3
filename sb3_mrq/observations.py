"""
Functions on observations, which are arrays or tensors, or dicts of these for Dict spaces.
"""

from collections.abc import Callable
from typing import Any

import torch as th

Observation = th.Tensor | dict[str, th.Tensor]


def map_observation(function: Callable[..., Any], obs: Any, *others: Any) -> Any:
    """
    Apply a function to observations, or to each entry of a dict of observations.

    :param function: function of observations and of further arguments
    :param obs: observations, or a dict of these
    :param others: further arguments, such as a space; dicts with the same keys if the observations are a dict
    :return: result of the function, or a dict of its results
    """
    if isinstance(obs, dict):
        return {key: function(value, *(other[key] for other in others)) for key, value in obs.items()}
    return function(obs, *others)


def images_to_floats(obs: Observation) -> Observation:
    """
    :param obs: observations, (B, ...) or a dict of these
    :return: the observations, with uint8 values from 0 to 255 converted to floats from 0 to 1
    """
    return map_observation(lambda value: value.float().div_(255) if value.dtype == th.uint8 else value, obs)


def split_observation(obs: Observation, size: int) -> list[Observation]:
    """
    :param obs: (B, ...) or a dict of these
    :param size: size of the parts along the first axis; the last part may be smaller
    :return: the parts, as views
    """
    return _transpose(map_observation(lambda value: value.split(size), obs))


def unbind_time(obs: Observation) -> list[Observation]:
    """
    :param obs: (B, T, ...) or a dict of these
    :return: list of T observations, (B, ...) or dicts of these
    """
    return _transpose(map_observation(lambda value: value.unbind(1), obs))


def _transpose(parts: Any) -> list[Observation]:
    """
    :param parts: a sequence of tensors, or a dict of sequences of the same length
    :return: list of tensors, or of dicts
    """
    if isinstance(parts, dict):
        return [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]
    return list(parts)
