"""Gaussians with opacity and colour, fitted to photographs.

Frame: the object's own, centred, about one unit in radius, so that rates do not depend on the world's unit. The
loss is L1 with D-SSIM; where there are masks, another background behind object and Gaussians in each step shows what
must be opaque and what must be empty. Gaussians whose projections are pulled about most are split or doubled, faint
ones are taken away (Kerbl et al., 3D Gaussian splatting, 2023); their number is bounded from the start.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree
from torch import Tensor

from napari_innergs.fit.metrics import ssim_map
from napari_innergs.geometry.camera import Camera
from napari_innergs.operators.rgb import evaluate_harmonics, render_rgb
from napari_innergs.operators.shear import Adam
from napari_innergs.photographs import Photographs, as_unit

__all__ = [
    "PhotoTargets",
    "SplatField",
    "copy_of",
    "fit_photographs",
    "inside_masks",
    "object_frame",
    "object_points",
    "photo_loss",
    "rotate_harmonics",
    "splat_rates",
    "start_splats",
    "surface_centres",
]

FloatArray = NDArray[np.float64]

#: Share of D-SSIM in the loss, the rest being L1.
STRUCTURAL = 0.2
#: Zeroth spherical harmonic.
SH0 = 0.5 / math.sqrt(math.pi)
#: A point belongs to the object when its mask is above one half in this share of the photographs that show it.
IN_MASKS = 0.98
# The same for what is on the surface, where it may be seen beside an outline that is a little off.
_ON_OBJECT = 0.9
# Share of the photographs that must show a place when only their masks tell where the object is.
_SHOWN = 0.5
# Opacity of a new Gaussian, and its standard deviation in distances to its neighbours.
_OPACITY, _WIDTH, _NEIGHBOURS = 0.3, 0.6, 3
# Rates in radii of the object, logarithms, and so on; those of means fall to this share of the first.
RATES = {
    "mean": 2e-3,
    "log_scale": 1.5e-2,
    "quaternion": 8e-3,
    "opacity": 5e-2,
    "colour": 2.5e-2,
    "harmonics": 2e-3,
}
_DECAY = {"mean": 0.02, "colour": 0.1}
_DECAY_OTHERS = 0.2
# Gaussians are added and taken away so often, in this span of the steps.
_EVERY, _FROM, _UNTIL = 100, 0.05, 0.65
# Fainter ones are taken away; larger ones (radii of the object) are split, others doubled; what splitting does to
# the size; the most that may be added at a time.
_FAINT, _LARGE, _SHRINK, _GROWTH = 0.02, 0.02, 1.6, 0.35
_LEAST_SCALE, _MOST_SCALE = math.log(5e-4), math.log(0.5)


@dataclass
class SplatField:
    """Gaussians that are seen in photographs.

    Attributes
    ----------
    mean : Tensor, (N, 3)
        Centres (z, y, x).
    log_scale : Tensor, (N, 3)
        Logarithms of the standard deviations along the own axes.
    quaternion : Tensor, (N, 4)
        Rotations (w, a, b, c) acting on (z, y, x), of any length.
    opacity : Tensor, (N,)
        What the logistic function makes opacities of.
    colour : Tensor, (N, 1, 3)
        Zeroth coefficient of the spherical harmonics of each colour.
    harmonics : Tensor, (N, K - 1, 3)
        The others.
    """

    mean: Tensor
    log_scale: Tensor
    quaternion: Tensor
    opacity: Tensor
    colour: Tensor
    harmonics: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def tensors(self) -> dict[str, Tensor]:
        """Return what is fitted, by name."""
        return {name: getattr(self, name) for name in RATES}

    def to(self, device: str) -> SplatField:
        """Return a copy on a device."""
        return SplatField(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def covariances(self) -> Tensor:
        """Return (N, 6): zz, zy, zx, yy, yx, xx."""
        w, a, b, c = torch.nn.functional.normalize(self.quaternion, dim=1).unbind(1)
        turn = torch.stack(
            [
                1 - 2 * (b * b + c * c),
                2 * (a * b - w * c),
                2 * (a * c + w * b),
                2 * (a * b + w * c),
                1 - 2 * (a * a + c * c),
                2 * (b * c - w * a),
                2 * (a * c - w * b),
                2 * (b * c + w * a),
                1 - 2 * (a * a + b * b),
            ],
            1,
        ).reshape(-1, 3, 3)
        half = turn * self.log_scale.exp()[:, None]
        z, y, x = half.unbind(1)
        return torch.stack([(p * q).sum(1) for p, q in ((z, z), (z, y), (z, x), (y, y), (y, x), (x, x))], 1)

    def opacities(self) -> Tensor:
        """Return the opacities at the centres, (N,)."""
        return torch.sigmoid(self.opacity)

    def coefficients(self) -> Tensor:
        """Return the spherical harmonics, (N, K, 3)."""
        return torch.cat([self.colour, self.harmonics], 1)

    def render(
        self,
        camera: Camera,
        background: Tensor | float = 0.0,
        *,
        pose: Tensor | None = None,
        shifts: Tensor | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Return a photograph (H, W, 3) and its alpha (H, W); `pose` replaces the camera's own."""
        matrix = torch.tensor(camera.world_to_camera) if pose is None else pose
        image, alpha = render_rgb(
            self.mean,
            self.covariances(),
            self.opacities(),
            self.coefficients(),
            matrix,
            torch.tensor(camera.intrinsics),
            camera.size,
            background=background,
            shifts=shifts,
            backend=backend,
        )
        return image, alpha


