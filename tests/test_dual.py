"""Photographs and X-rays together: outline, joint fit, task, command."""

import json

import dual_scene
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import binary_dilation

import napari_innergs as igs
from napari_innergs.cli import main
from napari_innergs.fit import photos
from napari_innergs.fit.align import Alignment, Candidate, surface_of_volume
from napari_innergs.fit.attenuation import Radiographs, start_attenuation
from napari_innergs.fit.dual import fit_jointly, hull_of_masks, join
from napari_innergs.fit.engine import Done, Failed, Preview, Step
from napari_innergs.fit.metrics import psnr
from napari_innergs.io.cameras import CameraSet
from napari_innergs.photographs import Photographs
from napari_innergs.tasks import dual as task
from napari_innergs.tasks.dual import NoMatch, estimate_dual, fit_dual, reconstruct_dual

TINY = {"preset": "fast", "photo_steps": 150, "joint_steps": 30, "max_splats": 1000}


@pytest.fixture(scope="module")
def pictures():
    return dual_scene.photographs()


@pytest.fixture(scope="module")
def scan():
    return dual_scene.scan()


@pytest.fixture(scope="module")
def result(pictures, scan):
    data, geometry, grid, _ = scan
    events = []
    found = reconstruct_dual(data, geometry, pictures, None, grid, TINY, progress=events.append)
    return found, events


@pytest.fixture(scope="module")
def parts(pictures, scan):
    """Frame, photographs in it, a start of each half, and the scan's data in units of the field."""
    data, geometry, grid, volume = scan
    frame = photos.object_frame(pictures)
    framed = pictures.moved(frame)
    scale = float(volume.max())
    to_index = np.linalg.inv(grid.affine) @ dual_scene.TRUTH @ np.linalg.inv(frame)
    radiographs = Radiographs(geometry, grid)

    def make():
        inside = start_attenuation(volume / scale, 12, 3000)
        return join(inside, photos.start_splats(framed, most=400), to_index)

    return framed, make, radiographs, data / np.float32(scale * radiographs.unit)


# --- outline


def test_hull_holds_the_object_and_little_else(pictures, scan):
    _, _, grid, volume = scan
    hull = hull_of_masks(pictures, grid, np.linalg.inv(dual_scene.TRUTH))
    solid = volume > 0.1 * volume.max()
    assert not (solid & ~hull).any()
    assert not (hull & ~binary_dilation(solid, iterations=6)).any()


def test_surface_tells_how_far_it_is_and_can_be_stopped(scan):
    told = []
    points, _ = surface_of_volume(scan[3], scan[2], step=lambda done, total: told.append(done / total))
    assert len(points) > 100
    assert told == sorted(told)
    assert told[-1] == 1.0

    class Enough(Exception):
        pass

    def stop(done, total):
        if done > 3:
            raise Enough

    with pytest.raises(Enough):
        surface_of_volume(scan[3], scan[2], step=stop)


def test_hull_ignores_what_was_not_photographed(pictures, scan):
    valid = np.ones(pictures.masks.shape, bool)
    valid[:] = False
    blind = Photographs(pictures.images, pictures.cameras, pictures.masks, valid=valid)
    assert hull_of_masks(blind, scan[2], np.linalg.inv(dual_scene.TRUTH)).all()


# --- joint fit


def test_photographs_do_not_touch_the_inside(parts):
    framed, make, _, _ = parts
    field = make()
    before = [t.clone() for t in (field.inside.mean, field.inside.cholesky, field.inside.raw, field.raw)]
    surface = field.surface.mean.clone()
    for _ in fit_jointly(field, framed, 5):
        pass
    after = (field.inside.mean, field.inside.cholesky, field.inside.raw, field.raw)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(surface, field.surface.mean)


