"""Evaluation: one road from pictures to scores, for a torch network and for an exported graph."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segdeconv.checkpoint import CheckpointInfo, load_checkpoint
from segdeconv.config import DataConfig
from segdeconv.data import Samples, eval_loader, open_samples
from segdeconv.errors import UserError
from segdeconv.files import to_json, write_atomically
from segdeconv.metrics import MAIN_METRIC, classification_scores, new_confusion, segmentation_scores
from segdeconv.models import main_output, size_multiple
from segdeconv.progress import Bar

Predict = Callable[[Tensor], Tensor]
"""Normalised pictures (n, 3, H, W) to class numbers, (n, H, W) or (n,), on the same device."""


def torch_predictor(model: nn.Module, amp: torch.dtype | None = None) -> Predict:
    """The arg max of a network in evaluation mode."""
    model.eval()

    @torch.inference_mode()
    def predict(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
            return main_output(model(images)).argmax(1)

    return predict


def onnx_predictor(path: str | Path, info: CheckpointInfo, multiple: int) -> Predict:
    """The same from an exported graph, through `segdeconv.runtime`.

    Raises:
        UserError: the graph is not there, or was exported from a run with other classes or preparation.
    """
    from segdeconv.export import graph_metadata
    from segdeconv.runtime import Segmenter

    segmenter = Segmenter(path)
    expected = json.loads(json.dumps(graph_metadata(info, multiple, "labels")))
    for key in ("task", "classes", "mean", "std", "resize", "size_multiple"):
        if segmenter.metadata[key] != expected[key]:
            raise UserError(
                f"{path}: was exported from another run: its {key} is {segmenter.metadata[key]}, the run's "
                f"{expected[key]}"
            )

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(segmenter.run(images.cpu().numpy()).astype(np.int64)).to(images.device)

    return predict


def ignore_index_of(samples: Samples, data: DataConfig) -> int:
    """The target that does not count; for classification one that never occurs."""
    return data.ignore_index if samples.task == "segmentation" else -100


def score(
    predict: Predict,
    loader: DataLoader,
    samples: Samples,
    ignore_index: int,
    device: torch.device | str,
    title: str = "evaluating",
) -> dict[str, Any]:
    """Scores of ``predict`` over a loader; see `segdeconv.metrics` for what they are."""
    confusion = new_confusion(len(samples.classes), ignore_index).to(device)
    for images, targets in Bar(loader, len(loader), title):
        confusion.update(predict(images.to(device)), targets.to(device))
    by_task = {"segmentation": segmentation_scores, "classification": classification_scores}
    return by_task[samples.task](confusion.compute(), samples.classes)


def check_fit(info: CheckpointInfo, samples: Samples) -> None:
    """Raise UserError unless the data has the checkpoint's classes."""
    if samples.classes != info.classes:
        raise UserError(
            f"the data has {len(samples.classes)} classes ({', '.join(samples.classes[:3])}, ...), but the "
            f"checkpoint was trained on {len(info.classes)} ({', '.join(info.classes[:3])}, ...); check "
            "data.dataset and data.classes"
        )


def evaluate_run(
    run: str | Path,
    device: torch.device | str = "cpu",
    onnx: str | Path | None = None,
    root: str | None = None,
) -> dict[str, Any]:
    """Evaluate a run on its recipe's validation split, with PyTorch or, given ``onnx``, with onnxruntime.

    Args:
        root: where the data lies, if not where the recipe says.

    Raises:
        UserError: no such run, its data is not there or has other classes, or the graph is another run's.
    """
    model, info = load_checkpoint(run, device)
    data = info.recipe.data if root is None else replace(info.recipe.data, root=root)
    samples = open_samples(data, "val")
    check_fit(info, samples)
    multiple = size_multiple(model)
    loader = eval_loader(samples, data, info.recipe.train.batch_size, multiple)
    predict = torch_predictor(model) if onnx is None else onnx_predictor(onnx, info, multiple)
    return {
        "recipe": info.recipe.name,
        "split": data.val,
        "samples": len(samples),
        "epoch": info.epoch,
        "engine": "pytorch" if onnx is None else "onnxruntime",
        **score(predict, loader, samples, ignore_index_of(samples, data), device),
    }


def write_scores(run: str | Path, scores: dict[str, Any]) -> Path:
    """Leave scores beside the checkpoint, in ``eval.json`` or ``eval_onnx.json``."""
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / ("eval.json" if scores["engine"] == "pytorch" else "eval_onnx.json")
    write_atomically(path, lambda temporary: temporary.write_text(to_json(scores, indent=1)))
    return path


def table(scores: dict[str, Any], task: str) -> Table:
    """Scores as a table for the terminal."""
    per_class = scores["iou" if task == "segmentation" else "recall"]
    out = Table("class", "IoU" if task == "segmentation" else "recall", "share of truth")
    counts = np.array(scores["confusion"], dtype=np.int64)
    shares = counts.sum(1) / max(counts.sum(), 1)
    for (name, value), share in zip(per_class.items(), shares, strict=True):
        out.add_row(name, "absent" if math.isnan(value) else f"{value:.4f}", f"{share:.4f}")
    out.add_section()
    out.add_row(MAIN_METRIC[task], f"{scores[MAIN_METRIC[task]]:.4f}", "")
    if task == "segmentation":
        out.add_row("pixel_acc", f"{scores['pixel_acc']:.4f}", "")
    return out
