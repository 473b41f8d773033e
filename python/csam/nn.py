"""Masked twins of nn.Conv2d and nn.Linear: the same signature and state_dict keys, plus a mask.

A layer computes with the effective weight theta * M. M is the hard `mask` (bool buffer), or, with
`layer.soft = True`, clamp(mask_score, 0, 1), in which `mask_score` is differentiable. Granularities (one
mask value covers ...):

| granularity | covers | mask of a conv weight [O, I/groups, kH, kW] | of a linear weight [O, I] |
|---|---|---|---|
| weight | one weight | [O, I/groups, kH, kW] | [O, I] |
| filter | an output channel | [O, 1, 1, 1] | [O, 1] |
| channel | an input channel (of every group) | [1, I/groups, 1, 1] | [1, I] |
| block | n consecutive weights of a flattened filter | [O, ceil(I/groups*kH*kW / n)] | [O, ceil(I / n)] |
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from csam import lowering
from csam_kernels import checks, masked_conv2d, masked_linear
from csam_kernels.layout import expand_mask

GRANULARITIES = ("weight", "filter", "channel", "block")
Exclude: TypeAlias = str | Iterable[str] | Callable[[str, nn.Module], bool]

# These read the weights of their Linear children without calling them, so a mask there would be ignored in
# silence.
_READS_CHILD_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# These turn into nn.Conv2d and nn.Linear on their first input, too late for a mask.
_LAZY = (nn.LazyConv2d, nn.LazyLinear)


def mask_shape(weight_shape: Iterable[int], granularity: str, block_size: int = 4) -> tuple[int, ...]:
    """Shape of the mask of a weight [O, ...] (table above).

    Raises:
        TypeError: block_size is no integer.
        ValueError: unknown granularity, or block_size < 1.
    """
    rows, *rest = weight_shape
    if granularity == "weight":
        return (rows, *rest)
    if granularity == "filter":
        return (rows, *(1 for _ in rest))
    if granularity == "channel":
        return (1, rest[0], *(1 for _ in rest[1:]))
    if granularity != "block":
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    return (rows, math.ceil(math.prod(rest) / checks.integer("block_size", block_size, low=1)))


class _Masked(nn.Module):
    """What the two masked layers share.

    `effective_weight`, when set, stands in for theta * M: MaskSearch puts its autograd leaf there.
    """

    weight: Tensor
    mask: Tensor
    mask_score: nn.Parameter
    granularity: str
    block_size: int | None
    soft: bool
    effective_weight: Tensor | None
    _plain: type[nn.Module]

    def _add_mask(self, granularity: str, block_size: int) -> None:
        shape = mask_shape(self.weight.shape, granularity, block_size)
        self.granularity = granularity
        self.block_size = int(block_size) if granularity == "block" else None
        self.soft = False
        self.effective_weight = None
        weight = self.weight.detach()
        # a full mask takes the weight's memory format with its shape
        ones = torch.ones_like(weight) if shape == weight.shape else weight.new_ones(shape)
        score = ones.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
        self.mask_score = nn.Parameter(score, requires_grad=False)
        self.register_buffer("mask", ones.to(torch.bool))

    def set_mask(self, mask: Tensor) -> None:
        """Copy a hard mask into the layer.

        Args:
            mask: bool, or numbers that are all 0 or 1; broadcastable to `self.mask.shape`, on its device.

        Raises:
            TypeError: not a dense tensor.
            ValueError: another device, a shape that does not broadcast, values besides 0 and 1.
        """
        checks.dense("mask", mask)
        if mask.device != self.mask.device:
            raise ValueError(f"mask must be on the layer's device {self.mask.device}, got {mask.device}")
        if not _broadcasts(mask.shape, self.mask.shape):
            wanted = f"{tuple(self.mask.shape)} (granularity {self.granularity!r})"
            raise ValueError(f"mask must broadcast to {wanted}, got shape {tuple(mask.shape)}")
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"mask must be bool or hold only 0 and 1, got other values of dtype {mask.dtype}")
        with torch.no_grad():
            self.mask.copy_(mask.detach() != 0)

    def kept(self) -> int:
        """Number of weights that the hard mask keeps."""
        if self.block_size is None:
            return int(self.mask.sum()) * (self.weight.numel() // max(self.mask.numel(), 1))
        cols = self.weight[0].numel()
        widths = torch.full((self.mask.shape[1],), self.block_size, device=self.mask.device)
        widths[-1:] = cols - self.block_size * (self.mask.shape[1] - 1)
        return int((self.mask.sum(0) * widths).sum())

    @property
    def sparsity(self) -> float:
        """Exact share of the weights that the hard mask removes."""
        return 1 - self.kept() / self.weight.numel() if self.weight.numel() else 0.0

    def masked_weight(self) -> Tensor:
        """theta * M for the hard mask, in the weight's shape, dtype and memory format."""
        return (self.weight * expand_mask(self.mask, self.weight.shape, self.block_size or 0)).detach()

    def _mask_in_use(self) -> Tensor:
        return self.mask_score.clamp(0, 1) if self.soft else self.mask

    def extra_repr(self) -> str:
        block = f", block_size={self.block_size}" if self.block_size is not None else ""
        sparsity = "" if self.mask.is_meta else f", sparsity={self.sparsity:.4f}"
        return f"{super().extra_repr()}, granularity={self.granularity}{block}{sparsity}"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """A plain layer's state_dict loads too; the masks then stay as they are, ones if they have no values yet."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = {prefix + "mask", prefix + "mask_score"}
        if own.isdisjoint(state_dict):
            missing_keys[:] = [key for key in missing_keys if key not in own]
            if self.mask.is_meta and not self.weight.is_meta:  # assign=True
                ones = torch.ones_like(self.mask_score, device=self.weight.device)
                self.mask_score = nn.Parameter(ones, requires_grad=self.mask_score.requires_grad)
                self.mask = ones.to(torch.bool)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Masks that come from the meta device, where they have no values, are ones (`to_empty`)."""
        were_meta = self.mask.is_meta
        super()._apply(fn, recurse)
        if were_meta and not self.mask.is_meta:
            with torch.no_grad():
                self.mask_score.fill_(1)
                self.mask.fill_(True)
        return self


