"""Several processes that train one network, as torchrun starts them.

On torch.distributed alone: a run needs a process group, DistributedDataParallel's averaging of gradients and
one sum over the ranks, and a further library over these would hide where a collective happens. N processes
compute what one does with the whole batch: the layers' statistics, the loss and the loaders each see to that
themselves, with the functions of this file.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number; 0 without a process group. Only rank 0 writes files."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # Every rank's loss depends on every rank's values, so the gradients are summed as well.
        return _SumOverRanks.apply(grad)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The elementwise sum over all processes, differentiable.

    A loss made of such sums is the same on every rank. Each rank's gradient is then that of its own share
    times the number of ranks, which the average of DistributedDataParallel takes out again.
    """
    return _SumOverRanks.apply(values) if world_size() > 1 else values


def mean_over_ranks(count: int, *values: Tensor) -> tuple[list[Tensor], Tensor]:
    """The mean of each tensor over all processes, this one's weighted by ``count``: one all-reduce of eight
    bytes per number, differentiable.

    Returns:
        The means in float64, in which differences of second moments lose nothing, and the total count.
    """
    flat = torch.cat([value.double().flatten() for value in values]) * count
    total = sum_over_ranks(torch.cat((flat, flat.new_tensor([count]))))
    means = (total[:-1] / total[-1]).split([value.numel() for value in values])
    return [mean.view_as(value) for mean, value in zip(means, values, strict=True)], total[-1].detach()


def launched_by_torchrun() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_gpu() -> torch.device:
    """The GPU of this process, by its number among those that torchrun started on this machine."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def start(device: torch.device) -> torch.device:
    """Join the process group that torchrun describes in the environment; returns this process's device."""
    if device.type == "cuda":
        device = own_gpu()
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def barrier() -> None:
    """Until every process is here."""
    if world_size() > 1:
        dist.barrier()


def broadcast_buffers(*modules: nn.Module) -> None:
    """Give all processes the buffers that the modules have on rank 0."""
    if world_size() > 1:
        for module in dict.fromkeys(modules):
            for buffer in module.buffers():
                dist.broadcast(buffer, 0)


def says_a_process_is_gone(error: Exception) -> bool:
    """Whether an error, wherever it was raised, is that of a collective which another process has left."""
    words = ("Connection", "gloo", "NCCL", "peer")
    return launched_by_torchrun() and any(word in str(error).partition("\n")[0] for word in words)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
