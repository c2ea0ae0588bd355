"""Evaluation: one path from pictures to scores, for a torch network and for an exported graph.

It takes a `Predict`. Sliding windows, mirroring and scales make of one `Predict` another, which averages
class probabilities; `score` picks the most probable class and counts.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from rich.table import Column, Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from segdeconv.checkpoint import CheckpointInfo, load_checkpoint
from segdeconv.config import DataConfig
from segdeconv.data import EvalSet, Samples, end_workers, eval_loader, evenly_spread, open_samples
from segdeconv.data.cityscapes import Cityscapes
from segdeconv.distributed import sum_over_ranks
from segdeconv.errors import UserError, first_line, out_of_memory, shortage
from segdeconv.figures import confusion_picture, triptych
from segdeconv.files import check_place, make_folder, to_json, write_atomically, write_text
from segdeconv.images import Picture, check_windows, label_png, save_image, window_starts
from segdeconv.metrics import (
    MAIN_METRIC,
    category_scores,
    classification_scores,
    instance_counts,
    instance_scores,
    new_confusion,
    new_top5,
    segmentation_scores,
)
from segdeconv.models import main_output, size_multiple
from segdeconv.progress import Bar

Predict = Callable[[Tensor], Tensor]
"""Normalised pictures (n, 3, H, W) to class scores, (n, C, H, W) or (n, C) floats, on the same device.

An engine without scores gives class numbers, (n, H, W) or (n,) integers.
"""

Observe = Callable[[int, Picture, Picture], None]
"""Called for every segmented picture with its index, its class numbers and its truth, both (H, W) uint8."""

_WORST = 10
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # by train.amp


def torch_predictor(model: nn.Module, amp: torch.dtype | None = None) -> Predict:
    """The logits of a network in evaluation mode."""
    model.eval()

    @torch.inference_mode()
    def predict(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=amp, enabled=amp is not None):
            return main_output(model(images))

    return predict


def onnx_predictor(path: str | Path, info: CheckpointInfo, model: nn.Module, device: str = "auto") -> Predict:
    """Class numbers from an exported graph, through `segdeconv.runtime`; it pads what has to be padded.

    A graph that prepares pictures itself gets the picture back that was normalised for it. ``device`` is as
    `Segmenter` takes it; tensors come and go on the CPU.

    Raises:
        UserError: the graph is not there, was exported from a run with other classes or preparation, or
            crops pictures that are cropped already.
    """
    from segdeconv.export import preparation_of
    from segdeconv.runtime import Segmenter

    segmenter = Segmenter(path, device)
    preparation = preparation_of(info, model)
    expected = {"task": info.task, "classes": info.classes, **asdict(preparation)}
    for key, value in json.loads(json.dumps(expected)).items():
        found = segmenter.metadata.get(key)
        if found != value:
            raise UserError(f"{path}: was exported from another run: its {key} is {found}, the run's {value}")
    if info.sha256 is not None and segmenter.metadata.get("weights_sha256") not in (None, info.sha256):
        raise UserError(
            f"{path}: was exported from other weights than this run's; evaluate it on the run that it came "
            "from, or export this one"
        )
    raw = segmenter.metadata.get("preprocess") == "graph"
    if raw and preparation.central_crop is not None:
        raise UserError(
            f"{path}: crops pictures itself, as evaluation has done already; export it with --preprocess none"
        )
    kind = np.float16 if segmenter.session.get_inputs()[0].type == "tensor(float16)" else np.float32
    std, mean = (torch.tensor(parts)[:, None, None] for parts in (preparation.std, preparation.mean))

    def predict(images: Tensor) -> Tensor:
        if segmenter.size not in (None, tuple(images.shape[-2:])):
            raise UserError(
                f"{path}: takes pictures of {segmenter.size} only, these are {tuple(images.shape[-2:])}; "
                "export it without --static, or for this size"
            )
        if raw:
            pictures = (255 * (images * std + mean)).round().byte().permute(0, 2, 3, 1)
            batch = pictures.contiguous().numpy()
        else:
            batch = images.numpy().astype(kind, copy=False)
        return torch.from_numpy(segmenter.run(batch).astype(np.int64))

    return predict if raw else padded(predict, preparation.size_multiple)


def padded(predict: Predict, multiple: int) -> Predict:
    """Pad pictures with zeros, right and below, to a multiple of pixels, and cut what comes out."""

    def run(images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        bottom, right = -height % multiple, -width % multiple
        if not bottom and not right:
            return predict(images)
        return predict(F.pad(images, (0, right, 0, bottom)))[..., :height, :width]

    return run


def probabilities(predict: Predict) -> Predict:
    """Logits to softmax probabilities, in float32."""
    return lambda images: predict(images).float().softmax(1)


def sliding_window(predict: Predict, window: tuple[int, int], overlap: float) -> Predict:
    """Run windows (height, width) that cover a picture evenly; where they overlap, average.

    Neighbours share at least ``overlap`` of their length. No window reaches beyond the picture: where the
    picture is smaller than a window, it is one.
    """

    def run(images: Tensor) -> Tensor:
        size = images.shape[-2:]
        height, width = (min(side, whole) for side, whole in zip(window, size, strict=True))
        total: Tensor | None = None
        times = images.new_zeros(size)
        for top in window_starts(size[0], height, overlap):
            for left in window_starts(size[1], width, overlap):
                here = (..., slice(top, top + height), slice(left, left + width))
                scores = predict(images[here])
                if total is None:
                    total = scores.new_zeros(*scores.shape[:2], *size)
                total[here] += scores
                times[here] += 1
        assert total is not None
        return total / times

    return run


def flipped(predict: Predict) -> Predict:
    """The average over a picture and its mirror image."""

    def run(images: Tensor) -> Tensor:
        mirrored = predict(images.flip(-1))
        return (predict(images) + (mirrored.flip(-1) if mirrored.ndim == 4 else mirrored)) / 2

    return run


def multi_scale(predict: Predict, scales: Sequence[float]) -> Predict:
    """The average over pictures enlarged by each of ``scales``, brought back to the picture's size."""

    def run(images: Tensor) -> Tensor:
        size = images.shape[-2:]
        total: Tensor | float = 0.0
        for scale in scales:
            height, width = (max(1, round(side * scale)) for side in size)
            scores = predict(resized(images, (height, width)))
            total = total + (resized(scores, size) if scores.ndim == 4 else scores)
        assert isinstance(total, Tensor)
        return total / len(scales)

    return run


