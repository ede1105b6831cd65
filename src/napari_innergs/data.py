"""Pixels together with their geometry, validated once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from napari_innergs.geometry.frames import check_affine, check_units, normalise_unit, unit_scale
from napari_innergs.geometry.grid import Grid
from napari_innergs.geometry.slices import SliceGeometry

__all__ = ["SliceStack", "restore_dtype"]

FloatArray = NDArray[np.float64]
PROFILES = ("gaussian", "box")
# squares of larger values overflow in float32
_LARGEST = 1e18
# volumes are float32: the range of the pixels must be at least so many of its steps
_STEPS = 256


class SliceStack:
    """Parallel slices with their place in the world.

    Parameters
    ----------
    data : array_like (n, h, w) or (n, h, w, c)
        Pixels of any real type, or a sequence of n images. A fourth axis is channels.
    affine : array_like (4, 4), optional
        Index (i, row, col) to world (z, y, x); default: the identity. The slice normal is the cross product
        of the in-plane columns; column 0 may be tilted against it (gantry tilt).
    positions : array_like (n,), optional
        Position of each slice along column 0's direction, world units, from the affine's origin; replaces the
        regular step of column 0. Slices are sorted by it.
    thickness : float
        Full width (box) or FWHM (gaussian) of the slice profile, world units; 0 is an ideal thin slice.
    profile : {"gaussian", "box"}
        Shape of the slice profile.
    mask : array_like (n, h, w) of bool, optional
        Pixels to trust, in the order of `data`. Default: all, or what a masked array does not mask.
    units : str or sequence of 3 str, optional
        Units of the world axes.
    channel_names : sequence of str, optional
        One for each channel.
    name : str
        A name for reports and layers.

    Attributes
    ----------
    data : ndarray (n, h, w, c)
        Read-only view in the original type, sorted by position.
    order : ndarray (n,) of int
        ``data[i]`` is slice ``order[i]`` of the input.
    positions : ndarray (n,)
        Strictly increasing.
    affine, frame_affine : ndarray (4, 4)
        The affine as given; and the map (t, row, col) to world, with t in world units along column 0.

    Raises
    ------
    TypeError
        If the pixels are boolean, complex or objects.
    ValueError
        If anything else is wrong; the sentence names the argument, what came and what is needed.

    Examples
    --------
    >>> stack = SliceStack(np.zeros((3, 8, 8), np.uint8), np.diag([4.0, 1.0, 1.0, 1.0]), units="mm")
    >>> stack.spacing, stack.default_grid().shape
    (4.0, (9, 8, 8))
    """

    data: NDArray[Any]
    geometry: SliceGeometry
    order: NDArray[np.intp]
    mask: NDArray[np.bool_] | None
    thickness: float
    profile: str
    units: tuple[str, str, str] | None
    channel_names: tuple[str, ...] | None
    name: str
    had_channel_axis: bool
    intensity_range: tuple[float, float]

    def __init__(
        self,
        data: ArrayLike,
        affine: ArrayLike | None = None,
        positions: ArrayLike | None = None,
        thickness: float = 0.0,
        profile: str = "gaussian",
        mask: ArrayLike | None = None,
        *,
        units: Any = None,
        channel_names: Sequence[str] | None = None,
        name: str = "",
    ) -> None:
        if isinstance(data, np.ma.MaskedArray) and mask is None:
            hidden = np.ma.getmaskarray(data)
            mask = ~(hidden.any(axis=3) if hidden.ndim == 4 else hidden)
        pixels = _as_pixels(data)
        had_channel_axis = pixels.ndim == 4
        if not had_channel_axis:
            pixels = pixels[..., np.newaxis]
        trusted = _as_mask(mask, pixels.shape[:3])
        geometry = SliceGeometry(check_affine(affine), pixels.shape[0], positions)
        extent = float(geometry.gaps.sum())
        width = _as_number(thickness, "thickness")
        if width < 0:
            raise ValueError(f"thickness: got {width:g}, need 0 (thin slices) or more.")
        if width > extent + geometry.spacing:
            raise ValueError(
                f"thickness: got {width:g}, larger than the whole stack ({extent + geometry.spacing:g}); "
                "need the width of one slice in world units."
            )
        if profile not in PROFILES:
            raise ValueError(f"profile: got {profile!r}, need 'gaussian' or 'box'.")
        names = None if channel_names is None else tuple(str(label) for label in channel_names)
        if names is not None and len(names) != pixels.shape[3]:
            raise ValueError(
                f"channel_names: got {len(names)} names, need {pixels.shape[3]}, one for each channel."
            )
        limits = _check_values(pixels, trusted)
        if not np.array_equal(geometry.order, np.arange(len(geometry.order))):
            pixels = pixels[geometry.order]
            trusted = None if trusted is None else trusted[geometry.order]
        self._fill(
            data=_read_only(pixels),
            geometry=geometry,
            order=geometry.order,
            mask=None if trusted is None else _read_only(trusted),
            thickness=width,
            profile=profile,
            units=check_units(units),
            channel_names=names,
            name=str(name),
            had_channel_axis=had_channel_axis,
            intensity_range=limits,
        )

    def _fill(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"SliceStack is immutable: {name} can not be set; make a new SliceStack.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"SliceStack is immutable: {name} can not be deleted.")

    def __len__(self) -> int:
        return self.n_slices

    def __repr__(self) -> str:
        unit = "" if self.units is None else f" {'/'.join(dict.fromkeys(self.units))}"
        row, col = self.pixel_size
        return (
            f"SliceStack({self.name + ': ' if self.name else ''}{self.n_slices} slices of {self.height} x "
            f"{self.width}, {self.n_channels} channel(s), {self.dtype}, gap {self.spacing:.6g}, "
            f"pixel {row:.6g} x {col:.6g}{unit})"
        )

    @property
    def n_slices(self) -> int:
        """Number of slices."""
        return int(self.data.shape[0])

    @property
    def height(self) -> int:
        """Rows."""
        return int(self.data.shape[1])

    @property
    def width(self) -> int:
        """Columns."""
        return int(self.data.shape[2])

    @property
    def n_channels(self) -> int:
        """Channels; 1 for data without a channel axis."""
        return int(self.data.shape[3])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels as given."""
        return self.data.dtype

    @property
    def affine(self) -> FloatArray:
        """The affine as given: index of the input to world (when no positions were given)."""
        return self.geometry.affine

    @property
    def frame_affine(self) -> FloatArray:
        """(t, row, col) to world (z, y, x), (4, 4); t in world units along column 0's direction."""
        return self.geometry.frame_affine

    @property
    def positions(self) -> FloatArray:
        """Values of t of the slices, (n,), strictly increasing."""
        return self.geometry.positions

    @property
    def normal(self) -> FloatArray:
        """Unit normal of the slices, world (z, y, x), on the side to which positions increase."""
        return self.geometry.normal

    @property
    def pixel_size(self) -> FloatArray:
        """Distances between pixel centres along rows and columns, (2,), world units."""
        return self.geometry.pixel_size

    @property
    def spacing(self) -> float:
        """Median gap between slices along the normal, world units."""
        return self.geometry.spacing

    def corners(self) -> FloatArray:
        """World positions of the eight outermost pixel centres, (8, 3)."""
        ends = (self.positions[[0, -1]], (0, self.height - 1), (0, self.width - 1))
        return self.geometry.to_world([[t, r, c] for t in ends[0] for r in ends[1] for c in ends[2]])

    def values(self) -> NDArray[np.float32]:
        """Pixels as float32, finite everywhere.

        Returns
        -------
        ndarray (n, h, w, c) of float32
            Pixels that are masked out are interpolated between the nearest slices that can be trusted there;
            where no slice can, they take the value of the nearest known pixel of their slice. May be read-only.
        """
        if self.mask is None or self.mask.all():
            return np.ascontiguousarray(self.data, dtype=np.float32)
        from scipy.ndimage import distance_transform_edt

        out = np.where(self.mask[..., None], self.data, 0).astype(np.float32)
        number = np.arange(self.n_slices).reshape(-1, 1, 1)
        below = np.maximum.accumulate(np.where(self.mask, number, -1), axis=0)
        above = np.minimum.accumulate(np.where(self.mask, number, self.n_slices)[::-1], axis=0)[::-1]
        for i in np.flatnonzero(~self.mask.all(axis=(1, 2))):
            low, high = below[i], above[i]
            known = (low >= 0) | (high < self.n_slices)
            first, last = (
                np.where(low < 0, high, low)[known],
                np.where(high >= self.n_slices, low, high)[known],
            )
            gap = self.positions[last] - self.positions[first]
            share = np.where(
                gap > 0, (self.positions[i] - self.positions[first]) / np.where(gap > 0, gap, 1), 0
            )
            rows, cols = np.nonzero(known)
            ends = (self.data[at, rows, cols].astype(np.float32) for at in (first, last))
            lower, upper = ends
            filled = lower + share[:, None].astype(np.float32) * (upper - lower)
            here = self.mask[i][known]
            out[i][known] = np.where(here[:, None], out[i][known], filled)
            if not known.all():
                place = distance_transform_edt(
                    ~known, sampling=tuple(self.pixel_size), return_distances=False, return_indices=True
                )
                out[i] = out[i][tuple(place)]
        return out

    def _replace(self, indices: Any, rows: slice, cols: slice) -> SliceStack:
        """Make the stack of some slices and a window, with the same t axis."""
        starts = []
        for label, cut, size in (("rows", rows, self.height), ("cols", cols, self.width)):
            start, stop, step = cut.indices(size)
            if step != 1 or stop <= start:
                raise ValueError(
                    f"{label}: got {cut}, need a range with step 1 that keeps at least one of {size} pixels."
                )
            starts.append(float(start))
        shift = np.array(self.affine)
        shift[:3, 3] += self.affine[:3, 1] * starts[0] + self.affine[:3, 2] * starts[1]
        data = self.data[indices][:, rows, cols]
        geometry = SliceGeometry(shift, data.shape[0], self.positions[indices])
        out = object.__new__(SliceStack)
        mask = None if self.mask is None else _read_only(self.mask[indices][:, rows, cols][geometry.order])
        if mask is not None and not mask.any():
            raise ValueError("mask: no pixel of the selection is trusted, need at least one.")
        data = _read_only(data[geometry.order])
        out._fill(
            **{
                **self.__dict__,
                "data": data,
                "geometry": geometry,
                "order": _read_only(self.order[indices]),
                "mask": mask,
                "intensity_range": _check_values(data, mask),
            }
        )
        return out

    def subset(self, indices: Any) -> SliceStack:
        """Keep some slices; t of a slice stays what it is.

        Parameters
        ----------
        indices : sequence of int, slice, or bool array (n,)
            Which (sorted) slices to keep; at least two.

        Returns
        -------
        SliceStack
            Their stack, in the same frame: ``positions`` and ``frame_affine`` agree with this stack's.

        Raises
        ------
        ValueError
            If fewer than two are kept, one is asked for twice, or one does not exist.

        Examples
        --------
        >>> SliceStack(np.zeros((4, 2, 2))).subset([0, 3]).positions.tolist()
        [0.0, 3.0]
        """
        if isinstance(indices, slice):
            chosen = np.arange(self.n_slices)[indices]
        else:
            chosen = np.asarray(indices)
            if chosen.dtype == bool:
                if chosen.shape != (self.n_slices,):
                    raise ValueError(f"indices: got a mask of shape {chosen.shape}, need ({self.n_slices},).")
                chosen = np.flatnonzero(chosen)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            raise ValueError("indices: need a list of integers, a slice or a mask.")
        bad = [int(i) for i in chosen if not -self.n_slices <= i < self.n_slices]
        if bad:
            raise ValueError(f"indices: got {bad[0]}, need numbers below {self.n_slices}.")
        chosen = np.sort(chosen.astype(np.intp) % self.n_slices)
        if len(chosen) < 2:
            raise ValueError(f"indices: {len(chosen)} slice(s) would be left, need at least 2.")
        if (np.diff(chosen) == 0).any():
            raise ValueError("indices: got the same slice twice, need each at most once.")
        return self._replace(chosen, slice(None), slice(None))

    def keep_every(self, k: int, start: int = 0) -> SliceStack:
        """Keep every k-th slice, to try out what would be lost.

        Parameters
        ----------
        k : int
            Step, at least 1.
        start : int
            First slice that is kept.

        Returns
        -------
        SliceStack
            The sparser stack, in the same frame.

        Raises
        ------
        ValueError
            If fewer than two slices are left.

        Examples
        --------
        >>> SliceStack(np.zeros((5, 2, 2))).keep_every(2).positions.tolist()
        [0.0, 2.0, 4.0]
        """
        if int(k) != k or k < 1:
            raise ValueError(f"keep_every: got {k}, need an integer of at least 1.")
        if int(start) != start or not 0 <= start < self.n_slices:
            raise ValueError(f"start: got {start}, need an integer from 0 to {self.n_slices - 1}.")
        chosen = range(int(start), self.n_slices, int(k))
        if len(chosen) < 2:
            raise ValueError(
                f"keep_every: got {k} with {self.n_slices} slices, which leaves {len(chosen)}, "
                "need at least 2."
            )
        return self._replace(np.array(chosen), slice(None), slice(None))

    def crop(
        self, rows: slice = slice(None), cols: slice = slice(None), slices: slice = slice(None)
    ) -> SliceStack:
        """Cut out a region; what is left stays where it is in the world.

        Parameters
        ----------
        rows, cols : slice
            Windows in pixels, step 1.
        slices : slice
            Which (sorted) slices.

        Returns
        -------
        SliceStack
            The region.

        Raises
        ------
        ValueError
            If nothing or fewer than two slices are left.
        """
        chosen = np.arange(self.n_slices)[slices]
        if len(chosen) < 2:
            raise ValueError(f"slices: got {slices}, which leaves {len(chosen)} slice(s), need at least 2.")
        return self._replace(np.sort(chosen), rows, cols)

    def default_grid(self) -> Grid:
        """Give the grid along the slices with nearly cubic voxels.

        Returns
        -------
        Grid
            In-plane pixels exactly as they are; from the first to the last slice in steps of about a pixel,
            on which regular slices fall wherever the gap is a whole number of pixels (to 1 %).
        """
        return self.geometry.default_grid(self.height, self.width, self.units)

    def restore(
        self, volume: ArrayLike, dtype: DTypeLike | None = None, *, clip: str = "dtype"
    ) -> NDArray[Any]:
        """Bring a computed volume back to the type of the pixels.

        Parameters
        ----------
        volume : array_like (z, y, x) or (z, y, x, c)
            Floating-point values in the units of the input. A channel axis that the input did not have is
            dropped.
        dtype : dtype, optional
            Default: the type of the input. Integers are rounded and clipped to what the type can hold.
        clip : {"dtype", "data"}
            ``"data"`` also clips to the range of the input.

        Returns
        -------
        ndarray
            The volume; integers never wrap round.

        Raises
        ------
        ValueError
            If the volume holds NaN and the type is an integer.

        Examples
        --------
        >>> stack = SliceStack(np.zeros((2, 1, 2), np.uint8))
        >>> stack.restore([[[-3.2, 254.6]], [[300.0, 1.5]]]).tolist()
        [[[0, 255]], [[255, 2]]]
        """
        if clip not in ("dtype", "data"):
            raise ValueError(f"clip: got {clip!r}, need 'dtype' or 'data'.")
        array = np.asarray(volume)
        if not self.had_channel_axis and array.ndim == 4 and array.shape[3] == 1:
            array = array[..., 0]
        return restore_dtype(
            array, self.dtype if dtype is None else dtype, self.intensity_range if clip == "data" else None
        )

    @classmethod
    def from_channels(
        cls, stacks: Sequence[SliceStack], channel_names: Sequence[str] | None = None, name: str = ""
    ) -> SliceStack:
        """Join stacks of the same slices as channels of one.

        Parameters
        ----------
        stacks : sequence of SliceStack
            All with the same shape, geometry, type and units.
        channel_names : sequence of str, optional
            Default: the names of the stacks.
        name : str
            Name of the new stack.

        Returns
        -------
        SliceStack
            With all channels; a pixel is trusted where all channels are.

        Raises
        ------
        ValueError
            If they disagree; the sentence says in what.
        """
        if not stacks:
            raise ValueError("stacks: got an empty list, need at least one.")
        first = stacks[0]
        for number, other in enumerate(stacks[1:], start=1):
            for what, a, b in (
                ("shape", first.data.shape[:3], other.data.shape[:3]),
                ("type", first.dtype, other.dtype),
                ("units", first.units, other.units),
                ("thickness and profile", (first.thickness, first.profile), (other.thickness, other.profile)),
            ):
                if a != b:
                    raise ValueError(
                        f"stacks: channel {number} has {what} {b}, channel 0 has {a}; need the same."
                    )
            size = float(first.pixel_size.min())
            if np.abs(first.corners() - other.corners()).max() > 1e-3 * size or (
                np.abs(first.positions - other.positions).max() > 1e-3 * size
            ):
                raise ValueError(
                    f"stacks: channel {number} lies elsewhere in the world than channel 0; need one place."
                )
        mask = None
        for stack in stacks:
            if stack.mask is not None:
                mask = stack.mask if mask is None else mask & stack.mask
        labels: list[str] = []
        for stack in stacks:
            labels += stack.channel_names or [stack.name] * stack.n_channels
        if channel_names is None and any(labels):
            channel_names = labels
        return cls(
            np.concatenate([stack.data for stack in stacks], axis=3),
            first.affine,
            first.positions,
            first.thickness,
            first.profile,
            mask,
            units=first.units,
            channel_names=channel_names,
            name=name or first.name,
        )

    @classmethod
    def from_layer(
        cls,
        layer: Any,
        axis: int = 0,
        keep_every: int = 1,
        channel_axis: int | None = None,
        time_index: int | None = None,
        *,
        time_axis: int | None = None,
        start: int = 0,
        positions: ArrayLike | None = None,
        thickness: float | None = None,
        profile: str | None = None,
        mask: ArrayLike | None = None,
    ) -> SliceStack:
        """Take the slices from a napari Image layer, with its full world transform.

        Parameters
        ----------
        layer : napari.layers.Image
            A layer with three spatial axes, and possibly a channel and a time axis. The finest level of a
            multiscale layer is used; dask arrays are computed.
        axis : int
            Which of the three spatial axes counts the slices.
        keep_every : int
            Keep every k-th slice, from `start`.
        channel_axis : int, optional
            Data axis of the channels. RGB layers need none.
        time_index : int, optional
            Which time point of a layer with a time axis.
        time_axis : int, optional
            Data axis of time. Default: the first axis that is not the channels'.
        start : int
            First slice that is kept.
        thickness, profile : optional
            As for :class:`SliceStack`. Default: what ``layer.metadata["napari-innergs"]`` says, else thin slices.
        positions, mask
            As for :class:`SliceStack`; for all slices, before `keep_every`.

        Returns
        -------
        SliceStack
            The slices.

        Raises
        ------
        TypeError
            For a Labels layer, or something that is not an image layer.
        ValueError
            If the axes do not fit the data.
        """
        _check_layer(layer)
        data = layer.data[0] if getattr(layer, "multiscale", False) else layer.data
        rgb = bool(getattr(layer, "rgb", False))
        ndim = int(layer.ndim)
        label = str(getattr(layer, "name", ""))
        if channel_axis is not None:
            if rgb:
                raise ValueError("channel_axis: the layer is RGB, its colours are the channels; need None.")
            channel_axis = _as_axis(channel_axis, ndim, "channel_axis")
        needed = 3 + (channel_axis is not None)
        if ndim < needed:
            raise ValueError(
                f"layer: {label!r} has {ndim} dimensions, need {needed}: slices, rows and columns"
                + ("." if channel_axis is None else " beside the channels.")
            )
        if ndim > needed + 1:
            raise ValueError(
                f"layer: {label!r} has {ndim} dimensions, need three spatial ones and at most channels "
                "(channel_axis) and time (time_index)."
            )
        if ndim == needed + 1:
            others = [d for d in range(ndim) if d != channel_axis]
            time_axis = others[0] if time_axis is None else _as_axis(time_axis, ndim, "time_axis")
            if time_axis == channel_axis:
                raise ValueError(f"time_axis: got {time_axis}, which is the channel axis; need another one.")
            if time_index is None:
                raise ValueError(
                    f"time_index: layer {label!r} has {ndim} dimensions; name a time point by time_index "
                    "or the channels by channel_axis."
                )
            if int(time_index) != time_index or not 0 <= time_index < data.shape[time_axis]:
                raise ValueError(
                    f"time_index: got {time_index}, need an integer from 0 to {data.shape[time_axis] - 1}."
                )
        elif time_index is not None or time_axis is not None:
            raise ValueError(f"time_index: layer {label!r} has no time axis; need None.")
        spatial = [d for d in range(ndim) if d not in (channel_axis, time_axis)]
        axis = _as_axis(axis, 3, "axis")
        pick: list[Any] = [slice(None)] * np.ndim(data)
        base = np.zeros(ndim)
        if time_axis is not None:
            assert time_index is not None
            pick[time_axis] = int(time_index)
            base[time_axis] = float(time_index)
        pixels = np.asarray(data[tuple(pick)])
        # axes of the data that are left, then slices first and channels last
        left = [d for d in range(ndim) if d != time_axis] + ([ndim] if rgb else [])
        front = [spatial[axis]] + [d for d in spatial if d != spatial[axis]]
        last = [channel_axis] if channel_axis is not None else ([ndim] if rgb else [])
        pixels = pixels.transpose([left.index(d) for d in front + last])
        origin = np.asarray(layer.data_to_world(base), dtype=np.float64)
        affine = np.eye(4)
        for column, d in enumerate(front):
            unit = base.copy()
            unit[d] += 1.0
            affine[:3, column] = (np.asarray(layer.data_to_world(unit), dtype=np.float64) - origin)[spatial]
        affine[:3, 3] = origin[spatial]
        affine, units = _one_unit(affine, getattr(layer, "units", None), spatial)
        noted = getattr(layer, "metadata", {}).get("napari-innergs", {})
        noted = noted if isinstance(noted, dict) else {}
        width = noted.get("thickness", 0.0) if thickness is None else thickness
        shape = noted.get("profile", "gaussian") if profile is None else profile
        stack = cls(pixels, affine, positions, width, shape, mask, units=units, name=label)
        return stack if keep_every == 1 and start == 0 else stack.keep_every(keep_every, start)


