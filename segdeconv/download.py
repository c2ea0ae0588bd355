"""A file whose size and SHA-256 are known, from the first source that gives it, into a place of its own.

urllib of the standard library does the asking: it heeds the proxies of the environment and follows redirects,
and none of requests, httpx and urllib3 is sure to be there (huggingface_hub changes its own from version to
version). Ranges (RFC 9110, sections 13.1.5 and 14) have to be written by hand with any of them.

Nothing here looks into a file: what it holds is safetensors, and it is read by checkpoint.py.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock

from segdeconv.errors import UserError
from segdeconv.files import sha256_of
from segdeconv.progress import Bar, notes

_ATTEMPTS = 5  # in a row that brought nothing new, before the next source is tried
_WAIT = 1.0  # seconds after an attempt that brought nothing new, doubled after every further one
_LONGEST_WAIT = 30.0
_TIMEOUT = 30.0  # seconds without a byte
_CHUNK = 2**20
_SECRET = re.compile("://[^/]*@")
_TRY_AGAIN = (408, 425, 429)  # and all from 500 on


class _Interrupted(Exception):
    """An attempt that failed and may succeed if repeated."""


class _Refused(Exception):
    """A source that does not give the file, however often it is asked."""


def fetch(target: Path, sources: Sequence[str], size: int, sha256: str) -> Path:
    """Bring a file to ``target`` unless it is there, and check it in both cases.

    Sources are tried in order: ``https://``, ``http://`` and ``file://`` URLs, and
    ``hf://ORG/REPO/PATH`` on the Hugging Face Hub. A transfer that was cut, in this process or one before it,
    goes on where it stopped. Of several processes one downloads, the others wait. With SEGDECONV_OFFLINE or
    HF_HUB_OFFLINE set, only files are read. Notes and progress go to standard error.

    Args:
        target: the file to make; ``TARGET.part`` is what has arrived of it so far.
        size: its bytes.
        sha256: its SHA-256, in hexadecimal digits.

    Raises:
        UserError: no source gave the file (the message says what each of them did), or it cannot be written.
    """
    try:
        if target.is_file() and sha256_of(target) == sha256:
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_process(target):
            if target.is_file():
                if sha256_of(target) == sha256:  # another process brought it meanwhile
                    return target
                notes.print(f"{target}: is damaged, kept as {_set_aside(target, target)}")
            _fetch(target, sources, size, sha256)
    except OSError as error:
        raise UserError(
            f"{target.name}: cannot be written to {target.parent} ({error.strerror or error}); it takes "
            f"{size / 2**20:.1f} MiB: make room there, or name another folder in SEGDECONV_CACHE"
        ) from None
    return target


def offline() -> bool:
    """Whether the environment forbids internet access."""
    names = ("SEGDECONV_OFFLINE", "HF_HUB_OFFLINE")
    return any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in names)


def _fetch(target: Path, sources: Sequence[str], size: int, sha256: str) -> None:
    part = target.with_name(f"{target.name}.part")
    problems = []
    for source in sources:
        try:
            url = _url(source)
            resumed = _download(url, part, size, target.name)
            if resumed and sha256_of(part) != sha256:  # the pieces may be of different files
                _forget(part)
                _download(url, part, size, target.name)
            if sha256_of(part) == sha256:
                os.replace(part, target)
                _state(part).unlink(missing_ok=True)
                return
            aside = _set_aside(part, target)
            _state(part).unlink(missing_ok=True)
            raise _Refused(f"gives a file of another SHA-256 than {sha256[:12]}..., kept as {aside}")
        except _Refused as refusal:
            problems.append(f"{_SECRET.sub('://...@', source)} {refusal}")
    raise UserError(f"{target.name}: cannot be downloaded: {'; '.join(problems)}")


def _url(source: str) -> str:
    scheme, _, rest = source.partition("://")
    if scheme == "file":
        return source
    if "@" in rest.partition("/")[0]:
        raise _Refused("holds a user name or password, which are not sent; give an address without them")
    if scheme not in ("https", "http", "hf"):
        raise _Refused("is no address that starts with https://, http://, hf:// or file://")
    if offline():
        raise _Refused("is not asked, because SEGDECONV_OFFLINE or HF_HUB_OFFLINE is set")
    if scheme != "hf":
        return source
    organisation, _, rest = rest.partition("/")
    repository, _, path = rest.partition("/")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{hub}/{organisation}/{repository}/resolve/main/{path}"


def _download(url: str, part: Path, size: int, title: str) -> bool:
    """Fill ``part``, in as many attempts as it takes; whether it was put together from several."""
    furthest, failures, resumed = _begun(url, part)[0], 0, False
    while True:
        try:
            return _attempt(url, part, size, title) or resumed
        except _Interrupted as interruption:
            reached = _begun(url, part)[0]
            failures = 0 if reached > furthest else failures + 1
            furthest, resumed = max(furthest, reached), resumed or reached > 0
            if failures == _ATTEMPTS:
                raise _Refused(f"{interruption} ({failures} times)") from None
            if failures:
                time.sleep(min(_WAIT * 2 ** (failures - 1), _LONGEST_WAIT))


def _attempt(url: str, part: Path, size: int, title: str) -> bool:
    """Ask once for what is missing; whether that was less than the whole."""
    offset, version = _begun(url, part)
    if offset >= size:
        return True
    headers = {"User-Agent": "segdeconv"}
    if offset:
        headers |= {"Range": f"bytes={offset}-", "If-Range": version}
    with _open(url, headers) as response:
        validator = _validator(response.headers) if response.status else None  # a file:// has no ranges
        ranged = response.status in (206, 416)
        told = response.headers.get("Content-Range" if ranged else "Content-Length", "")
        length = told.rpartition("/")[2]
        # A first answer may lie about its length, and the server is asked for the rest; unless that cannot be
        # asked for, or the bytes of another source would be lost by it.
        if length.isdecimal() and int(length) != size and (_size(part) or not validator):
            if offset:
                _forget(part)
            kind = "" if ranged else f" ({response.headers.get_content_type()})"
            raise _Refused(f"answers with {length} bytes{kind}, not the {size} of this file")
        if not ranged:  # the whole file: a first attempt, a server without ranges, or the file has changed
            offset = 0
            _forget(part)
            if validator:
                _state(part).write_text(json.dumps([url, validator]))
        elif not told.startswith(f"bytes {offset}-") or validator not in (None, version):
            _forget(part)
            raise _Interrupted("has changed the file meanwhile")
        missing = size - offset
        with open(part, "ab") as file:
            for chunk in Bar(
                _chunks(response, missing), math.ceil(missing / _CHUNK), f"{title} (MiB)", notes
            ):
                file.write(chunk)
    if _size(part) < size:
        raise _Interrupted(f"cuts the connection after {_size(part)} of {size} bytes")
    return offset > 0


@contextlib.contextmanager
def _open(url: str, headers: dict[str, str]) -> Iterator[Any]:
    try:
        request = urllib.request.Request(url, headers=headers)
        # An opener of its own: the global one keeps the proxies that it was made with.
        response = urllib.request.build_opener().open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            error.close()
            kind = _Interrupted if error.code in _TRY_AGAIN or error.code >= 500 else _Refused
            raise kind(f"answers {error.code} {_short(error.reason)}") from None
        response = error  # says how long the file is
    except urllib.error.URLError as error:
        if isinstance(error.reason, socket.gaierror):
            raise _Refused("cannot be reached: no network, or no such host") from None
        # A reason that is a text is about the address, as "no host given".
        lasting = request.type == "file" or isinstance(error.reason, (str, ssl.SSLCertVerificationError))
        raise (_Refused if lasting else _Interrupted)(f"cannot be reached ({_short(error.reason)})") from None
    except (ValueError, http.client.InvalidURL) as error:
        raise _Refused(f"is no address ({_short(error)})") from None
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(f"cannot be reached ({_short(error)})") from None
    with response:
        yield response


def _chunks(response: Any, missing: int) -> Iterator[bytes]:
    """What arrives, but no more than is missing: what a server says of lengths is not relied on."""
    while missing:
        chunk, cut = bytearray(), None
        try:  # `read` would lose what arrives before the line is cut
            while piece := response.read1(min(_CHUNK, missing) - len(chunk)):
                chunk += piece
        except (OSError, http.client.HTTPException) as error:
            cut = f"cuts the connection ({_short(error)})"
        if chunk:
            missing -= len(chunk)
            yield bytes(chunk)
        if cut:
            raise _Interrupted(cut)
        if not chunk:
            return


def _validator(headers: Any) -> str | None:
    """What identifies this version of the file to its server; a weak ETag does not (RFC 9110, 13.1.5)."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


@contextlib.contextmanager
def _only_process(target: Path) -> Iterator[None]:
    lock = filelock.FileLock(f"{target}.lock")
    try:
        lock.acquire(timeout=0.5)
    except filelock.Timeout:
        notes.print(f"waiting for another process that downloads {target.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _state(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _begun(url: str, part: Path) -> tuple[int, str]:
    """How many bytes of this source's file are there to go on from, and the validator of their version."""
    with contextlib.suppress(OSError, ValueError, TypeError):  # none there, or it was being written
        source, validator = json.loads(_state(part).read_text())
        if source == url:
            return _size(part), validator
    return 0, ""


def _forget(part: Path) -> None:
    for path in (part, _state(part)):
        path.unlink(missing_ok=True)


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() else 0


def _set_aside(path: Path, target: Path) -> Path:
    aside = target.with_name(f"{target.name}.wrong")
    os.replace(path, aside)
    return aside


def _short(error: object) -> str:
    strerror = getattr(error, "strerror", None)
    return " ".join(str(strerror or error or type(error).__name__).split())
