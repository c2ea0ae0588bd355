"""What goes into an exported graph and what comes out: standard ONNX operators around a folded network.

The network's own graph takes normalised planes and puts out logits. `around` puts before it, where asked for,
what `segdeconv.images` and `segdeconv.runtime` do to a picture, and after it what is wanted of the logits.
Which operators the network itself becomes is torch's business, in export.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper

from segdeconv.errors import UserError

Output = Literal["labels", "logits", "probabilities"]

OPSET = 18  # later opsets put Resize on the CPU in many CUDA builds of onnxruntime
_OPSETS = (18, 23)


@dataclass(frozen=True)
class Interface:
    """The outside of an exported graph.

    Attributes:
        outputs: ``labels``: class numbers uint8 (int32 above 256 classes); ``logits``; ``probabilities``.
        preprocess: ``none`` takes ``image`` (n, 3, H, W), normalised as the metadata says, with sides that
            are multiples of ``size_multiple``. ``graph`` takes RGB (n, H, W, 3) uint8 of any size, and
            resizes or pads and normalises it itself; all outputs then have the size of the picture.
        static: batch, height and width of ``image``, where they are to be fixed.
        opset: version of ONNX's operators.
        portable: of ``graph``: resize by two products of matrices, for other runtimes than onnxruntime.
            Resize with antialiasing, much faster there on large pictures, is refused by TensorRT and computed
            otherwise by OpenVINO and OpenCV, without a word.

    Raises:
        UserError: an output is named twice or not known, or a number makes no sense.
    """

    outputs: tuple[Output, ...] = ("labels",)
    preprocess: Literal["none", "graph"] = "none"
    static: tuple[int, int, int] | None = None
    opset: int = OPSET
    portable: bool = False

    def __post_init__(self) -> None:
        known = ("labels", "logits", "probabilities")
        if isinstance(self.outputs, str):
            raise UserError(f"outputs = {self.outputs!r}: expected a tuple, such as ({self.outputs!r},)")
        if self.preprocess not in ("none", "graph"):
            raise UserError(f"--preprocess {self.preprocess}: expected none or graph")
        if self.portable and self.preprocess != "graph":
            raise UserError("--portable goes with --preprocess graph; other graphs are so anyway")
        named = ",".join(self.outputs)
        once = len(set(self.outputs)) == len(self.outputs)
        if not self.outputs or not once or set(self.outputs) - set(known):
            raise UserError(f"--output {named}: expected some of {', '.join(known)}, each once")
        if self.static is not None and (
            len(self.static) != 3 or not all(isinstance(size, Integral) and size > 0 for size in self.static)
        ):
            text = ",".join(map(str, self.static))
            raise UserError(
                f"--static {text}: expected three whole numbers of at least 1, such as 1,512,1024"
            )
        if self.static is not None and math.prod(self.static) > 2**30:
            raise UserError(
                f"--static {','.join(map(str, self.static))}: expected 2**30 pixels in all at most"
            )
        if not _OPSETS[0] <= self.opset <= _OPSETS[1]:
            raise UserError(f"--opset {self.opset}: expected {_OPSETS[0]} to {_OPSETS[1]}")


@dataclass(frozen=True)
class Preparation:
    """How pictures are brought to a network, as a recipe says; see `segdeconv.config.DataConfig`.

    Attributes:
        resize: height and width, or None.
        shorter_side, central_crop: of classifiers: first the one, then the other; both or neither.
        size_multiple: what the sides of the network's input are padded to, right and below.
        mean, std: in units of 0 to 1.
    """

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size_multiple: int = 1
    resize: tuple[int, int] | None = None
    shorter_side: int | None = None
    central_crop: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """Height and width before padding, where they do not depend on the picture."""
        return self.central_crop or self.resize

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """What the network itself gets of a picture of this size."""
        rows, columns = self.size or (height, width)
        return rows + -rows % self.size_multiple, columns + -columns % self.size_multiple


def around(
    core: onnx.ModelProto, interface: Interface, preparation: Preparation, task: str, num_classes: int
) -> onnx.ModelProto:
    """The whole graph, from a network's that takes ``image`` and puts out ``logits``.

    Types are the network's own: a network in float16 takes and gives float16.
    """
    made = onnx.ModelProto()
    made.CopyFrom(core)
    graph = made.graph
    float_type = graph.input[0].type.tensor_type.elem_type
    label_type = TensorProto.UINT8 if num_classes <= 256 else TensorProto.INT32
    raw, segments = interface.preprocess == "graph", task == "segmentation"
    before, after = _Nodes("prepare"), _Nodes("answer")
    if raw:
        _rename(graph, "image", "planes")
        _prepare(before, preparation, float_type, interface.portable)
    padded = raw and segments and preparation.size_multiple > 1
    resized = raw and segments and preparation.size is not None
    if padded or resized:
        _rename(graph, "logits", "scores")
    _answer(after, interface.outputs, label_type, padded, resized)

    nodes = [*before.nodes, *graph.node, *after.nodes]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*before.constants, *after.constants])
    batch, height, width = map(int, interface.static) if interface.static else ("batch", "height", "width")
    shape = [batch, height, width, 3] if raw else [batch, 3, height, width]
    kind = TensorProto.UINT8 if raw else float_type
    graph.input.append(helper.make_tensor_value_info("image", kind, shape))
    sides = [height, width] if segments else []
    for output in interface.outputs:
        kind, channels = (label_type, []) if output == "labels" else (float_type, [num_classes])
        graph.output.append(helper.make_tensor_value_info(output, kind, [batch, *channels, *sides]))
    return made


class _Nodes:
    """Nodes of one output each, and their constants, as they are added."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Append a node; its output is called ``name``, or by prefix and number."""
        name = name or f"{self.prefix}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [name], f"{self.prefix}/{name}", **attributes))
        return name

    def resize(self, value: str, size: str, name: str = "", **how: Any) -> str:
        """A map (n, C, H, W) at ``size``, which holds height and width."""
        # All four sides, since onnxruntime's layout optimiser mistakes the axes of two (seen in 1.32).
        sides = self.add("Concat", self.add("Shape", value, end=2), size, axis=0)
        return self.add("Resize", value, "", "", sides, name=name, **how)

    def resize_by_products(self, value: str, size: str) -> str:
        """`resize` with antialiasing, as a product with a matrix from either side."""
        down, across = (self._triangles(value, size, axis) for axis in (0, 1))
        return self.add("MatMul", self.add("MatMul", down, value), self.add("Transpose", across, perm=[1, 0]))

    def _triangles(self, value: str, size: str, axis: int) -> str:
        """The matrix (wanted, length) that resizes an axis: its rows are triangles about the wanted
        pixels' centres, as wide as the scale and at least one pixel, and sum to one.
        """
        add, one = self.add, self.floats([1])
        length = add("Shape", value, start=2 + axis, end=3 + axis)
        wanted = add("Slice", size, self.ints([axis]), self.ints([axis + 1]))
        scale = add("Div", *(add("Cast", count, to=TensorProto.FLOAT) for count in (length, wanted)))
        wanted, places = (
            add("Add", add("Cast", self._range(count), to=TensorProto.FLOAT), self.floats([0.5]))
            for count in (wanted, length)
        )
        centres = add("Unsqueeze", add("Mul", wanted, scale), self.ints([1]))
        away = add("Abs", add("Sub", places, centres))
        weights = add("Relu", add("Sub", one, add("Div", away, add("Max", scale, one))))
        return add("Div", weights, add("ReduceSum", weights, self.ints([1])))

    def _range(self, count: str) -> str:
        zero, one = (self._constant(TensorProto.INT64, [], [number]) for number in (0, 1))
        return self.add("Range", zero, self.add("Squeeze", count), one)

    def ints(self, values: Sequence[int]) -> str:
        return self._constant(TensorProto.INT64, [len(values)], values)

    def floats(self, values: Sequence[float], *dims: int) -> str:
        return self._constant(TensorProto.FLOAT, dims, values)

    def _constant(self, kind: int, dims: Sequence[int], values: Sequence[float]) -> str:
        name = f"{self.prefix}_constant_{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, kind, dims, values))
        return name


