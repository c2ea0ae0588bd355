"""How int8 treats a deconvolved network and its batch-norm twin: writes docs/int8.md.

    python tools/int8_twins.py unet_mobilenet_v2.nd_camvid unet_mobilenet_v2.bn_camvid

Takes entries of the zoo, or runs, whose data is at hand (--root says where). Each is exported with --int8,
and its accuracy and speed are measured as `segdeconv export` does. Then weights alone and activations alone
are rounded to int8 in PyTorch, to see which of the two does the harm: weights with one scale per
channel, what convolutions read with one scale per tensor.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from segdeconv.bench import machine
from segdeconv.checkpoint import load_checkpoint
from segdeconv.data import EvalSet, evenly_spread, open_samples
from segdeconv.errors import one_sentence
from segdeconv.files import write_text
from segdeconv.fold import fold_network_deconv
from segdeconv.markdown import markdown_table
from segdeconv.models import main_output, size_multiple
from segdeconv.precision import Gates, export_smaller

_PICTURES = 16

PAGE = """# int8, deconvolution beside batch norm

Written by `python tools/int8_twins.py {runs}`,
which says how. int8 graphs are as `segdeconv export --int8` makes them, with its gates open; speed is
onnxruntime's on the {device}. Twins with the same layers in float have the
same operations; each speed was measured once.

{exported}

What rounding to int8 does to one part alone, in PyTorch. The spread is of a filter, its largest weight over
the root of the mean square; of what convolutions read, the range over the standard deviation. Both are means
over layers.

{by_part}
"""


def round_weights(model: nn.Module) -> nn.Module:
    """Filters to multiples of 1/127 of their largest weight."""
    for layer in convolutions(model):
        step = layer.weight.flatten(1).abs().amax(1)[:, None, None, None].clamp_min(1e-12) / 127
        layer.weight.copy_((layer.weight / step).round() * step)
    return model


def round_activations(model: nn.Module) -> nn.Module:
    """What convolutions read to 255 even steps over its range, one of them at 0."""

    def hook(_: nn.Module, read: tuple[Tensor, ...]) -> tuple[Tensor]:
        low, high = read[0].min().clamp_max(0), read[0].max().clamp_min(0)
        step = (high - low) / 255
        zero = (-low / step).round()
        return ((((read[0] / step).round() + zero).clamp(0, 255) - zero) * step,)

    for layer in convolutions(model):
        layer.register_forward_pre_hook(hook)
    return model


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def spreads(model: nn.Module, images: Tensor) -> dict[str, float]:
    """How far the largest values stand out, in filters and in what convolutions read."""
    filters, read = [], []
    for layer in convolutions(model):
        rows = layer.weight.flatten(1)
        filters.append((rows.abs().amax(1) / rows.square().mean(1).sqrt().clamp_min(1e-12)).mean().item())
        layer.register_forward_pre_hook(
            lambda _, x: read.append(((x[0].max() - x[0].min()) / x[0].std()).item())
        )
    model(images)
    return {"weights": statistics.fmean(filters), "activations": statistics.fmean(read)}


@torch.inference_mode()
def harm(run: str, root: str | None) -> list[tuple[str, ...]]:
    """Cells by what is rounded: labels changed on training pictures, the logits' relative error, spread."""
    model, info = load_checkpoint(run)
    data = info.recipe.data.at(root)
    samples = open_samples(data, "train")
    pictures = EvalSet(samples, data, size_multiple(model))
    images = torch.stack([pictures[index][0] for index in evenly_spread(_PICTURES, len(samples))])
    folded = fold_network_deconv(model)
    expected = main_output(folded(images))
    spread = spreads(copy.deepcopy(folded), images)
    rows: list[tuple[str, ...]] = []
    for name, change in (("weights", round_weights), ("activations", round_activations)):
        logits = main_output(change(copy.deepcopy(folded))(images))
        changed = (logits.argmax(1) != expected.argmax(1)).float().mean().item()
        error = ((logits - expected).norm() / expected.norm()).item()
        rows.append((run, name, f"{changed:.2%}", f"{error:.4f}", f"{spread[name]:.1f}"))
    return rows


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("nd", help="the deconvolved network")
    parser.add_argument("bn", help="its batch-norm twin")
    parser.add_argument("--root", help="where the data lies, if not where the recipe says")
    parser.add_argument("--out", type=Path, default=Path("docs/int8.md"))
    options = parser.parse_args()
    titles = ["", "fp32", "int8", "times as fast", "MB", "in float", "labels changed on training pictures"]
    exported: list[tuple[str, ...]] = []
    parts: list[tuple[str, ...]] = []
    for run in (options.nd, options.bn):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            made = export_smaller(run, path, "int8", gates=Gates(1.0, 0.0), root=options.root, device="cpu")
        ranges = ", ".join(f"{way} {share:.2%}" for way, share in made.ranges.items())
        scores = (f"{made.before:.4f}", f"{made.after:.4f}", f"{made.speedup:.2f}")
        size = f"{made.megabytes[0]:.1f} to {made.megabytes[1]:.1f}"
        exported.append((run, *scores, size, f"{len(made.in_float)} of {made.layers}", ranges))
        parts += harm(run, options.root)
    text = PAGE.format(
        runs=f"{options.nd} {options.bn}",
        device=machine("cpu")["device_name"],
        exported=markdown_table(titles, exported).rstrip(),
        by_part=markdown_table(
            ["", "rounded", "labels changed", "relative error of logits", "spread"], parts
        ).rstrip(),
    )
    write_text(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
