"""What whitening costs in one 3x3 layer, part by part, and against width and resolution.

    python tools/bench_whitening.py --channels 256 --size 16 16 --batch 64
    python tools/bench_whitening.py --figure docs/step_time.png

The parts are those of the fast mode: the channel moments and their gradient, the weight product and its
gradient, and, a twentieth of it a step, the refresh of the whitening matrix: sampling patches, their second
moments, the root. Beside them the layer's own convolution, a batch norm, and the exact mode. The figure is of
whole layers, convolution and ReLU with batch norm or with whitening, forward and backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from segdeconv.config import NetworkDeconvConfig
from segdeconv.errors import one_sentence
from segdeconv.figures import new_figure, save_figure
from segdeconv.files import make_folder
from segdeconv.layers import WhitenedConv2d
from segdeconv.train import pick_device
from segdeconv.whitening import (
    channel_moments,
    inverse_sqrt,
    sample_patches,
    shrunk_inverse_sqrt,
    standardise_and_fold,
)

CYCLE = NetworkDeconvConfig().refresh_every


def milliseconds(*functions: Callable[[], object], rounds: int = 7) -> list[float]:
    """Median time of each function, taking turns."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(rounds):
        for function, mine in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            mine.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(mine) for mine in times]


class Launches(TorchDispatchMode):
    """Counts operations that compute: not views, not allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        allocates = "empty" in function._schema.name
        self.count += not (views or allocates) and isinstance(out, (torch.Tensor, tuple))
        return out


def launches(model: nn.Module, x: torch.Tensor, amp: bool) -> int:
    """Operations of one step, forward and backward, that refreshes no whitening."""
    model.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    with Launches() as counter:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
            output = model(x)
        output.backward(torch.empty_like(output))
    return counter.count


def maps(batch: int, channels: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """A layer's input, in the layout that the loaders' batches bring about."""
    x = torch.randn(batch, channels, height, width, device=device)
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def parts(channels: int, size: tuple[int, int], batch: int, device: torch.device) -> None:
    x = maps(batch, channels, *size, device)
    conv = nn.Conv2d(channels, channels, 3, padding=1, device=device)
    norm = nn.BatchNorm2d(channels, device=device)
    fast = WhitenedConv2d.from_conv(nn.Conv2d(channels, channels, 3, padding=1, device=device))
    exact = WhitenedConv2d.from_conv(conv, NetworkDeconvConfig(mode="exact"))
    fast(x)
    late = {"num_batches_tracked": torch.tensor(1001)}
    fast.load_state_dict(fast.state_dict() | late)
    print(f"{channels} channels, batch {batch}, {size[0]}x{size[1]}")
    for amp in (False, True):
        counts = [launches(model, x, amp) for model in (nn.Sequential(conv, norm), fast)]
        precision = "bfloat16 autocast" if amp else "float32"
        print(f"  operations a step in {precision}: batch norm {counts[0]}, fast {counts[1]}")
    grad = torch.randn_like(x)
    features, blocks = fast.running_whitening.shape[-1], fast.num_blocks
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    rows = sample_patches(x.detach(), (3, 3), (1, 1), (1, 1, 1, 1), "zeros", (3, 3)).view(-1, features)
    samples = x.numel() // channels
    rows = rows[: max(8 * features, 1024)]
    moments = torch.stack((mean, var)).requires_grad_()

    # Gradients are taken, not added to those in leaves, which would be another pass over the map.
    def backward(output: torch.Tensor, *leaves: torch.Tensor) -> Callable[[], object]:
        ones = torch.randn_like(output)
        return lambda: torch.autograd.grad(output, leaves, ones, retain_graph=True)

    def moments_backward() -> None:
        torch.autograd.grad(channel_moments(x), x, (grad, moments.detach()))

    def product() -> torch.Tensor:
        return standardise_and_fold(fast.weight, fast.bias, moments, fast.running_whitening, blocks, 1e-5)[0]

    rows_and_functions = {
        "convolution, forward": lambda: conv(x),
        "convolution, backward": backward(conv(x), x, *conv.parameters()),
        "batch norm, forward": lambda: norm(x),
        "batch norm, backward": backward(norm(x), x, *norm.parameters()),
        "channel moments, forward": lambda: channel_moments(x.detach()),
        "channel moments, forward and backward": moments_backward,
        "weight product, forward": product,
        "weight product, backward": backward(product(), fast.weight, moments),
        f"covariance of {len(rows)} patches": lambda: rows.T @ rows,
        f"root of {features} features": lambda: shrunk_inverse_sqrt(fast.running_cov, fast.cov_samples),
        "five Newton-Schulz iterations": lambda: inverse_sqrt(fast.running_cov, 1e-5, 5),
        "fast layer, refresh": lambda: fast._refresh(x.detach(), moments.detach(), samples, 0, 0.1),
        "exact layer, forward": lambda: exact(x),
        "exact layer, backward": backward(exact(x), x, *exact.parameters()),
    }
    print(f"  {blocks} blocks of {features} features, ms:")
    for name, took in zip(rows_and_functions, milliseconds(*rows_and_functions.values()), strict=True):
        print(f"    {name:38} {took:9.2f}")


def ratio(width: int, side: int, batch: int, device: torch.device) -> float:
    """A step of convolution and ReLU, whitened over batch-normalised."""
    x = maps(batch, width, side, side, device)
    norm = nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    ).to(device)
    conv = nn.Conv2d(width, width, 3, padding=1).to(device)
    whitened = nn.Sequential(WhitenedConv2d.from_conv(conv), nn.ReLU(inplace=True))
    grad = torch.randn_like(norm(x))
    late = {"num_batches_tracked": torch.tensor(1000)}  # when every twentieth step refreshes
    whitened[0].load_state_dict(whitened[0].state_dict() | late)

    def cycle(model: nn.Module) -> Callable[[], object]:
        def steps() -> None:
            for _ in range(CYCLE):
                torch.autograd.grad(model(x), (x, *model.parameters()), grad)

        return steps

    base, mine = milliseconds(cycle(norm), cycle(whitened), rounds=3)
    return mine / base


def figure(path: Path, batch: int, device: torch.device) -> None:
    sides = (8, 16, 32, 64)
    fig = new_figure(figsize=(6, 4))
    ax = fig.subplots()
    for width in (32, 64, 128, 256):
        ratios = [ratio(width, side, batch, device) for side in sides]
        print(f"width {width}: " + ", ".join(f"{s}x{s} {r:.2f}" for s, r in zip(sides, ratios, strict=True)))
        ax.plot(sides, ratios, marker="o", label=f"{width} channels")
    ax.axhline(1, color="grey", lw=0.8)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sides, [f"{side}x{side}" for side in sides])
    ax.set_xlabel(f"map, batch {batch}")
    ax.set_ylabel("step of a 3x3 layer over batch norm's")
    ax.legend()
    fig.tight_layout()
    save_figure(fig, path)
    print(path)


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--size", type=int, nargs=2, default=(16, 16), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--figure", type=Path, help="draw step time against width and resolution instead")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_args()
    if min(arguments.channels, arguments.batch, *arguments.size) < 1:
        parser.error("--channels, --batch and --size must be at least 1")
    device = pick_device(arguments.device)
    if arguments.figure:
        make_folder(arguments.figure.parent)
        figure(arguments.figure, arguments.batch, device)
    else:
        parts(arguments.channels, tuple(arguments.size), arguments.batch, device)


if __name__ == "__main__":
    main()