def rotate_harmonics(coefficients: NDArray[np.floating], rotation: FloatArray) -> NDArray[np.float32]:
    """Return the spherical harmonics of Gaussians after their world was turned.

    Harmonics of one degree turn into each other; the matrix is found from values in more directions than terms.

    Parameters
    ----------
    coefficients : ndarray (N, K, 3)
        K = 1, 4, 9 or 16.
    rotation : ndarray (3, 3)
        Old world to new world, (z, y, x).

    Returns
    -------
    ndarray of float32 (N, K, 3)
        What is seen along R d is what was seen along d.
    """
    terms = coefficients.shape[1]
    if terms == 1:
        return np.asarray(coefficients, np.float32)
    directions = np.random.default_rng(0).normal(size=(4 * terms, 3))

    def basis(at: FloatArray) -> FloatArray:
        # coefficients so small that no colour is below zero
        unit = torch.from_numpy(0.1 * np.eye(terms))[:, :, None].expand(terms, terms, 3)
        rows = [evaluate_harmonics(unit, torch.from_numpy(np.tile(d, (terms, 1))))[:, 0] for d in at]
        return (torch.stack(rows).numpy() - 0.5) / 0.1

    matrix = np.linalg.lstsq(basis(directions @ rotation.T), basis(directions), rcond=None)[0]
    return np.einsum("kj,njc->nkc", matrix, coefficients).astype(np.float32)


def _aim(photographs: Photographs) -> FloatArray:
    """Return the point that is nearest to the optical axes of all cameras."""
    matrix, right = np.zeros((3, 3)), np.zeros(3)
    for camera in photographs.cameras:
        # what is seen at the middle of the picture, which need not be the principal point
        origin, direction = camera.rays(*(0.5 * (n - 1) for n in camera.size))
        across = np.eye(3) - np.outer(direction, direction)
        matrix += across
        right += across @ origin
    return np.asarray(np.linalg.lstsq(matrix, right, rcond=None)[0])


def inside_masks(
    photographs: Photographs, points: FloatArray, level: float = 0.5, least: float = 0.0
) -> FloatArray:
    """Return in which share of the photographs that show them points are inside the object's mask.

    Parameters
    ----------
    photographs : Photographs
        With masks.
    points : ndarray (M, 3)
        World (z, y, x).
    level : float
        Mask values above it are the object.
    least : float
        Share of the photographs that must show a point.

    Returns
    -------
    ndarray (M,)
        0 to 1; 0 for points that are shown by too few, or none.
    """
    assert photographs.masks is not None
    inside, seen = np.zeros(len(points)), np.zeros(len(points))
    for k, camera in enumerate(photographs.cameras):
        pixels, depth = camera.project(points)
        rows, columns = np.nan_to_num(pixels, nan=-9.0).T
        height, width = camera.size
        shown = (depth > 0) & (rows > -0.5) & (rows < height - 0.5)
        shown &= (columns > -0.5) & (columns < width - 0.5)
        if photographs.valid is not None:
            near = np.rint(rows[shown]).astype(int), np.rint(columns[shown]).astype(int)
            shown[shown] = photographs.valid[k][near]
        at = np.stack([rows[shown], columns[shown]])
        inside[shown] += map_coordinates(photographs.masks[k], at, order=1, mode="nearest") > level
        seen += shown
    enough = seen >= max(least * len(photographs), 1)
    return np.where(enough, inside / np.maximum(seen, 1), 0.0)


def object_points(photographs: Photographs) -> FloatArray:
    """Return the sparse points of the object, (m, 3): those inside the masks where there are masks, else all.

    Structure from motion also finds the table and the wall; no pose lays these onto the X-rays.
    """
    if photographs.points is None:
        return np.zeros((0, 3))
    points = np.asarray(photographs.points)
    if photographs.masks is None or not len(points):
        return points
    return np.asarray(points[inside_masks(photographs, points) >= _ON_OBJECT])


