"""Cameras, lenses, and the files that describe them."""

import doctest
import json
import os
import pickle
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import napari_innergs as igs
from napari_innergs.geometry import camera as camera_module
from napari_innergs.geometry.camera import Camera, Lens
from napari_innergs.io import _camera_set, cameras
from napari_innergs.io.cameras import read_cameras

K = np.array([[90.0, 0, 33.2], [0, 80.0, 20.7], [0, 0, 1]])
SIZE = (48, 64)
# no two of them are alike in any coordinate, (x, y, z)
POINTS = np.array([[0.3, -0.7, 1.1], [-0.9, 0.2, 0.5], [0.6, 0.8, -1.3], [0.0, 0.1, 0.2]])
MODELS = {
    "SIMPLE_PINHOLE": [90.0, 33.7, 21.2],
    "PINHOLE": [90.0, 80.0, 33.7, 21.2],
    "SIMPLE_RADIAL": [90.0, 33.7, 21.2, 0.05],
    "RADIAL": [90.0, 33.7, 21.2, 0.05, -0.01],
    "OPENCV": [90.0, 80.0, 33.7, 21.2, 0.05, -0.01, 0.002, -0.003],
}
NUMBERS = dict(zip(MODELS, range(5), strict=True))


def poses(count=5, seed=3):
    """World-to-camera of cameras about the origin, in OpenCV's axes and (x, y, z)."""
    out = []
    for i, rotation in enumerate(Rotation.random(count, random_state=seed)):
        matrix = np.eye(4)
        matrix[:3, :3] = rotation.as_matrix()
        matrix[:3, 3] = [0.1 * i, -0.2, 6 + i]
        out.append(matrix)
    return out


def write_text(folder, model="PINHOLE", names=None, observations="", ending="\n", encoding="utf-8"):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"p{i}.png" for i in range(5)] if names is None else names
    sensors = ["# a comment", f"7 {model} 64 48 " + " ".join(map(str, MODELS.get(model, [1.0] * 8)))]
    shots = ["# two lines each"]
    for i, (name, pose) in enumerate(zip(names, poses(len(names)), strict=True)):
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat()
        shots += [
            " ".join(map(repr, map(float, (w, x, y, z, *pose[:3, 3])))).join([f"{i + 1} ", f" 7 {name}"])
        ]
        shots += [observations]
    points = ["# points"] + [
        f"{i} {x} {y} {z} {10 * i} 20 30 0.5 1 0 2 0" for i, (x, y, z) in enumerate(POINTS)
    ]
    for part, lines in (("cameras", sensors), ("images", shots), ("points3D", points)):
        (folder / f"{part}.txt").write_bytes(ending.join([*lines, ""]).encode(encoding))
    return folder


def write_binary(folder, model="PINHOLE", names=None):
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"p{i}.png" for i in range(5)] if names is None else names
    values = MODELS[model]
    raw = struct.pack("<QiiQQ", 1, 7, NUMBERS[model], 64, 48) + struct.pack(f"<{len(values)}d", *values)
    (folder / "cameras.bin").write_bytes(raw)
    raw = struct.pack("<Q", len(names))
    for i, (name, pose) in enumerate(zip(names, poses(len(names)), strict=True)):
        x, y, z, w = Rotation.from_matrix(pose[:3, :3]).as_quat()
        raw += struct.pack("<I7dI", i + 1, w, x, y, z, *pose[:3, 3], 7) + name.encode() + b"\0"
        raw += struct.pack("<Q", i) + i * struct.pack("<ddq", 1.5, 2.5, -1)
    (folder / "images.bin").write_bytes(raw)
    raw = struct.pack("<Q", len(POINTS))
    for i, point in enumerate(POINTS):
        raw += struct.pack("<Q3d3BdQ", i, *point, 10 * i, 20, 30, 0.5, i) + i * struct.pack("<II", 1, 2)
    (folder / "points3D.bin").write_bytes(raw)
    return folder


def transforms(names=None, **shared):
    """Give the same cameras as a table with OpenGL's axes."""
    names = [f"p{i}.png" for i in range(5)] if names is None else names
    frames = []
    for name, pose in zip(names, poses(len(names)), strict=True):
        matrix = np.linalg.inv(pose) @ np.diag([1.0, -1, -1, 1])
        frames.append({"file_path": name, "transform_matrix": matrix.tolist()})
    table = {"fl_x": 90.0, "fl_y": 80.0, "cx": 33.7, "cy": 21.2, "w": 64, "h": 48, **shared}
    return {**{key: value for key, value in table.items() if value is not None}, "frames": frames}


