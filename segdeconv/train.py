"""Training: a recipe in, a run folder out."""

from __future__ import annotations

import math
import random
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from segdeconv.checkpoint import CheckpointInfo, create_run_folder, save_checkpoint
from segdeconv.config import Recipe, TrainConfig
from segdeconv.convert import calibrate
from segdeconv.data import Samples, eval_loader, open_samples, train_loader
from segdeconv.errors import UserError
from segdeconv.evaluate import ignore_index_of, score, torch_predictor
from segdeconv.figures import training_curves
from segdeconv.files import to_json, write_atomically
from segdeconv.metrics import MAIN_METRIC
from segdeconv.models import build_model, resolve, size_multiple, split_output, starts_trained
from segdeconv.progress import Bar, console

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_CALIBRATION_BATCHES = 16


def lr_factor(step: int, steps: int, warmup_steps: int, schedule: str, power: float) -> float:
    """The learning rate at ``step`` of ``steps`` over its peak: linear warm-up, then the schedule."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    t = (step - warmup_steps) / max(steps - warmup_steps, 1)
    if schedule == "poly":
        return (1 - t) ** power
    if schedule == "cosine":
        return (1 + math.cos(math.pi * t)) / 2
    return 1.0


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def loss_of(output: Any, targets: Tensor, config: TrainConfig, ignore_index: int) -> Tensor:
    """Mean cross-entropy over labelled pixels, plus the auxiliary heads' where the network has some."""

    # Summed and divided by hand: the mean over a batch without a single labelled pixel would be NaN.
    counted = (targets != ignore_index).sum().clamp(min=1)

    def entropy(logits: Tensor) -> Tensor:
        smoothing = config.label_smoothing
        total = F.cross_entropy(
            logits.float(), targets, ignore_index=ignore_index, label_smoothing=smoothing, reduction="sum"
        )
        return total / counted

    main, auxiliary = split_output(output)
    return entropy(main) + config.aux_weight * sum(entropy(logits) for logits in auxiliary)


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU.

    Raises:
        UserError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not available here ({first}); use auto or cpu") from None
    return device


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)


