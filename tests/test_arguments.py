"""
Arguments of a wrong type, of other algorithms, and as text: each is answered with its name, value and remedy.
"""

import inspect

import gymnasium as gym
import numpy as np
import pytest
import torch as th
import yaml
from envs import BOX, IMAGE, VECTOR, SpaceEnv, learn_and_check, policy_for, tiny_model
from gymnasium import spaces
from stable_baselines3 import DQN, SAC, TD3
from stable_baselines3.sac.policies import SACPolicy
from stable_baselines3.td3.policies import TD3Policy
from torch import nn

from sb3_mrq import MRQ
from sb3_mrq.arguments import FOREIGN_ARGUMENTS, Number
from sb3_mrq.extractors import CNNExtractor, MLPExtractor
from sb3_mrq.hyperparameters import POLICY_REQUIREMENTS, REQUIREMENTS
from sb3_mrq.policies import MRQPolicy


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("gamma", "0.9", "a number between 0 and 1. Write 0.9, without quotes."),
        ("gamma", True, "a number between 0 and 1."),
        ("gamma", None, "a number between 0 and 1."),
        ("gamma", np.nan, "finite."),
        ("max_grad_norm", "1e1", "a number greater than 0, or None. YAML reads 1e1 as text: write 10 or 1.0e+1."),
        ("exploration_noise", "2e-1", "a number of at least 0. YAML reads 2e-1 as text: write 0.2 or 2.0e-1."),
        ("learning_rate", "1e-5", "function of the remaining progress. YAML reads 1e-5 as text: write 0.00001 or 1.0e-5."),
        ("learning_rate", -1.0, "at least 0"),
        ("encoder_learning_rate", "fast", "a number of at least 0, or a function of the remaining progress."),
        ("learning_starts", "20", "a number. Write 20, without quotes."),
        ("gradient_steps", "1", "an integer. Write 1, without quotes."),
        ("gradient_steps", 1.5, "an integer."),
        ("batch_size", True, "an integer of at least 1."),
        ("batch_size", 8.0, "an integer of at least 1. Write 8."),
        ("buffer_size", "1e3", "an integer of at least 1. YAML reads 1e3 as text: write 1000."),
        ("buffer_size", 1e3, "an integer of at least 1. Write 1000."),
        ("train_freq", "1", "an integer of at least 1. Write 1, without quotes."),
        ("train_freq", [1, "step"], "a pair such as (1, 'episode')"),
        ("train_freq", (1, "hour"), "a pair such as (1, 'episode')"),
        ("train_freq", 0, "at least 1"),
        ("priority_alpha", np.inf, "finite."),
        ("reward_scaling", "False", "True or False, without quotes."),
        ("action_noise", 0.1, "an ActionNoise such as NormalActionNoise, or None. The size of the built-in noise is"),
        ("replay_buffer_kwargs", [1], "a dict of arguments of the replay buffer, or None."),
        ("tensorboard_log", 3, "a folder, or None."),
        ("stats_window_size", 1.5, "an integer of at least 0."),
        ("seed", 3.0, "an integer between 0 and 4294967295, or None. Write 3."),
        ("seed", -1, "between 0 and 4294967295, or None."),
    ],
)
def test_hyperparameters_of_a_wrong_type(name, value, remedy):
    with pytest.raises(ValueError) as info:
        tiny_model(SpaceEnv(), **{name: value})
    assert str(info.value).startswith(f"{name} is {value!r}, but must be ") and remedy in str(info.value)
    model = tiny_model(SpaceEnv())
    setattr(model, f"_{name}" if name == "stats_window_size" else name, value)
    with pytest.raises(ValueError, match=f"^{name} is "):
        model.learn(20)
    assert model.num_timesteps == 0


