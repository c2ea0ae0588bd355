from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Call

from segdeconv import doctor
from segdeconv.doctor import Cache, Facts, examine, gather, why_no_cuda

CPU_MACHINE = Facts({"onnxruntime": "1.32.0", "numpy": "2.4.6"})
GPU_MACHINE = Facts(
    {
        "onnxruntime-gpu": "1.31.1",
        "torch": "2.14.1",
        "torchvision": "0.29.1",
        "opencv-python-headless": "4.12",
        "nvidia-cudnn-cu13": "9.13.0.50",
    },
    gpu="NVIDIA H100",
    driver_cuda="13.0",
    torch_cuda="13.0",
    onnxruntime_cuda="13.0",
)
SWITCH = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install "
FULL_DISK = Cache("TORCH_HOME", "/c/torch", True, 3 << 30, 1 << 30)
LOCKED = Cache("TORCH_HOME", "/c/torch", False, 0, 99 << 30)


def changed(facts: Facts, packages: dict[str, str | None] | None = None, **others: object) -> Facts:
    """Other facts, and packages added, changed or (None) taken away."""
    merged = {k: v for k, v in {**facts.packages, **(packages or {})}.items() if v is not None}
    return replace(facts, packages=merged, **others)


CASES = {
    "no onnxruntime": (
        changed(CPU_MACHINE, {"onnxruntime": None}),
        "onnxruntime is not installed",
        "pip install onnxruntime",
    ),
    "both wheels": (
        changed(GPU_MACHINE, {"onnxruntime": "1.32.0"}),
        "both installed",
        SWITCH + "'onnxruntime-gpu[cuda,cudnn]'",
    ),
    "both wheels without a GPU": (
        changed(CPU_MACHINE, {"onnxruntime-gpu": "1.31.1"}),
        "both installed",
        SWITCH + "onnxruntime",
    ),
    "half an onnxruntime": (
        replace(CPU_MACHINE, onnxruntime_error="no attribute 'InferenceSession'"),
        "cannot be imported (no attribute 'InferenceSession')",
        SWITCH + "onnxruntime",
    ),
    "CPU build beside a GPU": (
        replace(CPU_MACHINE, gpu="NVIDIA H100"),
        "1.32.0 is the CPU build",
        SWITCH + "'onnxruntime-gpu[cuda,cudnn]'",
    ),
    "no driver": (replace(GPU_MACHINE, gpu=None), "nvidia-smi does not run", "apt-get install nvidia-driver"),
    "old driver": (
        replace(GPU_MACHINE, driver_cuda="12.4"),
        "no more than CUDA 12.4, too old for onnxruntime-gpu (CUDA 13.0) and torch (CUDA 13.0)",
        "apt-get install nvidia-driver",
    ),
    "torch for another CUDA": (
        changed(GPU_MACHINE, torch_cuda="12.8"),
        "torch 2.14.1 was built for CUDA 12.8, onnxruntime-gpu 1.31.1 for 13.0",
        "--index-url https://download.pytorch.org/whl/cu130",
    ),
    "onnxruntime for another CUDA": (
        changed(GPU_MACHINE, {"nvidia-cudnn-cu13": None}, onnxruntime_cuda="12.6"),
        "for 12.6",
        "--index-url https://download.pytorch.org/whl/cu126",
    ),
    "no cuDNN": (
        replace(GPU_MACHINE, library_error="libcudnn.so.9: cannot open shared object file"),
        "libcudnn.so.9",
        "pip install 'onnxruntime-gpu[cuda,cudnn]==1.31.1'",
    ),
    "libraries of an older CUDA": (
        changed(GPU_MACHINE, {"nvidia-cudnn-cu12": "9.1", "nvidia-cublas-cu12": "12.4"}),
        "nvidia-cublas-cu12 and nvidia-cudnn-cu12 belong to an older CUDA than 13",
        "pip uninstall -y nvidia-cublas-cu12 nvidia-cudnn-cu12 && pip install --force-reinstall --no-deps "
        "nvidia-cudnn-cu13",
    ),
    "old cuDNN": (
        changed(GPU_MACHINE, {"nvidia-cudnn-cu13": "8.9.7"}),
        "nvidia-cudnn-cu13 8.9.7 is too old",
        "pip install --upgrade 'nvidia-cudnn-cu13>=9'",
    ),
    "two OpenCVs": (
        changed(GPU_MACHINE, {"opencv-python": "4.11"}),
        "opencv-python and opencv-python-headless are all installed",
        "pip uninstall -y opencv-python opencv-python-headless && pip install opencv-python-headless",
    ),
    "OpenCV with contrib": (
        changed(GPU_MACHINE, {"opencv-contrib-python": "4.11"}),
        "overwrite each other's files",
        "&& pip install opencv-contrib-python-headless",
    ),
    "torchvision of another torch": (
        changed(GPU_MACHINE, {"torch": "2.13.0+cu130"}),
        "torchvision 0.29.1 was compiled for another torch than 2.13.0+cu130",
        "pip install 'torchvision==0.28.*'",
    ),
    "torchvision of other hardware": (
        changed(GPU_MACHINE, {"torch": "2.14.1+cu130", "torchvision": "0.29.1+cpu"}),
        "builds for different hardware",
        "--index-url https://download.pytorch.org/whl/cu130",
    ),
    "full disk": (
        replace(CPU_MACHINE, caches=(FULL_DISK,)),
        "only 1.0 GB are free at /c/torch, which holds 3.0 GB of downloads",
        "pip cache purge",
    ),
    "full disk under the zoo": (
        replace(CPU_MACHINE, caches=(replace(FULL_DISK, variable="SEGDECONV_CACHE", path="/my data"),)),
        "only 1.0 GB are free at /my data",
        "pip cache purge && rm -r '/my data/zoo'",
    ),
    "foreign cache": (replace(CPU_MACHINE, caches=(LOCKED,)), "cannot be written", "export TORCH_HOME="),
}


