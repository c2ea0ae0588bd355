"""Where the nodes of a graph run: onnxruntime's own profile of one run, by execution provider.

The profile sees the graph as onnxruntime runs it: fused, partitioned, and with the memory copies it put in,
which its list of assigned nodes (``get_provider_graph_assignment_info``, since 1.24) does not have.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segdeconv.errors import UserError, first_line
from segdeconv.markdown import markdown_table
from segdeconv.runtime import CPU, TYPES, import_onnxruntime, open_session

_DEFAULT_SIDE = 256  # pixels, where a graph takes any height and width
_SHAPE_NUMBERS = 16  # what puts out no more numbers than this computes shapes


@dataclass(frozen=True)
class Placement:
    """Nodes of a graph by execution provider.

    Attributes:
        nodes: execution provider -> operator -> number of nodes, memory copies left out.
        shape_nodes: of the CPU's nodes, those that compute shapes: onnxruntime keeps them there on purpose.
        copies: memory copies between the CPU and the accelerator, by operator.
        why_cpu: why the session has no accelerator; empty where it has one.
    """

    nodes: dict[str, Counter[str]]
    shape_nodes: Counter[str]
    copies: Counter[str]
    why_cpu: str = ""

    @property
    def off_accelerator(self) -> Counter[str]:
        """Operators that compute on the CPU."""
        return self.nodes.get(CPU, Counter()) - self.shape_nodes


def read_profile(events: Iterable[dict[str, Any]], why_cpu: str = "") -> Placement:
    """Count the nodes in the events of an onnxruntime profile of one run."""
    nodes: dict[str, Counter[str]] = {}
    shapes: Counter[str] = Counter()
    copies: Counter[str] = Counter()
    for event in events:
        details = event.get("args", {})
        if event.get("cat") != "Node" or "provider" not in details:
            continue
        operator = details["op_name"]
        if operator.startswith("Memcpy"):
            copies[operator] += 1
            continue
        nodes.setdefault(details["provider"], Counter())[operator] += 1
        if details["provider"] == CPU and _is_small(details.get("output_type_shape", [])):
            shapes[operator] += 1
    return Placement(nodes, shapes, copies, why_cpu)


def _is_small(outputs: list[dict[str, list[int]]]) -> bool:
    shapes = [shape for output in outputs for shape in output.values()]
    return all(len(shape) <= 1 and int(np.prod(shape)) <= _SHAPE_NUMBERS for shape in shapes)


def placement(
    path: str | Path, device: str = "auto", allow_cpu: bool = False, size: tuple[int, int] | None = None
) -> Placement:
    """Run a graph once, on a black picture, and say where its nodes ran.

    Args:
        path: an ONNX file with one image as its input, made by segdeconv or not.
        device: as `segdeconv.runtime.open_session` takes it.
        allow_cpu: the same.
        size: height and width of the picture; by default the graph's own, or 256 each.

    Raises:
        UserError: the session cannot be had, or the graph does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = import_onnxruntime().SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session, _, why_cpu = open_session(path, device, allow_cpu, options)
        for source in session.get_inputs():
            if source.type not in TYPES or len(source.shape) != 4:
                raise UserError(
                    f"{path}: its input {source.name} is {source.type} {source.shape}; expected pictures, "
                    "floats or bytes with four axes"
                )
        pictures = {source.name: _black(source, size) for source in session.get_inputs()}
        try:
            session.run(None, pictures)
        except Exception as error:  # onnxruntime raises its own unrelated classes
            raise UserError(f"{path}: does not run ({first_line(error)}); try another --size") from None
        finally:
            profile = session.end_profiling()
        try:
            events = json.loads(Path(profile).read_text())
        except ValueError:
            raise UserError(f"{profile}: is cut short; is there room in {tempfile.gettempdir()}?") from None
    if not why_cpu and device == "cpu":
        why_cpu = "--device cpu asked for it"
    return read_profile(events, why_cpu)


def _black(source: Any, size: tuple[int, int] | None) -> np.ndarray:
    """Zeros that suit an input (n, C, H, W), or (n, H, W, C)."""
    kind = TYPES[source.type]
    rows, columns = size or (_DEFAULT_SIDE, _DEFAULT_SIDE)
    free = (1, rows, columns, 3) if kind is np.uint8 else (1, 3, rows, columns)
    shape = [s if isinstance(s, int) else f for s, f in zip(source.shape, free, strict=True)]
    if size is not None and (rows, columns) not in (tuple(shape[1:3]), tuple(shape[2:])):
        raise UserError(f"--size {rows},{columns}: the graph takes {tuple(shape)} only")
    return np.zeros(shape, kind)


def table(found: Placement) -> str:
    """A Markdown table: execution provider, nodes, operators."""
    counted = {**found.nodes, "memory copies": found.copies}
    rows = [(name, operators.total(), _listed(operators)) for name, operators in counted.items()]
    return markdown_table(("execution provider", "nodes", "operators"), rows)


def _listed(operators: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in operators.most_common())
