import pickle
from itertools import permutations, product

import numpy as np
import pytest

from napari_innergs.geometry import grid as grid_module
from napari_innergs.geometry.frames import (
    LPS,
    LPS_ZYX,
    RAS,
    RAS_ZYX,
    WORLD,
    Frame,
    affine_from_spacing,
    check_affine,
    check_units,
    normalise_unit,
    reverse_affine,
    unit_scale,
)
from napari_innergs.geometry.grid import Grid, available_memory, format_bytes
from napari_innergs.geometry.rotation import (
    matrix_to_quaternion,
    multiply_quaternions,
    normalise_quaternion,
    quaternion_to_matrix,
    reverse_quaternion,
    rotation_vector_to_matrix,
)
from napari_innergs.geometry.slices import SliceGeometry, SlicePlane

OBLIQUE = np.array([[2.9, 0.1, 0.2, -7.0], [0.3, 0.6, -0.4, 3.0], [-0.2, 0.3, 0.7, 11.0], [0, 0, 0, 1]])


# ---------------------------------------------------------------- frames


def test_ras_lps_and_order_move_a_known_point():
    # a point 10 right, 20 anterior, 30 superior of the origin
    assert RAS.convert_points([10, 20, 30], LPS).tolist() == [-10, -20, 30]
    assert RAS.convert_points([10, 20, 30], LPS_ZYX).tolist() == [30, -20, -10]
    assert RAS.convert_points([10, 20, 30], RAS_ZYX).tolist() == [30, 20, 10]
    assert LPS_ZYX.convert_points([30, -20, -10], RAS).tolist() == [10, 20, 30]


def test_conversions_are_inverse_and_compose():
    frames = [RAS, LPS, LPS_ZYX, RAS_ZYX, Frame(("y", "x", "z"), ("I", "R", "A"))]
    for a, b, c in product(frames, repeat=3):
        np.testing.assert_array_equal(b.to(c) @ a.to(b), a.to(c))
        np.testing.assert_array_equal(b.to(a) @ a.to(b), np.eye(4))


def test_handedness_and_code():
    assert RAS.handedness == LPS.handedness == LPS_ZYX.handedness == WORLD.handedness == "right"
    assert Frame(("x", "y", "z"), ("L", "A", "S")).handedness == "left"
    assert (RAS.code, LPS_ZYX.code, WORLD.code) == ("RAS", "LPS", None)
    for order in permutations("xyz"):
        letters = tuple({"x": "R", "y": "A", "z": "S"}[name] for name in order)
        assert Frame(order, letters).handedness == "right"


def test_affine_conversion_agrees_with_points():
    rng = np.random.default_rng(0)
    index = rng.uniform(0, 20, (5, 3))  # i, j, k of NIfTI
    homogeneous = np.c_[index, np.ones(5)]
    ras = (OBLIQUE @ homogeneous.T).T[:, :3]
    ours = RAS.convert_affine(OBLIQUE, LPS_ZYX, reverse_index=True)
    found = (ours @ np.c_[index[:, ::-1], np.ones(5)].T).T[:, :3]
    np.testing.assert_allclose(found, np.stack([ras[:, 2], -ras[:, 1], -ras[:, 0]], 1), atol=1e-12)
    np.testing.assert_array_equal(LPS_ZYX.convert_affine(ours, RAS, reverse_index=True), OBLIQUE)


def test_reverse_affine_is_an_involution_that_swaps_both_sides():
    flipped = reverse_affine(OBLIQUE)
    np.testing.assert_array_equal(reverse_affine(flipped), OBLIQUE)
    point = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(flipped[:3, :3] @ point[::-1] + flipped[:3, 3], (OBLIQUE @ [*point, 1])[2::-1])