def restore_dtype(
    volume: NDArray[Any], dtype: DTypeLike, limits: tuple[float, float] | None = None
) -> NDArray[Any]:
    """Cast floating-point values to a type, rounding and clipping instead of wrapping round.

    Parameters
    ----------
    volume : ndarray
        Values.
    dtype : dtype
        A real type.
    limits : (float, float), optional
        Clip to this range as well.

    Returns
    -------
    ndarray
        A new array.

    Raises
    ------
    ValueError
        If there are NaN and the type is an integer.
    TypeError
        If the type is not real.

    Examples
    --------
    >>> restore_dtype(np.array([1e9, -1.0]), "int16").tolist()
    [32767, -1]
    """
    target = np.dtype(dtype)
    if target.kind not in "iuf":
        raise TypeError(f"dtype: got {target}, need an integer or floating-point type.")
    out = np.empty(volume.shape, target)
    if target.kind == "f":
        low, high = float(np.finfo(target).min), float(np.finfo(target).max)
    else:
        low, high = float(np.iinfo(target).min), float(np.iinfo(target).max)
    if limits is not None:
        low, high = max(low, limits[0]), min(high, limits[1])
    # by planes: a float64 copy of the whole volume may not fit
    for number in range(len(volume) if volume.ndim else 1):
        part: Any = slice(number, number + 1) if volume.ndim else ...
        block, place = np.asarray(volume[part], dtype=np.float64), out[part]
        if target.kind == "f":
            # NaN and infinities stay: floating-point types can hold them
            keep = ~np.isfinite(block) if limits is None else np.isnan(block)
            place[...] = np.where(keep, block, np.clip(block, low, high))
            continue
        if np.isnan(block).any():
            raise ValueError(f"volume: got NaN, which {target} can not hold; need finite numbers.")
        block = np.rint(np.clip(block, low, high))
        # 2^63 - 1 is not a float64: what rounds up to 2^63 would wrap
        top = block >= float(np.iinfo(target).max)
        place[...] = np.where(top, 0.0, block).astype(target)
        place[top] = np.iinfo(target).max
    return out


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    view = array.view()
    view.flags.writeable = False
    return view


