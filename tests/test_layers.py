from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from reference import (
    authors_fold,
    patches_by_loops,
    shrunk_root_by_eigenvalues,
    whitened_conv,
    whitening_by_eigenvalues,
)
from timm.layers import Conv2dSame
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from segdeconv import compiling, layers
from segdeconv.config import NetworkDeconvConfig
from segdeconv.layers import Whitened, WhitenedConv2d, WhitenedLinear
from segdeconv.schedule import RefreshSchedule
from segdeconv.whitening import folding_matrix, inverse_sqrt, shrunk_inverse_sqrt

CONVS = {
    "3x3": dict(kernel_size=3, padding=1),
    "1x1": dict(kernel_size=1),
    "7x7 stride 2": dict(kernel_size=7, stride=2, padding=3),
    "non-square": dict(kernel_size=(1, 3), padding=(0, 1), stride=(2, 1)),
    "tall": dict(kernel_size=(3, 1), padding=(1, 0)),
    "valid": dict(kernel_size=3, padding="valid"),
    "same even": dict(kernel_size=(2, 4), padding="same"),
    "same dilated": dict(kernel_size=3, padding="same", dilation=2),
    "reflect": dict(kernel_size=3, padding=1, padding_mode="reflect"),
    "replicate": dict(kernel_size=5, padding=2, padding_mode="replicate"),
    "circular": dict(kernel_size=3, padding=(1, 2), padding_mode="circular"),
    "dilated": dict(kernel_size=3, padding=2, dilation=2),
    "groups": dict(kernel_size=3, padding=1, groups=2),
    "depthwise": dict(kernel_size=3, padding=1, groups=8),
    "no bias": dict(kernel_size=3, padding=1, bias=False),
}


def config(**changes: object) -> NetworkDeconvConfig:
    settings = {"mode": "exact", "block_size": 2, **changes}
    sampling = {} if settings["mode"] == "fast" else {"sampling_stride": 2}
    return NetworkDeconvConfig(**{**sampling, **settings})


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8], ids=str)
def test_an_input_of_another_type_spoils_nothing(mode: str, dtype: torch.dtype) -> None:
    layer = WhitenedConv2d(3, 8, 3, config=NetworkDeconvConfig(mode=mode))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=rf"an input of {dtype} for a layer of torch\.float32"):
        layer(torch.ones(4, 3, 16, 16).to(dtype))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_functional_calls_count_the_steps_of_the_state_they_are_given() -> None:
    layer = WhitenedConv2d(3, 8, 3)
    x = torch.randn(4, 3, 16, 16)
    states = [{name: value.clone() for name, value in layer.state_dict().items()} for _ in range(3)]
    for state in states:
        for _ in range(2):
            torch.func.functional_call(layer, state, (x,))
    for key, value in states[0].items():
        assert all(torch.equal(value, state[key]) for state in states[1:]), key
    assert states[0]["num_batches_tracked"] == 2
    layer(x)
    torch.testing.assert_close(layer.running_moments[0], x[:, :, :].mean((0, 2, 3)))


def assert_same_gradients(
    got: torch.Tensor, want: torch.Tensor, leaves: tuple[torch.Tensor, ...], of_largest: float, atol: float
) -> None:
    """Of a random sum of the outputs; they may differ by ``atol`` and this share of the largest element."""
    probe = torch.randn_like(got)
    grads, wanted = (torch.autograd.grad((out * probe).sum(), leaves) for out in (got, want))
    for grad, theirs in zip(grads, wanted, strict=True):
        allowed = of_largest * theirs.abs().max().item() + atol
        torch.testing.assert_close(grad, theirs, rtol=0, atol=allowed)


