"""Segmentation and classification scores from a confusion matrix in int64. Nothing here predicts.

The scores of Cityscapes (Cordts et al., CVPR 2016, section 4.1) are those of the official script,
cityscapesscripts/evaluation/evalPixelLevelSemanticLabeling.py; a test runs both on the same pictures. A score
whose denominator is zero, as of a class neither labelled nor predicted, is NaN and enters no mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

MAIN_METRIC = {"segmentation": "miou", "classification": "top1"}


def new_confusion(num_classes: int, ignore_index: int | None) -> MulticlassConfusionMatrix:
    """Counts (true class, predicted class); pixels labelled ``ignore_index``, if given, do not count."""
    return MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)


def new_top5(num_classes: int) -> MulticlassAccuracy:
    """The share of samples whose true class is among the five with the highest scores."""
    return MulticlassAccuracy(num_classes, top_k=5, average="micro", validate_args=False)


def segmentation_scores(confusion: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """Scores of a confusion matrix (C, C), rows true, columns predicted.

    IoU of a class is TP / (TP + FP + FN), its accuracy TP / (TP + FN); mIoU and mean accuracy are the means
    over the classes that have one (PASCAL VOC and Cityscapes).

    Returns:
        ``miou``, ``pixel_acc``, ``mean_acc``, ``iou`` by class name, and ``confusion`` as nested lists.
    """
    counts = confusion.to(torch.int64).cpu()
    true_positive, iou = counts.diag().double(), _iou(counts)
    return {
        "miou": iou.nanmean().item(),
        "pixel_acc": (true_positive.sum() / counts.sum()).item(),
        "mean_acc": (true_positive / counts.sum(1)).nanmean().item(),
        "iou": dict(zip(classes, iou.tolist(), strict=True)),
        "confusion": counts.tolist(),
    }


def category_scores(confusion: Tensor, categories: tuple[str, ...]) -> dict[str, Any]:
    """IoU of categories, ``categories`` being that of every class: a category is one class made of its own.

    Returns:
        ``category_miou``, and ``category_iou`` by name.
    """
    member = _membership(categories)
    iou = _iou(member @ confusion.to(torch.int64).cpu() @ member.T)
    return {
        "category_miou": iou.nanmean().item(),
        "category_iou": dict(zip(dict.fromkeys(categories), iou.tolist(), strict=True)),
    }


def instance_counts(
    predicted: NDArray[np.uint8],
    instances: NDArray[np.int32],
    label_ids: tuple[int, ...],
    categories: tuple[str, ...],
    average_sizes: tuple[float, ...],
) -> Tensor:
    """What one picture adds to the instance-weighted scores. Counts of pictures are summed.

    Every pixel of an object counts average size of its class / size of the object, so that small objects
    count as much as large ones.

    Args:
        predicted: class numbers (H, W).
        instances: (H, W), 1000 times label id plus a number for every object, anything below for the rest.
        label_ids, categories: of every class.
        average_sizes: of the objects of every class, in pixels; NaN for classes without objects.

    Returns:
        (C, 3) float64: weighted pixels of the class's objects that were given the class, that were given a
        class of its category, and all of them.
    """
    counts = torch.zeros(len(label_ids), 3, dtype=torch.float64)
    inside = instances > 1000
    objects, number = np.unique(instances[inside], return_inverse=True)
    found = np.bincount(number * len(label_ids) + predicted[inside], minlength=len(objects) * len(label_ids))
    class_of = {label: c for c, label in enumerate(label_ids) if not np.isnan(average_sizes[c])}
    for instance, found_C in zip(objects, found.reshape(-1, len(label_ids)), strict=True):
        c = class_of.get(int(instance) // 1000)
        if c is None:
            continue
        weight = average_sizes[c] / found_C.sum()
        in_category = found_C[[category == categories[c] for category in categories]].sum()
        counts[c] += torch.tensor([weight * found_C[c], weight * in_category, average_sizes[c]])
    return counts


def instance_scores(
    confusion: Tensor,
    counts: Tensor,
    classes: tuple[str, ...],
    categories: tuple[str, ...],
    average_sizes: tuple[float, ...],
) -> dict[str, Any]:
    """Instance-weighted IoU (iIoU): TP and FN weighted by object as `instance_counts` has it, FP by pixel.

    Of classes that have objects, and of the categories all of whose classes have.

    Returns:
        ``miiou``, ``category_miiou``, and ``iiou`` and ``category_iiou`` by name.
    """
    confusion, member = confusion.to(torch.int64).cpu(), _membership(categories)
    has_objects = ~torch.tensor(average_sizes).isnan()
    of_class = counts[:, 0] / (counts[:, 2] + _false_positive(confusion))
    merged = _false_positive(member @ confusion @ member.T)
    of_category = (member.double() @ counts[:, 1]) / (member.double() @ counts[:, 2] + merged)
    all_objects = (member @ (~has_objects).to(torch.int64)) == 0
    iiou, category_iiou = of_class[has_objects], of_category[all_objects]
    names = [name for name, has in zip(classes, has_objects, strict=True) if has]
    category_names = [n for n, every in zip(dict.fromkeys(categories), all_objects, strict=True) if every]
    return {
        "miiou": iiou.nanmean().item(),
        "category_miiou": category_iiou.nanmean().item(),
        "iiou": dict(zip(names, iiou.tolist(), strict=True)),
        "category_iiou": dict(zip(category_names, category_iiou.tolist(), strict=True)),
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


def _iou(counts: Tensor) -> Tensor:
    true_positive = counts.diag().double()
    return true_positive / (counts.sum(1) + _false_positive(counts)).double()  # 0 / 0 is NaN


def _false_positive(counts: Tensor) -> Tensor:
    return counts.sum(0) - counts.diag()


def _membership(categories: tuple[str, ...]) -> Tensor:
    """(K, C) int64: whether category k, in order of appearance, holds class c."""
    return torch.tensor([[c == name for c in categories] for name in dict.fromkeys(categories)]).long()
