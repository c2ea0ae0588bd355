from __future__ import annotations

import abc
import collections
import copy
import functools
import gc
import math
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from networks import NETWORKS, images, logits, scramble_batch_norms
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves
from torchvision.ops import FrozenBatchNorm2d

from segdeconv.config import DataConfig, NetworkDeconvConfig
from segdeconv.convert import ConversionReport, calibrate, convert_to_network_deconv
from segdeconv.data import EvalSet, open_samples
from segdeconv.errors import UserError
from segdeconv.fold import fold_network_deconv
from segdeconv.layers import Whitened, WhitenedConv2d, WhitenedLinear
from segdeconv.structure import read_structure

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
    assert model.training is False
    scale = want.abs().max().item()
    torch.testing.assert_close(converted, want, rtol=0, atol=2e-5 * scale)
    torch.testing.assert_close(calibrated, want, rtol=0, atol=1e-4 * scale)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, Whitened):
            assert layer.running_moments[0].any(), layer_name
            assert (layer.running_whitening is not None) is layer.decorrelates, layer_name
            if layer.decorrelates:
                identity = torch.eye(layer.running_whitening.shape[-1])
                assert not torch.equal(layer.running_whitening[0], identity), layer_name


@pytest.mark.parametrize("name", ["unet mobilenet_v2", "torchvision deeplabv3_resnet50"])
def test_warm_start_on_photographs_with_default_settings(name: str, camvid: Path) -> None:
    """Issue: the same function before and after, to 1e-4 relative in float32 on real images."""
    config = DataConfig("camvid", root=str(camvid), size=(96, 128))
    samples = open_samples(config, "train")
    photographs = torch.stack([EvalSet(samples, config, 32)[i][0] for i in range(0, 60, 5)])
    model = NETWORKS[name]()
    with torch.no_grad():
        for _ in range(3):  # running values that belong to photographs
            model(photographs[:8])
        want = logits(model.eval()(photographs[8:]))
        model, _ = convert_to_network_deconv(model.train(), warm_start=True)
        calibrate(model, [photographs[:4], photographs[4:8]])
        got = logits(model.eval()(photographs[8:]))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize(
    ("name", "part"),
    [("unet mobilenet_v2", "encoder"), ("torchvision deeplabv3_resnet50", "backbone")],
)
def test_warm_start_of_a_trained_part(name: str, part: str) -> None:
    """What is trained keeps its function; what is new is what conversion without a warm start makes of it."""
    torch.manual_seed(0)
    model = scramble_batch_norms(NETWORKS[name]()).eval()
    x = images(name)
    cold, _ = convert_to_network_deconv(copy.deepcopy(model), SMALL)

    def features() -> list[torch.Tensor]:
        with torch.no_grad():
            return tree_leaves(model.get_submodule(part)(x))

    want = features()
    model, _ = convert_to_network_deconv(model, SMALL, warm_start=lambda _, name: name.startswith(part))
    calibrate(model.get_submodule(part), [images(name), images(name) + 0.5])
    for a, b in zip(features(), want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
    new = cold.state_dict()
    for key, value in model.state_dict().items():
        if not key.startswith(part):
            assert torch.equal(value, new[key]), key
    assert not torch.equal(features()[-1], tree_leaves(cold.get_submodule(part)(x))[-1])


def test_a_new_batch_norm_leaves_the_trained_layer_before_it_alone() -> None:
    convs = nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False)
    parts = {"encoder": nn.Sequential(*convs), "norm": nn.BatchNorm2d(4), "head": nn.Conv2d(4, 2, 1)}
    model = nn.Sequential(collections.OrderedDict(parts)).eval()
    x = torch.randn(4, 3, 16, 16)
    want = model.encoder(x)
    convert_to_network_deconv(model, SMALL, warm_start=lambda _, name: name.startswith("encoder"))
    calibrate(model.encoder, [torch.randn(4, 3, 16, 16)])
    torch.testing.assert_close(model.encoder(x), want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_what_cannot_say_what_is_trained_leaves_the_network_as_it_was() -> None:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    model = scramble_batch_norms(nn.Sequential(*layers))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AttributeError, match="running_mean"):
        convert_to_network_deconv(model, SMALL, warm_start=lambda module, _: bool(module.running_mean.any()))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_trained_network_converted_as_if_new_is_warned_of() -> None:
    network = scramble_batch_norms(smp.Unet("resnet18", encoder_weights=None, classes=3))
    with pytest.warns(UserWarning, match=r"of 30 batch norms, as encoder\.bn1, .*warm_start=True") as caught:
        convert_to_network_deconv(copy.deepcopy(network), SMALL)
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"of 10 batch norms, as decoder\."):
        convert_to_network_deconv(copy.deepcopy(network), SMALL, warm_start=lambda _, name: "encoder" in name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_to_network_deconv(network, SMALL, warm_start=True)
        convert_to_network_deconv(smp.Unet("resnet18", encoder_weights=None, classes=3), SMALL)


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
def test_calibration_gives_every_batch_the_same_weight(mode: str) -> None:
    everywhere = {} if mode == "fast" else {"sampling_stride": 1}
    config = NetworkDeconvConfig(mode=mode, block_size=4, **everywhere)
    layer = WhitenedConv2d(8, 4, 3, config=config).double()
    batches = [torch.randn(2, 8, 7, 7, dtype=torch.float64) + i for i in range(3)]
    calibrate(nn.Sequential(layer), batches)
    if mode == "fast":
        var, mean = torch.var_mean(torch.cat(batches), (0, 2, 3), correction=0)  # of all as one batch
        expected = torch.stack((mean, var))
        torch.testing.assert_close(layer.running_moments, expected, rtol=0, atol=1e-12)
    else:
        mean, covs, _ = zip(*map(layer.moments, batches), strict=True)
        root = sum(map(layer.whitening_from, covs)) / 3
        torch.testing.assert_close(layer.running_whitening, root, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.running_mean, sum(mean) / 3, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
@pytest.mark.parametrize("options", [dict(groups=2), dict(groups=8), dict(stride=2), {}])
def test_calibration_in_every_mode(mode: str, options: dict) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, **options).double()
    x = torch.randn(4, 8, 9, 9, dtype=torch.float64)
    want = conv(x)
    config = NetworkDeconvConfig(mode=mode, block_size=4)
    layer = WhitenedConv2d.from_conv(conv, config)
    calibrate(nn.Sequential(layer), [x])
    torch.testing.assert_close(layer.eval()(x), want, rtol=0, atol=1e-10)


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
    assert "control flow" in report.summary()
    assert isinstance(model[0].conv, WhitenedConv2d)


@pytest.mark.parametrize("nested", [False, True])
def test_module_order_does_not_say_who_else_reads_what_is_overwritten(nested: bool) -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            relu = nn.ReLU(inplace=True)
            self.relu = nn.Sequential(relu) if nested else relu
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            z = self.relu(self.norm(y))
            return y + z if x.shape[0] == 2 else y

    model, report = convert_to_network_deconv(Moody())
    assert report.untraced
    x = torch.randn(2, 3, 9, 9)
    y = model.eval().conv(x)
    assert torch.equal(model(x), y + y.relu())


def test_a_norm_read_by_what_could_not_be_traced_is_kept() -> None:
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.part(x)) if x.sum() < 1e9 else x

    _, report = convert_to_network_deconv(Moody())
    assert reasons(report, "kept") == {"part.0": "what reads it could not be traced"}


