import doctest

import ellipsoids
import numpy as np
import pytest

from napari_innergs.baselines import preprocess
from napari_innergs.baselines.preprocess import (
    check_direction,
    find_bad_pixels,
    find_rotation_centre,
    line_integrals,
    repair_pixels,
    scan_line_integrals,
    suppress_rings,
)
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry
from napari_innergs.scan import Scan

TURN = np.linspace(0, 2 * np.pi, 40, endpoint=False)
HALF = np.linspace(0, np.pi, 60, endpoint=False)
CONE = {"source_origin": 150.0, "source_detector": 250.0, "detector_shape": (9, 96), "pixel_size": 1.8}
FLAT = {"detector_shape": (3, 96), "pixel_size": 1.0}


def cone(angles=TURN, **changes):
    return ConeBeam.circular(angles, **{**CONE, **changes})


def parallel(angles=HALF, **changes):
    return ParallelBeam.circular(angles, **{**FLAT, **changes})


@pytest.fixture(scope="module")
def clean():
    return ellipsoids.project(cone()).astype(np.float32)


def test_examples_in_docstrings_run():
    assert doctest.testmod(preprocess).failed == 0


# ---------------------------------------------------------------- counts to line integrals


def test_line_integrals_come_back_from_counts(clean):
    rng = np.random.default_rng(0)
    flat = rng.uniform(30000, 60000, clean.shape[1:])
    dark = rng.uniform(50, 150, clean.shape[1:])
    level = rng.uniform(0.8, 1.2, len(clean))
    counts = np.exp(-clean) * (flat - dark) + dark
    found = line_integrals(counts, flat=flat, dark=dark)
    np.testing.assert_allclose(found.projections, clean, atol=1e-5)
    assert found.projections.dtype == np.float32
    assert (found.n_dark, found.n_bright, found.n_repaired, found.warnings) == (0, 0, 0, ())
    # several images of each field are averaged
    frames = np.stack([flat - 100, flat + 100]), np.stack([dark - 5, dark + 5])
    again = line_integrals(counts, flat=frames[0], dark=frames[1])
    np.testing.assert_allclose(again.projections, found.projections, atol=1e-6)
    # a source whose power changes
    varying = np.exp(-clean) * 1000 * level[:, None, None]
    np.testing.assert_allclose(line_integrals(varying, i0=1000 * level).projections, clean, atol=1e-5)
    varying = np.exp(-clean) * (flat - dark) * level[:, None, None] + dark
    mean = float((flat - dark).mean())
    found = line_integrals(varying, flat=flat, dark=dark, i0=mean * level)
    np.testing.assert_allclose(found.projections, clean, atol=1e-5)


def test_zeros_nan_and_hot_pixels_are_clipped_or_repaired_and_counted(clean):
    counts = np.exp(-clean.astype(float)) * 10000
    counts[3, 4, 50] = 0
    counts[4, 4, 50] = -20
    counts[5, 4, 50] = np.nan
    counts[6, 4, 5] = 90000
    found = line_integrals(counts, i0=10000)
    assert np.isfinite(found.projections).all()
    assert (found.n_dark, found.n_bright, found.n_repaired) == (2, 1, 1)
    assert len(found.warnings) == 3 and "2 pixels" in found.warnings[0]
    np.testing.assert_allclose(found.projections[3:5, 4, 50], -np.log(0.5 / 10000), rtol=1e-5)
    assert abs(found.projections[5, 4, 50] - clean[5, 4, 50]) < 0.05
    assert found.projections[6, 4, 5] > -0.3
    # a blank scan of 1: nothing is known about counts
    scaled = line_integrals(counts / 10000, i0=1.0)
    np.testing.assert_allclose(scaled.projections[3, 4, 50], -np.log(1e-4), rtol=1e-5)
    assert line_integrals(counts, i0=10000, minimum=0.1).projections.max() == pytest.approx(-np.log(0.1))


