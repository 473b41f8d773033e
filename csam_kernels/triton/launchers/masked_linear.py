"""Launchers of the masked linear layer: the 1x1 convolution of one-pixel images."""

from __future__ import annotations

from torch import Tensor

from csam_kernels.triton.launchers.masked_conv2d import _backward, _forward


def _options(block_size: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int, int]:
    return (1, 1), (0, 0), (1, 1), 1, block_size


def _image(t: Tensor) -> Tensor:
    return t[:, :, None, None]


def masked_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, block_size: int) -> Tensor:
    mask = mask if block_size else _image(mask)
    out = _forward(_image(x), _image(weight), mask, bias, _options(block_size), convolution=False)
    return out.view(out.shape[:2])


def masked_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mask: Tensor, block_size: int, need: list[bool]
) -> list[Tensor]:
    images = (_image(grad), _image(x), _image(weight), mask if block_size else _image(mask))
    grads = _backward(*images, _options(block_size), need, convolution=False)
    return [g.view(g.shape[:2]) if g.dim() == 4 else g for g in grads]
