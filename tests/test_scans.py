import builtins
import doctest
import io
import json
import os
import pickle
import sys
from collections import OrderedDict

import ellipsoids
import numpy as np
import pytest
import tifffile

from napari_innergs import scan as scan_module
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.xray import ConeBeam, ParallelBeam, XrayGeometry
from napari_innergs.io import _scan_formats, scans
from napari_innergs.io.scans import geometry_from_dict, read_scan
from napari_innergs.scan import Scan

ANGLES = np.linspace(0, 2 * np.pi, 6, endpoint=False)
ABOUT = {
    "mode": "cone",
    "DSO": 200.0,
    "DSD": 300.0,
    "nDetector": [12, 16],
    "dDetector": [5.0, 6.0],
    "offDetector": [2.0, -3.0],
    "nVoxel": [8, 10, 12],
    "dVoxel": [4.0, 3.0, 2.0],
    "offOrigin": [1.0, 2.0, 3.0],
    "units": "mm; and more",
}
GEOMETRY = ConeBeam.circular(
    ANGLES,
    source_origin=200,
    source_detector=300,
    detector_shape=(12, 16),
    pixel_size=(5, 6),
    detector_offset=(2, -3),
    units="mm",
)


@pytest.fixture
def projections():
    return ellipsoids.project(GEOMETRY).astype(np.float32)


@pytest.fixture
def pair(tmp_path, projections):
    about = {**ABOUT, "angles_rad": ANGLES.tolist(), "note": "made up"}
    (tmp_path / "a.json").write_text(json.dumps(about))
    np.savez(tmp_path / "a.npz", proj=projections, proj_noisy=projections + 1, angles_rad=ANGLES)
    return tmp_path / "a.json"


@pytest.mark.parametrize("module", [scan_module, scans, _scan_formats])
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------- Scan


def test_a_scan_keeps_what_it_was_given(projections):
    grid = Grid((4, 4, 4))
    scan = Scan(projections, GEOMETRY, grid, arrays=["proj"], name="body", metadata={"note": 1})
    assert scan.projections is not projections and np.shares_memory(scan.projections, projections)
    assert not scan.is_counts and scan.grid is grid and scan.arrays == ("proj",)
    assert scan.n_views == len(scan) == 6 and "line integrals" in repr(scan)
    with pytest.raises(ValueError, match="read-only"):
        scan.projections[0] = 0
    with pytest.raises(AttributeError, match="immutable"):
        scan.name = "b"
    projections[0, 0, 0] += 0  # the caller's array stays writable
    part = scan.subset([4, 1])
    np.testing.assert_array_equal(part.projections, projections[[4, 1]])
    np.testing.assert_array_equal(part.geometry.angles, ANGLES[[4, 1]])
    moved = scan.with_geometry(GEOMETRY.with_offset(1, 0))
    assert moved.geometry != scan.geometry and moved.name == "body"


def test_counts_carry_their_fields():
    counts = np.full((6, 12, 16), 500, np.uint16)
    scan = Scan(counts, GEOMETRY, i0=np.arange(1, 7), flat=np.ones((12, 16)), dark=np.zeros((3, 12, 16)))
    assert scan.is_counts and scan.flat.shape == (1, 12, 16) and scan.dark.shape == (3, 12, 16)
    np.testing.assert_array_equal(scan.subset([5, 0]).i0, [6, 1])
    assert Scan(counts, GEOMETRY, i0=1000).i0 == 1000.0


def test_a_mask_allows_nan(projections):
    projections[2, 3, 4] = np.nan
    with pytest.raises(ValueError, match=r"1 pixel values are NaN.*view 2, row 3, column 4"):
        Scan(projections, GEOMETRY)
    mask = np.ones((12, 16), bool)
    mask[3, 4] = False
    scan = Scan(projections, GEOMETRY, mask=mask)
    assert scan.mask.shape == (6, 12, 16) and scan.subset([2]).mask.sum() == 12 * 16 - 1


