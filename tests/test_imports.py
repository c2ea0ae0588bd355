"""Imports go one way, and a bare import does no work (design, 'Rooms')."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import segdeconv

PACKAGE = Path(segdeconv.__file__).parent

# What each room may import from the package, at any level of its code.
LEAVES = {"errors"}
FILES = LEAVES | {"files"}
PICTURES = FILES | {"images"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "whitening": set(),
    "files": LEAVES,
    "images": FILES,
    "config": LEAVES,
    "progress": set(),
    "doctor": FILES,
    "runtime": PICTURES | {"doctor"},
    "placement": PICTURES | {"runtime"},
    "bench": LEAVES | {"runtime"},
    "serve": PICTURES | {"runtime"},
    "webdemo": FILES | {"runtime"},
    "distributed": set(),
    "layers": {"whitening", "config", "distributed"},
    "losses": {"config", "distributed", "models"},
    "structure": set(),
    "convert": LEAVES | {"layers", "whitening", "config", "structure"},
    "fold": {"convert", "layers", "structure"},
    "metrics": set(),
    "figures": PICTURES,
    "data": PICTURES | {"config", "progress"},
    "models": LEAVES | {"config", "convert", "checkpoint"},
    "download": FILES | {"progress"},
    "entries": FILES | {"download", "progress"},
    "checkpoint": FILES | {"config", "convert", "entries", "models", "progress"},
    "evaluate": PICTURES
    | {"checkpoint", "config", "data", "distributed", "export", "figures", "metrics", "models"}
    | {"progress", "runtime"},
    "compare": FILES | {"checkpoint", "config", "figures", "metrics"},
    "inspection": FILES
    | {"checkpoint", "config", "data", "figures", "layers", "models", "structure", "whitening"},
    "graphs": LEAVES | {"layers"},
    "train": FILES
    | {"checkpoint", "config", "convert", "data", "distributed", "evaluate", "figures", "graphs", "layers"}
    | {"losses", "metrics", "models", "progress"},
    "interface": LEAVES,
    "export": PICTURES | {"checkpoint", "entries", "fold", "interface", "metrics", "models", "runtime"},
    "precision": FILES
    | {"bench", "checkpoint", "config", "data", "evaluate", "export", "interface", "metrics", "models"}
    | {"progress", "runtime"},
    "zoo": PICTURES
    | {
        "bench",
        "checkpoint",
        "config",
        "data",
        "download",
        "entries",
        "evaluate",
        "figures",
        "fold",
        "metrics",
    }
    | {"models"},
    "demo": PICTURES
    | {"checkpoint", "config", "data", "evaluate", "export", "figures", "models", "progress", "runtime"}
    | {"train"},
}


def imported(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("segdeconv"):
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"]
                if node.module == "segdeconv"
                else [node.module]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("segdeconv.")]
        rooms |= {name.split(".")[1] for name in names}
    return rooms


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if room_of(p) not in ("__init__", "__main__", "cli"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path)
    assert imported(path) - {room} <= ALLOWED[room]


def test_nothing_imports_the_command_line() -> None:
    assert not [path for path in MODULES if "cli" in imported(path)]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bare_import_does_no_work() -> None:
    heavy = "('torch', 'numpy', 'PIL', 'pydantic', 'onnxruntime')"
    assert run(f"import sys, segdeconv; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_the_command_line_imports_lazily() -> None:
    code = "import sys, segdeconv.cli; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert run(code).strip() == "False False"


def test_public_names() -> None:
    assert len(segdeconv.__all__) <= 12
    for name in segdeconv.__all__:
        assert getattr(segdeconv, name).__name__ == name
        assert name in dir(segdeconv)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = segdeconv.nonsense
