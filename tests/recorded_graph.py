"""
What a CUDA graph does, on any device: operations are recorded once and played again on the same memory.
"""

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """
    Records every operation inside of it, backward passes and optimisers included. ``replay`` does them again: with the numbers
    and the tensors of the first time, results written over the first ones. Nothing of Python runs again.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (th.ops.aten._local_scalar_dense.default, th.ops.aten.nonzero.default):
            raise RuntimeError(f"{function} waits for the device, which is not permitted while it is captured")
        outputs = function(*args, **kwargs)
        aliases = [result.alias_info for result in function._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return outputs  # a view of memory that is there
        fresh = not any(alias is not None for alias in aliases)
        self.operations.append((function, args, kwargs, tree_leaves(outputs) if fresh else []))
        return outputs

    @th.no_grad()
    def replay(self):
        for function, args, kwargs, written in self.operations:
            results = tree_leaves(function(*args, **kwargs))
            for tensor, result in zip(written, results, strict=bool(written)):
                if isinstance(tensor, th.Tensor):
                    tensor.detach().copy_(result)


def capture(function):
    """Replaces ``Graph.capture``. Recording does the work once, so the first replay is left out."""
    recorder = Recorder()
    with recorder:
        outputs = function()
    first = [True]

    def replay():
        if not first:
            recorder.replay()
        first.clear()

    return replay, outputs
