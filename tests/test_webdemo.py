from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image
from test_export import make
from test_serve import painted, picture

from segdeconv import webdemo
from segdeconv.errors import UserError
from segdeconv.export import export_onnx
from segdeconv.images import colored, resize_image, resize_labels
from segdeconv.interface import Interface
from segdeconv.runtime import Segmenter
from segdeconv.webdemo import ORT_FILES, check_integrity, fetch_onnxruntime_web, write_webdemo

WEB = Path(webdemo.__file__).parent / "web"


@contextmanager
def files_of(folder: Path) -> Iterator[str]:
    """What `python -m http.server` does, quietly; gives the URL."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


SIZES = [(30, 50), (30, 49), (30, 200), (61, 50), (7, 50), (15, 25), (60, 100), (29, 51), (7, 3), (1, 1)]


def test_pixels_are_resized_as_pillow_does(browser: Any) -> None:
    """Bilinear pictures and nearest labels, smaller and larger, to the last bit along one axis.

    Pictures are rounded between the axes, and Pillow 13 chooses which one comes first.
    """
    image = picture(30, 50)
    with files_of(WEB) as url:
        page = browser.new_page()
        page.goto(f"{url}/pixels.js")
        got = page.evaluate(
            """async ([values, sizes]) => {
                const { resizeImage, resizeLabels } = await import("/pixels.js");
                const image = { data: new Uint8Array(values), height: 30, width: 50, channels: 3 };
                const labels = { ...image, width: 150, channels: 1 };
                return sizes.map((size) => [
                    Array.from(resizeImage(image, size).data), Array.from(resizeLabels(labels, ...size).data),
                ]);
            }""",
            [image.ravel().tolist(), SIZES],
        )
        page.close()
    for size, (resized, labels) in zip(SIZES, got, strict=True):
        off = np.abs(np.reshape(resized, (*size, 3)) - resize_image(image, size).astype(int)).max()
        assert off <= (30 not in size and 50 not in size), size
        assert np.array_equal(np.reshape(labels, size), resize_labels(image.reshape(30, 150), size)), size


@pytest.fixture(scope="module")
def tarball() -> Path:
    cached = webdemo.cache_folder() / f"onnxruntime-web-{webdemo.ORT_VERSION}.tgz"
    if not cached.is_file():
        pytest.skip(f"no onnxruntime-web at {cached}; segdeconv webdemo fetches it")
    return cached


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(*make("linknet+tf_mobilenetv3_small_minimal_100"), path)
    return path


@pytest.mark.parametrize("prepares", ["page resizes", "page pads", "graph"])
def test_the_browser_labels_as_python_does(
    prepares: str, browser: Any, tarball: Path, exported: Path, tmp_path: Path
) -> None:
    """The whole page, whoever resizes or pads (to a multiple of 32); no picture is sent."""
    model = tmp_path / "model.onnx"
    if prepares == "graph":
        export_onnx(*make("linknet+tf_mobilenetv3_small_minimal_100"), model, Interface(preprocess="graph"))
    else:
        graph = onnx.load(exported)
        if prepares == "page pads":
            next(prop for prop in graph.metadata_props if prop.key == "resize").value = "null"
        onnx.save(graph, model)
    write_webdemo(model, tmp_path / "demo", tarball)
    segmenter = Segmenter(model, "cpu")
    page = browser.new_page()
    methods: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: methods.append(request.method))
    page.on("pageerror", lambda error: errors.append(str(error)))
    with files_of(tmp_path / "demo") as url:
        page.goto(url)
        for height, width in ((96, 192), (51, 77), (210, 130)):
            coarse = Image.fromarray(picture(4, 5, seed=height))
            image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
            Image.fromarray(image).save(tmp_path / f"{height}.png")
            page.set_input_files("#file", tmp_path / f"{height}.png")
            page.locator("#status", has_text=f"{height}.png: {width}").wait_for()
            want = colored(segmenter(image).astype(np.uint8), segmenter.palette)
            assert (painted(page) != want).any(-1).mean() < 1e-3
        (tmp_path / "notes.png").write_text("no picture")
        page.set_input_files("#file", tmp_path / "notes.png")
        page.locator(
            "#status.error", has_text="notes.png: not a picture that this browser can read"
        ).wait_for()
        page.close()
    assert errors == []
    assert set(methods) == {"GET"}


def test_only_the_pinned_package_is_taken(tmp_path: Path) -> None:
    wrong = tmp_path / "onnxruntime-web.tgz"
    with pytest.raises(UserError, match=r"onnxruntime-web.tgz: cannot be read \(No such file"):
        check_integrity(wrong)
    wrong.write_bytes(b"something else")
    with pytest.raises(UserError, match=r"is not npm's onnxruntime-web@1.30.0 \(another SHA-512\)"):
        check_integrity(wrong)


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for npm is a shell script")
@pytest.mark.parametrize(
    ("npm", "message"),
    [
        (None, "npm is not installed; run 'npm pack onnxruntime-web@1.30.0' where it can be fetched"),
        ("echo npm error code ENOTFOUND >&2; exit 1", r"cannot be fetched \(npm error code ENOTFOUND\)"),
        ("echo hello > $4/onnxruntime-web-1.30.0.tgz", "another SHA-512"),
    ],
)
def test_what_npm_can_do_wrong(
    npm: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, and nothing in the cache."""
    (tmp_path / "bin").mkdir()
    if npm is not None:
        script = tmp_path / "bin" / "npm"
        script.write_text(f"#!{shutil.which('sh')}\n{npm}\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("SEGDECONV_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message):
        fetch_onnxruntime_web()
    assert not (tmp_path / "cache").exists()


