"""What a machine that only deploys gets: no torch, a quick import, and one sentence for what needs more."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_runtime import handmade

from segdeconv.runtime import Segmenter

ROOT = Path(__file__).parents[1]
TRAINING = (
    "torch torchvision timm segmentation_models_pytorch albumentations cv2 yaml torchmetrics "
    "matplotlib onnx onnxscript safetensors filelock tensorboard"
)
COMMAND_LINE = "rich typer pydantic"  # typer may need pydantic
PREDICT = """
from pathlib import Path
from segdeconv import Segmenter
from segdeconv.runtime import find_images, predict_images
model, source, out = sys.argv[1:]
print(*(path.name for path in predict_images(Segmenter(model), find_images(source), out)))
"""


def blocked(names: str, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Python where importing ``names`` is an error."""
    code = f"import sys\nfor name in {names.split()}:\n    sys.modules[name] = None\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def road(tmp_path: Path) -> tuple[Path, Path]:
    """A graph and a picture."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return handmade(tmp_path / "model.onnx"), tmp_path / "a.png"


def test_the_library_needs_numpy_pillow_and_onnxruntime_only(road: tuple, tmp_path: Path) -> None:
    done = blocked(f"{TRAINING} {COMMAND_LINE}", PREDICT, *road, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "a.png"


@pytest.mark.parametrize("command", ["predict", "placement", "bench", "doctor"])
def test_commands_that_need_no_torch(command: str, road: tuple, tmp_path: Path) -> None:
    arguments = {
        "predict": ["predict", *road, "--out", tmp_path / "out"],
        "placement": ["placement", road[0], "--size", "30,50"],
        "bench": ["bench", road[0], "--size", "30,50", "--runs", "2"],
        "doctor": ["doctor"],
    }[command]
    done = blocked(TRAINING, "from segdeconv.cli import main; main()", *arguments)
    assert done.returncode in ((0, 1) if command == "doctor" else (0,)), done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [["train", "demo"], ["eval", "run"], ["export", "run"], ["recipes"]])
def test_commands_that_need_it_say_so(arguments: list[str]) -> None:
    done = blocked(TRAINING, "from segdeconv.cli import main; main()", *arguments)
    assert done.returncode == 2
    says = r"segdeconv: error: this command needs \w+: pip install 'segdeconv\[train\]'\n"
    assert re.fullmatch(says, done.stderr)


def test_the_runtime_is_imported_in_a_second() -> None:
    """The best of three, since the machine may be busy; onnxruntime, which loads on first use, included."""
    code = "import time; start = time.perf_counter(); from segdeconv import Segmenter; import onnxruntime; "
    code += "print(time.perf_counter() - start)"
    took = [float(blocked("torch", code).stdout) for _ in range(3)]
    assert min(took) < 1.0


def test_extras_keep_training_out_of_the_base() -> None:
    """Read from pyproject.toml, since what is installed may be older than it."""
    text = (ROOT / "pyproject.toml").read_text()
    base = text.partition("\ndependencies = [")[2].partition("]")[0]
    assert set(re.findall(r'^ *"([\w-]+)', base, re.MULTILINE)) == {"numpy", "pillow", "typer", "rich"}
    assert re.search(r'^runtime = \["segdeconv\[cpu\]"\]$', text, re.MULTILINE)


@pytest.mark.slow
def test_the_wheel_in_a_clean_environment(road: tuple, tmp_path: Path) -> None:
    """Built, installed with the extra from the package index, and run: the labels of this process."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("segdeconv", "zoo"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            source,
        ]
    )
    (wheel,) = tmp_path.glob("segdeconv-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    try:
        run([binaries / "python", "-m", "pip", "install", "-q", f"{wheel}[runtime]"])
    except AssertionError as error:
        if "No matching distribution" in str(error) or "Connection" in str(error):
            pytest.skip(f"no package index: {error}")
        raise
    packages = run([binaries / "python", "-m", "pip", "list", "--format=freeze"]).lower()
    assert "onnxruntime==" in packages
    assert not re.search(r"^(torch|timm|opencv|albumentations|matplotlib|onnx)\b=", packages, re.M)
    run([binaries / "segdeconv", "predict", *road, "--out", tmp_path / "out"])
    labels = np.asarray(Image.open(tmp_path / "out" / "a.png"))
    assert np.array_equal(labels, Segmenter(road[0])(np.asarray(Image.open(road[1]))))
    assert "nothing is wrong" in run([binaries / "segdeconv", "doctor"])
    assert importlib.metadata.version("segdeconv") in run([binaries / "segdeconv", "--version"])


def run(command: list) -> str:
    """Standard output of a command that sees no other installation of the package."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
