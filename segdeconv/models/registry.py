"""What the registry of networks holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class Architecture:
    """One entry: ``build(num_classes, encoder, options)`` returns the network with batch norm."""

    task: Literal["segmentation", "classification"]
    build: Callable[[int, str | None, dict[str, Any]], nn.Module]
    takes_encoder: bool = False
    default_encoder: str = "resnet18"


def merge(*registries: dict[str, Architecture]) -> dict[str, Architecture]:
    """One dictionary from several; a name that stands in two is an error."""
    merged: dict[str, Architecture] = {}
    for registry in registries:
        for name, architecture in registry.items():
            if name in merged:
                raise ValueError(f"two architectures are called {name!r}")
            merged[name] = architecture
    return merged