@pytest.mark.parametrize(
    ("values", "options", "match"),
    [
        (np.zeros((12, 6, 16)), {}, r"axes seem to be \[v, n, u\].*transpose\(projections, \(1, 0, 2\)\)"),
        (np.zeros((12, 16, 6)), {}, r"\[v, u, n\].*\(2, 0, 1\)"),
        (np.zeros((7, 12, 16)), {}, "got 7 views, the geometry has 6"),
        (np.zeros((6, 12, 15)), {}, r"need \(6, 12, 16\)"),
        (np.zeros((6, 12)), {}, "projections"),
        (np.zeros((6, 12, 16), int), {}, "without a blank scan"),
        (np.full((6, 12, 16), 1e30), {"i0": 1e30}, "values reach"),
        (np.full((6, 12, 16), 40000.0), {}, "for counts give the blank scan"),
        (np.full((6, 12, 16), 40000.0), {"mask": np.ones((12, 16), bool)}, "for counts give the blank scan"),
        (np.zeros((6, 12, 16)), {"dark": np.zeros((12, 16))}, "without flat"),
        (np.zeros((6, 12, 16)), {"i0": 0}, "i0.*positive"),
        (np.zeros((6, 12, 16)), {"i0": [1, 2]}, "i0"),
        (np.zeros((6, 12, 16)), {"i0": "x"}, "i0"),
        (np.zeros((6, 12, 16)), {"flat": np.ones((16, 12))}, "flat.*size of the panel"),
        (np.zeros((6, 12, 16)), {"mask": np.zeros((12, 16), bool)}, "no pixel"),
        (np.zeros((6, 12, 16)), {"mask": np.ones((12, 16))}, "booleans"),
    ],
)
def test_what_does_not_fit_is_refused(values, options, match):
    with pytest.raises(ValueError, match=match):
        Scan(values, GEOMETRY, **options)


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="XrayGeometry"):
        Scan(np.zeros((6, 12, 16)), ABOUT)
    with pytest.raises(TypeError, match="complex"):
        Scan(np.zeros((6, 12, 16), complex), GEOMETRY)
    with pytest.raises(TypeError, match="grid"):
        Scan(np.zeros((6, 12, 16)), GEOMETRY, (8, 8, 8))


# ---------------------------------------------------------------- descriptions


def test_a_description_gives_geometry_and_grid():
    geometry, grid = geometry_from_dict(ABOUT, ANGLES)
    assert geometry == GEOMETRY
    assert grid.shape == (8, 10, 12) and grid.units == ("mm",) * 3
    np.testing.assert_allclose(grid.index_to_world([3.5, 4.5, 5.5]), (1, 2, 3))
    widths = {key: value for key, value in ABOUT.items() if key not in ("dDetector", "dVoxel")}
    widths.update(sDetector=[60.0, 96.0], sVoxel=[32.0, 30.0, 24.0])
    assert geometry_from_dict(widths, ANGLES) == (geometry, grid)

    class Described:
        def __init__(self):
            self.__dict__.update(ABOUT, angles=ANGLES)

    assert geometry_from_dict(Described())[0] == GEOMETRY
    # the axis displaced along u: source and panel move together
    shifted = geometry_from_dict({**ABOUT, "COR": 4.0}, ANGLES)[0]
    np.testing.assert_allclose(shifted.source - GEOMETRY.source, 4 * GEOMETRY.u / 6, atol=1e-12)
    np.testing.assert_allclose(shifted.center - GEOMETRY.center, 4 * GEOMETRY.u / 6, atol=1e-12)
    parallel = geometry_from_dict({**ABOUT, "mode": "parallel"}, ANGLES)[0]
    assert isinstance(parallel, ParallelBeam) and parallel.pixel_size == (5.0, 6.0)
    vectors = geometry_from_dict({"vectors": GEOMETRY.vectors.tolist(), "nDetector": [12, 16]})[0]
    np.testing.assert_array_equal(vectors.vectors, GEOMETRY.vectors)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"DSO": None}, "'DSO' is missing"),
        ({"DSO": "far"}, "'DSO' is 'far'"),
        ({"DSD": 100}, "exchanged"),
        ({"nDetector": [12, 16.5]}, "nDetector.*whole"),
        ({"nDetector": [12, 16, 3]}, "nDetector"),
        ({"dDetector": [5, -6]}, "pixel_size"),
        ({"dVoxel": [0, 1, 1]}, "voxels"),
        ({"mode": "spiral"}, "mode"),
        ({"rotDetector": [0.1, 0, 0]}, "rotDetector"),
        ({"angles": np.arange(0, 360, 60)}, "look like degrees"),
        ({"angles": None}, "angles_rad.*missing"),
        ({"nVoxel": [1e30, 1, 1]}, "nVoxel"),
        ({"COR": 10**400}, "'COR' is too large"),
    ],
)
def test_wrong_descriptions_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        geometry_from_dict({**ABOUT, "angles": ANGLES, **changes})
    with pytest.raises(ValueError, match="dictionary"):
        geometry_from_dict(3)


