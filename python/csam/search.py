"""C-SAM's mask stage: learn soft masks C under mask perturbation, then cut a binary mask at exact sparsity.

Source: He & Chen, "Towards Compact and Robust DNNs via Compression-aware Sharpness Minimization",
arXiv 2601.20301. Tags: [P] stated by the paper, [E] by reviews of its predecessor, [R] our reconstruction.

With theta the weights, C in [0,1] the soft masks, C~ the perturbed ones and B the binary ones, p(M) the
softmax output at x with effective weights theta * M, and p_T(M) the same at the transformed input x_T, a
step descends on the batch mean of

    task        * CE(p(C~), y)                                            [R: on by default]
  + structural  * max_k |p_k(C~) - p_k(C)|                                [E, form R]
  + consistency * KL(p(C) || p(B))                                        [E, form R]
  + margin      * max(0, max_k |p_k(C~) - p_T,k(C~)| - (p1 - p2)/2)        [E; sufficient condition P, form R]
  + budget      * mean(C)  or  budget * |mean(C) - (1 - s)|               [E, form R]

p1, p2 are the two largest of p(C~). Perturbation arms: `uniform` C~ = clip(C + u, 0, 1), u ~ U(-radius,
radius) [P]; `adversarial` C~ = clip(C + rho * g/||g||, 0, 1) with g the gradient of the task's
cross-entropy at C, whatever the weights of the objective [R]. Gradients reach C straight through the noise,
the clip and the cut [R].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from csam.masks import initial_scores, require_masked, select
from csam.nn import MaskedLayer
from csam.processes import average
from csam_kernels import checks, effective_weights, mask_gradients, perturb_masks

Transform = Callable[..., Tensor]
_CALLS_NONE = "model must call its masked layers, got logits that depend on none of them"
_OPTIMIZER_STATE = {"adam": ("step", "exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


def structural_term(logits_soft: Tensor, logits: Tensor) -> Tensor:
    """Batch mean of max_k |p_k(C~) - p_k(C)|: how far mask noise moves the output [E, form R]."""
    return (logits_soft.softmax(1) - logits.softmax(1)).abs().amax(1).mean()


def consistency_term(logits: Tensor, logits_hard: Tensor) -> Tensor:
    """Batch mean of KL(p(C) || p(B)) [E, form R]."""
    log_p, log_hard = logits.log_softmax(1), logits_hard.log_softmax(1)
    return F.kl_div(log_hard, log_p, reduction="batchmean", log_target=True)


def margin_term(logits: Tensor, logits_transformed: Tensor) -> Tensor:
    """Batch mean of max(0, Z - d), Z = max_k |p_k(x) - p_k(x_T)|, d = (p1 - p2)/2 of the two largest p(x).

    Z < d keeps the prediction [P]; hinge [R]. Logits [B, K], K >= 2.
    """
    p = logits.softmax(1)
    top = p.topk(2, dim=1).values
    moved = (p - logits_transformed.softmax(1)).abs().amax(1)
    return F.relu(moved - (top[:, 0] - top[:, 1]) / 2).mean()


@dataclass
class _Pass:
    """A forward pass at effective weights theta * M that are autograd leaves."""

    masks: list[Tensor]
    leaves: list[Tensor]
    logits: Tensor


class _Passes(NamedTuple):
    """The passes of a step at C, C~ and B, as far as they are needed; without noise C~ is C."""

    clean: _Pass | None
    soft: _Pass | None
    hard: _Pass | None

    def distinct(self) -> list[_Pass]:
        return list({id(p): p for p in self if p is not None}.values())


class _Group(NamedTuple):
    """Parameters by name, the optimizer that moves them, and the names of its state's entries."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    state_keys: tuple[str, ...]


