"""Checks and corrections of a scan's geometry, and the run that makes them."""

import json
import threading

import numpy as np
import pytest

from napari_innergs.baselines.preprocess import scan_line_integrals
from napari_innergs.fit.engine import Done, Preview, Step
from napari_innergs.fit.xray_geometry import GeometryCheck, Refinement
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam
from napari_innergs.io.scans import geometry_from_dict
from napari_innergs.result import Reconstruction
from napari_innergs.scan import Scan
from napari_innergs.tasks import scan_checks
from napari_innergs.tasks.scan_checks import (
    check_scan,
    describe_centre,
    describe_refinement,
    find_centre,
    fit_checked,
    geometry_description,
    improves,
    refine_scan,
    refine_steps,
    reverse_rotation,
)

ANGLES = np.arange(24) * np.pi / 12
# (centre (z, y, x), radius, attenuation): no symmetry
BALLS = (((0, 0, 0), 7, 0.02), ((1, -2, 3), 2.5, 0.03), ((-2, 3, -1), 2, -0.015), ((2, 3.5, 3), 1.5, 0.03))


def cone(angles=ANGLES, **options):
    given = {
        "source_origin": 100,
        "source_detector": 150,
        "detector_shape": (24, 28),
        "pixel_size": 1.0,
        "units": "mm",
    }
    return ConeBeam.circular(angles, **{**given, **options})


def balls(geometry):
    """Line integrals of a few balls, in closed form."""
    rows, cols = (np.arange(n) - 0.5 * (n - 1) for n in geometry.detector_shape)
    pixels = geometry.center[:, None, None] + rows[:, None, None] * geometry.v[:, None, None]
    pixels = pixels + cols[:, None] * geometry.u[:, None, None]
    if geometry.kind == "cone":
        ray = pixels - geometry.source[:, None, None]
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    else:
        ray = np.broadcast_to(geometry.direction[:, None, None], pixels.shape)
    total = np.zeros(pixels.shape[:-1])
    for centre, radius, value in BALLS:
        apart = np.linalg.norm(np.cross(pixels - np.array(centre), ray), axis=-1)
        total += 2 * value * np.sqrt(np.maximum(radius**2 - apart**2, 0))
    return total.astype(np.float32)


def grid(size=18):
    affine = np.eye(4)
    affine[:3, 3] = -0.5 * (size - 1)
    return Grid((size,) * 3, affine, "mm")


def scan_of(truth, claimed):
    return Scan(balls(truth), claimed, grid())


def test_a_right_geometry_is_let_alone():
    found = check_scan(scan_of(cone(), cone()))
    assert (found.reversed, found.likely) == (False, False)
    assert found.geometry.error < 0.2
    assert found.message.startswith("The projections agree with the geometry")
    assert found.summary()["direction"] == "right"
    json.dumps(found.summary())


def test_an_offset_is_noticed_and_the_axis_found():
    scan = scan_of(cone(detector_offset=(0, -2)), cone())
    found = check_scan(scan)
    assert found.likely
    assert "refine it" in found.message
    centre = find_centre(scan)
    # the panel is 2 columns towards lower ones: the axis is seen 2 columns higher
    assert centre.shift == pytest.approx(2, abs=0.1)
    assert "column 15.5" in describe_centre(centre)
    np.testing.assert_allclose(
        centre.corrected(cone()).center, cone(detector_offset=(0, -2)).center, atol=0.1
    )
    assert not check_scan(scan.with_geometry(centre.corrected(cone()))).likely


def test_wrong_way_rotation_is_noticed_before_anything_else():
    scan = scan_of(cone(rotation="cw", detector_offset=(0, -2)), cone(detector_offset=(0, -2)))
    found = check_scan(scan)
    assert found.reversed
    assert found.geometry is None
    assert "turn the other way" in found.message
    assert not check_scan(scan.with_geometry(reverse_rotation(scan.geometry))).reversed


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"detector_offset": (0.5, -3), "source_offset": (0.2, 1), "detector_tilt": (0.02, 0.03, -0.05)},
        {"start_angle": 0.4},
    ],
)
def test_reversed_is_as_if_made_so(options):
    given = {**options}
    start = given.pop("start_angle", 0.0)
    once = reverse_rotation(cone(start_angle=start, **given))
    np.testing.assert_allclose(
        once.vectors, cone(start_angle=-start, rotation="cw", **given).vectors, atol=1e-9
    )
    np.testing.assert_allclose(reverse_rotation(once).vectors, cone(**options).vectors, atol=1e-9)
    flat = ParallelBeam.circular(ANGLES, detector_shape=(3, 9), detector_offset=(0, 1))
    other = ParallelBeam.circular(ANGLES, detector_shape=(3, 9), detector_offset=(0, 1), rotation="cw")
    np.testing.assert_allclose(reverse_rotation(flat).vectors, other.vectors, atol=1e-9)


@pytest.mark.parametrize("spacing", [0.2, 3.0])
def test_the_check_does_not_depend_on_the_voxels_that_are_wanted(spacing):
    size = round(18 / spacing)
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = -0.5 * (size - 1) * spacing
    where = Grid((size,) * 3, affine, "mm")
    for claimed, likely in ((cone(detector_offset=(0, -2)), False), (cone(), True)):
        found = check_scan(scan_of(cone(detector_offset=(0, -2)), claimed), where)
        assert found.likely == likely
    usual = check_scan(scan_of(cone(detector_offset=(0, -2)), cone()), grid())
    assert found.geometry.offset == pytest.approx(usual.geometry.offset, rel=0.1)


