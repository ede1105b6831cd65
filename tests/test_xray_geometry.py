import doctest
import pickle

import ellipsoids
import numpy as np
import pytest

from napari_innergs.geometry import xray
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.rotation import rotation_vector_to_matrix
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry, check_angles

TURN = np.linspace(0, 2 * np.pi, 12, endpoint=False)
CONE = {
    "source_origin": 100.0,
    "source_detector": 150.0,
    "detector_shape": (30, 40),
    "pixel_size": (2.0, 3.0),
}


def cone(angles=TURN, **changes):
    return ConeBeam.circular(angles, **{**CONE, **changes})


def test_examples_in_docstrings_run():
    assert doctest.testmod(xray).failed == 0


def test_a_circular_scan_has_the_documented_numbers():
    geometry = cone([0.0, np.pi / 2, 0.3], units="mm")
    # world (z, y, x): source at SOD (cos a, sin a, 0) in (x, y, z)
    np.testing.assert_allclose(geometry.source[0], (0, 0, 100), atol=1e-12)
    np.testing.assert_allclose(geometry.source[1], (0, 100, 0), atol=1e-12)
    np.testing.assert_allclose(geometry.center[2], (0, -50 * np.sin(0.3), -50 * np.cos(0.3)))
    np.testing.assert_allclose(geometry.u[2], (0, 3 * np.cos(0.3), -3 * np.sin(0.3)))
    np.testing.assert_allclose(geometry.v[2], (2, 0, 0), atol=1e-12)
    np.testing.assert_allclose(geometry.vectors[1], [0, 100, 0, 0, -50, 0, -3, 0, 0, 0, 0, 2], atol=1e-12)
    assert geometry.magnification == pytest.approx(1.5)
    assert geometry.units == ("mm", "mm", "mm")
    assert geometry.n_views == len(geometry) == 3
    np.testing.assert_allclose(geometry.source_detector, 150)
    np.testing.assert_allclose(geometry.source_origin, 100)


def test_points_are_seen_where_the_pinhole_formula_puts_them():
    geometry = cone([0.0, 0.7])
    z, y, x = 3.0, 5.0, -7.0
    seen = geometry.project([[z, y, x], [0, 0, 0]])
    for i, a in enumerate((0.0, 0.7)):
        scale = 150 / (100 - (x * np.cos(a) + y * np.sin(a)))
        row = z * scale / 2 + 14.5
        col = (-x * np.sin(a) + y * np.cos(a)) * scale / 3 + 19.5
        np.testing.assert_allclose(seen[i], [[row, col], [14.5, 19.5]])
    assert np.isnan(geometry.project([[0.0, 0.0, 120.0]])[0]).all()
    parallel = ParallelBeam.circular([0.7], detector_shape=(30, 40), pixel_size=(2, 3))
    expected = (z / 2 + 14.5, (-x * np.sin(0.7) + y * np.cos(0.7)) / 3 + 19.5)
    np.testing.assert_allclose(parallel.project([[z, y, x]])[0, 0], expected)


def test_the_shadow_of_an_ellipsoid_lies_where_its_centre_is_seen():
    bodies = [(1.0, (9.0, -6.0, 11.0), (3.0, 5.0, 2.0))]
    geometry = ParallelBeam.circular(
        TURN, detector_shape=(160, 200), pixel_size=0.25, detector_offset=(2.0, -3.0)
    )
    image = ellipsoids.project(geometry, bodies)
    total = image.sum(axis=(1, 2))
    rows = (image.sum(axis=2) * np.arange(160)).sum(axis=1) / total
    cols = (image.sum(axis=1) * np.arange(200)).sum(axis=1) / total
    seen = geometry.project([bodies[0][1]])[:, 0]
    np.testing.assert_allclose(np.stack([rows, cols], axis=1), seen, atol=0.05)
    # the integral of a shadow is the volume
    np.testing.assert_allclose(total * 0.25**2, 4 / 3 * np.pi * 3 * 5 * 2, rtol=0.01)


def test_sense_and_start_of_the_rotation():
    assert cone(TURN, rotation="cw") == cone(-TURN)
    assert cone(TURN, rotation="cw", start_angle=0.4) == cone(0.4 - TURN)
    np.testing.assert_allclose(cone(TURN, start_angle=0.4).angles, TURN + 0.4)


