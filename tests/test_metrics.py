from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from segdeconv.metrics import (
    category_scores,
    classification_scores,
    instance_counts,
    instance_scores,
    new_confusion,
    segmentation_scores,
)


def test_confusion_counts_and_ignores() -> None:
    confusion = new_confusion(3, ignore_index=255)
    confusion.update(torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 2, 2, 255]]))
    counts = confusion.compute()
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]


def test_segmentation_scores_by_hand() -> None:
    scores = segmentation_scores(
        torch.tensor([[5, 1, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]), ("a", "b", "c", "d")
    )
    assert scores["iou"]["a"] == 5 / 9
    assert scores["iou"]["b"] == 2 / 5
    assert math.isnan(scores["iou"]["c"])  # neither labelled nor predicted
    assert scores["iou"]["d"] == 0  # labelled, never found
    assert scores["miou"] == pytest.approx((5 / 9 + 2 / 5 + 0) / 3, abs=1e-15)
    assert scores["pixel_acc"] == 7 / 11


def test_segmentation_scores_against_numpy() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 5, (2, 1000))
    confusion = new_confusion(5, 255)
    confusion.update(torch.from_numpy(predicted), torch.from_numpy(truth))
    scores = segmentation_scores(confusion.compute(), tuple("abcde"))
    for c, name in enumerate("abcde"):
        inter = ((truth == c) & (predicted == c)).sum()
        assert scores["iou"][name] == inter / ((truth == c) | (predicted == c)).sum()


def test_classification_scores() -> None:
    scores = classification_scores(torch.tensor([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), ("a", "b", "c"))
    assert scores["top1"] == 5 / 6
    assert scores["recall"]["a"] == 3 / 4
    assert math.isnan(scores["recall"]["c"])


def test_counts_are_exact_beyond_float64() -> None:
    confusion = new_confusion(3, 255)
    confusion.confmat += 2**53  # where a float64 no longer tells neighbours apart
    confusion.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 0]))
    counts = confusion.compute()
    assert counts.dtype == torch.int64
    assert (counts - 2**53).tolist() == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert segmentation_scores(counts, ("a", "b", "c"))["confusion"] == counts.tolist()


def test_absent_classes_enter_no_mean() -> None:
    counts = torch.zeros(4, 4, dtype=torch.int64)
    counts[0, 0], counts[0, 1], counts[2, 2] = 6, 2, 5
    scores = segmentation_scores(counts, tuple("abcd"))
    assert scores["mean_acc"] == (6 / 8 + 1) / 2  # b is predicted, but labelled nowhere
    assert scores["miou"] == pytest.approx((6 / 8 + 0 + 1) / 3, abs=1e-15)
    assert math.isnan(scores["iou"]["d"])
    categories = category_scores(counts, ("x", "x", "y", "z"))
    assert categories["category_iou"]["x"] == 1  # a and b are not told apart
    assert math.isnan(categories["category_iou"]["z"])
    assert categories["category_miou"] == 1
    nothing = segmentation_scores(torch.zeros(4, 4), tuple("abcd"))
    assert all(math.isnan(nothing[key]) for key in ("miou", "pixel_acc", "mean_acc"))
    assert math.isnan(classification_scores(torch.zeros(4, 4), tuple("abcd"))["top1"])


def test_categories_and_instances_against_loops() -> None:
    """Pixel by pixel, and object by object, over three pictures."""
    rng = np.random.default_rng(0)
    label_ids, categories = (7, 24, 25, 26, 28), ("flat", "human", "human", "vehicle", "vehicle")
    sizes = (math.nan, 34.0, 39.0, 120.0, math.nan)  # so that not all of 'vehicle' has objects
    confusion, counts = new_confusion(5, 255), torch.zeros(5, 3, dtype=torch.float64)
    pictures = []
    for _ in range(3):
        truth, predicted = rng.integers(0, 5, (2, 30, 40)).astype(np.uint8)
        objects = rng.integers(0, 4, (30, 40))
        instances = np.array(label_ids, np.int32)[truth]
        instances = np.where((objects > 0) & (truth > 0), 1000 * instances + objects, instances)
        instances[0], truth[0] = 29005, 255  # an object of a class that is not evaluated
        confusion.update(torch.from_numpy(predicted), torch.from_numpy(truth))
        counts += instance_counts(predicted, instances.astype(np.int32), label_ids, categories, sizes)
        pictures.append((truth, predicted, instances))
    total, classes = confusion.compute(), ("road", "person", "rider", "car", "bus")
    got = category_scores(total, categories) | instance_scores(total, counts, classes, categories, sizes)

    def pixels(keep: Callable[[int, int], bool]) -> int:
        pairs = (
            (t, p)
            for truth, predicted, _ in pictures
            for t, p in zip(truth.flat, predicted.flat, strict=True)
        )
        return sum(t != 255 and keep(int(t), int(p)) for t, p in pairs)

    def weighted(of: set[int], good: Callable[[int, int], bool]) -> tuple[float, float]:
        right = everything = 0.0
        for _, predicted, instances in pictures:
            for number in np.unique(instances[instances > 1000]):
                if number // 1000 not in {label_ids[c] for c in of}:
                    continue
                c = label_ids.index(number // 1000)
                found = predicted[instances == number]
                weight = sizes[c] / len(found)
                right += weight * sum(good(c, int(p)) for p in found)
                everything += weight * len(found)
        return right, everything

    for name in ("flat", "human", "vehicle"):
        own = {c for c in range(5) if categories[c] == name}
        right = pixels(lambda t, p, own=own: t in own and p in own)
        either = pixels(lambda t, p, own=own: t in own or p in own)
        assert got["category_iou"][name] == right / either
    assert set(got["iiou"]) == {"person", "rider", "car"}
    for c in (1, 2, 3):
        right, everything = weighted({c}, lambda c, p: c == p)
        wrong = pixels(lambda t, p, c=c: p == c != t)
        assert got["iiou"][classes[c]] == pytest.approx(right / (everything + wrong), abs=1e-13)
    assert set(got["category_iiou"]) == {"human"}
    right, everything = weighted({1, 2}, lambda c, p: p in (1, 2))
    wrong = pixels(lambda t, p: p in (1, 2) and t not in (1, 2))
    assert got["category_iiou"]["human"] == pytest.approx(right / (everything + wrong), abs=1e-13)
    assert got["miiou"] == pytest.approx(np.mean(list(got["iiou"].values())), abs=1e-15)


def test_a_picture_without_objects() -> None:
    labels = np.zeros((3, 4), np.uint8)
    counts = instance_counts(
        labels, np.full((3, 4), 7, np.int32), (7, 24), ("flat", "human"), (math.nan, 9.0)
    )
    assert not counts.any()
    confusion = torch.tensor([[12, 0], [0, 0]])
    scores = instance_scores(confusion, counts, ("road", "person"), ("flat", "human"), (math.nan, 9.0))
    assert math.isnan(scores["iiou"]["person"])
    assert math.isnan(scores["category_miiou"])