def test_policy_kwargs_of_a_wrong_type():
    with pytest.raises(ValueError, match=r"policy_kwargs is \[1\], but must be a dict"):
        MRQ("MlpPolicy", SpaceEnv(), policy_kwargs=[1])


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("net_arch", [16.0], "net_arch['qf'] is [16.0], but must be a list of integers"),
        ("net_arch", {"encoder": ["16"]}, "net_arch['encoder'] is ['16'], but must be a list of integers"),
        ("net_arch", {"qf": 16}, "net_arch['qf'] is 16, but must be a list of integers"),
        ("net_arch", [{"pi": [16], "qf": [16]}], "must be a list of integers"),
        ("net_arch", 16, "net_arch is 16, but must be a list such as [256, 256], or a dict of lists."),
        ("n_critics", "2", "an integer of at least 1. Write 2, without quotes."),
        ("n_critics", True, "an integer of at least 1."),
        ("z_s_dim", 16.0, "an integer of at least 2. Write 16."),
        ("reward_bins_limit", 100.0, "greater than 0 and at most 80."),
        ("gumbel_temperature", np.nan, "finite."),
        ("activation_fn", "relu", "a class such as torch.nn.ReLU, neither its name nor an instance."),
        ("actor_activation_fn", nn.ReLU(), "a class such as torch.nn.ReLU, neither its name nor an instance."),
        ("features_extractor_class", "MLPExtractor", "a class derived from BaseFeaturesExtractor."),
        ("features_extractor_kwargs", 3, "a dict of arguments of the features extractor, or None."),
        ("optimizer_class", "adam", "a class such as torch.optim.AdamW."),
        ("optimizer_kwargs", 3, "a dict of arguments of the optimizer, or None."),
        ("optimizer_kwargs", {"lr": 1e-3}, "learning_rate and encoder_learning_rate"),
        ("normalize_images", "yes", "True or False, without quotes."),
    ],
)
def test_arguments_of_the_policy_of_a_wrong_type(name, value, remedy):
    with pytest.raises(ValueError) as info:
        tiny_model(SpaceEnv(), policy_kwargs={name: value})
    assert name in str(info.value) and remedy in str(info.value)


def test_numbers_of_numpy():
    """They are converted to Python, as Stable-Baselines3 and the random generators ask for."""
    numbers = {"train_freq": np.int64(2), "seed": np.int64(3), "batch_size": np.int32(8), "gamma": np.float32(0.5)}
    numbers |= {"learning_rate": np.float32(0.25), "reward_scaling": np.bool_(False), "gradient_steps": np.int64(1)}
    model = tiny_model(SpaceEnv(), policy_kwargs={"net_arch": np.array([16, 16]), "n_critics": np.int64(3)}, **numbers)
    learn_and_check(model, 40)
    assert (model.train_freq.frequency, model.seed, model.gamma, model.reward_scaling) == (2, 3, 0.5, False)
    assert type(model.gamma) is float and type(model.seed) is int
    tiny_model(SpaceEnv(), train_freq=(np.int64(1), "episode")).learn(20)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("learning_starts", value) for value in (12.5, -5, 1e1)),
        *(("gradient_steps", value) for value in (-2, 0)),
        *((name, np.inf) for name in ("max_grad_norm", "target_noise_clip")),
        ("learning_rate", lambda progress: 1e-3 * progress),
        ("learning_rate", 0),
        ("reward_scaling", 0),
    ],
)
def test_values_that_work(name, value):
    model = tiny_model(SpaceEnv(), **{name: value})
    model.learn(20)
    assert all(th.isfinite(weight).all() for weight in model.policy.state_dict().values())


@pytest.mark.parametrize("text", ["1e3", "2e-1", "-1e-5", "1.e3", "3E+2", "1.5e-7", "0.25", "7"])
def test_what_to_write_instead_of_text_is_a_number_in_yaml(text):
    message = Number().describe(text)
    advice = message.partition("rite ")[2].removesuffix(".").removesuffix(", without quotes")
    for written in advice.split(" or "):
        assert yaml.safe_load(written) == float(text), message


def test_every_argument_is_checked():
    """Except where Stable-Baselines3 or torch say what is wrong, where an argument has a check of its own, or no effect."""
    elsewhere = {"policy", "env", "device", "verbose", "_init_setup_model", "optimize_memory_usage", "replay_buffer_class"}
    elsewhere.add("action_noise")
    assert REQUIREMENTS.keys() == inspect.signature(MRQ).parameters.keys() - elsewhere
    elsewhere = {"observation_space", "action_space", "lr_schedule", "encoder_lr_schedule", "net_arch"}
    assert POLICY_REQUIREMENTS.keys() == inspect.signature(MRQPolicy).parameters.keys() - elsewhere


