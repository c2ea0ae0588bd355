from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from reference import patches_by_loops, shrunk_root_by_eigenvalues, whitening_by_eigenvalues
from torch import Tensor
from torch.nn.functional import conv2d
from torch.overrides import TorchFunctionMode

from segdeconv.whitening import (
    RIDGE,
    channel_moments,
    channels_per_block,
    channels_per_block_reference,
    fold_whitening,
    from_blocks,
    inverse_sqrt,
    patch_moments,
    patches_at,
    sample_patches,
    shrunk_inverse_sqrt,
    standardise_and_fold,
    to_blocks,
    unfold_whitening,
)


def random_cov(features: int, condition: float) -> torch.Tensor:
    basis, _ = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), features, dtype=torch.float64)
    return basis @ torch.diag(values) @ basis.T


@pytest.mark.parametrize(
    ("channels", "size", "expected", "authors"),
    [(64, 64, 64, 64), (3, 64, 3, 3), (96, 64, 48, 32), (1376, 64, 43, 32), (67, 64, 1, 1), (128, 1, 1, 1)],
)
def test_block_sizes(channels: int, size: int, expected: int, authors: int) -> None:
    assert channels_per_block(channels, size) == expected
    assert channels_per_block_reference(channels, size) == authors


@pytest.mark.parametrize("interleaved", [False, True])
def test_blocks_round_trip(interleaved: bool) -> None:
    features = torch.arange(24).expand(2, 24)
    blocks = to_blocks(features, 4, interleaved)
    assert blocks.shape == (2, 4, 6)
    assert blocks[0, 1].tolist() == ([1, 5, 9, 13, 17, 21] if interleaved else [6, 7, 8, 9, 10, 11])
    assert torch.equal(from_blocks(blocks, interleaved), features)


@pytest.mark.parametrize(
    ("kernel", "stride", "dilation", "lrtb", "mode"),
    [
        ((3, 3), (3, 3), (1, 1), (1, 1, 1, 1), "zeros"),
        ((1, 1), (2, 3), (1, 1), (0, 0, 0, 0), "zeros"),
        ((2, 5), (1, 2), (2, 1), (2, 3, 0, 1), "reflect"),
        ((3, 1), (2, 2), (1, 3), (0, 0, 2, 1), "circular"),
        ((3, 3), (4, 4), (2, 2), (2, 2, 2, 2), "replicate"),
    ],
)
def test_sample_patches(kernel: tuple, stride: tuple, dilation: tuple, lrtb: tuple, mode: str) -> None:
    x = torch.randn(2, 3, 9, 11, dtype=torch.float64)
    got = sample_patches(x, kernel, dilation, lrtb, mode, stride)
    assert torch.equal(got, patches_by_loops(x, kernel, stride, dilation, lrtb, mode))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("kernel", "dilation", "lrtb", "mode"),
    [
        ((3, 3), (1, 1), (1, 1, 1, 1), "zeros"),
        ((1, 1), (1, 1), (0, 0, 0, 0), "zeros"),
        ((2, 5), (2, 1), (2, 3, 0, 1), "reflect"),
        ((3, 1), (1, 3), (0, 0, 2, 1), "circular"),
        ((3, 3), (2, 2), (2, 2, 2, 2), "replicate"),
    ],
)
def test_patches_at(kernel: tuple, dilation: tuple, lrtb: tuple, mode: str, channels_last: bool) -> None:
    x = torch.randn(2, 3, 9, 11)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    rows, columns = torch.tensor([0, 3, 6]), torch.tensor([0, 2, 4, 6])
    got = patches_at(x.bfloat16(), rows, columns, kernel, dilation, lrtb, mode)
    every = patches_by_loops(x.bfloat16().float(), kernel, (3, 2), dilation, lrtb, mode).unflatten(0, (2, -1))
    height = (9 + lrtb[2] + lrtb[3] - dilation[0] * (kernel[0] - 1) - 1) // 3 + 1
    assert torch.equal(got, every.unflatten(1, (height, -1))[:, :3, :4].flatten(0, 2))


@pytest.mark.parametrize("shared", [False, True])
def test_patch_moments(shared: bool) -> None:
    patches = torch.randn(2, 3, 50, 4, dtype=torch.float64) + torch.arange(3.0)[:, None, None]
    mean, cov = patch_moments(patches, shared)
    for g in range(2):
        rows = patches[g].flatten(0, 1) if shared else (patches[g] - patches[g].mean(1, True)).flatten(0, 1)
        torch.testing.assert_close(cov[g], torch.cov(rows.T, correction=0), rtol=0, atol=1e-14)
    expected = patches.mean((1, 2))[:, None] if shared else patches.mean(2)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("num_iters", "rtol"), [(1, 1e-12), (5, 1e-12), (15, 1e-9)])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1e4])