def test_units_scale_frames():
    micron = Frame(("x", "y", "z"), None, ("um",) * 3)
    metre = Frame(("z", "y", "x"), None, ("mm",) * 3)
    np.testing.assert_allclose(micron.convert_points([1000, 2000, 3000], metre), [3, 2, 1])
    assert normalise_unit("\u00b5m") == normalise_unit("Micrometer") == normalise_unit("microns") == "um"
    assert check_units(("mm", "micron", "px")) == ("mm", "um", "pixel")
    assert check_units(None) is None
    with pytest.raises(ValueError, match="units: no conversion from 'pixel' to 'mm'"):
        unit_scale("pixel", "mm")
    with pytest.raises(ValueError, match="got 2 units"):
        check_units(("mm", "mm"))


@pytest.mark.parametrize(
    ("axes", "towards", "word"),
    [(("x", "y", "y"), None, "axes"), (("x", "y", "z"), ("R", "L", "S"), "towards")],
)
def test_bad_frames(axes, towards, word):
    with pytest.raises(ValueError, match=word):
        Frame(axes, towards)


@pytest.mark.parametrize(
    ("affine", "word"),
    [
        (np.eye(3), "shape"),
        (np.diag([1, 1, 0, 1.0]), "length 0 along index axis 2"),
        (np.full((4, 4), np.nan), "NaN"),
        ([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]], "singular"),
        (np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1.0]]), "last row"),
        ("no", "not a matrix"),
    ],
)
def test_bad_affines(affine, word):
    with pytest.raises(ValueError, match=word):
        check_affine(affine)


def test_small_spacing_is_not_singular():
    check_affine(np.diag([1e-9, 1e-9, 1e3, 1.0]))


@pytest.mark.parametrize("spacing", [(1, 0, 1), (1, -2, 1), (1, np.nan, 1), 0.0, (1, 1)])
def test_bad_spacing(spacing):
    with pytest.raises(ValueError, match="spacing"):
        affine_from_spacing(spacing)


# ---------------------------------------------------------------- grid


def test_grid_maps_there_and_back():
    grid = Grid((4, 5, 6), OBLIQUE, "mm")
    points = np.random.default_rng(1).uniform(-3, 9, (7, 2, 3))
    np.testing.assert_allclose(grid.world_to_index(grid.index_to_world(points)), points, atol=1e-12)
    np.testing.assert_allclose(grid.index_to_world([1, 2, 3]), (OBLIQUE @ [1, 2, 3, 1])[:3])
    np.testing.assert_allclose(grid.corners()[-1], (OBLIQUE @ [3, 4, 5, 1])[:3])
    np.testing.assert_allclose(grid.corners()[1], (OBLIQUE @ [0, 0, 5, 1])[:3])
    assert grid.nbytes(3, np.uint16) == 4 * 5 * 6 * 3 * 2


def test_grid_is_immutable_and_comparable():
    affine = OBLIQUE.copy()
    grid = Grid((4, 5, 6), affine)
    affine[0, 3] = 99
    assert grid.affine[0, 3] == -7
    with pytest.raises(AttributeError, match="immutable"):
        grid.shape = (1, 1, 1)
    with pytest.raises(ValueError, match="read-only"):
        grid.affine[0, 0] = 2
    copy = pickle.loads(pickle.dumps(grid))
    assert copy == grid and hash(copy) == hash(grid) and grid != Grid((4, 5, 7), OBLIQUE)


