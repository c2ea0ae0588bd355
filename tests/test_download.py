"""Downloads from a real HTTP server on this machine, which behaves as badly as servers and networks do."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path

import numpy as np
import pytest

from segdeconv import download, progress
from segdeconv.download import fetch
from segdeconv.errors import UserError

SIZE = 300_001
RIGHT = np.random.default_rng(0).bytes(SIZE)
OTHER = np.random.default_rng(1).bytes(SIZE)
SHA = hashlib.sha256(RIGHT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """What it does is set by the test; what it was asked is in ``requests``."""

    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests: list[tuple[str, Message]] = []
        self.content: Callable[[int], bytes] = lambda request: RIGHT
        self.type = "application/octet-stream"
        self.tag: Callable[[int], str | None] = lambda request: '"one"'
        self.cut: Callable[[int], int | None] = lambda request: None  # bytes of an answer before it is cut
        self.status: Callable[[int], int] = lambda request: 200
        self.ranges = self.heeds_if_range = True
        self.claim: Callable[[int], int] = lambda request: 0  # added to the length that is told
        self.reset = False  # what is cut is cut by a reset of the line, not by its end
        self.silence = 0.0  # seconds before an answer
        self.pause = 0.0  # seconds between its pieces


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, number = self.server, len(self.server.requests)
        server.requests.append((self.path, self.headers))
        time.sleep(server.silence)
        if self.path.startswith(("/moved", "/circle")):
            self.send_response(302)
            self.send_header("Location", self.path.replace("/moved", "/there"))
            self.end_headers()
            return
        if (status := server.status(number)) != 200:
            self.send_error(status)
            return
        content, tag = server.content(number), server.tag(number)
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = not server.heeds_if_range or self.headers.get("If-Range") == tag
        if wanted and server.ranges and same:
            start = int(wanted[1])
            there = start < len(content)
            self.send_response(206 if there else 416)
            extent = f"{start}-{len(content) - 1}" if there else "*"
            self.send_header("Content-Range", f"bytes {extent}/{len(content)}")
            content = content[start:]
        else:
            self.send_response(200)
        if tag:
            self.send_header("ETag", tag)
        self.send_header("Content-Type", server.type)
        self.send_header("Content-Length", str(len(content) + server.claim(number)))
        self.end_headers()
        for begin in range(0, len(content[: server.cut(number)]), 30_000):
            piece = content[: server.cut(number)][begin : begin + 30_000]
            try:
                self.wfile.write(piece)
            except OSError:  # whoever asked has gone
                return
            time.sleep(server.pause)
        if server.reset and server.cut(number) is not None:
            time.sleep(0.05)  # a reset overtakes what is on its way
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@contextlib.contextmanager
def serving(port: int = 0) -> Iterator[Server]:
    server = Server(port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_WAIT", 0.001)
    monkeypatch.setattr(download, "_CHUNK", 2**14)
    for name in ("SEGDECONV_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What is waited between attempts, instead of waiting."""
    waits: list[float] = []
    monkeypatch.setattr(download, "_WAIT", 1.0)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: waits.append(seconds) if seconds else None)
    return waits


def get(target: Path, *sources: str) -> Path:
    return fetch(target, sources, SIZE, SHA)


def ranges(server: Server) -> list[str | None]:
    return [headers.get("Range") for _, headers in server.requests]


def check(path: Path) -> None:
    """The file is right, and nothing but it and its lock is left."""
    assert path.read_bytes() == RIGHT
    assert left(path) <= {path.name, f"{path.name}.lock"}


