"""
In which precision matrix products are fast, and in which they are computed where that is left open.
"""

import platform

import torch as th
from torch import nn

from sb3_mrq.extractors import MLPExtractor, MultiInputExtractor


def processor_has_bfloat16() -> bool:
    """
    :return: whether the processor has AMX or AVX512-BF16
    """
    return th.cpu._is_amx_tile_supported() or th.cpu._is_avx512_bf16_supported()


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
        return processor_has_bfloat16()
    return True


def automatic_precision(device: th.device, features_extractor: nn.Module) -> str:
    """
    What ``precision="auto"`` stands for: bfloat16 where it was measured to be faster, and to learn as float32 does. That is on
    processors with instructions for it, with vectors as observations and this package's own layers for them. An extractor
    of the user's own may need float32.

    :param device: that of the networks
    :param features_extractor: of the state encoder
    :return: "bfloat16" or "float32"
    """
    vectors = type(features_extractor) is MLPExtractor or (
        type(features_extractor) is MultiInputExtractor and not features_extractor.image_keys
    )
    return "bfloat16" if device.type == "cpu" and vectors and processor_has_bfloat16() else "float32"
