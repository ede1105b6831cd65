"""Motion, contrast and outliers of slices: simulated with cubic splines, found from coarse to fine."""

import itertools
import json

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, map_coordinates

from napari_innergs.data import SliceStack
from napari_innergs.fit import motion as motions
from napari_innergs.fit.motion import (
    Motion,
    consistency,
    estimate_motion,
    estimate_thickness,
    match_intensities,
)
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import rotation_vector_to_matrix

SIZE, K = 40, 4


def texture(seed=0, size=SIZE):
    random = np.random.default_rng(seed)
    noise = random.standard_normal((3, size, size, size))
    detail = sum(gaussian_filter(n, s) * s**1.5 * 6 for n, s in zip(noise, (1.2, 2.0, 4.0), strict=True))
    at = (np.indices((size,) * 3) - (size - 1) / 2) / (size / 2)
    inside = gaussian_filter(((at**2).sum(0) < 0.75).astype(float), 1.0)
    return (100 + 40 * detail) * inside


def take(volume, axis, moves=None, thickness=K, noise=0.02, seed=0):
    """A stack of slices; `moves` is (rotation vector, translation) for each slice about its centre."""
    size = len(volume)
    count = size // K
    affine = np.zeros((4, 4))
    others = [a for a in range(3) if a != axis]
    affine[axis, 0], affine[axis, 3], affine[3, 3] = K, (K - 1) / 2, 1
    affine[others[0], 1] = affine[others[1], 2] = 1
    middle = np.tile((size - 1) / 2, (count, 3))
    middle[:, axis] = K * np.arange(count) + (K - 1) / 2
    transforms = np.tile(np.eye(4), (count, 1, 1))
    if moves is not None:
        turn = rotation_vector_to_matrix(moves[0])
        transforms[:, :3, :3] = turn
        transforms[:, :3, 3] = middle - np.einsum("nab,nb->na", turn, middle) + moves[1]
    rows, columns = np.mgrid[:size, :size]
    place = np.zeros((thickness, count, 3, size, size))
    place[:, :, others[0]], place[:, :, others[1]] = rows, columns
    depth = np.arange(thickness) - (thickness - 1) / 2
    place[:, :, axis] = (middle[:, axis] + depth[:, None])[..., None, None]
    place = (
        np.einsum("nab,knbhw->akhwn", transforms[:, :3, :3], place)
        + transforms[:, :3, 3].T[:, None, None, None]
    )
    data = map_coordinates(volume, place, order=3, mode="nearest").mean(0).transpose(2, 0, 1)
    random = np.random.default_rng([seed, axis])
    data += noise * np.ptp(volume) * random.standard_normal(data.shape)
    return SliceStack(data.astype(np.float32), affine, thickness=thickness, profile="box"), transforms


