"""
What the first release saved, every later version must load. ``python tests/test_compatibility.py`` has made the files, once.
"""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th

from sb3_mrq import MRQ
from sb3_mrq.weights import load_weights, save_weights

FOLDER = Path(__file__).parent / "data" / "release-0.1"
TASKS = {"continuous": "Pendulum-v1", "discrete": "CartPole-v1"}
SETTINGS = dict(
    buffer_size=60,
    learning_starts=20,
    batch_size=4,
    target_update_interval=5,
    policy_kwargs=dict(net_arch=dict(encoder=[8], qf=[8], pi=[8]), z_s_dim=8, z_a_dim=4, z_sa_dim=8),
    seed=0,
    device="cpu",
)


def observations(env_id):
    space = gym.make(env_id).observation_space
    space.seed(0)
    return np.stack([np.clip(space.sample(), -2, 2) for _ in range(5)])


def known(model, env_id):
    """What a model and its buffer have to be like."""
    buffer = model.replay_buffer
    indices, probabilities = buffer.sampling_probabilities()
    samples = buffer.get_subtrajectories(indices)
    return {
        "pre_activations": model.policy.pre_activation(th.as_tensor(observations(env_id))).tolist(),
        "num_timesteps": model.num_timesteps,
        "n_updates": model._n_updates,
        "reward_scale": model.reward_scale,
        "target_reward_scale": model.target_reward_scale,
        "probabilities": probabilities.tolist(),
        "max_priority": buffer.max_priority,
        "observations": samples.observations.flatten().tolist(),
        "actions": samples.actions.flatten().tolist(),
        "rewards": samples.rewards.flatten().tolist(),
        "terminated": samples.terminated.flatten().tolist(),
        "mask": samples.mask.flatten().tolist(),
        "momentum": [float(state["exp_avg"].sum()) for state in model.critic.optimizer.state.values()],
    }


@pytest.mark.parametrize("name", TASKS)
def test_loads_what_the_first_release_saved(name):
    env_id = TASKS[name]
    model = MRQ.load(FOLDER / f"{name}.zip", env=gym.make(env_id), device="cpu")
    model.load_replay_buffer(FOLDER / f"{name}_buffer.pkl")
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    actual = known(model, env_id)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(actual[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    model.learn(20, reset_num_timesteps=False)
    assert model._n_updates == expected["n_updates"] + 20

    other = MRQ("MlpPolicy", env_id, **(SETTINGS | {"seed": 7}))
    load_weights(other, FOLDER / f"{name}.safetensors")
    actual = other.policy.pre_activation(th.as_tensor(observations(env_id))).tolist()
    np.testing.assert_allclose(actual, expected["pre_activations"], rtol=1e-4, atol=1e-5)


def save() -> None:
    """Make the files."""
    FOLDER.mkdir(parents=True)
    for name, env_id in TASKS.items():
        model = MRQ("MlpPolicy", env_id, **SETTINGS).learn(100)
        model.save(FOLDER / f"{name}.zip")
        model.save_replay_buffer(FOLDER / f"{name}_buffer.pkl")
        save_weights(model, FOLDER / f"{name}.safetensors")
        (FOLDER / f"{name}.json").write_text(json.dumps(known(model, env_id)) + "\n")


if __name__ == "__main__":
    save()
