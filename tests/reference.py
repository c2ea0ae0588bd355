"""Slow, obvious float64 references: loops and eigendecompositions instead of the package's fast paths."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor


def newton_schulz_scalar(a: Tensor, num_iters: int) -> Tensor:
    """The coupled iteration for numbers in (0, 1]: what it makes of each eigenvalue."""
    y, z = a, torch.ones_like(a)
    for _ in range(num_iters):
        t = (3 - z * y) / 2
        y, z = y * t, t * z
    return z


def whitening_by_eigenvalues(cov: Tensor, eps: float, num_iters: int | None) -> Tensor:
    """(Cov + eps I)^(-1/2) of one (F, F) matrix; with ``num_iters``, as far as that many iterations get."""
    values, vectors = torch.linalg.eigh(cov + eps * torch.eye(len(cov), dtype=cov.dtype))
    if num_iters is None:
        root = values.rsqrt()
    else:
        norm = values.square().sum().sqrt()
        root = newton_schulz_scalar(values / norm, num_iters) / norm.sqrt()
    return vectors @ torch.diag(root) @ vectors.T


def patches_by_loops(
    x: Tensor, kernel: tuple, stride: tuple, dilation: tuple, lrtb: tuple, mode: str
) -> Tensor:
    """Rows of (C, kh, kw) features of every ``stride``-th window, image by image, row by row."""
    left, right, top, bottom = lrtb
    x = F.pad(x, (left, right, top, bottom), mode="constant" if mode == "zeros" else mode)
    (kh, kw), (dy, dx) = kernel, dilation
    rows = []
    for image in x:
        height, width = image.shape[1:]
        for i, j in itertools.product(
            range(0, height - dy * (kh - 1), stride[0]), range(0, width - dx * (kw - 1), stride[1])
        ):
            window = image[:, i : i + dy * (kh - 1) + 1 : dy, j : j + dx * (kw - 1) + 1 : dx]
            rows.append(window.flatten())
    return torch.stack(rows)


def whitened_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: tuple,
    dilation: tuple,
    lrtb: tuple,
    mode: str,
    groups: int,
    block: int,
    eps: float,
    num_iters: int | None,
    sampling_stride: int,
) -> Tensor:
    """Network deconvolution in training on the data itself: centre and whiten every patch, then multiply."""
    kernel = tuple(weight.shape[2:])
    taps = kernel[0] * kernel[1]
    every = (sampling_stride * stride[0], sampling_stride * stride[1])
    sampled = patches_by_loops(x, kernel, every, dilation, lrtb, mode)
    full = patches_by_loops(x, kernel, stride, dilation, lrtb, mode)
    group_features = weight[0].numel()
    out_group = len(weight) // groups
    outputs = []
    for g in range(groups):
        part = slice(g * group_features, (g + 1) * group_features)
        blocks = list(
            zip(sampled[:, part].split(block * taps, 1), full[:, part].split(block * taps, 1), strict=True)
        )
        cov = sum((s - s.mean(0)).T @ (s - s.mean(0)) / len(s) for s, _ in blocks) / len(blocks)
        whitening = whitening_by_eigenvalues(cov, eps, num_iters)
        rows = weight[g * out_group : (g + 1) * out_group].flatten(1).split(block * taps, 1)
        outputs.append(sum((f - s.mean(0)) @ whitening @ w.T for (s, f), w in zip(blocks, rows, strict=True)))
    out = torch.cat(outputs, 1) + bias
    (kh, kw), (dy, dx) = kernel, dilation
    height = (x.shape[2] + lrtb[2] + lrtb[3] - dy * (kh - 1) - 1) // stride[0] + 1
    width = (x.shape[3] + lrtb[0] + lrtb[1] - dx * (kw - 1) - 1) // stride[1] + 1
    return out.view(len(x), height, width, -1).permute(0, 3, 1, 2)


def shrunk_root_by_eigenvalues(cov: Tensor, samples: float) -> Tensor:
    """The fast mode's whitening matrix of one (F, F) covariance."""
    features = len(cov)
    alpha = 4 * features / (4 * features + samples)
    identity = torch.eye(features, dtype=cov.dtype)
    shrunk = (1 - alpha) * cov + alpha * cov.trace() / features * identity
    values, vectors = torch.linalg.eigh(shrunk)
    ridge = 1.5**-10 * max(values.square().sum().sqrt().item(), 1.0)
    return vectors @ torch.diag((values + ridge).rsqrt()) @ vectors.T


def authors_fold(
    weight: Tensor, bias: Tensor, running_mean: Tensor, running_deconv: Tensor, block: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Folded weight and bias of one trained FastDeconv, one output channel and one feature at a time."""
    out_channels, channels, kh, kw = weight.shape
    features = kh * kw * block
    folded, shifted = torch.empty_like(weight), bias.clone()
    for o in range(out_channels):
        flat = weight[o].flatten()
        result = torch.empty_like(flat)
        if groups == 1:
            blocks = channels // block
            for k in range(blocks):
                index = torch.tensor([f * blocks + k for f in range(features)])
                result[index] = flat[index] @ running_deconv
                shifted[o] -= result[index] @ running_mean
        else:
            g = o // (out_channels // groups)
            result = flat @ running_deconv[g]
            shifted[o] -= result @ running_mean.view(groups, -1)[g]
        folded[o] = result.view(channels, kh, kw)
    return folded, shifted
