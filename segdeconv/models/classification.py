"""Classifiers: torchvision's by name, with batch norm where it offers a choice; timm's by name."""

from __future__ import annotations

from typing import Any

import timm
import torchvision
from torch import nn

from segdeconv.models.registry import Architecture

# vgg11 means the network with batch norm: the plain one has no twin to compare with.
_WITH_BATCH_NORM = {name: f"{name}_bn" for name in ("vgg11", "vgg13", "vgg16", "vgg19")}

_WITH_WEIGHTS: dict[str, dict[str, Any]] = {
    "googlenet": {"transform_input": True, "aux_logits": False},
    "inception_v3": {"transform_input": True},
}


def _torchvision(name: str) -> Architecture:
    def build(num_classes: int, encoder: str | None, options: dict[str, Any]) -> nn.Module:
        options = {"weights": None, **options}
        return torchvision.models.get_model(
            _WITH_BATCH_NORM.get(name, name), num_classes=num_classes, **options
        )

    return Architecture("classification", build, with_weights=_WITH_WEIGHTS.get(name, {}))


def timm_architecture(name: str) -> Architecture:
    """Any of timm's classifiers."""

    def build(num_classes: int, encoder: str | None, options: dict[str, Any]) -> nn.Module:
        return timm.create_model(name, num_classes=num_classes, **options)

    return Architecture("classification", build)


ARCHITECTURES: dict[str, Architecture] = {
    name: _torchvision(name) for name in torchvision.models.list_models(module=torchvision.models)
}
