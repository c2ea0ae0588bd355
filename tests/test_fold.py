from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import NETWORKS, images, logits, scramble_batch_norms
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import prune

from segdeconv.config import NetworkDeconvConfig
from segdeconv.convert import convert_to_network_deconv
from segdeconv.fold import fold_network_deconv
from segdeconv.layers import Whitened
from segdeconv.structure import read_structure

SMALL = NetworkDeconvConfig(block_size=4, linear_block_size=32)


@pytest.mark.parametrize(
    ("dtype", "of_layer", "of_whole"), [(torch.float32, 1e-6, 1e-5), (torch.float64, 1e-14, 1e-12)]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_folded_network_is_the_network_in_evaluation(
    name: str, dtype: torch.dtype, of_layer: float, of_whole: float
) -> None:
    """Every plain layer puts out what its whitened layer does on the same input, and so does the whole."""
    torch.manual_seed(1)
    model, _ = convert_to_network_deconv(scramble_batch_norms(NETWORKS[name]()), SMALL)
    model.to(dtype)
    with torch.no_grad():
        model(images(name, 4).to(dtype))
        folded = fold_network_deconv(model)
        model.eval()
        seen = {}

        def remember(layer_name: str):
            def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
                seen[layer_name] = args[0].clone(), out.clone()  # activations work in place

            return hook

        for layer_name, layer in model.named_modules():
            if isinstance(layer, Whitened):
                layer.register_forward_hook(remember(layer_name))
        x = images(name).to(dtype)
        whole = logits(model(x))
        assert not any(isinstance(m, Whitened) for m in folded.modules())
        assert not any("running_whitening" in key for key in folded.state_dict())
        assert len(seen) > 10
        for layer_name, (read, want) in seen.items():
            got = folded.get_submodule(layer_name)(read)
            assert type(folded.get_submodule(layer_name)).__name__ in ("Conv2d", "Linear", "Conv2dSame")
            scale = want.abs().max().item()
            torch.testing.assert_close(got, want, rtol=0, atol=of_layer * scale, msg=layer_name)
        torch.testing.assert_close(logits(folded(x)), whole, rtol=0, atol=of_whole * whole.abs().max().item())


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_norm_twin_folds_likewise(name: str) -> None:
    """In float64 the folded twin is the twin; batch norms stay only where no layer is before them."""
    model = scramble_batch_norms(NETWORKS[name]()).double()
    after = read_structure(model).norm_after
    folded = fold_network_deconv(model)
    model.eval()
    left = {n for n, m in folded.named_modules() if isinstance(m, _BatchNorm)}
    assert not left & set(after)
    x = images(name).double()
    with torch.no_grad():
        want, got = logits(model(x)), logits(folded(x))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11 * want.abs().max().item())


@pytest.mark.parametrize("name", ["unet", "deeplabv3plus", "torchvision resnet18"])
def test_folded_state_loads_into_the_stripped_architecture(name: str) -> None:
    """Plain layers, named as in the network with batch norm taken out."""
    model, report = convert_to_network_deconv(NETWORKS[name](), SMALL)
    stripped = NETWORKS[name]()
    for norm_name, layer_name in read_structure(stripped).norm_after.items():
        stripped.set_submodule(norm_name, nn.Identity())
        _give_bias(stripped.get_submodule(layer_name))
    for layer in report.layers:
        if layer.action == "swapped":
            _give_bias(stripped.get_submodule(layer.name))
    folded = fold_network_deconv(model)
    stripped.load_state_dict(folded.state_dict(), strict=True)
    x = images(name)
    with torch.no_grad():
        assert torch.equal(stripped.eval()(x), folded(x))


def _give_bias(layer: nn.Module) -> None:
    if layer.bias is None:
        layer.bias = nn.Parameter(torch.zeros(len(layer.weight)))


def test_the_original_is_untouched() -> None:
    model, _ = convert_to_network_deconv(NETWORKS["unet"](), SMALL)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fold_network_deconv(model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "place", ["after the layer", "after what is between", "before it", "before the norm"]
)
@pytest.mark.parametrize("step", ["fold", "warm start"])
def test_no_fold_across_a_hook_that_changes_what_is_between(place: str, step: str) -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    model = scramble_batch_norms(layers).eval()
    if place.startswith("after"):
        hooked = model[0] if place == "after the layer" else model[1]
        hooked.register_forward_hook(lambda module, args, out: out.clamp(-0.2, 0.2))
    else:
        hooked = model[2] if place == "before the norm" else model[1]
        hooked.register_forward_pre_hook(lambda module, args: (args[0].clamp(-0.2, 0.2),))
    x = torch.randn(2, 3, 9, 9)
    want = model(x)
    if step == "warm start":
        model, _ = convert_to_network_deconv(model, SMALL, warm_start=True)
    torch.testing.assert_close(fold_network_deconv(model)(x), want)


class ReLUConv3d(nn.Conv3d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # named as on the torch layer
        return super().forward(x).relu()


def test_what_a_training_step_left_in_the_network_does_not_hinder() -> None:
    model, _ = convert_to_network_deconv(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)).double()
    )
    prune.l1_unstructured(model[3], "weight", amount=0.5)
    model[2].register_forward_hook(lambda module, args, out: setattr(module, "seen", out))
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    model(x).sum().backward()
    folded = fold_network_deconv(model)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=0, atol=1e-12)


def test_no_fold_into_a_layer_with_a_forward_of_its_own() -> None:
    model = scramble_batch_norms(nn.Sequential(ReLUConv3d(2, 3, 2), nn.BatchNorm3d(3))).eval()
    x = torch.randn(2, 2, 4, 4, 4)
    assert torch.equal(fold_network_deconv(model)(x), model(x))


@pytest.mark.parametrize(
    "compute",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_weights_that_hooks_compute_are_folded(compute: Any) -> None:
    model, _ = convert_to_network_deconv(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)))
    compute(model[2])
    x = torch.randn(2, 3, 9, 9)
    with torch.no_grad():
        for _ in range(3):
            model(x)
        folded = fold_network_deconv(model)
        torch.testing.assert_close(folded(x), model.eval()(x))
    assert {type(layer) for layer in folded} == {nn.Conv2d, nn.ReLU}


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(4, 6, 3), lambda: nn.ConvTranspose2d(4, 6, 3, groups=2)])
@pytest.mark.parametrize("options", [{"eps": 0.5}, {"affine": False}, {"track_running_stats": False}])
def test_batch_norms_of_all_kinds_fold(make: Any, options: dict) -> None:
    norm = nn.BatchNorm2d(6, **options)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    model, x = nn.Sequential(make(), norm).eval(), torch.randn(2, 4, 7, 7)
    folded = fold_network_deconv(model)
    assert any(isinstance(module, nn.BatchNorm2d) for module in folded) is (norm.running_mean is None)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-5)


def test_no_norm_is_folded_into_a_computed_weight() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    nn.utils.spectral_norm(model[0])
    folded, x = fold_network_deconv(model), torch.randn(2, 3, 7, 7)
    assert isinstance(folded[1], nn.BatchNorm2d)
    torch.testing.assert_close(folded(x), model(x))


def test_a_norm_behind_a_computed_bias_stays() -> None:
    model = scramble_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    prune.l1_unstructured(model[0], "bias", 0.5)
    x = torch.randn(2, 3, 7, 7)
    folded = fold_network_deconv(model)
    torch.testing.assert_close(folded(x), model(x), rtol=0, atol=1e-6)
