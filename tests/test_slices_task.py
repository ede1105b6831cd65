import json
import time

import numpy as np
import pytest

import napari_innergs as igs
from napari_innergs.device import describe_device
from napari_innergs.fit.engine import Done, Failed, Preview, Step
from napari_innergs.fit.metrics import psnr
from napari_innergs.samples import _volumes

QUICK = igs.SliceConfig.preset("fast").model_copy(update={"iterations": 8})
NO_GAUSSIANS = QUICK.model_copy(update={"gaussians": ()})


def brain(n=25, h=40, w=44):
    data = _volumes.volume("brain").data
    z, y, x = ((size - want) // 2 for size, want in zip(data.shape, (n, h, w), strict=True))
    return np.ascontiguousarray(data[z : z + n, y : y + h, x : x + w])


def full_grid(stack, k):
    return igs.Grid(((stack.n_slices - 1) * k + 1, stack.height, stack.width), np.eye(4))


def test_better_than_every_interpolation_on_a_real_brain():
    truth = brain(33, 64, 64)
    stack = igs.SliceStack(truth, np.eye(4)).keep_every(4)
    result = igs.reconstruct_slices(stack, full_grid(stack, 4), "fast", keep_candidates=True)
    held = np.array([i for i in range(33) if i % 4])
    scores = {
        name: psnr(result.candidate(name, held)[..., 0], truth[held])
        for name in result.report["contributions"]
    }
    ours = psnr(result.volume[held], truth[held])
    plain = [value for name, value in scores.items() if not name.startswith("gaussians")]
    assert ours > max(plain) + 0.1
    assert scores["gaussians-normalised"] > max(plain)
    assert np.array_equal(result.volume[::4], truth[::4])  # real slices are kept as they are
    inside = np.abs(result.volume - truth)[held] <= result.uncertainty[held]
    assert 0.8 < inside.mean() < 0.99
    report = result.report
    assert report["best_single"].startswith("gaussians")
    assert report["psnr_heldout"] > report["baseline_psnr_heldout"]
    assert sum(report["contributions"].values()) == pytest.approx(1)
    assert json.loads(json.dumps(report)) == report


def test_distance_to_the_nearest_slice_and_the_model():
    stack = igs.SliceStack(brain(5), np.diag([4.0, 1, 1, 1]))
    result = igs.reconstruct_slices(stack, config=QUICK)
    assert result.volume.shape == (17, 40, 44)
    np.testing.assert_allclose(result.distance[:, 0, 0], [0, 1, 2, 1] * 4 + [0], atol=1e-5)
    assert (result.uncertainty[::4] == 0).all() and result.uncertainty[2].min() >= 0
    from_model = result.model.voxelise(result.grid)
    assert psnr(from_model[::4], stack.data[..., 0].astype(float)) > 26
    assert np.ptp(result.model.means[:, 0]) == pytest.approx(16)


def test_intensity_scale_offset_and_units_do_not_matter():
    data = brain(7).astype(np.float32)
    first = igs.reconstruct_slices(igs.SliceStack(data, np.diag([4.0, 1, 1, 1])), config=QUICK)
    scaled = igs.SliceStack(data * 7 - 300, np.diag([0.004, 0.001, 0.001, 1]), units="m")
    second = igs.reconstruct_slices(scaled, config=QUICK)
    assert second.volume.shape == first.volume.shape
    np.testing.assert_allclose((second.volume + 300) / 7, first.volume, atol=0.5)
    assert np.median(np.abs((second.volume + 300) / 7 - first.volume)) < 0.01


def test_order_of_the_slices_does_not_matter():
    data = brain(6)
    positions = np.array([0, 3, 7, 11, 14, 20.0])
    straight = igs.reconstruct_slices(igs.SliceStack(data, positions=positions), config=QUICK)
    order = [3, 0, 5, 1, 4, 2]
    mixed = igs.reconstruct_slices(igs.SliceStack(data[order], positions=positions[order]), config=QUICK)
    np.testing.assert_array_equal(straight.volume, mixed.volume)
    assert straight.grid == mixed.grid


def test_irregular_positions_land_where_they_belong():
    truth = brain(21)
    kept = np.array([0, 2, 3, 8, 12, 15, 20])
    stack = igs.SliceStack(truth[kept], np.eye(4), positions=kept.astype(float))
    grid = igs.Grid((21, 40, 44), np.eye(4))
    result = igs.reconstruct_slices(stack, grid, QUICK)
    np.testing.assert_array_equal(result.volume[kept], truth[kept])
    linear = igs.reconstruct_slices(stack, grid, {"methods": ("linear",), "gaussians": (), "combine": "best"})
    held = np.setdiff1d(np.arange(21), kept)
    assert psnr(result.volume[held], truth[held]) > psnr(linear.volume[held], truth[held]) + 0.3


def test_oblique_grid_agrees_with_the_aligned_one():
    stack = igs.SliceStack(brain(7), np.diag([4.0, 1, 1, 1]))
    aligned = igs.reconstruct_slices(stack, config=QUICK)
    angle = 0.3
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:3, 3] = 5, 8, 6
    grid = igs.Grid((9, 20, 20), turn)
    oblique = igs.reconstruct_slices(stack, grid, QUICK)
    plane = igs.SlicePlane(grid.index_to_world([[4, 0, 0]])[0], turn[:3, 1], turn[:3, 2], (20, 20))
    expected = aligned.render_slice(plane)
    assert psnr(oblique.volume[4], expected, 255) > 35
    np.testing.assert_allclose(oblique.distance[:, 0, 0], [1, 2, 1, 0, 1, 2, 1, 0, 1], atol=1e-5)