# ---------------------------------------------------------------- JSON and NPZ


def test_json_and_npz(pair, projections):
    for path in (pair, pair.with_suffix(".npz")):
        scan = read_scan(path)
        assert scan.geometry == GEOMETRY and scan.name == "a" and scan.metadata["note"] == "made up"
        np.testing.assert_array_equal(scan.projections, projections)
        assert scan.arrays == ("angles_rad", "proj", "proj_noisy")
        assert scan.grid.shape == (8, 10, 12)
    np.testing.assert_array_equal(read_scan(pair, "proj_noisy").projections, projections + 1)
    other = GEOMETRY.with_offset(1, 0)
    assert read_scan(pair, geometry=other).geometry == other
    assert read_scan(pair, i0=1e5).is_counts
    with pytest.raises(ValueError, match=r"no array 'x'.*proj_noisy"):
        read_scan(pair, "x")


def test_counts_with_fields_and_degrees_beside_them(tmp_path):
    counts = np.full((4, 2, 20), 300, np.uint16)
    arrays = {"data": counts, "data_white": counts[:3] + 500, "data_dark": counts[:2] - 290}
    np.savez(tmp_path / "t.npz", theta=[0.0, 45, 90, 135], **arrays)
    (tmp_path / "t.json").write_text(json.dumps({"geometry": {"type": "parallel beam"}, "licence": "x"}))
    scan = read_scan(tmp_path / "t.json")
    assert scan.geometry == ParallelBeam.circular(np.deg2rad([0, 45, 90, 135]), detector_shape=(2, 20))
    assert scan.is_counts and scan.flat.shape == (3, 2, 20) and scan.dark.shape == (2, 2, 20)
    assert scan.metadata["licence"] == "x" and scan.grid is None


def test_arrays_alone_need_a_geometry(tmp_path, projections):
    np.save(tmp_path / "a.npy", projections)
    with pytest.raises(ValueError, match=r"geometry=.*DSO"):
        read_scan(tmp_path / "a.npy")
    assert read_scan(tmp_path / "a.npy", geometry=GEOMETRY).geometry == GEOMETRY
    assert read_scan(tmp_path / "a.npy", geometry={**ABOUT, "angles_rad": ANGLES}).geometry == GEOMETRY
    with pytest.raises(ValueError, match="only RTK"):
        read_scan(tmp_path / "a.npy", pixel_size=2)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "damaged JSON"),
        ("[1, 2]", "JSON object"),
        ("[" * 100000, "damaged JSON"),
        ("\xff\xfe", "no text"),
        (json.dumps({**ABOUT, "angles_rad": [0.0, 1.0]}), "got 6 views, the geometry has 2"),
        (json.dumps({**ABOUT, "angles_rad": [0, 60, 120, 180, 240, 300]}), "look like degrees"),
        (json.dumps({**ABOUT, "angles_rad": [float("nan")] * 6}), "NaN"),
        (json.dumps({**ABOUT, "nDetector": [16, 12], "angles_rad": ANGLES.tolist()}), "axes seem to be"),
        (json.dumps({"hello": 1}), "no description"),
        (json.dumps({**ABOUT, "angles_rad": [10**400] * 6}), "too large"),
        (json.dumps({**ABOUT, "vectors": [[10**400] * 12] * 6}), "too large"),
    ],
)
def test_wrong_json_gives_a_sentence_with_the_file(pair, text, match):
    pair.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=match) as caught:
        read_scan(pair)
    assert "a.json" in str(caught.value)


def test_errors_name_files_of_relative_paths_but_not_wrong_arguments(pair, monkeypatch):
    monkeypatch.chdir(pair.parent)
    with pytest.raises(ValueError, match=r"mask.*no pixel is trusted") as caught:
        read_scan("a.json", mask=np.zeros((12, 16), bool))
    assert "a.json" not in str(caught.value)
    pair.write_text(json.dumps({**ABOUT, "dDetector": [0, 1], "angles_rad": ANGLES.tolist()}))
    with pytest.raises(ValueError, match=r"pixel_size.*\(file 'a\.json'\)"):
        read_scan("a.json")
    whole = pair.with_suffix(".npz").read_bytes()
    pair.with_suffix(".npz").write_bytes(whole[:200] + whole[250:])
    with pytest.raises(ValueError, match=r"path.*a\.npz"):
        read_scan("a.json")


