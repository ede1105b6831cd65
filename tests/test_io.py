import gzip
import io
import json
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile

from napari_innergs.geometry.frames import LPS_ZYX, RAS, RAS_ZYX
from napari_innergs.geometry.grid import Grid
from napari_innergs.io import files, ply
from napari_innergs.io.files import atomic_path, ensure_writable, suffix_of
from napari_innergs.io.read import count_times, read_stack, read_times
from napari_innergs.io.write import check_output, write_volume
from napari_innergs.model import GaussianModel

OBLIQUE = np.array([[2.9, 0.1, 0.2, -7.0], [0.3, 0.6, -0.4, 3.0], [-0.2, 0.3, 0.7, 11.0], [0, 0, 0, 1]])
# exact in float32, so that NIfTI keeps it to the last bit
EXACT = np.array([[-3.0, 0.25, 0, 10], [0, 1.25, 0.5, -4], [0.5, -0.5, 0.75, 7.5], [0, 0, 0, 1]])
ENDINGS = (".tif", ".ome.tif", ".nii", ".nii.gz", ".zarr", ".ome.zarr", ".npz")


def asymmetric(shape=(5, 7, 9), dtype=np.uint8, channels=()):
    """No two voxels of equal value along a line, no symmetry."""
    return (np.arange(np.prod(shape + channels)) % 251).reshape(shape + channels).astype(dtype)


def world_of(stack, i, row, col):
    return (stack.frame_affine @ [stack.positions[i], row, col, 1])[:3]