def test_rotated_and_flipped_affine_keeps_landmarks():
    data = brain(7)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, 0, -1.0], [1, 0, 0], [0, 1, 0]]) @ np.diag([4, 1, 1])
    affine[:3, 3] = 10, -20, 30
    stack = igs.SliceStack(data, affine)
    result = igs.reconstruct_slices(stack, config=QUICK)
    for index in ((0, 5, 9), (3, 20, 30), (6, 39, 43)):
        world = (affine @ [*index, 1])[:3]
        there = result.grid.world_to_index([world])[0]
        np.testing.assert_allclose(there, np.rint(there), atol=1e-6)
        assert result.volume[tuple(np.rint(there).astype(int))] == data[index]


def test_gantry_tilt():
    """Slices that are shifted in-plane from one to the next are put where the affine says."""
    y, x = np.ogrid[:40, :44]
    planes = np.stack([np.exp(-((y - 20 + j) ** 2 + (x - 22) ** 2) / 30) for j in range(7)]).astype(
        np.float32
    )
    affine = np.diag([4.0, 1, 1, 1])
    affine[1, 0] = 1.0  # each slice is one row further on: in the world the blob is a straight rod
    stack = igs.SliceStack(planes, affine)
    grid = igs.Grid((25, 40, 44), np.eye(4))
    result = igs.reconstruct_slices(stack, grid, QUICK)
    peaks = [np.unravel_index(result.volume[z].argmax(), (40, 44)) for z in range(25)]
    assert set(peaks) == {(20, 22)}


@pytest.mark.parametrize("channels", [1, 2, 3, 6])
def test_channels(channels):
    data = np.stack([np.roll(brain(6), 3 * c, 2) for c in range(channels)], -1)
    result = igs.reconstruct_slices(igs.SliceStack(data, np.diag([3.0, 1, 1, 1])), config=QUICK)
    assert result.volume.shape == (16, 40, 44, channels)
    assert result.uncertainty.shape == result.volume.shape
    np.testing.assert_array_equal(result.volume[::3], data)


