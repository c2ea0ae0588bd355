"""Two operations that keep torch.compile correct and its graphs whole."""

from __future__ import annotations

import contextlib
import functools
import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

# torch has it since 2.7.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)

LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()
NUMBERS = itertools.count()
# torch has this tag since 2.8.
_TAGS: dict[str, Any] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
)


# The schedule is Python's, so graphs of torch.compile leave it out: a graph for every step would be compiled.
# ``number`` is declared as mutated: otherwise the compiler could drop the call, or merge two of them.
@torch.library.custom_op("segdeconv::track", mutates_args=("number",), **_TAGS)
def track_outside_graph(
    x: Tensor,
    moments: Tensor,
    samples: Tensor | None,
    running_moments: Tensor,
    running_whitening: Tensor | None,
    number: Tensor,
) -> tuple[Tensor, Tensor]:
    """`Whitened._track`; returns copies of the updated running moments and whitening matrix (empty if there
    is none). The ``running_`` arguments only give their shapes.
    """
    layer = LAYERS.get(int(number))
    if layer is None:
        raise RuntimeError("the network that this graph was compiled of is gone; compile another")
    layer._track(x, moments, x.numel() // x.shape[1] if samples is None else samples)
    return tuple(
        moments.new_empty(0) if running is None else running.clone()
        for running in (layer.running_moments, layer.running_whitening)
    )  # type: ignore[return-value]


@track_outside_graph.register_fake
def _(
    x: Tensor,
    moments: Tensor,
    samples: Tensor | None,
    running_moments: Tensor,
    running_whitening: Tensor | None,
    number: Tensor,
) -> tuple[Tensor, Tensor]:
    none = moments.new_empty(0)
    return torch.empty_like(running_moments), none if running_whitening is None else none.new_empty(
        running_whitening.shape
    )


# torch's partitioner may compute a value again in the backward pass from a buffer that the forward pass has
# written since (pytorch/pytorch#197039), but never the result of an operation it does not know.
@torch.library.custom_op("segdeconv::snapshot", mutates_args=())
def snapshot(value: Tensor) -> Tensor:
    """A copy of what was computed from a buffer's present values, for the backward pass."""
    return value.clone()


@snapshot.register_fake
def _(value: Tensor) -> Tensor:
    _fuse_snapshots()
    return torch.empty_like(value)


@functools.cache
def _fuse_snapshots() -> None:
    """Let Inductor fuse a snapshot with what makes its value; only the partitioner must not see into it.

    Called when a graph is traced, so that nothing else imports Inductor. In a torch with other internals a
    snapshot stays a kernel of its own.
    """
    with contextlib.suppress(ImportError, AttributeError, KeyError, TypeError):
        from torch._inductor.lowering import lowerings, register_lowering

        clone = lowerings[torch.ops.aten.clone.default]
        register_lowering(torch.ops.segdeconv.snapshot.default, type_promotion_kind=None)(clone)


snapshot.register_autograd(lambda _, grad: grad)
