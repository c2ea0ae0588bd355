"""Segmentation networks with network deconvolution (Ye et al., ICLR 2020): convert, train, fold, export.

Importing the package does no work; names below load what they need when they are first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what `__getattr__` gives
    from segdeconv.checkpoint import load_checkpoint as load_checkpoint
    from segdeconv.config import NetworkDeconvConfig as NetworkDeconvConfig
    from segdeconv.convert import calibrate as calibrate
    from segdeconv.convert import convert_to_network_deconv as convert_to_network_deconv
    from segdeconv.errors import UserError as UserError
    from segdeconv.export import export_onnx as export_onnx
    from segdeconv.fold import fold_network_deconv as fold_network_deconv
    from segdeconv.layers import WhitenedConv2d as WhitenedConv2d
    from segdeconv.layers import WhitenedLinear as WhitenedLinear
    from segdeconv.runtime import Segmenter as Segmenter
    from segdeconv.zoo import load as load

# onnxruntime reads it when it is imported, and would tell its makers of every session without it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_HOMES = {
    "NetworkDeconvConfig": "config",
    "UserError": "errors",
    "WhitenedConv2d": "layers",
    "WhitenedLinear": "layers",
    "convert_to_network_deconv": "convert",
    "calibrate": "convert",
    "fold_network_deconv": "fold",
    "load": "zoo",
    "load_checkpoint": "checkpoint",
    "export_onnx": "export",
    "Segmenter": "runtime",
}

__all__ = list(_HOMES)


if not TYPE_CHECKING:  # else any name would have a type

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'segdeconv' has no attribute {name!r}")
        return getattr(importlib.import_module(f"segdeconv.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
