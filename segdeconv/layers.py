"""Convolution and linear layers that whiten what they read. They hold state; the mathematics is whitening.py.

Network Deconvolution, Ye et al., ICLR 2020 (arXiv 1905.11926), algorithm 1. In training the mean and the
whitening matrix (exact mode) or the mean and scale of every channel (fast mode) come from the batch, with
gradient; in evaluation they are running values. Either way the layer is one plain convolution with folded
parameters, which `to_conv` and `to_linear` return.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from segdeconv.compiling import LAYERS, NUMBERS, is_exporting, snapshot, track_outside_graph
from segdeconv.config import NetworkDeconvConfig
from segdeconv.distributed import mean_over_ranks, sum_over_ranks, world_size
from segdeconv.whitening import (
    channel_moments,
    channels_per_block,
    channels_per_block_reference,
    fold_whitening,
    folding_matrix,
    has_autocast,
    inverse_sqrt,
    mean_and_scale,
    no_autocast,
    patch_moments,
    patches_at,
    sample_patches,
    shrunk_inverse_sqrt,
    standardise_and_fold,
    to_blocks,
    unfold_whitening,
)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is on, and brings ``x`` to its precision."""
    device = x.device.type
    enabled = has_autocast(device) and torch.is_autocast_enabled(device)
    return enabled and x.is_floating_point() and x.dtype != torch.float64


def _low_precision(x: Tensor) -> torch.dtype | None:
    """bfloat16 if autocast brings ``x`` to it, else None: float16 has too little range for gradients divided
    by the scale of a channel.
    """
    bfloat16 = _autocasts(x) and torch.get_autocast_dtype(x.device.type) == torch.bfloat16
    return torch.bfloat16 if bfloat16 else None


