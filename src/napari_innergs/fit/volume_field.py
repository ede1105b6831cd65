"""A normalised field of Gaussians in a volume, fitted to what a linear operator measures of it.

Frame: voxel indices of a grid. A Gaussian is its centre, the Cholesky factor of its covariance, its values and its
weight. The Gaussians are voxelised and then measured, so that any slice profile and any geometry is exact; what
keeps noise and the unmeasured directions in check is how few Gaussians there are and how early the fit stops.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from napari_innergs.operators.acquisition import misfit
from napari_innergs.operators.linear import LinearOperator
from napari_innergs.operators.shear import Adam
from napari_innergs.operators.slices import morton_order
from napari_innergs.operators.voxels import voxelise_normalised

# Squared radius of the support: in a normalised field the denominator is cut off alike.
CUT_VOLUME = 9.0
# Standard deviation of a new Gaussian in units of the spacing, and the least one in voxels.
_WIDTH, _MIN_WIDTH = 0.55, 0.4
_RATES = {"mean": 0.1, "cholesky": 0.05, "amplitude": 0.03, "log_weight": 0.05}


@dataclass
class VolumeField:
    """Gaussians in voxel indices.

    Attributes
    ----------
    mean : Tensor, (N, 3)
        Centres (z, y, x).
    cholesky : Tensor, (N, 6)
        Logarithms of the factor's diagonal (z, y, x), then l_yz, l_xz, l_xy.
    amplitude : Tensor, (N, C)
        Values.
    log_weight : Tensor, (N,)
        Logarithms of the weights.
    """

    mean: Tensor
    cholesky: Tensor
    amplitude: Tensor
    log_weight: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def covariances(self) -> Tensor:
        """Return (N, 6): zz, zy, zx, yy, yx, xx."""
        a, b, c = self.cholesky[:, :3].exp().unbind(1)
        d, e, f = self.cholesky[:, 3:].unbind(1)
        return torch.stack([a * a, a * d, a * e, d * d + b * b, d * e + b * f, e * e + f * f + c * c], 1)

    def render(self, shape: tuple[int, int, int], backend: str = "auto") -> Tensor:
        """Return the field at the centres of voxels, (C, Z, Y, X)."""
        return voxelise_normalised(
            self.mean,
            self.covariances(),
            self.amplitude,
            self.log_weight,
            shape,
            cut=CUT_VOLUME,
            backend=backend,
        )


def start_volume_field(volume: np.ndarray, spacing: float) -> VolumeField:
    """Place round Gaussians on a staggered lattice, with the values of a volume.

    Parameters
    ----------
    volume : ndarray, (C, Z, Y, X), float32
        Values, scaled to about one.
    spacing : float
        Distance of the centres in voxels.
    """
    shape = volume.shape[1:]
    axes = [np.arange(((n - 1) % spacing) / 2, n, spacing) for n in shape]
    z, y, x = np.meshgrid(*axes, indexing="ij")
    odd = (np.arange(len(axes[0])) % 2 == 1)[:, None, None] * spacing / 2
    y, x = np.minimum(y + odd, shape[1] - 1), np.minimum(x + odd, shape[2] - 1)
    mean = torch.from_numpy(np.stack([z, y, x], -1).reshape(-1, 3).astype(np.float32))
    mean = mean[morton_order(mean)].contiguous()
    at = tuple(mean.round().long().numpy().T)
    log_sigma = float(np.log(_WIDTH * spacing))
    cholesky = torch.zeros(len(mean), 6)
    cholesky[:, :3] = log_sigma
    amplitude = torch.from_numpy(np.ascontiguousarray(volume[(slice(None), *at)].T))
    return VolumeField(mean, cholesky, amplitude, torch.zeros(len(mean)))


def fit_volume_field(
    field: VolumeField,
    shape: tuple[int, int, int],
    operators: Sequence[LinearOperator],
    data: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    iterations: int,
    *,
    backend: str = "auto",
) -> Generator[tuple[int, float], None, None]:
    """Fit a field to measurements in place, yielding (iteration, loss) after each step.

    Parameters
    ----------
    field : VolumeField
        What to fit; it always holds the latest state.
    shape : tuple of int
        Voxels of the volume.
    operators : sequence of LinearOperator
        One for each stack.
    data : sequence of ndarray, (C, ...)
        What each measured, scaled to about one.
    weights : sequence of ndarray
        Weights of the values, the same for all channels.
    iterations : int
        Adam steps; rates decay to a tenth over them.
    backend : str
        Where the Gaussians are voxelised.
    """
    names = tuple(_RATES)
    optimiser = Adam(backend=backend)
    decay = 0.1 ** (1 / max(iterations, 1))
    total = sum(float(w.sum()) for w in weights) * len(data[0])
    for iteration in range(iterations):
        tensors = {name: getattr(field, name).requires_grad_(True) for name in names}
        try:
            volume = field.render(shape, backend)
            loss = misfit(volume, operators, data, weights) / max(total, 1.0)
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for tensor in tensors.values():
                tensor.requires_grad_(False)
        optimiser.step(tensors, {name: rate * decay**iteration for name, rate in _RATES.items()})
        field.cholesky[:, :3].clamp_min_(float(np.log(_MIN_WIDTH)))
        yield iteration + 1, float(loss.detach())
    for name in names:
        getattr(field, name).grad = None
