from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import Call
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_export import change_graphs, clear_first_weight, make

from segdeconv import precision
from segdeconv.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from segdeconv.data import EvalSet, open_samples
from segdeconv.errors import Refused, UserError
from segdeconv.evaluate import evaluate_run
from segdeconv.export import preparation_of
from segdeconv.interface import Interface
from segdeconv.models import build_model
from segdeconv.placement import placement
from segdeconv.precision import Gates, export_smaller, summary
from segdeconv.runtime import Segmenter

NO_GATES = Gates(max_drop=1.0, min_speedup=0.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the toy set, its network not trained."""
    folder = tmp_path_factory.mktemp("run")
    recipe = make(
        "linknet+tf_mobilenetv3_small_minimal_100",
        size="[32, 64]",
        crop="null",
        scale="[1, 1]",
        count="[12, 4]",
    )[1].recipe
    samples = open_samples(recipe.data, "val")
    model, _ = build_model(recipe.model, len(samples.classes))
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(4, 3, 64, 64))
    info = CheckpointInfo(recipe, "segmentation", samples.classes, samples.palette, 1, {})
    save_checkpoint(folder / "best.safetensors", model, info)
    return folder


def test_int8(run: Path, tmp_path: Path) -> None:
    """What the file does is what was reported, and it is int8 with a scale a channel."""
    path = tmp_path / "int8.onnx"
    found = export_smaller(run, path, "int8", Interface(preprocess="graph"), NO_GATES)
    assert found.before == pytest.approx(evaluate_run(run)["miou"], abs=1e-3)
    assert found.after == evaluate_run(run, onnx=path)["miou"]
    assert list(found.ranges) == sorted(found.ranges, key=lambda way: found.ranges[way])
    assert set(found.ranges) == {"MinMax", "Percentile", "Entropy"}
    assert all(0 < share < 0.2 for share in found.ranges.values())
    assert found.megabytes[1] < 0.5 * found.megabytes[0]
    assert found.in_float == ()
    graph = onnx.load(path)
    assert {node.domain for node in graph.graph.node} == {""}
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    weights = [tensor for name, tensor in tensors.items() if name.endswith("weight_quantized")]
    assert len(weights) == found.layers
    assert {tensor.data_type for tensor in weights} == {TensorProto.INT8}
    for weight in weights:
        scale = tensors[weight.name.replace("_quantized", "_scale")]
        assert list(scale.dims) in (
            [weight.dims[0]],
            [weight.dims[1]],
        )  # one a channel, transposed ones by row
    segmenter = Segmenter(path, "cpu")
    assert segmenter.metadata["precision"] == "int8"
    assert segmenter.metadata["miou"] == found.after
    assert segmenter(np.zeros((33, 70, 3), np.uint8)).shape == (33, 70)
    lines = "\n".join(summary(found))
    assert f"int8 {found.after:.4f}" in lines
    assert f"0 of {found.layers} layers" in lines


@pytest.mark.parametrize("half_io", [False, True])
def test_fp16(half_io: bool, run: Path, tmp_path: Path) -> None:
    path = tmp_path / "fp16.onnx"
    found = export_smaller(run, path, "fp16", Interface(("labels", "logits")), NO_GATES, half_io)
    assert abs(found.before - found.after) < 0.01
    assert found.after == evaluate_run(run, onnx=path)["miou"]
    assert found.megabytes[1] < 0.6 * found.megabytes[0]
    graph = onnx.load(path).graph
    weights = [tensor for tensor in graph.initializer if len(tensor.dims) == 4]
    assert {tensor.data_type for tensor in weights} == {TensorProto.FLOAT16}
    outside = TensorProto.FLOAT16 if half_io else TensorProto.FLOAT
    assert graph.input[0].type.tensor_type.elem_type == outside
    assert graph.output[1].type.tensor_type.elem_type == outside
    picture = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    assert Segmenter(path, "cpu", window=(32, 32))(picture).shape == (40, 70)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--max-drop", "-1"],
            r"fp16 brings miou from 0\.\d+ to 0\.\d+, a drop of more than --max-drop -1.0",
        ),
        (["--min-speedup", "1000"], r"times as fast as fp32 on cpu, less than --min-speedup 1000.0"),
    ],
)
def test_what_is_not_worth_it_is_refused(
    options: list[str],
    says: str,
    run: Path,
    tmp_path: Path,
    call: Call,
) -> None:
    """Exit code 3, the figures, and no file."""
    out = tmp_path / "m.onnx"
    code, _, error = call("export", run, "--fp16", "--out", out, "--device", "cpu", *options)
    assert code == 3
    assert error.count("\n") == 1
    assert re.search(says, error)
    assert not list(tmp_path.iterdir())


def test_what_is_worth_it_is_written(run: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "m.onnx"
    gates = ("--max-drop", "1", "--min-speedup", "0")
    code, said, error = call("export", run, "--fp16", "--out", out, "--device", "cpu", *gates)
    assert (code, error) == (0, "")
    assert f"wrote {out}; next: segdeconv predict {out}" in said
    assert out.exists()


def test_both_gates_hold_in_python(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="not written"):
        export_smaller(run, tmp_path / "m.onnx", "fp16", gates=Gates(max_drop=-1))
    with pytest.raises(UserError, match="there is no folder"):
        export_smaller(run, tmp_path / "no" / "m.onnx", "int8")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_fixed_sizes_of_graphs_that_prepare_pictures(precision: Any, run: Path, tmp_path: Path) -> None:
    """The size is the camera's, not the recipe's; accuracy is measured all the same."""
    path = tmp_path / "m.onnx"
    interface = Interface(("labels", "probabilities"), "graph", (2, 48, 70))
    found = export_smaller(run, path, precision, interface, NO_GATES, half_io=precision == "fp16")
    assert found.before == pytest.approx(evaluate_run(run)["miou"], abs=1e-3)
    assert found.after == pytest.approx(found.before, abs=0.03)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 48, 70, 3), dtype=np.uint8)
    assert Segmenter(path, "cpu")(pictures).shape == (3, 48, 70)
    assert placement(path, "cpu").nodes


def test_a_network_that_is_wrong_already_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_graphs(monkeypatch, precision, clear_first_weight)
    with pytest.raises(UserError, match="disagrees with PyTorch"):
        export_smaller(run, tmp_path / "m.onnx", "fp16", gates=NO_GATES)
    assert not list(tmp_path.iterdir())


def test_int8_classifier_with_crops(tmp_path: Path) -> None:
    """Pictures of folders, cropped in training only."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("a", "b", "c"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    folder / f"{index}.png"
                )
    root = str(tmp_path / "data")
    changes = {"dataset": "image_folder", "root": root, "size": "null", "crop": "[32, 32]", "pad": "4"}
    model, info = make("lcnet_050", **changes, scale="[1, 1]")
    save_checkpoint(tmp_path / "best.safetensors", model, info)
    found = export_smaller(tmp_path, tmp_path / "m.onnx", "int8", gates=NO_GATES)
    assert found.metric == "top1"
    assert found.after == evaluate_run(tmp_path, onnx=tmp_path / "m.onnx")["top1"]