def write_json(file, table):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(table))
    return file


def expected_pixels(points=POINTS):
    """Row and column of each point in each picture, by the definition, from (x, y, z)."""
    out = []
    for pose in poses():
        seen = points @ pose[:3, :3].T + pose[:3, 3]
        out.append(
            np.stack([seen[:, 1] / seen[:, 2] * 80 + 20.7, seen[:, 0] / seen[:, 2] * 90 + 33.2], axis=1)
        )
    return np.array(out)


def pixels_of(found):
    return np.array([camera.project(POINTS[:, ::-1])[0] for camera in found.cameras])


@pytest.mark.parametrize("module", [camera_module, cameras, _camera_set])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


# ---- camera


def test_projection_of_the_axes():
    # looks along +z from z = -10: world x is to the right and world y down
    camera = Camera.from_xyz(K, [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 10], [0, 0, 0, 1]], SIZE)
    pixels, depth = camera.project([[0, 0, 0], [0, 0, 1], [0, 1, 0], [10, 0, 1], [-10, 0, 0], [-11, 0, 0]])
    np.testing.assert_allclose(pixels[:4], [[20.7, 33.2], [20.7, 42.2], [28.7, 33.2], [20.7, 37.7]])
    np.testing.assert_allclose(depth, [10, 10, 10, 20, 0, -1])
    assert np.isnan(pixels[4:]).all()
    np.testing.assert_allclose(camera.centre, [-10, 0, 0])
    np.testing.assert_allclose(camera.direction, [1, 0, 0])
    assert np.linalg.det(camera.world_to_camera) == pytest.approx(-1)


def test_rays_meet_the_points_they_show():
    for pose in poses():
        camera = Camera.from_xyz(K, pose, SIZE)
        pixels, depth = camera.project(POINTS)
        origins, directions = camera.rays(pixels[:, 0], pixels[:, 1])
        along = depth / (directions @ camera.direction)
        np.testing.assert_allclose(origins + along[:, None] * directions, POINTS, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(directions, axis=1), 1)
    assert camera.rays(np.zeros((3, 1)), np.arange(4))[1].shape == (3, 4, 3)


def test_looking_at():
    camera = Camera.looking_at((3.0, 1.0, -2.0), (0.5, 0.2, 0.1), K, SIZE)
    pixels, depth = camera.project([[0.5, 0.2, 0.1], [0.6, 0.2, 0.1]])
    np.testing.assert_allclose(pixels[0], [20.7, 33.2])
    assert depth[0] == pytest.approx(np.linalg.norm([2.5, 0.8, -2.1]))
    # upward in the picture: a smaller row
    assert pixels[1, 0] < 20.7 and pixels[1, 1] == pytest.approx(33.2)
    with pytest.raises(ValueError, match=r"up: .*along the view"):
        Camera.looking_at((1, 0, 0), (3, 0, 0), K, SIZE)


def test_moved_with_its_world():
    similarity = np.eye(4)
    similarity[:3, :3] = 0.37 * Rotation.random(random_state=5).as_matrix()
    similarity[:3, 3] = [4.0, -5.0, 6.0]
    camera = Camera.from_xyz(K, poses()[1], SIZE)
    moved = camera.moved(similarity)
    pixels, depth = camera.project(POINTS)
    new_pixels, new_depth = moved.project(POINTS @ similarity[:3, :3].T + similarity[:3, 3])
    np.testing.assert_allclose(new_pixels, pixels, atol=1e-9)
    np.testing.assert_allclose(new_depth, 0.37 * depth)
    np.testing.assert_allclose(
        moved.world_to_camera[:3, :3] @ moved.world_to_camera[:3, :3].T, np.eye(3), atol=1e-12
    )
    back = moved.moved(np.linalg.inv(similarity))
    np.testing.assert_allclose(back.world_to_camera, camera.world_to_camera, atol=1e-12)
    for bad, text in ((np.diag([-1.0, 1, 1, 1]), "mirrored"), (np.diag([1.0, 2, 1, 1]), "orthogonal")):
        with pytest.raises(ValueError, match=f"similarity: .*{text}"):
            camera.moved(bad)


