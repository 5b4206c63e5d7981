"""Products with matrices of codes that share scales, against the same values in fp64, which are exact."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vibe_sgl_lite.model_worker.gpu.grouped_matrix import FEW_ROWS, MOST_ROWS, GroupedFormat, GroupedMatrix
from vibe_sgl_lite.model_worker.gpu.kernels.fp8_product import encode_groups
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_gemv import GEMV_OUTPUTS, GemvTiles, grouped_gemv
from vibe_sgl_lite.model_worker.gpu.kernels.grouped_product import GroupedTiles, grouped_product, plain_matrix
from vibe_sgl_lite.model_worker.quantized_files import Codes

DTYPES = (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def codes_of(
    bits: int, outputs: int, inputs: int, group: int, device: torch.device, *, shuffled: bool = False
) -> Codes:
    """Random ones; the first groups have the zeros and codes that are the most there may be, or e4m3's least."""
    group_of = torch.arange(inputs, device=device) // group
    if shuffled:
        group_of = group_of[torch.randperm(inputs, device=device)]
    groups = int(group_of.max()) + 1
    scales = (torch.rand((outputs, groups), device=device) + 0.5) * 0.1 * inputs**-0.5
    if bits == 8:
        codes = torch.randint(0, 256, (outputs, inputs), device=device).to(torch.uint8)
        codes = torch.where((codes & 0x7F) == 0x7F, 0, codes)
        codes[0] = torch.tensor([1, 0x81, 0x7E, 0xFE, 0, 0x80, 7, 8], device=device).repeat(-(-inputs // 8))[:inputs]
        return Codes(codes.view(torch.float8_e4m3fn), scales / 30, None, group_of, 8)
    codes = torch.randint(0, 16, (outputs, inputs), device=device).to(torch.int32)
    zeros = torch.randint(0, 17, (outputs, groups), device=device).to(torch.int32)
    codes[0], zeros[0], codes[1], zeros[1] = 0, 16, 15, 0
    return Codes(codes, scales.half(), zeros, group_of, 4)


def kept(codes: Codes, *more: Codes) -> GroupedMatrix:
    matrix = GroupedFormat(codes.bits, codes.codes.device).of_codes([codes, *more])
    assert matrix is not None
    return matrix


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "rows", "outputs", "inputs", "group"),
    [
        (4, 3, 70, 384, 128),
        (8, 1, 72, 320, 128),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (4, 1, 72, 320, 32),
                (4, 1, 40, 4352, 128),  # which programs share, as it comes
                (8, 1, 40, 4352, 128),
                (4, 4, 64, 80, 16),
                (4, 17, 200, 640, 64),
                (4, 33, 130, 1024, 512),
                (8, 5, 200, 256, 128),
                (8, 33, 130, 192, 64),
            )
        ),
    ],
)
def test_products(
    bits: int, rows: int, outputs: int, inputs: int, group: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Sides that are no whole tiles, splits that are uneven; twice, for the second finds what the first left behind."""
    codes = codes_of(bits, outputs, inputs, group, device)
    matrix, x = kept(codes), torch.randn((rows, inputs), device=device).to(dtype)
    expected = x.double() @ codes.plain().double().T
    for _ in range(2):
        close(matrix.multiply(x), expected)
    output = torch.empty((rows, outputs), dtype=dtype, device=device)
    splits = GemvTiles(2, 2, splits=-(-matrix.codes.units // 2))
    gemv = GemvTiles(2, 2), GemvTiles(8, 2, 3), splits  # in chunks, the last not whole; in turns
    for cut in (GroupedTiles(16, 64, 3, 4, 3), *(gemv if rows == 1 else ())):
        multiply(x, matrix, output.fill_(0), cut)
        close(output, expected)
    assert not matrix.scratch.arrived.any()
    assert torch.equal(plain_matrix(matrix.codes, torch.float32, pdl=False), codes.plain())
    size = matrix.codes.words.numel() * 2
    assert matrix.nbytes == size + size * 8 // bits // matrix.codes.group * 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "outputs", "inputs"),
    [
        *((1, 4100, 5376), (1, 4100, 4096), (1, 8500, 4096), (4, 8500, 4096), (9, 4100, 5376), (9, 8500, 4096)),
        *((33, 4100, 5376), (200, 4100, 5376), (MOST_ROWS + 1, 4100, 5376)),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_products_on_a_card(
    bits: int, rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> None:
    """With the instructions for two numbers, in every cut: inputs in chunks, at once, and tiles that are shared."""
    codes = codes_of(bits, outputs, inputs, 128, device)
    matrix, x = kept(codes), torch.randn((rows, inputs), device=device).to(dtype)
    plain, tolerance = codes.plain().double(), TOLERANCE[dtype]
    expected = x.double() @ plain.T
    error = (matrix.multiply(x).double() - expected).abs()
    if rows > MOST_ROWS:  # a plain matrix in `dtype`, and the library may round parts of sums to it
        tolerance *= 3
    assert bool((error <= tolerance * (expected.abs() + plain.norm(dim=1))).all())


Cut = GemvTiles | GroupedTiles


def multiply(x: torch.Tensor, matrix: GroupedMatrix, output: torch.Tensor, cut: Cut, **around: Any) -> None:
    if isinstance(cut, GemvTiles):
        grouped_gemv(x, matrix.codes, output, cut, matrix.scratch, pdl=False, **around)
    else:
        grouped_product(x, matrix.codes, output, cut, matrix.scratch, pdl=False, **around)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("rows", "added", "cuts"),
    [
        (1, GemvTiles(4, 4), (GemvTiles(4, 4), GemvTiles(4, 4, 5), GemvTiles(2, 2))),
        (1, GemvTiles(1, 1, splits=2), (GemvTiles(2, 2, splits=2), GemvTiles(1, 1, splits=3))),
        (5, GroupedTiles(8, 64, 2, 4, 2), (GroupedTiles(8, 64, 1, 4, 2), GroupedTiles(8, 64, 3, 4, 2))),
    ],
)
def test_products_with_norm_sum_and_silu(
    bits: int, rows: int, added: Cut, cuts: tuple[Cut, ...], device: torch.device
) -> None:
    """As a layer runs them: a sum into the stream, a product of its norm with SiLU."""
    inputs, width, inner, eps = 256, 192, 96, 1e-3
    down, gate_up = codes_of(bits, width, inputs, 128, device), codes_of(bits, 2 * inner, width, 64, device)
    x, stream = torch.randn((rows, inputs), device=device), torch.randn((rows, width), device=device)
    gain = torch.rand(width, device=device) + 0.5
    gained, output = torch.full_like(stream, float("nan")), torch.empty((rows, inner), device=device)
    tile = GEMV_OUTPUTS if isinstance(added, GemvTiles) else added.outputs
    squares = torch.full((rows, width // tile), float("nan"), device=device)
    expected = stream.double() + x.double() @ down.plain().double().T
    multiply(x, kept(down), stream, added, gain=gain, gained=gained, new_squares=squares)
    close(stream, expected)
    close(gained, expected * gain.double())
    torch.testing.assert_close(squares.double().sum(1), (expected**2).sum(1), atol=1e-4, rtol=1e-5)
    normal = F.rms_norm(expected, (width,), gain.double(), eps) @ gate_up.plain().double().T
    expected = F.silu(normal[:, :inner]) * normal[:, inner:]
    matrix = kept(gate_up)
    for cut in cuts:
        multiply(gained, matrix, output, cut, squares=squares, eps=eps, silu=True)
        close(output, expected)


def test_inputs_of_groups_in_another_order(device: torch.device) -> None:
    codes, x = codes_of(4, 72, 256, 32, device, shuffled=True), torch.randn((3, 256), device=device)
    matrix = kept(codes)
    close(matrix.multiply(x), x.double() @ codes.plain().double().T)
    assert torch.equal(plain_matrix(matrix.codes, torch.float32, pdl=False), codes.plain())
    close(matrix.multiply(x.repeat(100, 1)), (x.double() @ codes.plain().double().T).repeat(100, 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_below_each_other_and_slices_off_group_bounds(bits: int, device: torch.device) -> None:
    parts = [codes_of(bits, outputs, 256, 128, device) for outputs in (40, 24)]
    plain = torch.cat([part.plain() for part in parts])
    assert torch.equal(plain_matrix(kept(*parts).codes, torch.float32, pdl=False), plain)

    def cut(first: int, last: int) -> Any:
        part, columns = parts[0], slice(first, last)
        return Codes(part.codes[:, columns], part.scales, part.zeros, part.group_of[columns], bits)

    matrix = kept(cut(64, 256))
    assert matrix.codes.group == 64
    assert torch.equal(plain_matrix(matrix.codes, torch.float32, pdl=False), plain[:40, 64:])
    assert GroupedFormat(bits, device).of_codes([cut(60, 256)]) is None
    assert GroupedFormat(bits, device).of_codes([cut(0, 128), cut(128, 256)]) is None


def test_a_plain_matrix_loses_as_much_as_its_format_says(device: torch.device) -> None:
    plain = torch.randn((200, 320), device=device)
    for bits, most in ((4, 0.12), (8, 0.03)):
        matrix = GroupedFormat(bits, device)(plain)
        error = (plain_matrix(matrix.codes, torch.float32, pdl=False) - plain).norm() / plain.norm()
        assert most / 3 < float(error) < most


def test_e4m3_without_a_number_is_refused(device: torch.device) -> None:
    codes = codes_of(8, 24, 128, 128, device)
    codes.codes.view(torch.uint8)[3, 5] = 0xFF
    with pytest.raises(ValueError, match="no numbers"):
        GroupedFormat(8, device).of_codes([codes])


def test_rows_in_e4m3_have_a_scale_for_each_128_inputs(device: torch.device) -> None:
    x = torch.randn((3, 320), device=device)
    codes = torch.empty((3, 384), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty((3, 3), device=device)
    encode_groups(x, codes, scales, pdl=False)
    whole = F.pad(x, (0, 64)).view(3, 3, 128)
    torch.testing.assert_close(scales.t() * 448, whole.abs().amax(2), rtol=1e-6, atol=0)
    in_order = codes.float().view(3, 3, 64, 2).transpose(2, 3).reshape(3, 3, 128)
    assert torch.equal(in_order, (whole / scales.t()[..., None]).to(torch.float8_e4m3fn).float())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [FEW_ROWS + 1, 300])
def test_e4m3_through_the_cards_own_units(rows: int, device: torch.device) -> None:
    """As closely as rows in e4m3 allow."""
    plain, x = torch.randn((2, 1100, 1024), device=device).bfloat16()
    matrix = GroupedFormat(8, device)(plain)
    assert matrix.blocks is not None
    expected = x[:rows].double() @ plain_matrix(matrix.codes, torch.float32, pdl=False).double().T
    error = (matrix.multiply(x[:rows]).double() - expected).norm() / expected.norm()
    assert 1e-3 < float(error) < 0.04


def test_new_values_take_the_place_of_others(device: torch.device) -> None:
    """Where graphs find them."""
    codes, other = codes_of(4, 72, 256, 128, device), codes_of(4, 72, 256, 128, device)
    matrix = kept(codes)
    place = matrix.codes.words.data_ptr()
    matrix.take(kept(other))
    assert torch.equal(plain_matrix(matrix.codes, torch.float32, pdl=False), other.plain())
    matrix.refill(other.plain() * 2)
    error = plain_matrix(matrix.codes, torch.float32, pdl=False) - other.plain() * 2
    assert float(error.norm() / other.plain().norm()) < 0.2
    assert matrix.codes.words.data_ptr() == place
    with pytest.raises(ValueError, match="groups of inputs are others"):
        matrix.take(kept(codes_of(4, 72, 256, 64, device)))
