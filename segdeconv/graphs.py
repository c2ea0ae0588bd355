"""Training steps as CUDA graphs: one launch instead of a thousand.

On a fast GPU a small network waits for the launches of its many small kernels, not for the arithmetic
(docs/whitening.md counts them). A CUDA graph holds them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from segdeconv.errors import UserError, first_line
from segdeconv.schedule import RefreshSchedule


@dataclass
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    loss: Tensor
    grads: list[Tensor | None]


class StepGraphs:
    """Forward, loss and backward pass of a training step, recorded and replayed.

    Of every shape there are two graphs, that of steps which measure correlation (see `RefreshSchedule`) and
    that of the others. The first step of each runs as it would without graphs, the second is recorded.
    Batches of another shape run as they would too, once. The gradients are the same tensors after every
    replay.

    Args:
        model: on the GPU, past loading of its state, in one process.
        compute: ``compute(images, targets)`` sets the gradients anew and returns the loss, a scalar. It must
            not wait for the device.

    Raises:
        UserError: ``compute`` waits for the device, or does something else that a CUDA graph cannot hold;
            from the second batch of a shape on, which is recorded.
    """

    def __init__(self, model: nn.Module, compute: Callable[..., Tensor]) -> None:
        self.compute = compute
        self.parameters = list(model.parameters())
        self.refreshes = RefreshSchedule(model)
        self.seen: set[Any] = set()
        self.recorded: dict[Any, _Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.device = self.parameters[0].device
        self.stream = torch.cuda.Stream(self.device)

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of one step, whose gradients the parameters then have."""
        with torch.cuda.device(self.device):  # streams and graphs are the current device's
            return self._step(*batch)

    def _step(self, *batch: Tensor) -> Tensor:
        key = self.refreshes.step(), *(tensor.shape for tensor in batch)
        if key not in self.seen:
            self.seen.add(key)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # as a recording demands of what runs before it
                loss = self.compute(*batch).detach()
            torch.cuda.current_stream().wait_stream(self.stream)
            return loss
        if key not in self.recorded:
            self.recorded[key] = self._record(batch)
        step = self.recorded[key]
        for place, tensor in zip(step.inputs, batch, strict=True):
            place.copy_(tensor, non_blocking=True)
        step.graph.replay()
        for parameter, grad in zip(self.parameters, step.grads, strict=True):
            parameter.grad = grad
        return step.loss.clone()

    def _record(self, batch: tuple[Tensor, ...]) -> _Recorded:
        inputs = tuple(tensor.clone() for tensor in batch)
        for parameter in self.parameters:
            parameter.grad = None
        graph = torch.cuda.CUDAGraph()
        try:  # thread_local, because other threads may pin memory meanwhile
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                loss = self.compute(*inputs).detach()
        except RuntimeError as error:
            # A recording that failed cannot be ended either: that is the last error, and says less.
            cause = error if error.__suppress_context__ else error.__context__ or error
            if torch.OutOfMemoryError in (type(error), type(cause)):
                raise torch.OutOfMemoryError from error
            raise UserError(
                f"train.cuda_graphs: this network's training step cannot be recorded ({first_line(cause)}); "
                "set it to false"
            ) from error
        return _Recorded(graph, inputs, loss, [parameter.grad for parameter in self.parameters])
