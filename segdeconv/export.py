"""From a trained network to one ONNX file, compared with PyTorch before it is written.

The network is folded first, so the graph holds plain convolutions: the same operators and nodes as the export
of its batch-norm twin. What the runtime must know is in the file's metadata as JSON.
"""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from segdeconv.checkpoint import CheckpointInfo
from segdeconv.errors import UserError
from segdeconv.files import write_atomically
from segdeconv.fold import fold_network_deconv
from segdeconv.metrics import MAIN_METRIC
from segdeconv.models import main_output, size_multiple
from segdeconv.runtime import import_onnxruntime

OPSET = 18  # later opsets put Resize on the CPU in many CUDA builds of onnxruntime
TOLERANCE = 1e-4  # of the largest logit; more only where float32 itself is less exact, see compare
Output = Literal["labels", "logits"]

_TRACED_SIZE = (96, 160)
_CHECKED = ((1, 64, 96), (2, 128, 64), (3, 192, 224))  # batch, height, width; none of them is traced


@dataclass(frozen=True)
class Parity:
    """How an exported graph compares with PyTorch at one input size.

    Attributes:
        shape: batch, height, width.
        max_diff: largest difference of logits over the largest logit; NaN where the graph gives labels.
        labels_differ: share of differing labels.
        tolerance: what ``max_diff`` may be; labels may differ only where PyTorch's two best logits are closer
            than twice that.
    """

    shape: tuple[int, int, int]
    max_diff: float
    labels_differ: float
    tolerance: float
    passed: bool


class _Deployed(nn.Module):
    """What the graph computes: logits, or their arg max as uint8 (int32 above 256 classes)."""

    def __init__(self, model: nn.Module, output: Output, num_classes: int) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.label_type = torch.uint8 if num_classes <= 256 else torch.int32

    def forward(self, image: Tensor) -> Tensor:
        logits = main_output(self.model(image))
        return logits if self.output == "logits" else logits.argmax(1).to(self.label_type)