class FakeSession:
    def __init__(self, outputs: list[str], shape: list[Any], kind: str = "tensor(float)") -> None:
        self.get_outputs = lambda: [onnx.ValueInfoProto(name=name) for name in outputs]
        self.get_inputs = lambda: [type("Input", (), {"shape": shape, "type": kind})]


@pytest.mark.parametrize(
    ("task", "session", "message"),
    [
        ("classification", FakeSession(["labels"], ["n", 3, "h", "w"]), "needs a segmentation graph"),
        ("segmentation", FakeSession(["logits"], ["n", 3, "h", "w"]), "with --output labels"),
        ("segmentation", FakeSession(["labels"], [1, 3, 96, 160]), "without --static"),
        ("segmentation", FakeSession(["labels"], ["n", 3, "h", "w"], "tensor(float16)"), "without --half-io"),
    ],
)
def test_graphs_that_the_page_cannot_run(
    task: str, session: FakeSession, message: str, tmp_path: Path, monkeypatch: Any
) -> None:
    class Fake:
        def __init__(self, *_: Any) -> None:
            self.metadata, self.classes = {"task": task}, ("a", "b")
            self.session = session

    monkeypatch.setattr(webdemo, "Segmenter", Fake)
    with pytest.raises(UserError, match=message):
        write_webdemo("model.onnx", tmp_path / "demo", tmp_path / "no.tgz")
    assert not (tmp_path / "demo").exists()


def test_the_page_is_whole(tarball: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Every file that the page's files name is written."""

    class Fake:
        def __init__(self, *_: Any) -> None:
            self.metadata, self.classes = {"task": "segmentation", "classes": ["a"]}, ("a",)
            self.session = FakeSession(["labels"], ["n", 3, "h", "w"])

    monkeypatch.setattr(webdemo, "Segmenter", Fake)
    (tmp_path / "some.onnx").write_bytes(b"graph")
    write_webdemo(tmp_path / "some.onnx", tmp_path / "demo", tarball)
    written = {path.name for path in (tmp_path / "demo").iterdir()}
    assert written == {*webdemo._PAGE, *ORT_FILES, "model.onnx", "model.json"}
    assert json.loads((tmp_path / "demo" / "model.json").read_text())["classes"] == ["a"]
    assert (tmp_path / "demo" / "model.onnx").read_bytes() == b"graph"
