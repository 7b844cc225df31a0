"""`gpt2 tune` with made-up times, losses and memory; and once with real processes on a CPU."""

import dataclasses
import json
import re
import time

import pytest
import torch
from conftest import SMALL
from runs import run

from engine.config import PRESETS
from engine.errors import BadInput
from engine.tuning import record, steps, tune
from engine.tuning.record import Setup
from engine.tuning.search import Race
from engine.tuning.steps import OUT_OF_MEMORY, Refused, Worker, difference
from kernels import alternatives, dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda")
CUDNN = {"attention": "cudnn"}
SHIPPED = Setup("bf16", 16, compile=True)


class Machine:
    """Stands for a machine: seconds of an update, losses and memory of each setup. Time is its own."""

    def __init__(self, device=GPU, seconds=lambda setup: 1.0, losses=lambda setup: 5.0, fits=lambda setup: True):
        self.device, self.seconds, self.losses, self.fits = device, seconds, losses, fits
        self.now, self.started, self.running, self.lines = 0.0, [], set(), []

    def start(self, job: dict, until: float):
        machine, setup = self, Setup(**job["setup"])
        self.started.append(setup)
        self.now += 10.0
        if self.now > until:
            raise Refused("not finished in the time left")
        if not self.fits(setup):
            raise Refused(OUT_OF_MEMORY)

        class Fake:
            def __init__(self):
                self.losses = [8.0, machine.losses(setup)]

            def __call__(self) -> float:
                machine.now += 0.1
                return machine.seconds(setup)

            def close(self) -> None:
                machine.running.discard(id(self))

        worker = Fake()
        self.running.add(id(worker))
        assert len(self.running) <= 3  # as shipped, in use, and the one that is tried
        return worker

    def search(self, until: float = 1e9) -> tune.Steps:
        return tune.Steps(
            "gpt2", 64, self.device, until, tell=self.lines.append, clock=lambda: self.now, start=self.start
        )

    def found(self, ops=({},), tiles=None, asked=PRESETS["gpt2"], shipped=SHIPPED, until=1e9) -> Setup:
        search = self.search(until)
        search.begin(shipped)
        search.run(tune.moves(asked, self.device, list(ops), tiles or {}, search))
        setup = search.finish(until + 10)[0]
        search.close()
        assert not self.running
        return setup


def test_the_fastest_ops_and_micro_batch_are_found_one_after_the_other():
    machine = Machine(seconds=lambda setup: 1.0 - 0.1 * (setup.ops == CUDNN) - 0.001 * setup.micro_batch_size)
    tiles = {"layer_norm_fwd 1024": {"num_warps": 2}}
    found = machine.found([CUDNN, {"attention": "flash"}], tiles)
    assert found == dataclasses.replace(SHIPPED, ops=CUDNN, tiles=tiles, micro_batch_size=64)
    assert sum("taken" in line for line in machine.lines) == 2


def test_a_wrong_setup_is_refused_however_fast():
    flash = {"attention": "flash"}
    for loss in (5.1, float("nan")):
        machine = Machine(
            seconds=lambda setup: 0.1 if setup.ops == flash else 1.0,
            losses=lambda setup, loss=loss: loss if setup.ops == flash else 5.0,
        )
        assert machine.found([flash]) == SHIPPED
        assert any("attention flash" in line and "wrong: its loss is off by" in line for line in machine.lines)


def test_what_does_not_fit_is_no_candidate_and_recomputing_is_tried_with_it():
    def fits(setup: Setup) -> bool:
        return setup.micro_batch_size < 32 or setup.recompute == "block"

    machine = Machine(seconds=lambda setup: 0.8 if setup.micro_batch_size == 32 else 1.0, fits=fits)
    assert machine.found() == dataclasses.replace(SHIPPED, micro_batch_size=32, recompute="block")
    assert sum(line.endswith(OUT_OF_MEMORY) for line in machine.lines) == 3  # 64, 32, and 32 with attention recomputed
    machine = Machine()
    machine.found()
    assert not [setup for setup in machine.started if setup.recompute != "none"]  # all fitted: it could only cost time


def test_where_the_shipped_micro_batch_does_not_fit_the_largest_that_does_is_the_beginning():
    machine = Machine(fits=lambda setup: setup.micro_batch_size <= 4)
    assert machine.found() == dataclasses.replace(SHIPPED, micro_batch_size=4)
    with pytest.raises(BadInput, match="tune: a step of gpt2 must run here, B = 1, bf16, compiled got: out of memory"):
        Machine(fits=lambda setup: False).found()


