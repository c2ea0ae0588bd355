"""The paper's small experiments on MNIST: how fast linear and small networks converge.

    python tools/reproduce_linear.py --data ../shared/data/mnist        # about twenty minutes on one core

arXiv 1905.11926 says that where the features of a linear model are whitened, gradient descent is Newton's
method, for regression (L2) and nearly so for logistic regression (cross-entropy); and that networks gain
likewise. Here: one linear layer under either loss, the three-layer perceptron of the authors' code (128
sigmoid units) and a small convolutional network, each plain, with batch norm (for the linear layer, of its
input) and with network deconvolution. SGD with momentum 0.9 in batches of 512, as in the authors' command, at
a constant learning rate, for each the best of --lrs by the mean training loss of the last 20 steps.

Writes --out, one line per training; what is there is not done again. tools/paper_page.py draws it.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reproduce_table1 import shown
from timed_step import timed_step
from torch import Tensor, nn

from segdeconv import convert_to_network_deconv
from segdeconv.config import DataConfig, NetworkDeconvConfig
from segdeconv.data import open_samples
from segdeconv.errors import one_sentence
from segdeconv.figures import new_figure, save_figure, spread
from segdeconv.files import append_json_line, make_folder, read_json_lines
from segdeconv.layers import WhitenedLinear
from segdeconv.markdown import markdown_table
from segdeconv.trainer import seed_everything

ARMS = {"plain": "no normalisation", "bn": "batch norm", "nd": "network deconvolution"}
MEASURED = Path("docs/measured/linear.jsonl")
BATCH, STEPS, LAST = 512, 234, 20  # two passes over the training pictures


def linear() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(784), nn.Linear(784, 10))


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for size in (784, 128):
        layers += [nn.Linear(size, 128), nn.BatchNorm1d(128), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def convnet() -> nn.Module:
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    for channels, out in ((1, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


# name: (title, network, whether the loss is L2)
TASKS: dict[str, tuple[str, Callable[[], nn.Module], bool]] = {
    "regression": ("linear, L2", linear, True),
    "logistic": ("linear, cross-entropy", linear, False),
    "mlp": ("perceptron, cross-entropy", mlp, False),
    "convnet": ("convolutions, cross-entropy", convnet, False),
}


def build(task: str, arm: str) -> nn.Module:
    model = TASKS[task][1]()
    if arm == "nd":  # all 784 pixels in one block
        model, _ = convert_to_network_deconv(model, NetworkDeconvConfig(linear_block_size=784))
        for layer in model.modules():
            if isinstance(layer, WhitenedLinear) and layer.gain is not None:
                layer.gain.fill_(1)  # the best rate is looked for, so none is held back
        return model
    if arm == "plain":
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                model.set_submodule(name, nn.Identity())
    return model


def load(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pixels (n, 784), normalised as in the authors' code, and labels."""
    samples = open_samples(DataConfig("mnist", root=str(root)), split)
    images = torch.from_numpy(np.array(samples.images)).flatten(1).float() / 255  # type: ignore[attr-defined]
    return (images - 0.1307) / 0.3081, torch.tensor(samples.labels)  # type: ignore[attr-defined]


