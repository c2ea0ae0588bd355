"""Good and bad pictures, mixed, from many clients at once: does every one get its own answer?

    python tools/load_test.py model.onnx --requests 3000 --clients 8

Starts ``segdeconv serve`` on a free port of 127.0.0.1 and stops it at the end. Every answer is compared with
what `Segmenter` says of that client's picture in this process, or with the status that bad input must get. No
two clients have a picture in common. Printed are answers by kind, latencies, and the server's memory after a
tenth of the requests and after all. Exit code 1 where an answer is wrong or missing, or where memory grew.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from segdeconv.errors import one_sentence
from segdeconv.images import Palette, Picture, overlay
from segdeconv.runtime import Segmenter

MEGABYTES = 1  # the server's limit here, so that too large a body is still small
GROWTH = 32.0  # MiB of memory; allocators keep some of what they were given
TIMEOUT = 60.0  # seconds that a client waits for an answer
PICTURES = 10  # good ones of each client
OUTPUTS = ("labels", "overlay", "areas")


@dataclass(frozen=True)
class Request:
    """What a client sends and what it must get; a good picture has ``image`` and ``labels``."""

    kind: str
    body: bytes
    status: int
    image: Picture | None = None
    labels: Picture | None = None
    content_type: str = "image/png"
    chunked: bool = False


@dataclass
class Report:
    """What came back; memory in MiB, 0 where the system does not tell it; seconds that good pictures took."""

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0
    memory_before: float = 0.0
    memory_after: float = 0.0
    exit_code: int | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, answer: str, seconds: float | None = None, wrong: str | None = None) -> None:
        with self.lock:
            self.answers[answer] += 1
            if seconds is not None:
                self.latencies.append(seconds)
            if wrong is not None:
                self.wrong.append(f"{answer}, {wrong}")

    @property
    def growth(self) -> float:
        return self.memory_after - self.memory_before


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def good_picture(rng: np.random.Generator, segmenter: Segmenter) -> Request:
    rows, columns = rng.integers(2, 6, 2)
    coarse = Image.fromarray(rng.integers(0, 256, (rows, columns, 3), dtype=np.uint8))
    width, height = (int(side) for side in rng.integers(20, 200, 2))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return Request("good", encoded(image), 200, pixels, segmenter(pixels).astype(np.uint8))


def bad_pictures() -> list[Request]:
    """One of each kind, with the status that it must get."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    png = encoded(Image.fromarray(noise))
    large = bytes(int(MEGABYTES * 1.5e6))
    return [
        Request("truncated", png[: len(png) // 2], 422),
        Request("16 bits", encoded(Image.fromarray(noise[..., 0].astype(np.uint16) * 256)), 422),
        Request("too large", large, 413),
        Request("too large, length not said", large, 413, chunked=True),
        Request("bomb", encoded(Image.new("1", (12_000, 12_000))), 413),
        Request("one row of pixels", encoded(Image.new("L", (60_000, 1))), 413),
        Request("no picture", b"hello, world", 415),
        Request("empty", b"", 415),
        Request("a kind not taken", encoded(Image.fromarray(noise), "GIF"), 415),
        Request("wrong type", png, 415, content_type="multipart/form-data; boundary=x"),
    ]


@contextmanager
def serving(model: Path, report: Report) -> Iterator[int]:
    """A server process and its port; its exit code is in the report afterwards."""
    command = [sys.executable, "-m", "segdeconv", "serve", str(model), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        [*command, "--megabytes", str(MEGABYTES), "--queue", "64"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = ""
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)/", said)) is None:
            line = process.stdout.readline()
            if not line:
                sys.exit(f"the server did not start: {said}")
            said += line
        yield int(found[1])
    finally:
        process.terminate()
        report.exit_code = process.wait(TIMEOUT)


def memory(port: int) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("GET", "/metrics")
    found = re.search(rb"^process_resident_memory_bytes (\S+)", connection.getresponse().read(), re.MULTILINE)
    connection.close()
    return float(found[1]) / 2**20 if found else 0.0


def is_right(request: Request, output: str, palette: Palette, body: bytes) -> bool:
    if request.image is None or request.labels is None:
        return bool(json.loads(body)["detail"])
    if output == "areas":
        counts = np.bincount(request.labels.ravel(), minlength=len(palette))
        return list(json.loads(body)["pixels"].values()) == counts.tolist()
    want = request.labels if output == "labels" else overlay(request.image, request.labels, palette)
    return np.array_equal(np.asarray(Image.open(io.BytesIO(body))), want)


class Client:
    """One client: a connection that is kept, and its share of the requests."""

    def __init__(self, seed: int, segmenter: Segmenter, report: Report) -> None:
        self.random, rng = random.Random(seed), np.random.default_rng(seed)
        self.good = [good_picture(rng, segmenter) for _ in range(PICTURES)]
        self.bad = bad_pictures()
        self.palette, self.report = segmenter.palette, report

    def run(self, port: int, requests: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        for _ in range(requests):
            choice = self.random.random()
            if choice < 0.02:
                self.walk_away(port)
            else:
                self.ask(connection, self.random.choice(self.good if choice < 0.6 else self.bad))
        connection.close()

    def walk_away(self, port: int) -> None:
        """Promise a body, send half of it, and go."""
        body = self.good[0].body
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        connection.putrequest("POST", "/predict")
        connection.putheader("Content-Type", "image/png")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body[: len(body) // 2])
        connection.close()
        self.report.add("walked away")

    def ask(self, connection: http.client.HTTPConnection, request: Request) -> None:
        output = self.random.choice(OUTPUTS)
        begun = time.perf_counter()
        try:
            connection.request(
                "POST",
                f"/predict?output={output}",
                iter([request.body]) if request.chunked else request.body,
                {"Content-Type": request.content_type},
                encode_chunked=request.chunked,
            )
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            self.report.add(f"{request.kind}: no answer", wrong=repr(error))
            return
        seconds = None if request.image is None else time.perf_counter() - begun
        right = response.status == request.status and is_right(request, output, self.palette, body)
        wrong = None if right else f"{output}, {body[:100]!r}"
        self.report.add(f"{request.kind}: {response.status}", seconds, wrong)


def run(model: Path, requests: int, clients: int) -> Report:
    """Send ``requests`` from ``clients`` threads, a tenth of them before memory is first looked at."""
    report = Report()
    segmenter = Segmenter(model, "cpu", threads=1)
    visitors = [Client(seed, segmenter, report) for seed in range(clients)]
    with serving(model, report) as port:
        begun = time.perf_counter()
        for share in (requests // 10, requests - requests // 10):
            report.memory_before = memory(port)
            counts = [share // clients + (i < share % clients) for i in range(clients)]
            threads = [
                threading.Thread(target=visitor.run, args=(port, count))
                for visitor, count in zip(visitors, counts, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        report.seconds = time.perf_counter() - begun
        report.memory_after = memory(port)
    return report


@one_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a file made by segdeconv export")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    report = run(options.model, options.requests, options.clients)
    for kind, count in sorted(report.answers.items()):
        print(f"{count:6} {kind}")
    total = sum(report.answers.values())
    print(f"{total} of {options.requests} requests in {report.seconds:.1f} s, {total / report.seconds:.0f}/s")
    if len(report.latencies) > 1:
        cuts = statistics.quantiles(report.latencies, n=100)
        print("good pictures: " + ", ".join(f"p{p} {1000 * cuts[p - 1]:.0f} ms" for p in (50, 95, 99)))
    print(f"memory {report.memory_before:.0f} -> {report.memory_after:.0f} MiB; exit code {report.exit_code}")
    for line in report.wrong:
        print(f"wrong: {line}")
    sys.exit(bool(report.wrong) or report.growth > GROWTH)


if __name__ == "__main__":
    main()
