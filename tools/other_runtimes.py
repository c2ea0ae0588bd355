"""Whether exported graphs give elsewhere what they give in onnxruntime: prints a table in Markdown.

    pip install openvino
    python tools/other_runtimes.py model.onnx another.onnx --image photo.jpg

Runs every graph on the picture in OpenVINO and OpenCV, those that are installed, and compares labels and
scores with onnxruntime's. OpenVINO computes in float32, as onnxruntime does; its default is bfloat16 where
the machine has it. Graphs made with --preprocess graph are to be made with --portable too.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segdeconv.errors import UserError, first_line, one_sentence
from segdeconv.images import read_rgb, resize_image
from segdeconv.markdown import markdown_table
from segdeconv.runtime import Segmenter

Answers = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("graphs", nargs="+", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    args = parser.parse_args()
    installed = {name: run for name, run in RUNTIMES.items() if importlib.util.find_spec(name)}
    if not installed:
        raise UserError(f"none of {', '.join(RUNTIMES)} is installed; pip install openvino")
    rows = []
    for graph in args.graphs:
        segmenter = Segmenter(graph, "cpu")
        fed = _input(segmenter, args.image)
        names = [output.name for output in segmenter.session.get_outputs()]
        expected: Answers = dict(zip(names, segmenter.session.run(names, {"image": fed}), strict=True))
        for name, run in installed.items():
            try:
                rows.append((graph.stem, name, *_compared(run(graph, fed), expected)))
            except Exception as error:  # each has classes of its own
                rows.append((graph.stem, name, first_line(error)[:100], ""))
    print(markdown_table(["graph", "runtime", "equal labels", "largest difference of scores"], rows), end="")


def _input(segmenter: Segmenter, path: Path) -> NDArray[Any]:
    """What the graph takes, of a picture."""
    image = read_rgb(path)
    if segmenter.size is not None:
        image = resize_image(image, segmenter.size)
    return (
        image[None] if segmenter.metadata.get("preprocess") == "graph" else segmenter.preprocess(image[None])
    )


def _compared(found: Answers, expected: Answers) -> tuple[str, str]:
    same, apart = "", 0.0
    for name, values in expected.items():
        if name == "labels":
            same = f"{(found[name].reshape(values.shape) == values).mean():.3%}"
        else:
            wanted = values.astype(np.float64)
            apart = max(apart, float(np.abs(found[name] - wanted).max() / np.abs(wanted).max()))
    return same, f"{apart:.0e}" if len(expected) > bool(same) else ""


def _openvino(graph: Path, fed: NDArray[Any]) -> Answers:
    import openvino

    model = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answers = model([fed])
    return {name: answers[output] for output in model.outputs for name in output.names}


def _opencv(graph: Path, fed: NDArray[Any]) -> Answers:
    import cv2

    network = cv2.dnn.readNetFromONNX(str(graph))
    network.setInput(fed)
    names = network.getUnconnectedOutLayersNames()
    return dict(zip(names, network.forward(names), strict=True))


RUNTIMES: dict[str, Callable[[Path, NDArray[Any]], Answers]] = {"openvino": _openvino, "cv2": _opencv}

if __name__ == "__main__":
    with one_sentence():
        main()
