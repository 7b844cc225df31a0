"""bench.gpu's training steps without a GPU: turns, memory that runs out, losses that part, the search, the goals."""

import math
import sys
import time
import weakref

import pytest
import torch
from conftest import ROOT
from test_bench_gpu import HostTimer, empty_record, part

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import gpu_batch, gpu_goals, gpu_plan, gpu_step, gpu_tables, gpu_worker

TINY = gpu_step.GPT2Config(1, 1, 16, n_positions=8, vocab_size=61)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A worker whose training steps are a tiny model's, timed on the CPU; the peer that it needs is the reference."""
    monkeypatch.setattr(gpu_step, "PRESETS", {"gpt2": TINY})
    monkeypatch.setattr(gpu_step, "CONTEXT", 8)
    monkeypatch.setattr(gpu_step, "CHUNK", 2)
    monkeypatch.setattr(gpu_step, "CHOICES", ((8, "none"), (4, "block"), (2, "none")))
    monkeypatch.setattr(gpu_step, "SMALL", (2, 8))
    monkeypatch.setattr(gpu_step, "Timer", lambda spacer: HostTimer())
    monkeypatch.setitem(gpu_step.STEPS, "bf16 eager", ("bf16", ("torch eager", "reference eager")))
    worker = gpu_worker.Worker(empty_record(tmp_path), time.time() + 300, dry_run=True)
    worker.dry_run = False
    return worker


STEP_KEYS = {
    *("section", "op", "contestant", "status", "preset", "precision", "context", "batch", "recompute"),
    *("tokens_per_s", "step_ms", "mfu", "peak_gib", "in_turns", "note"),
}


def test_contestants_take_turns_and_make_the_same_updates(trainer, monkeypatch):
    order = []
    advance = gpu_step.Runner.advance

    def noted(runner, updates, timer=None):
        order.append((runner.step.who, updates, timer is not None))
        advance(runner, updates, timer)

    monkeypatch.setattr(gpu_step.Runner, "advance", noted)
    trainer.training(part("step", "bf16 eager"))
    alone = [(1, False), (2, False), (8, True)]
    turn = [(2, False), (11, True)]
    expected = [(who, *step) for who in ("ours", "reference") for step in alone]
    expected += [(who, *step) for _ in range(3) for who in ("ours", "reference") for step in turn]
    assert order == expected
    rows = trainer.record.section("step")
    assert [row["contestant"] for row in rows] == ["torch eager", "reference eager"]
    for row in rows:
        assert row.keys() == STEP_KEYS
        assert (row["status"], row["batch"], row["in_turns"], row["step_ms"]["samples"]) == ("measured", 8, True, 33)
        assert row["tokens_per_s"] == pytest.approx(8 * 8 / row["step_ms"]["median_ms"] * 1e3)
        assert row["mfu"] is None  # of a CPU
    (loss,) = trainer.record.section("loss")
    assert (loss["steps"], loss["batch"], loss["tolerance"]) == (50, 8, 1e-2)
    assert 0.0 < loss["largest_difference"] < 1e-2
    assert loss["losses"][1] < loss["losses"][0]
    assert trainer.record.state["rows"][0]["op"] == "gpt2 bf16"


def test_turns_stop_when_the_time_is_short_and_the_first_times_stay(trainer):
    trainer.deadline = time.time() + 1.0
    trainer.training(part("step", "bf16 eager"))
    rows = trainer.record.section("step")
    assert [(row["in_turns"], row["step_ms"]["samples"]) for row in rows] == [(False, 8)] * 2


def test_what_runs_out_of_memory_is_tried_at_half_the_batch_and_says_so(trainer, monkeypatch):
    loss, runners = gpu_step.TrainingStep.loss, []

    def bounded(step, tokens, targets):
        if step.who == "reference" and len(tokens) > 2:
            runners.append(weakref.ref(step))
            held = torch.empty(1)  # in this frame, which the error's traceback keeps
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {held.numel()} GiB")
        assert not [ref for ref in runners if ref() is not None], "the last one must be gone"
        return loss(step, tokens, targets)

    monkeypatch.setattr(gpu_step.TrainingStep, "loss", bounded)
    trainer.training(part("step", "bf16 eager"))
    ours, reference = trainer.record.section("step")
    assert (ours["batch"], ours["note"]) == (8, "")
    note = "out of memory at B = 8, out of memory at B = 4 with recompute block"
    assert (reference["status"], reference["batch"], reference["note"]) == ("measured", 2, note)
    assert len(runners) == 2
    assert trainer.record.section("loss") == []  # other batches
    assert f"| gpt2 bf16 | reference eager | 2 | {gpu_tables.spread(reference['step_ms'])} |" in trainer.record.table()

    monkeypatch.setattr(gpu_step, "CHOICES", ((8, "none"), (4, "none")))
    trainer.record.state["rows"] = []
    trainer.training(part("step", "bf16 eager"))
    assert trainer.record.section("step")[1]["reason"] == (
        "MemoryError: out of memory at B = 8, out of memory at B = 4"
    )


