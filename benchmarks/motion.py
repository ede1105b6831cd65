"""Motion of slices: three orthogonal stacks of thick slices that move, against known and ignored motion.

Slices are 4 voxels thick (box), taken from the truth with cubic splines, with 2 % noise; each turns by up to 2
degrees and moves by up to 2 voxels, in random directions. PSNR (peak = range of the truth, without a margin of 4
voxels) of one total variation reconstruction: without motion, with motion ignored, with the true motion, and with
the estimated one after one rigid registration of all its slices with the truth.

    python benchmarks/motion.py            # the table
    python benchmarks/motion.py --time     # also 160^3 from three stacks of 160 x 192 x 40
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from common import volumes, write
from scipy.ndimage import map_coordinates, spline_filter

import napari_innergs as igs
from napari_innergs.baselines.stacks import StackProblem, tikhonov_steps, tv_steps
from napari_innergs.fit.metrics import psnr
from napari_innergs.fit.motion import Motion, estimate_motion
from napari_innergs.geometry.rotation import rotation_vector_to_matrix
from napari_innergs.operators.acquisition import SliceAcquisition

K, NOISE, MARGIN = 4, 0.02, 4
# Weight of total variation in units of the range, the same everywhere.
TV = 0.012


def random_motion(count: int, degrees: float, voxels: float, random: np.random.Generator) -> np.ndarray:
    """Rotation vectors and translations (2, count, 3) of random direction and uniform length."""
    way = random.standard_normal((2, count, 3))
    way *= random.uniform(0, 1, (2, count, 1)) / np.linalg.norm(way, axis=2, keepdims=True)
    return way * np.array([np.radians(degrees), voxels])[:, None, None]


def simulate(
    coefficients: np.ndarray,
    start: np.ndarray,
    shape: tuple[int, ...],
    axis: int,
    level: str,
    noise: float,
    degrees: float = 2.0,
    voxels: float = 2.0,
) -> tuple[igs.SliceStack, np.ndarray]:
    """A stack of thick slices of the window of a volume (spline coefficients), and its true transforms."""
    random = np.random.default_rng([7, axis])
    others = [a for a in range(3) if a != axis]
    count, h, w = shape[axis] // K, shape[others[0]], shape[others[1]]
    affine = np.zeros((4, 4))
    affine[axis, 0], affine[axis, 3], affine[3, 3] = K, (K - 1) / 2, 1
    affine[others[0], 1] = affine[others[1], 2] = 1
    transforms = np.tile(np.eye(4), (count, 1, 1))
    if level != "off":
        turn, shift = random_motion(count if level == "slice" else 1, degrees, voxels, random)
        center = np.tile((np.array(shape) - 1) / 2, (count, 1))
        if level == "slice":
            center[:, axis] = K * np.arange(count) + (K - 1) / 2
        matrix = rotation_vector_to_matrix(turn)
        transforms[:, :3, :3] = matrix
        transforms[:, :3, 3] = center - np.einsum("nab,nb->na", transforms[:, :3, :3], center) + shift
    data = np.empty((count, h, w), np.float32)
    place = np.zeros((3, K, h, w))
    place[others[0]], place[others[1]] = np.mgrid[:h, :w][:, None]
    for i in range(count):
        place[axis] = (K * i + np.arange(K))[:, None, None]
        at = (
            np.tensordot(transforms[i, :3, :3], place, 1)
            + (transforms[i, :3, 3] + start)[:, None, None, None]
        )
        data[i] = map_coordinates(coefficients, at, order=3, mode="nearest", prefilter=False).mean(0)
    data += noise * np.random.default_rng([8, axis]).standard_normal(data.shape)
    return igs.SliceStack(data, affine, thickness=K, profile="box"), transforms


def spoil(stack: igs.SliceStack, share: float, seed: int) -> tuple[igs.SliceStack, np.ndarray]:
    """Replace slices by noise, upside-down slices and nearly empty ones."""
    random = np.random.default_rng([9, seed])
    data = stack.data[..., 0].copy()
    bad = random.choice(len(data), max(1, round(share * len(data))), replace=False)
    low, high = float(data.min()), float(data.max())
    for number, i in enumerate(bad):
        kind = (number + seed) % 3
        if kind == 0:
            data[i] = random.uniform(low, high, data[i].shape)
        else:
            data[i] = data[i, ::-1, ::-1] if kind == 1 else low + 0.1 * (data[i] - low)
    return igs.SliceStack(data, stack.affine, thickness=K, profile="box"), bad


def reconstruct(
    stacks: list[igs.SliceStack],
    grid: igs.Grid,
    transforms: list[np.ndarray],
    wide: float,
    motion: Motion | None = None,
) -> np.ndarray:
    """Total variation from slices where the transforms put them."""
    operators = [SliceAcquisition(s, grid, t) for s, t in zip(stacks, transforms, strict=True)]
    data = [s.data[..., 0] for s in stacks]
    weights = [o.inside().astype(np.float32) for o in operators]
    if motion is not None:
        data = [
            ((d - o) / g / s[:, None, None]).astype(np.float32)
            for d, s, g, o in zip(data, motion.scales, motion.gains, motion.offsets, strict=True)
        ]
        weights = [w * trust for w, trust in zip(weights, motion.weights, strict=True)]
    problem = StackProblem(operators, data, weights)
    volume = np.full(grid.shape, data[0].mean(), np.float32)
    for _ in tikhonov_steps(problem, volume, 0.1, 12):
        pass
    for _ in tv_steps(problem, volume, TV * wide, 60):
        pass
    return volume


def drive(steps: object) -> tuple[Motion, float]:
    """Run to the end; also return the longest time between two reports."""
    longest = 0.0
    while True:
        began = time.perf_counter()
        try:
            next(steps)  # type: ignore[call-overload]
        except StopIteration as stop:
            return stop.value, longest
        longest = max(longest, time.perf_counter() - began)


def slice_errors(
    stacks: list[igs.SliceStack], found: list[np.ndarray], true: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean displacement of each slice's pixels after one robust rigid registration, and that registration."""
    places = []
    for s in stacks:
        ends = [(r * (s.height - 1), c * (s.width - 1)) for r in (0.2, 0.5, 0.8) for c in (0.2, 0.5, 0.8)]
        at = np.array([[[t, *e] for e in ends] for t in s.positions])
        places.append(s.geometry.to_world(at.reshape(-1, 3)).reshape(at.shape))

    def put(transforms: list[np.ndarray]) -> np.ndarray:
        moved = [
            np.einsum("nab,nkb->nka", t[:, :3, :3], p) + t[:, None, :3, 3]
            for t, p in zip(transforms, places, strict=True)
        ]
        return np.concatenate(moved)

    a, b = put(found), put(true)
    weight = np.ones((len(a), 1, 1))
    for _ in range(8):
        mean_a, mean_b = (np.sum(weight * v, (0, 1)) / (weight.sum() * v.shape[1]) for v in (a, b))
        u, _, v = np.linalg.svd(np.einsum("nka,nkb->ab", weight * (a - mean_a), b - mean_b))
        turn = v.T @ np.diag([1, 1, np.linalg.det(u @ v)]) @ u.T
        error = np.linalg.norm((a - mean_a) @ turn.T - (b - mean_b), axis=2).mean(1)
        weight = (1 / (1 + (error / np.median(error)) ** 2))[:, None, None]
    whole = np.eye(4)
    whole[:3, :3], whole[:3, 3] = turn, mean_b - turn @ mean_a
    return error, whole


