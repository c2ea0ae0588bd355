from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_train import tiny
from torch import Tensor, nn

from segdeconv.checkpoint import CheckpointInfo, create_run_folder, save_checkpoint
from segdeconv.config import NetworkDeconvConfig
from segdeconv.convert import calibrate, convert_to_network_deconv
from segdeconv.data import open_samples
from segdeconv.inspection import (
    _some_pictures,
    fit_dog,
    inspect_run,
    layer_filters,
    layer_views,
    picture_filters,
    sparsity,
    summary,
)
from segdeconv.layers import WhitenedConv2d, WhitenedLinear
from segdeconv.models import build_model

MODES = ("fast", "exact", "reference")


def blurred(count: int = 8) -> Tensor:
    """Noise with neighbours and channels that are alike, as in photographs."""
    kernel = torch.outer(torch.tensor([1.0, 4, 6, 4, 1]), torch.tensor([1.0, 4, 6, 4, 1])) / 256
    noise = torch.randn(count, 3, 48, 48)
    return F.conv2d(noise + noise.mean(1, keepdim=True), kernel.expand(3, 1, 5, 5), padding=2, groups=3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (8, 1), (8, 4)])
def test_whitened_patches_are_what_the_layer_computes_with(mode: str, channels: int, groups: int) -> None:
    config = NetworkDeconvConfig(mode=mode, block_size=4)
    layer = WhitenedConv2d(channels, 8, 3, stride=2, padding=1, groups=groups, config=config).double()
    x = torch.randn(3, channels, 11, 8, dtype=torch.float64).cumsum(3)
    layer(x)
    layer.eval()
    patches = layer.patches(x, at_least=10_000)
    assert patches.shape == (3 * 6 * 4, groups, layer.num_blocks, channels // groups // layer.num_blocks * 9)
    whitened = layer.whitened(patches)
    if layer.interleaved:
        whitened = whitened.transpose(2, 3)
    out = torch.einsum("ngp,gop->ngo", whitened.flatten(2), layer.weight.view(groups, 8 // groups, -1))
    want = layer(x).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(out.flatten(1) + layer.bias, want, rtol=0, atol=1e-12)
    assert len(layer.patches(x, at_least=20)) == 3 * 3 * 4


def test_whitened_rows_of_a_linear_layer() -> None:
    layer = WhitenedLinear(6, 4, config=NetworkDeconvConfig(linear_block_size=3)).double()
    x = torch.randn(5, 7, 6, dtype=torch.float64)
    layer(x)
    layer.eval()
    assert layer.patches(x, 10).shape[0] == 12  # every third
    out = layer.whitened(layer.patches(x, 35)).flatten(1) @ layer.weight.T + layer.bias
    torch.testing.assert_close(out.view(5, 7, 4), layer(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (torch.distributions.Normal(2.0, 3.0), (0.0797, 0.0, 1 - (2 / np.pi) ** 0.5)),
        (torch.distributions.Laplace(-1.0, 5.0), (1 - np.exp(-(2**0.5) / 10), 3.0, 1 - 0.5**0.5)),
        (torch.distributions.Uniform(0.0, 4.0), (0.1 / 3**0.5, -1.2, 1 - 0.75**0.5)),
    ],
    ids=["Gaussian", "Laplace", "uniform"],
)  # fmt: skip
def test_sparsity_of_known_distributions(
    distribution: torch.distributions.Distribution, expected: tuple
) -> None:
    near, kurtosis, hoyer = sparsity(distribution.sample((1, 300_000, 4)).double())
    assert near == pytest.approx(expected[0], abs=1e-3)
    assert kurtosis == pytest.approx(expected[1], abs=0.06)
    assert hoyer == pytest.approx(expected[2], abs=1e-3)


def test_sparsity_is_that_of_single_features() -> None:
    """Wide and narrow features together are not sparse, and those that do not vary do not count."""
    rows = torch.randn(1, 100_000, 4, dtype=torch.float64)
    want = sparsity(rows)
    mixed = torch.cat((rows * torch.tensor([0.01, 1, 5, 20]) + 3, torch.full_like(rows, 7)), 2)
    assert sparsity(mixed) == pytest.approx(want, rel=1e-9)
    assert np.isnan(sparsity(torch.full_like(rows, 7))).all()


def test_difference_of_gaussians_is_found() -> None:
    y, x = np.mgrid[-5:6, -5:6]
    gaussian = {s: np.exp(-(x**2 + y**2) / (2 * s * s)) for s in (0.8, 2.0)}
    fit = fit_dog(3 * gaussian[0.8] - 0.7 * gaussian[2.0])
    assert fit.r2 > 0.9999
    assert fit.surround_r2 > 0.9999
    np.testing.assert_allclose(fit.fitted, fit.taps, atol=0.02)
    assert fit.centre_surround
    assert not fit_dog(gaussian[2.0]).centre_surround
    assert fit_dog(np.sign(x).astype(float)).r2 < 1e-9  # an edge
    assert fit_dog(np.random.default_rng(0).normal(size=(11, 11))).r2 < 0.2


@pytest.mark.parametrize("mode", MODES)
def test_layer_filters_are_rows_of_the_whitening(mode: str) -> None:
    config = NetworkDeconvConfig(mode=mode)
    layer = WhitenedConv2d(3, 4, 3, config=config)
    images = blurred()
    for _ in range(3):
        layer(images)
    layer.eval()
    kernel = torch.from_numpy(np.stack(layer_filters(layer))).float()
    seen = F.conv2d(images, kernel).permute(0, 2, 3, 1).flatten(0, 2)
    middle = layer.whitened(layer.patches(images, 10**9))[:, 0, 0, [4, 13, 22]]  # up to the mean
    want = middle - middle.mean(0)
    torch.testing.assert_close(seen - seen.mean(0), want, rtol=0, atol=1e-4 * want.abs().max().item())


def test_blurred_pictures_have_centre_surround_filters() -> None:
    filters = picture_filters(blurred(16))
    assert [row.shape for row in filters] == [(3, 11, 11)] * 3
    fits = [fit_dog(row[c]) for c, row in enumerate(filters)]
    assert all(fit.centre_surround and fit.r2 > 0.9 for fit in fits)


def test_padding_is_not_looked_at() -> None:
    data = tiny("data.size=[45, 70]").data
    network: Any = SimpleNamespace(
        requires_divisible_input_shape=True, encoder=SimpleNamespace(output_stride=32)
    )
    whole = _some_pictures(nn.Identity(), data)
    assert whole.shape == (4, 3, 45, 70)
    torch.testing.assert_close(_some_pictures(network, data), whole[:, :, :32, :64], rtol=0, atol=0)
    network.encoder.output_stride = 64  # more than there is
    assert _some_pictures(network, data).shape == (4, 3, 64, 64)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(),
        nn.Linear(4 * 48 * 48, 2),
    )  # fmt: skip


def test_layer_views_of_both_twins() -> None:
    images = blurred()
    twin = small()
    model, _ = convert_to_network_deconv(small(), NetworkDeconvConfig(mode="exact", num_iters=15))
    calibrate(model, [images])
    nd, bn = (layer_views(m, images, NetworkDeconvConfig()) for m in (model, twin))
    assert [layer.name for layer in nd] == [layer.name for layer in bn] == ["0", "3", "5"]
    assert set(nd[0].condition) == {"raw", "standardised", "whitened"}
    assert set(bn[0].condition) == {"raw", "standardised"}
    first = nd[0]
    for view in ("raw", "standardised"):
        assert first.condition[view] == pytest.approx(bn[0].condition[view])
        assert first.condition[view] > 100
    assert first.features == 27
    assert first.condition["whitened"] < 3  # the statistics are those of the same pictures
    assert first.correlation["whitened"] < 0.05 < 0.3 < first.correlation["raw"]
    # Against eigenvalues of the covariance as numpy has it.
    patches = F.unfold(F.pad(images, (1, 1, 1, 1)), 3).transpose(1, 2).flatten(0, 1).double().numpy()
    values = np.linalg.eigvalsh(np.cov(patches.T, bias=True))
    assert first.condition["raw"] == pytest.approx(
        values[-1] / values[0], rel=0.2
    )  # of a part of the patches


def test_depthwise_layers_do_not_count_as_whitening_in_fast_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model, _ = convert_to_network_deconv(model)
    calibrate(model, [blurred()])
    depthwise, dense = layer_views(model, blurred(), NetworkDeconvConfig())
    assert (depthwise.whitens, dense.whitens) == (False, True)
    assert depthwise.correlation["whitened"] == pytest.approx(depthwise.correlation["standardised"], rel=1e-5)
    assert dense.correlation["whitened"] < 0.5 * dense.correlation["standardised"]


@pytest.mark.parametrize("norm", ["nd", "bn"])
def test_a_run(norm: str, tmp_path: Path) -> None:
    recipe = tiny(f"model.norm={norm}")
    samples = open_samples(recipe.data, "val")
    model, _ = build_model(recipe.model, len(samples.classes))
    run = tmp_path / "run"
    create_run_folder(run, recipe)
    info = CheckpointInfo(recipe, "segmentation", samples.classes, samples.palette, 1, {})
    save_checkpoint(run / "last.safetensors", model, info)

    report = inspect_run(run, tmp_path / "all")
    names = {path.name for path in (tmp_path / "all").iterdir()}
    assert names == {"inspect.json", "filters.png", "sparsity.png", "spectrum.png"}
    assert json.loads((tmp_path / "all" / "inspect.json").read_text()) == report
    assert report["pictures"] == 4
    assert len(report["filters"]) == (2 if norm == "nd" else 1)
    text = [part for part in summary(report) if isinstance(part, str)]
    assert any("batch norm whitens nothing" in line for line in text) == (norm == "bn")

    report = inspect_run(run, tmp_path / "one", filters=True, sparsity=False, spectrum=False)
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"inspect.json", "filters.png"}
    assert "layers" not in report


@pytest.mark.parametrize(
    ("keep", "change", "sets"),
    [
        ("encoder.model.conv_stem", "", 1),
        ("decoder*", "", 2),
        ("segmentation_head*", "model.network_deconv.block_size=1", 1),
    ],
)
def test_a_run_with_kept_layers(keep: str, change: str, sets: int, tmp_path: Path) -> None:
    """Layers that stayed plain have no whitened view; tables and pictures do without."""
    recipe = tiny(f"model.keep=[{keep!r}]", *filter(None, [change]))
    samples = open_samples(recipe.data, "val")
    model, _ = build_model(recipe.model, len(samples.classes))
    info = CheckpointInfo(recipe, "segmentation", samples.classes, samples.palette, 1, {})
    save_checkpoint(tmp_path / "last.safetensors", model, info)
    report = inspect_run(tmp_path, tmp_path / "out")
    assert {len(layer["condition"]) for layer in report["layers"]} == {2, 3}
    assert len(report["filters"]) == sets
    table = summary(report)[0]
    assert [column.header for column in table.columns] == ["", "raw", "standardised", "whitened"]
    first, median = (list(table.columns[-1].cells)[i : i + 5] for i in (1, 7))
    assert all(median)
    assert any(first) == (keep != "encoder.model.conv_stem")
