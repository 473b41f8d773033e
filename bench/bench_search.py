"""One whole C-SAM step (adversarial arm, ResNet-18 with the CIFAR stem, batch 64) against the same step in torch.

The twin is what a careful user would write: masks as autograd leaves, theta * mask in every layer, autocast for bf16,
channels_last throughout, foreach operators for whatever goes over all layers, fused Adam. Both sides have the same
weights, data, terms and dtype, and the first losses are checked to agree.

Bound in float32: two forward and backward passes are 2 * 6 * 0.556e9 * 64 = 427 GFLOP, nearly all in convolutions that
both sides give to oneDNN, which runs them near the peak of the AVX-512 units; the mask arithmetic that can be saved is
a few per cent of that. In bfloat16 AMX takes the convolutions out of the way, and the rest of the step shows.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import versus
from csam import models
from csam.nn import convert
from csam.search import MaskSearch, consistency_term, structural_term

SPARSITY, RHO, LR, TAU = 0.7, 1.0, 0.02, 0.9
CORE = {"structural": 0.0, "consistency": 0.0}
FULL = {"structural": 1.0, "consistency": 1.0}


class TorchConv(nn.Conv2d):
    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class TorchLinear(nn.Linear):
    mask: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class TorchStep:
    """The step in torch operators alone."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, structural: float, consistency: float) -> None:
        self.model, self.dtype = model.requires_grad_(False), dtype
        self.structural, self.consistency = structural, consistency
        self.layers = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
        for layer in self.layers:
            layer.__class__ = TorchConv if isinstance(layer, nn.Conv2d) else TorchLinear
        magnitudes = [layer.weight.abs() for layer in self.layers]
        self.scores = [(m / m.flatten().quantile(TAU)).clamp(0, 1).requires_grad_() for m in magnitudes]
        self.count = sum(s.numel() for s in self.scores)
        self.adam = torch.optim.Adam(self.scores, lr=LR, fused=True)

    def logits(self, masks: list[Tensor], x: Tensor) -> Tensor:
        for layer, mask in zip(self.layers, masks, strict=True):
            layer.mask = mask
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype is not None):
            return self.model(x).float()

    def step(self, x: Tensor, y: Tensor) -> float:
        both = bool(self.structural or self.consistency)
        clean = self.logits(self.scores, x)
        grads = torch.autograd.grad(F.cross_entropy(clean, y), self.scores, retain_graph=both)
        soft_masks = self.ascend(grads)
        soft = self.logits(soft_masks, x)
        task = F.cross_entropy(soft, y)
        loss, leaves = task, soft_masks
        if both:
            hard_masks = self.binary()
            loss = loss + self.structural * structural_term(soft, clean)
            loss = loss + self.consistency * consistency_term(clean, self.logits(hard_masks, x))
            leaves = [*soft_masks, *self.scores, *hard_masks]
        loss.backward(inputs=leaves)
        self.update(leaves)
        return float(task.detach())

    @torch.no_grad()
    def ascend(self, grads: tuple[Tensor, ...]) -> list[Tensor]:
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        moved = torch._foreach_add(self.scores, torch._foreach_mul(grads, float(RHO / norm)))
        torch._foreach_clamp_min_(moved, 0.0)
        torch._foreach_clamp_max_(moved, 1.0)
        return [m.requires_grad_() for m in moved]

    @torch.no_grad()
    def binary(self) -> list[Tensor]:
        flat = torch.cat([s.flatten() for s in self.scores])
        threshold = flat.kthvalue(int(SPARSITY * self.count)).values
        return [(s > threshold).float().requires_grad_() for s in self.scores]

    @torch.no_grad()
    def update(self, leaves: list[Tensor]) -> None:
        parts = [leaves[i :: len(self.scores)] for i in range(len(self.scores))]
        grads = [part[0].grad for part in parts]
        for others in zip(*[part[1:] for part in parts], strict=True):
            torch._foreach_add_(grads, [leaf.grad for leaf in others])
        mean = torch.stack([s.sum() for s in self.scores]).sum() / self.count
        torch._foreach_add_(grads, float(torch.sign(mean - (1 - SPARSITY)) / self.count))
        for score, grad in zip(self.scores, grads, strict=True):
            score.grad = grad
        self.adam.step()
        self.adam.zero_grad()
        torch._foreach_clamp_min_(self.scores, 0.0)
        torch._foreach_clamp_max_(self.scores, 1.0)


@pytest.mark.parametrize(
    ("dtype", "terms", "rounds"),
    [(torch.bfloat16, CORE, 9), (torch.bfloat16, FULL, 5), (None, CORE, 3)],
    ids=["bf16", "bf16-all-terms", "f32"],
)
def test_csam_step_adversarial_resnet18_b64(
    benchmark: Any, dtype: torch.dtype | None, terms: dict[str, float], rounds: int
) -> None:
    torch.manual_seed(0)
    model = models.build("resnet18").to(memory_format=torch.channels_last).train()
    x = torch.rand(64, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (64,))
    search = MaskSearch(convert(model), SPARSITY, rho=RHO, lr=LR, tau=TAU, dtype=dtype, **terms)
    twin = TorchStep(model, dtype, **terms)
    assert search.step(x, y)["task"] == pytest.approx(twin.step(x, y), rel=0.02)
    versus(benchmark, lambda: search.step(x, y), lambda: twin.step(x, y), rounds=rounds, warmup=1)
