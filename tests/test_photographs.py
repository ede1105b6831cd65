"""Photographs: their checks, and how they come from files."""

import doctest
import io
import json
import warnings

import numpy as np
import pytest
import tifffile
from PIL import Image
from scipy import ndimage
from scipy.spatial.transform import Rotation

from napari_innergs import Camera, Photographs, photographs, read_photographs
from napari_innergs.geometry.camera import Lens
from napari_innergs.io import cameras, files

K = np.array([[40.0, 0, 15.2], [0, 40.0, 10.7], [0, 0, 1]])
H, W = 24, 32


def make_cameras(count=4, size=(H, W)):
    eyes = Rotation.random(count, random_state=1).apply([6.0, 1.0, -2.0])
    return [Camera.looking_at(eye, (0, 0, 0), K, size) for eye in eyes]


def scene(camera, background=0.0):
    """Show three balls of different colours and sizes, none on an axis: straight colours and coverage."""
    rows, columns = np.indices(camera.size)
    origins, directions = camera.rays(rows, columns)
    colours = np.full((*camera.size, 3), background)
    nearest = np.full(camera.size, np.inf)
    for centre, radius, colour in (
        ((0.5, -0.3, 0.2), 0.9, (1.0, 0.2, 0.1)),
        ((-0.6, 0.8, -0.1), 0.5, (0.2, 0.9, 0.3)),
        ((0.1, 0.2, 1.2), 0.4, (0.1, 0.3, 0.8)),
    ):
        to_centre = np.array(centre) - origins
        along = (to_centre * directions).sum(-1)
        hit = ((to_centre**2).sum(-1) - along**2 < radius**2) & (along < nearest)
        colours[hit] = colour
        nearest[hit] = along[hit]
    return colours, np.isfinite(nearest).astype(float)


def bytes_of(values):
    return np.rint(np.asarray(values) * 255).astype(np.uint8)


def write_set(folder, suffix=".png", alpha=True, names=None, count=4, images="images", **table):
    """Write pictures of the scene and their transforms.json; give the cameras."""
    made = make_cameras(count)
    names = [f"v{i}" for i in range(count)] if names is None else names
    (folder / images).mkdir(parents=True, exist_ok=True)
    frames = []
    for name, camera in zip(names, made, strict=True):
        colours, cover = scene(camera, 0.6)
        pixels = np.dstack([colours, cover]) if alpha else colours
        file = folder / images / f"{name}{suffix}"
        if suffix in (".tif", ".tiff"):
            tifffile.imwrite(
                file, bytes_of(pixels), photometric="rgb", extrasamples=["unassalpha"] if alpha else None
            )
        else:
            Image.fromarray(bytes_of(pixels)).save(file, quality=98)
        frames.append({"file_path": f"{images}/{name}{suffix}", "transform_matrix": matrix_of(camera)})
    content = {"fl_x": 40.0, "cx": 15.7, "cy": 11.2, "w": W, "h": H, "frames": frames, **table}
    (folder / "transforms.json").write_text(json.dumps(content))
    return made


def matrix_of(camera):
    """Camera-to-world with OpenGL's axes, (x, y, z)."""
    pose = camera.world_to_camera.copy()
    pose[:, :3] = pose[:, 2::-1]
    return (np.linalg.inv(pose) @ np.diag([1.0, -1, -1, 1])).tolist()


def edit(folder, change):
    file = folder / "transforms.json"
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))


