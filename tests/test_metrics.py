from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from segdeconv.metrics import classification_scores, new_confusion, segmentation_scores


def test_confusion_counts_and_ignores() -> None:
    confusion = new_confusion(3, ignore_index=255)
    confusion.update(torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 2, 2, 255]]))
    counts = confusion.compute()
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]


def test_counts_stay_exact_beyond_float32() -> None:
    confusion = new_confusion(2, 255)
    big = torch.zeros(1 << 22, dtype=torch.long)
    for _ in range(5):
        confusion.update(big, big)
    confusion.update(torch.tensor([1]), torch.tensor([0]))
    assert confusion.compute().tolist() == [[5 << 22, 1], [0, 0]]


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
