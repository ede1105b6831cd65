"""``innergs info``: what to add to a problem report."""

from __future__ import annotations

import dataclasses
import importlib.util

from napari_innergs.cli._options import Json
from napari_innergs.cli._run import print_json
from napari_innergs.cli.bench import devices

_EXTRAS = {
    "medical": ("nibabel", "pydicom"),
    "zarr": ("zarr", "ngff_zarr"),
    "hdf5": ("h5py",),
    "napari": ("napari",),
}


def info(as_json: Json = False) -> int:
    """Print versions, device and memory: what to add to a problem report.

    \b
    Example:
      innergs info --json
    """
    from napari_innergs.device import describe_device, find_cuda, get_threads
    from napari_innergs.geometry.grid import available_memory, format_bytes
    from napari_innergs.tasks.versions import versions

    choice = describe_device()
    cuda = dataclasses.asdict(find_cuda())
    free = available_memory()
    extras = {
        name: all(importlib.util.find_spec(module) is not None for module in modules)
        for name, modules in _EXTRAS.items()
    }
    report = {
        "versions": versions(),
        "device": {"name": choice.name, "reason": choice.reason},
        "devices": devices(),
        "cuda": cuda,
        "threads": get_threads(),
        "memory_available": free,
        "extras": extras,
    }
    if as_json:
        print_json(report)
        return 0
    for name, version in versions().items():
        print(f"{name:24}{version}")
    print(f"{'device':24}{choice.name}: {choice.reason}")
    for name in ("torch_cuda", "cupy", "cupy_cuda", "driver_cuda"):
        if cuda[name]:
            print(f"{name.replace('_cuda', ' for CUDA'):24}{cuda[name]}")
    for gpu in cuda["gpus"]:
        print(f"{'gpu':24}{gpu}")
    print(f"{'threads':24}{get_threads()}")
    print(f"{'memory available':24}{format_bytes(free)}")
    for name, present in extras.items():
        print(f"{name:24}{'installed' if present else 'not installed'}")
    return 0