def write_colmap(folder, made, names, model="PINHOLE 32 24 40 40 15.7 11.2"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text(f"1 {model}\n")
    lines = []
    for name, camera in zip(names, made, strict=True):
        pose = camera.world_to_camera.copy()
        pose[:, :3] = pose[:, 2::-1]
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat()
        lines += [" ".join(map(str, (1, w, x, y, z, *pose[:3, 3], 1, name))), ""]
    (folder / "images.txt").write_text("\n".join(lines))


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ---- the object


def make(count=3, size=(4, 6), **changes):
    made = [Camera.looking_at((9.0 + i, 0, 1), (0, 0, 0), K, size, up=(0, 1, 0)) for i in range(count)]
    rng = np.random.default_rng(0)
    given = {
        "images": rng.random((count, *size, 3)),
        "cameras": made,
        "masks": rng.random((count, *size)),
        "names": [f"n{i}" for i in range(count)],
        "points": rng.random((5, 3)),
        "point_colours": rng.integers(0, 256, (5, 3)).astype(np.uint8),
        "valid": rng.random((count, *size)) > 0.1,
    }
    return Photographs(**{**given, **changes})


def test_examples():
    assert doctest.testmod(photographs).failed == 0


def test_kept_as_given():
    pixels = np.random.default_rng(1).integers(0, 256, (3, 4, 6, 3)).astype(np.uint8)
    found = make(images=pixels)
    assert found.images.dtype == np.uint8 and found.n_views == len(found) == 3 and found.size == (4, 6)
    np.testing.assert_allclose(found.image(1), pixels[1] / 255, atol=1e-7)
    assert found.masks.dtype == np.float32 and found.point_colours.dtype == np.float32
    assert found.point_colours.max() <= 1
    assert not found.images.flags.writeable and pixels.flags.writeable
    with pytest.raises(AttributeError, match="immutable"):
        found.images = pixels
    plain = Photographs(pixels, found.cameras)
    assert (
        plain.names == ("0", "1", "2")
        and plain.masks is None
        and plain.valid is None
        and plain.points is None
    )
    assert make(masks=np.ones((3, 4, 6), bool)).masks.dtype == np.float32


def test_subset():
    found = make(5)
    for indices in ([3, 1], slice(1, 3), np.array([0, 1, 0, 1, 0], bool), 2, [-1]):
        chosen = np.atleast_1d(np.arange(5)[indices])
        part = found.subset(indices)
        np.testing.assert_array_equal(part.images, found.images[chosen])
        np.testing.assert_array_equal(part.masks, found.masks[chosen])
        np.testing.assert_array_equal(part.valid, found.valid[chosen])
        assert part.names == tuple(f"n{i}" for i in chosen)
        assert part.cameras == tuple(found.cameras[i] for i in chosen)
        np.testing.assert_array_equal(part.points, found.points)
    for bad in ([5], [], np.zeros(5, bool), "a"):
        with pytest.raises(ValueError, match="indices: "):
            found.subset(bad)


def test_downsampled_pictures_fit_their_cameras():
    big = make_cameras(3, (H * 4, W * 4))
    images = [scene(camera)[0] for camera in big]
    found = Photographs(
        images, big, [scene(camera)[1] for camera in big], valid=np.ones((3, H * 4, W * 4), bool)
    )
    small = found.downsampled(4)
    assert small.size == (H, W) and small.valid.all()
    np.testing.assert_allclose(
        small.images[0, 3, 5], np.mean(images[0][12:16, 20:24], axis=(0, 1)), atol=1e-6
    )
    # where a square is of one colour, the small camera sees that colour
    for image, camera in zip(small.images, small.cameras, strict=True):
        direct = scene(camera)[0]
        same = np.abs(image - direct).max(axis=-1) < 1e-6
        assert same.mean() > 0.85
        assert np.abs(image - np.roll(direct, 1, axis=1)).mean() > 1.5 * np.abs(image - direct).mean()
    assert found.downsampled(1) is found
    odd = make(3, (5, 7), valid=np.indices((3, 5, 7))[1] > 0).downsampled(2)
    assert odd.size == (2, 3) and not odd.valid[:, 0].any() and odd.valid[:, 1].all()
    with pytest.raises(ValueError, match="factor: got 6, need an integer from 1 to 4"):
        make().downsampled(6)


def test_moved_and_other_cameras():
    found = make()
    similarity = np.eye(4)
    similarity[:3, :3] = 2.5 * Rotation.random(random_state=2).as_matrix()
    similarity[:3, 3] = (1.0, -2.0, 3.0)
    moved = found.moved(similarity)
    for before, after in zip(found.cameras, moved.cameras, strict=True):
        np.testing.assert_allclose(after.project(moved.points)[0], before.project(found.points)[0], atol=1e-9)
    assert found.with_cameras(moved.cameras).cameras == moved.cameras
    assert Photographs(found.images, found.cameras).moved(similarity).points is None


NAN = np.full((3, 4, 6, 3), 0.5)
NAN[1, 2, 3] = np.nan
EMPTY = np.ones((3, 4, 6))
EMPTY[2] = 0


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"images": np.zeros((3, 4, 6), np.uint8)}, ValueError, r"images: got shape \(3, 4, 6\)"),
        ({"images": np.zeros((3, 4, 6, 4))}, ValueError, "give the fourth channel as masks"),
        ({"images": np.zeros((0, 4, 6, 3))}, ValueError, "images: got shape"),
        ({"images": np.zeros((3, 4, 6, 3), np.int64)}, TypeError, "images: got values of type int64"),
        ({"images": NAN}, ValueError, "images: 'n1' has 3 values that are NaN or infinite"),
        (
            {"images": np.full((3, 4, 6, 3), 200.0)},
            ValueError,
            "'n0' has values from 200 to 200, need 0 to 1; divide",
        ),
        ({"images": np.zeros((2, 4, 6, 3))}, ValueError, "cameras: got 3 for 2 photographs"),
        ({"images": np.zeros((3, 4, 7, 3))}, ValueError, "cameras: that of 'n0' has 4 x 6 .* 4 x 7"),
        ({"cameras": [1, 2, 3]}, TypeError, "cameras: got int"),
        ({"names": ["a"]}, ValueError, "names: got 1, need 3"),
        ({"masks": EMPTY}, ValueError, "masks: 1 of 3 show no object, the first is that of 'n2'"),
        ({"masks": np.ones((3, 4, 5))}, ValueError, r"masks: got shape \(3, 4, 5\)"),
        ({"masks": np.full((3, 4, 6), 255, np.uint8)}, TypeError, "masks: got values of type uint8"),
        ({"masks": np.full((3, 4, 6), 255.0)}, ValueError, "masks: that of 'n0' has values from 255"),
        ({"valid": np.ones((3, 4, 6))}, ValueError, "valid: got float64"),
        ({"points": None}, ValueError, "point_colours: got colours without points"),
        ({"points": np.ones((5, 2))}, ValueError, "points: got shape"),
        ({"points": np.full((5, 3), np.inf)}, ValueError, "points: .*finite"),
        ({"point_colours": np.ones((4, 3))}, ValueError, "point_colours: got shape"),
        ({"point_colours": np.ones((5, 3), int)}, TypeError, "point_colours: got values of type"),
        ({"point_colours": np.full((5, 3), 9.0)}, ValueError, "point_colours: .* 9"),
    ],
)
def test_refused(changes, error, text):
    with pytest.raises(error, match=text):
        make(**changes)


