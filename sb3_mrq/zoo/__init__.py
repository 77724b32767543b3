"""
MRQ and DRQ as the algorithms ``mrq`` and ``drq`` of rl-zoo3.

Importing this package registers the algorithms with rl-zoo3's functions and classes. The command ``sb3-mrq <script>``, or
``python -m sb3_mrq.zoo <script>``, runs any script of rl-zoo3 with it.
"""

try:
    import rl_zoo3  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "rl_zoo3":
        raise
    raise ModuleNotFoundError(
        'rl-zoo3 is not installed. Install it with: pip install "sb3-mrq[zoo]"', name=error.name
    ) from None

from sb3_mrq.zoo.registration import register

register()

__all__ = ["register"]
