"""Thick slices and several stacks: the measurement, the solvers, the fields, and the whole job."""

import time

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import napari_innergs as igs
from napari_innergs.baselines.stacks import StackProblem, tikhonov_steps, tv_steps
from napari_innergs.cpu.variation import squared_gradient
from napari_innergs.fit.engine import Done, Preview, Step
from napari_innergs.fit.thick import simplex_weights
from napari_innergs.fit.volume_field import fit_volume_field, start_volume_field
from napari_innergs.operators.acquisition import SliceAcquisition, misfit
from napari_innergs.samples import _volumes
from napari_innergs.tasks import parts
from napari_innergs.tasks.parts import common_grid


def brain(size=48):
    data = _volumes.volume("brain").data.astype(np.float32)
    low = [(n - size) // 2 for n in data.shape]
    return np.ascontiguousarray(data[tuple(slice(a, a + size) for a in low)])


def affine_of(axis, k, first):
    affine = np.zeros((4, 4))
    affine[axis, 0], affine[axis, 3], affine[3, 3] = k, first, 1
    for column, other in enumerate([a for a in range(3) if a != axis], 1):
        affine[other, column] = 1
    return affine


def thick_stack(volume, axis, k=4, noise=0.0, **options):
    turned = np.moveaxis(volume, axis, 0)
    slices = turned.reshape(-1, k, *turned.shape[1:3], *volume.shape[3:]).mean(1)
    slices = slices + noise * np.ptp(volume) * np.random.default_rng(axis).standard_normal(slices.shape)
    options = {"thickness": k, "profile": "box", **options}
    return igs.SliceStack(slices.astype(np.float32), affine_of(axis, k, (k - 1) / 2), **options)


def rotation(degrees, shift=(0.0, 0.0, 0.0)):
    from scipy.spatial.transform import Rotation

    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("zyx", degrees, degrees=True).as_matrix()
    out[:3, 3] = shift
    return out


def psnr(volume, truth):
    return float(20 * np.log10(np.ptp(truth) / np.sqrt(np.mean((volume - truth) ** 2))))


def exhaust(steps):
    for _ in steps:
        pass


class TestAcquisition:
    @pytest.mark.parametrize("axis", [0, 1, 2])
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_box_of_whole_voxels_is_their_mean(self, axis, k):
        volume = np.random.default_rng(0).standard_normal((8, 12, 16)).astype(np.float32)
        stack = thick_stack(volume, axis, k)
        seen = SliceAcquisition(stack, igs.Grid(volume.shape))
        np.testing.assert_allclose(seen.apply(volume), stack.data[..., 0], atol=1e-5)
        assert len(seen.weights) == k and seen.inside(whole=True).all()

    def test_gaussian_profile_of_a_plane_wave(self):
        z = np.arange(64, dtype=np.float32)
        volume = np.broadcast_to(np.cos(0.3 * z)[:, None, None], (64, 6, 6))
        stack = igs.SliceStack(np.zeros((9, 6, 6), np.float32), affine_of(0, 4, 15.0), thickness=5.0)
        seen = SliceAcquisition(stack, igs.Grid(volume.shape)).apply(volume)
        sigma = 5 / 2.3548
        # the Fourier transform of the profile, and of the voxels it is integrated over
        wanted = (
            np.cos(0.3 * (15 + 4 * np.arange(9)))
            * np.exp(-0.5 * (0.3 * sigma) ** 2)
            * np.sinc(0.3 / 2 / np.pi)
        )
        np.testing.assert_allclose(seen[:, 3, 3], wanted, atol=2e-3)

    def test_large_pixels_are_means(self):
        volume = np.random.default_rng(1).standard_normal((6, 12, 12)).astype(np.float32)
        affine = np.diag([1.0, 3.0, 3.0, 1.0])
        affine[1:3, 3] = 1
        stack = igs.SliceStack(np.zeros((6, 4, 4), np.float32), affine)
        seen = SliceAcquisition(stack, igs.Grid(volume.shape)).apply(volume)
        np.testing.assert_allclose(seen, volume.reshape(6, 4, 3, 4, 3).mean((2, 4)), atol=1e-5)

    @pytest.mark.parametrize("profile", ["box", "gaussian"])
    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_adjoint(self, axis, turned, profile):
        random = np.random.default_rng(2)
        volume = random.standard_normal((24, 20, 28)).astype(np.float32)
        stack = thick_stack(volume, axis, 4, profile=profile)
        moves = np.stack([rotation((3 * i, -7, 5), (0.3 * i, -1.2, 0.7)) for i in range(stack.n_slices)])
        seen = SliceAcquisition(stack, igs.Grid(volume.shape), moves if turned else None)
        slices = random.standard_normal(seen.range_shape).astype(np.float32)
        left = np.vdot(seen.apply(volume).astype(float), slices)
        right = np.vdot(volume, seen.adjoint(slices).astype(float))
        scale = np.linalg.norm(seen.apply(volume)) * np.linalg.norm(slices)
        assert abs(left - right) < 1e-5 * scale

    def test_motion_moves_what_is_seen(self):
        index = np.indices((24, 24, 24)).astype(np.float32)
        volume = index[0] + 2 * index[1] + 4 * index[2]
        stack = igs.SliceStack(
            np.zeros((3, 8, 8), np.float32), affine_of(0, 2, 9.0) + 0, thickness=2.0, profile="box"
        )
        move = rotation((10, -5, 8), (1.5, 6.0, 7.0))
        seen = SliceAcquisition(stack, igs.Grid(volume.shape), np.broadcast_to(move, (3, 4, 4)))
        world = move @ np.array([11.0, 3, 5, 1])
        # a linear volume is not changed by any profile
        assert seen.apply(volume)[1, 3, 5] == pytest.approx(world[:3] @ [1, 2, 4], abs=1e-3)

    def test_part_is_a_window(self):
        volume = np.random.default_rng(3).standard_normal((16, 16, 16)).astype(np.float32)
        whole = SliceAcquisition(thick_stack(volume, 1, 4), igs.Grid(volume.shape))
        part = whole.part(igs.Grid(volume.shape), np.array([1, 3]), slice(2, 9), slice(4, 16))
        np.testing.assert_array_equal(part.apply(volume), whole.apply(volume)[[1, 3], 2:9, 4:16])

    def test_misfit_gradient(self):
        random = np.random.default_rng(4)
        volume = torch.from_numpy(random.standard_normal((2, 8, 8, 8)).astype(np.float32)).requires_grad_()
        operators = [
            SliceAcquisition(thick_stack(np.zeros((8, 8, 8)), a, 2), igs.Grid((8, 8, 8))) for a in (0, 2)
        ]
        data = [random.standard_normal((2, *one.range_shape)).astype(np.float32) for one in operators]
        weights = [random.random(one.range_shape).astype(np.float32) for one in operators]
        loss = misfit(volume, operators, data, weights)
        loss.backward()
        direction = random.standard_normal(volume.shape).astype(np.float32)
        ends = [
            misfit(volume.detach() + s * torch.from_numpy(direction), operators, data, weights)
            for s in (-0.1, 0.1)
        ]
        slope = float(ends[1] - ends[0]) / 0.2
        assert float((volume.grad.numpy() * direction).sum()) == pytest.approx(slope, rel=1e-3)


class TestSolvers:
    @pytest.fixture
    def problem(self):
        truth = gaussian_filter(np.random.default_rng(5).standard_normal((16, 16, 16)), 1.5).astype(
            np.float32
        )
        stacks = [thick_stack(truth, axis, 4, 0.02) for axis in range(3)]
        operators = [SliceAcquisition(s, igs.Grid(truth.shape)) for s in stacks]
        return StackProblem(operators, [s.data[..., 0] for s in stacks])

    def test_tikhonov_solves_the_normal_equations(self, problem):
        volume, prior = np.zeros((2, 16, 16, 16), np.float32)
        prior[4:8] = 0.1
        exhaust(tikhonov_steps(problem, volume, 0.05, 200, prior, tolerance=1e-6))
        gradient = problem.transpose(problem.residuals(volume)) - 0.05 * squared_gradient(volume - prior)
        assert np.linalg.norm(gradient) < 1e-4 * np.linalg.norm(problem.transpose(problem.data))

    def test_total_variation_is_least(self, problem):
        def objective(x):
            steps = [np.diff(x, axis=a, append=x.take([-1], a)) for a in range(3)]
            fit = sum(np.square(r).sum() for r in problem.residuals(x)) / 2
            return fit + 0.01 * np.sqrt(sum(s * s for s in steps)).sum()

        volume = np.zeros((16, 16, 16), np.float32)
        exhaust(tv_steps(problem, volume, 0.01, 300))
        least = objective(volume)
        random = np.random.default_rng(6)
        for size in (1e-3, 1e-2):
            for _ in range(3):
                assert (
                    objective(volume + size * random.standard_normal(volume.shape).astype(np.float32)) > least
                )
        exhaust(tv_steps(problem, volume, 0.01, 300))
        assert objective(volume) > least * (1 - 1e-3)

    def test_norm_bounds_the_spectrum(self, problem):
        vector = np.random.default_rng(7).standard_normal(problem.shape).astype(np.float32)
        for _ in range(20):
            image = problem.normal(vector)
            value = np.linalg.norm(image) / np.linalg.norm(vector)
            vector = image / np.linalg.norm(image)
        assert 0.8 * problem.norm() <= value <= problem.norm() * (1 + 1e-4)

    def test_field_explains_the_slices(self, problem):
        field = start_volume_field(np.zeros((1, 16, 16, 16), np.float32), 2.0)
        weights = problem.weights
        data = [d[None] for d in problem.data]
        losses = [
            loss for _, loss in fit_volume_field(field, (16, 16, 16), problem.operators, data, weights, 40)
        ]
        assert losses[-1] < 0.1 * losses[0]

    def test_simplex_weights(self):
        random = np.random.default_rng(8)
        shared = random.standard_normal(20000)  # the noise of the test data
        errors = np.stack([shared + s * random.standard_normal(20000) for s in (1.0, 2.0, 10.0)])
        weights = simplex_weights(errors @ errors.T / 20000)
        np.testing.assert_allclose(weights, [0.8, 0.2, 0.0], atol=0.04)
        assert weights.sum() == pytest.approx(1)
        alike = simplex_weights(np.ones((3, 3)) + 1e-3 * np.eye(3))
        np.testing.assert_allclose(alike, 1 / 3, atol=1e-3)


class TestGrid:
    def test_single_stack_covers_whole_slices(self):
        volume = np.zeros((24, 10, 12), np.float32)
        grid = common_grid([thick_stack(volume, 0, 4)])
        assert grid.shape == volume.shape
        np.testing.assert_allclose(grid.affine, np.eye(4), atol=1e-12)

    def test_orthogonal_stacks_meet_on_voxels(self):
        volume = np.zeros((16, 24, 32), np.float32)
        for order in ((0, 1, 2), (2, 0, 1)):
            grid = common_grid([thick_stack(volume, axis) for axis in order])
            corners = np.sort(grid.corners(), 0)
            np.testing.assert_allclose(corners[[0, -1]], [[0, 0, 0], [15, 23, 31]], atol=1e-9)


class TestJob:
    @pytest.fixture(scope="class")
    @staticmethod
    def three():
        truth = brain()
        stacks = [thick_stack(truth, axis, 4, 0.03) for axis in range(3)]
        return truth, stacks, igs.reconstruct_slices(stacks, config="fast")

    def test_beats_what_it_is_made_from(self, three):
        truth, stacks, result = three
        grid = igs.Grid(truth.shape)
        assert result.grid == grid
        problem = StackProblem([SliceAcquisition(s, grid) for s in stacks], [s.data[..., 0] for s in stacks])
        variation = np.full(truth.shape, truth.mean(), np.float32)
        exhaust(tv_steps(problem, variation, result.report["penalties"]["tv"] * np.ptp(truth), 150))
        mean = np.mean(
            [
                np.repeat(s.data[..., 0], 4, 0).swapaxes(0, a)
                if a < 2
                else np.moveaxis(np.repeat(s.data[..., 0], 4, 0), 0, 2)
                for a, s in enumerate(stacks)
            ],
            0,
        )
        assert psnr(result.volume, truth) > psnr(variation, truth) + 0.3
        assert psnr(result.volume, truth) > psnr(mean, truth) + 3

    def test_report_and_model(self, three):
        truth, _, result = three
        report = result.report
        assert report["task"] == "slices" and len(report["stacks"]) == 3
        assert report["stacks"][1]["thickness"] == 4 and report["noise"]["denoised"]
        assert sum(report["contributions"].values()) == pytest.approx(1, abs=1e-3)
        assert any(name.startswith("gaussians") for name in report["contributions"])
        assert report["consistency"] > 0.8 and report["warnings"] == [] and report["motion"] is None
        assert (
            report["psnr_heldout"]
            >= max(v for k, v in report["heldout"]["psnr"].items() if k != "combined") - 0.05
        )
        assert report["n_gaussians"] == len(result.model.means) > 1000
        assert psnr(result.model.voxelise(result.grid), truth) > 20

    def test_band_holds_most_errors(self, three):
        truth, _, result = three
        share = np.mean(np.abs(result.volume - truth) <= result.uncertainty)
        assert 0.75 < share < 0.99

    def test_shift_scale_and_units_change_nothing(self, three):
        truth, stacks, result = three
        moved = []
        for s in stacks:
            affine = np.diag([0.5, 0.5, 0.5, 1.0]) @ s.affine
            affine[:3, 3] += 100
            moved.append(
                igs.SliceStack(3 * s.data[..., 0] - 50, affine, thickness=2.0, profile="box", units="mm")
            )
        again = igs.reconstruct_slices(moved, config="fast")
        assert again.grid.units == ("mm", "mm", "mm")
        np.testing.assert_allclose(again.grid.spacing, 0.5)
        difference = (again.volume + 50) / 3 - result.volume
        assert np.abs(difference).max() < 0.02 * np.ptp(truth)

    def test_save_and_load(self, three, tmp_path):
        result = three[2]
        again = igs.load(result.save(tmp_path / "r"))
        np.testing.assert_array_equal(again.volume, result.volume)
        assert again.report == result.report

    def test_single_thick_stack(self):
        truth = brain()
        stack = thick_stack(truth, 0, 4)
        result = igs.reconstruct_slices(stack, config="fast")
        assert result.grid == igs.Grid(truth.shape)
        held = SliceAcquisition(stack, result.grid).apply(result.volume)
        # slices are means over their thickness, not samples at their middles
        assert psnr(held, stack.data[..., 0]) > 45
        thin = igs.SliceStack(stack.data[..., 0], stack.affine)
        middle = igs.reconstruct_slices(thin, grid=result.grid, config="fast")
        inner = slice(2, -2)
        assert psnr(result.volume[inner], truth[inner]) > psnr(middle.volume[inner], truth[inner]) + 0.2

    def test_blocks_agree_with_the_whole(self, three, monkeypatch):
        truth, stacks, result = three
        monkeypatch.setattr(parts, "BLOCK_VOXELS", 60_000)
        assert len(parts.in_blocks(truth.shape, 12)) > 1
        again = igs.reconstruct_slices(stacks, config="fast")
        assert np.abs(again.volume - result.volume).mean() < 0.01 * np.ptp(truth)
        assert abs(psnr(again.volume, truth) - psnr(result.volume, truth)) < 0.2
        assert again.report["n_gaussians"] == pytest.approx(result.report["n_gaussians"], rel=0.2)

    def test_contrast_and_mask(self, three):
        truth, stacks, result = three
        broken = stacks[1].data[..., 0].copy()
        mask = np.ones(broken.shape, bool)
        broken[3, 5:12, 5:12], mask[3, 5:12, 5:12] = np.nan, False
        broken[6], mask[6] = 1e4, False
        other = igs.SliceStack(
            0.5 * stacks[2].data[..., 0] + 20, stacks[2].affine, thickness=4, profile="box"
        )
        second = igs.SliceStack(broken, stacks[1].affine, thickness=4, profile="box", mask=mask)
        again = igs.reconstruct_slices([stacks[0], second, other], result.grid, "fast")
        assert again.report["stacks"][2]["gain"] == pytest.approx(0.5, rel=0.03)
        assert psnr(again.volume, truth) > psnr(result.volume, truth) - 0.5

    def test_two_channels_on_a_tilted_grid(self):
        truth = brain(32)
        pair = np.stack([truth, truth.max() - truth], -1)
        stacks = [thick_stack(pair, axis) for axis in (0, 2)]
        grid = igs.Grid((24, 24, 24), rotation((8, 4, -6), (4, 2, 5)))
        result = igs.reconstruct_slices(stacks, grid, "fast")
        assert result.volume.shape == (24, 24, 24, 2)
        assert np.abs(result.volume.sum(-1) - truth.max()).mean() < 0.03 * np.ptp(truth)

    def test_different_objects_are_noticed(self):
        truth = brain()
        other = np.random.default_rng(9).permutation(truth.ravel()).reshape(truth.shape)
        other = gaussian_filter(other, 1.5).astype(np.float32)
        result = igs.reconstruct_slices([thick_stack(truth, 0), thick_stack(other, 1)], config="fast")
        assert result.report["consistency"] < 0.5
        assert "agree poorly" in result.report["warnings"][0]

    def test_motion_is_found(self, three):
        truth, _, _ = three
        from scipy.ndimage import shift

        moved = thick_stack(shift(truth, (0, 1.5, -1.0), order=3, mode="nearest"), 0, 4, 0.01)
        stacks = [thick_stack(truth, 1, 4, 0.01), thick_stack(truth, 2, 4, 0.01), moved]
        grid = igs.Grid(truth.shape)
        settings = {"preset": "fast", "motion": "stack"}
        ignored = igs.reconstruct_slices(stacks, grid, "fast")
        found = igs.reconstruct_slices(stacks, grid, settings)
        transforms = [np.array(t) for t in found.report["motion"]["transforms"]]
        assert [t.shape for t in transforms] == [(12, 4, 4)] * 3
        middle = np.array([24, 24, 24, 1])
        places = [(t[6] @ middle)[:3] for t in transforms]
        np.testing.assert_allclose(places[2] - places[0], (0, -1.5, 1.0), atol=0.3)
        np.testing.assert_allclose(places[1] - places[0], 0, atol=0.3)
        # the mean motion is none: the object is where the stacks have it on average
        inner = (slice(6, -6),) * 3
        there = shift(found.volume, (middle[:3] - places[0]), order=3, mode="nearest")
        here = shift(found.volume, (places[0] - middle[:3]), order=3, mode="nearest")
        best = max(psnr(v[inner], truth[inner]) for v in (there, here))
        assert best > psnr(ignored.volume[inner], truth[inner]) + 1

    def test_cancel_is_quick_and_previews_come(self, three):
        _, stacks, _ = three
        events = igs.fit_slices(stacks, config="balanced")
        previews = 0
        longest, last = 0.0, time.monotonic()
        for event in events:
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
            previews += isinstance(event, Preview)
            if isinstance(event, Step) and event.fraction > 0.3:
                break
        started = time.monotonic()
        events.close()
        assert previews >= 1 and time.monotonic() - started < 0.5 and longest < 2

    def test_fractions_rise(self, three):
        _, stacks, _ = three
        fractions = [0.0]
        for event in igs.fit_slices(stacks[:2], config="fast"):
            if isinstance(event, Step):
                fractions.append(event.fraction)
            assert not isinstance(event, Done) or fractions[-1] > 0.9
        assert min(np.diff(fractions)) > -0.02 and max(fractions) <= 1


def test_comparison_averages_over_the_profile():
    from napari_innergs._demo import compare

    truth = brain()
    complete = thick_stack(truth, 0, 2)
    sparse = complete.keep_every(2)
    result = igs.reconstruct_slices(sparse, config="fast")
    score = compare(result, sparse, complete)
    # the gaps are filled, what is beyond the slices is not
    assert score["psnr"] > 22
    assert np.all(np.ptp(result.volume, axis=(1, 2)) > 50)
    wide = igs.Grid((60, 48, 48))
    beyond = igs.reconstruct_slices(sparse, wide, {"preset": "fast", "gaussians": ()})
    assert np.ptp(beyond.volume[-8:]) == 0 and np.ptp(beyond.volume[40]) > 50
    exact = igs.Reconstruction(truth, igs.Grid(truth.shape), report={"stacks": [{}]})
    assert compare(exact, sparse, complete)["psnr"] > 80


def test_thickness_of_a_layer():
    napari = pytest.importorskip("napari")
    noted = {"napari-innergs": {"thickness": 4.0, "profile": "box"}}
    layer = napari.layers.Image(np.zeros((6, 8, 8), np.float32), scale=(4, 1, 1), metadata=noted)
    stack = igs.SliceStack.from_layer(layer)
    assert (stack.thickness, stack.profile) == (4.0, "box")
    assert igs.SliceStack.from_layer(layer, thickness=0).thickness == 0


def test_single_candidate_has_a_band(three_small):
    result = igs.reconstruct_slices(three_small[1], config={"preset": "fast", "combine": "best"})
    assert len(result.report["contributions"]) == 1
    share = np.mean(np.abs(result.volume - three_small[0]) <= result.uncertainty)
    assert 0.6 < share < 1


@pytest.fixture(scope="module")
def three_small():
    truth = brain()
    return truth, [thick_stack(truth, axis, 4, 0.03) for axis in range(3)]


def test_gaussian_profiles_in_blocks(three_small, monkeypatch):
    truth, stacks = three_small
    told = [igs.SliceStack(s.data, s.affine, thickness=4, profile="gaussian") for s in stacks]
    settings = {"preset": "fast", "gaussians": ()}
    whole = igs.reconstruct_slices(told, config=settings)
    monkeypatch.setattr(parts, "BLOCK_VOXELS", 60_000)
    pieces = igs.reconstruct_slices(told, whole.grid, settings)
    assert np.abs(pieces.volume - whole.volume).mean() < 0.01 * np.ptp(truth)
    assert abs(np.mean((pieces.volume[:4] - whole.volume[:4]) ** 2)) < (0.03 * np.ptp(truth)) ** 2


def test_strips_do_not_darken_the_volume(three_small):
    truth, stacks = three_small
    strip = stacks[2].crop(rows=slice(10, 15))
    settings = {"preset": "fast", "combine": "average"}
    result = igs.reconstruct_slices([*stacks[:2], strip], igs.Grid(truth.shape), settings)
    assert result.volume.mean() == pytest.approx(truth.mean(), rel=0.03)


def test_warnings_of_what_can_not_be_known():
    truth = brain()
    few = [thick_stack(truth[:16], 0, 4), thick_stack(truth[:16], 1, 4)]
    report = igs.reconstruct_slices(few, config="fast").report
    assert report["chosen"] == "fixed weights" and "fixed weights" in report["warnings"][0]
    coarse = igs.Grid((24, 24, 24), np.diag([2.0, 2, 2, 1]))
    stacks = [thick_stack(truth, axis, 4) for axis in (0, 1)]
    report = igs.reconstruct_slices(stacks, coarse, {"preset": "fast", "gaussians": ()}).report
    assert any("larger than the pixels" in line for line in report["warnings"])


def test_profile_thinner_than_a_voxel_stays_in_place():
    volume = np.broadcast_to(np.arange(16, dtype=np.float32)[:, None, None], (16, 4, 4))
    for thickness in (0.0, 0.1, 0.5, 0.9):
        stack = igs.SliceStack(
            np.zeros((3, 4, 4), np.float32), affine_of(0, 4, 2.45), thickness=thickness, profile="box"
        )
        seen = SliceAcquisition(stack, igs.Grid(volume.shape)).apply(volume)
        np.testing.assert_allclose(seen[:, 0, 0], 2.45 + 4 * np.arange(3), atol=1e-4)


def test_small_stack_inside_a_large_one():
    volume = brain()
    small = igs.SliceStack(
        volume[20:22, 20:24, 20:24],
        affine_of(0, 1, 20.0) + np.array([[0] * 4, [0, 0, 0, 20], [0, 0, 0, 20], [0] * 4]),
    )
    igs.fit_slices([thick_stack(volume, 0), small]).close()


class TestBadInput:
    def test_sentences(self):
        stack = thick_stack(brain(16), 0)
        far = igs.SliceStack(
            stack.data, stack.affine + np.array([[0, 0, 0, 500]] * 3 + [[0] * 4]), thickness=4
        )
        metres = igs.SliceStack(stack.data, stack.affine, units="m")
        mm = igs.SliceStack(stack.data, stack.affine, units="mm")
        colour = igs.SliceStack(np.zeros((4, 16, 16, 3), np.uint8))
        for wrong, said in (
            ([stack, far], "stacks: stack 1 overlaps with no other one"),
            ([mm, metres], "stacks: stack 2 has units .* the first one .*; need the same"),
            ([stack, colour], r"stacks: stack 2 has 3 channel\(s\), the first one 1"),
            ([], "stacks: got an empty list"),
        ):
            with pytest.raises(ValueError, match=said):
                igs.fit_slices(wrong)
        with pytest.raises(TypeError, match="got str at 1"):
            igs.fit_slices([stack, "b.tif"])
        with pytest.raises(ValueError, match="thickness: got 99, larger than the whole stack"):
            igs.SliceStack(stack.data, stack.affine, thickness=99)
        with pytest.raises(ValueError, match="motion = 'stack' needs several stacks"):
            igs.fit_slices(stack, config={"motion": "stack"})
        with pytest.raises(ValueError, match=r"gaussians = .*additive.* can not be fitted to thick slices"):
            igs.fit_slices(stack, config="innergs-paper")
        with pytest.raises(ValueError, match=r"each spacing must be from 1\.2"):
            igs.SliceConfig.coerce({"volume_spacings": (0.5,)})
