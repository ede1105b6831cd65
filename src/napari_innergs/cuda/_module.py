"""From kernel text to a launch on torch's stream: the only module that imports CuPy.

A launch names a source, a kernel, how many threads are wanted and the arguments in order; what the arguments
must be is read from the kernel's own signature, so that a wrong type is an error here and not a wrong number
there. Sources are compiled once for each device and set of macros, and CuPy keeps the result on disk.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from napari_innergs._constants import MIN_PIVOT, VARIANCE_RANGE

#: Edge in pixels of the tiles of the deterministic forward pass; a block has TILE * TILE threads.
TILE = 16
#: Threads in a block of the kernels that do not work on tiles.
BLOCK = 128
#: Options of the compiler besides architecture and macros. Numbers below 1e-38 count as zero, which makes exp2f
#: one instruction; division and square root stay exact.
OPTIONS = ("-std=c++17", "--ftz=true")

SOURCES = ("probe", "prepare", "planes", "shear", "xray", "rgb", "project")

_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(([^)]*)\)', re.S
)
_SCALARS: dict[str, type] = {"int": np.int32, "int64": np.int64, "float": np.float32, "double": np.float64}
_POINTERS = {"float*": torch.float32, "int*": torch.int32, "int64*": torch.int64}

Function = TypeVar("Function", bound=Callable[..., Any])


class Parameter(NamedTuple):
    """One parameter of a kernel: its name, and its type as one of the keys above."""

    name: str
    type: str


class DeviceMemoryError(MemoryError):
    """The memory of a GPU was not enough."""


@functools.cache
def source(name: str) -> str:
    """Return the text of ``kernels/<name>.cu`` with the headers that it includes put in."""
    folder = resources.files("napari_innergs.cuda") / "kernels"

    def header(match: re.Match[str]) -> str:
        text = (folder / match[1]).read_text("utf-8")
        line = whole.count("\n", 0, match.end()) + 2
        return f'#line 1 "{match[1]}"\n{text}#line {line} "{name}.cu"'

    whole = (folder / f"{name}.cu").read_text("utf-8")
    return f'#line 1 "{name}.cu"\n' + re.sub(r'^#include "([\w.]+)"$', header, whole, flags=re.M)


@functools.cache
def signatures(name: str) -> dict[str, list[Parameter]]:
    """Return the parameters of each kernel of a source."""
    found = {}
    for kernel, parameters in _KERNEL.findall(source(name)):
        words = [re.sub(r"\bconst\b|__restrict__", " ", one).split() for one in parameters.split(",")]
        found[kernel] = [Parameter(one[-1], "".join(one[:-1])) for one in words]
    return found


def macros(channels: int | None) -> dict[str, str]:
    """Return what is passed to the compiler by name: the shared constants and the number of channels."""
    numbers = {"MIN_PIVOT": MIN_PIVOT, "SMALLEST": VARIANCE_RANGE[0], "LARGEST": VARIANCE_RANGE[1]}
    out = {key: repr(float(value)) for key, value in numbers.items()} | {"TILE": str(TILE)}
    return out if channels is None else out | {"C": str(channels)}


def convert(name: str, kernel: str, arguments: tuple[Any, ...]) -> list[Any]:
    """Return numpy numbers, and addresses of tensors as uint64, for the arguments of a kernel.

    Raises
    ------
    TypeError
        If an argument does not fit the kernel's parameter, or a tensor is not contiguous.
    """
    parameters = signatures(name)[kernel]
    if len(parameters) != len(arguments):
        raise TypeError(f"{kernel} takes {len(parameters)} arguments, not {len(arguments)}.")
    out: list[Any] = []
    for parameter, argument in zip(parameters, arguments, strict=True):
        if parameter.type in _SCALARS:
            if isinstance(argument, Tensor) or (
                "int" in parameter.type and not isinstance(argument, (int, np.integer))
            ):
                raise TypeError(f"{kernel}: {parameter.name} must be {parameter.type}, not {argument!r}.")
            out.append(_SCALARS[parameter.type](argument))
            continue
        wanted = _POINTERS[parameter.type]
        if not isinstance(argument, Tensor) or argument.dtype != wanted or not argument.is_contiguous():
            raise TypeError(f"{kernel}: {parameter.name} must be a contiguous tensor of {wanted}.")
        out.append(np.uint64(argument.data_ptr()))
    return out


@functools.cache
def _compiled(name: str, channels: int | None, index: int) -> Any:
    import cupy

    options = (*OPTIONS, *(f"-D{key}={value}" for key, value in macros(channels).items()))
    with cupy.cuda.Device(index):
        return cupy.RawModule(code=source(name), options=options, backend="nvrtc")


@functools.cache
def _kernel(name: str, kernel: str, channels: int | None, index: int) -> Any:
    return _compiled(name, channels, index).get_function(kernel)


def launch(
    name: str,
    kernel: str,
    threads: int,
    arguments: tuple[Any, ...],
    *,
    device: torch.device,
    channels: int | None = None,
    block: int = BLOCK,
) -> None:
    """Start a kernel on the current stream of torch, with at least ``threads`` threads.

    Parameters
    ----------
    name, kernel : str
        The source and the kernel in it.
    threads : int
        Threads that have something to do; nothing is started for none.
    arguments : tuple
        Tensors on ``device`` and numbers, as the kernel declares them.
    device : torch.device
        A CUDA device with an index.
    channels : int, optional
        Value of the macro C.
    block : int
        Threads in a block.
    """
    if threads == 0:
        return
    import cupy

    values = convert(name, kernel, arguments)
    stream = torch.cuda.current_stream(device)
    with cupy.cuda.Device(device.index), cupy.cuda.ExternalStream(stream.cuda_stream, device.index):
        function = _kernel(name, kernel, channels, device.index)
        function((-(-threads // block),), (block,), tuple(values))


def versions() -> dict[str, str]:
    """Return CuPy's version, the CUDA version it was built for, and the latest that the driver supports.

    Raises
    ------
    ImportError
        If CuPy is missing or broken.
    """
    import cupy

    def written(number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}" if number else ""

    runtime = cupy.cuda.runtime
    try:
        driver = int(runtime.driverGetVersion())
    except runtime.CUDARuntimeError:  # no driver
        driver = 0
    built = written(int(runtime.runtimeGetVersion()))
    return {"cupy": str(cupy.__version__), "cuda": built, "driver": written(driver)}


def probe(index: int) -> None:
    """Run a small kernel on a device.

    Raises
    ------
    RuntimeError
        If it can not be compiled or started, or its answer is wrong.
    """
    device = torch.device("cuda", index)
    values = torch.arange(32, dtype=torch.float32, device=device)
    out = torch.zeros_like(values)
    try:
        launch("probe", "probe", 32, (values, out), device=device, block=32)
        answer = out.cpu()
    except Exception as error:  # CuPy's own classes, of which none can be named without importing it
        raise RuntimeError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    if not torch.equal(answer, 2 * (torch.arange(32) ^ 1).float() + 1):
        raise RuntimeError("a kernel gave a wrong answer")


def explain_memory(error: BaseException, device: torch.device | None = None) -> DeviceMemoryError:
    """Return an error that says how much memory was there and what to do."""
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    parts = [f"{wanted[1]} more were wanted"] if wanted else []
    try:
        free, total = torch.cuda.mem_get_info(device)
        parts.append(f"{free:,} of {total:,} bytes are free")
    except (RuntimeError, AssertionError):  # no GPU any more: say what there is
        pass
    return DeviceMemoryError(
        f"The GPU has not enough memory ({', '.join(parts) or error}). Choose a smaller preset, or the device "
        "'cpu'. What was fitted so far is kept."
    )


def guarded(function: Function) -> Function:
    """Turn a lack of GPU memory inside ``function`` into `DeviceMemoryError`."""

    @functools.wraps(function)
    def inner(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except torch.cuda.OutOfMemoryError as error:
            raise explain_memory(error) from error

    return inner  # type: ignore[return-value]


_deterministic = False


def set_deterministic(value: bool) -> None:
    """Choose the forward pass that gives the same bits every time, or the faster one with atomic additions."""
    global _deterministic
    _deterministic = bool(value)


def is_deterministic() -> bool:
    """Return whether the same bits are wanted every time, here or by torch's own setting."""
    return _deterministic or torch.are_deterministic_algorithms_enabled()