def test_the_noise_of_air_keeps_its_mean():
    counts = np.random.default_rng(1).poisson(400.0, (20, 16, 16))
    mean = float(line_integrals(counts, i0=400).projections.mean())
    # -log of a Poisson number is biased by half its relative variance
    assert mean == pytest.approx(0.5 / 400, abs=5e-3 / 4)


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("value", [0, 1000])
def test_columns_that_never_change_are_filled_whatever_they_say(clean, counts, value):
    geometry = cone()
    middle = clean.shape[2] // 2
    scan = Scan(np.round(1e5 * np.exp(-clean)), geometry, i0=1e5) if counts else Scan(clean, geometry)
    right = scan_line_integrals(scan)
    assert right.n_repaired == 0
    broken = np.array(scan.projections)
    broken[:, :, middle] = value
    found = scan_line_integrals(Scan(broken, geometry, i0=scan.i0))
    assert found.n_repaired == clean[:, :, 0].size and found.n_dark == 0
    assert "filled from their neighbours" in found.warnings[0]
    assert np.abs(found.projections - right.projections).max() < 0.2 * right.projections.max()


def test_thin_things_are_no_dead_pixels():
    wires = np.zeros((12, 1, 40))
    wires[np.arange(12), 0, 3 * np.arange(12)] = 1.0
    geometry = ParallelBeam.circular(np.arange(12) * np.pi / 12, detector_shape=(1, 40))
    assert scan_line_integrals(Scan(wires, geometry)).n_repaired == 0


def test_a_scan_of_nothing_is_told():
    geometry = ParallelBeam.circular(np.arange(12) * np.pi / 12, detector_shape=(1, 40))
    assert "nothing to reconstruct" in scan_line_integrals(Scan(np.zeros((12, 1, 40)), geometry)).warnings[0]
    with pytest.raises(ValueError, match="no pixel has a signal"):
        scan_line_integrals(Scan(np.zeros((12, 1, 40)), geometry, i0=1000))


def test_dead_pixels_of_the_flat_field_are_filled(clean):
    flat = np.full(clean.shape[1:], 5000.0)
    flat[2, 40] = 0
    flat[:, 60] = 100
    counts = np.exp(-clean) * np.where(flat > 200, flat, 5000)
    mask = np.ones(flat.shape, bool)
    mask[7, 10] = False
    found = line_integrals(counts, flat=flat, mask=mask)
    assert found.n_repaired == len(clean) * (1 + 9 + 1)
    assert np.abs(found.projections - clean).max() < 0.25


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "flat, i0: got neither"),
        ({"i0": -1}, "i0"),
        ({"i0": [1, 2, 3]}, "i0"),
        ({"flat": np.ones((3, 3))}, "flat: got shape"),
        ({"flat": np.ones((9, 96)), "dark": np.ones((9, 96)) * 2}, "exchanged"),
        ({"i0": 100}, "above the blank scan"),
        ({"i0": 1e4, "mask": np.zeros((9, 96), bool)}, "no pixel"),
        ({"i0": 1e4, "mask": np.ones((9, 96))}, "booleans"),
    ],
)
def test_wrong_fields_are_refused(clean, options, match):
    with pytest.raises(ValueError, match=match):
        line_integrals(np.exp(-clean) * 10000, **options)


def test_a_scan_gives_its_line_integrals(clean):
    counts = np.round(np.exp(-clean) * 60000).astype(np.uint16)
    scan = Scan(counts, cone(), i0=60000)
    np.testing.assert_allclose(scan_line_integrals(scan).projections, clean, atol=1e-3)
    pixels = clean.copy()
    pixels[0, 4, 40] = np.nan
    mask = np.isfinite(pixels)
    found = scan_line_integrals(Scan(pixels, cone(), mask=mask))
    assert found.n_repaired == 1 and abs(found.projections[0, 4, 40] - clean[0, 4, 40]) < 0.05
    np.testing.assert_array_equal(found.projections[1:], clean[1:])


# ---------------------------------------------------------------- bad pixels and rings


