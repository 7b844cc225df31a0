"""Self-check before a run: what it finds decides the ops, is remembered, and survives whatever a kernel does."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

import kernels.tiles
from engine import config
from engine.checks import facts, selfcheck
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.tuning import choices
from engine.tuning.record import Setup
from kernels import dispatch
from kernels.dispatch import MODULES

CPU = torch.device("cpu")
WRONG = "its self-check failed: dqkv is off by 3.1e-01, at most 1.0e-02 is allowed"
TINY = config.parse([*SMALL, "--model.n-embd", "32"], "test")

# In place of the process that checks: it passes, fails at, dies at or hangs at an op, as `acts` says.
CHILD = """
import json, os, sys, time
acts = {acts!r}
for op in json.loads(sys.argv[1])["ops"]:
    print(json.dumps({{"op": op, "failure": "unfinished"}}), flush=True)
    act = acts.get(op)
    if act == "dies":
        print("CUDA error: an illegal memory access was encountered", file=sys.stderr)
        os.abort()
    if act == "hangs":
        time.sleep(60)
    print(json.dumps({{"op": op, "failure": act}}), flush=True)
"""


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def play(monkeypatch):
    """Sets what the checking process does at which op."""
    return lambda **acts: monkeypatch.setattr(selfcheck, "CHILD", ("-c", CHILD.format(acts=acts)))


def asked(**changed) -> dict:
    sizes = [1, 5, 1, 16, 61, 64]
    rest = {"precision": "fp32", "tiles": {}, "parameters": "float32", "device": "cpu"}
    return {"ops": ["gelu", "attention"], "sizes": sizes, **rest} | changed


def found(said: list[str] | None = None, **changed) -> dict[str, str]:
    return selfcheck.failures(asked(**changed), [].append if said is None else said.append)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="kernels run natively here")
def test_another_process_passes_the_shipped_kernels():
    said = []
    assert found(said, ops=["layer_norm"]) == {}
    assert said[0].startswith("self-check: 1 of 1 Triton ops agree with their definitions in fp32 (")


def test_what_fails_is_named_and_the_rest_is_used(play):
    play(attention=WRONG)
    assert found() == {"attention": WRONG}


def test_a_kernel_that_kills_its_process_does_not_keep_the_others_from_being_checked(play):
    play(gelu="dies", attention=WRONG)
    failed = found(ops=["gelu", "attention", "bias_gelu"])
    assert failed.keys() == {"gelu", "attention"}
    assert failed["gelu"] == (
        "does not run here: its process ended with SIGABRT: CUDA error: an illegal memory access was encountered"
    )


def test_a_kernel_that_hangs_is_a_failure(play, monkeypatch):
    monkeypatch.setattr(selfcheck, "LIMIT", 1.0)
    play(attention="hangs")
    late = "does not run here: its process did not end within 1 s"
    assert found(ops=["attention", "gelu"]) == {"attention": late}
    play(attention=WRONG, bias_gelu="hangs")
    assert found(ops=["attention", "bias_gelu", "gelu"]) == {"attention": WRONG, "bias_gelu": late}


def test_a_check_that_cannot_be_made_fails_no_kernel(monkeypatch):
    monkeypatch.setattr(selfcheck, "CHILD", ("-c", "raise SystemExit('CUDA-capable device(s) is/are busy')"))
    said = []
    assert found(said) == {}
    assert "not made, its process ended with exit code 1: CUDA-capable device(s) is/are busy" in said[0]


# ---- Memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("acts", [{}, {"attention": WRONG}], ids=["passed", "failed"])
def test_a_check_is_made_once(play, monkeypatch, acts):
    play(**acts)
    first = found()
    monkeypatch.setattr(selfcheck, "check", lambda asked: pytest.fail("checked again"))
    said = []
    assert found(said) == first
    assert said == []


CHANGES = {
    "dtype": lambda patch: {"precision": "tf32"},
    "head_dim": lambda patch: {"sizes": [1, 5, 1, 32, 61, 64]},
    "ops": lambda patch: {"ops": ["gelu"]},
    "code": lambda patch: patch(facts, "code", lambda *packages: "other") or {},
    "versions": lambda patch: patch(facts, "_version", lambda package: "99.0") or {},
    "GPU": lambda patch: patch(facts, "device_name", lambda device: "other") or {},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_another_of_these_is_checked_again(play, monkeypatch, changed):
    play()
    found()
    assert selfcheck.recall(asked()) == {}
    others = CHANGES[changed](monkeypatch.setattr)
    assert selfcheck.recall(asked(**others)) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"facts": {}, "failed": {}}', '{"failed": {}}', "\x00\xff"])
def test_a_damaged_memory_is_checked_again_and_replaced(play, text):
    play()
    found()
    path = selfcheck._path(asked())
    path.write_text(text)
    assert selfcheck.recall(asked()) is None
    assert found() == {}
    assert selfcheck.recall(asked()) == {}


def test_a_memory_that_cannot_be_written_is_no_error(play, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    play()
    assert found() == {}
    assert selfcheck.recall(asked()) is None


def test_what_may_be_gone_the_next_time_is_not_remembered(play):
    play(gelu="does not run here: OutOfMemoryError: CUDA out of memory")
    assert found()
    assert selfcheck.recall(asked()) is None


# ---- The run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch) -> Ranks:
    """Fakes a machine with an sm_90 GPU, on which attention's gradient is wrong."""
    monkeypatch.setattr(dispatch, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "has_c_compiler", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    for module in (dispatch, kernels.tiles):
        monkeypatch.setattr(module, "INTERPRETED", False)
    return Ranks(0, 0, 1, torch.device("cuda", 0))


def choose(gpu: Ranks, kernels: str):
    return choices.ops(config.parse([*SMALL, "--kernels", kernels], "test"), "bf16", gpu, None)


def test_auto_falls_back_for_the_op_that_fails_and_says_by_how_much(gpu, play):
    play(attention=WRONG)
    ops = choose(gpu, "auto")
    assert {c.op for c in ops.choices if c.implementation == "triton"} == set(MODULES) - {"attention"}
    assert f"torch: {WRONG} (attention)" in ops.summary()


def test_triton_ends_with_that_sentence(gpu, play):
    play(attention=WRONG)
    with pytest.raises(BadInput, match=f"train: kernels: .* attention cannot: {WRONG}"):
        choose(gpu, "triton")


def test_what_fails_on_another_host_is_used_on_none(gpu, play, monkeypatch):
    play()
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value, {"gelu": WRONG}])
    assert {c.op for c in choose(gpu, "auto").choices if c.implementation == "torch"} == {"gelu"}


