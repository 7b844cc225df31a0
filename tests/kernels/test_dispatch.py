"""Dispatch: which implementation runs, and the reason given for it."""

import types

import pytest
import torch

import kernels.tiles
from kernels import alternatives, cases, dispatch
from kernels.dispatch import MODULES, Choice, Ops, has_c_compiler, select
from model import gpt2

OPS = ("attention", "layer_norm", "add_layer_norm", "gelu", "bias_gelu", "linear_cross_entropy")


@pytest.fixture
def on_a_gpu(monkeypatch) -> dict[str, types.SimpleNamespace]:
    """Fakes a machine with an sm_90 GPU. Its ops are stand-ins, which are chosen but never run."""
    modules = {
        op: types.SimpleNamespace(**{f"{op}_torch": f"{op} on torch", f"{op}_triton": f"{op} on triton"}) for op in OPS
    }
    monkeypatch.setattr(dispatch, "MODULES", modules)
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "has_c_compiler", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for module in (dispatch, kernels.tiles):
        monkeypatch.setattr(module, "INTERPRETED", False)
    return modules


@pytest.fixture
def without_a_gpu(monkeypatch) -> None:
    """Fakes a machine with Triton and a C compiler, without a GPU and without the interpreter."""
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_op_has_a_definition_and_two_implementations():
    assert tuple(MODULES) == OPS
    for op, module in MODULES.items():
        assert callable(getattr(module, f"{op}_reference"))
        assert callable(getattr(module, f"{op}_torch"))
        assert callable(getattr(module, f"{op}_triton"))


def test_the_package_is_the_door_to_the_choice_and_has_nothing_else():
    from kernels import Choice as ChoiceOfDoor
    from kernels import Ops as OpsOfDoor
    from kernels import select as select_of_door

    assert (select_of_door, OpsOfDoor, ChoiceOfDoor) == (select, Ops, Choice)
    with pytest.raises(ImportError, match="cannot import name 'selekt'"):
        from kernels import selekt  # noqa: F401
    for op in OPS:
        assert f"{op}(" in Ops.__doc__


def test_a_device_that_pytorch_does_not_know_is_a_value_error():
    with pytest.raises(ValueError, match=r"kernels: the device must be one of PyTorch, .*, got 'gpu'"):
        select("auto", "gpu", torch.float32, 64)


def test_torch_takes_pytorch_for_every_op():
    ops = select("torch", "cpu", torch.float32, 64)
    for op, module in MODULES.items():
        assert getattr(ops, op) is getattr(module, f"{op}_torch")
    assert ops.choices == tuple(Choice(op, "torch", "asked for") for op in OPS)


def test_torch_is_taken_even_where_triton_can_run(on_a_gpu):
    ops = select("torch", "cuda", torch.bfloat16, 64)
    assert ops.attention == "attention on torch"
    assert {choice.implementation for choice in ops.choices} == {"torch"}


def test_auto_on_a_cpu_takes_pytorch_and_says_why(without_a_gpu):
    ops = select("auto", torch.device("cpu"), torch.float32, 64)
    for op in OPS:
        assert getattr(ops, op) is getattr(MODULES[op], f"{op}_torch")
    assert ops.choices == tuple(Choice(op, "torch", "no CUDA device") for op in OPS)


def test_auto_takes_triton_where_it_can_run(on_a_gpu):
    ops = select("auto", "cuda", torch.bfloat16, 64)
    assert [getattr(ops, op) for op in OPS] == [f"{op} on triton" for op in OPS]
    assert {str(choice).split(maxsplit=1)[1] for choice in ops.choices} == {"triton: sm_90"}


OBSTACLES = [
    pytest.param("cpu", torch.float32, 64, OPS, "the tensors are on cpu", id="a CPU beside a GPU"),
    pytest.param("cuda", torch.float64, 64, OPS, "float64 is not float32, bfloat16 or float16", id="float64"),
    pytest.param("cuda", torch.bfloat16, 12, ("attention",), "head_dim 12 < 16", id="narrow heads"),
    pytest.param("cuda", torch.bfloat16, 257, ("attention",), "head_dim 257 > 256", id="wide heads"),
]


@pytest.mark.parametrize(("device", "dtype", "head_dim", "stopped", "reason"), OBSTACLES)
def test_auto_goes_around_an_obstacle_and_names_it(on_a_gpu, device, dtype, head_dim, stopped, reason):
    for choice in select("auto", device, dtype, head_dim).choices:
        assert choice.implementation == ("torch" if choice.op in stopped else "triton")
        assert (reason in choice.reason) == (choice.op in stopped)


