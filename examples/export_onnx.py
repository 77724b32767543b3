"""
Export a policy to ONNX and run it with onnxruntime, without PyTorch.

    python examples/export_onnx.py [model.zip] [policy.onnx]  # extra examples
"""

import os
import sys

import numpy as np
import onnxruntime
import torch as th
from torch import nn

from sb3_mrq import MRQ

STEPS = int(os.environ.get("EXAMPLE_STEPS", "15000"))


class DeterministicPolicy(nn.Module):
    """
    ``model.predict(obs, deterministic=True)``, but with Box actions in [-1, 1].

    :param model: the model
    """

    def __init__(self, model: MRQ):
        super().__init__()
        self.policy = model.policy

    def forward(self, obs: th.Tensor) -> th.Tensor:
        """
        :param obs: a batch of observations, (B, ...)
        :return: actions, (B, action_dim)
        """
        return self.policy(obs, deterministic=True)


def export(model: MRQ, path: str) -> None:
    """
    :param model: a model
    :param path: file to write
    """
    obs = th.as_tensor(np.stack([model.observation_space.sample() for _ in range(2)]))
    model.policy.set_training_mode(False)
    th.onnx.export(
        DeterministicPolicy(model).cpu().eval(),
        (obs,),
        path,
        input_names=["obs"],
        output_names=["action"],
        dynamic_shapes={"obs": {0: th.export.Dim("batch")}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )


if len(sys.argv) > 1:
    model = MRQ.load(sys.argv[1], device="cpu")
else:
    model = MRQ("MlpPolicy", "Pendulum-v1", seed=0, learning_starts=min(10_000, STEPS // 2), device="cpu").learn(STEPS)
path = sys.argv[2] if len(sys.argv) > 2 else "policy.onnx"
export(model, path)

session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
obs = np.stack([model.observation_space.sample() for _ in range(100)])
(scaled,) = session.run(None, {"obs": obs})
actions = model.policy.unscale_action(scaled) if model.policy.squash_output else scaled
expected, _ = model.predict(obs, deterministic=True)
difference = np.abs(actions.reshape(expected.shape) - expected).max()
print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB, actions differ from model.predict by at most {difference:.2g}")
if difference > 1e-4:
    sys.exit(f"The exported policy differs from the model: its actions are off by up to {difference:.2g}. Do not use {path}.")
