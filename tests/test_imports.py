"""Imports go one way, and a bare import does no work."""

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
    "markdown": set(),
    "config": LEAVES,
    "progress": LEAVES,
    "doctor": {"files"},
    "runtime": PICTURES | {"doctor"},
    "placement": LEAVES | {"markdown"} | {"runtime"},
    "bench": LEAVES | {"markdown"} | {"runtime"},
    "serve": LEAVES | {"images", "runtime"},
    "webdemo": FILES | {"runtime"},
    "distributed": set(),
    "compiling": set(),
    "layers": {"compiling", "whitening", "config", "distributed"},
    "schedule": {"layers", "whitening"},
    "losses": {"config", "distributed", "models"},
    "structure": set(),
    "convert": LEAVES | {"layers", "config", "distributed", "structure", "whitening"},
    "fold": {"convert", "layers", "structure"},
    "metrics": set(),
    "figures": PICTURES,
    "data": PICTURES | {"config", "progress"},
    "models": LEAVES | {"config", "convert"},
    "download": FILES | {"progress"},
    "entries": FILES | {"download", "markdown", "progress"},
    "checkpoint": FILES | {"config", "convert", "entries", "models", "progress"},
    "evaluate": PICTURES
    | {"checkpoint", "config", "data", "distributed", "export", "figures", "metrics", "models"}
    | {"progress", "runtime"},
    "compare": FILES | {"markdown"} | {"checkpoint", "config", "figures", "metrics"},
    "inspection": {"files"}
    | {"checkpoint", "config", "data", "figures", "layers", "models", "structure", "whitening"},
    "graphs": LEAVES | {"schedule"},
    "trainer": LEAVES | {"checkpoint", "config", "distributed", "evaluate", "graphs", "losses", "schedule"},
    "train": FILES
    | {"checkpoint", "config", "convert", "data", "distributed", "evaluate", "figures"}
    | {"metrics", "models", "progress", "trainer"},
    "interface": LEAVES,
    "export": FILES
    | {"checkpoint", "entries", "fold", "interface", "metrics", "models", "runtime", "structure"},
    "precision": LEAVES
    | {"bench", "checkpoint", "data", "evaluate", "export", "interface", "metrics", "progress", "runtime"},
    "zoo": PICTURES
    | {"markdown"}
    | {"bench", "checkpoint", "config", "data", "download", "entries", "evaluate", "figures", "fold"}
    | {"metrics", "models"},
    "demo": PICTURES
    | {"checkpoint", "config", "data", "evaluate", "export", "figures", "progress", "runtime", "train"},
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


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_what_they_may_and_no_less(room: str) -> None:
    paths = [path for path in MODULES if room_of(path) == room]
    assert set().union(*map(imported, paths)) - {room} == ALLOWED[room]


def test_imports_go_one_way() -> None:
    rooms = dict(ALLOWED)
    assert rooms.keys() == {room_of(path) for path in MODULES}
    while free := {room for room, needs in rooms.items() if not needs & rooms.keys()}:
        rooms = {room: needs for room, needs in rooms.items() if room not in free}
    assert not rooms


def test_type_checkers_see_the_public_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    checking = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {node.names[0].asname: node.module for node in checking.body if isinstance(node, ast.ImportFrom)}
    assert seen == {name: f"segdeconv.{home}" for name, home in segdeconv._HOMES.items()}


def test_nothing_imports_the_command_line() -> None:
    assert not [path for path in MODULES if "cli" in imported(path)]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bare_import_does_no_work() -> None:
    heavy = "('torch', 'numpy', 'PIL', 'pydantic', 'onnxruntime')"
    assert run(f"import sys, segdeconv; print([m for m in {heavy} if m in sys.modules])").strip() == "[]"


def test_onnxruntime_tells_nobody() -> None:
    asked = "import os; os.environ.pop('ORT_DISABLE_TELEMETRY', 0)"  # this process has imported it already
    told = "import segdeconv.runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert run(f"{asked}; {told}").strip() == "1"


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
