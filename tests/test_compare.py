from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from segdeconv.checkpoint import save_state
from segdeconv.compare import compare_runs, legend, table
from segdeconv.config import load_recipe, recipe_to_dict
from segdeconv.errors import UserError
from segdeconv.figures import _shortened, confusion_picture, read_metrics, training_curves, triptych


def make_run(
    folder: Path, changes: Sequence[str] = (), scores: Sequence[float | None] = (0.2, 0.5),
    metric: str = "miou",
) -> Path:  # fmt: skip
    folder.mkdir(parents=True)
    recipe = recipe_to_dict(load_recipe("demo", [f"train.epochs={len(scores)}", *changes]))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with open(folder / "metrics.jsonl", "w") as file:
        for epoch, value in enumerate(scores, 1):
            line = {
                "epoch": epoch,
                "step": 40 * epoch,
                "loss": 1 / epoch,
                "seconds": 90 * epoch,
                metric: value,
            }
            if value is not None:
                line[metric] = value
            file.write(json.dumps(line) + "\n")
    return folder


def test_seeds_are_one_entry_with_mean_and_spread(tmp_path: Path) -> None:
    scores = [[0.1, None, 0.3, 0.5], [0.2, None, 0.6, 0.4], [0.3, None, 0.9, 0.6]]
    nd = [
        make_run(tmp_path / f"nd{i}", [f"train.seed={i}", f"data.root=at{i}"], s)
        for i, s in enumerate(scores)
    ]
    bn = make_run(tmp_path / "bn", ["model.norm=bn", "train.epochs=4"], [0.1, 0.2, 0.25])
    metric, (first, second) = compare_runs([nd[0], bn, *nd[1:]], tmp_path / "out")
    assert metric == "miou"
    assert (first.label, second.label) == ("nd0 and 2 more", "bn")
    assert first.folders == nd
    assert (first.recipe, second.recipe) == ({"model.norm": "nd"}, {"model.norm": "bn"})
    assert [point.epoch for point in first.curve] == [1, 3, 4]  # the second is not scored, all have four
    last = first.curve[-1]
    assert (last.step, last.minutes, last.low, last.high) == (160, 6, 0.4, 0.6)
    assert last.mean == pytest.approx(0.5, abs=1e-15)
    assert last.error == pytest.approx(statistics.stdev([0.5, 0.4, 0.6]) / 3**0.5, abs=1e-15)
    assert first.best == pytest.approx(
        (2 / 3, statistics.stdev([0.5, 0.6, 0.9]) / 3**0.5, 0.5, 0.9), abs=1e-15
    )
    assert math.isnan(second.curve[0].error)
    assert legend([second]) == ["bn: model.norm = bn", f"note: {bn}: has 3 of 4 epochs"]

    assert table(metric, [first, second]).row_count == (3 + 1) + (3 + 1)
    lines = (tmp_path / "out" / "compare.md").read_text().splitlines()
    assert lines[0] == f"- nd0 and 2 more: model.norm = nd; mean of {', '.join(map(str, nd))}"
    assert "| nd0 and 2 more | 4 | 160 | 6.0 | 0.2500 | 0.5000 | 0.0577 | 0.4000 to 0.6000 |" in lines
    assert "| bn | best |  |  |  | 0.2500 |  |  |" in lines
    written = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert written["runs"][0]["curve"][-1]["mean"] == pytest.approx(0.5, abs=1e-15)
    assert written["runs"][1]["best"] == {"mean": 0.25, "error": None, "low": 0.25, "high": 0.25}
    assert Image.open(tmp_path / "out" / "compare.png").size[0] > 1300


def test_what_batch_norm_has_no_use_for_does_not_tell_its_runs_apart(tmp_path: Path) -> None:
    every, rare = (f"model.network_deconv.refresh_every={n}" for n in (1, 5))
    nd, bn = make_run(tmp_path / "nd", [every]), make_run(tmp_path / "bn", ["model.norm=bn", rare])
    again = make_run(tmp_path / "again", ["model.norm=bn", every, "train.seed=1"])
    entries = compare_runs([nd, bn, again], tmp_path / "out")[1]
    assert [entry.recipe for entry in entries] == [{"model.norm": "nd"}, {"model.norm": "bn"}]
    assert entries[1].folders == [bn, again]
    other = make_run(tmp_path / "other", [rare])
    entries = compare_runs([bn, nd, other], tmp_path / "out")[1]
    key = "model.network_deconv.refresh_every"
    assert [entry.recipe.get(key, "none") for entry in entries] == ["none", 1, 5]