class MaskedConv2d(_Masked, nn.Conv2d):
    """nn.Conv2d over theta * M: its signature and state_dict, plus `mask_score` and `mask` (ones at first).

    Args:
        granularity: "weight", "filter", "channel" or "block" (module docstring).
        block_size: n of granularity "block"; unused otherwise.

    Shapes: x [B, C, H, W] or [C, H, W], as nn.Conv2d's.

    Raises:
        ValueError: unknown granularity, block_size < 1, and what nn.Conv2d raises.
    """

    _plain = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        granularity: str = "weight",
        block_size: int = 4,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        self._add_mask(granularity, block_size)

    def forward(self, input: Tensor) -> Tensor:
        if self.effective_weight is not None:
            return self._convolve(input, self.effective_weight)
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        stride: Any = self.stride
        dilation: Any = self.dilation
        return masked_conv2d(
            input,
            self.weight,
            self._mask_in_use(),
            self.bias,
            stride,
            padding,
            dilation,
            self.groups,
            block_size=self.block_size,
        )

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """The plain convolution with a given weight, as nn.Conv2d's, or lowered to a product where that is faster."""
        stride: Any = self.stride
        padding: Any = self.padding
        usual = self.padding_mode == "zeros" and self.groups == 1 and self.dilation == (1, 1)
        if usual and not isinstance(padding, str) and lowering.pays(x, weight, stride, padding):
            return lowering.conv2d(x, weight, self.bias, stride, padding)
        return self._conv_forward(x, weight, self.bias)


class MaskedLinear(_Masked, nn.Linear):
    """nn.Linear over theta * M: its signature and state_dict, plus `mask_score` and `mask` (ones at first).

    Args:
        granularity: "weight", "filter", "channel" or "block" (module docstring).
        block_size: n of granularity "block"; unused otherwise.

    Raises:
        ValueError: unknown granularity, block_size < 1.
    """

    _plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        granularity: str = "weight",
        block_size: int = 4,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._add_mask(granularity, block_size)

    def forward(self, input: Tensor) -> Tensor:
        if self.effective_weight is not None:
            return F.linear(input, self.effective_weight, self.bias)
        return masked_linear(input, self.weight, self._mask_in_use(), self.bias, block_size=self.block_size)


MaskedLayer: TypeAlias = MaskedConv2d | MaskedLinear
_TWINS: dict[type[nn.Module], type[MaskedLayer]] = {nn.Conv2d: MaskedConv2d, nn.Linear: MaskedLinear}


