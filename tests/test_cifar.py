"""The ten networks of the paper's Table 1, and the small one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import scramble_batch_norms
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segdeconv.config import ModelConfig
from segdeconv.convert import ConversionReport
from segdeconv.fold import fold_network_deconv
from segdeconv.layers import Whitened
from segdeconv.models import build_model, cifar

# Millions of parameters in the paper, where batch norm has been removed, and layers that stay plain: those of
# squeeze-and-excite see 1x1 maps.
TABLE_1 = {
    "cifar_vgg16": (14.71, 0),
    "cifar_resnet18": (11.17, 0),
    "cifar_preact_resnet18": (11.17, 0),
    "cifar_densenet121": (6.88, 0),
    "cifar_resnext29_32x4d": (4.76, 0),
    "cifar_mobilenet_v2": (2.28, 0),
    "cifar_dpn92": (34.18, 0),
    "cifar_pnasnet_a": (0.13, 0),
    "cifar_senet18": (11.26, 16),
    "cifar_efficientnet_b0": (2.91, 32),
}
ALL = {**TABLE_1, "cifar_six_conv": (0.29, 0)}


def test_table_1_is_complete() -> None:
    assert set(cifar.ARCHITECTURES) == set(ALL)


def build(name: str, norm: str) -> tuple[nn.Module, ConversionReport | None]:
    return build_model(ModelConfig(name, norm=norm), 10)


@pytest.mark.parametrize("name", ALL)
def test_size_and_conversion(name: str) -> None:
    millions, plain = ALL[name]
    model, report = build(name, "nd")
    assert report is not None
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - millions) <= max(0.01 * millions, 0.005)  # the paper rounds to two digits
    assert not any(isinstance(m, _BatchNorm) for m in model.modules())
    assert not report.untraced
    kept = [layer for layer in report.layers if layer.action == "kept"]
    assert len(kept) == plain
    assert all("squeeze" in layer.name and "sees a 1x1 map" in layer.reason for layer in kept)
    twin, _ = build(name, "bn")
    norms = sum(p.numel() for m in twin.modules() if isinstance(m, _BatchNorm) for p in m.parameters())
    new_biases = sum(
        len(layer.bias)
        for key, layer in model.named_modules()
        if isinstance(layer, Whitened) and twin.get_submodule(key).bias is None
    )
    assert (
        sum(p.numel() for p in twin.parameters())
        == sum(p.numel() for p in model.parameters()) + norms - new_biases
    )


@pytest.mark.parametrize("norm", ["bn", "nd"])
@pytest.mark.parametrize("name", ALL)
def test_every_parameter_gets_a_gradient(name: str, norm: str) -> None:
    model, _ = build(name, norm)
    out = model(torch.randn(4, 3, 32, 32))
    assert out.shape == (4, 10)
    F.cross_entropy(out, torch.tensor([0, 3, 6, 9])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key


@pytest.mark.parametrize("norm", ["bn", "nd"])
@pytest.mark.parametrize("name", ALL)
def test_folded_network_is_the_network_in_evaluation(name: str, norm: str) -> None:
    model = scramble_batch_norms(build(name, norm)[0]).double()
    with torch.no_grad():
        if norm == "nd":
            model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
        folded = fold_network_deconv(model)
        assert not any(isinstance(m, Whitened) for m in folded.modules())
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        want, got = model.eval()(x), folded(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12 * want.abs().max().item())
