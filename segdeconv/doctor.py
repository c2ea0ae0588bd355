"""What is wrong with an installation, and the command that mends it. The standard library only, since what
else there is may be broken.

`gather` looks at the machine; `examine` and `why_no_cuda` are pure functions over what it found.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import stat
import subprocess
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from segdeconv.files import cache_folder, user_cache_folder

_OPENCV = (
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
    "opencv-python",
    "opencv-python-headless",
)
_ONNXRUNTIME = ("onnxruntime", "onnxruntime-gpu")
_GPU_PREFIXES = ("nvidia-cudnn-cu", "nvidia-cublas-cu", "nvidia-cuda-runtime-cu")
_LOW_DISK = 2 << 30  # bytes; a zoo entry, an export and its temporary copy take a few hundred MB
_SWITCH = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install "
_DRIVER = (
    "sudo apt-get install nvidia-driver (sudo ubuntu-drivers install on Ubuntu), then reboot; "
    "a container wants docker run --gpus all"
)


@dataclass(frozen=True)
class Cache:
    """A folder that libraries download into: the variable that moves it, its size, and what is free there."""

    variable: str
    path: str
    writable: bool
    size: int  # bytes
    free: int  # bytes


@dataclass(frozen=True)
class Facts:
    """What `examine` needs to know about a machine.

    Attributes:
        packages: versions by distribution name.
        gpu: what nvidia-smi calls the first GPU; None where it does not run.
        driver_cuda: the newest CUDA that the driver can run.
        torch_cuda: the CUDA torch was built with; None for a CPU build, and where there is no torch.
        onnxruntime_cuda: the CUDA onnxruntime was built with; None for a CPU build.
        onnxruntime_error: why onnxruntime cannot be imported.
        library_error: why onnxruntime's CUDA library cannot be loaded.
    """

    packages: dict[str, str]
    gpu: str | None = None
    driver_cuda: str | None = None
    torch_cuda: str | None = None
    onnxruntime_cuda: str | None = None
    onnxruntime_error: str | None = None
    library_error: str | None = None
    caches: tuple[Cache, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, in a sentence, and the command that mends it."""

    what: str
    fix: str


def examine(facts: Facts) -> list[Finding]:
    """All that needs mending; nothing where an installation is fine."""
    found = _onnxruntime(facts)
    if facts.gpu or ("onnxruntime-gpu" in facts.packages and "onnxruntime" not in facts.packages):
        found += _cuda(facts)
    return [*found, *_torch(facts), *_opencv(facts), *_old_libraries(facts), *_disk(facts)]


def why_no_cuda(facts: Facts, error: str = "") -> Finding:
    """What keeps onnxruntime from CUDA: the first thing found, or else what onnxruntime itself said."""
    for finding in (*_onnxruntime(facts), *_cuda(facts), *_old_libraries(facts)):
        return finding
    cause = f"onnxruntime could not start CUDA ({error or 'it gives no reason'})"
    return Finding(cause, _SWITCH + "'onnxruntime-gpu[cuda,cudnn]'")


def _onnxruntime(facts: Facts) -> list[Finding]:
    installed = [name for name in _ONNXRUNTIME if name in facts.packages]
    right = "'onnxruntime-gpu[cuda,cudnn]'" if facts.gpu else "onnxruntime"
    if not installed:
        return [Finding("onnxruntime is not installed", f"pip install {right}")]
    if len(installed) == 2:
        what = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
        return [Finding(what, _SWITCH + right)]
    if facts.onnxruntime_error:
        return [Finding(f"{installed[0]} cannot be imported ({facts.onnxruntime_error})", _SWITCH + right)]
    return []


