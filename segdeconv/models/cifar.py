"""The ten networks for 32x32 pictures that the paper's Table 1 trains on CIFAR (arXiv 1905.11926), and a
smaller one.

Shapes and widths are those of the authors' code, which has them from kuangliu/pytorch-cifar; they differ from
the networks of the same name for ImageNet in stem, strides and head. The counts of parameters in the paper
are those of networks without batch norm, as the twins are. Where torchvision has the same network or block it
is taken from there. Weights begin as torch begins them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.vgg import cfgs, make_layers
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from segdeconv.models.registry import Architecture

ConvNormReLU = Conv2dNormActivation  # no bias, and padding that keeps the size at stride 1


def vgg16(num_classes: int) -> nn.Module:
    """VGG-16 with a single linear layer as its head; 14.71 M parameters at 10 classes."""
    features = make_layers(cfgs["D"], batch_norm=True)
    return nn.Sequential(OrderedDict(features=features, **_head(512, num_classes)))


def resnet18(num_classes: int, width: int = 64) -> nn.Module:
    """ResNet-18; 11.17 M at a width of 64."""
    blocks, channels = [], width
    for out in (width, 2 * width, 4 * width, 8 * width):
        for stride in (1 if out == width else 2, 1):
            same = stride == 1 and channels == out
            skip = None if same else ConvNormReLU(channels, out, 1, stride, activation_layer=None)
            blocks.append(BasicBlock(channels, out, stride, skip))
            channels = out
    return _network(ConvNormReLU(3, width), blocks, channels, num_classes)


def preact_resnet18(num_classes: int) -> nn.Module:
    """ResNet-18 with batch norm and ReLU before the convolutions (arXiv 1603.05027); 11.17 M."""
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    return _network(stem, _preact_blocks(squeeze=False), 512, num_classes)


def densenet121(num_classes: int) -> nn.Module:
    """DenseNet-121 (arXiv 1608.06993); 6.88 M."""
    model = torchvision.models.densenet121(weights=None, num_classes=num_classes)
    model.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        delattr(model.features, name)
    return _begin_as_torch(model)


def resnext29_32x4d(num_classes: int) -> nn.Module:
    """ResNeXt-29 with 32 groups of 4 channels (arXiv 1611.05431); 4.76 M, where 2x64d would have 9.12 M."""
    model = torchvision.models.ResNet(Bottleneck, [3, 3, 3, 1], groups=32, width_per_group=4)
    model.layer4 = nn.Identity()
    model.fc = nn.Linear(1024, num_classes)
    model.conv1 = nn.Conv2d(3, 64, 1, bias=False)
    model.maxpool = nn.Identity()
    return _begin_as_torch(model)


def mobilenet_v2(num_classes: int) -> nn.Module:
    """MobileNetV2 (arXiv 1801.04381); 2.28 M."""
    plan = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
            (6, 320, 1, 1))  # fmt: skip
    blocks = [*_inverted_residuals(plan, squeeze=False), ConvNormReLU(320, 1280, 1)]
    return _network(ConvNormReLU(3, 32), blocks, 1280, num_classes)


def dpn92(num_classes: int) -> nn.Module:
    """Dual path network 92 (arXiv 1707.01629); 34.18 M."""
    blocks: list[nn.Module] = []
    channels = 64
    for width, residual, count, dense in ((96, 256, 3, 16), (192, 512, 4, 32), (384, 1024, 20, 24),
                                          (768, 2048, 3, 128)):  # fmt: skip
        for i in range(count):
            stride = 2 if i == 0 and blocks else 1
            blocks.append(DualPathBlock(channels, width, residual, dense, stride, first=i == 0))
            channels = residual + (i + 2) * dense
    return _network(ConvNormReLU(3, 64), blocks, channels, num_classes)


def pnasnet_a(num_classes: int) -> nn.Module:
    """A small network of one kind of cell in the manner of PNASNet (arXiv 1712.00559); 0.13 M."""
    blocks = []
    channels = 44
    for width in (44, 88, 176):
        for _ in range(6 if width == 44 else 7):
            blocks.append(PNASCell(channels, width))
            channels = width
    return _network(ConvNormReLU(3, 44), blocks, channels, num_classes)


def senet18(num_classes: int) -> nn.Module:
    """`preact_resnet18` with squeeze-and-excite in every block (arXiv 1709.01507); 11.26 M."""
    return _network(ConvNormReLU(3, 64), _preact_blocks(squeeze=True), 512, num_classes)


def efficientnet_b0(num_classes: int) -> nn.Module:
    """EfficientNet-B0's widths and depths, with 3x3 kernels and squeeze-and-excite last; 2.91 M."""
    plan = ((1, 16, 1, 2), (6, 24, 2, 1), (6, 40, 2, 2), (6, 80, 3, 2), (6, 112, 3, 1), (6, 192, 4, 2),
            (6, 320, 1, 2))  # fmt: skip
    return _network(ConvNormReLU(3, 32), _inverted_residuals(plan, squeeze=True), 320, num_classes)


