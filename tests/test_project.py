"""Voxel projectors: every geometry against the float64 reference, their transpose, analytic ellipsoids."""

import functools

import numpy as np
import pytest
from conftest import GPU, HOST

from napari_innergs.cpu import project as cpu_project
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry
from napari_innergs.operators.project import VoxelProjector, backproject

#: the CUDA kernels have one mode only
KERNELS = [HOST[0], GPU[0]]
ANGLES = np.linspace(0.05, 6.2, 7)
SHAPE = (17, 20, 18)
SPACING = (1.0, 1.2, 0.9)


def grid(shape=SHAPE, spacing=SPACING, turn=None, shift=(0.0, 0.0, 0.0)):
    """Return a grid around the origin, its axes turned by a matrix."""
    steps = (np.eye(3) if turn is None else turn) @ np.diag(spacing)
    affine = np.eye(4)
    affine[:3, :3] = steps
    affine[:3, 3] = np.array(shift) - steps @ ((np.array(shape) - 1) / 2)
    return Grid(shape, affine)


def cone(**options):
    options = {"detector_shape": (21, 26), "pixel_size": (1.6, 1.3), "detector_offset": (1.0, -2.0)} | options
    return ConeBeam.circular(ANGLES, source_origin=80.0, source_detector=120.0, **options)


TURN = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
PANEL = {"detector_shape": (21, 26), "pixel_size": (0.9, 1.1)}
#: Scan, grid, and the number of views whose detector columns are parallel to a grid axis
CASES = {
    "cone": (cone(), grid(), 7),
    "coarse panel": (cone(detector_shape=(5, 33), pixel_size=(7.0, 1.0)), grid(), 7),
    "fine panel": (cone(detector_shape=(150, 9), pixel_size=(0.2, 3.0)), grid(), 7),
    "rows upside down": (cone(pixel_size=(1.6, 1.3)).moved(np.diag([-1.0, 1.0, 1.0, 1.0])), grid(), 7),
    "tilted panel": (cone(detector_tilt=(0.1, 0.05, 0.03)), grid(), 0),
    "turned grid": (cone(), grid(turn=TURN), 0),
    "exchanged axes": (cone(), grid(turn=np.eye(3)[[1, 2, 0]]), 7),
    "elsewhere": (cone(), grid(shift=(3.0, -7.0, 5.0)), 7),
    "thin slices": (cone(), grid((60, 20, 18), (0.1, 1.2, 0.9)), 0),
    "long lines": (cone(), grid((70, 9, 8), (0.8, 2.0, 2.0)), 7),
    "one slice": (
        ConeBeam.fan(ANGLES, source_origin=80.0, source_detector=120.0, n_columns=26, pixel_size=1.5),
        grid((1, 20, 18)),
        7,
    ),
    "helix": (
        ConeBeam.helical(ANGLES, pitch=5.0, source_origin=80.0, source_detector=120.0, **PANEL),
        grid(),
        7,
    ),
    "cone laminography": (
        ConeBeam.laminography(ANGLES, tilt=0.6, source_origin=80.0, source_detector=120.0, **PANEL),
        grid(),
        0,
    ),
    "parallel": (ParallelBeam.circular(ANGLES, **PANEL), grid(), 7),
    "parallel laminography": (ParallelBeam.laminography(ANGLES, tilt=0.9, **PANEL), grid(), 0),
    "along the axes": (ParallelBeam.circular([0.0, np.pi / 2, np.pi], **PANEL), grid(), 3),
    "two rows": (cone(detector_shape=(2, 40)), grid((2, 20, 18)), 7),
    "two rows, parallel": (
        ParallelBeam.circular(ANGLES, detector_shape=(2, 41), pixel_size=(1.3, 0.7)),
        grid((3, 20, 18)),
        7,
    ),
    # rays that fan out so far that one view follows three directions; planes close to the source
    "wide fan": (
        ConeBeam.circular(
            ANGLES, source_origin=15.0, source_detector=20.0, detector_shape=(3, 60), pixel_size=(0.7, 1.5)
        ),
        grid((4, 20, 18)),
        7,
    ),
    "coarse columns": (cone(detector_shape=(3, 8), pixel_size=(1.2, 6.0)), grid((4, 20, 18)), 7),
    # some rays are followed along z, and some planes lie behind the source
    "source near by": (
        ConeBeam.circular(
            ANGLES, source_origin=17.0, source_detector=40.0, detector_shape=(40, 40), pixel_size=2.0
        ),
        grid(),
        None,
    ),
}


