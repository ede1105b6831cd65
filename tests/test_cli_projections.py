"""``innergs projections``: results, files, one line for bad input, interruption."""

import json

import numpy as np
import pytest
from cli_tools import error_line, interrupt_at_previews

import napari_innergs as igs
from napari_innergs.cli import main
from napari_innergs.geometry.xray import ConeBeam
from napari_innergs.io.read import read_stack

FAST = [
    *("--preset", "fast", "--set", "tv_weight=0.0005", "--set", "tv_passes=10"),
    *("--set", "volume_steps=2", "--set", "view_steps=2"),
]
RADIUS, VALUE = 4.0, 0.05


def ball(geometry):
    """Line integrals of a ball around the origin, in closed form."""
    rows, cols = (np.arange(n) - 0.5 * (n - 1) for n in geometry.detector_shape)
    pixels = geometry.center[:, None, None] + rows[:, None, None] * geometry.v[:, None, None]
    pixels = pixels + cols[:, None] * geometry.u[:, None, None]
    ray = pixels - geometry.source[:, None, None]
    ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
    apart = np.linalg.norm(np.cross(pixels, ray), axis=-1)
    return 2 * VALUE * np.sqrt(np.maximum(RADIUS**2 - apart**2, 0))


@pytest.fixture
def scan_file(tmp_path):
    angles = np.arange(12) * np.pi / 6
    about = {
        "mode": "cone",
        "DSO": 100.0,
        "DSD": 150.0,
        "nDetector": [18, 20],
        "dDetector": [1.5, 1.5],
        "angles_rad": angles.tolist(),
        "nVoxel": [14, 14, 14],
        "dVoxel": [1.0, 1.0, 1.0],
        "units": "mm",
    }
    geometry = ConeBeam.circular(
        angles, source_origin=100, source_detector=150, detector_shape=(18, 20), pixel_size=1.5
    )
    integrals = ball(geometry)
    (tmp_path / "scan.json").write_text(json.dumps(about))
    counts = np.rint(60000 * np.exp(-integrals)).astype(np.uint16)
    np.savez(tmp_path / "scan.npz", proj=integrals.astype(np.float32), counts=counts)
    return tmp_path / "scan.json"


def run(scan, folder, *more):
    return main(["projections", str(scan), "-o", str(folder), *FAST, *map(str, more)])


def check_ball(volume, spacing=1.0):
    away = (np.indices(volume.shape) - 0.5 * (np.array(volume.shape)[:, None, None, None] - 1)) * spacing
    radius = np.sqrt(np.sum(away**2, axis=0))
    # few voxels across: their values swing about the ball's, their sum does not
    assert volume[radius < 0.7 * RADIUS].mean() == pytest.approx(VALUE, rel=0.06)
    assert volume.sum() * spacing**3 == pytest.approx(
        VALUE * 4 / 3 * np.pi * RADIUS**3, rel=0.04 * spacing**2
    )
    assert np.abs(volume[radius > RADIUS + 1.8 * spacing]).mean() < 0.1 * VALUE


