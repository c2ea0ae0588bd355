"""Several runs on one picture and in one table; runs that share a recipe but for its seed are one entry."""

from __future__ import annotations

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
class Entry:
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


def compare_runs(folders: Sequence[Path], out: Path) -> tuple[str, list[Entry]]:
    """Compare run folders; writes ``compare.png``, ``compare.md`` and ``compare.json`` into ``out``.

    Returns:
        The metric compared, and an entry a recipe.

    Raises:
        UserError: a folder is no run, is given twice or has no score yet, or the runs' tasks differ.
    """
    metric, entries = _entries(folders)
    make_folder(out)
    training_curves({entry.label: entry.folders for entry in entries}, out / "compare.png", metric)
    text = to_json({"metric": metric, "runs": [_plain(entry) for entry in entries]}, indent=1)
    write_text(out / "compare.json", text)
    write_text(out / "compare.md", _markdown(metric, entries))
    return metric, entries


def _entries(folders: Sequence[Path]) -> tuple[str, list[Entry]]:
    groups: list[tuple[dict[str, Any], list[Path]]] = []
    metrics: dict[str, Path] = {}
    seen: set[Path] = set()
    seeds: dict[Path, int] = {}
    lines_of: dict[Path, list[dict[str, Any]]] = {}
    for folder in folders:
        if not (folder / "recipe.yaml").is_file():
            raise UserError(f"{folder}: no run (it has no recipe.yaml); give the folder of segdeconv train")
        if folder.resolve() in seen:
            raise UserError(f"{folder}: is given twice")
        seen.add(folder.resolve())
        lines_of[folder] = read_metrics(folder)
        logged = {key for line in lines_of[folder] for key, value in line.items() if value is not None}
        found = [metric for metric in MAIN_METRIC.values() if metric in logged]
        if not found:
            raise UserError(
                f"{folder}: has no score; wait for its first evaluation, or see with segdeconv data check "
                "whether any pixel of its validation masks is labelled"
            )
        metrics.setdefault(found[0], folder)
        if len(metrics) > 1:
            told = " and ".join(f"{run} has {metric}" for metric, run in metrics.items())
            raise UserError(f"runs of different tasks cannot be compared: {told}")
        recipe = flat(recipe_to_dict(load_recipe(folder / "recipe.yaml")))
        seeds[folder] = recipe["train.seed"]
        recipe = {key: value for key, value in recipe.items() if key not in (*FREE_KEYS, "train.seed")}
        same = [runs for other, runs in groups if other == recipe]
        if same:
            same[0].append(folder)
        else:
            groups.append((recipe, [folder]))
    metric = next(iter(metrics))
    keys = {key: None for recipe, _ in groups for key in recipe}
    differ = [key for key in keys if any(recipe.get(key) != groups[0][0].get(key) for recipe, _ in groups)]
    names = [runs[0].name for _, runs in groups]
    pictures = {run: held for run in folders if (held := pictures_of(run)) is not None}
    like = next(iter(pictures), None)
    entries = []
    for recipe, runs in groups:
        name = runs[0].name if names.count(runs[0].name) == 1 else str(runs[0])
        label = f"{name} and {len(runs) - 1} more" if len(runs) > 1 else name
        lines = [lines_of[run] for run in runs]
        points = curve(lines, metric)
        if not points:
            raise UserError(f"{label}: runs of one recipe, but no epoch is scored in all of them")
        epochs = {point.epoch for point in points}
        best = [max(line[metric] for line in run if line["epoch"] in epochs) for run in lines]
        apart = {key: recipe.get(key) for key in differ}
        notes = []
        if len({seeds[run] for run in runs}) < len(runs):
            notes.append(f"{label}: some have the same train.seed, so they do not count as several")
        for run in runs:
            made, planned = lines_of[run][-1]["epoch"], recipe["train.epochs"]
            if made < planned:
                cut = f"; the mean ends at epoch {points[-1].epoch}" if len(runs) > 1 else ""
                notes.append(f"{run}: has {made} of {planned} epochs{cut}")
            if like is not None and pictures.get(run, pictures[like]) != pictures[like]:
                notes.append(f"{run}: has other pictures than {like}")
        entries.append(
            Entry(
                label,
                runs,
                [seeds[run] for run in runs],
                apart,
                points,
                curve(lines, "loss"),
                spread(best),
                notes,
            )
        )
    return metric, entries


def _rows(entries: list[Entry]) -> list[list[tuple[str, ...]]]:
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


def legend(entries: list[Entry]) -> list[str]:
    """A line an entry: what sets its recipe apart, and which runs it averages; and its notes."""
    lines = []
    for entry in entries:
        apart = ", ".join(f"{key} = {value}" for key, value in entry.recipe.items())
        runs = f"mean of {', '.join(map(str, entry.folders))}" if len(entry.folders) > 1 else ""
        lines.append(f"{entry.label}: {'; '.join(filter(None, (apart, runs))) or 'one run'}")
        lines += [f"note: {note}" for note in entry.notes]
    return lines


def table(metric: str, entries: list[Entry]) -> Table:
    """The comparison for the terminal; without the spread where no entry has one."""
    columns = len(_HEADER) - (0 if any(len(entry.folders) > 1 for entry in entries) else 2)
    name, *others = _header(metric)[:columns]
    out = Table(Column(name, overflow="fold", min_width=10), *others)
    for rows in _rows(entries):
        for number, (label, *row) in enumerate(rows):
            out.add_row("" if number else label, *row[: columns - 1])  # names may be long
        out.add_section()
    return out


def _markdown(metric: str, entries: list[Entry]) -> str:
    table = markdown_table(_header(metric), (row for rows in _rows(entries) for row in rows))
    return "\n".join([*(f"- {line}" for line in legend(entries)), "", table])


def _plain(entry: Entry) -> dict[str, Any]:
    names = ("mean", "error", "low", "high")
    values = asdict(entry) | {"folders": [str(folder) for folder in entry.folders]}
    return values | {"best": dict(zip(names, entry.best, strict=True))}
