"""bench.peers: who may be timed, what a ratio is, and that its contestants are the same model."""

import json
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import contestants, machine, peers
from bench.contestants import TrainingStep, initial_weights
from model.gpt2 import GPT2Config

CASE = (1, 64, 8, 1)
CHILD = """
import json, sys
from math import nan
answers = {answers!r}
for request in sys.stdin:
    answer = answers[request.strip()]
    if isinstance(answer, str):
        sys.exit(answer)
    print(json.dumps(answer.pop(0) if isinstance(answer, list) else answer), flush=True)
"""


@pytest.fixture
def play(monkeypatch):
    """Measures a field whose processes answer what they are given: {who: (loss or what it dies of, seconds)}."""

    def measure(parts: dict[str, tuple], rounds: int = 3) -> dict[str, dict]:
        def command(contestant, case, precision):
            loss, seconds = ("", [1.0]) if contestant.who == "ceiling" else parts[contestant.who]
            prepared = {"loss_50": loss, "step_bytes": 1000} if isinstance(loss, float) else loss
            times = [{"seconds": s} for s in seconds * rounds * 2]
            return [sys.executable, "-c", CHILD.format(answers={"prepare": prepared, "time": times})]

        monkeypatch.setattr(peers.Contestant, "command", command)
        monkeypatch.setattr(peers, "CONTESTANTS", tuple((who, False, True) for who in parts))
        return {row["contestant"]: row for row in peers.measure(CASE, "fp32", rounds, lambda line: None)}

    return measure


def test_ratios_are_taken_within_a_round(play):
    rows = play({"ours": (10.0, [1.0, 2.0, 4.0]), "reference": (10.0, [2.0, 4.0, 8.0])})
    assert rows["reference"]["times_ours"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert rows["ours"]["step_ms"] == {"median": 2000.0, "min": 1000.0, "max": 4000.0}
    assert "times_ours" not in rows["ours"]


def test_who_does_not_agree_is_not_timed(play):
    rows = play({"ours": (10.0, [1.0]), "reference": (10.01, [1.0]), "transformers": (float("nan"), [1.0])})
    for who in ("reference", "transformers"):
        assert rows[who]["status"] == "failed"
        assert "must be ours, 10.00000" in rows[who]["reason"]
        assert "step_ms" not in rows[who]


def test_who_dies_is_named_and_the_others_go_on(play):
    rows = play({"ours": (10.0, [1.0]), "reference": ("out of memory", [1.0]), "transformers": (10.0, [3.0])})
    assert rows["reference"]["status"] == "failed"
    assert rows["reference"]["reason"] == "the process ended with 1: out of memory"
    assert rows["transformers"]["times_ours"]["median"] == 3.0
    assert "| reference eager, memory kept | failed: the process ended" in peers.table(list(rows.values()))


def test_goals_are_judged_by_the_fastest_and_the_leanest_peer(play):
    rows = play({"ours": (10.0, [1.0]), "reference": (10.0, [3.0]), "transformers": (10.0, [0.5])})
    for who, size in (("ours", 500), ("reference", 1000), ("transformers", 2000)):
        rows[who]["step_bytes"] = size
    (said,) = peers.verdicts(list(rows.values()))
    speed, ceiling, memory = said.split("; ")
    assert speed == (
        "ours eager, memory kept: 0.50x the speed of the fastest peer (0.50 to 0.50), the goal is 1.0: not met"
    )
    assert ceiling.endswith("not met")
    assert memory == "0.50 of the leanest peer's memory, the goal is 0.5: met"


def test_saving_replaces_the_same_case_and_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for case, ms in (("a", 1), ("b", 2), ("a", 3)):
        peers.save({"commit": "c", "command": f"{case} {ms}"}, [{"case": case, "precision": "fp32", "step_ms": ms}])
    stored = json.loads((tmp_path / machine.slug() / "peers.json").read_text())
    assert {row["case"]: row["step_ms"] for row in stored["rows"]} == {"a": 3, "b": 2}
    assert {row["command"] for row in stored["rows"]} == {"a 3", "b 2"}  # each row's own


@pytest.mark.parametrize("text", ["1,64,8", "1,64,8,0", "1,65,8,1", "a,b,c,d", ""])
def test_a_bad_case_is_a_sentence(text, capsys):
    with pytest.raises(SystemExit) as exit_code:
        peers.main(["--case", text])
    assert exit_code.value.code == 2
    assert "must be L,C,T,B, with C a multiple of 64" in capsys.readouterr().err


def losses(who: str, precision: str = "fp32") -> list[float]:
    config = GPT2Config(2, 2, 32, n_positions=16, vocab_size=61)
    step = TrainingStep(who, config, initial_weights(config), "cpu", is_compiled=False, precision=precision)
    torch.manual_seed(1)
    batches = torch.randint(61, (10, 4, 17))
    return [step(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()).item() for rows in batches]


@pytest.mark.parametrize("who", ["reference", "transformers"])
def test_contestants_learn_the_same_from_the_same_weights(who):
    assert losses(who) == pytest.approx(losses("ours"), rel=2e-6)


def test_under_autocast_a_peer_is_as_close_as_bfloat16_allows():
    full, ours, reference = losses("ours"), losses("ours", "bf16"), losses("reference", "bf16")
    assert ours != full
    assert reference != full
    assert ours == pytest.approx(full, rel=1e-2)
    assert reference == pytest.approx(full, rel=1e-2)


def test_another_model_would_not_agree(monkeypatch):
    monkeypatch.setattr("bench.reference.MLP.forward", lambda mlp, x: mlp.c_proj(F.gelu(mlp.c_fc(x))))  # not tanh's
    assert losses("reference") != pytest.approx(losses("ours"), rel=2e-6)


def test_every_contestant_has_an_optimizer_over_every_weight():
    config = GPT2Config(1, 1, 16, n_positions=8, vocab_size=13)
    for who in ("ours", "reference", "transformers"):
        model = contestants.build(who, config, initial_weights(config))
        groups = contestants.adamw(model).param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) == 16, who
        assert [len(group["params"]) for group in groups] == [6, 10], who