# ---- from files


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_becomes_the_mask(tmp_path, quiet, suffix):
    made = write_set(tmp_path, suffix)
    found = read_photographs(tmp_path)
    assert found.names == tuple(f"images/v{i}{suffix}" for i in range(4)) and found.images.dtype == np.float32
    for i, camera in enumerate(made):
        colours, cover = scene(camera)
        np.testing.assert_allclose(found.images[i], colours, atol=0.5 / 255 + 1e-6)
        np.testing.assert_array_equal(found.masks[i], cover)
        np.testing.assert_allclose(found.cameras[i].world_to_camera, camera.world_to_camera, atol=1e-12)
        np.testing.assert_allclose(found.cameras[i].intrinsics, K)
    assert found.valid is None


def test_half_covered_pixels_are_multiplied_once(tmp_path):
    write_set(tmp_path)
    pixels = np.zeros((H, W, 4), np.uint8)
    pixels[3:9, 4:20] = (200, 100, 50, 128)
    Image.fromarray(pixels).save(tmp_path / "images" / "v1.png")
    found = read_photographs(tmp_path)
    np.testing.assert_allclose(found.images[1, 5, 6], np.array([200, 100, 50]) / 255 * 128 / 255, atol=1e-6)
    assert found.masks[1, 5, 6] == pytest.approx(128 / 255)
    # associated alpha is not multiplied again
    edit(tmp_path, lambda table: table["frames"][1].update(file_path="images/v9.tif"))
    ready = pixels.copy()
    ready[3:9, 4:20, :3] = (100, 50, 25)
    tifffile.imwrite(
        tmp_path / "images" / "v9.tif", ready * np.uint16(257), photometric="rgb", extrasamples=["assocalpha"]
    )
    (tmp_path / "images" / "v1.png").unlink()
    np.testing.assert_allclose(
        read_photographs(tmp_path).images[1, 5, 6], np.array([100, 50, 25]) / 255, atol=1e-4
    )