def test_activation_of_a_norm_with_activation_stays() -> None:
    from timm.layers import BatchNormAct2d

    model, _ = convert_to_network_deconv(
        nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4, act_layer=nn.SiLU))
    )
    assert isinstance(model[1].act, nn.SiLU)


def test_an_activation_that_norms_carry_stays_itself() -> None:
    """One PReLU of two norms: parts of the network list it once, hooks see it, and it may be compiled."""
    from timm.layers import BatchNormAct2d

    class Net(nn.Module):
        def __init__(self, act: nn.Module) -> None:
            super().__init__()
            self.act = act
            self.conv, self.norm = nn.Conv2d(3, 4, 1), BatchNormAct2d(4, apply_act=False)
            self.last, self.last_norm = nn.Conv2d(4, 4, 1), BatchNormAct2d(4, apply_act=False)
            self.norm.act = self.last_norm.act = act

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last_norm(self.last(self.norm(self.conv(x))))

    x, act = torch.randn(2, 3, 5, 5), nn.PReLU()
    model, _ = convert_to_network_deconv(Net(act))
    assert [name for name, module in model.named_modules() if isinstance(module, nn.PReLU)] == ["act"]
    assert {"norm.act.weight", "last_norm.act.weight"} < model.state_dict().keys()
    calls: list[nn.Module] = []
    act.register_forward_hook(lambda module, *_: calls.append(module))
    model(x)
    assert calls == [act, act]
    model, report = convert_to_network_deconv(Net(torch.compile(nn.PReLU(), backend="eager")))
    assert report.count("removed") == 2
    torch.testing.assert_close(fold_network_deconv(model)(x), model.eval()(x))


def test_dropout_that_a_library_wrapped_ends_in_evaluation() -> None:
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(4)
    norm.act = nn.Dropout()
    norm.act.forward = functools.partial(norm.act.forward)  # which knows the Dropout itself
    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(3, 4, 1), norm))
    x = torch.randn(2, 3, 5, 5)
    model(x)
    assert torch.equal(model.eval()(x), model(x))


def pair(block: nn.Module) -> dict[str, str]:
    return read_structure(block).norm_after


class Block(nn.Module):
    """Two layers and a norm, wired as each test says."""

    def __init__(self, forward: Callable, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = norm or nn.BatchNorm2d(4)
        self.wiring = forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wiring(self, x)


def same_after_warm_start(model: nn.Module) -> ConversionReport:
    """Convert with a warm start and compare, on the network and on its fold, in evaluation."""
    scramble_batch_norms(model).eval()
    x = torch.randn(4, 4, 6, 6)
    with torch.no_grad():
        want = model(x.clone())
        torch.testing.assert_close(fold_network_deconv(model)(x.clone()), want, rtol=0, atol=1e-5)
        model, report = convert_to_network_deconv(model, warm_start=True)
        calibrate(model, [torch.randn(8, 4, 6, 6)])
        torch.testing.assert_close(model.eval()(x.clone()), want, rtol=0, atol=1e-4 * want.abs().max().item())
        torch.testing.assert_close(
            fold_network_deconv(model)(x.clone()), want, rtol=0, atol=1e-4 * want.abs().max().item()
        )
    return report


class NormReLU(nn.BatchNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(super().forward(x))


def test_a_batch_norm_with_a_forward_of_its_own_is_kept() -> None:
    report = same_after_warm_start(Block(lambda m, x: m.b(m.norm(m.a(x))), NormReLU(4)))
    assert reasons(report, "kept") == {"norm": "NormReLU has a forward of its own"}


class OwnWeights(nn.Conv2d):
    def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        return super()._conv_forward(x, weight / weight.norm(), bias)


class SlowNorm(nn.BatchNorm2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, momentum=0.01)


class PaddedConv(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)


def test_subclasses_that_compute_as_their_class_are_of_their_class() -> None:
    """As transformers' EfficientNetDepthwiseConv2d and torchvision's Conv3DSimple."""
    block = Block(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), SlowNorm(4))
    block.a, block.b = PaddedConv(4), OwnWeights(4, 4, 1)
    report = same_after_warm_start(block)
    assert reasons(report, "removed") == {"norm": "followed a"}
    assert reasons(report, "kept") == {"b": "OwnWeights has a forward of its own"}
    volume = type("Conv3DSimple", (nn.Conv3d,), {"__module__": "mine"})(3, 4, 3)
    folded = fold_network_deconv(scramble_batch_norms(nn.Sequential(volume, nn.BatchNorm3d(4))))
    assert isinstance(folded[1], nn.Identity)


class SlottedNorm(nn.BatchNorm2d):
    __slots__ = ("extra",)


class AbstractConv(abc.ABC, nn.Conv2d):
    pass


def test_layers_whose_class_cannot_change_are_kept() -> None:
    """Slots among the bases, `abc.ABC` has them, forbid it."""
    block = Block(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))), SlottedNorm(4))
    kept = reasons(same_after_warm_start(block), "kept")
    assert kept == {"norm": "SlottedNorm has slots, so its class cannot change"}
    block = Block(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))))
    block.a = AbstractConv(4, 4, 1)
    kept = reasons(same_after_warm_start(block), "kept")
    assert kept["a"] == "AbstractConv has slots, so its class cannot change"
    assert isinstance(block.norm, nn.BatchNorm2d)


