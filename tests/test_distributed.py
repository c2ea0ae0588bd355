"""N processes with a share of the batch each against one process with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

from segdeconv.config import NetworkDeconvConfig
from segdeconv.layers import WhitenedConv2d, WhitenedLinear

STEPS = 3
CASES = {
    "fast conv": (lambda: WhitenedConv2d(8, 6, 3, padding=1), (8, 8, 9, 10)),
    "fast grouped conv": (lambda: WhitenedConv2d(8, 6, 3, stride=2, groups=2), (8, 8, 9, 10)),
    "fast linear": (lambda: WhitenedLinear(6, 5), (8, 6)),
    "exact conv": (lambda: WhitenedConv2d(8, 6, 3, padding=1, config=CONFIG["exact"]), (8, 8, 9, 10)),
    "reference conv": (lambda: WhitenedConv2d(8, 6, 3, config=CONFIG["reference"]), (8, 8, 9, 10)),
    "exact linear": (lambda: WhitenedLinear(6, 5, config=CONFIG["exact"]), (8, 6)),
}
CONFIG = {mode: NetworkDeconvConfig(mode=mode, block_size=4) for mode in ("exact", "reference")}  # type: ignore[arg-type]
SPLITS = {2: (5, 3), 4: (2, 2, 2, 2)}


def run_case(name: str, rank: int, world: int) -> dict[str, Tensor]:
    """Outputs, gradients and running values after some steps."""
    make, shape = CASES[name]
    torch.manual_seed(0)
    layer = make().double()
    split = SPLITS.get(world, (shape[0],))
    begin, end = sum(split[:rank]), sum(split[: rank + 1])
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 1)[begin:end].requires_grad_()
        out = layer(x)
        probe = torch.randn(shape[0], *out.shape[1:], generator=generator, dtype=torch.float64)[begin:end]
        (out * probe).sum().backward()
        assert x.grad is not None
        found |= {f"out {step}": out.detach(), f"grad {step}": x.grad}
    found |= {f"weight {key}": p.grad.clone() for key, p in layer.named_parameters() if p.grad is not None}
    return found | {f"buffer {key}": value.clone() for key, value in layer.named_buffers()}


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save({name: run_case(name, rank, world) for name in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=sorted(SPLITS))
def shares(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (request.param, str(folder)), request.param)
    return [torch.load(Path(folder, f"{rank}.pt"), weights_only=True) for rank in range(request.param)]


@pytest.mark.parametrize("name", CASES)
def test_layers_compute_what_one_process_does(name: str, shares: list[dict]) -> None:
    want = run_case(name, 0, 1)
    for key, value in want.items():
        parts = [share[name][key] for share in shares]
        if key.startswith("buffer"):  # the same on all ranks, to the bit
            assert all(torch.equal(part, parts[0]) for part in parts), key
            got = parts[0]
        else:
            got = sum(parts) if key.startswith("weight") else torch.cat(parts)
        assert torch.allclose(got, value, rtol=0, atol=1e-10 * value.abs().max().item()), key