def _as_number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: got {value!r}, need a number.") from error
    if not np.isfinite(number):
        raise ValueError(f"{name}: got {number}, need a finite number.")
    return number


def _as_axis(value: int, ndim: int, name: str) -> int:
    if int(value) != value or not -ndim <= value < ndim:
        raise ValueError(f"{name}: got {value}, need an integer from 0 to {ndim - 1}.")
    return int(value) % ndim


def _as_pixels(data: Any) -> NDArray[Any]:
    if isinstance(data, (list, tuple)):
        images = [np.asarray(image) for image in data]
        for i, image in enumerate(images):
            if image.shape != images[0].shape:
                raise ValueError(
                    f"data: slice {i} has shape {image.shape}, slice 0 has {images[0].shape}; "
                    "need the same size and channels in all slices."
                )
        pixels = np.stack(images) if images else np.empty((0, 0, 0))
    else:
        pixels = np.asarray(data)
    if pixels.dtype == bool:
        raise TypeError(
            "data: got boolean pixels, need numbers; use data.astype('uint8') for grey values, "
            "or with the method nearest alone for a segmentation."
        )
    if pixels.dtype.kind == "c":
        raise TypeError(f"data: got {pixels.dtype}, need real numbers; use abs(data), or two channels.")
    if pixels.dtype.kind not in "iuf":
        raise TypeError(f"data: got pixels of type {pixels.dtype}, need integers or floating-point numbers.")
    if pixels.ndim not in (3, 4):
        raise ValueError(f"data: got shape {pixels.shape}, need (n, h, w) or (n, h, w, c).")
    if pixels.size == 0:
        raise ValueError(f"data: got an empty array of shape {pixels.shape}, need at least one pixel.")
    return pixels