def object_frame(photographs: Photographs) -> FloatArray:
    """Return the similarity that takes the photographs' world to a frame in which the object has radius one.

    From the sparse points where there are some, else from what the masks enclose, else from the cameras.

    Returns
    -------
    ndarray (4, 4)
        World (z, y, x) to frame.

    Raises
    ------
    ValueError
        If nothing tells where the object is, because all cameras are in one place.
    """
    points, radius = object_points(photographs), 0.0
    if len(points) >= 10:
        centre = np.median(points, axis=0)
        radius = float(np.percentile(np.linalg.norm(points - centre, axis=1), 95))
    if not radius > 0:
        places = np.array([camera.centre for camera in photographs.cameras])
        if not np.ptp(places, axis=0).max() > 0:
            raise ValueError("cameras: all are in one place, need photographs from several places")
        centre = _aim(photographs)
        away = np.linalg.norm(places - centre, axis=1)
        sizes = [
            min(camera.size) / 2 / float(camera.intrinsics[[0, 1], [0, 1]].mean())
            for camera in photographs.cameras
        ]
        radius = float(np.median(away * sizes))
        if photographs.masks is not None:
            lattice = np.stack(np.meshgrid(*[np.linspace(-1.5, 1.5, 32)] * 3, indexing="ij"), -1)
            inner = centre + radius * lattice.reshape(-1, 3)
            within = inner[inside_masks(photographs, inner, least=_SHOWN) >= IN_MASKS]
            if len(within) >= 10:
                centre = 0.5 * (within.min(0) + within.max(0))
                radius = float(np.linalg.norm(within - centre, axis=1).max())
    frame = np.eye(4)
    frame[:3, :3] /= radius
    frame[:3, 3] = -centre / radius
    return frame


def _hull_points(photographs: Photographs, count: int, random: np.random.Generator) -> FloatArray:
    """Return points near the surface of what all masks enclose (frame of the object), or within the radius."""
    places = random.uniform(-1.3, 1.3, (40 * count, 3))
    if photographs.masks is None:
        return places[np.linalg.norm(places, axis=1) < 1][:count]
    share = inside_masks(photographs, places, least=_SHOWN)
    within = places[share >= IN_MASKS]
    if len(within) < 4:
        raise ValueError(
            "masks: no place is inside all of them; need masks and cameras of one object that does not move."
        )
    outside = cKDTree(places[share < IN_MASKS])
    away = outside.query(within)[0]
    return within[np.argsort(away, kind="stable")[: max(count, 4)]]


def _seen_colours(photographs: Photographs, points: FloatArray) -> FloatArray:
    """Return the median colour of the pixels at which points are projected, (M, 3)."""
    found = np.full((len(photographs), len(points), 3), np.nan)
    for k, camera in enumerate(photographs.cameras):
        pixels, depth = camera.project(points)
        rows, columns = np.rint(np.nan_to_num(pixels, nan=-9.0)).astype(int).T
        shown = (depth > 0) & (rows >= 0) & (rows < camera.size[0]) & (columns >= 0)
        shown &= columns < camera.size[1]
        found[k, shown] = photographs.image(k)[rows[shown], columns[shown]]
    found[:, np.isnan(found).all((0, 2))] = 0.5
    return np.asarray(np.nanmedian(found, axis=0))


