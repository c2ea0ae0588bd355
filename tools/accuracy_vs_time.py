"""Accuracy of batch norm, exact and fast network deconvolution by steps and time, and what of it matters.

    python tools/accuracy_vs_time.py six_conv resnet18_narrow camvid --lrs 0.1 0.2       # hours on a CPU
    python tools/accuracy_vs_time.py six_conv --arms bn fast identity --lrs 0.05 0.1 0.2 0.4
    python tools/accuracy_vs_time.py six_conv --arms bn fast identity --seeds 1 2 --at-best
    python tools/accuracy_vs_time.py --table --figure docs/accuracy_vs_time.png         # of what is there

Every run is one line of --out with its curve; runs that are there are not done again, so a stopped comparison
goes on where it was. Batch norm's learning rate is searched as the others' is: table and figure take each
arm's best by its mean over the seeds. --at-best trains at the rate that was the arm's best with the first
seed. A run has one thread, bfloat16 autocast, and as its time that of its core, so that several side by side
do not slow each other in the figures.

Tasks: `six_conv`, the small network of segdeconv/models/cifar.py, and `resnet18_narrow`, ResNet-18 with a
quarter of the width, and `mobilenet_v2`, whole, on 12,800 pictures of CIFAR-10 (JPEG, an image folder in
data/cifar10); `camvid`, the U-Net of the recipe camvid_unet_mobilenet_v2 on data/camvid.

Arms: `bn`, `exact`, `fast`, any of the two with settings as in `fast:refresh_every=5,block_size=32`, and what
they are taken apart into: OF_EXACT and OF_FAST, below, say what each is. SGD trains them, with momentum, or
AdamW in `adamw/bn`, `adamw/fast:filter_norm=0.25` and the like.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timed_step import timed_step
from torch import Tensor, nn

from segdeconv import calibrate, convert_to_network_deconv, layers, whitening
from segdeconv.config import NetworkDeconvConfig, load_recipe
from segdeconv.data import eval_loader, open_samples, train_loader
from segdeconv.errors import UserError, one_sentence
from segdeconv.evaluate import ignore_index_of, score, torch_predictor
from segdeconv.figures import new_figure, save_figure, spread
from segdeconv.files import append_json_line, make_folder, read_json_lines
from segdeconv.losses import loss_of
from segdeconv.markdown import markdown_table
from segdeconv.models import build_model, size_multiple
from segdeconv.models.cifar import mobilenet_v2, resnet18, six_conv
from segdeconv.trainer import lr_factor, seed_everything
from segdeconv.whitening import (
    channel_moments,
    from_blocks,
    mean_and_scale,
    patch_moments,
    shrunk_inverse_sqrt,
    standardise_and_fold,
    to_blocks,
)

RESULTS = Path("docs/measured/accuracy_vs_time.jsonl")
CAMVID_BATCH, WEIGHT_DECAY = 8, 5e-4
ADAMW, ADAMW_DECAY = "adamw/", 0.01  # torch's default, as the other settings of AdamW
OF_EXACT = {
    "exact": "exact mode, the published method",
    "detached": "exact mode without gradient through the statistics",
    "ridge": "exact mode with the converged root and an explicit ridge instead of five iterations",
}
OF_FAST = {
    "fast": "fast mode",
    "identity": "fast mode's channel statistics only, no whitening: D = I",
    "own": "fast mode with a whitening matrix for every block instead of one for all blocks of a layer",
    "unscaled": "fast mode with live mean, but the covariance of the raw patches: no live channel scale",
    "unshrunk": "fast mode without shrinkage of covariances that rest on few samples",
    "depthwise": "fast mode that whitens between the taps of depthwise layers too",
    "free_head": "fast mode that holds no wide linear layer back",
    "all_rows": "fast mode with channel statistics from every row of large maps, not every third",
    "warm": "batch norm for the first half, then fast mode with the network's function kept (warm start)",
}
SETTINGS = {
    "block_size": "channels per block",
    "linear_block_size": "features per block of linear layers",
    "eps": "eps",
    "momentum": "momentum of the running values",
    "filter_norm": "norm of the filters at first",
    "refresh_every": "most steps between refreshes",
    "num_iters": "Newton-Schulz iterations",
    "sampling_stride": "sampling stride",
}


class OwnBlocks(layers.Whitened):
    """One whitening matrix per block: (G·K, F, F) running values instead of (G, F, F)."""

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        for name in ("running_cov", "running_whitening"):
            setattr(self, name, getattr(self, name).repeat_interleave(self.num_blocks, 0))

    def _refresh(self, *args: Any) -> None:
        groups, blocks, block, taps = self._shape
        self._shape = groups * blocks, 1, block, taps
        super()._refresh(*args)
        self._shape = groups, blocks, block, taps

    def _fold(self, whitening: Tensor | None, mean: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
        assert whitening is not None
        assert scale is not None
        return fold_own(*self._weight_and_bias(), whitening, mean, scale)


def fold_own(
    weight: Tensor, bias: Tensor, whitening: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    groups, blocks, features = mean.shape
    rows = to_blocks(weight.reshape(groups, -1, weight[0].numel()), blocks, False)
    whitening = whitening.view(groups, blocks, features, features)
    folded = (rows.transpose(1, 2) @ whitening).transpose(1, 2) * scale[:, None]
    return from_blocks(folded, False).reshape(weight.shape), bias - (folded * mean[:, None]).sum(
        (-1, -2)
    ).flatten()


def parsed(arm: str) -> tuple[str, dict[str, Any]]:
    """The name before the colon, and the settings behind it; the optimiser is no part of either."""
    name, _, settings = arm.removeprefix(ADAMW).partition(":")
    pairs = [setting.partition("=") for setting in settings.split(",") if setting]
    return name, {key: json.loads(value) for key, _, value in pairs}


def config_of(arm: str) -> NetworkDeconvConfig:
    name, settings = parsed(arm)
    return NetworkDeconvConfig(mode="exact" if name in OF_EXACT else "fast", **settings)


def arm_name(text: str) -> str:
    plain = text.removeprefix(ADAMW)
    if plain.partition(":")[0] not in (*OF_EXACT, *OF_FAST) and plain != "bn":
        raise argparse.ArgumentTypeError(
            f"{text!r} is no arm; expected bn, {', '.join((*OF_EXACT, *OF_FAST))}, "
            f"any but bn with settings as in fast:refresh_every=5, and any with {ADAMW} before it"
        )
    try:
        config_of(text)
    except (ValueError, TypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME:SETTING=VALUE,SETTING=VALUE with settings of network deconvolution"
        ) from None
    return text


def described(arm: str) -> str:
    """What an arm is, in a few words."""
    name, settings = parsed(arm)
    usual = config_of(name)
    usual = dataclasses.replace(usual, block_size=usual.conv_block_size)
    changes = [f"{SETTINGS[key]} {value}, not {getattr(usual, key)}" for key, value in settings.items()]
    optimizer = ["trained by AdamW"] if arm.startswith(ADAMW) else []
    return "; ".join([{"bn": "batch norm", **OF_FAST, **OF_EXACT}[name], *changes, *optimizer])


def convert(model: nn.Module, arm: str) -> nn.Module:
    mode, config = parsed(arm)[0], config_of(arm)
    model, _ = convert_to_network_deconv(model, config, warm_start=mode == "warm")
    for layer in model.modules():
        if mode == "depthwise" and isinstance(layer, layers.Whitened):
            layer.decorrelate(True)
        if mode == "free_head" and isinstance(layer, layers.WhitenedLinear) and layer.gain is not None:
            layer.gain.fill_(1)
        if mode == "own" and isinstance(layer, layers.Whitened) and layer.decorrelates:
            layer.__class__ = type(mode, (OwnBlocks, type(layer)), {})
            layer.reset_running_stats()
    return model


def ablation(arm: str) -> contextlib.AbstractContextManager[object]:
    """What to patch into segdeconv.layers while an arm trains."""

    def identity(cov: Tensor, samples: Tensor) -> Tensor:
        return torch.eye(cov.shape[-1]).expand_as(cov)

    def unshrunk(cov: Tensor, samples: Tensor) -> Tensor:
        return shrunk_inverse_sqrt(cov, samples * math.inf)

    def raw(cov: Tensor, samples: Tensor) -> Tensor:
        variance = cov.diagonal(dim1=-2, dim2=-1).mean((-1, -2)).clamp(min=1e-12)
        return shrunk_inverse_sqrt(cov / variance, samples) / variance.sqrt()

    def means_only(x: Tensor, zeros: float) -> tuple[Tensor, Tensor]:
        x, moments = channel_moments(x, zeros)
        return x, torch.stack((moments[0], torch.full_like(moments[1], 1 - NetworkDeconvConfig().eps)))

    def own(
        weight: Tensor,
        bias: Tensor,
        moments: Tensor,
        whitening: Tensor | None,
        blocks: int,
        eps: float,
        low_precision: torch.dtype | None,
        *for_compilers: Any,
    ) -> tuple[Tensor, Tensor]:
        if whitening is None:
            return standardise_and_fold(weight, bias, moments, None, blocks, eps, low_precision)
        mean, scale = mean_and_scale(moments, len(whitening) // blocks, blocks, whitening.shape[-1], eps)
        return fold_own(weight, bias, whitening, mean, scale)

    def detached(patches: Tensor, shared_mean: bool) -> tuple[Tensor, Tensor]:
        return patch_moments(patches.detach(), shared_mean)

    def ridge(cov: Tensor, eps: float, num_iters: int) -> Tensor:
        variance = cov.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + eps
        return shrunk_inverse_sqrt(cov / variance, torch.tensor(math.inf)) / variance.sqrt()

    functions: dict[str, dict[str, Any]] = {
        "detached": {"patch_moments": detached},
        "ridge": {"inverse_sqrt": ridge},
        "identity": {"shrunk_inverse_sqrt": identity},
        "own": {"standardise_and_fold": own},
        "unscaled": {"shrunk_inverse_sqrt": raw, "channel_moments": means_only},
        "unshrunk": {"shrunk_inverse_sqrt": unshrunk},
    }
    name, _ = parsed(arm)
    if name == "all_rows":
        return mock.patch.object(whitening, "_moment_rows", lambda x: x)
    return mock.patch.multiple(layers, **functions[name]) if name in functions else contextlib.nullcontext()


@functools.lru_cache(None)
def cifar(split: str, count: int) -> tuple[Tensor, Tensor]:
    files = sorted(Path("data/cifar10", split).glob("*/*.jpg"))
    if not files:
        raise UserError(f"data/cifar10/{split}: holds no CLASS/NAME.jpg; unpack CIFAR-10 there")
    classes = sorted({file.parent.name for file in files})
    chosen = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:count]]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in chosen])
    mean, std = torch.tensor([125.3, 123.0, 113.9]), torch.tensor([63.0, 62.1, 66.7])
    images = ((images - mean) / std).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor([classes.index(file.parent.name) for file in chosen])


class Cifar:
    """12,800 pictures, mirrored, and shifted a batch at a time; top-1 on 4,000 test pictures."""

    def __init__(self, seed: int) -> None:
        self.train, self.test = cifar("train", 12_800), cifar("test", 4_000)
        self.steps, self.ignore_index = len(self.train[0]) // 128, 255
        self.seed = seed

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
        order = torch.randperm(len(self.train[0]), generator=generator)
        for chosen in order.split(128):
            images = F.pad(self.train[0][chosen], (4, 4, 4, 4))
            dy, dx = torch.randint(9, (2,), generator=generator).tolist()
            images = images[:, :, dy : dy + 32, dx : dx + 32]
            mirrored = torch.rand(len(chosen), 1, 1, 1, generator=generator) < 0.5
            images = torch.where(mirrored, images.flip(3), images)
            yield images.contiguous(memory_format=torch.channels_last), self.train[1][chosen]

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        model.eval()
        right = [
            (model(images).argmax(1) == labels).float().mean().item()
            for images, labels in zip(self.test[0].split(500), self.test[1].split(500), strict=True)
        ]
        return statistics.mean(right)


class CamVid:
    def __init__(self, seed: int) -> None:
        self.recipe = load_recipe(
            "camvid_unet_mobilenet_v2",
            ["model.norm=bn"],
        )
        data = self.recipe.data
        self.samples, self.held_out = open_samples(data, "train"), open_samples(data, "val")
        multiple = size_multiple(self.build())
        self.loader = train_loader(self.samples, data, CAMVID_BATCH, seed, multiple)
        self.val = eval_loader(self.held_out, data, CAMVID_BATCH, multiple)
        self.steps, self.ignore_index = len(self.loader), ignore_index_of(self.samples, data)

    def build(self) -> nn.Module:
        return build_model(self.recipe.model, len(self.samples.classes))[0]

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.loader.batch_sampler.epoch = epoch  # type: ignore[union-attr]
        yield from self.loader

    def score(self, model: nn.Module) -> float:
        scores = score(
            torch_predictor(model, None), self.val, self.held_out, self.ignore_index, torch.device("cpu"), ""
        )
        return float(scores["miou"])


# name: (data, network, epochs)
TASKS: dict[str, tuple[Callable[[int], Any], Callable[[Any], nn.Module], int]] = {
    "six_conv": (Cifar, lambda data: six_conv(10), 2),
    "resnet18_narrow": (Cifar, lambda data: resnet18(10, width=16), 4),
    "mobilenet_v2": (Cifar, lambda data: mobilenet_v2(10), 1),
    "camvid": (CamVid, lambda data: data.build(), 6),
}


def make_optimizer(model: nn.Module, arm: str, lr: float) -> torch.optim.Optimizer:
    if arm.startswith(ADAMW):
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=ADAMW_DECAY)
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=WEIGHT_DECAY)


def run(task: str, arm: str, lr: float, seed: int, epochs: int) -> dict[str, Any]:
    make_data, build, _ = TASKS[task]
    data = make_data(seed)
    seed_everything(seed)
    model = build(data)
    name, _ = parsed(arm)
    warm = name == "warm"
    if name != "bn" and not warm:
        model = convert(model, arm)
    config = load_recipe("camvid_unet_mobilenet_v2").train
    total, warmup = epochs * data.steps, data.steps // 4
    done, curve, seconds = 0, [], 0.0
    optimizer = make_optimizer(model, arm, lr)
    with ablation(arm):
        for epoch in range(epochs):
            if warm and epoch == epochs // 2:
                model = calibrate(convert(model, arm), (images for images, _ in islice(data.epoch(0), 4)))
                optimizer = make_optimizer(model, arm, lr)
            model.train()
            losses = []
            for images, targets in data.epoch(epoch):
                criterion = functools.partial(
                    loss_of, targets=targets, config=config, ignore_index=data.ignore_index
                )
                rate = lr * lr_factor(done, total, warmup, "cosine", 1)
                loss, took = timed_step(model, optimizer, rate, images, criterion, torch.bfloat16)
                done, seconds = done + 1, seconds + took
                losses.append(loss)
            mean = statistics.mean(losses)
            if not math.isfinite(mean):
                break
            accuracy = data.score(model)
            curve.append([done, round(seconds, 2), round(accuracy, 4), round(mean, 4)])
    final = curve[-1][2] if len(curve) == epochs else 0.0
    return {
        "task": task,
        "arm": arm,
        "lr": lr,
        "seed": seed,
        "epochs": epochs,
        "final": final,
        "curve": curve,
    }


Key = tuple[str, int, str]  # task, epochs, arm


def best(lines: list[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    """Of every task, length and arm the runs at the learning rate with the best mean, most seeds first."""
    groups: dict[Key, dict[float, list[dict[str, Any]]]] = {}
    for line in lines:
        key = line["task"], line["epochs"], line["arm"]
        groups.setdefault(key, {}).setdefault(line["lr"], []).append(line)
    chosen = {}
    for key, by_lr in groups.items():
        seeds = max(len(runs) for runs in by_lr.values())
        full = [runs for runs in by_lr.values() if len(runs) == seeds]
        chosen[key] = max(full, key=lambda runs: statistics.mean(r["final"] for r in runs))
    return chosen


def table(lines: list[dict[str, Any]]) -> str:
    rows = [[*key, rates(lines, key), *measured(runs)] for key, runs in sorted(best(lines).items())]
    return markdown_table(["task", "epochs", "arm", "rates tried", *_MEASURED], rows)


def rates(lines: list[dict[str, Any]], key: Key) -> int:
    return len({line["lr"] for line in lines if (line["task"], line["epochs"], line["arm"]) == key})


def explained(lines: list[dict[str, Any]]) -> str:
    """The table of one task's lines, which says what every arm is and how many learning rates it had."""
    chosen, rows = best(lines), []
    for key in sorted(chosen, key=lambda key: (key[1], rank(key[2]))):
        _, epochs, arm = key
        rows.append([epochs, arm, described(arm), rates(lines, key), *measured(chosen[key])])
    return markdown_table(["epochs", "arm", "what it is", "rates tried", *_MEASURED], rows)


