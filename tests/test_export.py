from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from segdeconv import export
from segdeconv.checkpoint import CheckpointInfo
from segdeconv.config import load_recipe
from segdeconv.errors import UserError
from segdeconv.export import compare, export_onnx
from segdeconv.images import central_crop, resize_image
from segdeconv.interface import Interface, Preparation, around
from segdeconv.models import build_model
from segdeconv.runtime import Segmenter

CLASSES = ("a", "b", "c")
PLAIN = Preparation((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def make(name: str, norm: str = "nd", **data: str) -> tuple[torch.nn.Module, CheckpointInfo]:
    """A network whose running values have seen some batches; ``data`` are changes of the recipe's data."""
    encoder = name.partition("+")[2] or None
    changes = {
        "model.architecture": name.partition("+")[0],
        "model.encoder": encoder or "null",
        "model.options": "{}",
        "model.network_deconv.block_size": 8,
        "model.norm": norm,
        **{f"data.{key}": value for key, value in data.items()},
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


def one_layer() -> tuple[torch.nn.Module, CheckpointInfo]:
    _, info = make("unet+tf_mobilenetv3_small_minimal_100")
    return torch.nn.Sequential(torch.nn.Conv2d(3, len(CLASSES), 3, padding=1)), info


def operators(path: Path) -> collections.Counter:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    "name",
    [f"{decoder}+tf_mobilenetv3_small_minimal_100" for decoder in ("unet", "linknet", "deeplabv3plus")],
)
def test_the_graph_is_that_of_the_batch_norm_twin(name: str, tmp_path: Path) -> None:
    """Same operators and node count, parity at every size that was not traced, nothing of whitening."""
    for norm in ("nd", "bn"):
        results = export_onnx(*make(name, norm), tmp_path / f"{norm}.onnx", Interface(("logits",)))
        assert [result.shape[0] for result in results] == [1, 2, 3]
        assert all(result.passed and result.max_diff <= result.tolerance for result in results)
    counts = operators(tmp_path / "nd.onnx")
    assert counts == operators(tmp_path / "bn.onnx")
    assert counts["BatchNormalization"] == counts["MatMul"] == 0
    graph = onnx.load(tmp_path / "nd.onnx")
    assert not any("whiten" in t.name or "running" in t.name for t in graph.graph.initializer)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [(o.domain, o.version) for o in graph.opset_import if o.domain == ""] == [("", 18)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    results = export_onnx(*make("unet+tf_mobilenetv3_small_minimal_100"), path)
    assert all(np.isnan(result.max_diff) and result.labels_differ < 1e-3 for result in results)
    return path


@pytest.mark.parametrize("preprocess", ["none", "graph"])
@pytest.mark.parametrize("static", [None, (1, 96, 128)], ids=["any size", "one size"])
def test_another_runtime_computes_the_same(
    preprocess: str, static: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    """OpenCV has no Resize with antialiasing, and a faulty one of maps of one pixel."""
    data = {"size": "[32, 48]", "crop": "null"} if preprocess == "graph" else {"size": "null"}
    path = tmp_path / "m.onnx"
    interface = Interface(("labels", "logits"), preprocess, static, portable=preprocess == "graph")
    export_onnx(*make("deeplabv3plus+tf_mobilenetv3_small_minimal_100", **data), path, interface)
    image = np.random.default_rng(0).integers(0, 256, (1, 96, 128, 3), dtype=np.uint8)
    if preprocess == "none":
        image = image.transpose(0, 3, 1, 2).astype(np.float32) / 128 - 1
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    labels, logits = session.run(["labels", "logits"], {"image": image})
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(image)
    found = dict(zip(names := network.getUnconnectedOutLayersNames(), network.forward(names), strict=True))
    np.testing.assert_allclose(found["logits"], logits, rtol=0, atol=3e-5 * np.abs(logits).max())
    assert (found["labels"] != labels).mean() < 1e-3


@pytest.mark.parametrize("static", [None, (1, 40, 64)], ids=["any size", "one size"])
def test_what_older_and_other_runtimes_cannot_read_is_left_out(
    static: tuple[int, int, int] | None, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    interface = Interface(("labels", "logits"), "graph", static, portable=True)
    export_onnx(*make("linknet+tf_mobilenetv3_small_minimal_100", size="[32, 64]"), path, interface)
    graph = onnx.load(path)
    assert graph.ir_version == 8
    assert not graph.graph.value_info
    assert [output.name for output in graph.graph.output] == ["labels", "logits"]
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
    whole = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type == onnx.TensorProto.UINT8}
    assert not whole  # TensorRT has uint8 at both ends only
    used = operators(path)
    assert "antialias" not in {a.name for node in graph.graph.node for a in node.attribute}
    if static is not None:
        assert not used.keys() & {"Shape", "Range", "Mod"}


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
    assert (metadata["task"], metadata["output"], metadata["miou"]) == ("segmentation", ["labels"], 0.25)
    assert (metadata["precision"], metadata["preprocess"], metadata["layout"]) == ("fp32", "none", "NCHW")
    assert metadata["licence"].startswith("Street scenes drawn by this package")
    assert metadata["weights_sha256"] is None  # these weights never were in a file
    assert metadata["mean"] == [0.485, 0.456, 0.406]
    assert (metadata["resize"], metadata["size_multiple"]) == (list(load_recipe("demo").data.size), 1)


def test_classifier(tmp_path: Path) -> None:
    path = tmp_path / "classifier.onnx"
    export_onnx(*make("lcnet_050"), path)
    (labels,) = onnxruntime.InferenceSession(path).get_outputs()
    assert labels.shape == ["batch"]


def change_graphs(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, change: Callable[[onnx.ModelProto], None]
) -> None:
    """Have ``module`` export networks to graphs with a change."""
    export_network = module.network_graph

    def changed(*arguments: Any) -> onnx.ModelProto:
        graph = export_network(*arguments)
        change(graph)
        return graph

    monkeypatch.setattr(module, "network_graph", changed)


def clear_first_weight(graph: onnx.ModelProto) -> None:
    weight = next(t for t in graph.graph.initializer if len(t.dims) == 4)
    weight.raw_data = bytes(len(weight.raw_data))


def test_a_graph_that_disagrees_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a graph made from other weights is caught."""
    model, info = make("unet+tf_mobilenetv3_small_minimal_100")
    change_graphs(monkeypatch, export, clear_first_weight)
    with pytest.raises(UserError, match="not written, the graph disagrees with PyTorch"):
        export_onnx(model, info, tmp_path / "bad.onnx")
    assert not list(tmp_path.iterdir())


def test_a_network_that_puts_out_nan_is_not_written(tmp_path: Path) -> None:
    model, info = one_layer()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        export_onnx(model, info, tmp_path / "nan.onnx")


def test_a_network_that_is_not_float32_is_refused(tmp_path: Path) -> None:
    model, info = make("lcnet_050")
    with pytest.raises(UserError, match=r"the network has weights in torch\.float64; give model\.float\(\)"):
        export_onnx(model.double(), info, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_labels_may_differ_only_at_ties() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self.logits = torch.nn.Parameter(logits)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.logits.view(1, -1, 1, 1).expand(len(image), -1, *image.shape[2:]) + 0 * image[:, :1]

    interface, preparation = Interface(), PLAIN
    core = export.network_graph(Fixed(torch.tensor([1.0, 1.0 + 1e-6])).eval(), interface, preparation)
    graph = around(core, interface, preparation, "segmentation", 2)

    def passes(values: list[float]) -> bool:
        model = Fixed(torch.tensor(values))
        return compare(graph, model, "segmentation", interface, preparation, (1, 8, 8)).passed

    assert passes([1.0 + 1e-6, 1.0])
    assert not passes([1.0 + 1e-2, 1.0])


@pytest.mark.parametrize(
    ("name", "says"), [("model.pt", "must end in .onnx"), ("nowhere/model.onnx", "no folder")]
)
def test_wrong_places(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        export_onnx(*make("unet+tf_mobilenetv3_small_minimal_100"), tmp_path / name)


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    class Moody(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    _, info = make("unet+tf_mobilenetv3_small_minimal_100")
    with pytest.raises(UserError, match="cannot be exported to ONNX"):
        export_onnx(Moody(), info, tmp_path / "x.onnx")


@pytest.mark.parametrize("size", [1, 2, (3, 5), 6])
def test_adaptive_pooling_at_sizes_that_were_not_traced(size: Any) -> None:
    """Sizes below and above the traced ones, divisible and not, and smaller than the bins."""

    class Pool(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.pool = torch.nn.AdaptiveAvgPool2d(size)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.pool(image) * self.weight

    pool = Pool().eval()
    graph = export.network_graph(pool, Interface(), PLAIN)
    for sides in ((12, 18), (7, 13), (301, 200), (4, 5)):
        images = torch.randn(2, 3, *sides)
        found = export._run(graph, images, ["logits"])["logits"]
        np.testing.assert_allclose(found, pool(images).detach(), atol=2e-7)


ALL = ("labels", "logits", "probabilities")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("unet+tf_mobilenetv3_small_minimal_100", "[40, 60]"),
        ("linknet+tf_mobilenetv3_small_minimal_100", "null"),
        ("linknet+tf_mobilenetv3_small_minimal_100", "[40, 60]"),
    ],
)
def test_a_graph_that_prepares_pictures_is_the_runtime(name: str, size: str, tmp_path: Path) -> None:
    """Pictures of any size in, labels of that size out: those that Segmenter makes with Pillow and numpy.

    Pillow rounds resized pictures to whole grey levels, the graph does not, so those differ by one at most.
    """
    model, info = make(name, size=size)
    results = export_onnx(model, info, tmp_path / "graph.onnx", Interface(ALL, "graph"))
    assert [result.shape for result in results] == [(1, 192, 128), (2, 131, 163), (3, 160, 224)]
    export_onnx(model, info, tmp_path / "none.onnx", Interface(ALL))
    graph = onnx.load(tmp_path / "graph.onnx")
    both = {way: Segmenter(tmp_path / f"{way}.onnx", "cpu") for way in ("graph", "none")}
    rng = np.random.default_rng(0)
    for height, width in ((64, 96), (51, 77), (210, 130)):
        coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = resize_image(coarse, (height, width))
        planes = export._run(graph, torch.tensor(picture[None]), ["planes"])["planes"]
        resized = resize_image(picture, info.recipe.data.size)
        want = both["none"].preprocess(resized[None])
        off = np.abs(planes - want).max() * 255 * max(info.recipe.data.std)
        assert off <= (1.01 if size != "null" else 0)
        if size == "null":
            assert (both["graph"](picture) != both["none"](picture)).mean() <= 1e-3
        found = dict(zip(ALL, both["graph"].session.run(None, {"image": picture[None]}), strict=True))
        assert {name: value.shape for name, value in found.items()} == {
            "labels": (1, height, width),
            "logits": (1, 3, height, width),
            "probabilities": (1, 3, height, width),
        }
        assert found["probabilities"].sum(1) == pytest.approx(1, abs=1e-5)


def test_a_classifier_that_crops_pictures(tmp_path: Path) -> None:
    model, info = make("lcnet_050", size="null", crop="[48, 40]", shorter_side="52")
    path = tmp_path / "graph.onnx"
    results = export_onnx(model, info, path, Interface(("labels", "logits"), "graph"))
    assert all(result.passed for result in results)
    export_onnx(model, info, tmp_path / "none.onnx", Interface(("logits",)))
    session, plain = onnxruntime.InferenceSession(path), Segmenter(tmp_path / "none.onnx", "cpu")
    assert [o.shape for o in session.get_outputs()] == [["batch"], ["batch", 3]]
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    for side in ((70, 90), (91, 68), (48, 300)):
        picture = resize_image(coarse, side)
        _, logits = session.run(None, {"image": picture[None]})
        want = plain.infer(plain.preprocess(central_crop(picture, 52, (48, 40))[None]))
        assert logits == pytest.approx(want, abs=float(0.02 * np.abs(want).max()))  # Pillow rounds


@pytest.mark.parametrize("preprocess", ["none", "graph"])
def test_static_graphs(preprocess: Any, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    shape = (2, 64, 96) if preprocess == "none" else (2, 50, 70)
    (result,) = export_onnx(
        *make("linknet+tf_mobilenetv3_small_minimal_100", size="null"),
        path,
        Interface(ALL, preprocess, shape),
    )
    assert result.shape == shape
    session = onnxruntime.InferenceSession(path)
    batch, height, width = shape
    image = [batch, 3, height, width] if preprocess == "none" else [batch, height, width, 3]
    assert session.get_inputs()[0].shape == image
    assert [o.shape for o in session.get_outputs()] == [
        [batch, height, width],
        [batch, 3, height, width],
        [batch, 3, height, width],
    ]
    pictures = np.random.default_rng(0).integers(0, 256, (3, *shape[1:], 3), dtype=np.uint8)
    assert Segmenter(path, "cpu")(pictures).shape == (3, height, width)


def test_another_opset(tmp_path: Path) -> None:
    export_onnx(
        *make("unet+tf_mobilenetv3_small_minimal_100"),
        tmp_path / "m.onnx",
        Interface(preprocess="graph", opset=20),
    )
    assert [(o.domain, o.version) for o in onnx.load(tmp_path / "m.onnx").opset_import] == [("", 20)]


def test_the_name_of_a_graph_is_of_its_weights(tmp_path: Path) -> None:
    """What caches engines by the graph's name never mixes two."""

    def name(model: torch.nn.Module, interface: Interface | None = None) -> str:
        export_onnx(model, info, tmp_path / "m.onnx", interface)
        return onnx.load(tmp_path / "m.onnx").graph.name

    model, info = one_layer()
    first = name(model)
    assert first == name(model)
    assert first.startswith("demo_nd_")
    assert name(model, Interface(("logits",))) != first
    with torch.no_grad():
        model[0].bias[0] += 1e-3
    assert name(model) != first


@pytest.mark.parametrize("what", ["mean", "size_multiple", "resize"])
def test_a_wrong_preparation_is_caught(what: str) -> None:
    model, info = make("linknet+tf_mobilenetv3_small_minimal_100", size="[40, 60]")
    interface = Interface(preprocess="graph")
    right = export.preparation_of(info, model)
    wrong = {"mean": (0.485, 0.456, 0.4), "size_multiple": 128, "resize": (40, 62)}
    changed = dataclasses.replace(right, **{what: wrong[what]})
    core = export.network_graph(model.eval(), interface, right)
    graph = around(core, interface, changed, "segmentation", 3)
    assert not compare(graph, model, "segmentation", interface, right, (1, 50, 70)).passed


def test_other_classes_than_the_network_has(tmp_path: Path) -> None:
    model, info = make("unet+tf_mobilenetv3_small_minimal_100")
    for change in ({"classes": ("a", "b"), "palette": info.palette[:2]}, {"task": "classification"}):
        with pytest.raises(UserError, match="not written, the network puts out"):
            export_onnx(model, dataclasses.replace(info, **change), tmp_path / "m.onnx")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"outputs": ("masks",)}, "--output masks: expected some of labels, logits, probabilities"),
        ({"outputs": ("labels", "labels")}, "each once"),
        ({"outputs": ()}, "--output : expected"),
        ({"outputs": "labels"}, "expected a tuple"),
        ({"preprocess": "Graph"}, "--preprocess Graph: expected none or graph"),
        ({"static": (1, 0, 64)}, "--static 1,0,64"),
        ({"static": (64, 64)}, "--static 64,64: expected three"),
        ({"static": (1, 64.0, 64)}, "--static 1,64.0,64: expected three whole"),
        ({"opset": 17}, "--opset 17: expected 18 to"),
    ],
)
def test_wrong_interfaces(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Interface(**settings)


def test_a_static_size_that_the_network_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--static 1,50,64: this network takes multiples of 32 pixels"):
        export_onnx(
            *make("linknet+tf_mobilenetv3_small_minimal_100"),
            tmp_path / "m.onnx",
            Interface(static=(1, 50, 64)),
        )


def test_graphs_beyond_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before protobuf fails on them."""
    monkeypatch.setattr(export, "_LARGEST", 1000)
    monkeypatch.setattr(export, "around", lambda *_: pytest.fail("too late"))
    with pytest.raises(UserError, match="2 GB or more"):
        export_onnx(*make("unet+tf_mobilenetv3_small_minimal_100"), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_operators_beyond_onnx_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, info = make("unet+tf_mobilenetv3_small_minimal_100")

    def use_foreign_operator(graph: onnx.ModelProto) -> None:
        graph.graph.node[3].domain = "com.microsoft"

    change_graphs(monkeypatch, export, use_foreign_operator)
    with pytest.raises(UserError, match="operators beyond ONNX's own: "):
        export_onnx(model, info, tmp_path / "m.onnx")


def test_nothing_of_the_machine_is_in_the_file(exported: Path) -> None:
    content = exported.read_bytes()
    assert b"site-packages" not in content
    assert str(Path(export.__file__).parent).encode() not in content


def test_a_graph_of_one_size_that_resizes(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    export_onnx(
        *make("unet+tf_mobilenetv3_small_minimal_100", size="[32, 64]"),
        path,
        Interface(preprocess="graph", static=(1, 50, 70)),
    )
    segmenter = Segmenter(path, "cpu")
    assert segmenter(np.zeros((50, 70, 3), np.uint8)).shape == (50, 70)
    with pytest.raises(UserError, match=r"resizes pictures of \(50, 70\) only, not of \(40, 70\)"):
        segmenter(np.zeros((40, 70, 3), np.uint8))


def test_no_logits_and_one_class(tmp_path: Path) -> None:
    """Nothing to divide by, and nothing to compare with."""

    class Zero(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, 3, 1, 1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.conv2d(image, self.weight)

    _, info = make("unet+tf_mobilenetv3_small_minimal_100")
    info = dataclasses.replace(info, classes=("only",), palette=((1, 2, 3),))
    results = export_onnx(Zero(), info, tmp_path / "m.onnx", Interface(ALL))
    assert all(result.passed and result.max_diff == 0 for result in results)
