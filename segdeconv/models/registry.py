"""What the registry of networks holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One entry: ``build(num_classes, encoder, options)`` returns the network with batch norm.

    ``with_weights`` are the options that its library sets where ``weights`` are asked for, if they change
    more than the weights.
    """

    task: Literal["segmentation", "classification"]
    build: Callable[[int, str | None, dict[str, Any]], nn.Module]
    takes_encoder: bool = False
    default_encoder: str = "resnet18"
    with_weights: dict[str, Any] = field(default_factory=dict)


def merge(*registries: dict[str, Architecture]) -> dict[str, Architecture]:
    """One dictionary from several; a name that stands in two is an error."""
    merged: dict[str, Architecture] = {}
    for registry in registries:
        for name, architecture in registry.items():
            if name in merged:
                raise ValueError(f"two architectures are called {name!r}")
            merged[name] = architecture
    return merged