def test_xrays_move_the_surface_only_as_far_as_they_may(parts):
    framed, make, radiographs, data = parts

    def run(**settings):
        field = make()
        for _ in fit_jointly(field, framed, 6, **settings):
            pass
        return field

    alone = run()
    deaf = run(radiographs=radiographs, data=data, pull=0.0)
    pulled = run(radiographs=radiographs, data=data, pull=0.5)
    assert torch.equal(alone.surface.mean, deaf.surface.mean)
    assert not torch.equal(alone.surface.mean, pulled.surface.mean)
    # attenuation is the X-rays' in any case
    assert not torch.equal(alone.raw, deaf.raw)
    assert not torch.equal(alone.inside.raw, deaf.inside.raw)


def test_joint_steps_bring_both_renders_nearer(parts):
    framed, make, radiographs, data = parts
    field = make()

    def xray():
        with torch.no_grad():
            images = radiographs.render(field.attenuation(), list(range(0, 20, 4)))
        return float(np.square(images.numpy() - data[::4]).mean())

    before = xray()
    options = {"radiographs": radiographs, "data": data, "rate": 4.0}
    losses = [loss for _, loss in fit_jointly(field, framed, 96, **options)]
    assert xray() < 0.7 * before
    assert np.mean(losses[-12:]) < 0.7 * np.mean(losses[:12])


def test_reference_draws_the_inside(parts, scan):
    framed, make, _, _ = parts
    volume = scan[3] / scan[3].max()

    def away(weight):
        field = make()
        with torch.no_grad():
            field.inside.raw += 1.0
        for _ in fit_jointly(field, framed, 30, reference=volume, reference_weight=weight, rate=4.0):
            pass
        with torch.no_grad():
            made = field.inside.voxelise(volume.shape)[0].numpy()
        return float(np.square(made - volume).mean())

    assert away(1.0) < 0.9 * away(0.0)


def test_cameras_are_refined(pictures, fitted_surface):
    """A camera that was turned a little comes back; the others stay nearly where they are."""
    _, framed, surface = fitted_surface
    wrong = np.array(framed.cameras[2].world_to_camera)
    angle = 0.01
    wrong[:3] = (
        np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
        @ (wrong[:3])
    )
    poses = list(framed.cameras)
    poses[2] = igs.Camera(poses[2].intrinsics, wrong, poses[2].size)
    turned = framed.with_cameras(poses).subset([2])
    inside = start_attenuation(np.ones((4, 4, 4), np.float32), 8, 8)
    field = join(inside, photos.copy_of(surface), np.eye(4))
    changes = {}
    losses = [loss for _, loss in fit_jointly(field, turned, 60, cameras=changes, rate=0.5)]
    # the rotation about the camera's x axis is undone, with the shift that goes with it
    assert losses[-1] < 0.7 * losses[0]
    assert float(changes[2 if 2 in changes else 0].norm()) > 1e-3


@pytest.fixture(scope="module")
def fitted_surface(pictures):
    frame = photos.object_frame(pictures)
    framed = pictures.moved(frame)
    surface = photos.start_splats(framed, most=1000)
    for _ in photos.fit_photographs(surface, framed, 150, most=1000):
        pass
    return frame, framed, surface


# --- task


def test_everything_comes_out(result, scan):
    found, events = result
    _, _, grid, volume = scan
    assert psnr(found.volume, volume) > 30
    corners = np.array([[-10, -8, -9], [10, 8, 9], [12, -5, 4.0], [-12, 5, -4]])
    back = np.linalg.inv(dual_scene.TRUTH)
    again = (corners @ back[:3, :3].T + back[:3, 3]) @ found.transform[:3, :3].T + found.transform[:3, 3]
    assert np.abs(again - corners).max() < 0.5
    assert found.report["alignment"]["scale_error"] < 0.05
    assert found.colour.shape == (*grid.shape, 3)
    assert found.colour.max() > 0.5
    assert len(found.model) == found.report["n_gaussians"] > len(found.splats)
    assert json.dumps(found.report)
    assert isinstance(events[-1], Done)
    assert sum(isinstance(event, Preview) for event in events) >= 3
    shares = [event.fraction for event in events if isinstance(event, Step)]
    assert shares == sorted(shares)


