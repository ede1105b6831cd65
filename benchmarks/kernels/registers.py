"""Compile every CUDA kernel for every architecture, without a GPU, and list registers, spills and memory.

Writes ``benchmarks/results/cuda_registers.json``. Needs the wheel nvidia-cuda-nvrtc-cu12 and nothing else of
CUDA; the same functions are the compile test of the suite.

    python benchmarks/kernels/registers.py
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from napari_innergs.cuda import _module, _planes

ARCHITECTURES = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
MOST_REGISTERS = 128
RESULT = Path(__file__).parents[1] / "results" / "cuda_registers.json"

_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.S,
)


@functools.cache
def load_nvrtc() -> ctypes.CDLL:
    """Return the library of the wheel nvidia-cuda-nvrtc-cu12; raise FileNotFoundError where it is missing."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for path in sorted(Path(folder).glob("cuda_nvrtc/lib/libnvrtc.so.12")):
            return ctypes.CDLL(str(path))
    raise FileNotFoundError("libnvrtc.so.12 is missing: pip install 'nvidia-cuda-nvrtc-cu12==12.9.*'")


def nvrtc_version() -> str:
    major, minor = ctypes.c_int(), ctypes.c_int()
    load_nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return f"{major.value}.{minor.value}"


def compile_text(text: str, options: list[str]) -> tuple[str, bytes]:
    """Return the compiler's log and the machine code; raise RuntimeError with the log if it fails."""
    nvrtc = load_nvrtc()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"kernels.cu", 0, None, None)
    words = (ctypes.c_char_p * len(options))(*(one.encode() for one in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), words)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    code = b""
    if status == 0:
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, buffer)
        code = buffer.raw
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    if status != 0:
        raise RuntimeError(log.value.decode())
    return log.value.decode(), code


def variants() -> Iterator[tuple[str, int | None]]:
    """Every source with every number of channels that it is compiled for."""
    grouped = range(1, _planes.GROUP + 1)
    channels = {"planes": grouped, "xray": grouped, "rgb": (3, 4)}  # colours, with depth too
    for name in _module.SOURCES:
        yield from ((name, c) for c in channels.get(name, (None,)))


def resources(name: str, channels: int | None, architecture: str) -> dict[str, dict[str, int]]:
    """Return what each kernel of a source takes: registers, bytes of spills, stack and shared memory."""
    options = [*_module.OPTIONS, *(f"-D{key}={value}" for key, value in _module.macros(channels).items())]
    options += [f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    log, code = compile_text(_module.source(name), options)
    if not code:
        raise RuntimeError(f"{name} for {architecture}: no machine code")
    found = {}
    for kernel, stack, stores, loads, registers, rest in _ENTRY.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[kernel] = {
            "registers": int(registers),
            "spill_bytes": int(stores) + int(loads),
            "stack_bytes": int(stack),
            "shared_bytes": int(shared[1]) if shared else 0,
        }
    missing = set(_module.signatures(name)) - set(found)
    if missing:
        raise RuntimeError(
            f"{name} for {architecture}: the log does not tell of {', '.join(sorted(missing))}"
        )
    return found


def table(architectures: tuple[str, ...] = ARCHITECTURES, workers: int = 2) -> list[dict[str, Any]]:
    """Return one row for each kernel, number of channels and architecture."""
    tasks = [(*variant, architecture) for variant in variants() for architecture in architectures]
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(lambda task: resources(*task), tasks))
    return [
        {"kernel": kernel, "channels": channels, "architecture": architecture, **numbers}
        for (_, channels, architecture), found in zip(tasks, done, strict=True)
        for kernel, numbers in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULT)
    output = parser.parse_args().output
    rows = table()
    head = {
        "date": datetime.date.today().isoformat(),
        "compiler": f"NVRTC {nvrtc_version()}",
        "options": list(_module.OPTIONS),
        "most_registers": max(row["registers"] for row in rows),
        "kernels_with_spills": sum(row["spill_bytes"] > 0 for row in rows),
    }
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    output.write_text(json.dumps(head, indent=1)[:-2] + f',\n "kernels": [\n  {lines}\n ]\n}}\n')
    json.loads(output.read_text())
    for row in rows:
        print(*(f"{key} {value}" for key, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