def start_splats(
    photographs: Photographs, degree: int = 0, least: int = 3000, most: int = 20_000, seed: int = 0
) -> SplatField:
    """Place round Gaussians on the sparse points, or near the surface of what the masks enclose.

    Parameters
    ----------
    photographs : Photographs
        In the frame of the object.
    degree : int
        Of the spherical harmonics, 0 to 3.
    least : int
        Number of places when there are fewer sparse points.
    most : int
        Limit of the number of Gaussians.
    seed : int
        Of the random places.

    Raises
    ------
    ValueError
        If the masks have no place in common.
    """
    random = np.random.default_rng(seed)
    points, colours = np.zeros((0, 3)), np.zeros((0, 3))
    if photographs.points is not None:
        points = np.asarray(photographs.points)
        good = np.linalg.norm(points, axis=1) < 1.5
        if photographs.masks is not None:
            good &= inside_masks(photographs, points) >= _ON_OBJECT
        points = points[good]
        given = photographs.point_colours
        colours = _seen_colours(photographs, points) if given is None else np.asarray(given)[good]
    if len(points) < min(least, most) // 4:
        more = _hull_points(photographs, min(least, most), random)
        points = np.concatenate([points, more])
        colours = np.concatenate([colours, _seen_colours(photographs, more)])
    if len(points) > most:
        chosen = np.sort(random.choice(len(points), most, replace=False))
        points, colours = points[chosen], colours[chosen]
    n = len(points)
    near = cKDTree(points).query(points, min(_NEIGHBOURS + 1, n))[0].reshape(n, -1)[:, 1:]
    away = np.sqrt(np.mean(near**2, axis=1)) if near.shape[1] else np.full(n, 0.1)
    scale = np.log(np.clip(_WIDTH * away, 2e-3, 0.2)).astype(np.float32)
    quaternion = torch.zeros(n, 4)
    quaternion[:, 0] = 1
    return SplatField(
        mean=torch.from_numpy(points.astype(np.float32)),
        log_scale=torch.from_numpy(scale)[:, None].repeat(1, 3),
        quaternion=quaternion,
        opacity=torch.full((n,), math.log(_OPACITY / (1 - _OPACITY))),
        colour=torch.from_numpy(((colours - 0.5) / SH0).astype(np.float32))[:, None].contiguous(),
        harmonics=torch.zeros(n, (degree + 1) ** 2 - 1, 3),
    )


def photo_loss(image: Tensor, target: Tensor, valid: Tensor | None, structural: float = STRUCTURAL) -> Tensor:
    """Return L1 and D-SSIM of photographs (H, W, 3), over pixels that are valid."""
    if valid is not None:
        image, target = image * valid[..., None], target * valid[..., None]
    loss = (image - target).abs().mean()
    if structural > 0:
        a, b = (x.permute(2, 0, 1)[None] for x in (image, target))
        loss = (1 - structural) * loss + structural * (1 - ssim_map(a, b, 1.0).mean())
    return loss