def test_opaque_pictures_have_no_masks(tmp_path, quiet):
    made = write_set(tmp_path, alpha=False)
    found = read_photographs(tmp_path)
    assert found.masks is None and found.images.dtype == np.uint8
    np.testing.assert_array_equal(found.images[2], bytes_of(scene(made[2], 0.6)[0]))
    # an alpha channel that says nothing
    for file in (tmp_path / "images").iterdir():
        Image.open(file).convert("RGBA").save(file)
    assert read_photographs(tmp_path).masks is None


@pytest.mark.parametrize("kind", ["jpeg", "grey", "palette", "png16", "tif16", "planar", "float"])
def test_kinds_of_pictures(tmp_path, quiet, kind):
    suffix = {"jpeg": ".jpg", "tif16": ".tif", "planar": ".tif", "float": ".tif"}.get(kind, ".png")
    made = write_set(tmp_path, suffix, alpha=False)
    expected = scene(made[0], 0.6)[0]
    file, tolerance = tmp_path / "images" / f"v0{suffix}", 1e-5
    deep = np.rint(expected * 65535).astype(np.uint16)
    if kind == "jpeg":
        # blocks of 8 x 8 blur sharp colours
        assert np.abs(read_photographs(tmp_path).image(0) - expected).mean() < 0.03
        return
    if kind == "grey":
        Image.fromarray(bytes_of(expected[..., 0])).save(file)
        expected, tolerance = np.repeat(expected[..., :1], 3, axis=2), 0.003
    elif kind == "palette":
        Image.fromarray(bytes_of(expected)).quantize(16).save(file)
        tolerance = 0.01
    elif kind == "png16":
        import cv2

        file.write_bytes(cv2.imencode(".png", deep[..., ::-1])[1].tobytes())
    elif kind == "tif16":
        tifffile.imwrite(file, deep, photometric="rgb")
    elif kind == "planar":
        tifffile.imwrite(file, np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate")
    else:
        tifffile.imwrite(file, expected.astype(np.float32), photometric="rgb")
    np.testing.assert_allclose(read_photographs(tmp_path).image(0), expected, atol=tolerance)


def test_names_of_other_computers(tmp_path, quiet):
    write_set(tmp_path, names=["a 1", "r_0.5", "c", "d"])
    (tmp_path / "images" / "c.png").rename(tmp_path / "images" / "C.PNG")

    def change(table):
        paths = [r".\images\a 1.png", "images/r_0.5", "images/c", r"C:\photos\images\d.png"]
        for frame, path in zip(table["frames"], paths, strict=True):
            frame["file_path"] = path

    edit(tmp_path, change)
    found = read_photographs(tmp_path)
    assert found.names == ("images/a 1.png", "images/r_0.5", "images/c", "C:/photos/images/d.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "transforms.json").rename(tmp_path / "elsewhere" / "transforms.json")
    edit(
        tmp_path / "elsewhere",
        lambda table: [
            f.update(file_path=f"../images/{n}")
            for f, n in zip(table["frames"], ["a 1", "r_0.5", "C", "d"], strict=True)
        ],
    )
    np.testing.assert_array_equal(read_photographs(tmp_path / "elsewhere").images, found.images)


def test_pictures_of_colmap_are_found(tmp_path, quiet):
    made = write_set(tmp_path)
    (tmp_path / "transforms.json").unlink()
    write_colmap(tmp_path / "sparse" / "0", made, [f"v{i}.png" for i in range(4)])
    for path in (tmp_path, tmp_path / "sparse" / "0"):
        assert read_photographs(path).names == tuple(f"v{i}.png" for i in range(4))
    (tmp_path / "images").rename(tmp_path / "pictures")
    with pytest.raises(
        ValueError, match="path: 0 of 4 cameras have photographs, need at least 3; give the folder"
    ):
        read_photographs(tmp_path)
    assert len(read_photographs(tmp_path, tmp_path / "pictures")) == 4
    with pytest.raises(ValueError, match=r"images: .* is no folder"):
        read_photographs(tmp_path, tmp_path / "pictures" / "v0.png")


def test_cameras_without_photographs_and_the_reverse(tmp_path):
    made = write_set(tmp_path, count=5)
    write_colmap(tmp_path / "colmap", made, [f"v{i}.png" for i in range(5)])
    (tmp_path / "images" / "v1.png").rename(tmp_path / "images" / "other.png")
    for path in (tmp_path, tmp_path / "colmap"):
        with pytest.warns(UserWarning) as heard:
            found = read_photographs(path)
        first, second = (str(one.message) for one in heard)
        assert "1 of 5 cameras have no photograph" in first and "v1.png'; add the files" in first
        assert "1 photographs have no camera" in second and "'other.png'" in second
        assert [name[-6:-4] for name in found.names] == ["v0", "v2", "v3", "v4"]
        np.testing.assert_allclose(found.cameras[1].world_to_camera, made[2].world_to_camera, atol=1e-9)
    for name in ("v0", "v2"):
        (tmp_path / "images" / f"{name}.png").unlink()
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="2 of 5 cameras have photographs, need at least 3"),
    ):
        read_photographs(tmp_path)


