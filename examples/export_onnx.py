"""
Export a policy to ONNX and run it with onnxruntime, without PyTorch.

    python examples/export_onnx.py [model.zip] [policy.onnx]

Needs the extra ``examples``.
"""

import argparse
import os
import sys

import numpy as np
import onnxruntime
import torch as th
from torch import nn

from sb3_mrq import MRQ


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


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", help="file of a trained model (default: train one)")
parser.add_argument("path", nargs="?", default="policy.onnx", help="file to write (default: %(default)s)")
parser.add_argument("--steps", type=int, default=15_000, help="steps of training, without a model (default: %(default)s)")
args = parser.parse_args()

if args.model:
    model = MRQ.load(args.model, device="cpu")
else:
    model = MRQ("MlpPolicy", "Pendulum-v1", seed=0, learning_starts=min(10_000, args.steps // 2), device="cpu")
    model.learn(args.steps)
export(model, args.path)

session = onnxruntime.InferenceSession(args.path, providers=["CPUExecutionProvider"])
obs = np.stack([model.observation_space.sample() for _ in range(100)])
(scaled,) = session.run(None, {"obs": obs})
actions = model.policy.unscale_action(scaled) if model.policy.squash_output else scaled
expected, _ = model.predict(obs, deterministic=True)
difference = np.abs(actions.reshape(expected.shape) - expected).max()
print(f"{args.path}: {os.path.getsize(args.path) / 1e6:.1f} MB, actions differ from model.predict by at most {difference:.2g}")
if difference > 1e-4:
    sys.exit(f"The actions of the exported policy are off by up to {difference:.2g}. Do not use {args.path}.")
