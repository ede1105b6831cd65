"""Geometry refinement and the geometry check, on projections in closed form."""

import json

import numpy as np
import pytest
from ellipsoids import BODIES
from ellipsoids import project as project_bodies

from napari_innergs.fit.xray_geometry import check_geometry, refine_geometry
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam

N = 36
TURN = np.arange(N) * 2 * np.pi / N
GRID = Grid((44, 44, 44), [[2, 0, 0, -43], [0, 2, 0, -43], [0, 0, 2, -43], [0, 0, 0, 1]])


# angles show only where there are details far from the axis
_rng = np.random.default_rng(11)
DETAILS = [
    (0.06, (h, r * np.sin(a), r * np.cos(a)), (4.0, 4.5, 5.0))
    for h, r, a in zip(
        _rng.uniform(-20, 20, 14), _rng.uniform(12, 30, 14), _rng.uniform(0, 6.28, 14), strict=True
    )
]


def project(geometry):
    return project_bodies(geometry, BODIES + DETAILS)


def cone(angles=TURN, **options):
    options = {
        "source_origin": 300,
        "source_detector": 450,
        "detector_shape": (44, 44),
        "pixel_size": 3.2,
    } | options
    return ConeBeam.circular(angles, **options)


def run(data, geometry, grid=GRID, **options):
    steps = refine_geometry(data, geometry, grid, **options)
    fractions = []
    while True:
        try:
            fraction, text = next(steps)
        except StopIteration as end:
            assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
            return end.value
        assert text
        fractions.append(fraction)


def without_waves(error, angles=TURN):
    waves = np.stack([np.ones_like(angles), np.cos(angles), np.sin(angles)], axis=1)
    return error - waves @ np.linalg.lstsq(waves, error, rcond=None)[0]


@pytest.fixture(scope="module")
def noise():
    return 0.01 * np.random.default_rng(5).standard_normal((N, 44, 44))


@pytest.fixture(scope="module")
def shaken(noise):
    """A scan with errors of every kind, and what they are."""
    rng = np.random.default_rng(2)
    angles = np.deg2rad(1.0) * rng.standard_normal(N)
    shifts = 0.5 * rng.standard_normal((N, 2))
    roll = np.deg2rad(0.8)
    true = cone(TURN + angles, detector_tilt=(roll, 0, 0)).with_offset(
        0.6 + shifts[:, 0], -1.5 + shifts[:, 1]
    )
    return project(true) + noise, angles, shifts, roll


def test_everything_is_found_together(shaken):
    data, angles, shifts, roll = shaken
    found = run(data, cone(), sizes=(22, 44), rounds=(1, 1))
    assert abs(found.offset[1] - (-1.5 + shifts[:, 1].mean())) < 0.05
    assert abs(found.offset[0] - (0.6 + shifts[:, 0].mean())) < 0.5
    assert 0 < found.offset_error[1] < 0.05 and 0 < found.offset_error[0] < 1
    assert np.std(found.shifts[:, 0] - shifts[:, 0]) < 0.06
    assert np.std(without_waves(found.shifts[:, 1] - shifts[:, 1])) < 0.06
    assert np.rad2deg(np.std(without_waves(found.angles - angles))) < 0.35
    assert abs(found.tilt[0] - roll) < np.deg2rad(0.15)
    assert found.tilt[1:] == (0, 0) and np.isinf(found.tilt_error[1:]).all()
    assert found.residual_after < 0.5 * found.residual_before
    # the gauge
    assert abs(found.angles.mean()) < 1e-12 and np.abs(found.shifts.mean(axis=0)).max() < 1e-12
    assert "lifting the object" in found.gauge and "turning the object" in found.gauge
    assert isinstance(found.geometry, ConeBeam)
    # the numbers describe the geometry
    whole = cone(TURN + found.angles, detector_tilt=(found.tilt[0], 0, 0)).with_offset(0, 0)
    moves = found.shifts + found.offset
    centre = cone(TURN + found.angles).with_offset(moves[:, 0], moves[:, 1]).center
    np.testing.assert_allclose(found.geometry.u, whole.u, atol=1e-9)
    np.testing.assert_allclose(found.geometry.center, centre, atol=1e-9)
    kept = json.loads(found.to_json())
    np.testing.assert_allclose(kept["vectors_xyz"], found.geometry.vectors)
    assert kept["tilt_error_degrees"][1] is None


