"""The command line: results, exit status, one line for bad input, interruption."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_tools import error_line, interrupt_at_previews

import napari_innergs as igs
from napari_innergs.cli import main
from napari_innergs.cli._run import Progress
from napari_innergs.io.read import read_stack

FAST = ("--preset", "fast", "--set", "methods=linear,pchip", "--set", "iterations=2")


def blobs(n=7, size=24, step=3.0, dtype=np.uint8, shift=0.0):
    z, y, x = np.mgrid[0:n, 0:size, 0:size]
    value = 120 + 60 * np.sin(0.4 * (x + z + shift)) + 50 * np.cos(0.35 * y - 0.4 * z)
    return value.astype(dtype), np.diag([step, 1.0, 1.0, 1.0])


@pytest.fixture
def stack_file(tmp_path):
    data, affine = blobs()
    path = tmp_path / "blobs.npz"
    np.savez(path, data=data, affine=affine, units="mm")
    return path


def test_a_stack_becomes_a_volume_on_the_input(stack_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["slices", str(stack_file), "-o", str(out), *FAST]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[0] == str(out / "volume.tif")
    volume = read_stack(out / "volume.tif")
    assert volume.dtype == np.uint8
    assert volume.data.shape == (19, 24, 24, 1)
    assert volume.units == ("mm",) * 3
    np.testing.assert_array_equal(volume.data[::3, ..., 0], blobs()[0])
    assert {p.name for p in out.iterdir()} == {
        *("volume.tif", "uncertainty.tif", "distance.tif", "model.npz", "report.json")
    }


def test_json_npz_and_load(stack_file, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["slices", str(stack_file), "-o", str(out), "--format", "npz", "--dtype", "float32", "--json"]
    assert main([*arguments, *FAST, "--seed", "7"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seed"] == 7
    assert report["config"]["iterations"] == 2
    assert report["config"]["methods"] == ["linear", "pchip"]
    result = igs.load(out)
    assert result.volume.dtype == np.float32
    assert result.report == report
    assert result.uncertainty.shape == result.volume.shape
    assert len(result.model) == report["n_gaussians"] > 0


@pytest.mark.parametrize("ending", ["nii.gz", "zarr"])
def test_formats(stack_file, tmp_path, ending):
    pytest.importorskip("nibabel" if ending == "nii.gz" else "zarr")
    out = tmp_path / "out"
    for _ in range(2):  # the second time replaces the first
        arguments = ["slices", str(stack_file), "-o", str(out), "--format", ending, "--volume-only"]
        assert main([*arguments, *FAST]) == 0
    assert {p.name for p in out.iterdir()} == {f"volume.{ending}", "report.json"}
    again = read_stack(out / f"volume.{ending}", axis=0)
    np.testing.assert_allclose(np.abs(again.normal), (1, 0, 0), atol=1e-6)
    assert again.data[..., 0].shape == (19, 24, 24)


def test_spacing_axis_and_voxel(stack_file, tmp_path, capsys):
    arguments = ["slices", str(stack_file), "-o", str(tmp_path / "out"), "--axis", "1", "--spacing", "1,4,1"]
    assert main([*arguments, "--voxel", "2", "--json", *FAST]) == 0
    report = json.loads(capsys.readouterr().out)
    # 24 slices 4 apart of 7 x 24 pixels
    assert report["grid"]["shape"] == [47, 4, 13]


def test_keep_every_compares_with_the_slices_left_out(tmp_path, capsys):
    data, _ = blobs(n=13)
    path = tmp_path / "all.npz"
    np.savez(path, data=data)
    arguments = ["slices", str(path), "-o", str(tmp_path / "out"), "--keep-every", "2", "--json"]
    assert main([*arguments, *FAST]) == 0
    truth = json.loads(capsys.readouterr().out)["truth"]
    assert truth["slices"] == 6
    assert truth["psnr"] > 15
    assert {"linear", "pchip", "gaussians-normalised"} <= set(truth["candidates"])

    sparse = tmp_path / "sparse.npz"
    np.savez(sparse, data=data[::2], spacing=(2, 1, 1))
    arguments = ["slices", str(sparse), "-o", str(tmp_path / "other"), "--truth", str(path), "--json"]
    assert main([*arguments, *FAST]) == 0
    other = json.loads(capsys.readouterr().out)["truth"]
    assert other["candidates"]["linear"] == truth["candidates"]["linear"]


def thick(axis, k=4, size=24, name=None, folder=None, **extra):
    """A stack of slices that are means of k voxels of one object, across an axis; its file if a folder is given."""
    z, y, x = np.mgrid[0:size, 0:size, 0:size]
    value = 120 + 60 * np.sin(0.4 * (x + z)) + 50 * np.cos(0.35 * y - 0.4 * z)
    data = np.moveaxis(value, axis, 0).reshape(size // k, k, size, size).mean(1)
    order = [axis, *(d for d in range(3) if d != axis), 3]
    affine = np.eye(4)
    affine[axis] *= k
    affine[axis, 3] = (k - 1) / 2
    path = folder / f"{name or 'zyx'[axis]}.npz"
    contents = {"data": data.astype(np.float32), "affine": affine[:, order], "units": "mm", **extra}
    np.savez(path, **contents)
    return str(path), value


def stack_options(folder, count=3):
    return [word for axis in range(count) for word in ("--stack", thick(axis, folder=folder)[0])]


class Recorder:
    """In place of the engine: notes what it is given and says that slices moved."""

    def __call__(self, stacks, grid=None, config=None, **options):
        from napari_innergs.fit.engine import Done, Preview
        from napari_innergs.result import Reconstruction

        self.stacks, self.config, self.options = stacks, config, options
        listed = [stacks] if isinstance(stacks, igs.SliceStack) else list(stacks)
        self.grid = grid or listed[0].default_grid()
        volume = np.zeros(self.grid.shape, np.float32)
        yield Preview(volume, self.grid, "first")
        moves = [np.tile(np.eye(4), (stack.n_slices, 1, 1)) for stack in listed]
        moves[-1][2, :3, 3] = 1, 2, 3
        report = {
            "stacks": [{"name": stack.name, "shape": list(stack.data.shape)} for stack in listed],
            "grid": {"shape": list(self.grid.shape)},
            "n_gaussians": 0,
            "seconds": 1.0,
            "warnings": ["They differ."],
        }
        if config.motion != "off":
            report["motion"] = {"gauge": "mean", "transforms": [move.tolist() for move in moves]}
        yield Done(Reconstruction(volume, self.grid, report=report))


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("napari_innergs.tasks.slices.fit_slices", recorder)
    return recorder


def test_three_stacks_make_one_volume(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "slices",
        *stack_options(tmp_path),
        "--thickness",
        "4",
        "--profile",
        "box",
        "--preset",
        "fast",
    ]
    assert main([*arguments, "-o", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "from z 6 slices, y 6 slices, x 6 slices" in captured.out
    volume = read_stack(out / "volume.tif")
    truth = thick(0, folder=tmp_path)[1]
    assert volume.data[..., 0].shape == truth.shape
    np.testing.assert_allclose(volume.affine[:3, 3], 0, atol=1e-6)
    inner = (slice(4, -4),) * 3
    error = (volume.data[..., 0] - truth)[inner]
    # one stack alone can't do this
    single = np.repeat(read_stack(tmp_path / "z.npz").data[..., 0], 4, axis=0)
    assert error.std() < 0.25 * (single - truth)[inner].std()
    report = json.loads((out / "report.json").read_text())["report"]
    assert [(one["thickness"], one["profile"]) for one in report["stacks"]] == [(4, "box")] * 3
    assert not (out / "transforms.json").exists()


def test_profiles_for_each_stack_and_transforms(tmp_path, capsys, recorder):
    out = tmp_path / "out"
    arguments = ["slices", *stack_options(tmp_path), "-o", str(out), "--voxel", "2", "--motion", "slice"]
    each = ["--thickness", "4", "--thickness", "3,5", "--profile", "box,gaussian,box"]
    assert main([*arguments, *each]) == 0
    assert "They differ." in capsys.readouterr().out
    found = [(stack.name, stack.thickness, stack.profile) for stack in recorder.stacks]
    assert found == [("z", 4, "box"), ("y", 3, "gaussian"), ("x", 5, "box")]
    assert recorder.config.motion == "slice"
    assert recorder.options["warm_start"] is None
    # around all of them
    assert recorder.grid.shape == (13, 13, 13)
    np.testing.assert_allclose(recorder.grid.spacing, 2)
    content = json.loads((out / "transforms.json").read_text())
    assert [one["name"] for one in content["stacks"]] == ["z", "y", "x"]
    assert (content["gauge"], content["units"]) == ("mean", ["mm"] * 3)
    np.testing.assert_array_equal(np.array(content["stacks"][2]["transforms"])[2, :3, 3], (1, 2, 3))
    report = json.loads((out / "report.json").read_text())["report"]
    assert report["files"]["transforms"] == str(out / "transforms.json")
    # a later run without motion leaves no transforms behind
    assert main([*arguments[:-2]]) == 0
    assert not (out / "transforms.json").exists()


def test_axis_for_each_stack_and_one_thick_stack(tmp_path, capsys, recorder):
    data = np.zeros((8, 8, 8), np.float32)
    for name in "ab":
        np.savez(tmp_path / f"{name}.npz", data=data, spacing=(1, 4, 1))
    both = [
        *("--stack", str(tmp_path / "a.npz"), "--stack", str(tmp_path / "b.npz")),
        "-o",
        str(tmp_path / "out"),
    ]
    assert main(["slices", *both, "--axis", "1,2"]) == 0
    assert [stack.spacing for stack in recorder.stacks] == [4, 1]
    one = ["slices", both[1], "-o", str(tmp_path / "out"), "--axis", "1"]
    assert main([*one, "--thickness", "3.5"]) == 0
    assert isinstance(recorder.stacks, igs.SliceStack)
    assert recorder.stacks.thickness == 3.5
    capsys.readouterr()
    # a single --stack is as an INPUT: it can be compared
    assert main(["slices", *both[:2], *both[4:], "--keep-every", "2"]) == 0
    assert "3 slices not given" in capsys.readouterr().out


def test_stacks_of_a_time_series(tmp_path, capsys, recorder):
    for name, times in (("a", 2), ("b", 2), ("c", 3)):
        film = np.arange(times * 4 * 8 * 8, dtype=np.float32).reshape(times, 4, 8, 8)
        np.savez(tmp_path / f"{name}.npz", data=film, axes="tzyx", spacing=(3, 1, 1))
    out = ["-o", str(tmp_path / "out")]
    first, second, third = (["--stack", str(tmp_path / f"{name}.npz")] for name in "abc")
    assert main(["slices", *first, *second, *out]) == 0
    assert (tmp_path / "out" / "t001" / "volume.tif").exists()
    assert [stack.name for stack in recorder.stacks] == ["a t1", "b t1"]
    capsys.readouterr()
    assert main(["slices", *first, *third, *out]) == 2
    assert "differ in their time points" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--thickness", "4,4"], "--thickness: got 2 values for 3 stack"),
        (["--thickness", "wide"], "--thickness: got 'wide', need a number"),
        (["--thickness", "-1"], "thickness: got -1"),
        (["--thickness", "400"], "larger than the whole stack"),
        (["--profile", "triangle"], "profile: got 'triangle'"),
        (["--motion", "fast"], "motion = 'fast'"),
        (["--keep-every", "2"], "--keep-every: it compares one stack"),
        (["--truth", "all.tif"], "--truth: it compares one stack"),
        (["another.tif"], "need all stacks as --stack"),
    ],
)
def test_bad_input_with_several_stacks(tmp_path, capsys, recorder, arguments, says):
    assert main(["slices", *stack_options(tmp_path), "-o", str(tmp_path / "out"), *arguments]) == 2
    assert says in error_line(capsys)


def test_no_input_at_all(tmp_path, capsys):
    assert main(["slices", "-o", str(tmp_path / "out")]) == 2
    assert "INPUT: there is none" in error_line(capsys)


def test_stacks_that_contradict_each_other(tmp_path, capsys):
    first, _ = thick(0, folder=tmp_path)
    other, _ = thick(1, folder=tmp_path, units="um")
    assert main(["slices", "--stack", first, "--stack", other, "-o", str(tmp_path / "out")]) == 2
    assert "units" in error_line(capsys)


def test_a_folder_of_stacks_with_a_broken_one(tmp_path, capsys):
    folder = tmp_path / "stacks"
    folder.mkdir()
    for name in ("a", "c"):
        np.savez(folder / f"{name}.npz", data=blobs()[0], spacing=(3, 1, 1))
    (folder / "b.tif").write_bytes(b"II*\0 this is no TIFF")
    (folder / "notes.txt").write_text("not a stack")
    out = tmp_path / "out"
    assert main(["slices", str(folder), "-o", str(out), "--volume-only", *FAST]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 2
    assert "b.tif" in captured.err.splitlines()[0]
    assert "1 of 3 inputs failed" in captured.err
    assert (out / "a" / "volume.tif").exists()
    assert (out / "c" / "volume.tif").exists()


def test_names_that_occur_twice_get_folders_of_their_own(tmp_path):
    paths = []
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        paths.append(tmp_path / place / "same.npz")
        np.savez(paths[-1], data=blobs()[0], spacing=(3, 1, 1))
    out = tmp_path / "out"
    assert main(["slices", *map(str, paths), "-o", str(out), "--volume-only", *FAST]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["same", "same-2"]


def test_a_time_series_gives_a_volume_for_each_time_point(tmp_path, capsys):
    data = np.stack([blobs(shift=s)[0] for s in (0.0, 0.5)])
    path = tmp_path / "film.npz"
    np.savez(path, data=data, axes="tzyx", spacing=(3, 1, 1))
    out = tmp_path / "out"
    assert main(["slices", str(path), "-o", str(out), "--json", *FAST]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    for number in range(2):
        volume = read_stack(out / f"t{number:03d}" / "volume.tif")
        np.testing.assert_array_equal(volume.data[::3, ..., 0], data[number])


def test_dicom_folder_is_one_series(tmp_path):
    pytest.importorskip("pydicom")
    from napari_innergs.cli.slices import find_jobs

    (tmp_path / "series").mkdir()
    for number in range(2):
        (tmp_path / "series" / f"{number}").write_bytes(b"\0" * 128 + b"DICM")
    jobs, several = find_jobs([tmp_path / "series"], tmp_path / "out")
    assert jobs == [(tmp_path / "series", tmp_path / "out")]
    assert not several
    # beside another stack it is one of several
    np.savez(tmp_path / "a.npz", data=blobs()[0])
    jobs, several = find_jobs([tmp_path], tmp_path / "out")
    assert [path.name for path, _ in jobs] == ["a.npz", "series"]
    assert several


def test_yaml_preset_and_set_win_in_this_order(tmp_path):
    from napari_innergs.cli.slices import read_settings

    path = tmp_path / "settings.yaml"
    path.write_text("preset: fast\niterations: 33\ngaussian_spacing: 4\n")
    config = read_settings(None, path, ["iterations=5", "uncertainty=off", "gaussians=", "denoise=off"])
    assert (config.iterations, config.gaussian_spacing, config.uncertainty) == (5, 4.0, False)
    assert (config.gaussians, config.denoise) == ((), "off")
    assert config.methods == igs.SliceConfig.preset("fast").methods
    assert read_settings("balanced", path, []).methods == igs.SliceConfig.preset("balanced").methods


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "slow"], "no preset 'slow'"),
        (["--set", "iterations"], "need key=value"),
        (["--set", "iteration=3"], "no setting 'iteration'"),
        (["--set", "iterations=many"], "iterations = 'many'"),
        (["--config", "nothing.yaml"], "no file"),
        (["--spacing", "1,2"], "--spacing"),
        (["--spacing", "0"], "spacing"),
        (["--axis", "5"], "axis"),
        (["--keep-every", "0"], "--keep-every"),
        (["--keep-every", "100"], "at least 2"),
        (["--voxel", "-1"], "spacing"),
        (["--voxel", "1e-5"], "memory|need"),
        (["--format", "bmp"], "bmp"),
        (["--device", "abacus"], "abacus"),
        (["--truth", "nothing.tif"], "nothing.tif"),
        (["--nonsense"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_status_2(stack_file, tmp_path, capsys, arguments, says):
    import re

    assert main(["slices", str(stack_file), "-o", str(tmp_path / "out"), *arguments]) == 2
    line = error_line(capsys)
    assert re.search(says, line), line
    assert not (tmp_path / "out" / "volume.tif").exists()


def test_inputs_that_are_not_stacks(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["slices", str(tmp_path / "empty"), "-o", str(tmp_path / "out")]) == 2
    assert "no stack in the folder" in error_line(capsys)
    assert main(["slices", str(tmp_path / "nothing.tif"), "-o", str(tmp_path / "out")]) == 2
    assert "nothing.tif" in error_line(capsys)
    np.savez(tmp_path / "one.npz", data=np.zeros((1, 8, 8)))
    assert main(["slices", str(tmp_path / "one.npz"), "-o", str(tmp_path / "out")]) == 2
    assert "1 slice(s)" in error_line(capsys)
    data = np.zeros((4, 8, 8))
    data[1, 2, 3] = np.nan
    np.savez(tmp_path / "nan.npz", data=data)
    assert main(["slices", str(tmp_path / "nan.npz"), "-o", str(tmp_path / "out")]) == 2
    assert "NaN" in error_line(capsys)


def test_output_that_can_not_be_written_is_found_before_the_work(stack_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "napari_innergs.tasks.slices.fit_slices", lambda *a, **k: pytest.fail("began to work")
    )
    (tmp_path / "file").write_text("in the way")
    assert main(["slices", str(stack_file), "-o", str(tmp_path / "file" / "out")]) == 2
    assert "can not write" in error_line(capsys)


def test_the_input_is_never_overwritten(tmp_path, capsys):
    np.savez(tmp_path / "volume.npz", data=blobs()[0])
    before = (tmp_path / "volume.npz").read_bytes()
    arguments = ["slices", str(tmp_path / "volume.npz"), "-o", str(tmp_path), "--format", "npz"]
    assert main(arguments) == 2
    assert "would be overwritten" in error_line(capsys)
    assert (tmp_path / "volume.npz").read_bytes() == before


def test_a_new_result_replaces_an_earlier_one_and_nothing_else(stack_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "volume.nii.gz").write_text("somebody's own")
    assert main(["slices", str(stack_file), "-o", str(out), "--format", "npz", *FAST]) == 0
    assert main(["slices", str(stack_file), "-o", str(out), "--volume-only", *FAST]) == 0
    assert {p.name for p in out.iterdir()} == {"volume.nii.gz", "volume.tif", "report.json"}


def test_missing_library_for_a_format_is_found_before_the_work(stack_file, tmp_path, capsys, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["slices", str(stack_file), "-o", str(tmp_path), "--format", "nii.gz"]) == 2
    assert "napari-innergs[medical]" in error_line(capsys)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_saves_the_best_state(stack_file, tmp_path, capsys, monkeypatch, as_json):
    interrupt_at_previews(monkeypatch)
    out = tmp_path / "out"
    arguments = ["slices", str(stack_file), "-o", str(out), *FAST, *(["--json"] if as_json else [])]
    assert main(arguments) == 130
    captured = capsys.readouterr()
    assert str(out / "volume.tif") in captured.err
    assert captured.err.count("\n") == 1
    stack = igs.read_stack(stack_file)
    volume = read_stack(out / "volume.tif")
    np.testing.assert_array_equal(volume.data[::3], stack.data)
    report = json.loads((out / "report.json").read_text())["report"]
    assert report["interrupted"]
    assert report["state"].startswith("preview: ")
    if as_json:
        assert json.loads(captured.out) == report


def test_ctrl_c_ends_a_run_of_several(stack_file, tmp_path, capsys, monkeypatch):
    interrupt_at_previews(monkeypatch)
    out = tmp_path / "out"
    assert main(["slices", str(stack_file), str(stack_file), "-o", str(out), *FAST, "--json"]) == 130
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    (report,) = json.loads(captured.out)
    assert report["interrupted"]
    assert [folder.name for folder in out.iterdir() if (folder / "report.json").exists()] == [stack_file.stem]


def test_what_is_left_of_a_run(capsys):
    import io

    from napari_innergs.cli._run import Interrupted, Run
    from napari_innergs.fit.engine import Preview
    from napari_innergs.geometry.grid import Grid

    def events():
        yield Preview(np.ones((2, 2, 2), np.float32), Grid((2, 2, 2)), "outline")
        raise KeyboardInterrupt

    def save(result):
        return {**result.report, "files": {"volume": f"{result.volume.sum():g}.tif"}}

    run = Run(Progress(io.StringIO()), save, {"task": "dual", "seed": 3})
    with pytest.raises(Interrupted) as stopped, run.guarded("the best state so far", as_json=True):
        run.follow(events())
    captured = capsys.readouterr()
    assert captured.err == "innergs: interrupted; the best state so far is saved in 8.tif\n"
    report = json.loads(captured.out)
    assert report == stopped.value.args[0]
    assert (report["task"], report["seed"], report["state"]) == ("dual", 3, "preview: outline")
    assert report["interrupted"] and "numpy" in report["versions"]


def test_dual_does_not_overwrite_its_input(tmp_path, capsys):
    np.savez(tmp_path / "volume.npz", data=np.zeros((4, 4, 4)))
    assert main(["dual", str(tmp_path / "volume.npz"), "photos", "--volume", "-o", str(tmp_path)]) == 2
    assert "would be overwritten" in error_line(capsys)


def test_ctrl_c_before_anything_is_there(stack_file, tmp_path, capsys, monkeypatch):
    def show(self, event):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "show", show)
    assert main(["slices", str(stack_file), "-o", str(tmp_path / "out")]) == 130
    assert "nothing to save" in error_line(capsys)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_the_process_with_130(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "big.npz", data=rng.normal(size=(40, 256, 256)).astype(np.float32))
    command = [sys.executable, "-m", "napari_innergs.cli", "slices", str(tmp_path / "big.npz")]
    out = tmp_path / "out"
    process = subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, text=True)
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(8)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.count("\n") == 1
    assert errors.startswith("innergs: interrupted; ")


def test_progress_line_on_a_terminal():
    import io

    from napari_innergs.fit.engine import Step

    class Terminal(io.StringIO):
        def isatty(self):
            return True

        def fileno(self):
            raise OSError

    stream = Terminal()
    progress = Progress(stream)
    progress.title = "head.tif"
    progress.show(Step("Denoising the slices", 0.25))
    assert " 25 %  Denoising the slices" in stream.getvalue()
    progress.clear()
    assert stream.getvalue().endswith("\r")


def test_voxelise(tmp_path, capsys):
    model = igs.GaussianModel(
        [[2.0, 3.0, 4.0]], [[0, 0, 0]], [[1, 0, 0, 0]], [5.0], field="additive", units="um"
    )
    model.save(tmp_path / "model.ply")
    out = tmp_path / "volume.tif"
    arguments = ["voxelise", str(tmp_path / "model.ply"), "-o", str(out), "--json"]
    assert main([*arguments, "--spacing", "1"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["grid"]["shape"] == [7, 7, 7]
    volume = read_stack(out)
    assert volume.units == ("um",) * 3
    np.testing.assert_allclose(volume.affine[:3, 3], (-1, 0, 1))
    assert volume.data[3, 3, 3, 0] == pytest.approx(5.0)

    assert main([*arguments[:2], "-o", str(tmp_path / "like.npz"), "--like", str(out)]) == 0
    np.testing.assert_allclose(read_stack(tmp_path / "like.npz").data, volume.data, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--spacing", "0"], "positive"),
        (["--spacing", "1e-6"], "memory|GiB|TiB"),
        ([], "give one of them"),
        (["--spacing", "1", "-o", "x.bmp"], "bmp"),
    ],
)
def test_voxelise_bad_input(tmp_path, capsys, arguments, says):
    import re

    model = igs.GaussianModel([[0.0, 0, 0]], [[0, 0, 0]], [[1, 0, 0, 0]], [5.0], field="additive")
    model.save(tmp_path / "model.npz")
    start = ["voxelise", str(tmp_path / "model.npz"), "-o", str(tmp_path / "v.tif")]
    assert main([*start, *arguments]) == 2
    assert re.search(says, error_line(capsys))


def test_info_and_bench(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["devices"][0] == "cpu"
    assert report["memory_available"] > 0
    assert report["versions"]["napari-innergs"] == igs.__version__
    assert main(["info"]) == 0
    assert report["device"]["reason"] in capsys.readouterr().out
    assert main(["bench", "--gaussians", "200", "--rounds", "1", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert len(results) == 4 * len(report["devices"])


@pytest.mark.parametrize("command", ["slices", "voxelise", "demo", "bench", "info"])
def test_help_has_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert f"Example:\n    innergs {command}" in capsys.readouterr().out


def test_demo(tmp_path, capsys):
    from PIL import Image

    out = tmp_path / "demo"
    assert main(["demo", "-o", str(out), "--preset", "fast"]) == 0
    printed = capsys.readouterr().out
    assert "Not for diagnosis." in printed
    report = json.loads((out / "report.json").read_text())
    truth = report["truth"]
    plain = [v["psnr"] for k, v in truth["candidates"].items() if not k.startswith("gaussians")]
    assert truth["psnr"] > max(plain)
    picture = np.asarray(Image.open(out / "picture.png"))
    assert picture.shape[2] == 3
    assert picture.std() > 30
    volume, real = read_stack(out / "volume.tif"), read_stack(out / "truth.tif")
    np.testing.assert_array_equal(volume.data[::4], real.data[::4])
    np.testing.assert_allclose(volume.affine, real.affine)
    assert read_stack(out / "input.tif").n_slices == 16


def test_demo_interrupted(tmp_path, capsys, monkeypatch):
    interrupt_at_previews(monkeypatch)
    assert main(["demo", "-o", str(tmp_path), "--preset", "fast"]) == 130
    assert str(Path(tmp_path) / "volume.tif") in error_line(capsys)
    assert (tmp_path / "volume.tif").exists()


def test_a_type_that_the_format_can_not_hold_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("napari_innergs.tasks.slices.fit_slices", lambda *a, **k: pytest.fail("work started"))
    np.savez(tmp_path / "wide.npz", data=np.arange(3 * 8 * 8).reshape(3, 8, 8))
    assert main(["slices", str(tmp_path / "wide.npz"), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "can not hold int64" in said and "--dtype float32" in said


def test_a_file_that_is_no_array_is_called_that(tmp_path, capsys):
    (tmp_path / "junk.npz").write_bytes(b"not an archive" * 9)
    assert main(["slices", str(tmp_path / "junk.npz"), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "neither NPY nor NPZ" in said and "pickle" not in said
