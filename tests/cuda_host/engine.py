"""Build kernel text for the CPU with g++, and launch it in place of the GPU."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from napari_innergs.cuda import _module

HERE = Path(__file__).parent
HEADER = HERE / "cuda_on_host.h"
# Without contraction: every multiply-add that the kernels want is written as fmaf.
FLAGS = ("-std=c++20", "-g", "-fPIC", "-ffp-contract=off", "-Wall", "-Wno-unknown-pragmas", "-Wno-unused")
_TYPES = {"int": ctypes.c_int, "int64": ctypes.c_longlong, "float": ctypes.c_float, "double": ctypes.c_double}


class HostError(RuntimeError):
    """A barrier or a warp operation that not all threads reached."""


def compiler() -> str:
    """Return the path of g++, or raise with what to install."""
    found = shutil.which("g++")
    if found is None:
        raise FileNotFoundError("g++ is missing: it runs the CUDA kernels on the CPU (apt-get install g++)")
    return found


def build(text: str, flags: tuple[str, ...], name: str) -> Path:
    """Compile C++ text once and return the path of the result, kept in a folder for temporary files."""
    key = hashlib.sha256("\0".join([text, HEADER.read_text(), *flags]).encode()).hexdigest()[:20]
    folder = Path(tempfile.gettempdir()) / f"innergs-cuda-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to somebody else")
    path = folder / f"{name}-{key}"
    if not path.exists():
        code = folder / f"{name}-{key}-{os.getpid()}.cpp"
        made = code.with_suffix(".made")
        code.write_text(text)
        command = [compiler(), *FLAGS, *flags, "-include", str(HEADER), str(code), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        code.unlink()
        if done.returncode:
            raise RuntimeError(done.stderr)
        made.replace(path)
    return path


def defines(channels: int | None) -> tuple[str, ...]:
    return tuple(f"-D{key}={value}" for key, value in _module.macros(channels).items())


def wrappers(name: str) -> str:
    """Return a C function for each kernel of a source: grid, block, then the kernel's own arguments."""
    out = []
    for kernel, parameters in _module.signatures(name).items():
        declared = ", ".join(f"{p.type} {p.name}" for p in parameters)
        names = ", ".join(p.name for p in parameters)
        out.append(
            f'extern "C" const char* host_{kernel}(unsigned grid, unsigned block, {declared}) '
            f"{{ return host::launch(grid, block, [=] {{ {kernel}({names}); }}); }}\n"
        )
    return "".join(out)


@functools.cache
def library(name: str, channels: int | None) -> ctypes.CDLL:
    text = _module.source(name) + wrappers(name)
    out = ctypes.CDLL(str(build(text, ("-O2", "-shared", *defines(channels)), f"{name}{channels or ''}")))
    for kernel, parameters in _module.signatures(name).items():
        function = getattr(out, f"host_{kernel}")
        function.restype = ctypes.c_char_p
        function.argtypes = [ctypes.c_uint] * 2 + [_TYPES.get(p.type, ctypes.c_void_p) for p in parameters]
    return out


def launch(
    name: str,
    kernel: str,
    threads: int,
    arguments: tuple[Any, ...],
    *,
    device: torch.device,
    channels: int | None = None,
    block: int = _module.BLOCK,
) -> None:
    """Stand in for `napari_innergs.cuda._module.launch` with tensors on the CPU."""
    if threads == 0:
        return
    assert device.type == "cpu"
    values = [x.item() for x in _module.convert(name, kernel, arguments)]
    error = getattr(library(name, channels), f"host_{kernel}")(-(-threads // block), block, *values)
    if error:
        raise HostError(f"{kernel}: {error.decode()}")
