"""Rotations as quaternions.

A quaternion is (w, a, b, c), w first. Its matrix acts on coordinate triples in array order: for the world
that is (z, y, x), so a belongs to z, b to y and c to x. The formula is the usual one, with the first
coordinate in the role of "x"; no axis is swapped. :func:`reverse_quaternion` gives the same rotation for
(x, y, z) triples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "matrix_to_quaternion",
    "multiply_quaternions",
    "normalise_quaternion",
    "quaternion_to_matrix",
    "reverse_quaternion",
    "rotation_vector_to_matrix",
]

FloatArray = NDArray[np.float64]


def normalise_quaternion(quaternion: ArrayLike) -> FloatArray:
    """Scale quaternions to length 1, with w >= 0.

    Parameters
    ----------
    quaternion : array_like (..., 4)
        (w, a, b, c).

    Returns
    -------
    ndarray (..., 4)
        Unit quaternions; q and -q, which are the same rotation, give the same answer.

    Raises
    ------
    ValueError
        If one has length 0 or is not finite.

    Examples
    --------
    >>> normalise_quaternion([-2.0, 0.0, 0.0, 0.0]).tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    q = np.array(quaternion, dtype=np.float64)
    if q.ndim == 0 or q.shape[-1] != 4:
        raise ValueError(f"quaternion: got shape {q.shape}, need (..., 4).")
    length = np.linalg.norm(q, axis=-1, keepdims=True)
    if not (np.isfinite(length).all() and (length > 0).all()):
        raise ValueError("quaternion: got one of length 0 or not finite, need finite numbers, not all zero.")
    q /= length
    # the first component that is not zero is made positive
    leading = np.take_along_axis(q, np.argmax(q != 0, axis=-1)[..., None], axis=-1)
    return q * np.where(leading < 0, -1.0, 1.0) + 0.0


def quaternion_to_matrix(quaternion: ArrayLike) -> FloatArray:
    """Turn quaternions into rotation matrices.

    Parameters
    ----------
    quaternion : array_like (..., 4)
        (w, a, b, c); need not have length 1.

    Returns
    -------
    ndarray (..., 3, 3)
        Matrices with determinant +1.

    Examples
    --------
    >>> bool(np.allclose(quaternion_to_matrix([1, 1, 0, 0]) @ [0, 1, 0], [0, 0, 1]))  # about axis 0
    True
    """
    w, a, b, c = np.moveaxis(normalise_quaternion(quaternion), -1, 0)
    rows = [
        [1 - 2 * (b * b + c * c), 2 * (a * b - w * c), 2 * (a * c + w * b)],
        [2 * (a * b + w * c), 1 - 2 * (a * a + c * c), 2 * (b * c - w * a)],
        [2 * (a * c - w * b), 2 * (b * c + w * a), 1 - 2 * (a * a + b * b)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def matrix_to_quaternion(matrix: ArrayLike) -> FloatArray:
    """Turn rotation matrices into quaternions.

    Takes the largest of the four forms of the trace (Shepperd 1978), so that it is stable at 180 degrees.

    Parameters
    ----------
    matrix : array_like (..., 3, 3)
        Orthonormal matrices with determinant +1.

    Returns
    -------
    ndarray (..., 4)
        Unit quaternions (w, a, b, c) with w >= 0.

    Raises
    ------
    ValueError
        If a matrix is not a rotation.

    Examples
    --------
    >>> matrix_to_quaternion(np.eye(3)).tolist()
    [1.0, 0.0, 0.0, 0.0]
    """
    m = np.asarray(matrix, dtype=np.float64)
    if m.ndim < 2 or m.shape[-2:] != (3, 3):
        raise ValueError(f"matrix: got shape {m.shape}, need (..., 3, 3).")
    gram = np.swapaxes(m, -1, -2) @ m
    if not np.allclose(gram, np.eye(3), atol=1e-4) or not (np.linalg.det(m) > 0).all():
        raise ValueError("matrix: got one that is not a rotation, need orthonormal with determinant +1.")
    d0, d1, d2 = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    # rows of 4 q q^T: any one of them, normalised, is the quaternion; the largest is the accurate one
    s01, s02, s12 = m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1]
    a01, a02, a12 = m[..., 1, 0] - m[..., 0, 1], m[..., 0, 2] - m[..., 2, 0], m[..., 2, 1] - m[..., 1, 2]
    outer = np.stack(
        [
            np.stack([1 + d0 + d1 + d2, a12, a02, a01], axis=-1),
            np.stack([a12, 1 + d0 - d1 - d2, s01, s02], axis=-1),
            np.stack([a02, s01, 1 - d0 + d1 - d2, s12], axis=-1),
            np.stack([a01, s02, s12, 1 - d0 - d1 + d2], axis=-1),
        ],
        axis=-2,
    )
    best = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), axis=-1)
    row = np.take_along_axis(outer, best[..., None, None], axis=-2)[..., 0, :]
    return normalise_quaternion(row)


