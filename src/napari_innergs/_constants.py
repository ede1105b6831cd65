"""Numbers that every backend must agree on, defined once and passed in."""

from __future__ import annotations

#: Squared Mahalanobis radius in 3D at which a Gaussian is cut: 0.1 % of its mass lies outside.
CUT_3D: float = 16.3

#: The same rule in 2D (detector images).
CUT_2D: float = 13.8

#: Denominator offset of the normalised field: the weight that the background carries.
EPSILON: float = 1e-4

#: A covariance counts as positive definite when each pivot of its factorisation keeps at least this share of
#: the diagonal entry it came from; any less is rounding of a singular float32 matrix.
MIN_PIVOT: float = 1e-6

#: Variances outside this range (pixels squared) would overflow in float32; such Gaussians are left out.
VARIANCE_RANGE: tuple[float, float] = (1e-20, 1e20)
