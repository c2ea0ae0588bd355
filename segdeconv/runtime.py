"""The deployed side: an exported graph, a photograph in, a label map out. Needs numpy, Pillow, onnxruntime.

Everything the graph needs to know about pictures (size, normalisation, classes, colours) is read from its own
metadata, so this file imports nothing of the training side, and no torch.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segdeconv.errors import UserError, first_line
from segdeconv.files import check_utf8, make_folder
from segdeconv.images import (
    Palette,
    Picture,
    check_windows,
    images_in,
    label_png,
    overlay,
    read_rgb,
    resize_image,
    resize_labels,
    save_image,
    window_starts,
)

Labels = NDArray[Any]  # uint8, or int32 above 256 classes

_REQUIRED = ("task", "classes", "palette", "mean", "std", "size_multiple", "resize")
_CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
TYPES = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32, "tensor(float16)": np.float16}


def import_onnxruntime() -> ModuleType:
    """The module onnxruntime, which two extras of the package bring.

    Raises:
        UserError: neither is installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "onnxruntime is not installed; pip install 'segdeconv[runtime]' (or '[gpu]')"
        ) from None
    return onnxruntime


def cpu_session(graph: bytes) -> Any:
    """An onnxruntime session on the CPU, of a serialised graph."""
    return import_onnxruntime().InferenceSession(graph, providers=[CPU])


def _size(metadata: dict[str, Any]) -> tuple[int, int]:
    height, width = metadata["resize"]
    return int(height), int(width)


def _value(key: str, text: str) -> Any:
    """A value of the graph's metadata: JSON, or what another tool has added as plain text."""
    try:
        return json.loads(text)
    except ValueError:
        if key in _REQUIRED:
            raise
        return text


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_session(
    path: str | Path, device: str = "auto", allow_cpu: bool = False, options: Any = None
) -> tuple[Any, str, str]:
    """An onnxruntime session that runs where it was asked to, or says why it does not.

    onnxruntime itself goes on with the CPU when CUDA cannot be had, with no more than a line in its log.

    Args:
        path: the ONNX file.
        device: ``cpu``; ``cuda`` or ``cuda:N``; ``auto`` takes CUDA where it works, else the CPU.
        allow_cpu: let ``cuda`` take the CPU where CUDA cannot be had.
        options: onnxruntime's ``SessionOptions``.

    Returns:
        The session; ``cpu`` or ``cuda:N``; and why it is the CPU where CUDA was asked for or possible.

    Raises:
        UserError: the file is missing or damaged, or CUDA was asked for and cannot be had: cause and fix.
    """
    onnxruntime = import_onnxruntime()
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file; make one with segdeconv export")
    check_utf8(path, "onnxruntime")
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (":" in device and not (kind == "cuda" and number.isdigit())):
        raise UserError(f"--device {device}: expected auto, cpu, cuda or cuda:N")

    def session(providers: list[Any]) -> Any:
        # Without enable_fallback=0 a session whose CUDA fails in the middle is made anew on the CPU.
        made = onnxruntime.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
        # Names and metadata of a damaged file may not be UTF-8, which fails only when they are read.
        _ = made.get_modelmeta().custom_metadata_map, [*map(str, (*made.get_inputs(), *made.get_outputs()))]
        return made

    opened, error = None, ""
    if kind != "cpu" and _CUDA in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()  # finds the CUDA that pip installed
        try:
            opened = session([(_CUDA, {"device_id": number or "0"}), CPU])
        except Exception as raised:  # onnxruntime raises its own unrelated classes
            error = first_line(raised)
        if opened is not None and _CUDA in opened.get_providers():
            return opened, f"cuda:{number or 0}", ""
    if opened is None:
        try:
            opened = session([CPU])
        except Exception as raised:
            raise UserError(f"{path}: onnxruntime cannot load it ({first_line(raised)})") from None
    if kind == "cpu":
        return opened, "cpu", ""
    from segdeconv.doctor import gather, why_no_cuda

    finding = why_no_cuda(gather(caches=False), error)
    if kind == "cuda" and not allow_cpu:
        raise UserError(
            f"--device {device}: {finding.what}; mend it with: {finding.fix} (or choose --device cpu)"
        )
    return opened, "cpu", finding.what