def multiply_quaternions(first: ArrayLike, second: ArrayLike) -> FloatArray:
    """Give the quaternion of the rotation `second` followed by `first`.

    Parameters
    ----------
    first, second : array_like (..., 4)
        Quaternions (w, a, b, c).

    Returns
    -------
    ndarray (..., 4)
        The product; its matrix is matrix(first) @ matrix(second).

    Examples
    --------
    >>> multiply_quaternions([1, 0, 0, 0], [0, 1, 0, 0]).tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    w1, a1, b1, c1 = np.moveaxis(np.asarray(first, dtype=np.float64), -1, 0)
    w2, a2, b2, c2 = np.moveaxis(np.asarray(second, dtype=np.float64), -1, 0)
    return np.stack(
        [
            w1 * w2 - a1 * a2 - b1 * b2 - c1 * c2,
            w1 * a2 + a1 * w2 + b1 * c2 - c1 * b2,
            w1 * b2 - a1 * c2 + b1 * w2 + c1 * a2,
            w1 * c2 + a1 * b2 - b1 * a2 + c1 * w2,
        ],
        axis=-1,
    )


def reverse_quaternion(quaternion: ArrayLike) -> FloatArray:
    """Give the same rotation for coordinates in reversed order, (z, y, x) to (x, y, z) or back.

    With P the reversal, P R P turns about -P n, because P has determinant -1.

    Parameters
    ----------
    quaternion : array_like (..., 4)
        (w, a, b, c).

    Returns
    -------
    ndarray (..., 4)
        (w, -c, -b, -a).

    Examples
    --------
    >>> reverse_quaternion([0.5, 0.1, 0.2, 0.3]).tolist()
    [0.5, -0.3, -0.2, -0.1]
    """
    q = np.asarray(quaternion, dtype=np.float64)
    return np.concatenate([q[..., :1], -q[..., :0:-1]], axis=-1)


def rotation_vector_to_matrix(vector: ArrayLike) -> FloatArray:
    """Turn rotation vectors (axis times angle in radians) into matrices.

    Parameters
    ----------
    vector : array_like (..., 3)
        In the same axis order as the coordinates that are turned.

    Returns
    -------
    ndarray (..., 3, 3)
        Rotation matrices.

    Examples
    --------
    >>> rotation_vector_to_matrix([0.0, 0.0, 0.0]).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    v = np.asarray(vector, dtype=np.float64)
    if v.ndim == 0 or v.shape[-1] != 3:
        raise ValueError(f"vector: got shape {v.shape}, need (..., 3).")
    half = np.linalg.norm(v, axis=-1, keepdims=True) / 2
    # sin(h) / (2 h), with its limit 1/2 at h = 0
    scale = np.sinc(half / np.pi) / 2
    return quaternion_to_matrix(np.concatenate([np.cos(half), v * scale], axis=-1))
