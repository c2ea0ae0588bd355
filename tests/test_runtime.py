from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from test_export import make

from segdeconv.errors import UserError
from segdeconv.export import export_onnx
from segdeconv.fold import fold_network_deconv
from segdeconv.images import colored, label_png, overlay
from segdeconv.runtime import Segmenter, find_images, predict_images

PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """linknet pads to a multiple of 32, so that the runtime's padding is exercised."""
    model, info = make("linknet+lcnet_050")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, info, path)
    return path, fold_network_deconv(model)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_segmenter_does_what_training_did(exported: tuple[Path, torch.nn.Module]) -> None:
    """Normalise, pad, run, crop: the same labels as PyTorch on the evaluation transform's output."""
    path, model = exported
    segmenter = Segmenter(path)
    assert segmenter.metadata["resize"] == [96, 192]
    image = picture(96, 192)
    mean, std = torch.tensor(segmenter.metadata["mean"]), torch.tensor(segmenter.metadata["std"])
    normalised = ((torch.from_numpy(image).float() / 255 - mean) / std).permute(2, 0, 1)[None]
    np.testing.assert_allclose(segmenter.preprocess(image), normalised, rtol=0, atol=2e-6)
    with torch.no_grad():
        want = model(normalised).argmax(1)[0].numpy()
    got = segmenter(image)
    assert got.dtype == np.uint8
    assert (got != want).mean() < 1e-3


def test_pictures_of_any_size_come_back_at_their_own(exported: tuple[Path, torch.nn.Module]) -> None:
    segmenter = Segmenter(exported[0])
    assert segmenter(picture(51, 77)).shape == (51, 77)
    segmenter.metadata["resize"] = None
    assert segmenter.preprocess(picture(51, 77)).shape == (1, 3, 64, 96)
    assert (segmenter.preprocess(picture(51, 77))[:, :, 51:] == 0).all()
    assert segmenter(picture(51, 77)).shape == (51, 77)


def test_logits_graphs_work_too(tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    export_onnx(*make("linknet+lcnet_050"), tmp_path / "logits.onnx", "logits")
    image = picture(40, 60)
    assert (Segmenter(tmp_path / "logits.onnx")(image) != Segmenter(exported[0])(image)).mean() < 1e-3


def test_predict_images(tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    source, out = tmp_path / "in", tmp_path / "deep" / "out"
    source.mkdir()
    for name in ("b.png", "a.jpg"):
        Image.fromarray(picture(30, 50)).save(source / name)
    (source / "notes.txt").write_text("not a picture")
    segmenter = Segmenter(exported[0])
    written = list(predict_images(segmenter, find_images(source), out))
    assert [path.name for path in written] == ["a.png", "b.png"]
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "a_overlay.jpg", "b.png", "b_overlay.jpg"]
    labels = Image.open(out / "b.png")
    assert labels.mode == "P"
    assert np.array_equal(np.asarray(labels), segmenter(picture(30, 50)))


def test_pictures_are_never_overwritten(tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    Image.fromarray(picture(30, 50)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png: is one of the pictures to predict"):
        list(predict_images(Segmenter(exported[0]), find_images(tmp_path), tmp_path))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture(30, 50))


def test_painting() -> None:
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    assert colored(labels, PALETTE).tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]
    image = np.full((2, 2, 3), 100, np.uint8)
    mixed = overlay(image, labels, PALETTE, alpha=0.5)
    assert mixed[0, 0].tolist() == [178, 50, 50]
    assert mixed[1, 1].tolist() == [100, 100, 100]
    png = label_png(labels, PALETTE)
    assert np.array_equal(np.asarray(png), labels)
    assert np.array_equal(np.asarray(png.convert("RGB"))[:1], colored(labels, PALETTE)[:1])


def test_runs_with_torch_blocked(tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    """numpy, Pillow and onnxruntime are enough; whatever else is imported is an error here."""
    Image.fromarray(picture(30, 50)).save(tmp_path / "a.png")
    code = """
import sys
for name in ("torch torchvision timm segmentation_models_pytorch albumentations cv2 pydantic yaml "
             "torchmetrics matplotlib onnx safetensors tensorboard rich typer").split():
    sys.modules[name] = None
from pathlib import Path
from segdeconv import Segmenter
from segdeconv.runtime import find_images, predict_images
model, source, out = sys.argv[1:]
print(*(path.name for path in predict_images(Segmenter(model), find_images(source), out)))
"""
    command = [sys.executable, "-c", code, exported[0], tmp_path / "a.png", tmp_path / "out"]
    command = [sys.executable, "-c", code, exported[0], tmp_path / "a.png", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "a.png"


@pytest.mark.parametrize("what", ["missing", "not onnx", "foreign", "truncated"])
def test_wrong_graphs(what: str, tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    path = tmp_path / "x.onnx"
    if what == "not onnx":
        path.write_text("hello")
    elif what == "truncated":
        path.write_bytes(exported[0].read_bytes()[:5000])
    elif what == "foreign":
        graph = onnx.load(exported[0])
        del graph.metadata_props[:]
        onnx.save(graph, path)
    with pytest.raises(UserError, match=r"x.onnx: (no such file|onnxruntime cannot load|has no metadata)"):
        Segmenter(path)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4), "uint8"), ((4, 4, 3), "float32"), ((4, 4, 4), "uint8")]
)
def test_wrong_arrays(shape: tuple, dtype: str, exported: tuple[Path, torch.nn.Module]) -> None:
    with pytest.raises(UserError, match="expected RGB"):
        Segmenter(exported[0])(np.zeros(shape, dtype))
