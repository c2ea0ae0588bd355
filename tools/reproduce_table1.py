"""The paper's Table 1 on CIFAR-10: ten networks, each with batch norm and with network deconvolution.

    python tools/reproduce_table1.py --networks densenet121 dpn92                # hours a network on one core
    python tools/reproduce_table1.py --epochs 20 --networks pnasnet_a --amp off
    python tools/reproduce_table1.py --device cuda --out docs/measured/table1_gpu.jsonl --arms bn nd
    python tools/reproduce_table1.py --networks                                  # the table only

Three trainings a network and seed: `bn` and `nd` for the same number of steps, and `bn_for_nds_time`, batch
norm again, for as many steps as fit into the time that `nd` took, its learning rate falling over all of them.
Every training is one line of --out, and those that are there are not done again; one that was stopped goes on
from its state in runs/, at most ten minutes old, to the same result. tools/paper_page.py draws the lines. A
training has one thread, and as its time the processor time of its steps, so that others on the machine do not
count. Precision is bfloat16 autocast, or float32 with --amp off, which on CPUs is the faster for depthwise
convolutions; the arms of a network have the same. Seconds are null where they say nothing, so there is no
batch norm for nd's time: on a GPU, and (by hand) of a training that was made on another day than its twin.

The data is an image folder, data/cifar10/{train,test}/CLASS/NAME.jpg, read as by the recipe cifar10_resnet18:
batches of 128, crops of pictures padded by 4, mirrored; SGD at 0.1 with momentum 0.9, a weight decay of 5e-4
for batch norm and 1e-3, the authors' setting, for network deconvolution, and a cosine without warm-up. The
last point of a curve is top-1 on all test pictures, those before it on every fifth.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timed_step import timed_step
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segdeconv.checkpoint import has_state, load_state, restore_training, save_state, training_tensors
from segdeconv.config import Recipe, load_recipe
from segdeconv.data import EpochBatches, Samples, eval_loader, open_samples, train_loader
from segdeconv.errors import UserError, one_sentence
from segdeconv.evaluate import AMP, score, torch_predictor
from segdeconv.figures import new_figure, save_figure, spread
from segdeconv.files import append_json_line, make_folder, read_json_lines
from segdeconv.losses import loss_of
from segdeconv.markdown import markdown_table
from segdeconv.models import build_model, count_parameters
from segdeconv.train import pick_device
from segdeconv.trainer import lr_factor, make_optimizer, seed_everything

# Title, and top-1 in percent after so many epochs: batch norm and network deconvolution in the paper (arXiv
# 1905.11926, table 1), and the same in its reproduction study (ReScience C 10(1)#4, means of three).
NETWORKS: dict[str, tuple[str, dict[int, tuple[float, ...]]]] = {
    "vgg16": ("VGG-16", {1: (14.12, 74.18, 14.38, 74.20), 20: (90.07, 93.25, 90.36, 92.83)}),
    "resnet18": ("ResNet-18", {1: (56.25, 72.89, 46.56, 58.69), 20: (92.64, 94.07, 92.35, 94.20)}),
    "preact_resnet18": ("Preact-18", {1: (55.15, 72.70, 16.42, 72.33), 20: (91.93, 94.10, 90.32, 94.26)}),
    "mobilenet_v2": ("MobileNetV2", {1: (54.29, 65.40, 53.26, 59.85), 20: (89.86, 92.52, 90.70, 92.11)}),
    "senet18": ("SENet-18", {1: (57.63, 67.21, 58.62, 67.80), 20: (92.37, 94.11, 92.74, 94.25)}),
    "efficientnet_b0": ("EfficientNet", {1: (35.40, 55.67, 40.10, 59.91), 20: (84.21, 86.78, 84.68, 87.77)}),
    "pnasnet_a": ("PNASNet-A", {1: (21.81, 64.19, 10.55, 65.19), 20: (75.85, 81.97, 58.84, 81.61)}),
    "densenet121": ("DenseNet-121", {1: (59.56, 76.63, 55.78, 76.31), 20: (93.25, 94.89, 93.11, 94.87)}),
    "resnext29_32x4d": ("ResNeXt-29", {1: (52.14, 69.22, 25.70, 69.35), 20: (93.12, 94.05, 92.34, 93.57)}),
    "dpn92": ("DPN-92", {1: (34.00, 53.02, 23.27, 50.61), 20: (92.87, 93.74, 91.79, 93.55)}),
}
ARMS = {"bn": "batch norm", "nd": "network deconvolution", "bn_for_nds_time": "batch norm for nd's time"}
PRECISION = {"bf16": "bfloat16", "off": "float32"}
WEIGHT_DECAY = {"bn": 5e-4, "nd": 1e-3}
MEASURED = Path("docs/measured/table1.jsonl")
POINTS = 5  # of a curve, an epoch
ALL = 50_000


def train(
    network: str, arm: str, seed: int, arguments: argparse.Namespace, ratio: float | None = None
) -> dict[str, Any]:
    """One training of ``arguments.epochs`` epochs, or ``ratio`` times as many steps; the line it leaves."""
    norm = arm[:2]
    recipe = load_recipe(
        "cifar10_resnet18",
        [
            f"model.architecture=cifar_{network}",
            f"model.norm={norm}",
            f"data.root={arguments.data}",
            f"train.epochs={arguments.epochs}",
            f"train.weight_decay={WEIGHT_DECAY[norm]}",
            f"train.amp={arguments.amp}",
            f"train.seed={seed}",
        ],
    )
    config = recipe.train
    samples, held_out = (fewer(open_samples(recipe.data, s), arguments.pictures) for s in ("train", "val"))
    seed_everything(seed)
    device = pick_device(arguments.device)
    model = build_model(recipe.model, len(samples.classes))[0].to(device)
    loader = train_loader(samples, recipe.data, config.batch_size, seed, 1)
    optimizer = make_optimizer(model, config)
    an_epoch = len(loader)
    steps = max(round(config.epochs * an_epoch * (ratio or 1)), 1)
    # What a stopped training goes on from: nothing in these networks draws random numbers.
    state = state_folder(arguments, network, arm, seed)
    said = vars(arguments)
    task = {key: str(said[key]) for key in ("epochs", "pictures", "device", "amp", "data")} | {"steps": steps}
    curve: list[list[float]] = []
    losses: list[float] = []
    seconds, done = 0.0, 0
    if has_state(state):
        tensors, values = load_state(state)
        if values["task"] == task:
            restore_training(tensors, model, optimizer)
            curve, losses, seconds, done = (values[key] for key in ("curve", "losses", "seconds", "done"))
            print(f"{network} {arm} seed {seed}: goes on after step {done} of {steps}", flush=True)
    saved = time.monotonic()
    for step, (images, targets) in enumerate(endless(loader, done, steps), done + 1):
        model.train()
        images, targets = images.to(device), targets.to(device)
        criterion = functools.partial(
            loss_of, targets=targets, config=config, ignore_index=recipe.data.ignore_index
        )
        lr = config.lr * lr_factor(step - 1, steps, 0, config.schedule, 1)
        loss, took = timed_step(model, optimizer, lr, images, criterion, AMP[config.amp])
        seconds += took
        losses.append(loss)
        if step == steps or step % max(an_epoch // POINTS, 1) == 0:
            share = 1 if step == steps else 5
            top1 = accuracy(model, recipe, held_out, share, device)
            curve.append([step, round(seconds, 2), float(np.mean(losses)), round(top1, 5)])
            losses = []
        if not math.isfinite(loss):
            break
        if time.monotonic() - saved >= 60 * config.checkpoint_minutes and step < steps:
            values = {"task": task, "curve": curve, "losses": losses, "seconds": seconds, "done": step}
            save_state(make_folder(state), training_tensors(model, optimizer), values)
            saved = time.monotonic()
    whole = bool(curve) and curve[-1][0] == steps
    return {
        "network": network,
        "arm": arm,
        "seed": seed,
        "epochs": arguments.epochs,
        "pictures": arguments.pictures,
        "device": device.type,
        "amp": config.amp,
        "weight_decay": config.weight_decay,
        **({"pace": ratio} if ratio else {}),
        "parameters": count_parameters(model),
        "steps": step,  # fewer where it diverged
        "seconds": round(seconds, 2) if device.type == "cpu" else None,
        "top1": curve[-1][3] if whole else 1 / len(samples.classes),
        "curve": curve,
    }


def state_folder(arguments: argparse.Namespace, network: str, arm: str, seed: int) -> Path:
    return Path("runs") / arguments.out.stem / f"{network}.{arm}.{seed}"


def fewer(samples: Samples, count: int) -> Samples:
    """At most ``count`` pictures, evenly from all classes."""
    samples.items = samples.items[:: -(-len(samples) // count)]  # type: ignore[attr-defined]
    return samples


def endless(loader: DataLoader, done: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of ``steps`` steps, epoch after epoch, but for the first ``done``."""
    batches = cast(EpochBatches, loader.batch_sampler)
    batches.epoch, batches.start = divmod(done, len(loader))
    while done < steps:
        for batch in itertools.islice(loader, steps - done):
            yield batch
            done += 1
        batches.epoch, batches.start = batches.epoch + 1, 0