def test_a_scan_becomes_a_volume(scan_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(scan_file, out) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[0] == str(out / "volume.tif")
    assert "14 x 14 x 14 voxels from 12 views" in captured.out
    assert {p.name for p in out.iterdir()} == {"volume.tif", "uncertainty.tif", "model.npz", "report.json"}
    volume = read_stack(out / "volume.tif")
    assert volume.units == ("mm",) * 3
    check_ball(volume.data[..., 0])


def test_counts_json_npz_and_views_left_out(scan_file, tmp_path, capsys):
    out = tmp_path / "out"
    more = ("--array", "counts", "--i0", 60000, "--keep-every", 2, "--format", "npz", "--json", "--seed", 3)
    assert run(scan_file, out, *more) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seed"] == 3
    assert report["config"]["tv_weight"] == 0.0005
    assert report["scan"]["counts"]
    assert report["scan"]["shape"] == [6, 18, 20]
    left = report["views_left_out"]
    assert left["views"] == 6
    assert 0 < left["rms"] < 0.2 * left["signal_rms"]
    result = igs.load(out)
    assert result.report == report
    assert result.model.field == "additive"
    check_ball(result.volume)


def test_voxels_volume_only_and_a_description_of_its_own(scan_file, tmp_path, capsys):
    about = json.loads(scan_file.read_text())
    # the images alone, described in another file, in centimetres
    images = tmp_path / "images.npy"
    with np.load(tmp_path / "scan.npz") as archive:
        np.save(images, archive["proj"])
    for name in ("DSO", "DSD"):
        about[name] /= 10
    for name in ("dDetector", "dVoxel"):
        about[name] = [step / 10 for step in about[name]]
    (tmp_path / "other.json").write_text(json.dumps({**about, "units": "cm"}))
    out = tmp_path / "out"
    assert run(scan_file, out) == 0
    more = (
        "--geometry",
        tmp_path / "other.json",
        "--voxel",
        0.14,
        "--set",
        "tv_weight=0.02",
        "--volume-only",
        "--json",
    )
    capsys.readouterr()
    assert run(images, out, *more) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["grid"]["shape"] == [10, 10, 10]
    # what an earlier run left in the folder is gone
    assert {p.name for p in out.iterdir()} == {"volume.tif", "report.json"}
    volume = read_stack(out / "volume.tif")
    assert volume.units == ("cm",) * 3
    # the same place in the world, ten times as much attenuation for each unit of length
    middle = volume.affine @ [4.5, 4.5, 4.5, 1]
    np.testing.assert_allclose(middle[:3], 0, atol=1e-6)
    check_ball(volume.data[..., 0] / 10, 1.4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--array", "sinogram"], "has no array 'sinogram'"),
        (["--array", "counts"], "need i0 or flat"),
        (["--i0", "-5", "--array", "counts"], "i0: got values that are not positive"),
        (["--set", "tv_wait=1"], "there is no setting 'tv_wait'"),
        (["--set", "tv_passes=0"], "tv_passes"),
        (["--preset", "slow"], "there is no preset 'slow'"),
        (["--keep-every", "0"], "--keep-every: got 0"),
        (["--voxel", "-1"], "--voxel: got -1"),
        (["--voxel", "1e-300"], "--voxel: got 1e-300"),
        (["--voxel", "1e300"], "--voxel: got 1e"),
        (["--geometry", "nowhere.json"], "--geometry: there is no file"),
        (["--pixel-size", "2"], "only RTK"),
        (["--voxel", "0.001"], "grid:"),
        (["--device", "abacus"], "Unknown device 'abacus'"),
    ],
)
def test_bad_input_is_one_line(scan_file, tmp_path, capsys, more, words):
    assert main(["projections", str(scan_file), "-o", str(tmp_path / "out"), *more]) == 2
    assert words in error_line(capsys)
    assert not (tmp_path / "out" / "volume.tif").exists()


def test_bad_files_are_one_line(scan_file, tmp_path, capsys):
    def complaint(path, *more):
        assert run(path, tmp_path / "out", *more) == 2
        return error_line(capsys)

    assert "nothing.json" in complaint(tmp_path / "nothing.json")
    (tmp_path / "hostile.pickle").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert "hostile.pickle" in complaint(tmp_path / "hostile.pickle")
    (tmp_path / "list.json").write_text("[1]")
    assert "JSON object" in complaint(scan_file, "--geometry", tmp_path / "list.json")
    about = json.loads(scan_file.read_text())
    about["angles_rad"] = np.rad2deg(about["angles_rad"]).tolist()
    (tmp_path / "degrees.json").write_text(json.dumps(about))
    assert "look like degrees" in complaint(scan_file, "--geometry", tmp_path / "degrees.json")
    # never on itself
    np.save(tmp_path / "volume.npy", np.zeros((12, 18, 20)))
    assert run(tmp_path / "volume.npy", tmp_path) == 2
    assert "would be overwritten" in error_line(capsys)


def test_interruption_saves_the_best_state(scan_file, tmp_path, capsys, monkeypatch):
    interrupt_at_previews(monkeypatch)
    out = tmp_path / "out"
    assert run(scan_file, out, "--format", "npz") == 130
    assert str(out / "volume.npz") in error_line(capsys)
    result = igs.load(out)
    assert result.report["interrupted"]
    assert result.report["state"] == "preview: FDK"
    assert result.volume.shape == (14, 14, 14)