class SealedConv(nn.Conv2d):
    sealed = False

    def __setattr__(self, name: str, value: Any) -> None:
        if self.sealed and name not in ("training", "weight", "bias"):
            raise AttributeError(f"{name} cannot be set")
        super().__setattr__(name, value)


def test_a_layer_that_takes_no_new_attributes_is_whitened_too() -> None:
    layer = SealedConv(3, 4, 1)
    layer.sealed = True
    convert_to_network_deconv(layer)
    assert isinstance(layer, WhitenedConv2d)


def test_dropout_of_a_norm_with_activation_stays() -> None:
    from timm.layers import BatchNormAct2d

    block = Block(lambda m, x: m.b(m.norm(m.a(x))), BatchNormAct2d(4, drop_layer=nn.Dropout2d))
    model, _ = convert_to_network_deconv(block)
    assert [type(m).__name__ for m in model.norm] == ["Dropout2d", "ReLU"]


def moody(forward: Callable) -> Callable:
    """The same wiring behind a branch on a value, which fx cannot trace."""
    return lambda m, x: forward(m, x) if x.sum() < 1e9 else x


@pytest.mark.parametrize(
    "wiring",
    [
        moody(lambda m, x: m.b(torch.relu(m.norm(m.a(x))))),
        moody(lambda m, x: m.a(torch.relu(m.b(m.norm(x))))),
        moody(lambda m, x: (lambda y: m.a(y) + m.norm(y))(m.b(x))),
    ],
)
def test_module_order_is_never_folded_on(wiring: Callable) -> None:
    """Registered as a, b, norm: a guess that is right, and two that are wrong, all keep the function."""
    report = same_after_warm_start(Block(wiring))
    assert "by module order" in reasons(report, "removed")["norm"]


def frozen_by_timm(stem: nn.Module) -> nn.Module:
    from timm.utils import freeze

    freeze(stem)
    return stem


def frozen_by_torchvision(stem: nn.Module) -> nn.Module:
    stem[1] = FrozenBatchNorm2d(8)
    return stem


