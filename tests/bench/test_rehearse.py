"""bench.rehearse: a rank of many, on fake tensors, holds and sends what a real one does, and what the plan says."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import counts, rehearse
from engine import rehearsal, start
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.planning import communication
from model.gpt2 import GPT2
from model.presets import GPT2Config

MODEL = GPT2Config(n_layer=2, n_head=2, n_embd=64, n_positions=33, vocab_size=257)
FLAGS = "tiny --model.n-layer 2 --model.n-embd 130 --model.n-head 2"  # shards are padded
WAYS = [
    pytest.param(way, optimizer, marks=() if (way, optimizer) == ("fsdp", "muon") else pytest.mark.slow)
    for way in ("ddp", "fsdp", "hsdp")
    for optimizer in ("adamw", "muon")
]


def run(*flags: str) -> int:
    return rehearse.main(
        [*FLAGS.split(), "--tokens-per-step", "16384", "--micro-batch-size", "16", "--world", "8", *flags]
    )


@pytest.mark.parametrize(("way", "optimizer"), WAYS)
def test_a_rank_of_eight_does_what_is_planned(capsys, way, optimizer):
    recompute = "block" if way == "fsdp" else "none"
    flags = ["--gpus-per-node", "4", "--recompute", recompute, "--optim.name", optimizer]
    assert run("--parallel", way, *flags) == 0, capsys.readouterr().out
    said = capsys.readouterr().out
    assert said.count(": yes\n") == 4
    assert ("all_gather" in said) == (way != "ddp")
    assert ("Muon's matrices" in said) == (optimizer == "muon")


def test_a_plan_that_is_wrong_by_one_byte_is_seen(monkeypatch, capsys):
    def wrong(*args, **options):
        *others, last = communication.communication(*args, **options)
        return [*others, replace(last, payload_bytes=last.payload_bytes + 1)]

    monkeypatch.setattr(rehearse, "communication", wrong)
    assert run() == 1
    assert "plan: differs: ('loss and signals', 'all_reduce', 8): (1, 20), planned (1, 21)\n" in capsys.readouterr().out


@pytest.mark.slow
def test_a_rehearsed_peak_is_that_of_a_real_update():
    config = TrainConfig(model=MODEL, tokens_per_step=33 * 16, micro_batch_size=8, compile=False, kernels="torch")
    with rehearsal.one_of(1, 0, 1) as ranks:
        held, calls = rehearsal.rehearse(config, ranks, "fp32")
        data = rehearsal.batches(config, ranks)
    update = start.build_step(config, GPT2(MODEL), Ranks(0, 0, 1, torch.device("cpu")), "fp32", is_compiled=False)
    batch = [tuple(t % MODEL.vocab_size for t in pair) for pair in data.at(0)]
    data.close()
    update(0, batch, 0.0)
    above = held["peak"] - held["weights"] - held["moments"]
    assert above == pytest.approx(counts.memory(lambda: update(1, batch, 0.0))["peak_bytes"], rel=1e-3)
    assert calls == []


def test_a_window_that_two_ranks_read_is_seen(monkeypatch, capsys):
    batches = rehearsal.batches
    monkeypatch.setattr(rehearsal, "batches", lambda config, ranks, **shape: batches(config, twin(ranks), **shape))
    assert run() == 1
    assert "each once: differs" in capsys.readouterr().out


def twin(ranks):
    """Rank 3 reads as rank 2."""
    return replace(ranks, rank=2) if ranks.rank == 3 else ranks


def test_bad_input_is_a_sentence(capsys):
    assert run("--rank", "8") == 2
    assert capsys.readouterr().err == "bench.rehearse: --rank must be 0 to --world - 1, got 8 and 8\n"
    assert run("--head", "sampled", "--no-compile") == 2
    assert capsys.readouterr().err == "bench.rehearse: --head must be full, got sampled; leave it out\n"
    assert run("--parallel", "hsdp", "--gpus-per-node", "3") == 2
    assert "must divide all 8 processes, got 3" in capsys.readouterr().err


@pytest.mark.slow
def test_gpt2_xl_on_1024_ranks(capsys):
    assert rehearse.main(["gpt2-xl", "--world", "1024", "--parallel", "fsdp"]) == 0, capsys.readouterr().out
