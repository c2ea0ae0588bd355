from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx.helper
import onnx.numpy_helper
import onnx.parser
import pytest
import uvicorn
from PIL import Image, TiffImagePlugin

from segdeconv.errors import UserError
from segdeconv.images import overlay
from segdeconv.serve import Limits, serve, server_config

LOAD = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "load_test.py"))
CLASSES, PALETTE = ("road", "tree", "café"), ((200, 0, 0), (0, 200, 0), (0, 0, 200))
JPEG = {"Content-Type": "image/jpeg"}


class Fake:
    """In place of a Segmenter: labels are thirds of the red channel; waits at the gate before it answers."""

    whole = False

    def __init__(self) -> None:
        self.classes, self.palette, self.device = CLASSES, PALETTE, "cpu"
        self.metadata = {"task": "segmentation", "name": "fake", "classes": CLASSES, "palette": PALETTE}
        self.gate, self.entered = threading.Event(), threading.Semaphore(0)
        self.gate.set()

    def __call__(self, image: np.ndarray) -> np.ndarray:
        self.entered.release()
        assert self.gate.wait(30)
        return image[..., 0] // 86


def picture(height: int = 30, width: int = 50, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


@contextmanager
def serving(segmenter: Fake, limits: Limits = Limits()) -> Iterator[int]:  # noqa: B008
    """The application in a thread of this process; gives the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(server_config(segmenter, limits))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        segmenter.gate.set()
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(Fake(), Limits(megabytes=LOAD["MEGABYTES"])) as port:
        yield port


def ask(
    port: int, path: str, body: bytes | None = None, method: str = "POST", headers: dict[str, str] = JPEG
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def test_an_answer_in_every_form(port: int) -> None:
    image = picture()
    labels = image[..., 0] // 86
    counts = dict(zip(CLASSES, np.bincount(labels.ravel()).tolist(), strict=True))
    for query, want in (("", labels), ("?output=labels", labels), ("?output=overlay", None)):
        response, body = ask(port, f"/predict{query}", png(image))
        assert (response.status, response.headers["Content-Type"]) == (200, "image/png")
        assert json.loads(response.headers["Class-Pixels"]) == counts
        want = overlay(image, labels, PALETTE) if want is None else want
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), want)
    areas = json.loads(ask(port, "/predict?output=areas", png(image))[1])
    assert areas["pixels"] == counts
    assert areas["shares"] == {name: count / labels.size for name, count in counts.items()}
    assert (areas["height"], areas["width"]) == (30, 50)


def test_photographs_are_turned_upright(port: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG", exif=exif)
    _, body = ask(port, "/predict", file.getvalue())
    assert Image.open(io.BytesIO(body)).size == (30, 50)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("request_", LOAD["bad_pictures"](), ids=lambda request: request.kind)
def test_bad_input(request_: Any, port: int) -> None:
    headers = {"Content-Type": request_.content_type}
    body = iter([request_.body]) if request_.chunked else request_.body
    response, body = ask(port, "/predict", body, headers=headers)
    assert response.status == request_.status
    sentence = json.loads(body)["detail"]
    assert "\n" not in sentence
    assert "0x" not in sentence


def test_other_wrong_requests(port: int) -> None:
    response, body = ask(port, "/predict?output=mask", png(picture()))
    assert response.status == 422
    assert json.loads(body) == {"detail": "output 'mask': input should be 'labels', 'overlay' or 'areas'"}
    assert ask(port, "/predict", method="GET")[0].status == 405
    assert ask(port, "/nothing", method="GET")[0].status == 404


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/model.json", "/page.js"])
def test_heads(path: str, port: int) -> None:
    response, body = ask(port, path, method="HEAD")
    assert (response.status, body) == (200, b"")
    assert response.headers["Content-Type"] == ask(port, path, method="GET")[0].headers["Content-Type"]


def test_other_origins_are_not_let_in(port: int) -> None:
    headers = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
    response, _ = ask(port, "/predict", method="OPTIONS", headers=headers)
    assert response.status == 405
    answered, _ = ask(port, "/predict", png(picture()), headers=JPEG | headers)
    assert not [name for name in (*response.headers, *answered.headers) if name.startswith("access-control")]
    simple = {"Content-Type": "text/plain"}  # what a page may send anywhere without asking
    assert ask(port, "/predict", png(picture()), headers=simple)[0].status == 415


def test_the_queue_is_bounded() -> None:
    segmenter = Fake()
    with serving(segmenter, Limits(workers=1, queue=1)) as port, ThreadPoolExecutor(2) as clients:
        segmenter.gate.clear()
        images = [picture(seed=seed) for seed in (1, 2)]
        answers = [clients.submit(ask, port, "/predict", png(images[0]))]
        assert segmenter.entered.acquire(timeout=10)
        answers.append(clients.submit(ask, port, "/predict", png(images[1])))
        wait_for(port, working=1, waiting=1)
        response, body = ask(port, "/predict", png(picture()))
        assert (response.status, response.headers["Retry-After"]) == (503, "1")
        assert "queue is full" in json.loads(body)["detail"]
        segmenter.gate.set()
        for image, answer in zip(images, answers, strict=True):
            labels = np.asarray(Image.open(io.BytesIO(answer.result()[1])))
            assert np.array_equal(labels, image[..., 0] // 86)
        wait_for(port, working=0, waiting=0)
        metrics = ask(port, "/metrics", method="GET")[1].decode().splitlines()
        assert 'segdeconv_requests_total{code="200"} 2.0' in metrics
        assert 'segdeconv_requests_total{code="503"} 1.0' in metrics
        assert "segdeconv_request_seconds_count 2.0" in metrics
        assert {"segdeconv_queue_length 0.0", "segdeconv_working 0.0"} <= set(metrics)


def wait_for(port: int, **state: int) -> None:
    end = time.monotonic() + 10
    while (seen := json.loads(ask(port, "/health", method="GET")[1])) != {"status": "ok", **state}:
        assert time.monotonic() < end, seen
        time.sleep(0.01)


def test_timeouts() -> None:
    """A thread that is stuck keeps its worker, and nothing else; a body that does not arrive is cut off."""
    segmenter = Fake()
    with serving(segmenter, Limits(workers=1, queue=0, timeout=0.3)) as port:
        segmenter.gate.clear()
        for _ in range(2):  # the second waits for the worker that the first still holds
            response, body = ask(port, "/predict", png(picture()))
            assert (response.status, json.loads(body)["detail"]) == (504, "no answer within 0.3 s")
        segmenter.gate.set()
        wait_for(port, working=0, waiting=0)
        assert ask(port, "/predict", png(picture()))[0].status == 200

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"half")
        assert connection.getresponse().status == 408
        connection.close()
        assert ask(port, "/predict", png(picture()))[0].status == 200


@pytest.mark.parametrize("earlier", [False, True])
def test_connections_without_a_whole_request_are_closed(earlier: bool) -> None:
    with serving(Fake(), Limits(timeout=0.3)) as port, socket.create_connection(("127.0.0.1", port)) as half:
        if earlier:
            half.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert half.recv(1 << 16).startswith(b"HTTP/1.1 200")
        half.sendall(b"GET / HT")
        half.settimeout(10)
        while half.recv(1 << 16):
            pass  # the rest of the answer; then the end


def test_a_client_that_does_not_read_its_answer_is_dropped() -> None:
    body = png(picture(1500, 1500))
    head = "POST /predict?output=overlay HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    # On a busy machine an overlay, the answer that is larger than what a connection holds, takes a second.
    with serving(Fake(), Limits(timeout=4.0)) as port, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", port))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        assert client.recv(12) == b"HTTP/1.1 200"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(ConnectionResetError):
                client.send(b"x")
                time.sleep(0.2)
                continue
            return
        pytest.fail("the connection is still there")


def test_a_picture_of_a_thousand_passes_is_refused(port: int) -> None:
    file = io.BytesIO()
    Image.fromarray(picture()).save(file, "JPEG", progressive=True)
    whole = file.getvalue()
    last = whole[whole.rindex(b"\xff\xda") : -2]
    assert ask(port, "/predict", whole)[0].status == 200
    response, body = ask(port, "/predict", whole[:-2] + 1000 * last + whole[-2:])
    assert response.status == 422
    assert "more than 100 scans" in json.loads(body)["detail"]


@pytest.mark.parametrize(("side", "status"), [(64, 200), (26000, 413)])
def test_a_tile_larger_than_its_picture_counts(side: int, status: int, port: int) -> None:
    data = zlib.compress(bytes(64 * 64))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8, 325: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    tiff = head + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    response, _ = ask(port, "/predict", tiff, headers={"Content-Type": "image/tiff"})
    assert response.status == status


def test_a_tile_of_two_widths_is_no_failure_of_the_server(port: int) -> None:
    file, tags = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    tags[TiffImagePlugin.TILEWIDTH], tags[TiffImagePlugin.TILELENGTH] = (16, 16), 16
    Image.fromarray(picture()).save(file, "TIFF", tiffinfo=tags)
    response, _ = ask(port, "/predict", file.getvalue(), headers={"Content-Type": "image/tiff"})
    assert response.status < 500


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to answer")
def test_a_stop_answers_what_is_in() -> None:
    code = """
import threading
from test_serve import Fake, Limits, serve
segmenter = Fake()
segmenter.gate.clear()
threading.Timer(60, segmenter.gate.set).start()
print_ready = threading.Thread(target=lambda: (segmenter.entered.acquire(), print("entered", flush=True)))
print_ready.start()
threading.Thread(target=lambda: (input(), segmenter.gate.set()), daemon=True).start()
serve(segmenter, "127.0.0.1", 0, Limits())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, ThreadPoolExecutor(1) as client:
        port = int(process.stdout.readline().split("127.0.0.1:")[1].split("/")[0])
        answer = client.submit(ask, port, "/predict", png(picture()))
        assert process.stdout.readline() == "entered\n"
        process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while is_open(port):  # it takes nobody new
            assert time.monotonic() < end
            time.sleep(0.02)
        assert process.poll() is None
        process.stdin.write("\n")
        process.stdin.flush()
        response, body = answer.result(30)
        assert response.status == 200
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), picture()[..., 0] // 86)
        process.wait(30)
    assert process.returncode == -signal.SIGTERM


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_what_cannot_be_served(port: int) -> None:
    with pytest.raises(
        UserError, match=rf"127.0.0.1 port {port}: cannot listen there \(Address already in use"
    ):
        serve(Fake(), "127.0.0.1", port, Limits())
    with pytest.raises(UserError, match="--host '': expected an address"):
        serve(Fake(), "", 0, Limits())
    classifier = Fake()
    classifier.metadata["task"] = "classification"
    with pytest.raises(UserError, match="the server needs a segmentation graph"):
        serve(classifier, "127.0.0.1", 0, Limits())
    for wrong in ({"workers": 0}, {"queue": -1}, {"timeout": 0}, {"megabytes": -1}, {"megapixels": 0}):
        name, value = next(iter(wrong.items()))
        with pytest.raises(UserError, match=f"--{name} {value}: expected"):
            Limits(**wrong)