def train(recipe: Recipe, out: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Train one run and leave it in ``out``.

    Writes ``recipe.yaml``, ``conversion.txt`` (what became of every layer), ``metrics.jsonl`` (a line an
    epoch), TensorBoard events, ``last.safetensors``, ``best.safetensors`` and ``curves.png``.

    Returns:
        The last line of metrics.jsonl.

    Raises:
        UserError: data, network or folder are not as they should be, or the loss became NaN or infinite.
    """
    device = torch.device(device)
    config = recipe.train
    architecture, _ = resolve(recipe.model)
    samples, held_out = open_samples(recipe.data, "train"), open_samples(recipe.data, "val")
    if architecture.task != samples.task:
        raise UserError(
            f"model.architecture = {recipe.model.architecture!r} is for {architecture.task}, but "
            f"data.dataset = {recipe.data.dataset!r} is for {samples.task}"
        )
    if samples.classes != held_out.classes:
        raise UserError("the train and val splits have different classes")
    seed_everything(config.seed)
    model, report = build_model(recipe.model, len(samples.classes))
    multiple = size_multiple(model)
    loader = train_loader(samples, recipe.data, config.batch_size, config.seed, multiple)
    val_loader = eval_loader(held_out, recipe.data, config.batch_size, multiple)
    create_run_folder(out, recipe)

    model.to(device)
    if report is not None:
        write_atomically(out / "conversion.txt", lambda temporary: temporary.write_text(f"{report}\n"))
        console.print(f"network deconvolution: {report.summary()}\n  every layer: {out / 'conversion.txt'}")
        if starts_trained(recipe.model):
            calibrate(model, (images.to(device) for images, _ in islice(loader, _CALIBRATION_BATCHES)))
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{recipe.name}: {recipe.model.architecture}, {parameters / 1e6:.2f} M parameters, norm "
        f"{recipe.model.norm}, {len(samples)} training and {len(held_out)} validation pictures, on {device}"
    )
    ignore_index = ignore_index_of(samples, recipe.data)
    return _Run(recipe, out, device, model, loader, ignore_index).fit(held_out, val_loader)


class _Run:
    """The state of one training run."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: torch.device,
        model: nn.Module,
        loader: DataLoader[Any],
        ignore_index: int,
    ) -> None:
        self.recipe, self.out, self.device, self.model, self.loader = recipe, out, device, model, loader
        config = recipe.train
        self.ignore_index = ignore_index
        self.optimizer = make_optimizer(model, config)
        steps = config.epochs * len(loader)
        warmup = round(config.warmup_epochs * len(loader))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: lr_factor(step, steps, warmup, config.schedule, config.poly_power)
        )
        self.amp = AMP[config.amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")

    def fit(self, held_out: Samples, val_loader: DataLoader) -> dict[str, Any]:
        config, task, metric = self.recipe.train, held_out.task, MAIN_METRIC[held_out.task]
        best, seconds, line = -1.0, 0.0, {}
        with SummaryWriter(str(self.out / "tensorboard")) as board:
            for epoch in range(1, config.epochs + 1):
                start = time.monotonic()
                loss = self._epoch(epoch)
                seconds += time.monotonic() - start
                line = {
                    "epoch": epoch,
                    "loss": loss,
                    "lr": self.optimizer.param_groups[0]["lr"],
                    "seconds": seconds,
                }
                scores: dict[str, Any] = {}
                if epoch % config.eval_every == 0 or epoch == config.epochs:
                    scores = score(
                        torch_predictor(self.model, self.amp),
                        val_loader,
                        held_out,
                        self.ignore_index,
                        self.device,
                        f"epoch {epoch} val",
                    )
                    scores.pop("confusion")
                    line |= {key: value for key, value in scores.items() if not isinstance(value, dict)}
                self._write(board, line)
                info = CheckpointInfo(self.recipe, task, held_out.classes, held_out.palette, epoch, line)
                save_checkpoint(self.out / "last.safetensors", self.model, info)
                if scores and scores[metric] > best:
                    best = scores[metric]
                    save_checkpoint(self.out / "best.safetensors", self.model, info)
                shown = f", {metric} {scores[metric]:.4f}" if scores else ""
                console.print(
                    f"epoch {epoch}/{config.epochs}: loss {loss:.4f}{shown}, {seconds:.0f} s of training"
                )
        training_curves({self.recipe.model.norm: self.out}, self.out / "curves.png", metric)
        return line

    def _epoch(self, epoch: int) -> float:
        """One pass over the training split; returns the mean loss."""
        self.model.train()
        sampler: Any = self.loader.sampler
        sampler.epoch = epoch - 1
        total = torch.zeros((), device=self.device)
        bar = Bar(self.loader, len(self.loader), f"epoch {epoch}/{self.recipe.train.epochs}")
        for step, (images, targets) in enumerate(bar, 1):
            try:
                loss = self._step(images.to(self.device), targets.to(self.device))
            except torch.OutOfMemoryError:
                raise UserError("the device ran out of memory; lower train.batch_size or data.crop") from None
            except (RuntimeError, ValueError) as error:
                if epoch > 1 or step > 1:
                    raise
                raise UserError(
                    f"the network cannot train on batches of shape {tuple(images.shape)} "
                    f"({str(error).splitlines()[0]}); check train.batch_size, data.crop and model.options"
                ) from error
            total += loss
            if step % 10 == 0 or step == len(self.loader):
                mean = (total / step).item()
                if not math.isfinite(mean):
                    raise UserError(
                        f"the loss became {mean} at step {step} of epoch {epoch}; try a lower train.lr (now "
                        f"{self.recipe.train.lr}), a longer train.warmup_epochs, or train.amp: off"
                    )
                bar.note = f"loss {mean:.4f}"
        return (total / len(self.loader)).item()

    def _step(self, images: Tensor, targets: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            output = self.model(images)
        loss = loss_of(output, targets, self.recipe.train, self.ignore_index)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.detach()

    def _write(self, board: SummaryWriter, line: dict[str, Any]) -> None:
        path = self.out / "metrics.jsonl"
        try:
            with open(path, "a") as file:
                file.write(to_json(line) + "\n")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        for key, value in line.items():
            if key != "epoch":
                board.add_scalar(key, value, line["epoch"])
