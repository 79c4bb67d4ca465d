"""Tiles of rows of any width D, although Triton requires tile sides that are powers of two.

A tile is a tuple of one or two parts, D1 and D2 columns wide: 80 is held as 64 + 16, 96 as 64 + 32.
D2 is 0 if one part holds the whole row. Columns beyond D are read as 0 and never stored.
"""

import triton
import triton.language as tl


def parts(d: int) -> tuple[int, int]:
    """Widths (D1, D2) of the parts of a row of width d; D2 is 0 unless two parts need fewer columns."""
    single = max(16, triton.next_power_of_2(d))
    rest = max(16, triton.next_power_of_2(d - single // 2))
    return (single // 2, rest) if single // 2 + rest < single else (single, 0)


@triton.jit
def _part(row_ptrs, FIRST: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    c = FIRST + tl.arange(0, WIDTH)[None, :]
    if FIRST + WIDTH > D:
        return tl.load(row_ptrs + c, mask=c < D, other=0.0)
    else:
        return tl.load(row_ptrs + c)


@triton.jit
def load_rows(ptr, offsets, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Loads the rows that start at ptr + offsets [R]: [R, D1] and, unless D2 is 0, [R, D2]."""
    row_ptrs = ptr + offsets[:, None]
    if D2:
        return (_part(row_ptrs, 0, D1, D), _part(row_ptrs, D1, D2, D))
    else:
        return (_part(row_ptrs, 0, D1, D),)


@triton.jit
def zeros(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, ACC: tl.constexpr):
    if D2:
        return (tl.zeros((ROWS, D1), ACC), tl.zeros((ROWS, D2), ACC))
    else:
        return (tl.zeros((ROWS, D1), ACC),)


@triton.jit
def dot(x, y, ACC: tl.constexpr):
    """x @ y^T, summed over the parts: [R, C]."""
    z = tl.dot(x[0], y[0].T, input_precision="ieee", out_dtype=ACC)
    if len(x) > 1:
        z = tl.dot(x[1], y[1].T, z, input_precision="ieee", out_dtype=ACC)
    return z


@triton.jit
def add_product(acc, w, y, ACC: tl.constexpr):
    """acc + w @ y for each part; w [R, C] is rounded to y's dtype."""
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
def store_rows(ptr, offsets, mask, acc, factor, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Stores acc * factor ([R, 1] or a scalar) to the rows at ptr + offsets [R] whose mask [R] is True."""
    row_ptrs, mask = ptr + offsets[:, None], mask[:, None]
    c = tl.arange(0, D1)[None, :]
    tl.store(row_ptrs + c, (acc[0] * factor).to(ptr.dtype.element_ty), mask & (c < D))
    if D2:
        c = D1 + tl.arange(0, D2)[None, :]
        tl.store(row_ptrs + c, (acc[1] * factor).to(ptr.dtype.element_ty), mask & (c < D))
