"""Small and representative networks with batch norm, by name."""

from __future__ import annotations

from collections.abc import Callable

import segmentation_models_pytorch as smp
import timm
import torch
import torchvision
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def _smp(architecture: str, encoder: str = "resnet18", **options: object) -> Callable[[], nn.Module]:
    return lambda: smp.create_model(architecture, encoder, encoder_weights=None, classes=5, **options)


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, num_classes=5)


def _torchvision(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=5, **options)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    # smp's decoders
    "unet": _smp("unet"),
    "unetplusplus": _smp("unetplusplus"),
    "manet": _smp("manet"),
    "linknet": _smp("linknet"),
    "fpn": _smp("fpn"),
    "pspnet": _smp("pspnet"),
    "deeplabv3": _smp("deeplabv3"),
    "deeplabv3plus": _smp("deeplabv3plus"),
    "pan": _smp("pan"),
    "upernet": _smp("upernet"),
    "segformer": _smp("segformer"),
    # encoders with habits of their own
    "unet mobilenet_v2": _smp("unet", "mobilenet_v2"),
    "linknet densenet121 (pre-activation)": _smp("linknet", "densenet121"),
    "segformer densenet121 (pre-activation)": _smp("segformer", "densenet121"),
    "manet densenet121 (pre-activation)": _smp("manet", "densenet121"),
    "unet densenet121 (pre-activation)": _smp("unet", "densenet121"),
    "unet efficientnet-b0 (padding by image size)": _smp("unet", "efficientnet-b0"),
    "unet dpn68 (sliced Sequential)": _smp("unet", "dpn68"),
    "unet mobileone_s0 (parallel batch norms)": _smp("unet", "mobileone_s0"),
    "unet mit_b0 (layer norm)": _smp("unet", "mit_b0"),
    "unet se_resnet50": _smp("unet", "se_resnet50"),
    "unet tu-mobilenetv3_small_050": _smp("unet", "tu-mobilenetv3_small_050"),
    "deeplabv3plus tu-resnet10t (pools padded by image size)": _smp("deeplabv3plus", "tu-resnet10t"),
    # classifiers
    "timm resnetv2_50 (pre-activation)": _timm("resnetv2_50"),
    "timm tf_efficientnet_b0 (same padding)": _timm("tf_efficientnet_b0"),
    "timm repvgg_a0": _timm("repvgg_a0"),
    "timm mixnet_s": _timm("mixnet_s"),
    "timm levit_128s": _timm("levit_128s"),
    "torchvision resnet18": _torchvision("resnet18"),
    "torchvision densenet121": _torchvision("densenet121"),
    "torchvision shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5"),
    "torchvision fcn_resnet50": _torchvision("fcn_resnet50", weights_backbone=None, aux_loss=True),
    "torchvision deeplabv3_resnet50": _torchvision(
        "deeplabv3_resnet50", weights_backbone=None, aux_loss=True
    ),
}
SIZES = {
    "timm levit_128s": (224, 224),  # fixed by its attention biases
    "pan": (128, 128),  # pools the deepest map three times
}


def images(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *SIZES.get(name, (64, 96)))


def logits(output: object) -> torch.Tensor:
    return output["out"] if isinstance(output, dict) else output


@torch.no_grad()
def scramble_batch_norms(model: nn.Module) -> nn.Module:
    """Running values and affine as after training, so that dropping or misplacing one shows."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(0, 0.2)
    return model