def six_conv(num_classes: int, width: int = 32) -> nn.Module:
    """Six 3x3 convolutions, small and fast; 0.29 M at a width of 32."""
    plan = [width, width, "M", 2 * width, 2 * width, "M", 4 * width, 4 * width]
    features = make_layers(plan, batch_norm=True)
    return nn.Sequential(OrderedDict(features=features, **_head(4 * width, num_classes)))


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each behind its batch norm, and a skip connection."""

    def __init__(self, channels: int, out: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.squeeze = SqueezeExcitation(out, out // 16) if squeeze else nn.Identity()
        keeps_shape = stride == 1 and channels == out
        self.shortcut = None if keeps_shape else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        return self.squeeze(self.conv2(F.relu(self.norm2(self.conv1(y))))) + skip


class InvertedResidual(nn.Module):
    """Expand, filter each channel by 3x3, project. Where the stride is 1 the input is added, through a 1x1
    convolution if it has another number of channels; with squeeze-and-excite what that reads is added
    elsewhere.
    """

    def __init__(self, channels: int, out: int, expansion: int, stride: int, squeeze: bool) -> None:
        super().__init__()
        wide = expansion * channels
        self.layers = nn.Sequential(
            ConvNormReLU(channels, wide, 1),
            ConvNormReLU(wide, wide, 3, stride, groups=wide),
            ConvNormReLU(wide, out, 1, activation_layer=None),
        )
        self.squeeze = SqueezeExcitation(out, out // 16) if squeeze else None
        self.shortcut: nn.Module | None = None
        if stride == 1:
            same = channels == out
            self.shortcut = nn.Identity() if same else ConvNormReLU(channels, out, 1, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        if self.squeeze is None:
            return y if self.shortcut is None else y + self.shortcut(x)
        return self.squeeze(y) + (y if self.shortcut is None else self.shortcut(x))


class DualPathBlock(nn.Module):
    """A bottleneck of which ``residual`` channels are added to the input and ``dense`` are appended to it."""

    def __init__(self, channels: int, width: int, residual: int, dense: int, stride: int, first: bool):
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvNormReLU(channels, width, 1),
            ConvNormReLU(width, width, 3, stride, groups=32),
            ConvNormReLU(width, residual + dense, 1, activation_layer=None),
        )
        self.shortcut = (
            ConvNormReLU(channels, residual + dense, 1, stride, activation_layer=None)
            if first
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        x, y, d = self.shortcut(x), self.layers(x), self.residual
        return F.relu(torch.cat((x[:, :d] + y[:, :d], x[:, d:], y[:, d:]), 1))


class PNASCell(nn.Module):
    """A 7x7 filter a channel beside max-pooling; a cell with more channels out than in halves the size."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        stride = 1 if channels == out else 2
        self.filter = ConvNormReLU(channels, out, 7, stride, groups=channels, activation_layer=None)
        self.pool = nn.MaxPool2d(3, stride, padding=1)
        self.project = nn.Identity() if stride == 1 else ConvNormReLU(channels, out, 1, activation_layer=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.filter(x) + self.project(self.pool(x)))


def _preact_blocks(squeeze: bool) -> list[nn.Module]:
    shapes = [(64, 64, 1), (64, 64, 1)]
    for out in (128, 256, 512):
        shapes += [(out // 2, out, 2), (out, out, 1)]
    return [PreActBlock(*shape, squeeze) for shape in shapes]


def _inverted_residuals(plan: Sequence[tuple[int, int, int, int]], squeeze: bool) -> list[nn.Module]:
    """``plan`` has one row per stage: expansion, channels, blocks, stride of the first block."""
    blocks: list[nn.Module] = []
    channels = 32
    for expansion, out, count, stride in plan:
        for i in range(count):
            blocks.append(InvertedResidual(channels, out, expansion, stride if i == 0 else 1, squeeze))
            channels = out
    return blocks


def _network(stem: nn.Module, blocks: Iterable[nn.Module], channels: int, num_classes: int) -> nn.Module:
    parts = OrderedDict(stem=stem, blocks=nn.Sequential(*blocks), **_head(channels, num_classes))
    return nn.Sequential(parts)


def _head(channels: int, num_classes: int) -> dict[str, nn.Module]:
    return {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "head": nn.Linear(channels, num_classes),
    }


def _begin_as_torch(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    return model


def _architecture(build: Callable[..., nn.Module]) -> Architecture:
    return Architecture("classification", lambda num_classes, _, options: build(num_classes, **options))


ARCHITECTURES: dict[str, Architecture] = {
    f"cifar_{build.__name__}": _architecture(build)
    for build in (
        vgg16, resnet18, preact_resnet18, densenet121, resnext29_32x4d, mobilenet_v2, dpn92, pnasnet_a,
        senet18, efficientnet_b0, six_conv,
    )
}  # fmt: skip