def _recomputing() -> bool:
    """Whether this forward pass repeats one, inside a backward pass: activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


# With fewer, statistics are so noisy that gradients grow from layer to layer: in exact mode that of the first
# layer of a U-Net on MobileNetV2 is 35 times as large without this rule (tools/gradient_by_sampling.py).
_SAMPLES_PER_FEATURE = 8
_FEWEST_SAMPLES = 128  # fast mode, for blocks of few features

# Fast mode: the running values count as this many samples in the statistics of a batch. That is next to
# nothing on a map; but in a batch of two a linear layer sees two values per channel, which without them would
# always become +-1.
_PRIOR_SAMPLES = 16

# Fast mode: the squared norm of a linear layer's whitened input is its number of features. A step moves its
# outputs, which nothing normalises, in proportion; beyond this many features `gain` reduces both
# (docs/whitening.md, wide heads).
_FULL_RATE_FEATURES = 128

# Fast mode under bfloat16 autocast: from this many multiplications of weight and whitening matrix on,
# bfloat16 is faster; with fewer, the operations around them cost more than it saves (CPU with AMX; on an H100
# 2**23 take 6 us in float32 and 3 in bfloat16, and rounding the matrix 1).
_LOW_PRECISION_PAYS, _LOW_PRECISION_PAYS_ON_CUDA = 2**25, 2**22

# Fast mode: statistics move quickly at first, so the whitening matrix is refreshed at every one of the first
# 2 * 20 steps; then the interval grows by one every 20 steps, up to ``config.refresh_every``.
_STEPS_AN_INTERVAL = 20


class Whitened(nn.Module):
    """Running values and the way from batch to folded parameters, shared by the layers below.

    Buffers (G groups, K blocks of channels in a group, F features per block, C input channels):
        running_mean: (G, K, F), K is 1 in reference mode; not in fast mode.
        running_whitening: (G, F, F).
        num_batches_tracked: how many batches the running values have seen; in fast mode how many steps were
            made, those with values that are not finite included.
    In fast mode also:
        running_moments: (2, C), mean and variance of every channel.
        running_cov: (G, F, F), of the standardised features; the whitening matrix is made from it.
        cov_samples: how many patches ``running_cov`` rests on.
        num_refreshes: how often it was updated.
        gain: linear layers multiply their weight by it.
    In a layer that does not decorrelate, ``running_whitening``, ``running_cov``, ``cov_samples`` and
    ``num_refreshes`` are None.
    """

    weight: Tensor
    bias: Any  # a Parameter or None; the torch layers beside this class in the bases do not agree on its type
    running_mean: Tensor
    running_whitening: Any  # these four are Tensors, or None in layers that do not decorrelate
    running_cov: Any
    cov_samples: Any
    num_refreshes: Any
    gain: Any  # a Tensor in linear layers in fast mode, else None
    num_batches_tracked: Tensor
    running_moments: Tensor
    _step: tuple[Tensor, int] | None
    _held: float
    _folding_matrix: Tensor | None  # see `keep_folding_matrix`
    _matrix_version: int
    #: Fast mode: whether the next step measures correlation, of which a `RefreshSchedule` then makes the
    #: whitening; None: the layer does both, by the number of steps taken. The schedule sets it; evaluation,
    #: copying, loading, resetting and taking over running values end it, and so does moving a layer with a
    #: folding matrix to another device.
    refresh_now: bool | None

    def _init_whitening(self, config: NetworkDeconvConfig, channels: int, groups: int, taps: int) -> None:
        """``channels`` and ``taps`` are those of one group."""
        if not isinstance(config, NetworkDeconvConfig):
            raise TypeError(f"config is {config!r}; expected a NetworkDeconvConfig")
        self.config = config
        limit = config.conv_block_size if isinstance(self, nn.Conv2d) else config.linear_block_size
        reference = config.mode == "reference"
        if reference and groups > 1:
            block = channels  # the authors keep one matrix per group, whatever the block size
        else:
            block = (channels_per_block_reference if reference else channels_per_block)(channels, limit)
        self.num_blocks = channels // block
        # The authors interleave (channel, tap) features over blocks in convolutions, not in linear layers.
        self.interleaved = reference and isinstance(self, nn.Conv2d)
        self._shape = groups, self.num_blocks, block, taps
        held = config.mode == "fast" and isinstance(self, nn.Linear)
        self.register_buffer("gain", self.weight.new_ones((), dtype=torch.float32) if held else None)
        self._held = 1.0  # what ``gain`` is to be where it was not loaded
        #: Fast mode: added to the step count, so that the layers of a network refresh on different steps.
        self.refresh_offset = 0
        self._register()
        # On small maps whitened taps of depthwise layers make networks train worse, on large ones no better.
        self._start_anew(decorrelates=config.mode != "fast" or groups == 1 or channels > 1)

    def _register(self) -> None:
        """Give the layer a number, every copy its own, by which compiled code finds it.

        It is a tensor, so that layers of one shape can share that code. Under a compiled
        `torch.func.functional_call` running values go to the layer itself, not into the buffers passed.
        """
        number = next(NUMBERS)
        self._number = torch.tensor(number, device="cpu")
        LAYERS[number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Whitened:
        # What copying does anyway; but torch's parametrizations give a class that has no `__deepcopy__` one
        # that skips `__setstate__`.
        copied = self.__new__(type(self))
        memo[id(self)] = copied
        # A compiled call would run the original layer.
        state = {key: value for key, value in self.__dict__.items() if key != "_compiled_call_impl"}
        copied.__setstate__(copy.deepcopy(state, memo))
        return copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._register()
        self._step = self.refresh_now = self._folding_matrix = None

    @property
    def decorrelates(self) -> bool:
        """Whether correlation is whitened. In fast mode depthwise layers only standardise, unless
        `decorrelate` was called or a state from before that rule was loaded.
        """
        return self.running_whitening is not None

    def decorrelate(self, on: bool) -> None:
        """Whiten correlation, or only standardise (fast mode). Running values are as before the first batch.

        Raises:
            ValueError: exact and reference mode have nothing but the whitening.
        """
        if not on and self.config.mode != "fast":
            raise ValueError(f"{self.config.mode} mode cannot do without whitening; mode='fast' can")
        self._start_anew(on)

    def reset_running_stats(self) -> None:
        """Running values as before the first batch: mean zero, scale one, whitening identity."""
        self._start_anew(self.decorrelates)

    @torch.inference_mode(False)  # or nothing could be written into the buffers later
    def _start_anew(self, decorrelates: bool) -> None:
        groups, blocks, block, taps = self._shape
        features = block * taps
        # Not made from the weight, which may be sharded over processes; each has the whole statistics.
        like = torch.empty((), dtype=_at_least_float32(self.weight.dtype), device=self.weight.device)
        counter = torch.tensor(0, device=self.weight.device)
        identity = None
        if decorrelates:
            identity = torch.eye(features, dtype=like.dtype, device=like.device).repeat(groups, 1, 1)
        if self.config.mode == "fast":
            channels = groups * blocks * block
            mean, var = like.new_zeros(channels), like.new_full((channels,), 1 - self.config.eps)
            self.register_buffer("running_moments", torch.stack((mean, var)))
            self.register_buffer("running_cov", None if identity is None else torch.zeros_like(identity))
            self.register_buffer("cov_samples", like.new_ones(()) if decorrelates else None)
            self.register_buffer("num_refreshes", counter.clone() if decorrelates else None)
        else:
            means = 1 if self.config.mode == "reference" else blocks
            self.register_buffer("running_mean", like.new_zeros(groups, means, features))
        self.register_buffer("running_whitening", identity)
        self.register_buffer("num_batches_tracked", counter)
        # Fast mode: num_batches_tracked as a number, because reading the tensor would wait for the device,
        # beside the tensor it was read from, because `torch.func.functional_call` brings others. None where
        # the buffers may have been written: by DistributedDataParallel, or by averaging of weights.
        self._step = self.refresh_now = self._folding_matrix = None

    def reset_parameters(self) -> None:
        """New weights, and running values as before the first batch."""
        super().reset_parameters()  # type: ignore[misc]
        if hasattr(self, "_shape"):  # not yet while the torch layer constructs itself
            self.reset_running_stats()
            if self.gain is not None:
                self.gain.fill_(self._held)

    def train(self, mode: bool = True) -> Whitened:
        if mode != self.training:
            self._step = self.refresh_now = None
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Whitened:
        """As on any module, but running values stay in float32 or wider where the weights become narrower."""
        running = {id(buffer) for buffer in self.buffers(recurse=False)}

        def apply(tensor: Tensor) -> Tensor:
            out: Tensor = fn(tensor)
            if id(tensor) not in running or not out.is_floating_point():
                return out
            wide = _at_least_float32(out.dtype)
            return out if out.dtype == wide else tensor.to(out.device, wide)

        super()._apply(apply, recurse)
        if self._folding_matrix is not None and self._folding_matrix.device != self.running_whitening.device:
            self._folding_matrix = self.refresh_now = None
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        """As on any module. In fast mode a layer decorrelates if the state's did: once depthwise ones did."""
        if self.config.mode == "fast" and f"{prefix}running_moments" in state:
            decorrelates = f"{prefix}running_whitening" in state
            if decorrelates != self.decorrelates:
                self.decorrelate(decorrelates)
        if self.gain is not None and f"{prefix}running_moments" in state:
            like = state[f"{prefix}running_moments"]
            state.setdefault(f"{prefix}gain", like.new_ones((), dtype=torch.float32))  # from before the rule
        super()._load_from_state_dict(state, prefix, *args)
        for name, buffer in self.named_buffers(recurse=False):
            if buffer.is_floating_point():  # `assign=True` brings what was saved in fewer bits
                setattr(self, name, buffer.to(_at_least_float32(buffer.dtype)))
        self._step = self.refresh_now = None

    def _sample(self, x: Tensor, every: tuple[int, int], first: tuple[Any, Any] | None = None) -> Tensor:
        """Rows of features, (N, G·K·F) in float32 or wider, on a grid of output positions ``every`` rows and
        columns apart. It starts in the corner, or at row and column ``first`` (numbers or tensors less than
        ``every``), in which case N does not depend on ``first``.
        """
        raise NotImplementedError

    def _positions(self, x: Tensor) -> tuple[int, int]:
        """Output rows and columns for an input."""
        raise NotImplementedError

    def _batched(self, input: Tensor) -> Tensor:
        """The input as (n, C, ...); ValueError if its shape is not what the layer takes."""
        raise NotImplementedError

    def _share_of_zeros(self, x: Tensor) -> float:
        """The share of padding zeros among all values that patches of ``x`` hold."""
        raise NotImplementedError

    def whiten(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight and bias of the plain layer that computes what this one does for ``x`` (n, C, ...).

        In training from the statistics of ``x``, and the running values are updated. In evaluation, and for a
        batch with a single sample for every mean, which has no covariance, from the running values. The input
        is ``x``, made part of the gradient of its own statistics in fast mode.

        Raises:
            ValueError: in training, an input of another type than the weight, which autocast does not mend.
            RuntimeError: where a training step would silently go wrong: a replica of DataParallel, or an
                empty batch while other processes have one.
        """
        if not self.training:
            return x, *self.folded_parameters()
        if getattr(self, "_is_replica", False) and self.config.mode == "fast":
            raise RuntimeError(
                "network deconvolution does not train under torch.nn.DataParallel, whose replicas lose what "
                "they measure; use torch.nn.parallel.DistributedDataParallel"
            )
        like = self.weight if self.bias is None else self.bias  # a parametrized weight is computed when read
        if x.dtype != like.dtype and not _autocasts(x):  # before it spoils running values
            raise ValueError(
                f"an input of {x.dtype} for a layer of {like.dtype}; convert one of them, as with "
                f"x.to({like.dtype})"
            )
        if x.numel() == 0:
            if world_size() > 1:  # the others would wait for this process's statistics
                raise RuntimeError(
                    f"an empty batch, {tuple(x.shape)}, on one of {world_size()} processes that take the "
                    "statistics of all their images; give every process at least one"
                )
            return x, *self.folded_parameters()
        if self.config.mode == "fast":
            return self._whiten_fast(x)
        mean, cov, rows = self.moments(x)
        if rows * self.num_blocks <= mean.shape[1]:  # one sample for every mean
            return x, *self.folded_parameters()
        whitening = self.whitening_from(cov)
        if not _recomputing():
            self._update_running(mean, whitening, self.config.momentum)
        return x, *self._fold(whitening, mean, None)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take the statistics of ``x`` into the running values, weighted as every batch before."""
        x = self._batched(x).to(_at_least_float32(self.weight.dtype))
        if x.numel() == 0:
            return
        with no_autocast(x):
            if self.config.mode == "fast":
                _, moments, samples = self._channel_moments(x)
                self._pool_moments(moments, self._share_of_zeros(x))
                if self.decorrelates:
                    self._refresh(x, self.running_moments, samples, self._steps_taken() - 1, None)
                return
            mean, cov, rows = self.moments(x)
            if rows * self.num_blocks > mean.shape[1]:
                self._update_running(mean, self.whitening_from(cov), None)

    @torch.no_grad()
    def adopt_running_values(self, other: Whitened) -> None:
        """Take over the running values of a layer of the same kind, and rewrite weight and bias so that this
        layer computes in evaluation what it did before.

        Raises:
            ValueError: the other has another mode or other shapes, or this layer has no bias.
        """
        mine, theirs = ({k: tuple(v.shape) for k, v in x.named_buffers()} for x in (self, other))
        if mine != theirs:
            raise ValueError(f"the running values of the other layer are {theirs}; expected {mine}")
        if self.bias is None:
            raise ValueError("a layer without a bias cannot take over running values; give it one of zeros")
        weight, bias = self.folded_parameters()
        for name, buffer in other.named_buffers():
            getattr(self, name).copy_(buffer)
        self._step = self.refresh_now = None
        mean, scale = self.running_mean_and_scale()
        weight, bias = unfold_whitening(
            weight, bias, self.running_whitening, mean, self.num_blocks, self.interleaved, scale
        )
        self.weight.copy_(weight if self.gain is None else weight / self.gain)
        self.bias.copy_(bias)

    @torch.no_grad()
    def patches(self, x: Tensor, at_least: int) -> Tensor:
        """What the layer reads at evenly spread positions of ``x``, (N, G, K, F): at least ``at_least``
        patches and not many more, or all there are.
        """
        x = self._batched(x)
        every = self._grid(x, at_least, len(x))
        first = every[0] // 2, every[1] // 2  # the corner is mostly padding
        rows = self._sample(x, every, first).unflatten(1, (self._shape[0], -1))
        rows = rows[:: max(len(rows) // max(at_least, 1), 1)]  # a linear layer's are on no grid
        return to_blocks(rows, self.num_blocks, self.interleaved)

    @torch.no_grad()
    def whitened(self, patches_NGKF: Tensor) -> Tensor:
        """`patches` as evaluation whitens them, (x - μ) s D. The layer itself has D and s in its weights."""
        mean_GKF, scale_GKF = self.running_mean_and_scale()
        centred = patches_NGKF - mean_GKF
        if scale_GKF is not None:
            centred = centred * scale_GKF
        if self.running_whitening is None:
            return centred
        return (centred.unsqueeze(-2) @ self.running_whitening.unsqueeze(1)).squeeze(-2)

    def folded_parameters(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the plain layer this layer is in evaluation."""
        whitening, (mean, scale) = self.running_whitening, self.running_mean_and_scale()
        # A training step may write into running values before the backward pass. Traces have the copies too,
        # because torch.jit checks them with gradients off.
        if torch.is_grad_enabled() or torch.jit.is_tracing():
            mean = mean.clone()
            if whitening is not None:
                whitening = whitening.clone()
        return self._fold(whitening, mean, scale)

    def running_mean_and_scale(self) -> tuple[Tensor, Tensor | None]:
        """What evaluation subtracts from every feature and, in fast mode, multiplies it by, (G, K, F)."""
        if self.config.mode != "fast":
            return self.running_mean, None
        return self._mean_and_scale(self.running_moments)

    def _mean_and_scale(self, moments_2C: Tensor) -> tuple[Tensor, Tensor]:
        groups, blocks, block, taps = self._shape
        return mean_and_scale(moments_2C, groups, blocks, block * taps, self.config.eps)

    def _fold(self, whitening: Tensor | None, mean: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        with no_autocast(self.weight):
            return fold_whitening(
                *self._weight_and_bias(), whitening, mean, self.num_blocks, self.interleaved, scale
            )

    def _weight_and_bias(self) -> tuple[Tensor, Tensor]:
        weight = self.weight if self.gain is None else self.weight * self.gain
        return weight, self.weight.new_zeros(len(weight)) if self.bias is None else self.bias

    # Exact and reference mode: batch statistics of the patches, with gradient.

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean (G, K, F), covariance (G, F, F) and number of sampled rows N of one batch, over all ranks."""
        with no_autocast(x):
            every = self.sampling_stride(x)
            rows = self._sample(x, (every, every))
            patches = to_blocks(rows.unflatten(1, (self._shape[0], -1)), self.num_blocks, self.interleaved)
            mean, cov = patch_moments(patches.permute(1, 2, 0, 3), self.config.mode == "reference")
            if world_size() > 1:
                wide = mean.double()
                outer = wide.mT @ wide / mean.shape[1]
                (wide, second), total = mean_over_ranks(len(rows), wide, cov + outer)
                mean, cov = wide.to(mean.dtype), (second - wide.mT @ wide / mean.shape[1]).to(cov.dtype)
                return mean, cov, int(total)
        return mean, cov, len(rows)

    def sampling_stride(self, x: Tensor) -> int:
        """How many output positions apart patches are sampled: ``config.sampling_stride``, or less where that
        would leave fewer than eight samples per feature and a smaller stride has more to offer. Ranks agree,
        because the images of all count.
        """
        every = self.config.sampling_stride
        if self.config.mode == "reference" or every == 1:
            return every
        wanted = _SAMPLES_PER_FEATURE * self.running_whitening.shape[-1] / self.num_blocks
        images = int(sum_over_ranks(torch.tensor(len(x), device=x.device))) if world_size() > 1 else len(x)
        height, width = self._positions(x)
        while every > 1 and images * math.ceil(height / every) * math.ceil(width / every) < wanted:
            every -= 1
        return every

    def _grid(self, x: Tensor, wanted: float, images: int) -> tuple[int, int]:
        """Rows and columns apart, the widest grid with ``wanted`` samples of ``images``, or all positions."""
        height, width = self._positions(x)
        every = 1, 1
        for n in range(2, 2 * max(height, width)):  # 2x1, 2x2, 3x2, ...
            down, right = min(n // 2 + 1, height), min((n + 1) // 2, width)
            if images * (height // down) * (width // right) < wanted:
                break
            every = down, right
        return every

    def whitening_from(self, cov_GFF: Tensor) -> Tensor:
        """The whitening matrices (G, F, F) of covariances, by this layer's settings."""
        with no_autocast(cov_GFF):
            return inverse_sqrt(cov_GFF, self.config.eps, self.config.num_iters)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, whitening: Tensor, momentum: float | None) -> None:
        # Tensor arithmetic throughout: a Python branch on NaN would make every step wait for the device.
        finite = mean.isfinite().all() & whitening.isfinite().all()
        self.num_batches_tracked.add_(finite)
        if self.config.mode == "reference" and momentum is not None:
            step = torch.full_like(self.num_batches_tracked, momentum, dtype=self.running_mean.dtype)
        else:
            step = _step_size(momentum, self.num_batches_tracked.clamp(min=1).to(self.running_mean.dtype))
        _lerp_(self.running_mean, mean, step, finite)
        _lerp_(self.running_whitening, whitening, step, finite)

    # Fast mode: channel statistics of the batch, with gradient; correlation from running values, without.

    def _whiten_fast(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.numel() == x.shape[1] and world_size() == 1:
            return x, *self.folded_parameters()
        outside = self.refresh_now is None or (self.refresh_now and world_size() > 1)
        # Inside torch.compile, torch 2.11 says that it exports.
        exports = outside and not torch.compiler.is_dynamo_compiling() and is_exporting()
        if torch.jit.is_tracing() or exports:
            raise RuntimeError(
                "network deconvolution is exported or traced in evaluation or folded; a graph for training "
                "would leave out the whitening"
            )
        out = _low_precision(x)
        low_precision = out if self._pays_in_low_precision() else None
        matrix = None
        with no_autocast(x):
            x, moments, samples = self._channel_moments(x)
            if torch.compiler.is_compiling() and outside:
                running, refreshed = track_outside_graph(
                    x.detach(),
                    moments.detach(),
                    samples if isinstance(samples, Tensor) else None,
                    self.running_moments,
                    self.running_whitening,
                    self._number,
                )
                whitening = refreshed if self.decorrelates else None
            else:
                self._track(x.detach(), moments.detach(), samples)
                running, whitening = self.running_moments, self.running_whitening
                if torch.compiler.is_compiling() and low_precision is not None:
                    matrix = self._folding_matrix
            moments = self._with_prior(moments, samples, running)
            if torch.compiler.is_compiling() and running is self.running_moments:
                moments = snapshot(moments)
            weight, bias = standardise_and_fold(
                *self._weight_and_bias(),
                moments,
                whitening,
                self.num_blocks,
                self.config.eps,
                low_precision,
                out,
                matrix,
            )
        return x, weight, bias

    def _pays_in_low_precision(self) -> bool:
        _, blocks, block, taps = self._shape  # and not the weight, which may be a computed one
        outputs: Any = self.out_channels if isinstance(self, nn.Conv2d) else self.out_features
        on_cuda = self.num_batches_tracked.is_cuda
        pays = _LOW_PRECISION_PAYS_ON_CUDA if on_cuda else _LOW_PRECISION_PAYS
        return self.decorrelates and bool(outputs * blocks * (block * taps) ** 2 >= pays)

    def keep_folding_matrix(self, dtype: torch.dtype | None) -> None:
        """Have compiled steps under a `RefreshSchedule` read the whitening matrix as `folding_matrix` of this
        type, if it is what they compute in.
        """
        if dtype != torch.bfloat16 or not self._pays_in_low_precision():
            self._folding_matrix = None
        else:
            if self._folding_matrix is None:
                self._folding_matrix = torch.empty_like(self.running_whitening, dtype=dtype)
            self.update_folding_matrix()

    @torch.no_grad()
    def update_folding_matrix(self, if_older: bool = False) -> None:
        """Make it from the present whitening matrix, with ``if_older`` only if that has changed since."""
        if self._folding_matrix is None:
            return
        version = self.running_whitening._version
        if if_older and version == self._matrix_version:
            return
        self._matrix_version = version
        dtype = self._folding_matrix.dtype  # in place: graphs read it where it is
        self._folding_matrix.copy_(folding_matrix(self.running_whitening, self._shape[-1], dtype))

    def _channel_moments(self, x: Tensor) -> tuple[Tensor, Tensor, Any]:
        """``x``, its moments and how many values a channel has, over all ranks."""
        zeros, samples = self._share_of_zeros(x), x.numel() // x.shape[1]
        if world_size() == 1:
            return *channel_moments(x, zeros), samples
        x, moments = channel_moments(x)
        mean, var = moments.double()
        share = mean.new_tensor(zeros)  # a tensor, because ranks may have maps of different sizes
        (mean, second, share), total = mean_over_ranks(samples, mean, var + mean.square(), share)
        var = (1 - share) * (second - mean.square()) + share * mean.square()
        return x, torch.stack((mean, var)).to(moments.dtype), total

    def _with_prior(self, moments: Tensor, samples: Any, running: Tensor) -> Tensor:
        """The moments of a batch with the running ones counted in as ``_PRIOR_SAMPLES`` samples."""
        trust = 1 / (1 + _PRIOR_SAMPLES / samples)
        if isinstance(trust, Tensor):
            trust = trust.to(moments.dtype)
        return torch.lerp(running, moments, trust)

    def _track(self, x: Tensor, moments: Tensor, samples: Any) -> None:
        """Take a batch into the running moments and, when it is its turn, its correlation into the whitening.

        Skipped when activation checkpointing recomputes the forward pass, which then gives the same result if
        the layer is called once before the backward pass.
        """
        if _recomputing():
            return
        self._update_moments(moments, self.config.momentum)
        turn: Any
        due = self.refresh_now
        if due is None:
            step = self._steps_taken() - 1
            turn = step + self.refresh_offset
            due = is_due(step, self.config.refresh_every, self.refresh_offset)
        else:  # a number would be part of the graph
            turn = self.num_batches_tracked - 1 + self.refresh_offset
        if self.decorrelates and due:
            moments = self._with_prior(moments, samples, self.running_moments)
            self._refresh(x, moments, samples, turn, self.config.momentum)

    @torch.no_grad()
    def _update_moments(self, moments: Tensor, momentum: float | None) -> None:
        if self.refresh_now is None:
            count: Any = self._steps_taken() + 1
            self._step = self.num_batches_tracked, count
        else:
            count = self.num_batches_tracked.to(moments.dtype) + 1
        self.num_batches_tracked.add_(1)  # finite or not: the schedule counts steps
        finite = (moments.abs() < math.inf).all()  # false where one is NaN
        _lerp_(self.running_moments, moments, _step_size(momentum, count), finite)

    @torch.no_grad()
    def _pool_moments(self, moments: Tensor, zeros: float) -> None:
        """Make the running moments those of all batches so far, with this one, as if they were a single batch
        and all of one size. The mean of their variances would leave out the variance between batches, which
        is all there is in batches of one.
        """
        share = 1 / (self._steps_taken() + 1)
        apart = (moments[0] - self.running_moments[0]).square() * (share * (1 - share) * (1 - 2 * zeros))
        apart = torch.where((moments.abs() < math.inf).all(), apart, 0)
        self._update_moments(moments, None)
        mean, var = self.running_moments
        torch.maximum(var + apart, zeros * mean.square(), out=var)  # less only if batches differ in `zeros`

    def _steps_taken(self) -> int:
        if self._step is None or self._step[0] is not self.num_batches_tracked:
            return 0 if self.num_batches_tracked.is_meta else int(self.num_batches_tracked)
        return self._step[1]

    @torch.no_grad()
    def _refresh(self, x: Tensor, moments: Tensor, samples: Any, turn: Any, momentum: float | None) -> None:
        """Take second moments of standardised patches into ``running_cov`` and, outside of the training steps
        of a `RefreshSchedule`, refresh the whitening.
        """
        groups, blocks, block, taps = self._shape
        wanted = max(_SAMPLES_PER_FEATURE * block * taps, _FEWEST_SAMPLES) / blocks
        images = int(samples) * x.shape[1] // x[0].numel()  # over all ranks
        every = self._grid(x, wanted, images)
        # A grid that always starts in the corner sees too much padding. Fractions of a two-dimensional
        # golden ratio spread its start evenly, and depend on nothing but the step.
        turn = turn.double() if isinstance(turn, Tensor) else turn
        first = tuple(
            _whole(turn * share % 1 * n) for share, n in zip((0.7548777, 0.5698403), every, strict=True)
        )
        patches = self._sample(x, every, first).unflatten(1, (groups, blocks, -1))
        mean, scale = self._mean_and_scale(moments)
        patches_GNF = ((patches - mean) * scale).transpose(0, 1).flatten(1, 2)
        rows = patches_GNF.shape[1]
        cov = patches_GNF.transpose(1, 2) @ patches_GNF / rows
        if world_size() > 1:
            (mean_cov,), total = mean_over_ranks(rows, cov)
            cov, rows = mean_cov.to(cov.dtype), total.to(cov.dtype)
        finite = cov.isfinite().all()
        self.num_refreshes.add_(finite)
        step = _step_size(momentum, self.num_refreshes.clamp(min=1).to(self.running_cov.dtype))
        _lerp_(self.running_cov, cov, step, finite)
        # The variance of a weighted mean of independent samples, as a number of equally weighted ones.
        counted = 1 / ((1 - step).square() / self.cov_samples + step.square() / rows)
        self.cov_samples.copy_(torch.where(finite, counted, self.cov_samples))
        if self.refresh_now is not None and momentum is not None:
            return
        whitening = shrunk_inverse_sqrt(self.running_cov, self.cov_samples)
        whitening = torch.where(self.num_refreshes > 0, whitening, self.running_whitening)
        if self.refresh_now is not None:  # graphs read it where it is
            self.running_whitening.copy_(whitening)
            self.update_folding_matrix()
            return
        # A new tensor: a forward pass before this one may still need the old one for its backward pass.
        with torch.inference_mode(False):
            refreshed = torch.empty_like(self.running_cov)
        self.running_whitening = refreshed.copy_(whitening)


def _whole(number: Any) -> Any:
    return number.long() if isinstance(number, Tensor) else int(number)


def is_due(step: int, refresh_every: int, offset: int = 0) -> bool:
    """Fast mode: whether the step after ``step`` steps refreshes the whitening."""
    interval = min(refresh_every, max(step // _STEPS_AN_INTERVAL, 1))
    return (step + offset) % interval == 0


def _step_size(momentum: float | None, count: Any) -> Any:
    """The weight of batch number ``count``, a number or tensor: the first counts in full, as with Adam's bias
    correction. Without a momentum all batches count equally.
    """
    return 1 / count if momentum is None else momentum / (1 - (1 - momentum) ** count)


def _lerp_(running: Tensor, batch: Tensor, step: Tensor | float, finite: Tensor) -> None:
    running.lerp_(torch.where(finite, batch.to(running.dtype), running), step)


class WhitenedConv2d(Whitened, nn.Conv2d):
    """`torch.nn.Conv2d` that whitens the patches it reads, in blocks of ``config.block_size`` whole channels.

    Takes and returns what Conv2d does: (n, C, H, W) to (n, O, Ho, Wo). ``stride``, ``padding`` and
    ``dilation`` may be changed after construction, as on the torch layer.

    Raises, when called:
        ValueError: the input has other channels, is smaller than the kernel or the padding that reflects or
            repeats it, or, in training, is of another type than the weight.
        RuntimeError: see `Whitened.whiten`.

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
        """Whiten an existing convolution: its Parameters are reused, a missing bias is added as zeros.

        Raises:
            TypeError: it is no Conv2d, or whitened already.
        """
        if not isinstance(conv, nn.Conv2d) or isinstance(conv, Whitened):
            raise TypeError(f"{type(conv).__name__} cannot be whitened; expected a plain Conv2d")
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

    def _batched(self, input: Tensor) -> Tensor:
        x = input if input.ndim == 4 else input[None]
        if x.ndim != 4 or x.shape[1] != self.in_channels or min(self._positions(x)) < 1:
            raise ValueError(
                f"an input of shape {tuple(input.shape)} for a {tuple(self.kernel_size)} convolution of "
                f"{self.in_channels} channels; expected (n, {self.in_channels}, height, width), a map no "
                "smaller than the kernel"
            )
        if self.padding_mode in ("reflect", "circular"):
            left, right, top, bottom = self._padding_lrtb(x)
            rows, columns = max(top, bottom), max(left, right)
            if min(x.shape[2] - rows, x.shape[3] - columns) < (self.padding_mode == "reflect"):
                raise ValueError(
                    f"an input of shape {tuple(input.shape)} is too small for {self.padding_mode} padding of "
                    f"{rows} rows and {columns} columns"
                )
        return x

    def _sample(self, x: Tensor, every: tuple[int, int], first: tuple[Any, Any] | None = None) -> Tensor:
        sy, sx = _pair(self.stride)
        if first is not None:
            grid = [
                (torch.arange(count // apart, device=x.device) * apart + start) * stride
                for count, apart, start, stride in zip(
                    self._positions(x), every, first, (sy, sx), strict=True
                )
            ]
            return patches_at(
                x,
                grid[0],
                grid[1],
                self.kernel_size,
                _pair(self.dilation),
                self._padding_lrtb(x),
                self.padding_mode,
            )
        if self.config.mode == "reference" and self.kernel_size == (1, 1):
            # The authors skip along flattened rows here, over image borders.
            rows = x.to(_at_least_float32(x.dtype)).permute(0, 2, 3, 1).flatten(0, 2)
            return rows[:: (every[0] * sy) ** 2]
        return sample_patches(
            x,
            self.kernel_size,
            _pair(self.dilation),
            self._padding_lrtb(x),
            self.padding_mode,
            (every[0] * sy, every[1] * sx),
        )

    def _positions(self, x: Tensor) -> tuple[int, int]:
        left, right, top, bottom = self._padding_lrtb(x)
        outputs = []
        for axis, pad in enumerate((top + bottom, left + right)):
            reach = _pair(self.dilation)[axis] * (self.kernel_size[axis] - 1)
            outputs.append((x.shape[axis - 2] + pad - reach - 1) // _pair(self.stride)[axis] + 1)
        return outputs[0], outputs[1]

    def _share_of_zeros(self, x: Tensor) -> float:
        if self.padding_mode != "zeros":
            return 0.0
        left, _, top, _ = self._padding_lrtb(x)
        inside = 1.0
        for axis, (windows, before) in enumerate(zip(self._positions(x), (top, left), strict=True)):
            size, kernel = x.shape[axis - 2], self.kernel_size[axis]
            inside *= _share_inside(
                size, windows, before, kernel, _pair(self.dilation)[axis], _pair(self.stride)[axis]
            )
        return 1 - inside

    def forward(self, input: Tensor) -> Tensor:  # named as on the torch layer
        batched, weight, bias = self.whiten(self._batched(input))
        padding = self.padding
        if self.padding_mode != "zeros" or (padding == "same" and max(_pair(self.stride)) > 1):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            batched, padding = F.pad(batched, self._padding_lrtb(batched), mode=mode), 0
        out = F.conv2d(batched, weight, bias, self.stride, padding, self.dilation, self.groups)
        return out if input.ndim == 4 else out[0]


class WhitenedLinear(Whitened, nn.Linear):
    """`torch.nn.Linear` that whitens the features it reads, in blocks of ``config.linear_block_size``.

    Takes and returns what Linear does: (..., C) to (..., O); every row is a sample.

    Raises, when called:
        ValueError: the input has other features, or, in training, another type than the weight.
        RuntimeError: see `Whitened.whiten`.

    Source: arXiv 1905.11926, algorithm 1 and section 3.3.
    """

    def __init__(self, *args: Any, config: NetworkDeconvConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._init_whitening(config or NetworkDeconvConfig(), self.in_features, groups=1, taps=1)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: NetworkDeconvConfig | None = None) -> WhitenedLinear:
        """Whiten an existing linear layer: its Parameters are reused, a missing bias is added as zeros."""
        return _adopt(cls(linear.in_features, linear.out_features, config=config, device="meta"), linear)

    @torch.no_grad()
    def hold_back(self, keep_function: bool) -> None:
        """In fast mode, let a layer of more than 128 features learn no faster than one of 128: its weight is
        multiplied by ``gain``, so that steps of SGD change what it computes by the square of that.
        ``keep_function`` makes a new weight, divided by it; without, outputs start smaller.
        """
        held = min(1.0, math.sqrt(_FULL_RATE_FEATURES / self.in_features))
        if self.gain is None or held == self._held:
            return
        self._held = held
        before = self.gain.clone()
        self.gain.fill_(held)
        if keep_function:
            self.weight = nn.Parameter(self.weight * before / self.gain, self.weight.requires_grad)

    def to_linear(self) -> nn.Linear:
        """The plain linear layer that computes what this layer does in evaluation."""
        return _give(self, nn.Linear(self.in_features, self.out_features, device="meta"))

    def _batched(self, input: Tensor) -> Tensor:
        if input.shape[-1] != self.in_features:
            raise ValueError(
                f"an input of shape {tuple(input.shape)} for a linear layer of {self.in_features} features; "
                f"expected (..., {self.in_features})"
            )
        return input.reshape(-1, self.in_features)

    def _sample(self, x: Tensor, every: tuple[int, int], first: tuple[Any, Any] | None = None) -> Tensor:
        return x.to(_at_least_float32(x.dtype))

    def _positions(self, x: Tensor) -> tuple[int, int]:
        return 1, 1

    def _share_of_zeros(self, x: Tensor) -> float:
        return 0.0

    def forward(self, input: Tensor) -> Tensor:
        rows, weight, bias = self.whiten(self._batched(input))
        return F.linear(rows, weight, bias).view(*input.shape[:-1], self.out_features)


def _share_inside(size: int, windows: int, before: int, kernel: int, dilation: int, stride: int) -> float:
    """Along one axis, the share of the taps of all windows that fall on data, not on padding."""
    inside = 0
    for tap in range(kernel):
        start = tap * dilation - before  # in the first window
        first, last = max(-(start // stride), 0), min((size - 1 - start) // stride, windows - 1)
        inside += max(last - first + 1, 0)
    return inside / max(windows * kernel, 1)


def _adopt(layer: Any, plain: Any) -> Any:
    """Give the whitened ``layer`` the Parameters, place, precision and mode of the ``plain`` one."""
    layer.weight = plain.weight
    if plain.bias is not None:
        layer.bias = plain.bias
    else:
        zeros = plain.weight.new_zeros(len(plain.weight))
        layer.bias = nn.Parameter(zeros, requires_grad=plain.weight.requires_grad)
    if layer.gain is not None:
        layer.gain = layer.gain.new_ones((), device=plain.weight.device)  # it was on meta
    layer.reset_running_stats()
    return layer.train(plain.training)


def _give(layer: Any, plain: Any) -> Any:
    """Give the ``plain`` layer the folded parameters, place, precision and mode of the whitened one."""
    weight, bias = layer.folded_parameters()
    plain.weight = nn.Parameter(weight.detach(), requires_grad=layer.weight.requires_grad)
    plain.bias = nn.Parameter(bias.detach(), requires_grad=layer.weight.requires_grad)
    return plain.train(layer.training)