def test_offsets_are_v_u_and_move_the_panel():
    plain, moved = cone(), cone(detector_offset=(4.0, -9.0))
    np.testing.assert_allclose(moved.project([[1, 2, 3]]), plain.project([[1, 2, 3]]) - [2.0, -3.0])
    np.testing.assert_allclose(moved.vectors, plain.with_offset(2.0, -3.0).vectors)
    jitter = np.linspace(-1, 1, 12)
    many = plain.with_offset(0.0, jitter)
    np.testing.assert_allclose((plain.project([[0, 0, 0]]) - many.project([[0, 0, 0]]))[:, 0, 1], jitter)
    centred = cone(rotation_centre=17.25)
    np.testing.assert_allclose(centred.project([[5.0, 0, 0], [-5.0, 0, 0]])[..., 1], 17.25)
    # source and panel displaced together: the axis is off the central ray
    shifted = cone(source_offset=(0.0, 6.0), detector_offset=(0.0, 6.0))
    np.testing.assert_allclose(shifted.project([[0.0, 0, 0]])[:, 0, 1], 19.5 - 6 * 1.5 / 3)


def test_tilts_turn_the_panel_about_its_own_axes():
    def corner(tilt):
        geometry = cone([0.0], detector_tilt=tilt)
        return geometry.u[0] / 3, geometry.v[0] / 2

    c, s = np.cos(0.1), np.sin(0.1)
    # at angle 0 (z, y, x): u = y, v = z, normal = x
    np.testing.assert_allclose(corner((0.1, 0, 0)), ([s, c, 0], [c, -s, 0]), atol=1e-12)
    np.testing.assert_allclose(corner((0, 0.1, 0)), ([0, 1, 0], [c, 0, s]), atol=1e-12)
    np.testing.assert_allclose(corner((0, 0, 0.1)), ([0, c, -s], [1, 0, 0]), atol=1e-12)
    u, v = corner((0.3, -0.2, 0.1))
    assert abs(u @ v) < 1e-12
    np.testing.assert_allclose([np.linalg.norm(u), np.linalg.norm(v)], 1)


def test_helix_fan_and_laminography():
    angles = np.linspace(0, 6 * np.pi, 31)
    helix = ConeBeam.helical(angles, pitch=12.0, **CONE)
    np.testing.assert_allclose(helix.source[:, 0], np.linspace(-18, 18, 31))
    np.testing.assert_allclose(helix.center[:, 0], helix.source[:, 0])
    np.testing.assert_allclose(helix.source_origin, 100)
    assert ConeBeam.helical(angles, pitch=12.0, start_height=7.0, **CONE).source[0, 0] == 7.0
    plain = cone().default_grid()
    tall = helix.default_grid(spacing=plain.spacing[0])
    assert tall.shape[0] == pytest.approx(plain.shape[0] + 36 / plain.spacing[0], abs=1)
    fan = ConeBeam.fan(TURN, source_origin=100, source_detector=150, n_columns=40, pixel_size=3)
    assert fan.detector_shape == (1, 40)
    assert fan.default_grid().shape[0] == 1
    for lamino in (
        ConeBeam.laminography(TURN, tilt=0.5, **CONE),
        ParallelBeam.laminography(TURN, tilt=0.5, detector_shape=(30, 40)),
    ):
        np.testing.assert_allclose(lamino.direction[:, 0], -np.sin(0.5))
        np.testing.assert_allclose(lamino.project([[0, 0, 0]])[:, 0], [[14.5, 19.5]] * 12)
        assert lamino.check_covers(lamino.default_grid()) is None


def test_heights_of_ones_own():
    lifted = ConeBeam.circular([0.0, 0.1, 0.2], heights=[0.0, 3.0, 9.0], **CONE)
    flat = ConeBeam.circular([0.0, 0.1, 0.2], **CONE)
    for part in ("source", "center"):
        np.testing.assert_allclose((getattr(lifted, part) - getattr(flat, part))[:, 0], [0, 3, 9])
    assert lifted.isocentre.tolist() == [4, 0, 0]
    with pytest.raises(ValueError, match="heights: need one finite number or 3"):
        ConeBeam.circular([0.0, 0.1, 0.2], heights=[0.0, 1.0], **CONE)