def chain(outliers: list[float]) -> onnx.ModelProto:
    """1x1 convolutions one after the other, whose channel 0 is always 0. Where the weights that read it are
    large, int8 has no steps left for those that matter.
    """
    rng = np.random.default_rng(0)
    nodes, tensors, value = [], [], "image"
    for index, outlier in enumerate(outliers):
        last = index == len(outliers) - 1
        kernel = rng.uniform(0.5, 1, (3, 3, 1, 1)).astype(np.float32)
        kernel[:, 0] = outlier
        kernel[0] *= last
        tensors.append(numpy_helper.from_array(kernel, f"w{index}"))
        out = "logits" if last else f"v{index}"
        nodes.append(helper.make_node("Conv", [value, f"w{index}"], [out], f"layer{index}"))
        value = out
    shape = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def planes() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    made = [rng.uniform(0, 1, (1, 3, 16, 16)).astype(np.float32) for _ in range(4)]
    for one in made:
        one[:, 0] = 0
    return made


@pytest.mark.parametrize("worst", [0, 1, 2])
def test_the_layer_that_suffers_is_found_and_left_in_float(worst: int) -> None:
    core, pictures = chain([1000.0 if index == worst else 1.0 for index in range(3)]), planes()
    ranges = precision.find_ranges(core, pictures, "MinMax")
    ranked = precision._by_effect(core, ranges, pictures, precision._logits_of(core))
    assert ranked[0] == f"layer{worst}"
    want = precision._logits_of(core)(pictures[0])

    def error(graph: onnx.ModelProto) -> float:
        return float(np.abs(precision._logits_of(graph)(pictures[0]) - want).max() / np.abs(want).max())

    left = precision.to_int8(core, ranges, leave=ranked[:1])
    assert error(left) < 0.05 < 0.9 < error(precision.to_int8(core, ranges))
    kinds = {tensor.name: tensor.data_type for tensor in left.graph.initializer}
    assert kinds[f"w{worst}"] == TensorProto.FLOAT
    assert sum(name.endswith("_quantized") and name[0] == "w" for name in kinds) == 2