def run(task: str, arm: str, lr: float, seed: int, data: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    seed_everything(seed)
    model, squared = build(task, arm), TASKS[task][2]
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    images, labels = data["train"]
    order = torch.cat([torch.randperm(len(labels)) for _ in range(2)])
    losses, seconds = [], 0.0
    for step in range(STEPS):
        chosen = order[step * BATCH : (step + 1) * BATCH]
        criterion = functools.partial(loss_of, labels=labels[chosen], squared=squared)
        loss, took = timed_step(model, optimizer, lr, images[chosen], criterion)
        seconds += took
        losses.append(loss)
        if not math.isfinite(losses[-1]):
            break
    images, labels = data["val"]
    with torch.no_grad():
        logits = model.eval()(images)
    whole = len(losses) == STEPS and math.isfinite(losses[-1])
    return {
        "task": task, "arm": arm, "lr": lr, "seed": seed, "losses": [round(x, 6) for x in losses],
        "final": statistics.fmean(losses[-LAST:]) if whole else None, "seconds": round(seconds, 2),
        "test_loss": loss_of(logits, labels, squared).item(),
        "top1": (logits.argmax(1) == labels).double().mean().item(),
    }  # fmt: skip


def loss_of(output: Tensor, labels: Tensor, squared: bool) -> Tensor:
    if squared:
        return F.mse_loss(output, F.one_hot(labels, 10).to(output.dtype))
    return F.cross_entropy(output, labels)


def best(lines: list[dict[str, Any]], task: str, arm: str) -> list[dict[str, Any]]:
    """The trainings at the learning rate with the lowest final loss, of those rates with the most seeds that
    did not diverge.
    """
    by_lr: dict[float, list[dict[str, Any]]] = {}
    for line in lines:
        if line["task"] == task and line["arm"] == arm:
            by_lr.setdefault(line["lr"], []).append(line)
    whole = [runs for runs in by_lr.values() if all(x["final"] is not None for x in runs)]
    most = max(map(len, whole), default=0)
    whole = [runs for runs in whole if len(runs) == most]
    return min(whole, key=lambda runs: statistics.fmean(x["final"] for x in runs), default=[])


def smooth(losses: list[float]) -> np.ndarray:
    return np.convolve(losses, np.ones(5) / 5, mode="valid")


def table(lines: list[dict[str, Any]]) -> str:
    said = (
        f"MNIST, {STEPS} steps of {BATCH}, SGD with momentum 0.9 at the best constant learning rate; means "
        "over seeds, of losses with their standard errors. `steps` is how many it takes until the loss, "
        "averaged over five steps, is below what plain training ends with (the mean of its last "
        f"{LAST} steps). A block of `nd` holds all inputs of a layer, and no head is held back."
    )
    titles = ["task", "arm", "lr", "seeds", "training loss", "test loss", "top-1, %", "steps", "seconds"]
    rows = []
    for task, (title, _, _) in TASKS.items():
        goal = statistics.fmean([x["final"] for x in best(lines, task, "plain")] or [math.nan])
        for arm, name in ARMS.items():
            runs = best(lines, task, arm)
            if not runs:
                continue
            reached = np.mean([smooth(x["losses"]) for x in runs], 0) < goal
            steps = str(int(reached.argmax()) + 5) if reached.any() else "-"
            losses = [shown([x[key] for x in runs], digits=4) for key in ("final", "test_loss")]
            top1, seconds = (spread([x[key] for x in runs])[0] for key in ("top1", "seconds"))
            rest = [f"{100 * top1:.2f}", steps, f"{seconds:.1f}"]
            rows.append([title, name, f"{runs[0]['lr']:g}", len(runs), *losses, *rest])
    return f"{said}\n\n{markdown_table(titles, rows, numbers_from=2)}"


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    figure = new_figure(figsize=(4 * len(TASKS), 3.6), layout="constrained")
    axes = figure.subplots(1, len(TASKS))
    for axis, (task, (title, _, _)) in zip(axes, TASKS.items(), strict=True):
        for i, (arm, name) in enumerate(ARMS.items()):
            runs = best(lines, task, arm)
            for j, run in enumerate(runs):
                curve = smooth(run["losses"])
                style = dict(color=f"C{i}", alpha=1 if j == 0 else 0.35)
                label = f"{name}, lr {run['lr']:g}" if j == 0 else None
                axis.plot(np.arange(len(curve)) + 5, curve, label=label, **style)
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("training loss")
    save_figure(figure, path)


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data/mnist"), help="as torchvision has it"
    )
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.01, 0.03, 0.1, 0.3, 1.0, 3.0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=MEASURED)
    arguments = parser.parse_args()
    if min(arguments.seeds) < 0 or min(arguments.lrs) <= 0:
        parser.error("--seeds must be at least 0 and --lrs above 0")
    reproduce(arguments)


def reproduce(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    path = make_folder(arguments.out.parent) / arguments.out.name
    lines = read_json_lines(path, missing_ok=True)
    data = {split: load(arguments.data, split) for split in ("train", "val")}
    for seed in arguments.seeds:
        for task in TASKS:
            for arm in ARMS:
                for lr in arguments.lrs:
                    key = {"task": task, "arm": arm, "lr": lr, "seed": seed}
                    if any(key.items() <= line.items() for line in lines):
                        continue
                    lines.append(run(task, arm, lr, seed, data))
                    append_json_line(path, lines[-1])
                    print(f"{task} {arm} lr {lr:g} seed {seed}: {lines[-1]['final']}", flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
