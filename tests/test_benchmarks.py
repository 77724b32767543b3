"""
The benchmarks run and report the right figures. Nothing is asserted about times.
"""

import json
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch as th
from envs import TINY_POLICY
from gymnasium import spaces

from benchmarks import memory, small_spaces, speed
from benchmarks.plain import Plain
from sb3_mrq import MRQ
from sb3_mrq.accelerate.precision import bfloat16_is_fast
from sb3_mrq.losses import n_step_return


def numbers(figures):
    """All numbers of nested dictionaries."""
    return [x for value in figures.values() for x in (numbers(value) if isinstance(value, dict) else [value])]


def test_speed(tmp_path, capsys, monkeypatch):
    # Compiling takes longer than everything else, and has its own tests
    monkeypatch.setattr("sb3_mrq.accelerate.updates.CompiledFunction", lambda function, *_: function)
    out = tmp_path / "speed.json"
    # and so does training with the default intervals and batches
    monkeypatch.setattr(speed, "MRQ", partial(MRQ, target_update_interval=5, batch_size=64))
    monkeypatch.setattr(speed, "TRAIN_WARM_UP", 2)
    fastest = speed.fastest
    monkeypatch.setattr(speed, "fastest", lambda function, seconds, at_least=1: fastest(function, seconds, 1))
    monkeypatch.setattr(speed.ImageNoiseEnv, "observation_space", spaces.Box(0, 255, (3, 36, 36), np.uint8))
    arguments = "--seconds 0.02 --large 4000 --small 2000 --train Pendulum-v1 --train-steps 5 --out"
    speed.main([*arguments.split(), str(out)])
    figures = json.loads(out.read_text())
    assert figures["update"]["gflop"]["encoder"] == pytest.approx(11.5 / 4, rel=0.01)
    assert figures["update"]["gflop"]["value_and_policy"] == pytest.approx(7.8 / 4, rel=0.01)
    measured = {
        key: figures[key]
        for key in ("memory", "sampling", "update", "image_update", "acting", "loop", "parallel_training", "training")
    }
    assert all(math.isfinite(x) for x in numbers(measured))
    del measured["memory"]  # of so small a buffer, the pages of a process come and go
    assert all(x > 0 for x in numbers(measured))
    table = capsys.readouterr().out
    for text in (
        "update, bfloat16, compiled / floor" if bfloat16_is_fast(th.device("cpu")) else "update, bfloat16: left out",
        "update, images, float32, eager",
        "sampling",
        "memory",
        "acting / TD3",
        "sampling / fastest update",
        "training steps a second, 8 environments / 1",
        "loop, 8 environments",
    ):
        assert text in table


@pytest.mark.parametrize("device, fast, all_of_them", [("cpu", 1, 2), ("cuda", 2, 3)])
def test_modes(device, fast, all_of_them):
    """Compiled updates come last, and can be left out."""
    assert len(speed.modes(device, False)) == all_of_them and speed.modes(device, False)[0] == "eager"
    assert speed.modes(device, True) == speed.modes(device, False)[:fast]


def test_memory(tmp_path):
    out = tmp_path / "memory.json"
    memory.main(["Pendulum-v1", "--size", "3000", "--further", "100", "--recorded", "250", "--out", str(out)])
    figures = json.loads(out.read_text())
    assert 2900 < figures["transitions"] < 3000
    assert 0 <= figures["buffer_gb"] < 0.05


