"""
``torch.compile`` with a fallback.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils._pytree import tree_leaves


class CompiledFunction:
    """
    Function that ``torch.compile`` compiles at the first call. If compiling fails, for example without a C++ compiler, the
    uncompiled function is used.

    :param function: function from tensors to tensors
    :param on_failure: called with the error if compiling fails
    :param trial: context of the call that compiles the function, whose outputs are discarded
    """

    def __init__(
        self,
        function: Callable[..., Any],
        on_failure: Callable[[Exception], None],
        trial: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.function = function
        self.on_failure = on_failure
        self.trial = trial
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        with self._settings():
            if self.compiled is None:
                with self.trial():
                    self.compiled = self._compile(args)
            try:
                return self.compiled(*args)
            except Exception as error:
                # Recompiling for changed inputs may have failed. An error of the function itself is raised again here.
                outputs = self.function(*args)
                self.on_failure(error)
                return outputs

    @staticmethod
    def _settings() -> contextlib.AbstractContextManager:
        # Imported here, as it takes a second and most models never compile
        from torch._dynamo import config

        # Models with the same code share compiled code. Guards on hooks detect hooks that are added to one of them later.
        # There is a variant for each kind of model and for each value of a constant. Beyond the limit, torch would run the
        # function uncompiled without a warning.
        return config.patch(skip_nnmodule_hook_guards=False, recompile_limit=64, fail_on_recompile_limit_hit=True)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled code refers to the networks of the original, so a copy must compile again
        return self.__dict__ | {"compiled": None}

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        try:
            with warnings.catch_warnings():
                # From code of torch
                warnings.simplefilter("ignore", DeprecationWarning)
                compiled = th.compile(self.function, dynamic=False)
                outputs = compiled(*args)
                # The first backward pass compiles it
                differentiable = [output for output in tree_leaves(outputs) if output.requires_grad]
                if differentiable:
                    differentiable[0].sum().backward()
        except Exception as error:
            self.on_failure(error)
            return self.function
        return compiled