def test_mask_is_not_believed():
    data = brain(9).astype(np.float32)
    spoiled = data.copy()
    spoiled[4, 10:20, 10:20] = 4000
    mask = np.ones(data.shape, bool)
    mask[4, 10:20, 10:20] = False
    stack = igs.SliceStack(spoiled, np.diag([3.0, 1, 1, 1]), mask=mask)
    result = igs.reconstruct_slices(stack, config=QUICK)
    assert result.volume.max() < 400


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 20, 30), (4, 5, 60), (5, 1, 1), (3, 2, 17)])
def test_small_stacks(shape):
    random = np.random.default_rng(0)
    data = random.integers(0, 200, shape).astype(np.uint8)
    result = igs.reconstruct_slices(igs.SliceStack(data, np.diag([2.0, 1, 1, 1])), config={"denoise": "off"})
    assert result.volume.shape == (2 * shape[0] - 1, *shape[1:])
    assert np.isfinite(result.volume).all()
    np.testing.assert_array_equal(result.volume[::2], data)


def test_constant_data_stay_constant():
    stack = igs.SliceStack(np.full((6, 32, 32), 17, np.int16), np.diag([3.0, 1, 1, 1]))
    result = igs.reconstruct_slices(stack, config=QUICK)
    np.testing.assert_allclose(result.volume, 17, atol=1e-3)
    assert stack.restore(result.volume).dtype == np.int16
    assert (stack.restore(result.volume) == 17).all()


def test_noise_is_removed():
    truth = brain(17, 48, 48).astype(np.float32)
    noisy = truth + np.random.default_rng(0).normal(0, 0.06 * np.ptp(truth), truth.shape).astype(np.float32)
    stack = igs.SliceStack(noisy, np.eye(4)).keep_every(4)
    result = igs.reconstruct_slices(stack, full_grid(stack, 4), QUICK)
    assert result.report["noise"]["denoised"]
    plain = igs.reconstruct_slices(stack, full_grid(stack, 4), QUICK.model_copy(update={"denoise": "off"}))
    assert not plain.report["noise"]["denoised"]
    assert psnr(result.volume, truth) > psnr(plain.volume, truth) + 0.5
    inside = np.abs(result.volume - noisy)[result.distance > 0] <= result.uncertainty[result.distance > 0]
    assert 0.8 < inside.mean() < 0.97


def test_events_come_in_order_and_progress_rises():
    events = list(igs.fit_slices(igs.SliceStack(brain(7), np.diag([4.0, 1, 1, 1])), config=QUICK))
    assert isinstance(events[-1], Done)
    previews = [event for event in events if isinstance(event, Preview)]
    steps = [event for event in events if isinstance(event, Step)]
    assert len(previews) >= 2 and all(p.volume.shape == (25, 40, 44) for p in previews)
    fractions = [step.fraction for step in steps]
    assert fractions == sorted(fractions) and fractions[0] < 0.1 < 0.9 < fractions[-1] <= 1
    fitting = [step for step in steps if step.phase == "Fitting Gaussians (normalised)"]
    assert [s.iteration for s in fitting if s.loss is not None] == list(range(1, 9))
    assert steps[-1].psnr_heldout is not None


def test_cancel_in_every_phase():
    stack = igs.SliceStack(brain(9), np.diag([3.0, 1, 1, 1]))
    phases = list(dict.fromkeys(e.phase for e in igs.fit_slices(stack, config=QUICK) if isinstance(e, Step)))
    assert len(phases) >= 6
    for phase in phases:
        events = igs.fit_slices(stack, config=QUICK)
        for event in events:
            if isinstance(event, Step) and event.phase == phase:
                break
        started = time.perf_counter()
        events.close()
        assert time.perf_counter() - started < 0.5, phase


