"""Every op as compiled code, on the emulator: right by the bounds of tolerances.py, and without a problem."""

import pytest
from cases import CASES
from emulate import emulate  # noqa: F401  (a fixture)
from translate import Program, Unsupported

COMMON = [
    ("sm_90", "attention T=100 D=64 bf16"),
    ("sm_90", "attention T=300 D=64 bf16 one launch"),
    ("sm_90", "attention T=300 D=64 bf16 polynomial"),
    ("sm_90", "attention T=300 D=64 bf16 documents"),
    ("sm_90", "layer_norm 6x768 bf16"),
    ("sm_90", "add_layer_norm 9x33 bf16"),
    ("sm_90", "gelu 5x77 bf16"),
    ("sm_90", "bias_gelu 5x77 bf16"),
    ("sm_90", "cross_entropy 4x50257 bf16"),
    ("sm_90", "cross_entropy 2x50257 bf16 no grad"),
    ("sm_90", "cross_entropy 6x128 bf16"),
    ("sm_90", "attention T=100 D=64 bf16 dropout"),  # all of sm_80, in a process of its own, is slow
]
KERNELS = {
    "_attention_fwd_kernel", "_attention_bwd_dq_kernel", "_attention_bwd_dkdv_kernel", "_layer_norm_fwd_kernel",
    "_layer_norm_bwd_kernel", "_column_sum_kernel", "_gelu_fwd_kernel", "_gelu_bwd_kernel", "_bias_gelu_fwd_kernel",
    "_bias_gelu_bwd_kernel", "_cross_entropy_kernel",
}  # fmt: skip


def runs() -> list:
    """Every case on every target; those that are not in COMMON are slow."""
    every = []
    for target in ("sm_90", "sm_80"):
        for case in CASES:
            marks = [] if (target, case) in COMMON else [pytest.mark.slow]
            every.append(pytest.param(target, case, marks=marks, id=f"{target}-{case}"))
    return every


@pytest.mark.parametrize(("target", "case"), runs())
def test_the_compiled_op_is_accurate_and_has_no_problem(emulate, target, case):  # noqa: F811
    report = emulate(target, case=case)
    assert report["problems"] == []
    assert report["failure"] == ""


def test_every_kernel_is_among_them(emulate):  # noqa: F811
    launched = {name for target, case in COMMON if target == "sm_90" for name in emulate(target, case=case)["launches"]}
    assert launched >= KERNELS


@pytest.mark.parametrize(
    ("target", "case"),
    [
        ("sm_90", "attention T=300 D=64 bf16"),
        ("sm_90", "bias_gelu 7x3072 bf16"),
        ("sm_90", "layer_norm 9x33 bf16"),
        *(
            pytest.param(target, case, marks=pytest.mark.slow)
            for target in ("sm_80", "sm_90")
            for case in (
                "attention T=257 D=64 bf16 full",
                "attention T=100 D=64 bf16 dropout",
                "layer_norm 5x12288 bf16",
            )
        ),
    ],
)
def test_programs_and_warps_in_any_order_give_the_same_bits(emulate, target, case):  # noqa: F811
    reports = [emulate(target, case=case, order=order) for order in range(4)]
    assert [report["problems"] for report in reports] == [[]] * 4
    assert {report["digest"] for report in reports} == {reports[0]["digest"]}
    assert reports[0]["digest"]


def test_an_instruction_that_the_emulator_does_not_know_is_named():
    kernel = ".visible .entry k(\n\t.param .u64 k_param_0\n)\n.reqntid 32\n{\n\t.reg .b64 %rd<2>;\n"
    kernel += "\tld.param.b64 %rd1, [k_param_0];\n\tatom.global.add.u64 %rd1, [%rd1], 1;\n\tret;\n}\n"
    with pytest.raises(Unsupported, match=r"PTX line 8: atom\.global\.add\.u64"):
        Program(kernel)