def left(path: Path) -> set[str]:
    return {other.name for other in path.parent.iterdir()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights.safetensors"


def test_once_and_then_from_the_cache(server: Server, target: Path) -> None:
    for _ in range(2):
        check(get(target, f"{server.url}/a"))
    assert len(server.requests) == 1
    assert ranges(server) == [None]


def test_a_cut_transfer_goes_on_where_it_stopped(server: Server, target: Path) -> None:
    server.cut = lambda request: 120_000 if request < 2 else None
    check(get(target, f"{server.url}/a"))
    assert ranges(server) == [None, "bytes=120000-", "bytes=240000-"]
    assert {headers.get("If-Range") for _, headers in server.requests[1:]} == {'"one"'}


def test_what_arrived_before_a_reset_is_kept(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_CHUNK", 2**20)  # more than arrives at once
    server.cut, server.reset = lambda request: 120_000 if request < 2 else None, True
    check(get(target, f"{server.url}/a"))
    assert ranges(server) == [None, "bytes=120000-", "bytes=240000-"]


def test_more_cuts_than_attempts_are_fine_while_something_arrives(server: Server, target: Path) -> None:
    server.cut = lambda request: SIZE // (3 * download._ATTEMPTS)
    check(get(target, f"{server.url}/a"))
    assert len(server.requests) > 2 * download._ATTEMPTS


def test_a_server_without_ranges_starts_over(server: Server, target: Path) -> None:
    server.ranges = False
    server.cut = lambda request: 120_000 if request == 0 else None
    check(get(target, f"{server.url}/a"))
    assert ranges(server) == [None, "bytes=120000-"]


@pytest.mark.parametrize("tag", [None, 'W/"weak"'])
def test_a_version_that_cannot_be_told_is_not_resumed(server: Server, target: Path, tag: str | None) -> None:
    server.tag = lambda request: tag
    server.cut = lambda request: 120_000 if request == 0 else None
    check(get(target, f"{server.url}/a"))
    assert ranges(server) == [None, None]


@pytest.mark.parametrize("heeds_if_range", [True, False])
def test_a_file_that_changes_between_attempts(server: Server, target: Path, heeds_if_range: bool) -> None:
    server.heeds_if_range = heeds_if_range
    server.content = lambda request: OTHER if request == 0 else RIGHT
    server.tag = lambda request: '"old"' if request == 0 else '"new"'
    server.cut = lambda request: 120_000 if request == 0 else None
    check(get(target, f"{server.url}/a"))
    assert ranges(server)[:2] == [None, "bytes=120000-"]


def test_a_change_that_the_server_hides_is_found_by_the_hash(server: Server, target: Path) -> None:
    server.content = lambda request: OTHER if request == 0 else RIGHT
    server.cut = lambda request: 120_000 if request == 0 else None
    check(get(target, f"{server.url}/a"))
    assert ranges(server) == [None, "bytes=120000-", None]


def test_a_range_that_cannot_be_satisfied_starts_over(server: Server, target: Path) -> None:
    server.cut = lambda request: 120_000 if request == 0 else None
    server.status = lambda request: 416 if request == 1 else 200
    check(get(target, f"{server.url}/a"))
    assert ranges(server) == [None, "bytes=120000-", None]


@pytest.mark.parametrize("claim", [-100_000, 100_000])
def test_lengths_that_are_lies(server: Server, target: Path, claim: int) -> None:
    server.claim = lambda request: claim if request == 0 else 0
    check(get(target, f"{server.url}/a"))
    assert ranges(server) == [None, *(["bytes=200001-"] if claim < 0 else [])]


@pytest.mark.parametrize("tag", [None, '"one"'])
@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("length", [190, 200_000])
def test_a_file_that_is_too_short(
    server: Server, target: Path, waits: list[float], tag: str | None, ranges: bool, length: int
) -> None:
    server.content = lambda request: RIGHT[:length]
    server.type, server.tag, server.ranges = "text/html; charset=utf-8", lambda request: tag, ranges
    known = "" if tag and ranges else r" \(text/html\)"
    with pytest.raises(
        UserError, match=rf"/a answers with {length} bytes{known}, not the 300001 of this file$"
    ):
        get(target, f"{server.url}/a")
    assert len(server.requests) == (2 if tag else 1)
    assert not waits
    assert left(target) == {"weights.safetensors.lock"}


def test_a_page_does_not_displace_what_another_source_brought(server: Server, target: Path) -> None:
    server.cut = lambda request: 120_000 if request == 0 else None
    server.status = lambda request: 404 if request == 1 else 200
    server.content = lambda request: RIGHT[:190] if request == 2 else RIGHT
    with pytest.raises(UserError, match="answers 404"):
        get(target, f"{server.url}/good")
    check(get(target, f"{server.url}/page", f"{server.url}/good"))
    assert ranges(server) == [None, "bytes=120000-", None, "bytes=120000-"]


@pytest.mark.parametrize("content", [RIGHT[:190], RIGHT + b"more"])
def test_a_local_file_of_another_length(
    target: Path, tmp_path: Path, waits: list[float], content: bytes
) -> None:
    (tmp_path / "here").write_bytes(content)
    with pytest.raises(UserError, match=rf"/here answers with {len(content)} bytes .*, not the 300001"):
        get(target, (tmp_path / "here").as_uri())
    assert not waits
    assert left(target) == {"weights.safetensors.lock"}


@pytest.mark.parametrize("address", ["http://127.0.0.1/a b", "http:///a", "http://127.0.0.1:port/a"])
def test_a_malformed_address_is_asked_once(target: Path, waits: list[float], address: str) -> None:
    with pytest.raises(UserError, match=f"{address} (is no address|cannot be reached)"):
        get(target, address)
    assert not waits


def test_an_endless_file_is_not_read_to_its_end(server: Server, target: Path) -> None:
    server.content = lambda request: RIGHT + bytes(50_000_000)
    check(get(target, f"{server.url}/a"))


def test_redirects_keep_the_range(server: Server, target: Path) -> None:
    server.cut = lambda request: 120_000 if request == 1 else None
    check(get(target, f"{server.url}/moved/a"))
    assert [path for path, _ in server.requests] == ["/moved/a", "/there/a"] * 2
    assert ranges(server) == [None, None, "bytes=120000-", "bytes=120000-"]


def test_redirects_in_a_circle(server: Server, target: Path) -> None:
    with pytest.raises(UserError, match=r"^weights\.safetensors: .*/circle answers 302 .*infinite loop.*$"):
        get(target, f"{server.url}/circle")


def test_a_source_is_not_measured_by_what_another_brought(server: Server, target: Path) -> None:
    server.status = lambda request: {1: 404, 2: 503}.get(request, 200)
    server.cut = lambda request: 250_000 if request == 0 else 20_000
    check(get(target, f"{server.url}/a", f"{server.url}/b"))
    assert ranges(server)[:5] == [None, "bytes=250000-", None, None, "bytes=20000-"]


def test_wrong_bytes_are_kept_aside_and_the_next_source_is_taken(server: Server, target: Path) -> None:
    server.content = lambda request: OTHER if request == 0 else RIGHT
    get(target, f"{server.url}/bad", f"{server.url}/good")
    assert target.read_bytes() == RIGHT
    assert target.with_name("weights.safetensors.wrong").read_bytes() == OTHER


def test_wrong_bytes_everywhere(server: Server, target: Path) -> None:
    server.content = lambda request: OTHER
    with pytest.raises(UserError, match=rf"/a gives a file of another SHA-256 than {SHA[:12]}.*\.wrong"):
        get(target, f"{server.url}/a")
    assert not target.exists()


def test_a_damaged_cache_is_seen_and_mended(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    get(target, f"{server.url}/a")
    target.write_bytes(OTHER)
    get(target, f"{server.url}/a")
    assert target.read_bytes() == RIGHT
    aside = target.with_name("weights.safetensors.wrong")
    assert aside.read_bytes() == OTHER
    assert capsys.readouterr() == ("", f"{target}: is damaged, kept as {aside}\n")


def test_progress_goes_to_standard_error(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.0)
    get(target, f"{server.url}/a")
    progress.console.print("afterwards")
    told = capsys.readouterr()
    assert told.out == "afterwards\n"
    assert told.err.startswith("weights.safetensors (MiB): 1/19, ")


@pytest.mark.parametrize("errors", [(503, 429, 500), (408, 425, 599)])
def test_server_errors_are_waited_for(
    errors: tuple[int, ...], server: Server, target: Path, waits: list[float]
) -> None:
    server.status = lambda request: errors[request] if request < 3 else 200
    check(get(target, f"{server.url}/a"))
    assert waits == [1, 2, 4]


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_final_and_falls_back(server: Server, target: Path, status: int) -> None:
    server.status = lambda request: status if request == 0 else 200
    check(get(target, f"{server.url}/gone", f"{server.url}/here"))
    assert [path for path, _ in server.requests] == ["/gone", "/here"]


def test_every_source_says_its_part(server: Server, target: Path, tmp_path: Path) -> None:
    server.status = lambda request: 404 if request == 0 else 500
    sources = (f"{server.url}/a", f"{server.url}/b", "http://127.0.0.1:1/c", "http://nowhere.invalid/d")
    with pytest.raises(UserError) as error:
        get(target, *sources, (tmp_path / "e").as_uri(), "ftp://f", "https://bob:hunter2@g.example/h")
    text = str(error.value)
    assert "hunter2" not in text
    for part in (
        "weights.safetensors: cannot be downloaded",
        "/a answers 404 Not Found;",
        "/b answers 500 Internal Server Error (5 times);",
        "http://127.0.0.1:1/c cannot be reached (Connection refused) (5 times);",
        "http://nowhere.invalid/d cannot be reached: no network, or no such host;",
        "/e cannot be reached",
        "ftp://f is no address",
        "https://...@g.example/h holds a user name or password",
    ):
        assert part in text
    assert "\n" not in text


def test_silence_times_out(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_TIMEOUT", 0.05)
    monkeypatch.setattr(download, "_ATTEMPTS", 2)
    server.silence = 0.4
    with pytest.raises(UserError, match=r"/a cannot be reached \(timed out\) \(2 times\)"):
        get(target, f"{server.url}/a")


def test_files_and_offline(
    server: Server, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").write_bytes(RIGHT)
    monkeypatch.setenv("SEGDECONV_OFFLINE", "1")
    with pytest.raises(UserError, match="is not asked, because SEGDECONV_OFFLINE"):
        get(target, f"{server.url}/a", "hf://org/repo/a")
    check(get(target, f"{server.url}/a", (tmp_path / "here").as_uri()))
    check(get(target))
    assert not server.requests


def test_the_hub(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    check(get(target, "hf://org/repo/unet.nd_toy/model.safetensors"))
    assert server.requests[0][0] == "/org/repo/resolve/main/unet.nd_toy/model.safetensors"
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        get(target.with_name("b"), "hf://org/repo/b")


def test_proxies_of_the_environment(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    check(get(target, "http://zoo.invalid/a"))
    assert server.requests[0][0] == "http://zoo.invalid/a"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write into")
@pytest.mark.parametrize("full", [".part", ".part.json"])
def test_a_full_disk(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    path = target.with_name(target.name + full)
    monkeypatch.setattr(download, "_forget", lambda part: path.symlink_to("/dev/full"))
    with pytest.raises(UserError) as error:
        get(target, f"{server.url}/a")
    assert str(error.value) == (
        f"weights.safetensors: cannot be written to {target.parent} (No space left on device); "
        "it takes 0.3 MiB: make room there, or name another folder in SEGDECONV_CACHE"
    )
    assert not target.exists()


@pytest.mark.parametrize("tag", ['"one"', None])
def test_a_disk_that_fills_up_in_the_last_piece(server: Server, target: Path, tag: str | None) -> None:
    resource = pytest.importorskip("resource")
    server.tag = lambda request: tag
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, hard))  # a write is cut there, the next one fails
    try:
        with pytest.raises(UserError, match=r"cannot be written to .* \(File too large\); .* make room"):
            get(target, f"{server.url}/a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(server.requests) == 1


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        get(tmp_path / "file" / "weights", f"{server.url}/a")


CHILD = """
import sys
from pathlib import Path
from segdeconv import download
download._CHUNK = 2**14
target, url, size, sha = sys.argv[1:]
download.fetch(Path(target), [url], int(size), sha)
"""


def child(target: Path, server: Server) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(target), f"{server.url}/a", str(SIZE), SHA]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_40_percent(target: Path) -> Path:
    part = target.with_name("weights.safetensors.part")
    deadline = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 0.4 * SIZE):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return part


def test_a_process_killed_at_40_percent(server: Server, target: Path) -> None:
    server.pause = 0.05
    process = child(target, server)
    part = wait_for_40_percent(target)
    process.kill()
    process.wait()
    arrived = part.stat().st_size
    assert not target.exists()
    assert 0 < arrived < SIZE

    server.pause = 0.0
    check(get(target, f"{server.url}/a"))
    assert ranges(server) == [None, f"bytes={arrived}-"]


SERVER = """
from test_download import Server
server = Server()
server.pause = 0.05
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def test_a_server_killed_at_40_percent(
    target: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(download, "_WAIT", 0.05)  # the second server takes some milliseconds to be there
    command = [sys.executable, "-c", SERVER]
    first = subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    request.addfinalizer(first.kill)
    assert first.stdout
    port = int(first.stdout.readline())
    with ThreadPoolExecutor() as pool:
        done = pool.submit(get, target, f"http://127.0.0.1:{port}/a")
        wait_for_40_percent(target)
        first.kill()
        first.wait()
        with serving(port) as second:
            check(done.result(timeout=60))
    (asked,) = ranges(second)
    assert asked
    assert 0.4 * SIZE < int(asked.removeprefix("bytes=").removesuffix("-")) < SIZE


def test_two_processes_download_once(server: Server, target: Path) -> None:
    server.pause = 0.1  # long enough for both to want it
    processes = [child(target, server) for _ in range(2)]
    told = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(server.requests) == 1
    assert not any(out for out, _ in told)
    assert sum("waiting for another process" in notes for _, notes in told) <= 1
    check(target)
