"""The zoo: entries made from finished runs, verified and published.

What an entry claims was measured on the very file that it stores, and `verify` measures it again. What an
entry is, what it says, and how its weights are fetched, is in entries.py and download.py: listing the zoo
needs no torch, which takes seconds to load.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segdeconv import bench
from segdeconv.checkpoint import CheckpointInfo, copy_checkpoint, load_checkpoint, read_info
from segdeconv.config import DataConfig, Recipe, recipe_to_yaml
from segdeconv.data import EvalSet, open_samples
from segdeconv.download import offline
from segdeconv.entries import (
    DATA,
    METRICS,
    NAME,
    WEIGHTS,
    Entry,
    damaged_scores,
    entry_folder,
    entry_json,
    entry_names,
    find_weights,
    measured,
    read_entry,
    read_scores,
    zoo_folder,
)
from segdeconv.errors import UserError
from segdeconv.evaluate import Inference, evaluate_run, predicted_samples, torch_predictor
from segdeconv.figures import read_metrics, with_legend
from segdeconv.files import make_folder, sha256_of, to_json, with_home, write_atomically, write_text
from segdeconv.fold import fold_network_deconv
from segdeconv.images import overlay, save_image
from segdeconv.markdown import escaped
from segdeconv.metrics import MAIN_METRIC
from segdeconv.models import count_parameters, resolve, size_multiple, trained_part

TOLERANCE = 1e-3  # of a metric measured again, on a machine that rounds otherwise
_UNIT = METRICS | {"top5": "top-5", "pixel_acc": "pixel accuracy"}
_PRECISION = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of train.amp
_ADDING = ".adding."  # begins the folder of an entry that is being made
_FAILURES = 4  # classes and confusions that a card names


def load(name: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The trained network of a zoo entry, run folder or checkpoint, in evaluation mode.

    `load_checkpoint` does the same and returns classes and normalisation with it.

    Raises:
        UserError: nothing is called so, or the weights cannot be fetched or are damaged.
    """
    return load_checkpoint(name, device)[0]


# Making an entry.


@dataclass(frozen=True)
class Origin:
    """What a card says that no file of a run knows; None takes what can be found out.

    Attributes:
        data: what the data is and its licence; by default from `entries.DATA`.
        machine: what the run was trained on; by default this machine.
        notes: further sentences, such as what is known to fail.
    """

    data: str | None = None
    machine: str | None = None
    notes: Sequence[str] = ()


