"""The deployed side: an exported graph, a photograph in, a label map out. Needs numpy, Pillow, onnxruntime.

Everything the graph needs to know about pictures (size, normalisation, classes, colours) is read from its own
metadata, so this file imports nothing of the training side, and no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdeconv.errors import UserError
from segdeconv.files import make_folder
from segdeconv.images import (
    Palette,
    Picture,
    first_line,
    images_in,
    label_png,
    overlay,
    read_rgb,
    resize_image,
    resize_labels,
    save_image,
)

_REQUIRED = ("task", "classes", "palette", "mean", "std", "size_multiple", "resize", "output")


def import_onnxruntime() -> Any:
    """The module onnxruntime, which two extras of the package bring.

    Raises:
        UserError: neither is installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError("onnxruntime is not installed; pip install 'segdeconv[cpu]' (or '[gpu]')") from None
    return onnxruntime


class Segmenter:
    """A segmentation graph made by ``segdeconv export``.

    ``Segmenter("model.onnx")(image)`` takes RGB (H, W, 3) uint8 and returns class numbers (H, W) uint8 at the
    picture's own size.

    Args:
        path: the ONNX file.
        providers: onnxruntime execution providers; None takes CUDA where onnxruntime offers it, then the CPU.

    Raises:
        UserError: the file is missing or damaged, or was not made by segdeconv.
    """

    def __init__(self, path: str | Path, providers: list[str] | None = None) -> None:
        onnxruntime = import_onnxruntime()
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file; make one with segdeconv export")
        if providers is None:
            wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
            providers = [p for p in wanted if p in onnxruntime.get_available_providers()]
        try:
            self.session = onnxruntime.InferenceSession(str(path), providers=providers)
        except Exception as error:  # onnxruntime raises its own unrelated classes
            raise UserError(f"{path}: onnxruntime cannot load it ({first_line(error)})") from None
        metadata = self.session.get_modelmeta().custom_metadata_map
        missing = [key for key in _REQUIRED if key not in metadata]
        if missing:
            raise UserError(f"{path}: has no metadata {missing[0]!r}; it was not made by segdeconv export")
        try:
            self.metadata: dict[str, Any] = {key: json.loads(value) for key, value in metadata.items()}
        except ValueError as error:
            raise UserError(f"{path}: its metadata is damaged ({error})") from None
        self.classes = tuple(self.metadata["classes"])
        self.palette: Palette = tuple(tuple(color) for color in self.metadata["palette"])
        self._mean = np.array(self.metadata["mean"], np.float32) * 255
        self._std = np.array(self.metadata["std"], np.float32) * 255
        self._input = self.session.get_inputs()[0].name

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.integer]:
        """The graph as it is: normalised (n, 3, H, W) float32 to class numbers (n, H, W), or (n,)."""
        (output,) = self.session.run(None, {self._input: batch})
        return output if self.metadata["output"] == "labels" else output.argmax(1)

    def __call__(self, image: Picture) -> Picture:
        """Class numbers (H, W) of an RGB picture (H, W, 3), both uint8."""
        if self.metadata["task"] != "segmentation":
            raise UserError(f"the graph does {self.metadata['task']}, not segmentation")
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise UserError(f"expected RGB (H, W, 3) uint8, not {image.shape} {image.dtype}")
        height, width = image.shape[:2]
        image = resize_image(image, self.metadata["resize"])
        labels = self.run(self.preprocess(image))[0, : image.shape[0], : image.shape[1]].astype(np.uint8)
        return resize_labels(labels, (height, width))

    def preprocess(self, image: Picture) -> NDArray[np.float32]:
        """(H, W, 3) uint8 to normalised (1, 3, H', W'), zero-padded right and below to the size multiple."""
        normalised = (image.astype(np.float32) - self._mean) / self._std
        multiple = self.metadata["size_multiple"]
        bottom, right = (-side % multiple for side in image.shape[:2])
        padded = np.pad(normalised, ((0, bottom), (0, right), (0, 0)))
        return np.ascontiguousarray(padded.transpose(2, 0, 1)[None])


def find_images(source: str | Path) -> list[Path]:
    """The picture itself, or the pictures in a folder, by name.

    Raises:
        UserError: nothing is there, the folder holds no picture, or two pictures would share an output name.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"{source}: no such picture or folder")
    return images_in(source)


def predict_images(segmenter: Segmenter, images: list[Path], out: str | Path) -> Iterator[Path]:
    """Write ``NAME.png`` (class numbers, palette colours) and ``NAME_overlay.jpg`` for every picture.

    Yields the label file of each picture when it is written.

    Raises:
        UserError: a picture cannot be read or would be overwritten, or ``out`` cannot be written.
    """
    out = make_folder(Path(out))
    inputs = {path.resolve() for path in images}
    for path in images:
        image = read_rgb(path)
        labels = segmenter(image)
        painted = Image.fromarray(overlay(image, labels, segmenter.palette))
        made = {
            out / f"{path.stem}.png": label_png(labels, segmenter.palette),
            out / f"{path.stem}_overlay.jpg": painted,
        }
        for target, picture in made.items():
            if target.resolve() in inputs:
                raise UserError(f"{target}: is one of the pictures to predict; choose another --out")
            save_image(picture, target)
        yield next(iter(made))
