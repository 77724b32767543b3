"""Import path of version 0.1, see :mod:`sb3_mrq.persist.weights`."""

from sb3_mrq.persist.weights import load_weights, save_weights

__all__ = ["load_weights", "save_weights"]
