"""
Checks of arguments: types and ranges, with the remedy in the message, and arguments that only other algorithms have.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ParamSpec, Protocol

import numpy as np

P = ParamSpec("P")

_NO_ENTROPY = "No argument takes its place, as there is no entropy term; exploration_noise sets how much is explored."
_NO_SDE = "No argument takes its place; action_noise takes noise that is correlated in time."
_NO_DISTRIBUTION = (
    "No argument takes its place: the policy is deterministic, and exploration_noise of MRQ is added to its actions."
)
_EMBEDDING = "z_s_dim in policy_kwargs takes its place: the size of the layer after the convolutions."

#: arguments of Stable-Baselines3's algorithms and sb3-contrib's TQC that classes of this package do not have, and what takes
#: the place of each
FOREIGN_ARGUMENTS = {
    "MRQ": {
        "tau": "target_update_interval takes its place: targets are replaced completely, every so many training steps.",
        "policy_delay": "No argument takes its place: the policy is updated in every training step.",
        "ent_coef": _NO_ENTROPY,
        "target_entropy": _NO_ENTROPY,
        "use_sde": _NO_SDE,
        "sde_sample_freq": _NO_SDE,
        "use_sde_at_warmup": "No argument takes its place: the first learning_starts steps are uniformly random.",
        "exploration_fraction": "learning_starts takes its place: so many random steps, then exploration_noise throughout.",
        "exploration_final_eps": "exploration_noise takes its place: the standard deviation of noise, not a probability.",
        "exploration_initial_eps": "No argument takes its place: the first learning_starts steps are uniformly random.",
        "top_quantiles_to_drop_per_net": "No argument takes its place: the target is the smallest of the value heads.",
    },
    "MRQPolicy": {
        "share_features_extractor": "No argument takes its place: value heads and policy share one encoder.",
        "use_sde": _NO_DISTRIBUTION,
        "log_std_init": _NO_DISTRIBUTION,
        "use_expln": _NO_DISTRIBUTION,
        "clip_mean": "pre_activation_weight of MRQ takes its place: a penalty on the policy's output before tanh.",
        "n_quantiles": "No argument takes its place: each of the n_critics value heads gives one number.",
    },
    "MLPExtractor": {
        "features_dim": "The last number of net_arch['encoder'] in policy_kwargs takes its place; z_s_dim is the size of the "
        "embedding that is made of the features.",
    },
    "CNNExtractor": {"features_dim": _EMBEDDING},
    "MultiInputExtractor": {"cnn_output_dim": _EMBEDDING, "features_dim": _EMBEDDING},
}
FOREIGN_ARGUMENTS["DRQ"] = FOREIGN_ARGUMENTS["MRQ"]


class UnsupportedSpaceError(ValueError, NotImplementedError, AssertionError):
    """
    An observation or action space is not supported. Stable-Baselines3 raises one of the three base classes, by the space.
    """


class Requirement(Protocol):
    """What a value must be."""

    def accepts(self, value: Any) -> bool:
        """
        :param value: of the argument, without types of NumPy
        :return: whether it can work
        """

    def describe(self, value: Any) -> str:
        """
        :param value: one that is not accepted
        :return: what it should be, and the remedy, as the end of a sentence that begins "the argument must be"
        """


@dataclass(frozen=True)
class Number:
    """
    A number, NumPy's included, but not a boolean. It is never NaN.

    :param integer: whether it must be an integer
    :param least: smallest value
    :param most: largest value
    :param above: a bound that is not allowed itself
    :param infinite: whether it may be infinite
    :param optional: whether it may be None
    :param schedule: whether it may be a function, of the remaining progress
    """

    integer: bool = False
    least: float | None = None
    most: float | None = None
    above: float | None = None
    infinite: bool = False
    optional: bool = False
    schedule: bool = False

    def _has_type(self, value: Any) -> bool:
        return isinstance(value, Integral if self.integer else Real) and not isinstance(value, bool)

    def accepts(self, value: Any) -> bool:
        if (self.optional and value is None) or (self.schedule and callable(value)):
            return True
        return (
            self._has_type(value)
            and not math.isnan(value)
            and (self.infinite or not math.isinf(value))
            and (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
        )

    def describe(self, value: Any) -> str:
        if self.least is not None and self.most is not None:
            bounds = f"between {self.least} and {self.most}"
        elif self.least is not None:
            bounds = f"at least {self.least}"
        elif self.above is not None:
            bounds = f"greater than {self.above}" + ("" if self.most is None else f" and at most {self.most}")
        else:
            bounds = ""
        if not self._has_type(value):
            kind = "an integer" if self.integer else "a number"
            text = f"{kind} of {bounds}" if bounds.startswith("at") else f"{kind} {bounds}".rstrip()
        elif math.isnan(value) or (math.isinf(value) and not self.infinite):
            text = "finite"
        else:
            text = bounds
        text += ", or a function of the remaining progress" * self.schedule + ", or None" * self.optional
        return f"{text}.{self._remedy(value)}"

    def _remedy(self, value: Any) -> str:
        """What to write instead of a text or a float that stands for a number."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            return ""
        if isinstance(value, bool) or not math.isfinite(number) or (self.integer and not number.is_integer()):
            return ""
        plain = np.format_float_positional(number, trim="-")
        if not isinstance(value, str):
            return "" if self._has_type(value) else f" Write {plain}."
        mantissa, e, exponent = value.lower().partition("e")
        if not e:
            return f" Write {plain}, without quotes."
        # The only form with an exponent that YAML 1.1 takes for a number has a point and a sign
        scientific = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"
        return f" YAML reads {value} as text: write {plain}" + ("." if self.integer else f" or {scientific}.")