class Segmenter:
    """A segmentation graph made by ``segdeconv export``.

    ``Segmenter("model.onnx")(image)`` takes RGB (H, W, 3) uint8 and returns class numbers (H, W) uint8 at the
    picture's own size. Nothing in it changes after construction and onnxruntime's sessions may be run by many
    threads at once: make one ``Segmenter`` in a process and let all its threads call it. The threads that one
    call uses are ``threads``; with N callers at once, cores / N is a good number.

    Args:
        path: the ONNX file.
        device: ``cpu``; ``cuda`` or ``cuda:N``; ``auto`` takes CUDA where it works, else the CPU.
        allow_cpu: let ``cuda`` take the CPU where CUDA cannot be had, instead of failing.
        threads: threads that compute one operator; None lets onnxruntime take all cores.
        window: height and width of sliding windows for pictures that are larger, after the recipe's resize;
            None runs pictures whole.
            Probabilities are averaged where windows overlap; of a graph that puts out labels alone, every
            window gives what is nearer to its own middle than to its neighbours'.
        overlap: least share of its height or width that a window has in common with the next.

    Attributes:
        device: ``cpu`` or ``cuda:N``, where the graph runs.
        why_cpu: why it is the CPU, where ``auto`` or ``allow_cpu`` settled for it.
        metadata: what the graph says about itself.
        size: height and width that the graph was exported for; None where it takes any.
        classes: names of the classes.
        palette: colours of the classes.

    Raises:
        UserError: the file is missing or damaged, or was not made by segdeconv; CUDA was asked for and cannot
            be had; or the windows make no sense.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "auto",
        *,
        allow_cpu: bool = False,
        threads: int | None = None,
        window: tuple[int, int] | None = None,
        overlap: float = 0.25,
    ) -> None:
        options = import_onnxruntime().SessionOptions()
        if threads is not None:
            if not 1 <= threads <= 1024:
                raise UserError(f"--threads {threads}: expected 1 to 1024")
            options.intra_op_num_threads = threads
        self.session, self.device, self.why_cpu = open_session(path, device, allow_cpu, options)
        metadata = self.session.get_modelmeta().custom_metadata_map
        missing = [key for key in _REQUIRED if key not in metadata]
        if missing:
            raise UserError(f"{path}: has no metadata {missing[0]!r}; it was not made by segdeconv export")
        try:
            self.metadata: dict[str, Any] = {key: _value(key, text) for key, text in metadata.items()}
            self.classes = tuple(self.metadata["classes"])
            self.palette: Palette = tuple(tuple(color) for color in self.metadata["palette"])
            self._raw = self.metadata.get("preprocess", "none") == "graph"  # takes uint8 NHWC of any size
            self._mean = np.array(self.metadata["mean"], np.float32).reshape(3) * 255
            self._std = np.array(self.metadata["std"], np.float32).reshape(3) * 255
            self._resize = None if self._raw or self.metadata["resize"] is None else _size(self.metadata)
            self.metadata["size_multiple"] = int(self.metadata["size_multiple"])
            source = self.session.get_inputs()[0]
            self._input = source.name
            self._input_type = np.dtype(TYPES[source.type])
            fixed = [side if isinstance(side, int) else None for side in source.shape]
            self._batch = fixed[0]
            height, width = fixed[1:3] if self._raw else fixed[2:4]
            self._outputs = [output.name for output in self.session.get_outputs()]
            self._main = "labels" if "labels" in self._outputs else self._outputs[0]
            if any(len(color) != 3 or not {*range(256)}.issuperset(color) for color in self.palette):
                raise ValueError("a colour of its palette is not three numbers from 0 to 255")
            if min(self.metadata["size_multiple"], *(self._resize or ()), *self._std) <= 0:
                raise ValueError("size_multiple, resize and std are above 0")
        except (ValueError, TypeError, LookupError) as error:
            raise UserError(f"{path}: its metadata or input is damaged ({error}); export it again") from None
        self._label_type = np.uint8 if len(self.classes) <= 256 else np.int32
        self.size = None if height is None or width is None else (height, width)
        self._resizes = self._raw and self.metadata["resize"] is not None  # the graph itself
        self._window, self._overlap = window or (None if self._resizes else self.size), overlap
        #: Whether pictures go through the network at whatever size they have.
        self.whole = self._window is None and self._resize is None and not self._resizes
        self._check_windows(path)

    def _check_windows(self, path: str | Path) -> None:
        check_windows(self._window, self._overlap)
        if self._window is None:
            return
        height, width = self._window
        if self.size is not None and (height > self.size[0] or width > self.size[1]):
            raise UserError(f"--window {height},{width}: {path} takes no more than {self.size}")
        if self._resizes:
            raise UserError(
                f"--window {height},{width}: {path} resizes what it gets, so windows too; export it with "
                "--preprocess none"
            )

    @overload
    def __call__(self, images: Picture) -> Labels: ...
    @overload
    def __call__(self, images: Sequence[Picture]) -> list[Labels]: ...
    def __call__(self, images: Picture | Sequence[Picture]) -> Labels | list[Labels]:
        """Class numbers at the pictures' own sizes.

        Args:
            images: RGB uint8: one picture (H, W, 3), a batch (n, H, W, 3), or a sequence of pictures of any
                sizes, of which those of one size run as one batch.

        Returns:
            (H, W), (n, H, W) or a list, uint8 (int32 above 256 classes).

        Raises:
            UserError: the graph is a classifier, the arrays are no pictures, or onnxruntime fails.
        """
        if self.metadata["task"] != "segmentation":
            task = self.metadata["task"]
            raise UserError(f"the graph does {task}, not segmentation; segdeconv eval RUN --onnx scores it")
        if isinstance(images, np.ndarray):
            return self._label(images) if images.ndim == 4 else self._label(images[None])[0]
        pictures = images if isinstance(images, Sequence) else [images]
        other = next((type(image).__name__ for image in pictures if not isinstance(image, np.ndarray)), None)
        if other is not None:
            raise UserError(
                f"expected RGB (H, W, 3) uint8, not {other}; of a Pillow image "
                "np.asarray(image.convert('RGB')) makes that"
            )
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(pictures):
            by_shape.setdefault(image.shape, []).append(index)
        found: dict[int, Labels] = {}
        for indices in by_shape.values():
            labels = self._label(np.stack([pictures[index] for index in indices]))
            found.update(zip(indices, labels, strict=True))
        return [found[index] for index in range(len(pictures))]

    def _label(self, images: Picture) -> Labels:
        """Class numbers (n, H, W) of RGB (n, H, W, 3)."""
        _check_pictures(images)
        height, width = images.shape[1:3]
        if self._resize is not None:
            images = np.stack([resize_image(image, self._resize) for image in images])
        labels = self._whole(images) if self._fits(images) else self._by_windows(images)
        if labels.shape[1:] == (height, width):
            return labels
        return np.stack([resize_labels(label, (height, width)) for label in labels])

    def _fits(self, images: Picture) -> bool:
        return self._window is None or all(
            side <= limit for side, limit in zip(images.shape[1:3], self._window, strict=True)
        )

    def _whole(self, images: Picture) -> Labels:
        return self.postprocess(self.infer(self.preprocess(images)), images.shape[1:3])

    def _by_windows(self, images: Picture) -> Labels:
        assert self._window is not None
        size = images.shape[1:3]
        height, width = (min(side, whole) for side, whole in zip(self._window, size, strict=True))
        tops = window_starts(size[0], height, self._overlap)
        lefts = window_starts(size[1], width, self._overlap)
        windows = [(slice(top, top + height), slice(left, left + width)) for top in tops for left in lefts]
        if not {"probabilities", "logits"} & set(self._outputs):
            labels = np.empty(images.shape[:3], self._label_type)
            parts = [(rows, columns) for rows in _parts(tops, height) for columns in _parts(lefts, width)]
            for (down, across), (rows, columns) in zip(windows, parts, strict=True):
                inner_rows = slice(rows.start - down.start, rows.stop - down.start)
                inner_columns = slice(columns.start - across.start, columns.stop - across.start)
                found = self._whole(images[:, down, across])
                labels[:, rows, columns] = found[:, inner_rows, inner_columns]
            return labels
        total = np.zeros((len(images), len(self.classes), *size), np.float32)
        times = np.zeros(size, np.float32)
        for down, across in windows:
            scores = self._probabilities(self.preprocess(images[:, down, across]))
            total[:, :, down, across] += scores[:, :, :height, :width]
            times[down, across] += 1
        return (total / times).argmax(1).astype(self._label_type)

    def preprocess(self, images: Picture) -> NDArray[Any]:
        """What the graph takes, from RGB (n, H, W, 3) uint8 at the size the network is to be run at: a
        recipe's resize or crop is part only of graphs that prepare pictures themselves.

        Returns:
            Normalised (n, 3, H', W') float32 (float16 where the graph takes that), padded with zeros right
            and below to the size multiple, or to the one size the graph was exported for; the pictures
            themselves where the graph prepares them.

        Raises:
            UserError: the arrays are no pictures, or not of the one size, or larger than it, that the graph
                was exported for.
        """
        _check_pictures(images)
        count, height, width = images.shape[:3]
        multiple = 1 if self._raw else self.metadata["size_multiple"]
        rows, columns = self.size or (height + -height % multiple, width + -width % multiple)
        if not self._resizes and (rows < height or columns < width):
            raise UserError(f"the graph takes pictures of {self.size} at most, not of {(height, width)}")
        if self._raw:
            if (rows, columns) == (height, width):
                return np.ascontiguousarray(images)
            if self._resizes:
                raise UserError(
                    f"the graph resizes pictures of {(rows, columns)} only, not of {(height, width)}; export "
                    "it without --static"
                )
            filled = np.empty((count, rows, columns, 3), np.uint8)
            filled[:] = self._mean.round()  # what is 0 when it is normalised
            filled[:, :height, :width] = images
            return filled
        made = np.zeros((count, 3, rows, columns), np.float32)
        for channel in range(3):  # much faster than arithmetic with three channels innermost
            plane = made[:, channel, :height, :width]
            np.subtract(images[..., channel], self._mean[channel], out=plane)
            plane /= self._std[channel]
        return made.astype(self._input_type, copy=False)

    def infer(self, batch: NDArray[Any]) -> NDArray[Any]:
        """The graph's labels for what `preprocess` made, or its scores where it puts out no labels.

        Raises:
            UserError: the batch does not suit the graph, or onnxruntime fails.
        """
        return self._infer(batch, self._main)

    def postprocess(self, found: NDArray[Any], size: tuple[int, ...] | None = None) -> Labels:
        """Class numbers (n, H, W) from what `infer` found, without the padding around ``size``; (n,) from a
        classifier's.
        """
        labels = found if self._main == "labels" else found.argmax(1)
        if size is not None and labels.ndim == 3:
            labels = labels[:, : size[0], : size[1]]
        return labels.astype(self._label_type, copy=False)

    def run(self, batch: NDArray[Any]) -> Labels:
        """Class numbers (n, H, W), or (n,) of a classifier, for what `preprocess` made, padding and all."""
        return self.postprocess(self.infer(batch))

    def _probabilities(self, batch: NDArray[Any]) -> NDArray[np.float32]:
        if "probabilities" in self._outputs:
            return self._infer(batch, "probabilities")
        logits = self._infer(batch, "logits").astype(np.float32, copy=False)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def _infer(self, batch: NDArray[Any], output: str) -> NDArray[Any]:
        """One output for a batch, in as many runs as the graph's own batch size asks for."""
        if batch.dtype != self._input_type:
            raise UserError(
                f"the graph takes {self._input_type}, not {batch.dtype}; see Segmenter.preprocess"
            )
        if self._batch is None:
            return self._bound(batch, output)
        found = []
        for first in range(0, len(batch), self._batch):
            part = batch[first : first + self._batch]
            full = np.concatenate([part, np.zeros_like(batch[:1]).repeat(self._batch - len(part), 0)])
            found.append(self._bound(full, output)[: len(part)])
        return np.concatenate(found)

    def _bound(self, batch: NDArray[Any], output: str) -> NDArray[Any]:
        # One copy to the device, the output made there, one copy back; every call has a binding of its own,
        # so that threads do not meet.
        kind, _, number = self.device.partition(":")
        try:
            value = import_onnxruntime().OrtValue.ortvalue_from_numpy(batch, kind, int(number or 0))
            binding = self.session.io_binding()
            binding.bind_ortvalue_input(self._input, value)
            binding.bind_output(output, kind, int(number or 0))
            self.session.run_with_iobinding(binding)
            return binding.copy_outputs_to_cpu()[0]
        except Exception as error:  # onnxruntime raises its own unrelated classes
            raise UserError(
                f"onnxruntime cannot run {batch.shape} on {self.device} ({first_line(error)})"
            ) from None

    def warm_up(self, size: tuple[int, int] | None = None, batch: int = 1) -> None:
        """Run a black picture twice, so that the first real one does not wait for allocation and tuning.

        Args:
            size: height and width the pictures will have; by default what the graph or the recipe fixes, or a
                window.
            batch: pictures a call.

        Raises:
            UserError: no size is given and the graph knows none.
        """
        size = size or self.size or self.metadata["resize"] or self._window
        if size is None:
            raise UserError("warm_up needs the pictures' height and width, the graph takes any")
        pictures = np.zeros((batch, *size, 3), np.uint8)
        for _ in range(2):
            if self.metadata["task"] == "segmentation":
                self(pictures)
            else:
                self.run(self.preprocess(pictures))

    def overlay(self, image: Picture, labels: Labels | None = None, alpha: float = 0.55) -> Picture:
        """RGB (H, W, 3) with its class numbers (H, W), by default what the graph says, painted over it."""
        return overlay(image, self(image) if labels is None else labels, self.palette, alpha)