def test_missing_and_hostile_arrays(pair, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    np.savez(tmp_path / "a.npz", proj=np.array([Harm()], dtype=object))
    with pytest.raises(ValueError, match="Python objects"):
        read_scan(pair)
    (tmp_path / "a.npz").unlink()
    with pytest.raises(ValueError, match=r"'a\.npz' beside it"):
        read_scan(pair)
    with pytest.raises(ValueError, match="no file"):
        read_scan(tmp_path / "nothing.json")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="no known kind"):
        read_scan(tmp_path / "a.txt")
    assert not (tmp_path / "harm").exists()


# ---------------------------------------------------------------- R2-Gaussian and NAF

SCANNER = {
    **{key: ABOUT[key] for key in ("mode", "DSO", "DSD", "nDetector")},
    "sDetector": [60.0, 96.0],
    "offDetector": [-3.0, 2.0],
    "nVoxel": [12, 10, 8],
    "sVoxel": [24.0, 30.0, 32.0],
    "offOrigin": [3.0, 2.0, 1.0],
}


def write_r2(folder, projections, **changes):
    (folder / "proj_train").mkdir(exist_ok=True)
    entries = []
    for i, (image, angle) in enumerate(zip(projections[:, ::-1], ANGLES, strict=True)):
        np.save(folder / "proj_train" / f"{i:04d}.npy", image)
        entries.append({"file_path": f"proj_train/{i:04d}.npy", "angle": float(angle)})
    about = {"scanner": SCANNER, "vol": "v.npy", "proj_train": entries, "proj_test": entries[:2], **changes}
    (folder / "meta_data.json").write_text(json.dumps(about))
    return about


def same_scan(scan, projections, units):
    np.testing.assert_array_equal(scan.projections, projections)
    np.testing.assert_allclose(scan.geometry.vectors, GEOMETRY.vectors)
    assert scan.geometry.units == units
    assert scan.grid.shape == (8, 10, 12)
    np.testing.assert_allclose(scan.grid.spacing, (4, 3, 2))
    np.testing.assert_allclose(scan.grid.index_to_world([3.5, 4.5, 5.5]), (1, 2, 3))


def test_r2_gaussian(tmp_path, projections):
    write_r2(tmp_path, projections)
    for path in (tmp_path, tmp_path / "meta_data.json"):
        same_scan(read_scan(path), projections, None)
    assert read_scan(tmp_path, "proj_test").n_views == 2
    assert read_scan(tmp_path).arrays == ("proj_train", "proj_test")
    with pytest.raises(ValueError, match="no views 'proj'"):
        read_scan(tmp_path, "proj")


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        ({"file_path": "../secret.npy", "angle": 0}, "in its folder"),
        ({"file_path": "/etc/passwd", "angle": 0}, "in its folder"),
        ({"file_path": "proj_train/none.npy", "angle": 0}, "no file"),
        ({"file_path": 3, "angle": 0}, "lacks"),
        ({"file_path": "proj_train/0000.npy"}, "lacks"),
        ({"file_path": "x" * 5000 + ".npy", "angle": 0}, "too long"),
        ({"file_path": "proj_train/0000.npy", "angle": 10**400}, "too large"),
        ("x", "lacks"),
    ],
)
def test_r2_gaussian_stays_in_its_folder(tmp_path, projections, entry, match):
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(tmp_path / "secret.npy", projections[0])
    write_r2(folder, projections, proj_train=[entry])
    with pytest.raises(ValueError, match=match):
        read_scan(folder)


