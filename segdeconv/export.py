"""From a trained network to one ONNX file, compared with PyTorch before it is written.

The network is folded first, so the graph holds plain convolutions: the same operators and nodes as the export
of its batch-norm twin. What goes in and out is interface.py's; what the runtime must know is in the file's
metadata as JSON. Smaller types are precision.py's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnxscript import opset18
from onnxscript.optimizer import optimize
from timm.layers import Conv2dSame
from timm.layers.conv2d_same import conv2d_same
from torch import Tensor, nn

from segdeconv import __version__
from segdeconv.checkpoint import CheckpointInfo
from segdeconv.entries import DATA
from segdeconv.errors import UserError, first_line
from segdeconv.files import check_place, write_atomically
from segdeconv.fold import fold_network_deconv
from segdeconv.interface import Interface, Preparation, around
from segdeconv.metrics import MAIN_METRIC
from segdeconv.models import main_output, size_multiple
from segdeconv.runtime import cpu_session, import_onnxruntime
from segdeconv.structure import detached_copy, set_to_evaluation

TOLERANCE = 1e-4  # of the largest logit; more only where float32 itself is less exact, see compare

op: Any = opset18  # its types know less than it does

_SMALLEST = 128  # pixels a side; PAN takes no fewer than 113
_TRACED_SIZE = (128, 160)
_CHECKED = ((1, 192, 128), (2, 131, 163), (3, 160, 224))  # batch, height, width; none of them is traced
_PREPARED = 1e-3  # of a standard deviation: a sixteenth of a grey level, the most that resizing may differ
_FOLDED = 1 << 24  # bytes of a constant that a graph of fixed sizes may have computed beforehand
_LARGEST = (1 << 31) - (1 << 20)  # bytes; protobuf ends at 2 GiB


@dataclass(frozen=True)
class Parity:
    """How an exported graph compares with PyTorch at one input size.

    Attributes:
        shape: batch, height, width of the input.
        max_diff: largest difference of logits and probabilities over the largest logit; NaN where the graph
            gives labels alone.
        labels_differ: share of differing labels.
        tolerance: what ``max_diff`` may be; labels may differ only where PyTorch's two best logits are closer
            than twice that.
    """

    shape: tuple[int, int, int]
    max_diff: float
    labels_differ: float
    tolerance: float
    passed: bool


def export_onnx(
    model: nn.Module, info: CheckpointInfo, path: str | Path, interface: Interface | None = None
) -> list[Parity]:
    """Fold a network and write it as ONNX.

    Args:
        model: from `load_checkpoint`, or any network that ``info`` describes.
        interface: what goes in and comes out; by default normalised planes of any size, and labels.

    Returns:
        The comparison with PyTorch, at three sizes that were not traced or at the one that is fixed.

    Raises:
        UserError: the network is not in float32 or cannot be exported, the graph disagrees with PyTorch
            (nothing is written), or ``path`` cannot be written.
    """
    path, interface = check_graph_place(path), interface or Interface()
    other = {value.dtype for value in model.parameters()} - {torch.float32}
    if other:
        raise UserError(f"{path}: not written, the network has weights in {other.pop()}; give model.float()")
    preparation = preparation_of(info, model)
    model = detached_copy(model).cpu()
    set_to_evaluation(model)
    core = network_graph(model, interface, preparation)
    graph = finish(core, info, interface, preparation)
    results = compare_all(graph, model, info, interface, preparation)
    check(results, path)
    write_graph(graph, path)
    return results


def check(results: Sequence[Parity], path: Path) -> None:
    """Raise UserError unless a graph agrees with PyTorch at all sizes."""
    failed = next((result for result in results if not result.passed), None)
    if failed is not None:
        raise UserError(
            f"{path}: not written, the graph disagrees with PyTorch at {failed.shape}: by "
            f"{failed.max_diff:.1e} of the largest logit (allowed {failed.tolerance:.1e}), "
            f"{failed.labels_differ:.2%} of labels"
        )


def check_graph_place(path: str | Path) -> Path:
    """The path of a graph that is going to be written.

    Raises:
        UserError: its suffix is another, it is a folder, or its folder is not there.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: the file's name must end in .onnx")
    check_place(path)
    return path


