"""Whitening of convolution inputs: pure functions on tensors.

Network Deconvolution, Ye et al., ICLR 2020 (arXiv 1905.11926): for the im2col patches X of what a layer
reads, with mean μ and covariance Cov (section 3.2, eq. 2), the whitening matrix D = (Cov + εI)^(-1/2) is
never applied to the data. X D w = X (D w), so the layer runs with w' = D w and b' = b - w'·μ
(section 3.3). The inverse root is approximated by coupled Newton-Schulz iterations (section 3.1).

This file holds no state and knows no modules; running averages live in layers.py.

Shape suffixes
    N  sampled patches (image x position)       O  output channels of one group
    G  groups, each with its own matrix         K  blocks of channels in a group; they share the matrix
    F  features of one block, taps x channels   C  input channels,  H, W  height and width
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def channels_per_block(channels: int, block_size: int) -> int:
    """The largest divisor of ``channels`` that is not above ``block_size``."""
    return next(size for size in range(min(channels, block_size), 0, -1) if channels % size == 0)


def channels_per_block_reference(channels: int, block_size: int) -> int:
    """The block size of the authors' code: ``block_size`` capped at ``channels``, else their gcd."""
    return channels if block_size > channels else math.gcd(block_size, channels)


def to_blocks(features: Tensor, blocks: int, interleaved: bool) -> Tensor:
    """Split the last axis of (..., K·F) features, channel-major as `unfold` and conv weights lay them out.

    Whole channels stay together in a block, or, ``interleaved`` as in the authors' code, feature ``f`` of
    block ``k`` is the original feature ``f·K + k``.

    Returns (..., K, F).
    """
    if interleaved:
        return features.unflatten(-1, (-1, blocks)).transpose(-1, -2)
    return features.unflatten(-1, (blocks, -1))


def from_blocks(features_KF: Tensor, interleaved: bool) -> Tensor:
    """Undo `to_blocks`: (..., K, F) to (..., K·F)."""
    return (features_KF.transpose(-1, -2) if interleaved else features_KF).flatten(-2)


def sample_patches(
    x_NCHW: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    padding_lrtb: tuple[int, int, int, int],
    padding_mode: str,
    stride: tuple[int, int],
) -> Tensor:
    """The im2col patches of an image batch at every ``stride``-th position, as rows.

    Args:
        padding_lrtb: pixels added left, right, top and bottom, in ``padding_mode`` ('zeros', 'reflect',
            'replicate' or 'circular').

    Returns:
        (N, C·kh·kw), features channel-major, in float32 or wider.
    """
    x_NCHW = x_NCHW.to(torch.promote_types(x_NCHW.dtype, torch.float32))
    if any(padding_lrtb):
        x_NCHW = F.pad(x_NCHW, padding_lrtb, mode="constant" if padding_mode == "zeros" else padding_mode)
    patches = F.unfold(x_NCHW, kernel_size, dilation=dilation, stride=stride)
    return patches.transpose(1, 2).flatten(0, 1)


def patch_moments(patches_GKNF: Tensor, shared_mean: bool) -> tuple[Tensor, Tensor]:
    """Mean and biased covariance of patches; the covariance is averaged over the K blocks of a group.

    Args:
        shared_mean: one mean for all blocks of a group (the authors' code) instead of one for each.

    Returns:
        ``mean_GKF`` (K is 1 with a shared mean) and ``cov_GFF``.
    """
    mean = patches_GKNF.mean(dim=(1, 2) if shared_mean else 2, keepdim=True)
    centred = (patches_GKNF - mean).flatten(1, 2)
    cov_GFF = centred.transpose(1, 2) @ centred / centred.shape[1]
    return mean.squeeze(2), cov_GFF


def inverse_sqrt(cov_GFF: Tensor, eps: float, num_iters: int) -> Tensor:
    """D = (Cov + εI)^(-1/2) by coupled Newton-Schulz iterations (section 3.1, algorithm 1).

    With A = (Cov + εI) / ||Cov + εI||_F, Y_0 = A and Z_0 = I, each step is T = (3I - ZY) / 2, Y = YT,
    Z = TZ; Z converges to A^(-1/2). Five steps do not converge for eigenvalues below about 2% of the norm,
    and are the published method: they leave weak directions only partly whitened.

    Returns:
        ``whitening_GFF``, symmetric up to rounding.
    """
    identity = torch.eye(cov_GFF.shape[-1], dtype=cov_GFF.dtype, device=cov_GFF.device)
    ridged = cov_GFF + eps * identity
    norm = torch.linalg.matrix_norm(ridged, keepdim=True)
    y = ridged / norm
    z = identity.expand_as(y)
    for _ in range(num_iters):
        t = 1.5 * identity - 0.5 * (z @ y)
        y = y @ t
        z = t @ z
    return z / norm.sqrt()


def fold_whitening(
    weight: Tensor,
    bias: Tensor,
    whitening_GFF: Tensor,
    mean_GKF: Tensor,
    blocks: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The plain layer's parameters: w' = w D in every block and b' = b - w'·μ (section 3.3).

    Training, evaluation and folding all go through here.

    Args:
        weight: (G·O, C/G, kh, kw) of a convolution or (O, C) of a linear layer.
        bias: (G·O,).
        mean_GKF: the mean; K may be 1 for a mean that the blocks share.
        blocks: K, the number of blocks in a group.

    Returns:
        weight and bias of the shapes and type given; the arithmetic is in float32 or wider.
    """
    dtype = weight.dtype
    weight, bias = (t.to(torch.promote_types(t.dtype, whitening_GFF.dtype)) for t in (weight, bias))
    whitening_GFF, mean_GKF = whitening_GFF.to(weight.dtype), mean_GKF.to(weight.dtype)
    groups = whitening_GFF.shape[0]
    weight_GOKF = to_blocks(weight.reshape(groups, weight.shape[0] // groups, -1), blocks, interleaved)
    folded_GOKF = (weight_GOKF.flatten(1, 2) @ whitening_GFF).view_as(weight_GOKF)
    shift_GO = (folded_GOKF * mean_GKF[:, None]).sum((-1, -2))
    folded = from_blocks(folded_GOKF, interleaved).reshape(weight.shape)
    return folded.to(dtype), (bias - shift_GO.flatten()).to(dtype)


def unfold_whitening(
    weight: Tensor,
    bias: Tensor,
    whitening_GFF: Tensor,
    mean_GKF: Tensor,
    blocks: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """The inverse of `fold_whitening`: W = w' D^(-1) and b = b' + w'·μ, so that folding gives w', b' back.

    Solved in float64. This is how a trained plain layer starts as a whitened one.
    """
    double = [t.double() for t in (weight, bias, mean_GKF)]
    inverse_GFF = torch.linalg.inv(whitening_GFF.double())
    unfolded, _ = fold_whitening(double[0], double[1], inverse_GFF, double[2], blocks, interleaved)
    identity = torch.eye(inverse_GFF.shape[-1], dtype=torch.float64, device=weight.device)
    _, shifted = fold_whitening(
        double[0], double[1], identity.expand_as(inverse_GFF), -double[2], blocks, interleaved
    )
    return unfolded.to(weight.dtype), shifted.to(bias.dtype)