def test_new_views_of_both_kinds(result, scan):
    found, _ = result
    data, geometry, _, _ = scan
    others = dual_scene.photographs(4, first=0.5, points=0)
    for k, camera in enumerate(others.cameras):
        assert psnr(found.render_rgb(camera.moved(found.transform)), others.image(k), 1.0) > 20
    views = found.render_xray(geometry)
    assert psnr(views, data) > 30
    cut = found.render_cutaway(others.cameras[0].moved(found.transform), (0, 0, 0), (1, 0, 0))
    assert cut.shape == (48, 48, 3)


def test_result_is_kept(result, tmp_path):
    found, _ = result
    again = igs.load(found.save(tmp_path / "out"))
    assert np.allclose(again.transform, found.transform)
    assert np.array_equal(again.colour, found.colour)
    camera = dual_scene.photographs(1, points=0).cameras[0].moved(found.transform)
    assert np.abs(again.render_rgb(camera) - found.render_rgb(camera)).max() < 1e-3
    assert (tmp_path / "out" / "splats.ply").is_file()
    igs.Reconstruction(found.volume, found.grid).save(tmp_path / "out")
    assert igs.load(tmp_path / "out").splats is None
    assert not (tmp_path / "out" / "splats.ply").exists()
    with pytest.raises(ValueError, match="splats: this result has no Gaussians with colour"):
        igs.load(tmp_path / "out").render_rgb(camera)


def test_volume_and_landmarks_in_place_of_projections_and_search(pictures, scan):
    _, _, grid, volume = scan
    target = dual_scene.surface(8)
    back = np.linalg.inv(dual_scene.TRUTH)
    source = target @ back[:3, :3].T + back[:3, 3]
    settings = {**TINY, "photo_steps": 40, "joint_steps": 6, "silhouettes": False}
    found = reconstruct_dual(
        None, None, pictures, None, grid, settings, volume=volume, landmarks=(source, target)
    )
    assert np.allclose(found.transform, dual_scene.TRUTH, atol=1e-6)
    assert np.array_equal(found.volume, volume)
    assert max(found.report["alignment"]["landmark_residuals"]) < 1e-6


def test_sections_of_a_given_volume_have_their_weight(pictures, scan):
    """0 is none: the inside stays as it was fitted to the volume, and the surface takes no part."""
    grid, volume = scan[2:]

    def inside(**changes):
        settings = {**TINY, "photo_steps": 10, **changes}
        found = reconstruct_dual(
            None, None, pictures, None, grid, settings, volume=volume, transform=dual_scene.TRUTH
        )
        n = found.report["n_gaussians"] - found.report["n_surface"]
        return found.model.amplitudes[:n]

    before, none = inside(joint_steps=0), inside(joint_steps=8, reference_weight=0)
    assert np.array_equal(before, none)
    assert not np.array_equal(before, inside(joint_steps=8))


def test_given_transform_is_taken(pictures, scan):
    data, geometry, grid, _ = scan
    settings = {**TINY, "photo_steps": 20, "joint_steps": 0, "hull": False}
    found = reconstruct_dual(data, geometry, pictures, None, grid, settings, transform=dual_scene.TRUTH)
    assert np.array_equal(found.transform, dual_scene.TRUTH)
    assert found.report["hull"] is None