def test_nothing_is_started_when_the_time_is_over_and_each_candidate_says_so():
    machine = Machine(seconds=lambda setup: 0.5 if setup.micro_batch_size == 64 else 1.0)
    assert machine.found(until=24.0).micro_batch_size == 64
    assert len(machine.started) == 2
    assert sum(line.endswith("no time left") for line in machine.lines) == 2
    assert machine.now < 40


def test_a_flag_pins_what_it_sets():
    machine = Machine(CPU, seconds=lambda setup: 1 / setup.micro_batch_size)
    asked = dataclasses.replace(PRESETS["tiny"], micro_batch_size=4, precision="fp32")
    machine.found(asked=asked, shipped=Setup("fp32", 4))
    assert {(setup.micro_batch_size, setup.precision) for setup in machine.started} == {(4, "fp32")}


def test_a_cpu_tries_threads_malloc_precision_and_compiling(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(tune.devices, "compile_obstacle", lambda device: None)
    machine = Machine(CPU, seconds=lambda setup: 0.9 if setup.threads == 4 else 1.0)
    found = machine.found(asked=PRESETS["tiny"], shipped=Setup("fp32", 16))
    assert found == Setup("fp32", 16, threads=4)
    assert {setup.threads for setup in machine.started} == {None, 1, 2, 4}
    assert {setup.malloc_tuned for setup in machine.started} == {True, False}
    assert {setup.precision for setup in machine.started} == {"fp32", "bf16"}
    assert {setup.compile for setup in machine.started} == {True, False}
    monkeypatch.setenv("OMP_NUM_THREADS", "6")  # asked for: it stays
    machine.started.clear()
    machine.found(asked=PRESETS["tiny"], shipped=Setup("fp32", 16))
    assert {setup.threads for setup in machine.started} == {None}


def test_what_wins_a_race_and_loses_the_last_one_is_not_taken():
    machine = Machine()
    late = iter([1.0] * 1000)

    def seconds(setup: Setup) -> float:
        next(late)
        return 0.5 if setup.micro_batch_size == 64 and len(machine.started) < 3 else 1.0

    machine.seconds = seconds
    assert machine.found() == SHIPPED
    assert any("B = 64" in line and "taken" in line for line in machine.lines)


def test_combinations_are_the_winners_and_then_by_their_time_in_a_step():
    races = {
        "attention": Race("cudnn", {"triton": [3.0], "cudnn": [2.0], "flash": []}, {"flash": "not here"}),
        "add_layer_norm": Race("triton", {"triton": [1.0], "torch": [1.1]}),
    }
    assert tune.combinations(races, 12) == [
        {"attention": "cudnn", "add_layer_norm": "triton"},
        {"attention": "cudnn", "add_layer_norm": "torch"},
        {"attention": "triton", "add_layer_norm": "triton"},
    ]


@pytest.mark.parametrize(("loss", "right"), [(5.0, True), (5.0004, True), (5.01, False), (float("nan"), False)])
def test_losses_must_be_those_of_the_shipped_setup(loss, right):
    assert (difference([8.0, loss], [8.0, 5.0], "fp32") is None) == right


def test_the_command_refuses_what_cannot_be(capsys):
    for args, sentence in [
        (["tniy"], "tune: the preset must be one that exists, got 'tniy'; did you mean \"tiny\"?"),
        (["tiny", "--precision", "bf15"], "tune: --precision must be one of auto, bf16"),
        (["tiny", "--max-minutes", "0"], "tune: --max-minutes must be above 0 and finite, got 0.0"),
        (["tiny", "--micro-batch-size", "0"], "tune: --micro-batch-size must be at least 1, got 0"),
        (["tiny", "--micro-batch-size", "3"], "the nearest --micro-batch-size 2 and 4"),
        (
            ["tiny", "--micro-batch-size", "7"],
            "tune: --micro-batch-size must divide the 16 sequences of a step of tiny",
        ),
        (["tiny", "--micro-batch-size", "99"], "got 99; the nearest --micro-batch-size 16\n"),
        (["tiny", "--precision", "tf32"], "tune: --precision tf32 needs an NVIDIA GPU from 2020 on (sm_80), got cpu"),
    ]:
        assert run("tune", *args) == 2
        assert sentence in capsys.readouterr().err


def test_the_whole_command_prints_80_columns_and_writes_a_file_that_train_finds(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tune.devices, "choose_precision", lambda asked, device, who, model: ("fp32", "fake"))
    machine = Machine(CPU, seconds=lambda setup: 0.8 if not setup.malloc_tuned else 1.0)
    monkeypatch.setattr(steps, "Worker", machine.start)
    monkeypatch.setattr(
        tune.Bench,
        "tune",
        lambda self, op, *_: (Race("torch", {"torch": [1e-3], "fast": [2e-3]}, {"cudnn": "no " * 50}), {}),
    )
    assert run("tune", "tiny") == 0
    output = capsys.readouterr().out
    assert all(len(line) <= 80 for line in output.splitlines() if str(tmp_path) not in line)
    assert "1,024 -> 1,280 tokens/s, 1.25x" in output
    found, note = record.find(PRESETS["tiny"], CPU)
    assert not found.setup.malloc_tuned
    assert "malloc untuned" in note


def test_the_whole_command_on_a_gpu_that_is_a_fake(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for owner, name, value in [
        (torch.cuda, "is_available", lambda: True),
        (torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda")),
        (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        (torch.accelerator, "get_memory_info", lambda device=None: (23 * 2**30, 80 * 2**30)),  # for 32 sequences
        (torch.cuda, "get_device_name", lambda device=None: "NVIDIA Made Up 80GB"),
        (torch, "set_float32_matmul_precision", lambda precision: None),
        (dispatch, "INTERPRETED", False),
        (dispatch, "has_c_compiler", lambda: True),
        (tune.devices, "wants_compile", lambda asked, device: (True, "on")),
    ]:
        monkeypatch.setattr(owner, name, value)
    machine = Machine(seconds=lambda setup: 1.0 - 0.1 * (setup.ops == CUDNN) - 0.001 * setup.micro_batch_size)
    monkeypatch.setattr(steps, "Worker", machine.start)
    shipped, tile = [], {"column_sum 1": {"BLOCK_P": 64, "BLOCK_C": 32, "num_warps": 4}}

    def tune_op(self, op, first, tuned, until):
        shipped.append(first)
        times = {"triton": [2e-3], "cudnn": [1e-3]} if op == "attention" else {"triton": [1e-3], "torch": [2e-3]}
        return Race("cudnn" if op == "attention" else "triton", times), tile

    monkeypatch.setattr(tune.Bench, "tune", tune_op)
    assert run("tune", "gpt2", "--out", str(tmp_path / "h100.json")) == 0
    output = capsys.readouterr().out
    assert output.startswith("gpt2 on NVIDIA Made Up 80GB: at most 3 minutes\n")
    assert "\n  B = 32, bf16, compiled " in output  # as gpt2 train would choose
    assert "found: B = 64, bf16, compiled, attention cudnn, 1 tile" in output
    assert shipped == ["triton"] * 4
    found = record.load(tmp_path / "h100.json")
    assert (found.shipped.ops, found.setup.ops, found.setup.tiles) == ({}, CUDNN, tile)
    taken = record.applied(found, PRESETS["gpt2"], 8)
    assert (taken.micro_batch_size, taken.compile) == (64, None)  # compiled is the default of a GPU
    dtype, tuned = torch.bfloat16, found.setup.ops
    assert dispatch.select("auto", "cuda", dtype, 64, tuned=tuned).attention is alternatives.attention_cudnn


# ---- Real processes -----------------------------------------------------------------------------------------------


def worker(limit_s: float = 300.0, **setup) -> Worker:
    made = Setup("fp32", 16, **{"threads": 1, **setup})
    return Worker(steps.job("tiny", made, 16, CPU), time.monotonic() + limit_s)


@pytest.mark.slow
def test_a_worker_trains_and_two_right_setups_have_the_same_losses():
    one, other = worker(), worker(malloc_tuned=False, ops={"linear_cross_entropy": "unchunked"})
    assert one.losses[-1] < one.losses[0]
    assert difference(one.losses, other.losses, "fp32") is None
    assert 0 < one() < 60
    one.close()
    other.close()


@pytest.mark.slow
def test_a_worker_that_cannot_run_or_is_late_is_refused_with_the_reason():
    with pytest.raises(Refused, match="RuntimeError: No viable backend"):
        worker(ops={"attention": "cudnn"})
    with pytest.raises(Refused, match="not finished in the time left"):
        worker(limit_s=0.5)


@pytest.mark.slow
def test_tune_on_this_cpu_writes_what_train_reads(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # a busy machine makes more of them very slow
    assert run("tune", "tiny", "--max-minutes", "1", "--out", str(tmp_path / "tuned.json")) == 0
    assert re.search(r"tokens/s, \d\.\d\dx, after \d+ s", capsys.readouterr().out)
    fields = json.loads((tmp_path / "tuned.json").read_text())
    assert fields["tokens_per_s"] >= fields["shipped_tokens_per_s"] > 0
    flags = [
        "--data",
        str(shards),
        "--out",
        str(tmp_path / "run"),
        "--num-steps",
        "1",
        *SMALL[SMALL.index("--eval-tokens") :],
    ]
    assert run("train", "tiny", "--tuned", str(tmp_path / "tuned.json"), *flags) == 0
    assert capsys.readouterr().out.startswith("tuned: ")