def test_downsampled_sees_the_same_places():
    camera = Camera.from_xyz(K, poses()[0], (49, 65))
    small = camera.downsampled(4)
    assert small.size == (12, 16)
    # the middle of the first square of pixels is the first pixel
    np.testing.assert_allclose(camera.rays(1.5, 1.5)[1], small.rays(0, 0)[1])
    np.testing.assert_allclose(camera.rays(45.5, 61.5)[1], small.rays(11, 15)[1])
    for bad in (0, 1.5, 50, "2"):
        with pytest.raises(ValueError, match="factor: got"):
            camera.downsampled(bad)


def test_camera_is_a_value():
    camera = Camera.from_xyz(K, poses()[0], SIZE)
    copy = pickle.loads(pickle.dumps(camera))
    assert copy == camera and hash(copy) == hash(camera) and copy != camera.downsampled(2)
    with pytest.raises(AttributeError, match=r"immutable"):
        camera.size = (1, 1)
    with pytest.raises(ValueError, match="read-only"):
        camera.intrinsics[0, 0] = 1


@pytest.mark.parametrize(
    ("intrinsics", "pose", "size", "text"),
    [
        (
            K,
            np.diag([1.0, 1, -1, 1]),
            SIZE,
            r"world_to_camera: got mirrored axes \(determinant -1, need \+1\)",
        ),
        (K, np.diag([1.0, 1, 2, 1]), SIZE, "world_to_camera: .*not orthogonal with length 1"),
        (K, np.full((4, 4), np.nan), SIZE, "world_to_camera: got NaN"),
        (K, np.eye(3), SIZE, r"world_to_camera: got shape \(3, 3\), need \(4, 4\)"),
        (-K, np.eye(4), SIZE, "intrinsics: got focal lengths"),
        (K + np.eye(3, k=1), np.eye(4), SIZE, "intrinsics: got skew"),
        ("K", np.eye(4), SIZE, "intrinsics: got something that is not numbers"),
        (K, np.eye(4), (0, 5), r"size: got \(0, 5\)"),
        (K, np.eye(4), (4.5, 5), r"size: got \(4.5, 5\)"),
        (K, np.eye(4), 5, "size: got 5"),
    ],
)
def test_camera_refuses(intrinsics, pose, size, text):
    with pytest.raises(ValueError, match=text):
        Camera.from_xyz(intrinsics, pose, size)


def test_camera_refuses_a_world_that_is_not_reversed():
    with pytest.raises(ValueError, match=r"mirrored axes \(determinant \+1, need -1\)"):
        Camera(K, np.eye(4), SIZE)
    with pytest.raises(ValueError, match=r"points: got shape \(3,\)"):
        Camera.from_xyz(K, np.eye(4), SIZE).project([1, 2, 3])


def test_lens_is_that_of_opencv():
    import cv2

    lens = Lens((0.11, -0.07, 0.02), (0.004, -0.006))
    points = np.random.default_rng(0).uniform(-0.6, 0.6, (50, 2))
    solid = np.concatenate([points, np.ones((50, 1))], axis=1)
    expected, _ = cv2.projectPoints(
        solid, np.zeros(3), np.zeros(3), np.eye(3), np.array([0.11, -0.07, 0.004, -0.006, 0.02])
    )
    np.testing.assert_allclose(lens.distort(points), expected[:, 0], atol=1e-12)


def test_lens_that_folds_the_picture_ends_there():
    # x (1 - x^2 / 3) turns back at 1
    lens = Lens((-1 / 3,))
    assert lens.limit == pytest.approx(1)
    assert Lens((0.2,)).limit == np.inf and Lens().limit == np.inf
    camera = Camera.from_xyz([[10, 0, 20], [0, 10, 20], [0, 0, 1]], np.eye(4), (41, 41))
    _, valid = lens.source_pixels(camera)
    rows, columns = np.indices((41, 41)) - 20
    np.testing.assert_array_equal(valid, np.hypot(rows, columns) < 10)


# ---- COLMAP


@pytest.mark.parametrize("write", [write_text, write_binary])
def test_colmap(tmp_path, write):
    found = read_cameras(write(tmp_path))
    assert found.names == tuple(f"p{i}.png" for i in range(5)) and len(found) == 5
    assert found.cameras[0].size == SIZE
    np.testing.assert_allclose(pixels_of(found), expected_pixels(), atol=1e-9)
    np.testing.assert_allclose(found.points, POINTS[:, ::-1])
    np.testing.assert_array_equal(found.colours, [[10 * i, 20, 30] for i in range(4)])


