from __future__ import annotations

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from test_export import make

from segdeconv import doctor, runtime
from segdeconv.errors import UserError
from segdeconv.export import export_onnx
from segdeconv.fold import fold_network_deconv
from segdeconv.images import colored, label_png, overlay, save_image, window_starts
from segdeconv.interface import Interface
from segdeconv.runtime import Segmenter, find_images, open_session, predict_images

PALETTE = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    """linknet pads to a multiple of 32, so that the runtime's padding is exercised."""
    model, info = make("linknet+tf_mobilenetv3_small_minimal_100")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(model, info, path)
    return path, fold_network_deconv(model)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_segmenter_does_what_training_did(exported: tuple[Path, torch.nn.Module]) -> None:
    """Normalise, pad, run, crop: the same labels as PyTorch on the evaluation transform's output."""
    path, model = exported
    segmenter = Segmenter(path)
    assert segmenter.metadata["resize"] == [96, 192]
    assert not segmenter.whole
    image = picture(96, 192)
    mean, std = torch.tensor(segmenter.metadata["mean"]), torch.tensor(segmenter.metadata["std"])
    normalised = ((torch.from_numpy(image).float() / 255 - mean) / std).permute(2, 0, 1)[None]
    np.testing.assert_allclose(segmenter.preprocess(image[None]), normalised, rtol=0, atol=2e-6)
    with torch.no_grad():
        want = model(normalised).argmax(1)[0].numpy()
    got = segmenter(image)
    assert got.dtype == np.uint8
    assert (got != want).mean() < 1e-3


def test_pictures_of_any_size_come_back_at_their_own(exported: tuple[Path, torch.nn.Module]) -> None:
    segmenter = Segmenter(exported[0])
    assert segmenter(picture(51, 77)).shape == (51, 77)
    padded = segmenter.preprocess(picture(51, 77)[None])
    assert padded.shape == (1, 3, 64, 96)
    assert (padded[:, :, 51:] == 0).all()
    assert (padded[:, :, :, 77:] == 0).all()