def _as_mask(mask: Any, shape: tuple[int, ...]) -> NDArray[np.bool_] | None:
    if mask is None:
        return None
    trusted = np.asarray(mask)
    if trusted.shape != shape:
        raise ValueError(f"mask: got shape {trusted.shape}, need {shape}, one value for each pixel.")
    if trusted.dtype != bool:
        if trusted.dtype.kind not in "iu" or not np.isin(trusted, (0, 1)).all():
            raise ValueError(
                f"mask: got {trusted.dtype} values, need booleans (True where a pixel is trusted)."
            )
        trusted = trusted.astype(bool)
    if not trusted.any():
        raise ValueError("mask: no pixel is trusted, need at least one.")
    return trusted


def _check_values(pixels: NDArray[Any], mask: NDArray[np.bool_] | None) -> tuple[float, float]:
    """Count what is not finite, and find the range of the trusted pixels, slice by slice."""
    count = 0
    first: tuple[int, ...] = ()
    low, high = np.inf, -np.inf
    for i, image in enumerate(pixels):
        trusted = None if mask is None else mask[i]
        if pixels.dtype.kind == "f":
            bad = ~np.isfinite(image)
            if trusted is not None:
                bad &= trusted[..., None]
            found = int(np.count_nonzero(bad))
            if found:
                if not count:
                    first = (i, *(int(k) for k in np.argwhere(bad)[0]))
                count += found
                continue
        values = image if trusted is None else image[trusted]
        if values.size:
            low, high = min(low, float(values.min())), max(high, float(values.max()))
    if count:
        where = f"slice {first[0]}, row {first[1]}, column {first[2]}"
        if pixels.shape[3] > 1:
            where += f", channel {first[3]}"
        raise ValueError(
            f"data: {count} pixel values are NaN or infinite, the first at {where}; "
            "need finite values, or a mask that leaves these pixels out."
        )
    largest = max(abs(low), abs(high))
    if largest > _LARGEST:
        raise ValueError(
            f"data: values reach {largest:.3g}, need at most {_LARGEST:.0e} (squares in float32); "
            "divide them first."
        )
    step = float(np.spacing(np.float32(largest)))
    if 0 < high - low < _STEPS * step:
        raise ValueError(
            f"data: values reach {largest:.10g} but span only {high - low:.4g}, which float32 would cut into steps "
            f"of {step:.3g}; subtract an offset such as {low:.10g} first."
        )
    return low, high


def _check_layer(layer: Any) -> None:
    kind = type(layer).__name__
    if hasattr(layer, "selected_label") or "Labels" in kind:
        raise TypeError(
            f"layer: {getattr(layer, 'name', kind)!r} is a Labels layer, whose numbers must not be blended; "
            "use an Image layer of its numbers with the method nearest alone."
        )
    for needed in ("data", "data_to_world", "ndim"):
        if not hasattr(layer, needed):
            raise TypeError(f"layer: got {kind}, need a napari Image layer.")
    if not hasattr(layer, "rgb"):
        raise TypeError(f"layer: got a {kind} layer, need an Image layer.")


def _one_unit(
    affine: FloatArray, units: Any, spatial: Sequence[int]
) -> tuple[FloatArray, tuple[str, str, str] | None]:
    """Bring the three world axes to one unit (that of the last one)."""
    if units is None:
        return affine, None
    names = [normalise_unit(units[d]) for d in spatial]
    out = np.array(affine)
    for row, unit in enumerate(names):
        out[row] *= unit_scale(unit, names[-1])
    return out, (names[-1], names[-1], names[-1])