@pytest.mark.parametrize("model", MODELS)
def test_colmap_models(tmp_path, model):
    text = read_cameras(write_text(tmp_path / "text", model))
    binary = read_cameras(write_binary(tmp_path / "binary", model))
    assert text.cameras[2].intrinsics[0, 2] == pytest.approx(33.2)
    assert text.cameras[2].intrinsics[1, 1] == (80 if model in ("PINHOLE", "OPENCV") else 90)
    for one, other in zip(text.cameras, binary.cameras, strict=True):
        np.testing.assert_allclose(one.intrinsics, other.intrinsics)
        np.testing.assert_allclose(one.world_to_camera, other.world_to_camera, atol=1e-12)
    radial = {"SIMPLE_RADIAL": (0.05,), "RADIAL": (0.05, -0.01), "OPENCV": (0.05, -0.01)}.get(model, ())
    tangential = (0.002, -0.003) if model == "OPENCV" else (0.0, 0.0)
    assert text.lenses == binary.lenses == (Lens(radial, tangential),) * 5
    assert text.lenses[0].is_ideal == (model in ("SIMPLE_PINHOLE", "PINHOLE"))


def test_colmap_refuses_other_models_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"camera 7 .*OPENCV_FISHEYE, need one of SIMPLE_PINHOLE"):
        read_cameras(write_text(tmp_path, "OPENCV_FISHEYE"))
    folder = write_binary(tmp_path / "b")
    for number, text in ((6, "FULL_OPENCV"), (99, "model number 99"), (-1, "model number -1")):
        raw = struct.pack("<QiiQQ", 1, 7, number, 64, 48) + struct.pack("<12d", *[1.0] * 12)
        (folder / "cameras.bin").write_bytes(raw)
        with pytest.raises(ValueError, match=text):
            read_cameras(folder)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_colmap_text_of_windows(tmp_path, encoding, ending):
    names = [r"links\Käfer 1.png", r".\Käfer 2.png", "rechts/3.png"]
    folder = write_text(tmp_path, names=names, ending=ending, encoding=encoding)
    assert read_cameras(folder).names == ("links/Käfer 1.png", "Käfer 2.png", "rechts/3.png")


@pytest.mark.parametrize("observations", ["", "   ", "1.5 2.5 -1", "1 2 3 4 5 6 7 8 9 10.5 11 12", None])
def test_colmap_observation_lines(tmp_path, observations):
    folder = write_text(tmp_path, observations=observations or "")
    if observations is None:  # a program that leaves the empty lines out
        file = folder / "images.txt"
        file.write_text("\n".join(line for line in file.read_text().split("\n") if line))
    np.testing.assert_allclose(pixels_of(read_cameras(folder)), expected_pixels(), atol=1e-9)


def test_where_models_are_looked_for(tmp_path):
    write_text(tmp_path / "sparse" / "0")
    assert len(read_cameras(tmp_path)) == 5
    assert len(read_cameras(str(tmp_path / "sparse" / "0" / "images.txt"))) == 5
    # binary files come first, but what is named counts
    write_binary(tmp_path / "sparse" / "0", "SIMPLE_RADIAL")
    assert not read_cameras(tmp_path).lenses[0].is_ideal
    assert read_cameras(tmp_path / "sparse" / "0" / "cameras.txt").lenses[0].is_ideal
    write_json(tmp_path / "transforms.json", transforms(["a.png"]))
    assert read_cameras(tmp_path).names == ("a.png",)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing")
    for nothing in ("empty", "notes.txt"):
        with pytest.raises(ValueError, match="holds no cameras, need a folder with a COLMAP model"):
            read_cameras(tmp_path / nothing)
    with pytest.raises(ValueError, match="there is no file or folder"):
        read_cameras(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("part", "old", "new", "text"),
    [
        ("cameras", "7 PINHOLE 64", "7 PINHOLE wide", "line 2 of .*cameras.txt.* need CAMERA_ID"),
        ("cameras", "90.0 80.0", "90.0", "camera 7 .*has 3 parameters, PINHOLE needs 4"),
        ("cameras", "90.0 80.0", "90.0 nan", "camera 7 .*NaN"),
        ("cameras", "90.0 80.0", "90.0 -80", "'p0.png' .*focal lengths"),
        ("cameras", "7 PINHOLE", "8 PINHOLE", "'p0.png' .*has camera 7, which is not in 'cameras.txt'"),
        ("cameras", "64 48", "64 99999999999", "'p0.png' .*size: got"),
        ("images", " 7 p1.png", "", "line 4 of .*images.txt.* need IMAGE_ID"),
        ("images", "p1.png", "p0.png", "names 'p0.png' twice"),
        ("points3D", "10 20 30", "10 20 300", "line 3 of .*points3D.txt.* need POINT3D_ID"),
        ("points3D", "0.3", "inf", "points3D.txt.* NaN or infinite"),
    ],
)
def test_damaged_colmap_text(tmp_path, part, old, new, text):
    file = write_text(tmp_path) / f"{part}.txt"
    content = file.read_text()
    assert old in content
    file.write_text(content.replace(old, new, 1))
    with pytest.raises(ValueError, match=text):
        read_cameras(tmp_path)


