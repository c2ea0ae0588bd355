"""Files that are whole or not there, and JSON without NaN. The standard library only."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from segdeconv.errors import UserError, as_utf8

_STREAMS = ("/dev", "/dev/fd", "/proc/self/fd")  # hold links to what the shell has opened


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file next to ``path``, then rename it there: all or nothing.

    A link stays, and what it leads to is replaced. Devices and pipes are written into.

    Raises:
        UserError: the place cannot be written.
    """
    if os.path.isdir(path):  # False where Path.is_dir raises
        raise UserError(f"{path}: is a folder, not a file to write")
    target = Path(os.path.realpath(path))
    # Named by chance, not by the process: two writers at once may be threads, or in containers.
    temporary = target.with_name(_temporary_name(path, secrets.token_hex(8)))
    try:
        if path.exists() and (not path.is_file() or str(path.parent) in _STREAMS):  # stdout may be a file
            _write_into(path, write)
            return
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # safetensors makes files for their owner alone
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, target)
        with contextlib.suppress(OSError):  # the file is there, even if its folder may not be opened
            _sync_folder(target.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _temporary_name(path: Path, token: str) -> str:
    return f".{path.stem[:40]}.{token}.tmp{path.suffix}"  # a name has 255 bytes at most


def temporaries_of(path: Path) -> Iterator[Path]:
    """The temporary files for ``path``: those that killed processes left, and those being filled."""
    return Path(os.path.realpath(path)).parent.glob(_temporary_name(path, "?" * 16))


def _write_into(path: Path, write: Callable[[Path], object]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(temporary := Path(folder, path.name))
        with path.open("ab") as device:
            device.write(temporary.read_bytes())


def write_text(path: Path, text: str) -> None:
    """Write a text, in UTF-8, by `write_atomically`."""
    write_atomically(path, lambda temporary: temporary.write_text(as_utf8(text), encoding="utf-8"))


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut, where the system lets one."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_place(path: Path) -> None:
    """Before long work: whether a file can be written here, as far as the path tells.

    Raises:
        UserError: the path is a folder, or its folder is not there or may not be written.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a file to write")
    folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise UserError(f"{path}: there is no folder {folder} to write into")
    place = path if path.exists() and not path.is_file() else folder  # a device is written into
    if not os.access(place, os.W_OK):
        raise UserError(f"{path}: {place} cannot be written; choose another place")


def make_folder(path: Path) -> Path:
    """Make a folder and its parents; one that is there already is fine.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(
            f"{error.filename}: is no folder, or a link to none; remove it, or choose another place"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot make the folder ({error.strerror}); choose another place") from None
    return path


def check_utf8(path: str | Path, reader: str) -> None:
    """Raise UserError if a path has bytes that are not UTF-8, for a reader written in another language."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path}: {reader} takes no path that is not UTF-8; rename it, or choose another"
        ) from None


def with_home(path: str, name: str) -> Path:
    """A path with ``~`` written out.

    Args:
        name: of what the path was given as, for the message.

    Raises:
        UserError: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{name} {path!r}: there is no such home folder; write the path in full") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_folder() -> Path:
    """Where downloads are kept: SEGDECONV_CACHE, or ``segdeconv`` in the user's cache folder."""
    # os.path's, which leaves alone what it does not know: there may be no home.
    chosen = os.environ.get("SEGDECONV_CACHE")
    return Path(os.path.expanduser(chosen)) if chosen else user_cache_folder() / "segdeconv"


def user_cache_folder() -> Path:
    """Where programs keep what they can fetch again: XDG_CACHE_HOME, or ``.cache`` at home."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))


def read_json_lines(path: Path, missing_ok: bool = False) -> list[dict[str, Any]]:
    """The objects of a file with one in each line. A last line that was cut short does not count.

    Args:
        missing_ok: a file that is not there is an empty one.

    Raises:
        UserError: it cannot be read, or is damaged.
    """
    if missing_ok and not path.exists():
        return []
    try:
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
        values = [json.loads(line) for line in whole.splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error})") from None
    odd = next((number for number, value in enumerate(values, 1) if not isinstance(value, dict)), None)
    if odd is not None:
        raise UserError(f"{path}: is damaged (line {odd} is no object)")
    return values


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append a line and flush it to the disk; it replaces a last line that was cut short.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with path.open("a+b") as file:
            file.seek(0)
            there = file.read()
            if not there.endswith(b"\n"):  # only then: another process may be appending
                file.truncate(there.rfind(b"\n") + 1)
            file.write(f"{to_json(value)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text; NaN and infinity, which JSON does not have, become null."""

    def clean(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {key: clean(inner) for key, inner in item.items()}
        return [clean(inner) for inner in item] if isinstance(item, (list, tuple)) else item

    return json.dumps(clean(value), indent=indent)
