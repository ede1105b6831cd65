"""From torch tensors to the arrays of a backend, and back."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from napari_innergs.device import backend_device, explain_error

#: Backends by the name that a caller may give, with "cuda:1" and so on; :mod:`napari_innergs.device` decides.
BACKENDS = ("auto", "reference", "cpu", "cuda")


@dataclass(frozen=True)
class Backend:
    """A backend's module for one operator, and how arrays get in and out of it."""

    name: str
    module: ModuleType
    device: torch.device

    def enter(self, tensor: Tensor) -> Any:
        """Return contiguous float32 for the backend (reference: the tensor), shared where possible."""
        tensor = tensor.detach()
        if self.name == "reference":
            return tensor
        try:
            tensor = tensor.to(self.device, torch.float32).contiguous()
        except torch.cuda.OutOfMemoryError as error:
            raise explain_error(error) from error
        return tensor.numpy() if self.name == "cpu" else tensor

    def leave(self, array: Any, like: Tensor) -> Tensor:
        """Return a tensor of the type and on the device of ``like``, sharing memory where possible."""
        tensor = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
        return tensor.to(like)


class Sums(torch.autograd.Function):
    """Sums of Gaussians by a backend's module: saves, calls and returns; the arithmetic is the backend's."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, arguments: tuple[Any, ...], means: Tensor, covs: Tensor, amps: Tensor
    ) -> Tensor:
        """Call the module with the arrays of three tensors and further arguments."""
        out, ctx.saved = backend.module.forward(*map(backend.enter, (means, covs, amps)), *arguments)
        ctx.backend = backend
        # The backend shares their memory: torch raises if they are changed in place before backward.
        ctx.save_for_backward(means, covs, amps)
        return backend.leave(out, means)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the three tensors."""
        inputs = ctx.saved_tensors
        grads = ctx.backend.module.backward(ctx.backend.enter(grad_out), ctx.saved)
        return None, None, *(ctx.backend.leave(g, x) for g, x in zip(grads, inputs, strict=True))


def get_backend(name: str, operator: str, where: torch.device) -> Backend:
    """Return the backend called ``name`` for ``operator`` ("slices", "voxels", ...) on tensors on ``where``.

    Raises
    ------
    ValueError
        If the name is unknown.
    RuntimeError
        If the backend cannot be used on this computer.
    """
    if name not in BACKENDS and not name.startswith("cuda:"):
        raise ValueError(f"Unknown backend {name!r}: choose one of {', '.join(BACKENDS)}.")
    device = where if name == "reference" else torch.device(backend_device(name, where))
    room = name if name == "reference" else device.type
    return Backend(room, importlib.import_module(f"napari_innergs.{room}.{operator}"), device)


def check_gaussians(means: Tensor, covs: Tensor, amps: Tensor) -> None:
    """Raise ValueError unless shapes are (N, 3), (N, 6) and (N, C) and all are floating point."""
    n = means.shape[0] if means.ndim else 0
    if means.ndim != 2 or means.shape[1] != 3:
        raise ValueError(f"means must have shape (N, 3), not {tuple(means.shape)}.")
    if covs.shape != (n, 6):
        raise ValueError(f"covs must have shape ({n}, 6) to match means, not {tuple(covs.shape)}.")
    if amps.ndim != 2 or amps.shape[0] != n or amps.shape[1] < 1:
        raise ValueError(f"amps must have shape ({n}, C) with C >= 1, not {tuple(amps.shape)}.")
    for name, tensor in (("means", means), ("covs", covs), ("amps", amps)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, not {tensor.dtype}.")


def check_cut(cut: float) -> float:
    """Return ``cut``, or raise ValueError unless it is positive and small enough for float32."""
    cut = float(cut)
    if not 0 < cut <= 80:
        raise ValueError(
            f"cut is a squared radius in standard deviations, above 0 and at most 80, not {cut}."
        )
    return cut


def normalised_channels(amps: Tensor, log_weights: Tensor) -> Tensor:
    """Return the channels (w a_1, ..., w a_C, w), (N, C + 1), whose sums give the normalised field."""
    log_weights = log_weights.reshape(-1, 1)
    if len(log_weights) != len(amps):
        raise ValueError(f"log_weights must hold {len(amps)} numbers to match amps, not {len(log_weights)}.")
    w = torch.exp(log_weights)
    return torch.cat([w * amps, w], 1)


def normalise(sums: Tensor, axis: int, background: Tensor | float | None, eps: float) -> Tensor:
    """Return (sum w a g + eps b) / (sum w g + eps) from sums whose last channel along ``axis`` is sum w g."""
    if not eps > 0:
        raise ValueError(f"eps must be positive, not {eps}.")
    channels = sums.shape[axis] - 1
    numerator, denominator = sums.split([channels, 1], axis)
    if background is not None:
        numerator = numerator + eps * background
    return numerator / (denominator + eps)


def morton_order(means: Tensor, cell: float = 8.0) -> Tensor:
    """Return an order of Gaussians in which neighbours in the list are neighbours in space.

    Kernels run two to three times faster on Gaussians in such an order than on shuffled ones. Positions drift
    while fitting, so sort anew every hundred steps or so, and sort the state of the optimiser along.

    Parameters
    ----------
    means : Tensor, (N, 3)
        Positions, in pixels or voxels.
    cell : float
        Edge of the cubes inside which the order does not matter, in the same unit.

    Returns
    -------
    Tensor of int64, (N,)
        Use it as an index: ``means[order]``. Z-order curve (Morton 1966) over 2**20 cells on each axis;
        positions that are not finite come first.
    """
    x = means.detach().double().nan_to_num(0.0, 0.0, 0.0)
    if len(x) == 0:
        return torch.zeros(0, dtype=torch.int64, device=means.device)
    code = ((x - x.amin(0)) / cell).clamp(0, 2**20 - 1).to(torch.int64)
    # Spread the bits of each coordinate three apart.
    for shift, mask in (
        (32, 0x1F00000000FFFF),
        (16, 0x1F0000FF0000FF),
        (8, 0x100F00F00F00F00F),
        (4, 0x10C30C30C30C30C3),
        (2, 0x1249249249249249),
    ):
        code = (code | (code << shift)) & mask
    return torch.argsort(code[:, 0] << 2 | code[:, 1] << 1 | code[:, 2], stable=True)
