"""Figures for people: pictures beside truth and prediction, training curves, confusion matrices."""

from __future__ import annotations

import functools
import importlib.resources
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from segdeconv.errors import UserError, as_utf8
from segdeconv.files import read_json_lines, write_atomically
from segdeconv.images import Palette, Picture, overlay

_NAMED_CLASSES = 40  # a confusion matrix of more classes is drawn without names and numbers
_LETTERS = 24  # of a class's name beside a confusion matrix
_SIDE = 640  # pixels that a picture in a triptych has at most


def triptych(
    rows: list[tuple[Picture, Picture, Picture]],
    classes: tuple[str, ...],
    palette: Palette,
    captions: Sequence[str] = (),
) -> Image.Image:
    """Rows of image | truth | prediction with a legend. Each row is (image, label map, label map).

    Pictures are shown as wide as the first, but neither very small nor very large, nor very tall.
    ``captions`` has a line to stand below each row, or none.
    """
    pad, bar, line = 6, 20, 20
    width = rows[0][0].shape[1]
    width = min(width * max(1, round(320 / width)), _SIDE)  # whole steps keep the pixels of small ones
    scales = [min(width / image.shape[1], _SIDE / image.shape[0]) for image, _, _ in rows]
    sizes = [
        tuple(max(round(side * scale), 1) for side in (image.shape[1], image.shape[0]))
        for (image, _, _), scale in zip(rows, scales, strict=True)
    ]
    below = line if captions else pad
    total_width = 3 * width + 4 * pad
    canvas = Image.new(
        "RGB", (total_width, bar + sum(height for _, height in sizes) + len(rows) * below), "white"
    )
    pen = _pen(canvas)
    for column, title in enumerate(("image", "truth", "prediction")):
        pen.text((pad + column * (width + pad), 4), title, fill="black")
    y = bar
    for i, (image, truth, predicted) in enumerate(rows):
        how = Image.Resampling.NEAREST if scales[i] >= 1 else Image.Resampling.BOX
        tiles = (image, overlay(image, truth, palette), overlay(image, predicted, palette))
        for column, tile in enumerate(tiles):
            shown = Image.fromarray(tile).resize(sizes[i], how)
            canvas.paste(shown, (pad + column * (width + pad), y))
        y += sizes[i][1]
        if captions:
            pen.text((pad, y + 3), _cut(pen, captions[i], total_width - 2 * pad), fill="black")
        y += below
    return with_legend(canvas, classes, palette)


def with_legend(picture: Image.Image, classes: tuple[str, ...], palette: Palette) -> Image.Image:
    """A picture with the colours of the classes below it."""
    classes = tuple(" ".join(name.split()) for name in classes)
    width, line = max(picture.width, 320), 20  # a name has to fit
    legend = _legend_rows(classes, width)
    canvas = Image.new("RGB", (width, picture.height + line * len(legend) + 6), "white")
    canvas.paste(picture)
    pen, y = _pen(canvas), picture.height
    for row in legend:
        for x, index in row:
            pen.rectangle((x, y + 3, x + 12, y + 15), fill=palette[index], outline="black")
            pen.text((x + 17, y + 4), classes[index], fill="black")
        y += line
    return canvas


def _pen(canvas: Image.Image) -> ImageDraw.ImageDraw:
    """What draws on it, with matplotlib's font: Pillow's own has English letters only."""
    pen = ImageDraw.Draw(canvas)
    pen.font = _font()
    return pen


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    folder = importlib.resources.files("matplotlib") / "mpl-data" / "fonts" / "ttf"
    try:
        return ImageFont.truetype(str(folder / "DejaVuSans.ttf"), 11)
    except OSError:  # a matplotlib without its fonts, as some systems pack it
        return ImageFont.load_default()


