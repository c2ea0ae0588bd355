"""Convolution and linear layers that whiten what they read. They hold state; the mathematics is whitening.py.

Network Deconvolution, Ye et al., ICLR 2020 (arXiv 1905.11926), algorithm 1. In training the whitening matrix
and the mean come from the batch, with gradient; in evaluation they are running values. Either way the layer
is one plain convolution with folded parameters, which `to_conv` and `to_linear` return.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from segdeconv.config import NetworkDeconvConfig
from segdeconv.whitening import (
    channels_per_block,
    channels_per_block_reference,
    fold_whitening,
    inverse_sqrt,
    patch_moments,
    sample_patches,
    to_blocks,
)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    if torch.amp.is_autocast_available(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


# With fewer, statistics are so noisy that gradients grow from layer to layer: in a U-Net on MobileNetV2 the
# first layer's was 25 times as large without this rule (tools/gradient_by_sampling.py).
_SAMPLES_PER_FEATURE = 8


class Whitened(nn.Module):
    """Running values and the road from batch to folded parameters, shared by the layers below.

    Buffers (G groups, K blocks, F features a block):
        running_mean: (G, K, F), K is 1 in reference mode.
        running_whitening: (G, F, F).
        num_batches_tracked: how many finite batches the running values have seen.
    """

    weight: Tensor
    bias: Any  # a Parameter or None; the torch layers beside this class in the bases do not agree on its type
    running_mean: Tensor
    running_whitening: Tensor
    num_batches_tracked: Tensor

    def _init_whitening(self, config: NetworkDeconvConfig, channels: int, groups: int, taps: int) -> None:
        """``channels`` and ``taps`` are those of one group."""
        self.config = config
        limit = config.block_size if isinstance(self, nn.Conv2d) else config.linear_block_size
        reference = config.mode == "reference"
        if reference and groups > 1:
            block = channels  # the authors keep one matrix a group, whatever the block size
        else:
            block = (channels_per_block_reference if reference else channels_per_block)(channels, limit)
        self.num_blocks = channels // block
        # The authors interleave (channel, tap) features over blocks in convolutions, not in linear layers.
        self.interleaved = reference and isinstance(self, nn.Conv2d)
        self._shape = groups, 1 if reference else self.num_blocks, taps * block  # G, K of the mean, F
        self.reset_running_stats()

    def reset_running_stats(self) -> None:
        """Running values as before the first batch: mean zero, whitening identity."""
        groups, means, features = self._shape
        device, dtype = self.weight.device, _at_least_float32(self.weight.dtype)
        identity = torch.eye(features, dtype=dtype, device=device)
        self.register_buffer("running_mean", torch.zeros(groups, means, features, dtype=dtype, device=device))
        self.register_buffer("running_whitening", identity.repeat(groups, 1, 1))
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device))

    def _sample(self, x: Tensor) -> Tensor:
        """Rows of features to take statistics of, (N, G·K·F) in float32 or wider."""
        raise NotImplementedError

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean (G, K, F), covariance (G, F, F) and number of sampled rows N of one batch."""
        with _no_autocast(x):
            rows = self._sample(x)
            patches = to_blocks(
                rows.unflatten(1, (len(self.running_mean), -1)), self.num_blocks, self.interleaved
            )
            mean, cov = patch_moments(patches.permute(1, 2, 0, 3), self.config.mode == "reference")
        return mean, cov, len(rows)

    def whitening_from(self, cov_GFF: Tensor) -> Tensor:
        """The whitening matrices (G, F, F) of covariances, by this layer's settings."""
        with _no_autocast(cov_GFF):
            return inverse_sqrt(cov_GFF, self.config.eps, self.config.num_iters)

    def effective_parameters(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain layer this layer is for the batch ``x``.

        In training from the statistics of ``x``, and the running values are updated. In evaluation, and for a
        batch with a single sampled position, which has no covariance, from the running values.
        """
        if not self.training or x.numel() == 0:
            return self.folded_parameters()
        mean, cov, rows = self.moments(x)
        if rows * self.num_blocks < 2:
            return self.folded_parameters()
        whitening = self.whitening_from(cov)
        self._update_running(mean.detach(), whitening.detach())
        with _no_autocast(x):
            return fold_whitening(
                self.weight, self._bias(), whitening, mean, self.num_blocks, self.interleaved
            )

    def folded_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain layer this layer is in evaluation."""
        with _no_autocast(self.weight):
            return fold_whitening(
                self.weight,
                self._bias(),
                self.running_whitening,
                self.running_mean,
                self.num_blocks,
                self.interleaved,
            )

    def _bias(self) -> Tensor:
        return self.weight.new_zeros(len(self.weight)) if self.bias is None else self.bias

    @torch.no_grad()
    def _update_running(self, mean: Tensor, whitening: Tensor) -> None:
        # Tensor arithmetic throughout: a Python branch on NaN would make every step wait for the device.
        finite = mean.isfinite().all() & whitening.isfinite().all()
        self.num_batches_tracked += finite
        if self.config.mode == "reference":
            step = torch.full_like(self.num_batches_tracked, self.config.momentum, dtype=mean.dtype)
        else:
            # Adam's bias correction, written as a step size: the first batch counts in full.
            forgotten = (1 - self.config.momentum) ** self.num_batches_tracked.clamp(min=1).to(mean.dtype)
            step = self.config.momentum / (1 - forgotten)
        for running, batch in ((self.running_mean, mean), (self.running_whitening, whitening)):
            batch = torch.where(finite, batch.to(running.dtype), running)
            running.lerp_(batch, step.to(running.dtype))


class WhitenedConv2d(Whitened, nn.Conv2d):
    """`torch.nn.Conv2d` that whitens the patches it reads, in blocks of ``config.block_size`` whole channels.

    Takes and returns what Conv2d does: (n, C, H, W) to (n, O, Ho, Wo). ``stride``, ``padding`` and
    ``dilation`` may be changed after construction, as on the torch layer.

    Source: arXiv 1905.11926, algorithm 1 and section 3.3.
    """

    plain_type: type[nn.Conv2d] = nn.Conv2d
    kernel_size: tuple[int, int]
    stride: Any  # as on the torch layer: a number or (rows, columns)
    dilation: Any
    padding: Any  # likewise, or 'same' or 'valid'

    def __init__(self, *args: Any, config: NetworkDeconvConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        height, width = self.kernel_size
        self._init_whitening(
            config or NetworkDeconvConfig(), self.in_channels // self.groups, self.groups, height * width
        )

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: NetworkDeconvConfig | None = None) -> WhitenedConv2d:
        """Whiten an existing convolution: its Parameters are reused, a missing bias is added as zeros."""
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            padding_mode=conv.padding_mode,
            config=config,
            device="meta",
        )
        if type(conv).__name__ == "Conv2dSame":  # timm's: padded by the input's size, at any stride
            layer.plain_type = type(conv)
            layer.padding = "same"
        return _adopt(layer, conv)

    def to_conv(self) -> nn.Conv2d:
        """The plain convolution that computes what this layer does in evaluation."""
        conv = self.plain_type(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            device="meta",
        )
        conv.padding_mode = self.padding_mode
        return _give(self, conv)

    def _padding_lrtb(self, x: Tensor) -> tuple[int, int, int, int]:
        if self.padding == "valid":
            return 0, 0, 0, 0
        if self.padding == "same":  # the odd pixel goes to the right and to the bottom
            top, bottom = self._same_padding(x, 0)
            left, right = self._same_padding(x, 1)
            return left, right, top, bottom
        py, px = _pair(self.padding)
        return px, px, py, py

    def _same_padding(self, x: Tensor, axis: int) -> tuple[int, int]:
        size, stride = x.shape[axis - 2], _pair(self.stride)[axis]
        reach = _pair(self.dilation)[axis] * (self.kernel_size[axis] - 1)
        total = max((math.ceil(size / stride) - 1) * stride + reach + 1 - size, 0)
        return total // 2, total - total // 2

    def _sample(self, x: Tensor) -> Tensor:
        x = x if x.ndim == 4 else x[None]
        every, (sy, sx) = self.sampling_stride(x), _pair(self.stride)
        if self.config.mode == "reference" and self.kernel_size == (1, 1):
            # The authors skip along flattened rows here, over image borders.
            rows = x.to(_at_least_float32(x.dtype)).permute(0, 2, 3, 1).flatten(0, 2)
            return rows[:: (every * sy) ** 2]
        return sample_patches(
            x,
            self.kernel_size,
            _pair(self.dilation),
            self._padding_lrtb(x),
            self.padding_mode,
            (every * sy, every * sx),
        )

    def sampling_stride(self, x: Tensor) -> int:
        """How many output positions apart patches are sampled: ``config.sampling_stride``, or less where that
        would leave fewer than eight samples a feature and a smaller stride has more to offer.
        """
        every = self.config.sampling_stride
        if self.config.mode == "reference":
            return every
        left, right, top, bottom = self._padding_lrtb(x)
        outputs = []
        for axis, pad in enumerate((top + bottom, left + right)):
            reach = _pair(self.dilation)[axis] * (self.kernel_size[axis] - 1)
            outputs.append((x.shape[axis - 2] + pad - reach - 1) // _pair(self.stride)[axis] + 1)
        wanted = _SAMPLES_PER_FEATURE * self.running_mean.shape[-1] / (len(x) * self.num_blocks)
        while every > 1 and math.prod(math.ceil(size / every) for size in outputs) < wanted:
            every -= 1
        return every

    def forward(self, input: Tensor) -> Tensor:  # named as on the torch layer
        weight, bias = self.effective_parameters(input)
        padding = self.padding
        if self.padding_mode != "zeros" or (padding == "same" and max(_pair(self.stride)) > 1):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input, padding = F.pad(input, self._padding_lrtb(input), mode=mode), 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)