def test_runs_of_one_seed_are_pointed_out(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / str(i), [f"train.seed={seed}"]) for i, seed in enumerate((0, 1, 0))]
    for folders, notes in ((runs[:2], 0), (runs, 1)):
        _, (entry,) = compare_runs(folders, tmp_path / "out")
        assert sum("some have the same train.seed" in line for line in legend([entry])) == notes


def test_an_unfinished_seed_is_pointed_out(tmp_path: Path) -> None:
    """The mean ends with its epochs, and so does what the best is chosen from."""
    runs = [
        make_run(tmp_path / str(i), [f"train.seed={i}", "train.epochs=4"], scores)
        for i, scores in enumerate([[0.1, 0.2, 0.3, 0.9], [0.2, 0.1], [0.2, 0.1, 0.3]])
    ]
    _, (entry,) = compare_runs(runs, tmp_path / "out")
    assert legend([entry])[1:] == [
        f"note: {runs[1]}: has 2 of 4 epochs; the mean ends at epoch 2",
        f"note: {runs[2]}: has 3 of 4 epochs; the mean ends at epoch 2",
    ]
    assert [point.epoch for point in entry.curve] == [1, 2]
    assert entry.best == pytest.approx((0.2, 0, 0.2, 0.2), abs=1e-15)


def test_runs_on_other_pictures_are_pointed_out(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [f"train.seed={i}"]) for i, name in enumerate("abcd")]
    for run, count in zip(runs, (8, 8, 7), strict=False):
        save_state(run, {}, {"pictures": {"training": [count, "names"], "validation": [2, "names"]}})
    _, (entry,) = compare_runs(runs, tmp_path / "out")
    assert entry.notes == [f"{runs[2]}: has other pictures than {runs[0]}"]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "run", [f"train.lr=0.{i}"]) for i, name in enumerate(("a", "b"), 1)]
    _, entries = compare_runs(runs, tmp_path / "out")
    assert [entry.label for entry in entries] == [str(run) for run in runs]
    assert legend(entries)[1] == f"{runs[1]}: train.lr = 0.2"
    columns = table("miou", entries).columns
    assert [column.header for column in columns] == ["run", "epoch", "step", "minutes", "loss", "miou"]
    assert list(columns[0].cells) == [str(runs[0]), "", "", str(runs[1]), "", ""]


def test_a_run_whose_name_is_not_utf8(tmp_path: Path) -> None:
    compare_runs([make_run(tmp_path / "run\udce9")], tmp_path / "out")
    assert r"- run\udce9: one run" in (tmp_path / "out" / "compare.md").read_text()
    assert (tmp_path / "out" / "compare.png").is_file()