def test_pictures_of_another_split_are_expected(tmp_path, quiet):
    write_set(tmp_path, count=8)
    table = json.loads((tmp_path / "transforms.json").read_text())
    for name, part in (("train", slice(0, 5)), ("test", slice(5, 8))):
        (tmp_path / f"transforms_{name}.json").write_text(
            json.dumps({**table, "frames": table["frames"][part]})
        )
    (tmp_path / "transforms.json").write_text("damaged")
    assert read_photographs(tmp_path / "transforms_test.json").n_views == 3


def test_too_few_views(tmp_path):
    write_set(tmp_path, count=2)
    with pytest.raises(ValueError, match="path: 2 of 2 cameras have photographs, need at least 3"):
        read_photographs(tmp_path)


def test_mixed_sizes(tmp_path):
    write_set(tmp_path)
    file = tmp_path / "images" / "v2.png"
    Image.open(file).resize((16, 12)).save(file)
    with pytest.raises(
        ValueError, match=r"v2.png' has 12 x 16 pixels, its camera 24 x 32 pixels; need the photographs"
    ):
        read_photographs(tmp_path)
    edit(tmp_path, lambda table: table["frames"][2].update(w=16, h=12))
    with pytest.raises(
        ValueError, match=r"mixed sizes: 'images/v2.png' has 12 x 16 pixels, 'images/v0.png' 24 x 32"
    ):
        read_photographs(tmp_path)


def write_masks(folder, made, name="v{}.png"):
    folder.mkdir(exist_ok=True)
    for i, camera in enumerate(made):
        Image.fromarray(bytes_of(scene(camera)[1])).save(folder / name.format(i))
    return folder


@pytest.mark.parametrize("name", ["v{}.png", "v{}.tif", "v{}.jpg.png"])
def test_masks_from_files(tmp_path, quiet, name):
    made = write_set(tmp_path, ".jpg", alpha=False)
    masks = write_masks(tmp_path / "masks", made, name)
    found = read_photographs(tmp_path, masks=masks)
    for i, camera in enumerate(made):
        np.testing.assert_array_equal(found.masks[i], scene(camera)[1])
        assert (found.images[i][found.masks[i] == 0] == 0).all() and found.images[i].max() > 0.5


