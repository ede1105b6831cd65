"""The similarity between photographs and X-rays: surfaces, landmarks, silhouettes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from napari_innergs.fit.align import (
    Alignment,
    align_landmarks,
    align_surfaces,
    refine_on_silhouettes,
    surface_of_volume,
)
from napari_innergs.geometry.camera import Camera
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import quaternion_to_matrix, rotation_vector_to_matrix

SHAPE = (56, 52, 48)
# of the body, world
MIDDLE = (10.5, 17.4, 16.4)


def fields() -> tuple[np.ndarray, np.ndarray]:
    """A body without symmetry on twice the grid, and its inside (hollow, with a hole to the outside)."""
    z, y, x = np.mgrid[: 2 * SHAPE[0], : 2 * SHAPE[1], : 2 * SHAPE[2]] / 2 - 0.25
    body = ((z - 28) / 20) ** 2 + ((y - 26) / 12) ** 2 + ((x - 24) / 9) ** 2 < 1
    body |= (z - 36) ** 2 + (y - 36) ** 2 + (x - 28) ** 2 < 49
    body |= ((z - 14) / 4) ** 2 + ((y - 22) / 5) ** 2 + ((x - 34) / 10) ** 2 < 1
    inside = ((z - 28) / 15) ** 2 + ((y - 26) / 7) ** 2 + ((x - 24) / 5) ** 2 < 1
    inside |= ((y - 26) ** 2 + (x - 24) ** 2 < 4) & (z > 28)
    return body, inside


@pytest.fixture(scope="module")
def grid() -> Grid:
    affine = np.diag([0.5, 0.4, 0.6, 1.0])
    affine[:3, 3] = (-3.0, 7.0, 2.0)
    return Grid(SHAPE, affine)


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    """Attenuation with noise; the body is half soft and half hard."""
    body, inside = fields()
    values = (body & ~inside) * np.where(np.arange(2 * SHAPE[1]) > SHAPE[1], 0.3, 0.2)[:, None]
    values = values.reshape(SHAPE[0], 2, SHAPE[1], 2, SHAPE[2], 2).mean((1, 3, 5))
    noise = np.random.default_rng(0).standard_normal(SHAPE)
    return (gaussian_filter(values, 0.5) + 0.006 * noise).astype(np.float32)


@pytest.fixture(scope="module")
def surface(volume: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    return surface_of_volume(volume, grid)


@pytest.fixture(scope="module")
def outside(grid: Grid) -> np.ndarray:
    """Points on the body's outside (world), from its own finer field."""
    fine = grid.affine @ np.diag([0.5, 0.5, 0.5, 1.0])
    fine[:3, 3] = grid.index_to_world([[-0.25, -0.25, -0.25]])[0]
    return surface_of_volume(fields()[0].astype(np.float32), Grid(tuple(2 * n for n in SHAPE), fine))[0]


def similarity(seed: int) -> np.ndarray:
    """Photo world to X-ray world."""
    random = np.random.default_rng(seed)
    out = np.eye(4)
    out[:3, :3] = np.exp(random.uniform(-1.6, 1.6)) * quaternion_to_matrix(random.standard_normal(4))
    out[:3, 3] = random.uniform(-40, 40, 3)
    return out


def apply(transform: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ transform[:3, :3].T + transform[:3, 3]


def cloud(outside: np.ndarray, truth: np.ndarray, seed: int) -> np.ndarray:
    """Points in the photo world: noise, strays, one side hidden."""
    random = np.random.default_rng(seed)
    middle, radius = outside.mean(0), 10.0
    side = outside @ random.standard_normal(3)
    seen = outside[side < np.quantile(side, 0.85)]
    points = seen[random.choice(len(seen), 1900, replace=False)]
    points = points + 0.03 * random.standard_normal(points.shape)
    points = np.concatenate([points, middle + radius * random.uniform(-1.5, 1.5, (100, 3))])
    return apply(np.linalg.inv(truth), points)


def displacement(found: Alignment, truth: np.ndarray, outside: np.ndarray) -> float:
    """Root mean square, world units."""
    moved = apply(found.transform @ np.linalg.inv(truth), outside)
    return float(np.sqrt(np.mean(np.sum((moved - outside) ** 2, axis=1))))


def cameras(truth: np.ndarray, count: int) -> list[Camera]:
    """Around the body, in the photo world."""
    out = []
    for i in range(count):
        random = np.random.default_rng([3, i])
        way = random.standard_normal(3)
        eye = np.array(MIDDLE) + 35 * way / np.linalg.norm(way)
        lens = [[140.0, 0, 47.0], [0, 140.0, 52.0], [0, 0, 1]]
        camera = Camera.looking_at(eye, MIDDLE, lens, (100, 96), up=random.standard_normal(3))
        out.append(camera.moved(np.linalg.inv(truth)))
    return out


def silhouettes(grid: Grid, truth: np.ndarray, views: list[Camera]) -> np.ndarray:
    """Masks with edges between 0 and 1: four rays for each pixel, in steps through the body."""
    body = fields()[0]
    out = []
    for camera in views:
        row, column = np.mgrid[: 2 * camera.size[0], : 2 * camera.size[1]] / 2 - 0.25
        origin, way = camera.rays(row, column)
        far = np.linalg.norm(camera.centre - np.linalg.inv(truth)[:3] @ [*MIDDLE, 1.0])
        hit = np.zeros(row.shape, bool)
        for along in np.linspace(0.6, 1.4, 110) * far:
            world = apply(truth, (origin + along * way).reshape(-1, 3))
            index = np.rint(2 * grid.world_to_index(world) + 0.5).astype(int)
            inside = ((index >= 0) & (index < body.shape)).all(axis=1)
            hit.ravel()[inside] |= body[tuple(index[inside].T)]
        out.append(hit.reshape(camera.size[0], 2, camera.size[1], 2).mean((1, 3)))
    return np.array(out)


def test_surface_lies_halfway_and_shows_the_outside_only(
    surface: tuple[np.ndarray, np.ndarray], outside: np.ndarray
) -> None:
    points, normals = surface
    near, index = cKDTree(outside).query(points)
    assert np.quantile(near, 0.99) < 0.3, "no walls of the cavity"
    assert np.quantile(cKDTree(points).query(outside)[0], 0.99) < 0.6
    assert abs(np.mean(np.sum((points - outside[index]) * normals, axis=1))) < 0.05
    assert np.mean(np.sum((points - MIDDLE) * normals, axis=1) > 0) > 0.9
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1)