def naf(projections, **changes):
    mm = {**ABOUT, "nDetector": [12, 16], "offDetector": [-3.0, 2.0]}
    mm.update(nVoxel=[12, 10, 8], dVoxel=[2.0, 3.0, 4.0], offOrigin=[3.0, 2.0, 1.0])
    views = {"projections": projections[:, ::-1], "angles": ANGLES}
    return {
        **mm,
        "train": views,
        "val": {**views, "angles": list(ANGLES)},
        "numTrain": np.int64(6),
        **changes,
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_naf_pickles_of_every_protocol(tmp_path, projections, protocol):
    path = tmp_path / "a.pickle"
    table = naf(projections, image=np.asfortranarray(np.ones((2, 3))), big=np.arange(3, dtype=">f8"))
    path.write_bytes(pickle.dumps(OrderedDict(table), protocol))
    same_scan(read_scan(path), projections, ("mm",) * 3)
    same_scan(read_scan(path, "val"), projections, ("mm",) * 3)
    plain = _scan_formats.load_plain(path)
    np.testing.assert_array_equal(_scan_formats.as_array(plain["image"], "image"), np.ones((2, 3)))
    np.testing.assert_array_equal(_scan_formats.as_array(plain["big"], "big"), [0, 1, 2])
    assert plain["numTrain"] == 6


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_no_pickle_runs_code(tmp_path, projections, monkeypatch):
    mark = tmp_path / "harm"
    code = f"open({str(mark)!r}, 'w')"
    found = []
    for value in (
        Call(os.mkdir, str(mark)),
        Call(builtins.eval, code),
        Call(builtins.exec, code),
        Call(builtins.getattr, os, "system"),
        Call(np.load, str(mark)),
        Call(io.open, str(mark), "w"),
        np.array([Call(os.mkdir, str(mark))], dtype=object),
        Call(np._core.multiarray._reconstruct, Call, (0,), b"b"),
    ):
        for place in ({"x": value}, naf(projections, train={"projections": value, "angles": ANGLES})):
            path = tmp_path / "a.pickle"
            try:
                path.write_bytes(pickle.dumps(place))
            except (pickle.PicklingError, TypeError):
                continue
            with pytest.raises(ValueError, match=r"pickle.*a\.pickle.*can not be read"):
                read_scan(path)
            found.append(value)
    assert len(found) >= 12 and not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x04cnumpy\ndtype.__class__\n.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
        b"cnumpy\ndtype\n(S'f8'\nI0\nI1\ntR(I3\nS'?'\ntb.",
        b"\x80\x04\x8c",
        b"garbage",
        b"I1\n.",
        b"(" * 100,
        # a memo of three hundred million objects
        b"\x80\x02}r\x00\xa3\xe1\x11.",
        b"}p300000000\n.",
    ],
)
def test_damaged_pickles(tmp_path, text):
    (tmp_path / "a.pkl").write_bytes(text)
    with pytest.raises(ValueError, match=r"pickle.*a\.pkl"):
        read_scan(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train": 3}, "no views 'train'"),
        ({"train": {"angles": ANGLES}}, "lacks 'projections'"),
        ({"train": {"angles": ANGLES, "projections": np.zeros((6, 12))}}, "three axes"),
        ({"train": {"angles": ANGLES[:3], "projections": np.zeros((6, 12, 16))}}, "got 6 views"),
        ({"train": {"angles": "many", "projections": np.zeros((6, 12, 16))}}, "angles: got str"),
        ({"DSO": "x"}, "DSO: got str"),
        ({"DSO": 10**400}, "too large"),
    ],
)
def test_wrong_naf(tmp_path, projections, changes, match):
    (tmp_path / "a.pickle").write_bytes(pickle.dumps(naf(projections, **changes)))
    with pytest.raises(ValueError, match=match):
        read_scan(tmp_path / "a.pickle")


def test_an_array_that_announces_more_than_it_has(tmp_path, projections):
    text = pickle.dumps({"train": {"projections": np.zeros((3, 5, 7)), "angles": ANGLES}}, 2)
    (tmp_path / "a.pickle").write_bytes(text.replace(b"K\x03K\x05K\x07", b"K\x7fK\x7fK\x7f"))
    with pytest.raises(ValueError, match="another number of bytes"):
        read_scan(tmp_path / "a.pickle")


# ---------------------------------------------------------------- RTK

RTK_HEAD = '<?xml version="1.0"?>\n<!DOCTYPE RTKGEOMETRY>\n<RTKThreeDCircularGeometry version="3">\n'
RTK_VIEW = """<SourceToIsocenterDistance>1000</SourceToIsocenterDistance>
<SourceToDetectorDistance>1536</SourceToDetectorDistance>
<Projection><GantryAngle>271.847274780273</GantryAngle>
<ProjectionOffsetX>-117.056503295898</ProjectionOffsetX><ProjectionOffsetY>-1.01195001602173</ProjectionOffsetY>
</Projection>
<Projection><GantryAngle>20</GantryAngle><OutOfPlaneAngle>5</OutOfPlaneAngle><InPlaneAngle>-8</InPlaneAngle>
<SourceOffsetX>3</SourceOffsetX><SourceOffsetY>-4</SourceOffsetY></Projection>
"""
RTK_TAIL = "</RTKThreeDCircularGeometry>\n"