def convert(model: nn.Module, granularity: str = "weight", block_size: int = 4, exclude: Exclude = ()) -> nn.Module:
    """A copy of the model in which every nn.Conv2d and nn.Linear is its masked twin, with an all-ones mask.

    The copy shares nothing with the original and gives its outputs to the last bit. Layers are changed
    where they stand, so names, weights, requires_grad, hooks, training flags, device, dtype, and modules
    used in two places stay as they were. Left alone: other layers (ConvTranspose2d, Conv1d, ...),
    subclasses of nn.Conv2d and nn.Linear (their forward may differ; parametrized layers are among them),
    layers with a forward of their own or a weight that hooks compute (nn.utils.spectral_norm, nn.utils.prune until
    its `remove`), layers that are masked already, and everything inside nn.MultiheadAttention and
    nn.TransformerEncoderLayer, which read their children's weights directly.

    Args:
        granularity, block_size: of every new mask. A filter mask on a classifier can remove a class:
            exclude it there.
        exclude: module names left plain (a name covers everything below it), or a predicate (name, module)
            -> bool.

    Raises:
        TypeError: `model` is not a module, `exclude` neither names nor callable, block_size no integer.
        ValueError: unknown granularity, block_size < 1, a name in `exclude` that the model does not have, a
            lazy layer that has not seen its first input.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    mask_shape((1, 1), granularity, block_size)
    twin = copied(model)
    skipped = _excluded(twin, exclude)
    for name, module in twin.named_modules():
        if module in skipped:
            continue
        if isinstance(module, _LAZY) and module.has_uninitialized_params():
            raise ValueError(f"model must have run once before it is converted, got the lazy layer {name!r}")
        if _is_plain(module):
            module.__class__ = _TWINS[type(module)]
            module._add_mask(granularity, block_size)
    return twin


def fold(model: nn.Module) -> nn.Module:
    """A plain copy of the model: masked layers are nn.Conv2d or nn.Linear again, with weight theta * M.

    M is the hard mask. The copy shares nothing with the original, has the plain model's state_dict keys,
    and gives the masked model's outputs; but where a model reads the weight of a masked layer without calling it
    (F.linear(y, self.head.weight)), only the copy's is masked there.

    Raises:
        TypeError: `model` is not a module.
        ValueError: the weight of a masked layer is computed by a hook, such as that of torch.nn.utils.prune, or by a
            parametrization.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    computed = {name for name, layer in masked_layers(model).items() if "weight" not in layer._parameters}
    if computed:
        raise ValueError(
            f"model must have no masked layer whose weight hooks or parametrizations compute, got {min(computed)!r}; "
            'first call torch.nn.utils.prune.remove(module, "weight"), torch.nn.utils.remove_weight_norm(module), or '
            'torch.nn.utils.parametrize.remove_parametrizations(module, "weight")'
        )
    plain = copied(model)
    for layer in masked_layers(plain).values():
        layer.weight = nn.Parameter(layer.masked_weight(), requires_grad=layer.weight.requires_grad)
        del layer.mask_score, layer.mask
        del layer.granularity, layer.block_size, layer.soft, layer.effective_weight
        layer.__class__ = layer._plain  # type: ignore[assignment]
    return plain


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model; of what hooks computed from its parameters, too, which torch refuses.

    Such a weight, as torch.nn.utils.prune and weight_norm leave it, is computed anew before the layer is called again.
    """
    computed = [t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})


def settle_weights(model: nn.Module) -> None:
    """Make plain parameters, in place, of weights that hooks of torch.nn.utils (prune, weight_norm, spectral_norm)
    compute before every call: the values of eval mode, where they stay the same."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)
            elif isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, hook.name)


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The model's masked layers by name, in the order of `named_modules`; a shared layer comes once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, (MaskedConv2d, MaskedLinear))}


def _is_plain(module: nn.Module) -> bool:
    """Whether the layer computes with a weight of its own as its class does, so that the masked twin does the same."""
    return type(module) in _TWINS and "weight" in module._parameters and "forward" not in vars(module)


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) > len(target):
        return False
    return all(s in (1, t) for s, t in zip(reversed(shape), reversed(target), strict=False))


def _excluded(model: nn.Module, exclude: Exclude) -> set[nn.Module]:
    """The modules that stay plain."""
    named = list(model.named_modules(remove_duplicate=False))
    roots = [module for _, module in named if isinstance(module, _READS_CHILD_WEIGHTS)]
    if callable(exclude):
        roots += [module for name, module in named if exclude(name, module)]
    elif not isinstance(exclude, Iterable):
        raise TypeError(f"exclude must be names of modules or a callable (name, module), got {exclude!r}")
    else:
        known = dict(named)
        for name in [exclude] if isinstance(exclude, str) else exclude:
            if name not in known:
                raise ValueError(f"exclude must hold names of the model's modules, got {name!r}")
            roots.append(known[name])
    return {module for root in roots for module in root.modules()}