@pytest.mark.parametrize(("scale", "differ_by"), [(1.0006, "6.0e-04"), (math.nan, "nan"), (1.0004, None)])
def test_losses_that_part_are_a_failed_row(trainer, monkeypatch, scale, differ_by):
    monkeypatch.setitem(sys.modules, "transformers", None)
    enter = gpu_step.Setting.enter
    monkeypatch.setattr(
        gpu_step.Setting, "enter", lambda s, name, *choice: enter(s, name.replace("triton", "torch"), *choice)
    )
    loss, seen = gpu_step.TrainingStep.loss, []

    def other(step, tokens, targets):
        seen.append(step.who)  # its first two losses agree
        return loss(step, tokens, targets) * (scale if seen.count("reference") > 2 else 1.0)

    monkeypatch.setattr(gpu_step.TrainingStep, "loss", other)
    trainer.training(part("loss", "fp32 eager"))
    absent, row = trainer.record.section("loss")
    assert (absent["contestant"], absent["status"]) == ("transformers eager", "skipped")
    assert absent["reason"] == "transformers is not installed"
    assert row["contestant"] == "reference eager against triton eager"
    if differ_by is None:
        assert row["status"] == "measured"
        assert row["largest_difference"] == pytest.approx(4e-4, rel=1e-2)
    else:
        assert row["status"] == "failed"
        assert row["reason"] == f"ArithmeticError: the losses must agree to 5e-04, they differ by up to {differ_by}"
    trainer.record.table()


def test_a_first_loss_that_is_wrong_is_not_timed(trainer, monkeypatch):
    loss = gpu_step.TrainingStep.loss
    monkeypatch.setattr(gpu_step.TrainingStep, "loss", lambda step, *batch: loss(step, *batch) * 1.02)
    trainer.training(part("step", "bf16 eager"))
    for row in trainer.record.section("step"):
        assert row["status"] == "failed"
        assert row["reason"].startswith("ArithmeticError: the first loss must be")
        assert "step_ms" not in row


def test_mfu_is_the_engine_s(trainer, monkeypatch):
    monkeypatch.setattr(gpu_step.metrics, "peak_flops", lambda device, precision: {"bf16": 989e12}.get(precision))
    setting = gpu_step.Setting.new(trainer, part("step", "bf16 eager"), "gpt2", "bf16", 2, 8)
    runner = gpu_step.Runner(None, setting, batch=2, before=0, peak=2**30, losses=[torch.ones(())])
    figures = runner.figures([2.0, 1.0, 3.0])
    flops = gpu_step.metrics.flops_per_token(TINY, 8)
    assert figures["tokens_per_s"] == pytest.approx(2 * 8 / 2e-3)
    assert figures["mfu"] == pytest.approx(figures["tokens_per_s"] * flops / 989e12)
    assert figures["peak_gib"] == 1.0
    runner.losses.append(torch.tensor(math.inf))
    with pytest.raises(ArithmeticError, match="the loss must stay finite"):
        runner.figures([1.0])


@pytest.mark.parametrize("error", [0.5, 0.97, 1.0, 1.4])  # of the guess
def test_the_largest_batch_is_found_between_two_neighbours(error):
    for fits in (*range(8, 400, 8), 4096):
        probed = []

        def probe(batch, fits=fits, probed=probed):
            probed.append(batch)
            return int(fits * error) if batch <= fits else None

        ran, too_large = gpu_batch.largest(probe, 64, 8, 4096, lambda: False)
        assert (ran, too_large) == (fits, None if fits == 4096 else fits + 8)
        assert all(batch % 8 == 0 and 8 <= batch <= 4096 for batch in probed)
        assert len(probed) == len(set(probed)) <= 20
        if error == 0.97 and 80 < fits < 400:
            assert len(probed) <= 6


def test_no_batch_fits_or_the_time_is_over():
    assert gpu_batch.largest(lambda batch: None, 64, 8, 4096, lambda: False) == (None, 8)
    assert gpu_batch.largest(lambda batch: 200, 64, 8, 4096, lambda: True) == (64, None)


def test_the_search_goes_on_after_running_out_of_memory(trainer, monkeypatch):
    monkeypatch.setattr(gpu_batch, "CONTEXT", 8)
    monkeypatch.setattr(gpu_batch, "START", 16)
    monkeypatch.setattr(gpu_batch, "MOST", 64)
    monkeypatch.setattr(gpu_batch.torch.cuda, "mem_get_info", lambda: (0, 0))
    monkeypatch.setattr(gpu_batch, "guess", lambda *_: 48)
    loss = gpu_step.TrainingStep.loss

    def bounded(step, tokens, targets):
        if len(tokens) > 24:
            raise RuntimeError("backend='inductor' raised: CUDA out of memory. Tried to allocate 2 GiB")
        return loss(step, tokens, targets)

    monkeypatch.setattr(gpu_step.TrainingStep, "loss", bounded)
    gpu_batch.search(trainer, gpu_plan.Part("batch", "reference eager", 60))
    (row,) = trainer.record.section("batch")
    assert (row["status"], row["batch"], row["too_large"], row["is_exact"]) == ("measured", 24, 32, True)
    assert "| gpt2 bf16 | reference eager | 24 | 32 |" in trainer.record.table()


