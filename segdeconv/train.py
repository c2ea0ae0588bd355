"""Training: a recipe in, a run folder out, whatever stops it in between.

A run is a function of its recipe: a sample depends on seed, epoch and index, a step's random numbers on seed,
step and rank. What is left to keep for resuming bit for bit is in `_Run.save_state`.

Under torchrun every process works on its share of each batch; see `segdeconv.distributed`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import filelock
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from segdeconv import distributed
from segdeconv.checkpoint import (
    CheckpointInfo,
    build_for,
    build_started,
    check_same_recipe,
    create_run_folder,
    find_checkpoint,
    has_state,
    load_state,
    named,
    read_info,
    recipe_digest,
    save_checkpoint,
    save_state,
)
from segdeconv.config import Recipe
from segdeconv.convert import ConversionReport, calibrate
from segdeconv.data import (
    EpochBatches,
    EvalSet,
    Samples,
    end_workers,
    eval_loader,
    open_samples,
    train_loader,
)
from segdeconv.distributed import rank, sum_over_ranks, world_size
from segdeconv.errors import UserError, as_utf8, first_line
from segdeconv.evaluate import ignore_index_of, predicted_samples, score, torch_predictor
from segdeconv.figures import read_metrics, training_curves, triptych
from segdeconv.files import append_json_line, check_utf8, make_folder, temporaries_of, to_json, write_text
from segdeconv.metrics import MAIN_METRIC
from segdeconv.models import count_parameters, normalisation_of_weights, resolve, size_multiple, trained_part
from segdeconv.progress import Bar, console
from segdeconv.trainer import Trainer, seed_everything

_CALIBRATION_BATCHES = 16
_FILES = (
    *("recipe.yaml", "conversion.txt", "metrics.jsonl", "curves.png"),
    *("state.new.safetensors", "last.safetensors", "best.safetensors"),
)  # written only by the process that holds the folder's lock


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA where there is one, else the CPU.

    Raises:
        UserError: the device is unknown or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        # Not on the first GPU for all: each process would take memory of it.
        torch.empty(1, device=distributed.own_gpu() if name == "cuda" else device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError) as error:
        first = first_line(error)
        raise UserError(f"--device {name}: not available here ({first}); use auto or cpu") from None
    return device


def train(
    recipe: Recipe, out: str | Path, device: torch.device | str = "cpu", resume: bool = False
) -> dict[str, Any]:
    """Train one run and leave it in ``out``.

    Writes ``recipe.yaml``, ``conversion.txt`` (what became of every layer), ``metrics.jsonl`` (a line an
    epoch), TensorBoard events, ``last.safetensors``, ``best.safetensors``, ``curves.png``, and
    ``state.safetensors``, from which a stopped run goes on. SIGTERM, or Ctrl-C, leaves a state and ends the
    process.

    Args:
        resume: go on with the run in ``out`` as if it had not been stopped, on the CPU bit for bit; begin it
            where there is none.

    Returns:
        The last line of metrics.jsonl.

    Raises:
        UserError: data, network or folder are not as they should be, another process trains in ``out``, or
            the loss became NaN or infinite.
    """
    out, device = Path(out), torch.device(device)
    if not distributed.launched_by_torchrun():
        return _train(recipe, out, device, resume)
    try:
        device = distributed.start(device)
        console.quiet = rank() != 0
        return _train(recipe, out, device, resume)
    except RuntimeError as error:
        if not distributed.says_a_process_is_gone(error):
            raise
        raise UserError(
            f"rank {os.environ['RANK']}: another process of this run ended or hangs "
            f"({first_line(error)}); its own message says why; start again with --resume"
        ) from None
    finally:
        distributed.stop()


def _train(recipe: Recipe, out: Path, device: torch.device, resume: bool) -> dict[str, Any]:
    check_utf8(out, "safetensors")
    resume = resume and has_state(out)
    run = None if resume else _prepare(recipe, device)  # first: if it fails, it leaves no folder behind
    make_folder(out)
    with only_process(out), _signals() as stop:
        distributed.barrier()  # all ranks have looked for a run before rank 0 begins one
        if run is None:
            check_same_recipe(out, recipe)
            run = _prepare(recipe, device, out)
        elif rank() == 0:
            create_run_folder(out, recipe)
        try:
            return run.fit(out, resume, stop)
        finally:
            run.end_workers()


def dry_run(recipe: Recipe, device: torch.device | str = "cpu") -> None:
    """Print what a run would be, and train two steps: parameters, operations, memory, conversion report."""
    run = _prepare(recipe, torch.device(device))
    try:
        _describe(run)
    finally:
        run.end_workers()


@contextlib.contextmanager
def only_process(out: Path) -> Iterator[None]:
    """Hold the run folder's lock on rank 0. It ends with the process, which may take it more than once."""
    if rank() != 0:
        yield
        return
    lock = filelock.FileLock(out / ".lock", blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(
            f"{out}: another process trains in this folder; wait for it, or choose another --out"
        ) from None
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        raise UserError(f"{out}: cannot be locked ({first_line(error)}); choose another --out") from None
    try:
        # Temporary files of a killed process, safetensors' too; other commands write other files here.
        for left in chain(out.glob(".tmp??????"), *(temporaries_of(out / name) for name in _FILES)):
            if left.is_file():
                left.unlink()
        yield
    finally:
        lock.release()


class _Stop:
    """Whether a signal asked the run to stop, and which."""

    signal: int | None = None

    def __call__(self, number: int, frame: object) -> None:
        self.signal = number
        if number == signal.SIGINT:  # a second Ctrl-C does not wait; a second SIGTERM comes from torchrun
            signal.signal(number, signal.default_int_handler)


@contextlib.contextmanager
def _signals() -> Iterator[_Stop]:
    stop = _Stop()
    try:
        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are somebody else's
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(recipe: Recipe, device: torch.device, resumed: Path | None = None) -> _Run:
    """Open the data and build the network; a resumed run needs nothing of what it once started from."""
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
    if config.class_weights is not None and len(config.class_weights) != len(samples.classes):
        raise UserError(
            f"train.class_weights has {len(config.class_weights)} values for {len(samples.classes)} classes; "
            "give one each"
        )
    if samples.task == "classification" and (config.dice_weight or config.ohem is not None):
        raise UserError("train.dice_weight and train.ohem are for segmentation; remove them")
    seed_everything(config.seed)
    if resumed is None:
        model, report = build_started(recipe.model, len(samples.classes))
        before = read_info(find_checkpoint(recipe.model.init)).classes if recipe.model.init else ()
        if len(before) == len(samples.classes) and before != samples.classes:
            was, now = next(pair for pair in zip(before, samples.classes, strict=True) if len(set(pair)) > 1)
            console.print(
                f"note: {recipe.model.init} has other classes, but as many; its last layer is taken over, "
                f"for example {was!r} as {now!r}"
            )
        _note_normalisation(recipe)
    else:
        names = named("model", load_state(resumed)[0])
        model, report = build_for(names, recipe.model, len(samples.classes))
    return _Run(recipe, device, model.to(device), report, samples, held_out)


def _note_normalisation(recipe: Recipe) -> None:
    """Say where pictures come in another form than the weights that the network starts from know."""
    if recipe.model.init is not None:
        before = read_info(find_checkpoint(recipe.model.init)).recipe.data
        known: Any = before.mean, before.std
    else:
        known = normalisation_of_weights(recipe.model)
    own = recipe.data.mean, recipe.data.std
    if known is not None and not np.allclose(known, own, rtol=0, atol=0.005):
        mean, std = ([round(value, 4) for value in values] for values in known)
        console.print(
            f"note: the weights that training starts from know pictures of data.mean = {mean} and data.std = "
            f"{std}; the recipe has {list(own[0])} and {list(own[1])}"
        )


class _Run:
    """One training run: its data, folder, log and signals, around the steps of a `Trainer`."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        model: nn.Module,
        report: ConversionReport | None,
        samples: Samples,
        held_out: Samples,
    ) -> None:
        self.recipe, self.device, self.report = recipe, device, report
        self.samples, self.held_out = samples, held_out
        config, data = recipe.train, recipe.data
        multiple, share = size_multiple(model), (rank(), world_size())
        self.loader = train_loader(samples, data, config.batch_size, config.seed, multiple, *share)
        self.batches = cast(EpochBatches, self.loader.batch_sampler)
        self.val_set = EvalSet(held_out, data, multiple)
        self.val_loader = eval_loader(held_out, data, config.batch_size, multiple, *share)
        self.ignore_index = ignore_index_of(samples, data)
        self.metric = MAIN_METRIC[held_out.task]
        self.steps_per_epoch = len(self.loader)
        self.trainer = Trainer(model, config, self.steps_per_epoch, self.ignore_index)
        self.finished_epochs = 0
        self.best, self.seconds = -1.0, 0.0
        self.board: SummaryWriter | None = None
        self.loss_total = torch.zeros((), device=device)  # of the epoch so far

    @property
    def steps_done(self) -> int:
        """How many are made of the epoch under way."""
        return self.trainer.step - self.finished_epochs * self.steps_per_epoch

    def end_workers(self) -> None:
        end_workers(getattr(self.loader, "_iterator", None))  # they stay from epoch to epoch

    # What a stopped run goes on from.

    def save_state(self) -> None:
        if rank() != 0:
            return
        tensors = self.trainer.state_tensors() | {"loss_total": self.loss_total}
        values = {
            "step": self.trainer.step,
            "finished_epochs": self.finished_epochs,
            "best": self.best,
            "seconds": self.seconds,
            "scaler": self.trainer.scaler.state_dict(),
            "pictures": self.pictures,
            "recipe": self.recipe_digest,
        }
        save_state(self.out, tensors, values)

    def load_state(self) -> None:
        tensors, values = load_state(self.out)
        try:
            self.trainer.load_state_tensors(tensors)
            self.trainer.scaler.load_state_dict(values["scaler"])
            self.loss_total = tensors["loss_total"].to(self.device)
            self.trainer.step, self.finished_epochs = values["step"], values["finished_epochs"]
            self.best, self.seconds = values["best"], values["seconds"]
        except (KeyError, RuntimeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
            raise UserError(
                f"{self.out}: its state does not fit the network ({reason}); choose another --out"
            ) from None
        if self.finished_epochs < self.recipe.train.epochs:
            self._check_pictures(values.get("pictures", self.pictures))

    @functools.cached_property
    def recipe_digest(self) -> str:
        return recipe_digest(self.out)

    @functools.cached_property
    def pictures(self) -> dict[str, list[Any]]:
        """How many there are to train on and to validate on, and a hash of their names."""
        found = {}
        for split, samples in (("training", self.samples), ("validation", self.held_out)):
            digest = hashlib.sha256()
            for index in range(len(samples)):
                digest.update(f"{samples.name(index)}\n".encode(errors="surrogateescape"))
            found[split] = [len(samples), digest.hexdigest()]
        return found

    def _check_pictures(self, before: dict[str, list[Any]]) -> None:
        for split, (count, names) in self.pictures.items():
            was, named = before[split]
            if (was, named) != (count, names):
                now = f"there are {count}" if was != count else "some have other names"
                raise UserError(
                    f"{self.out}: was begun with {was} {split} pictures, now {now}, so it would be another "
                    "run; restore them, or choose another --out"
                )

    # The run.

    def fit(self, out: Path, resume: bool, stop: _Stop) -> dict[str, Any]:
        self.out, self.stop = out, stop
        config = self.recipe.train
        _announce(self)
        if resume:
            self._go_on()
        else:
            self._begin()
        self.trainer.start()
        line: dict[str, Any] = {}
        if self.finished_epochs:
            line = next(reversed(read_metrics(out)), {})  # empty if the file system lost them
        if rank() == 0:
            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=self.trainer.step + 1)
        with self.board or contextlib.nullcontext():
            for epoch in range(self.finished_epochs + 1, config.epochs + 1):
                line = self._epoch(epoch)
                # On the CPU every rank has running values of batch norm, and averages of them, of its own.
                distributed.broadcast_buffers(self.trainer.model, self.trainer.evaluated)
                if epoch % config.eval_every == 0 or epoch == config.epochs:
                    # Ranks cannot leave a validation, and a scheduler may not wait for its end.
                    self.save_state()
                    scores = self._score(epoch)
                    line |= {key: value for key, value in scores.items() if key != "confusion"}
                console.print(_epoch_in_words(line, config.epochs, self.metric))
                score_now = line.get(self.metric, -1.0)
                if rank() == 0:
                    self._keep(line, score_now)
                self.best = max(self.best, score_now)
                self.finished_epochs, self.loss_total = epoch, torch.zeros_like(self.loss_total)
                self.save_state()
        if rank() == 0:
            self._draw_curves()
        distributed.barrier()
        return line

    def _go_on(self) -> None:
        """Take up the run where its last state left it."""
        self.load_state()
        self._check_room()
        self._forget_later_lines()
        if self.finished_epochs < self.recipe.train.epochs:
            console.print(f"resuming after step {self.steps_done} of epoch {self.finished_epochs + 1}")
        else:
            console.print("this run is finished: nothing is left to train")

    def _begin(self) -> None:
        """Statistics for trained weights, and a first state: a folder that cannot be written says so now."""
        self._check_room()
        part = trained_part(self.recipe.model)
        layers = [] if self.report is None or part is None else self.report.layers
        if part is not None and any(x.action == "swapped" and x.name.startswith(part) for x in layers):
            batches = (images for images, _ in islice(self.loader, _CALIBRATION_BATCHES))
            first = next(batches)
            images = (batch.to(self.device) for batch in chain([first], batches))
            with self.trainer.explained(first):
                calibrate(self.trainer.model.get_submodule(part), images)
        if rank() == 0:
            if self.report is not None:
                write_text(self.out / "conversion.txt", f"{self.report}\n")
            self.save_state()

    def _check_room(self) -> None:
        if rank() != 0 or self.finished_epochs == self.recipe.train.epochs:
            return
        there = sum(path.stat().st_size for path in self.out.glob("*.safetensors"))
        wanted, free = self.bytes_wanted() - there, shutil.disk_usage(self.out).free
        if free < wanted:
            raise UserError(
                f"{self.out}: the run's checkpoints need about {wanted / 2**20:.1f} MiB, and "
                f"{free / 2**20:.1f} MiB are free; make room or choose another --out"
            )

    def bytes_wanted(self) -> int:
        """The most that files with weights take at a time: three states (the last, the one before and the
        one being written) and three checkpoints (the last, the best and the one being written).
        """
        config = self.recipe.train
        network = sum(value.nbytes for value in self.trainer.model.state_dict().values())
        parameters = sum(p.nbytes for p in self.trainer.model.parameters() if p.requires_grad)
        momenta = {"sgd": int(config.momentum > 0), "adamw": 2}[config.optimizer] * parameters
        state = network + momenta + (network if self.trainer.ema else 0)
        return 3 * state + 3 * network

    def _epoch(self, epoch: int) -> dict[str, Any]:
        """Train the rest of an epoch; returns its line for metrics.jsonl."""
        config, trainer = self.recipe.train, self.trainer
        trainer.model.train()
        self.batches.epoch, self.batches.start = epoch - 1, self.steps_done
        source = _Timed(self.loader)
        bar = Bar(source, len(self.loader), f"epoch {epoch}/{config.epochs}")
        begin = saved = time.monotonic()
        before, first = self.seconds, self.batches.start
        for images, targets in bar:
            self.loss_total += trainer.train_step(images, targets)
            done = self.steps_done
            if trainer.unchecked:  # to read the loss would be to wait
                continue
            took = max(time.monotonic() - begin, 1e-9)
            bar.note = (
                f"loss {self.loss_total.item() / done:.4f}, lr {trainer.lr(trainer.step - 1):.3g}, "
                f"{(done - first) * config.batch_size / took:.1f} images/s, {memory_mib(self.device):.0f} MiB"
            )
            self.seconds = before + took
            if self._asked_to_stop():
                self._leave()
            if time.monotonic() - saved >= 60 * config.checkpoint_minutes and done < self.steps_per_epoch:
                self.save_state()
                saved = time.monotonic()
        took = max(time.monotonic() - begin, 1e-9)
        made = self.steps_per_epoch - first  # 0 if the run was resumed before a validation
        self.seconds = before + took
        self.batches.start = 0
        return {
            "epoch": epoch,
            "step": trainer.step,
            "loss": self.loss_total.item() / self.steps_per_epoch,
            "lr": trainer.lr(trainer.step - 1),  # the optimiser of a run resumed here has made no step yet
            "seconds": self.seconds,
            "images_per_second": made * config.batch_size / took if made else math.nan,
            "loader_share": source.seconds / took if made else math.nan,
            "memory_mib": memory_mib(self.device),
        }

    def _asked_to_stop(self) -> bool:
        if world_size() == 1:
            return self.stop.signal is not None
        asked = torch.tensor(float(self.stop.signal is not None), device=self.device)
        if sum_over_ranks(asked).item() and self.stop.signal is None:
            self.stop.signal = signal.SIGTERM
        return self.stop.signal is not None

    def _leave(self) -> None:
        self.save_state()
        step = self.trainer.step
        console.print(f"stopped by a signal at step {step}; nothing is lost: go on with --resume")
        if rank() == 0 and self.finished_epochs:
            with contextlib.suppress(UserError):  # the state is what counts
                self._draw_curves()
        raise SystemExit(130 if self.stop.signal == signal.SIGINT else 0)

    def _draw_curves(self) -> None:
        training_curves({self.recipe.model.norm: [self.out]}, self.out / "curves.png", self.metric)

    def _score(self, epoch: int) -> dict[str, Any]:
        predict = torch_predictor(self.trainer.evaluated, self.trainer.amp)
        batches: Any = _Stoppable(self.val_loader, self)
        return score(predict, batches, self.held_out, self.ignore_index, self.device, f"epoch {epoch} val")

    def _keep(self, line: dict[str, Any], score_now: float) -> None:
        """Leave an epoch's results: its line, checkpoints, TensorBoard's scalars and pictures."""
        append_json_line(self.out / "metrics.jsonl", line)  # before a state says the epoch is finished
        scalars = {key: value for key, value in line.items() if not isinstance(value, dict)}
        held_out = self.held_out
        info = CheckpointInfo(
            self.recipe, held_out.task, held_out.classes, held_out.palette, line["epoch"], scalars
        )
        save_checkpoint(self.out / "last.safetensors", self.trainer.evaluated, info)
        if score_now > self.best:
            save_checkpoint(self.out / "best.safetensors", self.trainer.evaluated, info)
        assert self.board is not None
        for key, value in line.items():
            for name, number in value.items() if isinstance(value, dict) else [("", value)]:
                self.board.add_scalar(as_utf8(f"{key}/{name}" if name else key), number, self.trainer.step)
        if score_now >= 0 and held_out.task == "segmentation":
            predict = torch_predictor(self.trainer.evaluated, self.trainer.amp)
            rows = predicted_samples(predict, held_out, self.val_set, self.device)
            pictures = triptych(rows, held_out.classes, held_out.palette)
            self.board.add_image("val", np.asarray(pictures), self.trainer.step, dataformats="HWC")

    def _forget_later_lines(self) -> None:
        """Drop lines of epochs that will be trained once more."""
        path = self.out / "metrics.jsonl"
        if rank() == 0 and path.exists():
            lines = [line for line in read_metrics(self.out) if line["epoch"] <= self.finished_epochs]
            text = "".join(f"{to_json(line)}\n" for line in lines)
            write_text(path, text)


def _announce(run: _Run) -> None:
    """What a run is, and what of its recipe has no effect or is missing, for the log."""
    recipe, trainer = run.recipe, run.trainer
    if world_size() > 1 and run.device.type == "cpu" and trainer.has_batch_norm:
        console.print("note: on the CPU, batch norm takes its statistics from each process's own share")
    if run.report is not None:
        console.print(f"network deconvolution: {run.report.summary()}")
    millions = count_parameters(trainer.model) / 1e6
    ranks = f", {world_size()} processes" if world_size() > 1 else ""
    console.print(
        f"{recipe.name}: {recipe.model.architecture}, {millions:.2f} M parameters, norm {recipe.model.norm}, "
        f"{len(run.samples)} training and {len(run.held_out)} validation pictures, on {run.device}{ranks}"
    )
    if recipe.train.warmup_epochs > recipe.train.epochs:
        console.print("note: train.warmup_epochs is more than train.epochs, so train.lr is never reached")
    if trainer.compiles < recipe.train.compile:
        console.print(
            "note: train.compile has no effect here: of train.batch_size = "
            f"{recipe.train.batch_size} the {world_size()} processes have different shares"
        )
    if trainer.records < recipe.train.cuda_graphs:
        console.print("note: train.cuda_graphs has no effect here: it is for a GPU, and one process")
    off = [key for key in ("compile", "cuda_graphs") if not getattr(recipe.train, key)]
    fast = run.report is not None and recipe.model.network_deconv.mode == "fast"
    if off and fast and run.device.type == "cuda" and world_size() == 1:
        console.print(
            "note: on a GPU network deconvolution comes near batch norm's speed with "
            f"{' and '.join(f'train.{key}=true' for key in off)}"
        )


def _epoch_in_words(line: dict[str, Any], epochs: int, metric: str) -> str:
    """A line of metrics.jsonl for the log."""
    epoch, seconds = line["epoch"], line["seconds"]
    shown = f", {metric} {line[metric]:.4f}" if metric in line else ""
    if not math.isnan(line["images_per_second"]):
        shown += f", {line['images_per_second']:.1f} images/s, loader {line['loader_share']:.0%}"
    left = f", some {seconds / epoch * (epochs - epoch):.0f} s left" if epoch < epochs else ""
    return f"epoch {epoch}/{epochs}: loss {line['loss']:.4f}{shown}, {seconds:.0f} s of training{left}"


def _describe(run: _Run) -> None:
    """What `dry_run` prints."""
    _announce(run)
    if run.report is not None:
        console.print(str(run.report))
    trainer = run.trainer
    images, targets = next(iter(run.loader))
    trainer.model.train()
    with FlopCounterMode(display=False) as counter, trainer.explained(images):
        trainer.model(images.to(run.device))
    operations = counter.get_total_flops() / len(images) / 1e9
    console.print(
        f"{tuple(images.shape)} images a batch, {run.steps_per_epoch} steps an epoch, "
        f"{operations:.2f} GFLOP an image forward (a multiplication and an addition are two)"
    )
    trainer.check_every = 1
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for step in (1, 2):
        kept.clear()
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.compiler.set_stance("force_eager"):
            loss = trainer.train_step(images, targets)
        console.print(f"step {step}: loss {loss.item():.4f}")
    weights = sum(p.nbytes for p in trainer.model.parameters())
    values = (value for state in trainer.optimizer.state.values() for value in state.values())
    states = sum(value.nbytes for value in values if isinstance(value, Tensor))
    console.print(
        f"memory: weights {weights / 2**20:.0f} MiB, gradients {weights / 2**20:.0f}, optimiser "
        f"{states / 2**20:.0f}, kept for the backward pass about {sum(kept.values()) / 2**20:.0f}; "
        f"peak of this process {memory_mib(run.device):.0f} MiB"
    )


class _Timed:
    """Iterate, and add up the seconds spent waiting for items."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[Any]:
        items, done = iter(self.items), object()
        while True:
            begin = time.monotonic()
            item = next(items, done)
            self.seconds += time.monotonic() - begin
            if item is done:
                return
            yield item


class _Stoppable:
    """The validation batches; a run of one process that a signal asks to stop ends between them."""

    def __init__(self, loader: DataLoader, run: _Run) -> None:
        self.loader, self.run = loader, run

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        try:
            for batch in batches:
                if world_size() == 1 and self.run.stop.signal is not None:
                    self.run._leave()
                yield batch
        finally:
            end_workers(batches)


def memory_mib(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
