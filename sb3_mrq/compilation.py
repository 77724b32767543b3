"""
``torch.compile`` with a way back.
"""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch as th


class CompiledFunction:
    """
    A function compiled by ``torch.compile`` when it is first called, or the function itself where that fails: for want of a
    C++ compiler, say, or because a user's network cannot be compiled.

    :param function: from tensors to tensors
    :param give_up: called with the error where it fails; like the function it may be a method of what is copied with this
    :param trial: context in which it is called for the first time, only to see whether it works
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
                losses_of_it = [output for output in _leaves(outputs) if output.requires_grad]
                if losses_of_it:
                    losses_of_it[0].sum().backward()
        except Exception as error:
            self.give_up(error)
            return self.function
        return compiled


def _leaves(outputs: Any) -> list[th.Tensor]:
    """
    :param outputs: a tensor or nested tuples of these
    :return: the tensors, in order
    """
    return [outputs] if isinstance(outputs, th.Tensor) else [leaf for output in outputs for leaf in _leaves(output)]
