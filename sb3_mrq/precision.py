"""
In which precisions a device multiplies matrices fast.
"""

import platform

import torch as th


def bfloat16_is_fast(device: th.device) -> bool:
    """
    :param device: that of the networks
    :return: False where matrix products in bfloat16 are known to be slower than in float32: on GPUs without bfloat16, and on
        x86 processors with neither AMX nor AVX512-BF16, where torch computes each number on its own
    """
    if device.type == "cuda":
        with th.cuda.device(device):
            return th.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and platform.machine() in ("x86_64", "AMD64"):
        return th.cpu._is_amx_tile_supported() or th.cpu._is_avx512_bf16_supported()
    return True