def _check_pictures(images: Picture) -> None:
    if images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape or images.dtype != np.uint8:
        raise UserError(
            f"expected RGB (n, H, W, 3) uint8 with n, H, W > 0, not {images.shape} {images.dtype}"
        )


def _parts(starts: list[int], length: int) -> list[slice]:
    """What each window along an axis gives: up to the middle of what it shares with its neighbour."""
    middles = [(first + length + second) // 2 for first, second in itertools.pairwise(starts)]
    edges = [0, *middles, starts[-1] + length]
    return [slice(*pair) for pair in itertools.pairwise(edges)]


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


def predict_images(segmenter: Segmenter, images: Iterable[str | Path], out: str | Path) -> Iterator[Path]:
    """Write ``NAME.png`` (class numbers, palette colours) and ``NAME_overlay.jpg`` for every picture.

    Yields the label file of each picture when it is written.

    Raises:
        UserError: more than 256 classes; ``out`` is a picture's folder, or cannot be written; a PNG that is
            no earlier prediction would be overwritten; two pictures would share an output name; or, when all
            others are done, pictures could not be read.
    """
    paths = [Path(path) for path in images]
    if len(segmenter.classes) > 256:
        raise UserError(f"the graph has {len(segmenter.classes)} classes; masks are PNGs of at most 256")
    out = make_folder(Path(out))
    folders = {path.parent.resolve() for path in paths} | {path.resolve().parent for path in paths}
    if out.resolve() in folders:  # predictions would be pictures to predict the next time
        raise UserError(f"{out}: is the folder of what is to be predicted; choose another --out")
    targets = [(out / f"{path.stem}.png", out / f"{path.stem}_overlay.jpg") for path in paths]
    if len(set(targets)) < len(targets):
        raise UserError(
            f"{out}: two of the pictures would be predicted into one file; give each its own --out"
        )
    for label_file, overlay_file in targets:
        if label_file.exists() and not overlay_file.exists():  # somebody's mask
            raise UserError(f"{label_file}: is there and is no earlier prediction; choose another --out")
    unread = []
    for path, (label_file, overlay_file) in zip(paths, targets, strict=True):
        try:
            image = read_rgb(path)
        except UserError as error:
            unread.append(str(error))
            continue
        labels = segmenter(image)
        save_image(Image.fromarray(segmenter.overlay(image, labels)), overlay_file)
        save_image(label_png(labels, segmenter.palette), label_file)
        yield label_file
    if unread:
        of_all = f"{len(unread)} of {len(paths)} pictures could not be read: " if len(paths) > 1 else ""
        more = f"; and {len(unread) - 5} more" if len(unread) > 5 else ""
        raise UserError(f"{of_all}{'; '.join(unread[:5])}{more}")
