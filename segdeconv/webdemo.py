"""A static page that runs an exported graph in the browser: no server, and no picture leaves the machine.

The page is the server's (segdeconv/web); only ``segment.js`` differs. It does what `runtime.Segmenter` does
to a picture, Pillow's resizing included, and runs the graph with onnxruntime-web, whose two files come from
its npm package at one pinned version.
"""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from functools import partial
from pathlib import Path

from segdeconv.errors import UserError
from segdeconv.files import cache_folder, make_folder, to_json, write_atomically
from segdeconv.runtime import Segmenter

ORT_VERSION = "1.30.0"
ORT_INTEGRITY = (
    "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
)
ORT_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")

_PACKAGE = f"onnxruntime-web@{ORT_VERSION}"
_TARBALL = f"onnxruntime-web-{ORT_VERSION}.tgz"
_WEB = Path(__file__).parent / "web"
_PAGE = {
    "index.html": "page.html",
    "page.css": "page.css",
    "page.js": "page.js",
    "segment.js": "segment_browser.js",
    "worker.js": "worker.js",
    "pixels.js": "pixels.js",
}


def write_webdemo(model: str | Path, out: str | Path, ort: Path | None = None) -> None:
    """Write the page, the graph and onnxruntime-web into a folder that any static web server can serve.

    Args:
        ort: the npm package as a file; None takes it from the user's cache folder, where npm puts it first.

    Raises:
        UserError: the graph does not segment or puts out no labels, onnxruntime-web is not to be had or is
            not the pinned one, or ``out`` cannot be written.
    """
    segmenter = Segmenter(model, "cpu")
    source = segmenter.session.get_inputs()[0]
    outputs = [output.name for output in segmenter.session.get_outputs()]
    if segmenter.metadata["task"] != "segmentation" or "labels" not in outputs:
        raise UserError(f"{model}: the page needs a segmentation graph exported with --output labels")
    if len(segmenter.classes) > 256:
        raise UserError(f"{model}: has {len(segmenter.classes)} classes; the page shows at most 256")
    if [side for side in source.shape if isinstance(side, int)] != [3]:
        raise UserError(f"{model}: takes one size only; the page needs a graph exported without --static")
    if source.type == "tensor(float16)":
        raise UserError(f"{model}: takes float16; the page needs a graph exported without --half-io")
    tarball = fetch_onnxruntime_web() if ort is None else check_integrity(ort)
    files = {name: (_WEB / source).read_bytes() for name, source in _PAGE.items()}
    files["model.json"] = to_json(segmenter.metadata).encode()
    files["model.onnx"] = Path(model).read_bytes()
    with tarfile.open(tarball) as archive:
        for name in ORT_FILES:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None  # the archive's hash is known
            files[name] = member.read()
    out = make_folder(Path(out))
    for name, content in files.items():
        write_atomically(out / name, partial(Path.write_bytes, data=content))


def fetch_onnxruntime_web() -> Path:
    """The pinned npm package in the cache folder, put there by ``npm pack`` the first time.

    Raises:
        UserError: npm is not installed or cannot fetch it, or what came is not what the pin says.
    """
    cached = cache_folder() / _TARBALL
    if cached.is_file():
        return check_integrity(cached)
    npm = shutil.which("npm")
    by_hand = f"run 'npm pack {_PACKAGE}' where it can be fetched and pass the file with --ort"
    if npm is None:
        raise UserError(f"onnxruntime-web is needed and npm is not installed; {by_hand}")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [npm, "pack", _PACKAGE, "--pack-destination", folder], capture_output=True, text=True, check=False
        )
        fetched = Path(folder) / _TARBALL
        if done.returncode or not fetched.is_file():
            reason = next((line for line in done.stderr.splitlines() if "npm error" in line), "npm failed")
            raise UserError(f"{_PACKAGE}: cannot be fetched ({reason}); {by_hand}")
        check_integrity(fetched)
        make_folder(cached.parent)
        write_atomically(cached, lambda path: shutil.copyfile(fetched, path))
    return cached


def check_integrity(tarball: Path) -> Path:
    """The file itself, if its SHA-512 is the pinned one.

    Raises:
        UserError: there is no such file, or it is another.
    """
    try:
        digest = hashlib.sha512(tarball.read_bytes()).digest()
    except OSError as error:
        raise UserError(f"{tarball}: cannot be read ({error.strerror})") from None
    if f"sha512-{base64.b64encode(digest).decode()}" != ORT_INTEGRITY:
        raise UserError(
            f"{tarball}: is not npm's {_PACKAGE} (another SHA-512); delete it and run 'npm pack {_PACKAGE}'"
        )
    return tarball