def accuracy(model: nn.Module, recipe: Recipe, held_out: Samples, share: int, device: torch.device) -> float:
    """Top-1 on every ``share``-th test picture."""
    loader = eval_loader(held_out, recipe.data, 500, 1, rank=0, world=share)
    return float(score(torch_predictor(model, AMP[recipe.train.amp]), loader, held_out, 255, device)["top1"])


def read(path: Path, epochs: int, pictures: int) -> list[dict[str, Any]]:
    lines = read_json_lines(path, missing_ok=True)
    return [line for line in lines if line["epochs"] == epochs and line["pictures"] == pictures]


def by_arm(lines: Iterable[dict[str, Any]], network: str) -> dict[str, list[dict[str, Any]]]:
    return {arm: [x for x in lines if x["network"] == network and x["arm"] == arm] for arm in ARMS}


def table(lines: list[dict[str, Any]], epochs: int) -> str:
    steps = max((line["steps"] for line in lines if line["arm"] == "nd"), default=0)
    pictures = max((line["pictures"] for line in lines), default=0)
    known = ["paper bn", "paper nd", "study bn", "study nd"]
    titles = ["network", "M parameters", *known, *ARMS, "seeds", "nd/bn", "precision"]
    said = (
        f"CIFAR-10 (JPEG, {pictures} training pictures), epochs: {epochs}, of {steps // epochs} steps of "
        "128: top-1 in percent on the test pictures, the mean over seeds and its standard error. "
        "`nd/bn` is how long a step of `nd` takes over one of batch norm, each trained on one core beside "
        "the other; `bn_for_nds_time` is batch norm with as many steps as that gives it. Weight decay is "
        "5e-4 for batch norm and 1e-3, the authors' setting, for `nd`. The learning rate is 0.1 for both and "
        "was searched for neither; chance is 10 percent. "
        "`paper` is arXiv 1905.11926, table 1; `study` its reproduction, ReScience C 10(1)#4."
        + ("" if pictures == ALL else " **Not all pictures: a trial of the program, not a result.**")
    )
    rows = []
    for network, (title, known_figures) in NETWORKS.items():
        runs = by_arm(lines, network)
        if not any(runs.values()):
            continue
        columns = [title, f"{max(x['parameters'] for arm in runs.values() for x in arm) / 1e6:.2f}"]
        columns += [f"{value:.2f}" for value in known_figures.get(epochs, ())] or [""] * len(known)
        columns += [shown([100 * x["top1"] for x in arm]) for arm in runs.values()]
        seeds = [str(len(arm)) for arm in runs.values() if arm]
        columns.append("/".join(seeds) if len(set(seeds)) > 1 else seeds[0])  # of every arm where they differ
        ratios = paces(runs)
        columns.append(f"{np.mean(ratios):.2f}" if ratios else "")
        columns.append("/".join(sorted({how(x) for arm in runs.values() for x in arm})))
        rows.append(columns)
    return f"{said}\n\n{markdown_table(titles, rows, numbers_from=1)}"