def test_memory_above_what_is_kept_grows_with_the_batch():
    assert gpu_batch.guess(batch=64, peak=2 + 64 * 3, kept=2, capacity=2 + 3 * 100) == 100


# Goals


def step_row(contestant: str, tokens_per_s: float, peak_gib: float = 10.0, batch: int = 64, op: str = "gpt2 bf16"):
    row = {"section": "step", "op": op, "contestant": contestant, "status": "measured", "step_ms": {}}
    return row | {"tokens_per_s": tokens_per_s, "peak_gib": peak_gib, "batch": batch}


def test_step_goals_compare_with_the_best_peer_and_the_compiled_reference():
    def found(rows, gpu="NVIDIA H200"):
        return [(goal["measured"], goal["is_met"]) for goal in gpu_goals.step_goals(rows, gpu)]

    rows = [
        step_row("triton compiled", 650e3, 20.0),
        step_row("torch compiled", 900e3),  # ours, on PyTorch's ops
        step_row("reference compiled", 400e3, 41.0),
        step_row("transformers eager", 520e3),
        step_row("reference compiled", 900e3, op="gpt2 fp16"),
        {"section": "step", "op": "gpt2 bf16", "contestant": "transformers compiled", "status": "failed", "reason": ""},
    ]
    assert found(rows) == [(650e3, True), (1.25, False), (2.05, True)]
    assert found(rows, "NVIDIA H100")[0] == (None, None)
    rows[2]["batch"] = 32
    assert found(rows)[2] == (None, None)
    assert found(rows[1:]) == [(None, None)] * 3
    assert gpu_tables.goal_cells(gpu_goals.step_goals(rows, "NVIDIA H200")[0]) == (
        *("gpt2 bf16 training step on an H200", "650,000 tokens/s", "at least 600,000 tokens/s", "met"),
    )


def row(section: str, op: str, contestant: str, both_ms: float, share: float | None = None, **more) -> dict:
    phase = {"p20_ms": 1.0, "p80_ms": 1.0, "rate": 1.0, "unit": "GB/s", "share_of_ceiling": share}
    phases = {
        "forward": {"median_ms": both_ms / 4},
        "backward": {"median_ms": both_ms / 2},
        "both": {"median_ms": both_ms},
    }
    return {
        **{"section": section, "op": op, "contestant": contestant, "status": "measured", "errors": {"y": 1e-3}},
        "phases": {name: phase | times for name, times in phases.items()},
        **{"peak_bytes": 10} | more,
    }


def test_goals_compare_with_the_fastest_rival_and_the_ceiling():
    head = ("cross_entropy", "linear_cross_entropy")
    rows = [
        row("attention", "attention", "triton", 2.0),
        row("attention", "attention", "sdpa cudnn", 1.9),
        row("attention", "attention", "sdpa flash", 4.0),
        row("attention", "separate q, k, v", "sdpa cudnn", 0.1),  # for information: no copies
        row("layer_norm", "layer_norm", "triton", 1.0, share=0.85),
        row("layer_norm", "layer_norm", "compile", 1.0),
        row(*head, "triton", 3.0, peak_bytes=10),
        row(*head, "compile", 6.0, peak_bytes=59),
        {"section": "gelu", "op": "gelu", "contestant": "triton", "status": "failed", "reason": "no"},
        row("gelu", "gelu", "compile", 1.0),
    ]
    found = {goal["goal"]: (goal["measured"], goal["is_met"]) for goal in gpu_goals.goals(rows, "NVIDIA H200")}
    assert found["attention, forward + backward, against the best of PyTorch's with its copies"] == (0.95, False)
    assert found["layer_norm, forward, share of the copy ceiling"] == (0.85, False)
    assert found["layer_norm, backward, share of the copy ceiling"] == (0.85, True)
    assert found["layer_norm, forward + backward, against torch.compile"] == (1.0, True)
    assert found["linear_cross_entropy, forward + backward, against torch.compile"] == (2.0, True)
    assert found["linear_cross_entropy, times less peak memory than torch.compile"] == (5.9, False)
    assert found["gelu, forward, against torch.compile"] == (None, None)
    assert found["bias_gelu, forward, share of the copy ceiling"] == (None, None)
    verdicts = [gpu_tables.goal_cells(goal)[-1] for goal in gpu_goals.goals(rows, "NVIDIA H200")]
    assert set(verdicts) == {"met", "not met", "not measured"}
