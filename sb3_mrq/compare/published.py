"""
The returns that the authors of MR.Q and DR.Q have published, and how far runs are from them.
"""

from pathlib import Path

import pandas as pd
from scipy.stats import ttest_ind

from sb3_mrq.compare.algorithms import base_of
from sb3_mrq.zoo.configuration import ConfigurationError

#: format of the environment id, given the name in the published file
FILES = {"gym.csv": "{}", "dmc.csv": "dmc/{}-v0", "dmc_visual.csv": "dmc-visual/{}-v0", "atari.csv": "ALE/{}"}
#: beginning of the names of the published files, by algorithm
PREFIXES = {"mrq": "", "drq": "drq_"}


def read_published(folder: Path, results: pd.DataFrame) -> pd.DataFrame:
    """
    :param folder: folder of the published returns, with the columns ``env``, ``timesteps``, ``seed0``, ``seed1`` and so on
    :param results: results of runs
    :return: the published returns of the algorithms and tasks of the runs, up to their last steps, with the columns task,
        algorithm, step, seed and return. Version 5 of Gym tasks has the returns of version 4.
    :raises ConfigurationError: if the folder has none at all
    """
    frames = []
    for algorithm, prefix in PREFIXES.items():
        for name, pattern in FILES.items():
            if (folder / f"{prefix}{name}").exists():
                frame = pd.read_csv(folder / f"{prefix}{name}").rename(columns={"timesteps": "step"})
                frame = frame.melt(["env", "step"], var_name="seed", value_name="return").dropna()
                frames.append(frame.assign(task=frame["env"].map(pattern.format), algorithm=algorithm))
    if not frames:
        raise ConfigurationError(f"{folder} has no published returns: it must contain at least one of {', '.join(FILES)}.")
    published = pd.concat(frames).drop(columns="env")
    gym = published[published["task"].str.fullmatch(r"\w+-v4")]
    published = pd.concat([published, gym.assign(task=gym["task"].str.replace("-v4", "-v5"))], ignore_index=True)
    # Not a number, and so not at or above a step, for other tasks
    last = published["task"].map(results.groupby("task")["step"].max())
    return published[published["algorithm"].isin(set(results["algorithm"].map(base_of))) & (published["step"] <= last)]


def compare_with_published(results: pd.DataFrame, published: pd.DataFrame) -> pd.DataFrame:
    """
    :param results: results of runs
    :param published: published returns
    :return: a row for every algorithm, task and step that both have: number, mean and range of our seeds, mean and range of
        theirs, and the difference of the means in Welch's standard errors, which is not a number for a single seed
    """
    theirs_of = dict(iter(published.groupby(["algorithm", "task", "step"])["return"]))
    rows = []
    for (name, task, step), frame in results.dropna(subset="return").groupby(["algorithm", "task", "step"], sort=False):
        ours, theirs = frame["return"], theirs_of.get((base_of(name), task, step))
        if theirs is None or step == 0:
            continue
        row = {"task": task, "algorithm": frame["label"].iloc[0], "step": step, "seeds": len(ours)}
        for prefix, values in (("", ours), ("published ", theirs)):
            row |= {f"{prefix}{statistic}": values.agg(statistic) for statistic in ("mean", "min", "max")}
        rows.append(row | {"standard errors": ttest_ind(ours, theirs, equal_var=False).statistic if len(ours) > 1 else None})
    return pd.DataFrame(rows)