def write_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph with its weights inside, atomically.

    Raises:
        UserError: the place cannot be written.
    """
    write_atomically(path, lambda temporary: temporary.write_bytes(graph.SerializeToString()))


def preparation_of(info: CheckpointInfo, model: nn.Module) -> Preparation:
    """How a checkpoint's recipe brings pictures to the network in evaluation."""
    data = info.recipe.data
    return Preparation(
        mean=data.mean,
        std=data.std,
        size_multiple=size_multiple(model),
        resize=data.size,
        shorter_side=data.shorter_side,
        central_crop=data.crop if data.shorter_side else None,
    )


def graph_metadata(info: CheckpointInfo, interface: Interface, preparation: Preparation) -> dict[str, Any]:
    """What an exported file says about itself; each value is stored as JSON under its key."""
    metric = MAIN_METRIC[info.task]
    return {
        "task": info.task,
        "name": info.recipe.name,
        "architecture": info.recipe.model.architecture,
        "encoder": info.recipe.model.encoder,
        "norm": info.recipe.model.norm,
        "precision": "fp32",
        "output": interface.outputs,
        "preprocess": interface.preprocess,
        "classes": info.classes,
        "palette": info.palette,
        "ignore_index": info.recipe.data.ignore_index,
        "color_order": "RGB",
        "layout": "NHWC" if interface.preprocess == "graph" else "NCHW",
        **asdict(preparation),
        metric: info.scores.get(metric),
        "weights_sha256": info.sha256,
        "licence": DATA.get(info.recipe.data.dataset),
        "exporter": f"segdeconv {__version__}",
        "torch": torch.__version__,
    }


def finish(
    core: onnx.ModelProto,
    info: CheckpointInfo,
    interface: Interface,
    preparation: Preparation,
    **changes: Any,
) -> onnx.ModelProto:
    """The whole graph, checked and with its metadata, from the network's own.

    Its name holds a hash of all it computes, so that engine caches that go by names never mix up two graphs.

    Args:
        changes: metadata that differ from `graph_metadata`.

    Raises:
        UserError: it is larger than an ONNX file can be, holds an operator that is not ONNX's own, or puts
            out something else than scores of the classes.
    """
    if core.ByteSize() > _LARGEST:
        raise UserError("not written, the graph has 2 GB or more, which one ONNX file cannot hold")
    foreign = sorted({node.op_type for node in core.graph.node if node.domain not in ("", "ai.onnx")})
    if foreign:
        raise UserError(f"not written, the graph needs operators beyond ONNX's own: {', '.join(foreign)}")
    shape = [size.dim_value for size in core.graph.output[0].type.tensor_type.shape.dim]  # 0: not fixed
    if len(shape) != (4 if info.task == "segmentation" else 2) or shape[1] not in (0, len(info.classes)):
        raise UserError(
            f"not written, the network puts out {shape} (0: any), which is no {info.task} of "
            f"{len(info.classes)} classes"
        )
    graph = around(core, interface, preparation, info.task, len(info.classes))
    if interface.static is not None:
        graph = _with_sizes_as_numbers(graph, interface)
    _strip(graph)
    graph.ir_version = onnx.helper.find_min_ir_version_for(graph.opset_import, True)  # for older runtimes
    digest = hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest()
    graph.graph.name = f"{info.recipe.name}_{info.recipe.model.norm}_{digest[:16]}"
    del graph.metadata_props[:]  # what tools left there is not JSON
    for key, value in (graph_metadata(info, interface, preparation) | changes).items():
        graph.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(graph, full_check=True)
    return graph


def _with_sizes_as_numbers(graph: onnx.ModelProto, interface: Interface) -> onnx.ModelProto:
    """A graph of one size without what computes with sizes, which not every runtime does."""
    kept = ["planes"] if interface.preprocess == "graph" else []  # `compare` looks at them
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in kept)
    graph = optimize(graph, input_size_limit=_FOLDED, output_size_limit=_FOLDED)
    del graph.graph.output[len(interface.outputs) :]
    return graph


