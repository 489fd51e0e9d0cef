"""What is measured of the machine."""

from __future__ import annotations

import platform

import pytest
import torch

from penchant.training.hardware import forget_peak_memory, peak_memory_bytes

CPU = torch.device("cpu")
LARGE = 300 * 2**20


@pytest.mark.skipif(platform.system() != "Linux", reason="the peak of a process can be reset on Linux alone")
def test_the_peak_of_what_went_before_is_forgotten() -> None:
    forget_peak_memory()
    before = peak_memory_bytes(CPU)
    held = torch.ones(LARGE, dtype=torch.uint8)
    high = peak_memory_bytes(CPU)
    assert high >= before + 0.9 * LARGE
    del held
    assert peak_memory_bytes(CPU) >= high - 2**20  # it stays, but for the rounding of the kernel's counters
    forget_peak_memory()
    assert peak_memory_bytes(CPU) <= high - 0.9 * LARGE
