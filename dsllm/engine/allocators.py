"""What torch's allocator holds now, and held at most: CUDA keeps statistics, for the CPU there is a counter here."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch.utils import cpp_extension

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu_allocator.cpp")


class Reading(NamedTuple):
    """Bytes of tensors on one device, at one moment."""

    held_bytes: int
    """Now."""
    peak_bytes: int
    """At most since `reset_peak`."""
    reserved_bytes: int | None
    """Taken from the device for it, at most since `reset_peak`, gaps included; None where that is not known."""


class Allocator(Protocol):
    """What gives tensors their memory. It is read in every phase of every step, and must answer at once."""

    def read(self) -> Reading:
        """What it holds."""

    def reset_peak(self) -> None:
        """Begin a new peak at what is held now."""


class CudaAllocator:
    """torch's statistics of the current CUDA device, kept by the host: nothing waits for the device."""

    def __init__(self) -> None:
        torch.cuda.init()  # there are none before

    def read(self) -> Reading:
        # one call as it comes: each of torch.cuda.max_memory_allocated and its like flattens and sorts all of it
        statistics = torch.cuda.memory_stats_as_nested_dict()
        allocated, reserved = statistics["allocated_bytes"]["all"], statistics["reserved_bytes"]["all"]
        return Reading(allocated["current"], allocated["peak"], reserved["peak"])

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()


class CpuAllocator:
    """Counts what passes through torch's CPU allocator from the first of these on."""

    def __init__(self, library: ctypes.CDLL) -> None:
        for function in (library.held_bytes, library.peak_bytes):
            function.restype = ctypes.c_longlong
        library.install()
        self._library = library

    def read(self) -> Reading:
        return Reading(self._library.held_bytes(), self._library.peak_bytes(), None)

    def reset_peak(self) -> None:
        self._library.reset_peak()


@functools.cache
def allocator(device_type: str) -> Allocator | None:
    """The statistics of "cuda" or "cpu"; None on the CPU where the counter cannot be compiled."""
    if device_type == "cuda":
        return CudaAllocator()
    try:
        return CpuAllocator(ctypes.CDLL(str(_compiled())))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("memory is not measured on this CPU: %s", error)
        return None


def _compiled() -> Path:
    """The counter as a library, compiled once for each version of torch in about two seconds.

    Raises OSError where there is no compiler, CalledProcessError where it fails.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"no C++ compiler '{compiler[0]}'")
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = _cache_folder() / f"cpu_allocator-{key}.so"
    if not library.is_file():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Every rank may come here at once: each makes its own and the last rename wins.
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            partial = Path(folder) / library.name
            includes = [f"-I{path}" for path in cpp_extension.include_paths()]
            paths = [f"-L{path}" for path in cpp_extension.library_paths()]
            abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
            options = ["-O1", "-std=c++20", "-shared", "-fPIC", abi]
            command = [*compiler, *options, str(SOURCE), *includes, *paths, "-lc10", "-o", str(partial)]
            subprocess.run(command, check=True, capture_output=True)
            partial.replace(library)
    return library


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsllm"