def _cuda(facts: Facts) -> list[Finding]:
    found = []
    if facts.gpu is None:
        found.append(Finding("no NVIDIA GPU or driver answers (nvidia-smi does not run)", _DRIVER))
    if "onnxruntime" in facts.packages and "onnxruntime-gpu" not in facts.packages:
        what = f"onnxruntime {facts.packages['onnxruntime']} is the CPU build and cannot use CUDA"
        found.append(Finding(what, _SWITCH + "'onnxruntime-gpu[cuda,cudnn]'"))
    ours, torchs = facts.onnxruntime_cuda, facts.torch_cuda
    too_new = [
        f"{name} (CUDA {built})"
        for name, built in (("onnxruntime-gpu", ours), ("torch", torchs))
        if built and facts.driver_cuda and _major(built) > _major(facts.driver_cuda)
    ]
    if too_new:
        what = f"the driver runs no more than CUDA {facts.driver_cuda}, too old for {' and '.join(too_new)}"
        found.append(Finding(what, _DRIVER))
    if ours and torchs and _major(ours) != _major(torchs):
        index = "cu130" if _major(ours) >= 13 else "cu126"
        what = (
            f"torch {facts.packages['torch']} was built for CUDA {torchs}, onnxruntime-gpu "
            f"{facts.packages.get('onnxruntime-gpu', '')} for {ours}; one process cannot load both cuDNNs"
        )
        fix = (
            "pip install --force-reinstall torch torchvision "
            f"--index-url https://download.pytorch.org/whl/{index}"
        )
        found.append(Finding(what, fix))
    if facts.library_error and "onnxruntime-gpu" in facts.packages:
        what = f"onnxruntime-gpu cannot load what it needs of CUDA or cuDNN ({facts.library_error})"
        found.append(
            Finding(
                what,
                f"pip install 'onnxruntime-gpu[cuda,cudnn]=={facts.packages['onnxruntime-gpu']}'",
            )
        )
    return found


def _torch(facts: Facts) -> list[Finding]:
    torch, vision = facts.packages.get("torch"), facts.packages.get("torchvision")
    if not torch or not vision:
        return []
    # torchvision 0.N is compiled against torch 2.(N - 15); its README has the table.
    numbers = [int(number) for number in re.findall(r"\d+", torch)[:2]]
    fits = f"0.{numbers[1] + 15}" if numbers[0] == 2 else None
    builds = [version.partition("+")[2] for version in (torch, vision)]
    if fits and not vision.startswith(f"{fits}."):
        return [
            Finding(
                f"torchvision {vision} was compiled for another torch than {torch}",
                f"pip install 'torchvision=={fits}.*'",
            )
        ]
    if all(builds) and builds[0] != builds[1]:
        return [
            Finding(
                f"torch {torch} and torchvision {vision} are builds for different hardware",
                f"pip install --force-reinstall torch torchvision "
                f"--index-url https://download.pytorch.org/whl/{builds[0]}",
            )
        ]
    return []


def _opencv(facts: Facts) -> list[Finding]:
    installed = [name for name in _OPENCV if name in facts.packages]
    if len(installed) < 2:
        return []
    best = "opencv-python-headless"
    if any("contrib" in name for name in installed):
        best = "opencv-contrib-python-headless"
    return [
        Finding(
            f"{' and '.join(installed)} are all installed and overwrite each other's files",
            f"pip uninstall -y {' '.join(installed)} && pip install {best}",
        )
    ]


def _old_libraries(facts: Facts) -> list[Finding]:
    built = [_major(cuda) for cuda in (facts.onnxruntime_cuda, facts.torch_cuda) if cuda]
    if not built:
        return []
    old = [
        name
        for name in sorted(facts.packages)
        for prefix in _GPU_PREFIXES
        if (found_in := re.fullmatch(rf"{prefix}(\d+)", name)) and int(found_in[1]) < min(built)
    ]
    found = []
    if old:
        what = f"{' and '.join(old)} belong to an older CUDA than {min(built)} and may be loaded instead"
        # cuDNN for every CUDA lies in the same folder, so the one that stays must be written anew.
        newer = f"nvidia-cudnn-cu{min(built)}"
        fix = f"pip uninstall -y {' '.join(old)} && pip install --force-reinstall --no-deps {newer}"
        found.append(Finding(what, fix))
    for name, version in facts.packages.items():
        if name.startswith("nvidia-cudnn-cu") and name not in old and _major(version) < 9:
            what = f"{name} {version} is too old, onnxruntime-gpu and torch need cuDNN 9"
            found.append(Finding(what, f"pip install --upgrade '{name}>=9'"))
    return found