@pytest.mark.parametrize("shape", [(1, 2), (0, 1, 1), (1, 2, -3), (1, 2, 2.5)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match="shape"):
        Grid(shape)


def test_crop_keeps_the_world():
    grid = Grid((10, 11, 12), OBLIQUE)
    part = grid.crop(slice(2, 8, 2), slice(3, None), slice(1, 5))
    assert part.shape == (3, 8, 4)
    np.testing.assert_allclose(part.index_to_world([1, 2, 3]), grid.index_to_world([4, 5, 4]))
    with pytest.raises(ValueError, match="y"):
        grid.crop(y=slice(5, 5))


def test_isotropic_encloses_and_is_made_of_cubes():
    grid = Grid((5, 30, 20), OBLIQUE, "mm")
    for align in ("first", "world"):
        made = Grid.isotropic(0.7, around=[grid, Grid((3, 3, 3), np.diag([9, 9, 9, 1]))], align=align)
        gram = made.affine[:3, :3].T @ made.affine[:3, :3]
        np.testing.assert_allclose(gram, 0.49 * np.eye(3), atol=1e-12)
        inside = made.world_to_index(grid.corners())
        assert (inside > -1e-6).all() and (inside < np.array(made.shape) - 0.5 + 1e-6).all()
        assert made.units == ("mm",) * 3
    # the rotated box is tighter than the one along the world axes
    assert Grid.isotropic(0.7, around=grid).size < Grid.isotropic(0.7, around=grid, align="world").size
    assert Grid.isotropic(around=Grid((2, 9, 9), np.diag([4, 2, 0.5, 1]))).spacing.tolist() == [0.5] * 3


def test_isotropic_keeps_flips():
    flipped = np.diag([-3.0, 1, -1, 1])
    grid = Grid.isotropic(1.0, around=Grid((3, 4, 5), flipped))
    np.testing.assert_array_equal(grid.affine, np.diag([-1.0, 1, -1, 1]))
    assert grid.shape == (7, 4, 5)


def test_isotropic_refuses_bad_input():
    with pytest.raises(ValueError, match="spacing"):
        Grid.isotropic(0.0, around=Grid((2, 2, 2)))
    with pytest.raises(ValueError, match="units"):
        Grid.isotropic(1.0, around=[Grid((2, 2, 2), units="mm"), Grid((2, 2, 2), units="um")])
    with pytest.raises(ValueError, match="around"):
        Grid.isotropic(1.0)


def test_check_memory_says_what_fits():
    grid = Grid((100, 200, 300), np.diag([2, 1, 1, 1]))
    need = 100 * 200 * 300 * 4 * 2 * 3
    assert grid.check_memory(2, 3, available=need) == need
    with pytest.raises(ValueError, match=str(need)) as caught:
        grid.check_memory(2, 3, available=need // 8)
    assert "(50, 100, 150)" in str(caught.value) and "spacing (4, 2, 2)" in str(caught.value)
    with pytest.raises(ValueError, match="no grid fits"):
        grid.check_memory(2, 3, available=5)
    with pytest.raises(ValueError, match=r"\(1, 1, 100\)"):
        Grid((1, 1, 1000)).check_memory(1, 1, available=400)


def test_check_memory_reads_the_system(monkeypatch):
    assert 0 < available_memory() < 2**50
    monkeypatch.setattr(grid_module, "available_memory", lambda: 100)
    with pytest.raises(ValueError, match="100 B is available"):
        Grid((10, 10, 10)).check_memory()
    assert (format_bytes(512), format_bytes(5 * 2**40)) == ("512 B", "5.0 TiB")


# ---------------------------------------------------------------- slices


def test_positions_are_sorted_and_in_world_units():
    geometry = SliceGeometry(np.diag([5.0, 1, 1, 1]), 3, [7.0, 1.0, 4.0])
    assert geometry.order.tolist() == [1, 2, 0]
    # positions count along the direction of column 0, not in steps of it
    np.testing.assert_allclose(geometry.to_world([7.0, 2, 3]), [7, 2, 3])
    np.testing.assert_allclose(geometry.from_world([7, 2, 3]), [7, 2, 3])
    np.testing.assert_allclose(geometry.index_affine @ [2, 0, 0, 1], [7, 0, 0, 1])


def test_tilted_stack_measures_gaps_along_the_normal():
    affine = np.eye(4)
    affine[:3, 0] = (3.0, 4.0, 0.0)  # step 5, only 3 of it across the slices
    geometry = SliceGeometry(affine, 4)
    np.testing.assert_allclose(geometry.positions, [0, 5, 10, 15])
    assert geometry.spacing == pytest.approx(3.0) and geometry.cosine == pytest.approx(0.6)
    np.testing.assert_allclose(geometry.normal, [1, 0, 0])
    np.testing.assert_allclose(geometry.to_world([5.0, 0, 0]), [3, 4, 0])
    grid = geometry.default_grid(6, 7)
    assert grid.shape == (10, 6, 7)
    np.testing.assert_allclose(grid.index_to_world([9, 2, 3]), geometry.to_world([15, 2, 3]))


def test_normal_points_to_increasing_positions():
    for signs in product((-1.0, 1.0), repeat=3):
        geometry = SliceGeometry(np.diag([*signs, 1.0]), 2)
        np.testing.assert_array_equal(geometry.normal, [signs[0], 0, 0])


@pytest.mark.parametrize(
    ("positions", "count", "step"),
    [
        (None, 17, 1.0),  # gap 4, pixel 1
        ([0, 4.02, 8.04, 12.06, 16.08], 17, 1.005),  # to 1 %
        ([0, 1, 5, 6, 13], 14, 1.0),  # missing slices
        ([0, 4, 12, 20, 24], 25, 1.0),
        ([0, 4.5, 9, 13.5, 18], 19, 1.0),  # no whole number of pixels: isotropic
        ([0, 0.5, 1, 1.5, 2], 5, 0.5),  # closer than pixels: all slices kept
        ([0, 0.01, 4, 8, 12], 13, 1.0),  # one close pair
    ],
)
def test_default_grid(positions, count, step):
    geometry = SliceGeometry(np.diag([4.0, 1, 1, 1]), 5, positions)
    grid = geometry.default_grid(8, 9)
    assert grid.shape == (count, 8, 9)
    assert grid.spacing[0] == pytest.approx(step, rel=1e-9)
    np.testing.assert_array_equal(grid.affine[:3, 1:3], geometry.affine[:3, 1:3])
    np.testing.assert_allclose(
        grid.index_to_world([count - 1, 0, 0]), geometry.to_world([geometry.positions[-1], 0, 0])
    )


def test_default_grid_of_an_oblique_stack_holds_the_slices():
    affine = OBLIQUE.copy()
    pixel = np.sqrt(np.prod(np.linalg.norm(OBLIQUE[:3, 1:3], axis=0)))
    affine[:3, 0] *= 4 * pixel / SliceGeometry(OBLIQUE, 2).spacing
    geometry = SliceGeometry(affine, 4)
    grid = geometry.default_grid(5, 5)
    index = grid.world_to_index(geometry.to_world(np.c_[geometry.positions, np.ones((4, 2))]))
    np.testing.assert_allclose(index[:, 0], [0, 4, 8, 12], atol=1e-9)
    np.testing.assert_allclose(index[:, 1:], 1, atol=1e-9)


@pytest.mark.parametrize(
    ("n", "positions", "match"),
    [
        (1, None, "at least 2"),
        (3, [0, 1], "positions: got shape"),
        (3, [0, np.inf, 1], "first at slice 1"),
        (4, [0, 3, 5, 3], "slices 1 and 3 are both at 3"),
        (2, ["a", "b"], "not numbers"),
    ],
)
def test_bad_positions(n, positions, match):
    with pytest.raises(ValueError, match=match):
        SliceGeometry(np.eye(4), n, positions)


def test_slice_geometry_pickles_and_is_frozen():
    geometry = SliceGeometry(OBLIQUE, 3, [4, 0, 9])
    copy = pickle.loads(pickle.dumps(geometry))
    np.testing.assert_array_equal(copy.frame_affine, geometry.frame_affine)
    np.testing.assert_array_equal(copy.order, [1, 0, 2])
    with pytest.raises(AttributeError):
        copy.positions = None


def test_plane_points_and_affine_agree():
    plane = SlicePlane((5, 1, 2), (0, 3, 4), (0, -4, 3), (4, 6), (0.5, 2.0), "mm")
    points = plane.points()
    assert points.shape == (4, 6, 3)
    np.testing.assert_allclose(
        points[3, 2], np.array([5, 1, 2]) + 1.5 * np.array([0, 0.6, 0.8]) + 4 * np.array([0, -0.8, 0.6])
    )
    np.testing.assert_allclose(plane.grid().index_to_world([0, 3, 2]), points[3, 2])
    assert pickle.loads(pickle.dumps(plane)).shape == (4, 6)


def test_plane_through_a_grid_covers_the_cut():
    grid = Grid((9, 11, 13), np.diag([2.0, 1, 1, 1]), "mm")
    flat = SlicePlane.through(grid, (1, 0, 0), (4.0, 5, 6))
    assert flat.shape == (11, 13)
    np.testing.assert_allclose(flat.points()[..., 0], 4.0)
    oblique = SlicePlane.through(grid, (1, 1, 0.5))
    index = grid.world_to_index(oblique.points().reshape(-1, 3))
    inside = ((index >= 0) & (index <= np.array(grid.shape) - 1)).all(axis=1)
    assert inside.sum() > 100
    # nothing of the cut is left out: one pixel further out lies outside the grid
    edge = np.zeros(oblique.shape, bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    assert inside.reshape(oblique.shape)[edge].mean() < 0.2
    with pytest.raises(ValueError, match="misses the grid"):
        SlicePlane.through(grid, (1, 0, 0), (99.0, 0, 0))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"row_axis": (0, 0, 0)}, "row_axis"),
        ({"row_axis": (0, 1, 1)}, "right angles"),
        ({"shape": (0, 2)}, "shape"),
        ({"spacing": -1.0}, "spacing"),
        ({"origin": (np.nan, 0, 0)}, "origin"),
    ],
)
def test_bad_planes(kwargs, match):
    good = {
        "origin": (0, 0, 0),
        "row_axis": (0, 1, 0),
        "col_axis": (0, 0, 1),
        "shape": (2, 2),
        "spacing": 1.0,
    }
    with pytest.raises(ValueError, match=match):
        SlicePlane(**{**good, **kwargs})