def resized(values: Tensor, size: Sequence[int]) -> Tensor:
    """(n, C, H, W) floats at another height and width: bilinear, with antialiasing where that shrinks."""
    if tuple(values.shape[-2:]) == tuple(size):
        return values
    return F.interpolate(values.float(), tuple(size), mode="bilinear", align_corners=False, antialias=True)


@dataclass(frozen=True)
class Inference:
    """How a picture is brought through the network. The default is what training's validation does.

    Attributes:
        window: height and width of sliding windows; None runs the whole picture.
        overlap: least share of its height or width that a window has in common with the next.
        flip: average over the picture and its mirror image.
        scales: average over these sizes of the picture.
        original: where the recipe resizes pictures (``data.size``), bring the scores back to the picture's
            own size and compare with labels as they are in the file, instead of resized ones.
        amp: autocast: 'off', which is float32 as in an exported graph, 'bf16', 'fp16', or as the recipe
            trains.
    """

    window: tuple[int, int] | None = None
    overlap: float = 0.25
    flip: bool = False
    scales: tuple[float, ...] = (1.0,)
    original: bool = False
    amp: Literal["recipe", "off", "bf16", "fp16"] = "recipe"

    def __post_init__(self) -> None:
        check_windows(self.window, self.overlap)
        if self.window is None and self.overlap != Inference.overlap:
            raise UserError(f"--overlap {self.overlap}: goes with --window")
        if self.amp not in ("recipe", *AMP):
            raise UserError(f"--amp {self.amp}: expected recipe, {', '.join(AMP)}")
        if not self.scales or not all(0 < scale <= 8 for scale in self.scales):
            text = ",".join(map(str, self.scales))
            raise UserError(f"--scales {text}: expected factors above 0, to 8, such as 0.75,1,1.25")

    @property
    def plain(self) -> bool:
        """Whether a picture is run once and whole."""
        return self.window is None and not self.flip and self.scales == (1.0,)

    def around(self, predict: Predict) -> Predict:
        """A predictor of logits, wrapped as these settings say."""
        if self.plain:
            return predict
        predict = probabilities(predict)
        if self.window is not None:
            predict = sliding_window(predict, self.window, self.overlap)
        if self.flip:
            predict = flipped(predict)
        return predict if self.scales == (1.0,) else multi_scale(predict, self.scales)