def test_too_few_views_are_no_error():
    few = cone(ANGLES[:3])
    found = check_scan(scan_of(few, few))
    assert found.geometry is None
    assert found.message == "Too few views to check the geometry."
    with pytest.raises(ValueError, match="need at least 4"):
        refine_scan(scan_of(few, few))


@pytest.mark.parametrize(("offset", "n_views", "likely"), [(0.1, 6, False), (0.4, 6, True), (0.1, 24, True)])
def test_few_views_tell_the_offset_only(monkeypatch, offset, n_views, likely):
    def alarm(*_):
        return GeometryCheck(0.6, -offset, 0.5, True, "wrong")

    monkeypatch.setattr("napari_innergs.tasks.scan_checks.check_geometry", alarm)
    few = cone(ANGLES[:: 24 // n_views])
    found = check_scan(scan_of(few, few))
    assert found.likely == likely
    assert ("6 views are too few to check each of them" in found.message) != likely
    if not likely:
        assert found.geometry.error == offset


def test_refining_mends_an_offset_and_reports_it():
    scan = scan_of(cone(detector_offset=(0, -2)), cone())
    events = list(refine_steps(scan, parameters=("offset",), sizes=(18,), rounds=(2,)))
    found = events[-1].result
    assert all(isinstance(event, Step) for event in events[:-1])
    fractions = [event.fraction for event in events[:-1]]
    assert fractions == sorted(fractions)
    assert any("round 2 of 2" in event.phase for event in events[:-1])
    assert improves(found)
    assert found.offset[1] == pytest.approx(-2, abs=0.1)
    text = describe_refinement(found)
    assert "offset of the panel (v, u)" in text
    assert "±" in text
    assert "lifting the object" in text
    assert not check_scan(scan.with_geometry(found.geometry)).likely


def test_a_refinement_that_changes_nothing_says_so():
    none = np.zeros(24)
    found = Refinement(
        *(cone(), ("offset",), (0.0, 0.01), (0.1, 0.1), none, none, np.zeros((24, 2)), np.zeros((24, 2))),
        *((0.0, 0.0, 0.0), (np.inf,) * 3, 0.0222, 0.0221, "gauge"),
    )
    assert not improves(found)
    assert "the geometry was kept" in describe_refinement(found)


def test_closing_ends_a_refinement():
    events = refine_steps(scan_of(cone(), cone()))
    next(events)
    events.close()
    with pytest.raises(StopIteration):
        next(events)


def test_descriptions_are_read_again():
    geometry = cone(detector_offset=(0.3, -2), detector_tilt=(0.01, 0, 0))
    again, where = geometry_from_dict(json.loads(json.dumps(geometry_description(geometry, grid()))))
    assert again == geometry
    np.testing.assert_array_equal(where.affine, grid().affine)
    assert where.shape == grid().shape
    # the panel's offset is no displacement of the object
    aside = cone(detector_offset=(6, 4))
    again, _ = geometry_from_dict(json.loads(json.dumps(geometry_description(aside))))
    np.testing.assert_allclose(again.isocentre, 0, atol=1e-12)
    assert again.default_grid() == aside.default_grid()


def fit_with(labels):
    def fit(scan, geometry, where, config, *, device, seed):
        volume = np.zeros(where.shape, np.float32)
        for number, label in enumerate(labels):
            yield Step(label, number / len(labels))
            yield Preview(volume + number, where, label)
        yield Done(Reconstruction(volume, where, report={"warnings": ["first"]}))

    return fit


def test_every_run_checks_after_the_first_preview():
    scan = scan_of(cone(detector_offset=(0, -2)), cone())
    events = list(fit_checked(scan, grid(), fit=fit_with(["FDK", "total variation", "combined"])))
    phases = [getattr(event, "label", getattr(event, "phase", "")) for event in events]
    assert phases[1] == "FDK"
    assert phases.index("Checking the geometry") == 2
    found = events[-1].result
    assert found.check.likely
    assert found.result.report["warnings"] == ["first", found.check.message]
    assert found.result.report["geometry_check"]["geometry"]["likely"]
    np.testing.assert_array_equal(found.tv, 1)
    right = list(fit_checked(scan_of(cone(), cone()), grid(), fit=fit_with(["FDK"])))[-1].result
    assert right.tv is None
    assert right.result.report["warnings"] == ["first"]
    # what is wrong is said at once, before the first event
    with pytest.raises(ValueError, match="there is no preset"):
        fit_checked(scan, grid(), "quick")


def test_a_run_takes_the_logarithm_once(monkeypatch):
    calls = []

    def counted(scan):
        calls.append(scan)
        return scan_line_integrals(scan)

    for module in ("projections", "scan_checks"):
        monkeypatch.setattr(f"napari_innergs.tasks.{module}.scan_line_integrals", counted)
    settings = {"gaussians": False, "tv_weight": 1e-3, "tv_passes": 1}
    found = list(fit_checked(scan_of(cone(), cone()), grid(), settings))[-1].result
    assert len(calls) == 1
    assert found.check == check_scan(calls[0], grid())
    assert found.result.report["geometry_check"] == found.check.summary()


def test_a_refinement_can_be_closed_while_it_works(monkeypatch):
    started, go_on = threading.Event(), threading.Event()

    def slow(*_, **__):
        yield 0.0, "Long work"
        started.set()
        go_on.wait(20)
        yield 1.0, "Done"

    monkeypatch.setattr(scan_checks, "refine_geometry", slow)
    events = refine_steps(scan_of(cone(), cone()))
    try:
        while not started.is_set():
            assert isinstance(next(events), Step)
        events.close()
    finally:
        go_on.set()