def test_ties_are_kept_when_one_is_refined(pictures, scan, monkeypatch):
    grid, volume = scan[2:]
    turned = dual_scene.TRUTH @ np.diag([1.0, -1, -1, 1])
    poses = tuple(Candidate(pose, 0.9) for pose in (turned, dual_scene.TRUTH))
    tie = Alignment(
        turned, 5.0, 0.9, 0.1, 0.1, 0.1, 0.1, poses, True, "2 poses fit about equally well; choose one."
    )
    monkeypatch.setattr(task, "align_surfaces", lambda *given, step: tie)

    def run(candidate):
        settings = {**TINY, "photo_steps": 5, "joint_steps": 0, "candidate": candidate}
        return reconstruct_dual(None, None, pictures, None, grid, settings, volume=volume)

    found = run(1)
    given, chosen = (np.array(one["transform"]) for one in found.report["alignment"]["candidates"])
    assert np.array_equal(given, turned)
    assert np.array_equal(chosen, found.transform)
    assert not np.array_equal(chosen, dual_scene.TRUTH)
    assert np.allclose(chosen[:3, :3], dual_scene.TRUTH[:3, :3], atol=0.3)
    # of the surfaces, not of the outlines
    assert found.report["alignment"]["rms"] == tie.rms
    assert found.report["warnings"] == []
    warnings = run(0).report["warnings"]
    assert sum("2 poses fit alike" in one for one in warnings) == 1
    assert not any("about equally" in one or ".." in one for one in warnings)


def test_points_of_the_table_are_not_laid_onto_the_object(pictures, scan):
    """Structure from motion finds more than the object; the masks tell what is what."""
    grid, volume = scan[2:]
    random = np.random.default_rng(0)
    table = np.column_stack([np.full(900, -16.0), random.uniform(-40, 40, (900, 2))])
    back = np.linalg.inv(dual_scene.TRUTH)
    table = table @ back[:3, :3].T + back[:3, 3]
    cloud = np.concatenate([pictures.points, table])
    laid = Photographs(pictures.images, pictures.cameras, pictures.masks, points=cloud)
    own = len(photos.object_points(pictures))
    assert own > 240
    assert own <= len(photos.object_points(laid)) < own + 30
    settings = {**TINY, "photo_steps": 5, "joint_steps": 0, "silhouettes": False}
    found = reconstruct_dual(None, None, laid, None, grid, settings, volume=volume)
    assert np.allclose(found.transform[:3, :3], dual_scene.TRUTH[:3, :3], atol=0.2)


def test_another_object_does_not_match(pictures, scan):
    grid, volume = scan[2:]
    # a long bar in place of what was photographed
    bar = np.zeros_like(volume)
    bar[4:32, 16:19, 16:19] = 0.05
    events = list(fit_dual(None, None, pictures, None, grid, {**TINY, "photo_steps": 20}, volume=bar))
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, NoMatch)
    assert "no match" in str(events[-1].error)
    assert not events[-1].error.alignment.matched


def test_few_views_are_kept_within_the_outline(pictures, scan):
    data, geometry, grid, volume = scan
    few = np.arange(0, 20, 3)
    settings = {**TINY, "photo_steps": 20, "joint_steps": 0}

    def run(**changes):
        return reconstruct_dual(
            data[few],
            geometry.subset(few),
            pictures,
            None,
            grid,
            {**settings, **changes},
            transform=dual_scene.TRUTH,
        )

    bound, free = run(), run(hull=False)
    hull = hull_of_masks(pictures, grid, np.linalg.inv(dual_scene.TRUTH))
    assert free.volume[~hull].any()
    assert not bound.volume[~hull].any()
    assert bound.report["hull"]["attenuation_outside"] < 0.01
    # the inside is looked at again, and is at least about as good
    assert not np.array_equal(bound.volume[hull], free.volume[hull])
    assert psnr(bound.volume, volume) > psnr(free.volume, volume) - 0.5


def test_photographs_of_a_part_do_not_cut_the_object(pictures, scan):
    """Where much attenuation lies outside the outline, the outline is not used."""
    data, geometry, grid, _ = scan
    few = np.arange(0, 20, 2)
    move = dual_scene.TRUTH.copy()
    move[0, 3] += 14
    settings = {**TINY, "photo_steps": 20, "joint_steps": 0}
    found = reconstruct_dual(data[few], geometry.subset(few), pictures, None, grid, settings, transform=move)
    assert any("outline was not used" in warning for warning in found.report["warnings"])
    plain = igs.reconstruct_projections(data[few], geometry.subset(few), grid, "fast")
    assert np.array_equal(found.volume, plain.volume)