def score(volume: np.ndarray, truth: np.ndarray) -> float:
    inner = (slice(MARGIN, -MARGIN),) * 3
    return psnr(volume[inner], truth[inner], peak=float(np.ptp(truth)))


def cell(
    coefficients: np.ndarray,
    start: np.ndarray,
    truth: np.ndarray,
    level: str = "slice",
    garbage: float = 0.0,
    noise: float = NOISE,
    degrees: float = 2.0,
    voxels: float = 2.0,
) -> dict[str, object]:
    """Measure one volume at one setting."""
    wide, grid = float(np.ptp(truth)), igs.Grid(truth.shape)
    still = [simulate(coefficients, start, truth.shape, a, "off", noise * wide) for a in range(3)]
    moved = [
        simulate(coefficients, start, truth.shape, a, level, noise * wide, degrees, voxels) for a in range(3)
    ]
    stacks, true = [s for s, _ in moved], [t for _, t in moved]
    told = [t for _, t in still]
    row: dict[str, object] = {
        "level": level,
        "noise": noise,
        "degrees": degrees,
        "voxels": voxels,
        "garbage": garbage,
        "no_motion": score(reconstruct([s for s, _ in still], grid, told, wide), truth),
        "ignored": score(reconstruct(stacks, grid, told, wide), truth),
        "known": score(reconstruct(stacks, grid, true, wide), truth),
    }
    bad = np.zeros(0, int)
    if garbage:
        spoilt = [spoil(s, garbage, i) for i, s in enumerate(stacks)]
        firsts = np.cumsum([0] + [s.n_slices for s in stacks])
        bad = np.concatenate([b + f for (_, b), f in zip(spoilt, firsts[:-1], strict=True)])
        stacks = [s for s, _ in spoilt]
    cpu, wall = time.process_time(), time.perf_counter()
    motion, longest = drive(estimate_motion(stacks, grid, level=level))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    error, whole = slice_errors(stacks, motion.transforms, true)
    good = np.ones(len(error), bool)
    good[bad] = False
    outliers = np.concatenate(motion.outliers)
    est = score(reconstruct(stacks, grid, [whole @ t for t in motion.transforms], wide, motion), truth)
    row |= {
        "estimated": est,
        "recovered": (est - row["ignored"]) / (row["no_motion"] - row["ignored"]),  # type: ignore[operator]
        "slice_error_median": float(np.median(error[good])),
        "slice_error_90": float(np.percentile(error[good], 90)),
        "start_error_median": float(np.median(slice_errors(stacks, told, true)[0][good])),
        "stated_error_median": float(np.median(np.concatenate(motion.error)[good, 0])),
        "outliers_found": f"{int(outliers[bad].sum())} of {len(bad)}",
        "outliers_false": int(outliers[good].sum()),
        "cpu_s": cpu,
        "wall_s": wall,
        "longest_step_s": longest,
    }
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def window(volume: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spline coefficients, and the middle of a volume with sides of whole slices."""
    shape = np.minimum(volume.shape, size) // (2 * K) * (2 * K)
    start = (np.array(volume.shape) - shape) // 2
    cut = volume[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
    return spline_filter(volume, 3), start, np.ascontiguousarray(cut)


def timing(volume: np.ndarray) -> dict[str, object]:
    """Three stacks of 160 x 192 x 40 with motion, to 160 x 160 x 160 (motion alone)."""
    shape = (160, 192, 160)
    factor = [s / n for s, n in zip(shape, volume.shape, strict=True)]
    at = np.stack(np.meshgrid(*(np.arange(s) / f for s, f in zip(shape, factor, strict=True)), indexing="ij"))
    big = map_coordinates(volume, at, order=1)
    coefficients = spline_filter(big, 3)
    wide = float(np.ptp(volume))
    stacks = [simulate(coefficients, np.zeros(3), shape, a, "slice", NOISE * wide)[0] for a in range(3)]
    affine = np.diag([1, 1.2, 1, 1])
    affine[1, 3] = 0.1
    wall, cpu = time.perf_counter(), time.process_time()
    motion, longest = drive(estimate_motion(stacks, igs.Grid((160, 160, 160), affine)))
    return {
        "wall_s": round(time.perf_counter() - wall, 1),
        "cpu_s": round(time.process_time() - cpu, 1),
        "longest_step_s": round(longest, 2),
        "stacks": [list(s.data.shape[:3]) for s in stacks],
        "translation_median": round(motion.summary()["translation_median"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--volume", action="append", help="name; may be repeated")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--name", default="motion")
    arguments = parser.parse_args()
    every = volumes()
    known = [n for n in ("colin27", "brain", "bone") if n in every]
    settings: list[dict[str, object]] = [
        {},
        {"garbage": 0.05},
        {"level": "stack", "degrees": 5.0, "voxels": 5.0},
        {"degrees": 5.0, "voxels": 5.0},
        {"noise": 0.05},
    ]
    rows = []
    for name in arguments.volume or known:
        prepared = window(every[name], arguments.size)
        for setting in settings:
            row = {"volume": name, "shape": list(prepared[2].shape), **cell(*prepared, **setting)}  # type: ignore[arg-type]
            rows.append(row)
            print(row, flush=True)
    content: dict[str, object] = {"rows": rows}
    if arguments.time:
        content["time_160"] = timing(every[known[0]])
        print(content["time_160"])
    write(arguments.name, content)


if __name__ == "__main__":
    main()
