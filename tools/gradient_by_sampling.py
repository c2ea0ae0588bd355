"""How the gradient grows when the exact mode's whitening statistics see too few samples.

    python tools/gradient_by_sampling.py [--encoder mobilenet_v2] [--size 80 112]

Prints, for a freshly converted U-Net on one batch of drawn street scenes, the first layer's gradient norm
over its weight norm, with statistics of at least 0, 1, 2, 4, ... samples a feature, beside the batch-norm
twin's.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
import torch.nn.functional as F

from segdeconv import layers
from segdeconv.config import load_recipe
from segdeconv.data import open_samples, train_loader
from segdeconv.models import build_model


def first_layer_gradient(recipe, batch) -> float:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model, _ = build_model(recipe.model, 8)
    images, targets = batch
    F.cross_entropy(model(images), targets).backward()
    weight = next(p for p in model.parameters() if p.ndim == 4)
    return float(weight.grad.norm() / weight.detach().norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="mobilenet_v2")
    parser.add_argument("--size", type=int, nargs=2, default=(80, 112), metavar=("HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    recipe = load_recipe(
        "toy_unet_resnet18",
        [
            "model.network_deconv.mode=exact",
            f"model.encoder={arguments.encoder}",
            f"data.size={list(arguments.size)}",
            "data.count=[8, 1]",
        ],
    )
    samples = open_samples(recipe.data, "train")
    batch = next(iter(train_loader(samples, recipe.data, 8, seed=0, multiple=1)))
    twin = replace(recipe, model=replace(recipe.model, norm="bn"))
    print(f"batch norm: {first_layer_gradient(twin, batch):.2f}")
    for minimum in (0, 1, 2, 4, 8, 16, 32):
        layers._SAMPLES_PER_FEATURE = minimum
        print(f"at least {minimum:2} samples a feature: {first_layer_gradient(recipe, batch):.2f}")


if __name__ == "__main__":
    main()
