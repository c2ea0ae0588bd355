"""Smaller graphs, float16 and int8, that are written only if they are measured to be right and faster.

The conversions are onnxruntime's. What is done here is to choose: how activations' ranges are found, by what
each way does to labels of training pictures, and which layers stay in float, by what each does alone.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx.shape_inference import infer_shapes
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from segdeconv.bench import default_size, interleave, noise, stages
from segdeconv.checkpoint import CheckpointInfo, load_checkpoint
from segdeconv.data import EvalSet, evenly_spread, open_samples
from segdeconv.errors import Refused, UserError
from segdeconv.evaluate import evaluate_run, ignore_index_of, score
from segdeconv.export import (
    check,
    check_graph_place,
    compare_all,
    finish,
    network_graph,
    preparation_of,
    write_graph,
)
from segdeconv.interface import Interface, Preparation
from segdeconv.metrics import MAIN_METRIC
from segdeconv.progress import Bar, console
from segdeconv.runtime import Segmenter, cpu_session

Precision = Literal["fp16", "int8"]
Planes = NDArray[np.float32]
Compute = Callable[[Planes], Planes]  # planes (n, 3, H, W) to logits

_PICTURES = 32  # of the training split, for ranges; as many others for choosing
_PROBES = 4  # of the latter, for each layer alone
_RUNS = 20  # measured calls of each graph
_RANGES: dict[str, dict[str, Any]] = {  # of activations: onnxruntime's ways, and settings
    "MinMax": {},
    "Percentile": {"percentile": 99.99, "symmetric": False},
    "Entropy": {},
}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_IN_INT8 = (
    *_WEIGHTED,
    *("Add", "Mul", "Concat", "Resize", "Clip", "Relu", "LeakyRelu", "Sigmoid", "Pad", "Split", "Slice"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose", "Flatten", "Squeeze"),
)


@dataclass(frozen=True)
class Gates:
    """What a smaller graph has to keep; see `export_smaller`."""

    max_drop: float = 0.01
    min_speedup: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_drop", "min_speedup"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected a number")


@dataclass(frozen=True)
class Smaller:
    """What a smaller graph was measured to be.

    Attributes:
        metric: ``miou`` or ``top1``; ``before`` is that of the float32 graph on the validation split, and
            ``after`` its own.
        speedup: median over the rounds of one run of the float32 graph's time over its own.
        megabytes: of both files.
        ranges: of int8: share of labels that differ from float's, by way of finding ranges; the first is
            the one taken.
        in_float: of int8: layers that stayed in float, the most sensitive first; of ``layers``.
    """

    precision: Precision
    metric: str
    before: float
    after: float
    speedup: float
    device: str
    megabytes: tuple[float, float]
    ranges: dict[str, float]
    in_float: tuple[str, ...]
    layers: int


def export_smaller(
    run: str | Path,
    path: str | Path,
    precision: Precision,
    interface: Interface | None = None,
    gates: Gates | None = None,
    half_io: bool = False,
    root: str | None = None,
    device: str = "cpu",
) -> Smaller:
    """Fold a run, write it as float16 or int8, and measure what that costs and gains.

    int8 is static: QuantizeLinear and DequantizeLinear around what is to be computed in int8, one scale per
    channel for weights (int8) and one per tensor for activations (uint8), whose ranges come from training
    pictures. Layers that are measured to lose most stay in float until half of ``gates.max_drop`` is kept on
    other training pictures. Accuracy is then measured on the validation split, which nothing was chosen by.

    Args:
        run: a run folder, checkpoint or zoo entry; its data must be at hand.
        half_io: for fp16: the graph's input and scores are float16 too.
        root: where the data lies, if not where the recipe says.
        device: where speed and accuracy are measured, as `Segmenter` takes it.

    Returns:
        What was measured, and which layers stayed in float.

    Raises:
        Refused: the metric drops by more than ``gates.max_drop``, or the graph is not ``gates.min_speedup``
            times as fast; nothing is written.
        UserError: the run, its data or the place is not as it should be.
    """
    if precision not in ("fp16", "int8"):
        raise UserError(f"precision = {precision!r}: expected fp16 or int8")
    path, interface, gates = check_graph_place(path), interface or Interface(), gates or Gates()
    model, info = load_checkpoint(run)
    preparation = preparation_of(info, model)
    for split in ("train", "val") if precision == "int8" else ("val",):
        open_samples(info.recipe.data.at(root), split)  # what is missing must not be missed after an export
    # Accuracy is that of the network, on pictures of any size; the outside is for speed and for the file.
    plain = Interface(opset=interface.opset)
    core = network_graph(model, plain, preparation)
    full = finish(core, info, plain, preparation)
    check(compare_all(full, model, info, plain, preparation), path)
    chosen: dict[str, float] = {}
    in_float: tuple[str, ...] = ()
    if precision == "fp16":
        small = to_fp16(core, half_io)
    else:
        small, chosen, in_float = _quantize(core, info, preparation, gates.max_drop / 2, root)
    asked = finish(small, info, interface, preparation, precision=precision)
    for result in compare_all(asked, model, info, interface, preparation):
        if np.isinf(result.max_diff):
            raise UserError(f"{path}: not written, {precision} puts out something else at {result.shape}")

    metric = MAIN_METRIC[info.task]
    less = finish(small, info, plain, preparation, precision=precision)
    before, after = (_score(run, graph, metric, device, root) for graph in (full, less))
    speedup, where = _speedup(finish(core, info, interface, preparation), asked, info, interface, device)
    megabytes = full.ByteSize() / 1e6, less.ByteSize() / 1e6
    layers = len(_layers(core))
    found = Smaller(precision, metric, before, after, speedup, where, megabytes, chosen, in_float, layers)
    _check_gates(found, gates, path)
    write_graph(finish(small, info, interface, preparation, precision=precision, **{metric: after}), path)
    return found


def _check_gates(found: Smaller, gates: Gates, path: Path) -> None:
    if math.isnan(found.before):
        raise UserError(f"{path}: not written, as no label of the validation split counts to measure it by")
    if not found.before - found.after <= gates.max_drop:
        raise Refused(
            f"{path}: not written, {found.precision} brings {found.metric} from {found.before:.4f} to "
            f"{found.after:.4f}, a drop of more than --max-drop {gates.max_drop} ({found.speedup:.2f} times "
            f"as fast on {found.device})"
        )
    if not found.speedup >= gates.min_speedup:
        raise Refused(
            f"{path}: not written, {found.precision} is {found.speedup:.2f} times as fast as fp32 on "
            f"{found.device}, less than --min-speedup {gates.min_speedup} ({found.metric} {found.before:.4f} "
            f"to {found.after:.4f})"
        )


def summary(smaller: Smaller) -> list[str]:
    """What was measured, in lines for people."""
    before, after = smaller.megabytes
    lines = [
        f"{smaller.metric}: fp32 {smaller.before:.4f}, {smaller.precision} {smaller.after:.4f}",
        f"{smaller.speedup:.2f} times as fast on {smaller.device}; {before:.1f} MB become {after:.1f} MB",
    ]
    if smaller.ranges:
        changed = ", ".join(f"{way} {share:.2%}" for way, share in smaller.ranges.items())
        lines.append(
            f"labels of training pictures that differ from float's, by how ranges are found: {changed}"
        )
        kept = f": {', '.join(smaller.in_float)}" if smaller.in_float else ""
        lines.append(f"{len(smaller.in_float)} of {smaller.layers} layers stayed in float{kept}")
    return lines


def to_fp16(core: onnx.ModelProto, half_io: bool = False) -> onnx.ModelProto:
    """A network's own graph in float16; its input and logits stay float32 unless ``half_io``."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        return _sorted(convert_float_to_float16(infer_shapes(core), keep_io_types=not half_io))