def shaken(volume, seed=1, degrees=2.0, voxels=2.0):
    random = np.random.default_rng(seed)
    out = []
    for axis in range(3):
        way = random.standard_normal((2, SIZE // K, 3))
        way *= random.uniform(0, 1, (2, SIZE // K, 1)) / np.linalg.norm(way, axis=2, keepdims=True)
        out.append(take(volume, axis, (np.radians(degrees) * way[0], voxels * way[1])))
    return [s for s, _ in out], [t for _, t in out]


def finish(steps):
    reports = []
    while True:
        try:
            reports.append(next(steps))
        except StopIteration as stop:
            return stop.value, reports


def slice_errors(stacks, found, true):
    """Mean displacement of each slice's pixels after the best rigid registration (Kabsch)."""
    places = []
    for stack in stacks:
        ends = np.array([[r, c] for r, c in itertools.product((8, SIZE - 9), repeat=2)], float)
        at = np.array([[[t, *e] for e in ends] for t in stack.positions])
        places.append(stack.geometry.to_world(at.reshape(-1, 3)).reshape(at.shape))

    def put(transforms):
        return np.concatenate(
            [
                np.einsum("nab,nkb->nka", t[:, :3, :3], p) + t[:, None, :3, 3]
                for t, p in zip(transforms, places, strict=True)
            ]
        )

    a, b = put(found), put(true)
    # the outermost slices show little
    weight = np.concatenate([np.r_[0, 0, np.ones(len(t) - 4), 0, 0] for t in found])[:, None, None]
    mean_a, mean_b = (np.sum(weight * v, (0, 1)) / (weight.sum() * v.shape[1]) for v in (a, b))
    u, _, v = np.linalg.svd(np.einsum("nka,nkb->ab", weight * (a - mean_a), b - mean_b))
    turn = v.T @ np.diag([1, 1, np.linalg.det(u @ v)]) @ u.T
    return np.linalg.norm((a - mean_a) @ turn.T - (b - mean_b), axis=2).mean(1)


@pytest.fixture(scope="module")
def volume():
    return texture()


@pytest.fixture(scope="module")
def moved(volume):
    stacks, true = shaken(volume)
    found, reports = finish(estimate_motion(stacks, Grid(volume.shape)))
    return stacks, true, found, reports


def test_slices_are_found(moved):
    stacks, true, found, reports = moved
    before = slice_errors(stacks, [np.tile(np.eye(4), (len(t), 1, 1)) for t in true], true)
    after = slice_errors(stacks, found.transforms, true)
    assert np.median(before) > 0.7
    assert np.median(after) < 0.2
    fractions = [f for f, _ in reports]
    assert np.all(np.diff(fractions) >= 0) and fractions[-1] == pytest.approx(1, abs=0.01)
    assert not np.concatenate(found.outliers).any()
    assert np.concatenate([s[2:-2] for s in found.scales]) == pytest.approx(1, abs=0.1)
    error = np.concatenate([e[2:-2] for e in found.error])
    assert 0.01 < np.median(error[:, 0]) < 0.3


def test_gauge(moved):
    _, _, found, _ = moved
    shift = np.concatenate(
        [
            np.einsum("nab,nb->na", t[:, :3, :3], c) + t[:, :3, 3] - c
            for t, c in zip(found.transforms, found.centers, strict=True)
        ]
    )
    assert shift.mean(0) == pytest.approx(0, abs=1e-9)
    turn = np.concatenate(found.transforms)[:, :3, :3].mean(0)
    assert turn - turn.T == pytest.approx(0, abs=1e-4)
    for t in found.transforms:
        assert t[:, :3, :3] @ t[:, :3, :3].swapaxes(1, 2) == pytest.approx(
            np.broadcast_to(np.eye(3), (10, 3, 3))
        )
    assert "mean" in found.summary()["gauge"]


def test_json(moved):
    found = moved[2]
    again = Motion.from_json(found.to_json())
    for name in ("transforms", "scales", "error", "centers", "outliers"):
        for a, b in zip(getattr(found, name), getattr(again, name), strict=True):
            assert np.array_equal(a, b) and a.dtype == b.dtype
    assert [w.shape for w in again.weights] == [w.shape for w in found.weights]
    assert again.summary() == found.summary()
    json.dumps(found.summary())
    with pytest.raises(ValueError, match="need JSON with format"):
        Motion.from_json("{}")
    with pytest.raises(ValueError, match="not JSON"):
        Motion.from_json("motion")


def test_garbage_and_faint_slices_are_left_out(volume):
    stacks, true = shaken(volume, seed=3)
    random = np.random.default_rng(0)
    spoilt = [(0, 4, "noise"), (1, 5, "flip"), (2, 4, "faint")]
    for s, i, kind in spoilt:
        data = stacks[s].data[..., 0].copy()
        if kind == "noise":
            data[i] = random.uniform(0, volume.max(), data[i].shape)
        else:
            data[i] = data[i, ::-1, ::-1] if kind == "flip" else 0.1 * data[i]
        stacks[s] = SliceStack(data, stacks[s].affine, thickness=K, profile="box")
    found, _ = finish(estimate_motion(stacks, Grid(volume.shape)))
    assert {(s, int(i)) for s in range(3) for i in np.flatnonzero(found.outliers[s])} == {
        (s, i) for s, i, _ in spoilt
    }
    assert all(found.weights[s][i].max() == 0 and found.weights[s][3].max() == 1 for s, i, _ in spoilt)
    inner = np.zeros((3, 10), bool)
    inner[:, 2:-2] = True
    for s, i, _ in spoilt:
        inner[s, i] = False
    assert np.median(slice_errors(stacks, found.transforms, true)[inner.ravel()]) < 0.3


def test_bad_pixels_lose_weight(volume):
    stacks, _ = shaken(volume, seed=5)
    data = stacks[0].data[..., 0].copy()
    data[5, 15:20, 15:20] += 2 * np.ptp(volume)
    stacks[0] = SliceStack(data, stacks[0].affine, thickness=K, profile="box")
    found, _ = finish(estimate_motion(stacks, Grid(volume.shape)))
    assert found.weights[0][5, 16:19, 16:19].max() < 0.2
    assert found.weights[0].mean() > 0.95


def test_whole_stacks_and_their_contrast(volume):
    random = np.random.default_rng(2)
    stacks, true = [], []
    middle = np.full(3, (SIZE - 1) / 2)
    for axis, (gain, offset) in enumerate(((1.0, 0.0), (0.8, 12.0), (1.3, -20.0))):
        turn = rotation_vector_to_matrix(np.radians(3) * random.uniform(-1, 1, 3))
        shift = random.uniform(-4, 4, 3)
        centers = np.tile(middle, (SIZE // K, 1))
        centers[:, axis] = K * np.arange(SIZE // K) + (K - 1) / 2
        vector = motions._parameters(np.pad(turn[None], ((0, 0), (0, 1), (0, 1))), middle[None])[0, :3]
        steps = centers @ turn.T + (middle - turn @ middle + shift) - centers
        stack, transforms = take(volume, axis, (np.tile(vector, (len(steps), 1)), steps))
        stacks.append(
            SliceStack(gain * stack.data + np.float32(offset), stack.affine, thickness=K, profile="box")
        )
        true.append(transforms)
    found, _ = finish(estimate_motion(stacks, Grid(volume.shape), level="stack"))
    assert slice_errors(stacks, found.transforms, true).max() < 0.1
    assert found.gains == pytest.approx([1, 0.8, 1.3], rel=0.03)
    assert found.offsets == pytest.approx([0, 12, -20], abs=3)
    assert all(np.ptp(t[:, :3, :3], axis=0).max() < 1e-9 for t in found.transforms)


def test_off_and_single_stack(volume):
    grid = Grid(volume.shape)
    stack, _ = take(volume, 0)
    for level, stacks in (("off", [stack, stack]), ("stack", [stack]), ("slice", [stack])):
        found, _ = finish(estimate_motion(stacks, grid, level=level))
        assert found.level == "off" and found.weights[0].min() == 1
        assert np.array_equal(found.transforms[0], np.tile(np.eye(4), (10, 1, 1)))


def test_masks_are_kept_out(volume):
    stacks, true = shaken(volume, seed=6)
    data = stacks[1].data[..., 0].copy()
    data[:, 10:20, 10:20] = np.nan
    mask = np.isfinite(data)
    stacks[1] = SliceStack(data, stacks[1].affine, thickness=K, profile="box", mask=mask)
    found, _ = finish(estimate_motion(stacks, Grid(volume.shape), iterations=3))
    assert np.median(slice_errors(stacks, found.transforms, true)) < 0.25


def test_errors(volume):
    stack, _ = take(volume, 0)
    grid = Grid(volume.shape)
    with pytest.raises(ValueError, match="level: got 'pixel'"):
        next(estimate_motion([stack], grid, level="pixel"))
    with pytest.raises(ValueError, match="stacks: got none"):
        next(estimate_motion([], grid))
    with pytest.raises(ValueError, match="iterations: got 0"):
        next(estimate_motion([stack], grid, iterations=0))
    with pytest.raises(ValueError, match="index: got 2"):
        estimate_thickness([stack], grid, 2)


def test_contrast(volume):
    grid = Grid(volume.shape)
    stacks = [take(volume, axis)[0] for axis in range(3)]
    changed = [
        SliceStack(g * s.data + np.float32(o), s.affine, thickness=K, profile="box")
        for s, g, o in zip(stacks, (1, 0.5, 2), (0, 40, -10), strict=True)
    ]
    gains, offsets = match_intensities(changed, grid)
    assert gains == pytest.approx([1, 0.5, 2], rel=0.05)
    assert offsets == pytest.approx([0, 40, -10], abs=5)
    assert match_intensities(changed[:1], grid)[0].tolist() == [1]


def test_consistency(volume):
    grid = Grid(volume.shape)
    stacks = [take(volume, axis)[0] for axis in range(3)]
    # another object, in another place of the field of view
    other = take(np.roll(texture(9), (9, -8, 10), (0, 1, 2)), 2)[0]
    score, overlap = consistency(stacks, grid)
    assert score > 0.8 and overlap > 0.9
    assert consistency(shaken(volume)[0], grid)[0] > 0.5
    assert consistency([stacks[0], stacks[1], other], grid)[0] < 0.4
    far = stacks[1].affine.copy()
    far[:3, 3] += 100
    assert consistency([stacks[0], SliceStack(stacks[1].data, far, thickness=K)], grid) == (0.0, 0.0)
    assert consistency(stacks[:1], grid) == (1.0, 1.0)


@pytest.mark.parametrize("true", [2, 4, 6])
def test_thickness(volume, true):
    grid = Grid(volume.shape)
    stacks = [take(volume, axis, thickness=true if axis == 0 else K)[0] for axis in range(3)]
    unknown = SliceStack(stacks[0].data, stacks[0].affine, thickness=1.0, profile="box")
    found = estimate_thickness([unknown, *stacks[1:]], grid, 0)
    assert found is not None
    assert abs(found[0] - true) < max(0.15 * true, 3 * found[1])
    assert found[1] < 0.25 * true


def test_thickness_can_not_always_be_known(volume):
    grid = Grid(volume.shape)
    stack = take(volume, 0)[0]
    assert estimate_thickness([stack], grid, 0) is None
    far = stack.affine.copy()
    far[:3, 3] += 100
    assert estimate_thickness([stack, SliceStack(stack.data, far, thickness=K)], grid, 0) is None
