"""Line integrals of ellipsoids, in closed form: projections that no projector of ours has made."""

import numpy as np

#: Density, centre (z, y, x) and half axes (z, y, x) of bodies without any symmetry, within a radius of 40.
BODIES = [
    (0.02, (0.0, 2.0, -3.0), (30.0, 26.0, 34.0)),
    (0.03, (4.0, 11.0, 6.0), (9.0, 5.0, 12.0)),
    (-0.015, (-6.0, -12.0, 9.0), (12.0, 6.0, 4.0)),
    (0.05, (1.0, -4.0, -21.0), (6.0, 7.0, 3.0)),
    (0.04, (0.0, 17.0, -12.0), (20.0, 2.0, 3.0)),
]


def project(geometry, bodies=BODIES):
    """Line integrals (n, v, u): chord length through each ellipsoid times its density."""
    rows, cols = geometry.detector_shape
    v = np.arange(rows) - (rows - 1) / 2
    u = np.arange(cols) - (cols - 1) / 2
    out = np.zeros((geometry.n_views, rows, cols))
    for i in range(geometry.n_views):
        pixel = geometry.center[i] + v[:, None, None] * geometry.v[i] + u[:, None] * geometry.u[i]
        if geometry.kind == "cone":
            ray = pixel - geometry.source[i]
            ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        else:
            ray = np.broadcast_to(geometry.direction[i], pixel.shape)
        for density, centre, half in bodies:
            start = (pixel - np.array(centre)) / half
            step = ray / half
            a, b = (step**2).sum(-1), (start * step).sum(-1)
            inside = b**2 - a * ((start**2).sum(-1) - 1)
            out[i] += density * 2 * np.sqrt(np.maximum(inside, 0)) / a
    return out
