"""Runs and checkpoints on disk. Everything is safetensors, YAML and JSON: loading never runs code.

A run folder holds ``recipe.yaml``, ``metrics.jsonl``, ``last.safetensors`` and ``best.safetensors``. A
checkpoint is the network's state dict with its recipe, class names and scores in the file's metadata, so that
one file is enough to rebuild the network. ``state.safetensors`` is what training resumes from: network,
optimiser and averages as tensors, everything else as JSON, and a hash of both; ``state.previous.safetensors``
is the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from segdeconv.config import (
    ModelConfig,
    Recipe,
    flat,
    load_recipe,
    recipe_from_dict,
    recipe_to_dict,
    recipe_to_yaml,
)
from segdeconv.convert import ConversionReport
from segdeconv.entries import WEIGHTS, find_weights, is_entry, near
from segdeconv.errors import UserError
from segdeconv.files import (
    check_utf8,
    make_folder,
    sha256_of,
    to_json,
    with_home,
    write_atomically,
    write_text,
)
from segdeconv.models import as_configured, build_model
from segdeconv.progress import console

FORMAT = "segdeconv/1"
STATE_FORMAT = "segdeconv-state/1"
_STATE, _PREVIOUS = "state.safetensors", "state.previous.safetensors"
_LARGE = 4096  # numbers in a tensor that is worth halving
_UNREADABLE = (OSError, ValueError, KeyError, safetensors.SafetensorError)  # what a damaged state raises
_MOMENTS = ("running_moments", "running_mean", "running_var")
# Keys that may change between stop and resume: they do not change what is computed.
FREE_KEYS = ("data.root", "data.num_workers", "data.download", "train.checkpoint_minutes")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says about itself, besides weights; ``sha256`` is of the file it was loaded from."""

    recipe: Recipe
    task: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    epoch: int
    scores: dict[str, Any]
    sha256: str | None = None


def create_run_folder(path: Path, recipe: Recipe) -> None:
    """Make a new run folder with its recipe.

    Raises:
        UserError: the folder cannot be made, or holds a run, or scores of another network.
    """
    if has_state(path):
        raise UserError(
            f"{path}: holds a run already; go on with --resume, choose another --out, or remove it first"
        )
    if (path / "metrics.jsonl").exists():
        raise UserError(
            f"{path}: holds a run without its {_STATE}, so it cannot go on; choose another --out, or remove "
            "it first"
        )
    if any((path / name).exists() for name in ("eval.json", "eval_onnx.json")):
        raise UserError(f"{path}: holds scores of another network; choose another --out, or remove it first")
    make_folder(path)
    write_text(path / "recipe.yaml", recipe_to_yaml(recipe))


def save_checkpoint(path: Path, model: nn.Module, info: CheckpointInfo) -> None:
    """Write weights and what they belong to, atomically."""
    metadata = {
        "format": FORMAT,
        "recipe": json.dumps(recipe_to_dict(info.recipe)),
        "task": info.task,
        "classes": json.dumps(info.classes),
        "palette": json.dumps(info.palette),
        "epoch": str(info.epoch),
        "scores": to_json(info.scores),
    }

    _save(path, model.state_dict(), metadata)


def copy_checkpoint(source: Path, target: Path, recipe: Recipe, half: bool) -> None:
    """Copy a checkpoint as one of ``recipe``, with ``half`` its large tensors as float16; loading makes them
    float32 again.

    Small tensors (biases, counters) cost nothing and stay as they are, and so do means and variances.
    """
    with safetensors.safe_open(source, framework="pt") as file:
        metadata = file.metadata() | {"recipe": json.dumps(recipe_to_dict(recipe))}
    tensors = load_file(source)
    if half:
        large = {
            name: value
            for name, value in tensors.items()
            if value.numel() >= _LARGE and not name.endswith(_MOMENTS)
        }
        halved = {name: value.half() for name, value in large.items() if value.is_floating_point()}
        tensors |= {name: value for name, value in halved.items() if value.isfinite().all()}
    _save(target, tensors, metadata)


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            save_file(plain, temporary, metadata)
        except safetensors.SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from None
        _sort_header(temporary)

    write_atomically(path, write)