@pytest.mark.parametrize("algorithm", [TD3, SAC, DQN], ids=lambda algorithm: algorithm.__name__)
def test_arguments_of_other_algorithms(algorithm):
    foreign = inspect.signature(algorithm).parameters.keys() - inspect.signature(MRQ).parameters.keys()
    assert foreign
    for name in foreign:
        with pytest.raises(TypeError, match=f"^MRQ has no argument {name}. .*(takes its place|No argument)"):
            MRQ("MlpPolicy", SpaceEnv(), **{name: 1})


@pytest.mark.parametrize("policy", [TD3Policy, SACPolicy], ids=lambda policy: policy.__name__)
@pytest.mark.parametrize("ours", ["MlpPolicy", "CnnPolicy"])
def test_arguments_of_other_policies(policy, ours):
    space = IMAGE if ours == "CnnPolicy" else VECTOR
    for name in inspect.signature(policy).parameters.keys() - inspect.signature(MRQPolicy).parameters.keys():
        with pytest.raises(TypeError, match=f"^MRQPolicy has no argument {name}. .*(takes its place|No argument)"):
            tiny_model(SpaceEnv(space), ours, policy_kwargs={name: 1})


def test_counterparts_exist():
    ours = inspect.signature(MRQ).parameters
    for owner, foreign in FOREIGN_ARGUMENTS.items():
        for name, counterpart in foreign.items():
            assert counterpart.startswith("No argument") or "takes its place" in counterpart, name
            if owner == "MRQ" and not counterpart.startswith("No argument"):
                assert counterpart.split()[0] in ours, name


def test_constructors_keep_their_signature():
    """Editors, type checkers and the zoo go by it."""
    assert "tau" not in inspect.signature(MRQ).parameters and "gamma" in inspect.signature(MRQ.__init__).parameters
    kinds = {parameter.kind for parameter in inspect.signature(MRQ).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    with pytest.raises(TypeError, match="gama"):
        MRQ("MlpPolicy", SpaceEnv(), gama=0.9)


@pytest.mark.parametrize(
    ("space", "name", "ours"),
    [
        (VECTOR, "features_dim", "net_arch['encoder']"),
        (IMAGE, "features_dim", "z_s_dim"),
        (spaces.Dict(image=IMAGE, vector=VECTOR), "cnn_output_dim", "z_s_dim"),
    ],
    ids=["vector", "image", "dict"],
)
def test_arguments_of_other_features_extractors(space, name, ours):
    with pytest.raises(TypeError, match=f"has no argument {name}. .*takes its place") as info:
        tiny_model(SpaceEnv(space), policy_for(space), policy_kwargs={"features_extractor_kwargs": {name: 24}})
    assert ours in str(info.value)
    # The remedy
    kwargs = {"net_arch": {"encoder": [16, 24], "qf": [16], "pi": [16]}} if space is VECTOR else {"z_s_dim": 24}
    state = tiny_model(SpaceEnv(space), policy_for(space), policy_kwargs=kwargs).encoder.state
    assert 24 in (state.features_extractor.features_dim, state.head[0].out_features)


def test_features_extractors_derived_from_ours():
    """Those that pass all on to the constructor get the same message, those that take the argument get it."""

    class Passing(CNNExtractor):
        def __init__(self, observation_space, **kwargs):
            super().__init__(observation_space, **kwargs)

    class Taking(MLPExtractor):
        def __init__(self, observation_space, features_dim):
            super().__init__(observation_space, (8, features_dim))

    kwargs = {"features_extractor_class": Passing, "features_extractor_kwargs": {"features_dim": 24}}
    with pytest.raises(TypeError, match=r"CNNExtractor has no argument features_dim\. z_s_dim"):
        tiny_model(SpaceEnv(IMAGE), "CnnPolicy", policy_kwargs=kwargs)
    model = tiny_model(SpaceEnv(), policy_kwargs=kwargs | {"features_extractor_class": Taking})
    assert model.encoder.state.features_extractor.features_dim == 24


def test_subclass_with_an_argument_of_that_name():
    class Soft(MRQ):
        def __init__(self, *args, tau=0.1, **kwargs):
            super().__init__(*args, **kwargs)
            self.tau = tau

    assert Soft("MlpPolicy", gym.make("Pendulum-v1"), tau=0.3, policy_kwargs={"net_arch": [8]}).tau == 0.3
    with pytest.raises(TypeError, match="MRQ has no argument ent_coef"):
        Soft("MlpPolicy", SpaceEnv(action_space=BOX), ent_coef=0.1)