def _score(run: str | Path, graph: onnx.ModelProto, metric: str, device: str, root: str | None) -> float:
    with tempfile.TemporaryDirectory() as folder:
        write_graph(graph, path := Path(folder) / "graph.onnx")
        return evaluate_run(run, device, path, root)[metric]


def _speedup(
    full: onnx.ModelProto, small: onnx.ModelProto, info: CheckpointInfo, interface: Interface, device: str
) -> tuple[float, str]:
    """How many times as fast ``small`` is, with preparation and labels, and where."""
    with tempfile.TemporaryDirectory() as folder:
        segmenters = {}
        for name, graph in (("small", small), ("full", full)):
            write_graph(graph, path := Path(folder) / f"{name}.onnx")
            segmenters[name] = Segmenter(path, device)
    data, fixed = info.recipe.data, interface.static
    size = fixed[1:] if fixed else data.size or data.crop or default_size(segmenters["full"])
    batch = fixed[0] if fixed else 1
    pictures = noise(batch, *size)
    arms = {name: stages(segmenter, pictures) for name, segmenter in segmenters.items()}
    _, of_full = interleave(arms, _RUNS, batch)  # ratios are over the first
    return of_full.ratio, segmenters["full"].device


# int8.


def _quantize(
    core: onnx.ModelProto,
    info: CheckpointInfo,
    preparation: Preparation,
    allowed_drop: float,
    root: str | None,
) -> tuple[onnx.ModelProto, dict[str, float], tuple[str, ...]]:
    """The network in int8, how much ways of finding ranges change labels, and the layers left in float."""
    core = infer_shapes(core)
    pictures = _Training(info, preparation, root)
    compute = _logits_of(core)
    expected = [compute(planes).argmax(1) for planes in pictures.choosing]
    found = {way: find_ranges(core, pictures.calibrating, way) for way in _RANGES}
    graphs = {way: to_int8(core, ranges) for way, ranges in found.items()}
    changed = {way: _changed(_logits_of(graph), pictures.choosing, expected) for way, graph in graphs.items()}
    changed = dict(sorted(changed.items(), key=lambda item: item[1]))
    way = next(iter(changed))
    before, graph = pictures.metric(compute), graphs[way]
    drop = before - pictures.metric(_logits_of(graph))
    tried: list[tuple[float, onnx.ModelProto, tuple[str, ...]]] = [(drop, graph, ())]
    if drop > allowed_drop:
        sensitive = _by_effect(core, found[way], pictures.choosing[:_PROBES], compute)
        count = 1
        while tried[-1][0] > allowed_drop and count < len(sensitive):
            graph = to_int8(core, found[way], leave=sensitive[:count])
            drop = before - pictures.metric(_logits_of(graph))
            console.print(f"int8 with {count} of {len(sensitive)} layers in float: {drop:+.4f} lost")
            tried.append((drop, graph, tuple(sensitive[:count])))
            count *= 2
    _, graph, in_float = min(tried, key=lambda attempt: attempt[0])
    return graph, changed, in_float