def test_bad_pixels_are_found_and_good_ones_kept(clean):
    assert not find_bad_pixels(clean).any()
    rng = np.random.default_rng(2)
    noisy = clean + rng.normal(0, 0.01, clean.shape).astype(np.float32)
    assert not find_bad_pixels(noisy).any()
    bad = np.zeros(clean.shape[1:], bool)
    bad[:, 30:32] = bad[4, 60] = bad[7, 48] = bad[1, 20] = True
    noisy[:, :, 30:32] = 0
    noisy[:, 4, 60] += 0.5
    noisy[:, 7, 48] = np.median(clean[:, 7, 48])
    noisy[:30, 1, 20] = np.nan
    np.testing.assert_array_equal(find_bad_pixels(noisy), bad)
    fixed, filled = repair_pixels(noisy)
    np.testing.assert_array_equal(filled.any(axis=0), bad)
    assert np.abs(fixed - clean)[:, bad].max() < 0.25 and np.abs(fixed - clean)[:, bad].mean() < 0.06
    np.testing.assert_array_equal(fixed[:, ~bad], noisy[:, ~bad])


def test_repair_interpolates_between_the_nearest_good_pixels():
    image = np.broadcast_to(np.arange(10.0), (1, 6, 10)).copy()
    bad = np.zeros((6, 10), bool)
    bad[:, 3:6] = bad[2] = True
    image[:, bad] = 99
    fixed, _ = repair_pixels(image, bad)
    # whole bad columns: a straight line from side to side
    np.testing.assert_allclose(fixed[0, 0], np.arange(10), atol=1e-6)
    # where row and column are both bad, the neighbours that were filled first are used
    np.testing.assert_allclose(fixed[0, 2], np.arange(10), atol=1e-5)
    with pytest.raises(ValueError, match="view 0 has no good pixel"):
        repair_pixels(image, np.ones((6, 10), bool))
    with pytest.raises(ValueError, match="bad: got"):
        repair_pixels(image, np.ones((6, 9), bool))
    with pytest.raises(ValueError, match="at least 3"):
        find_bad_pixels(image)
    with pytest.raises(ValueError, match="threshold"):
        find_bad_pixels(np.zeros((3, 4, 12)), threshold=0)


def test_stripes_are_suppressed_and_the_object_is_kept():
    angles = np.linspace(0, np.pi, 180, endpoint=False)
    clean = ellipsoids.project(parallel(angles, detector_shape=(3, 384), pixel_size=0.25))
    stripes = np.zeros(clean.shape[1:])
    stripes[0, [0, 60, 120, 176, 244]] = stripes[1, [80, 188, 280, 383]] = 0.1
    stripes[2, [140, 141, 320]] = -0.1
    fixed = suppress_rings(clean + stripes, size=9)
    # what all views share: little is left of the stripes
    left = np.abs((fixed - clean).mean(axis=0))[stripes != 0]
    assert left.max() < 0.05 and left.mean() < 0.015
    assert np.abs(suppress_rings(clean, size=9) - clean).mean() < 0.002
    assert suppress_rings(clean).dtype == np.float32
    for size in (2, 385, 4.5):
        with pytest.raises(ValueError, match="size"):
            suppress_rings(clean, size)


# ---------------------------------------------------------------- centre of rotation


@pytest.mark.parametrize("centre", [47.5, 45.2, 51.37])
def test_the_centre_of_a_cone_beam(centre):
    true = cone(rotation_centre=centre)
    pixels = ellipsoids.project(true)
    found = find_rotation_centre(pixels, cone())
    assert found.method == "conjugate" and found.expected == pytest.approx(47.5)
    assert found.column == pytest.approx(centre, abs=0.03)
    assert found.shift == found.column - found.expected
    np.testing.assert_allclose(found.corrected(cone()).vectors, true.vectors, atol=0.1)
    # from another starting point, the same column
    assert find_rotation_centre(pixels, cone(rotation_centre=44)).column == pytest.approx(centre, abs=0.03)
    rng = np.random.default_rng(4)
    noisy = pixels + rng.normal(0, 0.02, pixels.shape)
    assert find_rotation_centre(noisy, cone()).column == pytest.approx(centre, abs=0.1)