def test_surface_at_a_given_level(grid: Grid) -> None:
    z = np.mgrid[:24, :24, :24][0].astype(np.float32)
    ramp = np.where((z > 0) & (z < 20), z / 20, 0)
    points, normals = surface_of_volume(ramp, Grid((24, 24, 24)), threshold=0.5)
    low = points[normals[:, 0] < -0.9]
    assert np.abs(normals[:, 1:]).max() < 0.9, "no surface where the volume ends"
    inner = (np.abs(low[:, 1:] - 11.5) < 8).all(axis=1)
    np.testing.assert_allclose(low[inner, 0], 10, atol=0.05)


@pytest.mark.parametrize(
    ("values", "threshold", "message"),
    [
        (np.zeros((4, 4, 4)), None, "everywhere"),
        (np.full((4, 4, 4), np.nan), None, "NaN"),
        (np.zeros((4, 4, 5)), None, "shape"),
        (np.arange(64.0).reshape(4, 4, 4), 100.0, "no voxel"),
    ],
)
def test_surface_refuses(values: np.ndarray, threshold: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        surface_of_volume(values, Grid((4, 4, 4)), threshold)


@pytest.mark.parametrize("seed", [1, 2])
def test_alignment_without_a_guess(
    surface: tuple[np.ndarray, np.ndarray], outside: np.ndarray, seed: int
) -> None:
    truth = similarity(seed)
    found = align_surfaces(cloud(outside, truth, seed), *surface, starts=100)
    assert found.matched and found.reason == "" and len(found.candidates) == 1
    assert displacement(found, truth, outside) < 0.15, "a third of a voxel"
    assert found.scale == pytest.approx(np.cbrt(np.linalg.det(truth[:3, :3])), rel=0.01)
    np.testing.assert_array_equal(found.candidates[0].transform, found.transform)
    # the stated error is of the size of the true one
    assert found.rotation_error < 1 and found.scale_error < 0.02 and found.shift_error < 0.3


def test_alignment_is_deterministic(surface: tuple[np.ndarray, np.ndarray], outside: np.ndarray) -> None:
    points = cloud(outside, similarity(4), 4)
    first, second = (align_surfaces(points, *surface, starts=1) for _ in range(2))
    np.testing.assert_array_equal(first.transform, second.transform)


def test_another_object_and_a_mirror_image_are_refused(
    surface: tuple[np.ndarray, np.ndarray], outside: np.ndarray
) -> None:
    way = np.random.default_rng(5).standard_normal((2000, 3))
    way /= np.abs(way).max(axis=1, keepdims=True)
    other = align_surfaces(way * [1, 2, 3], *surface, starts=50)
    assert not other.matched and other.reason.startswith("no match")
    mirrored = align_surfaces(cloud(outside, similarity(6), 6) * [1, -1, 1], *surface, starts=50)
    assert not mirrored.matched and "mirror" in mirrored.reason


def test_a_symmetric_body_has_ties() -> None:
    z, y, x = np.mgrid[:40, :40, :40] - 19.5
    brick = ((np.abs(z) < 15) & (np.abs(y) < 10) & (np.abs(x) < 6)).astype(np.float32)
    points, normals = surface_of_volume(brick, Grid(brick.shape))
    found = align_surfaces(apply(similarity(7), points), points, normals, starts=50)
    assert found.matched and "choose" in found.reason
    assert len(found.candidates) == 4
    scores = [c.score for c in found.candidates]
    assert scores == sorted(scores, reverse=True) and scores[0] - scores[-1] < 0.03


def test_points_given_twice_do_no_harm(surface: tuple[np.ndarray, np.ndarray], outside: np.ndarray) -> None:
    truth = similarity(12)
    points = np.repeat(cloud(outside, truth, 12), 2, axis=0)
    found = align_surfaces(points, *surface, starts=80)
    assert found.matched and displacement(found, truth, outside) < 0.15


def test_alignment_can_be_stopped(surface: tuple[np.ndarray, np.ndarray], outside: np.ndarray) -> None:
    calls: list[tuple[int, int]] = []

    def step(done: int, total: int) -> None:
        calls.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        align_surfaces(cloud(outside, similarity(1), 1), *surface, step=step)
    assert [done for done, _ in calls] == [1, 2, 3]
    calls.clear()
    align_surfaces(outside[::40], *surface, starts=1, step=lambda *a: calls.append(a))
    assert calls[-1][0] == calls[-1][1] and all(done <= total for done, total in calls)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.zeros((100, 2)), "need \\(n, 3\\)"),
        (np.zeros((5, 3)), "at least 50"),
        (np.full((100, 3), np.inf), "finite"),
        (np.ones((100, 3)), "one place"),
    ],
)
def test_alignment_refuses(surface: tuple[np.ndarray, np.ndarray], points: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_surfaces(points, *surface)


def test_landmarks() -> None:
    random = np.random.default_rng(8)
    source, truth = random.uniform(-3, 3, (8, 3)), similarity(8)
    exact = align_landmarks(source[:3], apply(truth, source[:3]))
    np.testing.assert_allclose(exact.transform, truth, atol=1e-9)
    assert np.isnan(exact.scale_error)
    target = apply(truth, source)
    target[2] += 0.5
    found = align_landmarks(source, target)
    assert found.residuals is not None and int(np.argmax(found.residuals)) == 2
    assert abs(found.scale / np.cbrt(np.linalg.det(truth[:3, :3])) - 1) < 3 * found.scale_error


def test_error_of_landmarks_is_honest() -> None:
    source, ratios = np.random.default_rng(9).uniform(-3, 3, (6, 3)), []
    for seed in range(60):
        noise = 0.02 * np.random.default_rng([9, seed]).standard_normal(source.shape)
        found = align_landmarks(source, source + noise)
        ratios.append((found.scale - 1) / found.scale_error)
    assert 0.7 < np.sqrt(np.mean(np.square(ratios))) < 1.5


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (np.eye(3)[:2], np.eye(3)[:2], "at least 3"),
        (np.eye(3), np.zeros((4, 3)), "one for each"),
        (np.arange(12.0).reshape(4, 3), np.eye(4)[:, :3], "on a line"),
        (np.eye(4)[:, :3], np.eye(4)[:, :3] * [1, 1, -1], "mirror"),
    ],
)
def test_landmarks_refuse(source: np.ndarray, target: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align_landmarks(source, target)


def given(transform: np.ndarray) -> Alignment:
    """An alignment as landmarks give it."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    return align_landmarks(corners, apply(transform, corners))


def test_silhouettes_draw_a_spoilt_pose_back(
    surface: tuple[np.ndarray, np.ndarray], outside: np.ndarray, grid: Grid
) -> None:
    truth = similarity(10)
    views = cameras(truth, 6)
    masks = silhouettes(grid, truth, views)
    masks[5] = 0
    spoil = np.eye(4)
    spoil[:3, :3] = 1.03 * rotation_vector_to_matrix([0.05, -0.03, 0.04])
    start = given(spoil @ truth)
    steps: list[tuple[int, int]] = []
    found = refine_on_silhouettes(start, masks, views, *surface, step=lambda *a: steps.append(a))
    assert steps[-1][0] == steps[-1][1]
    assert displacement(start, truth, outside) > 1.0
    assert displacement(found, truth, outside) < 0.1
    assert found.rms < 0.5 and found.reason == ""
    assert found.scale == pytest.approx(np.cbrt(np.linalg.det(found.transform[:3, :3])))
    shifted = np.roll(masks, 30, axis=2)
    lost = refine_on_silhouettes(start, shifted, views, *surface)
    assert "outlines" in lost.reason
    np.testing.assert_array_equal(lost.transform, start.transform)


def test_silhouettes_refuse(surface: tuple[np.ndarray, np.ndarray]) -> None:
    truth = similarity(11)
    views, start = cameras(truth, 2), given(truth)
    masks = np.zeros((2, 100, 96))
    for wrong, message in (
        (masks, "none with an outline"),
        (masks[:1], "one for each camera"),
        (masks[:, :50], "size"),
        (masks + 255, "255"),
    ):
        with pytest.raises(ValueError, match=message):
            refine_on_silhouettes(start, wrong, views, *surface)
    with pytest.raises(ValueError, match="normals"):
        refine_on_silhouettes(start, masks, views, surface[0], surface[1][:-1])