def test_estimate_grows_with_what_is_asked(pictures, scan):
    data, geometry, grid, _ = scan

    def cost(shape=(24, 48, 48), **changes):
        return estimate_dual(data, geometry, shape, grid, {**TINY, **changes})

    plain = cost()
    assert estimate_dual(data, geometry, pictures, grid, TINY) == plain
    for name in ("photo_steps", "joint_steps"):
        assert cost(**{name: 30_000})["seconds"] > 2 * cost(**{name: 300})["seconds"]
    assert cost((24, 480, 480))["bytes"] > plain["bytes"]
    assert plain["seconds"] > igs.estimate_projections(data, geometry, grid, "fast")["seconds"]
    assert estimate_dual(None, None, pictures, grid, TINY)["seconds"] < plain["seconds"]
    with pytest.raises(ValueError, match="grid: got None"):
        estimate_dual(None, None, pictures, None, TINY)


def test_too_few_points_and_hounsfield_units_are_told(pictures, scan):
    grid, volume = scan[2:]
    bare = Photographs(pictures.images, pictures.cameras, pictures.masks)
    settings = {**TINY, "photo_steps": 2, "joint_steps": 0}
    jobs = []
    events = list(fit_dual(None, None, bare, None, grid, settings, volume=volume, watch=jobs.append))
    assert jobs[0].warnings == []
    assert "photographs: their fit left 0 opaque Gaussians" in str(events[-1].error)
    units = 1000 * (volume / 0.05 - 1)
    fit_dual(None, None, bare, None, grid, settings, volume=units, watch=jobs.append)
    assert "Hounsfield" in jobs[1].warnings[0]
    # what filtering leaves is not meant
    noisy = volume + 0.003 * np.random.default_rng(0).normal(size=volume.shape)
    fit_dual(None, None, bare, None, grid, settings, volume=noisy, watch=jobs.append)
    assert jobs[2].warnings == []


def test_closing_ends_it(pictures, scan):
    data, geometry, grid, _ = scan
    events = fit_dual(data, geometry, pictures, None, grid, TINY)
    for _ in range(4):
        next(events)
    events.close()
    with pytest.raises(StopIteration):
        next(events)


