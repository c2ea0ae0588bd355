"""Every kind of timm network that has batch norms: converted, folded, and compared with what it was.

    python tools/convert_timm.py                       # some 200 networks, an hour or so
    python tools/convert_timm.py resnet18 mixnet_s     # these alone

Networks of one file of timm that are made of the same classes of modules are one kind; the smallest is taken.
In float64, with batch norms as after training: how many batch norms there are before and after conversion,
and how far (relative to the norm of the outputs) the folded network is from the deconvolved one after two
training steps, and the one that starts warm, calibrated and folded, from the network it was made of. Exits
with 1 if one of them differs by more than 1e-6; rounding is below 1e-13, but for networks that blow it up.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import warnings

import timm
import torch
from rich.progress import track
from timm.models import model_entrypoint
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from segdeconv import UserError, calibrate, convert_to_network_deconv, fold_network_deconv
from segdeconv.models import count_parameters

CLASSES = 5
ALLOWED = 1e-6


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def kinds() -> list[str]:
    """The smallest network of every kind."""
    smallest: dict[tuple[str, ...], tuple[int, str]] = {}
    for name in track(timm.list_models(), "reading timm's networks", transient=True):
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=CLASSES)
        if batch_norms(model):
            kind = model_entrypoint(name).__module__, *sorted({type(m).__name__ for m in model.modules()})
            entry = count_parameters(model), name
            smallest[kind] = min(smallest.get(kind, entry), entry)
    return sorted(name for _, name in smallest.values())


@torch.no_grad()
def trained(name: str) -> nn.Module:
    """As after training, so that what is dropped or misplaced shows."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES)
    for norm in batch_norms(model):
        for value, low, high in (
            (norm.running_mean, -0.3, 0.3),
            (norm.running_var, 0.5, 2.0),
            (norm.weight, 0.5, 1.5),
            (norm.bias, -0.3, 0.3),
        ):
            if value is not None:
                value.uniform_(low, high)
    for parameter in model.parameters():
        if parameter.abs().max() < 1e-3:  # zeros, and scales of layers that begin with next to nothing
            parameter.normal_(0, 0.5)
    return model.double().eval()


def images_for(model: nn.Module) -> Tensor:
    """As small as it takes them."""
    full = model.default_cfg["input_size"]  # type: ignore[index]
    for side in (64, 96, 128):
        images = torch.randn(2, 3, side, side, dtype=torch.float64)
        try:
            with torch.no_grad():
                model(images)
            return images
        except (AssertionError, RuntimeError, ValueError):
            pass
    return torch.randn(2, *full, dtype=torch.float64)


def apart(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


def compare(name: str) -> tuple[str, float]:
    """A line, and the larger of the two differences."""
    model = trained(name)
    images = images_for(model)
    with torch.no_grad():
        want = model(images)
    with warnings.catch_warnings(action="ignore"):  # that its function is lost
        network, _ = convert_to_network_deconv(copy.deepcopy(model))
    left = len(batch_norms(network))
    for _ in range(2):
        network.train()(images).square().mean().backward()
    if not all(p.grad is None or p.grad.isfinite().all() for p in network.parameters()):
        return f"{name:40} a gradient is not finite", math.inf
    with torch.no_grad():
        evaluated = network.eval()(images)
        folded = apart(fold_network_deconv(network).eval()(images), evaluated)
        warm, _ = convert_to_network_deconv(copy.deepcopy(model), warm_start=True)
        calibrate(warm, [images, torch.randn_like(images)])
        kept = apart(fold_network_deconv(warm).eval()(images), want)
    line = f"{name:40} {len(batch_norms(model)):4} -> {left:3} {folded:9.0e} {kept:9.0e}"
    return line, max(folded, kept) if folded == folded and kept == kept else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks of timm; all kinds if none is named")
    names = parser.parse_args().names
    for name in names:
        if not timm.is_model(name):
            parser.error(f"timm has no network {name!r}")
    same = refused = different = 0
    print(f"{'':40} {'batch norms':>11} {'folded':>9} {'warm':>9}")
    for name in names or kinds():
        try:
            line, difference = compare(name)
        except UserError as error:
            refused += 1
            print(f"{name:40} refused: {error}", flush=True)
            continue
        same, different = same + (difference <= ALLOWED), different + (not difference <= ALLOWED)
        print(line, flush=True)
    print(f"{same} networks stay what they were, {different} do not, {refused} are refused")
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