def test_newton_schulz_against_eigenvalues(num_iters: int, rtol: float, condition: float) -> None:
    """Value and gradient of the matrix iteration are those of the scalar iteration on each eigenvalue."""
    cov = (
        random_cov(12, condition) * 3 + 1e-3 * torch.diag(torch.rand(12, dtype=torch.float64))
    ).requires_grad_()
    probe = torch.randn(12, 12, dtype=torch.float64)
    probe = probe + probe.T  # eigh reads one triangle, so compare along symmetric directions
    got = inverse_sqrt(cov[None], 1e-5, num_iters)[0]
    want = whitening_by_eigenvalues(cov, 1e-5, num_iters)
    scale = want.abs().max().item()
    torch.testing.assert_close(got, want, rtol=0, atol=rtol * scale)
    (grad,) = torch.autograd.grad((got * probe).sum(), cov)
    (expected,) = torch.autograd.grad((want * probe).sum(), cov)
    symmetric, expected = grad + grad.T, expected + expected.T
    torch.testing.assert_close(symmetric, expected, rtol=0, atol=1e4 * rtol * expected.abs().max().item())


def test_newton_schulz_converges() -> None:
    """Enough iterations whiten fully; five do not, which is the published method."""
    cov = random_cov(20, 100.0)[None]
    converged = inverse_sqrt(cov, 1e-9, 20)[0]
    torch.testing.assert_close(converged, whitening_by_eigenvalues(cov[0], 1e-9, None), rtol=0, atol=1e-8)
    white = converged @ cov[0] @ converged
    torch.testing.assert_close(white, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-6)
    partly = inverse_sqrt(cov, 1e-9, 5)[0]
    assert torch.linalg.eigvalsh(partly @ cov[0] @ partly)[0] < 0.9


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("groups", "blocks"), [(1, 1), (1, 3), (2, 2)])
def test_fold_is_whitening_the_data(groups: int, blocks: int, interleaved: bool) -> None:
    """w' and b' on raw patches give what w gives on centred, whitened patches."""
    features = 8
    weight = torch.randn(groups * 5, blocks * features, dtype=torch.float64)
    bias = torch.randn(groups * 5, dtype=torch.float64)
    whitening = torch.stack([random_cov(features, 10.0) for _ in range(groups)])
    mean = torch.randn(groups, blocks, features, dtype=torch.float64)
    patches = torch.randn(30, groups, blocks * features, dtype=torch.float64)
    white = (to_blocks(patches, blocks, interleaved) - mean) @ whitening
    white = from_blocks(white, interleaved)
    expected = torch.einsum("ngf,gof->ngo", white, weight.view(groups, 5, -1)).flatten(1) + bias
    folded, shifted = fold_whitening(weight, bias, whitening, mean, blocks, interleaved)
    got = torch.einsum("ngf,gof->ngo", patches, folded.view(groups, 5, -1)).flatten(1) + shifted
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)

    back, bias_back = unfold_whitening(folded, shifted, whitening, mean, blocks, interleaved)
    torch.testing.assert_close(back, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(bias_back, bias, rtol=0, atol=1e-12)


def test_fold_covers_borders() -> None:
    """w'·μ is one constant per channel, also where the kernel reads zero padding."""
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    mean = torch.randn(1, 1, 18, dtype=torch.float64)
    identity = torch.eye(18, dtype=torch.float64)[None]
    zero = torch.zeros(3, dtype=torch.float64)
    folded, bias = fold_whitening(weight, zero, identity, mean, 1, False)
    got = conv2d(x, folded, bias, padding=1)
    patches = patches_by_loops(x, (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "zeros")
    want = ((patches - mean[0]) @ weight.flatten(1).T).T.view(1, 3, 5, 5)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize("features", [1, 9, 64, 288])
@pytest.mark.parametrize("samples", [5.0, 1e3, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shrunk_inverse_sqrt(features: int, samples: float, dtype: torch.dtype) -> None:
    """Against eigenvalues, on correlation matrices with a strong common part and a long tail."""
    data = torch.randn(3, 2 * features, features, dtype=torch.float64)
    data = data * torch.logspace(0, -3, 2 * features, dtype=torch.float64)[:, None] + data[:, :1]
    cov = data.transpose(1, 2) @ data
    spread = cov.diagonal(dim1=-2, dim2=-1).sqrt()
    cov = cov / spread[:, :, None] / spread[:, None]
    got = shrunk_inverse_sqrt(cov.to(dtype), torch.tensor(samples, dtype=dtype))
    assert got.dtype == dtype
    for mine, one in zip(got, cov, strict=True):
        want = shrunk_root_by_eigenvalues(one, samples)
        error = torch.linalg.matrix_norm(mine.double() - want, 2) / torch.linalg.matrix_norm(want, 2)
        assert error < 2.5e-5


def test_shrunk_inverse_sqrt_of_nothing_is_finite() -> None:
    got = shrunk_inverse_sqrt(torch.zeros(1, 9, 9), torch.tensor(1e9))
    torch.testing.assert_close(got[0], torch.eye(9) * RIDGE**-0.5, rtol=3e-5, atol=0)


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 6), (3, 4, 32, 5)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("zeros", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_channel_moments(shape: tuple, channels_last: bool, zeros: float, dtype: torch.dtype) -> None:
    """Values and gradient, through a layer that reads x as well, against plain float64 arithmetic."""
    x = (torch.randn(shape) * 3 + 5).to(dtype).requires_grad_()
    probe, a, b = torch.randn(shape).to(dtype), torch.randn(4).double() * 60, torch.randn(4).double() * 20
    y = x.contiguous(memory_format=torch.channels_last) if channels_last and x.ndim == 4 else x
    y, moments = channel_moments(y, zeros)
    wide = x.detach().double().requires_grad_()
    rows = wide[:, :, 1::3] if shape[2:] == (32, 5) else wide
    over = [axis for axis in range(x.ndim) if axis != 1]
    want_mean = rows.mean(over)
    want_var = (1 - zeros) * rows.var(over, correction=0) + zeros * want_mean**2
    close = torch.testing.assert_close
    exact = dtype == torch.float64
    assert moments.dtype == (torch.float64 if exact else torch.float32)
    want_moments = torch.stack((want_mean, want_var)).to(moments.dtype)
    close(moments, want_moments, rtol=1e-14 if exact else 1e-6, atol=0)
    weights = torch.stack((a, b))
    (got,) = torch.autograd.grad((y * 2 * probe).sum() + (moments * weights).sum(), x)
    (want,) = torch.autograd.grad(
        (wide * 2 * probe.double()).sum() + (want_mean * a).sum() + (want_var * b).sum(), wide
    )
    # Twice rounded to bfloat16: what is added, and the sum.
    close(got.double(), want, rtol=1e-13 if exact else 2**-8, atol=1e-13 if exact else 2**-8 * 20)


class Tf32(TorchFunctionMode):
    """Factors of matrix products rounded as GPUs do for TF32, to ten bits after the first."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.matmul:
            args = [(x.view(torch.int32) + 2**12 & -(2**13)).view(torch.float32) for x in args]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("features", [27, 144, 576])
def test_inverse_root_in_tf32(features: int, decay: float) -> None:
    """Of covariances with eigenvalues that fall as 1, i^-1 and i^-2: as good as bfloat16 can hold it."""
    samples, scales = 2000, torch.arange(1, features + 1).double() ** (-decay / 2)
    x = torch.randn(samples, features, dtype=torch.float64) * scales
    x = x @ torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
    x /= x.std(0)
    cov = (x.T @ x / samples)[None]
    want = shrunk_inverse_sqrt(cov, torch.tensor(1e5))
    with Tf32():
        got = shrunk_inverse_sqrt(cov.float(), torch.tensor(1e5))
    error = torch.linalg.matrix_norm(got.double() - want, 2) / torch.linalg.matrix_norm(want, 2)
    assert 2**-14 < error.item() < 2**-8


@pytest.mark.parametrize(
    ("low_precision", "compiling", "out"),
    [
        (None, False, None),
        (torch.bfloat16, False, None),
        (None, True, None),
        (torch.bfloat16, True, torch.bfloat16),
        (None, True, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("decorrelates", [True, False])
@pytest.mark.parametrize(("groups", "blocks", "block", "kernel"), [(1, 2, 3, 3), (2, 1, 2, 1), (3, 2, 1, 2)])
def test_standardise_and_fold(
    groups: int,
    blocks: int,
    block: int,
    kernel: int,
    decorrelates: bool,
    low_precision: torch.dtype | None,
    compiling: bool,
    out: torch.dtype | None,
) -> None:
    """Values and gradients against autograd through the definition; products may be rounded to bfloat16."""
    channels, features = groups * blocks * block, block * kernel**2
    leaves = [
        torch.randn(4 * groups, blocks * block, kernel, kernel).double(),
        torch.randn(4 * groups).double(),
        torch.stack((torch.randn(channels), torch.rand(channels) + 0.1)).double(),
    ]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    whitening = torch.randn(groups, features, features).double() if decorrelates else None
    with mock.patch.object(torch.compiler, "is_compiling", return_value=compiling):
        got = standardise_and_fold(*leaves, whitening, blocks, 1e-3, low_precision, out)
    assert got[0].dtype == (low_precision or out or torch.float64)
    assert got[1].dtype == (torch.float64 if compiling else low_precision or torch.float64)
    weight, bias, (mean, var) = leaves
    mean, scale = (
        value.view(groups, blocks, block).repeat_interleave(kernel**2, -1)
        for value in (mean, (var + 1e-3).rsqrt())
    )
    want = fold_whitening(weight, bias, whitening, mean, blocks, False, scale)
    probes = [torch.randn_like(value) for value in got]
    for mine, reference in zip(
        (
            *got,
            *torch.autograd.grad(got, leaves, [p.to(g, copy=True) for p, g in zip(probes, got, strict=True)]),
        ),
        (*want, *torch.autograd.grad(want, leaves, probes)),
        strict=True,
    ):
        error = 2**-6 if low_precision or out else 1e-13
        torch.testing.assert_close(
            mine.double(), reference, rtol=0, atol=error * reference.abs().max().item()
        )