@pytest.mark.parametrize("task", ["bandit-MultiDiscrete", "IdentityEnvBox"])
def test_small_spaces(task, tmp_path, monkeypatch):
    """A table with all numbers, and the figure of a bandit."""
    monkeypatch.setattr(small_spaces, "UNITS", TINY_POLICY)
    make_env, gamma, *_ = small_spaces.TASKS[task]
    monkeypatch.setitem(small_spaces.TASKS, task, (make_env, gamma, 20, 60))
    agents = "greedy,td3" if task == "IdentityEnvBox" else "actor,greedy,a2c"
    small_spaces.main(["--tasks", task, "--agents", agents, "--out", str(tmp_path)])
    table = pd.read_csv(tmp_path / "small-spaces.csv", comment="#")
    assert table.groupby("agent")["step"].max().tolist() == [80] * table["agent"].nunique()
    assert table["return"].between(0, 100).all()
    if task == "IdentityEnvBox":
        return
    ours = table[table["agent"] != "a2c"]
    assert (table[table["agent"] == "greedy"]["policy_follows_values"] == 1).all()
    for column in ("values_right", "policy_right", "policy_follows_values"):
        assert ours[column].between(0, 1).all()
    assert ours["actions_tried"].between(1, 16).all()
    assert (tmp_path / "small-spaces.png").stat().st_size > 10_000


def test_plain_implementation_computes_the_same():
    """With the same weights the plain implementation has the same losses as the package."""
    settings = dict(precision="float32", compile_updates=False)
    model = MRQ("MlpPolicy", speed.NoiseEnv(), learning_starts=500, seed=0, device="cpu", **settings)
    with pytest.warns(UserWarning, match="Nothing will be learned"):
        model.learn(300)
    plain = Plain(17, 6)
    copy_weights(model, plain)
    samples, n_step = model.replay_buffer.sample(64), model.replay_buffer.sample_n_step(64)
    # There is no switch of the termination term in it
    loss = plain.update_encoder(samples.observations, samples.actions, samples.rewards, samples.terminated, samples.mask)
    assert loss == pytest.approx(float(model.learner.update_encoder(samples)["encoder_loss"]), rel=1e-4)

    copy_weights(model, plain)
    th.manual_seed(0)
    noise = model.learner.sample_noise(64).target_normal
    returns, discount = n_step_return(n_step.rewards, n_step.terminated, n_step.mask, 0.99)
    losses = plain.update_value_and_policy(
        n_step.observations, n_step.actions, returns, discount, n_step.next_observations, 1.0, 0.0, noise
    )
    th.manual_seed(0)
    _, metrics = model.learner.update_value_and_policy(n_step)
    np.testing.assert_allclose(losses, [float(metrics["critic_loss"]), float(metrics["actor_loss"])], rtol=1e-3)


def copy_weights(model, plain):
    """From the package's networks and targets to the plain implementation's."""

    def linear(layer, weight, bias):
        with th.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)

    def layers(network):
        return [layer for layer in network.modules() if isinstance(layer, th.nn.Linear)]

    for suffix in ("", "_target"):
        encoder, ours = getattr(plain, f"encoder{suffix}"), getattr(model, f"encoder{suffix}")
        for layer, source in zip(layers(encoder.f), layers(ours.state), strict=True):
            linear(layer, source.weight, source.bias)
        g = ours.state_action
        linear(encoder.action, g.action_embedding[0].weight, g.action_embedding[0].bias)
        linear(encoder.g.first, th.cat([g.state_input.weight, g.action_input.weight], dim=1), g.state_input.bias)
        for layer, source in zip((encoder.g.second, encoder.g.last), layers(g.layers), strict=True):
            linear(layer, source.weight, source.bias)
        linear(encoder.m, ours.predictor.linear.weight, ours.predictor.linear.bias)
        heads = getattr(model, f"critic{suffix}").layers
        ensembles = [layer for layer in heads if hasattr(layer, "weight")]
        for k, head in enumerate(getattr(plain, f"critic{suffix}").heads):
            for layer, source in zip(layers(head), ensembles, strict=True):
                linear(layer, source.weight[k].T, source.bias[k, 0])
        for layer, source in zip(
            layers(getattr(plain, f"actor{suffix}")), layers(getattr(model, f"actor{suffix}")), strict=True
        ):
            linear(layer, source.weight, source.bias)