def test_the_check_warns_only_of_wrong_geometry(shaken, noise):
    bad = check_geometry(shaken[0], cone(), GRID)
    assert bad.likely and bad.error > 0.5 and "refine" in bad.message
    assert abs(bad.offset + 1.5) < 0.8
    data = project(cone()) + noise
    good = check_geometry(data, cone(), GRID)
    assert not good.likely and good.error < 0.2 and "agree" in good.message
    assert check_geometry(data, cone().with_offset(0, 0.6), GRID).likely
    # nothing but the place of the object
    assert not check_geometry(data, cone().with_offset(0.3, 0), GRID).likely


def test_only_what_is_asked_for_moves(shaken):
    found = run(shaken[0], cone(), parameters=("offset",), sizes=(22,), rounds=(2,))
    assert not found.angles.any() and np.abs(found.shifts).max() < 1e-12 and found.tilt == (0, 0, 0)
    assert abs(found.offset[1] - (-1.5 + shaken[2][:, 1].mean())) < 0.3
    found = run(shaken[0], cone(), parameters=("shifts",), sizes=(22,), rounds=(1,))
    assert found.offset == (0, 0) and np.abs(found.shifts.mean(axis=0)).max() < 1e-12
    assert not found.angles.any()
    np.testing.assert_allclose(found.geometry.source, cone().source, atol=1e-9)


def test_parallel_rays_leave_the_objects_place_open(noise):
    rng = np.random.default_rng(3)
    angles = np.arange(N) * np.pi / N
    shifts = 0.5 * rng.standard_normal((N, 2))
    told = ParallelBeam.circular(angles, detector_shape=(44, 44), pixel_size=2.0)
    data = project(told.with_offset(shifts[:, 0], 0.9 + shifts[:, 1])) + noise
    found = run(data, told, parameters=("offset", "shifts"), sizes=(22, 44), rounds=(1, 1))
    assert found.offset[0] == pytest.approx(0, abs=1e-12) and np.isinf(found.offset_error[0])
    assert np.std(found.shifts[:, 0] - shifts[:, 0]) < 0.06
    # the sum of offset and shifts is known but for the waves
    error = found.shifts[:, 1] + found.offset[1] - shifts[:, 1] - 0.9
    waves = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert np.std(error - waves @ np.linalg.lstsq(waves, error, rcond=None)[0]) < 0.08
    assert "both are zero" in found.gauge
    assert json.loads(found.to_json())["offset_error_pixels"][0] is None


def test_a_single_row(noise):
    told = ConeBeam.fan(TURN, source_origin=300, source_detector=450, n_columns=44, pixel_size=3.2)
    data = project(told.with_offset(0, 1.2)) + noise[:, :1]
    grid = Grid((1, 44, 44), [[2, 0, 0, 0], [0, 2, 0, -43], [0, 0, 2, -43], [0, 0, 0, 1]])
    found = run(data, told, grid, sizes=(44,), rounds=(2,))
    assert abs(found.offset[1] - 1.2) < 0.1 and found.offset[0] == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"parameters": ("offset", "speed")}, "parameters: got"),
        ({"parameters": ()}, "parameters: got"),
        ({"sizes": (16, 32)}, "sizes, rounds"),
        ({"weight": 0}, "weight: got"),
    ],
)
def test_wrong_arguments(change, match):
    with pytest.raises(ValueError, match=match):
        next(
            refine_geometry(np.zeros((N, 44, 44)), cone(), GRID, **{"rounds": (1,), "sizes": (16,)} | change)
        )


def test_wrong_projections():
    data = np.zeros((N, 44, 44))
    for call in (check_geometry, lambda *a: next(refine_geometry(*a))):
        with pytest.raises(ValueError, match="to match the geometry"):
            call(data[1:], cone(), GRID)
        with pytest.raises(ValueError, match="at least 4"):
            call(data[:3], cone(TURN[:3]), GRID)
        with pytest.raises(ValueError, match="finite line integrals"):
            call(np.where(np.arange(44) == 3, np.nan, data), cone(), GRID)