def test_colmap_poses_of_no_length(tmp_path):
    write_text(tmp_path, names=["a.png"])
    (tmp_path / "images.txt").write_text("1 0 0 0 0 1 2 3 7 a.png\n\n")
    with pytest.raises(ValueError, match=r"'a.png' .*damaged camera: quaternion"):
        read_cameras(tmp_path)
    (tmp_path / "images.txt").write_text("# nothing was registered\n")
    with pytest.raises(ValueError, match="holds no poses"):
        read_cameras(tmp_path)
    (tmp_path / "images.txt").write_bytes(b"\x89PNG\0\0\0")
    with pytest.raises(ValueError, match="no text file"):
        read_cameras(tmp_path)


@pytest.mark.parametrize("part", ["cameras", "images", "points3D"])
def test_truncated_or_hostile_colmap_binary(tmp_path, part):
    file = write_binary(tmp_path) / f"{part}.bin"
    raw = file.read_bytes()
    for cut in range(1, len(raw), 7):
        file.write_bytes(raw[:cut])
        with pytest.raises(
            ValueError, match=f"{part}.bin' is (truncated or )?damaged|{part}.bin' is truncated"
        ):
            read_cameras(tmp_path)
    # as many records as a number can say, and observations without end
    file.write_bytes(b"\xff" * 8 + raw[8:])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_cameras(tmp_path)
    if part == "points3D":
        file.write_bytes(raw[:51] + b"\xff" * 8 + raw[59:])
        with pytest.raises(ValueError, match="truncated or damaged"):
            read_cameras(tmp_path)


# ---- transforms.json


def test_transforms_are_the_cameras_of_colmap(tmp_path):
    found = read_cameras(write_json(tmp_path / "transforms.json", transforms()))
    np.testing.assert_allclose(pixels_of(found), expected_pixels(), atol=1e-9)
    colmap = read_cameras(write_text(tmp_path))
    for one, other in zip(found.cameras, colmap.cameras, strict=True):
        np.testing.assert_allclose(one.world_to_camera, other.world_to_camera, atol=1e-12)
        np.testing.assert_allclose(one.intrinsics, other.intrinsics)
    assert found.points is None and all(lens.is_ideal for lens in found.lenses)


def test_transforms_with_a_lens_shared_or_for_each_frame(tmp_path):
    table = transforms(k1=0.1, k2=-0.05, p1=0.01, p2=0.02, camera_model="OPENCV")
    table["frames"][1].update(k1=0.0, k2=0.0, p1=0.0, p2=0.0, fl_x=70.0, cx=10.5, k3=0.3)
    table["frames"][2]["transform_matrix"] = table["frames"][2]["transform_matrix"][:3]
    found = read_cameras(write_json(tmp_path / "t.json", table))
    assert found.lenses[0] == Lens((0.1, -0.05), (0.01, 0.02))
    assert found.lenses[1] == Lens((0.0, 0.0, 0.3), (0.0, 0.0))
    np.testing.assert_allclose(found.cameras[1].intrinsics, [[70, 0, 10], [0, 80, 20.7], [0, 0, 1]])
    np.testing.assert_allclose(pixels_of(found)[2], expected_pixels()[2], atol=1e-9)


def test_angles_of_both_axes_are_taken(tmp_path):
    """Pixels that are not square, as instant-ngp reads them."""
    frame = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist()}
    for given in ({"camera_angle_x": 0.7}, {"fl_x": 32 / np.tan(0.35)}):
        table = {"w": 64, "h": 48, **given, "camera_angle_y": 0.6, "frames": [frame]}
        (tmp_path / "transforms.json").write_text(json.dumps(table))
        (camera,) = read_cameras(tmp_path).cameras
        assert np.allclose(camera.intrinsics.diagonal(), (32 / np.tan(0.35), 24 / np.tan(0.3), 1))