@pytest.mark.parametrize("facts", [CPU_MACHINE, GPU_MACHINE], ids=["CPU", "GPU"])
def test_nothing_is_wrong_with_a_sound_machine(facts: Facts) -> None:
    assert examine(facts) == []


@pytest.mark.parametrize("name", CASES)
def test_findings(name: str) -> None:
    """One finding for one fault, with the command that mends it."""
    facts, what, fix = CASES[name]
    (finding,) = examine(facts)
    assert what in finding.what
    assert fix in finding.fix


@pytest.mark.parametrize(
    ("facts", "what"),
    [
        (CPU_MACHINE, "nvidia-smi does not run"),
        (replace(CPU_MACHINE, gpu="NVIDIA H100"), "is the CPU build"),
        (replace(GPU_MACHINE, library_error="libcudnn.so.9: cannot open"), "libcudnn.so.9"),
        (GPU_MACHINE, "could not start CUDA (out of memory)"),
    ],
)
def test_the_cause_of_no_cuda(facts: Facts, what: str) -> None:
    assert what in why_no_cuda(facts, "out of memory").what


def test_facts_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "weights").write_bytes(bytes(1000))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "not" / "there"))
    facts = gather()
    assert facts.onnxruntime_error is None
    assert {"numpy", "torch", "pillow"} <= set(facts.packages)
    _, hub, torch = facts.caches
    assert (hub.size, hub.writable) == (1000, True)
    assert (torch.size, torch.writable) == (0, True)
    assert hub.free > 0


def test_caches_are_where_the_libraries_have_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "SEGDECONV_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [Path(cache.path).relative_to(tmp_path) for cache in gather().caches]
    assert [str(folder) for folder in folders] == ["segdeconv", "huggingface/hub", "torch"]


def test_a_machine_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of an unknown user, or one whose HOME is somebody else's."""
    for variable in ("HF_HOME", "HF_HUB_CACHE", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setenv("SEGDECONV_CACHE", "")
    monkeypatch.chdir(tmp_path)
    assert [cache.size for cache in gather().caches] == [0, 0, 0]
    assert gather(caches=False).caches == ()


def test_the_command(monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    monkeypatch.setattr(doctor, "gather", lambda: CPU_MACHINE)
    assert call("doctor") == (0, "nothing is wrong\n", "")
    monkeypatch.setattr(doctor, "gather", lambda: changed(CPU_MACHINE, {"onnxruntime": None}))
    assert call("doctor") == (1, "onnxruntime is not installed\n    pip install onnxruntime\n", "")