@pytest.mark.parametrize("name", CONVS)
def test_conv_against_reference(name: str) -> None:
    """Output and every gradient in training, against whitening the data by loops and eigenvalues."""
    options = CONVS[name]
    layer = WhitenedConv2d.from_conv(nn.Conv2d(8, 8, **options).double(), config())
    x = (torch.randn(2, 8, 9, 10, dtype=torch.float64) * 2 + 1).requires_grad_()
    same = torch.as_tensor(layer.dilation) * (torch.as_tensor(layer.kernel_size) - 1)
    py, px = (0, 0) if isinstance(layer.padding, str) else layer.padding
    lrtb = (px, px, py, py)
    if layer.padding == "same":
        lrtb = (same[1] // 2, same[1] - same[1] // 2, same[0] // 2, same[0] - same[0] // 2)
        lrtb = tuple(int(side) for side in lrtb)

    def reference(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return whitened_conv(
            x, weight, bias, stride=layer.stride, dilation=layer.dilation, lrtb=lrtb, mode=layer.padding_mode,
            groups=layer.groups, block=min(2, 8 // layer.groups), eps=1e-5, num_iters=5,
            sampling_stride=layer.sampling_stride(x),
        )  # fmt: skip

    got, want = layer(x), reference(layer.weight, layer.bias, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert_same_gradients(got, want, (layer.weight, layer.bias, x), 1e-9, 1e-12)


@pytest.mark.parametrize("name", CONVS)
def test_fast_conv_against_reference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output, every gradient and running values of a step, against whitening the standardised data itself.

    Every position is sampled, and the whitening matrix is that of the batch.
    """
    monkeypatch.setattr(layers, "_FEWEST_SAMPLES", 10**6)
    conv = nn.Conv2d(8, 8, **CONVS[name]).double()
    layer = WhitenedConv2d.from_conv(conv, config(mode="fast"))
    x = (
        torch.randn(2, 8, 9, 10, dtype=torch.float64) * torch.arange(1, 9)[:, None, None] + 1
    ).requires_grad_()
    kernel, groups, eps = layer.kernel_size, layer.groups, layer.config.eps
    block = min(2, 8 // groups)
    same = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
    py, px = (0, 0) if isinstance(layer.padding, str) else layer.padding
    lrtb = (px, px, py, py)
    if layer.padding == "same":
        lrtb = (same[1] // 2, same[1] - same[1] // 2, same[0] // 2, same[0] - same[0] // 2)

    def windows(x: torch.Tensor) -> torch.Tensor:
        """Standardised patches, (G, N, K, F): zeros of the padding are standardised as data are."""
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        padded = nn.functional.pad(x, lrtb, mode=mode)
        everywhere = nn.functional.pad(torch.ones_like(x), lrtb, mode=mode)
        certainty = 180 / (180 + 16)  # in the first batch the running values are its own, without gradient
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        # The variance is about the mean of the data, but over everything that windows read, padding included.
        inside = patches_by_loops(everywhere, kernel, layer.stride, layer.dilation, (0,) * 4, "zeros").mean()
        var = inside * var + (1 - inside) * mean.square()
        mean, var = (v.detach() + certainty * (v - v.detach()) for v in (mean, var))
        mean, scale = mean[:, None, None], (var + eps).rsqrt()[:, None, None]
        rows = patches_by_loops(
            (padded - mean) * scale, kernel, layer.stride, layer.dilation, (0,) * 4, "zeros"
        )
        return rows.view(len(rows), groups, 8 // groups // block, -1).movedim(1, 0)

    with torch.no_grad():
        rows = windows(x).flatten(1, 2)
        covs = torch.stack([group.T @ group / len(group) for group in rows])
        roots = torch.stack([shrunk_root_by_eigenvalues(cov, rows.shape[1]) for cov in covs])
        if groups == 8:  # depthwise layers standardise and no more
            roots = torch.eye(covs.shape[-1], dtype=covs.dtype).expand_as(covs)

    def reference(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        whitened = torch.einsum("gnkf,gfh->gnkh", windows(x), roots).flatten(2)
        out = (
            torch.einsum("gnc,goc->ngo", whitened, weight.reshape(groups, 8 // groups, -1)).flatten(1) + bias
        )
        return out.view(2, *got.shape[2:], 8).movedim(3, 1)

    got = layer(x)
    want = reference(layer.weight, layer.bias, x)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())  # the quintics' error
    assert layer.decorrelates is (groups < 8)
    if layer.decorrelates:
        torch.testing.assert_close(layer.running_cov, covs, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.running_whitening, roots, rtol=2e-5, atol=2e-5)
        roots = layer.running_whitening.clone()
    want = reference(layer.weight, layer.bias, x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert_same_gradients(got, want, (layer.weight, layer.bias, x), 1e-12, 1e-13)


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_folded_conv_is_the_layer_in_evaluation(name: str, mode: str, dtype: torch.dtype) -> None:
    layer = WhitenedConv2d.from_conv(nn.Conv2d(8, 8, **CONVS[name]), config(mode=mode)).to(dtype)
    for _ in range(3):
        layer(torch.randn(2, 8, 9, 10, dtype=dtype) * 3 - 1)
    layer.eval()
    x = torch.randn(3, 8, 12, 7, dtype=dtype) * 3 - 1
    plain = layer.to_conv()
    assert type(plain) is nn.Conv2d
    assert not plain.training
    assert torch.equal(plain(x), layer(x))


def test_exact_mode_cannot_do_without_whitening() -> None:
    layer = WhitenedConv2d(4, 4, 3, config=NetworkDeconvConfig(mode="exact"))
    with pytest.raises(ValueError, match="exact mode cannot do without whitening"):
        layer.decorrelate(False)
    assert layer.decorrelates


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("once", [True, False])
def test_loaded_state_says_whether_a_layer_decorrelates(once: bool, groups: int) -> None:
    """Weights from when depthwise layers whitened go on as they began, and new ones do in an old layer."""

    def depthwise(decorrelates: bool) -> WhitenedConv2d:
        layer = WhitenedConv2d(4, 4, 3, groups=groups)
        layer.decorrelate(decorrelates)
        return layer

    assert not WhitenedConv2d(4, 4, 3, groups=4).decorrelates
    assert WhitenedConv2d(74, 74, 3, groups=2).decorrelates  # 37 channels a group, one a block
    assert WhitenedConv2d(1, 4, 3).decorrelates  # grey pictures
    straight, stopped = depthwise(once), depthwise(once)
    stopped.load_state_dict(straight.state_dict())
    for step in range(6):
        x = torch.randn(2, 4, 9, 9)
        assert torch.equal(straight(x), stopped(x))
        if step == 2:
            resumed = depthwise(not once)
            resumed.load_state_dict(stopped.state_dict())
            stopped = resumed
    assert stopped.decorrelates is once
    assert (stopped.running_whitening is not None) is once
    for name, value in straight.state_dict().items():
        assert torch.equal(value, stopped.state_dict()[name]), name


@pytest.mark.parametrize(
    ("shape", "mode", "expected"),
    [
        ((8, 16, 96, 96), "exact", 3),  # 8192 positions a channel block, 1152 wanted
        ((8, 16, 48, 48), "exact", 3),  # 2048
        ((8, 16, 34, 34), "exact", 3),  # 12 x 12 x 8, just enough
        ((8, 16, 33, 33), "exact", 2),
        ((8, 16, 22, 22), "exact", 1),
        ((1, 16, 2, 2), "exact", 1),  # never enough
        ((1, 16, 2, 2), "reference", 3),
    ],
)
def test_small_maps_are_sampled_densely(shape: tuple, mode: str, expected: int) -> None:
    """At least eight samples for each of the 144 features, as far as there are positions."""
    layer = WhitenedConv2d(16, 4, 3, padding=1, config=NetworkDeconvConfig(mode=mode))
    assert layer.sampling_stride(torch.empty(shape)) == expected
    if shape[-1] < 40:
        _, _, rows = layer.moments(torch.randn(shape))
        positions = math.ceil(shape[-1] / expected) ** 2
        assert rows == shape[0] * positions


@pytest.mark.parametrize(("size", "expected"), [(25, 3), (24, 2)])
def test_blocks_share_their_samples(size: int, expected: int) -> None:
    exact = NetworkDeconvConfig(mode="exact", block_size=16)
    layer = WhitenedConv2d(32, 4, 3, padding=1, config=exact)
    assert layer.sampling_stride(torch.empty(8, 32, size, size)) == expected


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((8, 16, 40, 56), 10 * 18 * 8),  # 4 rows and 3 columns apart; 4 and 4 would be 1120
        ((8, 64, 40, 56), 10 * 18 * 8 * 2),  # two blocks of 288 features
        ((8, 1, 40, 56), 160),  # never fewer than 128
        ((8, 16, 20, 28), 10 * 28 * 8),
        ((8, 16, 12, 12), 12 * 12 * 8),
        ((2, 16, 1, 900), 1 * 900 * 2),
        ((2, 16, 1, 2304), 1 * 576 * 2),
        ((1, 16, 2, 2), 2 * 2 * 1),  # never enough
    ],
)
def test_a_refresh_samples_the_widest_grid_that_is_enough(shape: tuple, rows: int) -> None:
    """Eight patches for each feature, 144 of 16 channels, and less than twice as many."""
    layer = WhitenedConv2d(shape[1], 4, 3, padding=1)
    layer(torch.randn(shape))
    assert layer.cov_samples.item() == pytest.approx(rows, rel=1e-6)


def test_linear_against_conv() -> None:
    """A linear layer is a 1x1 convolution over positions, sampled everywhere."""
    linear = nn.Linear(12, 5).double()
    exact = NetworkDeconvConfig(mode="exact", block_size=4, linear_block_size=4, sampling_stride=1)
    layer = WhitenedLinear.from_linear(copy.deepcopy(linear), exact)
    conv = nn.Conv2d(12, 5, 1).double()
    conv.weight.data, conv.bias.data = linear.weight.data[..., None, None], linear.bias.data
    twin = WhitenedConv2d.from_conv(conv, exact)
    x = torch.randn(6, 7, 12, dtype=torch.float64)
    torch.testing.assert_close(
        layer(x), twin(x.movedim(2, 1)[..., None])[..., 0].movedim(1, 2), rtol=0, atol=1e-12
    )
    layer.eval()
    torch.testing.assert_close(layer.to_linear()(x), layer(x), rtol=0, atol=1e-12)


def test_parameters_are_reused() -> None:
    conv = nn.Conv2d(4, 6, 3, bias=False)
    layer = WhitenedConv2d.from_conv(conv)
    assert layer.weight is conv.weight
    assert torch.equal(layer.bias, torch.zeros(6))
    linear = nn.Linear(4, 6)
    swapped = WhitenedLinear.from_linear(linear)
    assert swapped.weight is linear.weight
    assert swapped.bias is linear.bias


def test_geometry_may_change_after_construction() -> None:
    layer = WhitenedConv2d(4, 6, 3, padding=1)
    layer.stride, layer.dilation, layer.padding = (2, 2), (2, 2), (2, 2)
    assert layer(torch.randn(2, 4, 16, 16)).shape == (2, 6, 8, 8)
    assert layer.eval().to_conv()(torch.randn(2, 4, 16, 16)).shape == (2, 6, 8, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_in_half_precision_keeps_float32_arithmetic(dtype: torch.dtype) -> None:
    layer = WhitenedConv2d(8, 4, 3, padding=1, dtype=dtype)
    assert layer.running_whitening.dtype == torch.float32
    x = torch.randn(2, 8, 9, 9, dtype=dtype)
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == dtype
    assert layer.weight.grad.isfinite().all()
    assert layer.eval().to_conv()(x).dtype == dtype


def test_unusual_inputs() -> None:
    layer = WhitenedConv2d(4, 6, 3, padding=1)
    assert layer(torch.randn(4, 9, 9)).shape == (6, 9, 9)  # an image without a batch
    assert layer(torch.randn(0, 4, 9, 9)).shape == (0, 6, 9, 9)
    layer.stride = 2  # a number, as on the torch layer
    assert layer(torch.randn(2, 4, 9, 9)).shape == (2, 6, 5, 5)
    assert WhitenedConv2d(4, 6, 3, device="meta")(torch.empty(2, 4, 9, 9, device="meta")).shape == (
        2,
        6,
        7,
        7,
    )
    assert WhitenedConv2d(4, 6, (1, 3), config=NetworkDeconvConfig(mode="reference"))(
        torch.randn(2, 4, 9, 9)
    ).shape == (2, 6, 9, 7)


AWKWARD = {
    "batch of one": torch.randn(1, 8, 6, 6),
    "1x1 map": torch.randn(4, 8, 1, 1),
    "one pixel": torch.randn(1, 8, 1, 1),
    "constant": torch.full((2, 8, 6, 6), 3.0),
    "zeros": torch.zeros(2, 8, 6, 6),
    "tiny": torch.randn(2, 8, 6, 6) * 1e-12,
    "huge": torch.randn(2, 8, 6, 6) * 1e8,
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_awkward_inputs_stay_finite(name: str, amp: torch.dtype | None) -> None:
    """Statistics are float32 whatever autocast says; 72 features see at most a few dozen samples here."""
    layer = WhitenedConv2d(8, 4, 3, padding=1)
    x = AWKWARD[name].clone().requires_grad_()
    with torch.autocast("cpu", dtype=amp, enabled=amp is not None):
        if amp is torch.float16 and name == "huge":
            pytest.skip("beyond float16 itself")
        out = layer(x)
    out.float().square().mean().backward()
    assert out.isfinite().all()
    assert layer.weight.grad.isfinite().all()
    assert x.grad.isfinite().all()
    assert layer.running_whitening.dtype == torch.float32
    assert layer.running_whitening.isfinite().all()
    with torch.no_grad():
        assert layer.eval()(x.detach()).isfinite().all()


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
def test_statistics_are_float32_under_autocast(mode: str) -> None:
    """The same running values as without autocast, to float32's precision on bf16 input."""
    plain = WhitenedConv2d(8, 4, 3, padding=1, config=config(mode=mode))
    mixed = copy.deepcopy(plain)
    x = torch.randn(4, 8, 12, 12).bfloat16()
    plain(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mixed(x).dtype == torch.bfloat16
    for name, value in plain.named_buffers():
        torch.testing.assert_close(mixed.get_buffer(name), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pays", [0, math.inf])
def test_bfloat16_autocast_is_near_float32(pays: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients of a step on maps whose every third row counts, in both memory layouts, with
    weights folded in bfloat16 and in float32.
    """
    monkeypatch.setattr(layers, "_LOW_PRECISION_PAYS", pays)
    x = torch.randn(4, 8, 40, 12) * torch.rand(8, 1, 1) + 2
    probe = torch.randn(4, 6, 40, 12)

    def step(amp: bool, layout: torch.memory_format) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = WhitenedConv2d(8, 6, 3, padding=1)
        leaf = x.clone(memory_format=layout).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = layer(leaf).float()
        return [out, *torch.autograd.grad((out * probe).sum(), (leaf, layer.weight, layer.bias))]

    wanted = step(False, torch.contiguous_format)
    for layout in (torch.channels_last, torch.contiguous_format):
        for got, want in zip(step(True, layout), wanted, strict=True):
            assert (got - want).norm() < 0.025 * want.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
def test_nan_never_enters_running_values(mode: str, bad: float) -> None:
    layer = WhitenedConv2d(4, 4, 3, config=NetworkDeconvConfig(mode=mode))
    layer(torch.randn(2, 4, 8, 8))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 4, 8, 8)
    x[0, 0, 0, 0] = bad
    layer(x)
    for key, value in layer.state_dict().items():
        if (mode, key) != ("fast", "num_batches_tracked"):  # the schedule counts every step
            assert torch.equal(value, before[key]), key


def test_layers_in_inference_mode_are_reset_to_train() -> None:
    layer = WhitenedConv2d(4, 2, 3)
    with torch.inference_mode():
        layer.reset_running_stats()
    layer(torch.randn(2, 4, 9, 9))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_of_one_stays_channels_last(compiled: bool) -> None:
    """With a stride that a view would have, torch's grouped convolution in float64 errs in its gradient."""
    layer = WhitenedConv2d(4, 6, 3, groups=2, dtype=torch.float64)
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    layer(x).sin().sum().backward()
    x = x.contiguous(memory_format=torch.channels_last)
    y = (torch.compile(other, backend="aot_eager") if compiled else other)(x)
    y.sin().sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(other.weight.grad, layer.weight.grad, rtol=1e-10, atol=1e-12)


def test_running_values_are_bias_corrected() -> None:
    """After t batches the running mean is the average with weights 0.9^(t-i), normalised."""
    layer = WhitenedLinear(6, 3, config=config())
    batches = [torch.randn(20, 6) + i for i in range(4)]
    for batch in batches:
        layer(batch)
    weights = torch.tensor([0.9**3, 0.9**2, 0.9, 1.0])
    expected = sum(w * b.mean(0) for w, b in zip(weights, batches, strict=True)) / weights.sum()
    torch.testing.assert_close(layer.running_mean[0, 0], expected, rtol=1e-6, atol=1e-6)
    roots = [layer.whitening_from(layer.moments(batch)[1]) for batch in batches]
    expected = sum(w * root for w, root in zip(weights, roots, strict=True)) / weights.sum()
    torch.testing.assert_close(layer.running_whitening, expected, rtol=1e-5, atol=1e-6)
    assert layer.num_batches_tracked.item() == 4


def test_evaluation_is_sensible_after_three_steps() -> None:
    layer = WhitenedConv2d(8, 8, 3, padding=1)
    data = torch.randn(64, 8, 12, 12) * torch.logspace(-1, 1, 8)[:, None, None] + 2
    for i in range(3):
        trained = layer(data[16 * i : 16 * i + 16])
    evaluated = layer.eval()(data[48:])
    assert 0.8 < (evaluated.std() / trained.std()).item() < 1.25
    assert evaluated.mean().abs().item() < 0.2 * trained.std().item()


def test_output_is_centred() -> None:
    """With every position sampled, the output's mean over a batch is the bias, exactly as with batch norm."""
    layer = WhitenedConv2d.from_conv(nn.Conv2d(16, 8, 3).double(), config(sampling_stride=1, block_size=4))
    out = layer(torch.randn(4, 16, 9, 9, dtype=torch.float64) * 5 + torch.arange(16.0)[:, None, None])
    torch.testing.assert_close(out.mean((0, 2, 3)), layer.bias, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_fast_mode_does_not_see_the_scale_of_its_input(training: bool) -> None:
    """Channels scaled and shifted, with the zeros that pad them: the same output, as behind a batch norm."""
    layer = WhitenedConv2d.from_conv(nn.Conv2d(8, 4, 3).double(), NetworkDeconvConfig(eps=1e-12))
    other = copy.deepcopy(layer)
    scale, shift = torch.logspace(-2, 2, 8, dtype=torch.float64)[:, None, None], torch.randn(8, 1, 1).double()
    for _ in range(3):
        x = torch.randn(4, 8, 12, 12, dtype=torch.float64)
        got, want = other(x * scale + shift), layer(x)
    if not training:
        got, want = other.eval()(x * scale + shift), layer.eval()(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7 * want.abs().max().item())


@pytest.mark.parametrize(
    ("offset", "refresh_every", "expected"),
    [
        (0, 10, [*range(40), *range(40, 60, 2), *range(60, 80, 3), 80, 84, 88]),
        (3, 10, [*range(40), *range(41, 60, 2), *range(60, 80, 3), 81, 85, 89]),
        (0, 2, [*range(40), *range(40, 90, 2)]),
        (0, 1, [*range(90)]),
    ],
)
def test_refresh_schedule(offset: int, refresh_every: int, expected: list[int]) -> None:
    """The steps between two refreshes grow by one every twenty, up to the setting; offsets move them."""
    layer = WhitenedConv2d(4, 4, 1, config=NetworkDeconvConfig(refresh_every=refresh_every))
    layer.refresh_offset = offset
    refreshed = []
    for step in range(90):
        before = layer.num_refreshes.item()
        layer(torch.randn(2, 4, 5, 5))
        if layer.num_refreshes.item() > before:
            refreshed.append(step)
    assert refreshed == expected


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_two_forward_passes_before_one_backward_pass(mode: str) -> None:
    """Layers shared in a network, losses summed over batches: each pass keeps its own statistics."""
    layer = WhitenedConv2d.from_conv(nn.Conv2d(4, 4, 3, padding=1).double(), config(mode=mode))
    one, other = torch.randn(2, 2, 4, 9, 9, dtype=torch.float64)
    alone = copy.deepcopy(layer)
    (alone(one).square().sum()).backward()
    apart = copy.deepcopy(layer)
    apart(one)
    (apart(other).square().sum()).backward()
    (layer(one).square().sum() + layer(other).square().sum()).backward()
    want = alone.weight.grad + apart.weight.grad
    torch.testing.assert_close(layer.weight.grad, want, rtol=0, atol=1e-12 * want.abs().max().item())


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_running_values_in_a_graph_outlast_the_next_step(kernel: int, mode: str) -> None:
    """A pass in evaluation, then one in training, then the backward pass of both, as batch norm allows."""
    layer = WhitenedConv2d(4, 4, kernel, config=config(mode=mode)).double()
    one, other = torch.randn(2, 2, 4, 9, 9, dtype=torch.float64)
    layer(other)
    want = torch.autograd.grad(layer.eval()(one).square().sum(), layer.weight)[0]
    loss = layer(one).square().sum()
    layer.train()(other)
    torch.testing.assert_close(torch.autograd.grad(loss, layer.weight)[0], want, rtol=0, atol=0)


def averaged(layer: WhitenedConv2d) -> WhitenedConv2d:
    """The layer as torch's averages of weights keep it, which write into buffers behind its back."""
    new = WhitenedConv2d(4, 4, 3)
    new(torch.randn(2, 4, 5, 5))
    average = AveragedModel(new.eval(), use_buffers=True)
    average.update_parameters(layer)
    return average.module.train()


def written_in_evaluation(layer: WhitenedConv2d) -> WhitenedConv2d:
    new = WhitenedConv2d(4, 4, 3)
    new(torch.randn(2, 4, 5, 5))
    return copied_into(new.eval(), layer).train()


def written_while_new(layer: WhitenedConv2d) -> WhitenedConv2d:
    return copied_into(WhitenedConv2d(4, 4, 3), layer)


@pytest.mark.parametrize("received", [averaged, written_while_new, written_in_evaluation])
def test_a_layer_goes_on_where_its_buffers_are(received: Callable) -> None:
    """Its schedule too, though its buffers were written by others: a second process, an average."""
    layer = WhitenedConv2d(4, 4, 3)
    for _ in range(100):
        layer(torch.randn(2, 4, 5, 5))
    other, x = received(copy.deepcopy(layer)), torch.randn(2, 4, 5, 5)
    assert layer.training
    layer(x)
    other(x)
    for name, value in layer.named_buffers():
        torch.testing.assert_close(other.get_buffer(name), value, msg=name)


def copied_into(new: WhitenedConv2d, layer: WhitenedConv2d) -> WhitenedConv2d:
    """As DistributedDataParallel sends rank 0's buffers to the other ranks, when it is constructed."""
    for name, value in layer.named_buffers():
        new.get_buffer(name).copy_(value)
    return new


def test_new_parameters_begin_with_new_running_values() -> None:
    """Constructed without memory, as large networks are."""
    layer = WhitenedConv2d(4, 4, 3, device="meta").to_empty(device="cpu")
    layer.reset_parameters()
    new = WhitenedConv2d(4, 4, 3)
    for name, value in new.named_buffers():
        assert torch.equal(layer.get_buffer(name), value), name
    assert layer(torch.randn(2, 4, 5, 5)).isfinite().all()


def test_replicas_of_data_parallel_are_refused() -> None:
    """What they measure is thrown away with them."""
    replica = WhitenedConv2d(4, 4, 3)._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_activation_checkpointing_changes_nothing(mode: str, reentrant: bool) -> None:
    """The forward pass that is repeated in the backward pass computes what the first did."""
    first = WhitenedConv2d(4, 4, 3, padding=1, config=config(mode=mode))
    plain = nn.Sequential(first, nn.ReLU(), WhitenedConv2d(4, 4, 3, config=config(mode=mode))).double()
    checkpointed = copy.deepcopy(plain)
    for _ in range(3):
        x = torch.randn(2, 4, 9, 9, dtype=torch.float64, requires_grad=True)
        plain(x).square().sum().backward()
        checkpoint(checkpointed, x, use_reentrant=reentrant).square().sum().backward()
    for mine, want in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, want.grad, rtol=0, atol=1e-12 * want.grad.abs().max().item())
    for name, value in plain.named_buffers():
        torch.testing.assert_close(checkpointed.get_buffer(name), value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_observed_batches_are_pooled(kind: str) -> None:
    """Moments of many small batches are those of one large one; a batch of one has no variance of its own."""
    if kind == "conv":
        layer, x = WhitenedConv2d(4, 2, 3, padding=1), torch.randn(6, 4, 5, 5) * 2 + torch.randn(6, 4, 1, 1)
    else:
        layer, x = WhitenedLinear(4, 2), torch.randn(6, 4) * 2 + 3
    layer, x = layer.double(), x.double()
    apart = copy.deepcopy(layer)
    layer.observe(x)
    for image in x.split(1):
        apart.observe(image)
    torch.testing.assert_close(apart.running_moments, layer.running_moments, rtol=1e-13, atol=1e-13)
    assert apart.running_cov.diagonal(dim1=1, dim2=2).mean() > 0.5


def test_observing_loses_no_small_variance() -> None:
    """A channel that is nearly constant far from zero, in float32; and maps of which most is padding."""
    layer, x = WhitenedLinear(2, 2), torch.randn(64, 2) * 0.01 + torch.tensor([300.0, 0.0])
    for batch in x.split(8):
        layer.observe(batch)
    want = x.double().var(0, correction=0).float()
    torch.testing.assert_close(layer.running_moments[1], want, rtol=2e-3, atol=0)
    dilated = WhitenedConv2d(2, 2, 3, padding=12, dilation=12)
    for size, mean in ((64, 5.0), (8, 0.0)):
        dilated.observe(torch.randn(1, 2, size, size) + mean)
    assert dilated.running_moments[1].min() > 1


def test_observing_in_inference_mode_leaves_a_layer_that_trains() -> None:
    layer = WhitenedConv2d(4, 2, 3)
    x = torch.randn(2, 4, 9, 9)
    with torch.inference_mode():
        layer.observe(x)
    layer(x).square().sum().backward()
    assert layer.weight.grad.norm() > 0
    layer.eval()(x).sum().backward()
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))


@pytest.mark.parametrize("mode", ["exact", "reference"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_a_single_row_has_no_covariance(mode: str, blocks: int) -> None:
    """But for blocks that share a mean: each of them has a row."""
    layer = WhitenedLinear(4, 2, config=config(mode=mode, linear_block_size=4 // blocks))
    for take in (layer, layer.observe):
        layer.reset_running_stats()
        take(torch.randn(1, 4))
        learned = not torch.equal(layer.running_whitening[0], torch.eye(4 // blocks))
        assert learned == (mode == "reference" and blocks == 2)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_network_made_narrow_keeps_its_running_values(mode: str) -> None:
    layer = WhitenedConv2d(8, 4, 3, padding=1, config=config(mode=mode))
    x = torch.randn(2, 8, 9, 9)
    layer(x)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    layer.bfloat16()
    for name, value in layer.named_buffers():
        assert torch.equal(value, before[name]), name
    layer(x.bfloat16()).float().sum().backward()
    assert layer.weight.grad.isfinite().all()
    assert layer.double().get_buffer("running_whitening").dtype == torch.float64


def test_an_input_that_does_not_fit_changes_nothing() -> None:
    conv, linear = WhitenedConv2d(4, 2, 3), WhitenedLinear(8, 4)
    for layer, shape in ((conv, (2, 1, 9, 9)), (conv, (2, 4, 2, 9)), (linear, (2, 16))):
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=r"an input of shape \(2, .* expected"):
            layer(torch.randn(shape))
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_float64_stays_float64_under_autocast() -> None:
    layer = WhitenedConv2d(4, 2, 3, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4, 9, 9, dtype=torch.float64)).dtype == torch.float64


def test_fast_mode_resumes_bit_for_bit() -> None:
    """The schedule, the sampling grid and every average go on from a state dict."""
    batches = [torch.randn(2, 4, 9, 9) for _ in range(30)]
    straight = WhitenedConv2d(4, 4, 3, padding=1)
    stopped = copy.deepcopy(straight)
    for batch in batches[:24]:
        straight(batch)
        stopped(batch)
    resumed = WhitenedConv2d(4, 4, 3, padding=1)
    resumed(batches[29])  # which what is loaded has to end
    resumed.load_state_dict(stopped.state_dict())
    for batch in batches[24:]:
        assert torch.equal(straight(batch), resumed(batch))
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_fast_mode_whitens_correlated_channels() -> None:
    """Outputs of orthonormal filters are nearly uncorrelated for inputs with a strong common part."""
    layer = WhitenedConv2d.from_conv(nn.Conv2d(8, 8, 1).double())
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.qr(torch.randn(8, 8))[0][..., None, None])
    mixed = torch.randn(1, 8, 1, 1, dtype=torch.float64) * 3
    for _ in range(30):
        x = torch.randn(4, 8, 24, 24, dtype=torch.float64)
        x = x + mixed * torch.randn(4, 1, 24, 24, dtype=torch.float64)
        out = layer(x)
    before = torch.corrcoef(x.movedim(1, 0).flatten(1)) - torch.eye(8)
    after = torch.corrcoef(out.movedim(1, 0).flatten(1)) - torch.eye(8)
    assert before.norm() > 4
    assert after.norm() < 0.2 * before.norm()


def test_few_samples_leave_little_whitening() -> None:
    """A single 2x3 map cannot estimate 64 features: the matrix stays near a multiple of the identity."""
    layer = WhitenedConv2d(32, 8, 1)
    layer(torch.randn(1, 32, 2, 3))
    values = torch.linalg.eigvalsh(layer.running_whitening[0])
    assert values.max() / values.min() < 1.25


# ---- the authors' layer, as the issue and the paper describe it, in loops (reference.authors_fold) ----


@pytest.mark.parametrize(("channels", "block", "groups"), [(8, 8, 1), (8, 4, 1), (12, 8, 1), (8, 64, 4)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_reference_mode_evaluates_the_authors_state(
    channels: int, block: int, groups: int, kernel: int
) -> None:
    layer = WhitenedConv2d(
        channels, 8, kernel, padding=kernel // 2, groups=groups,
        config=NetworkDeconvConfig(mode="reference", block_size=block),
    ).double()  # fmt: skip
    size = channels // groups if groups > 1 else {8: {8: 8, 4: 4}, 12: {8: 4}}[channels][block]
    features = kernel * kernel * size
    deconv = torch.randn(groups, features, features, dtype=torch.float64)
    mean = torch.randn(groups * features, dtype=torch.float64)
    layer.running_whitening.copy_(deconv)
    layer.running_mean.copy_(mean.view(groups, 1, features))
    theirs = deconv[0] if groups == 1 else deconv
    weight, bias = authors_fold(layer.weight.detach(), layer.bias.detach(), mean, theirs, size, groups)
    x = torch.randn(2, channels, 7, 7, dtype=torch.float64)
    expected = nn.functional.conv2d(x, weight, bias, padding=kernel // 2, groups=groups)
    torch.testing.assert_close(layer.eval()(x), expected, rtol=0, atol=1e-12)


def test_reference_mode_running_values() -> None:
    """They start at zero and identity and move by the momentum, without bias correction; one mean for all."""
    layer = WhitenedConv2d(8, 4, 3, config=NetworkDeconvConfig(mode="reference", block_size=4)).double()
    assert not layer.running_mean.any()
    assert torch.equal(layer.running_whitening[0], torch.eye(36, dtype=torch.float64))
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    layer(x)
    rows = nn.functional.unfold(x, 3, stride=3).transpose(1, 2).flatten(0, 1)
    patches = torch.cat([rows[:, k::2] for k in range(2)])
    torch.testing.assert_close(layer.running_mean[0, 0], 0.1 * patches.mean(0), rtol=0, atol=1e-14)
    whitening = whitening_by_eigenvalues(torch.cov(patches.T, correction=0), 1e-5, 5)
    expected = 0.9 * torch.eye(36, dtype=torch.float64) + 0.1 * whitening
    torch.testing.assert_close(layer.running_whitening[0], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
def test_reference_mode_samples_1x1_rows(stride: int) -> None:
    """1x1 layers take every ninth flattened row, or 36th, over image borders."""
    layer = WhitenedConv2d(4, 4, 1, stride, config=NetworkDeconvConfig(mode="reference")).double()
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    layer(x)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 4)[:: (3 * stride) ** 2]
    torch.testing.assert_close(layer.running_mean[0, 0], 0.1 * rows.mean(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize(("low_precision", "tolerance"), [(False, 1e-5), (True, 2e-2)])
@pytest.mark.parametrize(("kernel", "groups"), [(3, 1), (1, 1), (3, 4)])
def test_compiled_layers_are_one_graph_and_keep_their_own_running_values(
    kernel: int, groups: int, low_precision: bool, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies share their compiled code, and must not share what it updates."""
    monkeypatch.setattr(layers, "_LOW_PRECISION_PAYS", 0)
    torch._dynamo.reset()  # versions of other tests count
    first = WhitenedConv2d(4, 8, kernel, padding=kernel // 2, groups=groups)
    for layer in (first, copy.deepcopy(first)):
        eager = copy.deepcopy(layer)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for size in (8, 8, 11):
            x = torch.randn(3, 4, size, size, requires_grad=True)
            results = []
            for module, leaves in ((compiled, layer), (eager, eager)):
                with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
                    out = module(x)
                grads = torch.autograd.grad(out.square().sum(), (x, *leaves.parameters()))
                results.append((out, *grads))
            for mine, theirs in zip(*results, strict=True):
                atol = tolerance * theirs.abs().max().item()
                torch.testing.assert_close(mine, theirs, rtol=0, atol=atol)
        for mine, theirs in zip(layer.state_dict().values(), eager.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_schedule_makes_two_graphs(backend: str) -> None:
    """One that refreshes the whitening, one that does not; the same steps as without torch.compile."""
    eager = nn.Sequential(
        WhitenedConv2d(3, 8, 3, padding=1), nn.ReLU(), WhitenedConv2d(8, 4, 3, stride=2), nn.Flatten()
    )
    eager.append(WhitenedLinear(4 * 5 * 5, 3)).double()
    compiled = copy.deepcopy(eager)
    graphs: list[object] = []
    make = torch._dynamo.lookup_backend(backend)

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        with torch._inductor.config.patch(compile_threads=1):  # its pool of processes ends with other tests
            return make(graph, inputs)

    compiled.compile(backend=counting, fullgraph=True)
    counts = []
    networks = [(network, RefreshSchedule(network)) for network in (eager, compiled)]
    for step in range(50):
        x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
        outputs = []
        for network, refreshes in networks:
            refreshes.step()
            network.zero_grad()
            outputs.append(network(x))
            outputs[-1].sin().sum().backward()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= 0.01 * parameter.grad
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)
        counts.append(len(graphs))
        assert int(compiled[0].num_refreshes) == (step + 1 if step < 40 else 40 + (step - 38) // 2)
    for mine, theirs in zip(compiled.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    assert counts == [counts[0]] * 41 + [counts[0] + 1] * 9


def test_folding_matrices_follow_the_whitening(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps that read them compute what others do, whatever else happens to the layers."""
    torch._dynamo.reset()
    monkeypatch.setattr(layers, "_LOW_PRECISION_PAYS", 100)
    network = nn.Sequential(
        WhitenedConv2d(3, 4, 3, padding=1), WhitenedConv2d(4, 6, 3, groups=2), WhitenedConv2d(6, 2, 1)
    )
    networks = [network, copy.deepcopy(network)]
    compiled = [torch.compile(network, backend="aot_eager", fullgraph=True) for network in networks]
    schedules = [RefreshSchedule(networks[0], torch.bfloat16), RefreshSchedule(networks[1])]
    for step in range(45):
        if step == 20:
            for network in networks:
                network.eval().train()
        if step == 41:  # the matrix changes, and is not due to at the next step
            for network in networks:
                network[0].observe(torch.ones(2, 3, 8, 8))
        if step == 43:
            for network in networks:
                network[1].running_whitening.mul_(2)
        x, found = torch.randn(2, 3, 8, 8), []
        for network, forward, refreshes in zip(networks, compiled, schedules, strict=True):
            refreshes.step()
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = forward(x)
            out.float().square().sum().backward()
            found.append([out, *(parameter.grad.clone() for parameter in network.parameters())])
        assert all(map(torch.equal, *found)), step
        for layer in networks[0][:2]:
            want = folding_matrix(layer.running_whitening, 9, torch.bfloat16)
            assert torch.equal(layer._folding_matrix, want)
    assert [layer._folding_matrix is None for layer in (*networks[0], *networks[1])] == [False] * 2 + [
        True
    ] * 4
    assert copy.deepcopy(networks[0])[0]._folding_matrix is None


def test_a_schedule_computes_no_weights() -> None:
    """Spectral norm makes an iteration each time, and a resumed run would make more of them."""

    class Counting(nn.Module):
        calls = 0

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return weight * 1

    layer, counting = WhitenedConv2d(3, 4, 3), Counting()
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", counting)
    before = counting.calls
    RefreshSchedule(layer, torch.bfloat16).step()
    assert counting.calls == before
    layer(torch.randn(2, 3, 6, 6))
    assert counting.calls == before + 1


def test_a_scheduled_layer_moves_to_meta_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_LOW_PRECISION_PAYS", 0)
    layer = WhitenedConv2d(3, 4, 3)
    refreshes = RefreshSchedule(nn.Sequential(layer, WhitenedConv2d(4, 4, 3, groups=4)), torch.bfloat16)
    refreshes.step()
    assert layer._folding_matrix is not None
    layer.to("meta").to_empty(device="cpu").reset_parameters()
    assert layer.refresh_now is None
    refreshes.step()
    assert torch.equal(layer._folding_matrix[0], torch.eye(27)[:, _tap_major(3, 9)].bfloat16())


def _tap_major(channels: int, taps: int) -> list[int]:
    return [channel * taps + tap for tap in range(taps) for channel in range(channels)]


def test_inductor_fuses_snapshots() -> None:
    """A torch that cannot is forgiven, so this one has to say that it can."""
    compiling._fuse_snapshots()
    lowerings = torch._inductor.lowering.lowerings
    assert torch.ops.segdeconv.snapshot.default in lowerings


def test_copies_of_parametrized_layers_keep_their_own_running_values() -> None:
    """torch gives such layers a way of their own to be copied."""
    layer = WhitenedConv2d(3, 4, 3)
    nn.utils.parametrizations.weight_norm(layer)
    copied = copy.deepcopy(layer)
    compiled = torch.compile(copied, backend="aot_eager")
    for _ in range(3):
        compiled(torch.randn(4, 3, 6, 6))
    assert [int(each.num_batches_tracked) for each in (layer, copied)] == [0, 3]
    assert copied.parametrizations.weight is not layer.parametrizations.weight


@pytest.mark.parametrize(("mode", "smallest"), [("reflect", 3), ("circular", 2)])
def test_maps_too_small_for_their_padding_spoil_nothing(mode: str, smallest: int) -> None:
    layer = WhitenedConv2d(3, 4, 3, padding=2, padding_mode=mode)
    with pytest.raises(ValueError, match=f"too small for {mode} padding of 2 rows"):
        layer(torch.randn(2, 3, smallest - 1, 8))
    assert int(layer.num_batches_tracked) == 0
    assert layer(torch.randn(2, 3, smallest, smallest)).shape == (2, 4, smallest + 2, smallest + 2)


def test_compiled_code_is_shared_and_every_call_counts() -> None:
    """More many than torch.compile makes versions of one function, and calls that look superfluous."""
    torch._dynamo.reset()  # versions of other tests count
    many = [WhitenedConv2d(4, 6, 1) for _ in range(10)]
    x = torch.randn(3, 4, 8, 8)
    for layer in many:
        layer.compile(backend="aot_eager", fullgraph=True)
        layer(x)
    assert [int(layer.num_batches_tracked) for layer in many] == [1] * 10

    @torch.compile(backend="aot_eager", fullgraph=True)
    def thrice(x: torch.Tensor) -> torch.Tensor:
        many[0](x)
        return many[0](x) + many[0](x)

    thrice(x)
    assert many[0].num_batches_tracked == 4


def test_a_schedule_ends() -> None:
    """With evaluation, in copies, and with other state: layers then decide for themselves again."""
    layer = WhitenedConv2d(3, 4, 3)
    refreshes = RefreshSchedule(layer)
    for _ in range(42):
        assert refreshes.step() in ((True,), (False,))
        layer(torch.randn(2, 3, 6, 6))
    assert layer.refresh_now is False
    for ended in (copy.deepcopy(layer), copy.deepcopy(layer).eval().train()):
        assert ended.refresh_now is None
        before = int(ended.num_refreshes)
        for _ in range(4):
            ended(torch.randn(2, 3, 6, 6))
        assert int(ended.num_refreshes) == before + 2
    refreshes = RefreshSchedule(nn.Sequential(layer, nn.ReLU()))
    assert refreshes.steps == 42
    for end in (
        lambda: layer.eval().train(),
        lambda: layer.load_state_dict(layer.state_dict()),
        layer.reset_running_stats,
    ):
        refreshes.step()
        end()
        assert layer.refresh_now is None


def test_a_schedule_makes_all_matrices_of_a_size_together() -> None:
    """Each as its layer would, before the next step, and again in a copy that starts in between."""
    sizes = [(6, 4, 1, 1), (3, 4, 3, 1), (6, 4, 1, 2), (6, 8, 1, 1), (8, 8, 2, 4)]
    network = nn.ModuleList(WhitenedConv2d(c, o, k, groups=g) for c, o, k, g in sizes).double()
    network.append(WhitenedConv2d(4, 4, 3, groups=4).double())  # has nothing to refresh
    refreshes = RefreshSchedule(network)

    def step(network: nn.ModuleList, refreshes: RefreshSchedule, seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        refreshed = refreshes.step()[0]
        for layer in network:
            layer(torch.randn(2, layer.in_channels, 6, 7, dtype=torch.float64, generator=generator))
        return refreshed

    for seed in range(42):
        before = [copy.deepcopy(layer) for layer in network]
        refreshed = step(network, refreshes, seed)
        for layer, old in zip(network[:-1], before, strict=False):
            if seed:  # after every step so far, which is to change
                want = shrunk_inverse_sqrt(old.running_cov, old.cov_samples)
                torch.testing.assert_close(layer.running_whitening, want, rtol=0, atol=1e-13)
        assert refreshed is (seed <= 40)
    resumed = copy.deepcopy(network)
    refreshes_of_resumed = RefreshSchedule(resumed)
    for seed in range(50, 54):
        step(network, refreshes, seed)
        step(resumed, refreshes_of_resumed, seed)
    for mine, theirs in zip(resumed.buffers(), network.buffers(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("amp", [False, True])
def test_a_schedule_makes_no_matrix_where_nothing_was_measured(amp: bool) -> None:
    """Of layers that were not called or were reset; nor where a layer evaluates. In float32, as ever."""
    network = nn.ModuleList(WhitenedConv2d(6, 4, 1) for _ in range(4))
    refreshes = RefreshSchedule(network)
    called, left_out, reset, frozen = network
    x = torch.randn(2, 6, 8, 8)
    frozen.observe(x)
    frozen.eval()
    frozen.running_cov.mul_(0.5)  # as averaging would: not what its matrix is of
    kept = frozen.running_whitening.clone()
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            refreshes.step()
            for layer in (called, reset, frozen):
                layer(x)
        if step == 2:
            reset.reset_running_stats()
    assert torch.equal(left_out.running_whitening[0], torch.eye(6))
    assert torch.equal(frozen.running_whitening, kept)
    cov = called.running_cov.double()
    refreshes.step()
    want = shrunk_inverse_sqrt(cov, called.cov_samples)
    torch.testing.assert_close(called.running_whitening.double(), want, rtol=0, atol=2e-5)
    reset.reset_running_stats()
    refreshes.step()
    assert torch.equal(reset.running_whitening[0], torch.eye(6))


def test_observing_in_the_middle_of_a_schedule_refreshes() -> None:
    layer = WhitenedConv2d(6, 4, 1)
    RefreshSchedule(layer).step()
    layer.observe(torch.randn(2, 6, 8, 8))
    want = shrunk_inverse_sqrt(layer.running_cov, layer.cov_samples)
    assert torch.equal(layer.running_whitening, want)


def test_a_scheduled_layer_is_called_twice() -> None:
    """Before one backward pass, with a refresh in both calls."""
    layer = WhitenedConv2d(4, 4, 3, padding=1)
    layer.refresh_now = True
    layer(layer(torch.randn(2, 4, 6, 6))).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_a_single_row_before_more_of_them_in_a_scheduled_step() -> None:
    layer = WhitenedLinear(6, 3)
    RefreshSchedule(layer).step()
    x = torch.randn(8, 6)
    (layer(x[:1]).sum() + layer(x).sum()).backward()
    assert layer.weight.grad.isfinite().all()


def test_nothing_to_observe() -> None:
    layer = WhitenedLinear(6, 3)
    layer.observe(torch.zeros(0, 6))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(4, 10), (2, 1, 4, 9, 9), (2, 3, 9, 9), (2, 4, 1, 9)])
def test_an_input_that_does_not_fit_spoils_nothing(shape: tuple[int, ...]) -> None:
    layer = WhitenedConv2d(4, 4, 3)
    for take in (layer, layer.observe, lambda x: layer.patches(x, 10)):
        with pytest.raises(ValueError, match=r"for a \(3, 3\) convolution of 4 channels; expected"):
            take(torch.randn(shape))
    assert layer.num_batches_tracked == 0


def test_rows_that_do_not_fit_spoil_nothing() -> None:
    layer = WhitenedLinear(3, 4)
    for take in (layer, layer.observe):
        with pytest.raises(ValueError, match="for a linear layer of 3 features"):
            take(torch.randn(4, 6))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("layer", "other", "says"),
    [
        (WhitenedConv2d(3, 4, 1, bias=False), WhitenedConv2d(3, 4, 1), "without a bias"),
        (
            WhitenedConv2d(3, 4, 1),
            WhitenedConv2d(3, 4, 1, config=NetworkDeconvConfig(mode="exact")),
            "running_mean",
        ),
        (WhitenedConv2d(3, 4, 1), WhitenedConv2d(5, 4, 1), r"expected .*\(2, 3\)"),
    ],
)
def test_running_values_of_another_kind(layer: Whitened, other: Whitened, says: str) -> None:
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=says):
        layer.adopt_running_values(other)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("layer", [WhitenedConv2d(3, 4, 1), torch.nn.ConvTranspose2d(3, 4, 1)])
def test_what_is_no_plain_convolution(layer: torch.nn.Module) -> None:
    with pytest.raises(TypeError, match=r"Conv(Transpose)?2d cannot be whitened"):
        WhitenedConv2d.from_conv(layer)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_traces_a_layer() -> None:
    layer = WhitenedConv2d(4, 4, 3)
    layer(torch.randn(2, 4, 9, 9))
    layer.eval()
    x = torch.randn(2, 4, 9, 9)
    assert torch.equal(torch.jit.trace(layer, x)(x), layer(x))


def test_the_gain_of_a_wide_head_outlasts_deferred_initialisation() -> None:
    layer = WhitenedLinear(512, 3, device="meta")
    layer.hold_back(keep_function=False)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.gain == 0.5
    old = WhitenedLinear(512, 3).state_dict()
    del old["gain"]
    meta = WhitenedLinear(512, 3, device="meta")
    meta.load_state_dict(old, assign=True)
    assert meta.gain == 1


@pytest.mark.parametrize("keep_function", [True, False])
def test_a_wide_linear_layer_learns_no_faster_than_one_of_128(keep_function: bool) -> None:
    layer = WhitenedLinear(512, 3).double()
    plain = nn.Linear(512, 3).double()
    held = WhitenedLinear.from_linear(copy.deepcopy(plain))
    held.hold_back(keep_function)
    x = torch.randn(64, 512, dtype=torch.float64)
    for module in (layer, held):
        assert module.gain == (1 if module is layer else 0.5)
    held.hold_back(keep_function)  # once is enough
    if keep_function:
        torch.testing.assert_close(held.eval()(x), plain(x), rtol=0, atol=1e-14)
    held.train()
    free = copy.deepcopy(held)
    with torch.no_grad():
        free.gain.fill_(1)
        free.weight.mul_(0.5)
    steps = []
    for module in (held, free):
        module(x).square().sum().backward()
        steps.append(module.gain * module.weight.grad)
    torch.testing.assert_close(steps[0], steps[1] / 4, rtol=1e-12, atol=0)
    torch.testing.assert_close(held.eval()(x), held.to_linear()(x), rtol=0, atol=1e-12)


def test_state_from_before_wide_linear_layers_were_held_back() -> None:
    layer, old = WhitenedLinear(200, 3), WhitenedLinear(200, 3)
    layer.hold_back(keep_function=False)
    state = {name: value for name, value in old.state_dict().items() if name != "gain"}
    layer.load_state_dict(state)
    x = torch.randn(4, 200)
    assert torch.equal(layer.eval()(x), old.eval()(x))


def first_and_second_derivatives(layer: WhitenedConv2d) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    loss = layer(x).pow(3).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum() + loss, layer.weight)
    return first, second


@pytest.mark.parametrize("decorrelates", [True, False])
def test_second_derivatives_are_refused(decorrelates: bool) -> None:
    """torch.autograd.grad passes over torch's own `once_differentiable`: they would be zero."""
    layer = WhitenedConv2d(4, 4, 3).double()
    layer.decorrelate(decorrelates)
    with pytest.raises(RuntimeError, match=r"no second derivatives in fast mode; .*exact"):
        first_and_second_derivatives(layer)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.functional.jvp(
            layer, torch.randn(2, 4, 5, 5).double(), torch.ones(2, 4, 5, 5).double()
        )
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    again = copy.deepcopy(layer)
    (plain,) = torch.autograd.grad(again(x).pow(3).sum(), x)
    (first,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(first, plain, rtol=0, atol=0)


def test_exact_mode_has_second_derivatives() -> None:
    layer = WhitenedConv2d(4, 4, 3, config=NetworkDeconvConfig(mode="exact")).double()
    _, second = first_and_second_derivatives(layer)
    step = 1e-6 * torch.randn(layer.weight.shape, dtype=torch.float64)
    values = []
    x = torch.randn(
        2, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    for sign in (1, -1):
        moved = copy.deepcopy(layer)
        moved.weight.data += sign * step
        loss = moved(x).pow(3).sum()
        values.append(torch.autograd.grad(loss, x)[0].pow(2).sum() + loss)
    torch.testing.assert_close((second * step).sum(), (values[0] - values[1]) / 2, rtol=1e-5, atol=0)


def test_a_copy_of_a_layer_compiled_in_place_is_a_layer_of_its_own() -> None:
    layer = WhitenedConv2d(4, 4, 3)
    layer.compile(backend="eager")
    copied = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert not copied(torch.randn(2, 4, 5, 5)).any()
    assert (layer.num_batches_tracked, copied.num_batches_tracked) == (0, 1)


def test_running_values_stay_wide_where_state_is_assigned() -> None:
    layer = WhitenedConv2d(4, 4, 3)
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.running_moments.dtype == layer.running_whitening.dtype == torch.float32
    layer(torch.randn(2, 4, 5, 5).bfloat16()).sum().backward()


def test_a_backward_pass_inside_autocast_is_as_precise() -> None:
    grads = []
    for inside in (True, False):
        torch.manual_seed(0)
        layer, x = WhitenedConv2d(8, 8, 3), torch.randn(2, 8, 9, 9)
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            loss = layer(x).float().pow(2).sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_graph_for_training_is_not_exported() -> None:
    layer, x = WhitenedConv2d(4, 4, 3), torch.randn(2, 4, 5, 5)
    with pytest.raises(RuntimeError, match="exported or traced in evaluation or folded"):
        torch.export.export(layer, (x,))
    with pytest.raises(RuntimeError, match="exported or traced in evaluation or folded"):
        torch.jit.trace(layer, (x,))
    layer.eval()
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.5, 1.0])
@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
def test_the_settings_are_those_in_use(mode: str, momentum: float) -> None:
    """Not the defaults, which most tests have."""
    changes = {} if mode == "fast" else {"num_iters": 2, "sampling_stride": 1}
    settings = NetworkDeconvConfig(mode, eps=0.3, momentum=momentum, linear_block_size=2, **changes)
    layer = WhitenedLinear(4, 2, config=settings).double()
    assert layer.running_whitening.shape[-1] == 2
    found = []
    for _ in range(3):
        x = torch.randn(7, 4, dtype=torch.float64)
        layer(x)
        if mode == "fast":
            found.append(torch.stack((x.mean(0), x.var(0, correction=0))))
        else:
            found.append(inverse_sqrt(layer.moments(x)[1], 0.3, 2))
    weights = (1 - momentum) ** torch.arange(2, -1, -1).double()
    weights /= weights.sum()
    want = sum(weight * one for weight, one in zip(weights, found, strict=True))
    if mode == "reference":  # whose running values begin at the identity
        want = torch.eye(2, dtype=torch.float64)[None]
        for one in found:
            want = torch.lerp(want, one, momentum)
    got = layer.running_moments if mode == "fast" else layer.running_whitening
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    if mode == "fast":
        scale = (layer.running_moments[1] + 0.3).rsqrt().view(1, 2, 2)
        torch.testing.assert_close(layer.running_mean_and_scale()[1], scale, rtol=0, atol=1e-12)
        assert 14 / layer.cov_samples.item() == pytest.approx(weights.square().sum().item())


@pytest.mark.parametrize("how", ["alone", "scheduled", "observed"])
def test_the_grid_of_a_refresh_starts_everywhere(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same at the same step, whoever decides that it is one."""
    layer = WhitenedConv2d(16, 4, 3, padding=1)
    layer.refresh_offset = 0 if how == "observed" else 5
    starts: list[tuple[int, ...]] = []
    sample = layer._sample

    def spy(x: torch.Tensor, every: tuple[int, int], first: Any) -> torch.Tensor:
        assert every == (4, 3)
        starts.append(tuple(map(int, first)))
        return sample(x, every, first)

    monkeypatch.setattr(layer, "_sample", spy)
    refreshes = RefreshSchedule(layer)
    for _ in range(30):
        if how == "scheduled":
            refreshes.step()
        (layer.observe if how == "observed" else layer)(torch.randn(8, 16, 40, 56))
    assert set(starts) == set(itertools.product(range(4), range(3)))
    turn = layer.refresh_offset
    assert starts[:3] == [
        (int((turn + n) * 0.7548777 % 1 * 4), int((turn + n) * 0.5698403 % 1 * 3)) for n in range(3)
    ]


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_layer_measures_and_folds_as_one_in_float32(mode: str, dtype: torch.dtype) -> None:
    layer = WhitenedConv2d(8, 4, 3, padding=1, dtype=dtype, config=config(mode=mode))
    wide = copy.deepcopy(layer).float()
    x = torch.randn(2, 8, 9, 9).to(dtype) + 3
    for each, images in ((layer, x), (wide, x.float())):
        each(images)
    for name, value in wide.named_buffers():
        torch.testing.assert_close(layer.get_buffer(name), value, rtol=0, atol=1e-5)
    want = [value.to(dtype) for value in wide.eval().folded_parameters()]
    assert all(map(torch.equal, layer.eval().folded_parameters(), want))


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8], ids=str)
def test_what_autocast_leaves_alone_spoils_nothing(mode: str, dtype: torch.dtype) -> None:
    layer = WhitenedConv2d(3, 8, 3, config=NetworkDeconvConfig(mode=mode))
    before = copy.deepcopy(layer.state_dict())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match=rf"an input of {dtype} for a layer"),
    ):
        layer(torch.ones(4, 3, 16, 16).to(dtype))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_compiled_gradients_are_float32_under_autocast() -> None:
    """What autocast rounds is the convolution's; the product with the whitening matrix is not."""
    torch._dynamo.reset()
    layer, x, probe = WhitenedConv2d(4, 8, 3), torch.randn(3, 4, 8, 8), torch.randn(3, 8, 6, 6)
    grads = []
    for each in (layer, copy.deepcopy(layer)):
        forward = each if each is layer else torch.compile(each, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = forward(x)
        (out.float() * probe).sum().backward()
        grads.append(each.weight.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-5 * grads[0].abs().max().item())


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_float16_autocast_folds_in_float32(amp: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer than bfloat16, in which the weight may be folded too."""
    monkeypatch.setattr(layers, "_LOW_PRECISION_PAYS", 0)
    layer = WhitenedConv2d(8, 6, 3, padding=1)
    mixed = copy.deepcopy(layer)
    x = torch.randn(4, 8, 40, 12) * torch.rand(8, 1, 1) + 2
    with torch.autocast("cpu", amp):
        got = mixed(x).float()
    want = layer(x)
    assert (got - want).norm() < (0.025 if amp == torch.bfloat16 else 0.003) * want.norm()


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
def test_a_first_batch_that_is_not_finite_leaves_nothing(mode: str) -> None:
    layer, new = (WhitenedConv2d(5, 6, 3, config=config(mode=mode)) for _ in range(2))
    layer(torch.full((2, 5, 7, 7), math.nan))
    for name, value in new.named_buffers():
        if name != "num_batches_tracked":
            assert torch.equal(layer.get_buffer(name), value), name


@pytest.mark.parametrize("mode", ["fast", "exact", "reference"])
def test_a_single_row_is_whitened_by_the_running_values(mode: str) -> None:
    layer = WhitenedLinear(4, 2, config=config(mode=mode, linear_block_size=4))
    layer(torch.randn(9, 4))
    before, x = copy.deepcopy(layer.state_dict()), torch.randn(1, 4)
    assert torch.equal(layer(x), layer.eval()(x))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_running_correlation_is_the_average_of_batches_with_their_prior() -> None:
    layer = WhitenedLinear(3, 2).double()
    covs = []
    for n in range(4):
        x = torch.randn(5, 3, dtype=torch.float64) * (n + 1) + n
        layer(x)
        moments, trust = torch.stack((x.mean(0), x.var(0, correction=0))), 5 / (5 + 16)
        mean, var = torch.lerp(layer.running_moments, moments, trust)
        rows = (x - mean) / (var + 1e-5).sqrt()
        covs.append(rows.T @ rows / 5)
    weights = 0.9 ** torch.arange(3, -1, -1).double()
    weights /= weights.sum()
    want = sum(weight * cov for weight, cov in zip(weights, covs, strict=True))
    torch.testing.assert_close(layer.running_cov[0], want, rtol=0, atol=1e-12)
    assert layer.cov_samples.item() == pytest.approx(5 / weights.square().sum().item())


def test_observing_what_overflows_changes_nothing() -> None:
    layer = WhitenedLinear(4, 2)
    layer.observe(torch.randn(8, 4))
    before = copy.deepcopy(layer.state_dict())
    layer.observe(torch.full((8, 4), 1e30))
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key]) or key == "num_batches_tracked", key


def test_a_step_leaves_its_number() -> None:
    layer = WhitenedConv2d(4, 4, 3)
    layer(torch.randn(2, 4, 5, 5))
    assert layer._step == (layer.num_batches_tracked, 1)


@pytest.mark.parametrize("training", [True, False])
def test_a_whitened_layer_is_in_the_mode_of_the_plain_one(training: bool) -> None:
    assert WhitenedConv2d.from_conv(nn.Conv2d(3, 4, 3).train(training)).training is training
    assert WhitenedLinear.from_linear(nn.Linear(3, 4).train(training)).training is training


@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (3, (1, 2))])
def test_same_padding_by_the_size_of_the_input(kernel: int, stride: Any) -> None:

    conv = Conv2dSame(4, 6, kernel, stride).double()
    layer, x = WhitenedConv2d.from_conv(conv).eval(), torch.randn(2, 4, 8, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.to_conv()(x), conv(x), rtol=0, atol=1e-12)
    assert layer.train()(x).shape == conv(x).shape


def test_patches_begin_inside() -> None:
    assert WhitenedConv2d(4, 4, 3, padding=1).patches(torch.ones(1, 4, 40, 40), 100).all()