def rtk_matrix(gantry, out_of_plane, in_plane, source, distance, offset):
    """Projection matrix of RTK's documentation: world (x, y, z) of RTK to panel coordinates."""
    g, o, i = np.deg2rad([-gantry, -out_of_plane, -in_plane])
    turn = (
        np.array([[np.cos(i), -np.sin(i), 0], [np.sin(i), np.cos(i), 0], [0, 0, 1]])
        @ np.array([[1, 0, 0], [0, np.cos(o), -np.sin(o)], [0, np.sin(o), np.cos(o)]])
        @ np.array([[np.cos(g), 0, np.sin(g)], [0, 1, 0], [-np.sin(g), 0, np.cos(g)]])
    )
    shift = np.array([[1, 0, source[0] - offset[0]], [0, 1, source[1] - offset[1]], [0, 0, 1]])
    pinhole = np.array([[-distance, 0, 0, 0], [0, -distance, 0, 0], [0, 0, 1, -source[2]]])
    back = np.eye(4)
    back[:2, 3] = -source[0], -source[1]
    whole = np.eye(4)
    whole[:3, :3] = turn
    return shift @ pinhole @ back @ whole


def test_rtk_projects_as_its_own_matrix_does(tmp_path):
    path = tmp_path / "g.xml"
    path.write_text(RTK_HEAD + "<!-- a comment -->" + RTK_VIEW + RTK_TAIL)
    scan = read_scan(path, projections=np.zeros((2, 20, 30)), pixel_size=(2.0, 3.0))
    assert scan.geometry.detector_shape == (20, 30) and scan.geometry.kind == "cone"
    world = np.array([[1.0, 20.0, -30.0], [-5.0, 8.0, 60.0]])
    seen = scan.geometry.project(world)
    matrices = [
        rtk_matrix(271.847274780273, 0, 0, (0, 0, 1000), 1536, (-117.056503295898, -1.01195001602173)),
        rtk_matrix(20, 5, -8, (3, -4, 1000), 1536, (0, 0)),
    ]
    # numbers of the documentation's example
    np.testing.assert_allclose(matrices[0][2], [-0.999480303105996, 0, 0.0322354417240802, -1000], rtol=1e-9)
    np.testing.assert_allclose(matrices[0][0, 3], 117.056503295898 * -1000, rtol=1e-9)
    for matrix, pixels in zip(matrices, seen, strict=True):
        # RTK's (x, y, z) is our (y, z, x)
        points = np.concatenate([world[:, [1, 0, 2]], np.ones((2, 1))], axis=1)
        u, v, w = matrix @ points.T
        np.testing.assert_allclose(pixels[:, 1], u / w / 3 + 14.5, atol=1e-6)
        np.testing.assert_allclose(pixels[:, 0], v / w / 2 + 9.5, atol=1e-6)


def test_rtk_circle_is_ours_and_files_may_hold_the_views(tmp_path, projections):
    views = "".join(f"<Projection><GantryAngle>{a}</GantryAngle></Projection>" for a in np.rad2deg(ANGLES))
    path = tmp_path / "g.xml"
    path.write_text(
        RTK_HEAD
        + "<SourceToIsocenterDistance>200</SourceToIsocenterDistance>"
        + "<SourceToDetectorDistance>300</SourceToDetectorDistance>"
        + "<ProjectionOffsetX>-3</ProjectionOffsetX><ProjectionOffsetY>2</ProjectionOffsetY>"
        + views
        + RTK_TAIL
    )
    np.save(tmp_path / "p.npy", projections)
    scan = read_scan(path, projections=tmp_path / "p.npy", pixel_size=(5, 6))
    np.testing.assert_allclose(scan.geometry.vectors, GEOMETRY.vectors, atol=1e-9)
    np.testing.assert_allclose(scan.geometry.angles, ANGLES)
    path.write_text(RTK_HEAD + views + RTK_TAIL)
    parallel = read_scan(path, projections=projections, pixel_size=(5, 6)).geometry
    expected = ParallelBeam.circular(ANGLES, detector_shape=(12, 16), pixel_size=(5, 6))
    np.testing.assert_allclose(parallel.vectors, expected.vectors, atol=1e-9)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><RTKThreeDCircularGeometry/>', "refused"),
        ('<!DOCTYPE a SYSTEM "http://x/y"><RTKThreeDCircularGeometry/>', "refused"),
        # no comment, but two instructions and what is between them
        ('<?a <!-- ?><!DOCTYPE a [<!ENTITY b "c">]><?a --> ?><RTKThreeDCircularGeometry/>', "refused"),
        ("<!DOCTYPE a><!DOCTYPE a><RTKThreeDCircularGeometry/>", "refused"),
        (RTK_HEAD + "<Projection>", "damaged XML"),
        (RTK_HEAD + RTK_TAIL, "no projections"),
        ("<html/>", "root 'html'"),
        (
            RTK_HEAD + "<Projection><GantryAngle>x</GantryAngle></Projection>" + RTK_TAIL,
            "GantryAngle.*number",
        ),
        (RTK_HEAD + "<Projection><GantryAngle>inf</GantryAngle></Projection>" + RTK_TAIL, "finite"),
        (
            RTK_HEAD + "<RadiusCylindricalDetector>5</RadiusCylindricalDetector><Projection/>" + RTK_TAIL,
            "curved",
        ),
        (
            RTK_HEAD + "<SourceToDetectorDistance>-5</SourceToDetectorDistance><Projection/>" + RTK_TAIL,
            "not positive",
        ),
        (RTK_HEAD + RTK_VIEW + RTK_TAIL, "got 6 views, the geometry has 2"),
    ],
)
def test_wrong_xml(tmp_path, projections, text, match):
    path = tmp_path / "g.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=match) as caught:
        read_scan(path, projections=projections, pixel_size=2)
    assert "g.xml" in str(caught.value)


