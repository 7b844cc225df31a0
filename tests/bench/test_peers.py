"""bench.peers: who may be timed, what a ratio is, and that its peers are the same model."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import peers, steps, tables
from bench.peers import Comparison, Peer, Trial
from bench.processes import Failed
from bench.results import Row
from engine import optim
from engine.config import OptimConfig
from model.gpt2 import GPT2Config

TRIAL = Trial.of((1, 64, 8, 4), "fp32", on_gpu=False)
CONFIG = GPT2Config(2, 2, 32, n_positions=16, vocab_size=61)


class Actor:
    """In place of a Worker: answers what it is given for who it plays."""

    def __init__(self, parts: dict[str, tuple]):
        self.parts, self.who, self.batch = parts, None, 0

    def ask(self, do: str, limit_s: float, **what):
        if do == "build":
            self.who, self.batch = what["setup"]["who"], what["batch"]
            self.seconds = iter(self.parts.get(self.who, (10.0, []))[1] * 9)
            return {"peak_flops": None, "sdpa": None}
        loss, fits = self.parts.get(self.who, (10.0, []))[0], self.parts.get("fits", 99)
        if do == "losses":
            is_truth = self.batch == peers.TRUTH_SEQUENCES and self.who == "reference"
            if isinstance(loss, str) and not is_truth:
                raise Failed(loss)
            return [11.0, 10.0 if is_truth else loss]
        if do == "warm_up":
            if self.batch > fits:
                raise Failed("CUDA out of memory", out_of_memory=True)
            return {"step": 1000, "peak": 2000}
        return 1e12 if do == "ceiling" else next(self.seconds)

    def stop(self) -> None:
        pass


@pytest.fixture
def play(monkeypatch):
    """Compares {who: (last loss or what it fails of, seconds)}, for as many rounds as there are seconds."""

    def compare(parts: dict, trial: Trial = TRIAL) -> dict:
        field = [Peer(who, "eager", True) for who in parts if who != "fits"]
        rounds = len(next(iter(parts.values()))[1])
        monkeypatch.setattr(peers, "Worker", lambda: Actor(parts))
        rows = Comparison(lambda: lambda done: done < rounds, say=lambda line: None).run(trial, field)
        return {row.peer.split()[0]: row for row in rows}

    return compare


def test_ratios_are_taken_within_a_round(play):
    rows = play({"ours": (10.0, [1.0, 2.0, 4.0]), "reference": (10.0, [2.0, 4.0, 8.0])})
    assert rows["reference"].figures["time / ours"][:4] == (2.0, "x", 2.0, 2.0)
    assert rows["ours"].figures["speed"][:4] == (2.0, "x", 2.0, 2.0)
    assert rows["ours"].figures["step"][:2] == (2.0, "s")
    assert rows["ours"].value("tokens") == 4 * 8 / 2.0
    assert "time / ours" not in rows["ours"].figures


def test_who_does_not_agree_is_not_timed(play):
    rows = play({"ours": (10.0, [1.0]), "reference": (10.01, [1.0]), "transformers": (math.nan, [1.0])})
    for who, by in (("reference", "1.0e-03"), ("transformers", "nan")):
        assert rows[who].status == "failed"
        assert rows[who].reason == f"its losses must be the reference's to 1e-04, they differ by up to {by}"
        assert "step" not in rows[who].figures
    assert rows["ours"].status == "measured"


def test_ours_is_held_against_the_reference_too(play):
    assert play({"ours": (10.1, [1.0]), "reference": (10.0, [1.0])})["ours"].status == "failed"


def test_who_fails_is_named_and_the_others_go_on(play):
    rows = play(
        {"ours": (10.0, [1.0]), "reference": ("the process ended with 1", [1.0]), "transformers": (10.0, [3.0])}
    )
    assert (rows["reference"].status, rows["reference"].reason) == ("failed", "the process ended with 1")
    assert rows["transformers"].value("time / ours") == 3.0
    assert "failed: the process ended with 1" in tables.of([*rows.values()])


def test_what_runs_out_of_memory_is_tried_at_a_smaller_batch_and_says_so(play):
    choices = ((4, "none"), (4, "block"), (2, "none"))
    trial = Trial.of((1, 64, 8, 4), "fp32", on_gpu=True, choices=choices)
    row = play({"ours": (10.0, [1.0]), "fits": 2}, trial)["ours"]
    assert (row.status, row.facts["batch"]) == ("measured", 2)
    assert row.note == "out of memory at B = 4; out of memory at B = 4, recompute block"
    assert row.value("tokens") == 2 * 8
    row = play({"ours": (10.0, [1.0]), "fits": 1}, trial)["ours"]
    assert row.status == "failed"
    assert row.reason.endswith("CUDA out of memory")


def test_peers_of_different_batches_are_compared_per_token():
    ours, half = Peer("ours", "eager"), Peer("reference", "eager")
    rows = {
        peer: Row("step", "", peer.who, facts={"batch": b, "peak_flops": None}) for peer, b in ((ours, 4), (half, 2))
    }
    peers.summarize(TRIAL, rows, {ours: [1.0, 2.0], half: [1.0, 2.0], "ceiling": [1e12, 1e12]})
    assert rows[half].value("time / ours") == rows[ours].value("speed") == 2.0


@pytest.mark.parametrize("text", ["1,64,8", "1,64,8,0", "1,65,8,1", "a,b,c,d", ""])
def test_a_bad_case_is_a_sentence(text, capsys):
    with pytest.raises(SystemExit) as exit_code:
        peers.main(["--case", text])
    assert exit_code.value.code == 2
    assert "must be L,C,T,B, with C a multiple of 64" in capsys.readouterr().err


def losses(who: str, precision: str = "fp32", parts: int = 1) -> list[float]:
    """Of ten updates; each batch in so many micro-batches."""
    setup = steps.Setup(who, precision=precision)
    step = steps.build(setup, CONFIG, steps.initial_weights(CONFIG), torch.device("cpu"))
    batches = torch.randint(61, (10, 4, 17), generator=torch.Generator().manual_seed(1))
    split = [[(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in b.chunk(parts)] for b in batches]
    return [step(micro_batches).item() for micro_batches in split]


@pytest.mark.parametrize("who", ["reference", "transformers"])
def test_peers_learn_the_same_from_the_same_weights(who):
    assert losses(who) == pytest.approx(losses("ours"), rel=2e-6)
    assert losses(who, parts=2) == pytest.approx(losses("ours", parts=4), rel=2e-6)


def test_under_autocast_a_peer_is_as_close_as_bfloat16_allows():
    full, ours, reference = losses("ours"), losses("ours", "bf16"), losses("reference", "bf16")
    assert ours != full
    assert reference != full
    assert ours == pytest.approx(full, rel=1e-2)
    assert reference == pytest.approx(full, rel=1e-2)


def test_another_model_would_not_agree(monkeypatch):
    monkeypatch.setattr("bench.reference.MLP.forward", lambda mlp, x: mlp.c_proj(F.gelu(mlp.c_fc(x))))  # not tanh's
    assert losses("reference") != pytest.approx(losses("ours"), rel=2e-6)


def test_every_peer_has_an_optimizer_over_every_weight():
    config = GPT2Config(1, 1, 16, n_positions=8, vocab_size=13)
    for who in ("ours", "reference", "transformers"):
        model = steps.build_model(who, config, steps.initial_weights(config))
        optimizer = optim.build(model, OptimConfig()) if who == "ours" else steps.adamw(model)
        assert [len(group["params"]) for group in optimizer.param_groups] == [6, 10], who
