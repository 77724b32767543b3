"""
Precision of matrix products: which one is fast, and which one ``"auto"`` selects.
"""

import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch as th
from torch import nn

# Packages whose modules, except convolutions, are known to work in bfloat16
KNOWN_PACKAGES = ("torch", "sb3_mrq")


def processor_has_bfloat16() -> bool:
    """
    :return: whether the processor has AMX or AVX512-BF16; False if torch cannot detect it
    """
    # Not in the public interface of torch
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(th.cpu, name, lambda: False)() for name in names)


def bfloat16_is_fast(device: th.device) -> bool:
    """
    :param device: device of the networks
    :return: False if matrix products are known to be slower in bfloat16 than in float32: on GPUs without bfloat16, and on x86
        processors without AMX and AVX512-BF16
    """
    if device.type == "cuda":
        with th.cuda.device(device):
            return th.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        return processor_has_bfloat16()
    return True


def fast_precisions(device: th.device) -> list[str]:
    """
    :param device: device of the networks
    :return: precisions, without bfloat16 if it is known to be slower than float32
    """
    return ["float32", *(["tf32"] if device.type == "cuda" else []), *(["bfloat16"] if bfloat16_is_fast(device) else [])]


def automatic_precision(device: th.device, *networks: nn.Module) -> str:
    """
    Precision that ``precision="auto"`` selects: bfloat16 where it was measured to be faster, on processors with AMX or
    AVX512-BF16, for networks without convolutions. Networks with custom layers use float32, as the precision they need is
    unknown.

    :param device: device of the networks
    :param networks: all trained networks
    :return: "bfloat16" or "float32"
    """
    if device.type != "cpu" or not processor_has_bfloat16() or not th.backends.mkldnn.is_available():
        return "float32"
    modules = [module for network in networks for module in network.modules()]
    known = all(type(module).__module__.split(".")[0] in KNOWN_PACKAGES for module in modules)
    return "bfloat16" if known and not any(isinstance(module, nn.Conv2d) for module in modules) else "float32"


def warn_if_changed(precision: str, before: str | None) -> None:
    """
    Warn that a resumed run continues in another precision.

    :param precision: automatic choice on this device
    :param before: precision before the run was resumed, None if unknown
    """
    if before not in (None, precision):
        warnings.warn(
            f"The run computed in {before} before, and continues in {precision}, which is the automatic choice on this "
            f"device. Pass precision={before!r} to keep the precision.",
            stacklevel=6,
        )


class TF32Products:
    """
    Context manager for float32 matrix products in TF32 on devices that support it. The setting of torch is global: the first
    thread that enters changes it, and the last one that leaves restores it. In between it also affects other threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = ""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._before = th.get_float32_matmul_precision()
                th.set_float32_matmul_precision("high")
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    th.set_float32_matmul_precision(self._before)


tf32_products = TF32Products()
