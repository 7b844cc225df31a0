"""Attention's variants, off by default: each computes what the default kernels compute."""

import math

import pytest
import torch
from test_attention import compare, inputs
from tolerances import (
    DEVICE,
    assert_bitwise,
    poisoned_memory,  # noqa: F401  (a fixture)
    set_tiles,  # noqa: F401  (a fixture)
    values_and_gradients,
)

import kernels.tiles
from kernels.attention import attention_triton
from kernels.attention_kernels import _exp2_polynomial
from kernels.launch import tl, triton
from kernels.tiles import FIELDS, TABLE, VARIANTS

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SETTINGS = [{"PAIR_BLOCKS": 1}, {"ONE_LAUNCH": 1}, {"EXP2_POLYNOMIAL": 1, "maxnreg": 128}]


def choose(set_tiles, settings: dict[str, int], owned=16, step=16) -> None:  # noqa: F811
    """Gives every attention kernel one tile, and those variants of `settings` that it has."""

    def lookup(name, arch, size):
        kernel = name.partition("/")[0]
        blocks = (step, owned) if kernel == "attention_bwd_dkdv" else (owned, step)
        tile = dict(zip(FIELDS[kernel], (*blocks, 4, 2), strict=True))
        return tile | {constant: value for constant, value in settings.items() if constant in VARIANTS.get(name, {})}

    set_tiles(lookup)


def launched_with(settings: dict[str, int]) -> bool:
    return any(settings.items() <= config.items() for config in kernels.tiles.used().values())


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("T", [33, 49], ids=["an odd number of blocks", "an even number of blocks"])
def test_a_variant_matches_reference(T, settings, set_tiles):  # noqa: F811
    choose(set_tiles, settings)
    compare(attention_triton, *inputs((1, T, 2, 19), torch.float16))
    assert launched_with(settings)


@pytest.mark.parametrize(("is_causal", "dropout_p"), [(True, 0.3), (False, 0.0)], ids=["causal, dropout", "full"])
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_who_computes_a_block_changes_no_bit(settings, is_causal, dropout_p, set_tiles):  # noqa: F811
    qkv, dout = inputs((1, 33, 1, 16), torch.float16)
    results = []
    for chosen in ({}, settings):
        choose(set_tiles, chosen)
        torch.manual_seed(0)  # of the dropout mask
        run = lambda x: attention_triton(x, is_causal=is_causal, dropout_p=dropout_p)  # noqa: E731
        results.append(values_and_gradients(run, [qkv], [dout]))
        assert launched_with(chosen)
    assert_bitwise(*results)


def test_every_variant_is_of_a_kernel_in_the_table_and_off_there():
    for name, constants in VARIANTS.items():
        assert name in TABLE
        for constant, values in constants.items():
            assert values[0] == 0, constant
            assert constant not in FIELDS[name.partition("/")[0]]


@triton.jit
def _polynomial_kernel(x_ptr, y_ptr, BLOCK_SIZE: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    tl.store(y_ptr + offsets, _exp2_polynomial(tl.load(x_ptr + offsets)))


def polynomial(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    _polynomial_kernel[(len(x) // 1024,)](x, y, BLOCK_SIZE=1024)
    return y


def test_the_polynomial_is_exp2_to_less_than_half_a_unit_of_16_bit_numbers():
    x = torch.linspace(-126.0, 0.0, 2**18, device=DEVICE)
    error = (polynomial(x).double() / x.double().exp2() - 1).abs().max().item()
    assert error < 1.02e-4 < 2**-12  # float16 keeps 11 bits, bfloat16 8
    integers = torch.arange(-1023.0, 1.0, device=DEVICE)
    near = integers >= -126
    assert torch.equal(polynomial(integers)[near], integers[near].exp2())  # a row's largest score weighs exactly 1


def test_the_polynomial_is_exactly_0_where_a_key_is_masked_and_tiny_before():
    x = torch.full((1024,), -math.inf, device=DEVICE)
    x[1:4] = torch.tensor([-127.0, -1e4, -3e38])
    assert (polynomial(x) == 0).all()
    y = polynomial(torch.linspace(-127.0, -126.0, 2**14, device=DEVICE))
    assert ((y >= 0) & (y <= 2**-126)).all()  # below the smallest normal number