def ignore_index_of(samples: Samples, data: DataConfig) -> int:
    """The target that does not count; for classification one that never occurs."""
    return data.ignore_index if samples.task == "segmentation" else -100


def score(
    predict: Predict,
    loader: DataLoader,
    samples: Samples,
    ignore_index: int,
    device: torch.device | str,
    title: str = "evaluating",
    observers: Sequence[Observe] = (),
) -> dict[str, Any]:
    """Scores of ``predict`` over a loader; see `segdeconv.metrics` for what they are.

    Scores of another size than the targets are resized to it. Under several processes each gives its share of
    the counts, and all get the scores of the whole.
    """
    segments, count = samples.task == "segmentation", len(samples.classes)
    confusion = new_confusion(count, ignore_index).to(device)
    top5 = new_top5(count).to(device) if not segments and count > 5 else None
    seen, fitting = 0, set()
    batches = iter(loader)
    try:
        for images, targets in Bar(batches, len(loader), title):
            with _explained(images.shape, fits=images.shape[1:] in fitting):
                output, targets = predict(images.to(device)), targets.to(device)
                if output.is_floating_point():
                    output = resized(output, targets.shape[-2:]) if segments else output
                    if top5 is not None:
                        top5.update(output, targets)
                    output = output.argmax(1)
            fitting.add(images.shape[1:])
            confusion.update(output, targets)
            if observers:
                for labels, truth in zip(_bytes(output), _bytes(targets), strict=True):
                    for observe in observers:
                        observe(seen, labels, truth)
                    seen += 1
    finally:
        end_workers(batches)
    counts = confusion.compute()
    if not segments:
        scores = classification_scores(counts, samples.classes)
        if top5 is not None:  # all ranks compute it, or none does: one may have had no pictures
            updated = sum_over_ranks(torch.tensor(int(top5.update_called), device=device))
            scores |= {"top5": top5.compute().item()} if updated else {}
        return scores
    scores = segmentation_scores(counts, samples.classes)
    return scores | (category_scores(counts, samples.categories) if isinstance(samples, Cityscapes) else {})


@contextlib.contextmanager
def _explained(shape: tuple[int, ...], fits: bool) -> Iterator[None]:
    """Around what a network does with pictures of ``shape``: a UserError if it cannot take them. One that has
    taken pictures of that size before (``fits``) fails for another reason.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError, ValueError, AssertionError) as error:
        if out_of_memory(error):
            raise UserError(
                f"the device ran out of memory on pictures of shape {tuple(shape)}; evaluate in windows "
                "(--window), or lower data.size or train.batch_size"
            ) from None
        if fits or shortage(error):
            raise
        raise UserError(
            f"the network cannot take pictures of shape {tuple(shape)} ({first_line(error)}); check "
            "data.size, --scales and the pictures"
        ) from error


def _bytes(labels: Tensor) -> Picture:
    return labels.to(torch.uint8).cpu().numpy()


def check_fit(info: CheckpointInfo, samples: Samples) -> None:
    """Raise UserError unless the data has the checkpoint's classes."""
    if samples.classes != info.classes:
        raise UserError(
            f"the data has {len(samples.classes)} classes ({', '.join(samples.classes[:3])}, ...), but the "
            f"checkpoint was trained on {len(info.classes)} ({', '.join(info.classes[:3])}, ...); check "
            "data.dataset and data.classes"
        )