def test_the_index_frame_is_that_of_the_grid():
    affine = np.eye(4)
    affine[:3, :3] = rotation_vector_to_matrix([0.3, -0.5, 0.2]) @ np.diag([2.0, 1.5, 1.0])
    affine[:3, 3] = (-9, 4, 2)
    grid = Grid((20, 24, 30), affine)
    for geometry in (
        cone(detector_offset=(3, 5)),
        ParallelBeam.circular(TURN, detector_shape=(5, 8), pixel_size=2),
    ):
        frame = geometry.to_index_frame(grid)
        assert frame.shape == (12, 12) and frame.flags.c_contiguous
        row, col = 3, 6
        pixel = frame[:, 3:6] + row * frame[:, 9:12] + col * frame[:, 6:9]
        seen = geometry.project(grid.index_to_world(pixel[4]))[4, 0]
        np.testing.assert_allclose(seen, (row, col), atol=1e-9)
        if geometry.kind == "cone":
            np.testing.assert_allclose(grid.index_to_world(frame[:, :3]), geometry.source, atol=1e-9)
            middle = 0.5 * (frame[4, :3] + pixel[4])
        else:
            np.testing.assert_allclose(np.linalg.norm(frame[:, :3] @ affine[:3, :3].T, axis=1), 1)
            middle = pixel[4] - 7 * frame[4, :3]
        # a point on the ray is seen on the same pixel
        np.testing.assert_allclose(geometry.project(grid.index_to_world(middle))[4, 0], (row, col), atol=1e-9)


def test_a_moved_scan_sees_moved_points():
    move = np.eye(4)
    move[:3, :3] = rotation_vector_to_matrix([0.2, 0.4, -0.3])
    move[:3, 3] = (5, -6, 7)
    points = np.array([[1.0, 2, 3], [-4, 0, 2]])
    for geometry in (cone(), ParallelBeam.circular(TURN, detector_shape=(5, 8))):
        moved = geometry.moved(move)
        np.testing.assert_allclose(
            moved.project(points @ move[:3, :3].T + move[:3, 3]), geometry.project(points), atol=1e-9
        )
        np.testing.assert_allclose(moved.isocentre, move[:3, 3], atol=1e-12)
        assert moved.check_covers(moved.default_grid()) is None


def test_plain_vectors_give_angles_isocentre_and_grid():
    known = cone(TURN, detector_offset=(2.0, 4.0), detector_tilt=(0.02, 0, 0), start_angle=0.5)
    plain = XrayGeometry(known.vectors, known.detector_shape)
    np.testing.assert_allclose(plain.angles, known.angles, atol=1e-9)
    assert np.linalg.norm(plain.isocentre) < 3
    mirrored = np.array(known.vectors)
    mirrored[:, 6:9] *= -1
    np.testing.assert_allclose(XrayGeometry(mirrored, (30, 40)).angles, known.angles, atol=1e-9)
    one = XrayGeometry(cone([0.3]).vectors, (30, 40))
    np.testing.assert_allclose(one.isocentre, 0, atol=1e-9)
    assert cone().default_grid().shape == XrayGeometry(cone().vectors, (30, 40)).default_grid().shape


def test_the_default_grid_holds_what_the_panel_sees():
    geometry = cone()
    grid = geometry.default_grid()
    np.testing.assert_allclose(grid.spacing, 2 / 1.5)
    np.testing.assert_allclose(grid.index_to_world((np.array(grid.shape) - 1) / 2), 0, atol=1e-9)
    # the fan's edge touches a circle of radius SOD sin(fan angle)
    radius = 100 * np.sin(np.arctan(60 / 150))
    assert grid.shape[1] == grid.shape[2] == int(np.ceil(2 * radius * 1.5 / 2))
    assert grid.shape[0] == 30
    fixed = geometry.default_grid((32, 64, 64))
    assert fixed.shape == (32, 64, 64)
    assert fixed.spacing[0] * 64 >= 2 * radius - 1e-9
    assert geometry.default_grid(spacing=5.0).spacing.tolist() == [5.0] * 3
    # a panel to one side sees a wider field
    assert cone(detector_offset=(0.0, 30.0)).default_grid().shape[2] > grid.shape[2]


def test_subset_equality_pickle_and_immutability():
    geometry = cone(units="mm", detector_offset=(1, 2))
    part = geometry.subset([3, 1])
    np.testing.assert_array_equal(part.vectors, geometry.vectors[[3, 1]])
    np.testing.assert_array_equal(part.angles, geometry.angles[[3, 1]])
    assert geometry.subset(slice(None)) == geometry and hash(geometry) == hash(
        cone(units="mm", detector_offset=(1, 2))
    )
    assert geometry.subset(geometry.angles < 1).n_views == 2
    assert geometry != geometry.with_offset(0, 1e-9) and geometry != 3
    copy = pickle.loads(pickle.dumps(geometry))
    assert copy == geometry and type(copy) is ConeBeam and copy.units == geometry.units
    np.testing.assert_array_equal(copy.angles, geometry.angles)
    with pytest.raises(AttributeError, match="immutable"):
        geometry.kind = "parallel"
    with pytest.raises(ValueError, match="read-only"):
        geometry.vectors[0, 0] = 1
    for indices in ([12], [], slice(0, 0)):
        with pytest.raises(ValueError, match="indices"):
            geometry.subset(indices)
    parallel = ParallelBeam.circular(TURN, detector_shape=(5, 8))
    assert parallel.magnification == 1 and np.isinf(parallel.source_detector).all()
    with pytest.raises(AttributeError, match="parallel beam"):
        _ = parallel.source
    assert "12 views" in repr(parallel)


