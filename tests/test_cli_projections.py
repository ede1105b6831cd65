"""``innergs projections``: results, files, one line for bad input, interruption."""

import json
import os
import signal

import numpy as np
import pytest

import napari_innergs as igs
from napari_innergs.cli import _Progress, main
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


def error_line(capsys):
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("innergs: ")
    return captured.err


def check_ball(volume, spacing=1.0):
    away = (np.indices(volume.shape) - 0.5 * (np.array(volume.shape)[:, None, None, None] - 1)) * spacing
    radius = np.sqrt(np.sum(away**2, axis=0))
    assert volume[radius < 0.7 * RADIUS].mean() == pytest.approx(VALUE, rel=0.06)
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
    more = ("--geometry", tmp_path / "other.json", "--voxel", 0.14, "--volume-only", "--json")
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
    from napari_innergs.fit.engine import Preview

    def show(self, event):
        if isinstance(event, Preview):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(_Progress, "show", show)
    out = tmp_path / "out"
    assert run(scan_file, out, "--format", "npz") == 130
    assert str(out / "volume.npz") in error_line(capsys)
    result = igs.load(out)
    assert result.report["interrupted"]
    assert result.report["state"] == "preview: FDK"
    assert result.volume.shape == (14, 14, 14)