def test_rtk_needs_views_and_a_pixel_size(tmp_path, projections):
    path = tmp_path / "g.xml"
    path.write_text(RTK_HEAD + RTK_VIEW + RTK_TAIL)
    for options in ({}, {"projections": projections}, {"pixel_size": 2}):
        with pytest.raises(ValueError, match="only the geometry"):
            read_scan(path, **options)
    with pytest.raises(ValueError, match="pixel_size"):
        read_scan(path, projections=projections, pixel_size=-1)


# ---------------------------------------------------------------- Nikon, TIFF, HDF5

XTEKCT = """[XTekCT]
Name=thing
SrcToObject=200.0
SrcToDetector=300.0
DetectorPixelsX=16
DetectorPixelsY=12
DetectorPixelSizeX=6.0
DetectorPixelSizeY=5.0
Projections=6
InitialAngle=0
AngularStep=60
CentreOfRotationTop={0}
CentreOfRotationBottom={0}
WhiteLevel=60000
Comment=100%% sure
[CTPro]
Name=other
"""


def write_nikon(folder, images, centre=0.0):
    (folder / "thing.xtekct").write_text(XTEKCT.format(centre))
    for i, image in enumerate(images):
        tifffile.imwrite(folder / f"thing_{i + 1}.tif", image)
    return folder / "thing.xtekct"


def test_nikon(tmp_path):
    geometry = ConeBeam.circular(
        ANGLES,
        source_origin=200,
        source_detector=300,
        detector_shape=(12, 16),
        pixel_size=(5, 6),
        detector_offset=(0, 2.0),
        source_offset=(0, 2.0),
    )
    counts = (60000 * np.exp(-ellipsoids.project(geometry))).astype(np.uint16)
    # on disk as seen from behind the panel, row 0 on top
    scan = read_scan(write_nikon(tmp_path, counts[:, ::-1, ::-1], centre=3.0))
    np.testing.assert_array_equal(scan.projections, counts)
    np.testing.assert_allclose(scan.geometry.vectors, geometry.vectors, atol=1e-9)
    assert scan.i0 == 60000 and scan.geometry.units == ("mm",) * 3 and scan.name == "thing"
    assert scan.geometry.check_covers(scan.grid) is None


def test_wrong_nikon(tmp_path):
    path = write_nikon(tmp_path, np.ones((5, 12, 16), np.uint16))
    with pytest.raises(ValueError, match=r"got 5 images.*says 6"):
        read_scan(path)
    good = path.read_text()
    for old, new, match in (
        ("[XTekCT]", "[Other]", "no XTekCT"),
        ("SrcToObject=200.0", "", "srctoobject.*missing"),
        ("SrcToObject=200.0", "SrcToObject=near", "srctoobject.*near"),
        ("Projections=6", "Projections=1e99", "projections"),
        ("Projections=6", "Projections=2e9", "got 5 images"),
        ("SrcToDetector=", "SrcToDetector=0\nOther=", "SrcToDetector.*positive"),
        ("AngularStep=60", "ObjectTilt=3\nAngularStep=60", "tilted"),
    ):
        path.write_text(good.replace(old, new))
        with pytest.raises(ValueError, match=match) as caught:
            read_scan(path)
        assert "thing.xtekct" in str(caught.value)
    # a folder outside is not looked into
    (tmp_path / "in").mkdir()
    inner = write_nikon(tmp_path / "in", np.ones((6, 12, 16), np.uint16))
    inner.write_text(good.replace("Name=thing", "Name=thing\nInputFolderName=../", 1))
    assert read_scan(inner).n_views == 6


