"""One training step with its time, for the tools that compare trainings."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def timed_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lr: float,
    images: Tensor,
    loss_of: Callable[[Any], Tensor],
    amp: torch.dtype | None = None,
) -> tuple[float, float]:
    """The loss of one step at ``lr``, and the processor time that it took, in seconds."""
    start = time.process_time()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(images.device.type, amp, enabled=amp is not None):
        output = model(images)
    loss = loss_of(output)
    loss.backward()
    optimizer.step()
    took = time.process_time() - start
    return loss.item(), took