# ---------------------------------------------------------------- all formats


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("channels", [(), (2,), (3,)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_round_trip_keeps_pixels_place_and_type(tmp_path, ending, channels, dtype):
    volume = asymmetric(dtype=dtype, channels=channels)
    grid = Grid(volume.shape[:3], EXACT, "um")
    path = tmp_path / f"thing{ending}"
    write_volume(path, volume, grid)
    stack = read_stack(path, axis=0)
    assert stack.dtype == dtype and stack.name == "thing" and stack.units == ("um",) * 3
    np.testing.assert_array_equal(stack.data, volume.reshape(stack.data.shape))
    np.testing.assert_array_equal(stack.affine, EXACT)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name]


@pytest.mark.parametrize("ending", [".tif", ".ome.tif", ".zarr", ".npz"])
def test_channel_names_come_back(tmp_path, ending):
    volume = asymmetric(dtype=np.uint16, channels=(2,))
    write_volume(
        tmp_path / f"a{ending}", volume, Grid(volume.shape[:3]), channel_names=["nuclei", "membrane"]
    )
    assert read_stack(tmp_path / f"a{ending}").channel_names == ("nuclei", "membrane")


@pytest.mark.parametrize("ending", ENDINGS)
def test_oblique_affine_survives(tmp_path, ending):
    volume = asymmetric()
    write_volume(tmp_path / f"a{ending}", volume, Grid(volume.shape, OBLIQUE, "mm"))
    stack = read_stack(tmp_path / f"a{ending}", axis=0)
    np.testing.assert_allclose(stack.affine, OBLIQUE, atol=2e-6 if "nii" in ending else 1e-14)


@pytest.mark.parametrize("ending", [".tif", ".nii", ".zarr", ".npz"])
def test_axis_counts_any_array_axis(tmp_path, ending):
    volume = asymmetric()
    path = tmp_path / f"a{ending}"
    write_volume(path, volume, Grid(volume.shape, EXACT, "mm"))
    stack = read_stack(path, axis=2)
    assert stack.data.shape == (9, 5, 7, 1)
    i = list(stack.order).index(8)
    assert stack.data[i, 1, 2, 0] == volume[1, 2, 8]
    np.testing.assert_allclose(world_of(stack, i, 1, 2), (EXACT @ [1, 2, 8, 1])[:3])


def test_overwriting_replaces(tmp_path):
    for ending in ENDINGS:
        path = tmp_path / f"a{ending}"
        write_volume(path, np.zeros((2, 3, 4), np.uint8), Grid((2, 3, 4)))
        write_volume(path, np.full((3, 3, 4), 9, np.uint8), Grid((3, 3, 4)))
        assert (read_stack(path, axis=0).data == 9).all()
    assert len(list(tmp_path.iterdir())) == len(ENDINGS)


def test_write_refuses_what_does_not_fit(tmp_path):
    grid = Grid((2, 3, 4))
    for kwargs, match in (
        ({"path": "a.png"}, "path: got"),
        ({"volume": np.zeros((2, 3, 5))}, "volume: got shape"),
        ({"volume": np.zeros((2, 3, 4), complex)}, "complex"),
        ({"channel_names": ["a", "b"]}, "channel_names"),
        ({"path": "a.tif", "volume": np.zeros((2, 3, 4), np.int64)}, "TIFF can not hold int64"),
    ):
        call = {"path": "a.npz", "volume": np.zeros((2, 3, 4)), **kwargs}
        with pytest.raises(ValueError, match=match):
            write_volume(tmp_path / call.pop("path"), grid=grid, **call)
    assert not list(tmp_path.iterdir())


def test_read_refuses_the_unknown(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        read_stack(tmp_path / "none.tif")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(ValueError, match="no known kind"):
        read_stack(tmp_path / "a.txt")
    for ending in (".tif", ".nii", ".nii.gz", ".npz", ".npy", ".dcm"):
        path = tmp_path / f"b{ending}"
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="is empty"):
            read_stack(path)
        path.write_bytes(b"this is not what the name says" * 30)
        with pytest.raises(ValueError, match=path.name):
            read_stack(path)
    (tmp_path / "c.zarr").mkdir()
    with pytest.raises(ValueError, match=r"c\.zarr"):
        read_stack(tmp_path / "c.zarr")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no DICOM images"):
        read_stack(tmp_path / "empty")


@pytest.mark.parametrize("ending", [".tif", ".ome.tif", ".nii", ".nii.gz", ".npz"])
def test_truncated_files_never_give_a_wrong_volume(tmp_path, ending):
    rng = np.random.default_rng(0)
    volume = rng.integers(0, 255, (4, 24, 24)).astype(np.uint8)
    path = tmp_path / f"whole{ending}"
    write_volume(path, volume, Grid(volume.shape))
    content = path.read_bytes()
    cut = tmp_path / f"cut{ending}"
    for length in np.linspace(1, len(content) - 30, 25).astype(int):
        cut.write_bytes(content[:length])
        try:
            stack = read_stack(cut, axis=0)
        except ValueError as error:
            assert "cut" in str(error)
        else:
            # an ImageJ file ends with directories that repeat what is known: without them all is there
            assert ending == ".tif" and length > volume.size
            np.testing.assert_array_equal(stack.data[..., 0], volume)


def test_sizes_are_checked_before_allocation(tmp_path, monkeypatch):
    volume = asymmetric(dtype=np.float32)
    for ending in ENDINGS:
        write_volume(tmp_path / f"a{ending}", volume, Grid(volume.shape))
    monkeypatch.setattr(files, "available_memory", lambda: 1000)
    for ending in ENDINGS:
        with pytest.raises(ValueError, match="of memory is available"):
            read_stack(tmp_path / f"a{ending}", axis=0)


def test_spacing_override_and_bad_spacing(tmp_path):
    np.save(tmp_path / "a.npy", asymmetric())
    stack = read_stack(tmp_path / "a.npy", spacing=(4, 0.5, 0.25), units="mm", thickness=2.0, profile="box")
    np.testing.assert_array_equal(stack.affine, np.diag([4, 0.5, 0.25, 1]))
    assert (stack.thickness, stack.profile, stack.units) == (2.0, "box", ("mm",) * 3)
    for spacing in ((4, 0, 1), (-1, 1, 1)):
        with pytest.raises(ValueError, match="spacing"):
            read_stack(tmp_path / "a.npy", spacing=spacing)
    with pytest.raises(ValueError, match="axis"):
        read_stack(tmp_path / "a.npy", axis=3)


def test_errors_from_the_pixels_name_the_file(tmp_path):
    data = asymmetric(dtype=np.float32)
    data[1, 2, 3] = np.nan
    np.save(tmp_path / "holes.npy", data)
    with pytest.raises(ValueError, match=r"slice 1, row 2, column 3.*holes\.npy"):
        read_stack(tmp_path / "holes.npy")


# ---------------------------------------------------------------- writing safely


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_folders_that_can_not_be_written(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.write_text("x")
    with pytest.raises(ValueError, match="can not write in the folder"):
        ensure_writable(blocker / "below")
    assert ensure_writable(tmp_path / "a" / "b").is_dir()

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", refuse)
    for call in (
        lambda: check_output(tmp_path / "a.tif"),
        lambda: write_volume(tmp_path / "a.npz", np.zeros((2, 2, 2)), Grid((2, 2, 2))),
        lambda: model().save(tmp_path / "a.ply"),
    ):
        with pytest.raises(ValueError, match="Permission denied"):
            call()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="can not write"):
            ensure_writable(tmp_path)
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "precious.txt").write_text("x")
    with pytest.raises(ValueError, match="other files"):
        write_volume(tmp_path / "a.zarr", np.zeros((2, 2, 2)), Grid((2, 2, 2)))
    assert (tmp_path / "a.zarr" / "precious.txt").exists()