def network_graph(model: nn.Module, interface: Interface, preparation: Preparation) -> onnx.ModelProto:
    """The folded network alone: ``image`` (n, 3, H, W) float32 to ``logits``.

    Args:
        model: on the CPU, in evaluation mode.

    Raises:
        UserError: torch cannot export it.
    """
    import_onnxruntime()  # what the graph is compared in must not be missed after minutes of tracing
    (batch, *size), dynamic_shapes = _traced_shape(interface, preparation)
    network = _Logits(fold_network_deconv(model)).eval()
    for module in network.modules():
        if type(module) is Conv2dSame:
            module.__class__ = _Conv2dSame
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's notes to its own developers
            program = torch.onnx.export(
                network,
                (torch.randn(batch, 3, *size),),
                input_names=["image"],
                output_names=["logits"],
                opset_version=interface.opset,
                dynamo=True,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table={
                    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_average,
                    torch.ops.segdeconv.conv2d_same.default: _same_convolution,
                },
                verbose=False,
            )
    except Exception as error:  # the exporter raises what the traced Python raises, wrapped
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"the network cannot be exported to ONNX: {reason}") from None
    assert program is not None
    graph = program.model_proto
    _repeat_single_pixels(graph.graph)
    _strip(graph)
    return graph


def _traced_shape(
    interface: Interface, preparation: Preparation
) -> tuple[tuple[int, int, int], dict[str, Any] | None]:
    """Batch, height and width to trace at, and the ``dynamic_shapes`` of `torch.onnx.export`."""
    if interface.static is not None:
        return (interface.static[0], *_input_size(interface.static, interface, preparation)), None
    multiple = preparation.size_multiple
    height, width = (side + -side % multiple for side in _TRACED_SIZE)
    dynamic = torch.export.Dim.DYNAMIC
    dims: list[Any] = [torch.export.Dim("batch"), torch.export.Dim.STATIC, dynamic, dynamic]
    if multiple > 1:
        least = -(-_SMALLEST // multiple)
        for axis, name in ((2, "rows"), (3, "columns")):
            dims[axis] = multiple * torch.export.Dim(name, min=least, max=1 << 12)
    return (2, height, width), {"image": dict(enumerate(dims))}


def _repeat_single_pixels(graph: onnx.GraphProto) -> None:
    """Resize maps of one pixel by nearest neighbour. The result is the same; OpenCV's linear mode would read
    memory beyond such a map (seen in 5.0).
    """
    sizes = {value.name: value.type.tensor_type.shape.dim[2:] for value in graph.value_info}
    for node in graph.node:
        if node.op_type == "Resize" and [size.dim_value for size in sizes.get(node.input[0], ())] == [1, 1]:
            next(attribute for attribute in node.attribute if attribute.name == "mode").s = b"nearest"


def _strip(graph: onnx.ModelProto) -> None:
    """Take out symbol names of sizes, which shape inference makes again, and lines and folders of Python."""
    del graph.graph.value_info[:], graph.graph.metadata_props[:]
    for part in (*graph.graph.node, *graph.graph.initializer):
        del part.metadata_props[:]


def _adaptive_average(planes: Any, output_size: Sequence[int]) -> Any:
    """Adaptive average pooling of maps of any size, which torch itself exports for the traced size only."""
    rows, columns = output_size
    if rows == columns == 1:
        return op.GlobalAveragePool(planes)
    down = _bins(op.Shape(planes, start=2, end=3), rows)
    across = _bins(op.Shape(planes, start=3, end=4), columns)
    return op.MatMul(op.MatMul(down, planes), op.Transpose(across, perm=[1, 0]))


def _bins(length: Any, count: int) -> Any:
    """The matrix (count, length) that averages an axis: bin i is of i L / n, rounded down, to (i + 1) L / n,
    rounded up.
    """
    n, one, index = _numbers(count), _numbers(1), _numbers(*range(count))
    first = op.Div(op.Mul(index, length), n)
    behind = op.Div(op.Sub(op.Add(op.Mul(op.Add(index, one), length), n), one), n)
    first, behind = op.Unsqueeze(first, one), op.Unsqueeze(behind, one)
    at = op.Range(op.Constant(value_int=0), op.Squeeze(length), op.Constant(value_int=1))
    inside = op.And(op.GreaterOrEqual(at, first), op.Less(at, behind))
    width = op.Sub(behind, first)
    return op.Div(op.Cast(inside, to=onnx.TensorProto.FLOAT), op.Cast(width, to=onnx.TensorProto.FLOAT))


# An operator of its own, because torch takes minutes to trace how it computes its padding.
@torch.library.custom_op("segdeconv::conv2d_same", mutates_args=())
def _conv2d_same(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """TensorFlow's convolution, padded by the size of its input."""
    return conv2d_same(x, weight, bias, stride, dilation=dilation, groups=groups)  # type: ignore[arg-type]


@_conv2d_same.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], *_: Any) -> Tensor:
    rows, columns = ((size + step - 1) // step for size, step in zip(x.shape[2:], stride, strict=True))
    return x.new_empty(x.shape[0], weight.shape[0], rows, columns)


def _same_convolution(
    x: Any, weight: Any, bias: Any, stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Any:
    # Not auto_pad="SAME_UPPER", which OpenCV computes otherwise (seen in 5.0).
    reach = [step * (length - 1) for step, length in zip(dilation, weight.shape[2:], strict=True)]
    behind = op.Mod(op.Sub(op.Shape(x, start=2), _numbers(1)), _numbers(*stride))
    total = op.Max(op.Sub(_numbers(*reach), behind), _numbers(0))
    before = op.Div(total, _numbers(2))
    none = _numbers(0, 0)
    padded = op.Pad(x, op.Concat(none, before, none, op.Sub(total, before), axis=0))
    return op.Conv(padded, weight, bias, strides=stride, dilations=dilation, group=groups)


def _numbers(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


class _Conv2dSame(Conv2dSame):
    def forward(self, x: Tensor) -> Tensor:
        return _conv2d_same(x, self.weight, self.bias, self.stride, self.dilation, self.groups)


class _Logits(nn.Module):
    """The network's main output alone; some have auxiliary ones."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return main_output(self.model(image))


def _input_size(
    shape: tuple[int, int, int], interface: Interface, preparation: Preparation
) -> tuple[int, int]:
    """Height and width that the network itself gets of an ``image`` of ``shape``.

    Raises:
        UserError: a fixed size is no multiple of what the network needs.
    """
    (batch, height, width), multiple = shape, preparation.size_multiple
    if interface.preprocess == "graph":
        return preparation.network_size(height, width)
    if interface.static is not None and (height % multiple or width % multiple):
        raise UserError(
            f"--static {batch},{height},{width}: this network takes multiples of {multiple} pixels; choose "
            "such, or --preprocess graph, which pads"
        )
    return height + -height % multiple, width + -width % multiple


def compare_all(
    graph: onnx.ModelProto,
    model: nn.Module,
    info: CheckpointInfo,
    interface: Interface,
    preparation: Preparation,
) -> list[Parity]:
    """`compare` at three sizes that were not traced, or at the one size of a static graph."""
    shapes = _CHECKED if interface.static is None else (interface.static,)
    return [compare(graph, model, info.task, interface, preparation, shape) for shape in shapes]


def compare(
    graph: onnx.ModelProto,
    model: nn.Module,
    task: str,
    interface: Interface,
    preparation: Preparation,
    shape: tuple[int, int, int],
) -> Parity:
    """Run the graph and the network it was made from, not yet folded and in evaluation mode, on noise.

    The tolerance is `TOLERANCE`, or four times PyTorch's own float32 error against float64 where a network is
    so ill-conditioned that this is more, up to a hundred times `TOLERANCE`.

    Args:
        shape: batch, height, width, rounded up to the size multiple where the graph does not pad.
    """
    raw = interface.preprocess == "graph"
    images = _noise(shape, interface, preparation)
    found = _run(graph, images, [*interface.outputs, *(["planes"] if raw else [])])
    planes = images
    if raw:
        planes, wanted = torch.from_numpy(found["planes"]), prepared(images, preparation)
        allowed = max(_PREPARED, 4 * torch.finfo(planes.dtype).eps)
        planes = planes.float()
        if planes.shape != wanted.shape or not (planes - wanted).abs().max() < allowed:
            return Parity(shape, float("inf"), 1.0, TOLERANCE, False)
    with torch.inference_mode():
        logits = main_output(model(planes))
        exact = main_output(copy.deepcopy(model).double()(planes.double()))
    largest = max(float(logits.abs().max()), torch.finfo(torch.float32).tiny)  # NaN stays NaN
    tolerance = min(max(TOLERANCE, 4 * float((logits - exact).abs().max()) / largest), 100 * TOLERANCE)
    shown = images.shape[1:3] if raw else images.shape[2:]
    shape = (len(images), *shown)
    if raw and task == "segmentation":
        rows, columns = preparation.size or shown
        logits = logits[..., :rows, :columns]
    answers: dict[str, NDArray[Any]] = {name: _answer(name, logits, shown) for name in interface.outputs}
    if any(found[name].shape != answers[name].shape for name in answers) or not np.isfinite(largest):
        return Parity(shape, float("inf"), 1.0, tolerance, False)
    scores = [name for name in interface.outputs if name != "labels"]
    max_diff = max((_largest(found[name], answers[name]) / largest for name in scores), default=float("nan"))
    passed = not max_diff > tolerance
    best = logits.topk(min(2, logits.shape[1]), dim=1).values
    margin = best[:, 0] - best[:, -1]
    clear = _nearest((margin > 2 * tolerance * largest).byte(), shown).numpy() > 0

    def labels_of(values: dict[str, NDArray[Any]]) -> NDArray[Any]:
        return values["labels"] if "labels" in values else values[scores[0]].argmax(1)

    wrong = labels_of(found) != labels_of(answers)
    if "labels" in found:
        passed = passed and not (wrong & clear).any()
    return Parity(shape, max_diff, float(wrong.mean()), tolerance, passed)


def _noise(shape: tuple[int, int, int], interface: Interface, preparation: Preparation) -> Tensor:
    """What the graph takes."""
    generator = torch.Generator().manual_seed(0)
    batch, height, width = shape
    if interface.preprocess == "graph":
        return torch.randint(256, (batch, height, width, 3), generator=generator, dtype=torch.uint8)
    return torch.randn(batch, 3, *_input_size(shape, interface, preparation), generator=generator)


def _run(graph: onnx.ModelProto, images: Tensor, values: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Values of a graph by name, outputs or intermediate ones."""
    probed = onnx.ModelProto()
    probed.CopyFrom(graph)
    outputs = {output.name for output in graph.graph.output}
    for value in values:
        if value not in outputs:
            probed.graph.output.append(onnx.ValueInfoProto(name=value))
    session = cpu_session(probed.SerializeToString())
    half = session.get_inputs()[0].type == "tensor(float16)"
    try:
        found = session.run(list(values), {"image": (images.half() if half else images).numpy()})
    except Exception as error:  # onnxruntime raises its own unrelated classes
        raise UserError(
            f"the graph does not run on {tuple(images.shape)}, which it should ({first_line(error)})"
        ) from None
    return dict(zip(values, found, strict=True))


def prepared(pictures: Tensor, preparation: Preparation) -> Tensor:
    """Planes (n, 3, H', W') of RGB (n, H, W, 3) uint8: what the graph's own operators do, in torch."""
    planes, size = pictures.permute(0, 3, 1, 2).float(), preparation.resize
    if preparation.shorter_side is not None:
        sides = planes.shape[2:]
        size = tuple(preparation.shorter_side * side // min(sides) for side in sides)  # type: ignore[assignment]
    if size is not None:
        planes = F.interpolate(planes, size, mode="bilinear", antialias=True)
    if preparation.central_crop is not None:
        rows, columns = preparation.central_crop
        top, left = round((planes.shape[2] - rows) / 2), round((planes.shape[3] - columns) / 2)
        planes = planes[:, :, top : top + rows, left : left + columns]
    mean, std = (255 * torch.tensor(parts)[:, None, None] for parts in (preparation.mean, preparation.std))
    planes = (planes - mean) / std
    bottom, right = (-side % preparation.size_multiple for side in planes.shape[2:])
    return F.pad(planes, (0, right, 0, bottom))


def _answer(output: str, logits: Tensor, size: Sequence[int]) -> NDArray[Any]:
    """What the graph should put out, from the network's logits, at a picture's height and width."""
    if output == "labels":
        return _nearest(logits.argmax(1), size).numpy()
    scores = logits.softmax(1) if output == "probabilities" else logits
    if scores.ndim == 4 and scores.shape[2:] != tuple(size):
        scores = F.interpolate(scores, tuple(size), mode="bilinear")
    return scores.numpy()


def _nearest(maps: Tensor, size: Sequence[int]) -> Tensor:
    if maps.ndim == 1 or maps.shape[1:] == tuple(size):
        return maps
    return F.interpolate(maps[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].long()


def _largest(found: NDArray[Any], expected: NDArray[Any]) -> float:
    difference = np.abs(found.astype(np.float64) - expected).max()
    return float(difference) if np.isfinite(difference) else float("inf")
