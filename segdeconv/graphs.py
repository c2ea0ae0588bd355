"""Training steps as CUDA graphs: one launch instead of a thousand.

On a fast GPU a small network waits for the launches of its many small kernels, not for the arithmetic
(docs/whitening.md counts them). A CUDA graph holds them all.
"""

from __future__ import annotations

import gc
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
    result: Any


class _Recordings:
    """Functions of tensors as CUDA graphs, by a key each, in memory that they share."""

    def __init__(self, device: torch.device) -> None:
        self.seen: set[Any] = set()
        self.recorded: dict[Any, _Recorded] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def run(self, key: Any, compute: Callable[..., Any], *inputs: Tensor) -> Any:
        """What ``compute`` returns: called the first time, recorded the second, replayed from then on, with
        its result in the same place each time.
        """
        if key not in self.seen:
            self.seen.add(key)
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # as a recording demands of what runs before it
                result = compute(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if key not in self.recorded:
            self.recorded[key] = self._record(compute, inputs)
        recorded = self.recorded[key]
        for place, tensor in zip(recorded.inputs, inputs, strict=True):
            place.copy_(tensor, non_blocking=True)
        recorded.graph.replay()
        return recorded.result

    def _record(self, compute: Callable[..., Any], inputs: tuple[Tensor, ...]) -> _Recorded:
        inputs = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # garbage that holds other graphs would end the recording when it is collected
        gc.disable()
        try:  # thread_local, because other threads may pin memory meanwhile
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                result = compute(*inputs)
        except RuntimeError as error:
            # Ending a recording that failed fails too: that error comes last, and says less.
            cause = error if error.__suppress_context__ else error.__context__ or error
            if torch.OutOfMemoryError in (type(error), type(cause)):
                raise torch.OutOfMemoryError from error
            raise UserError(
                f"train.cuda_graphs: this network's training step cannot be recorded ({first_line(cause)}); "
                "set it to false"
            ) from error
        finally:
            gc.enable()
        return _Recorded(graph, inputs, result)


class StepGraphs:
    """Forward, loss and backward pass of a training step, recorded and replayed.

    For every shape of batches there are two graphs: one of steps that measure correlation (see
    `RefreshSchedule`), one of the others; making the whitening matrices is a graph too. Each runs without a
    graph the first time and is recorded the second. From the first recording on the gradients are the same
    tensors in all steps.

    Args:
        model: on the GPU, past loading of its state, in one process. Which of its parts train must
            not change: no layer may be frozen or put into evaluation later.
        compute: ``compute(images, targets)`` adds to the gradients, which are cleared before, and returns the
            loss, a scalar. It must not wait for the device.
        dtype: see `RefreshSchedule`.

    Raises:
        UserError: ``compute`` waits for the device, or does something else that a CUDA graph cannot hold;
            from the second batch of a shape on, which is recorded.
    """

    def __init__(
        self, model: nn.Module, compute: Callable[..., Tensor], dtype: torch.dtype | None = None
    ) -> None:
        self.compute = compute
        self.parameters = list(model.parameters())
        self.grads: list[Tensor | None] = [None for _ in self.parameters]
        self.device = self.parameters[0].device
        self.recordings = _Recordings(self.device)
        self.refreshes = RefreshSchedule(model, dtype, self.recordings.run)

    def __call__(self, *batch: Tensor) -> Tensor:
        """The loss of one step, whose gradients the parameters then have."""
        with torch.cuda.device(self.device):  # streams and graphs are the current device's
            key = self.refreshes.step(), *(tensor.shape for tensor in batch)
            loss, used = self.recordings.run(key, self._compute, *batch)
            if key not in self.recordings.recorded:
                return loss
            for number, parameter in enumerate(self.parameters):
                parameter.grad = self.grads[number] if number in used else None
            return loss.clone()

    def _compute(self, *batch: Tensor) -> tuple[Tensor, set[int]]:
        """The loss, and the numbers of the parameters that have a gradient of this batch."""
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        if there := [grad for grad in self.grads if grad is not None]:
            torch._foreach_zero_(there)  # as optimizers do
        used: set[int] = set()
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: used.add(number))
            for number, parameter in enumerate(self.parameters)
            if parameter.requires_grad
        ]
        try:
            loss = self.compute(*batch).detach()
        finally:
            for hook in hooks:
                hook.remove()
        for number, parameter in enumerate(self.parameters):
            if number not in used:
                parameter.grad = None
            elif torch.cuda.is_current_stream_capturing():
                self.grads[number] = parameter.grad
        return loss, used