class PhotoTargets:
    """Photographs as tensors, against any background.

    Parameters
    ----------
    photographs : Photographs
        In the frame of the field.
    device : torch.device
        Where the field is.
    """

    def __init__(self, photographs: Photographs, device: torch.device) -> None:
        self.photographs, self.device = photographs, device

    def __len__(self) -> int:
        return len(self.photographs)

    def get(self, k: int, background: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return photograph k (H, W, 3) before a colour, and which pixels count."""
        photographs = self.photographs
        image = torch.from_numpy(np.array(as_unit(photographs.images[k]))).to(self.device)
        if photographs.masks is not None:
            mask = torch.from_numpy(np.array(photographs.masks[k])).to(self.device)
            image = image + (1 - mask)[..., None] * background
        valid = None
        if photographs.valid is not None:
            valid = torch.from_numpy(photographs.valid[k].astype(np.float32)).to(self.device)
        return image, valid

    def background(self, random: np.random.Generator) -> Tensor:
        """Return a colour: another each time where masks tell what is behind the object, else black."""
        colour = random.random(3) if self.photographs.masks is not None else np.zeros(3)
        return torch.from_numpy(colour.astype(np.float32)).to(self.device)


def splat_rates(done: float, rate: float = 1.0) -> dict[str, float]:
    """Return the rates when this share of the steps is done."""
    return {name: rate * value * _DECAY.get(name, _DECAY_OTHERS) ** done for name, value in RATES.items()}


def fit_photographs(
    field: SplatField,
    photographs: Photographs,
    steps: int,
    *,
    most: int = 20_000,
    structural: float = STRUCTURAL,
    seed: int = 0,
    backend: str = "auto",
) -> Generator[tuple[int, float], None, None]:
    """Fit a field to photographs in place, one at a time, yielding (step, loss) after each.

    Parameters
    ----------
    field : SplatField
        What to fit; it always holds the latest state. Gaussians are added and taken away.
    photographs : Photographs
        In the same frame.
    steps : int
        Adam steps; all photographs are seen before one is seen again.
    most : int
        Limit of the number of Gaussians.
    structural : float
        Share of D-SSIM in the loss.
    seed : int
        Of the order, the backgrounds and the places of new Gaussians.
    backend : str
        Where the Gaussians are rendered.
    """
    random = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = Adam(beta2=0.999, backend=backend)
    targets = PhotoTargets(photographs, field.mean.device)
    waiting: list[int] = []
    pull = field.mean.new_zeros(len(field))
    count = field.mean.new_zeros(len(field))
    for step in range(steps):
        if not waiting:
            waiting = random.permutation(len(targets)).tolist()
        k = waiting.pop()
        background = targets.background(random)
        target, valid = targets.get(k, background)
        tensors = {name: tensor.requires_grad_(True) for name, tensor in field.tensors().items()}
        if not field.harmonics.shape[1]:
            del tensors["harmonics"]
        growing = _FROM * steps <= step < _UNTIL * steps
        shifts = field.mean.new_zeros(len(field), 2).requires_grad_(True) if growing else None
        image, _ = field.render(photographs.cameras[k], background, shifts=shifts, backend=backend)
        loss = photo_loss(image, target, valid, structural)
        loss.backward()  # type: ignore[no-untyped-call]
        for tensor in field.tensors().values():
            tensor.requires_grad_(False)
        if shifts is not None and shifts.grad is not None:
            size = shifts.grad.norm(dim=1)
            pull += size
            count += size > 0
        optimiser.step(tensors, splat_rates(step / steps))
        field.log_scale.clamp_(_LEAST_SCALE, _MOST_SCALE)
        if growing and (step + 1) % _EVERY == 0:
            rounds = max(int((_UNTIL * steps - step) / _EVERY), 1)
            _rearrange(field, optimiser, pull / count.clamp_min(1), most, rounds, generator)
            pull = field.mean.new_zeros(len(field))
            count = field.mean.new_zeros(len(field))
        yield step + 1, float(loss.detach())


@torch.no_grad()
def _rearrange(
    field: SplatField, optimiser: Adam, pull: Tensor, most: int, rounds: int, generator: torch.Generator
) -> None:
    """Take faint Gaussians away, and split or double those that are pulled about most."""
    keep = torch.nonzero(field.opacities() > _FAINT)[:, 0]
    if not len(keep):
        keep = torch.arange(len(field), device=pull.device)
    # what may be added is spread over the rounds that are left, and never more than a share of what is there
    room = max(most - len(keep), 0)
    room = min(-(-room // rounds) * 2, room, int(_GROWTH * len(keep)) + 1)
    order = torch.argsort(pull[keep], descending=True)[:room]
    chosen = keep[order[pull[keep][order] > 0]]
    new = {name: tensor[chosen].clone() for name, tensor in field.tensors().items()}
    large = field.log_scale[chosen].amax(1) > math.log(_LARGE)
    # both halves of what is split are smaller and lie apart; both of what is doubled are as opaque as the one was
    noise = torch.randn(len(chosen), 3, generator=generator).to(pull.device)
    offset = _own_to_frame(new["quaternion"], noise * new["log_scale"].exp())
    offset *= torch.where(large, 0.7, 0.3)[:, None]
    new["mean"] += offset
    shrink = large[:, None] * math.log(_SHRINK)
    new["log_scale"] -= shrink
    field.mean[chosen] -= offset
    field.log_scale[chosen] -= shrink
    half = 1 - torch.sqrt(1 - torch.sigmoid(new["opacity"]))
    solid = torch.logit(torch.where(large, torch.sigmoid(new["opacity"]), half).clamp(1e-4, 1 - 1e-4))
    new["opacity"] = solid
    field.opacity[chosen] = solid
    optimiser.rearrange(keep, len(chosen))
    for name, tensor in field.tensors().items():
        setattr(field, name, torch.cat([tensor[keep], new[name]]).contiguous())


def _own_to_frame(quaternion: Tensor, vectors: Tensor) -> Tensor:
    """Turn vectors from the own axes of Gaussians to the frame."""
    q = torch.nn.functional.normalize(quaternion, dim=1)
    axis = q[:, 1:]
    twice = 2 * torch.linalg.cross(axis, vectors)
    return vectors + q[:, :1] * twice + torch.linalg.cross(axis, twice)


def surface_centres(field: SplatField, photographs: Photographs, most: int = 6000) -> FloatArray:
    """Return centres of opaque, small Gaussians: points on the surface, in the field's frame.

    Parameters
    ----------
    field : SplatField
        Fitted to the photographs.
    photographs : Photographs
        In the same frame; their masks, if any, say what belongs to the object.
    most : int
        Limit of the number of points.
    """
    solid = (field.opacities() > 0.5).cpu().numpy()
    centres = field.mean.detach().double().cpu().numpy()
    size = field.log_scale.detach().amax(1).exp().cpu().numpy()
    solid &= size < 3 * np.median(size[solid]) if solid.any() else solid
    points = centres[solid]
    if photographs.masks is not None and len(points):
        points = points[inside_masks(photographs, points) >= _ON_OBJECT]
    if len(points) > most:
        points = points[np.random.default_rng(0).choice(len(points), most, replace=False)]
    return np.asarray(points)


def copy_of(field: SplatField) -> SplatField:
    """Return a field that shares nothing with another."""
    return replace(field, **{name: tensor.detach().clone() for name, tensor in field.tensors().items()})