def _prepare(nodes: _Nodes, preparation: Preparation, float_type: int, portable: bool) -> None:
    """From ``image`` (n, H, W, 3) uint8 to ``planes``; ``prepared_size`` is their size before padding."""
    add = nodes.add
    pixels = add("Transpose", add("Cast", "image", to=TensorProto.FLOAT), perm=[0, 3, 1, 2])  # see labels
    size = nodes.ints(preparation.resize) if preparation.resize is not None else ""
    if preparation.shorter_side is not None:
        whole = add("Shape", pixels, start=2)
        shorter = add("ReduceMin", whole, keepdims=1)
        size = add("Div", add("Mul", whole, nodes.ints([preparation.shorter_side])), shorter)
    if size:  # Pillow's bilinear filter, but for Pillow's rounding to whole numbers between the axes
        if portable:
            pixels = nodes.resize_by_products(pixels, size)
        else:
            pixels = nodes.resize(pixels, size, mode="linear", antialias=1, exclude_outside=1)
    if preparation.central_crop is not None:
        crop = nodes.ints(preparation.central_crop)
        spare = add("Cast", add("Sub", size, crop), to=TensorProto.FLOAT)
        half = add("Round", add("Mul", spare, nodes.floats([0.5], 1)))  # to even, as Python's round
        start = add("Cast", half, to=TensorProto.INT64)
        pixels = add("Slice", pixels, start, add("Add", start, crop), nodes.ints([2, 3]))
    for operator, values in (("Sub", preparation.mean), ("Div", preparation.std)):
        scaled = np.array(values, np.float32) * 255  # to the last bit what runtime.Segmenter takes
        pixels = add(operator, pixels, nodes.floats(scaled.tolist(), 1, 3, 1, 1))
    add("Shape", pixels, start=2, name="prepared_size")
    if preparation.size_multiple > 1:
        multiple = nodes.ints([preparation.size_multiple])  # of no negative number: runtimes differ there
        missing = add("Mod", add("Sub", multiple, add("Mod", "prepared_size", multiple)), multiple)
        pixels = add("Pad", pixels, add("Concat", nodes.ints([0] * 6), missing, axis=0))
    add("Cast", pixels, to=float_type, name="planes")


