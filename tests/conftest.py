"""Shared fixtures. Tests that use ../shared skip, with a reason, where it is absent."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import onnx
import pytest
import torch

torch.set_num_threads(1)  # test processes are the parallelism

Call = Callable[..., tuple[int, str, str]]
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _export_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """torch exports the same network once for all test processes of a session; it takes seconds each time."""
    from segdeconv import export, precision

    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "exported"
    folder.mkdir(exist_ok=True)
    make = export.network_graph

    def network_graph(model: torch.nn.Module, interface: Any, preparation: Any) -> onnx.ModelProto:
        static = interface.static and export._traced_shape(interface, preparation)
        key = (model, interface.opset, static, preparation.size_multiple)
        digest = hashlib.sha256(repr(key).encode())
        for tensor in model.state_dict().values():
            digest.update(tensor.numpy().tobytes())
        path = folder / f"{digest.hexdigest()}.onnx"
        with filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                onnx.save(make(model, interface, preparation), path)
        return onnx.load(path)

    with pytest.MonkeyPatch.context() as patch:
        for module in (export, precision):
            patch.setattr(module, "network_graph", network_graph)
        yield


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the command in this process; returns exit code, standard output, standard error."""
    from segdeconv import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["segdeconv", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="session")
def camvid() -> Path:
    path = SHARED_DATA / "camvid"
    if not path.is_dir():
        pytest.skip(f"no CamVid at {path}")
    return path


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's headless Chromium, driven by Playwright, which brings none of its own here."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium; apt-get install chromium")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses its sandbox to root
    utf8 = {**os.environ, "LC_ALL": "C.UTF-8"}  # in C it reads no file whose path is not ASCII
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, args=sandbox, env=utf8)
        yield chromium
        chromium.close()