def rank(arm: str) -> tuple[Any, ...]:
    """Batch norm and the two modes come first, then what they are taken apart into, and AdamW's last."""
    name, settings = parsed(arm)
    first = ("bn", "fast", "exact")
    place = first.index(arm) if arm in first else len(first)
    kind = ("bn", *OF_FAST, *OF_EXACT).index(name)
    return arm.startswith(ADAMW), place, kind, list(settings.items())


_MEASURED = ["lr", "seeds", "final", "standard error", "seconds"]


def measured(runs: list[dict[str, Any]]) -> list[Any]:
    mean, error, _, _ = spread([r["final"] for r in runs])
    took = statistics.mean(r["curve"][-1][1] if r["curve"] else 0 for r in runs)
    shown = "" if math.isnan(error) else f"{error:.4f}"
    return [f"{runs[0]['lr']:g}", len(runs), f"{mean:.4f}", shown, f"{took:.0f}"]


def figure(lines: list[dict[str, Any]], path: Path) -> None:
    complete = [line for line in lines if len(line["curve"]) == line["epochs"]]
    chosen = {key: runs for key, runs in best(complete).items() if key[2] in ("bn", "exact", "fast")}
    # Batch norm is what the others are drawn beside, and one epoch's single point is no curve.
    tasks = sorted({key[:2] for key in chosen if key[2] == "bn" and key[1] > 1})
    if not tasks:
        raise UserError(f"--figure {path}: there is no whole run of bn of two epochs or more to draw beside")
    chosen = {key: runs for key, runs in chosen.items() if key[:2] in tasks}
    fig = new_figure(figsize=(9, 3 * len(tasks)))
    axes = fig.subplots(len(tasks), 2, squeeze=False)
    colours = {"bn": "tab:grey", "exact": "tab:orange", "fast": "tab:blue"}
    for (task, epochs, arm), runs in chosen.items():
        for column, label in ((0, "training steps"), (1, "training time, s (one core)")):
            ax = axes[tasks.index((task, epochs))][column]
            points = np.mean([r["curve"] for r in runs], 0)
            for r in runs:
                ax.plot(*np.array(r["curve"])[:, [column, 2]].T, color=colours[arm], alpha=0.25, lw=0.8)
            ax.plot(points[:, column], points[:, 2], color=colours[arm], label=f"{arm}, lr {runs[0]['lr']:g}")
            ax.set_xlabel(label)
            ax.set_ylabel("mIoU" if task == "camvid" else "top-1")
            ax.set_title(f"{task}, {epochs} epochs")
            ax.legend()
    fig.tight_layout()
    save_figure(fig, path)
    print(path)


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []])
    parser.add_argument("--arms", nargs="+", type=arm_name, default=["bn", "exact", "fast"])
    parser.add_argument("--lrs", nargs="+", type=float, default=[0.1])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--at-best", action="store_true", help="at each arm's best rate so far, not --lrs")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of what is there")
    parser.add_argument("--figure", type=Path, help="draw the curves of what is there")
    arguments = parser.parse_args()
    shortest = 1 if arguments.epochs is None else arguments.epochs
    if shortest < 1 or min(arguments.seeds) < 0 or min(arguments.lrs) <= 0:
        parser.error("--epochs must be at least 1, --seeds at least 0 and --lrs above 0")
    measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    make_folder(arguments.out.parent)
    for seed, task, arm in itertools.product(arguments.seeds, arguments.tasks, arguments.arms):
        lrs, epochs = arguments.lrs, arguments.epochs or TASKS[task][2]
        if arguments.at_best:
            tuned = best(read_json_lines(arguments.out, missing_ok=True)).get((task, epochs, arm))
            if tuned is None:
                raise UserError(
                    f"--at-best: no run of {arm} on {task} is in {arguments.out}; give --lrs first"
                )
            lrs = [tuned[0]["lr"]]
        for lr in lrs:
            key = {"task": task, "arm": arm, "lr": lr, "seed": seed, "epochs": epochs}
            if any(key.items() <= line.items() for line in read_json_lines(arguments.out, missing_ok=True)):
                continue
            line = run(task, arm, lr, seed, epochs)
            append_json_line(arguments.out, line)
            print(f"{task} {arm} lr {lr:g} seed {seed}: {line['final']:.4f}", flush=True)
    if arguments.table and not read_json_lines(arguments.out, missing_ok=True):
        raise UserError(f"--table: {arguments.out} holds no run yet; name a task to train")
    if arguments.table:
        print(table(read_json_lines(arguments.out, missing_ok=True)))
    if arguments.figure:
        figure(read_json_lines(arguments.out, missing_ok=True), arguments.figure)


if __name__ == "__main__":
    main()