@dataclass(frozen=True)
class OneOf:
    """
    One of several values.

    :param choices: texts or booleans
    """

    choices: tuple[str | bool, ...]

    def accepts(self, value: Any) -> bool:
        # 1 is equal to True, but no choice
        return any(isinstance(value, type(choice)) and value == choice for choice in self.choices)

    def describe(self, value: Any) -> str:
        return f"one of {', '.join(map(repr, self.choices))}."


@dataclass(frozen=True)
class Switch:
    """True or False, or the integers that are equal to them."""

    def accepts(self, value: Any) -> bool:
        return isinstance(value, int) and value in (0, 1)

    def describe(self, value: Any) -> str:
        return "True or False" + (", without quotes." if isinstance(value, str) else ".")


@dataclass(frozen=True)
class Instance:
    """
    An object of one of several types.

    :param types: the types
    :param description: what the object is, and perhaps a remedy, as the end of a sentence that begins "must be"
    """

    types: tuple[type, ...]
    description: str

    def accepts(self, value: Any) -> bool:
        return isinstance(value, self.types)

    def describe(self, value: Any) -> str:
        return self.description


def plain(value: Any) -> Any:
    """
    :param value: any value
    :return: the same, scalars of NumPy as numbers, booleans or texts of Python
    """
    return value.item() if isinstance(value, np.generic) else value


def check_argument(name: str, value: Any, requirement: Requirement) -> Any:
    """
    :param name: of the argument
    :param value: of the argument
    :param requirement: what it must be
    :return: the value, scalars of NumPy converted to Python
    :raises ValueError: if it is something else, with name, value and remedy
    """
    value = plain(value)
    if not requirement.accepts(value):
        raise ValueError(f"{name} is {value!r}, but must be {requirement.describe(value)}")
    return value


def explain_foreign(owner: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """
    Decorator of a constructor, which answers an argument of another algorithm with what takes its place. A decorator
    leaves signature, help and type checks to the constructor, while ``**kwargs`` would weaken them.

    :param owner: name of the class, in ``FOREIGN_ARGUMENTS``
    """

    def decorate(init: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(init)
        def checked(*args: P.args, **kwargs: P.kwargs) -> None:
            for name in kwargs:
                if name in FOREIGN_ARGUMENTS[owner]:
                    raise TypeError(f"{owner} has no argument {name}. {FOREIGN_ARGUMENTS[owner][name]}")
            init(*args, **kwargs)

        return checked

    return decorate