def test_transforms_of_blender(tmp_path):
    names = [f"./train/r_{i}" for i in range(3)]
    table = {"camera_angle_x": 2 * np.arctan(0.5), "frames": transforms(names)["frames"]}
    # exporters leave the object's scale in the matrix
    for frame in table["frames"]:
        frame["transform_matrix"] = (np.array(frame["transform_matrix"]) * [2, 2, 2, 1]).tolist()
    file = write_json(tmp_path / "transforms_train.json", table)
    with pytest.raises(ValueError, match=r"no 'w' and 'h', and the photograph 'train/r_0' is not there"):
        read_cameras(file)
    (tmp_path / "train").mkdir()
    for name in names:
        Image.new("RGB", (64, 48)).save(tmp_path / f"{name}.png")
    found = read_cameras(tmp_path)
    assert found.names == tuple(f"train/r_{i}" for i in range(3))
    np.testing.assert_allclose(found.cameras[0].intrinsics, [[64, 0, 31.5], [0, 64, 23.5], [0, 0, 1]])
    reference = read_cameras(write_json(tmp_path / "t.json", transforms(names)))
    np.testing.assert_allclose(
        found.cameras[1].world_to_camera, reference.cameras[1].world_to_camera, atol=1e-12
    )


@pytest.mark.parametrize("text", [True, False])
def test_points_of_nerfstudio(tmp_path, text):
    header = ["ply", f"format {'ascii' if text else 'binary_little_endian'} 1.0", "element vertex 4"]
    header += [f"property float {name}" for name in "xyz"]
    header += [f"property uchar {name}" for name in ("red", "green", "blue")] + ["end_header", ""]
    rows = [(*point, 10 * i, 20, 30) for i, point in enumerate(POINTS)]
    if text:
        body = "".join(" ".join(map(str, row)) + "\n" for row in rows).encode()
    else:
        body = b"".join(struct.pack("<3f3B", *row) for row in rows)
    file = tmp_path / "sparse_pc.ply"
    file.write_bytes("\n".join(header).encode() + body)
    table = write_json(tmp_path / "transforms.json", transforms(ply_file_path="sparse_pc.ply"))
    found = read_cameras(table)
    np.testing.assert_allclose(found.points, POINTS[:, ::-1], rtol=1e-6)
    np.testing.assert_array_equal(found.colours, [[10 * i, 20, 30] for i in range(4)])
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"sparse_pc.ply' is not a PLY file"):
        read_cameras(table)
    file.unlink()
    assert read_cameras(table).points is None


def change(frame=None, **shared):
    table = transforms(**shared)
    table["frames"][1].update(frame or {})
    return table


MIRRORED = (np.diag([-1.0, 1, 1, 1]) @ np.array(transforms()["frames"][1]["transform_matrix"])).tolist()


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (change({"transform_matrix": MIRRORED}), "frame 1 .*mirrored axes"),
        (change({"transform_matrix": np.diag([1.0, 2, 1, 1]).tolist()}), "frame 1 .*axes of lengths"),
        (change({"transform_matrix": np.full((4, 4), np.nan).tolist()}), "frame 1 .*need .*finite"),
        (change({"transform_matrix": None}), "frame 1 .*'transform_matrix'"),
        (change({"transform_matrix": [["a"]]}), "frame 1 .*not numbers"),
        (
            change({"transform_matrix": [[1, 0.5, 0, 0], [0, 0.75**0.5, 0, 0], [0, 0, 1, 0]]}),
            "not orthogonal",
        ),
        (change({"file_path": None}), "frame 1 .*lacks 'file_path'"),
        (change({"file_path": "p0.png"}), "names 'p0.png' twice"),
        (change({"fl_x": "90"}), "frame 1 .*'fl_x' = '90', need a finite number"),
        (change(camera_model="OPENCV_FISHEYE"), "frame 0 .*OPENCV_FISHEYE, need one of"),
        (change(camera_model="EQUIRECTANGULAR"), "EQUIRECTANGULAR"),
        (change(is_fisheye=True), "fisheye"),
        (change(fl_x=None, fl_y=None), "no focal length"),
        (change(fl_x=None, fl_y=None, camera_angle_x=40.0), "camera angle of 40, need radians"),
        (change(w=1e300), "frame 0 .*size"),
        (change(w=64.5), "frame 0 .*size"),
        ({"frames": []}, "has no list 'frames'"),
        ({"frames": {"0": 1}}, "has no list 'frames'"),
        ([1, 2], "holds a list, need a JSON object"),
    ],
)
def test_damaged_transforms(tmp_path, table, text):
    with pytest.raises(ValueError, match=text):
        read_cameras(write_json(tmp_path / "transforms.json", table))