def test_interrupt_keeps_the_best_state():
    stack = igs.SliceStack(brain(9), np.diag([3.0, 1, 1, 1]))

    def stop(event):
        if isinstance(event, Step) and event.phase.startswith("Fitting"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        igs.reconstruct_slices(stack, config=QUICK, progress=stop)
    assert caught.value.best.volume.shape == (25, 40, 44)
    assert caught.value.best.volume.max() > 50


def test_failure_becomes_an_event_and_an_exception(monkeypatch):
    from napari_innergs.fit import combine

    def broken(*args, **options):
        raise RuntimeError("no weights today")

    monkeypatch.setattr(combine, "learn", broken)
    stack = igs.SliceStack(brain(9), np.diag([3.0, 1, 1, 1]))
    last = list(igs.fit_slices(stack, config=NO_GAUSSIANS))[-1]
    assert isinstance(last, Failed) and str(last.error) == "no weights today"
    assert last.best.volume.shape == (25, 40, 44)
    with pytest.raises(RuntimeError, match="no weights today"):
        igs.reconstruct_slices(stack, config=NO_GAUSSIANS)


def test_series_starts_warm():
    first, second = brain(9), np.roll(brain(9), 1, 2)
    stacks = [igs.SliceStack(data, np.diag([3.0, 1, 1, 1])) for data in (first, second)]
    one = igs.reconstruct_slices(stacks[0], config=QUICK)
    centres = one.model.means.copy()
    two = igs.reconstruct_slices(stacks[1], config=QUICK, warm_start=one)
    np.testing.assert_array_equal(two.volume[::3], second)
    np.testing.assert_array_equal(one.model.means, centres)
    cold = igs.reconstruct_slices(stacks[1], config=QUICK)
    assert psnr(two.volume, cold.volume) > 36
    assert two.report["psnr_heldout"] == pytest.approx(cold.report["psnr_heldout"])

    def steps(start):
        events = igs.fit_slices(stacks[0], config=QUICK, warm_start=start)
        return max(e.iteration for e in events if isinstance(e, Step) and e.phase.startswith("Fitting"))

    assert (steps(None), steps(one)) == (8, 4)


def test_warm_start_from_something_else_does_no_harm():
    stack = igs.SliceStack(brain(9), np.diag([3.0, 1, 1, 1]))
    other = igs.reconstruct_slices(igs.SliceStack(brain(9)[:, ::-1], np.diag([3.0, 1, 1, 1])), config=QUICK)
    cold = igs.reconstruct_slices(stack, config=QUICK)
    warm = igs.reconstruct_slices(stack, config=QUICK, warm_start=other)
    np.testing.assert_array_equal(warm.volume, cold.volume)


def test_model_alone_is_the_candidate():
    stack = igs.SliceStack(brain(9), np.diag([3.0, 1, 1, 1]))
    result = igs.reconstruct_slices(stack, config=QUICK, keep_candidates=True)
    z = np.arange(result.grid.shape[0], dtype=float)
    candidate = result.candidate("gaussians-normalised", z)[..., 0]
    np.testing.assert_allclose(result.model.voxelise(result.grid), candidate, atol=2e-3 * np.ptp(candidate))


def test_same_answer_twice():
    stack = igs.SliceStack(brain(7), np.diag([4.0, 1, 1, 1]))
    first, second = (igs.reconstruct_slices(stack, config=QUICK) for _ in range(2))
    np.testing.assert_array_equal(first.volume, second.volume)


def test_combine_modes_and_fields():
    stack = igs.SliceStack(brain(9), np.diag([3.0, 1, 1, 1]))
    best = igs.reconstruct_slices(stack, config={"preset": "fast", "iterations": 5, "combine": "best"})
    assert sorted(best.report["contributions"].values())[-1] == 1
    both = {"preset": "fast", "iterations": 5, "gaussians": ("normalised", "additive"), "densify": True}
    result = igs.reconstruct_slices(stack, config={**both, "uncertainty": False})
    assert "gaussians-additive" in result.report["contributions"]
    assert result.uncertainty is None
    assert result.model.field == "normalised"


def test_paper_preset_runs():
    config = igs.SliceConfig.preset("innergs-paper").model_copy(update={"iterations": 12})
    stack = igs.SliceStack(brain(9), np.diag([3.0, 1, 1, 1]))
    result = igs.reconstruct_slices(stack, config=config)
    assert result.model.field == "additive"
    assert psnr(result.model.voxelise(result.grid), result.volume) > 25
    assert list(result.report["contributions"]) == ["gaussians-additive"]


def test_save_and_load(tmp_path):
    stack = igs.SliceStack(brain(6), np.diag([3.0, 1, 1, 1]), units="mm")
    result = igs.reconstruct_slices(stack, config=QUICK)
    result.save(tmp_path / "out")
    again = igs.load(tmp_path / "out")
    for name in ("volume", "uncertainty", "distance"):
        np.testing.assert_array_equal(getattr(again, name), getattr(result, name))
    assert again.grid == result.grid and again.report == result.report
    assert len(again.model) == len(result.model)
    (tmp_path / "out" / "report.json").write_text("{}")
    with pytest.raises(ValueError, match="not the report of a reconstruction"):
        igs.load(tmp_path / "out")
    with pytest.raises(ValueError, match=r"report\.json"):
        igs.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="keep_candidates=True"):
        result.candidate("linear", [1.0])


