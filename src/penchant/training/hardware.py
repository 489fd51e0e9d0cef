"""What the machine has: the device, the arithmetic it is fast at, the memory a run used."""

from __future__ import annotations

import platform
import resource

import torch

from penchant.errors import UserError
from penchant.scoring.policy import Precision


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
    """Most memory that the process has held so far: on the device, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