def test_pictures_that_run_whole_are_smaller() -> None:
    segmenter, body = Fake(), png(np.zeros((2001, 2000, 3), np.uint8))
    for segmenter.whole, limits, code in (
        (True, Limits(), 413), (True, Limits(megapixels=5), 200), (False, Limits(), 200)
    ):  # fmt: skip
        with serving(segmenter, limits) as port:
            assert ask(port, "/predict", body)[0].status == code


def test_the_page(browser: Any, port: int, tmp_path: Path) -> None:
    """Choose, look, fade, drop, with the keyboard where a person would; nothing is asked of other hosts."""
    image = picture(40, 60)
    image[..., 0] //= 2  # leaves the last class out
    Image.fromarray(image).save(tmp_path / "photo.png")
    (tmp_path / "notes.png").write_text("no picture")
    page = browser.new_page()
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("filechooser", lambda _: None)  # Chromium is told now, not at the moment of the key
    page.goto(f"http://127.0.0.1:{port}/")
    page.locator("#about", has_text="3 classes").wait_for()
    assert page.title() == "fake"
    assert page.locator("#result").is_hidden()

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "file"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(tmp_path / "photo.png")
    page.locator("#status", has_text="photo.png: 60 \u00d7 40 pixels").wait_for()
    labels = image[..., 0] // 86
    assert np.array_equal(painted(page), np.array(PALETTE)[labels])
    shares = np.bincount(labels.ravel()) / labels.size
    assert page.locator("#legend tr").all_inner_texts() == [
        f"\t{CLASSES[i]}\t{shares[i]:.1%}".replace("%", " %") for i in np.argsort(-shares)
    ]
    assert page.locator("#absent").inner_text() == "Not in the picture: café"

    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "opacity"
    page.keyboard.press("ArrowLeft")
    assert page.locator("#percent").inner_text() == "59 %"
    assert page.evaluate("getComputedStyle(document.getElementById('overlay')).opacity") == "0.59"

    page.set_input_files("#file", tmp_path / "notes.png")
    page.locator("#status.error", has_text="notes.png: the body is no picture").wait_for()
    assert page.locator("#result").is_hidden()  # it is another picture's
    page.evaluate(
        """(bytes) => {
            const dropped = new DataTransfer();
            dropped.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: dropped, bubbles: true }));
        }""",
        list(png(picture(20, 10))),
    )
    page.locator("#status", has_text="dropped.png: 10 \u00d7 20 pixels").wait_for()
    assert np.array_equal(painted(page), np.array(PALETTE)[picture(20, 10)[..., 0] // 86])
    page.close()
    assert errors == []
    assert {url.split("/")[2] for url in asked if not url.startswith(("blob:", "data:"))} == {
        f"127.0.0.1:{port}"
    }


def painted(page: Any) -> np.ndarray:
    """RGB (H, W, 3) of the overlay that a page shows."""
    width, height, values = page.evaluate("""() => {
        const image = document.getElementById("overlay");
        const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight).getContext("2d");
        canvas.drawImage(image, 0, 0);
        const { data, width, height } = canvas.getImageData(0, 0, canvas.canvas.width, canvas.canvas.height);
        return [width, height, Array.from(data)];
    }""")
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def small_graph(folder: Path) -> Path:
    """One convolution of noise, written as `segdeconv export` would; to export a network takes longer."""
    graph = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        small (float[n, 3, h, w] image, float[3, 3, 5, 5] weight) => (uint8[n, h, w] labels) {
            scores = Conv <pads = [2, 2, 2, 2]> (image, weight)
            best = ArgMax <axis = 1, keepdims = 0> (scores)
            labels = Cast <to = 2> (best)
        }
    """)
    weight = np.random.default_rng(0).standard_normal((3, 3, 5, 5)).astype(np.float32)
    del graph.graph.input[1]
    graph.graph.initializer.append(onnx.numpy_helper.from_array(weight, "weight"))
    metadata = {"task": "segmentation", "classes": CLASSES, "palette": PALETTE, "output": "labels"}
    metadata |= {"mean": [0.5] * 3, "std": [0.2] * 3, "size_multiple": 1, "resize": None}
    onnx.helper.set_model_props(graph, {key: json.dumps(value) for key, value in metadata.items()})
    onnx.save(graph, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("requests", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_load(requests: int, tmp_path: Path) -> None:
    """No lost and no mixed-up answer, the right status for each kind of bad input, steady memory."""
    report = LOAD["run"](small_graph(tmp_path), requests, clients=8)
    assert report.wrong == []
    assert sum(report.answers.values()) == requests
    kinds = {f"{request.kind}: {request.status}" for request in LOAD["bad_pictures"]()}
    assert set(report.answers) - kinds == {"good: 200", "walked away"}
    assert report.growth < LOAD["GROWTH"]
    assert report.exit_code == 128 + signal.SIGTERM


def test_answers_are_of_the_kind_they_say() -> None:
    from test_serve import Fake, ask, png, serving

    with serving(Fake()) as port:
        for path, body, method in (("/predict", png(picture(3, 4)), "POST"), ("/", None, "GET")):
            assert ask(port, path, body, method)[0].headers["X-Content-Type-Options"] == "nosniff"


def test_a_failure_of_the_server_is_counted_as_one() -> None:
    from test_serve import Fake, ask, png, serving

    class Broken(Fake):
        def __call__(self, image: np.ndarray) -> np.ndarray:
            raise RuntimeError("out of luck")

    with serving(Broken()) as port:
        assert ask(port, "/predict", png(picture(3, 4)))[0].status == 500
        metrics = ask(port, "/metrics", method="GET")[1].decode().splitlines()
    assert 'segdeconv_requests_total{code="500"} 1.0' in metrics
    assert "segdeconv_request_seconds_count 0.0" in metrics
