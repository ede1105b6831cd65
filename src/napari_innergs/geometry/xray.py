"""X-ray scans with a flat panel: where the source, the panel and its pixels are in each view.

World coordinates are right-handed x, y, z, kept in the order (z, y, x). Twelve numbers describe a view, in the
order of the ASTRA toolbox and in (x, y, z): source (cone) or ray direction (parallel), centre of the panel, step
from column to column (u), step from row to row (v). Projections are [n, v, u].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike

from napari_innergs.geometry._xray_geometry import XrayGeometry
from napari_innergs.geometry._xray_vectors import (
    as_heights,
    as_length,
    as_number,
    check_angles,
    real_angles,
    turned_panel,
)

__all__ = ["ConeBeam", "ParallelBeam", "XrayGeometry", "check_angles"]


class _Beam(XrayGeometry):
    """A scan whose kind is known."""

    __slots__ = ()
    KIND: ClassVar[str]
    circular: ClassVar[Callable[..., Any]]

    def __init__(
        self,
        vectors: ArrayLike,
        detector_shape: Sequence[int],
        units: Any = None,
        *,
        angles: ArrayLike | None = None,
        isocentre: ArrayLike | None = None,
    ) -> None:
        super().__init__(vectors, detector_shape, self.KIND, units, angles=angles, isocentre=isocentre)

    @classmethod
    def laminography(cls, angles: ArrayLike, *, tilt: float, **options: Any) -> Self:
        """Make a scan whose rotation axis is not at right angles to the beam.

        Parameters
        ----------
        angles : array_like (n,)
            Radians.
        tilt : float
            Angle of the source, or of parallel rays, above the plane of rotation, radians: 0 is an ordinary scan.
        **options
            Further arguments of `circular`.

        Returns
        -------
        ConeBeam or ParallelBeam
            The geometry.
        """
        made: Self = cls.circular(angles, elevation=tilt, **options)
        return made


class ConeBeam(_Beam):
    """A point source and a flat panel; see :class:`XrayGeometry` for the parameters.

    Examples
    --------
    >>> geometry = ConeBeam.circular([0.0, 1.0], source_origin=500, source_detector=1000,
    ...                              detector_shape=(32, 48), pixel_size=0.8)
    >>> geometry.magnification, geometry.default_grid().spacing.tolist()
    (2.0, [0.4, 0.4, 0.4])
    """

    __slots__ = ()
    KIND = "cone"

    @classmethod
    def circular(
        cls,
        angles: ArrayLike,
        *,
        source_origin: float,
        source_detector: float,
        detector_shape: Sequence[int],
        pixel_size: float | Sequence[float],
        detector_offset: float | Sequence[float] = (0.0, 0.0),
        source_offset: float | Sequence[float] = (0.0, 0.0),
        rotation_centre: float | None = None,
        detector_tilt: float | Sequence[float] = (0.0, 0.0, 0.0),
        elevation: float = 0.0,
        start_angle: float = 0.0,
        rotation: str = "ccw",
        heights: float | ArrayLike = 0.0,
        units: Any = None,
    ) -> ConeBeam:
        """Make a scan on a circle about the world's z axis.

        Parameters
        ----------
        angles : array_like (n,)
            Radians.
        source_origin, source_detector : float
            Distances from the source to the axis and to the panel.
        detector_shape : (int, int)
            Rows and columns.
        pixel_size : float or (float, float)
            Distance between pixel centres (v, u), world units.
        detector_offset : (float, float)
            Place of the panel's centre relative to the line from the source through the axis (v, u), world units.
        source_offset : (float, float)
            The same for the source. Both offsets equal: the rotation axis is displaced.
        rotation_centre : float, optional
            Column (with fractions, counted from 0) on which the axis is seen when only the panel is displaced;
            instead of a horizontal `detector_offset`.
        detector_tilt : (float, float, float)
            Roll about the panel's normal (u towards v), pitch about u (v towards the normal, which points to the
            source), yaw about v (normal towards u), radians.
        elevation : float
            Angle of the source above the plane of rotation (laminography), radians.
        start_angle : float
            Added to all angles.
        rotation : {"ccw", "cw"}
            Sense in which the source turns about the object, seen from +z. An object on a turntable that turns
            clockwise is the same as a source that turns counter-clockwise.
        heights : float or array_like (n,)
            World z that source and panel are lifted to in each view; with more than one, the angles may be of many
            turns.
        units : str or sequence of 3 str, optional
            Units of the world axes.

        Returns
        -------
        ConeBeam
            The geometry.

        Raises
        ------
        ValueError
            If the angles look like degrees, a length is not positive, or the panel is nearer than the axis.
        """
        near, far = as_length(source_origin, "source_origin"), as_length(source_detector, "source_detector")
        if far < near:
            raise ValueError(
                f"source_detector: got {far:g}, shorter than source_origin ({near:g}), need the panel behind the "
                "axis; are the two exchanged?"
            )
        real = real_angles(angles, rotation, start_angle, turns=np.ndim(heights) > 0)
        rise = as_heights(heights, len(real))
        vectors = turned_panel(
            real,
            rise,
            source_origin=near,
            origin_detector=far - near,
            source_offset=source_offset,
            detector_shape=detector_shape,
            pixel_size=pixel_size,
            detector_offset=detector_offset,
            rotation_centre=rotation_centre,
            detector_tilt=detector_tilt,
            elevation=elevation,
        )
        middle = (float(np.mean(rise)), 0.0, 0.0)
        return cls(vectors, detector_shape, units, angles=real, isocentre=middle)

    @classmethod
    def fan(
        cls,
        angles: ArrayLike,
        *,
        source_origin: float,
        source_detector: float,
        n_columns: int,
        pixel_size: float,
        **options: Any,
    ) -> ConeBeam:
        """Make a scan with a single row of pixels.

        Parameters
        ----------
        angles, source_origin, source_detector
            As for :meth:`circular`.
        n_columns : int
            Pixels in the row.
        pixel_size : float
            Distance between them; also the height of the row.
        **options
            Further arguments of :meth:`circular`.

        Returns
        -------
        ConeBeam
            The geometry, with ``detector_shape`` (1, n_columns).
        """
        return cls.circular(
            angles,
            source_origin=source_origin,
            source_detector=source_detector,
            detector_shape=(1, n_columns),
            pixel_size=pixel_size,
            **options,
        )

    @classmethod
    def helical(
        cls,
        angles: ArrayLike,
        *,
        pitch: float,
        start_height: float | None = None,
        **options: Any,
    ) -> ConeBeam:
        """Make a scan on a helix about the world's z axis.

        Parameters
        ----------
        angles : array_like (n,)
            Radians, over as many turns as wanted.
        pitch : float
            Rise of source and panel for one whole turn of the given angles, world units; negative to sink.
        start_height : float, optional
            World z of the first view. Default: the helix is centred on 0.
        **options
            Further arguments of :meth:`circular`.

        Returns
        -------
        ConeBeam
            The geometry.
        """
        rise = check_angles(angles, turns=True) * (as_number(pitch, "pitch") / (2 * np.pi))
        if start_height is None:
            rise -= 0.5 * (rise.min() + rise.max())
        else:
            rise += as_number(start_height, "start_height") - rise[0]
        return cls.circular(angles, heights=rise, **options)


class ParallelBeam(_Beam):
    """Parallel rays and a flat panel; see :class:`XrayGeometry` for the parameters.

    Examples
    --------
    >>> ParallelBeam.circular([0.0, 0.1], detector_shape=(2, 64)).default_grid().shape
    (2, 64, 64)
    """

    __slots__ = ()
    KIND = "parallel"

    @classmethod
    def circular(
        cls,
        angles: ArrayLike,
        *,
        detector_shape: Sequence[int],
        pixel_size: float | Sequence[float] = 1.0,
        detector_offset: float | Sequence[float] = (0.0, 0.0),
        rotation_centre: float | None = None,
        detector_tilt: float | Sequence[float] = (0.0, 0.0, 0.0),
        elevation: float = 0.0,
        start_angle: float = 0.0,
        rotation: str = "ccw",
        units: Any = None,
    ) -> ParallelBeam:
        """Make a scan that turns about the world's z axis.

        Parameters
        ----------
        angles : array_like (n,)
            Radians.
        detector_shape : (int, int)
            Rows and columns.
        pixel_size : float or (float, float)
            Distance between pixel centres (v, u), world units.
        detector_offset, rotation_centre, detector_tilt, elevation, start_angle, rotation, units
            As for :meth:`ConeBeam.circular`; the panel's centre is on the plane through the axis.

        Returns
        -------
        ParallelBeam
            The geometry: rays run along (-cos a, -sin a, 0) in (x, y, z).

        Raises
        ------
        ValueError
            If the angles look like degrees or a length is not positive.
        """
        real = real_angles(angles, rotation, start_angle)
        vectors = turned_panel(
            real,
            detector_shape=detector_shape,
            pixel_size=pixel_size,
            detector_offset=detector_offset,
            rotation_centre=rotation_centre,
            detector_tilt=detector_tilt,
            elevation=elevation,
        )
        return cls(vectors, detector_shape, units, angles=real, isocentre=(0.0, 0.0, 0.0))
