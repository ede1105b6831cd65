"""``innergs bench``: how fast the kernels are on this computer."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Annotated

import typer

from napari_innergs.cli._options import Json
from napari_innergs.cli._run import print_json


def bench(
    gaussians: Annotated[int, typer.Option(help="How many Gaussians.", min=1)] = 20_000,
    rounds: Annotated[int, typer.Option(help="Repetitions; the median counts.", min=1)] = 5,
    as_json: Json = False,
) -> int:
    """Time the kernels on the devices of this computer.

    Whole calls of the public operators, forward and backward, on a fixed random problem.

    \b
    Example:
      innergs bench --gaussians 20000
    """
    import torch

    from napari_innergs.device import describe_device, get_threads
    from napari_innergs.operators.slices import morton_order, render_slices
    from napari_innergs.operators.voxels import voxelise as sample

    generator = torch.Generator().manual_seed(0)
    means = torch.rand(gaussians, 3, generator=generator) * 96
    means = means[morton_order(means)]
    widths = 1 + torch.rand(gaussians, 3, generator=generator)
    covariances = torch.zeros(gaussians, 6)
    covariances[:, [0, 3, 5]] = widths**2
    amplitudes = torch.rand(gaussians, 1, generator=generator)
    positions = torch.arange(0, 96, 4.0)
    tasks: dict[str, Callable[..., torch.Tensor]] = {
        "slices, 24 of 96 x 96": lambda m, s, a, b: render_slices(m, s, a, positions, (96, 96), backend=b),
        "voxels, 96 x 96 x 96": lambda m, s, a, b: sample(m, s, a, (96, 96, 96), backend=b),
    }
    rows = []
    for device in devices():
        # a GPU works on by itself after a call has returned
        wait = partial(torch.cuda.synchronize, device) if device != "cpu" else lambda: None
        for label, operator in tasks.items():
            forward, backward = [], []
            # the first call compiles
            for number in range(rounds + 1):
                inputs = [x.to(device).clone().requires_grad_() for x in (means, covariances, amplitudes)]
                wait()
                start = time.perf_counter()
                out = operator(*inputs, device)
                wait()
                middle = time.perf_counter()
                out.sum().backward()
                wait()
                if number:
                    forward.append(middle - start)
                    backward.append(time.perf_counter() - middle)
            for name, times in (("forward", forward), ("backward", backward)):
                median = sorted(times)[len(times) // 2]
                rows.append({"device": device, "operator": label, "pass": name, "ms": round(median * 1e3, 2)})
    report = {"gaussians": gaussians, "rounds": rounds, "threads": get_threads(), "results": rows}
    if as_json:
        print_json(report)
        return 0
    print(f"{gaussians} Gaussians, median of {rounds}, {get_threads()} threads")
    print(describe_device().reason)
    print(f"{'device':8}{'operator':26}{'pass':10}{'ms':>10}")
    for row in rows:
        print(f"{row['device']:8}{row['operator']:26}{row['pass']:10}{row['ms']:10.2f}")
    return 0


def devices() -> list[str]:
    """Devices that can be used here."""
    from napari_innergs.device import describe_device, find_cuda

    found = ["cpu"]
    for index in range(len(find_cuda().gpus)):
        with suppress(RuntimeError):
            found.append(describe_device(f"cuda:{index}").name)
    return found
