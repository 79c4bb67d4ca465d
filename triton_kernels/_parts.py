"""Tiles of rows of any width in Triton, whose sides are powers of two.

A tile is a tuple of one part or two, D1 and D2 columns wide: 80 is 64 and 16, 96 is 64 and 32; D2 is 0 where
one part holds it all. Columns beyond the width D read as 0 and are not stored.
"""

import triton
import triton.language as tl


def parts(d: int) -> tuple[int, int]:
    """Powers of two that hold a row of d: one, or two where they are fewer columns together."""
    whole = max(16, triton.next_power_of_2(d))
    rest = max(16, triton.next_power_of_2(d - whole // 2))
    return (whole // 2, rest) if whole // 2 + rest < whole else (whole, 0)


@triton.jit
def _part(at, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    c = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH > D:
        return tl.load(at + c, mask=c < D, other=0.0)
    else:
        return tl.load(at + c)


@triton.jit
def load_rows(ptr, at, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """The rows that start `at` [R] elements after ptr: [R, D1] and [R, D2]."""
    at = ptr + at[:, None]
    if D2:
        return (_part(at, 0, D1, D), _part(at, D1, D2, D))
    else:
        return (_part(at, 0, D1, D),)


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr):
    if D2:
        return (tl.zeros((ROWS, D1), ACC), tl.zeros((ROWS, D2), ACC))
    else:
        return (tl.zeros((ROWS, D1), ACC),)


@triton.jit
def dot(x, y, ACC: tl.constexpr):
    """x . y^T over the parts: [R, C]."""
    z = tl.dot(x[0], y[0].T, input_precision="ieee", out_dtype=ACC)
    if len(x) > 1:
        z = tl.dot(x[1], y[1].T, z, input_precision="ieee", out_dtype=ACC)
    return z


@triton.jit
def add_product(acc, w, y, ACC: tl.constexpr):
    """acc + w . y, by part; w [R, C] is rounded to y's dtype."""
    w = w.to(y[0].dtype)
    first = tl.dot(w, y[0], acc[0], input_precision="ieee", out_dtype=ACC)
    if len(acc) > 1:
        return (first, tl.dot(w, y[1], acc[1], input_precision="ieee", out_dtype=ACC))
    else:
        return (first,)


@triton.jit
def scaled(acc, factor):
    if len(acc) > 1:
        return (acc[0] * factor, acc[1] * factor)
    else:
        return (acc[0] * factor,)


@triton.jit
def store_rows(ptr, at, mask, acc, factor, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """acc * factor [R] or [] to rows `at`, where mask."""
    at, mask = ptr + at[:, None], mask[:, None]
    c = tl.arange(0, D1)[None, :]
    tl.store(at + c, (acc[0] * factor).to(ptr.dtype.element_ty), mask & (c < D))
    if D2:
        c = D1 + tl.arange(0, D2)[None, :]
        tl.store(at + c, (acc[1] * factor).to(ptr.dtype.element_ty), mask & (c < D))