def test_suffixes():
    assert [suffix_of(n) for n in ("a.OME.TIF", "a.nii.gz", "a.b.npz", "a")] == [
        ".ome.tif",
        ".nii.gz",
        ".npz",
        "",
    ]


# ---------------------------------------------------------------- TIFF


def test_imagej_metadata_from_another_writer(tmp_path):
    volume = asymmetric(dtype=np.uint16)
    tifffile.imwrite(
        tmp_path / "a.tif", volume, imagej=True, resolution=(1 / 0.2, 1 / 0.3),
        metadata={"axes": "ZYX", "spacing": 1.5, "unit": "micron"},
    )  # fmt: skip
    stack = read_stack(tmp_path / "a.tif")
    np.testing.assert_allclose(stack.affine.diagonal(), [1.5, 0.3, 0.2, 1], rtol=1e-6)
    assert stack.units == ("um",) * 3
    np.testing.assert_array_equal(stack.data[..., 0], volume)


def test_ome_metadata_from_another_writer(tmp_path):
    volume = asymmetric(dtype=np.uint16, channels=(2,))
    tifffile.imwrite(
        tmp_path / "a.ome.tif", np.moveaxis(volume, -1, 1),
        metadata={
            "axes": "ZCYX", "PhysicalSizeZ": 0.002, "PhysicalSizeZUnit": "mm", "PhysicalSizeY": 0.3,
            "PhysicalSizeX": 0.2, "PhysicalSizeYUnit": "µm", "PhysicalSizeXUnit": "µm",
            "Channel": {"Name": ["a", "b"]},
        },
    )  # fmt: skip
    stack = read_stack(tmp_path / "a.ome.tif")
    steps = stack.affine.diagonal()[:3] * {"mm": 1000, "um": 1}[stack.units[0]]
    np.testing.assert_allclose(steps, [2, 0.3, 0.2])
    assert stack.channel_names == ("a", "b")
    np.testing.assert_array_equal(stack.data, volume)


def test_other_programs_see_our_metadata(tmp_path):
    volume = asymmetric(dtype=np.uint16)
    grid = Grid(volume.shape, np.diag([1.5, 0.3, 0.2, 1]), "um")
    write_volume(tmp_path / "a.tif", volume, grid)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert (
            tiff.is_imagej and tiff.imagej_metadata["spacing"] == 1.5 and tiff.imagej_metadata["unit"] == "um"
        )
        x, y = (tiff.pages[0].tags[name].value for name in ("XResolution", "YResolution"))
        assert x[1] / x[0] == pytest.approx(0.2) and y[1] / y[0] == pytest.approx(0.3)
    write_volume(tmp_path / "a.ome.tif", volume, grid)
    with tifffile.TiffFile(tmp_path / "a.ome.tif") as tiff:
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert [pixels[f"PhysicalSize{a}"] for a in "ZYX"] == [1.5, 0.3, 0.2]
        assert pixels["PhysicalSizeXUnit"] == "µm"
        np.testing.assert_array_equal(tiff.asarray(), volume)


@pytest.mark.parametrize(
    "options",
    [{"imagej": True}, {"ome": True}, {"ome": True, "compression": "zlib"}],
    ids=["ij", "ome", "zip"],
)
def test_time_points(tmp_path, options):
    volume = asymmetric((3, 4, 2, 6, 7), np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, volume, metadata={"axes": "TZCYX"}, **options)
    assert count_times(path) == 3
    with pytest.raises(ValueError, match=r"time_index.*3 time points"):
        read_stack(path)
    with pytest.raises(ValueError, match="time_index: got 3"):
        read_stack(path, time_index=3)
    stacks = list(read_times(path))
    assert [s.name for s in stacks] == ["a t0", "a t1", "a t2"]
    for time, stack in enumerate(stacks):
        np.testing.assert_array_equal(stack.data, volume[time].transpose(0, 2, 3, 1))


