"""Check of torch.compile before the first update. Backends that run uncompiled graphs stand in for Inductor."""

import functools
import json
import re

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from runs import assert_same_run, train
from torch._dynamo.backends.common import aot_autograd

from engine import distributed
from engine.checks import compiler
from engine.checks.compiler import Finding, check, judge
from engine.distributed import Ranks
from engine.errors import DIVERGED
from model import tied
from model.gpt2 import GPT2
from model.presets import GPT2Config

CPU = torch.device("cpu")
ALONE = Ranks(0, 0, 1, CPU)
CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=16, vocab_size=61)
BATCH = tuple(torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))


WRONG = "differs from the uncompiled one by 5.0e-01, at most 1e-03 is allowed"


@pytest.fixture(autouse=True, scope="module")
def one_order():
    """Uncompiled and compiled add the tied matrix's gradients in one order, so that their bits can be compared."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tied, "split", lambda weight: (None, weight))
        yield


def backend(factor: float = 1.0):
    """A compiler whose backward multiplies every gradient of a LayerNorm or bias (1-D) by a factor."""

    def backward(graph, inputs):
        def run(*args):
            return [t * factor if t is not None and t.ndim == 1 else t for t in graph(*args)]

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=backward)


def refuse(graph, inputs):
    raise NotImplementedError("no such operator\nat line 7")


@pytest.fixture(autouse=True)
def no_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def compile_with(monkeypatch):
    """Sets the compiler that torch.compile uses, and forgets what was compiled."""
    compile_ = torch.compile

    def use(with_backend) -> None:
        torch.compiler.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=with_backend))

    yield use
    torch.compiler.reset()


def model(dtype: torch.dtype = torch.float32, **changed) -> GPT2:
    torch.manual_seed(0)
    raw_model = GPT2(GPT2Config(**{**CONFIG.__dict__, **changed}))
    raw_model.configure("torch", dtype)
    return raw_model


def checked(raw_model: GPT2, with_backend) -> Finding:
    torch.compiler.reset()
    return check(torch.compile(raw_model, backend=with_backend, dynamic=False), raw_model, BATCH, ALONE)


def test_the_same_arithmetic_passes_to_the_last_bit():
    assert checked(model(torch.float16), backend()) == Finding(
        True, "checked, loss and gradients are the uncompiled ones to 0e+00"
    )


def test_a_wrong_gradient_is_named_with_error_and_bound():
    finding = checked(model(), backend(1.5))
    assert not finding.is_right
    assert re.fullmatch(f"the gradient of ln_f.(weight|bias) {WRONG}", finding.text)


def test_a_gradient_that_is_not_finite_or_not_made_is_found():
    right = {compiler.LOSS: torch.tensor(1.0), "a": torch.ones(3), "b": torch.ones(3)}
    assert (
        "b differs from the uncompiled one by inf" in judge(right, right | {"b": right["b"] / 0 * 0}, 0.5, ALONE).text
    )
    missing = {name: value for name, value in right.items() if name != "b"}
    assert judge(right, missing, 0.5, ALONE) == Finding(
        False, "b differs from the uncompiled one by 1.0e+00, at most 5e-01 is allowed"
    )


def test_a_wrong_loss_is_found_and_a_gradient_of_next_to_nothing_is_not_judged_by_itself():
    right = {compiler.LOSS: torch.tensor(2.0), "a": torch.ones(3), "b": torch.full((3,), 1e-9)}
    assert judge(right, right | {compiler.LOSS: torch.tensor(2.1)}, 1e-2, ALONE).text.startswith("the loss differs")
    assert judge(right, right | {"b": torch.zeros(3)}, 1e-2, ALONE).is_right
    assert not judge(right, right | {"b": torch.full((3,), 1e-4)}, 1e-2, ALONE).is_right
    infinite = right | {"a": torch.full((3,), float("inf"))}
    assert "unchecked" in judge(infinite, right, 1e-2, ALONE).text


def test_what_another_rank_finds_counts_on_every_rank(monkeypatch):
    right = {compiler.LOSS: torch.tensor(2.0), "a": torch.ones(3)}
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, (True, 0.7, "the gradient of x")])
    assert judge(right, right, 1e-2, ALONE).text.startswith(
        "the gradient of x differs from the uncompiled one by 7.0e-01"
    )


def test_a_compiler_that_raises_is_not_used_and_out_of_memory_is_no_fault_of_it():
    assert checked(model(), refuse).text.startswith("it fails with BackendCompilerFailed: ")

    def full(graph, inputs):
        def run(*args):
            raise MemoryError

        return run

    raw_model = model()
    finding = checked(raw_model, full)
    assert finding == Finding(True, "unchecked, since memory does not suffice for a second set of gradients")
    assert all(p.grad is None for p in raw_model.parameters())


def test_the_bound_is_wider_where_products_are_tf32_s():
    assert compiler.bound_of(torch.float32) == 1e-3
    torch.set_float32_matmul_precision("high")
    assert compiler.bound_of(torch.float32) == compiler.TF32_BOUND == 1e-2
    assert compiler.bound_of(torch.bfloat16) == compiler.BOUNDS[torch.bfloat16]


def test_an_error_of_the_model_itself_is_raised(monkeypatch):
    raw_model = model()
    monkeypatch.setattr(raw_model, "hidden", lambda tokens, table: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checked(raw_model, backend())


def test_dropout_is_not_checked():
    assert "dropout" in checked(model(dropout=0.1), refuse).text


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_wrapped_models_are_checked_and_unwrapped_from_a_wrong_compiler(group, compile_with, parallel):
    def wrapped():
        raw_model = model()
        ranks = Ranks(0, 0, 1, CPU)
        wrapper = distributed.wrap(raw_model, ranks, parallel=parallel, is_compiled=True)
        if parallel == "ddp":
            wrapper = torch.nn.parallel.DistributedDataParallel(wrapper)
        return wrapper, raw_model

    compile_with(backend(1.5))
    wrapper, raw_model = wrapped()
    assert not check(wrapper, raw_model, BATCH, ALONE).is_right
    without = distributed.uncompiled(wrapper)
    assert type(without) is type(wrapper)
    with torch.compiler.set_stance("fail_on_recompile"):  # torch.compile would raise
        torch.compiler.reset()
        right, wrong = (compiler.loss_and_gradients(m, raw_model, BATCH, CPU) for m in (without, raw_model))
    assert all(torch.equal(right[name], wrong[name]) for name in right)


# ---- The run ------------------------------------------------------------------------------------------------------

FLAGS = ("--model.n-layer", "1", "--num-steps", "2", "--eval-every", "None")


@pytest.fixture(scope="module")
def uncompiled_run(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("uncompiled") / "run"
    assert train(out, shards, *FLAGS, "--no-compile") == 0
    return out


def test_a_wrong_compiler_is_named_and_the_run_goes_on_as_without_it(
    uncompiled_run, compile_with, shards, tmp_path, capfd
):
    compile_with(backend(1.5))
    assert train(tmp_path / "run", shards, *FLAGS, "--compile") == 0
    captured = capfd.readouterr()
    assert re.search(f"train: TORCH.COMPILE IS NOT USED: the gradient of .* {WRONG}", captured.err)
    assert re.search(f"compile: off, the gradient of .* {WRONG}: steps run uncompiled", captured.out)
    assert not (tmp_path / "run" / "compile_cache").exists()
    assert_same_run(uncompiled_run, tmp_path / "run")


def test_strict_ends_the_run_with_exit_code_3(compile_with, shards, tmp_path, capfd):
    compile_with(backend(1.5))
    assert train(tmp_path / "run", shards, *FLAGS, "--compile", "--strict") == DIVERGED
    assert "train: the compiled model must train as the uncompiled one, got: the gradient" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "heartbeat").read_text())["state"] == "failed"


def test_the_check_compiles_once_what_trains_and_changes_no_bit(uncompiled_run, compile_with, shards, tmp_path, capfd):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_with(count)
    assert train(tmp_path / "run", shards, *FLAGS, "--compile") == 0
    said = "compile: checked, loss and gradients are the uncompiled ones to 0e+00 (compiled in "
    assert said in capfd.readouterr().out
    assert len(graphs) == 1
    assert_same_run(uncompiled_run, tmp_path / "run")