def _by_effect(core: onnx.ModelProto, ranges: Any, pictures: Sequence[Planes], compute: Compute) -> list[str]:
    """Layers with weights, by how much int8 in that layer alone changes the logits, most first."""
    expected = [compute(planes) for planes in pictures]
    effect = {}
    layers = _layers(core)
    for layer in Bar(layers, len(layers), "each layer alone in int8"):
        alone = _logits_of(to_int8(core, ranges, only=[layer]))
        errors = [np.square(alone(p) - e).sum() for p, e in zip(pictures, expected, strict=True)]
        effect[layer] = float(np.sum(errors))
    return sorted(effect, key=lambda layer: -effect[layer])


def _layers(core: onnx.ModelProto) -> list[str]:
    return [node.name for node in core.graph.node if node.op_type in _WEIGHTED]


def find_ranges(core: onnx.ModelProto, pictures: Sequence[Planes], way: str) -> Any:
    """Ranges of all activations over planes (n, 3, H, W), as onnxruntime keeps them.

    Args:
        core: with its shapes inferred.
        way: a key of `_RANGES`.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    with tempfile.TemporaryDirectory() as folder, _quiet():
        onnx.save(core, path := Path(folder) / "core.onnx")
        calibrator = create_calibrator(
            path,
            _IN_INT8,
            str(Path(folder) / "augmented.onnx"),
            CalibrationMethod[way],
            extra_options=_RANGES[way],
        )
        for planes in pictures:  # one at a time: it keeps every activation of what it is given at once
            calibrator.collect_data(_reader([planes]))
        return calibrator.compute_data()


def _reader(pictures: Sequence[Planes]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        left = iter(pictures)

        def get_next(self) -> dict[str, Planes] | None:
            planes = next(self.left, None)
            return None if planes is None else {"image": planes}

    return Reader()


def to_int8(
    core: onnx.ModelProto, ranges: Any, only: Sequence[str] = (), leave: Sequence[str] = ()
) -> onnx.ModelProto:
    """A network's own graph in int8: all of it, ``only`` some layers, or all but ``leave``."""
    from onnxruntime.quantization import QDQQuantizer, QuantType

    model = onnx.ModelProto()
    model.CopyFrom(core)
    with _quiet():
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=list(only),
            nodes_to_exclude=list(leave),
            op_types_to_quantize=list(_IN_INT8),
            extra_options={},
        )
        quantizer.quantize_model()
    made = quantizer.model.model
    for node in [node for node in made.graph.node if node.name in leave]:
        # Between quantised tensors onnxruntime gives a float layer int8 weights after all, with one scale,
        # when it loads the graph (WeightBiasQuantization, its pull request 22969), unless something stands
        # before it. A sum of one changes nothing, and no optimiser takes it away.
        name = f"{node.name}_in_float"
        made.graph.node.append(onnx.helper.make_node("Sum", [node.input[0]], [name], name))
        node.input[0] = name
    return _sorted(made)


