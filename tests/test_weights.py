"""
Weights alone go from one model to another without a pickle.
"""

import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch as th
from envs import IMAGE, VECTOR, SpaceEnv, policy_for, tiny_model
from gymnasium import spaces
from helpers import same, snapshot

from sb3_mrq.extractors import MultiInputExtractor
from sb3_mrq.weights import load_weights, save_weights


@pytest.mark.parametrize("space", [VECTOR, IMAGE, spaces.Dict(image=IMAGE, vector=VECTOR)], ids=["vector", "image", "Dict"])
@pytest.mark.parametrize("name", ["weights", "weights.safetensors", "weights.v2"])
def test_the_same_policy(space, name, tmp_path, monkeypatch):
    model = tiny_model(SpaceEnv(space), policy_for(space))
    model.learn(20)
    save_weights(model, tmp_path / name)
    (file,) = tmp_path.iterdir()
    assert file.name == ("weights.safetensors" if name == "weights" else name)
    other = tiny_model(SpaceEnv(space), policy_for(space), seed=1)
    assert not same(snapshot(other.policy), snapshot(model.policy))
    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, lambda *_, **__: pytest.fail("unpickled"))
    load_weights(other, tmp_path / name)
    assert same(snapshot(other.policy), snapshot(model.policy))
    assert (other.reward_scale, other.target_reward_scale) == (model.reward_scale, model.target_reward_scale)
    obs = SpaceEnv(space).observation_space.sample()
    np.testing.assert_array_equal(other.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    # The loaded weights learn
    other.learn(20)
    assert not same(snapshot(other.policy), snapshot(model.policy))


class TwoCameras(MultiInputExtractor):
    """One network for both images."""

    def __init__(self, observation_space, **kwargs):
        super().__init__(observation_space, **kwargs)
        self.cnns[1] = self.cnns[0]


def test_shared_weights(tmp_path):
    space = spaces.Dict(left=IMAGE, right=IMAGE)
    model, other = (
        tiny_model(SpaceEnv(space), "MultiInputPolicy", policy_kwargs={"features_extractor_class": TwoCameras}, seed=seed)
        for seed in (0, 1)
    )
    save_weights(model, tmp_path / "w")
    load_weights(other, tmp_path / "w")
    assert same(snapshot(other.policy), snapshot(model.policy))


def test_nothing_else_is_in_the_file(tmp_path):
    model = tiny_model(SpaceEnv())
    save_weights(model, tmp_path / "w")
    data = (tmp_path / "w.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.keys() == {"__metadata__", *model.policy.state_dict()}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: tiny_model(SpaceEnv(spaces.Box(-1, 1, (4,)))), "another observation space"),
        (lambda: tiny_model(SpaceEnv(action_space=spaces.Discrete(2))), "another action space"),
        (
            lambda: tiny_model(SpaceEnv(), policy_kwargs={"z_s_dim": 8}),
            r"another architecture: \w+.* has the shape \(.*, not \(",
        ),
        (
            lambda: tiny_model(SpaceEnv(), policy_kwargs={"net_arch": {"encoder": [16], "qf": [16], "pi": [16, 16]}}),
            "another architecture",
        ),
    ],
)
def test_another_model(make, match, tmp_path):
    save_weights(tiny_model(SpaceEnv()), tmp_path / "w")
    model = make()
    before = snapshot(model.policy)
    with pytest.raises(ValueError, match=match):
        load_weights(model, tmp_path / "w")
    assert same(snapshot(model.policy), before)


def test_other_files(tmp_path):
    model = tiny_model(SpaceEnv())
    save_weights(model, tmp_path / "w")
    data = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "short").write_bytes(data[:-5])
    (tmp_path / "pickle").write_bytes(pickle.dumps(model.policy.state_dict()))
    safetensors.torch.save_file({"a": th.zeros(2)}, tmp_path / "other")
    for name, match in (("short", "cannot be read"), ("pickle", "cannot be read"), ("other", "does not contain weights")):
        with pytest.raises(ValueError, match=match):
            load_weights(model, tmp_path / name)
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / "none")
