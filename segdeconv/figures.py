"""Figures for people: pictures beside truth and prediction, and training curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from segdeconv.errors import UserError
from segdeconv.files import write_atomically
from segdeconv.images import Palette, Picture, overlay


def triptych(
    rows: list[tuple[Picture, Picture, Picture]], classes: tuple[str, ...], palette: Palette
) -> Image.Image:
    """Rows of image | truth | prediction with a legend. Each row is (image, label map, label map)."""
    pad, bar, line = 6, 20, 20
    height, width = rows[0][0].shape[:2]
    zoom = max(1, round(320 / width))  # small pictures are hard to look at
    height, width = height * zoom, width * zoom
    total_width = 3 * width + 4 * pad
    legend = _legend_rows(classes, total_width)
    total_height = bar + len(rows) * (height + pad) + line * len(legend) + pad
    canvas = Image.new("RGB", (total_width, total_height), "white")
    pen = ImageDraw.Draw(canvas)
    for column, title in enumerate(("image", "truth", "prediction")):
        pen.text((pad + column * (width + pad), 4), title, fill="black")
    for i, (image, truth, predicted) in enumerate(rows):
        for column, tile in enumerate(
            (image, overlay(image, truth, palette), overlay(image, predicted, palette))
        ):
            large = Image.fromarray(tile).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(large, (pad + column * (width + pad), bar + i * (height + pad)))
    y = bar + len(rows) * (height + pad)
    for row in legend:
        for x, index in row:
            pen.rectangle((x, y + 3, x + 12, y + 15), fill=palette[index], outline="black")
            pen.text((x + 17, y + 4), classes[index], fill="black")
        y += line
    return canvas


def _legend_rows(classes: tuple[str, ...], width: int) -> list[list[tuple[int, int]]]:
    rows: list[list[tuple[int, int]]] = [[]]
    x = 4
    for index, name in enumerate(classes):
        need = 15 + 7 * len(name) + 12
        if x + need > width and rows[-1]:
            rows.append([])
            x = 4
        rows[-1].append((x, index))
        x += need
    return rows


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl.

    Raises:
        UserError: the file is missing.
    """
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{run / 'metrics.jsonl'}: cannot be read ({error.strerror})") from None


def training_curves(runs: dict[str, Path], path: Path, metric: str) -> None:
    """Training loss and the validation metric by epoch and by wall time, one line a run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    for label, run in runs.items():
        lines = read_metrics(run)
        epochs = [line["epoch"] for line in lines]
        axes[0].plot(epochs, [line["loss"] for line in lines], label=label)
        scored = [line for line in lines if metric in line]
        scores = [line[metric] for line in scored]
        axes[1].plot([line["epoch"] for line in scored], scores, marker=".", label=label)
        axes[2].plot([line["seconds"] / 60 for line in scored], scores, marker=".", label=label)
    for axis, (x, y) in zip(
        axes, (("epoch", "training loss"), ("epoch", metric), ("minutes", metric)), strict=True
    ):
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        axis.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    plt.close(figure)
