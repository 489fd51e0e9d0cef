"""What the machine has: the device, the arithmetic it is fast at, the memory a run used."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
from importlib.metadata import version
from pathlib import Path

import torch

from penchant.errors import UserError
from penchant.scoring.policy import Precision

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MEMINFO = Path("/proc/meminfo")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def versions_in_use() -> dict[str, str]:
    """Of Python and of the packages that numbers depend on."""
    packages = ("penchant", "torch", "transformers", "peft", "tokenizers")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


def resolve_device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:1` means here.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: '{name}' is not usable here: {str(error).splitlines()[0]}") from None
    return device


def resolve_precision(name: str, device: torch.device) -> Precision:
    """`auto` is bf16 where the device multiplies it in hardware, float32 elsewhere (where it is far slower)."""
    if name != "auto":
        return "bf16" if name == "bf16" else "float32"
    return "bf16" if multiplies_bf16(device) else "float32"


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware: AMX or AVX512-BF16 on a CPU, Ampere or newer on CUDA."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def default_microbatch_tokens(device: torch.device) -> int:
    """Enough tokens at once to keep the device busy; more only costs memory and, in padded rows, filling."""
    return 16384 if device.type == "cuda" else 1024


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held since `forget_peak_memory`: on the device, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        (kibibytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
        return int(kibibytes) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak_memory() -> None:
    """Begins to measure anew, so that runs which follow each other in one process have their own peaks.

    On a host other than Linux, and where the process may not, the peak stays that of the whole process.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text("5")  # see proc(5): resets the peak resident set


def give_freed_memory_back() -> None:
    """Has the C library hand large pieces back to the system when they are freed, where it is glibc.

    Sharded weights come and go with every layer. By itself glibc would keep what they leave, in pieces: SmolLM2 in two
    processes was seen to hold 4.6 GiB at its peak instead of 2.7.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            libc.mallopt(option, 2**20)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is the device's or the host's way to say that memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def available_memory_bytes() -> int:
    """Host memory that programs could still take without swapping; 0 where the system does not say."""
    if not _MEMINFO.exists():
        return 0
    (kibibytes,) = re.findall(r"^MemAvailable:\s+(\d+) kB$", _MEMINFO.read_text(), re.MULTILINE)
    return int(kibibytes) * 1024