@pytest.mark.parametrize(
    ("drops", "kept"),
    [
        ([0.001], 0),
        ([0.5, 0.003], 1),
        ([0.5, 0.4, 0.004], 2),
        ([0.5, 0.4, 0.3, 0.005], 4),
        ([0.5, 0.2, 0.3, 0.4], 1),  # never enough: the least harm
    ],
)
def test_as_few_layers_stay_in_float_as_will_do(
    drops: list[float], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([0.9, *(0.9 - drop for drop in drops)])

    class Training:
        calibrating = choosing = planes()

        def metric(self, compute: Any) -> float:
            return next(values)

    monkeypatch.setattr(precision, "_Training", lambda *_: Training())
    core = chain([1.0] * 6)
    graph, ranges, in_float = precision._quantize(core, *[None] * 2, 0.005 + 1e-9, None)
    assert len(in_float) == kept
    assert len(ranges) == 3
    names = [tensor.name for tensor in graph.graph.initializer]
    assert sum(name[0] == "w" and name.endswith("_quantized") for name in names) == 6 - kept


def test_windows_of_pictures_that_keep_their_sizes() -> None:
    samples = [(torch.arange(3 * 5 * 7).view(3, 5, 7), torch.arange(35).view(5, 7)) for _ in range(20)]
    windows = precision._Windows(samples, (4, 32))
    tops = set()
    for index in range(20):
        image, target = windows[index]
        assert torch.equal(windows[index][0], image)
        assert target.shape == (4, 7)
        top = int(target[0, 0]) // 7
        tops.add(top)
        assert torch.equal(image, samples[0][0][:, top : top + 4])
    assert tops == {0, 1}


def test_ranges_and_choices_are_of_different_training_pictures(run: Path) -> None:
    model, info = load_checkpoint(run)
    preparation = preparation_of(info, model)
    training = precision._Training(info, preparation, None)
    samples = open_samples(info.recipe.data, "train")
    pictures = EvalSet(samples, info.recipe.data, preparation.size_multiple)
    want = np.stack([pictures[index][0].numpy() for index in range(12)])
    assert np.array_equal(np.concatenate(training.calibrating), want[::2])
    assert np.array_equal(np.concatenate(training.choosing), want[1::2])


def test_half_of_the_drop_is_for_choosing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*arguments: Any) -> None:
        raise UserError(str(arguments[3:]))

    monkeypatch.setattr(precision, "_quantize", asked)
    with pytest.raises(UserError, match=r"\(0\.125, 'elsewhere'\)"):
        export_smaller(run, tmp_path / "m.onnx", "int8", gates=Gates(max_drop=0.25), root="elsewhere")


def test_the_speedup_is_the_full_time_over_the_smaller(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stages(segmenter: Segmenter, pictures: np.ndarray) -> Any:
        return lambda: (0.0, 3.0 if segmenter.metadata["precision"] == "fp32" else 2.0, 0.0)

    monkeypatch.setattr(precision, "stages", stages)
    assert export_smaller(run, tmp_path / "m.onnx", "fp16", gates=NO_GATES).speedup == 1.5