def displaced(scan_file, columns=2.0, **options):
    """Write projections as a panel moved by some columns sees the ball, which is moved too, for the same file."""
    about = json.loads(scan_file.read_text())
    geometry = ConeBeam.circular(
        about["angles_rad"],
        source_origin=100,
        source_detector=150,
        detector_shape=(18, 20),
        pixel_size=1.5,
        detector_offset=(0, 1.5 * columns),
        **options,
    )
    shift = np.eye(4)
    shift[:3, 3] = (0.5, 2.0, -1.0)
    np.savez(scan_file.with_suffix(".npz"), proj=ball(geometry.moved(shift)).astype(np.float32))
    return geometry


def test_every_run_checks_the_geometry(scan_file, tmp_path, capsys):
    displaced(scan_file)
    assert run(scan_file, tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["geometry_check"]["geometry"]["likely"]
    assert any("refine it" in warning for warning in report["warnings"])
    assert "corrections" not in report
    assert not (tmp_path / "out" / "geometry.json").exists()


@pytest.mark.parametrize("how", ["--find-centre", "--refine"])
def test_corrections_are_made_said_and_written(scan_file, tmp_path, capsys, how):
    truth = displaced(scan_file)
    out = tmp_path / "out"
    assert run(scan_file, out, how, "--volume-only") == 0
    text = capsys.readouterr().out
    assert ("seen on column 7." if how == "--find-centre" else "Geometry refined") in text
    assert "likely to be wrong" not in text
    report = json.loads((out / "report.json").read_text())["report"]
    (correction,) = report["corrections"]
    if how == "--find-centre":
        assert correction["shift"] == pytest.approx(-2, abs=0.1)
    else:
        assert correction["offset_pixels"][1] == pytest.approx(2, abs=0.1)
        assert "lifting the object" in correction["gauge"]
    assert {p.name for p in out.iterdir()} == {"volume.tif", "geometry.json", "report.json"}
    # what was found can be used again
    again = igs.read_scan(scan_file, geometry=json.loads((out / "geometry.json").read_text()))
    axis = again.geometry.project(np.zeros((1, 3)))[:, 0, 1] - truth.project(np.zeros((1, 3)))[:, 0, 1]
    assert abs(axis.mean()) < 0.1
    assert again.grid.shape == (14, 14, 14)


def test_the_wrong_way_round(scan_file, tmp_path, capsys):
    displaced(scan_file, 0.0, rotation="cw")
    assert run(scan_file, tmp_path / "out", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["geometry_check"]["direction"] == "wrong"
    assert any("turn the other way" in warning for warning in report["warnings"])
    assert run(scan_file, tmp_path / "out", "--reverse", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["geometry_check"]["direction"] == "right"
    assert report["corrections"] == [{"kind": "reversed rotation"}]
    assert report["warnings"] == []


def test_hounsfield_and_total_variation_on_request(scan_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(scan_file, out, "--hu", "--tv", "--format", "npz", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["unit"] == "1/mm"
    assert report["hounsfield"] == {"water": 0.0206}
    assert set(report["files"]) == {"volume", "uncertainty", "hu", "tv", "model"}
    volume, hounsfield, tv = (read_stack(out / f"{name}.npz").data[..., 0] for name in ("volume", "hu", "tv"))
    np.testing.assert_allclose(hounsfield, 1000 * (volume - 0.0206) / 0.0206, atol=0.01)
    # the product is a mean of this one and the Gaussians
    assert np.abs(tv - volume).max() < VALUE * (1 - report["contributions"]["tv"]) + 1e-6
    check_ball(tv)
    assert run(scan_file, out, "--hu", "--water", 0.05, "--json") == 0
    assert json.loads(capsys.readouterr().out)["hounsfield"] == {"water": 0.05}
    assert not (out / "tv.npz").exists()


def test_hounsfield_without_a_unit_of_length(scan_file, tmp_path, capsys):
    about = {k: v for k, v in json.loads(scan_file.read_text()).items() if k != "units"}
    scan_file.write_text(json.dumps(about))
    assert run(scan_file, tmp_path / "out", "--hu") == 2
    assert "give the attenuation of water per unit" in error_line(capsys)
    assert run(scan_file, tmp_path / "out", "--water", 0.02) == 2
    assert "without --hu" in error_line(capsys)
