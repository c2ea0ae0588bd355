"""The command line as a person meets it: what it prints, and one sentence with exit code 2 for bad input."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import onnx
import pytest
import yaml
from conftest import Call
from PIL import Image
from rich.table import Table
from test_checkpoint import Hostile
from test_data import break_pair, make_set
from test_train import TINY, tiny

from segdeconv.config import recipe_to_dict
from segdeconv.progress import console


def changes(*more: str) -> list[str]:
    return [part for change in (*TINY, *more) for part in ("--set", change)]


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained and exported run, made through real processes."""
    folder = tmp_path_factory.mktemp("road")
    for command in (
        ["train", "demo", *changes("train.epochs=1"), "--out", "run"],
        ["export", "run", "--out", "model.onnx"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", "from segdeconv.cli import main; main()", *command],
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "next: segdeconv" in done.stdout
    return folder


def test_a_network_to_begin_with_has_any_name(road: Path, call: Call, tmp_path: Path) -> None:
    """YAML, in which it is handed on, has ways of its own to write what is not in its first plane."""
    begun = tmp_path / "run😀: ~"
    begun.symlink_to(road / "run")
    options = {"--init": str(begun), "--out": str(tmp_path / "next")}
    code, _, error = call("train", "demo", *sum(options.items(), ()), *changes("train.epochs=1"))
    assert (code, error) == (0, "")
    recipes = (yaml.safe_load((run / "recipe.yaml").read_text()) for run in (begun, tmp_path / "next"))
    old, new = (recipe["model"] for recipe in recipes)
    assert new == old | {"init": str(begun)}
    recipe = yaml.safe_load((road / "run/recipe.yaml").read_text())
    del recipe["model"]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(recipe))
    assert call("train", tmp_path / "bare.yaml", "--init", begun, "--resume", "--dry-run")[0] == 0
    begun.unlink()  # which a run that has begun needs no more
    again = call("train", "demo", *sum(options.items(), ()), *changes("train.epochs=1"), "--resume")
    assert (again[0], again[2]) == (0, "")


def test_eval_of_pytorch_and_onnx_agree(road: Path, call: Call) -> None:
    code, out, _ = call("eval", road / "run")
    assert code == 0
    assert "miou" in out
    assert call("eval", road / "run", "--onnx", road / "model.onnx")[0] == 0
    torch_scores, onnx_scores = (
        json.loads((road / "run" / name).read_text()) for name in ("eval.json", "eval_onnx.json")
    )
    assert onnx_scores["engine"] == "onnxruntime"
    assert abs(np.array(torch_scores["confusion"]) - np.array(onnx_scores["confusion"])).sum() <= 4
    assert onnx_scores["miou"] == pytest.approx(torch_scores["miou"], abs=1e-4)


def test_eval_with_everything(road: Path, call: Call, tmp_path: Path) -> None:
    options = [
        "--window",
        "32,32",
        "--overlap",
        "0.5",
        "--flip",
        "--scales",
        "0.75,1",
        "--original",
        "--amp",
        "off",
        "--split",
        "train",
    ]
    out, labels = tmp_path / "out", tmp_path / "labels"
    code, told, _ = call("eval", road / "run", *options, "--out", out, "--save-predictions", labels)
    assert code == 0
    assert f"wrote {labels}" in told
    assert {path.name for path in out.iterdir()} == {"eval.json", "confusion.png", "worst.jpg"}
    scores = json.loads((out / "eval.json").read_text())
    settings = {"size": [32, 64], "window": [32, 32], "overlap": 0.5, "flip": True, "scales": [0.75, 1.0]}
    assert scores["settings"] == {**settings, "original": True, "amp": "off"}
    assert len(list(labels.iterdir())) == scores["samples"] == 12
    assert (scores["split"], Image.open(next(labels.iterdir())).size) == ("train", (256, 128))


@pytest.mark.parametrize("name", ["confusion.png", "worst.jpg"])
def test_a_picture_that_cannot_be_written_costs_no_scores(
    name: str, road: Path, call: Call, tmp_path: Path
) -> None:
    (tmp_path / name).mkdir()
    code, out, err = call("eval", road / "run", "--out", tmp_path)
    assert (code, f"{name}: is a folder, not a file to write" in err) == (2, True)
    assert "miou" in out
    assert "miou" in json.loads((tmp_path / "eval.json").read_text())


def test_compare(road: Path, call: Call, tmp_path: Path) -> None:
    code, told, _ = call("compare", road / "run", "--out", tmp_path / "out")
    assert code == 0
    assert "run: one run" in told
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "compare.png",
        "compare.md",
        "compare.json",
    }