def test_large_files_become_bigtiff(tmp_path, monkeypatch):
    from napari_innergs.io import tiff as module

    volume = asymmetric(dtype=np.uint16, channels=(2,))
    monkeypatch.setattr(module, "_BIG", volume.nbytes - 1)
    write_volume(tmp_path / "a.tif", volume, Grid(volume.shape[:3], OBLIQUE, "um"))
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        assert tiff.is_bigtiff and tiff.is_ome
    np.testing.assert_array_equal(read_stack(tmp_path / "a.tif").data, volume)


@pytest.mark.parametrize("ending", ENDINGS)
def test_other_byte_order(tmp_path, ending):
    volume = asymmetric(dtype=">u2") + 300
    write_volume(tmp_path / f"a{ending}", volume.astype(">u2"), Grid(volume.shape))
    np.testing.assert_array_equal(read_stack(tmp_path / f"a{ending}", axis=0).data[..., 0], volume)


def test_plain_stacks_and_single_images(tmp_path):
    volume = asymmetric()
    tifffile.imwrite(tmp_path / "plain.tif", volume, photometric="minisblack")
    stack = read_stack(tmp_path / "plain.tif")
    np.testing.assert_array_equal(stack.data[..., 0], volume)
    assert stack.units is None
    rgb = asymmetric(channels=(3,))
    tifffile.imwrite(tmp_path / "rgb.tif", rgb, photometric="rgb")
    np.testing.assert_array_equal(read_stack(tmp_path / "rgb.tif").data, rgb)
    for name, image in (("one.tif", volume[0]), ("colour.tif", rgb[0])):
        tifffile.imwrite(tmp_path / name, image)
        with pytest.raises(ValueError, match="at least 2 slices"):
            read_stack(tmp_path / name)


def test_missing_pages_are_noticed(tmp_path):
    path = tmp_path / "a.tif"
    volume = np.random.default_rng(0).integers(0, 255, (6, 20, 20)).astype(np.uint8)
    with tifffile.TiffWriter(path) as writer:
        for image in volume:
            writer.write(image, compression="zlib", contiguous=False, metadata=None)
    with tifffile.TiffFile(path) as tiff:
        end = tiff.pages[3].offset
    (tmp_path / "cut.tif").write_bytes(path.read_bytes()[:end])
    assert read_stack(path).n_slices == 6
    with pytest.raises(ValueError, match=r"cut\.tif"):
        read_stack(tmp_path / "cut.tif")


def test_xml_entities_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    bomb = '<?xml version="1.0"?><!DOCTYPE OME [<!ENTITY a "aaaa">]><OME xmlns="x"><Image>&a;</Image></OME>'
    tifffile.imwrite(path, asymmetric(), description=bomb, metadata=None, photometric="minisblack")
    with pytest.raises(ValueError, match=r"a\.tif"):
        read_stack(path)


# ---------------------------------------------------------------- NIfTI