def frozen_by_transformers(stem: nn.Module) -> nn.Module:
    stem[1] = type("DetrFrozenBatchNorm2d", (FrozenBatchNorm2d,), {})(8)
    return stem


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("freeze", [frozen_by_timm, frozen_by_torchvision, frozen_by_transformers])
def test_what_a_frozen_batch_norm_reads_is_kept(freeze: Callable, traced: bool) -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = freeze(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
            self.rest = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rest(self.stem(x if traced or x.sum() < 1e9 else -x))

    x = torch.randn(4, 3, 12, 12)
    model = Network().train()
    with torch.no_grad():
        model(x)
    want = model.stem(x)
    model, report = convert_to_network_deconv(model, warm_start=True)
    assert [layer.action for layer in report.layers] == ["kept", "swapped", "removed"]
    assert "FrozenBatchNorm" in report.layers[0].reason
    calibrate(model, [x])
    torch.testing.assert_close(model.train().stem(x)[:2], want[:2], rtol=0, atol=0)


def test_what_cannot_be_traced_may_take_a_sequential_apart() -> None:
    def taps(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen = []
        for layer in m.part:
            x = layer(x)
            seen.append(x)
        return torch.cat(seen)

    block = Block(moody(taps))
    block.part = nn.Sequential(block.a, block.norm, nn.Tanh(), block.b)
    report = same_after_warm_start(block)
    assert "by module order" in next(iter(reasons(report, "removed").values()))


def test_every_call_of_a_norm_counts() -> None:
    twice = Block(lambda m, x: torch.cat([m.norm(m.a(x)), m.norm(m.a(2 * x))]))
    assert pair(twice) == {"norm": "a"}  # a block called twice is still a pair
    same_after_warm_start(twice)
    both = Block(lambda m, x: m.norm(m.a(x)) + m.norm(m.b(x)))
    with pytest.raises(UserError, match="'norm' neither follows"):
        convert_to_network_deconv(both)
    assert type(both.a) is nn.Conv2d


def test_what_a_forward_leaves_in_the_network_is_not_the_tracers() -> None:
    def wiring(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if getattr(m, "grid", None) is None:
            m.grid = torch.arange(x.shape[-1]).to(x)
        m.seen.append(x)
        if m.training:
            m.steps.add_(1)
        return m.b(torch.relu(m.norm(m.a(x)))) + m.grid

    block = Block(wiring)
    block.seen, block.steps = [], nn.Buffer(torch.zeros(()))
    plain = fold_network_deconv(block.eval())
    block, _ = convert_to_network_deconv(block.train())
    assert (block.seen, getattr(block, "grid", None), block.steps.item()) == ([], None, 0)
    x = torch.randn(2, 4, 6, 6)
    assert plain(x).shape == block(x).shape


def test_what_hooks_keep_is_not_the_tracers() -> None:
    """timm's encoders with features of inner layers collect them so."""

    class Collecting(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1))
            self.seen: list[torch.Tensor] = []
            self[0].register_forward_hook(functools.partial(self.collect, "first"))

        def collect(self, name: str, module: nn.Module, args: Any, out: torch.Tensor) -> None:
            self.seen.append(out)

    model, _ = convert_to_network_deconv(Collecting())
    assert not model.seen
    fold_network_deconv(model)
    model(torch.randn(2, 3, 4, 4))
    assert len(model.seen) == 1


def test_only_what_holds_in_evaluation_is_folded() -> None:
    def embedding(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        z = m.b(torch.relu(m.norm(y)))
        return z if m.training else torch.cat([z, y])

    report = same_after_warm_start(Block(embedding))
    assert "by module order" in reasons(report, "removed")["norm"]


def test_networks_compute_and_are_converted_beside_a_conversion() -> None:
    """torch.fx replaces how modules are called, for all threads, while it traces."""
    served, x = NETWORKS["torchvision resnet18"]().eval(), torch.randn(1, 3, 32, 32)
    stop = threading.Event()
    reports, errors = [], []

    def serve() -> None:
        while not stop.is_set():
            try:
                served(x)
            except Exception as error:
                errors.append(error)

    def convert() -> None:
        reports.append(convert_to_network_deconv(NETWORKS["unet"]())[1])

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        server = threading.Thread(target=serve)
        converters = [threading.Thread(target=convert) for _ in range(3)]
        for thread in (server, *converters):
            thread.start()
        for thread in converters:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        stop.set()
        server.join()
    assert not errors
    assert len(reports) == 3
    assert reports[0] == reports[1] == reports[2]


@pytest.mark.parametrize("alias", [False, True])
def test_a_weight_that_the_forward_reads_itself_is_left_alone(alias: bool) -> None:
    def wiring(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.b(torch.relu(m.norm(m.a(x))))
        return nn.functional.conv_transpose2d(y, m.tied if alias else m.a.weight)

    tied = Block(wiring)
    tied.tied = tied.a.weight
    report = same_after_warm_start(tied)
    assert reasons(report, "kept")["a"] == "its weight is read by the forward pass itself"
    assert reasons(report, "swapped").keys() == {"b"}


def test_a_network_is_called_without_its_optional_inputs() -> None:
    class Net(Block):
        def forward(self, x: torch.Tensor, features: Any = None, both: bool = False) -> Any:
            y = self.norm(self.a(x)) if features is None else features
            return (self.b(y), y) if both else self.b(y)

    report = same_after_warm_start(Net(lambda m, x: x))
    assert (report.count("swapped"), report.count("removed"), report.untraced) == (2, 1, [])


def test_an_input_with_a_default_is_traced_all_the_same() -> None:
    """transformers' networks say that their pictures may be None, and refuse it."""

    class Net(Block):
        def forward(self, x: torch.Tensor | None = None, labels: torch.Tensor | None = None) -> Any:
            if x is None:
                raise ValueError("no input")
            return self.b(self.norm(self.a(x)))

    report = same_after_warm_start(Net(lambda m, x: x))
    assert (reasons(report, "removed"), report.untraced) == ({"norm": "followed a"}, [])


def test_containers_with_a_forward_are_networks() -> None:
    class Chain(nn.ModuleDict):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for module in self.values():
                x = module(x)
            return x

    chain = Chain({"norm": nn.BatchNorm2d(4), "a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 4, 1)})
    _, report = convert_to_network_deconv(chain)
    assert reasons(report, "removed") == {"norm": "fed a"}


def test_a_forward_of_the_instance_is_kept() -> None:
    block = Block(lambda m, x: m.b(torch.relu(m.norm(m.a(x)))))
    inner = block.a.forward
    block.a.forward = lambda x: 3 * inner(x)
    report = same_after_warm_start(block)
    assert reasons(report, "kept")["a"] == "Conv2d has a forward of its own"


def test_keyword_inputs() -> None:
    same_after_warm_start(Block(lambda m, x: m.b(input=m.norm(input=m.a(input=x)))))


def test_shapes_read_in_between_do_not_part_a_pair() -> None:
    def wiring(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return m.norm(y).reshape(y.shape[0], 4, -1)

    assert pair(Block(wiring)) == {"norm": "a"}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(5), nn.BatchNorm1d(6)])
def test_linear_then_norm_over_tokens_is_not_folded(norm: nn.BatchNorm1d) -> None:
    """(n, L, C) is normalised along L, whatever C is."""
    length = norm.num_features
    model = scramble_batch_norms(nn.Sequential(nn.Linear(4, 6), norm)).eval()
    x = torch.randn(3, length, 4)
    with torch.no_grad():
        torch.testing.assert_close(fold_network_deconv(model)(x), model(x), rtol=0, atol=1e-6)


def test_conversion_does_not_depend_on_the_mode() -> None:
    """googlenet runs its auxiliary heads in training only; they are converted all the same."""
    import torchvision

    def keys(training: bool) -> set[str]:
        model = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
        model, _ = convert_to_network_deconv(model.train(training), SMALL)
        assert model.training is training
        return set(model.state_dict())

    assert keys(True) == keys(False)


def test_functions_in_place_do_not_reach_past_a_removed_norm() -> None:
    model = Block(lambda m, x: x + m.a(torch.relu_(m.norm(x))))
    model, report = convert_to_network_deconv(nn.Sequential(nn.Conv2d(4, 4, 1), model))
    assert "overwritten" in reasons(report, "kept")["1.norm"]
    alone = Block(
        lambda m, x: m.b(torch.nn.functional.relu(m.norm(torch.cat([x[:, :2], x[:, 2:]], 1)), True))
    )
    _, report = convert_to_network_deconv(alone)
    assert reasons(report, "removed") == {"norm": "fed b"}


def test_shared_heads_without_a_trace() -> None:
    """Two untraceable heads share a convolution: its second name means the same layer."""
    shared = nn.Conv2d(4, 4, 1)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = shared, nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x)) if x.sum() < 1e9 else x

    with pytest.raises(UserError, match=r"'0\.norm', '1\.norm' neither follow .* control flow\), so"):
        convert_to_network_deconv(nn.ModuleList([Head(), Head()]))


def sliced(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(x)
    return x + m.a(torch.cat([torch.relu_(y[:, :2]), y[:, 2:]], 1))


@pytest.mark.parametrize(
    "wiring",
    [
        sliced,
        lambda m, x: x + m.a(F.relu(m.norm(x).permute(0, 1, 3, 2), inplace=True)),
        lambda m, x: x + m.a(torch.relu_(m.norm(x.flatten(2).view(x.shape)))),
        moody(lambda m, x: x + m.part(x)),
    ],
    ids=["slice", "permuted", "norm of a view", "input of the part that can be traced"],
)
def test_functions_in_place_do_not_reach_past_a_removed_norm_through_views(wiring: Callable) -> None:
    block = Block(wiring)
    block.part = Block(lambda m, x: m.a(torch.relu_(m.norm(x))))
    model, _ = convert_to_network_deconv(block)
    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    with torch.no_grad():
        model(x)
    assert torch.equal(x, before)


WRITTEN_OUT = {
    "x.mul_(x.sigmoid())": lambda x: x.mul_(x.sigmoid()),
    "sigmoid(x) * x": lambda x: torch.sigmoid(x) * x,
}


@pytest.mark.parametrize(
    "activation", ["gelu", "hardswish", "leaky_relu", "silu", "relu", "tanh", *WRITTEN_OUT]
)
def test_squeeze_and_excite_is_seen_whatever_its_activation(activation: str) -> None:
    function = (
        WRITTEN_OUT.get(activation)
        or getattr(torch.nn.functional, activation, None)
        or getattr(torch, activation)
    )

    def wiring(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.norm(x) * torch.sigmoid(m.b(function(m.a(x.mean((2, 3), keepdim=True)))))

    structure = read_structure(Block(wiring))
    assert structure.sees_1x1 == {"a", "b"}


def test_an_error_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4, track_running_stats=False),
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match="keeps no running values"):
        convert_to_network_deconv(model, warm_start=True)
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_computed_weights_are_kept() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1))
    _, report = convert_to_network_deconv(model)
    assert list(reasons(report, "kept")) == ["0"]


@pytest.mark.parametrize("warm_start", [True, False])
def test_computed_biases_are_kept(warm_start: bool) -> None:
    layers = (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model, x = scramble_batch_norms(nn.Sequential(*layers)).eval(), torch.randn(2, 4, 5, 5)
    torch.nn.utils.prune.l1_unstructured(model[2], "bias", 0.5)
    want = model(x)
    _, report = convert_to_network_deconv(model, warm_start=warm_start)
    assert reasons(report, "kept")["2"] == "its bias is computed, not a parameter"
    assert torch.allclose(model(x), want, rtol=0, atol=1e-6) == warm_start


@pytest.mark.parametrize("own_activation", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_in_place_activations_do_not_reach_past_a_removed_norm(own_activation: bool, training: bool) -> None:
    """x goes on unchanged beside a pre-activation block, as it did with batch norm in between."""
    from timm.layers import BatchNormAct2d

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if own_activation:
                self.norm, self.act = BatchNormAct2d(4, drop_layer=nn.Dropout2d), nn.Identity()
            else:
                self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.conv(self.act(self.norm(x)))

    model, _ = convert_to_network_deconv(PreActivation())
    x = torch.randn(2, 4, 5, 5)
    before = x.clone()
    model.train(training)(x)
    assert torch.equal(x, before)


def test_transposed_convolutions_and_1x1_maps_are_left_alone() -> None:
    model = NETWORKS["linknet"]()
    _, report = convert_to_network_deconv(model, SMALL)
    kept = reasons(report, "kept")
    assert sum(reason == "transposed convolution" for reason in kept.values()) == 5
    assert sum("which is kept: transposed convolution" in reason for reason in kept.values()) == 5
    _, report = convert_to_network_deconv(NETWORKS["deeplabv3plus"](), SMALL)
    assert "kept 1 x Conv2d: sees a 1x1 map" in report.summary()
    pooled = [name for name, reason in reasons(report, "kept").items() if reason.startswith("sees a 1x1 map")]
    assert pooled == ["decoder.aspp.0.convs.4.1"]
    _, report = convert_to_network_deconv(NETWORKS["unet se_resnet50"](), SMALL)
    assert all(".se_module." in name for name in reasons(report, "kept"))


@pytest.mark.parametrize("warm_start", [False, True])
def test_convolutions_of_other_dimensions_keep_their_norms(warm_start: bool) -> None:
    model = nn.Sequential(
        nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(2), nn.Flatten(),
        nn.Linear(32, 2),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 5, 6, 7)
    want = model(x)
    model, report = convert_to_network_deconv(model, warm_start=warm_start)
    kept = reasons(report, "kept")
    assert kept["0"] == "convolution of another dimension than two"
    assert kept["1"].startswith("follows 0, which is kept")
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(fold_network_deconv(model)(x), want)
    assert reasons(report, "swapped") == {"5": "whitens its input, 1 x 32 channels"}
    _, report = convert_to_network_deconv(nn.Sequential(nn.Linear(512, 3)))
    assert reasons(report, "swapped") == {"0": "whitens its input, 1 x 512 channels, held back by 0.50"}


class StochasticDepth(nn.Module):
    """Stochastic depth as people write it: a pass drops half of the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Any) -> Any:
        if self.training and torch.rand(1) < 0.5:
            return x
        y = self.bn(self.conv(x))
        return torch.relu(x + y * torch.sigmoid(self.gate(self.pool(y))))


class OnlyInEvaluation(StochasticDepth):
    def forward(self, x: Any) -> Any:
        return x if self.training else super().forward(x)


@pytest.mark.parametrize("seed", range(4))
def test_what_a_training_pass_leaves_out_is_read_in_evaluation(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), StochasticDepth(), StochasticDepth(), OnlyInEvaluation()
    )
    state = torch.get_rng_state()
    structure = read_structure(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert structure.norm_after == {"1": "0", "2.bn": "2.conv", "3.bn": "3.conv", "4.bn": "4.conv"}
    assert structure.sees_1x1 == {"2.gate", "3.gate", "4.gate"}
    _, report = convert_to_network_deconv(model)
    assert set(reasons(report, "kept")) == structure.sees_1x1


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_frozen_encoder_stays_frozen(warm_start: bool) -> None:
    """smp freezes by putting batch norms, and nothing else, in evaluation."""
    torch.manual_seed(0)
    network = smp.Unet(
        "resnet18", encoder_weights=None, classes=3, encoder_depth=3, decoder_channels=(32, 16, 8)
    )
    model = scramble_batch_norms(network).double()
    model.freeze_encoder()
    model.train()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    want = model.eval()(x)
    model.train()
    model, _ = convert_to_network_deconv(model, SMALL, warm_start=warm_start)
    if warm_start:
        calibrate(model, [torch.randn(2, 3, 32, 32, dtype=torch.float64)])
        torch.testing.assert_close(model.eval()(x), want, rtol=0, atol=1e-12)
    model.train()
    frozen = copy.deepcopy(model.encoder.state_dict())
    model(x).sum().backward()
    assert all(torch.equal(value, frozen[key]) for key, value in model.encoder.state_dict().items())
    folded = fold_network_deconv(model)
    assert not any(module.training for module in folded.modules())
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=0, atol=1e-12)


def test_a_network_in_evaluation_is_in_evaluation_after_conversion() -> None:
    model = scramble_batch_norms(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3))).eval()
    x = torch.randn(4, 3, 16, 16)
    want = model(x)
    for _ in range(2):
        model, _ = convert_to_network_deconv(model, warm_start=True)
        assert not any(module.training for module in model.modules())
        torch.testing.assert_close(model(x), want, rtol=0, atol=1e-6)


class Domains(nn.Module):
    """A batch norm a domain, behind one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.bn = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x: Any, domain: int = 0) -> Any:
        return self.head(torch.relu(self.bn[domain](self.conv(x))))


def test_one_of_several_norms_is_not_folded() -> None:
    model = scramble_batch_norms(Domains()).eval()
    x = torch.randn(2, 3, 16, 16)
    want = [model(x, domain) for domain in (0, 1)]
    folded = fold_network_deconv(model)
    converted, _ = convert_to_network_deconv(model, warm_start=True)
    for other in (folded, converted):
        for domain in (0, 1):
            torch.testing.assert_close(other(x, domain), want[domain], rtol=0, atol=1e-5)


def test_hooks_see_what_a_layer_puts_out() -> None:
    """Not what an activation in place makes of it, where the batch norm in between is gone."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), nn.Conv2d(8, 5, 1)
    )
    seen: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    model[0].register_full_backward_hook(lambda module, grad_in, grad_out: None)
    model, _ = convert_to_network_deconv(model)
    model(torch.randn(4, 3, 16, 16, requires_grad=True)).sum().backward()
    assert (seen[0] < 0).any()


class ReadsItsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.bn(self.conv(x)))) + self.bn.weight.sum()


def test_a_norm_whose_parameters_the_forward_reads_is_kept() -> None:
    model = scramble_batch_norms(ReadsItsNorm()).eval()
    x = torch.randn(2, 3, 8, 8)
    want = model(x)
    torch.testing.assert_close(fold_network_deconv(model)(x), want)
    model, report = convert_to_network_deconv(model, warm_start=True)
    assert reasons(report, "kept") == {"bn": "its parameters are read by the forward pass itself"}
    torch.testing.assert_close(model(x), want)


def test_the_report_says_what_is_whitened() -> None:
    model = nn.Sequential(nn.Conv2d(64, 64, 3, groups=64), nn.Conv2d(64, 8, 1), nn.Conv2d(8, 6, 3, groups=2))
    _, report = convert_to_network_deconv(model)
    assert list(reasons(report, "swapped").values()) == [
        "standardises its input: depthwise",
        "whitens its input, 2 x 32 channels",
        "whitens its input, 2 x 4 channels",
    ]


@pytest.mark.parametrize("norm", [1.0, 0.25])
def test_filters_that_lose_their_batch_norm_start_at_one_norm(norm: float) -> None:
    """So that depthwise, projecting and other filters have outputs of one scale; others stay as they are."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    first, last = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    first[1] = model[0].weight.data[1] = 0
    config = NetworkDeconvConfig() if norm == 1.0 else NetworkDeconvConfig(filter_norm=norm)
    twin, _ = convert_to_network_deconv(scramble_batch_norms(model), config)
    norms = first.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    want = torch.where(norms > 0, first / norms * norm, 0)
    torch.testing.assert_close(twin[0].weight, want, rtol=0, atol=1e-7)
    assert torch.equal(twin[2].weight, last)
    assert torch.equal(twin[0].bias, torch.zeros(4))


def test_filter_keeps_layer_and_its_batch_norm() -> None:
    _, report = convert_to_network_deconv(
        NETWORKS["unet"](), SMALL, filter=lambda module, name: not name.startswith("encoder.conv1")
    )
    assert reasons(report, "kept") == {
        "encoder.conv1": "the filter said no",
        "encoder.bn1": "follows encoder.conv1, which is kept: the filter said no",
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


@pytest.mark.parametrize("warm_start", [False, True])
def test_shared_weights_stay_shared(warm_start: bool) -> None:
    """So a wide linear layer is held back only where its weight is its own."""
    one, other, own = nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 2)
    other.weight = one.weight
    model, _ = convert_to_network_deconv(nn.Sequential(one, other, own), warm_start=warm_start)
    assert model[0].weight is model[1].weight
    assert [layer.gain.item() for layer in model] == pytest.approx([1, 1, 0.5**0.5])


def test_shared_modules_are_replaced_everywhere() -> None:
    conv = nn.Conv2d(4, 4, 1)
    model, _ = convert_to_network_deconv(nn.Sequential(conv, nn.ReLU(), conv))
    assert model[0] is model[2]
    assert isinstance(model[0], WhitenedConv2d)


def chained(conv: nn.Module, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return norm(conv(x))


class Pair(NamedTuple):
    conv: nn.Module
    norm: nn.Module


@pytest.mark.parametrize(
    "hold",
    [
        list,
        tuple,
        lambda layers: dict(enumerate(layers)),
        lambda x: Pair(*x),
        lambda x: [(x[0], {"norm": x[1]})],
        collections.deque,
        lambda x: types.SimpleNamespace(values=types.SimpleNamespace(conv=x[0], norm=x[1])),
        lambda x: functools.partial(chained, *x),
    ],
)
def test_layers_held_in_plain_objects_are_whitened_too(hold: Callable) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.steps = hold([self.conv, self.norm])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if callable(self.steps):
                return self.steps(x)
            steps = self.steps.values() if isinstance(self.steps, dict) else self.steps
            if isinstance(self.steps, list) and len(self.steps) == 1:
                steps = [self.steps[0][0], self.steps[0][1]["norm"]]
            if isinstance(self.steps, types.SimpleNamespace):
                steps = [self.steps.values.conv, self.steps.values.norm]
            for step in steps:
                x = step(x)
            return x

    model, _ = convert_to_network_deconv(Net())
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(model.eval()(x), model.conv(x))
    torch.testing.assert_close(fold_network_deconv(model)(x), model(x))
    assert isinstance(model.conv, WhitenedConv2d)


def test_layers_that_a_closure_holds_are_whitened_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv, norm = self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.run = lambda x: norm(conv(x))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.run(x)

    net = Net()
    x, weight = torch.randn(2, 3, 9, 9), net.conv.weight
    net(x)  # what a layer was called with before leaves nothing behind
    model, report = convert_to_network_deconv(net)
    assert model is net
    assert report.removed() == ["norm"]
    assert model.conv.weight is weight
    model(x).sum().backward()
    assert int(model.conv.num_batches_tracked) == 1
    assert torch.equal(model.eval()(x), model.conv(x))


def test_a_single_layer_becomes_whitened_itself() -> None:
    layer = nn.Conv2d(3, 4, 3)
    model, _ = convert_to_network_deconv(layer)
    assert model is layer
    assert isinstance(layer, WhitenedConv2d)
    torch.compile(model, backend="aot_eager")(torch.randn(2, 3, 9, 9))  # which looks the layer up
    assert int(layer.num_batches_tracked) == 1
    folded = fold_network_deconv(model)
    assert type(folded) is nn.Conv2d
    assert isinstance(model, WhitenedConv2d)


def test_hooks_stay_through_conversion_and_folding() -> None:
    calls: list[str] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    model[1].register_forward_hook(lambda *_: calls.append("after"), always_call=True)
    model, _ = convert_to_network_deconv(model)
    x = torch.randn(2, 3, 9, 9, requires_grad=True)
    model(x).sum().backward()
    fold_network_deconv(model)(x)
    assert calls == ["before", "after", "backward", "before", "after"]


def test_converting_twice_keeps_what_is_whitened() -> None:
    model, _ = convert_to_network_deconv(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), filter=lambda m, n: n == "0"
    )
    first = model[0]
    model, report = convert_to_network_deconv(model)
    assert model[0] is first
    assert reasons(report, "kept") == {"0": "whitened already"}
    assert isinstance(model[1], WhitenedLinear)


def test_a_batch_norm_that_feeds_what_is_never_whitened_is_kept() -> None:
    layers = nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2)
    model, report = convert_to_network_deconv(nn.Sequential(*layers))
    assert isinstance(model[2], nn.BatchNorm2d)
    assert {entry.name: entry.reason for entry in report.layers}["2"] == "feeds 4, which is kept"


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ((torch.zeros(1, 3, 8, 8), torch.zeros(1)), "a batch is tuple"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), r"a batch is \(1, 3, 8, 8\) torch.uint8"),
        (torch.zeros(0, 3, 8, 8), r"a batch is \(0, 3, 8, 8\)"),
    ],
)
def test_calibrate_says_what_a_batch_should_be(batch: Any, says: str) -> None:
    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(UserError, match=f"{says}.*; expected images"):
        calibrate(model, [batch])


