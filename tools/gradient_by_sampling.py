"""How the gradient grows when whitening statistics see too few samples, and what keeps it in bounds.

    python tools/gradient_by_sampling.py [--encoder mobilenet_v2] [--size 80 112]

Prints, for a freshly converted U-Net on one batch of drawn street scenes, the first layer's gradient norm
times its weight norm (which does not depend on the scale of filters), over the batch-norm twin's: for the
fast mode with and without shrinkage, and for the exact mode with at least 0, 1, 2, 4, ... samples a feature.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from segdeconv import layers
from segdeconv.config import ModelConfig, NetworkDeconvConfig, load_recipe
from segdeconv.data import open_samples, train_loader
from segdeconv.errors import one_sentence
from segdeconv.models import build_model
from segdeconv.whitening import shrunk_inverse_sqrt


def first_layer_gradient(model_config: ModelConfig, batch: tuple[Tensor, Tensor]) -> float:
    torch.manual_seed(0)
    model, _ = build_model(model_config, 8)
    images, targets = batch
    F.cross_entropy(model(images), targets).backward()
    weight = next(p for p in model.parameters() if p.ndim == 4)
    assert weight.grad is not None
    return float(weight.grad.norm() * weight.detach().norm())


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", default="mobilenet_v2")
    parser.add_argument("--size", type=int, nargs=2, default=(80, 112), metavar=("HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    measure(arguments.encoder, arguments.size)


def measure(encoder: str, size: list[int]) -> None:
    recipe = load_recipe(
        "toy_unet_resnet18",
        [f"model.encoder={encoder}", f"data.size={list(size)}", "data.count=[8, 1]"],
    )
    samples = open_samples(recipe.data, "train")
    batch = next(iter(train_loader(samples, recipe.data, 8, seed=0, multiple=1)))
    batch_norm = first_layer_gradient(replace(recipe.model, norm="bn"), batch)

    def over(config: ModelConfig) -> str:
        return f"{first_layer_gradient(config, batch) / batch_norm:.1f} times batch norm's"

    print(f"fast mode: {over(recipe.model)}")
    unshrunk = lambda cov, samples: shrunk_inverse_sqrt(cov, samples * math.inf)  # noqa: E731
    with mock.patch.object(layers, "shrunk_inverse_sqrt", unshrunk):
        print(f"fast mode without shrinkage: {over(recipe.model)}")
    exact = replace(recipe.model, network_deconv=NetworkDeconvConfig(mode="exact"))
    for minimum in (0, 1, 2, 4, 8, 16, 32):
        with mock.patch.object(layers, "_SAMPLES_PER_FEATURE", minimum):
            print(f"exact mode, at least {minimum:2} samples a feature: {over(exact)}")


if __name__ == "__main__":
    main()