def test_nifti_signs_against_nibabel(tmp_path):
    nib = pytest.importorskip("nibabel")
    data = asymmetric((4, 5, 6), np.int16)  # i, j, k
    affine = np.array([[-0.9, 0.1, 0.2, 80], [0.15, 0.8, 0.3, -100], [0.1, -0.2, 3.0, -60], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    stack = read_stack(tmp_path / "a.nii.gz")
    assert stack.data.shape == (6, 5, 4, 1) and stack.units == ("mm",) * 3
    for i, j, k in ((0, 0, 0), (3, 1, 5), (1, 4, 2)):
        right, anterior, superior = nib.affines.apply_affine(image.affine, (i, j, k))
        assert stack.data[k, j, i, 0] == data[i, j, k]
        np.testing.assert_allclose(world_of(stack, k, j, i), [superior, -anterior, -right], atol=1e-5)
    ras = read_stack(tmp_path / "a.nii.gz", world=RAS_ZYX)
    np.testing.assert_allclose(
        world_of(ras, 5, 1, 3), nib.affines.apply_affine(image.affine, (3, 1, 5))[::-1], atol=1e-5
    )


@pytest.mark.parametrize("world", [LPS_ZYX, RAS_ZYX])
def test_written_nifti_lies_right_for_nibabel(tmp_path, world):
    nib = pytest.importorskip("nibabel")
    volume = asymmetric((4, 5, 6), np.float32)
    write_volume(tmp_path / "a.nii", volume, Grid(volume.shape, EXACT, "mm"), world=world)
    image = nib.load(tmp_path / "a.nii")
    assert image.shape == (6, 5, 4) and image.header.get_xyzt_units()[0] == "mm"
    for k, j, i in ((0, 0, 0), (3, 1, 5)):
        assert image.dataobj[i, j, k] == volume[k, j, i]
        point = (EXACT @ [k, j, i, 1])[:3]
        np.testing.assert_allclose(
            nib.affines.apply_affine(image.affine, (i, j, k)), world.convert_points(point, RAS)
        )


def test_nifti_input_affine_survives_exactly(tmp_path):
    nib = pytest.importorskip("nibabel")
    affine = np.array([[-0.9, 0.1, 0.2, 80], [0.15, 0.8, 0.3, -100], [0.1, -0.2, 3.0, -60], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(asymmetric((4, 5, 6)), affine), tmp_path / "a.nii")
    stack = read_stack(tmp_path / "a.nii", axis=0)
    write_volume(
        tmp_path / "b.nii", stack.data[..., 0], Grid(stack.data.shape[:3], stack.affine, stack.units)
    )
    np.testing.assert_array_equal(nib.load(tmp_path / "b.nii").affine, nib.load(tmp_path / "a.nii").affine)


@pytest.mark.parametrize(("zooms", "axis"), [((1, 1, 3), 0), ((4, 1, 1), 2), ((1, 4, 1), 1), ((1, 1, 1), 0)])
def test_nifti_slices_along_the_largest_spacing(tmp_path, zooms, axis):
    nib = pytest.importorskip("nibabel")
    nib.save(nib.Nifti1Image(asymmetric((4, 5, 6)), np.diag([*zooms, 1])), tmp_path / "a.nii")
    stack = read_stack(tmp_path / "a.nii")
    assert stack.n_slices == (6, 5, 4)[axis] and stack.spacing == max(zooms)


def test_nifti_time_scale_and_colour(tmp_path):
    nib = pytest.importorskip("nibabel")
    data = asymmetric((4, 5, 6, 3), np.int16)
    image = nib.Nifti1Image(data, np.eye(4))
    image.header.set_slope_inter(0.5, -10)
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "t.nii.gz")
    assert count_times(tmp_path / "t.nii.gz") == 3
    wanted = np.asarray(nib.load(tmp_path / "t.nii.gz").dataobj)
    for time, stack in enumerate(read_times(tmp_path / "t.nii.gz")):
        np.testing.assert_allclose(stack.data[..., 0], wanted[..., time].T, rtol=1e-6)
        assert stack.dtype == np.float32 and stack.units == ("um",) * 3
    rgb = np.zeros((4, 5, 6), [("R", "u1"), ("G", "u1"), ("B", "u1")])
    rgb["G"][1, 2, 3] = 200
    nib.save(nib.Nifti1Image(rgb, np.eye(4)), tmp_path / "c.nii")
    stack = read_stack(tmp_path / "c.nii")
    assert stack.n_channels == 3 and stack.data[3, 2, 1].tolist() == [0, 200, 0]


def test_nifti_with_a_hostile_header(tmp_path):
    nib = pytest.importorskip("nibabel")
    nib.save(nib.Nifti1Image(asymmetric((4, 5, 6)), np.eye(4)), tmp_path / "a.nii")
    content = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<8h", content, 40, 3, 32000, 32000, 32000, 1, 1, 1, 1)
    (tmp_path / "huge.nii").write_bytes(content)
    (tmp_path / "huge.nii.gz").write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ValueError, match="truncated"):
        read_stack(tmp_path / "huge.nii")
    with pytest.raises(ValueError, match="memory"):
        read_stack(tmp_path / "huge.nii.gz")


@pytest.mark.parametrize(("module", "name"), [("nibabel", "a.nii"), ("pydicom", "a.dcm"), ("zarr", "a.zarr")])
def test_missing_libraries_are_named_with_their_extra(tmp_path, monkeypatch, module, name):
    if name.endswith(".zarr"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zarr.json").write_text("{}")
    else:
        (tmp_path / name).write_bytes(b"x" * 400)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"{module}.*pip install 'napari-innergs"):
        read_stack(tmp_path / name)


# ---------------------------------------------------------------- OME-Zarr


def test_zarr_through_the_reference_library(tmp_path):
    ngff = pytest.importorskip("ngff_zarr")
    volume = asymmetric(dtype=np.uint16)
    affine = np.diag([1.5, 0.3, 0.2, 1])
    affine[:3, 3] = (10, 20, 30)
    write_volume(tmp_path / "a.ome.zarr", volume, Grid(volume.shape, affine, "um"))
    image = ngff.from_ngff_zarr(tmp_path / "a.ome.zarr").images[0]
    np.testing.assert_array_equal(np.asarray(image.data), volume)
    assert image.dims == ("z", "y", "x") or list(image.dims) == ["z", "y", "x"]
    assert [image.scale[a] for a in "zyx"] == [1.5, 0.3, 0.2]
    assert [image.translation[a] for a in "zyx"] == [10, 20, 30]
    assert image.axes_units["x"] == "micrometer"


def zarr_image(path, data, axes, transforms, version="0.5", inner="0", extra=None):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group(str(path), mode="w", zarr_format=3 if version == "0.5" else 2)
    array = group.create_array(
        "0", shape=data.shape, dtype=data.dtype, chunks=tuple(max(1, s // 2) for s in data.shape)
    )
    array[...] = data
    multiscales = [
        {
            "version": version, "axes": axes,
            "coordinateTransformations": [{"type": "scale", "scale": [2.0] * data.ndim}],
            "datasets": [{"path": inner, "coordinateTransformations": transforms}],
        }
    ]  # fmt: skip
    attributes = {"multiscales": multiscales, **(extra or {})}
    group.attrs.update({"ome": attributes} if version == "0.5" else attributes)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_zarr_versions_axes_and_transformations(tmp_path, version):
    data = asymmetric((2, 3, 4, 5, 6), np.uint16)
    axes = [{"name": "t", "type": "time"}, {"name": "c", "type": "channel"}]
    units = ["millimeter", "micrometer", "micrometer"]
    axes += [{"name": n, "type": "space", "unit": u} for n, u in zip("zyx", units, strict=True)]
    transforms = [
        {"type": "scale", "scale": [1, 1, 0.002, 0.5, 0.25]},
        {"type": "translation", "translation": [0, 0, 0.01, 3, 4]},
    ]
    omero = {"omero": {"channels": [{"label": n} for n in "abc"]}}
    zarr_image(tmp_path / "a.zarr", data, axes, transforms, version, extra=omero)
    stacks = list(read_times(tmp_path / "a.zarr"))
    assert len(stacks) == 2 and stacks[1].channel_names == ("a", "b", "c") and stacks[1].units == ("um",) * 3
    np.testing.assert_array_equal(stacks[1].data, data[1].transpose(1, 2, 3, 0))
    # the image's own scale of 2 comes after the level's scale and shift
    np.testing.assert_allclose(stacks[1].affine.diagonal(), [4, 1, 0.5, 1])
    np.testing.assert_allclose(stacks[1].affine[:3, 3], [20, 6, 8])
    with pytest.raises(ValueError, match="level: got 1"):
        read_stack(tmp_path / "a.zarr", time_index=0, level=1)


def test_zarr_that_is_hostile(tmp_path):
    data = asymmetric()
    axes = [{"name": n, "type": "space"} for n in "zyx"]
    good = [{"type": "scale", "scale": [1, 1, 1]}]
    for inner in ("../../etc", "/0", "9"):
        zarr_image(tmp_path / "a.zarr", data, axes, good, inner=inner)
        with pytest.raises(ValueError, match=r"a\.zarr"):
            read_stack(tmp_path / "a.zarr")
    for bad_axes, bad in (
        (axes[:2], good),
        ([{"name": n} for n in "zyq"], good),
        (axes, [{"type": "scale", "scale": [1, 0, 1]}]),
        (axes, [{"type": "rotation"}]),
        (axes, [{"type": "scale", "scale": ["a", 1, 1]}]),
        (axes, [{"type": "scale"}]),
    ):
        zarr_image(tmp_path / "b.zarr", data, bad_axes, bad)
        with pytest.raises(ValueError, match=r"b\.zarr"):
            read_stack(tmp_path / "b.zarr")
    zarr_image(tmp_path / "c.zarr", np.random.default_rng(0).random((4, 8, 8)), axes, good)
    chunk = next(p for p in (tmp_path / "c.zarr" / "0").rglob("*") if p.is_file() and p.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(ValueError, match=r"pixels of .*c\.zarr"):
        read_stack(tmp_path / "c.zarr")


# ---------------------------------------------------------------- NPZ


def test_npz_keys(tmp_path):
    data = asymmetric(channels=(2,))
    np.savez(
        tmp_path / "a.npz", data=np.moveaxis(data, -1, 0), axes="czyx", affine=OBLIQUE, units="mm",
        channel_names=["a", "b"], mask=np.ones(data.shape[:3], bool), positions=[8.0, 0, 1, 2, 5],
    )  # fmt: skip
    stack = read_stack(tmp_path / "a.npz")
    assert stack.positions.tolist() == [0, 1, 2, 5, 8] and stack.order.tolist() == [1, 2, 3, 4, 0]
    np.testing.assert_array_equal(stack.data, data[stack.order])
    assert stack.mask.all() and stack.channel_names == ("a", "b") and stack.units == ("mm",) * 3
    with pytest.raises(ValueError, match=r"key.*need one of \['affine'"):
        read_stack(tmp_path / "a.npz", key="volume")
    np.savez(tmp_path / "b.npz", data=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"b\.npz"):
        read_stack(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", data=data, spacing=(1, -1, 1))
    with pytest.raises(ValueError, match=r"spacing.*c\.npz"):
        read_stack(tmp_path / "c.npz")


class Trap:
    sprung = False

    def __reduce__(self):
        return (setattr, (Trap, "sprung", True))


def test_nothing_in_a_file_is_executed(tmp_path):
    trap = np.empty(1, object)
    trap[0] = Trap()
    np.savez(tmp_path / "a.npz", data=trap, gaussians=trap, means=trap)
    np.save(tmp_path / "a.npy", trap)
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap()))
    for call in (
        lambda: read_stack(tmp_path / "a.npz"),
        lambda: read_stack(tmp_path / "a.npy"),
        lambda: read_stack(tmp_path / "b.npz"),
        lambda: GaussianModel.load(tmp_path / "a.npz"),
    ):
        with pytest.raises(ValueError, match="path: "):
            call()
    assert not Trap.sprung


def test_npz_with_a_lying_header(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "<f8", "fortran_order": False, "shape": (10**6,) * 3}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("data.npy", stream.getvalue() + b"\0" * 100)
    with pytest.raises(ValueError, match="announces more"):
        read_stack(tmp_path / "a.npz")


# ---------------------------------------------------------------- Gaussian models


def model(count=7, channels=2, **options):
    rng = np.random.default_rng(5)
    return GaussianModel(
        rng.normal(size=(count, 3)) + 1e5,  # far from the origin: float32 would move them
        rng.normal(size=(count, 3)),
        rng.normal(size=(count, 4)),
        rng.normal(size=(count, channels)) * 1000,
        rng.normal(size=count),
        **options,
    )


@pytest.mark.parametrize("ending", [".ply", ".npz"])
@pytest.mark.parametrize("count", [0, 7])
@pytest.mark.parametrize("channels", [1, 4])
def test_model_round_trip(tmp_path, ending, count, channels):
    made = model(count, channels, field="additive", background=np.arange(channels), eps=0.25, units="um")
    made.save(tmp_path / f"a{ending}")
    back = GaussianModel.load(tmp_path / f"a{ending}")
    np.testing.assert_array_equal(back.means, made.means)
    np.testing.assert_array_equal(back.amplitudes, made.amplitudes)
    np.testing.assert_array_equal(back.log_weights, made.log_weights)
    np.testing.assert_allclose(back.covariances(), made.covariances(), rtol=1e-5, atol=1e-6)
    assert (back.field, back.eps, back.units) == ("additive", 0.25, ("um",) * 3)
    np.testing.assert_array_equal(back.background, made.background)


def test_ply_is_a_splat_file_in_xyz(tmp_path):
    # a needle along world x at z, y, x = 1, 2, 3, turned 30 degrees about z
    half = np.deg2rad(15)
    needle = GaussianModel([[1, 2, 3]], np.log([[0.1, 0.2, 5]]), [[np.cos(half), np.sin(half), 0, 0]], [9.0])
    needle.save(tmp_path / "a.ply")
    table, _ = ply.read_ply(tmp_path / "a.ply")
    assert [float(table[n][0]) for n in "xyz"] == [3, 2, 1]
    w, x, y, z = (float(table[f"rot_{i}"][0]) for i in range(4))
    # the usual matrix of a quaternion in x, y, z order, as viewers use it
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    scale = np.exp([float(table[f"scale_{i}"][0]) for i in range(3)])
    np.testing.assert_allclose(
        (rotation * scale**2) @ rotation.T, needle.covariances()[0][::-1, ::-1], rtol=1e-5, atol=1e-6
    )


def splat_file(path, count=3, fields=None, extra_header="", body=None):
    names = fields or [
        *("x", "y", "z", "f_dc_0", "f_dc_1", "f_dc_2", "opacity", "scale_0", "scale_1", "scale_2"),
        *(f"rot_{i}" for i in range(4)),
    ]
    header = f"ply\nformat binary_little_endian 1.0\n{extra_header}element vertex {count}\n"
    header += "".join(f"property float {n}\n" for n in names) + "end_header\n"
    data = np.full((3, len(names)), 0.5, "<f4").tobytes() if body is None else body
    path.write_bytes(header.encode() + data)


def test_splats_of_others_can_be_read(tmp_path):
    splat_file(tmp_path / "a.ply")
    found = GaussianModel.load(tmp_path / "a.ply")
    assert len(found) == 3 and found.n_channels == 3
    np.testing.assert_allclose(found.amplitudes, 0.5 + 0.28209479 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(np.exp(found.log_weights), 1 / (1 + np.exp(-0.5)), rtol=1e-6)


def test_moved_splats_are_believed(tmp_path):
    model().save(tmp_path / "a.ply")
    table, comments = ply.read_ply(tmp_path / "a.ply")
    table = table.copy()
    table["x"] += 100
    ply.write_ply(tmp_path / "b.ply", table, comments[0].removeprefix("napari-innergs "))
    moved = GaussianModel.load(tmp_path / "b.ply")
    np.testing.assert_allclose(moved.means[:, 2], model().means[:, 2] + 100, atol=0.01)
    np.testing.assert_array_equal(moved.means[:, :2], model().means[:, :2])


HEADER = "ply\nformat binary_little_endian 1.0\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"plx\n",
        b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nend_header\n1\n",
        b"ply\nformat binary_big_endian 1.0\nelement vertex 0\nproperty float x\nend_header\n",
        (HEADER + "element vertex 1\nproperty float x\n").encode(),
        (HEADER + "element vertex 999999999\nproperty float x\nend_header\nabcd").encode(),
        (HEADER + "element vertex 99999999999999999999999999\nproperty float x\nend_header\n").encode(),
        (HEADER + "element vertex -1\nproperty float x\nend_header\n").encode(),
        (HEADER + "element vertex 1\nproperty quaternion x\nend_header\nabcd").encode(),
        (HEADER + "element vertex 1\nproperty list uchar int x\nend_header\nabcd").encode(),
        (HEADER + "element vertex 1\nproperty float x\nproperty float x\nend_header\nabcdabcd").encode(),
        (HEADER + "element vertex 1\nend_header\n").encode(),
        (HEADER + "element face 1\nproperty float x\nelement vertex 0\nend_header\nabcd").encode(),
        (HEADER + "element vertex 1\nproperty float x\nend_header\nabcd").encode(),
        (HEADER + "comment x\n" * 100000 + "end_header\n").encode(),
        b"ply\n" + b"x" * 10**6,
    ],
)
def test_hostile_ply(tmp_path, content):
    (tmp_path / "bad.ply").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.ply"):
        GaussianModel.load(tmp_path / "bad.ply")


def test_damaged_models(tmp_path):
    for header in (
        "{",
        "[]",
        '{"version": 2}',
        '{"version": 1, "field": ["a"]}',
        '{"version": 1, "eps": "a"}',
        "[" * 9999,
    ):
        splat_file(tmp_path / "bad.ply", extra_header=f"comment napari-innergs {header}\n")
        with pytest.raises(ValueError, match=r"bad\.ply"):
            GaussianModel.load(tmp_path / "bad.ply")
    splat_file(tmp_path / "bad.ply", body=np.full((3, 14), np.nan, "<f4").tobytes())
    with pytest.raises(ValueError, match=r"bad\.ply.*NaN"):
        GaussianModel.load(tmp_path / "bad.ply")
    model().save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        arrays = dict(archive)
    for change in ({"means": arrays["means"][:3]}, {"gaussians": np.frombuffer(b"{}", np.uint8)}):
        np.savez(tmp_path / "bad.npz", **{**arrays, **change})
        with pytest.raises(ValueError, match=r"bad\.npz"):
            GaussianModel.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "bad.npz", data=np.zeros(3))
    with pytest.raises(ValueError, match="no Gaussian model"):
        GaussianModel.load(tmp_path / "bad.npz")
    for call in (lambda: model().save(tmp_path / "a.txt"), lambda: GaussianModel.load(Path(__file__))):
        with pytest.raises(ValueError, match=r"\.ply or \.npz"):
            call()


def test_model_header_is_plain_json(tmp_path):
    model(units="mm").save(tmp_path / "a.ply")
    _, comments = ply.read_ply(tmp_path / "a.ply")
    assert json.loads(comments[0].removeprefix("napari-innergs "))["units"] == ["mm"] * 3