def test_logits_graphs_work_too(tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    export_onnx(
        *make("linknet+tf_mobilenetv3_small_minimal_100"), tmp_path / "logits.onnx", Interface(("logits",))
    )
    image = picture(40, 60)
    assert (Segmenter(tmp_path / "logits.onnx")(image) != Segmenter(exported[0])(image)).mean() < 1e-3


def test_predict_images(tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    source, out = tmp_path / "in", tmp_path / "deep" / "out"
    source.mkdir()
    for name in ("b.png", "a.jpg"):
        Image.fromarray(picture(30, 50)).save(source / name)
    (source / "notes.txt").write_text("not a picture")
    segmenter = Segmenter(exported[0])
    written = list(predict_images(segmenter, find_images(source), out))
    assert [path.name for path in written] == ["a.png", "b.png"]
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "a_overlay.jpg", "b.png", "b_overlay.jpg"]
    labels = Image.open(out / "b.png")
    assert labels.mode == "P"
    assert np.array_equal(np.asarray(labels), segmenter(picture(30, 50)))


def test_masks_are_never_overwritten(tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    """Earlier predictions are: they have an overlay beside them."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for folder in (images, masks):
        folder.mkdir()
        Image.fromarray(picture(30, 50)).save(folder / "a.png")
    before = (masks / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"masks/a\.png: is there and is no earlier prediction"):
        list(predict_images(Segmenter(exported[0]), find_images(images), masks))
    assert (masks / "a.png").read_bytes() == before
    for _ in range(2):
        assert len(list(predict_images(Segmenter(exported[0]), find_images(images), tmp_path / "out"))) == 1


def test_a_picture_that_cannot_be_read_stops_no_other(
    tmp_path: Path, exported: tuple[Path, torch.nn.Module]
) -> None:
    for name in ("a.png", "c.png"):
        Image.fromarray(picture(30, 50)).save(tmp_path / name)
    (tmp_path / "b.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"^1 of 3 pictures could not be read: .*b\.jpg"):
        list(predict_images(Segmenter(exported[0]), find_images(tmp_path), tmp_path / "out"))
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a.png", "c.png"}


@pytest.mark.parametrize("names", [["a.png"], ["a.jpg"], ["a.jpg", "b.png"]])
def test_predictions_do_not_join_the_pictures(
    names: list[str], tmp_path: Path, exported: tuple[Path, torch.nn.Module]
) -> None:
    for name in names:
        Image.fromarray(picture(30, 50)).save(tmp_path / name)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="is the folder of what is to be predicted"):
        list(predict_images(Segmenter(exported[0]), find_images(tmp_path), tmp_path))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_predictions_of_one_name(tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    for folder in "ab":
        (tmp_path / folder).mkdir()
        Image.fromarray(picture(30, 50)).save(tmp_path / folder / "x.png")
    names = [str(tmp_path / folder / "x.png") for folder in "ab"]
    with pytest.raises(UserError, match="would be predicted into one file"):
        list(predict_images(Segmenter(exported[0]), iter(names), tmp_path / "out"))
    assert len(list(predict_images(Segmenter(exported[0]), iter(names[:1]), tmp_path / "out"))) == 1


def test_painting_of_many_classes() -> None:
    palette = tuple((number % 256, number // 256, 0) for number in range(300))
    assert colored(np.array([[299]], np.int32), palette).tolist() == [[[43, 1, 0]]]


def test_painting() -> None:
    labels = np.array([[0, 1], [2, 255]], np.uint8)
    assert colored(labels, PALETTE).tolist() == [[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [0, 0, 0]]]
    image = np.full((2, 2, 3), 100, np.uint8)
    mixed = overlay(image, labels, PALETTE, alpha=0.5)
    assert mixed[0, 0].tolist() == [178, 50, 50]
    assert mixed[1, 1].tolist() == [100, 100, 100]
    png = label_png(labels, PALETTE)
    assert np.array_equal(np.asarray(png), labels)
    assert np.array_equal(np.asarray(png.convert("RGB"))[:1], colored(labels, PALETTE)[:1])


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("missing", "no such file"),
        ("not onnx", "onnxruntime cannot load"),
        ("foreign", "has no metadata"),
        ("truncated", "onnxruntime cannot load"),
    ],
)
def test_wrong_graphs(what: str, says: str, tmp_path: Path, exported: tuple[Path, torch.nn.Module]) -> None:
    path = tmp_path / "x.onnx"
    if what == "not onnx":
        path.write_text("hello")
    elif what == "truncated":
        path.write_bytes(exported[0].read_bytes()[:5000])
    elif what == "foreign":
        graph = onnx.load(exported[0])
        del graph.metadata_props[:]
        onnx.save(graph, path)
    with pytest.raises(UserError, match=f"x.onnx: {says}"):
        Segmenter(path)


@pytest.mark.parametrize(
    ("there", "instead", "says"),
    [
        (b"segmentation", b"segmentati\xffn", "onnxruntime cannot load it .*'utf-8' codec"),
        (b"\x01n\n", b"\x01\xff\n", "onnxruntime cannot load it .*'utf-8' codec"),
        (b"[255, ", b"[256, ", "a colour of its palette is not three numbers from 0 to 255.*export it again"),
        (b"size_multiple\x12\x011", b"size_multiple\x12\x010", "size_multiple, resize and std are above 0"),
        (b"image\x12\x19\n\x17\x08\x02", b"image\x12\x19\n\x17\x08\x03", "its metadata or input is damaged"),
    ],
    ids=["metadata not UTF-8", "input not UTF-8", "palette", "size multiple", "type of input"],
)
def test_damaged_graphs(there: bytes, instead: bytes, says: str, tmp_path: Path) -> None:
    path = handmade(tmp_path / "x.onnx", raw=True)
    whole = path.read_bytes()
    assert there in whole
    path.write_bytes(whole.replace(there, instead))
    with pytest.raises(UserError, match=f"x.onnx: .*{says}"):
        Segmenter(path)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4), "uint8"), ((4, 4, 3), "float32"), ((4, 4, 4), "uint8")]
)
def test_wrong_arrays(shape: tuple, dtype: str, exported: tuple[Path, torch.nn.Module]) -> None:
    segmenter = Segmenter(exported[0])
    with pytest.raises(UserError, match="expected RGB"):
        segmenter(np.zeros(shape, dtype))
    with pytest.raises(UserError, match="expected RGB"):
        segmenter.preprocess(np.zeros(shape, dtype)[None])


METADATA = {
    "task": "segmentation",
    "classes": ["r", "g", "b"],
    "palette": PALETTE,
    "mean": [0.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
    "size_multiple": 1,
    "resize": None,
}


def handmade(
    path: Path,
    outputs: tuple[str, ...] = ("labels",),
    sides: tuple = ("n", 3, "h", "w"),
    raw: bool = False,
    **metadata: Any,
) -> Path:
    """Logits are the colours less their mean over the picture, so that what a window says is its own."""
    nodes = [
        helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[2, 3]),
        helper.make_node("Sub", ["pixels", "mean"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["classes"], axis=1, keepdims=0),
        helper.make_node("Cast", ["classes"], ["labels"], to=TensorProto.UINT8),
    ]
    if raw:
        first = [
            helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 3, 1, 2]),
            helper.make_node("Cast", ["turned"], ["whole"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["whole", "scale"], ["pixels"]),
        ]
        nodes = [*first, *nodes]
        sides = (sides[0], *sides[2:], sides[1])
        metadata["preprocess"] = "graph"
    else:
        nodes = [helper.make_node("Identity", ["image"], ["pixels"]), *nodes]
    kinds = {"labels": TensorProto.UINT8}
    graph = helper.make_graph(
        nodes,
        "handmade",
        [helper.make_tensor_value_info("image", TensorProto.UINT8 if raw else TensorProto.FLOAT, sides)],
        [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), None) for name in outputs],
        [helper.make_tensor("scale", TensorProto.FLOAT, [], [1 / 255])] if raw else [],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    for key, value in {**METADATA, **metadata}.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.save(model, path)
    return path


def logits_of(image: np.ndarray) -> np.ndarray:
    """What `handmade` computes, in float64: (H, W, 3)."""
    pixels = image / 255
    return pixels - pixels.mean((0, 1))


def windows_of(image: np.ndarray, window: tuple[int, int]) -> list[tuple[slice, slice]]:
    sides = [min(side, whole) for side, whole in zip(window, image.shape[:2], strict=True)]
    starts = [window_starts(whole, side, 0.25) for side, whole in zip(sides, image.shape[:2], strict=True)]
    return [(slice(t, t + sides[0]), slice(x, x + sides[1])) for t in starts[0] for x in starts[1]]


def close_calls(scores: np.ndarray) -> np.ndarray:
    """Where float32 may choose another class."""
    second, first = np.sort(scores, -1)[..., -2:].transpose(2, 0, 1)
    return first - second < 1e-6


@pytest.mark.parametrize("outputs", [("logits",), ("probabilities",), ("labels", "logits")])
@pytest.mark.parametrize("shape", [(50, 70), (20, 70), (50, 20), (32, 48)])
def test_windows_average_probabilities(outputs: tuple, shape: tuple, tmp_path: Path) -> None:
    image = picture(*shape)
    total, times = np.zeros((*shape, 3)), np.zeros((*shape, 1))
    for here in windows_of(image, (32, 48)):
        powers = np.exp(logits_of(image[here]))
        total[here] += powers / powers.sum(-1, keepdims=True)
        times[here] += 1
    scores = total / times
    got = Segmenter(handmade(tmp_path / "m.onnx", outputs), window=(32, 48))(image)
    assert ((got == scores.argmax(-1)) | close_calls(scores)).all()
    assert not Segmenter(tmp_path / "m.onnx", window=(32, 48)).whole
    whole = Segmenter(tmp_path / "m.onnx")(image)
    assert np.array_equal(whole, got) == (shape == (32, 48))


@pytest.mark.parametrize("shape", [(50, 70), (20, 90)])
def test_windows_of_labels_are_cut_between_their_middles(shape: tuple, tmp_path: Path) -> None:
    image = picture(*shape)
    windows = windows_of(image, (32, 48))
    by_window = [logits_of(image[here]) for here in windows]
    got = Segmenter(handmade(tmp_path / "m.onnx"), window=(32, 48))(image)
    for row, column in np.ndindex(*shape):

        def distance(index: int, at: tuple[float, float] = (row + 0.5, column + 0.5)) -> tuple[float, ...]:
            middles = ((part.start + part.stop) / 2 for part in windows[index])
            return tuple(abs(m - a) for m, a in zip(middles, at, strict=True))

        nearest = min(range(len(windows)), key=lambda i: (*distance(i), -i))
        down, across = windows[nearest]
        scores = by_window[nearest][row - down.start, column - across.start]
        assert got[row, column] == scores.argmax() or np.diff(np.sort(scores))[-1] < 1e-6


def test_a_graph_whose_name_is_not_utf8(tmp_path: Path) -> None:
    path = Path(os.fsdecode(bytes(tmp_path / "m") + b"\xe9.onnx"))
    path.touch()
    with pytest.raises(UserError, match=r"\.onnx: onnxruntime takes no path that is not UTF-8"):
        Segmenter(path)


@pytest.mark.parametrize("raw", [False, True], ids=["none", "graph"])
def test_batches_and_lists(raw: bool, tmp_path: Path) -> None:
    segmenter = Segmenter(handmade(tmp_path / "m.onnx", raw=raw))
    images = [picture(20, 30), picture(24, 30)[::-1], 255 - picture(20, 30)]
    assert segmenter.whole
    singly = [segmenter(image) for image in images]
    for image, labels in zip(images, singly, strict=True):
        scores = logits_of(image)
        assert ((labels == scores.argmax(-1)) | close_calls(scores)).all()
    assert all(map(np.array_equal, segmenter(images), singly))
    assert np.array_equal(segmenter(np.stack(images[::2])), np.stack(singly[::2]))
    assert segmenter([]) == []


@pytest.mark.parametrize("raw", [False, True], ids=["none", "graph"])
def test_graphs_of_one_size(raw: bool, tmp_path: Path) -> None:
    """Pictures are padded to it, batches filled up, larger pictures cut into windows."""
    segmenter = Segmenter(handmade(tmp_path / "m.onnx", sides=(2, 3, 32, 48), raw=raw))
    free = Segmenter(handmade(tmp_path / "free.onnx", raw=raw))
    images = np.stack([picture(32, 48), 255 - picture(32, 48), picture(32, 48)[::-1]])
    assert np.array_equal(segmenter(images), free(images))
    padded = np.pad(images[0, :20, :40], ((0, 12), (0, 8), (0, 0)))
    assert np.array_equal(segmenter(images[0, :20, :40]), free(padded)[:20, :40])
    windows = Segmenter(tmp_path / "free.onnx", window=(32, 48))
    assert np.array_equal(segmenter(picture(50, 70)), windows(picture(50, 70)))


def test_half_precision_inputs(tmp_path: Path) -> None:
    model = onnx.load(handmade(tmp_path / "m.onnx", ("logits",)))
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "half.onnx")
    image = picture(20, 30)
    half, full = (Segmenter(tmp_path / f"{name}.onnx", window=(16, 16))(image) for name in ("half", "m"))
    assert (half != full).mean() < 0.01


def test_threads_share_a_segmenter(tmp_path: Path) -> None:
    segmenter = Segmenter(handmade(tmp_path / "m.onnx", ("logits",)), threads=1, window=(32, 48))
    images = [np.roll(picture(50, 70), shift, 1) for shift in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(segmenter, images))
    assert all(map(np.array_equal, together, map(segmenter, images)))


def test_warm_up_and_overlay(tmp_path: Path) -> None:
    segmenter = Segmenter(handmade(tmp_path / "m.onnx"))
    segmenter.warm_up((20, 30), batch=2)
    with pytest.raises(UserError, match="needs the pictures' height and width"):
        segmenter.warm_up()
    Segmenter(handmade(tmp_path / "sized.onnx", resize=[20, 30])).warm_up()
    Segmenter(handmade(tmp_path / "fixed.onnx", sides=(1, 3, 32, 48), resize=[20, 30])).warm_up()
    image = picture(20, 30)
    assert np.array_equal(segmenter.overlay(image), overlay(image, segmenter(image), PALETTE))
    blank = np.full((20, 30), 255, np.uint8)
    assert np.array_equal(segmenter.overlay(image, blank), image)


def test_what_is_no_array_of_a_picture(tmp_path: Path) -> None:
    segmenter = Segmenter(handmade(tmp_path / "m.onnx"))
    image = Image.fromarray(picture(20, 30))
    for given in (image, [image], [picture(20, 30), image]):
        with pytest.raises(UserError, match=r"not Image; of a Pillow image np\.asarray"):
            segmenter(given)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"window": (0, 5)}, "--window 0,5: expected pixels"),
        ({"window": (64.5, 64)}, "--window 64.5,64: expected pixels"),
        ({"window": (64,)}, "--window 64: expected pixels"),
        ({"overlap": 1.0}, "--overlap 1.0"),
        ({"threads": 0}, "--threads 0"),
        ({"device": "gpu"}, "--device gpu: expected auto, cpu, cuda"),
        ({"device": "cpu:1"}, "--device cpu:1"),
        ({"device": "cuda:x"}, "--device cuda:x"),
    ],
)
def test_wrong_settings(changes: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        Segmenter(handmade(tmp_path / "m.onnx"), **changes)


def test_windows_that_a_graph_cannot_have(tmp_path: Path) -> None:
    fixed = handmade(tmp_path / "fixed.onnx", sides=(1, 3, 32, 48))
    with pytest.raises(UserError, match=r"fixed.onnx takes no more than \(32, 48\)"):
        Segmenter(fixed, window=(64, 48))
    resizing = handmade(tmp_path / "resizing.onnx", raw=True, resize=[20, 30])
    with pytest.raises(UserError, match="export it with --preprocess none"):
        Segmenter(resizing, window=(16, 16))
    assert Segmenter(resizing)(picture(40, 60)).shape == (40, 60)  # the graph does it, not we
    with pytest.raises(UserError, match="takes uint8, not float32"):
        Segmenter(resizing).run(np.zeros((1, 3, 20, 30), np.float32))


def test_what_onnxruntime_refuses_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot run \(1, 4, 20, 30\) on cpu"):
        Segmenter(handmade(tmp_path / "m.onnx")).run(np.zeros((1, 4, 20, 30), np.float32))


class FakeSession:
    """A session as onnxruntime makes it where CUDA works, is silently left out, or fails."""

    def __init__(self, how: str, providers: list) -> None:
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        if how == "fails" and len(names) == 2:
            raise RuntimeError("CUDA failure 101: invalid device ordinal\nmore")
        self.names = names[1:] if how == "left out" and len(names) == 2 else names
        self.asked = providers

    def get_providers(self) -> list[str]:
        return self.names

    def get_modelmeta(self) -> SimpleNamespace:
        return SimpleNamespace(custom_metadata_map={})

    def get_inputs(self) -> list[Any]:
        return []

    get_outputs = get_inputs


def fake(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    def session(path: str, options: Any, providers: list, enable_fallback: int) -> FakeSession:
        assert enable_fallback == 0
        return FakeSession(how, providers)

    module = SimpleNamespace(
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
        InferenceSession=session,
        preload_dlls=lambda: None,
    )
    sound = doctor.Facts(
        {"onnxruntime-gpu": "1.31.1"}, gpu="GPU", driver_cuda="13.0", onnxruntime_cuda="13.0"
    )
    library = "libcudnn.so.9: cannot open shared object file" if how == "left out" else None
    monkeypatch.setattr(runtime, "import_onnxruntime", lambda: module)
    monkeypatch.setattr(doctor, "gather", lambda caches: replace(sound, library_error=library))


def test_cuda_where_it_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(monkeypatch, "works")
    path = handmade(tmp_path / "m.onnx")
    for device, got in (("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")):
        session, where, why_cpu = open_session(path, device)
        assert (where, why_cpu) == (got, "")
        assert session.asked[0] == ("CUDAExecutionProvider", {"device_id": got[-1]})
    assert open_session(path, "cpu")[0].names == ["CPUExecutionProvider"]


@pytest.mark.parametrize(
    ("how", "cause"), [("left out", "libcudnn.so.9"), ("fails", r"CUDA failure 101: invalid device ordinal")]
)
def test_cuda_that_cannot_be_had_is_an_error(
    how: str, cause: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Cause and fix; auto and --allow-cpu take the CPU and say why."""
    fake(monkeypatch, how)
    path = handmade(tmp_path / "m.onnx")
    with pytest.raises(UserError, match=rf"--device cuda: .*{cause}.*mend it with: pip .*--device cpu"):
        open_session(path, "cuda")
    for options in ({"device": "auto"}, {"device": "cuda", "allow_cpu": True}):
        session, where, why_cpu = open_session(path, **options)
        assert session.names == ["CPUExecutionProvider"]
        assert where == "cpu"
        assert cause in why_cpu


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime offers CUDA here"
)
def test_no_cuda_on_this_machine(tmp_path: Path) -> None:
    path = handmade(tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"--device cuda: .*mend it with: "):
        Segmenter(path, "cuda")
    segmenter = Segmenter(path, "cuda", allow_cpu=True)
    assert segmenter.device == "cpu"
    assert segmenter.why_cpu == Segmenter(path).why_cpu != ""
    assert Segmenter(path, "cpu").why_cpu == ""


# Files.


def test_writers_in_one_process_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """Names that are alike for 40 characters: threads wrote each other's pictures."""

    def work(value: int) -> None:
        for number in range(20):
            name = f"camera_front_left_2026-11-27T10-00-00_frame_{value}_{number}.png"
            save_image(Image.fromarray(np.full((40, 40, 3), value, np.uint8)), tmp_path / name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    written = list(tmp_path.iterdir())
    assert len(written) == 80
    for path in written:
        assert np.array(Image.open(path))[0, 0, 0] == int(path.stem.split("_")[-2])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_picture_on_a_full_disk_is_not_there(suffix: str, tmp_path: Path, monkeypatch: Any) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left"):
        save_image(Image.new("RGB", (40, 40)), tmp_path / f"a.{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("height", [1, 255, 256, 257, 600])
def test_overlays_in_bands(height: int) -> None:
    rng = np.random.default_rng(0)
    image, labels = rng.integers(0, 256, (height, 5, 3), np.uint8), rng.integers(0, 4, (height, 5), np.uint8)
    palette = ((200, 0, 0), (0, 200, 0), (0, 0, 200))
    colors = np.array([*palette, (0, 0, 0)])[labels]
    want = np.where((labels < 3)[..., None], np.round((1 - 0.55) * image + 0.55 * colors), image)
    assert np.array_equal(overlay(image, labels, palette), want)


def test_threads_are_those_asked_for(tmp_path: Path) -> None:
    session = Segmenter(handmade(tmp_path / "m.onnx"), threads=3).session
    assert session.get_session_options().intra_op_num_threads == 3


@pytest.mark.parametrize(("classes", "kind"), [(256, np.uint8), (257, np.int32)])
def test_more_classes_than_a_byte_holds(classes: int, kind: type, tmp_path: Path) -> None:
    many = {"classes": [str(i) for i in range(classes)], "palette": [(0, 0, 0)] * classes}
    assert Segmenter(handmade(tmp_path / "m.onnx", ("logits",), **many))(picture(4, 5)).dtype == kind


def test_a_prediction_that_was_cut_short_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(picture(30, 50)).save(tmp_path / "a.png")
    segmenter, images = Segmenter(handmade(tmp_path / "m.onnx")), find_images(tmp_path / "a.png")
    written = []

    def full(image: Image.Image, path: Path) -> None:
        if written:
            raise UserError("disk full")
        runtime.save_image_(image, path)
        written.append(path)

    monkeypatch.setattr(runtime, "save_image_", runtime.save_image, raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "save_image", full)
        with pytest.raises(UserError, match="disk full"):
            list(predict_images(segmenter, images, tmp_path / "out"))
    assert len(list(predict_images(segmenter, images, tmp_path / "out"))) == 1


def test_a_graph_is_warm_after_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, infer = [], Segmenter._infer
    monkeypatch.setattr(
        Segmenter, "_infer", lambda self, batch, name: shapes.append(batch.shape) or infer(self, batch, name)
    )
    Segmenter(handmade(tmp_path / "m.onnx")).warm_up((20, 30), batch=2)
    assert shapes == [(2, 3, 20, 30)] * 2


def test_a_graph_of_one_size_gets_pictures_padded_with_the_mean(tmp_path: Path) -> None:
    """Which is 0 when it is normalised."""
    path = handmade(tmp_path / "m.onnx", sides=(1, 3, 8, 9), raw=True, mean=[0.5, 0.25, 0.1])
    filled = Segmenter(path).preprocess(picture(5, 6)[None])
    assert np.array_equal(filled[0, :5, :6], picture(5, 6))
    for part in (filled[0, 5:], filled[0, :, 6:]):
        assert (part == [128, 64, 26]).all()