def test_bad_arguments():
    stack = igs.SliceStack(brain(5), np.diag([3.0, 1, 1, 1]))
    with pytest.raises(TypeError, match=r"stacks: expected a SliceStack or a list of them, got ndarray"):
        igs.fit_slices(brain(5))
    with pytest.raises(ValueError, match=r"stacks: got an empty list"):
        igs.reconstruct_slices([])
    with pytest.raises(ValueError, match=r"config: there is no preset 'quick'"):
        igs.fit_slices(stack, config="quick")
    with pytest.raises(ValueError, match=r"methods and gaussians are both empty"):
        igs.fit_slices(stack, config={"methods": (), "gaussians": ()})
    with pytest.raises(ValueError, match=r"Unknown device 'gpu'"):
        igs.fit_slices(stack, config=QUICK, device="gpu")
    with pytest.raises(TypeError, match=r"grid: expected a Grid, got tuple"):
        igs.fit_slices(stack, (5, 5, 5), config=QUICK)
    far = np.eye(4)
    far[0, 3] = 1000
    with pytest.raises(ValueError, match=r"grid: it does not meet the stack"):
        igs.fit_slices(stack, igs.Grid((4, 4, 4), far), QUICK)
    with pytest.raises(ValueError, match=r"grid: .*bytes.*largest grid.*that fits"):
        igs.fit_slices(stack, igs.Grid((60000, 60000, 60000), np.diag([1e-3] * 3 + [1])), QUICK)


def test_estimate_grows_with_the_job():
    stack = igs.SliceStack(brain(5), np.diag([3.0, 1, 1, 1]))
    small = igs.estimate_slices(stack, config="fast")
    large = igs.estimate_slices(stack, config="best")
    assert 0 < small["bytes"] < 1e9
    assert 0 < small["seconds"] < large["seconds"]


def test_heldout_psnr_is_followed_while_fitting():
    stack = igs.SliceStack(brain(9), np.diag([3.0, 1, 1, 1]))
    values = [e.psnr_heldout for e in igs.fit_slices(stack, config=QUICK) if isinstance(e, Step)]
    curve = list(dict.fromkeys(v for v in values if v is not None))
    assert len(curve) >= 5
    assert curve[-1] > curve[0]