def test_predict(road: Path, call: Call, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(tmp_path / "a.png")
    code, out, _ = call("predict", road / "model.onnx", tmp_path / "a.png", "--out", tmp_path / "out")
    assert code == 0
    assert "wrote 1 label maps" in out
    assert Image.open(tmp_path / "out" / "a.png").size == (50, 40)


def test_demo_end_to_end(tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a second demo replaces the first
        code, out, err = call("demo", "--out", tmp_path / "demo", *changes("train.epochs=1"))
        assert code == 0, err
    assert "next, the same recipe with batch norm" in out
    for name in ("overlay.png", "curves.png", "demo.onnx", "best.safetensors", "eval.json", "eval_onnx.json"):
        assert (tmp_path / "demo" / name).is_file(), name
    code, _, err = call("demo", "--out", tmp_path / "demo", "--set", "model.architecture=unett")
    assert (code, "did you mean 'unet'?" in err) == (2, True)
    assert (tmp_path / "demo" / "overlay.png").is_file()  # which is worth more than nothing
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    with filelock.FileLock(tmp_path / "demo" / ".lock"):
        assert "another process trains in this folder" in call("demo", "--out", tmp_path / "demo")[2]
    assert (tmp_path / "demo" / "overlay.png").is_file()
    monkeypatch.chdir(tmp_path / "demo")
    assert call("demo", "--out", ".", "--set", "model.architecture=unett")[0] == 2
    assert (tmp_path / "demo" / "overlay.png").is_file()


@pytest.mark.parametrize("at", ["shutil.rmtree", "segdeconv.demo.train", "segdeconv.demo.evaluate_run"])
def test_a_demo_is_alone_and_begins_again_wherever_it_was_stopped(
    at: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    demo = tmp_path / "demo"
    (demo / "runs").mkdir(parents=True)
    (demo / ".segdeconv-demo").touch()
    (demo / "link").symlink_to(demo / "runs")
    others = []

    def stop(*_: object) -> None:
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(demo / ".lock", blocking=False).acquire()
        others.append(at)
        raise KeyboardInterrupt

    # The worst order: what marks the demo first.
    monkeypatch.setattr(Path, "iterdir", lambda path: map(path.joinpath, sorted(os.listdir(path))))
    monkeypatch.setattr("segdeconv.demo.train", lambda *_: None)
    monkeypatch.setattr(at, stop)
    for _ in range(2):
        assert call("demo", "--out", demo, *changes())[0] == 130
        assert (demo / ".segdeconv-demo").exists()
        (demo / "runs").mkdir(exist_ok=True)
    assert others == [at] * 2


def test_help_and_version(call: Call) -> None:
    code, out, _ = call("--help")
    assert code == 0
    assert all(name in out for name in ("train", "eval", "compare", "export", "predict", "demo", "recipes"))
    assert call("--version") == (0, "0.1.0\n", "")
    code, out, _ = call("recipes")
    assert "camvid_unet_mobilenet_v2" in out
    code, out, _ = call("recipes", "my_images")
    assert (code, yaml.safe_load(out)["data"]["dataset"]) == (0, "image_mask")
    assert call("recipes", "my_image")[::2] == (
        2, "segdeconv: error: no recipe file and no recipe of the package is called 'my_image'; did you mean "
        "'my_images'?\n"
    )  # fmt: skip


def bad_recipe(folder: Path, **sections: dict) -> Path:
    values = recipe_to_dict(tiny())
    for section, changed in sections.items():
        values[section] |= changed
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def own_images(folder: Path, what: str | None = None, **data: object) -> Path:
    make_set(folder / "data", count=4, size=(32, 64))
    make_set(folder / "data", count=2, split="val", size=(32, 64))
    if what:
        break_pair(folder / "data", what)
    values = {
        "dataset": "image_mask",
        "root": str(folder / "data"),
        "classes": ["a", "b"],
        "size": [32, 64],
        **data,
    }
    return bad_recipe(folder, data=values)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_only(folder: Path) -> Path:
    """A place nobody can write to, not even root: below a file."""
    return write(folder / "file", "x") / "out"


def foreign(road: Path, folder: Path) -> Path:
    graph = onnx.load(road / "model.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, folder / "foreign.onnx")
    return folder / "foreign.onnx"


BAD: dict[str, tuple[Callable[[Path, Path], list], str]] = {
    "no such command": (lambda r, t: ["trian"], "No such command 'trian'"),
    "no such option": (lambda r, t: ["train", "demo", "--lr", "3"], "No such option"),
    "missing argument": (lambda r, t: ["train"], "Missing argument"),
    "wrong choice": (lambda r, t: ["train", "demo", "--norm", "gn"], "'gn' is not one of"),
    "missing recipe": (lambda r, t: ["train", "dmeo"], "did you mean 'demo'?"),
    "recipe is no YAML": (lambda r, t: ["train", write(t / "r.yaml", "a: [")], "r.yaml: not a readable YAML"),
    "recipe is binary": (lambda r, t: ["train", write(t / "r.yaml", b"\xff\xfe\x00")], "not a readable YAML"),
    "recipe is a list": (lambda r, t: ["train", write(t / "r.yaml", "- a")], "expected a mapping"),
    "wrong key": (lambda r, t: ["train", bad_recipe(t, train={"epoch": 3})], "did you mean 'epochs'?"),
    "wrong type": (lambda r, t: ["train", bad_recipe(t, train={"lr": "fast"})], "train.lr = 'fast'"),
    "no number": (lambda r, t: ["train", "demo", "--set", "train.lr=on"], "train.lr = True: expected a number"),
    "a date as seed": (lambda r, t: ["train", "demo", "--set", "train.seed=20261126120000"], "train.seed = 2026"),
    "no run to begin with": (lambda r, t: ["train", "demo", "--init", ""], ".: holds no checkpoint"),
    "dry run of what cannot be": (
        lambda r, t: ["train", "demo", "--dry-run", *changes("model.encoder=null", "model.architecture=dpt", "model.options={}")], "cannot train on batches"),
    "graph of other weights": (
        lambda r, t: ["eval", r / "run", "--onnx", other_run(r, t, weights_sha256="0" * 64)], "from other weights"),
    "a prediction over a picture": (lambda r, t: ["predict", r / "model.onnx", two_of_a_name(t), "--out", t], "is the folder of what is to be predicted"),
    "threads beyond count": (
        lambda r, t: ["predict", r / "model.onnx", picture(t), "--threads", 3 * 10**9], "expected 1 to 1024"),
    "a gate that is no number": (
        lambda r, t: ["export", r / "run", "--fp16", "--max-drop", "nan", "--out", t / "m.onnx"], "--max-drop nan"),
    "a split that is not drawn": (lambda r, t: ["eval", r / "run", "--split", "test"], "has no split test"),
    "an overlap of no windows": (lambda r, t: ["eval", r / "run", "--overlap", "0.5"], "goes with --window"),
    "a run where scores lie": (
        lambda r, t: ["train", "demo", "--out", scores_in(t)], "holds scores of another network"),
    "a picture of no pixels": (lambda r, t: ["bench", r / "model.onnx", "--size", "-1,5"], "--size -1,5"),
    "numbers into a folder": (
        lambda r, t: ["bench", r / "model.onnx", "--size", "32,32", "--runs", "1", "--json", "/"], "is a folder"),
    "numbers into no folder": (
        lambda r, t: ["bench", r / "model.onnx", "--runs", "100000000", "--json", t / "no/b.json"], "is no folder"),
    "publishing somewhere unknown": (lambda r, t: ["zoo", "publish", "--to", "s3://bucket/x"], "expected a folder or hf://"),
    "override without =": (lambda r, t: ["train", "demo", "--set", "train.lr"], "expected key=value"),
    "override into a value": (lambda r, t: ["train", "demo", "--set", "name.x=3"], "is a value, not a section"),
    "unknown network": (lambda r, t: ["train", "demo", *changes("model.architecture=unnet")], "no architecture"),
    "unknown encoder": (lambda r, t: ["train", "demo", *changes("model.encoder=resnet19")], "no encoder"),
    "unknown data set": (lambda r, t: ["train", "demo", *changes("data.dataset=kitti")], "no such data set"),
    "unknown device": (lambda r, t: ["train", "demo", "--device", "gpu"], "--device gpu: not available"),
    "missing data folder": (
        lambda r, t: ["train", "camvid_unet_mobilenet_v2", "--set", f"data.root={t / 'no'}"], "no such folder"),
    "empty folder": (lambda r, t: ["train", own_images(t, "empty")], "holds no picture"),
    "picture without mask": (lambda r, t: ["train", own_images(t, "no mask")], "has no mask"),
    "mask of another size": (lambda r, t: ["train", own_images(t, "size")], "but its picture is"),
    "label outside the classes": (lambda r, t: ["train", own_images(t, "wrong label")], "holds label 7"),
    "one class": (lambda r, t: ["train", own_images(t, classes=["only"])], "data.classes: only alone leaves nothing"),
    "a label beyond the classes": (lambda r, t: ["train", own_images(t, "wrong label")], "holds label 7, but the labels here are 0 to 1, 255"),
    "corrupt picture": (lambda r, t: ["train", own_images(t, "truncated")], "a damaged picture"),
    "batch above the data": (lambda r, t: ["train", "demo", *changes("train.batch_size=99")], "only 12 pictures"),
    "classifier on masks": (
        lambda r, t: ["train", "demo", *changes("model.architecture=resnet18", "model.encoder=null",
                                                "model.options={}")], "is for classification"),
    "diverging": (lambda r, t: ["train", "demo", *changes("train.lr=1.0e30"), "--out", t / "x"], "lower train.lr"),
    "unwritable run folder": (lambda r, t: ["train", "demo", *changes(), "--out", read_only(t)], "cannot make"),
    "run folder in use": (lambda r, t: ["train", "demo", *changes(), "--out", r / "run"], "holds a run already"),
    "missing run": (lambda r, t: ["eval", t / "nothing"], "no such run folder or checkpoint"),
    "folder without a checkpoint": (lambda r, t: ["eval", t], "holds no checkpoint"),
    "truncated checkpoint": (
        lambda r, t: ["eval", write(t / "c.safetensors", (r / "run/best.safetensors").read_bytes()[:999])], "damaged"),
    "hostile pickle": (
        lambda r, t: ["eval", write(t / "c.safetensors", pickle.dumps(Hostile()))], "not a safetensors file"),
    "graph of another run": (lambda r, t: ["eval", r / "run", "--onnx", other_run(r, t)], "was exported from another run"),
    "damaged picture in a loader process": (lambda r, t: ["train", own_images(t, "truncated", num_workers=1)], "a damaged picture"),
    "joined name and encoder": (lambda r, t: ["train", "demo", *changes("model.architecture=unet_resnet18")], "names its encoder"),
    "keep that matches nothing": (lambda r, t: ["train", "demo", *changes("model.keep=[no.such]")], "matches no layer"),
    "palette out of range": (lambda r, t: ["train", bad_recipe(t, data={"palette": [[300, 0, 0]]})], "data.palette"),
    "mean in 0 to 255": (lambda r, t: ["train", bad_recipe(t, data={"mean": [123.6, 116, 103]})], "data.mean"),
    "ignored class": (lambda r, t: ["train", own_images(t, ignore_index=0)], "data.ignore_index = 0"),
    "evaluating on other classes": (
        lambda r, t: ["eval", write_other_classes(r, t)], "check data.dataset and data.classes"),
    "window of one number": (lambda r, t: ["eval", r / "run", "--window", "64"], "expected height and width"),
    "window is no number": (lambda r, t: ["eval", r / "run", "--window", "a,b"], "--window 'a,b': expected numbers"),
    "window of no pixels": (lambda r, t: ["eval", r / "run", "--window", "0,64"], "--window 0,64: expected pixels"),
    "overlap of one": (lambda r, t: ["eval", r / "run", "--overlap", "1"], "--overlap 1.0: expected a share"),
    "scale of zero": (lambda r, t: ["eval", r / "run", "--scales", "1,0"], "--scales 1.0,0.0: expected factors"),
    "scales are no numbers": (lambda r, t: ["eval", r / "run", "--scales", "1;2"], "--scales '1;2': expected numbers"),
    "no such split": (lambda r, t: ["eval", r / "run", "--split", "all"], "'all' is not one of"),
    "graph in windows": (
        lambda r, t: ["eval", r / "run", "--onnx", r / "model.onnx", "--flip"], "evaluates the graph as it is"),
    "submitting another data set": (
        lambda r, t: ["eval", r / "run", "--split", "test", "--submit", t / "s.zip"], "data is not Cityscapes"),
    "predictions into no folder": (
        lambda r, t: ["eval", r / "run", "--save-predictions", read_only(t)], "cannot make the folder"),
    "scores into no folder": (lambda r, t: ["eval", r / "run", "--out", read_only(t)], "cannot make the folder"),
    "nothing to compare": (lambda r, t: ["compare"], "Missing argument"),
    "comparing what is no run": (lambda r, t: ["compare", r / "run", t / "no"], "no: no run"),
    "comparing a run with itself": (lambda r, t: ["compare", r / "run", r / "run"], "is given twice"),
    "comparison into no folder": (
        lambda r, t: ["compare", r / "run", "--out", read_only(t)], "cannot make the folder"),
    "export to another suffix": (lambda r, t: ["export", r / "run", "--out", t / "m.pt"], "must end in .onnx"),
    "export of an unknown output": (
        lambda r, t: ["export", r / "run", "--output", "labels,masks"], "--output labels,masks: expected some of"),
    "export at two numbers": (lambda r, t: ["export", r / "run", "--static", "64,64"], "expected batch, height and width"),
    "export with an old opset": (lambda r, t: ["export", r / "run", "--opset", "9"], "--opset 9: expected 18 to"),
    "export as two things": (lambda r, t: ["export", r / "run", "--fp16", "--int8"], "choose one"),
    "portable without preparation": (lambda r, t: ["export", r / "run", "--portable"], "goes with --preprocess graph"),
    "half inputs of a whole graph": (lambda r, t: ["export", r / "run", "--half-io"], "--half-io goes with --fp16"),
    "calibrating on no data": (
        lambda r, t: ["export", "unet_mobilenet_v2.nd_camvid", "--int8", "--root", t / "no", "--out", t / "m.onnx"],
        "no such folder"),
    "benchmark of two sizes": (lambda r, t: ["bench", r / "model.onnx", "--size", "64"], "expected height and width"),
    "benchmark of nothing": (lambda r, t: ["bench", t / "m.onnx"], "m.onnx: no such file"),
    "placement of nothing": (lambda r, t: ["placement", t / "m.onnx"], "m.onnx: no such file"),
    "export into no folder": (lambda r, t: ["export", r / "run", "--out", t / "no/m.onnx"], "there is no folder"),
    "missing graph": (lambda r, t: ["predict", t / "m.onnx", t], "m.onnx: no such file"),
    "graph is no ONNX": (lambda r, t: ["predict", write(t / "m.onnx", "x"), t], "onnxruntime cannot load it"),
    "graph of somebody else": (lambda r, t: ["predict", foreign(r, t), t], "was not made by segdeconv"),
    "no pictures to predict": (lambda r, t: ["predict", r / "model.onnx", t], "holds no picture"),
    "missing picture": (lambda r, t: ["predict", r / "model.onnx", t / "a.png"], "no such picture or folder"),
    "corrupt picture to predict": (
        lambda r, t: ["predict", r / "model.onnx", write(t / "a.png", "x")], "not a readable picture"),
    "predictions cannot be written": (
        lambda r, t: ["predict", r / "model.onnx", picture(t), "--out", read_only(t)], "cannot make the folder"),
    "demo over something else": (lambda r, t: ["demo", "--out", write(t / "precious", "x").parent], "was not made by the demo"),
}  # fmt: skip


def other_run(road: Path, folder: Path, **metadata: Any) -> Path:
    graph = onnx.load(road / "model.onnx")
    for key, value in (metadata or {"mean": [0.5] * 3}).items():
        next(entry for entry in graph.metadata_props if entry.key == key).value = json.dumps(value)
    onnx.save(graph, folder / "other.onnx")
    return folder / "other.onnx"


def scores_in(folder: Path) -> Path:
    (folder / "eval.json").write_text("{}")
    return folder


def two_of_a_name(folder: Path) -> Path:
    """A JPEG beside a PNG that its prediction would replace."""
    Image.open(picture(folder)).save(folder / "p.jpg")
    return folder / "p.jpg"


def picture(folder: Path) -> Path:
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(folder / "p.png")
    return folder / "p.png"


def write_other_classes(road: Path, folder: Path) -> Path:
    from segdeconv.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint

    model, info = load_checkpoint(road / "run")
    renamed = tuple(f"{name}!" for name in info.classes)
    save_checkpoint(
        folder / "c.safetensors", model, CheckpointInfo(info.recipe, info.task, renamed, info.palette, 1, {})
    )
    return folder / "c.safetensors"


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, road: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence that says what is wrong, exit code 2, no traceback, and nothing left behind."""
    monkeypatch.chdir(tmp_path)
    make, says = BAD[name]
    code, _, err = call(*make(road, tmp_path))
    assert code == 2, err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("segdeconv: error: ")
    assert says in lines[0]
    assert not (tmp_path / "hostile-was-run").exists()
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "Killed; if memory ran out, lower"),
        (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "8) exited unexpectedly; if memory ran"),
        (RuntimeError("Caught RuntimeError in DataLoader worker process 0.\n  x\nRuntimeError: unable to allocate "
                      "shared memory(shm) for file </torch_9_1>: No space left on device (28)"), "make /dev/shm larger"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
                      "workers are out of shared memory."), "make /dev/shm larger"),
        (RuntimeError("Too many open files. Communication with the workers is no longer possible."), "raise ulimit -n"),
        (OSError(24, "Too many open files", "a.png"), "raise ulimit -n"),
        (OSError(12, "Cannot allocate memory"), "the memory ran out; take smaller"),
        (RuntimeError("Caught _ArrayMemoryError in DataLoader worker process 0.\n"
                      "numpy._core._exceptions._ArrayMemoryError: Unable to allocate"), "the memory ran out; take smaller"),
        (MemoryError(), "the memory ran out; take smaller"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "no programs run (noexec)"),
    ],
)  # fmt: skip
def test_what_the_machine_has_too_little_of(
    error: Exception, says: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever torch raises it: one sentence with what helps."""

    def short(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("segdeconv.checkpoint.find_checkpoint", short)
    code, _, err = call("eval", "run")
    assert code == 2
    assert says in err
    assert err.count("\n") == 1


def test_bad_input_in_a_real_process(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from segdeconv.cli import main; main()", "eval", "nothing"],
        cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "40"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == (
        "segdeconv: error: nothing: no such run folder or checkpoint, and no entry of the zoo is called so; "
        "segdeconv zoo list shows what there is\n"
    )
    assert done.stdout == ""


def test_what_the_terminal_cannot_encode_ends_no_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "segdeconv", "zoo", "info", "unet_resnet10t.nd_toy"],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"mIoU" in done.stdout


def test_control_characters_of_names_are_shown(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a\x1b]52;c;aGk=\x07\x9b2J"
    shown = r"a\x1b]52;c;aGk=\x07\x9b2J"
    code, _, said = call("predict", tmp_path / f"{name}.onnx", tmp_path)
    assert code == 2
    assert f"{shown}.onnx: no such file" in said
    table = Table(name)
    table.add_row(name)
    console.print(name)
    console.print(table)
    said = capsys.readouterr().out
    assert shown.replace(r"\x07", "") in said  # rich itself drops the bell
    assert not set(said) & {"\x1b", "\x07", "\x9b"}


def test_a_request_to_end_that_a_callback_swallows_is_made_again() -> None:
    code = """
import os, signal, time
from segdeconv import cli

class Collected:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

def app(**_):
    Collected()
    time.sleep(60)

cli.app = app
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (143, "")


@pytest.mark.parametrize("asked", ["recipes", "--version"])
def test_a_reader_that_has_seen_enough(asked: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "segdeconv", asked]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