def test_masks_that_the_file_names(tmp_path, quiet):
    made = write_set(tmp_path, alpha=False)
    write_masks(tmp_path / "m", made)
    # 0 and 1 are no and yes
    Image.fromarray(scene(made[0])[1].astype(np.uint8)).save(tmp_path / "m" / "v0.png")
    edit(tmp_path, lambda t: [frame.update(mask_path=rf"m\v{i}.png") for i, frame in enumerate(t["frames"])])
    found = read_photographs(tmp_path)
    np.testing.assert_array_equal(found.masks, [scene(camera)[1] for camera in made])
    (tmp_path / "m" / "v3.png").unlink()
    with pytest.raises(
        ValueError, match=r"1 of the masks that the file names are missing, the first are 'm/v3.png'"
    ):
        read_photographs(tmp_path)


def test_missing_and_empty_masks(tmp_path):
    made = write_set(tmp_path, alpha=False, count=5)
    masks = write_masks(tmp_path / "masks", made)
    Image.new("L", (W, H)).save(masks / "v3.png")
    with pytest.warns(UserWarning, match="1 of 5 masks are empty .* 'images/v3.png'"):
        found = read_photographs(tmp_path, masks=masks)
    assert [name[-6:] for name in found.names] == ["v0.png", "v1.png", "v2.png", "v4.png"]
    np.testing.assert_array_equal(found.masks[3], scene(made[4])[1])
    Image.new("L", (9, 9)).save(masks / "v1.png")
    with pytest.raises(ValueError, match=r"masks: .*v1.png' has 9 x 9 pixels, its photograph 24 x 32"):
        read_photographs(tmp_path, masks=masks)
    (masks / "v2.png").unlink()
    with pytest.raises(ValueError, match=r"masks: 1 of 5 photographs have no mask in .* 'images/v2.png'"):
        read_photographs(tmp_path, masks=masks)
    for i in (0, 1, 2):
        Image.new("L", (W, H)).save(masks / f"v{i}.png")
    with pytest.raises(ValueError, match="path: 1 of 5 masks show an object, need at least 3"):
        read_photographs(tmp_path, masks=masks)
    colours = Image.open(tmp_path / "images" / "v1.png")
    colours.putalpha(Image.fromarray(bytes_of(scene(made[1])[1])))
    colours.save(tmp_path / "images" / "v1.png")
    with pytest.raises(
        ValueError, match=r"masks: 4 of 5 photographs have no alpha or mask, the first are 'images/v0.png'"
    ):
        read_photographs(tmp_path)


def test_lens_is_taken_out(tmp_path, quiet):
    """Pictures made through a lens, ray by ray, come back as those of the pinhole camera."""
    size = (H * 4, W * 4)
    big = np.array([[160.0, 0, 62.3], [0, 160, 44.3], [0, 0, 1]])
    lens = Lens((0.25, -0.05), (0.004, -0.003))
    eyes = Rotation.random(4, random_state=1).apply([6.0, 1.0, -2.0])
    made = [Camera.looking_at(eye, (0, 0, 0), big, size) for eye in eyes]
    write_set(
        tmp_path, cx=62.8, cy=44.8, fl_x=160.0, w=size[1], h=size[0], k1=0.25, k2=-0.05, p1=0.004, p2=-0.003
    )
    # for each pixel of the lens's picture the place in the ideal one, by Newton's fixed point
    rows, columns = np.indices(size)
    wanted = np.stack([(columns - 62.3) / 160, (rows - 44.3) / 160], axis=-1)
    ideal = wanted.copy()
    for _ in range(60):
        ideal += wanted - lens.distort(ideal)
    np.testing.assert_allclose(lens.distort(ideal), wanted, atol=1e-9)
    for i, camera in enumerate(made):
        pixels = pattern(camera, ideal[..., 1] * 160 + 44.3, ideal[..., 0] * 160 + 62.3)
        Image.fromarray(bytes_of(pixels)).save(tmp_path / "images" / f"v{i}.png")
    found = read_photographs(tmp_path)
    assert found.valid is not None and 0.8 < found.valid.mean() < 1
    assert found.masks[~found.valid].max() == 0 and found.images[~found.valid].max() == 0
    for i, camera in enumerate(made):
        expected = pattern(camera, rows, columns)
        np.testing.assert_allclose(found.cameras[i].intrinsics, big)
        # not the rim, where a cubic has too few neighbours; two roundings to eight bits
        inside = ndimage.binary_erosion(found.valid[i], iterations=3)
        wrong = np.abs(found.images[i] - expected[..., :3] * expected[..., 3:])[inside]
        assert wrong.max() < 0.01
        np.testing.assert_allclose(found.masks[i][inside], expected[..., 3][inside], atol=0.01)
    assert read_photographs(tmp_path, factor=4).size == (H, W)