def _answer(nodes: _Nodes, outputs: Sequence[Output], label_type: int, padded: bool, resized: bool) -> None:
    """From the network's logits to ``outputs``. If they are ``padded``, or of a ``resized`` picture, they are
    called ``scores``, and ``logits`` are made of them.
    """
    add = nodes.add
    scores = "scores" if padded or resized else "logits"
    if padded:
        inner = "" if resized else "logits"
        scores = add("Slice", scores, nodes.ints([0, 0]), "prepared_size", nodes.ints([2, 3]), name=inner)
    for output in outputs:
        value, name = scores, "" if resized else output
        if output == "labels":
            # TensorRT has uint8 at the ends of a graph alone, and makes it of floats alone.
            value = add("Cast", add("ArgMax", scores, axis=1, keepdims=int(resized)), to=TensorProto.FLOAT)
        elif output == "probabilities":
            value = add("Softmax", scores, axis=1, name=name)
        if resized:
            size = add("Shape", "image", start=1, end=3)
            if output == "labels":  # the nearest neighbour that images.resize_labels takes
                how = {"mode": "nearest", "nearest_mode": "round_prefer_ceil"}
                value = add("Squeeze", nodes.resize(value, size, **how), nodes.ints([1]))
            else:
                nodes.resize(value, size, name=output, mode="linear")
        if output == "labels":
            add("Cast", value, to=label_type, name=output)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new
