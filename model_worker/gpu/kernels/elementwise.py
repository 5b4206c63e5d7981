"""What a step begins with, and what lies between a layer's matrix products: residual and RMSNorm, SiLU times up."""

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SILU_BLOCK = 1024


@triton.jit
def _add_rms_norm(
    x, residual, weight, output, eps, N: tl.constexpr, NP: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr
):
    """A program a row; NP: N rounded up to a power of two."""
    column = tl.arange(0, NP)
    inside = column < N
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    line = tl.program_id(0).to(tl.int64) * N + column
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + line, mask=inside, other=0.0)
    if ADD:
        value = (value.to(tl.float32) + tl.load(residual + line, mask=inside, other=0.0).to(tl.float32)).to(value.dtype)
    tl.store(residual + line, value, mask=inside)
    wide = value.to(tl.float32)
    normal = wide * tl.rsqrt(tl.sum(wide * wide, 0) / N + eps) * gain
    tl.store(output + line, normal.to(output.dtype.element_ty), mask=inside)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, output: Tensor, *, pdl: bool, add: bool = True
) -> None:
    """residual += x in place, or = x without `add`; output = residual / rms(residual) * weight. All [T, N]."""
    rows, columns = x.shape
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert output.is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    _add_rms_norm[(rows,)](
        x, residual, weight, output, eps, N=columns, NP=triton.next_power_of_2(columns), ADD=add, PDL=pdl,
        num_warps=4 if columns <= 4096 else 8, **options,
    )  # fmt: skip


@triton.jit
def _silu_multiply(gate_up, output, N, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, blocks of N)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < N
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up + row * 2 * N + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * N + N + column, mask=inside, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + row * N + column, product.to(output.dtype.element_ty), mask=inside)


def silu_multiply(gate_up: Tensor, output: Tensor, *, pdl: bool) -> None:
    """output [T, N] = silu(gate) * up of gate_up [T, 2 x N], gate first."""
    rows, columns = output.shape
    assert gate_up.is_contiguous()
    assert output.is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    grid = (rows, triton.cdiv(columns, SILU_BLOCK))
    _silu_multiply[grid](gate_up, output, columns, BLOCK=SILU_BLOCK, PDL=pdl, num_warps=4, **options)


@triton.jit
def _begin(
    token_ids, positions, matrix, table, update, residual, angles, N: tl.constexpr, NP: tl.constexpr, D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program a token."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, NP)
    inside = column < N
    dim = tl.arange(0, D)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(token_ids + row).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    value = tl.load(matrix + token * N + column, mask=inside, other=0.0)
    angle = tl.load(table + position * D + dim)
    tl.store(update + row * N + column, value, mask=inside)
    tl.store(residual + row * N + column, tl.zeros_like(value), mask=inside)
    tl.store(angles + row * D + dim, angle)


def begin(
    token_ids: Tensor,
    positions: Tensor,
    matrix: Tensor,
    table: Tensor,
    update: Tensor,
    residual: Tensor,
    angles: Tensor,
    *,
    pdl: bool,
) -> None:
    """update [T, N]: rows token_ids, [T], of matrix [vocabulary, N]; residual [T, N]: zeros; angles [T, 2, D / 2]: rows
    positions, [T], of table [positions, 2, D / 2], D a power of two."""
    rows, columns = update.shape
    assert matrix.is_contiguous()
    assert table.is_contiguous()
    assert update.is_contiguous()
    assert residual.is_contiguous()
    assert angles.is_contiguous()
    options = {"launch_pdl": True} if pdl else {}
    _begin[(rows,)](
        token_ids, positions, matrix, table, update, residual, angles, N=columns, NP=triton.next_power_of_2(columns),
        D=table.shape[1] * table.shape[2], PDL=pdl, num_warps=4, **options,
    )  # fmt: skip