@pytest.mark.parametrize(
    "angles",
    [np.arange(180.0), np.arange(0, 360, 0.5), np.linspace(0, 179.0055, 181), np.arange(0, 400, 7.2), [90.0]],
)
def test_degrees_are_recognised(angles):
    with pytest.raises(ValueError, match=r"look like degrees.*deg2rad"):
        check_angles(angles)


def test_radians_are_not_taken_for_degrees():
    for angles in (TURN, np.linspace(-2 * np.pi, 2 * np.pi, 9), np.arange(0, 60, 0.01), [3.0]):
        np.testing.assert_array_equal(check_angles(angles), angles)
    many = np.linspace(0, 20 * np.pi, 241)
    np.testing.assert_array_equal(check_angles(many, turns=True), many)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"angles": [0, np.nan]}, "angles.*NaN.*view 1"),
        ({"angles": []}, "angles.*one for each view"),
        ({"angles": "abc"}, "angles.*numbers"),
        ({"source_origin": -1}, "source_origin.*positive"),
        ({"source_origin": 200}, "source_detector.*exchanged"),
        ({"source_detector": np.inf}, "source_detector"),
        ({"pixel_size": 0}, "pixel_size.*positive"),
        ({"pixel_size": (1, 2, 3)}, "pixel_size"),
        ({"detector_shape": (30,)}, "detector_shape"),
        ({"detector_shape": (30, 0)}, "detector_shape"),
        ({"detector_shape": (30, 4.5)}, "detector_shape"),
        ({"rotation": "left"}, "rotation.*'ccw'"),
        ({"start_angle": 90}, "start_angle.*radians"),
        ({"detector_tilt": (5, 0, 0)}, "detector_tilt"),
        ({"elevation": 2}, "elevation"),
        ({"detector_offset": (0, np.nan)}, "detector_offset"),
        ({"rotation_centre": 3, "detector_offset": (0, 1)}, "rotation_centre"),
        ({"units": ("mm", "mm")}, "units"),
    ],
)
def test_wrong_descriptions_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        ConeBeam.circular(**{"angles": TURN, **CONE, **changes})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda v: v[:, :9], r"vectors.*\(n, 12\)"),
        (lambda v: v[:0], "vectors"),
        (lambda v: np.where(v == v[3, 3], np.nan, v), "vectors.*NaN"),
        (lambda v: np.concatenate([v[:, :9], 2 * v[:, 6:9]], axis=1), "parallel"),
        (lambda v: np.concatenate([v[:, :6], 0 * v[:, 6:9], v[:, 9:]], axis=1), "u has length 0"),
        (lambda v: np.concatenate([v[:, 3:6] + v[:, 6:9], v[:, 3:]], axis=1), "panel's plane"),
    ],
)
def test_wrong_vectors_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        XrayGeometry(change(np.array(cone().vectors)), (30, 40))
    with pytest.raises(ValueError, match="kind"):
        XrayGeometry(cone().vectors, (30, 40), "fan")
    with pytest.raises(ValueError, match=r"angles: got 3, need 12"):
        XrayGeometry(cone().vectors, (30, 40), angles=[1, 2, 3])


def test_rays_that_miss_the_grid_are_reported():
    geometry = cone()

    def cube(size, where=(0.0, 0.0, 0.0)):
        affine = np.eye(4) * size / 10
        affine[3, 3] = 1
        affine[:3, 3] = np.array(where) - 4.5 * size / 10
        return Grid((10, 10, 10), affine)

    assert geometry.check_covers(cube(40)) is None
    with pytest.raises(ValueError, match=r"source of view 0 is inside the grid \(12 view"):
        geometry.check_covers(cube(500))
    with pytest.raises(ValueError, match="no ray of view"):
        geometry.check_covers(cube(10, (80.0, 0, 0)))
    # behind the source of view 0, in front of others
    with pytest.raises(ValueError, match="no ray of view 0"):
        geometry.check_covers(cube(10, (0.0, 0.0, 130.0)))
    assert "Only" in geometry.check_covers(cube(4))
    assert "middle" in geometry.check_covers(cube(60, (45.0, 0, 0)))
    parallel = ParallelBeam.circular(TURN, detector_shape=(30, 40))
    assert parallel.check_covers(cube(40)) is None
    with pytest.raises(ValueError, match="no ray"):
        parallel.check_covers(cube(5, (60.0, 0, 0)))
