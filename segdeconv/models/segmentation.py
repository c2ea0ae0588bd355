"""Segmentation networks: smp's with any smp or timm encoder; torchvision's (the paper's) with aux head."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torchvision
from segmentation_models_pytorch.encoders import encoders as smp_encoders
from torch import nn

from segdeconv.errors import UserError, did_you_mean
from segdeconv.models.registry import Architecture


def check_encoder(name: str) -> str:
    """An encoder's name as smp takes it: smp's own, or a timm network (``tu-`` is put before it)."""
    if name in smp_encoders:
        return name
    of_timm = name.removeprefix("tu-")
    if timm.is_model(of_timm):  # not everything that timm takes for a name: it downloads and reads others
        return f"tu-{of_timm}"
    others = "see segmentation_models_pytorch's list of encoders"
    hint = did_you_mean(name, [*smp_encoders, *timm.list_models()], others)
    raise UserError(f"no encoder is called {name!r}; {hint}")


_NOT_AN_OPTION = {
    "classes": "the data says them",
    "in_channels": "pictures are RGB",
    "activation": "the loss and exported graphs apply softmax themselves",
    "aux_params": "its second head would not be trained",
}


def _check_options(architecture: str, encoder: str, options: dict[str, Any]) -> None:
    known = inspect.signature(smp.MODEL_ARCHITECTURES_MAPPING[architecture].__init__).parameters
    for key, value in options.items():
        if key in _NOT_AN_OPTION and value is not None and (key, value) != ("in_channels", 3):
            raise UserError(f"model.options.{key}: {_NOT_AN_OPTION[key]}; remove it")
        if key in known:
            continue
        # timm takes further arguments, and checks them; smp's own encoders ignore them.
        of_timm = encoder.startswith("tu-")
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.85 if of_timm else 0.6)
        if near or not of_timm:
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(list(known)[1:])}"
            raise UserError(f"{architecture} takes no option model.options.{key}; {hint}")


def _smp(architecture: str) -> Architecture:
    def build(num_classes: int, encoder: str | None, options: dict[str, Any]) -> nn.Module:
        weights = options.get("encoder_weights") or None  # smp takes false for yes
        if weights and str(encoder).startswith("tu-"):
            weights = True  # which ones, the encoder's name says; smp warns of anything else
        options = {**options, "encoder_weights": weights}
        _check_options(architecture, str(encoder), options)
        return smp.create_model(architecture, encoder, classes=num_classes, **options)

    default = "tu-vit_tiny_patch16_224" if architecture == "dpt" else "resnet18"
    return Architecture("segmentation", build, takes_encoder=True, default_encoder=default)


def _torchvision(name: str) -> Architecture:
    def build(num_classes: int, encoder: str | None, options: dict[str, Any]) -> nn.Module:
        defaults: dict[str, Any] = {"weights": None, "weights_backbone": None}
        if not name.startswith("lraspp"):
            defaults["aux_loss"] = True
        return torchvision.models.get_model(name, num_classes=num_classes, **(defaults | options))

    return Architecture("segmentation", build)


ARCHITECTURES: dict[str, Architecture] = {name: _smp(name) for name in smp.MODEL_ARCHITECTURES_MAPPING} | {
    name: _torchvision(name)
    for name in torchvision.models.list_models(module=torchvision.models.segmentation)
}