@pytest.mark.parametrize(("device", "dtype", "head_dim", "stopped", "reason"), OBSTACLES)
def test_triton_where_it_cannot_run_is_an_error_with_the_reason(on_a_gpu, device, dtype, head_dim, stopped, reason):
    with pytest.raises(
        ValueError, match=f'the triton backend must .*{stopped[0]} cannot: .*{reason}.*use "auto" or "torch"'
    ):
        select("triton", device, dtype, head_dim)


@pytest.mark.parametrize("head_dim", [16, 80, 256], ids=["narrowest", "no power of two", "widest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_takes_every_contracted_size_and_dtype(on_a_gpu, dtype, head_dim):
    assert select("triton", "cuda", dtype, head_dim).attention == "attention on triton"


MISSING = [
    pytest.param(dispatch, "HAS_TRITON", False, "Triton is not installed", id="no Triton"),
    pytest.param(torch.cuda, "is_available", lambda: False, "no CUDA device", id="no GPU"),
    pytest.param(torch.cuda, "get_device_capability", lambda device: (7, 5), "sm_75 < sm_80", id="an old GPU"),
    pytest.param(dispatch, "has_c_compiler", lambda: False, "no C compiler", id="no C compiler"),
]


@pytest.mark.parametrize(("owner", "name", "value", "reason"), MISSING)
def test_a_machine_that_lacks_something_runs_pytorch_and_says_what(on_a_gpu, monkeypatch, owner, name, value, reason):
    monkeypatch.setattr(owner, name, value)
    for choice in select("auto", "cuda", torch.bfloat16, 64).choices:
        assert choice.implementation == "torch"
        assert choice.reason.startswith(reason)
    with pytest.raises(ValueError, match=f"attention cannot: {reason}"):
        select("triton", "cuda", torch.bfloat16, 64)


def test_a_compiler_named_by_cc_counts(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not has_c_compiler()
    compiler = tmp_path / "mycc"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert has_c_compiler()


def test_triton_on_a_cpu_is_an_error_with_the_shipped_ops(without_a_gpu):
    with pytest.raises(
        ValueError, match="kernels: the triton backend must be able to run every op, attention cannot: no CUDA device"
    ):
        select("triton", "cpu", torch.float32, 64)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="kernels run natively here")
def test_the_interpreter_runs_only_when_triton_is_asked_for():
    ops = select("triton", "cpu", torch.float32, 64)
    assert {str(choice).split(maxsplit=1)[1] for choice in ops.choices} == {"triton: interpreter"}
    assert {choice.implementation for choice in select("auto", "cpu", torch.float32, 64).choices} == {"torch"}
    with pytest.raises(ValueError, match="attention cannot: Triton's interpreter computes bfloat16 wrongly"):
        select("triton", "cpu", torch.bfloat16, 64)


@pytest.mark.parametrize("backend", ["cuda", "Triton", "", None], ids=repr)
def test_an_unknown_backend_is_rejected(backend):
    with pytest.raises(ValueError, match=f'the backend must be "auto", "triton" or "torch", got {backend!r}'):
        select(backend, "cpu", torch.float32, 64)


def test_the_explanation_is_one_line_per_op():
    lines = select("auto", "cpu", torch.float32, 64).explain().splitlines()
    assert [line.split()[0] for line in lines] == list(OPS)
    assert all(line.split()[1] == "torch:" and len(line.split(": ", 1)[1]) > 5 for line in lines)


def test_ops_name_the_same_ops_as_the_modules():
    assert tuple(name for name in Ops.__dataclass_fields__ if name != "choices") == tuple(MODULES)


def test_auto_takes_what_was_tuned_and_says_so(on_a_gpu, monkeypatch):
    tuned = {"attention": "cudnn", "gelu": "torch", "layer_norm": "triton"}
    ops = select("auto", "cuda", torch.bfloat16, 64, tuned=tuned)
    assert ops.attention is alternatives.attention_cudnn
    assert (ops.gelu, ops.layer_norm) == ("gelu on torch", "layer_norm on triton")
    chosen = {choice.op: (choice.implementation, choice.reason) for choice in ops.choices}
    assert chosen["attention"] == ("cudnn", "tuned")
    assert chosen["bias_gelu"] == ("triton", "sm_90")


@pytest.mark.parametrize(("backend", "implementation"), [("triton", "triton"), ("torch", "torch")])
def test_a_backend_that_was_asked_for_heeds_no_tuning(on_a_gpu, backend, implementation):
    ops = select(backend, "cuda", torch.bfloat16, 64, tuned={"attention": "cudnn"})
    assert ops.attention == f"attention on {implementation}"


def test_an_op_that_failed_its_check_runs_on_pytorch_with_the_reason(on_a_gpu):
    why = "its self-check failed: dqkv is off by 0.5"
    ops = select("auto", "cuda", torch.bfloat16, 64, failed={"attention": why}, tuned={"attention": "triton"})
    assert ops.attention == "attention on torch"
    assert ops.choices[0] == Choice("attention", "torch", why)
    with pytest.raises(ValueError, match=r"attention cannot: its self-check failed: dqkv is off by 0\.5"):
        select("triton", "cuda", torch.bfloat16, 64, failed={"attention": why})


SLOW = [
    pytest.param(torch.bfloat16, 64, 0.1, (9, 0), "random bits cost our kernels five times", id="dropout"),
    pytest.param(torch.float32, 64, 0.0, (8, 0), "slow in float32", id="float32"),
    pytest.param(torch.bfloat16, 80, 0.0, (8, 0), "pad head_dim 80 to 128", id="80 wide"),
    pytest.param(torch.bfloat16, 96, 0.0, (8, 0), "pad head_dim 96 to 128", id="96 wide"),
    pytest.param(torch.bfloat16, 128, 0.0, (9, 0), "at head_dim 128 on sm_90", id="128 wide on sm_90"),
]


@pytest.mark.parametrize(("dtype", "head_dim", "dropout_p", "capability", "reason"), SLOW)
def test_auto_takes_pytorch_s_attention_where_ours_is_slow_by_count(
    on_a_gpu, monkeypatch, dtype, head_dim, dropout_p, capability, reason
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    ops = select("auto", "cuda", dtype, head_dim, dropout_p=dropout_p)
    assert (ops.attention, ops.bias_gelu) == ("attention on torch", "bias_gelu on triton")
    assert ops.choices[0].reason.startswith("SDPA, ")
    assert reason in ops.choices[0].reason
    assert select("triton", "cuda", dtype, head_dim, dropout_p=dropout_p).attention == "attention on triton"
    tuned = {"attention": "triton"}
    assert select("auto", "cuda", dtype, head_dim, dropout_p=dropout_p, tuned=tuned).attention == "attention on triton"


def test_auto_takes_our_attention_at_the_widths_where_it_is_not_padded(on_a_gpu, monkeypatch):
    for head_dim, capability in ((16, (9, 0)), (64, (9, 0)), (128, (8, 0))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None, got=capability: got)
        assert select("auto", "cuda", torch.bfloat16, head_dim).attention == "attention on triton"


def test_the_model_tells_dispatch_its_dropout(monkeypatch):
    seen = []
    monkeypatch.setattr(gpt2, "select", lambda *args, **options: seen.append(options["dropout_p"]) or select(*args))
    gpt2.GPT2(gpt2.GPT2Config(1, 1, 16, 8, 50, dropout=0.25))
    assert seen == [0.25]


@pytest.mark.parametrize("name", ["cudnn", "efficient"])
def test_a_single_position_is_left_to_pytorch_by_a_backend_that_may_refuse_it(name):
    qkv = torch.randn(2, 1, 3, 2, 16)
    alternative = dispatch.implementation("attention", name)
    torch.testing.assert_close(alternative(qkv), dispatch.implementation("attention", "torch")(qkv))


def test_every_alternative_gives_its_op_s_result():
    torch.manual_seed(0)
    sizes = cases.Sizes(B=2, T=5, H=2, D=16, V=61, Vp=64)
    for op, names in dispatch.ALTERNATIVES.items():
        options = {"vocab_size": sizes.V} if op == "linear_cross_entropy" else {}
        inputs = cases.with_gradients(cases.inputs_of(op, sizes, torch.float64, torch.device("cpu")))
        expected = dispatch.implementation(op, "reference")(*inputs, **options)
        for name in set(names) - {"cudnn", "efficient"}:  # which a CPU has not
            torch.testing.assert_close(dispatch.implementation(op, name)(*inputs, **options), expected)


def test_a_pinned_backend_makes_no_break_in_a_compiled_graph():
    qkv = torch.randn(2, 5, 3, 2, 16)
    compiled = torch.compile(alternatives.attention_flash, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(qkv), alternatives.attention_math(qkv))