@pytest.mark.parametrize(
    "angles",
    [
        HALF,
        np.linspace(0, np.pi, 61),
        np.linspace(0, 179.0055, 181) * np.pi / 180,
        2 * HALF,
        np.linspace(0, 1.3 * np.pi, 90),
        -HALF,
        HALF + 0.006 * np.sin(9 * HALF),
    ],
)
def test_the_centre_of_a_parallel_beam(angles):
    pixels = ellipsoids.project(parallel(angles, rotation_centre=44.6))
    found = find_rotation_centre(pixels, parallel(angles))
    assert found.column == pytest.approx(44.6, abs=0.15)
    assert found.column == pytest.approx(
        find_rotation_centre(pixels, parallel(angles), search=(40, 50)).column, abs=0.01
    )


def test_a_short_scan_and_mirrored_columns_have_a_centre():
    short = np.linspace(0, 1.4 * np.pi, 60)
    found = find_rotation_centre(ellipsoids.project(cone(short, rotation_centre=49)), cone(short))
    assert found.column == pytest.approx(49, abs=0.1)
    vectors = np.array(cone(rotation_centre=49).vectors)
    vectors[:, 6:9] *= -1
    mirrored = XrayGeometry(vectors, (9, 96))
    pixels = ellipsoids.project(mirrored)
    assert find_rotation_centre(pixels, mirrored).column == pytest.approx(46, abs=0.05)
    assert check_direction(pixels, mirrored).verdict == "right"


def test_scans_without_opposite_rays_are_refused():
    def check(geometry, match, pixels=None):
        pixels = ellipsoids.project(geometry) if pixels is None else pixels
        with pytest.raises(ValueError, match=match):
            find_rotation_centre(pixels, geometry)

    options = {key: CONE[key] for key in CONE}
    check(ConeBeam.helical(TURN, pitch=60.0, **options), "circular scan about z")
    check(cone(elevation=0.3), "circular scan about z")
    check(parallel(elevation=0.3), "circular scan about z")
    check(cone(np.linspace(0, 2, 20)), "too little of a turn")
    check(parallel(np.linspace(0, 2, 20)), "too little of a turn")
    check(cone(), "all values are the same", np.zeros((40, 9, 96)))
    check(cone(), "NaN", np.full((40, 9, 96), np.nan))
    check(cone(), "projections: got shape", np.zeros((39, 9, 96)))
    check(parallel(detector_shape=(3, 10)), "at least 16")
    with pytest.raises(ValueError, match="search"):
        find_rotation_centre(ellipsoids.project(cone()), cone(), search=(50, 40))


# ---------------------------------------------------------------- direction


@pytest.mark.parametrize("n_views", [20, 40])
@pytest.mark.parametrize("centre", [47.5, 44.0])
def test_wrong_way_rotation_is_noticed(n_views, centre):
    angles = np.linspace(0, 2 * np.pi, n_views, endpoint=False)
    pixels = ellipsoids.project(cone(angles, rotation_centre=centre))
    right = check_direction(pixels, cone(angles))
    assert right.verdict == "right" and right.opposite > 5 * right.given and "fits" in right.message
    wrong = check_direction(pixels, cone(angles, rotation="cw"))
    assert wrong.verdict == "wrong" and "rotation='cw'" in wrong.message
    assert wrong.given == pytest.approx(right.opposite, rel=0.2)
    assert check_direction(pixels[:, :, ::-1], cone(angles)).verdict == "wrong"
    noisy = pixels + np.random.default_rng(5).normal(0, 0.03, pixels.shape)
    assert check_direction(noisy, cone(angles)).verdict == "right"
    assert check_direction(noisy, cone(angles, rotation="cw")).verdict == "wrong"


def test_the_direction_is_left_open_where_the_data_can_not_tell():
    assert "mirror image" in check_direction(ellipsoids.project(parallel()), parallel()).message
    few = cone(np.linspace(0, 2, 20))
    assert "too little of a turn" in check_direction(ellipsoids.project(few), few).message
    ball = [(0.02, (0.0, 0.0, 0.0), (30.0, 30.0, 30.0))]
    found = check_direction(ellipsoids.project(cone(), ball), cone())
    assert found.verdict == "undecided" and "do not tell" in found.message
