"""Sixteen float32 lanes as a numba type.

numba's loop vectoriser gives up on ``exp`` when no vector mathematics library is installed, so the kernels
name their vectors: :data:`f32x16` is an LLVM ``<16 x float>``, and LLVM maps it to AVX-512, to two AVX
registers or to four SSE or NEON ones. Operations are emitted as LLVM instructions straight away (no overloads
that need to be typed and inlined), which keeps the first compilation short.

``Lanes(n)`` is a group of ``n`` vectors, one for each channel; loops over channels are unrolled here, while
the code is generated, so kernels are compiled once for each number of channels.

Array arguments must be one-dimensional, C-contiguous and of the stated type; indices are not checked.
"""

# LLVM calls are typed by their builders, not by annotations.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math
import operator

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

WIDTH = 16

_FLOAT = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, WIDTH)
_IVECTOR = ir.VectorType(_I32, WIDTH)

# Everything but reassociation: rounding by adding and subtracting a large number must survive.
_FLAGS = ("nnan", "ninf", "nsz", "arcp", "contract", "afn")


class F32x16(types.Type):
    """The numba type of sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="f32x16")


class Lanes(types.Type):
    """The numba type of ``count`` vectors."""

    def __init__(self, count: int) -> None:
        self.count = count
        super().__init__(name=f"f32x16[{count}]")


f32x16 = F32x16()


@register_model(F32x16)
class _F32x16Model(models.PrimitiveModel):
    def __init__(self, manager, fe_type) -> None:
        super().__init__(manager, fe_type, _VECTOR)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, fe_type) -> None:
        super().__init__(manager, fe_type, ir.ArrayType(_VECTOR, fe_type.count))


# --- helpers used while code is generated -------------------------------------------------------------------


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_VECTOR, [float(value)] * WIDTH)


def _splat(builder, scalar):
    one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(_VECTOR, ir.Undefined), ir.Constant(_IVECTOR, [0] * WIDTH))


def _vector(context, builder, value, numba_type):
    """Return a vector, whether it was one already or a number."""
    if isinstance(numba_type, F32x16):
        return value
    return _splat(builder, context.cast(builder, value, numba_type, types.float32))


def _add(builder, x, y):
    return builder.fadd(x, y, flags=_FLAGS)


def _mul(builder, x, y):
    return builder.fmul(x, y, flags=_FLAGS)


def _address(context, builder, array_type, array, index, index_type):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [context.cast(builder, index, index_type, types.intp)])


def _load(builder, element_address):
    loaded = builder.load(builder.bitcast(element_address, _VECTOR.as_pointer()), typ=_VECTOR)
    loaded.align = 4
    return loaded


def _store(builder, element_address, value):
    builder.store(value, builder.bitcast(element_address, _VECTOR.as_pointer())).align = 4


def _call(builder, name, result, arguments, **options):
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments, **options)


def _sum(builder, value):
    zero = ir.Constant(_FLOAT, 0.0)
    name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
    return _call(builder, name, _FLOAT, [zero, value], fastmath=("reassoc", *_FLAGS))


# --- + - * on vectors and numbers ---------------------------------------------------------------------------


def _register(operation, instruction: str) -> None:
    pairs = [(f32x16, f32x16), (f32x16, types.float32), (types.float32, f32x16)]

    class Template(ConcreteTemplate):
        cases = [signature(f32x16, *pair) for pair in pairs]  # noqa: RUF012

    infer_global(operation)(Template)

    def emit(context, builder, sig, arguments):
        x, y = (_vector(context, builder, v, t) for v, t in zip(arguments, sig.args, strict=True))
        return getattr(builder, instruction)(x, y, flags=_FLAGS)

    for pair in pairs:
        lower_builtin(operation, *pair)(emit)


for _operation, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.iadd, "fadd"),
    (operator.isub, "fsub"),
    (operator.imul, "fmul"),
):
    _register(_operation, _instruction)


# --- numbers in arrays, without wrap-around of negative indices ---------------------------------------------


@intrinsic
def at(typing, array, index):
    """Return ``array[index]``."""

    def emit(context, builder, sig, arguments):
        return builder.load(_address(context, builder, sig.args[0], arguments[0], arguments[1], sig.args[1]))

    return array.dtype(array, index), emit


@intrinsic
def put(typing, array, index, value):
    """Set ``array[index] = value``."""

    def emit(context, builder, sig, arguments):
        target = _address(context, builder, sig.args[0], arguments[0], arguments[1], sig.args[1])
        builder.store(context.cast(builder, arguments[2], sig.args[2], sig.args[0].dtype), target)
        return context.get_dummy_value()

    return types.void(array, index, value), emit


def _rounded(name):
    def function(typing, value):
        def emit(context, builder, sig, arguments):
            value = context.cast(builder, arguments[0], sig.args[0], types.float32)
            return builder.fptosi(_call(builder, f"llvm.{name}.f32", _FLOAT, [value]), _I64)

        return types.int64(value), emit

    function.__name__ = name
    return intrinsic(function)


floor_index = _rounded("floor")
ceil_index = _rounded("ceil")


# --- vectors ------------------------------------------------------------------------------------------------


@intrinsic
def splat(typing, value):
    """Return a vector with ``value`` in every lane."""

    def emit(context, builder, sig, arguments):
        return _vector(context, builder, arguments[0], sig.args[0])

    return f32x16(value), emit


@intrinsic
def lanes(typing):
    """Return 0, 1, ..., 15."""

    def emit(context, builder, sig, arguments):
        return ir.Constant(_VECTOR, [float(i) for i in range(WIDTH)])

    return f32x16(), emit


@intrinsic
def vsum(typing, value):
    """Return the sum of the lanes."""

    def emit(context, builder, sig, arguments):
        return _sum(builder, arguments[0])

    return types.float32(value), emit


@intrinsic
def load(typing, array, index):
    """Return the sixteen numbers from ``array[index]``."""

    def emit(context, builder, sig, arguments):
        return _load(
            builder, _address(context, builder, sig.args[0], arguments[0], arguments[1], sig.args[1])
        )

    return f32x16(array, index), emit


@intrinsic
def store(typing, array, index, value):
    """Set the sixteen numbers from ``array[index]``."""

    def emit(context, builder, sig, arguments):
        target = _address(context, builder, sig.args[0], arguments[0], arguments[1], sig.args[1])
        _store(builder, target, arguments[2])
        return context.get_dummy_value()

    return types.void(array, index, value), emit


@intrinsic
def minimum(typing, value, high):
    """Return ``min(value, high)``."""

    def emit(context, builder, sig, arguments):
        high = _vector(context, builder, arguments[1], sig.args[1])
        return builder.select(builder.fcmp_ordered("<", arguments[0], high), arguments[0], high)

    return f32x16(value, high), emit


@intrinsic
def clamp(typing, value, low, high):
    """Return ``min(max(value, low), high)``."""

    def emit(context, builder, sig, arguments):
        x = arguments[0]
        low = _vector(context, builder, arguments[1], sig.args[1])
        high = _vector(context, builder, arguments[2], sig.args[2])
        x = builder.select(builder.fcmp_ordered(">", x, low, flags=_FLAGS), x, low)
        return builder.select(builder.fcmp_ordered("<", x, high, flags=_FLAGS), x, high)

    return f32x16(value, low, high), emit


@intrinsic
def where_equal(typing, left, right, value):
    """Return ``value`` where ``left == right`` and zero elsewhere."""

    def emit(context, builder, sig, arguments):
        same = builder.fcmp_ordered("==", arguments[0], arguments[1])
        return builder.select(same, arguments[2], _constant(0.0))

    return f32x16(left, right, value), emit


@intrinsic
def keep_from(typing, value, threshold):
    """Return ``value`` where it is at least ``threshold`` and zero elsewhere."""

    def emit(context, builder, sig, arguments):
        threshold = _vector(context, builder, arguments[1], sig.args[1])
        return builder.select(
            builder.fcmp_ordered(">=", arguments[0], threshold), arguments[0], _constant(0.0)
        )

    return f32x16(value, threshold), emit


# Minimax polynomial of 2**f on [-1/2, 1/2]; relative error 2e-7 in float32.
_EXP2 = (
    1.535336188319500e-4,
    1.339887440266574e-3,
    9.618437357674640e-3,
    5.550332471162809e-2,
    2.402264791363012e-1,
    6.931472028550421e-1,
    1.0,
)


# Adding 1.5 * 2**23 leaves the nearest integer in the low bits of a float.
_MAGIC = 12582912.0


def _exp2(builder, x, factor):
    """Return 2**(factor x) for results that are normal numbers."""
    factor, magic = _constant(factor), _constant(_MAGIC)
    scaled = _mul(builder, x, factor)
    shifted = _add(builder, scaled, magic)
    f = builder.fsub(scaled, builder.fsub(shifted, magic), flags=("contract",))
    p = _constant(_EXP2[0])
    for coefficient in _EXP2[1:]:
        p = _add(builder, _mul(builder, p, f), _constant(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, _IVECTOR), ir.Constant(_IVECTOR, [23] * WIDTH))
    return builder.bitcast(builder.add(builder.bitcast(p, _IVECTOR), exponent), _VECTOR)


_LOG2_E = 1.0 / math.log(2.0)


@intrinsic
def vexp(typing, value):
    """Return ``exp(value)`` to 3e-7; exactly zero below -87.3, and held at exp(87.6) above."""

    def emit(context, builder, sig, arguments):
        low, high = _constant(-87.3), _constant(87.6)
        normal = builder.fcmp_ordered(">", arguments[0], low)
        x = builder.select(normal, arguments[0], low)
        x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
        return builder.select(normal, _exp2(builder, x, _LOG2_E), _constant(0.0))

    return f32x16(value), emit


def _unchecked(name, factor):
    def function(typing, value):
        def emit(context, builder, sig, arguments):
            return _exp2(builder, arguments[0], factor * _LOG2_E)

        return f32x16(value), emit

    function.__name__ = name
    return intrinsic(function)


# exp(-value) and exp(-value / 2), where the caller knows that the result is a normal number.
vexp_minus = _unchecked("vexp_minus", -1.0)
vexp_minus_half = _unchecked("vexp_minus_half", -0.5)


# --- one vector for each channel; the tuple `channels` carries the number of channels in its type -----------


@intrinsic
def channel_zeros(typing, channels):
    """Return zeros for each channel."""

    def emit(context, builder, sig, arguments):
        return ir.Constant(ir.ArrayType(_VECTOR, sig.return_type.count), [_constant(0.0)] * sig.args[0].count)

    return Lanes(channels.count)(channels), emit


@intrinsic
def channel_values(typing, channels, array, index):
    """Return ``array[index + c]`` in every lane of vector ``c``."""

    def emit(context, builder, sig, arguments):
        count = sig.args[0].count
        start = _address(context, builder, sig.args[1], arguments[1], arguments[2], sig.args[2])
        result = ir.Constant(ir.ArrayType(_VECTOR, count), ir.Undefined)
        for c in range(count):
            number = builder.load(builder.gep(start, [ir.Constant(_I64, c)]))
            result = builder.insert_value(result, _splat(builder, number), c)
        return result

    return Lanes(channels.count)(channels, array, index), emit


def _channel_addresses(context, builder, sig, arguments, count):
    """Return the addresses of ``array[index + c * stride]`` (the first three arguments) for each ``c``."""
    start = _address(context, builder, sig.args[0], arguments[0], arguments[1], sig.args[1])
    stride = context.cast(builder, arguments[2], sig.args[2], types.intp)
    return [builder.gep(start, [builder.mul(stride, ir.Constant(_I64, c))]) for c in range(count)]


@intrinsic
def channel_add(typing, array, index, stride, scale, value):
    """Add ``scale[c] * value`` to the sixteen numbers from ``array[index + c * stride]``, for each ``c``."""

    def emit(context, builder, sig, arguments):
        count = sig.args[3].count
        targets = _channel_addresses(context, builder, sig, arguments, count)
        # All loads before all stores: planes of the channels often agree in their last address bits.
        sums = [
            _add(
                builder,
                _mul(builder, builder.extract_value(arguments[3], c), arguments[4]),
                _load(builder, to),
            )
            for c, to in enumerate(targets)
        ]
        for to, total in zip(targets, sums, strict=True):
            _store(builder, to, total)
        return context.get_dummy_value()

    return types.void(array, index, stride, scale, value), emit


@intrinsic
def channel_dot(typing, array, index, stride, scale, value, totals):
    """Gather with weights: the adjoint of :func:`channel_add`.

    With ``g[c]`` the sixteen numbers from ``array[index + c * stride]``, returns ``value * sum_c scale[c]
    g[c]`` and ``totals[c] + value * g[c]``. With one channel the scale is left for the caller to apply, and
    the totals too, since both are then the same sum.
    """

    def emit(context, builder, sig, arguments):
        count = sig.args[3].count
        sources = _channel_addresses(context, builder, sig, arguments, count)
        scale, value, totals = arguments[3:]
        if count == 1:
            weight = _mul(builder, value, _load(builder, sources[0]))
        else:
            weight = None
            for c, source in enumerate(sources):
                g = _load(builder, source)
                total = _add(builder, builder.extract_value(totals, c), _mul(builder, g, value))
                totals = builder.insert_value(totals, total, c)
                part = _mul(builder, builder.extract_value(scale, c), g)
                weight = part if weight is None else _add(builder, weight, part)
            weight = _mul(builder, weight, value)
        return context.make_tuple(builder, sig.return_type, [weight, totals])

    return types.Tuple((f32x16, totals))(array, index, stride, scale, value, totals), emit


@intrinsic
def channel_store_sums(typing, array, index, totals):
    """Set ``array[index + c]`` to the sum of the lanes of ``totals[c]``."""

    def emit(context, builder, sig, arguments):
        start = _address(context, builder, sig.args[0], arguments[0], arguments[1], sig.args[1])
        for c in range(sig.args[2].count):
            total = _sum(builder, builder.extract_value(arguments[2], c))
            builder.store(total, builder.gep(start, [ir.Constant(_I64, c)]))
        return context.get_dummy_value()

    return types.void(array, index, totals), emit
