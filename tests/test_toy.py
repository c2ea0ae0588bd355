from __future__ import annotations

import numpy as np
import pytest

from segdeconv.config import DataConfig
from segdeconv.data import open_samples
from segdeconv.data.toy import CLASSES, draw_street

SIZE = (64, 128)


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, np.ndarray]:
    drawn = [draw_street(seed, SIZE) for seed in range(60)]
    return np.stack([image for image, _ in drawn]), np.stack([label for _, label in drawn])


def test_a_seed_fixes_a_scene() -> None:
    image, label = draw_street(7)
    again, same = draw_street(7)
    assert image.shape == (128, 256, 3)
    assert np.array_equal(image, again)
    assert np.array_equal(label, same)
    assert not np.array_equal(image, draw_street(8)[0])


def test_splits_do_not_share_scenes() -> None:
    config = DataConfig("toy", size=SIZE, count=(5, 3))
    train, val = open_samples(config, "train"), open_samples(config, "val")
    assert (len(train), len(val)) == (5, 3)
    drawn = {train.load(i)[0].tobytes() for i in range(5)} | {val.load(i)[0].tobytes() for i in range(3)}
    assert len(drawn) == 8
    assert np.array_equal(train.load(2)[0], draw_street(2, SIZE)[0])


def test_every_class_is_drawn_often(scenes: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = scenes
    assert labels.max() == len(CLASSES) - 1
    present = np.array([[(label == c).any() for c in range(len(CLASSES))] for label in labels]).mean(0)
    assert (present > 0.6).all(), dict(zip(CLASSES, present, strict=True))


def miou(truth: np.ndarray, predicted: np.ndarray) -> float:
    ious = []
    for c in range(len(CLASSES)):
        union = ((truth == c) | (predicted == c)).sum()
        ious.append(((truth == c) & (predicted == c)).sum() / union)
    return float(np.mean(ious))


def test_colour_alone_fails(scenes: tuple[np.ndarray, np.ndarray]) -> None:
    """The best classifier of single pixels by colour (16 levels a channel) is far from a solution."""
    images, labels = scenes
    codes = (images.astype(int) // 16) @ np.array([256, 16, 1])
    counts = np.zeros((4096, len(CLASSES)))
    np.add.at(counts, (codes[:40].ravel(), labels[:40].ravel()), 1)
    best = counts.argmax(1)
    assert miou(labels[40:], best[codes[40:]]) < 0.25


def test_position_alone_fails(scenes: tuple[np.ndarray, np.ndarray]) -> None:
    _, labels = scenes
    usual = np.stack([(labels[:40] == c).sum(0) for c in range(len(CLASSES))]).argmax(0)
    assert miou(labels[40:], np.broadcast_to(usual, labels[40:].shape)) < 0.4