def _sorted(graph: onnx.ModelProto) -> onnx.ModelProto:
    """With every node after those it reads, as ONNX demands; onnxruntime's tools append theirs at the end."""
    from onnxruntime.quantization.onnx_model import ONNXModel

    model = ONNXModel(graph)
    model.topological_sort()
    return model.model


def _changed(compute: Compute, pictures: Sequence[Planes], expected: Sequence[NDArray[Any]]) -> float:
    """Share of labels that differ from the expected ones."""
    return float(
        np.mean([(compute(p).argmax(1) != e).mean() for p, e in zip(pictures, expected, strict=True)])
    )


def _logits_of(graph: onnx.ModelProto) -> Compute:
    """What a network's own graph computes, on the CPU."""
    session = cpu_session(graph.SerializeToString())
    return lambda planes: session.run(["logits"], {"image": planes})[0]


class _Training:
    """Pictures of the training split, evenly spread: some for ranges, others for choosing.

    They have the recipe's size, or are windows of its crop where pictures keep sizes of their own, since
    calibration holds every activation of one picture in memory.
    """

    def __init__(self, info: CheckpointInfo, preparation: Preparation, root: str | None) -> None:
        data = info.recipe.data.at(root)
        self.samples = open_samples(data, "train")
        self.ignore_index = ignore_index_of(self.samples, data)
        pictures: Dataset[Any] = EvalSet(self.samples, data, preparation.size_multiple)
        if info.task == "segmentation" and data.size is None and data.crop is not None:
            pictures = _Windows(pictures, preparation.network_size(*data.crop))
        spread = evenly_spread(2 * _PICTURES, len(self.samples))
        self.chosen = Subset(pictures, spread[1::2] or spread)
        self.calibrating = [pictures[index][0][None].numpy() for index in spread[::2]]
        self.choosing = [self.chosen[index][0][None].numpy() for index in range(len(self.chosen))]

    def metric(self, compute: Compute) -> float:
        """mIoU, or top-1 accuracy, on the pictures for choosing."""

        def predict(images: Tensor) -> Tensor:
            return torch.from_numpy(compute(images.numpy()))

        scores = score(
            predict, DataLoader(self.chosen), self.samples, self.ignore_index, "cpu", "training pictures"
        )
        return scores[MAIN_METRIC[self.samples.task]]


class _Windows(Dataset[tuple[Tensor, Tensor]]):
    """A window of every sample, always the same one."""

    def __init__(self, samples: Dataset[Any], size: tuple[int, int]) -> None:
        self.samples, self.size = samples, size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.samples[index]
        generator = np.random.default_rng(index)
        rows, columns = (
            slice(start := int(generator.integers(max(side - wanted, 0) + 1)), start + wanted)
            for side, wanted in zip(image.shape[1:], self.size, strict=True)
        )
        return image[:, rows, columns], target[rows, columns]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what onnxruntime's tools print and log about every step."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)