def test_a_network_made_under_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"made or is converted under torch\.inference_mode"):
        convert_to_network_deconv(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "no batch"),
        ([torch.full((1, 3, 8, 8), math.nan)], "not finite"),
        ([torch.full((1, 3, 8, 8), 1e20)], "not finite"),  # their squares are not
        ([torch.zeros(1, 8, 8, 3)], r"0 got an input of shape \(1, 8, 8, 3\)"),
        ([torch.zeros(1, 3, 2, 8)], "0 got an input of .*no smaller than the kernel"),
    ],
)
def test_calibrate_refuses(batches: list, says: str) -> None:
    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(3, 4, 3)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=says):
        calibrate(model, batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="no whitened layer"):
        calibrate(nn.Sequential(nn.ReLU()), [torch.zeros(1)])


def test_calibrate_takes_single_images_if_there_are_several() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).eval()
    images = torch.randn(32, 3, 8, 8)
    before = model(images)
    model, _ = convert_to_network_deconv(model, warm_start=True)
    with pytest.raises(UserError, match="2 saw a single value per channel"):
        calibrate(model, [images[:1]])
    calibrate(model, images.split(1))
    torch.testing.assert_close(model(images), before, rtol=0, atol=1e-6)
    assert model.train()(images).std() > 0.5 * before.std()


