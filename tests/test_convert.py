from __future__ import annotations

import copy

import pytest
import torch
from networks import NETWORKS, images, logits, scramble_batch_norms
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from segdeconv.config import NetworkDeconvConfig
from segdeconv.convert import ConversionReport, calibrate, convert_to_network_deconv, read_structure
from segdeconv.errors import UserError
from segdeconv.layers import Whitened, WhitenedConv2d, WhitenedLinear

SMALL = NetworkDeconvConfig(block_size=4, linear_block_size=32)  # the walker is under test, not the roots


def reasons(report: ConversionReport, action: str) -> dict[str, str]:
    return {layer.name: layer.reason for layer in report.layers if layer.action == action}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_converts_and_trains(name: str) -> None:
    """Every layer is accounted for, the twin runs, and every parameter that is used gets a gradient."""
    model = NETWORKS[name]()
    before = {
        n
        for n, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear, _BatchNorm, nn.ConvTranspose2d))
    }
    twin, report = convert_to_network_deconv(model, SMALL)
    assert twin is model
    assert {layer.name for layer in report.layers} == before
    assert report.count("swapped") == sum(isinstance(m, Whitened) for m in twin.modules())
    kept_norms = {n for n, m in twin.named_modules() if isinstance(m, _BatchNorm)}
    assert kept_norms == {x.name for x in report.layers if x.action == "kept" and "BatchNorm" in x.kind}

    output = twin(images(name, 4))
    loss = logits(output).square().mean()
    if isinstance(output, dict):
        loss = loss + output["aux"].square().mean()
    loss.backward()
    assert loss.isfinite()
    unused = reasons(report, "kept")
    for parameter_name, parameter in twin.named_parameters():
        module = parameter_name.rpartition(".")[0]
        if unused.get(module) == "not used by the forward pass":
            continue
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", NETWORKS)
def test_warm_start_keeps_the_function(name: str) -> None:
    """Batch-norm network, converted, and calibrated: the same outputs in evaluation."""
    model = scramble_batch_norms(NETWORKS[name]()).eval()
    x = images(name)
    with torch.no_grad():
        want = logits(model(x))
        model.train()
        model, _ = convert_to_network_deconv(model, SMALL, warm_start=True)
        converted = logits(model.eval()(x))
        calibrate(model, [images(name), images(name) + 0.5])
        calibrated = logits(model(x))
    scale = want.abs().max().item()
    torch.testing.assert_close(converted, want, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(calibrated, want, rtol=0, atol=1e-4 * scale)
    assert any(m.running_mean.any() for m in model.modules() if isinstance(m, Whitened))


def test_calibration_measures_what_training_sees() -> None:
    """Statistics over several batches are those of all their patches together."""
    layer = WhitenedConv2d(8, 4, 3, config=NetworkDeconvConfig(block_size=4, sampling_stride=1)).double()
    batches = [torch.randn(2, 8, 7, 7, dtype=torch.float64) + i for i in range(3)]
    calibrate(nn.Sequential(layer), batches)
    mean, cov, _ = layer.moments(torch.cat(batches))
    torch.testing.assert_close(layer.running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.running_whitening, layer.whitening_from(cov), rtol=0, atol=1e-10)


def test_pairs_are_found_by_graph_not_by_name() -> None:
    class Crossed(nn.Module):
        """Registered in an order that says nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.norm_b = nn.BatchNorm2d(4)
            self.a = nn.Conv2d(3, 4, 3)
            self.norm_a = nn.BatchNorm2d(4)
            self.b = nn.Conv2d(4, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm_a(self.a(x)))
            return torch.relu(self.norm_b(self.b(x)))

    assert read_structure(Crossed()).norm_after == {"norm_a": "a", "norm_b": "b"}


def test_untraceable_modules_fall_back_to_module_order_with_a_reason() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)) if x.sum() > 0 else x

    model, report = convert_to_network_deconv(nn.Sequential(Moody()))
    assert reasons(report, "removed") == {"0.norm": "followed 0.conv"}
    assert [name for name, _ in report.untraced] == ["", "0"]
    assert "control flow" in report.untraced[1][1]
    assert "control flow" in str(report)
    assert isinstance(model[0].conv, WhitenedConv2d)


def test_activation_of_a_norm_with_activation_stays() -> None:
    from timm.layers import BatchNormAct2d

    model, _ = convert_to_network_deconv(
        nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act_layer=nn.SiLU))
    )
    assert isinstance(model[1], nn.SiLU)


@pytest.mark.parametrize("own_activation", [False, True])
def test_in_place_activations_do_not_reach_past_a_removed_norm(own_activation: bool) -> None:
    """x goes on unchanged beside a pre-activation block, as it did with batch norm in between."""
    from timm.layers import BatchNormAct2d

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if own_activation:
                self.norm, self.act = BatchNormAct2d(4), nn.Identity()
            else:
                self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(self.act(self.norm(x)))

    model, _ = convert_to_network_deconv(PreActivation())
    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    model(x)
    assert torch.equal(x, before)


def test_transposed_convolutions_and_1x1_maps_are_left_alone() -> None:
    model = NETWORKS["linknet"]()
    _, report = convert_to_network_deconv(model, SMALL)
    kept = reasons(report, "kept")
    assert sum(reason == "transposed convolution" for reason in kept.values()) == 5
    assert sum("follows the transposed convolution" in reason for reason in kept.values()) == 5
    _, report = convert_to_network_deconv(NETWORKS["deeplabv3plus"](), SMALL)
    pooled = [name for name, reason in reasons(report, "kept").items() if "1x1 map" in reason]
    assert pooled == ["decoder.aspp.0.convs.4.1"]
    _, report = convert_to_network_deconv(NETWORKS["unet se_resnet50"](), SMALL)
    assert all(".se_module." in name for name in reasons(report, "kept"))


def test_bias_is_given_and_initial_weights_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    weight = model[0].weight.clone()
    twin, _ = convert_to_network_deconv(scramble_batch_norms(model))
    assert torch.equal(twin[0].weight, weight)
    assert torch.equal(twin[0].bias, torch.zeros(4))


def test_filter_keeps_layer_and_its_batch_norm() -> None:
    _, report = convert_to_network_deconv(
        NETWORKS["unet"](), SMALL, filter=lambda module, name: not name.startswith("encoder.conv1")
    )
    assert reasons(report, "kept") == {
        "encoder.conv1": "the filter said no",
        "encoder.bn1": "follows encoder.conv1, which is kept",
    }


def test_a_batch_norm_without_neighbour_is_an_error_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Softmax(1))
    with pytest.raises(UserError, match=r"'2'.*pass a filter"):
        convert_to_network_deconv(model)
    assert type(model[0]) is nn.Conv2d
    _, report = convert_to_network_deconv(model, filter=lambda module, name: name != "2")
    assert reasons(report, "kept") == {"2": "the filter said no"}


def test_nothing_to_convert_is_an_error() -> None:
    with pytest.raises(UserError, match="no convolution or linear layer"):
        convert_to_network_deconv(nn.Sequential(nn.ReLU()))
    with pytest.raises(UserError, match="normalised by LayerNorm"):
        convert_to_network_deconv(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


def test_shared_modules_are_replaced_everywhere() -> None:
    conv = nn.Conv2d(4, 4, 1)
    model, _ = convert_to_network_deconv(nn.Sequential(conv, nn.ReLU(), conv))
    assert model[0] is model[2]
    assert isinstance(model[0], WhitenedConv2d)


def test_converting_twice_keeps_what_is_whitened() -> None:
    model, _ = convert_to_network_deconv(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), filter=lambda m, n: n == "0"
    )
    first = model[0]
    model, report = convert_to_network_deconv(model)
    assert model[0] is first
    assert reasons(report, "kept") == {"0": "whitened already"}
    assert isinstance(model[1], WhitenedLinear)


@pytest.mark.parametrize("batches", [[], [torch.full((1, 3, 8, 8), float("nan"))]])
def test_calibrate_refuses(batches: list) -> None:
    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(3, 4, 3)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"no batch|not finite"):
        calibrate(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="no whitened layer"):
        calibrate(nn.Sequential(nn.ReLU()), [torch.zeros(1)])