def test_tiff_stacks_and_folders(tmp_path, projections):
    tifffile.imwrite(tmp_path / "s.tif", projections)
    scan = read_scan(tmp_path / "s.tif", geometry={**ABOUT, "angles_rad": ANGLES})
    np.testing.assert_array_equal(scan.projections, projections)
    assert scan.geometry == GEOMETRY and scan.grid.shape == (8, 10, 12)
    folder = tmp_path / "views"
    folder.mkdir()
    many = np.stack([np.full((12, 16), i, np.float32) for i in range(12)])
    for i, image in enumerate(many):
        tifffile.imwrite(folder / f"p{i}.tif", image)
    geometry = GEOMETRY.subset(np.arange(12) % 6)
    # p2 comes before p10
    np.testing.assert_array_equal(read_scan(folder, geometry=geometry).projections, many)
    with pytest.raises(ValueError, match="need geometry="):
        read_scan(folder)
    tifffile.imwrite(folder / "p5.tif", np.zeros((3, 3), np.float32))
    with pytest.raises(ValueError, match=r"p5\.tif.*one kind"):
        read_scan(folder, geometry=geometry)
    (folder / "p5.tif").write_bytes(b"II*\0 nothing")
    with pytest.raises(ValueError, match=r"p5\.tif"):
        read_scan(folder, geometry=geometry)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no TIFF files"):
        read_scan(tmp_path / "none", geometry=geometry)


def test_hdf5_without_h5py_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "a.h5").write_bytes(b"x")
    with pytest.raises(ImportError, match="pip install h5py"):
        read_scan(tmp_path / "a.h5")


def test_dxchange(tmp_path):
    h5py = pytest.importorskip("h5py")
    counts = np.arange(4 * 2 * 20, dtype=np.uint16).reshape(4, 2, 20) + 100

    def write(**arrays):
        with h5py.File(tmp_path / "a.h5", "w") as store:
            for name, value in arrays.items():
                store[f"exchange/{name}"] = value

    good = {
        "data": counts,
        "data_white": counts[:1] + 500,
        "data_dark": counts[:1] * 0,
        "theta": [0, 45, 90, 135],
    }
    write(**good)
    scan = read_scan(tmp_path / "a.h5")
    np.testing.assert_array_equal(scan.projections, counts)
    assert scan.geometry == ParallelBeam.circular(np.deg2rad([0, 45, 90, 135]), detector_shape=(2, 20))
    assert scan.flat.shape == scan.dark.shape == (1, 2, 20)
    about = {"DSO": 5, "DSD": 9, "nDetector": [2, 20], "dDetector": [1, 1]}
    assert isinstance(read_scan(tmp_path / "a.h5", geometry=about).geometry, ConeBeam)
    with pytest.raises(ValueError, match="no array 'x'"):
        read_scan(tmp_path / "a.h5", "x")
    for link in (h5py.ExternalLink("/etc/passwd", "/x"), h5py.SoftLink("/exchange/theta")):
        write(**{**good, "data": link})
        with pytest.raises(ValueError, match="link, which is refused"):
            read_scan(tmp_path / "a.h5")
    write(data="text")
    with pytest.raises(ValueError, match="no array of numbers"):
        read_scan(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "w") as store:
        store["other"] = 1
    with pytest.raises(ValueError, match="exchange"):
        read_scan(tmp_path / "a.h5")
    (tmp_path / "a.h5").write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match="damaged HDF5"):
        read_scan(tmp_path / "a.h5")


def test_any_trajectory(tmp_path, projections):
    table = {"nDetector": [12, 16], "vectors": GEOMETRY.vectors.tolist()}
    np.savez(tmp_path / "a.npz", proj=projections)
    (tmp_path / "a.json").write_text(json.dumps(table))
    scan = read_scan(tmp_path / "a.json")
    assert type(scan.geometry) is XrayGeometry
    np.testing.assert_array_equal(scan.geometry.vectors, GEOMETRY.vectors)
