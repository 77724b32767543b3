"""
Verdicts on a diagnosis: green, amber or red for each item, with its number and what to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

# Limits of green and of amber. R^2 and shares are green from the first and red below the second.
REWARD_R2 = (0.5, 0.0)
EMBEDDING_R2 = (0.5, 0.0)
LINEARITY_R2 = (0.9, 0.7)
AGREEMENT = (0.9, 0.5)
# The absolute bias, divided by the root mean square of the realised returns, is green up to the first and red above the second
RELATIVE_BIAS = (0.15, 0.3)


@dataclass(frozen=True)
class Verdict:
    """
    :param name: what is judged
    :param level: "green", "amber" or "red", "grey" if it cannot be judged
    :param finding: sentence with the number
    :param advice: what to do, empty if there is nothing to do
    """

    name: str
    level: str
    finding: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.level.upper():5}  {self.name}: {self.finding} {self.advice}".rstrip()


def _level(value: float, limits: tuple[float, float]) -> str:
    """
    :param value: a number, the higher the better
    :param limits: the lowest green number and the lowest amber one
    :return: its level
    """
    return "green" if value >= limits[0] else "amber" if value >= limits[1] else "red"


def _reward(diagnosis: Any) -> Verdict:
    name, r2 = "Reward prediction", float(diagnosis.model.reward_r2[0])
    if math.isnan(r2):
        return Verdict(name, "grey", "All rewards are the same, so there is nothing to predict.")
    level = _level(r2, REWARD_R2)
    advice = "" if level == "green" else "Train longer: the encoder does not yet know what is rewarded."
    return Verdict(name, level, f"R² is {r2:.2f} one step ahead.", advice)


def _embedding(diagnosis: Any) -> Verdict:
    name, r2, unchanged = "Next embedding", diagnosis.model.embedding_r2, diagnosis.model.embedding_r2_unchanged
    known = np.flatnonzero(np.isfinite(r2))
    if not len(known):
        return Verdict(name, "grey", "The embedding does not vary, so there is nothing to predict.")
    last = int(known[-1])
    level = _level(float(r2[last]), EMBEDDING_R2) if r2[last] > unchanged[last] else "red"
    finding = f"R² is {r2[last]:.2f} at {last + 1} steps ahead, and {unchanged[last]:.2f} for predicting no change."
    advice = "" if level == "green" else "Train longer. If it stays, the observation may not contain the state: stack several."
    return Verdict(name, level, finding, advice)


def _linearity(diagnosis: Any) -> Verdict:
    name, r2 = "Linearity", diagnosis.probe.z_sa_r2
    if math.isnan(r2):
        return Verdict(name, "grey", "Q does not vary, or there are too few episodes.")
    level = _level(r2, LINEARITY_R2)
    advice = "" if level == "green" else "Use more episodes to be sure, then train longer: the embedding is not there yet."
    return Verdict(name, level, f"A linear function of z_sa explains Q with R² {r2:.2f}.", advice)


def _collapse(diagnosis: Any) -> Verdict:
    if diagnosis.flags:
        advice = "Check that observations vary and are of a moderate size; if they are, use the default hyperparameters."
        return Verdict("Collapse", "red", " ".join(diagnosis.flags), advice)
    ranks = f"{diagnosis.z_s.effective_rank:.1f} (z_s) and {diagnosis.z_sa.effective_rank:.1f} (z_sa)"
    return Verdict("Collapse", "green", f"No embedding has collapsed: effective ranks are {ranks}.")


def _bias(diagnosis: Any) -> Verdict:
    name, returns = "Bias of the value", diagnosis.returns
    size = float(np.sqrt(np.square(returns.realised[returns.counted]).mean())) if returns.counted.any() else 0.0
    if size == 0.0:
        return Verdict(name, "grey", "No return was realised that could be compared.")
    share = abs(returns.bias) / size
    level = _level(-share, (-RELATIVE_BIAS[0], -RELATIVE_BIAS[1]))
    finding = f"It is {returns.bias:+.3g}, {100 * share:.0f} % of the size of the realised returns ({size:.3g})."
    if level == "green":
        return Verdict(name, level, finding)
    if returns.bias < 0:
        return Verdict(name, level, finding, "Values are too low, as they are while the policy improves: train longer.")
    return Verdict(
        name,
        level,
        finding,
        "Values are too high. Train longer; if it stays, check how the environment reports terminations and truncations.",
    )


def _policy(diagnosis: Any) -> Verdict:
    level = _level(diagnosis.agreement, AGREEMENT)
    finding = f"It takes the action of the highest value in {100 * diagnosis.agreement:.0f} % of the states."
    advice = "" if level == "green" else 'An actor may be stuck: try discrete_policy="greedy".'
    return Verdict("The policy agrees with its values", level, finding, advice)


def judge(diagnosis: Any) -> list[Verdict]:
    """
    :param diagnosis: a :class:`~sb3_mrq.diagnostics.Diagnosis`
    :return: its verdicts; the one on the policy only for discrete actions that can be listed
    """
    items = [_reward, _embedding, _linearity, _collapse, _bias]
    return [item(diagnosis) for item in [*items, *([] if math.isnan(diagnosis.agreement) else [_policy])]]