def _sort_header(path: Path) -> None:
    """Sort the metadata, which safetensors writes in random order: equal files are to have equal hashes."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as long as it was, padding aside
            file.seek(8)
            file.write(text.ljust(length))


def save_state(run: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Write what training resumes from, atomically; the state before is kept beside it."""
    path = run / _STATE
    fresh = run / "state.new.safetensors"
    tensors = {name: value.detach().cpu() for name, value in tensors.items()}
    metadata = {"format": STATE_FORMAT, "values": json.dumps(values)}
    _save(fresh, tensors, metadata | {"sha256": _sha256_of_state(tensors, metadata["values"])})
    try:
        if path.exists():
            os.replace(path, run / _PREVIOUS)
        os.replace(fresh, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def has_state(run: Path) -> bool:
    return any((run / name).exists() for name in (_STATE, _PREVIOUS))


def recipe_digest(run: Path) -> str:
    """A hash of a run's recipe without `FREE_KEYS`: of the file, as parsing adds a newer version's keys."""
    begun = flat(yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8")))
    kept = {key: value for key, value in begun.items() if key not in FREE_KEYS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _sha256_of_state(tensors: dict[str, Tensor], values: str) -> str:
    digest = hashlib.sha256(values.encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pictures_of(run: Path) -> dict[str, list[Any]] | None:
    """How many pictures a run trains on and validates on, and a hash of their names; None without a state."""
    try:
        return cast(dict[str, list[Any]], json.loads(_state_metadata(run / _STATE)["values"])["pictures"])
    except _UNREADABLE:
        return None


def _state_metadata(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != STATE_FORMAT:
        raise ValueError(f"its format is not {STATE_FORMAT}")
    return cast(dict[str, str], metadata)


def _read_state(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, metadata = load_file(path), _state_metadata(path)
    # Older states have no hash of themselves, and none of their recipe.
    if metadata.get("sha256") not in (None, _sha256_of_state(tensors, metadata["values"])):
        raise ValueError("is damaged")
    values = json.loads(metadata["values"])
    if "recipe" in values and values["recipe"] != recipe_digest(path.parent):
        raise ValueError("is the state of a run with another recipe")
    return tensors, values


def load_state(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and values of the newest state of a run that can be read, and is this run's.

    Raises:
        UserError: there is none.
    """
    problems: list[str] = []
    for path in (run / _STATE, run / _PREVIOUS):
        try:
            state = _read_state(path)
            if problems:
                console.print(f"{problems[0]}; going on from the state before, {path.name}")
            return state
        except _UNREADABLE as error:
            problems.append(f"{path}: {error}")
    raise UserError(
        f"{run}: no state to resume from ({'; '.join(problems)}); choose another --out, or remove the folder"
    )


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """A network and its optimiser as named tensors, for `save_state`."""
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None}
    return tensors


def restore_training(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What `training_tensors` made, into the same network and optimiser.

    Raises:
        RuntimeError: the network is another.
    """
    model.load_state_dict(named("model", tensors))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in named("optimizer", tensors).items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def named(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state whose names begin with ``part``, without it."""
    return {
        key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")
    }


def check_same_recipe(run: Path, recipe: Recipe) -> None:
    """Raise UserError unless a run was begun with this recipe, but for keys that do not change the result."""
    path = run / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{run}: its recipe.yaml is gone, so the run cannot go on; choose another --out")
    begun = flat(recipe_to_dict(load_recipe(path)))
    now = flat(recipe_to_dict(recipe))
    for key in sorted((begun.keys() | now.keys()) - set(FREE_KEYS)):
        was, asked = (repr(values[key]) if key in values else "not set" for values in (begun, now))
        if was != asked:
            raise UserError(
                f"{run}: was begun with {key} = {was}, now it is {asked}; resume it with the same recipe and "
                "--set, or choose another --out"
            )


def find_checkpoint(run: str | Path) -> Path:
    """The best checkpoint of a run folder, the file itself, or the weights of the zoo entry of that name.

    Everything that takes a run finds it here, so everything takes an entry's name. A run folder or file of
    the same name goes first.

    Raises:
        UserError: there is none, or the entry's weights cannot be fetched.
    """
    path = with_home(str(run), "run")
    if path.is_dir():
        for name in ("best.safetensors", "last.safetensors", WEIGHTS):  # the last is an entry's folder's
            if (path / name).is_file():
                return path / name
        raise UserError(
            f"{path}: holds no checkpoint (best.safetensors or last.safetensors); train a run there"
        )
    if path.is_file():
        return path
    if is_entry(run):
        return find_weights(str(run))
    raise UserError(
        f"{path}: no such run folder or checkpoint, and no entry of the zoo is called so; {near(str(run))}"
    )


def read_info(path: Path) -> CheckpointInfo:
    """The metadata of a checkpoint.

    Raises:
        UserError: the file is damaged, or not one of ours.
    """
    check_utf8(path, "safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({error})") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of segdeconv (its metadata has no format {FORMAT!r})")
    try:
        return CheckpointInfo(
            recipe=recipe_from_dict(json.loads(metadata["recipe"]), str(path)),
            task=metadata["task"],
            classes=tuple(json.loads(metadata["classes"])),
            palette=tuple(tuple(color) for color in json.loads(metadata["palette"])),
            epoch=int(metadata["epoch"]),
            scores=json.loads(metadata["scores"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its metadata is damaged ({error!r})") from None


@torch.inference_mode(False)  # or it could be neither deconvolved nor trained
def load_checkpoint(run: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, CheckpointInfo]:
    """Rebuild the network of a run folder or checkpoint, in evaluation mode.

    Raises:
        UserError: nothing is there, the file is damaged, or the weights do not fit the recipe.
    """
    path = find_checkpoint(run)
    while True:
        before = path.stat()
        info, state, digest = read_info(path), read_weights(path), sha256_of(path)
        after = path.stat()
        if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns):
            break  # else a training has put the next one in its place meanwhile
    with torch.device("cpu"):  # whatever the default: a meta tensor could not hold the weights
        model, _ = build_for(state, info.recipe.model, len(info.classes))
    _load_weights(model, state, path, "a network of its recipe")
    return model.to(device).eval(), replace(info, sha256=digest)


def build_for(
    names: Iterable[str], config: ModelConfig, classes: int
) -> tuple[nn.Module, ConversionReport | None]:
    """`build_model`'s untrained network of ``config`` for a state dict of these names.

    Where a batch norm had no layer before it to be folded into, a warm start left an affine layer, whose
    weight is among them, or the norm. A recipe does not say where its network began so: runs start from runs.
    """
    held = set(names)

    def left(module: nn.Module, name: str) -> bool:
        return f"{name}.0.weight" in held or f"{name}.running_mean" in held

    return build_model(config, classes, pretrained=False, warm_start=left)


def build_started(config: ModelConfig, classes: int) -> tuple[nn.Module, ConversionReport | None]:
    """The network a recipe trains: `build_model`'s, with the weights that ``config.init`` names, if any.

    Raises:
        UserError: as `build_model` does; or ``config.init`` is not there, is damaged, or its network cannot
            become this one.
    """
    if config.init is None:
        return build_model(config, classes)
    path = find_checkpoint(config.init)
    trained = read_info(path).recipe.model
    if trained.norm == "bn":
        twin, _ = build_model(replace(config, norm="bn"), classes, pretrained=False)
        start_from(twin, config.init, classes)
        return as_configured(twin, config, warm_start=True)
    if config.norm == "bn":
        raise UserError(
            f"model.init = {config.init}: holds network deconvolution, which batch norm cannot start "
            "from; give the run of its batch-norm twin, or --norm nd"
        )
    if trained.network_deconv.eps != config.network_deconv.eps:  # which fits, but scales what it reads
        raise UserError(
            f"model.init = {config.init}: was trained with model.network_deconv.eps = "
            f"{trained.network_deconv.eps:g}, not {config.network_deconv.eps:g}; give the same"
        )
    model, report = build_for(read_weights(path), config, classes)
    start_from(model, config.init, classes)
    return model, report


def start_from(model: nn.Module, run: str | Path, classes: int) -> None:
    """Load a checkpoint's weights into its network, with the norm it was trained with. Where it has another
    number of classes than ``classes``, layers with one output channel per class keep their initial weights,
    and a note says so.

    Raises:
        UserError: nothing is there, the file is damaged, or the weights do not fit.
    """
    path = find_checkpoint(run)
    info = read_info(path)
    state, stayed = read_weights(path), []
    for name, mine in model.state_dict().items() if len(info.classes) != classes else ():
        theirs = state.get(name, mine)
        if theirs.shape[:1] == (len(info.classes),) and mine.shape == (classes, *theirs.shape[1:]):
            state[name] = mine
            stayed.append(name)
    gains = {f"{name.removesuffix('.weight')}.gain" for name in stayed}
    state |= {name: value for name, value in model.state_dict().items() if name in gains}
    _load_weights(model, state, path, f"a {info.recipe.model.architecture} with {len(info.classes)} classes")
    if stayed:
        console.print(f"note: {run} has {len(info.classes)} classes; not taken from it: {', '.join(stayed)}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: not a safetensors file, or damaged ({error})") from None


def _load_weights(model: nn.Module, state: dict[str, Tensor], path: Path, holds: str) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        what = lines[1] if len(lines) > 1 else lines[0]
        raise UserError(
            f"{path}: holds {holds}, whose weights do not fit the network: {what[:200]}; architecture, "
            "encoder, model.options and, of a deconvolved one, model.network_deconv and model.keep must be "
            "the same"
        ) from None
