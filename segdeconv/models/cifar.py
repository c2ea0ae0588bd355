"""Networks for 32x32 pictures, as the paper's Table 1 trains them on CIFAR (arXiv 1905.11926)."""

from __future__ import annotations

from typing import Any

import torchvision
from torch import nn

from segdeconv.models.registry import Architecture


def _resnet18(num_classes: int, encoder: str | None, options: dict[str, Any]) -> nn.Module:
    """ResNet-18 with a 3x3 stem at full resolution and no max-pool; 11.17 M parameters at 10 classes."""
    model = torchvision.models.resnet18(weights=None, num_classes=num_classes, **options)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


ARCHITECTURES: dict[str, Architecture] = {"cifar_resnet18": Architecture("classification", _resnet18)}