@pytest.mark.parametrize("model", ["resnet18", None, nn.Conv2d])
def test_what_is_no_network_is_refused(model: Any) -> None:
    with pytest.raises(UserError, match=r"expected a torch\.nn\.Module"):
        convert_to_network_deconv(model)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_that_cannot_be_whitened_are_kept() -> None:
    narrow = nn.Conv2d(4, 4, 1).to(torch.float8_e4m3fn)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.utils.skip_init(nn.Linear, 0, 3), narrow)
    _, report = convert_to_network_deconv(model)
    reasons = {entry.name: entry.reason for entry in report.layers}
    assert reasons["2"] == "it has no weights"
    assert reasons["3"] == "its weight is torch.float8_e4m3fn"


def test_what_stands_where_a_batch_norm_was_is_in_its_mode() -> None:
    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval())
    assert not any(module.training for module in model.modules())


def tied(part: str, other: type[nn.Module]) -> Callable:
    def tie(model: nn.Sequential) -> None:
        model.append(other(4, 4, 1))
        setattr(model[1], part, getattr(model[0], part))

    return tie


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (tied("weight", nn.Conv2d), "0 shares its weight with another layer"),
        (tied("weight", nn.ConvTranspose2d), "0 shares its weight with another layer"),
        (tied("bias", WhitenedConv2d), "0 shares its bias with another layer"),
        (lambda model: nn.utils.parametrizations.weight_norm(model[0]), "the weight of 0 is computed"),
        (lambda model: setattr(model[0], "bias", None), "the bias of 0 is missing"),
    ],
)
def test_calibrate_refuses_what_it_cannot_rewrite(change: Callable, says: str) -> None:
    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(4, 4, 1)))
    change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=says):
        calibrate(model, [torch.randn(2, 4, 5, 5)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_calibrate_leaves_alone_what_it_does_not_see() -> None:
    """An auxiliary head runs in training only, and a hook may belong to what cannot be copied."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.main(x)
            return self.head(x) if self.training else x

    model, _ = convert_to_network_deconv(Net())
    for _ in range(3):
        model(torch.randn(2, 3, 9, 9) + 1)
    lock = threading.Lock()
    model.main.register_forward_hook(lambda *_, lock=lock: None)
    model.main.register_forward_hook(functools.partial(lambda lock, *_: None, lock))
    head = {name: value.clone() for name, value in model.head.state_dict().items()}
    main = model.main.running_moments.clone()
    calibrate(model, [torch.randn(2, 3, 9, 9)])
    assert not torch.equal(model.main.running_moments, main)
    for name, value in model.head.state_dict().items():
        assert torch.equal(value, head[name]), name


def test_calibration_computes_in_float32_under_autocast() -> None:
    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(3, 8, 3)), warm_start=True)
    images, rounded = [torch.rand(2, 3, 16, 16)], copy.deepcopy(model)
    calibrate(model, images)
    with torch.autocast("cpu", torch.bfloat16):
        calibrate(rounded, images)
    for key, value in model.state_dict().items():
        assert torch.equal(rounded.state_dict()[key], value), key


def test_calibrate_writes_all_or_nothing() -> None:
    class Explode(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float("inf")

    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(4, 4, 1), Explode(), nn.Conv2d(4, 4, 1)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="the statistics of 2 are not finite"):
        calibrate(model, [torch.randn(2, 4, 5, 5)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class _Asks(nn.Module):
    """What cannot be traced, around what can."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 1e9:
            x = x * 0
        for part in self.children():
            x = part(x)
        return x


class _OptionalSkip(nn.Module):
    """Its first norm alone reads the first layer, unless it is called without ``skip``, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.b2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        y = self.c1(x)
        if skip is None:
            skip = y
        return F.relu(self.b2(self.c2(F.relu(self.b1(y)))) + skip)


class _Simple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.b, self.h = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.h(F.relu(self.b(self.c(x))))


def _with_forward_of_its_own() -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.c(x)
        return torch.cat((y, self.b(y)), 1)

    model = _Simple()
    model.forward = types.MethodType(forward, model)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: _Asks(stem=nn.Conv2d(3, 8, 3), block=_OptionalSkip(), head=nn.Conv2d(8, 2, 1)),
        _with_forward_of_its_own,
        lambda: _Asks(
            conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)),
            bn=nn.BatchNorm2d(8),
            head=nn.Conv2d(8, 2, 1),
        ),
    ],
    ids=["called without its optional argument", "forward set on the instance", "layers with children"],
)
def test_what_tracing_does_not_prove_is_not_folded(make: Callable[[], nn.Module]) -> None:
    model = make().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 2)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(fold_network_deconv(model)(x), want, rtol=0, atol=1e-12)
        converted, report = convert_to_network_deconv(model, warm_start=True)
        assert report.count("swapped")
        torch.testing.assert_close(converted.eval()(x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "config", "says"),
    [
        (_Simple, {"mode": "exact"}, "expected a NetworkDeconvConfig"),
        (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 2, 1)), None, r"0\.weight has no shape yet"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d(affine=False)),
            None,
            r"1\.running_mean has no shape yet",
        ),
    ],
)
def test_what_cannot_be_converted_stays_as_it_is(make: Any, config: Any, says: str) -> None:
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items() if not is_lazy(value)}
    with pytest.raises(UserError, match=says):
        convert_to_network_deconv(model, config)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_inference_mode_is_refused() -> None:
    model = _Simple()
    with torch.inference_mode(), pytest.raises(UserError, match="inference_mode"):
        convert_to_network_deconv(model)


def test_calibrate_wants_batches() -> None:
    model, _ = convert_to_network_deconv(_Simple())
    with pytest.raises(UserError, match=r"expected batches of images, as in \[images\]"):
        calibrate(model, torch.randn(4, 3, 8, 8))


@pytest.mark.parametrize("warm_start", [False, True])
def test_what_is_not_trained_is_not_afterwards(warm_start: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(196, 3), nn.Linear(3, 2)
    )
    model.requires_grad_(False)[-1].requires_grad_(True)
    model, _ = convert_to_network_deconv(model, warm_start=warm_start)
    for network in (model, fold_network_deconv(model)):
        trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        assert trained == ["4.weight", "4.bias"]


def test_a_linear_layer_whose_batch_norm_goes_is_not_held_back() -> None:
    model = nn.Sequential(nn.Linear(512, 4), nn.BatchNorm1d(4))
    assert convert_to_network_deconv(model)[0][0].gain == 1


def test_layers_refresh_on_different_steps() -> None:
    model, _ = convert_to_network_deconv(nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3))))
    assert len({layer.refresh_offset for layer in model}) == 3


@pytest.mark.parametrize("norm", ["RmsNorm", "LayerNorm2d"])
def test_parts_with_a_norm_of_timms_are_kept(norm: str) -> None:
    part = nn.Sequential(nn.Linear(4, 4), getattr(timm.layers, norm)(4))
    with pytest.raises(UserError, match=f"normalised by {norm}"):
        convert_to_network_deconv(part)


def test_a_norm_that_stays_as_affine_is_of_its_networks_mode_and_type() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3)).double().eval()
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    want = model(x)
    model, _ = convert_to_network_deconv(model, warm_start=True)
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("warm_start", [False, True])
def test_memory_is_free_as_soon_as_a_network_is_gone(warm_start: bool) -> None:
    """Not only when Python collects cycles: on a GPU the next network may need it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    seen: list[weakref.ref[Any]] = [weakref.ref(held) for held in (*model, *model.parameters())]
    gc.collect()
    gc.disable()
    try:
        model, _ = convert_to_network_deconv(model, warm_start=warm_start)
        calibrate(model, [torch.randn(2, 3, 8, 8)])
        seen += [weakref.ref(held) for held in (*model, *model.parameters())]
        plain = fold_network_deconv(model)
        seen += [weakref.ref(held) for held in (*plain, *plain.parameters())]
        del model, plain
        assert not [there for reference in seen if (there := reference()) is not None]
    finally:
        gc.enable()