def test_text_that_is_no_json(tmp_path):
    for text in ("{", "[" * 100000, "{}}"):
        (tmp_path / "transforms.json").write_text(text)
        with pytest.raises(ValueError, match="is damaged JSON"):
            read_cameras(tmp_path)
    (tmp_path / "transforms.json").write_bytes(json.dumps(transforms()).encode("utf-8-sig"))
    assert len(igs.read_cameras(tmp_path)) == 5


# ---- independent data: cameras written by another program for pictures rendered by a third


DATA = Path(os.environ.get("INNERGS_DATA", "")) / "dual"


@pytest.mark.skipif(
    not os.environ.get("INNERGS_DATA") or not DATA.is_dir(), reason="INNERGS_DATA is not there"
)
@pytest.mark.parametrize("name", ["tooth", "shell"])
def test_real_sets(name):
    colmap = read_cameras(DATA / name / "colmap")
    by_name = dict(zip(colmap.names, colmap.cameras, strict=True))
    count = 0
    for split in ("train", "test"):
        found = read_cameras(DATA / name / f"transforms_{split}.json")
        for where, camera in zip(found.names, found.cameras, strict=True):
            other = by_name[Path(where).name]
            scale = np.abs(camera.world_to_camera).max()
            np.testing.assert_allclose(other.world_to_camera, camera.world_to_camera, atol=1e-6 * scale)
            np.testing.assert_allclose(other.intrinsics, camera.intrinsics, atol=1e-6)
            count += 1
    assert count == len(colmap) == 72
    stored = np.load(DATA / name / "points.npz")
    np.testing.assert_allclose(colmap.points, stored["xyz"][:, ::-1], rtol=1e-5, atol=1e-5)
    # observations are noisy pictures of the true points, first pixel centre at 0.5
    true = stored["true_xyz"][:, ::-1]
    errors = []
    lines = (DATA / name / "colmap" / "images.txt").read_text().split("\n")
    lines = [line for line in lines if not line.startswith("#")]
    for pose, seen in zip(lines[::2], lines[1::2], strict=False):
        if not seen:
            continue
        table = np.array(seen.split(), dtype=float).reshape(-1, 3)
        index = table[:, 2].astype(int) - 1
        keep = stored["inlier"][index]
        pixels, depth = by_name[pose.split()[9]].project(true[index[keep]])
        assert (depth > 0).all()
        errors.append(pixels[:, ::-1] + 0.5 - table[keep, :2])
    errors = np.concatenate(errors)
    assert len(errors) > 10000
    assert np.abs(errors.mean(axis=0)).max() < 0.02
    assert 0.2 < errors.std() < 0.4


@pytest.mark.skipif(
    not os.environ.get("INNERGS_DATA") or not DATA.is_dir(), reason="INNERGS_DATA is not there"
)
def test_real_photographs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = igs.read_photographs(DATA / "shell" / "transforms_test.json")
    assert found.n_views == 12 and found.size == (200, 200)
    assert 0.05 < found.masks.mean() < 0.6
    # the object's own points are seen in front of it
    points = igs.read_cameras(DATA / "shell" / "colmap").points
    inlier = np.load(DATA / "shell" / "points.npz")["inlier"]

    def covered(shift):
        hits = []
        for camera, mask in zip(found.cameras, found.masks, strict=True):
            rows, columns = (np.rint(camera.project(points[inlier])[0]) + shift).astype(int).T
            inside = (rows >= 0) & (rows < 200) & (columns >= 0) & (columns < 200)
            hits.append(mask[rows[inside], columns[inside]])
        return np.concatenate(hits).mean()

    here = covered((0, 0))
    assert here > 0.93
    # a picture turned over or a principal point off by a pixel would be seen
    assert all(covered(shift) < here - 0.003 for shift in ((1, 0), (-1, 0), (0, 1), (0, -1)))
