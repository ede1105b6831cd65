"""From raw X-ray counts to line integrals, and two checks of the geometry that need no reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from napari_innergs.geometry.xray import XrayGeometry
from napari_innergs.scan import Scan

__all__ = [
    "CentreEstimate",
    "DirectionCheck",
    "LineIntegrals",
    "check_direction",
    "find_bad_pixels",
    "find_rotation_centre",
    "line_integrals",
    "repair_pixels",
    "scan_line_integrals",
    "suppress_rings",
]

FloatArray = NDArray[np.float64]
Float32Array = NDArray[np.float32]
# blank scans below this are not in counts: half a count means nothing then
_COUNTS = 50.0
# a pixel with less of the panel's median blank signal is dead
_DEAD = 0.05
# columns on either side that a bad column is compared with
_REACH = 4
# steady difference from the neighbours, as a share of the range of values, that makes a pixel bad
_VISIBLE = 0.02
# views from which on a pixel that never changes is told from chance
_STEADY_VIEWS = 6
# how many times smaller one direction's residual must be to decide
_DECIDED = 2.0


@dataclass(frozen=True)
class LineIntegrals:
    """Line integrals and what was done to get them.

    Parameters
    ----------
    projections : ndarray (n, v, u) of float32
        Line integrals, finite everywhere.
    n_dark : int
        Pixels with no signal, clipped.
    n_bright : int
        Pixels far above the blank scan, clipped.
    n_repaired : int
        Pixels filled from their neighbours: NaN, untrusted, dead in the blank scan, or the same in all views where
        their neighbours are not.
    warnings : tuple of str
        Sentences for the user; empty when all was well.
    """

    projections: Float32Array
    n_dark: int
    n_bright: int
    n_repaired: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class CentreEstimate:
    """Where the rotation axis is seen.

    Parameters
    ----------
    column : float
        Column (from 0, with fractions) on which the axis is seen.
    expected : float
        Column on which the geometry has it.
    residual : float
        Mean squared disagreement of rays that should agree, relative to the projections' variance.
    method : str
        ``"conjugate"`` (opposite rays) or ``"seam"`` (the first views mirrored behind the last ones).
    """

    column: float
    expected: float
    residual: float
    method: str

    @property
    def shift(self) -> float:
        """Columns by which the axis is displaced from where the geometry has it."""
        return self.column - self.expected

    def corrected(self, geometry: XrayGeometry) -> XrayGeometry:
        """Give the geometry with its panel moved so that the axis is seen on the estimated column.

        Parameters
        ----------
        geometry : XrayGeometry
            What the estimate was made with.

        Returns
        -------
        XrayGeometry
            The corrected geometry.
        """
        return geometry.with_offset(0.0, -self.shift)


@dataclass(frozen=True)
class DirectionCheck:
    """Whether the angles run the right way.

    Parameters
    ----------
    verdict : {"right", "wrong", "undecided"}
        "wrong": the data agree far better with the opposite rotation (or with mirrored columns).
    given, opposite : float
        Relative disagreement of opposite rays for the rotation as given, and reversed.
    message : str
        A sentence for the user.
    """

    verdict: str
    given: float
    opposite: float
    message: str


def _as_stack(projections: ArrayLike, name: str = "projections") -> NDArray[Any]:
    stack = np.asarray(projections)
    if stack.dtype.kind not in "iuf":
        raise TypeError(f"{name}: got values of type {stack.dtype}, need real numbers.")
    if stack.ndim != 3 or stack.size == 0:
        raise ValueError(f"{name}: got shape {stack.shape}, need (views, rows, columns).")
    return stack


def _field(field: ArrayLike | None, name: str, shape: tuple[int, ...]) -> FloatArray | None:
    if field is None:
        return None
    images = np.asarray(field, dtype=np.float64)
    if images.ndim == 3:
        images = images.mean(axis=0)
    if images.shape != shape:
        raise ValueError(f"{name}: got shape {np.shape(field)}, need {shape} or (k, *{shape}).")
    return images


def line_integrals(
    counts: ArrayLike,
    *,
    i0: ArrayLike | None = None,
    flat: ArrayLike | None = None,
    dark: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    minimum: float | None = None,
) -> LineIntegrals:
    """Turn raw counts into line integrals: dark and flat field, logarithm, clipping, repair.

    Parameters
    ----------
    counts : array_like (n, v, u)
        Raw projections.
    i0 : float or array_like (n,), optional
        Counts of the blank scan. Together with `flat`: its mean level in each view.
    flat, dark : array_like (v, u) or (k, v, u), optional
        Fields without object, and without X-rays; several are averaged.
    mask : array_like (v, u) or (n, v, u) of bool, optional
        Pixels to trust; the others are filled from their neighbours.
    minimum : float, optional
        Smallest transmission. Default: half a count, or 1e-4 when the blank scan is not in counts.

    Returns
    -------
    LineIntegrals
        ``-log(transmission)``. Values slightly below zero are kept: cutting off the noise of air would bias it.

    Raises
    ------
    ValueError
        If there is no blank scan, shapes disagree, the flat field is not above the dark field, most counts are
        above the blank scan, or none is above the dark field.

    Examples
    --------
    >>> found = line_integrals(np.full((2, 1, 3), 500), i0=1000)
    >>> round(float(found.projections[0, 0, 0]), 4)
    0.6931
    """
    stack = _as_stack(counts, "counts")
    shape = stack.shape[1:]
    white, black = _field(flat, "flat", shape), _field(dark, "dark", shape)
    black = np.zeros(shape) if black is None else black
    level = None if i0 is None else np.asarray(i0, dtype=np.float64)
    if level is not None and (
        level.shape not in ((), (len(stack),)) or not (np.isfinite(level).all() and (level > 0).all())
    ):
        raise ValueError(f"i0: need a positive number, or {len(stack)} of them, one for each view.")
    if white is None and level is None:
        raise ValueError("flat, i0: got neither, need a flat field or the counts of the blank scan.")
    blank = (white if white is not None else np.full(shape, float(np.median(level)))) - black  # type: ignore[arg-type]
    usual = float(np.nanmedian(blank))
    if not usual > 0:
        raise ValueError(
            "flat: its median is not above the dark field, need a brighter one; are they exchanged?"
        )
    dead = ~(blank > _DEAD * usual) | _stuck(stack)
    gain = np.ones(len(stack))
    if level is not None:
        base = float(blank[~dead].mean()) if white is not None else float(np.median(level))
        gain = np.broadcast_to(level / base, (len(stack),))
    trusted = (
        np.ones(stack.shape, dtype=bool) if mask is None else np.broadcast_to(np.asarray(mask), stack.shape)
    )
    if trusted.dtype != bool:
        raise ValueError(f"mask: got {trusted.dtype}, need booleans (True where a pixel is trusted).")
    if not (trusted & ~dead).any():
        raise ValueError("mask: no pixel is left to trust, need at least one.")
    is_counts = usual >= _COUNTS
    out = np.empty(stack.shape, dtype=np.float32)
    bad = np.zeros(stack.shape, dtype=bool)
    n_dark = n_bright = n_above = 0
    safe = np.where(dead, usual, blank)
    for i, image in enumerate(stack):
        expected = safe * gain[i]
        with np.errstate(invalid="ignore"):
            transmission = (image - black) / expected
        bad[i] = ~np.isfinite(transmission) | dead | ~trusted[i]
        if minimum is not None:
            lowest: Any = float(minimum)
        else:
            lowest = np.minimum(0.5 / expected, 0.5) if is_counts else 1e-4
        # six standard deviations of the counting noise above the blank scan
        highest = 1 + np.maximum(0.2, 6 / np.sqrt(expected) if is_counts else 0.2)
        good = ~bad[i]
        n_dark += int(np.count_nonzero(good & (transmission < lowest)))
        n_bright += int(np.count_nonzero(good & (transmission > highest)))
        n_above += int(np.count_nonzero(good & (transmission > 1.05)))
        out[i] = -np.log(np.clip(np.where(bad[i], 1.0, transmission), lowest, highest))
    n_good = int(np.count_nonzero(~bad))
    if n_good == 0:
        raise ValueError("counts: no pixel has a finite value, need some.")
    if n_above > 0.5 * n_good:
        raise ValueError(
            f"counts: {100 * n_above / n_good:.0f} % of them are above the blank scan, need counts below it; is i0 "
            "right, are flat and projections exchanged, or are these line integrals already?"
        )
    if n_dark == n_good:
        raise ValueError(
            "counts: no pixel has a signal above the dark field, need some; is the array the right one?"
        )
    n_repaired = int(np.count_nonzero(bad))
    if n_repaired:
        out, _ = repair_pixels(out, bad)
    return LineIntegrals(
        out, n_dark, n_bright, n_repaired, _complaints(n_dark, n_bright, n_repaired, stack.size)
    )


def _complaints(n_dark: int, n_bright: int, n_repaired: int, size: int) -> tuple[str, ...]:
    out = []
    if n_dark:
        out.append(f"{n_dark} pixels ({100 * n_dark / size:.2g} %) have no signal and were clipped.")
    if n_bright:
        out.append(
            f"{n_bright} pixels ({100 * n_bright / size:.2g} %) are far above the blank scan and were clipped: "
            "hot pixels, or a blank scan that is too weak."
        )
    if n_repaired:
        out.append(
            f"{n_repaired} pixels ({100 * n_repaired / size:.2g} %) were filled from their neighbours."
        )
    return tuple(out)


def _stuck(stack: NDArray[Any]) -> NDArray[np.bool_]:
    """Find pixels that are the same in all views, far from their neighbours, which change; (v, u)."""
    if len(stack) < _STEADY_VIEWS:
        return np.zeros(stack.shape[1:], dtype=bool)
    with np.errstate(invalid="ignore"):
        spread = np.fmax.reduce(stack, axis=0) - np.fmin.reduce(stack, axis=0)
    steady = spread == 0
    out: NDArray[np.bool_] = np.zeros_like(steady)
    if not steady.any() or steady.all():
        return out
    visible = _VISIBLE * float(np.nanpercentile(spread[~steady], 99))
    sums = np.cumsum(np.pad(spread > visible, ((0, 0), (1, 0))), axis=1)
    n_columns, column = stack.shape[2], np.arange(stack.shape[2])
    before, after = np.maximum(column - _REACH, 0), np.minimum(column + _REACH + 1, n_columns)
    between = (sums[:, column] > sums[:, before]) & (sums[:, after] > sums[:, column])
    rows, cols = np.nonzero(steady & between)
    if rows.size:
        around = np.clip(cols[:, None] + np.arange(-_REACH, _REACH + 1), 0, n_columns - 1)
        usual = np.median(stack[:, rows[:, None], around], axis=2)
        off = np.abs(np.median(stack[0, rows, cols] - usual, axis=0)) > visible
        out[rows[off], cols[off]] = True
    return out


def scan_line_integrals(scan: Scan) -> LineIntegrals:
    """Give a scan's line integrals: those it has, or those of its counts.

    Parameters
    ----------
    scan : Scan
        The scan.

    Returns
    -------
    LineIntegrals
        With untrusted and dead pixels filled from their neighbours.
    """
    if scan.is_counts:
        return line_integrals(scan.projections, i0=scan.i0, flat=scan.flat, dark=scan.dark, mask=scan.mask)
    pixels = np.array(scan.projections, dtype=np.float32)
    bad = np.broadcast_to(_stuck(pixels), pixels.shape)
    if scan.mask is not None:
        bad = bad | ~scan.mask
    n_repaired = int(np.count_nonzero(bad))
    if n_repaired:
        pixels, _ = repair_pixels(pixels, bad)
    warnings = _complaints(0, 0, n_repaired, pixels.size)
    if not pixels.max() > 0:
        warnings += ("No line integral is above zero: there is nothing to reconstruct.",)
    return LineIntegrals(pixels, 0, 0, n_repaired, warnings)


def find_bad_pixels(projections: ArrayLike, threshold: float = 8.0) -> NDArray[np.bool_]:
    """Find pixels and columns that are dead, hot or stuck in all views.

    A pixel is compared with the median of its row within 4 columns to either side. The object moves from view to
    view, so that the median over the views of this difference is near zero for a good pixel.

    Parameters
    ----------
    projections : array_like (n, v, u)
        Line integrals (or flat-field corrected counts). NaN are allowed.
    threshold : float
        How many robust standard deviations are too many.

    Returns
    -------
    ndarray (v, u) of bool
        True where a pixel is bad.

    Raises
    ------
    ValueError
        If there are fewer than three views, or `threshold` is not positive.
    """
    from scipy.ndimage import maximum_filter

    stack = _as_stack(projections)
    if len(stack) < 3:
        raise ValueError(
            f"projections: got {len(stack)} view(s), need at least 3 to tell pixels from the object."
        )
    if not threshold > 0:
        raise ValueError(f"threshold: got {threshold}, need a positive number.")
    finite = np.isfinite(stack)
    lost: NDArray[np.bool_] = finite.mean(axis=0) < 0.5
    work = np.where(finite, stack, 0).astype(np.float32)
    low, high = np.percentile(work, (1, 99))
    least = _VISIBLE * float(high - low)
    odd, stuck, size = _stands_out(work, work, threshold, least)
    # bad pixels draw their neighbours' medians aside: take the worst of each place first
    width = (1, min(2 * _REACH + 1, stack.shape[2]))
    bad = lost | (odd & (size >= 0.5 * maximum_filter(size, size=width, mode="nearest"))) | stuck
    if bad.any() and not bad.all():
        filled, _ = repair_pixels(work, bad)
        odd, stuck, _ = _stands_out(work, filled, threshold, least)
        bad = lost | odd | stuck
    return bad


def _stands_out(
    stack: Float32Array, reference: Float32Array, threshold: float, least: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Float32Array]:
    """Compare pixels in all views with the medians of the reference's rows around them.

    Returns which are steadily off, which are stuck, and by how much each is off, (v, u).
    """
    from scipy.ndimage import median_filter

    width = min(2 * _REACH + 1, stack.shape[2] - (stack.shape[2] + 1) % 2)
    around = median_filter(reference, size=(1, 1, width), mode="mirror")
    deviation = np.median(stack - around, axis=0)
    scale = 1.4826 * float(np.median(np.abs(deviation - np.median(deviation))))
    # smaller steady differences are gains that suppress_rings corrects, or the object itself
    size = np.abs(deviation)
    odd = size > max(threshold * scale, least)
    # stuck at a value that the object could have had: no change where the neighbours change
    usual = median_filter(reference.std(axis=0), size=(1, width), mode="mirror")
    stuck = (stack.std(axis=0) < 0.02 * usual) & (usual > 2 * least)
    return odd, stuck, size


def repair_pixels(
    projections: ArrayLike, bad: ArrayLike | None = None
) -> tuple[Float32Array, NDArray[np.bool_]]:
    """Fill bad pixels from the nearest good ones of their row and column.

    Parameters
    ----------
    projections : array_like (n, v, u)
        Line integrals.
    bad : array_like (v, u) or (n, v, u) of bool, optional
        What to fill. Default: what :func:`find_bad_pixels` finds. NaN and infinities are always filled.

    Returns
    -------
    ndarray (n, v, u) of float32
        The repaired projections: each bad pixel is the mean of the nearest good pixel to the left, right, above and
        below, weighted by the inverse distance.
    ndarray (n, v, u) of bool
        What was filled.

    Raises
    ------
    ValueError
        If `bad` has another shape, or a view has no good pixel.
    """
    stack = _as_stack(projections)
    out = np.array(stack, dtype=np.float32)
    wrong = find_bad_pixels(stack) if bad is None else np.asarray(bad)
    if wrong.dtype != bool or wrong.shape not in (stack.shape, stack.shape[1:]):
        raise ValueError(
            f"bad: got {wrong.dtype} of shape {wrong.shape}, need booleans of {stack.shape[1:]} or {stack.shape}."
        )
    wrong = np.broadcast_to(wrong, stack.shape) | ~np.isfinite(stack)
    for i in np.flatnonzero(wrong.any(axis=(1, 2))):
        if wrong[i].all():
            raise ValueError(f"projections: view {i} has no good pixel, leave it out.")
        out[i] = _fill(out[i], wrong[i])
    return out, wrong


def _fill(image: Float32Array, bad: NDArray[np.bool_]) -> Float32Array:
    """Interpolate the bad pixels of one image from the nearest good ones in four directions."""
    out = np.array(image)
    rows, cols = np.nonzero(bad)
    total, weights = np.zeros(len(rows)), np.zeros(len(rows))
    for axis in (0, 1):
        size = image.shape[axis]
        index = np.arange(size).reshape((-1, 1) if axis == 0 else (1, -1))
        before = np.maximum.accumulate(np.where(bad, -1, index), axis=axis)[rows, cols]
        after = np.flip(np.minimum.accumulate(np.flip(np.where(bad, size, index), axis), axis=axis), axis)[
            rows, cols
        ]
        here = (rows, cols)[axis]
        for place, known in ((before, before >= 0), (after, after < size)):
            inside = np.clip(place, 0, size - 1)
            value = image[inside, cols] if axis == 0 else image[rows, inside]
            weight = np.where(known, 1.0 / np.maximum(np.abs(here - place), 1), 0.0)
            total += np.where(known, value, 0.0) * weight
            weights += weight
    known = weights > 0
    out[rows[known], cols[known]] = (total[known] / weights[known]).astype(np.float32)
    if not known.all():
        # a pixel whose whole row and column are bad
        left = np.zeros_like(bad)
        left[rows[~known], cols[~known]] = True
        out = _fill(out, left)
    return out


def suppress_rings(projections: ArrayLike, size: int | None = None) -> Float32Array:
    """Remove the stripes in sinograms that become rings, by sorting.

    Vo, Atwood and Drakopoulos, Optics Express 26 (2018) 28396, algorithm 3: each column of a sinogram is sorted by
    value, the sorted columns are median-filtered across columns, and the sorting is undone. A column whose gain or
    offset is wrong then gets the distribution of its neighbours; smooth parts of the object stay.

    Parameters
    ----------
    projections : array_like (n, v, u)
        Line integrals.
    size : int, optional
        Width of the median filter, columns; more than twice the width of a stripe. Default: about a 32nd of the
        columns, at least 5.

    Returns
    -------
    ndarray (n, v, u) of float32
        The corrected projections.

    Raises
    ------
    ValueError
        If `size` is not a whole number from 3 to the number of columns.
    """
    from scipy.ndimage import median_filter

    stack = _as_stack(projections)
    n_columns = stack.shape[2]
    width = max(5, n_columns // 32) | 1 if size is None else size
    if int(width) != width or not 3 <= width <= n_columns:
        raise ValueError(f"size: got {width}, need a whole number from 3 to {n_columns}.")
    out = np.empty(stack.shape, dtype=np.float32)
    for row in range(stack.shape[1]):
        sinogram = np.asarray(stack[:, row], dtype=np.float32)
        order = np.argsort(sinogram, axis=0, kind="stable")
        ranked = np.take_along_axis(sinogram, order, axis=0)
        # mirrored: an edge column must not outvote its neighbours by its own copies
        smooth = median_filter(ranked, size=(1, int(width)), mode="mirror")
        np.put_along_axis(out[:, row], order, smooth, axis=0)
    return out


class _Sinogram:
    """The rows near the plane of rotation, ready to compare rays that run along the same line."""

    def __init__(self, projections: ArrayLike, geometry: XrayGeometry) -> None:
        stack = _as_stack(projections)
        if stack.shape != (geometry.n_views, *geometry.detector_shape):
            raise ValueError(
                f"projections: got shape {stack.shape}, the geometry has "
                f"{(geometry.n_views, *geometry.detector_shape)}."
            )
        if stack.shape[2] < 16:
            raise ValueError(f"projections: got {stack.shape[2]} columns, need at least 16 to compare rays.")
        axis = np.array([1.0, 0.0, 0.0])
        if geometry.kind == "cone":
            away = geometry.source - geometry.isocentre
            lift = (away @ axis) / np.maximum(np.linalg.norm(away, axis=1), 1e-300)
        else:
            lift = geometry.direction @ axis
        if np.abs(lift).max() > 0.02:
            raise ValueError(
                "geometry: the source leaves the plane of rotation (helix, laminography, or an axis that is not z), "
                "need a circular scan about z."
            )
        where = geometry.project(geometry.isocentre)[:, 0]
        self.expected = float(np.median(where[:, 1]))
        n_rows = stack.shape[1]
        if geometry.kind == "cone":
            # off the plane of rotation opposite rays do not coincide
            middle = float(np.clip(np.median(where[:, 0]), 0, n_rows - 1))
            reach = max(0.5, 0.01 * n_rows)
            first = max(0, int(np.ceil(middle - reach - 1e-6)))
            last = min(n_rows - 1, int(np.floor(middle + reach + 1e-6)))
        else:
            first, last = 0, n_rows - 1
        self.values: FloatArray = np.mean(stack[:, first : last + 1], axis=1, dtype=np.float64)
        if not np.isfinite(self.values).all():
            raise ValueError(
                "projections: NaN or infinite values, need finite ones; repair_pixels fills them."
            )
        if not np.ptp(self.values) > 0:
            raise ValueError("projections: all values are the same, need an object.")
        self.parallel = geometry.kind == "parallel"
        far = geometry.source_detector
        self.slope = 0.0 if self.parallel else float(np.median(geometry.pixel_size[1] / far))
        angles = geometry.angles
        along = np.stack([np.zeros_like(angles), np.cos(angles), -np.sin(angles)], axis=1)
        # fan angles grow with the column, or fall when columns run the other way
        self.sense = float(np.sign(np.sum(geometry.u * along)) or 1.0)
        self.angles = angles
        self.n_columns = stack.shape[2]
        self._smooth: tuple[float, FloatArray] = (0.0, self.values)

    def blurred(self, sigma: float) -> FloatArray:
        """Blur the values across columns; the last answer is kept for the next call."""
        from scipy.ndimage import gaussian_filter1d

        if sigma <= 0:
            return self.values
        if self._smooth[0] != sigma:
            self._smooth = sigma, gaussian_filter1d(self.values, sigma, axis=1)
        return self._smooth[1]

    def _mirrored(self, column: float, stride: int) -> tuple[FloatArray, FloatArray]:
        """Columns, and the places of their mirror images about `column`, where both are on the panel."""
        columns = np.arange(0.0, self.n_columns, stride)
        mirror = 2 * column - columns
        inside = (mirror >= 0) & (mirror <= self.n_columns - 1)
        return columns[inside], mirror[inside]

    def conjugate(self, column: float, sense: float, sigma: float, stride: int = 1) -> tuple[float, float]:
        """Compare each ray with the one that runs along the same line the other way.

        The ray of angle a and fan angle g is also the ray of angle a + pi - 2 g and fan angle -g.

        Returns the relative mean squared difference and the share of rays that have a partner.
        """
        from scipy.ndimage import map_coordinates

        values = self.blurred(sigma)
        turned = np.mod(self.angles, 2 * np.pi)
        order = np.argsort(turned, kind="stable")
        angles, values = turned[order], values[order]
        # a whole turn wraps; where views are missing the gap shows
        pad = min(6, len(angles))
        longer = np.concatenate([angles[-pad:] - 2 * np.pi, angles, angles[:pad] + 2 * np.pi])
        rows = np.concatenate([values[-pad:], values, values[:pad]])
        gaps = np.diff(longer)
        columns, mirror = self._mirrored(column, stride)
        fan = np.arctan((columns - column) * self.slope)
        wanted = np.mod(angles[:, None] + np.pi - 2 * sense * fan, 2 * np.pi)
        place = np.interp(wanted, longer, np.arange(len(longer)))
        left = np.clip(np.searchsorted(longer, wanted, side="right") - 1, 0, len(gaps) - 1)
        usual = float(np.median(gaps[gaps > 1e-9])) if (gaps > 1e-9).any() else 0.0
        near = np.minimum(wanted - longer[left], longer[left + 1] - wanted)
        valid = (gaps[left] <= 1.5 * usual) | (near <= 0.1 * usual)
        share = float(valid.mean()) if valid.size else 0.0
        if share == 0.0:
            return np.inf, 0.0
        there = map_coordinates(
            rows, np.stack([place, np.broadcast_to(mirror, place.shape)]), order=3, mode="nearest"
        )
        here = values[:, columns.astype(np.intp)]
        return _relative(there[valid], here[valid]), share

    def seam(self, column: float, sigma: float, stride: int = 1) -> float:
        """Compare views at the ends of a half turn with what their neighbours across the seam predict.

        In a parallel beam the first views, mirrored about the axis, continue the scan behind the last ones.
        """
        from scipy.ndimage import map_coordinates

        values = self.blurred(sigma)
        order = np.argsort(self.angles, kind="stable")
        angles, values = self.angles[order], values[order]
        count = min(3, len(angles) // 2)
        columns, mirror = self._mirrored(column, stride)
        first = np.stack(
            [map_coordinates(view, mirror[np.newaxis], order=3, mode="nearest") for view in values[:count]]
        )
        joined = np.concatenate([values[-count:][:, columns.astype(np.intp)], first])
        where = np.concatenate([angles[-count:], angles[:count] + np.pi])
        usual = float(np.median(np.diff(angles)))
        if where[count] - where[count - 1] < 0.25 * usual:
            # the last view is the first one again, from behind
            return _relative(joined[count - 1], joined[count])
        found = []
        for k in range(1, len(where) - 1):
            near = [j for j in range(max(0, k - 2), min(len(where), k + 3)) if j != k]
            if min(near) >= count or max(near) < count:
                continue
            weights = [
                np.prod([(where[k] - where[m]) / (where[j] - where[m]) for m in near if m != j]) for j in near
            ]
            found.append(_relative(np.tensordot(weights, joined[near], axes=1), joined[k]))
        return float(np.mean(found))

    def seam_gap(self) -> float:
        """Angle between the last view and the first one seen from behind, in usual steps."""
        angles = np.sort(self.angles)
        return float((angles[0] + np.pi - angles[-1]) / max(float(np.median(np.diff(angles))), 1e-12))


def _relative(there: FloatArray, here: FloatArray) -> float:
    spread = float(here.var())
    return float(np.mean((there - here) ** 2)) / spread if spread > 0 else np.inf


def _search(cost: Any, n_columns: int, limits: tuple[float, float]) -> tuple[float, float]:
    """Find the column of least cost: a coarse sweep on a blurred sinogram, then a bracketed search."""
    from scipy.optimize import minimize_scalar

    stride = max(1, n_columns // 128)
    step = max(1.0, stride)
    tries = np.arange(limits[0], limits[1] + 0.5 * step, step)
    coarse = [cost(column, 1.5 * step, stride) for column in tries]
    best = tries[int(np.argmin(coarse))]
    found = minimize_scalar(
        lambda column: cost(float(column), 1.0, 1),
        bounds=(best - 1.5 * step, best + 1.5 * step),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return float(found.x), float(found.fun)


def _limits(search: tuple[float, float] | None, n_columns: int) -> tuple[float, float]:
    if search is None:
        return 0.25 * (n_columns - 1), 0.75 * (n_columns - 1)
    low, high = (float(value) for value in search)
    if not (0 <= low < high <= n_columns - 1):
        raise ValueError(f"search: got {search}, need two rising columns from 0 to {n_columns - 1}.")
    return low, high


def find_rotation_centre(
    projections: ArrayLike, geometry: XrayGeometry, search: tuple[float, float] | None = None
) -> CentreEstimate:
    """Find the column on which the rotation axis is seen.

    Rays that run along the same line in opposite directions must have the same line integral (cone beam: in the
    plane of rotation). A half turn of a parallel beam has no such pairs; there the first views, mirrored about
    the axis, must continue the scan behind the last ones.

    Parameters
    ----------
    projections : array_like (n, v, u)
        Line integrals.
    geometry : XrayGeometry
        A circular scan about z, of one turn (cone), or of half a turn or more (parallel).
    search : (float, float), optional
        First and last column to try. Default: the middle half of the panel.

    Returns
    -------
    CentreEstimate
        The column, and how well the rays agree.

    Raises
    ------
    ValueError
        If the scan is not circular, or covers too little of a turn to have opposite rays.
    """
    sinogram = _Sinogram(projections, geometry)
    limits = _limits(search, sinogram.n_columns)
    share = sinogram.conjugate(0.5 * sum(limits), sinogram.sense, 0.0)[1]
    if share >= 0.05:
        column, residual = _search(
            lambda c, sigma, stride: sinogram.conjugate(c, sinogram.sense, sigma, stride)[0],
            sinogram.n_columns,
            limits,
        )
        return CentreEstimate(column, sinogram.expected, residual, "conjugate")
    if not sinogram.parallel or len(sinogram.angles) < 4 or abs(sinogram.seam_gap()) > 3:
        raise ValueError(
            "geometry: the angles cover too little of a turn for opposite rays, need a whole turn (cone beam) or at "
            "least half a turn (parallel beam)."
        )
    column, residual = _search(sinogram.seam, sinogram.n_columns, limits)
    return CentreEstimate(column, sinogram.expected, residual, "seam")


def check_direction(projections: ArrayLike, geometry: XrayGeometry) -> DirectionCheck:
    """Find out whether the angles run the right way.

    With the wrong sense of rotation (or mirrored columns), rays that the geometry takes for opposite ones are not:
    their line integrals disagree. Both senses are tried, each with the centre of rotation that suits it best. A
    parallel beam cannot tell: reversed, it is exactly the scan of the mirror image.

    Parameters
    ----------
    projections : array_like (n, v, u)
        Line integrals.
    geometry : XrayGeometry
        A circular scan about z.

    Returns
    -------
    DirectionCheck
        The verdict and a sentence for the user.

    Raises
    ------
    ValueError
        If the scan is not circular about z.
    """
    sinogram = _Sinogram(projections, geometry)
    limits = _limits(None, sinogram.n_columns)
    if sinogram.parallel:
        return DirectionCheck(
            "undecided",
            float("nan"),
            float("nan"),
            "A parallel beam cannot tell the direction of rotation: reversed, the volume is the mirror image.",
        )
    scores = []
    for sense in (sinogram.sense, -sinogram.sense):
        if sinogram.conjugate(0.5 * sum(limits), sense, 0.0)[1] < 0.05:
            return DirectionCheck(
                "undecided",
                float("nan"),
                float("nan"),
                "The angles cover too little of a turn to check the direction of rotation.",
            )

        def cost(column: float, sigma: float, stride: int, sense: float = sense) -> float:
            return sinogram.conjugate(column, sense, sigma, stride)[0]

        scores.append(_search(cost, sinogram.n_columns, limits)[1])
    given, opposite = scores
    numbers = f"(opposite rays differ by {given:.2g} of the variance as given, {opposite:.2g} reversed)"
    if opposite * _DECIDED < given:
        return DirectionCheck(
            "wrong",
            given,
            opposite,
            f"The object seems to turn the other way {numbers}: reverse the angles (rotation='cw' instead of 'ccw', "
            "or the other way round), or mirror the columns.",
        )
    if given * _DECIDED < opposite:
        return DirectionCheck("right", given, opposite, f"The direction of rotation fits the data {numbers}.")
    return DirectionCheck(
        "undecided", given, opposite, f"The data do not tell the direction of rotation {numbers}."
    )
