"""An exported graph over HTTP: POST a picture, get labels, an overlay or class areas; and a page for people.

One process, one graph. Pictures are decoded, labelled and encoded in a bounded pool of threads, never on the
event loop. Whatever clients send costs a bounded amount of memory: a request counts from its first byte to
its answer, and more than ``workers + queue`` of them at a time are turned away with 503.

Not here: TLS, authentication, several processes. A proxy in front does these.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import math
import socket
import time
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH

from segdeconv.errors import UserError
from segdeconv.images import FORMATS, Picture, label_png, overlay, to_rgb
from segdeconv.runtime import Segmenter

try:
    import uvicorn
    from fastapi import FastAPI, HTTPException, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, JSONResponse
    from fastapi.routing import APIRoute
    from prometheus_client import (
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        ProcessCollector,
        generate_latest,
    )
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from starlette.requests import ClientDisconnect
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError:
    raise UserError("segdeconv serve needs FastAPI; pip install 'segdeconv[serve]'") from None

Output = Literal["labels", "overlay", "areas"]
T = TypeVar("T")

WEB = Path(__file__).parent / "web"
PAGE = {"": "page.html", "page.css": "page.css", "page.js": "page.js", "segment.js": "segment_server.js"}

_JPEG_SCAN, _MAX_SCANS = b"\xff\xda", 100  # a progressive JPEG has some ten; each is a pass over the picture
_MAX_SIDE = 1 << 14  # pixels; a picture one pixel wide is padded to the graph's size multiple
_PICTURE = Path("picture")  # what a request's body is called in messages
_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)  # seconds

_PREDICT: dict[str, Any] = {  # what /openapi.json says of it
    "responses": {
        200: {"content": {"image/png": {}, "application/json": {}}},
        408: {"description": "The body did not arrive in time."},
        413: {"description": "The body has too many bytes, or the picture too many pixels."},
        415: {"description": "The body is no picture."},
        422: {"description": "The picture is damaged."},
        503: {"description": "The queue is full."},
        504: {"description": "No answer in time."},
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
}


@dataclass(frozen=True)
class Limits:
    """What one server takes.

    Attributes:
        megabytes: of a request's body, in 10^6 bytes.
        megapixels: of a picture, in 10^6 pixels, known from its header before anything is decoded; by default
            25, or 4 where pictures go through the network whole, which takes memory.
        workers: pictures worked on at a time.
        queue: requests that may wait for a worker or still be on their way in.
        timeout: seconds that a request's body may take to arrive, and then its answer.
    """

    megabytes: float = 20.0
    megapixels: float | None = None
    workers: int = 2
    queue: int = 16
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("megabytes", "megapixels", "workers", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e9:
                raise UserError(f"--{name} {value}: expected more than 0, to 1e9")
        if not 0 <= self.queue < 1e9:
            raise UserError(f"--queue {self.queue}: expected 0 or more, to 1e9")

    def megapixels_of(self, segmenter: Segmenter) -> float:
        return self.megapixels or (4.0 if segmenter.whole else 25.0)


class _Metrics:
    """What ``/metrics`` tells. A registry of its own, so that a process can hold several applications."""

    def __init__(self, working: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "segdeconv_requests", "Answers of /predict by HTTP status.", ["code"], registry=self.registry
        )
        self.seconds = Histogram(
            "segdeconv_request_seconds",
            "From a picture's first byte to its answer, answers of status 200 only.",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        for name, text, read in (
            ("segdeconv_working", "Pictures being worked on.", working),
            ("segdeconv_queue_length", "Requests waiting for a worker or on their way in.", waiting),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)


class _WorkerPool:
    """At most ``workers`` busy threads, and ``queue`` requests that wait."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._inside = self.working = 0
        self._free = asyncio.Semaphore(limits.workers)
        self._threads = ThreadPoolExecutor(limits.workers, thread_name_prefix="segdeconv")

    @property
    def waiting(self) -> int:
        return max(0, self._inside - self.working)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A request's place in the pool, from the first byte of its body to its answer.

        Raises:
            HTTPException: 503, there is none left.
        """
        if self._inside >= self._limits.workers + self._limits.queue:
            raise HTTPException(503, "the queue is full; try again", headers={"Retry-After": "1"})
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def run(self, work: Callable[[], Response]) -> Response:
        """Run ``work`` in a thread when one is free; nothing can stop it there, not even a timeout."""
        await self._free.acquire()
        self.working += 1
        future = asyncio.get_running_loop().run_in_executor(self._threads, work)
        future.add_done_callback(self._leave)
        return await asyncio.shield(future)

    def _leave(self, future: asyncio.Future[Response]) -> None:
        self.working -= 1
        self._free.release()
        future.exception()  # or asyncio would log it where nobody waits any more

    def close(self) -> None:
        self._threads.shutdown()


def make_app(segmenter: Segmenter, limits: Limits) -> FastAPI:
    """The application: ``/predict``, ``/health``, ``/metrics``, ``/model.json`` and the page at ``/``."""
    pool = _WorkerPool(limits)
    metrics = _Metrics(lambda: pool.working, lambda: pool.waiting)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        pool.close()

    # FastAPI's own pages of documentation load scripts from elsewhere; /openapi.json stays.
    app = FastAPI(title="segdeconv", lifespan=lifespan, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        begun, code = time.perf_counter(), 500
        try:
            response = await call_next(request)
            code = response.status_code
        finally:
            if request.url.path == "/predict":
                metrics.requests.labels(code).inc()
                if code == 200:
                    metrics.seconds.observe(time.perf_counter() - begun)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        sentence = f"{first['loc'][-1]} {first.get('input')!r}: {first['msg'].lower()}"
        return JSONResponse({"detail": sentence}, 422)

    @app.post("/predict", response_class=Response, **_PREDICT)
    async def predict(request: Request, output: Output = "labels") -> Response:
        """Label the picture in the body.

        The answer is class numbers as palette PNG, an overlay as PNG, or class areas as JSON; its header
        ``Class-Pixels`` holds the number of pixels of each class as JSON.
        """
        _check_type(request)
        with pool.place():
            body = await _within(limits.timeout, _read(request, limits), 408, "the body did not arrive")
            work = pool.run(lambda: _respond(segmenter, body, limits, output))
            return await _within(limits.timeout, work, 504, "no answer")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "working": pool.working, "waiting": pool.waiting}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/model.json")
    async def model() -> dict[str, Any]:
        return segmenter.metadata

    for route, name in PAGE.items():
        app.get(f"/{route}", include_in_schema=False)(_file(WEB / name))
    for got in list(app.routes):  # probes and balancers ask for heads, which FastAPI's get refuses
        if isinstance(got, APIRoute) and got.methods == {"GET"}:
            app.head(got.path, include_in_schema=False)(got.endpoint)
    return app


def serve(segmenter: Segmenter, host: str, port: int, limits: Limits) -> None:
    """Serve a graph until SIGINT or SIGTERM; requests that are in are answered first.

    Raises:
        UserError: the graph does not segment, has too many classes for PNGs, or the address is taken.
    """
    if segmenter.metadata["task"] != "segmentation":
        raise UserError(f"the graph does {segmenter.metadata['task']}; the server needs a segmentation graph")
    if len(segmenter.classes) > 256:
        raise UserError(f"the graph has {len(segmenter.classes)} classes; label PNGs hold at most 256")
    if not host:  # which would be every address of the machine
        raise UserError("--host '': expected an address, such as 127.0.0.1, or 0.0.0.0 for all of them")
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except (OSError, OverflowError, TypeError) as error:  # the last of names that no host can have
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{host} port {port}: cannot listen there ({reason}); choose another --port or --host"
        ) from None
    shown = f"[{host}]" if ":" in host else host
    print(
        f"serving on http://{shown}:{listener.getsockname()[1]}/; Ctrl-C stops",
        flush=True,
    )
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_decode` has its own limit
    # Where no file descriptor is left, asyncio would log thousands of tracebacks a second.
    logging.getLogger("asyncio").addFilter(lambda record: "out of system resource" not in record.getMessage())
    uvicorn.Server(server_config(segmenter, limits)).run([listener])


def server_config(segmenter: Segmenter, limits: Limits) -> uvicorn.Config:
    """What `serve` runs."""
    return uvicorn.Config(
        make_app(segmenter, limits),
        http=_connections(limits.timeout),
        log_level="warning",  # /metrics counts
        server_header=False,
        timeout_graceful_shutdown=2 * int(limits.timeout) + 1,
    )


def _connections(seconds: float) -> type[H11Protocol]:
    """The h11 protocol, which bounds headers, whatever else is installed. A connection is closed when it has
    completed no request for one to two times ``seconds`` (uvicorn would wait for ever), or when its client
    reads nothing of an answer.
    """

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(seconds, self._look, self.cycle)

        def _look(self, seen: Any, unread: int = 0) -> None:
            waits = self.cycle is None or self.cycle.response_complete
            left = self.transport.get_write_buffer_size()
            if left and left == unread:  # closing would wait until the client has read its answer
                self.transport.abort()
                return
            if waits and self.cycle is seen:
                self.transport.close()
            if left or not self.transport.is_closing():
                self.loop.call_later(seconds, self._look, self.cycle, left)

    return Connection


def _file(path: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(path, headers={"Cache-Control": "no-cache"})

    return send


def _check_type(request: Request) -> None:
    """Refuse the content types that a page of another origin could send unasked, without CORS's preflight."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not kind.startswith("image/") and kind != "application/octet-stream":
        raise HTTPException(
            415,
            f"content type {kind!r}: expected a picture's bytes as the body, with Content-Type image/jpeg "
            "or the like, or application/octet-stream",
        )