def how(line: dict[str, Any]) -> str:
    return PRECISION[line["amp"]] + (" on a GPU" if line.get("device", "cpu") != "cpu" else "")


def paces(runs: dict[str, list[dict[str, Any]]]) -> list[float]:
    """Of the seeds of a network that have it: time of a step of ``nd`` over batch norm's."""
    of_seed = {x["seed"]: x["pace"] for x in runs["bn_for_nds_time"]}
    for bn, nd in itertools.product(runs["bn"], runs["nd"]):
        if bn["seed"] == nd["seed"] and bn["seconds"] and nd["seconds"]:
            of_seed[bn["seed"]] = pace(bn, nd)
    return list(of_seed.values())


def shown(values: list[float], digits: int = 2) -> str:
    if not values:
        return ""
    mean, error, _, _ = spread(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")


def picture(lines: list[dict[str, Any]], path: Path) -> None:
    networks = [n for n in NETWORKS if any(line["network"] == n for line in lines)]
    figure = new_figure(figsize=(11, 2.6 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 3, squeeze=False)
    columns = (("step", 0, 2), ("step", 0, 3), ("seconds of training on one core", 1, 3))
    for row, network in zip(axes, networks, strict=True):
        for arm, runs in by_arm(lines, network).items():
            for axis, (label, x, y) in zip(row, columns, strict=True):
                if arm == "bn_for_nds_time" and x == 0:
                    continue
                for i, run in enumerate(run for run in runs if x == 0 or run["seconds"]):
                    points = np.array(run["curve"])
                    style = dict(color=f"C{list(ARMS).index(arm)}", marker=".", alpha=1 if i == 0 else 0.4)
                    name = ARMS[arm] if i == 0 else None
                    axis.plot(points[:, x], points[:, y] * (100 if y == 3 else 1), label=name, **style)
                axis.set_xlabel(label)
                axis.set_ylabel("training loss" if y == 2 else "top-1, %")
                axis.grid(alpha=0.3)
        row[0].set_yscale("log")
        row[0].set_title(NETWORKS[network][0], loc="left")
    for _, middle, last in axes:
        if not last.lines:  # nobody took the time
            last.set_axis_off()
        named = {arm: line for axis in (middle, last) for line in axis.lines for arm in [line.get_label()]}
        shown_arms = [arm for arm in ARMS.values() if arm in named]  # of both, for `nd` may have no time
        (last if last.lines else middle).legend(
            [named[arm] for arm in shown_arms], shown_arms, loc="best", fontsize=8
        )
    save_figure(figure, path)


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--amp", choices=PRECISION, default="bf16")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pictures", type=int, default=ALL, help="fewer, to try the program")
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"))
    parser.add_argument("--out", type=Path, default=MEASURED)
    arguments = parser.parse_args()
    if min(arguments.epochs, arguments.pictures) < 1 or min(arguments.seeds) < 0:
        parser.error("--epochs and --pictures must be at least 1, --seeds at least 0")
    reproduce(arguments)


def pace(bn: dict[str, Any], nd: dict[str, Any]) -> float:
    """Time of a step of ``nd`` over one of batch norm, which was trained beside it."""
    return float(nd["seconds"] / nd["steps"] / (bn["seconds"] / bn["steps"]))


def reproduce(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    device = pick_device(arguments.device).type
    if device != "cpu" and "bn_for_nds_time" in arguments.arms and arguments.networks:
        raise UserError("--arms bn_for_nds_time: time is taken on the CPU only; give --arms bn nd")
    runs = make_folder(arguments.out.parent) / arguments.out.name
    for seed in arguments.seeds:
        for network in arguments.networks:
            for arm in sorted(arguments.arms, key=list(ARMS).index):
                done = by_arm(read(runs, arguments.epochs, arguments.pictures), network)
                same = arguments.amp, device
                if any((x["amp"], x.get("device", "cpu")) != same for arm in done.values() for x in arm):
                    raise UserError(
                        f"{runs}: has {network} with another --amp than {arguments.amp} or --device than "
                        f"{device}; arms and seeds of a network are compared in one precision and place"
                    )
                here = {a: next((x for x in lines if x["seed"] == seed), None) for a, lines in done.items()}
                if here[arm] is not None:
                    continue
                bn, nd, ratio = here["bn"], here["nd"], None
                if arm == "bn_for_nds_time":
                    if not (bn and nd and bn["seconds"] and nd["seconds"]):
                        continue  # nothing says how long yet
                    ratio = pace(bn, nd)
                line = train(network, arm, seed, arguments, ratio)
                append_json_line(runs, line)
                shutil.rmtree(state_folder(arguments, network, arm, seed), ignore_errors=True)
                took = "" if line["seconds"] is None else f", {line['seconds']:.0f} s"
                print(f"{network} {arm} seed {seed}: {line['top1']:.4f}{took}", flush=True)
    print(table(read(runs, arguments.epochs, arguments.pictures), arguments.epochs))


if __name__ == "__main__":
    main()
