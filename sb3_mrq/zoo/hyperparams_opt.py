"""
Search space of MR.Q's hyperparameters for rl-zoo3's ``-optimize``.
"""

from typing import Any

import optuna


def sample_mrq_params(trial: optuna.Trial, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    Sampler for MR.Q hyperparams.

    :param trial: the trial
    :param n_actions: unused, required by rl-zoo3
    :param n_envs: unused, required by rl-zoo3
    :param additional_args: unused, required by rl-zoo3
    :return: arguments of :class:`~sb3_mrq.MRQ`
    """
    one_minus_gamma = trial.suggest_float("one_minus_gamma", 0.001, 0.05, log=True)
    # From 2**6=64 to 2**9=512
    batch_size_pow = trial.suggest_int("batch_size_pow", 6, 9)
    exploration_noise = trial.suggest_float("exploration_noise", 0.05, 0.5)
    target_policy_noise = trial.suggest_float("target_policy_noise", 0.0, 0.5)
    sampled_params = {
        "one_minus_gamma": one_minus_gamma,
        "batch_size_pow": batch_size_pow,
        "learning_rate": trial.suggest_float("learning_rate", 3e-5, 3e-3, log=True),
        "encoder_learning_rate": trial.suggest_float("encoder_learning_rate", 1e-5, 1e-3, log=True),
        "n_steps": trial.suggest_int("n_steps", 1, 6),
        "encoder_horizon": trial.suggest_int("encoder_horizon", 1, 8),
        "target_update_interval": trial.suggest_categorical("target_update_interval", [50, 100, 250, 500, 1000]),
        "exploration_noise": exploration_noise,
        "target_policy_noise": target_policy_noise,
        "priority_alpha": trial.suggest_float("priority_alpha", 0.0, 1.0),
    }
    # Display true values
    trial.set_user_attr("gamma", 1 - one_minus_gamma)
    trial.set_user_attr("batch_size", 2**batch_size_pow)
    return convert_mrq_params(sampled_params)


def convert_mrq_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: sampled hyperparameters, as stored in a study
    :return: arguments of :class:`~sb3_mrq.MRQ`
    """
    hyperparams = sampled_params.copy()
    hyperparams["gamma"] = 1 - hyperparams.pop("one_minus_gamma")
    hyperparams["batch_size"] = 2 ** hyperparams.pop("batch_size_pow")
    return hyperparams