async def _within(seconds: float, work: Coroutine[Any, Any, T], code: int, sentence: str) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        raise HTTPException(code, f"{sentence} within {seconds:g} s") from None


async def _read(request: Request, limits: Limits) -> bytes:
    most = int(limits.megabytes * 1e6)

    def too_large() -> NoReturn:
        raise HTTPException(413, f"the body has more than {limits.megabytes:g} MB; send a smaller picture")

    if int(request.headers.get("content-length", 0)) > most:
        too_large()
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                too_large()
    except ClientDisconnect:
        raise HTTPException(400, "the client went away") from None  # for the metrics; nobody reads it
    return bytes(body)


def _decode(body: bytes, megapixels: float) -> Picture:
    try:
        image = Image.open(io.BytesIO(body), formats=FORMATS)
    except Image.DecompressionBombError:
        raise HTTPException(413, "the picture has too many pixels; Pillow does not open it") from None
    except Exception:  # Pillow's parsers raise all sorts of things
        raise HTTPException(415, f"the body is no picture; expected {', '.join(FORMATS)}") from None
    sides = map(getattr(image, "tag_v2", {}).get, (TILEWIDTH, TILELENGTH))
    tile = math.prod(side for side in sides if isinstance(side, int))  # of a TIFF; decoded whole
    if max(image.width * image.height, tile) > megapixels * 1e6 or max(image.size) > _MAX_SIDE:
        raise HTTPException(
            413,
            f"the picture has {image.width} x {image.height} pixels; expected at most "
            f"{megapixels:g} megapixels and {_MAX_SIDE} a side",
        )
    if image.format in ("JPEG", "MPO") and body.count(_JPEG_SCAN) > _MAX_SCANS:
        raise HTTPException(
            422, f"the picture has more than {_MAX_SCANS} scans, each of which takes a decoding"
        )
    return to_rgb(image, _PICTURE)


def _respond(segmenter: Segmenter, body: bytes, limits: Limits, output: Output) -> Response:
    try:
        image = _decode(body, limits.megapixels_of(segmenter))
        labels = segmenter(image).astype(np.uint8, copy=False)  # `serve` takes no more than 256 classes
    except UserError as error:
        raise HTTPException(422, str(error)) from None
    counts = np.bincount(labels.ravel(), minlength=len(segmenter.classes)).tolist()
    pixels = dict(zip(segmenter.classes, counts, strict=False))
    headers = {"Class-Pixels": json.dumps(pixels)}
    if output == "areas":
        height, width = labels.shape
        shares = {name: count / labels.size for name, count in pixels.items()}
        return JSONResponse(
            {"height": height, "width": width, "pixels": pixels, "shares": shares}, headers=headers
        )
    if output == "labels":
        png = label_png(labels, segmenter.palette)
    else:
        png = Image.fromarray(overlay(image, labels, segmenter.palette))
    file = io.BytesIO()
    png.save(file, "PNG", compress_level=1)  # a fifth of the default's time, files little larger
    return Response(file.getvalue(), media_type="image/png", headers=headers)
