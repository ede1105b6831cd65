"""The one place that decides where the computing is done."""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Names that a user may ask for; "cuda:1" and so on name one of several GPUs.
DEVICES = ("auto", "cpu", "cuda")

_NAME = re.compile(r"auto|cpu|cuda(:\d+)?")
_GUIDE = "see docs/gpu.md"


@dataclass(frozen=True)
class DeviceChoice:
    """What was chosen, and a sentence that tells the user why.

    Attributes
    ----------
    name : str
        "cpu" or "cuda:0", "cuda:1", ...
    reason : str
        A full sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class CudaFindings:
    """What there is for computing on an NVIDIA GPU.

    Attributes
    ----------
    problem : str
        Why no GPU can be used and what to install, without a full stop; empty if one can.
    torch, cupy : str
        Versions; empty where it was not necessary to look, or not installed.
    torch_cuda, cupy_cuda, driver_cuda : str
        CUDA versions that PyTorch and CuPy were built for, and the latest that the driver supports.
    gpus : tuple of str
        Name, architecture and memory of each GPU.
    """

    problem: str
    torch: str = ""
    torch_cuda: str = ""
    cupy: str = ""
    cupy_cuda: str = ""
    driver_cuda: str = ""
    gpus: tuple[str, ...] = ()


@functools.cache
def find_cuda() -> CudaFindings:
    """Look for a GPU, and for PyTorch and CuPy that can use it; the answer is kept.

    PyTorch and CuPy are imported only when they are needed for the answer.
    """
    if importlib.util.find_spec("cupy") is None:
        return CudaFindings(
            f"CuPy is not installed (for an NVIDIA GPU install the extra cuda12 or cuda13; {_GUIDE})"
        )
    import torch

    found: dict[str, Any] = {"torch": str(torch.__version__), "torch_cuda": torch.version.cuda or ""}
    if torch.version.cuda is None:
        return CudaFindings(
            f"PyTorch {torch.__version__} was built without CUDA (install a CUDA build of it; {_GUIDE})",
            **found,
        )
    from napari_innergs.cuda import _module

    try:
        cupy = _module.versions()
    except Exception as error:  # CuPy raises ImportError, or its own error where a library is missing
        first = (str(error).strip().splitlines() or [""])[0]
        return CudaFindings(f"CuPy can not be used: {type(error).__name__}: {first} ({_GUIDE})", **found)
    found |= {"cupy": cupy["cupy"], "cupy_cuda": cupy["cuda"], "driver_cuda": cupy["driver"]}
    ours, theirs = (str(version).partition(".")[0] for version in (torch.version.cuda, cupy["cuda"]))
    if ours != theirs:
        return CudaFindings(
            f"PyTorch was built for CUDA {ours} and CuPy for CUDA {theirs} (uninstall this CuPy and install "
            f"cupy-cuda{ours}x; {_GUIDE})",
            **found,
        )
    if not torch.cuda.is_available():
        return CudaFindings(
            f"PyTorch finds no NVIDIA GPU or no driver for CUDA {torch.version.cuda} (nvidia-smi must list the "
            f"GPU; update the driver if it is older; {_GUIDE})",
            **found,
        )
    gpus = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        gpus.append(f"{about.name} (sm_{about.major}{about.minor}, {about.total_memory / 2**30:.1f} GiB)")
    return CudaFindings("", **found, gpus=tuple(gpus))


@functools.cache
def _try_gpu(index: int) -> str:
    """Run a test kernel on a GPU; return what is wrong, nothing if it went well."""
    findings = find_cuda()
    if findings.problem:
        return findings.problem
    if index >= len(findings.gpus):
        return f"there is no GPU number {index} (PyTorch finds {len(findings.gpus)}, counted from 0)"
    from napari_innergs.cuda import _module

    try:
        _module.probe(index)
    except RuntimeError as error:
        return f"the test kernel failed on {findings.gpus[index]}: {error} ({_GUIDE})"
    return ""


def describe_device(requested: str = "auto") -> DeviceChoice:
    """Choose a device and say why.

    A GPU is chosen only if PyTorch was built for CUDA, CuPy can be imported, both are for the same major version
    of CUDA, and a test kernel ran on the GPU.

    Parameters
    ----------
    requested : str
        "auto", "cpu", "cuda", or "cuda:1" and so on.

    Returns
    -------
    DeviceChoice

    Raises
    ------
    ValueError
        If the name is unknown.
    RuntimeError
        If a GPU is asked for and cannot be used.

    Examples
    --------
    >>> describe_device("cpu").name
    'cpu'
    """
    if not _NAME.fullmatch(requested):
        raise ValueError(
            f"Unknown device {requested!r}: choose one of {', '.join(DEVICES)}, or cuda:N for GPU number N."
        )
    if requested == "cpu":
        return DeviceChoice("cpu", "The CPU is used because it was asked for.")
    problem = find_cuda().problem
    if not problem:
        import torch

        index = int(requested[5:]) if requested[5:] else torch.cuda.current_device()
        problem = _try_gpu(index)
        if not problem:
            asked = "it can be used" if requested == "auto" else "it was asked for"
            return DeviceChoice(
                f"cuda:{index}", f"The GPU {find_cuda().gpus[index]} is used because {asked}."
            )
    if requested == "auto":
        return DeviceChoice("cpu", f"The CPU is used because {problem}.")
    raise RuntimeError(f"The device {requested!r} can not be used because {problem}.")


def backend_device(requested: str, where: torch.device) -> str:
    """Return the device, "cpu" or "cuda:N", on which an operator runs for tensors that are on ``where``.

    "auto" stays where the tensors are (on the CPU if their GPU can not be used); "cuda" prefers their GPU.
    """
    if requested == "auto":
        return str(where) if where.type == "cuda" and not _try_gpu(where.index) else "cpu"
    if requested == "cuda" and where.type == "cuda":
        requested = str(where)
    return describe_device(requested).name


def explain_error(error: Exception) -> Exception:
    """Return an error for the user: a lack of memory on the GPU with its size and the cures, else the same."""
    if type(error).__name__ != "OutOfMemoryError":
        return error
    from napari_innergs.cuda import _module

    return _module.explain_memory(error)


def set_deterministic(value: bool) -> None:
    """Choose on GPUs between the faster kernels and those that give the same bits every time.

    The CPU gives the same bits anyway. ``torch.use_deterministic_algorithms(True)`` has the same effect.
    """
    from napari_innergs.cuda import _module

    _module.set_deterministic(value)


def is_deterministic() -> bool:
    """Return whether kernels on GPUs give the same bits every time."""
    from napari_innergs.cuda import _module

    return _module.is_deterministic()


def set_threads(count: int) -> None:
    """Set the number of CPU threads that the kernels use (by default all, or ``OMP_NUM_THREADS``)."""
    from napari_innergs.cpu import _pool

    _pool.set_threads(count)


def get_threads() -> int:
    """Return the number of CPU threads that the kernels use."""
    from napari_innergs.cpu import _pool

    return _pool.get_threads()
