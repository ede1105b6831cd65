"""Sixteen numbers from sixteen places at once, for :mod:`napari_innergs.cpu._simd`.

LLVM turns a masked gather into one instruction where there is one and into sixteen loads elsewhere. Indices
count from ``offset``, so that they stay small whatever the size of the array; they are not checked.
"""

# LLVM calls are typed by their builders, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from napari_innergs.cpu import _simd
from napari_innergs.cpu._simd import WIDTH, f32x16

_ADDRESSES = ir.VectorType(_simd._I64, WIDTH)
_POINTERS = ir.VectorType(_simd._FLOAT.as_pointer(), WIDTH)
_MASK = ir.VectorType(ir.IntType(1), WIDTH)


def _integers(value: int) -> ir.Constant:
    return ir.Constant(_simd._IVECTOR, [value] * WIDTH)


def _gather(builder, start, index):
    """Load ``start[index]`` for a vector of 32-bit indices."""
    base = builder.ptrtoint(start, _simd._I64)
    unset = ir.Constant(_ADDRESSES, ir.Undefined)
    bases = builder.shuffle_vector(
        builder.insert_element(unset, base, ir.Constant(_simd._I32, 0)), unset, _integers(0)
    )
    bytes_ = builder.shl(builder.sext(index, _ADDRESSES), ir.Constant(_ADDRESSES, [2] * WIDTH))
    pointers = builder.inttoptr(builder.add(bases, bytes_), _POINTERS)
    arguments = [
        pointers,
        ir.Constant(_simd._I32, 4),
        ir.Constant(_MASK, [1] * WIDTH),
        ir.Constant(_simd._VECTOR, ir.Undefined),
    ]
    return _simd._call(builder, f"llvm.masked.gather.v{WIDTH}f32.v{WIDTH}p0", _simd._VECTOR, arguments)


def _split(builder, x):
    """Return the whole part (towards zero) and the rest of a vector."""
    whole = builder.fptosi(x, _simd._IVECTOR)
    return whole, builder.fsub(x, builder.sitofp(whole, _simd._VECTOR))


def _lerp(builder, low, high, part):
    return _simd._add(builder, low, _simd._mul(builder, part, builder.fsub(high, low)))


def _start(context, builder, sig, arguments):
    return _simd._address(context, builder, sig.args[0], arguments[0], arguments[1], sig.args[1])


def _spread(context, builder, sig, arguments, which):
    """Return an argument as a 32-bit integer in every lane."""
    value = context.cast(builder, arguments[which], sig.args[which], types.int32)
    unset = ir.Constant(_simd._IVECTOR, ir.Undefined)
    one = builder.insert_element(unset, value, ir.Constant(_simd._I32, 0))
    return builder.shuffle_vector(one, unset, _integers(0))


@intrinsic
def gather(typing, array, offset, index):
    """Return ``array[offset + index]`` for whole numbers ``index``."""

    def emit(context, builder, sig, arguments):
        whole = builder.fptosi(arguments[2], _simd._IVECTOR)
        return _gather(builder, _start(context, builder, sig, arguments), whole)

    return f32x16(array, offset, index), emit


@intrinsic
def gather_strided(typing, array, offset, index, stride):
    """Return ``array[offset + index * stride]`` for whole numbers ``index`` and ``stride``."""

    def emit(context, builder, sig, arguments):
        whole = builder.fptosi(arguments[2], _simd._IVECTOR)
        whole = builder.mul(whole, _spread(context, builder, sig, arguments, 3))
        return _gather(builder, _start(context, builder, sig, arguments), whole)

    return f32x16(array, offset, index, stride), emit


@intrinsic
def gather_linear(typing, array, offset, x):
    """Return ``array`` at ``offset + x`` by linear interpolation, for ``x`` at least zero."""

    def emit(context, builder, sig, arguments):
        start = _start(context, builder, sig, arguments)
        whole, part = _split(builder, arguments[2])
        low = _gather(builder, start, whole)
        high = _gather(builder, start, builder.add(whole, _integers(1)))
        return _lerp(builder, low, high, part)

    return f32x16(array, offset, x), emit


@intrinsic
def gather_bilinear(typing, array, offset, step, x, x_stride, y, y_stride):
    """Return ``array`` at ``offset + lane * step + x * x_stride + y * y_stride``, bilinear in x and y.

    ``x`` and ``y`` are at least zero; the strides are whole numbers.
    """

    def emit(context, builder, sig, arguments):
        start = _start(context, builder, sig, arguments)

        lane = ir.Constant(_simd._IVECTOR, list(range(WIDTH)))
        x, part_x = _split(builder, arguments[3])
        y, part_y = _split(builder, arguments[5])
        step, x_stride, y_stride = (_spread(context, builder, sig, arguments, n) for n in (2, 4, 6))
        index = builder.mul(lane, step)
        index = builder.add(index, builder.add(builder.mul(x, x_stride), builder.mul(y, y_stride)))
        beside = builder.add(index, x_stride)
        below, diagonal = builder.add(index, y_stride), builder.add(beside, y_stride)
        first = _lerp(builder, _gather(builder, start, index), _gather(builder, start, beside), part_x)
        second = _lerp(builder, _gather(builder, start, below), _gather(builder, start, diagonal), part_x)
        return _lerp(builder, first, second, part_y)

    return f32x16(array, offset, step, x, x_stride, y, y_stride), emit


def _rounded(name):
    def function(typing, value):
        def emit(context, builder, sig, arguments):
            return _simd._call(builder, f"llvm.{name}.v{WIDTH}f32", _simd._VECTOR, arguments)

        return f32x16(value), emit

    function.__name__ = f"v{name}"
    return intrinsic(function)


vceil = _rounded("ceil")
vfloor = _rounded("floor")
vabs = _rounded("fabs")


@intrinsic
def vinverse(typing, value):
    """Return ``1 / value``."""

    def emit(context, builder, sig, arguments):
        return builder.fdiv(_simd._constant(1.0), arguments[0])

    return f32x16(value), emit
