"""
Random shift of images (Yarats et al., 2022, arXiv 2107.09645).
"""

import torch as th


def random_shift(images: th.Tensor, pad: int = 4) -> th.Tensor:
    """
    Shift each image independently by up to ``pad`` pixels along either axis, repeating its border. This is the same as padding
    it by ``pad`` and cropping it at a uniform integer offset from 0 to 2 ``pad``.

    :param images: any dtype, (..., C, H, W)
    :param pad: largest shift, in pixels
    :return: a new tensor of the same shape and dtype
    """
    channels, height, width = images.shape[-3:]
    flat = images.reshape(-1, channels, height, width)
    n = len(flat)
    offsets = th.randint(-pad, pad + 1, (2, n, 1), device=images.device)
    rows = (th.arange(height, device=images.device) + offsets[0]).clamp_(0, height - 1)
    columns = (th.arange(width, device=images.device) + offsets[1]).clamp_(0, width - 1)
    # One gather over flattened pixels, since all channels of an image share rows and columns
    pixels = (rows.unsqueeze(2) * width + columns.unsqueeze(1)).view(n, 1, height * width)
    shifted = flat.view(n, channels, height * width).gather(2, pixels.expand(n, channels, height * width))
    return shifted.view(images.shape)
