"""Shared fixtures. Tests that use ../shared skip, with a reason, where it is absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # test processes are the parallelism

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def camvid() -> Path:
    path = SHARED_DATA / "camvid"
    if not path.is_dir():
        pytest.skip(f"no CamVid at {path}")
    return path