def test_nothing_is_extrapolated_beyond_the_stack():
    stack = igs.SliceStack(brain(5).astype(np.float32) - 300, np.diag([3.0, 1, 1, 1]))
    low, span = float(stack.data.min()), float(np.ptp(stack.data))
    plain = igs.reconstruct_slices(stack, config=NO_GAUSSIANS)
    for shape, start in (((33, 40, 44), (-10, 0, 0)), ((13, 50, 54), (0, -5, -5))):
        affine = np.eye(4)
        affine[:3, 3] = start
        result = igs.reconstruct_slices(stack, igs.Grid(shape, affine), NO_GAUSSIANS)
        inner = tuple(
            slice(-first, size - first) for first, size in zip(start, plain.volume.shape, strict=True)
        )
        np.testing.assert_allclose(result.volume[inner], plain.volume, atol=1e-3)
        np.testing.assert_allclose(result.uncertainty[inner], plain.uncertainty, atol=1e-3)
        beyond = np.ones(shape, bool)
        beyond[inner] = False
        np.testing.assert_allclose(result.volume[beyond], low, atol=1e-3)
        np.testing.assert_allclose(result.uncertainty[beyond], span, rtol=1e-5)


def test_trusted_pixels_of_measured_slices_stay_with_a_mask():
    data = brain(6)
    mask = np.ones(data.shape, bool)
    mask[2, 10:20, 10:20] = False
    result = igs.reconstruct_slices(igs.SliceStack(data, np.diag([3.0, 1, 1, 1]), mask=mask), config=QUICK)
    np.testing.assert_array_equal(result.volume[::3][mask], data[mask])
    assert (result.uncertainty[::3][mask] == 0).all()


def test_a_slice_without_trusted_pixels_is_a_missing_slice():
    data = brain(6)
    mask = np.ones(data.shape, bool)
    mask[2] = False
    spoiled = igs.SliceStack(np.where(mask, data, 255), np.diag([3.0, 1, 1, 1]), mask=mask)
    missing = igs.SliceStack(np.delete(data, 2, 0), positions=3.0 * np.array([0, 1, 3, 4, 5]))
    result = igs.reconstruct_slices(spoiled, config=QUICK)
    expected = igs.reconstruct_slices(missing, spoiled.default_grid(), QUICK)
    np.testing.assert_allclose(result.volume, expected.volume, atol=1.0)
    assert result.distance[6, 0, 0] == 3
    mask[1:] = False
    with pytest.raises(ValueError, match="only one slice"):
        igs.fit_slices(igs.SliceStack(data, mask=mask))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"device": "cuda"}, ValueError, "device: got 'cuda'"),
        ({"seed": -1}, ValueError, "seed: got -1"),
        ({"seed": "a"}, ValueError, "seed: got 'a'"),
        ({"warm_start": 5}, TypeError, "warm_start: expected a Reconstruction"),
        ({"grid": igs.Grid((5, 5, 5), units="um")}, ValueError, "grid: got units"),
        ({"config": {"preset": ["fast"]}}, ValueError, "no preset"),
        ({"config": {"nonsense": 3}}, ValueError, "no setting 'nonsense'.*iterations"),
    ],
)
def test_arguments_are_refused_before_the_work(arguments, error, match):
    if arguments.get("device") == "cuda" and describe_device().name == "cuda":
        pytest.skip("there is a GPU")
    with pytest.raises(error, match=match):
        igs.fit_slices(igs.SliceStack(brain(4), units="mm"), **arguments)


def test_render_slice_does_not_ring_at_the_border():
    grid = igs.Grid((6, 7, 8))
    result = igs.Reconstruction(np.full(grid.shape, 1000, np.float32), grid)
    inside = igs.SlicePlane((0.5, -0.4, 0.3), (0, 1, 0), (0, 0, 1), (7, 7))
    np.testing.assert_allclose(result.render_slice(inside), 1000, rtol=1e-4)
    wide = result.render_slice(igs.SlicePlane((2, -3, 0), (0, 1, 0), (0, 0, 1), (12, 8)))
    assert (wide[:3] == 0).all() and (wide[10:] == 0).all()
    np.testing.assert_allclose(wide[3:10], 1000, rtol=1e-4)