def pattern(camera, rows, columns):
    """Show waves of the direction of view at any places of a camera's picture: colours and alpha."""
    turn = Rotation.random(4, random_state=7).apply([1.0, 0, 0])
    return 0.5 + 0.4 * np.sin(30 * camera.rays(rows, columns)[1] @ turn.T)


def test_opaque_pictures_through_a_lens_have_no_masks(tmp_path, quiet):
    write_set(tmp_path, alpha=False, k1=0.3)
    found = read_photographs(tmp_path)
    assert found.masks is None and not found.valid.all() and found.images.dtype == np.float32
    for file in (tmp_path / "images").iterdir():
        Image.open(file).convert("RGBA").save(file)
    assert read_photographs(tmp_path).masks is None


def test_reading_smaller(tmp_path, quiet):
    write_set(tmp_path)
    whole = read_photographs(tmp_path).downsampled(3)
    small = read_photographs(tmp_path, factor=3)
    np.testing.assert_allclose(small.images, whole.images, atol=1e-6)
    np.testing.assert_allclose(small.masks, whole.masks, atol=1e-6)
    assert small.cameras == whole.cameras
    with pytest.raises(ValueError, match="factor: got 100"):
        read_photographs(tmp_path, factor=100)


@pytest.mark.parametrize("kind", ["truncated", "truncated16", "text", "empty", "tif", "values", "channels"])
def test_damaged_pictures_are_named(tmp_path, kind):
    suffix = ".tif" if kind in ("tif", "values", "channels") else ".png"
    write_set(tmp_path, suffix)
    file = tmp_path / "images" / f"v2{suffix}"
    if kind == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (H, W, 3)).astype(np.uint8)
        Image.fromarray(noise).save(file)
        file.write_bytes(file.read_bytes()[:900])
    elif kind == "truncated16":
        import cv2

        noise = np.random.default_rng(0).integers(0, 65536, (H, W, 3)).astype(np.uint16)
        file.write_bytes(cv2.imencode(".png", noise)[1].tobytes()[:1500])
    elif kind == "values":
        tifffile.imwrite(file, np.full((H, W, 3), 7, np.float32), photometric="rgb")
    elif kind == "channels":
        tifffile.imwrite(
            file, np.zeros((H, W, 6), np.uint16), photometric="minisblack", planarconfig="contig"
        )
    else:
        file.write_bytes(b"" if kind == "empty" else b"not a picture at all")
    with pytest.raises(ValueError, match=f"v2{suffix}'"):
        read_photographs(tmp_path)


def test_more_than_fits_in_memory(tmp_path, monkeypatch):
    write_set(tmp_path)
    monkeypatch.setattr(files, "available_memory", lambda: 60000)
    with pytest.raises(ValueError, match="of memory is available"):
        read_photographs(tmp_path)


def test_two_cameras_of_one_picture(tmp_path):
    write_set(tmp_path)
    edit(tmp_path, lambda table: table["frames"][1].update(file_path="images/v0"))
    with pytest.raises(ValueError, match=r"images: .*v0.png' is the photograph of two cameras"):
        read_photographs(tmp_path)


def test_a_giant_picture_is_refused_by_its_header(tmp_path):
    write_set(tmp_path)
    stream = io.BytesIO()
    Image.new("L", (1, 1)).save(stream, "png")
    raw = bytearray(stream.getvalue())
    raw[16:24] = (900000).to_bytes(4, "big") * 2
    (tmp_path / "images" / "v0.png").write_bytes(raw)
    edit(tmp_path, lambda table: table.update(w=900000, h=900000))
    with pytest.raises(ValueError, match=r"v0.png|v1.png"):
        read_photographs(tmp_path)
    assert cameras.read_cameras(tmp_path).cameras[0].size == (900000, 900000)
