"""Kernels compiled ahead of time: no spilled register, enough shared memory, tensor cores, wide loads.

A process either interprets or compiles kernels, so these tests compile in processes of their own.
"""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from kernels import aot
from kernels.aot import CASES, SHARED_LIMIT, Row, compile_case
from kernels.launch import HAS_TRITON, INTERPRETED

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton comes for Linux")

TARGETS = ("sm_90",)  # the slow tests compile every case for each target
HEADS = ["attention D=64 bf16"]
REST = ["layer_norm C=768 bf16", "gelu F=3072 bf16", "cross_entropy V=50257 bf16"]
CHILD = f"""
import contextlib, dataclasses, io, json, torch
from kernels import aot, tiles
from kernels.aot import compile_all
found = []
aot.CASES["tile"] = lambda: tiles.with_config("attention_fwd/16bit", 256, torch.device("cpu"), record)
def record(**tile):
    found.append(tile["BLOCK_N"])
for target in ("sm_80", "sm_86"):
    aot.compile_case(target, "tile")
assert found == [64, 32], found  # each target's own, also in one process
rows = []
for made in compile_all({TARGETS!r}, {HEADS + REST!r}, 1):
    rows += [dataclasses.asdict(row) for row in made]
print(json.dumps(rows))
from kernels import attention
attention._attention_fwd_kernel = None  # does not compile
for arguments in (["--only", "nothing"], ["--target", "sm_86", "--only", "D=64 fp16", "--jobs", "1"]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = aot.main(arguments)
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


def run(*args: str, seconds: int = 600, **environment: str) -> subprocess.CompletedProcess:
    """Runs Python at the repository's root, with kernels compiled and not interpreted."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=inherited | environment, capture_output=True, text=True, timeout=seconds
    )


@pytest.fixture(scope="module")
def printed() -> list:
    """What the child said: rows of what compiles, then code, stdout and stderr of the command for what does not."""
    done = run("-c", CHILD)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows(printed) -> list[Row]:
    return [Row(**row) for row in printed[0]]


def test_no_kernel_spills_or_exceeds_shared_memory(rows):
    assert not [str(row) for row in rows if row.problem]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", HEADS)
def test_every_attention_kernel_is_there(rows, target, case):
    kernels = [row.kernel for row in rows if row.target == target and row.case == case]
    assert sorted(kernels) == ["attention_bwd_dkdv", "attention_bwd_dq", "attention_fwd"]


def test_every_matmul_of_attention_is_that_of_the_architectures_tensor_cores(rows):
    newest = {"sm_90": "HGMMA"}  # wgmma
    seen = set()
    for row in rows:
        if row.case in HEADS and row.target.startswith("sm_"):
            assert row.tensor_core.split()[1::2] == [newest.get(row.target, "HMMA")], str(row)
            seen.add(row.target)
    assert seen == {*TARGETS}


def test_memory_is_read_128_bits_at_a_time(rows):
    for row in rows:
        if row.target.startswith("sm_"):
            assert row.wide_loads > 0, str(row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "case", "instruction"),
    [("gfx942", "attention D=64 bf16", "MFMA"), ("sm_90", "attention D=64 bf16 documents", "HGMMA")],
    ids=["AMD", "documents"],
)
def test_attention_compiles_with_matrix_instructions_elsewhere_too(target, case, instruction):
    done = run("-m", "kernels.aot", "--target", target, "--only", case)
    assert done.returncode == 0, done.stderr
    kernels = [line for line in done.stdout.splitlines() if line.startswith("attention")]
    assert {line.split()[0] for line in kernels} == {"attention_fwd", "attention_bwd_dq", "attention_bwd_dkdv"}
    assert all(instruction in line for line in kernels)


def test_every_op_is_a_case():
    assert {case.split()[0] for case in CASES} == {"attention", "layer_norm", "gelu", "cross_entropy"}
    assert {f"attention D={D} bf16" for D in (16, 32, 64, 80, 96, 128, 256)} <= set(CASES)


FITTING = Row("sm_86", "attention_fwd", "attention D=64 bf16", 155, 0, 99 * 1024, "128 HMMA", 28)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"spilled_bytes": 8}, "spills"),
        ({"shared_bytes": 99 * 1024 + 1}, "too much shared memory"),
        ({"failure": "does not compile: CompilationError"}, "does not compile: CompilationError"),
    ],
    ids=["fits to the byte", "one spill", "one byte over", "a failure"],
)
def test_a_row_says_what_is_wrong_with_it(change, problem):
    row = dataclasses.replace(FITTING, **change)
    assert row.problem == problem
    assert str(row).endswith(problem)


@pytest.mark.skipif(not INTERPRETED, reason="kernels run natively here")
def test_nothing_compiles_under_the_interpreter_and_it_says_so():
    with pytest.raises(ValueError, match="TRITON_INTERPRET must be unset"):
        compile_case("sm_90", "gelu F=3072 fp32")
    assert aot.main([]) == 2


@pytest.mark.slow
def test_the_command_prints_a_table_and_exits_with_0():
    done = run("-m", "kernels.aot", "--target", "sm_90", "--only", "gelu F=3072 bf16", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert f"sm_90: at most {SHARED_LIMIT['sm_90']} KiB of shared memory" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines() if "gelu F=3072" in line] == [
        "gelu_fwd", "gelu_bwd", "bias_gelu_fwd", "bias_gelu_bwd", "column_sum",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_case_fits_on_every_target(target):
    done = run("-m", "kernels.aot", "--target", target, seconds=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(any(f" {case} " in line for line in done.stdout.splitlines()) for case in CASES)


def test_the_command_exits_with_1_when_a_kernel_does_not_compile(printed):
    code, out, err = printed[2]
    assert code == 1, out + err
    assert "of the kernels do not fit" in out
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_command_exits_with_1_when_a_tile_spills():
    code = "import sys\nfrom kernels import aot, tiles\n"
    code += "tiles.TABLE['attention_fwd/16bit'] = {'default': {256: (128, 128, 4, 2)}}\n"
    code += "sys.exit(aot.main(['--target', 'sm_86', '--only', 'D=64 fp16', '--jobs', '1']))"
    done = run("-c", code)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "of the kernels do not fit" in done.stdout


def test_an_unknown_case_is_a_sentence_that_lists_them(printed):
    code, _, err = printed[1]
    assert code == 2
    assert err.startswith("kernels.aot: --only must be part of a case, got 'nothing'; the cases are: attention")