class WhitenedLinear(Whitened, nn.Linear):
    """`torch.nn.Linear` that whitens the features it reads, in blocks of ``config.linear_block_size``.

    Takes and returns what Linear does: (..., C) to (..., O); every row is a sample.

    Source: arXiv 1905.11926, algorithm 1 and section 3.3.
    """

    def __init__(self, *args: Any, config: NetworkDeconvConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_whitening(config or NetworkDeconvConfig(), self.in_features, groups=1, taps=1)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: NetworkDeconvConfig | None = None) -> WhitenedLinear:
        """Whiten an existing linear layer: its Parameters are reused, a missing bias is added as zeros."""
        return _adopt(cls(linear.in_features, linear.out_features, config=config, device="meta"), linear)

    def to_linear(self) -> nn.Linear:
        """The plain linear layer that computes what this layer does in evaluation."""
        return _give(self, nn.Linear(self.in_features, self.out_features, device="meta"))

    def _sample(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.in_features).to(_at_least_float32(x.dtype))

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.effective_parameters(input)
        return F.linear(input, weight, bias)


def _adopt(layer: Any, plain: Any) -> Any:
    """Give the whitened ``layer`` the Parameters, place, precision and mode of the ``plain`` one."""
    layer.weight = plain.weight
    if plain.bias is not None:
        layer.bias = plain.bias
    else:
        zeros = plain.weight.new_zeros(len(plain.weight))
        layer.bias = nn.Parameter(zeros, requires_grad=plain.weight.requires_grad)
    layer.reset_running_stats()
    return layer.train(plain.training)


def _give(layer: Any, plain: Any) -> Any:
    """Give the ``plain`` layer the folded parameters, place, precision and mode of the whitened one."""
    weight, bias = layer.folded_parameters()
    plain.weight = nn.Parameter(weight.detach(), requires_grad=layer.weight.requires_grad)
    plain.bias = nn.Parameter(bias.detach(), requires_grad=layer.weight.requires_grad)
    return plain.train(layer.training)
