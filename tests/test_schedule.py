"""Which steps refresh the whitening, decided for all layers at once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from segdeconv import layers, schedule
from segdeconv.config import NetworkDeconvConfig
from segdeconv.layers import WhitenedConv2d, WhitenedLinear
from segdeconv.schedule import RefreshSchedule


def test_a_schedule_begins_where_most_layers_are() -> None:
    """One was called twice in every step, another never."""
    network = nn.ModuleList(WhitenedLinear(2, 2) for _ in range(5))
    for layer in (*network[:4], network[0]):
        layer(torch.randn(4, 2))
    assert RefreshSchedule(network).steps == 1
    refreshes = RefreshSchedule(network[1])
    for _ in range(3):
        refreshes.step()
        network[1](torch.randn(4, 2))
    assert RefreshSchedule(network[1]).steps == 4


@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_matrices_are_made_of_all_layers(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "_NUMBERS_AT_ONCE", at_once * 16)
    network = nn.ModuleList(WhitenedLinear(4, 2) for _ in range(5)).append(
        WhitenedLinear(4, 2, config=NetworkDeconvConfig(mode="exact"))
    )
    refreshes = RefreshSchedule(network)
    for _ in range(2):
        refreshes.step()
        for layer in network:
            layer(torch.randn(9, 4))
    for layer in network[:5]:
        assert not torch.equal(layer.running_whitening[0], torch.eye(4))


def test_a_schedule_ends_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_LOW_PRECISION_PAYS", 0)
    layer = WhitenedConv2d(3, 4, 3)
    RefreshSchedule(layer, torch.bfloat16).step()
    layer.to("meta")
    assert layer.refresh_now is None
    assert layer._folding_matrix is None


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_pass_in_evaluation_outlasts_the_next_step(scheduled: bool) -> None:
    layer = WhitenedConv2d(4, 4, 3).double()
    refreshes = RefreshSchedule(layer)
    one, other = torch.randn(2, 2, 4, 9, 9, dtype=torch.float64)
    for _ in range(2):
        if scheduled:
            refreshes.step()
        layer(other)
    want = torch.autograd.grad(layer.eval()(one).square().sum(), layer.weight)[0]
    loss = layer(one).square().sum()
    layer.train()
    if scheduled:
        refreshes.step()
    layer(other)
    torch.testing.assert_close(torch.autograd.grad(loss, layer.weight)[0], want, rtol=0, atol=0)