def evaluate_run(
    run: str | Path,
    device: torch.device | str = "cpu",
    onnx: str | Path | None = None,
    root: str | None = None,
    split: str = "val",
    inference: Inference | None = None,
    figures: Path | None = None,
    predictions: Path | None = None,
    submission: Path | None = None,
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a run, with PyTorch or, given ``onnx``, with onnxruntime.

    Args:
        device: torch's, or onnxruntime's as `Segmenter` takes it.
        root: where the data lies, if not where the recipe says.
        split: 'train' or 'val', as the recipe names them, or another one of the data set.
        inference: how pictures are brought through the network; by default as in training's validation.
        figures: a folder for ``confusion.png`` and, of a segmentation, ``worst.jpg``: the pictures with the
            lowest mIoU.
        predictions: a folder for a label PNG of every picture, at its own size: label ids named as the
            Cityscapes server wants them, or class numbers. Implies ``inference.original``.
        submission: a zip file of the same, for the Cityscapes server; the split must be 'test'.
        tell: takes the scores before ``figures`` are drawn, which may fail.

    Raises:
        UserError: no such run, its data is not there or has other classes, the graph is another run's, or an
            option does not go with the others.
    """
    torch_device = torch.device("cpu" if onnx is not None else device)
    model, info = load_checkpoint(run, torch_device)
    figures = None if figures is None else make_folder(Path(figures))  # before the long part
    inference = inference or Inference()
    if predictions is not None or submission is not None:
        inference = replace(inference, original=True)
    _check_inference(inference, info.task, run, onnx)
    data = info.recipe.data.at(root)
    if submission is not None:
        _check_submission(submission, data.dataset, split)
    data = replace(data, val={"train": data.train, "val": data.val}.get(split, split))
    samples = open_samples(replace(data, size=None) if inference.original else data, "val")
    check_fit(info, samples)
    ignore_index = ignore_index_of(samples, data)
    batch_size = info.recipe.train.batch_size
    # Where labels keep their own size, pictures come at the recipe's all the same.
    loader = eval_loader(samples, data, batch_size, multiple=1, resize=data.size, keep=False)
    amp = info.recipe.train.amp if inference.amp == "recipe" else inference.amp
    if onnx is None:
        predict = padded(torch_predictor(model, AMP[amp]), size_multiple(model))
    else:
        predict = onnx_predictor(onnx, info, model, str(device))
    predict = inference.around(predict)

    with tempfile.TemporaryDirectory() as temporary:
        folder = predictions or (Path(temporary) if submission is not None else None)
        writer = None if folder is None else _Writer(samples, folder)
        segments = samples.task == "segmentation"
        worst = _Worst(samples, ignore_index) if segments and figures is not None else None
        objects = None
        if isinstance(samples, Cityscapes) and samples.config.size is None:
            objects = _Objects(samples)
        observers = [observer for observer in (writer, worst, objects) if observer is not None]
        scores = score(predict, loader, samples, ignore_index, torch_device, observers=observers)
        if submission is not None and writer is not None:
            write_atomically(submission, writer.pack)
    if objects is not None and objects.any:
        scores |= objects.scores(torch.tensor(scores["confusion"]))
    result = {
        "recipe": info.recipe.name,
        "split": data.val,
        "samples": len(samples),
        "epoch": info.epoch,
        "seed": info.recipe.train.seed,
        "engine": "pytorch" if onnx is None else "onnxruntime",
        "settings": {"size": data.size, **asdict(inference), "amp": amp if onnx is None else "off"},
        **scores,
    }
    if tell is not None:
        tell(result)
    if figures is not None and np.any(scores["confusion"]):  # there are labels
        confusion_picture(scores["confusion"], samples.classes, figures / "confusion.png")
        if worst is not None:
            worst.save(figures / "worst.jpg")
    return result


def predicted_samples(
    predict: Predict, samples: Samples, val_set: EvalSet, device: torch.device | str
) -> list[tuple[Picture, Picture, Picture]]:
    """Picture, truth and class numbers of up to three samples of one size, evenly spread."""
    rows = []
    for index in evenly_spread(3, len(samples)):
        image, truth = samples.load(index)
        assert isinstance(truth, np.ndarray)
        height, width = truth.shape
        labels = predict(val_set[index][0][None].to(device)).argmax(1)[0, :height, :width]
        rows.append((image, truth, labels.byte().cpu().numpy()))
    return [row for row in rows if row[0].shape == rows[0][0].shape]


class _Objects:
    """Adds up instance-weighted counts of Cityscapes."""

    def __init__(self, samples: Cityscapes) -> None:
        self.samples, self.any = samples, False
        by_name = _average_sizes()
        self.average_sizes = tuple(by_name.get(name, math.nan) for name in samples.classes)
        self.counts = torch.zeros(len(samples.classes), 3, dtype=torch.float64)

    def __call__(self, index: int, labels: Picture, truth: Picture) -> None:
        instances = self.samples.instances(index)
        if instances is None:
            return
        if instances.shape != labels.shape:
            raise UserError(
                f"{self.samples.name(index)}: its instance map is {instances.shape[1]}x{instances.shape[0]}, "
                f"but its labels are {labels.shape[1]}x{labels.shape[0]}"
            )
        self.any = True
        ids, categories = self.samples.label_ids, self.samples.categories
        self.counts += instance_counts(labels, instances, ids, categories, self.average_sizes)

    def scores(self, confusion: Tensor) -> dict[str, Any]:
        classes, categories = self.samples.classes, self.samples.categories
        return instance_scores(confusion, self.counts, classes, categories, self.average_sizes)


def _average_sizes() -> dict[str, float]:
    """Pixels of an average object, by Cityscapes class that has objects, as the official script has them."""
    try:
        from cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling import args
    except ValueError as error:  # it looks at its environment variables when it is imported
        raise UserError(str(error)) from None
    return args.avgClassSize


class _Worst:
    """Keeps the pictures with the lowest mIoU, over the classes that occur in a picture's truth or labels."""

    def __init__(self, samples: Samples, ignore_index: int) -> None:
        self.samples, self.ignore_index = samples, ignore_index
        self.kept: list[tuple[float, int, Picture]] = []  # a heap by -mIoU: the best of the worst is first

    def __call__(self, index: int, labels: Picture, truth: Picture) -> None:
        confusion = new_confusion(len(self.samples.classes), self.ignore_index)
        confusion.update(torch.from_numpy(labels), torch.from_numpy(truth))
        miou = segmentation_scores(confusion.compute(), self.samples.classes)["miou"]
        if not math.isnan(miou):
            push = heapq.heappush if len(self.kept) < _WORST else heapq.heappushpop
            push(self.kept, (-miou, index, labels))

    def save(self, path: Path) -> None:
        rows, captions = [], []
        for negative, index, labels in sorted(self.kept, key=lambda kept: -kept[0]):
            image, truth = self.samples.load(index)
            assert not isinstance(truth, int)
            rows.append((image, truth, labels))
            captions.append(f"{self.samples.name(index)}   mIoU {-negative:.3f}")
        if rows:
            save_image(triptych(rows, self.samples.classes, self.samples.palette, captions), path)


class _Writer:
    """Writes a PNG of every prediction: label ids for Cityscapes, else class numbers with the palette."""

    def __init__(self, samples: Samples, folder: Path) -> None:
        self.samples, self.folder = samples, folder
        # Even if nothing would be overwritten: 0.png beside 0.jpg would make two pictures of one name.
        pairs = getattr(samples, "pairs", ())
        if folder.resolve() in {path.resolve().parent for pair in pairs for path in pair}:
            raise UserError(f"{folder}: holds pictures or masks of the data; choose another folder")
        make_folder(folder)

    def __call__(self, index: int, labels: Picture, truth: Picture) -> None:
        if isinstance(self.samples, Cityscapes):
            png = Image.fromarray(np.array(self.samples.label_ids, np.uint8)[labels])
        else:
            png = label_png(labels, self.samples.palette)
        save_image(png, self._file(index))

    def _file(self, index: int) -> Path:
        name = self.samples.name(index)
        if isinstance(self.samples, Cityscapes):  # the server looks for CITY_SEQUENCE_FRAME*.png
            name = f"{name.removesuffix('_leftImg8bit')}_pred_labelIds"
        return self.folder / f"{name}.png"

    def pack(self, path: Path) -> None:
        """All that was written in one zip file, uncompressed: PNGs are compressed already."""
        with zipfile.ZipFile(path, "w") as archive:
            for index in range(len(self.samples)):
                file = self._file(index)
                archive.write(file, file.name)


def _check_inference(inference: Inference, task: str, run: str | Path, onnx: str | Path | None) -> None:
    """Raise UserError for settings that a graph, or a run of this task, cannot be evaluated with."""
    if onnx is not None and inference != Inference():
        raise UserError(
            "--onnx evaluates the graph as it is; windows, mirroring, scales, the original size, --amp and "
            "saved predictions are PyTorch's (segdeconv predict writes a graph's)"
        )
    if task != "segmentation" and (inference.original or inference.window is not None):
        raise UserError(
            f"{run}: is a {task} run; --window, --original, --save-predictions and --submit are for "
            "segmentation"
        )


def _check_submission(path: Path, dataset: str, split: str) -> None:
    if dataset != "cityscapes":
        raise UserError(
            "--submit makes a file for the Cityscapes server, and the run's data is not Cityscapes"
        )
    if split != "test":
        raise UserError(f"--submit: the server scores the split test, not {split}; add --split test")
    if path.suffix != ".zip":
        raise UserError(f"--submit {path}: the file's name must end in .zip")
    check_place(path)


def scores_folder(run: str | Path) -> Path:
    """Where the scores of a run folder or checkpoint are left; for a zoo entry, whose folder is published,
    it is ``runs/NAME``.
    """
    path = Path(run)
    path = path.parent if path.is_file() else path
    if path.is_dir() and not (path / "entry.json").is_file():
        if not os.access(path, os.W_OK):  # better said before the evaluation than after it
            raise UserError(f"{path}: cannot be written; choose a folder for the scores with --out")
        return path
    own = Path("runs") / path.name
    if (own / "recipe.yaml").exists():
        raise UserError(
            f"{own}: holds a run of your own of that name; choose a folder for the scores with --out"
        )
    return make_folder(own)


def write_scores(folder: Path, scores: dict[str, Any]) -> Path:
    """Leave scores in ``eval.json`` or ``eval_onnx.json``."""
    path = folder / ("eval.json" if scores["engine"] == "pytorch" else "eval_onnx.json")
    write_text(path, to_json(scores, indent=1))
    return path


def table(scores: dict[str, Any], task: str) -> Table:
    """Scores as a table for the terminal."""
    segments = task == "segmentation"
    per_class, weighted = scores["iou" if segments else "recall"], scores.get("iiou", {})
    out = Table(
        Column("class", overflow="fold"),
        "IoU" if segments else "recall",
        *(["iIoU"] if weighted else []),
        "share of truth",
    )

    def add(name: str, value: float, weighted_value: float | None = None, share: str = "") -> None:
        iiou = "" if weighted_value is None else _shown(weighted_value)
        out.add_row(name, _shown(value), *([iiou] if weighted else []), share)

    counts = np.array(scores["confusion"], dtype=np.int64)
    shares = counts.sum(1) / max(counts.sum(), 1)
    for (name, value), share in zip(per_class.items(), shares, strict=True):
        add(name, value, weighted.get(name), f"{share:.4f}")
    if "category_iou" in scores:
        out.add_section()
        for name, value in scores["category_iou"].items():
            add(f"category {name}", value, scores.get("category_iiou", {}).get(name))
    out.add_section()
    add(MAIN_METRIC[task], scores[MAIN_METRIC[task]], scores.get("miiou"))
    for key, weighted_key in (
        ("category_miou", "category_miiou"),
        ("pixel_acc", ""),
        ("mean_acc", ""),
        ("top5", ""),
    ):
        if key in scores:
            add(key, scores[key], scores.get(weighted_key))
    return out


def _shown(value: float) -> str:
    return "absent" if math.isnan(value) else f"{value:.4f}"