def test_interrupted_joint_fit_leaves_colours_and_pose(pictures, scan):
    grid, volume = scan[2:]
    settings = {**TINY, "photo_steps": 5, "joint_steps": 100_000}

    def stop(event):
        if event.phase == "Joint fit" and (event.iteration or 0) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        reconstruct_dual(
            None,
            None,
            pictures,
            None,
            grid,
            settings,
            volume=volume,
            transform=dual_scene.TRUTH,
            progress=stop,
        )
    best = caught.value.best
    assert best.report["interrupted"]
    assert len(best.splats) == best.report["n_surface"] > 0
    assert np.array_equal(best.transform, dual_scene.TRUTH)

    # nothing but the volume before
    def at_once(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        reconstruct_dual(None, None, pictures, None, grid, settings, volume=volume, progress=at_once)
    assert caught.value.best is None


def bad(pictures, scan, **changes):
    data, geometry, grid, _ = scan
    given = {"projections": data, "geometry": geometry, "images": pictures, "grid": grid, "config": TINY}
    return fit_dual(**{**given, **changes})


def test_bad_input_is_named(pictures, scan):
    volume = scan[3]
    apart = {"cameras": pictures.cameras, "masks": pictures.masks}
    cases = [
        ({"images": None}, "images: got None"),
        ({"images": pictures.images}, "cameras: got None"),
        ({"images": pictures.images, "cameras": pictures.cameras[:3]}, "cameras: got 3 for 24"),
        ({"images": pictures.subset([0, 1])}, "images: got 2 photographs, need at least 3"),
        ({"masks": pictures.masks}, "masks: Photographs bring their own"),
        ({"projections": None}, "projections: got None"),
        ({"volume": volume}, "volume: given together with projections"),
        (
            {"projections": None, "geometry": None, "volume": volume, "grid": None},
            "grid: got None with a volume",
        ),
        ({"projections": None, "geometry": None, "volume": volume[1:]}, "volume: got shape"),
        ({"projections": None, "geometry": None, "volume": volume * np.nan}, "volume: got 46656 NaN"),
        ({"transform": -np.eye(4)}, "transform"),
        ({"transform": np.eye(4), "landmarks": (np.eye(3), np.eye(3))}, "landmarks: given together"),
        ({"landmarks": (np.eye(3)[:2], np.eye(3)[:2])}, "landmarks: the photographs': got 2"),
        ({"transform": [[1, 2], ["a"]]}, "transform: got something that is not numbers"),
        ({"transform": np.zeros((4, 4))}, "transform: got last row|transform: got a singular"),
        ({"landmarks": (np.eye(3), np.eye(3), np.eye(3))}, "landmarks: need two arrays"),
        ({"landmarks": ([[1, 2], ["a"]], np.eye(3))}, "landmarks: need two arrays"),
        ({"landmarks": (np.eye(3), np.eye(4)[:, :3])}, "landmarks: the X-rays': got 4"),
        (
            {"projections": None, "geometry": None, "volume": np.zeros_like(volume)},
            "volume: got 0 everywhere",
        ),
        (
            {"images": pictures.images + 0.5 * (1 - pictures.masks[..., None]), **apart},
            "of the pixels are brighter than their mask",
        ),
        (
            {"images": [pictures.image(0), pictures.image(1)[1:]], **apart},
            "images: got pictures of different",
        ),
        (
            {
                "projections": scan[0][::7],
                "geometry": scan[1].subset([0, 7, 14]),
                "config": {"reference_views": 1},
            },
            "reference_views: geometry: got 3 view",
        ),
        ({"config": "finest"}, "there is no preset 'finest'"),
        ({"config": {"photo_step": 3}}, "there is no setting 'photo_step'"),
        ({"seed": -1}, "seed"),
        ({"device": "abacus"}, "device"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            bad(pictures, scan, **changes)
    with pytest.raises(TypeError, match="cameras: got CameraSet, need a list of Camera"):
        bad(pictures, scan, images=pictures.images, cameras=CameraSet((), (), ()))
    empty = np.array(pictures.masks)
    empty[4] = 0
    with pytest.raises(ValueError, match="mask"):
        bad(pictures, scan, images=pictures.images, cameras=pictures.cameras, masks=empty)


def test_mirrored_landmarks_are_noticed(pictures, scan):
    target = dual_scene.surface(8)
    with pytest.raises(ValueError, match="mirror"):
        bad(pictures, scan, landmarks=(target * np.array([1, 1, -1]), target))


# --- settings and command


def test_settings_are_files(tmp_path):
    config = igs.DualConfig.preset("best")
    config.to_yaml(tmp_path / "a.yaml")
    assert igs.DualConfig.from_yaml(tmp_path / "a.yaml") == config
    for name, field in igs.DualConfig.model_fields.items():
        assert field.title, name
        assert field.description, name


def test_command(tmp_path, pictures, scan, capsys, monkeypatch):
    data, volume = scan[0], scan[3]
    np.savez(tmp_path / "scan.npz", proj=data, angles_rad=np.arange(20) * 2 * np.pi / 20)
    np.savez(tmp_path / "volume.npz", data=volume)
    description = {
        "DSO": 120.0,
        "DSD": 180.0,
        "nDetector": [44, 44],
        "dDetector": [1.6, 1.6],
        "nVoxel": [36, 36, 36],
        "dVoxel": [1.0, 1.0, 1.0],
        "angles_rad": (np.arange(20) * 2 * np.pi / 20).tolist(),
    }
    (tmp_path / "scan.json").write_text(json.dumps(description))
    (tmp_path / "photos").mkdir()
    frames = []
    axes = np.eye(4)[[2, 1, 0, 3]]
    for k, camera in enumerate(pictures.cameras):
        alpha = pictures.masks[k][..., None]
        straight = np.divide(
            pictures.images[k], alpha, out=np.zeros_like(pictures.images[k]), where=alpha > 0
        )
        pixels = np.concatenate([straight, alpha], 2).clip(0, 1)
        Image.fromarray(np.rint(255 * pixels).astype(np.uint8)).save(tmp_path / "photos" / f"{k:02d}.png")
        opencv = np.linalg.inv(camera.world_to_camera @ axes)
        pose = (opencv @ np.diag([1.0, -1, -1, 1])).tolist()
        frames.append({"file_path": f"{k:02d}.png", "transform_matrix": pose})
    lens = pictures.cameras[0].intrinsics
    table = {
        "w": 48,
        "h": 48,
        "fl_x": lens[0, 0],
        "fl_y": lens[1, 1],
        "cx": lens[0, 2] + 0.5,
        "cy": lens[1, 2] + 0.5,
        "frames": frames,
    }
    (tmp_path / "photos" / "transforms.json").write_text(json.dumps(table))
    (tmp_path / "move.json").write_text(json.dumps({"transform": dual_scene.TRUTH.tolist()}))
    common = [str(tmp_path / "scan.json"), str(tmp_path / "photos"), "-o", str(tmp_path / "out")]
    common += ["--preset", "fast", "--transform", str(tmp_path / "move.json"), "--json"]
    for pair in ("photo_steps=20", "joint_steps=4", "max_splats=500"):
        common += ["--set", pair]
    assert main(["dual", *common]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["task"] == "dual"
    for name in ("volume", "colour", "model", "splats"):
        assert (tmp_path / "out" / report["files"][name].split("/")[-1]).exists()
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert np.allclose(written["transform"], dual_scene.TRUTH)
    # a volume with its own spacing in place of the scan
    igs.write_volume(tmp_path / "ct.nii.gz", volume, scan[2])
    tail = [*common[1:3], str(tmp_path / "ct"), *common[4:], "--format", "npz"]
    assert main(["dual", str(tmp_path / "ct.nii.gz"), *tail, "--volume"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["xray"] is None
    kept = igs.load(tmp_path / "ct")
    assert np.allclose(kept.volume, volume)
    assert np.allclose(kept.grid.affine, scan[2].affine)
    assert kept.render_rgb(pictures.cameras[0].moved(kept.transform)).max() > 0.1
    assert main(["dual", str(tmp_path / "ct.nii.gz"), *tail, "--volume", "--voxel", "2"]) == 2
    assert "--voxel: got it with --volume" in capsys.readouterr().err

    # Ctrl-C in the joint fit
    def stopped(*given, **options):
        yield 1, 0.5
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(task, "fit_jointly", stopped)
        assert main(["dual", str(tmp_path / "ct.nii.gz"), *tail, "--volume"]) == 130
    assert "interrupted; the best state so far is saved" in capsys.readouterr().err
    kept = igs.load(tmp_path / "ct")
    assert kept.report["state"] == "joint fit"
    assert len(kept.splats) == kept.report["n_surface"]
    # one that does not say how large its voxels are, and a file that is none
    assert main(["dual", str(tmp_path / "volume.npz"), *common[1:], "--volume"]) == 2
    assert "does not say how far apart" in capsys.readouterr().err
    assert main(["dual", *common, "--landmarks", str(tmp_path / "nothing.json")]) == 2
    assert "--landmarks: there is no file" in capsys.readouterr().err
