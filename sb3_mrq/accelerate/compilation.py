"""
``torch.compile`` with a way back.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch as th
from torch.utils._pytree import tree_leaves


class CompiledFunction:
    """
    A function compiled by ``torch.compile`` when it is first called. If compiling fails, for example because there is no C++
    compiler, the function itself is called from then on.

    :param function: from tensors to tensors
    :param give_up: called with the error if compiling fails
    :param trial: context of the first call, which only finds out whether it works
    """

    def __init__(
        self,
        function: Callable[..., Any],
        give_up: Callable[[Exception], None],
        trial: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        self.function = function
        self.give_up = give_up
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
                # Compiled anew for what has changed, perhaps; an error of a user's network comes again
                outputs = self.function(*args)
                self.give_up(error)
                return outputs

    @staticmethod
    def _settings() -> contextlib.AbstractContextManager:
        # Imported late: it takes a second, and most models never compile
        from torch._dynamo import config

        # Models of a kind share what is compiled. Hooks on networks count, also those that were added later, or to another one
        # of the models. There is a variant for every kind and for every value of what counts as a constant; beyond the limit
        # torch would run them uncompiled without saying so.
        return config.patch(skip_nnmodule_hook_guards=False, recompile_limit=64, fail_on_recompile_limit_hit=True)

    def __getstate__(self) -> dict[str, Any]:
        # What is compiled works on the networks of the original, also in a copy
        return self.__dict__ | {"compiled": None}

    def _compile(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        try:
            with warnings.catch_warnings():
                # Raised inside torch
                warnings.simplefilter("ignore", DeprecationWarning)
                compiled = th.compile(self.function, dynamic=False)
                outputs = compiled(*args)
                # The backward pass is compiled when it is first run
                differentiable = [output for output in tree_leaves(outputs) if output.requires_grad]
                if differentiable:
                    differentiable[0].sum().backward()
        except Exception as error:
            self.give_up(error)
            return self.function
        return compiled