class MaskSearch:
    """The mask stage as a training-loop object: call `step` on batches, then `apply`.

    ```python
    search = MaskSearch(convert(model), sparsity=0.7, transform=transforms.Rotation(10))
    for x, y in batches:
        print(search.step(x, y))
    search.apply()          # every layer.mask is cut; fine-tune next
    ```

    The scores are the layers' own `mask_score`, set to the percentile-scaled initial masks when the object
    is made. The model runs in the mode it is in: call `model.train()`, so that batch norm follows the masked
    activations. Its buffers stay as they are: every pass has copies of them, since the running statistics of
    the final mask have to be estimated anew in any case. Dropout draws the same units in every pass of a
    step. Step t of a seed is reproducible: its noise, transforms and dropout depend on (seed, t) only.

    Where torch.distributed is initialised, gradients and logged values are averaged over its processes, as
    DistributedDataParallel does: with the same model, settings and seed in each, all keep the same masks. Transforms
    and dropout draw alike in all of them; `csam.training.shared` gives each its own rows of a transform's draws.

    rho is the L2 length of the ascent step over all N mask values together (over each layer's with
    norm="layer"), so a value moves by rho/sqrt(N) in the root mean square; for scale, uniform noise has
    length radius * sqrt(N/3).

    A weight of zero drops its term and every forward pass that only this term needs. Passes over the batch
    (forward + backward) at most: one each at C, C~ and B, one at x_T, and for "adversarial" the gradient at
    C before the others.

    Args:
        model: holds masked layers (`csam.convert`), all float32 or all float64.
        sparsity: share s of the mask values to cut, in [0, 1).
        perturbation: "adversarial", "uniform", or None (C~ = C; the structural term is then zero and left
            out).
        radius: half-width of the uniform noise, >= 0 [R].
        rho: length of the adversarial step, >= 0 [R].
        norm: of the adversarial step, "global" or "layer".
        scope: of the budget, "global" or "layer".
        tau: quantile of the initial masks, in (0, 1] [E]; None keeps the scores that the layers hold.
        task, structural, consistency, margin, budget: the weights of the terms above, >= 0. margin None
            stands for 1 with a transform and 0 without.
        budget_form: "target" for |mean(C) - (1 - s)|, "l1" for mean(C); the mean is over mask values.
        transform: callable (x [B, C, H, W], *, seed: int) -> x_T of x's shape, for the margin term. Those of
            `csam.transforms` take pixels in [0, 1] and refuse others: the model is to normalise them itself.
            For pixels with noise give `transform.clipped`.
        optimizer: "adam" or "sgd" for the scores, with learning rate `lr` and, for sgd, `momentum`.
        joint: train theta as well (every parameter that requires a gradient), by SGD with `weight_lr`,
            `weight_momentum` and `weight_decay`. False: theta stays as it is [R, as HYDRA].
        dtype: torch.bfloat16 computes the passes of a float32 model in it (effective weights are rounded
            once, the rest runs under torch.autocast); None in the weights' dtype. Fastest is bfloat16 with
            model and images in channels_last.
        seed: 0..2^63-1.

    Raises:
        TypeError, ValueError: a model without masked layers or of another dtype, mixed block sizes, a
            margin weight without a transform, all weights zero, and arguments outside their ranges.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float = 0.7,
        *,
        perturbation: str | None = "adversarial",
        radius: float = 0.1,
        rho: float = 1.0,
        norm: str = "global",
        scope: str = "global",
        tau: float | None = 0.9,
        task: float = 1.0,
        structural: float = 1.0,
        consistency: float = 1.0,
        margin: float | None = None,
        budget: float = 1.0,
        budget_form: str = "target",
        transform: Transform | None = None,
        optimizer: str = "adam",
        lr: float = 0.02,
        momentum: float = 0.9,
        joint: bool = False,
        weight_lr: float = 0.01,
        weight_momentum: float = 0.9,
        weight_decay: float = 5e-4,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.sparsity = checks.sparsity(sparsity)
        self.perturbation = checks.choice("perturbation", perturbation, ("adversarial", "uniform", None))
        self.radius = checks.real("radius", radius, least=0)
        self.rho = checks.real("rho", rho, least=0)
        self.norm = checks.choice("norm", norm, ("global", "layer"))
        self.scope = checks.choice("scope", scope, ("global", "layer"))
        self.budget_form = checks.choice("budget_form", budget_form, ("target", "l1"))
        self.dtype = checks.choice("dtype", dtype, (None, torch.bfloat16))
        self.seed = checks.integer("seed", seed, low=0)
        if transform is not None and not callable(transform):
            raise TypeError(f"transform must be a callable or None, got {type(transform).__name__}")
        self.transform = transform
        self.joint = checks.flag("joint", joint)
        self.steps = 0
        if margin is None:
            margin = 0.0 if transform is None else 1.0
        terms = {
            "task": task,
            "structural": structural,
            "consistency": consistency,
            "margin": margin,
            "budget": budget,
        }
        self.lambdas = {name: checks.real(name, value, least=0) for name, value in terms.items()}
        if self.lambdas["margin"] and transform is None:
            raise ValueError(f"margin > 0 needs a transform, got margin={margin:g} and transform=None")
        if perturbation is None:
            self.lambdas["structural"] = 0.0
        if not any(self.lambdas.values()):
            raise ValueError(f"one of {', '.join(terms)} must be > 0 (structural needs a perturbation)")

        self._layers = require_masked(model)
        self._block_size = _common_block_size(self._layers)
        _match_dtypes(self._layers, self.dtype)
        self._scores = {name: layer.mask_score for name, layer in self._layers.items()}
        self._count = sum(score.numel() for score in self._scores.values())
        self.optimizer = _score_optimizer(optimizer, list(self._scores.values()), lr, momentum)
        self._groups = {"score": _Group(self._scores, self.optimizer, _OPTIMIZER_STATE[optimizer])}
        self._weight_names = _weight_names(model, self._layers)
        self._trained: dict[str, nn.Parameter] = {}
        if joint:
            self._trained = _trained_parameters(model, self._layers)
            self.weight_optimizer = torch.optim.SGD(
                self._trained.values(),
                lr=checks.real("weight_lr", weight_lr, above=0),
                momentum=checks.real("weight_momentum", weight_momentum, least=0),
                weight_decay=checks.real("weight_decay", weight_decay, least=0),
                fused=True,
            )
            self._groups["weight"] = _Group(self._trained, self.weight_optimizer, _OPTIMIZER_STATE["sgd"])
        if tau is not None:
            self._set_scores(initial_scores(self._layer_list(), tau))

    @property
    def lr(self) -> float:
        """Learning rate of the scores; assign to it for a schedule. Part of the state."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        self.optimizer.param_groups[0]["lr"] = checks.real("lr", value, above=0)

    @property
    def weight_lr(self) -> float:
        """Learning rate of theta in a joint search, likewise."""
        return float(self.weight_optimizer.param_groups[0]["lr"])

    @weight_lr.setter
    def weight_lr(self, value: float) -> None:
        self.weight_optimizer.param_groups[0]["lr"] = checks.real("weight_lr", value, above=0)

    @torch.enable_grad()
    def step(self, x: Tensor, y: Tensor) -> dict[str, float]:
        """One whole step: perturb, forward and backward passes, update of the scores (and of theta if joint).

        Args:
            x: floating point [B, ...], finite, and pixels in [0, 1] for a transform of `csam.transforms`; its
                memory format is that of the activations.
            y: int64 [B], class indices.

        Returns:
            "loss"; every term of non-zero weight by name, unweighted; "accuracy" at C~ if a term reads C~;
            "mask_mean" before the step; "grad_norm", the L2 norm of the scores' gradient.

        Raises:
            TypeError, ValueError: x and y not as above.
            FloatingPointError: the loss or a gradient is not finite; nothing has been updated then.
        """
        _check_batch(x, y)
        passes = self._forward(x, y)
        terms = self._terms(passes, x, y)
        score_grads, weight_grads = self._backward(terms, passes.distinct())
        if passes.soft is not None:
            terms["accuracy"] = (passes.soft.logits.argmax(1) == y).double().mean()
        values = torch.tensor([float(term.detach()) for term in terms.values()], dtype=torch.float64, device=x.device)
        score_grads = _averaged(score_grads)
        weight_grads = dict(zip(weight_grads, _averaged(list(weight_grads.values())), strict=True))
        logged = dict(zip(terms, _averaged([values])[0].tolist(), strict=True))
        logged["mask_mean"] = mean = self._mask_mean()
        if self.lambdas["budget"]:
            logged["budget"], slope = self._budget(mean)
            torch._foreach_add_(score_grads, self.lambdas["budget"] * slope / self._count)
        logged["loss"] = sum(weight * logged[name] for name, weight in self.lambdas.items() if weight)
        logged["grad_norm"] = norm = _norm(score_grads)
        weight_norm = _norm(list(weight_grads.values()))
        if not math.isfinite(logged["loss"] + norm + weight_norm):
            raise FloatingPointError(
                f"loss {logged['loss']:g}, gradient norm {norm:g} (of theta {weight_norm:g}) at step {self.steps}: "
                "nothing was updated; a lower lr or rho may do"
            )
        self._update(score_grads, weight_grads)
        return logged

    def masks(self, sparsity: float | None = None) -> dict[str, Tensor]:
        """Binary masks by layer name that keep exactly ceil((1-s)N) of the N mask values.

        N counts all layers together, or each layer alone with scope="layer".

        Args:
            sparsity: s; default the search's own.

        Raises:
            ValueError: sparsity outside [0, 1).
        """
        cut = select(self._layer_list(), self.sparsity if sparsity is None else sparsity, self.scope)
        return dict(zip(self._layers, cut, strict=True))

    def apply(self, sparsity: float | None = None) -> None:
        """Set every layer's hard mask to `masks(sparsity)`."""
        for name, mask in self.masks(sparsity).items():
            self._layers[name].set_mask(mask)

    def state_dict(self) -> dict[str, Tensor]:
        """Everything a resumed search needs, as a flat dict of contiguous tensors (fit for safetensors).

        Scores, their optimizer's state, step count and learning rate; with joint=True also the trained
        parameters, their optimizer's state and learning rate. A frozen theta, and the model's buffers, are the
        caller's to restore.
        """
        rates = {name: getattr(self, name) for name in self._rates()}
        state = {"step": torch.tensor(self.steps)} | {k: torch.tensor(v, dtype=torch.float64) for k, v in rates.items()}
        for prefix, group in self._groups.items():
            for name, parameter in group.parameters.items():
                state[f"{prefix}.{name}"] = parameter
                held = group.optimizer.state.get(parameter, {})
                state |= {f"{prefix}.{key}.{name}": v for key, v in held.items() if v is not None}
        return {key: v.detach().clone(memory_format=torch.contiguous_format) for key, v in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict()`: the next steps are bit for bit those of the search that was saved.

        Raises:
            TypeError, ValueError: a missing, unknown or wrongly shaped entry, by name; nothing has been changed then.
        """
        self._check_state(state)
        self.steps = int(state["step"])
        for rate in self._rates():
            setattr(self, rate, float(state[rate]))
        for prefix, group in self._groups.items():
            group.optimizer.state.clear()
            for name, parameter in group.parameters.items():
                with torch.no_grad():
                    parameter.copy_(state[f"{prefix}.{name}"])
                saved = {key: state.get(f"{prefix}.{key}.{name}") for key in group.state_keys}
                held = {key: _laid_out_as(parameter, v).clone() for key, v in saved.items() if v is not None}
                group.optimizer.state[parameter].update(held)

    def _forward(self, x: Tensor, y: Tensor) -> _Passes:
        """The passes that the terms of non-zero weight need."""
        on = {name for name, weight in self.lambdas.items() if weight}
        noisy = self.perturbation is not None and bool(on & {"task", "structural", "margin"})
        ascend = noisy and self.perturbation == "adversarial"
        at_clean = on & ({"structural", "consistency"} if noisy else {"task", "margin", "consistency"})
        scores = [score.detach() for score in self._scores.values()]

        clean = self._run(x, scores) if at_clean or ascend else None
        ascent = self._ascent(clean, y, keep_graph=bool(at_clean)) if clean and ascend else None
        soft = self._run(x, scores, self.perturbation, ascent) if noisy else clean
        hard = None
        if "consistency" in on:
            hard = self._run(x, select(self._layer_list(), self.sparsity, self.scope))
        return _Passes(clean, soft, hard)

    def _run(self, x: Tensor, at: list[Tensor], kind: str | None = None, ascent: list[Tensor] | None = None) -> _Pass:
        """Forward pass at the masks `at`, perturbed as `kind` says."""
        noise: dict[str, Any] = {
            "radius": self.radius,
            "rho": self.rho,
            "grads": ascent,
            "norm": self.norm,
            "seed": self.seed,
            "step": self.steps,
        }
        if self.joint and kind is not None:
            # dL/dtheta = G * C~ reads C~, which effective_weights never writes
            at, kind = perturb_masks(at, kind=kind, **noise), None
        leaves = effective_weights(
            [layer.weight.detach() for layer in self._layer_list()],
            at,
            kind=kind or "plain",
            dtype=self.dtype,
            block_size=self._block_size,
            **noise,
        )
        for leaf in leaves:
            leaf.requires_grad_()
        return _Pass(at, leaves, self._logits(leaves, x))

    def _logits(self, leaves: list[Tensor], x: Tensor) -> Tensor:
        """Logits [B, K] of the model with the leaves as its effective weights, float32 at least."""
        amp = torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None)
        drawn = seeded(_mix(self.seed, self.steps), x.device)
        masks = {f"{name}.mask" for name in self._layers}
        buffers = {name: b.clone() for name, b in self.model.named_buffers() if name not in masks}
        before = x._version
        with _installed(self._layer_list(), leaves), drawn, amp:
            logits = functional_call(self.model, buffers, (x,))
        if x._version != before:  # the next pass would have another x
            raise ValueError("model must leave its input as it is, got one that changes it in place")
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x) or logits.shape[1] < 2:
            came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"model must return logits of shape ({len(x)}, classes >= 2), got {came}")
        if not logits.requires_grad:  # as under torch.no_grad; other parameters may be frozen
            raise ValueError(_CALLS_NONE)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _ascent(self, clean: _Pass, y: Tensor, keep_graph: bool) -> list[Tensor]:
        """g = dCE/dC at the clean masks."""
        loss = _cross_entropy(clean.logits, y)
        with _run_once(self._layer_list()):
            grads = torch.autograd.grad(loss, clean.leaves, retain_graph=keep_graph, allow_unused=True)
        return _averaged(self._chain(grads, clean)[1])

    def _terms(self, passes: _Passes, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """The differentiable terms of non-zero weight."""
        clean, soft, hard = passes
        terms = {}
        if soft and self.lambdas["task"]:
            terms["task"] = _cross_entropy(soft.logits, y)
        if soft and clean and self.lambdas["structural"]:
            terms["structural"] = structural_term(soft.logits, clean.logits)
        if clean and hard:
            terms["consistency"] = consistency_term(clean.logits, hard.logits)
        if soft and self.lambdas["margin"]:
            terms["margin"] = margin_term(soft.logits, self._logits(soft.leaves, self._transformed(x)))
        return terms

    def _backward(self, terms: dict[str, Tensor], passes: list[_Pass]) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Gradients of the weighted terms: one a score, and those of theta by name (empty unless joint)."""
        if not terms:
            return [torch.zeros_like(score) for score in self._scores.values()], {}
        total = torch.stack([self.lambdas[name] * term for name, term in terms.items()]).sum()
        leaves = [leaf for p in passes for leaf in p.leaves]
        # a masked layer's weight has a gradient here too where something else reads it (a tied embedding)
        with _run_once(self._layer_list()):
            grads = torch.autograd.grad(total, [*leaves, *self._trained.values()], allow_unused=True)
        by_name = {n: g for n, g in zip(self._trained, grads[len(leaves) :], strict=True) if g is not None}
        by_score: list[Tensor] = []
        for i, p in enumerate(passes):
            part = grads[i * len(p.leaves) : (i + 1) * len(p.leaves)]
            if all(g is None for g in part):
                continue
            dtheta, dmask = self._chain(part, p)
            if by_score:
                torch._foreach_add_(by_score, dmask)
            else:
                by_score = dmask
            for name, grad in zip(self._weight_names, dtheta, strict=False):
                by_name[name] = by_name[name] + grad if name in by_name else grad
        if not by_score:
            raise ValueError(_CALLS_NONE)
        return by_score, by_name

    def _chain(self, grads: Sequence[Tensor | None], at: _Pass) -> tuple[list[Tensor], list[Tensor]]:
        """From dL/dW of a pass to dL/dtheta (empty unless joint) and dL/dM."""
        filled = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, at.leaves, strict=True)]
        theta = [layer.weight.detach() for layer in self._layer_list()]
        dtheta, dmask, _ = mask_gradients(filled, theta, at.masks, block_size=self._block_size, need_weight=self.joint)
        return dtheta or [], dmask or []

    def _budget(self, mean: float) -> tuple[float, float]:
        """The budget term at mean(C), and its derivative by the mean."""
        if self.budget_form == "l1":
            return mean, 1.0
        excess = mean - (1 - self.sparsity)
        return abs(excess), math.copysign(1.0, excess) if excess else 0.0

    def _mask_mean(self) -> float:
        sums = [score.detach().sum() for score in self._scores.values()]
        return float(torch.stack(sums).double().sum()) / self._count

    def _update(self, score_grads: list[Tensor], weight_grads: dict[str, Tensor]) -> None:
        """Optimizer steps, then the projection of the scores to [0, 1]."""
        grads = {"score": dict(zip(self._scores, score_grads, strict=True)), "weight": weight_grads}
        for prefix, group in self._groups.items():
            for name, parameter in group.parameters.items():
                grad = grads[prefix].get(name)
                parameter.grad = None if grad is None else _laid_out_as(parameter, grad)
                held = group.optimizer.state.get(parameter, {})  # of before the model moved, perhaps
                held.update({key: _laid_out_as(parameter, v) for key, v in held.items() if isinstance(v, Tensor)})
            group.optimizer.step()
            group.optimizer.zero_grad()
        with torch.no_grad():
            for score in self._scores.values():
                score.clamp_(0, 1)
        self.steps += 1

    def _transformed(self, x: Tensor) -> Tensor:
        """x_T of this step, in x's dtype and memory format."""
        assert self.transform is not None
        with torch.no_grad():
            moved = self.transform(x, seed=_mix(self.seed, self.steps))
        if not isinstance(moved, Tensor) or moved.shape != x.shape:
            came = tuple(moved.shape) if isinstance(moved, Tensor) else type(moved).__name__
            raise ValueError(f"transform must return a tensor of shape {tuple(x.shape)}, got {came}")
        return _laid_out_as(x, moved.to(x.dtype))

    def _check_state(self, state: Mapping[str, Tensor]) -> None:
        scalar = torch.Size()
        known = dict.fromkeys(("step", *self._rates()), scalar)
        for prefix, group in self._groups.items():
            for name, parameter in group.parameters.items():
                known[f"{prefix}.{name}"] = parameter.shape
                shapes = {key: scalar if key == "step" else parameter.shape for key in group.state_keys}
                held = {f"{prefix}.{key}.{name}": shape for key, shape in shapes.items()}
                if not held.keys().isdisjoint(state):  # the optimizer holds nothing before the first gradient
                    known |= held
        for key, value in state.items():
            if key not in known:
                raise ValueError(f"state must come from a search like this one, got the unknown key {key!r}")
            if not isinstance(value, Tensor):
                raise TypeError(f"state[{key!r}] must be a torch.Tensor, got {type(value).__name__}")
            if value.shape != known[key]:
                wanted, came = tuple(known[key]), tuple(value.shape)
                raise ValueError(f"state[{key!r}] must have shape {wanted}, got {came}")
        for key in known:
            if key not in state:
                raise ValueError(f"state must come from a search like this one, the key {key!r} is missing")
        for rate in self._rates():
            checks.real(rate, float(state[rate]), above=0)

    def _rates(self) -> tuple[str, ...]:
        return ("lr", "weight_lr") if "weight" in self._groups else ("lr",)

    def _layer_list(self) -> list[MaskedLayer]:
        return list(self._layers.values())

    def _set_scores(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for score, value in zip(self._scores.values(), values, strict=True):
                score.copy_(value)


def _score_optimizer(name: str, scores: list[nn.Parameter], lr: float, momentum: float) -> torch.optim.Optimizer:
    checks.choice("optimizer", name, tuple(_OPTIMIZER_STATE))
    lr = checks.real("lr", lr, above=0)
    momentum = checks.real("momentum", momentum, least=0)
    if name == "adam":
        return torch.optim.Adam(scores, lr=lr, fused=True)
    return torch.optim.SGD(scores, lr=lr, momentum=momentum, fused=True)


def _common_block_size(layers: Mapping[str, MaskedLayer]) -> int | None:
    sizes = {layer.block_size for layer in layers.values()}
    if len(sizes) > 1:
        raise ValueError(f"model must have one block size in all layers, got {sorted(map(str, sizes))}")
    return sizes.pop()


def _match_dtypes(layers: Mapping[str, MaskedLayer], dtype: torch.dtype | None) -> None:
    """Give every score its weight's dtype, float32 or float64, one for the whole model."""
    dtypes = {layer.weight.dtype for layer in layers.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        came = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ValueError(f"model must have weights of one dtype, float32 or float64, got {came}")
    if dtype is not None and dtypes != {torch.float32}:
        raise ValueError(f"dtype={dtype} needs a float32 model, got float64 weights")
    for layer in layers.values():
        layer.mask_score.data = layer.mask_score.data.to(layer.weight.dtype)


def _weight_names(model: nn.Module, layers: Mapping[str, MaskedLayer]) -> list[str]:
    """The parameter name of each layer's weight; layers that share a weight have one name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names.get(id(layer.weight), f"{name}.weight") for name, layer in layers.items()]


def _trained_parameters(model: nn.Module, layers: Mapping[str, MaskedLayer]) -> dict[str, nn.Parameter]:
    computed = [name for name, layer in layers.items() if "weight" not in layer._parameters]
    if computed:
        raise ValueError(
            "joint=True needs masked layers whose weight is a parameter of their own, got "
            f"{computed[0]!r}, where a parametrization or a hook computes it"
        )
    own = {id(layer.mask_score) for layer in layers.values()}
    found = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in own}
    if not found:
        raise ValueError("joint=True needs model parameters that require a gradient, got none")
    return found


def _check_batch(x: Tensor, y: Tensor) -> None:
    checks.tensor("x", x)
    checks.tensor("y", y, dtypes=(torch.int64,), ndim=1)
    checks.same_device(x=x, y=y)
    if x.dim() < 2 or len(x) != len(y) or not len(x):
        raise ValueError(f"x must be [B, ...] and y [B] with B >= 1, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError("x must be finite, got NaN or infinite values")
    if int(y.min()) < 0:
        raise ValueError(f"y must hold class indices >= 0, got {int(y.min())}")


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Batch mean; a label without a logit is named here, since on a GPU it would end the process's CUDA context."""
    if int(y.max()) >= logits.shape[1]:
        raise ValueError(f"y must hold class indices below the model's {logits.shape[1]}, got {int(y.max())}")
    return F.cross_entropy(logits, y)


def _norm(tensors: list[Tensor]) -> float:
    """L2 norm of all values together; 0 of none."""
    return float(torch.stack(torch._foreach_norm(tensors)).double().norm()) if tensors else 0.0


def _averaged(values: list[Tensor]) -> list[Tensor]:
    """The means over the processes of torch.distributed; the values themselves without them."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    means = [value.clone() for value in values]  # autograd may give two parameters one gradient tensor
    for dtype in dict.fromkeys(m.dtype for m in means):  # in the same order on all
        average([m for m in means if m.dtype == dtype])
    return means


def _laid_out_as(like: Tensor, value: Tensor) -> Tensor:
    """The value where `like` lies, and of one shape in its dtype and strides: fused optimizers walk both in storage
    order."""
    if value.shape != like.shape:
        return value.to(like.device)
    alike = value.device == like.device and value.dtype == like.dtype and value.stride() == like.stride()
    return value if alike else torch.empty_like(like).copy_(value)


def _mix(seed: int, step: int) -> int:
    """A 63-bit seed for one step of one seed (SplitMix64), so that neighbouring seeds share no steps."""
    z = (seed + (step + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1


@contextmanager
def _installed(layers: Sequence[MaskedLayer], leaves: Sequence[Tensor]) -> Iterator[None]:
    """The leaves in place of the layers' theta * M."""
    try:
        for layer, leaf in zip(layers, leaves, strict=True):
            layer.effective_weight = leaf
        yield
    finally:
        for layer in layers:
            layer.effective_weight = None


@contextmanager
def _run_once(layers: Sequence[MaskedLayer]) -> Iterator[None]:
    """Refuse that a backward pass computes a layer anew: its leaf is no longer in place, the result would be wrong."""

    def refuse(*_: Any) -> None:
        raise ValueError(
            "model must keep its activations during the search, got one that computes them anew in the backward pass; "
            "switch its torch.utils.checkpoint off"
        )

    handles = [layer.register_forward_pre_hook(refuse) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The model's own random draws (dropout) from `seed`; the global generators end as they were."""
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []):
        torch.default_generator.manual_seed(seed)
        if on_cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