def numbers(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def truths():
    """Return a function that gives numbers and what the reference makes of them, computed once for a case."""

    @functools.cache
    def truth(case):
        scan = VoxelProjector(*CASES[case][:2], "reference")
        volume, data = numbers(scan.domain_shape), numbers(scan.range_shape, 1)
        return volume, data, scan.apply(volume), scan.adjoint(data)

    return truth


@pytest.mark.parametrize("few", [0, 1000], ids=["along columns", "along rows"])
@pytest.mark.parametrize("case", CASES)
def test_matches_reference_and_transpose_is_exact(case, few, truths, monkeypatch):
    """Views with columns along a grid axis by either kind of kernel, whatever the number of rows."""
    monkeypatch.setattr(cpu_project, "FEW", few)
    geometry, voxels, straight = CASES[case]
    fast = VoxelProjector(geometry, voxels, "cpu")
    if straight is not None:
        assert fast._rays.separable.sum() == straight
    volume, data, *wanted = truths(case)
    projections, back = fast.apply(volume), fast.adjoint(data)
    for got, want in zip((projections, back), wanted, strict=True):
        assert got.shape == want.shape and got.dtype == np.float32
        assert np.abs(want).max() > 0.1
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
    left = np.vdot(projections.astype(float), data)
    right = np.vdot(volume.astype(float), back)
    assert abs(left - right) < 1e-5 * np.linalg.norm(projections) * np.linalg.norm(data)


def views_in_turns(scan, monkeypatch):
    """Make the CUDA backend take two views at a time."""
    from napari_innergs.cuda import project

    monkeypatch.setattr(project, "RAYS", 2 * int(np.prod(scan.geometry.detector_shape)))


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("case", CASES)
def test_cuda_matches_reference_and_transpose_is_exact(case, backend, truths, use_backend, monkeypatch):
    use_backend(backend)
    scan = VoxelProjector(*CASES[case][:2], backend)
    views_in_turns(scan, monkeypatch)
    volume, data, *wanted = truths(case)
    projections, back = scan.apply(volume), scan.adjoint(data)
    for got, want in zip((projections, back), wanted, strict=True):
        assert got.shape == want.shape and got.dtype == np.float32
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    left = np.vdot(projections.astype(float), data)
    right = np.vdot(volume.astype(float), back)
    assert abs(left - right) < 1e-5 * np.linalg.norm(projections) * np.linalg.norm(data)


@pytest.mark.parametrize("backend", KERNELS)
def test_cuda_gives_the_same_bits(backend, use_backend):
    use_backend(backend)
    geometry, voxels, _ = CASES["tilted panel"]
    volume, data = numbers(SHAPE), numbers((7, 21, 26), 1)
    scans = [VoxelProjector(geometry, voxels, backend) for _ in range(2)]
    for first, second in zip(*[(s.apply(volume), s.adjoint(data)) for s in scans], strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("kind", ["cone", "parallel", "in front and behind"])
def test_cuda_backprojects_as_the_cpu_does(kind, backend, use_backend):
    use_backend(backend)
    geometry, voxels, _ = CASES[
        "tilted panel" if kind == "cone" else kind if kind == "parallel" else "source near by"
    ]
    frames = geometry.to_index_frame(voxels).reshape(-1, 4, 3)
    origin, corner, right, down = frames.transpose(1, 0, 2)
    base, third = (corner, origin) if kind == "parallel" else (origin, corner - origin)
    inverse = np.linalg.inv(np.stack([right, down, third], 2))
    matrices = np.concatenate([inverse, -inverse @ base[:, :, None]], 2)
    if kind == "parallel":
        matrices[:, 2] = (0, 0, 0, 1)
    data = numbers((geometry.n_views, *geometry.detector_shape))
    arguments = (data, matrices, np.linspace(0.5, 2.0, len(data)), voxels.shape, kind == "parallel")
    want = backproject(*arguments)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(backproject(*arguments, backend=backend), want, atol=1e-4 * np.abs(want).max())
    out = np.full(voxels.shape, 3, np.float32)
    assert backproject(*arguments, (5, 9), out, backend=backend) is out
    np.testing.assert_allclose(out[5:9], want[5:9], atol=1e-4 * np.abs(want).max())
    assert (out[:5] == 3).all() and (out[9:] == 3).all()


@pytest.mark.parametrize("backend", ["cpu", *KERNELS])
@pytest.mark.parametrize("case", ["cone", "tilted panel"])
def test_subsets_of_views(case, backend, use_backend):
    use_backend(backend)
    geometry, voxels, _ = CASES[case]
    scan = VoxelProjector(geometry, voxels, backend)
    volume, data = numbers(scan.domain_shape), numbers(scan.range_shape, 1)
    chosen = np.array([5, 0, 3])
    np.testing.assert_array_equal(scan.apply(volume, chosen), scan.apply(volume)[chosen])
    only = np.zeros_like(data)
    only[chosen] = data[chosen]
    np.testing.assert_allclose(scan.adjoint(data[chosen], chosen), scan.adjoint(only), atol=1e-4)


def test_mixed_views():
    """Views of both kinds in one scan, each into its place."""
    straight, tilted = CASES["cone"][0], CASES["tilted panel"][0]
    geometry = XrayGeometry(np.stack([straight.vectors, tilted.vectors], 1).reshape(-1, 12), (21, 26))
    fast, truth = (VoxelProjector(geometry, grid(), backend) for backend in ("cpu", "reference"))
    assert fast._rays.separable.tolist() == [True, False] * 7
    volume, data = numbers(SHAPE), numbers(fast.range_shape, 1)
    for got, want in (
        (fast.apply(volume), truth.apply(volume)),
        (fast.adjoint(data), truth.adjoint(data)),
    ):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


FINE = grid((44, 40, 48), (0.5, 0.6, 0.5))


@functools.cache
def ellipsoid_voxels(voxels, centre, half):
    """Return how much of each voxel an ellipsoid fills, sampled finely; all (z, y, x)."""
    fine = np.stack(np.meshgrid(*[np.arange(-3, 4) / 7] * 3, indexing="ij"), -1).reshape(-1, 3)
    index = np.stack(np.meshgrid(*[np.arange(s) for s in voxels.shape], indexing="ij"), -1).astype(float)
    volume = np.zeros(voxels.shape)
    for offset in fine:
        where = (voxels.index_to_world(index + offset) - centre) / half
        volume += (where**2).sum(-1) < 1
    return volume / len(fine)


def ellipsoid(geometry, voxels, centre, half, value):
    """Return an ellipsoid on the grid and its exact line integrals; all (z, y, x)."""
    volume = ellipsoid_voxels(voxels, centre, half)
    rows, cols = geometry.detector_shape
    v, u = np.arange(rows) - (rows - 1) / 2, np.arange(cols) - (cols - 1) / 2
    pixel = geometry.center[:, None, None] + v[:, None, None] * geometry.v[:, None, None]
    pixel = pixel + u[:, None] * geometry.u[:, None, None]
    if geometry.kind == "cone":
        start = geometry.source[:, None, None]
        ray = pixel - start
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    else:
        start, ray = pixel, np.broadcast_to(geometry.direction[:, None, None], pixel.shape)
    a, b = (start - centre) / half, ray / half
    square, mixed, rest = (b * b).sum(-1), (a * b).sum(-1), (a * a).sum(-1) - 1
    chord = 2 * np.sqrt(np.maximum(mixed**2 - square * rest, 0)) / square
    return (value * volume).astype(np.float32), value * chord


@pytest.mark.parametrize("kind", ["cone", "parallel", "laminography", "helix", "fan"])
def test_ellipsoid(kind):
    """Off centre and with three different half axes, so that an exchanged or flipped axis shows."""
    angles = np.arange(6) * 1.1
    place = {"source_origin": 60.0, "source_detector": 90.0}
    panel = {"detector_shape": (40, 48), "pixel_size": 0.8}
    geometry = {
        "cone": ConeBeam.circular(angles, **place, **panel, detector_offset=(0.7, -1.3)),
        "parallel": ParallelBeam.circular(angles, **panel),
        "laminography": ConeBeam.laminography(angles, tilt=0.5, **place, **panel),
        "helix": ConeBeam.helical(angles, pitch=3.0, **place, **panel),
        "fan": ConeBeam.fan(angles, **place, n_columns=48, pixel_size=0.8),
    }[kind]
    volume, truth = ellipsoid(geometry, FINE, (1.0, -2.0, 1.5), (7.0, 5.0, 6.0), 0.05)
    error = VoxelProjector(geometry, FINE).apply(volume) - truth
    inside = truth > 0.6 * truth.max()
    assert np.sqrt(np.mean(error[inside] ** 2)) < 0.01 * truth.max()
    assert np.abs(error[inside]).max() < 0.03 * truth.max()
    # near the rim the voxels blur the chord: only its mean is right
    assert np.sqrt(np.mean(error**2)) < 0.02 * truth.max()
    assert abs(error.sum()) < 2e-3 * truth.sum()


def test_lengths_are_in_world_units():
    geometry = cone(detector_offset=(0.0, 0.0))
    larger = XrayGeometry(geometry.vectors * 10, geometry.detector_shape)
    small, large = (
        VoxelProjector(geometry, grid()),
        VoxelProjector(larger, grid(spacing=np.multiply(SPACING, 10))),
    )
    volume = numbers(SHAPE)
    np.testing.assert_allclose(10 * small.apply(volume), large.apply(volume), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("case", ["source near by", "two rows"])
@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_with_any_number_of_threads(threads, case):
    from napari_innergs.device import get_threads, set_threads

    geometry, voxels, _ = CASES[case]
    scan = VoxelProjector(geometry, voxels)
    volume, data = numbers(scan.domain_shape), numbers(scan.range_shape)
    before = scan.apply(volume), scan.adjoint(data)
    count = get_threads()
    try:
        set_threads(threads)
        after = scan.apply(volume), scan.adjoint(data)
    finally:
        set_threads(count)
    for x, y in zip(before, after, strict=True):
        np.testing.assert_array_equal(x, y)


def test_norm():
    scan = VoxelProjector(ParallelBeam.circular([0.0, 0.8], detector_shape=(2, 5)), grid((2, 4, 3)))
    matrix = np.stack([scan.apply(row.reshape(2, 4, 3)).ravel() for row in np.eye(24, dtype=np.float32)])
    true = np.linalg.norm(matrix, 2)
    assert true * 0.99 < scan.norm(40) < true * 1.0001


def test_layout_without_copies():
    geometry, voxels, _ = CASES["cone"]
    axes = VoxelProjector(geometry, voxels).axes
    turned = Grid([voxels.shape[a] for a in axes], voxels.affine[:, [*axes, 3]])
    scan = VoxelProjector(geometry, turned)
    assert scan.axes == (0, 1, 2)
    volume = numbers(SHAPE)
    np.testing.assert_allclose(
        scan.apply(volume.transpose(axes)), VoxelProjector(geometry, voxels).apply(volume), atol=1e-5
    )


def test_arrays_that_run_backwards():
    scan = VoxelProjector(
        ParallelBeam.circular([0.0, 0.8], detector_shape=(1, 5)), grid((1, 4, 3)), "reference"
    )
    data, volume = numbers((2, 1, 5)), numbers((1, 4, 3))
    np.testing.assert_array_equal(scan.adjoint(data[:, ::-1]), scan.adjoint(data))
    np.testing.assert_array_equal(scan.apply(volume[::-1]), scan.apply(volume))


def test_bad_input():
    geometry, voxels, _ = CASES["cone"]
    with pytest.raises(ValueError, match="backend"):
        VoxelProjector(geometry, voxels, "opencl")
    with pytest.raises(ValueError, match="data: got shape"):
        backproject(np.zeros((2, 3, 4)), np.zeros((2, 3, 3)), np.ones(2), (2, 2, 2), True)
    with pytest.raises(ValueError, match="backend: got 'reference'"):
        backproject(
            np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), np.ones(2), (2, 2, 2), True, backend="reference"
        )
    with pytest.raises(ValueError, match="source inside the grid"):
        VoxelProjector(geometry, grid(spacing=(10.0, 10.0, 10.0)))
    scan = VoxelProjector(geometry, voxels)
    with pytest.raises(ValueError, match=r"volume: got shape \(2, 2, 2\)"):
        scan.apply(np.zeros((2, 2, 2), np.float32))
    with pytest.raises(ValueError, match="data: got shape"):
        scan.adjoint(np.zeros((7, 21, 26), np.float32), [0, 1])