def export_onnx(
    model: nn.Module, info: CheckpointInfo, path: str | Path, output: Output = "labels"
) -> list[Parity]:
    """Fold a network and write it as ONNX, opset 18, with dynamic batch, height and width.

    Input ``image``: (n, 3, H, W) float32, RGB, normalised with the metadata's mean and std. Output
    ``labels``: (n, H, W) uint8 class numbers, or ``logits``: (n, classes, H, W) float32; without H and W for
    a classifier.

    Args:
        model: from `load_checkpoint`, or any network that ``info`` describes.

    Returns:
        The comparison with PyTorch at three sizes that were not traced.

    Raises:
        UserError: the network cannot be exported, the graph disagrees with PyTorch (nothing is written), or
            ``path`` cannot be written.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: the file's name must end in .onnx")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent} to write into")
    multiple = size_multiple(model)
    model = copy.deepcopy(model).cpu().eval()
    deployed = _Deployed(fold_network_deconv(model), output, len(info.classes)).eval()
    graph = _to_onnx(deployed, output, multiple)
    for key, value in graph_metadata(info, multiple, output).items():
        graph.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(graph, full_check=True)

    results = [compare(graph, model, output, shape, multiple) for shape in _CHECKED]
    failed = next((result for result in results if not result.passed), None)
    if failed is not None:
        raise UserError(
            f"{path}: not written, the graph disagrees with PyTorch at {failed.shape}: logits by "
            f"{failed.max_diff:.1e} of the largest (allowed {failed.tolerance:.1e}), "
            f"{failed.labels_differ:.2%} of labels"
        )
    write_atomically(path, lambda temporary: temporary.write_bytes(graph.SerializeToString()))
    return results


def graph_metadata(info: CheckpointInfo, multiple: int, output: Output) -> dict[str, Any]:
    """What an exported file says about itself; each value is stored as JSON under its key."""
    data = info.recipe.data
    metric = MAIN_METRIC[info.task]
    return {
        "task": info.task,
        "name": info.recipe.name,
        "architecture": info.recipe.model.architecture,
        "encoder": info.recipe.model.encoder,
        "norm": info.recipe.model.norm,
        "output": output,
        "classes": info.classes,
        "palette": info.palette,
        "ignore_index": data.ignore_index,
        "mean": data.mean,
        "std": data.std,
        "color_order": "RGB",
        "layout": "NCHW",
        "resize": data.size,
        "shorter_side": data.shorter_side,  # then, for classifiers, the central crop
        "central_crop": data.crop if data.shorter_side else None,
        "size_multiple": multiple,
        metric: info.scores.get(metric),
        "exporter": "segdeconv",
        "torch": torch.__version__,
    }


def _to_onnx(deployed: _Deployed, output: Output, multiple: int) -> onnx.ModelProto:
    dims: list[Any] = [
        torch.export.Dim("batch"),
        torch.export.Dim.STATIC,
        torch.export.Dim.DYNAMIC,
        torch.export.Dim.DYNAMIC,
    ]
    if multiple > 1:
        for axis, name in ((2, "rows"), (3, "columns")):
            dims[axis] = multiple * torch.export.Dim(name, min=1, max=1 << 12)
    height, width = (side + -side % multiple for side in _TRACED_SIZE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's notes to its own developers
            program = torch.onnx.export(
                deployed,
                (torch.randn(2, 3, height, width),),
                input_names=["image"],
                output_names=[output],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes={"image": dict(enumerate(dims))},
                verbose=False,
            )
    except Exception as error:  # the exporter raises what the traced Python raises, wrapped
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UserError(f"the network cannot be exported to ONNX: {reason}") from None
    assert program is not None
    graph = program.model_proto
    del graph.graph.value_info[:]  # symbol names of the tracer; shape inference makes them again
    names = ["batch", "", "height", "width"]
    for name, dim in zip(names, graph.graph.input[0].type.tensor_type.shape.dim, strict=True):
        if name:
            dim.dim_param = name
    outputs = graph.graph.output[0].type.tensor_type.shape.dim
    spatial = ["batch", "height", "width"] if output == "labels" else names
    for name, dim in zip(spatial, outputs, strict=False):
        if name:
            dim.dim_param = name
    return graph


def compare(
    graph: onnx.ModelProto, model: nn.Module, output: Output, shape: tuple[int, int, int], multiple: int
) -> Parity:
    """Run the graph and the network it was made from, not yet folded and in evaluation mode, on noise of
    ``shape`` (batch, height, width), rounded up to ``multiple``.

    The tolerance is `TOLERANCE`, or four times PyTorch's own float32 error against float64 where a network is
    so ill-conditioned that this is more, up to a hundred times `TOLERANCE`.
    """
    onnxruntime = import_onnxruntime()
    batch, height, width = shape[0], *(side + -side % multiple for side in shape[1:])
    shape = (batch, height, width)
    images = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"image": images.numpy()})
    with torch.inference_mode():
        logits = main_output(model(images)).numpy()
        exact = main_output(copy.deepcopy(model).double()(images.double())).numpy()
    largest = float(np.abs(logits).max())
    tolerance = min(max(TOLERANCE, 4 * float(np.abs(logits - exact).max()) / largest), 100 * TOLERANCE)
    expected = logits if output == "logits" else logits.argmax(1)
    if got.shape != expected.shape or not np.isfinite(largest):
        return Parity(shape, float("inf"), 1.0, tolerance, False)
    if output == "logits":
        max_diff = float(np.abs(got - logits).max()) / largest
        differ = float((got.argmax(1) != logits.argmax(1)).mean())
        return Parity(shape, max_diff, differ, tolerance, max_diff <= tolerance)
    second, first = np.partition(logits, -2, axis=1)[:, -2:].swapaxes(0, 1)
    wrong = got != expected
    clear = (first - second) > 2 * tolerance * largest
    return Parity(shape, float("nan"), float(wrong.mean()), tolerance, not (wrong & clear).any())
