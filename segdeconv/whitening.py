"""Whitening of convolution inputs: pure functions on tensors.

Network Deconvolution, Ye et al., ICLR 2020 (arXiv 1905.11926): for the im2col patches X of what a layer
reads, with mean μ and covariance Cov (section 3.2, eq. 2), the whitening matrix D = (Cov + εI)^(-1/2) is
never applied to the data. With filters w as rows X D wᵀ = X (w D)ᵀ, so the layer runs with w' = w D and
b' = b - w'·μ (section 3.3). The inverse root is approximated by coupled Newton-Schulz iterations (section
3.1).

The fast mode splits scale from correlation: `channel_moments` standardises every channel with gradient, at
the price of batch norm's statistics, and `shrunk_inverse_sqrt` whitens what is left, the correlation between
the standardised features, from a running average and without gradient. docs/whitening.md derives it.

This file holds no state and knows no modules; running averages live in layers.py.

Shape suffixes
    N  sampled patches (image x position)       O  output channels of one group
    G  groups, each with its own matrix         K  blocks of channels in a group; they share the matrix
    F  features of one block, channels x taps   C  input channels,  H, W  height and width
    P  all features of a group, K·F             S  two gradients, of mean and variance
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.compiler.assume_constant_result  # not every torch can trace the question
def has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context in which operations on the device of ``x`` keep the precision they are given."""
    if has_autocast(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def in_float64(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU where its device has none (Apple's GPUs)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


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
    if any(padding_lrtb):
        x_NCHW = F.pad(x_NCHW, padding_lrtb, mode="constant" if padding_mode == "zeros" else padding_mode)
    windows = x_NCHW
    for axis in (0, 1):  # views: only the sampled patches are copied, once
        windows = windows.unfold(2 + axis, dilation[axis] * (kernel_size[axis] - 1) + 1, stride[axis])
    taps = windows[..., :: dilation[0], :: dilation[1]].permute(0, 2, 3, 1, 4, 5)
    return taps.to(torch.promote_types(x_NCHW.dtype, torch.float32)).flatten(3).flatten(0, 2)


def patches_at(
    x_NCHW: Tensor,
    rows_Y: Tensor,
    columns_X: Tensor,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    padding_lrtb: tuple[int, int, int, int],
    padding_mode: str,
) -> Tensor:
    """The im2col patches whose corners are at these rows and columns of the padded image, as rows.

    The positions are tensors, so a graph of torch.compile can move the grid; nothing is padded, and nothing
    but the patches is copied.

    Args:
        rows_Y, columns_X: Y rows and X columns, all pairs of which count (I, J: the taps of a patch).

    Returns:
        (N, C·kh·kw), features channel-major, in float32 or wider.
    """
    left, _, top, _ = padding_lrtb
    indices, inside = [], []
    for axis, (corners, before) in enumerate(((rows_Y, top), (columns_X, left))):
        taps = torch.arange(kernel_size[axis], device=corners.device) * dilation[axis] - before
        index, size = corners[:, None] + taps, x_NCHW.shape[2 + axis]
        inside.append((index >= 0) & (index < size))
        if padding_mode == "circular":
            index = index % size
        elif padding_mode == "reflect":
            index = size - 1 - (size - 1 - index.abs()).abs()
        indices.append(index.clamp(0, size - 1))
    (rows_YI, columns_XJ), (rows_inside, columns_inside) = indices, inside
    taps_NCYXIJ = x_NCHW[:, :, rows_YI[:, None, :, None], columns_XJ[None, :, None, :]]
    taps_NYXCIJ = taps_NCYXIJ.permute(0, 2, 3, 1, 4, 5).to(torch.promote_types(x_NCHW.dtype, torch.float32))
    if padding_mode == "zeros" and any(padding_lrtb):
        real = rows_inside[:, None, None, :, None] & columns_inside[None, :, None, None, :]
        taps_NYXCIJ = taps_NYXCIJ.masked_fill(~real, 0)
    return taps_NYXCIJ.flatten(3).flatten(0, 2)


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
    Z = TZ; Z converges to A^(-1/2). Five steps do not converge for eigenvalues below about 3% of the norm,
    where D is a tenth short, and are the published method: they leave weak directions only partly whitened.

    Returns:
        ``whitening_GFF``, symmetric up to rounding.
    """
    identity = torch.eye(cov_GFF.shape[-1], dtype=cov_GFF.dtype, device=cov_GFF.device)
    ridged = cov_GFF + eps * identity
    norm = torch.linalg.matrix_norm(ridged, keepdim=True)
    y = ridged / norm
    z = identity.expand_as(y)
    for step in range(num_iters):
        t = 1.5 * identity - 0.5 * (z @ y)
        z = t @ z
        if step < num_iters - 1:
            y = y @ t
    return z / norm.sqrt()


def _moment_rows(x: Tensor) -> Tensor:
    """The part of ``x`` that its moments come from: of a map of 32 rows or more every third, else all.

    Neighbouring rows say much the same. Three shares no factor with the strides and upsampling of networks,
    so that all their phases are seen; and a rule that reads the height alone is the same on every rank.
    """
    return x[:, :, 1::3] if x.ndim == 4 and x.shape[2] >= 32 else x


def _dense(rows: Tensor, x: Tensor) -> Tensor:
    """``rows`` of ``x``, copied where batch norm's kernels are slow on rows of their dtype and layout."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        few = x.shape[1] < 8  # with so few channels, those kernels are slow in this layout
        return rows.contiguous(memory_format=torch.contiguous_format if few else torch.channels_last)
    return rows if x.dtype in (torch.float32, torch.float64) else rows.contiguous()


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on. Differentiating it is an error; otherwise the result would silently be zero."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *given: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "network deconvolution has no second derivatives in fast mode; "
            "NetworkDeconvConfig(mode='exact') has"
        )


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a Function's backward pass: to differentiate its results is an error.

    With torch's own of this name `torch.autograd.grad` would find no way from the results to its inputs, and
    give second derivatives of zero without an error.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        given = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        return tuple(
            None if result is None else _NoSecondDerivative.apply(result.detach(), *given)
            for result in results
        )

    return once


class _ChannelMoments(torch.autograd.Function):
    """x and its moments; their gradient is added into that of x as it passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, zeros: float) -> tuple[Tensor, Tensor]:
        rows = _moment_rows(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        # Batch norm's own kernel is several times faster than var_mean, unless that is compiled.
        if x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            # It gives statistics in the precision of the running values it is handed; these are thrown away.
            unused = x.new_empty(2, x.shape[1], dtype=wide)
            mean, var = torch.batch_norm_update_stats(_dense(rows, x), unused[0], unused[1], 0.0)
        else:
            over = [axis for axis in range(x.ndim) if axis != 1]
            var, mean = torch.var_mean(rows.to(wide), over, correction=0)
        if zeros:
            var = torch.addcmul(var * (1 - zeros), mean, mean, value=zeros)
        ctx.save_for_backward(x, mean)
        ctx.zeros = zeros
        # Not `view_as`, which changes the strides of a batch of one, so that it is no longer channels-last.
        return torch.ops.aten.alias(x), torch.stack((mean, var))

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_x: Tensor, grad_moments: Tensor) -> tuple[Tensor, None]:
        x, mean = ctx.saved_tensors
        rows, grad_rows = _moment_rows(x), _moment_rows(grad_x)
        grad_mean, grad_var = grad_moments
        share, slope = x.shape[1] / rows.numel(), 2 * (1 - ctx.zeros)
        offset = torch.addcmul(grad_mean, grad_var, mean, value=4 * ctx.zeros - 2)
        # In place: the gradient was just made by the one layer that reads x, and nobody else holds it.
        if grad_x.dtype == offset.dtype:
            shape = (-1, *(1,) * (x.ndim - 2))
            grad_rows.addcmul_(rows, grad_var.view(shape), value=slope * share)
            grad_rows.add_(offset.view(shape), alpha=share)
        else:  # tensor arithmetic in two precisions makes float32 copies, batch norm's kernel does not
            zero, one = torch.zeros_like(offset), torch.ones_like(offset)
            slope_C, offset = grad_var * (slope * share), offset * share
            # Not F.batch_norm, which takes no eps of zero before torch 2.12.
            grad_rows.add_(
                torch.batch_norm(_dense(rows, x), slope_C, offset, zero, one, False, 0.0, 0.0, False)
            )
        return grad_x, None


def channel_moments(x: Tensor, zeros: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel over batch and positions, with gradient.

    Of maps with 32 rows or more, every third row counts. Nothing but ``x`` is kept for the backward pass,
    which the layer that reads it keeps anyway.

    Args:
        x: (n, C, ...).
        zeros: the share of padding zeros among the values the layer reads. They count in the variance (about
            the mean of ``x``): a constant channel would be scaled beyond all bounds without, and the zeros
            beside it too.

    Returns:
        ``x`` for the one layer that reads it (its gradient is completed in place, so it must go nowhere
        else) and ``moments_2C``, means and variances, in float32 or wider.
    """
    return _ChannelMoments.apply(x, zeros)


# Five unconverged Newton-Schulz iterations multiply by 1.5 each where an eigenvalue is small, so they are, to
# 6.3% and a constant, an exact inverse root with a ridge of 1.5^-10 of the Frobenius norm.
RIDGE = 1.5**-10

# Odd quintics towards the sign function on [(RIDGE / (1 + RIDGE))^(1/2), 1], each the minimax choice for the
# interval that the one before leaves: errors 0.36, 0.031, 2.1e-5 (Polar Express, arXiv 2505.16932). In the
# coupled form below, as Newton-Schulz is, they make the inverse root.
_QUINTICS = (
    (5.084088, -11.887791, 8.165101),
    (2.027973, -1.411143, 0.391444),
    (1.876006, -1.251117, 0.375112),
)


def shrunk_inverse_sqrt(cov_GFF: Tensor, samples: Tensor) -> Tensor:
    """D = (S + r max(||S||_F, 1) I)^(-1/2) of S = (1 - α) Cov + α (tr Cov / F) I, α = 4F / (4F + samples).

    The ridge r ||S||_F is that of the published five iterations. The shrinkage α is for estimates from few
    samples, whose small eigenvalues are noise that the inverse root would blow up: without any samples D is a
    multiple of the identity, and the layer standardises its input and no more.

    Args:
        cov_GFF: positive semidefinite, of standardised features (diagonal about one).
        samples: how many patches the estimate rests on, a scalar or (G, 1, 1).

    Returns:
        ``whitening_GFF``, with a relative error of at most 2.5e-5 in spectral norm.
    """
    features = cov_GFF.shape[-1]
    identity = torch.eye(features, dtype=cov_GFF.dtype, device=cov_GFF.device)
    alpha = 4 * features / (4 * features + samples)
    variance = cov_GFF.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    cov_GFF = torch.lerp(cov_GFF, variance * identity, alpha)
    # One live channel alone has a norm of one; a norm below comes from constant inputs only.
    norm = torch.linalg.matrix_norm(cov_GFF, keepdim=True).clamp(min=1)
    largest = (1 + RIDGE) * norm
    y = (cov_GFF + RIDGE * norm * identity) / largest
    z = None
    for step, (a, b, c) in enumerate(_QUINTICS):
        zy = y if z is None else z @ y
        p = a * identity + b * zy + c * (zy @ zy)
        z = p if z is None else p @ z
        if step < len(_QUINTICS) - 1:
            y = y @ p
    assert z is not None
    return z / largest.sqrt()


def fold_whitening(
    weight: Tensor,
    bias: Tensor,
    whitening_GFF: Tensor | None,
    mean_GKF: Tensor,
    blocks: int,
    interleaved: bool,
    scale_GKF: Tensor | None = None,
    low_precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain layer's parameters: w' = w D s in every block and b' = b - w'·μ (section 3.3).

    Training, evaluation and folding all go through here. The scale s is what the fast mode multiplies every
    channel by before D; the other modes have none.

    Args:
        weight: (G·O, C/G, kh, kw) of a convolution or (O, C) of a linear layer.
        bias: (G·O,).
        whitening_GFF: D; None is the identity.
        mean_GKF: the mean; K may be 1 for a mean that the blocks share.
        blocks: K, the number of blocks in a group.
        low_precision: the type to compute in and to return, where autocast would round to it anyway.

    Returns:
        weight and bias of the shapes given, and, unless in low precision, of the type given and computed in
        float32 or wider.
    """
    out = low_precision or weight.dtype
    dtype = low_precision or torch.promote_types(out, mean_GKF.dtype)
    weight, bias, mean_GKF = (t.to(dtype) for t in (weight, bias, mean_GKF))
    groups = len(mean_GKF)
    weight_GOKF = to_blocks(weight.reshape(groups, weight.shape[0] // groups, -1), blocks, interleaved)
    if whitening_GFF is None:
        folded_GOKF = weight_GOKF.clone()
    else:
        folded_GOKF = (weight_GOKF.flatten(1, 2) @ whitening_GFF.to(dtype)).view_as(weight_GOKF)
    scale_GOKF = None if scale_GKF is None else scale_GKF[:, None].to(dtype)
    mean_GOKF = mean_GKF.expand(groups, *folded_GOKF.shape[2:])[:, None]
    if torch.compiler.is_compiling():  # which fuses this into one loop, but no baddbmm
        if scale_GOKF is not None:
            folded_GOKF = folded_GOKF * scale_GOKF
        shifted = bias - (folded_GOKF * mean_GOKF).sum((2, 3)).flatten()
    else:
        if scale_GOKF is not None:
            folded_GOKF *= scale_GOKF
        mean_GP1 = mean_GOKF.reshape(groups, -1, 1)
        shifted = torch.baddbmm(
            bias.view(groups, -1, 1), folded_GOKF.flatten(2), mean_GP1, alpha=-1
        ).flatten()
    folded = from_blocks(folded_GOKF, interleaved).reshape(weight.shape)
    # Not `to` where it has nothing to do: torch 2.11 compiles that to graphs without gradient.
    return (folded, shifted) if folded.dtype == out else (folded.to(out), shifted.to(out))


class _StandardiseAndFold(torch.autograd.Function):
    # With a backward pass of its own, in place where it can: autograd's has some thirty small operations, and
    # new memory for the intermediate values of a large weight costs more than the arithmetic.

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        moments_2C: Tensor,
        whitening_GFF: Tensor | None,
        blocks: int,
        eps: float,
        low_precision: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        groups, features = moments_2C.shape[1] // weight.shape[1], weight[0].numel() // blocks
        mean_GKF, scale_GKF = mean_and_scale(moments_2C, groups, blocks, features, eps)
        folded, shifted = fold_whitening(
            weight, bias, whitening_GFF, mean_GKF, blocks, False, scale_GKF, low_precision
        )
        ctx.save_for_backward(folded, mean_GKF, scale_GKF, whitening_GFF)
        ctx.dtypes = weight.dtype, bias.dtype, low_precision or mean_GKF.dtype
        return folded, shifted

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_folded: Tensor, grad_shifted: Tensor) -> tuple[Tensor | None, ...]:
        folded, mean_GKF, scale_GKF, whitening_GFF = ctx.saved_tensors
        weight_dtype, bias_dtype, dtype = ctx.dtypes
        groups, features = len(mean_GKF), mean_GKF.shape[-1]
        rows = groups, len(folded) // groups
        folded_GOP, grad_GOP = (t.reshape(*rows, -1).to(dtype) for t in (folded, grad_folded))
        mean_G1P, scale_G1P = (t.reshape(groups, 1, -1).to(dtype) for t in (mean_GKF, scale_GKF))
        shifted_GO1 = grad_shifted.reshape(*rows, 1).to(dtype)
        grad_GOP.addcmul_(shifted_GO1, mean_G1P, value=-1)  # b' = b - w'·μ
        grad_weight = grad_moments = None
        if ctx.needs_input_grad[2]:  # s = (var + ε)^(-1/2), so ds/dvar = -s³/2
            sums_SG1P = mean_G1P.new_empty(2, *mean_G1P.shape)
            torch.baddbmm(sums_SG1P[0], shifted_GO1.mT, folded_GOP, beta=0, alpha=-1, out=sums_SG1P[0])
            torch.sum(grad_GOP * folded_GOP, 1, keepdim=True, out=sums_SG1P[1])
            taps = math.prod(folded.shape[2:])
            grad_moments = sums_SG1P.view(2, -1, taps).sum(-1, dtype=mean_GKF.dtype)
            grad_moments[1].mul_(scale_GKF.flatten()[::taps].square() * -0.5)
        if ctx.needs_input_grad[0]:  # w' = w D s
            grad_weight = grad_GOP.mul_(scale_G1P).view(groups, -1, features)
            if whitening_GFF is not None:
                with no_autocast(folded):  # where the backward pass is made inside autocast
                    grad_weight = grad_weight @ whitening_GFF.to(dtype).mT
            grad_weight = grad_weight.view(folded.shape).to(weight_dtype)
        return grad_weight, grad_shifted.to(bias_dtype), grad_moments, None, None, None, None


class _CompiledStandardiseAndFold(torch.autograd.Function):
    # For compilers, which fuse these operations. The weight is returned, and its gradient arrives, in the
    # precision and memory layout (channels last: T taps before C channels, which are K blocks of B) in which
    # the convolution reads it and keeps it for the backward pass. All is computed in that layout, to which
    # D's columns are brought: so no transposition is fused with the sums beside it.

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor,
        moments_2C: Tensor,
        matrix_GFF: Tensor | None,
        blocks: int,
        eps: float,
        low_precision: torch.dtype | None,
        out: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        wide, groups = moments_2C.dtype, moments_2C.shape[1] // weight.shape[1]
        dtype, taps = low_precision or wide, math.prod(weight.shape[2:])
        mean_G11KB, var_G11KB = moments_2C.view(2, groups, 1, 1, blocks, -1)
        if matrix_GFF is None:
            whitened_GOKTB = weight.reshape(groups, -1, blocks, mean_G11KB.shape[-1], taps).mT
        else:
            whitened_GOKTB = weight.to(dtype).reshape(groups, -1, matrix_GFF.shape[-1]) @ matrix_GFF
            whitened_GOKTB = whitened_GOKTB.view(groups, -1, blocks, taps, mean_G11KB.shape[-1])
        folded_GOTKB = whitened_GOKTB.transpose(2, 3) * (var_G11KB + eps).rsqrt()
        folded_GOTKB = folded_GOTKB.to(out or weight.dtype).contiguous()
        shifted = bias.to(wide) - (folded_GOTKB.to(wide) * mean_G11KB).sum((2, 3, 4)).flatten()
        folded = folded_GOTKB.view(len(weight), *weight.shape[2:], -1).movedim(-1, 1)
        # Not `to` alone, which may return its input: torch 2.11 compiles that to wrong gradients.
        if shifted.dtype != bias.dtype:
            shifted = shifted.to(bias.dtype)
        ctx.save_for_backward(folded, moments_2C, matrix_GFF)
        ctx.dtypes = weight.dtype, bias.dtype, dtype
        ctx.blocks, ctx.eps = blocks, eps
        return folded, shifted

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_folded: Tensor, grad_shifted: Tensor) -> tuple[Tensor | None, ...]:
        folded, moments_2C, matrix_GFF = ctx.saved_tensors
        weight_dtype, bias_dtype, dtype = ctx.dtypes
        wide, groups = moments_2C.dtype, moments_2C.shape[1] // folded.shape[1]
        shape = groups, len(folded) // groups, math.prod(folded.shape[2:]), folded.shape[1]
        # A compiler traces this together with the forward pass, inside its autocast.
        with no_autocast(folded):
            mean_G11C, var_G11C = moments_2C.view(2, groups, 1, 1, -1)
            scale_G11C = (var_G11C + ctx.eps).rsqrt()
            folded_GOTC, grad_GOTC = (t.to(wide).movedim(1, -1).reshape(shape) for t in (folded, grad_folded))
            shifted_GO11 = grad_shifted.to(wide).view(*shape[:2], 1, 1)
            # b' = b - w'·μ and w' = w D s with s = (var + ε)^(-1/2), so ds/dvar = -s³/2.
            grad_mean = (shifted_GO11 * folded_GOTC).sum((1, 2)).neg()
            grad_scale = (grad_GOTC * folded_GOTC).sum((1, 2)) + mean_G11C[:, 0, 0] * grad_mean
            grad_var = grad_scale * scale_G11C[:, 0, 0].square() * -0.5
            grad_GOTC = ((grad_GOTC - shifted_GO11 * mean_G11C) * scale_G11C).to(dtype)
            grad_GOKTB = grad_GOTC.unflatten(-1, (ctx.blocks, -1)).transpose(2, 3)
            if matrix_GFF is None:
                grad_weight = grad_GOKTB.mT
            else:
                grad_weight = grad_GOKTB.reshape(groups, -1, matrix_GFF.shape[-1]) @ matrix_GFF.mT
            grad_weight = grad_weight.reshape(folded.shape).to(weight_dtype)
            # `stack` would be a kernel of its own, between what makes the rows and what reads them.
            row = torch.arange(2, device=folded.device)[:, None]
            grad_moments = torch.where(row == 0, grad_mean.flatten(), grad_var.flatten())
        return grad_weight, grad_shifted.to(bias_dtype), grad_moments, None, None, None, None, None


def folding_matrix(whitening_GFF: Tensor, taps: int, dtype: torch.dtype) -> Tensor:
    """D as compiled code multiplies by it: columns in order of tap and channel instead of channel and tap."""
    columns = whitening_GFF.unflatten(-1, (-1, taps)).mT.flatten(-2) if taps > 1 else whitening_GFF
    return columns.to(dtype)


def standardise_and_fold(
    weight: Tensor,
    bias: Tensor,
    moments_2C: Tensor,
    whitening_GFF: Tensor | None,
    blocks: int,
    eps: float,
    low_precision: torch.dtype | None = None,
    out: torch.dtype | None = None,
    matrix_GFF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fold_whitening` with every channel's mean and scale s = (var + ε)^(-1/2) of ``moments_2C``.

    Differentiable once, with respect to weight, bias and moments; the whitening matrix counts as constant.

    Args:
        low_precision: bfloat16 to compute and return in it, where autocast would round to it anyway. In
            compiled code only the product with D is in it.
        out: in compiled code, the type of the weight returned: what autocast would round it to.
        matrix_GFF: the `folding_matrix` of ``whitening_GFF`` where it is there already, for compilers.

    Returns:
        weight and bias for the one layer that computes with them: their gradients are taken up in place.
    """
    rest = blocks, eps, low_precision
    if not torch.compiler.is_compiling():
        return _StandardiseAndFold.apply(weight, bias, moments_2C, whitening_GFF, *rest)
    if matrix_GFF is None and whitening_GFF is not None:
        taps = math.prod(weight.shape[2:])
        matrix_GFF = folding_matrix(whitening_GFF, taps, low_precision or moments_2C.dtype)
    return _CompiledStandardiseAndFold.apply(weight, bias, moments_2C, matrix_GFF, *rest, out)


def mean_and_scale(
    moments_2C: Tensor, groups: int, blocks: int, features: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and scale s = (var + ε)^(-1/2) of every channel, at all its taps: ``mean_GKF``, ``scale_GKF``."""
    values = moments_2C.view(2, groups, blocks, -1, 1)
    mean_GKF, var_GKF = values.expand(-1, -1, -1, -1, features // values.shape[3]).flatten(3)
    return mean_GKF, (var_GKF + eps).rsqrt()


def unfold_whitening(
    weight: Tensor,
    bias: Tensor,
    whitening_GFF: Tensor | None,
    mean_GKF: Tensor,
    blocks: int,
    interleaved: bool,
    scale_GKF: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The inverse of `fold_whitening`: W = w' s^(-1) D^(-1) and b = b' + w'·μ, so that folding gives w', b'.

    Solved in float64. This is how a trained plain layer starts as a whitened one.
    """
    mean_GKF = in_float64(mean_GKF)
    inverse_GFF = None if whitening_GFF is None else torch.linalg.inv(in_float64(whitening_GFF))
    scale_GKF = torch.ones_like(mean_GKF) if scale_GKF is None else in_float64(scale_GKF)
    wide, shift = in_float64(weight), in_float64(bias)
    unscaled, shifted = fold_whitening(
        wide, shift, None, -mean_GKF * scale_GKF, blocks, interleaved, 1 / scale_GKF
    )
    unfolded, _ = fold_whitening(unscaled, shifted, inverse_GFF, mean_GKF, blocks, interleaved)
    return unfolded.to(weight), shifted.to(bias)