# ---------------------------------------------------------------- rotation


def test_quaternions_and_matrices_agree():
    rng = np.random.default_rng(2)
    q = normalise_quaternion(rng.normal(size=(200, 4)))
    np.testing.assert_allclose(matrix_to_quaternion(quaternion_to_matrix(q)), q, atol=1e-12)
    # half turns, where the usual formula divides by zero
    half = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0.6, -0.8, 0.0]])
    back = matrix_to_quaternion(quaternion_to_matrix(half))
    np.testing.assert_allclose(quaternion_to_matrix(back), quaternion_to_matrix(half), atol=1e-12)


def test_rotation_sense_and_product():
    quarter = [np.sqrt(0.5), np.sqrt(0.5), 0, 0]
    np.testing.assert_allclose(quaternion_to_matrix(quarter) @ [0, 1, 0], [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(
        rotation_vector_to_matrix([np.pi / 2, 0, 0]), quaternion_to_matrix(quarter), atol=1e-12
    )
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 5, 4))
    np.testing.assert_allclose(
        quaternion_to_matrix(multiply_quaternions(a, b)),
        quaternion_to_matrix(a) @ quaternion_to_matrix(b),
        atol=1e-12,
    )


def test_reversed_quaternion_is_the_same_rotation_in_xyz():
    rng = np.random.default_rng(4)
    q, v = rng.normal(size=4), rng.normal(size=3)
    turned = quaternion_to_matrix(q) @ v
    np.testing.assert_allclose(
        quaternion_to_matrix(reverse_quaternion(q)) @ v[::-1], turned[::-1], atol=1e-12
    )


def test_bad_rotations():
    with pytest.raises(ValueError, match="length 0"):
        normalise_quaternion([0, 0, 0, 0])
    with pytest.raises(ValueError, match="not a rotation"):
        matrix_to_quaternion(np.diag([1, 1, -1]))
    with pytest.raises(ValueError, match="shape"):
        quaternion_to_matrix([1, 0, 0])
