"""What StepGraphs does around CUDA graphs, imitated: a recording is its function, which a replay calls again.

tests/test_gpu.py has the graphs themselves.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_stability import network
from torch import Tensor, nn

from segdeconv import convert_to_network_deconv, graphs
from segdeconv.schedule import RefreshSchedule


class Imitation:
    capturing = False

    def __init__(self, device: torch.device) -> None:
        self.seen: set[Any] = set()
        self.recorded: dict[Any, Any] = {}

    def run(self, key: Any, compute: Callable[..., Any], *inputs: Tensor) -> Any:
        if key not in self.seen:
            self.seen.add(key)
            return compute(*inputs)
        Imitation.capturing = True
        result = compute(*inputs)
        Imitation.capturing = False
        place = self.recorded.setdefault(key, result)
        if result is not None:  # a replay leaves its loss where the recording did
            place[0].copy_(result[0])
        return place


@pytest.fixture(autouse=True)
def _imitate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_Recordings", Imitation)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Imitation.capturing)


class Auxiliary(nn.Module):
    """With a head that large batches alone use."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.head = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.main + (self.head if len(x) == 4 else 0) + self.frozen) * x.sum()


@pytest.mark.parametrize("sizes", [(2, 4, 2, 4), (4, 2, 4, 2)])
def test_parameters_have_gradients_of_their_own_batch_alone(sizes: tuple[int, ...]) -> None:
    model = Auxiliary()

    def compute(x: Tensor) -> Tensor:
        loss = model(x)
        loss.backward()
        return loss

    step, places = graphs.StepGraphs(model, compute), set()
    for size in sizes:
        for value in (1.0, 2.0, 3.0):  # called, recorded, replayed
            step(torch.full((size,), value))
            assert model.main.grad == size * value
            assert model.frozen.grad is None
            assert (model.head.grad is None) if size == 2 else (model.head.grad == size * value)
            places.add(model.main.grad.data_ptr())
    assert len(places) <= 2  # before the first recording, and from then on


def test_steps_are_those_without_graphs() -> None:
    """Refreshes and a batch of another size among them."""
    plain, _ = convert_to_network_deconv(network())
    recorded = copy.deepcopy(plain)
    batches = [(torch.randn(n, 3, 16, 16), torch.randint(4, (n,))) for n in [8] * 30 + [4] + [8] * 14]
    losses = []
    for model in (plain, recorded):
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
        refreshes = RefreshSchedule(model)

        def compute(images: Tensor, labels: Tensor, model: nn.Module = model) -> Tensor:
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss.detach()

        step = graphs.StepGraphs(model, compute) if model is recorded else compute
        for batch in batches:
            if model is plain:
                refreshes.step()
            optimizer.zero_grad()
            losses.append(step(*batch))
            optimizer.step()
    assert torch.equal(torch.stack(losses[:45]), torch.stack(losses[45:]))
    for name, value in recorded.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name]), name