def _disk(facts: Facts) -> list[Finding]:
    found = []
    for cache in facts.caches:
        if not cache.writable:
            what = f"the cache folder {cache.path} cannot be written"
            found.append(Finding(what, f"export {cache.variable}=/a/folder/you/own"))
        elif cache.free < _LOW_DISK:
            what = f"only {cache.free / 2**30:.1f} GB are free at {cache.path}"
            if cache.size:
                what += f", which holds {cache.size / 2**30:.1f} GB of downloads"
            fix = "pip cache purge"
            if cache.size and cache.variable == "SEGDECONV_CACHE":  # others' downloads are not ours to remove
                fix += f" && rm -r {shlex.quote(os.path.join(cache.path, 'zoo'))}"
            found.append(Finding(what, fix))
    return found


def _major(version: str) -> int:
    return int(version.partition(".")[0])


def gather(caches: bool = True) -> Facts:
    """Look at this machine, and at its ``caches``. Loads onnxruntime, and nothing else that is heavy."""
    packages = {(d.metadata["Name"] or "").lower().replace("_", "-"): d.version for d in distributions()}
    gpu, driver_cuda = _nvidia_smi()
    onnxruntime_cuda, onnxruntime_error, library_error = _load_onnxruntime()
    home = user_cache_folder()
    folders = {
        "SEGDECONV_CACHE": cache_folder(),  # the zoo's weights, onnxruntime-web
        "HF_HUB_CACHE": Path(os.environ.get("HF_HOME") or home / "huggingface") / "hub",  # smp's and timm's
        "TORCH_HOME": home / "torch",  # torchvision's
    }
    return Facts(
        packages,
        gpu,
        driver_cuda,
        _torch_cuda(),
        onnxruntime_cuda,
        onnxruntime_error,
        library_error,
        tuple(_cache(*item) for item in folders.items()) if caches else (),
    )


def _nvidia_smi() -> tuple[str | None, str | None]:
    """The first GPU's name and the newest CUDA the driver can run."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True)
        report = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None, None
    name = re.search(r"GPU 0: (.*?) \(UUID", listed.stdout)
    cuda = re.search(r"CUDA Version: *([\d.]+)", report.stdout)
    return name.group(1) if name else None, cuda.group(1) if cuda else None


def _torch_cuda() -> str | None:
    """Read from torch's version file: importing torch takes seconds, and may be what fails."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return None
    found = re.search(r"^cuda\b[^=\n]*= *'([\d.]+)'", text, re.MULTILINE)
    return found.group(1) if found else None


def _load_onnxruntime() -> tuple[str | None, str | None, str | None]:
    """The CUDA it was built with; why it cannot be imported; why its CUDA library cannot be loaded."""
    try:
        import onnxruntime

        folder = Path(onnxruntime.__file__).parent / "capi"
        cuda = getattr(onnxruntime, "cuda_version", "") or None
    except Exception as error:  # a half-overwritten module fails in many ways
        return None, str(error).partition("\n")[0], None
    library = folder / "libonnxruntime_providers_cuda.so"
    if not library.exists():
        return cuda, None, None
    try:
        onnxruntime.preload_dlls()
        # What onnxruntime does itself, but its log alone gets to see the reason.
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        return cuda, None, str(error).partition("\n")[0]
    return cuda, None, None


def _cache(variable: str, default: Path) -> Cache:
    path = Path(os.path.expanduser(os.environ.get(variable) or default))
    # os.path's, which takes what may not be looked at for what is not there.
    there = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(folder, name))
                size += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return Cache(
        variable,
        str(path),
        os.path.isdir(there) and os.access(there, os.W_OK),
        size,
        shutil.disk_usage(there).free,
    )
