"""Several runs on one picture and in one table; runs that share a recipe but for its seed are one entry."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Column, Table

from segdeconv.checkpoint import FREE_KEYS, pictures_of
from segdeconv.config import flat, load_recipe, recipe_to_dict
from segdeconv.errors import UserError
from segdeconv.figures import Point, curve, read_metrics, spread, training_curves
from segdeconv.files import make_folder, to_json, write_text
from segdeconv.markdown import markdown_table
from segdeconv.metrics import MAIN_METRIC

_HEADER = ("run", "epoch", "step", "minutes", "loss", "metric", "± s.e.", "min to max")


@dataclass(frozen=True)
class RunGroup:
    """Runs of one recipe.

    Attributes:
        seeds: ``train.seed`` of each run.
        recipe: every key that sets this recipe apart from the others, with its value.
        curve, loss: the validation metric and the training loss, averaged over the runs.
        best: the best value of each run in the epochs of the curve: mean, standard error of the mean,
            smallest, largest.
        notes: a sentence for everything that makes the comparison less than fair.
    """

    label: str
    folders: list[Path]
    seeds: list[int]
    recipe: dict[str, Any]
    curve: list[Point]
    loss: list[Point]
    best: tuple[float, float, float, float]
    notes: list[str]


def compare_runs(folders: Sequence[str | Path], out: str | Path) -> tuple[str, list[RunGroup]]:
    """Compare run folders; writes ``compare.png``, ``compare.md`` and ``compare.json`` into ``out``.

    Returns:
        The metric compared, and one entry per recipe.

    Raises:
        UserError: a folder is no run, is given twice or has no score yet, or the runs' tasks differ.
    """
    if not folders:
        raise UserError("compare: no run is given")
    metric, entries = _entries([Path(folder) for folder in folders])
    out = make_folder(Path(out))
    training_curves({entry.label: entry.folders for entry in entries}, out / "compare.png", metric)
    text = to_json({"metric": metric, "runs": [_plain(entry) for entry in entries]}, indent=1)
    write_text(out / "compare.json", text)
    write_text(out / "compare.md", _markdown(metric, entries))
    return metric, entries


@dataclass(frozen=True)
class _RunLog:
    """One folder: its recipe, flat, and the lines of its metrics.jsonl."""

    folder: Path
    recipe: dict[str, Any]
    lines: list[dict[str, Any]]
    metric: str

    @property
    def compared(self) -> dict[str, Any]:
        """What of its recipe sets it apart from runs of another entry."""
        return {
            key: value
            for key, value in self.recipe.items()
            if key not in (*FREE_KEYS, "train.seed") and (self.deconvolved or not _of_deconv(key))
        }

    @property
    def deconvolved(self) -> bool:
        return bool(self.recipe["model.norm"] == "nd")


def _of_deconv(key: str) -> bool:
    """Whether batch norm has no use for this key."""
    return key.startswith("model.network_deconv.")


def _read(folder: Path) -> _RunLog:
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: no run (it has no recipe.yaml); give the folder of segdeconv train")
    lines = read_metrics(folder)
    logged = {key for line in lines for key, value in line.items() if value is not None}
    metric = next((metric for metric in MAIN_METRIC.values() if metric in logged), None)
    if metric is None:
        raise UserError(
            f"{folder}: has no score; wait for its first evaluation, or see with segdeconv data check "
            "whether any pixel of its validation masks is labelled"
        )
    return _RunLog(folder, flat(recipe_to_dict(load_recipe(folder / "recipe.yaml"))), lines, metric)


def _entries(folders: Sequence[Path]) -> tuple[str, list[RunGroup]]:
    runs: list[_RunLog] = []
    for folder in folders:
        read = _read(folder)
        if any(folder.resolve() == run.folder.resolve() for run in runs):
            raise UserError(f"{folder}: is given twice")
        runs.append(read)
        if runs[-1].metric != runs[0].metric:
            told = " and ".join(f"{run.folder} has {run.metric}" for run in (runs[0], runs[-1]))
            raise UserError(f"runs of different tasks cannot be compared: {told}")
    groups: list[list[_RunLog]] = []
    for run in runs:
        same = next((group for group in groups if group[0].compared == run.compared), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    recipes = [group[0].compared for group in groups]
    deconvolved = [group[0].compared for group in groups if group[0].deconvolved]
    differ = []
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        first, *others = (recipe.get(key) for recipe in (deconvolved if _of_deconv(key) else recipes))
        if any(value != first for value in others):
            differ.append(key)
    names = Counter(group[0].folder.name for group in groups)
    pictures = {run.folder: held for run in runs if (held := pictures_of(run.folder)) is not None}
    entries = []
    for group in groups:
        folder = group[0].folder
        name = folder.name if names[folder.name] == 1 else str(folder)
        entries.append(_entry(group, name, differ, pictures))
    return runs[0].metric, entries


def _entry(runs: list[_RunLog], name: str, differ: list[str], pictures: dict[Path, Any]) -> RunGroup:
    label = f"{name} and {len(runs) - 1} more" if len(runs) > 1 else name
    lines, metric = [run.lines for run in runs], runs[0].metric
    points = curve(lines, metric)
    if not points:
        raise UserError(f"{label}: runs of one recipe, but no epoch is scored in all of them")
    epochs = {point.epoch for point in points}
    best = [max(line[metric] for line in run if line["epoch"] in epochs) for run in lines]
    seeds = [run.recipe["train.seed"] for run in runs]
    notes = []
    if len(set(seeds)) < len(runs):
        notes.append(f"{label}: some have the same train.seed, so they do not count as several")
    like = next(iter(pictures), None)
    for run in runs:
        made, planned = run.lines[-1]["epoch"], run.recipe["train.epochs"]
        if made < planned:
            cut = f"; the mean ends at epoch {points[-1].epoch}" if len(runs) > 1 else ""
            notes.append(f"{run.folder}: has {made} of {planned} epochs{cut}")
        if like is not None and pictures.get(run.folder, pictures[like]) != pictures[like]:
            notes.append(f"{run.folder}: has other pictures than {like}")
    return RunGroup(
        label=label,
        folders=[run.folder for run in runs],
        seeds=seeds,
        recipe={
            key: runs[0].compared.get(key) for key in differ if runs[0].deconvolved or not _of_deconv(key)
        },
        curve=points,
        loss=curve(lines, "loss"),
        best=spread(best),
        notes=notes,
    )


def _rows(entries: list[RunGroup]) -> list[list[tuple[str, ...]]]:
    """For every entry its quarters by epoch, and its best."""
    out = []
    for entry in entries:
        loss_at = {point.epoch: point.mean for point in entry.loss}
        marks = sorted({-(-len(entry.curve) * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})
        rows: list[tuple[str, ...]] = []
        for point in (entry.curve[mark] for mark in marks):
            loss = f"{loss_at[point.epoch]:.4f}" if point.epoch in loss_at else ""
            place = (str(point.epoch), f"{point.step:.0f}", f"{point.minutes:.1f}", loss)
            rows.append((entry.label, *place, *_spread(point.mean, point.error, point.low, point.high)))
        rows.append((entry.label, "best", "", "", "", *_spread(*entry.best)))
        out.append(rows)
    return out


def _spread(mean: float, error: float, low: float, high: float) -> tuple[str, str, str]:
    several = error == error  # NaN for one run
    return f"{mean:.4f}", f"{error:.4f}" if several else "", f"{low:.4f} to {high:.4f}" if several else ""


def _header(metric: str) -> list[str]:
    return [metric if name == "metric" else name for name in _HEADER]


def legend(entries: list[RunGroup]) -> list[str]:
    """A line an entry: what sets its recipe apart, and which runs it averages; and its notes."""
    lines = []
    for entry in entries:
        apart = ", ".join(f"{key} = {value}" for key, value in entry.recipe.items())
        runs = f"mean of {', '.join(map(str, entry.folders))}" if len(entry.folders) > 1 else ""
        lines.append(f"{entry.label}: {'; '.join(filter(None, (apart, runs))) or 'one run'}")
        lines += [f"note: {note}" for note in entry.notes]
    return lines


def table(metric: str, entries: list[RunGroup]) -> Table:
    """The comparison for the terminal; without the spread where no entry has one."""
    columns = len(_HEADER) - (0 if any(len(entry.folders) > 1 for entry in entries) else 2)
    name, *others = _header(metric)[:columns]
    out = Table(Column(name, overflow="fold", min_width=10), *others)
    for rows in _rows(entries):
        for number, (label, *row) in enumerate(rows):
            out.add_row("" if number else label, *row[: columns - 1])  # names may be long
        out.add_section()
    return out


def _markdown(metric: str, entries: list[RunGroup]) -> str:
    table = markdown_table(_header(metric), (row for rows in _rows(entries) for row in rows))
    return "\n".join([*(f"- {line}" for line in legend(entries)), "", table])


def _plain(entry: RunGroup) -> dict[str, Any]:
    names = ("mean", "error", "low", "high")
    values = asdict(entry) | {"folders": [str(folder) for folder in entry.folders]}
    return values | {"best": dict(zip(names, entry.best, strict=True))}
