"""A field of Gaussians fitted to slices: parameters in the stack's own frame, Adam, densify and prune.

Frame: (t, row, column) with t in units of the median slice gap and rows and columns in pixels. A Gaussian is its
centre, its shear k = S_un / S_nn (in-plane displacement per unit of t: the structure's inter-slice flow), its
through-plane standard deviation, the Cholesky factor of its in-plane covariance at fixed t, its amplitudes and
its weight. In these parameters the slices it was made from constrain everything but shear and through-plane
scale, which is why those two are set from the flow and the gap and stay there (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from napari_innergs._constants import EPSILON
from napari_innergs.operators.shear import Adam, sheared_gaussians
from napari_innergs.operators.slices import morton_order, render_slices

# Squared radius of the support while fitting: 3 standard deviations. In a normalised field what is cut off in
# the numerator is cut off in the denominator too, so the 0.1 % rule of the additive renderers is not needed.
CUT_FIT = 9.0
# In-plane standard deviation of a new Gaussian, in units of the spacing of the centres.
_WIDTH = 0.55
_MIN_WIDTH = 0.45

_RATES = {"mean": 0.3, "cholesky": 0.09, "amplitude": 0.03, "log_weight": 0.09}


@dataclass
class SliceField:
    """Gaussians in the frame of a stack.

    Attributes
    ----------
    mean : Tensor, (N, 3)
        Centres (t, row, column).
    shear : Tensor, (N, 2)
        In-plane displacement (row, column) per unit of t.
    log_through : Tensor, (N,)
        Logarithm of the through-plane standard deviation.
    cholesky : Tensor, (N, 3)
        (log l11, l21, log l22) of the in-plane covariance at fixed t.
    amplitude : Tensor, (N, C)
        Values of a normalised field, or amplitudes of an additive one.
    log_weight : Tensor, (N,)
        Logarithms of the weights of a normalised field.
    background : Tensor, (C,)
        Value where no Gaussian reaches; zero for an additive field.
    normalised : bool
        Kind of the field.
    """

    mean: Tensor
    shear: Tensor
    log_through: Tensor
    cholesky: Tensor
    amplitude: Tensor
    log_weight: Tensor
    background: Tensor
    normalised: bool = True

    def __len__(self) -> int:
        return len(self.mean)

    def parts(self, backend: str = "auto") -> tuple[Tensor, Tensor]:
        """Return covariances (N, 6) and channels (N, C + 1)."""
        return sheared_gaussians(
            self.shear, self.log_through, self.cholesky, self.amplitude, self.log_weight, backend=backend
        )

    def render(
        self, positions: Sequence[float] | np.ndarray, size: tuple[int, int], backend: str = "auto"
    ) -> Tensor:
        """Return the field on slices, (M, C, h, w)."""
        at = torch.as_tensor(np.asarray(positions, np.float32), device=self.mean.device)
        covs, channels = self.parts(backend)
        if not self.normalised:
            return render_slices(self.mean, covs, self.amplitude, at, size, cut=CUT_FIT, backend=backend)
        sums = render_slices(self.mean, covs, channels, at, size, cut=CUT_FIT, backend=backend)
        background = self.background[:, None, None]
        return (sums[:, :-1] + EPSILON * background) / (sums[:, -1:] + EPSILON)

    def to(self, device: str) -> SliceField:
        """Return the field on "cpu" or a GPU; "auto" leaves it where it is."""
        if device == "auto":
            return self
        tensors = {name: getattr(self, name).to(device) for name in (*_ALL, "background")}
        return SliceField(**tensors, normalised=self.normalised)

    def select(self, index: Tensor) -> SliceField:
        """Return the Gaussians of an index or mask."""
        return SliceField(
            **{name: getattr(self, name)[index] for name in _ALL},
            background=self.background,
            normalised=self.normalised,
        )


_ALL = ("mean", "shear", "log_through", "cholesky", "amplitude", "log_weight")


def start_field(
    values: np.ndarray,
    positions: np.ndarray,
    flows: Sequence[tuple[np.ndarray, np.ndarray]] | None,
    *,
    spacing: float,
    through: float,
    normalised: bool = True,
) -> SliceField:
    """Place Gaussians on the slices, sheared along the flow.

    Parameters
    ----------
    values : ndarray, shape (n, h, w, c), float32
        Slices, scaled to about one.
    positions : ndarray, shape (n,)
        Positions of the slices in median gaps.
    flows : sequence of (forward, backward) or None
        For each gap the displacements (h, w, 2) as (column, row) to the next slice and back; None for no shear.
    spacing : float
        Distance of the centres in pixels; staggered by half of it on every other slice.
    through : float
        Through-plane standard deviation in units of the adjacent gaps' mean.
    normalised : bool
        Kind of the field.
    """
    n, h, w, channels = values.shape
    gaps = np.diff(positions)
    mean, shear, width, amplitude = [], [], [], []
    for j in range(n):
        offset = spacing / 2 if j % 2 else 0.0
        rows = np.arange(min((h - 1) % spacing / 2 + offset, h - 1), h, spacing)
        columns = np.arange(min((w - 1) % spacing / 2 + offset, w - 1), w, spacing)
        row, column = (axis.ravel() for axis in np.meshgrid(rows, columns, indexing="ij"))
        at = np.rint(row).astype(int).clip(0, h - 1), np.rint(column).astype(int).clip(0, w - 1)
        mean.append(np.stack([np.full(len(row), positions[j]), row, column], 1))
        adjacent = gaps[max(j - 1, 0) : j + 1]
        width.append(np.full(len(row), np.log(through * adjacent.mean())))
        shear.append(_shear(flows, gaps, j, at) if flows is not None else np.zeros((len(row), 2)))
        amplitude.append(values[j][at])

    def tensor(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.float32))

    count = sum(len(part) for part in mean)
    log_sigma = float(np.log(_WIDTH * spacing))
    field = SliceField(
        tensor(mean),
        tensor(shear),
        tensor(width),
        torch.tensor([[log_sigma, 0.0, log_sigma]]).repeat(count, 1),
        tensor(amplitude).reshape(count, channels),
        torch.zeros(count),
        torch.from_numpy(np.median(values.reshape(-1, channels), 0).astype(np.float32)) * float(normalised),
        normalised,
    )
    if not normalised:
        # amplitudes so that the sum starts near the slices: divide by the sum of unit Gaussians
        ones = field.select(torch.arange(count))
        ones.amplitude = torch.ones_like(field.amplitude)
        total = ones.render(positions, (h, w))[:, 0]
        slice_of = torch.from_numpy(np.repeat(np.arange(n), [len(part) for part in mean]))
        near = field.mean[:, 1:].round().long()
        here = total[slice_of, near[:, 0].clamp(0, h - 1), near[:, 1].clamp(0, w - 1)].clamp_min(1e-3)
        field.amplitude = field.amplitude / here[:, None]
    return field


def carried_over(
    field: SliceField, positions: np.ndarray, flows: Sequence[tuple[np.ndarray, np.ndarray]] | None
) -> SliceField:
    """Return a copy of the field of an earlier time point, sheared along the present flow.

    Parameters
    ----------
    field : SliceField
        Gaussians with their centres on slices at the same positions.
    positions : ndarray, shape (n,)
        Positions of the slices in median gaps.
    flows : sequence of (forward, backward) or None
        As in `start_field`; None leaves the shear.
    """
    new = field.to("cpu").select(torch.arange(len(field)))
    if flows is None:
        return new
    t, row, column = new.mean.numpy().T
    slices = np.abs(t[:, None] - positions[None].astype(np.float32)).argmin(1)
    h, w = flows[0][0].shape[:2]
    shear = np.empty((len(new), 2), np.float32)
    for j in range(len(positions)):
        here = slices == j
        at = (np.rint(row[here]).astype(int).clip(0, h - 1), np.rint(column[here]).astype(int).clip(0, w - 1))
        shear[here] = _shear(flows, np.diff(positions), j, at)
    new.shear = torch.from_numpy(shear)
    return new


@torch.no_grad()
def misfit(field: SliceField, values: np.ndarray, positions: np.ndarray, backend: str = "auto") -> float:
    """Return the mean square difference between a field and slices (n, h, w, c)."""
    picture = field.render(positions, values.shape[1:3], backend)
    return float(np.mean(np.square(np.moveaxis(picture.cpu().numpy(), 1, -1) - values)))


def _shear(
    flows: Sequence[tuple[np.ndarray, np.ndarray]],
    gaps: np.ndarray,
    j: int,
    at: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    sides = []
    if j < len(gaps):
        sides.append(flows[j][0][at] / gaps[j])
    if j > 0:
        sides.append(-flows[j - 1][1][at] / gaps[j - 1])
    return np.mean(sides, 0)[:, ::-1]


def fit_field(
    field: SliceField,
    values: np.ndarray,
    positions: np.ndarray,
    iterations: int,
    *,
    weights: np.ndarray | None = None,
    densify: bool = False,
    free_shape: bool = False,
    structural: float = 0.0,
    backend: str = "auto",
) -> Generator[tuple[int, float], None, None]:
    """Fit a field to slices in place, yielding (iteration, loss) after each step.

    Parameters
    ----------
    field : SliceField
        What to fit; it always holds the latest state.
    values : ndarray, shape (n, h, w, c), float32
        Slices, scaled to about one.
    positions : ndarray, shape (n,)
        Positions in median gaps.
    iterations : int
        Adam steps; rates decay to a tenth over them.
    weights : ndarray or None, shape (n, h, w)
        Weight of each pixel.
    densify : bool
        After a third and two thirds of the steps add Gaussians where the residual is largest and remove those
        without weight.
    free_shape : bool
        Also move shear and through-plane scale (the InnerGS recipe; measured worse here).
    structural : float
        Share of D-SSIM in the loss; the rest is L1. 0 means a squared loss.
    """
    h, w = values.shape[1:3]
    target = torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, -1, 1))).to(field.mean.device)
    weight = None if weights is None else torch.from_numpy(weights)[:, None].to(field.mean.device)
    rates = dict(_RATES)
    if free_shape:
        rates |= {"shear": 0.02, "log_through": 0.03}
    if not field.normalised:
        del rates["log_weight"]
    optimiser = Adam(backend=backend)
    decay = 0.1 ** (1 / max(iterations, 1))
    events = {iterations // 3, 2 * iterations // 3} if densify and iterations >= 9 else set()
    _reorder(field)
    for iteration in range(iterations):
        tensors = {name: getattr(field, name).requires_grad_(True) for name in rates}
        try:
            picture = field.render(positions, (h, w), backend)
            error = picture - target
            if weight is not None:
                error = error * weight
            loss = _loss(error, picture, target, structural)
            loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for tensor in tensors.values():
                tensor.requires_grad_(False)
        # one slice's plane holds its Gaussians: t stays, or the centres drift off the data that defines them
        tensors["mean"].grad[:, 0] = 0  # type: ignore[index]
        optimiser.step(tensors, {name: rate * decay**iteration for name, rate in rates.items()})
        field.cholesky[:, ::2].clamp_min_(float(np.log(_MIN_WIDTH)))
        yield iteration + 1, float(loss.detach())
        if iteration + 1 in events:
            keep, added = _densify(field, error.detach(), positions, target)
            optimiser.rearrange(keep, added)
    for name in rates:
        getattr(field, name).grad = None


def _loss(error: Tensor, picture: Tensor, target: Tensor, structural: float) -> Tensor:
    if structural == 0:
        return error.square().mean()
    from napari_innergs.fit.metrics import ssim_map

    similarity = ssim_map(picture, target, 1.0).mean()
    return (1 - structural) * error.abs().mean() + structural * (1 - similarity) / 2


def _reorder(field: SliceField) -> None:
    order = morton_order(field.mean)
    for name in _ALL:
        setattr(field, name, getattr(field, name)[order].contiguous())


def _densify(field: SliceField, error: Tensor, positions: np.ndarray, target: Tensor) -> tuple[Tensor, int]:
    """Remove Gaussians without weight, add some where the residual is largest; return what was kept and added."""
    if field.normalised:
        keep = field.log_weight > field.log_weight.median() - 7.0
    else:
        strength = field.amplitude.abs().amax(1)
        keep = strength > 1e-3 * strength.median()
    square = error.square().sum(1)
    peak = torch.nn.functional.max_pool2d(square[:, None], 3, 1, 1)[:, 0]
    candidates = ((square == peak) & (square > 6 * square.mean())).nonzero()
    most = len(field) // 10
    if len(candidates) > most:
        strength = square[tuple(candidates.T)]
        candidates = candidates[strength.argsort(descending=True, stable=True)[:most]]
    index = keep.nonzero()[:, 0]
    if len(candidates):
        plane, row, column = candidates.T
        at = torch.from_numpy(positions.astype(np.float32)).to(field.mean.device)
        mean = torch.stack([at[plane], row.float(), column.float()], 1)
        parent = _nearest(field.mean, mean)
        new = field.select(parent)
        new.mean = mean
        new.cholesky = new.cholesky.clone()
        new.cholesky[:, ::2] = (new.cholesky[:, ::2] - 0.35).clamp_min(float(np.log(_MIN_WIDTH)))
        here = target[plane, :, row, column]
        new.amplitude = here if field.normalised else -0.5 * error[plane, :, row, column]
        for name in _ALL:
            setattr(field, name, torch.cat([getattr(field, name)[index], getattr(new, name)]).contiguous())
    else:
        for name in _ALL:
            setattr(field, name, getattr(field, name)[index].contiguous())
    return index, len(candidates)


def _nearest(mean: Tensor, points: Tensor) -> Tensor:
    from scipy.spatial import cKDTree

    # slices far apart in t, so that the parent is on the same slice
    scale = np.array([1e3, 1.0, 1.0], np.float32)
    tree = cKDTree(mean.cpu().numpy() * scale)
    return torch.from_numpy(tree.query(points.cpu().numpy() * scale)[1]).to(mean.device)
