"""A small object with photographs and X-rays in two worlds, both in closed form: no renderer of ours is involved."""

import ellipsoids
import numpy as np

from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam
from napari_innergs.photographs import Photographs

#: Density, centre (z, y, x) and half axes; the last two lie inside the first.
BODIES = [
    (0.05, (0.0, 0.0, 0.0), (15.0, 9.0, 11.0)),
    (0.05, (9.0, 8.0, 3.0), (5.0, 6.0, 4.0)),
    (0.05, (-7.0, -3.0, 10.0), (4.0, 4.0, 6.0)),
    (0.05, (-4.0, 1.0, -1.0), (5.0, 3.0, 4.0)),
    (-0.03, (5.0, -2.0, 2.0), (4.0, 3.0, 5.0)),
]
OUTER = 3
#: Photographs' world to X-rays' world.
_TURN = np.array([[0.36, 0.48, -0.8], [-0.8, 0.6, 0.0], [0.48, 0.64, 0.6]])
TRUTH = np.eye(4)
TRUTH[:3, :3] = 5.0 * _TURN
TRUTH[:3, 3] = (4.0, -7.0, 3.0)


def _hits(origins, directions):
    """Nearest intersection with the outer bodies: length, NaN where there is none."""
    best = np.full(directions.shape[:-1], np.inf)
    for _, centre, half in BODIES[:OUTER]:
        start, step = (origins - np.array(centre)) / half, directions / half
        a, b, c = (step**2).sum(-1), (start * step).sum(-1), (start**2).sum(-1) - 1
        root = b**2 - a * c
        length = np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)
        best = np.minimum(best, np.where(length > 0, length, np.inf))
    return best


def colour(points):
    """Colours of places in the X-rays' world."""
    return 0.5 + 0.4 * np.sin(points * np.array([0.31, 0.23, 0.27]) + np.array([0.0, 1.0, 2.0]))


def photographs(count=24, size=48, first=0.0, points=300):
    """Photographs of the outside, in their own world, with masks and sparse points."""
    back = np.linalg.inv(TRUTH)
    focal = 1.6 * size
    lens = [[focal, 0, 0.5 * size - 1.3], [0, focal, 0.5 * size + 0.8], [0, 0, 1]]
    images, masks, cameras = [], [], []
    for k in range(count):
        height = 1 - 2 * (k + 0.5) / count
        turn = first + k * np.pi * (3 - np.sqrt(5))
        across = np.sqrt(1 - height**2)
        eye = 70 * np.array([height, across * np.sin(turn), across * np.cos(turn)])
        camera = Camera.looking_at(eye, (0.5, 0.2, -0.3), lens, (size, size), up=(0.3, 1.0, 0.2))
        # nine rays for a pixel
        image, mask = np.zeros((size, size, 3)), np.zeros((size, size))
        rows, columns = np.indices((size, size))
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                origins, directions = camera.rays(rows + dr / 3, columns + dc / 3)
                length = _hits(origins, directions)
                hit = np.isfinite(length)
                where = origins + np.where(hit, length, 0)[..., None] * directions
                image += hit[..., None] * colour(where) / 9
                mask += hit / 9
        images.append(image)
        masks.append(mask)
        cameras.append(camera.moved(back))
    cloud = surface(points) @ back[:3, :3].T + back[:3, 3] if points else None
    colours = colour(surface(points)) if points else None
    return Photographs(
        np.clip(images, 0, 1).astype(np.float32),
        cameras,
        np.clip(masks, 0, 1).astype(np.float32),
        points=cloud,
        point_colours=colours,
    )


def surface(count):
    """Points on the outside, X-rays' world."""
    random = np.random.default_rng(1)
    found = []
    while len(found) < count:
        _, centre, half = BODIES[random.integers(OUTER)]
        direction = random.normal(size=3)
        place = np.array(centre) + np.array(half) * direction / np.linalg.norm(direction)
        others = [((place - np.array(c)) / h) @ ((place - np.array(c)) / h) for _, c, h in BODIES[:OUTER]]
        if min(others) > 1 - 1e-6:
            found.append(place)
    return np.array(found)


def scan(views=20):
    """Line integrals, geometry, grid and the true volume on it."""
    angles = np.arange(views) * 2 * np.pi / views
    geometry, fine = (
        ConeBeam.circular(
            angles,
            source_origin=120,
            source_detector=180,
            detector_shape=(44 * n, 44 * n),
            pixel_size=1.6 / n,
        )
        for n in (1, 3)
    )
    grid = Grid((36, 36, 36), np.block([[np.eye(3), np.full((3, 1), -17.5)], [np.zeros((1, 3)), 1]]), "mm")
    # pixels are means over nine rays; what lies in two bodies counts twice, here and in the volume
    rays = ellipsoids.project(fine, BODIES)
    data = rays.reshape(views, 44, 3, 44, 3).mean((2, 4)).astype(np.float32)
    places = np.stack(np.meshgrid(*[np.arange(-18, 18, 0.5) + 0.25] * 3, indexing="ij"), -1)
    volume = np.zeros(places.shape[:3])
    for density, centre, half in BODIES:
        volume += density * ((((places - np.array(centre)) / half) ** 2).sum(-1) < 1)
    return data, geometry, grid, volume.reshape(36, 2, 36, 2, 36, 2).mean((1, 3, 5)).astype(np.float32)
