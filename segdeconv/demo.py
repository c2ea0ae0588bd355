"""Everything, end to end, on the embedded data set: train, evaluate, fold, export, check, run, draw."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from segdeconv.checkpoint import build_started, load_checkpoint
from segdeconv.config import Recipe, load_recipe
from segdeconv.data import open_samples
from segdeconv.errors import UserError
from segdeconv.evaluate import evaluate_run, table, write_scores
from segdeconv.export import export_onnx
from segdeconv.figures import triptych
from segdeconv.files import make_folder
from segdeconv.images import save_image
from segdeconv.progress import console
from segdeconv.runtime import Segmenter
from segdeconv.train import only_process, train

_ROWS = 4


def run_demo(out: Path, overrides: list[str] | None = None) -> None:
    """Run the demo into the folder ``out``; an earlier demo there is replaced.

    Raises:
        UserError: ``out`` cannot be written, or holds something that is no demo.
    """
    recipe = load_recipe("demo", overrides)
    marker = out / ".segdeconv-demo"
    if out.is_dir() and not marker.exists() and any(path.name != ".lock" for path in out.iterdir()):
        raise UserError(f"{out}: is not empty and was not made by the demo; choose another --out")
    classes = open_samples(recipe.data, "train").classes
    build_started(recipe.model, len(classes))  # what is wrong with the recipe leaves an earlier demo alone
    with only_process(make_folder(out)):
        marker.touch()
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name not in (".lock", marker.name):  # a demo that is stopped here is still one
                path.unlink()
        _run(recipe, out)


def _run(recipe: Recipe, out: Path) -> None:
    start = time.monotonic()
    console.rule("1. train a deconvolved U-Net on drawn street scenes")
    train(recipe, out)
    console.rule("2. evaluate the best checkpoint")
    scores = evaluate_run(out)
    console.print(table(scores, "segmentation"))
    write_scores(out, scores)

    console.rule("3. fold into plain convolutions, export ONNX, compare with PyTorch")
    model, info = load_checkpoint(out)
    onnx_path = out / "demo.onnx"
    for result in export_onnx(model, info, onnx_path):
        console.print(f"input {result.shape}: {result.labels_differ:.4%} of labels differ from PyTorch")

    console.rule("4. run the graph in onnxruntime on held-out pictures")
    onnx_scores = evaluate_run(out, onnx=onnx_path)
    write_scores(out, onnx_scores)
    console.print(f"mIoU: PyTorch {scores['miou']:.4f}, onnxruntime {onnx_scores['miou']:.4f}")
    segmenter = Segmenter(onnx_path)
    held_out = open_samples(recipe.data, "val")
    rows = []
    for index in np.linspace(0, len(held_out) - 1, _ROWS).astype(int):
        image, truth = held_out.load(int(index))
        assert not isinstance(truth, int)
        rows.append((image, truth, segmenter(image)))
    overlay_path = out / "overlay.png"
    save_image(triptych(rows, held_out.classes, held_out.palette), overlay_path)

    console.rule(f"done in {time.monotonic() - start:.0f} s")
    for path, what in (
        (overlay_path, "image | truth | prediction"),
        (out / "curves.png", "loss and mIoU by epoch and minute"),
        (onnx_path, "the graph to deploy"),
        (out / "best.safetensors", "the trained network"),
        (out / "eval.json", "its scores"),
    ):
        console.print(f"  {path}  {what}")
    command = (
        "segdeconv"
        if shutil.which("segdeconv")
        else os.path.relpath(Path(sys.executable).parent / "segdeconv")
    )
    console.print(
        "\nnext, the same recipe with batch norm:\n"
        f"  {command} train demo --norm bn --out {out.with_name(out.name + '_bn')}\n"
        "or your own pictures:\n"
        f"  {command} recipes my_images > mine.yaml; then name their folder and classes in it, and\n"
        f"  {command} train mine.yaml"
    )