def add(
    run: Path,
    name: str | None = None,
    half: bool = False,
    origin: Origin | None = None,
    root: str | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Write the folder of a new entry from a finished and evaluated run.

    The weights are stored first and then evaluated as the run's ``eval.json`` was, but in float32, so that
    ``metrics.json`` describes what is stored and what is exported.

    Args:
        name: of the entry; by default ``ARCH_ENCODER.NORM_DATASET`` from the recipe.
        half: store large tensors as float16.
        root: where the data lies, if not where the recipe says.

    Raises:
        UserError: the run is not finished or not evaluated, its data is not here, there is such an entry, or
            the package is not that of a clone.
    """
    if zoo_folder().name == "zoo_entries":
        raise UserError("zoo add: the zoo lies in an installed package; add to a clone of the repository")
    origin = origin or Origin()
    info, scores, seconds = _finished_run(run)
    info = replace(info, recipe=_without_home(info.recipe))
    name = name or default_name(info.recipe)
    dataset, data = _dataset_of(name, info.recipe, origin.data)
    origin = Origin(data, origin.machine or machine(device), origin.notes)

    make_folder(zoo_folder())
    _remove_abandoned()
    with tempfile.TemporaryDirectory(prefix=_ADDING, dir=zoo_folder()) as temporary:
        new = make_folder(Path(temporary) / name)
        weights = new / WEIGHTS
        copy_checkpoint(run / "best.safetensors", weights, info.recipe, half)
        inference = replace(_inference(scores, run / "eval.json"), amp="off")
        stored_scores = _evaluate_stored(weights, scores["split"], inference, Path(temporary), root, device)
        model, _ = load_checkpoint(weights, device)
        picture = _picture(model, info, new, Path(temporary), root, device)
        size = input_size(info.recipe.data)
        architecture, encoder = _network(info.recipe)
        entry = Entry(
            name=name,
            task=info.task,  # type: ignore[arg-type]  # pydantic checks it
            dataset=dataset,
            architecture=architecture,
            encoder=encoder,
            norm=info.recipe.model.norm,
            parameters=count_parameters(model),
            gflops=count_gflops(model, size),
            input=size,
            storage="float16" if half else "float32",
            bytes=weights.stat().st_size,
            sha256=sha256_of(weights),
        )
        write_text(new / "recipe.yaml", recipe_to_yaml(info.recipe))
        write_text(new / "metrics.json", to_json(stored_scores, indent=1) + "\n")
        write_text(new / "card.md", _card(entry, info, stored_scores, scores, seconds, origin, picture))
        write_text(new / "entry.json", entry_json(entry))
        try:
            os.replace(new, zoo_folder() / name)
        except OSError as error:
            _check_new(zoo_folder() / name)  # another process may have added it meanwhile
            raise UserError(f"{zoo_folder() / name}: cannot be written ({error.strerror})") from None
    return zoo_folder() / name


def _finished_run(run: Path) -> tuple[CheckpointInfo, dict[str, Any], float]:
    """Best checkpoint, scores and seconds of training of a run that can become an entry.

    Raises:
        UserError: it is not finished, or not evaluated as entries are.
    """
    checkpoint = run / "best.safetensors"
    if not checkpoint.is_file():
        raise UserError(f"{run}: has no best.safetensors; give the folder of a finished run")
    if not (run / "eval.json").is_file():
        raise UserError(f"{run}: has no eval.json; first segdeconv eval {run}")
    info, scores, lines = read_info(checkpoint), read_scores(run / "eval.json"), read_metrics(run)
    epochs = info.recipe.train.epochs
    if not lines or lines[-1]["epoch"] != epochs:
        raise UserError(f"{run}: is not finished ({epochs} epochs); go on with segdeconv train --resume")
    if scores.get("epoch") != info.epoch:
        raise UserError(f"{run}: eval.json is not of this checkpoint; evaluate anew: segdeconv eval {run}")
    settings = _inference(scores, run / "eval.json")
    if settings.flip or settings.scales != (1.0,):
        raise UserError(
            f"{run}: eval.json is averaged over mirror images or scales, an entry's metrics are those of the "
            f"network alone; evaluate anew: segdeconv eval {run}"
        )
    if scores["split"] != info.recipe.data.val:
        raise UserError(
            f"{run}: eval.json is of the split {scores['split']!r}, an entry's metrics are of the recipe's "
            f"{info.recipe.data.val!r}; evaluate anew: segdeconv eval {run}"
        )
    return info, scores, lines[-1]["seconds"]


def _remove_abandoned() -> None:
    """Remove what processes that were killed left of entries they were making."""
    for folder in zoo_folder().glob(f"{_ADDING}*"):
        with contextlib.suppress(FileNotFoundError):  # an add that has just ended
            if time.time() - folder.stat().st_mtime > 24 * 3600:
                shutil.rmtree(folder, ignore_errors=True)


def _evaluate_stored(
    weights: Path,
    split: str,
    inference: Inference,
    figures: Path,
    root: str | None,
    device: torch.device | str,
) -> dict[str, Any]:
    """Scores of stored weights."""
    try:
        return evaluate_run(weights, device, root=root, split=split, inference=inference, figures=figures)
    except UserError as error:
        raise UserError(
            f"an entry's metrics are measured on what is stored, which failed: {error}; if the data lies "
            "elsewhere, say --root"
        ) from None


def _without_home(recipe: Recipe) -> Recipe:
    """The recipe, without the author's home folder in the places of the data and of what it began with."""
    home = os.path.expanduser("~")  # which Path.home refuses where there is none

    def public(path: str | None) -> str | None:
        if path is None or home == "/" or not Path(path).is_relative_to(home):
            return path
        return str(Path("~") / Path(path).relative_to(home))

    model = replace(recipe.model, init=public(recipe.model.init))
    return replace(recipe, data=recipe.data.at(public(recipe.data.root)), model=model)


def _dataset_of(name: str, recipe: Recipe, data: str | None) -> tuple[str, str]:
    """The data set in the name of a new entry, and ``data`` or what is known of its licence.

    Raises:
        UserError: the name is taken, or says something else than the recipe; or nothing is known.
    """
    if not re.fullmatch(NAME, name):
        raise UserError(f"--name {name!r}: expected ARCH_ENCODER.nd_DATASET, or .bn_DATASET for the twin")
    norm, _, dataset = name.partition(".")[2].partition("_")
    if norm != recipe.model.norm:
        raise UserError(f"--name {name!r}: says {norm}, but the run's model.norm is {recipe.model.norm}")
    of = recipe.data.dataset
    if data is None and {of, dataset} <= DATA.keys() and of != dataset:
        raise UserError(
            f"--name {name!r}: says {dataset}, but the run's data.dataset is {of}; choose another name, or "
            "say with --data what the data is and its licence"
        )
    data = data or DATA.get(dataset)
    _check_new(zoo_folder() / name)
    if data is None:
        raise UserError(f"--data is missing: what {dataset} is and under which licence, in a sentence or two")
    return dataset, data


def _check_new(folder: Path) -> None:
    if folder.exists():
        raise UserError(f"{folder}: there is such an entry; remove it first, or choose another --name")


def default_name(recipe: Recipe) -> str:
    """``ARCH_ENCODER.NORM_DATASET``."""
    return f"{'_'.join(filter(None, _network(recipe)))}.{recipe.model.norm}_{recipe.data.dataset}"


def count_gflops(model: nn.Module, size: tuple[int, int]) -> float:
    """Operations of the folded network on one picture of ``size`` (height, width), in 10^9.

    A multiplication and an addition are two; convolutions and matrix products are counted.
    """
    multiple = size_multiple(model)
    height, width = (side + -side % multiple for side in size)
    device, folded = next(model.parameters()).device, fold_network_deconv(model)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        folded(torch.zeros(1, 3, height, width, device=device))
    return round(counter.get_total_flops() / 1e9, 4)


def input_size(data: DataConfig) -> tuple[int, int]:
    """Height and width that an entry's GFLOPs are counted at: of its pictures, or else of its crops.

    Raises:
        UserError: the recipe fixes neither.
    """
    size = (data.crop if data.shorter_side else None) or data.size or data.crop
    if size is None:
        raise UserError("the recipe has neither data.size nor data.crop, at which GFLOPs could be counted")
    return size


def machine(device: torch.device | str) -> str:
    """This machine, in words."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    here = bench.machine("cpu")
    return f"{here['cores']} CPU cores ({here['device_name']})"


def _network(recipe: Recipe) -> tuple[str, str | None]:
    _, encoder = resolve(recipe.model)
    name = recipe.model.architecture
    encoder = encoder.removeprefix("tu-") if encoder else None  # as a recipe may call timm's
    return (name.removesuffix(f"_{encoder}") if encoder else name), encoder


def _picture(
    model: nn.Module,
    info: CheckpointInfo,
    folder: Path,
    figures: Path,
    root: str | None,
    device: torch.device | str,
) -> str:
    """Leave the card's picture in ``folder``; its file name."""
    if info.task != "segmentation":
        shutil.copyfile(figures / "confusion.png", folder / "confusion.png")
        return "confusion.png"
    data = info.recipe.data.at(root)
    samples, multiple = open_samples(data, "val"), size_multiple(model)
    val_set = EvalSet(samples, data, multiple)
    rows = predicted_samples(torch_predictor(model), samples, val_set, device)
    # Only what the network painted: the pictures and masks themselves are not the zoo's to hand on.
    painted = [overlay(image, labels, samples.palette) for image, _, labels in rows]
    strip = Image.fromarray(np.concatenate(painted, axis=1))
    save_image(with_legend(strip, samples.classes, samples.palette), folder / "overlay.jpg")
    return "overlay.jpg"


def _card(
    entry: Entry,
    info: CheckpointInfo,
    scores: dict[str, Any],
    before: dict[str, Any],
    seconds: float,
    origin: Origin,
    picture: str,
) -> str:
    metric, recipe = MAIN_METRIC[entry.task], info.recipe
    twin = entry.name.replace(".bn_", ".nd_") if entry.norm == "bn" else entry.name.replace(".nd_", ".bn_")
    what = {
        "nd": f"Network deconvolution (mode {recipe.model.network_deconv.mode}) in place of batch norm; the "
        f"batch-norm twin is {twin}.",
        "bn": f"The batch-norm twin of {twin}.",
    }[entry.norm]
    size = f"{entry.input[1]}x{entry.input[0]}"
    place = f" The recipe expects the data in `{recipe.data.root}`." if recipe.data.root else ""
    start = "from scratch" if trained_part(recipe.model) is None else "from pretrained weights"
    facts = {
        f"{_UNIT[metric]} ({scores['split']}, {scores['samples']} pictures)": f"{scores[metric]:.4f}",
        f"{_UNIT[metric]} of the run, before storage": f"{before[metric]:.4f}",
        **{_UNIT[key]: f"{scores[key]:.4f}" for key in ("pixel_acc", "top5") if key in scores},
        "stored as": f"{entry.storage}, {entry.bytes / 1e6:.1f} MB",
        "parameters": f"{entry.parameters / 1e6:.2f} M",
        f"operations for {size}": f"{entry.gflops:.2f} GFLOP (a multiplication and an addition are two)",
        "learning rate": f"{recipe.train.lr:g}",
        "seed": str(recipe.train.seed),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    trained = (
        f"{recipe.train.epochs} epochs in {_PRECISION[recipe.train.amp]}, {seconds / 60:.0f} minutes on "
        f"{origin.machine}. The stored weights are of epoch {info.epoch}, the best on the pictures that "
        f"the metrics are of.{place}"
    )
    per_class, key = ("IoU", "iou") if entry.task == "segmentation" else ("recall", "recall")
    by_class = {cls: value for cls, value in scores[key].items() if not math.isnan(value)}  # that occur
    classes = ", ".join(
        f"{index} {escaped(cls)}" + (f" ({by_class[cls]:.3f})" if cls in by_class else "")
        for index, cls in enumerate(info.classes)
    )
    notes = [*_failures(info.classes, by_class, scores, per_class), *origin.notes]
    failures = "\n".join(f"- {note}" for note in notes)
    network = "-".join(filter(None, (entry.architecture, entry.encoder)))
    shown = "what it sees" if picture == "overlay.jpg" else "confusion matrix"
    return f"""\
# {entry.name}

{entry.task.capitalize()}, {network}, trained {start}. {what}

| | |
|---|---|
{rows}

![{shown}]({picture})

## Data

{origin.data}

## Reproduce

    segdeconv train {entry.name}

{trained}

## Classes ({per_class})

{classes}

## Known failures

{failures}
"""


def _failures(
    classes: Sequence[str], by_class: dict[str, float], scores: dict[str, Any], per_class: str
) -> list[str]:
    """The weakest classes and the most frequent confusions, in words."""
    weakest = sorted(by_class, key=lambda cls: by_class[cls])[:_FAILURES]
    counts = np.array(scores["confusion"], np.float64)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    worst = np.argsort(-shares, axis=None)[:_FAILURES]
    pairs = [np.unravel_index(index, shares.shape) for index in worst]
    names = [escaped(cls) for cls in classes]
    taken = [f"{names[t]} for {names[p]} ({shares[t, p]:.0%})" for t, p in pairs if shares[t, p] > 0]
    return [
        f"Lowest {per_class}: {', '.join(f'{escaped(cls)} {by_class[cls]:.3f}' for cls in weakest)}.",
        *([f"Most often mistaken, in percent of the true class: {', '.join(taken)}."] if taken else []),
    ]


# Verifying and publishing.


@dataclass(frozen=True)
class Verdict:
    """What `verify` found; ``again`` is None, with the reason, where the data is not at hand."""

    weights: Path
    metric: str
    claimed: float
    again: float | None
    reason: str = ""


def verify(name: str, root: str | None = None, device: torch.device | str = "cpu") -> Verdict:
    """Check an entry's weights against its SHA-256, load them, and evaluate them where the data is at hand.

    Raises:
        UserError: the weights cannot be fetched, do not fit, or do not give what the entry claims; or there
            is no such data in ``root``.
    """
    entry, scores = read_entry(name), measured(name)
    weights = find_weights(name)
    model, info = load_checkpoint(weights, device)
    found, metric = count_parameters(model), MAIN_METRIC[entry.task]
    if found != entry.parameters:
        raise UserError(f"{name}: has {found} parameters, but its entry.json says {entry.parameters}")
    data = info.recipe.data.at(root)
    try:
        open_samples(data, "val")
    except UserError as error:
        if root is not None:
            raise
        return Verdict(weights, metric, scores[metric], None, str(error))
    inference = _inference(scores, entry_folder(name) / "metrics.json")
    again = evaluate_run(weights, device, root=root, split=scores["split"], inference=inference)[metric]
    if not abs(again - scores[metric]) <= TOLERANCE:
        raise UserError(
            f"{name}: {metric} is {again:.4f} here, but the entry says {scores[metric]:.4f}; is the data in "
            f"{data.root} what the card describes?"
        )
    return Verdict(weights, metric, scores[metric], again)


def publish(to: str, names: Sequence[str] = ()) -> list[str]:
    """Lay entries with their weights out for any static web server, or push them to the Hugging Face Hub.

    Args:
        to: a folder, or ``hf://ORG/REPO``, which is made if need be (huggingface_hub's login holds). Either
            serves as SEGDECONV_ZOO_URL, as does the address of a server of that folder.
        names: which entries; by default all.

    Returns:
        The names.

    Raises:
        UserError: there is no such entry, its weights are not to be had, or the place cannot be written.
    """
    names = list(names) or entry_names()
    if not to or (not to.startswith("hf://") and re.match("[A-Za-z][A-Za-z0-9+.-]*:/", to)):
        raise UserError(f"--to {to!r}: expected a folder or hf://ORG/REPO")
    folder = None if to.startswith("hf://") else with_home(to, "--to")
    weights = {name: find_weights(name) for name in names}  # all of them, before anything is written
    if folder is not None:
        for name in names:
            _lay_out(name, weights[name], folder)
        return names
    repository = to.removeprefix("hf://").strip("/")
    if repository.count("/") != 1:
        raise UserError(f"--to {to}: expected hf://ORG/REPO")
    if offline():
        raise UserError(f"--to {to}: SEGDECONV_OFFLINE or HF_HUB_OFFLINE forbids internet access")
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError("--to hf://: huggingface_hub is not installed; pip install huggingface_hub") from None
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            _lay_out(name, weights[name], Path(temporary))
        try:
            api = HfApi()
            api.create_repo(repository, exist_ok=True)
            api.upload_folder(repo_id=repository, folder_path=temporary, commit_message="segdeconv zoo")
        except Exception as error:  # it lets through what its HTTP library raises, which changes
            raise UserError(f"--to {to}: the hub refused ({' '.join(str(error).split())[:200]})") from None
    return names


def _lay_out(name: str, weights: Path, place: Path) -> None:
    folder = make_folder(place / name)
    for source in (weights, *sorted(entry_folder(name).iterdir())):
        if source.name != WEIGHTS or source == weights:
            target = folder / (WEIGHTS if source == weights else source.name)
            write_atomically(target, lambda path, source=source: shutil.copyfile(source, path))  # type: ignore[misc]


def _inference(scores: dict[str, Any], path: Path) -> Inference:
    """The settings that the scores of a file were measured with."""
    try:
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in scores["settings"].items()
            if key != "size"
        }
        return Inference(**settings)
    except (KeyError, TypeError, AttributeError, UserError) as error:
        raise damaged_scores(path, error) from None