def _cut(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """A text cut to ``width`` pixels at its beginning: its end has the numbers."""
    text = " ".join(text.split())
    while len(text) > 1 and pen.textlength(text) > width:
        text = f"…{text[2:]}"
    return text


def _legend_rows(classes: tuple[str, ...], width: int) -> list[list[tuple[int, int]]]:
    rows: list[list[tuple[int, int]]] = [[]]
    x = 4
    for index, name in enumerate(classes):
        need = 15 + round(_font().getlength(name)) + 16
        if x + need > width and rows[-1]:
            rows.append([])
            x = 4
        rows[-1].append((x, index))
        x += need
    return rows


def confusion_picture(confusion: Any, classes: tuple[str, ...], path: Path) -> None:
    """A confusion matrix (C, C), rows true, columns predicted, as a PNG: every row in percent of its sum."""
    counts = np.array(confusion, np.float64)
    total = counts.sum(1, keepdims=True)
    percent = 100 * np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    named = len(classes) <= _NAMED_CLASSES
    letters = min(max(map(len, classes)), _LETTERS)
    side = 1.4 + 0.08 * letters + 0.42 * len(classes) if named else 10
    figure = new_figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set(xlabel="predicted", ylabel="true (rows in percent)")
    if named:
        names = [_literal(_shortened(name)) for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90)
        axes.set_yticks(range(len(classes)), names)
        for (row, column), value in np.ndenumerate(percent):
            if value >= 0.5:  # what rounds to 0 would only be noise
                color = "white" if value > 55 else "black"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    else:
        figure.colorbar(shown, shrink=0.8, label="%")
    save_figure(figure, path)


def _shortened(name: str) -> str:
    """Beginning and end of a long name: either may be all that tells it from others."""
    half = _LETTERS // 2
    return name if len(name) <= _LETTERS else f"{name[: half - 1]}…{name[-half:]}"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. A last line that was cut short does not count.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = run / "metrics.jsonl"
    lines = read_json_lines(path)
    for key in ("epoch", "step", "seconds"):
        if not all(isinstance(line.get(key), (int, float)) for line in lines):
            raise UserError(f"{path}: is damaged (a line without its {key})")
    if any(isinstance(value, str) for line in lines for value in line.values()):
        raise UserError(f"{path}: is damaged (a text where a number belongs)")
    return lines


@dataclass(frozen=True)
class Point:
    """A figure of several runs at the end of an epoch: its mean, the mean's standard error (NaN for one run),
    the smallest and the largest."""

    epoch: int
    step: float
    minutes: float
    mean: float
    error: float
    low: float
    high: float


def curve(runs: Sequence[list[dict[str, Any]]], key: str) -> list[Point]:
    """A figure over the epochs in which all runs have it; a run is the lines of its metrics.jsonl."""
    by_epoch = [{line["epoch"]: line for line in run if line.get(key) is not None} for run in runs]
    points = []
    for epoch in sorted(set.intersection(*map(set, by_epoch))):
        lines = [run[epoch] for run in by_epoch]
        points.append(
            Point(
                epoch,
                statistics.fmean(line["step"] for line in lines),
                statistics.fmean(line["seconds"] for line in lines) / 60,
                *spread([line[key] for line in lines]),
            )
        )
    return points


def spread(values: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, standard error of the mean (NaN for one value), smallest and largest."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error, min(values), max(values)


def training_curves(runs: dict[str, list[Path]], path: Path, metric: str) -> None:
    """Training loss and the validation metric by step, epoch and training time, as a PNG.

    One line a label; of several runs their mean, a band of its standard error, and a paler one from the
    smallest to the largest.
    """
    lines = {label: [read_metrics(folder) for folder in folders] for label, folders in runs.items()}
    curves = {key: {label: curve(group, key) for label, group in lines.items()} for key in ("loss", metric)}
    columns = ("step", "epoch", "minutes")
    figure = new_figure(figsize=(13.2, 6.6), layout="constrained")
    axes = figure.subplots(2, 3, sharey="row")
    for row, (key, by_label) in zip(axes, curves.items(), strict=True):
        for axis, column in zip(row, columns, strict=True):
            for number, (label, points) in enumerate(by_label.items()):
                x = [getattr(point, column) for point in points]
                dashes = ("-", "--", ":")[number // 10 % 3]  # the ten colours begin anew
                (drawn,) = axis.plot(
                    x, [p.mean for p in points], dashes, marker=".", markersize=4, label=_literal(label)
                )
                if len(lines[label]) > 1:
                    style = {"color": drawn.get_color(), "linewidth": 0}
                    axis.fill_between(
                        x, [p.low for p in points], [p.high for p in points], alpha=0.12, **style
                    )
                    low, high = [p.mean - p.error for p in points], [p.mean + p.error for p in points]
                    axis.fill_between(x, low, high, alpha=0.25, **style)
            axis.set_xlabel("minutes of training" if column == "minutes" else column)
            axis.xaxis.get_major_locator().set_params(integer=column != "minutes")
            axis.grid(alpha=0.3)
        row[0].set_ylabel("training loss" if key == "loss" else f"validation {key}")
    longest = max(map(len, runs))
    figure.legend(
        *axes[0][0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=max(min(len(runs), 4, 160 // (longest + 8)), 1),
        fontsize="small" if longest > 120 else None,
    )
    save_figure(figure, path)


def new_figure(**options: Any) -> Any:
    """An empty ``matplotlib.figure.Figure``: pyplot would keep it, and ask which window system to draw in."""
    from matplotlib.figure import Figure

    return Figure(**options)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure atomically."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # names in scripts that it has not
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))


def _literal(name: str) -> str:
    """A name for matplotlib, which takes what stands between dollar signs for a formula, and UTF-8 alone."""
    return as_utf8(name).replace("$", r"\$")
