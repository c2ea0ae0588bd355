from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import Call
from onnx import TensorProto, helper

from segdeconv.errors import UserError
from segdeconv.placement import placement, read_profile, table

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def event(operator: str, provider: str, kind: str, *shape: int) -> dict[str, Any]:
    outputs = [{kind: list(shape)}]
    return {"cat": "Node", "args": {"op_name": operator, "provider": provider, "output_type_shape": outputs}}


def test_a_profile_with_an_accelerator() -> None:
    """Shape arithmetic belongs on the CPU, a resize does not; copies are counted apart."""
    events = [
        {"cat": "Session", "name": "model_loading_uri", "args": {}},
        event("Conv", CUDA, "float", 1, 3, 64, 96),
        event("Conv", CUDA, "float", 1, 3, 64, 96),
        event("Shape", CPU, "int64", 4),
        event("Gather", CPU, "int64"),
        event("MemcpyToHost", CUDA, "float", 1, 3, 64, 96),
        event("Resize", CPU, "float", 1, 3, 128, 192),
        event("MemcpyFromHost", CUDA, "float", 1, 3, 128, 192),
    ]
    found = read_profile(events)
    assert found.nodes == {CUDA: {"Conv": 2}, CPU: {"Shape": 1, "Gather": 1, "Resize": 1}}
    assert found.copies == {"MemcpyToHost": 1, "MemcpyFromHost": 1}
    assert found.off_accelerator == {"Resize": 1}
    assert "| CUDAExecutionProvider | 2 | Conv 2 |" in table(found)
    assert read_profile(events[:5]).off_accelerator == {}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Relu of a picture, and its shape."""
    sides = ["n", 3, "h", "w"]
    made = helper.make_graph(
        [helper.make_node("Relu", ["image"], ["out"]), helper.make_node("Shape", ["image"], ["shape"])],
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, sides)],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, sides),
            helper.make_tensor_value_info("shape", TensorProto.INT64, [4]),
        ],
    )
    path = tmp_path / "relu.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def test_on_the_cpu(graph: Path) -> None:
    found = placement(graph, "cpu")
    assert found.nodes == {CPU: {"Relu": 1, "Shape": 1}}
    assert found.off_accelerator == {"Relu": 1}
    assert found.copies == {}
    assert found.why_cpu
    assert {path.name for path in graph.parent.iterdir()} == {"relu.onnx"}  # no profile is left behind


def test_a_size_that_the_graph_has_not(graph: Path) -> None:
    made = onnx.load(graph)
    for side, size in zip(made.graph.input[0].type.tensor_type.shape.dim[2:], (30, 50), strict=True):
        side.dim_value = size
    onnx.save(made, graph)
    assert placement(graph, "cpu", size=(30, 50)).nodes
    with pytest.raises(UserError, match=r"--size 32,32: the graph takes \(1, 3, 30, 50\) only"):
        placement(graph, "cpu", size=(32, 32))


def test_a_graph_that_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_text("hello")
    with pytest.raises(UserError, match=r"x.onnx: onnxruntime cannot load it"):
        placement(tmp_path / "x.onnx", "cpu")


@pytest.mark.parametrize(
    ("kind", "sides", "said"),
    [
        (TensorProto.FLOAT, ["n", "features"], r"input x is tensor\(float\) \['n', 'features'\]"),
        (TensorProto.INT64, ["n", 3, "h", "w"], r"input x is tensor\(int64\)"),
    ],
)
def test_a_graph_that_reads_no_pictures(kind: int, sides: list[Any], said: str, tmp_path: Path) -> None:
    value = [helper.make_tensor_value_info(name, kind, sides) for name in ("x", "out")]
    made = helper.make_graph([helper.make_node("Identity", ["x"], ["out"])], "g", value[:1], value[1:])
    path = tmp_path / "rows.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    with pytest.raises(UserError, match=rf"rows.onnx: its {said}.*; expected pictures"):
        placement(path, "cpu")


@pytest.mark.parametrize(("option", "code"), [([], 0), (["--strict"], 1)])
def test_strict(option: list[str], code: int, graph: Path, call: Call) -> None:
    stopped, out, _ = call("placement", graph, "--device", "cpu", *option)
    assert stopped == code
    assert "| CPUExecutionProvider | 2 |" in out
