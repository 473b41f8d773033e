"""How often the votes of a trained network are those of its float32 module on the same noise, by dtype and engine.

    python bench/agreement.py resnet20 weights.safetensors cifar10-images.tar.xz --sigma 0.25

The network is one of `csam.models`, with CIFAR's 3x32x32 images; its weights are the published ones or those that
`csam train` left in models/. Test images, evenly spaced, each with so many samples in a stream of its own. Printed
beside the share of equal votes: the root mean square of what the logits move by, over the spread of the logits.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import csam_kernels
from csam import data, models, pipeline, sampling
from csam.smoothing import Prepared

KINDS = {
    "float32": (torch.float32, ("auto",)),
    "bfloat16": (torch.bfloat16, ("auto", "dense", "sparse", "module")),
    "int8": ("int8", ("auto",)),
}


def logits(prepared: Prepared, x: Tensor) -> Tensor:
    if prepared.sampler is not None:
        return prepared.sampler.logits(x)
    return prepared.module(x.to(prepared.input_dtype).contiguous(memory_format=prepared.memory_format)).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=models.ARCHITECTURES)
    parser.add_argument("weights", type=Path)
    parser.add_argument("images", type=Path, help="CIFAR-10, in any form that csam takes")
    parser.add_argument("--sigma", type=float, default=0.25)
    parser.add_argument("--count", type=int, default=100, help="of images")
    parser.add_argument("--samples", type=int, default=100, help="of each")
    args = parser.parse_args()
    model = models.build(args.architecture, **models.NORMALIZATION["imagenet"]._asdict()).eval()
    models.load_weights(model, args.weights)
    cifar = data.load("cifar10", args.images, train_subset=pipeline.CALIBRATION)
    chosen = data.evenly_spaced(len(cifar.test_x), args.count)
    plans: dict[tuple[str, str], sampling.Plan] = {}
    for name, (dtype, engines) in KINDS.items():
        options: dict[str, Any] = {"sigma": args.sigma} if dtype == "int8" else {}
        for engine in engines:
            examples = data.to_unit(cifar.train_x)
            plans[name, engine] = sampling.plan(model, examples, dtype=dtype, choices=engine, **options)
    equal, moved, spread = dict.fromkeys(plans, 0), dict.fromkeys(plans, 0.0), 0.0
    with torch.inference_mode():
        for i in chosen:
            noise = {"seed": 0, "stream": i}
            noisy = csam_kernels.smoothing_noise(data.to_unit(cifar.test_x[i]), args.samples, args.sigma, **noise)
            wanted = model(noisy)
            spread += float(wanted.var(1).sum())
            for key, plan in plans.items():
                found = logits(plan.prepared, noisy)
                equal[key] += int((found.argmax(1) == wanted.argmax(1)).sum())
                moved[key] += float((found - wanted).square().mean(1).sum())
    total = args.count * args.samples
    table = Table("dtype", "layers", title=f"{args.weights.name}, sigma {args.sigma:g}, {total:,} samples")
    for heading in ("equal votes", "logits move by"):
        table.add_column(heading, justify="right")
    for key, plan in plans.items():
        engines = Counter(layer.engine for layer in plan.layers)
        layers = f"{key[1]}: {', '.join(f'{n} {name}' for name, n in engines.items()) or 'torch'}"
        table.add_row(key[0], layers, f"{equal[key] / total:.2%}", f"{(moved[key] / spread) ** 0.5:.1%}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
