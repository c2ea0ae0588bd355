"""When the layers of a network refresh their whitening, decided for all of them at once."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from segdeconv.layers import Whitened, is_due
from segdeconv.whitening import no_autocast, shrunk_inverse_sqrt

# Computed together, matrices launch fewer kernels, but take some eight times their memory meanwhile.
_NUMBERS_AT_ONCE = 2**21


class RefreshSchedule:
    """Which steps refresh the whitening of a network: all layers at once. For torch.compile and CUDA graphs.

    A layer that decides for itself does so in Python, outside the graphs of torch.compile, so every layer
    is a hole in them. With a schedule there are two graphs without holes: one measures the correlation of
    what the layers read, the other does not. The whitening matrices are computed from it before the next
    step, those of one size together; in a new network they are the identity until then.

        refreshes = RefreshSchedule(network)
        for images, targets in batches:
            refreshes.step()
            loss(network(images), targets).backward()

    Args:
        model: after its state is loaded: the number of steps it has made (the median over its layers) is
            read here, once. Layers in other modes have nothing to schedule.
        dtype: in which autocast computes; for a compiled network, which then need not bring the whitening
            matrices to it at every step. (Not for `torch.func.functional_call` with other buffers: the
            matrices are the network's own.)
        run: called as ``run(key, refresh)`` in place of ``refresh()``, which makes whitening matrices and is
            the same function for a key each time.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        run: Callable[[Any, Callable[[], None]], None] = lambda _, refresh: refresh(),
    ) -> None:
        self.dtype, self.run = dtype, run
        self.layers: dict[int, list[Whitened]] = defaultdict(list)
        for layer in model.modules():
            if isinstance(layer, Whitened) and layer.config.mode == "fast":
                self.layers[layer.config.refresh_every].append(layer)
        taken = [layer._steps_taken() for layer in itertools.chain(*self.layers.values())]
        self.steps = statistics.median_low(taken) if taken else 0

    def step(self) -> tuple[bool, ...]:
        """Before the forward pass of every training step. Whether it measures, by ``refresh_every``."""
        if self.steps:
            for every, layers in self.layers.items():
                if is_due(self.steps - 1, every):
                    self.run(every, functools.partial(_refresh, layers))
        due = tuple(is_due(self.steps, every) for every in self.layers)
        for now, layers in zip(due, self.layers.values(), strict=True):
            for layer in layers:
                if layer.refresh_now is not now:  # setting a module's attribute is slow
                    if layer.refresh_now is None:
                        layer.keep_folding_matrix(self.dtype)
                    layer.refresh_now = now
                    layer._step = None  # scheduled steps do not count in it
                layer.update_folding_matrix(if_older=True)
        self.steps += 1
        return due


def _refresh(layers: list[Whitened]) -> None:
    of_size = defaultdict(list)
    for layer in layers:
        if layer.decorrelates and layer.training:
            cov = layer.running_cov
            of_size[cov.shape[-1], cov.dtype, cov.device].append(layer)
    for same in of_size.values():
        at_once = max(_NUMBERS_AT_ONCE // max(layer.running_cov.numel() for layer in same), 1)
        for first in range(0, len(same), at_once):
            _refresh_together(same[first : first + at_once])


@torch.no_grad()
def _refresh_together(same: list[Whitened]) -> None:
    groups = [len(layer.running_cov) for layer in same]
    cov_GFF = torch.cat([layer.running_cov for layer in same])
    before_GFF = torch.cat([layer.running_whitening for layer in same])
    samples = torch.cat([x.cov_samples.expand(len(x.running_cov), 1, 1) for x in same])
    refreshes = torch.cat([x.num_refreshes.expand(len(x.running_cov), 1, 1) for x in same])
    with no_autocast(cov_GFF):
        whitening_GFF = shrunk_inverse_sqrt(cov_GFF, samples)
    whitening_GFF = whitening_GFF.where(refreshes > 0, before_GFF)  # the identity until measured
    for layer, matrices in zip(same, whitening_GFF.split(groups), strict=True):
        layer.running_whitening.copy_(matrices)  # in place: graphs read it where it is
        layer.update_folding_matrix()
