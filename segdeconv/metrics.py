"""Segmentation and classification scores from a confusion matrix in int64. Nothing here predicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix


def new_confusion(num_classes: int, ignore_index: int | None) -> MulticlassConfusionMatrix:
    """Counts (true class, predicted class); pixels labelled ``ignore_index``, if given, do not count."""
    return MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)


def segmentation_scores(confusion: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Scores of a confusion matrix (C, C), rows true, columns predicted.

    IoU of a class is TP / (TP + FP + FN), NaN where the class is neither labelled nor predicted; mIoU is the
    mean over the classes that have one (PASCAL VOC and Cityscapes).

    Returns:
        ``miou``, ``pixel_acc``, ``iou`` by class name, and ``confusion`` as nested lists.
    """
    counts = confusion.to(torch.int64).cpu()
    true_positive = counts.diag().double()
    union = (counts.sum(0) + counts.sum(1)).double() - true_positive
    iou = true_positive / union  # 0 / 0 is NaN
    return {
        "miou": iou.nanmean().item(),
        "pixel_acc": (true_positive.sum() / counts.sum()).item(),
        "iou": dict(zip(classes, iou.tolist(), strict=True)),
        "confusion": counts.tolist(),
    }


def classification_scores(confusion: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """``top1``, ``recall`` by class name (NaN for a class without samples), and ``confusion``."""
    counts = confusion.to(torch.int64).cpu()
    right = counts.diag().double()
    return {
        "top1": (right.sum() / counts.sum()).item(),
        "recall": dict(zip(classes, (right / counts.sum(1)).tolist(), strict=True)),
        "confusion": counts.tolist(),
    }


MAIN_METRIC = {"segmentation": "miou", "classification": "top1"}