def test_bad_runs(tmp_path: Path) -> None:
    good, out = make_run(tmp_path / "good"), tmp_path / "out"
    with pytest.raises(UserError, match=r"nothing: no run \(it has no recipe.yaml\)"):
        compare_runs([good, tmp_path / "nothing"], out)
    with pytest.raises(UserError, match="good: is given twice"):
        compare_runs([good, tmp_path / "good" / ".." / "good"], out)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop: no run"):
        compare_runs([good, tmp_path / "loop"], out)
    with pytest.raises(UserError, match="young: has no score; wait for"):
        compare_runs([good, make_run(tmp_path / "young", scores=[None])], out)
    with pytest.raises(UserError, match=r"good has miou and .*cifar has top1"):
        compare_runs([good, make_run(tmp_path / "cifar", metric="top1")], out)
    with pytest.raises(UserError, match="no epoch is scored in all of them"):
        compare_runs(
            [good, make_run(tmp_path / "late", ["train.seed=1", "train.epochs=2"], [None, None, 0.4])], out
        )
    (good / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics.jsonl: cannot be read \(No such file"):
        compare_runs([good], out)
    assert not out.exists()


def test_dollar_signs_are_drawn_and_log_scales_stay_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What stands between them is a formula to matplotlib, which labels its log scales so."""
    drawn: list[Any] = []
    monkeypatch.setattr("segdeconv.figures.save_figure", lambda figure, path: drawn.append(figure))
    training_curves({"a$_{$b $x$": [make_run(tmp_path / "a$_{$b $x$")]}, tmp_path / "c.png", "miou")
    confusion_picture([[1, 2], [3, 4]], ("$_{$", "$5"), tmp_path / "c.png")
    (label,) = drawn[0].legends[0].get_texts()
    texts = [label, *drawn[1].axes[0].get_xticklabels(), *drawn[1].axes[0].get_yticklabels()]
    shown = [text._preprocess_math(text.get_text()) for text in texts]
    assert shown == [(name, False) for name in ("a$_{$b $x$", "$_{$", "$5", "$_{$", "$5")]
    axis = drawn[0].axes[0]
    axis.set_yscale("log")
    drawn[0].canvas.draw()
    ticks = [text for text in axis.get_yticklabels() if text.get_text()]
    assert ticks
    assert all(text._preprocess_math(text.get_text())[1] for text in ticks)


def test_a_line_cut_short_does_not_count(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(whole + whole[:30])
    assert [line["epoch"] for line in read_metrics(run)] == [1, 2]
    for damaged, said in ((whole[:30], ""), ("[1]", "line 1 is no object"), ("{}", "without its epoch")):
        (run / "metrics.jsonl").write_text(f"{damaged}\n{whole}")
        with pytest.raises(UserError, match=rf"metrics.jsonl: is damaged \(.*{said}"):
            read_metrics(run)


@pytest.mark.parametrize("count", [2, 19, 100])
def test_confusion_picture(count: int, tmp_path: Path) -> None:
    """The diagonal of a perfect matrix is dark, the rest light; a class without pixels has an empty row."""
    confusion = 7 * np.eye(count, dtype=int)
    confusion[-1] = 0
    names = tuple(f"class ${i}$ $_{{$" for i in range(count))  # no formulae
    confusion_picture(confusion, names, tmp_path / "c.png")
    picture = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    picture = picture[:, : int(0.82 * picture.shape[1])]  # without the scale that stands for the numbers
    dark_blue = (picture[..., 2] > picture[..., 0] + 60).mean()
    assert 0.2 / count < dark_blue < 0.9 / count


def test_triptych_of_pictures_of_several_sizes() -> None:
    palette = ((255, 0, 0), (0, 0, 255))
    rows = []
    for height, width in ((50, 100), (100, 50), (1024, 2048)):
        labels = np.zeros((height, width), np.uint8)
        rows.append((np.zeros((height, width, 3), np.uint8), labels, labels + 1))
    picture = triptych(rows, ("a", "b"), palette, ["first", "second", "third"])
    assert picture.size == (3 * 300 + 24, 20 + 150 + 600 + 150 + 3 * 20 + 20 + 6)
    colors = np.asarray(picture)[20 + 75]
    assert tuple(colors[6 + 300 + 6 + 150]) == (140, 0, 0)
    assert tuple(colors[6 + 612 + 150]) == (0, 0, 140)
    assert triptych(rows[:1], ("a", "b"), palette).size[1] == 20 + 150 + 6 + 20 + 6
    assert triptych(rows[2:], ("a", "b"), palette).size[0] == 3 * 640 + 24
    tall = np.zeros((70_000, 10), np.uint8)
    picture = triptych([(np.zeros((70_000, 10, 3), np.uint8), tall, tall)], ("a", "b"), palette)
    assert picture.size == (3 * 320 + 24, 20 + 640 + 6 + 20 + 6)


def test_long_names_of_classes_keep_both_ends() -> None:
    assert _shortened("a class of that name, the first") == "a class of …e, the first"
    assert _shortened("x" * 24) == "x" * 24
