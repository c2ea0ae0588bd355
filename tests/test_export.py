from __future__ import annotations

import collections
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from segdeconv import export
from segdeconv.checkpoint import CheckpointInfo
from segdeconv.config import load_recipe
from segdeconv.errors import UserError
from segdeconv.export import export_onnx
from segdeconv.models import build_model

CLASSES = ("a", "b", "c")


def make(name: str, norm: str = "nd") -> tuple[torch.nn.Module, CheckpointInfo]:
    """A network whose running values have seen some batches."""
    encoder = name.partition("+")[2] or None
    changes = {
        "model.architecture": name.partition("+")[0],
        "model.encoder": encoder or "null",
        "model.options": "{}",
        "model.network_deconv.block_size": 8,
        "model.norm": norm,
    }
    recipe = load_recipe("demo", [f"{key}={value}" for key, value in changes.items()])
    torch.manual_seed(0)
    model, _ = build_model(recipe.model, len(CLASSES))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 96, 96))
    task = "segmentation" if "+" in name or "lraspp" in name else "classification"
    scores = {"miou": 0.25} if task == "segmentation" else {"top1": 0.5}
    return model, CheckpointInfo(recipe, task, CLASSES, ((1, 2, 3), (4, 5, 6), (7, 8, 9)), 1, scores)


def operators(path: Path) -> collections.Counter:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", ["unet+lcnet_050", "deeplabv3plus+lcnet_050", "linknet+lcnet_050"])
def test_the_graph_is_that_of_the_batch_norm_twin(name: str, tmp_path: Path) -> None:
    """Same operators and node count, parity at every size that was not traced, nothing of whitening."""
    for norm in ("nd", "bn"):
        results = export_onnx(*make(name, norm), tmp_path / f"{norm}.onnx", "logits")
        assert [result.shape[0] for result in results] == [1, 2, 3]
        assert all(result.passed and result.max_diff <= result.tolerance for result in results)
    counts = operators(tmp_path / "nd.onnx")
    assert counts == operators(tmp_path / "bn.onnx")
    assert counts["BatchNormalization"] == 0
    assert counts["MatMul"] == 0
    graph = onnx.load(tmp_path / "nd.onnx")
    assert not any("whiten" in t.name or "running" in t.name for t in graph.graph.initializer)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(o.domain, o.version) for o in graph.opset_import if o.domain == ""] == [("", 18)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    results = export_onnx(*make("unet+lcnet_050"), path)
    assert all(np.isnan(result.max_diff) and result.labels_differ < 1e-3 for result in results)
    return path


def test_labels_come_out_as_uint8_at_any_size(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    (image,), (labels,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape) == (
        "image",
        "tensor(float)",
        ["batch", 3, "height", "width"],
    )
    assert (labels.name, labels.type, labels.shape) == (
        "labels",
        "tensor(uint8)",
        ["batch", "height", "width"],
    )
    for shape in ((1, 3, 32, 32), (2, 3, 57, 83)):
        (got,) = session.run(None, {"image": np.random.default_rng(0).random(shape, np.float32)})
        assert got.shape == (shape[0], *shape[2:])
        assert got.max() < 3


def test_metadata_is_json_and_readable_with_onnxruntime_alone(exported: Path) -> None:
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    metadata = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert metadata["classes"] == list(CLASSES)
    assert metadata["palette"] == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert (metadata["task"], metadata["output"], metadata["miou"]) == ("segmentation", "labels", 0.25)
    assert metadata["mean"] == [0.485, 0.456, 0.406]
    assert (metadata["resize"], metadata["size_multiple"]) == (list(load_recipe("demo").data.size), 1)


def test_classifier(tmp_path: Path) -> None:
    path = tmp_path / "classifier.onnx"
    export_onnx(*make("lcnet_050"), path)
    (labels,) = onnxruntime.InferenceSession(path).get_outputs()
    assert labels.shape == ["batch"]


def test_a_graph_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a graph made from other weights is caught."""
    model, info = make("unet+lcnet_050")
    made = export._to_onnx

    def wrong(deployed: torch.nn.Module, output: str, multiple: int) -> onnx.ModelProto:
        graph = made(deployed, output, multiple)
        weight = next(t for t in graph.graph.initializer if len(t.dims) == 4)
        weight.raw_data = bytes(len(weight.raw_data))
        return graph

    monkeypatch.setattr(export, "_to_onnx", wrong)
    with pytest.raises(UserError, match="not written, the graph disagrees with PyTorch"):
        export_onnx(model, info, tmp_path / "bad.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_puts_out_nan_is_not_written(tmp_path: Path) -> None:
    model, info = make("unet+lcnet_050")
    with torch.no_grad():
        model.segmentation_head[0].weight.fill_(float("nan"))
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        export_onnx(model, info, tmp_path / "nan.onnx")


def test_labels_may_differ_only_at_ties() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.logits.view(1, -1, 1, 1).expand(len(image), -1, *image.shape[2:]) + 0 * image[:, :1]

    made = export._Deployed(Fixed(torch.tensor([1.0, 1.0 + 1e-6])), "labels", 2).eval()
    graph = export._to_onnx(made, "labels", 1)

    def passes(values: list[float]) -> bool:
        return export.compare(graph, Fixed(torch.tensor(values)), "labels", (1, 8, 8), 1).passed

    assert passes([1.0 + 1e-6, 1.0])
    assert not passes([1.0 + 1e-2, 1.0])


@pytest.mark.parametrize(
    ("name", "says"), [("model.pt", "must end in .onnx"), ("nowhere/model.onnx", "no folder")]
)
def test_wrong_places(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        export_onnx(*make("unet+lcnet_050"), tmp_path / name)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    class Moody(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    _, info = make("unet+lcnet_050")
    with pytest.raises(UserError, match="cannot be exported to ONNX"):
        export_onnx(Moody(), info, tmp_path / "x.onnx")