def test_a_backend_that_pytorch_refuses_in_deterministic_mode_is_not_taken_from_a_tuning(gpu, play):
    play()
    tuned = Setup("bf16", 16, ops={"attention": "cudnn"})
    config_ = config.parse([*SMALL], "test")
    chosen = [
        choices.ops(dataclasses.replace(config_, deterministic=is_asked), "bf16", gpu, tuned).choices[0]
        for is_asked in (False, True)
    ]
    assert [choice.implementation for choice in chosen] == ["cudnn", "triton"]


def test_only_ops_on_triton_are_checked(gpu, monkeypatch):
    monkeypatch.setattr(selfcheck, "check", lambda asked: pytest.fail("checked"))
    assert {c.implementation for c in choose(gpu, "torch").choices} == {"torch"}
    monkeypatch.setattr(selfcheck, "request", lambda *_: pytest.fail("asked"))
    choices.ops(TINY, "fp32", Ranks(0, 0, 1, CPU), None)


def test_what_is_asked_for_follows_the_run():
    ops = SimpleNamespace(choices=[dispatch.Choice("gelu", "triton", ""), dispatch.Choice("attention", "torch", "")])

    def of(*flags: str) -> dict:
        return selfcheck.request(config.parse(["gpt2", *flags], "test"), "bf16", ops, CPU)

    assert of()["ops"] == ["gelu"]
    assert of()["sizes"] == (2, 304, 12, 64, 50257, 50304)
    assert of("--context", "1000")["sizes"][1] == 301  # Triton compiles other code where T is no multiple of 16
    assert of()["parameters"] == "float32"
    assert of("--parallel", "fsdp")["parameters"] == "bfloat16"
    json.dumps(of())


def test_doctor_says_what_is_remembered(gpu, play, monkeypatch, capsys):
    from engine import cli
    from engine.checks import doctor

    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    assert cli.main(["doctor"]) == 0
    assert "self-check            not made yet, gpt2 train makes it; --check makes it now" in capsys.readouterr().out
    play(attention=WRONG)
    choices.ops(config.PRESETS["gpt2"], "bf16", gpu, None)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "self-check            failed: attention" in out
    assert f"attention             torch: {WRONG}" in out


def test_doctor_makes_the_check_when_asked_and_train_remembers_it(gpu, play, monkeypatch, capsys):
    from engine import cli
    from engine.checks import doctor

    monkeypatch.setattr(doctor, "_gpus", lambda: [])
    play()
    assert cli.main(["doctor", "--check"]) == 0
    assert "self-check            passed, made now in " in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0
    assert "self-check            passed\n" in capsys.readouterr().out
    play(attention=WRONG)
    assert cli.main(["doctor", "--check"]) == 1  # made again, although one is remembered
    out = capsys.readouterr().out
    assert "self-check            failed: attention" in out
    assert f"attention             torch: {WRONG}" in out
    monkeypatch.setattr(selfcheck, "check", lambda asked: pytest.fail("checked"))
    assert choices.ops(config.PRESETS["gpt2"], "bf16", gpu, None).choices[0].reason == WRONG


def test_a_check_that_doctor_cannot_make_is_a_sentence(gpu, monkeypatch, capsys):
    from engine import cli

    monkeypatch.setattr(selfcheck, "CHILD", ("-c", "raise SystemExit('CUDA-capable device(s) is/are busy')"))
    assert cli.main(["doctor", "--check"]) == 2
    assert "--check needs a GPU that a new process can use, got: its process ended" in capsys.readouterr().err
