"""The study of recipes on made-up runs: ratios, what is run once, what is tuned and on which text, a failure."""

import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from runs import run

sys.path.insert(0, str(ROOT))  # where pytest itself was started, and not `python -m pytest`, bench is not on the path

from bench import learning, results
from bench.learning import GPT3, Arm, Case
from engine.config import parse, to_dict
from engine.tokens import tokenizer
from engine.tokens.shards import TokenStream

ONE_AT_A_TIME = threading.Lock()  # tyro is not made for threads
SEEDS, OTHERS, ADAMW = range(1, 3), range(3, 5), f"{GPT3} --optim.lr 3e-3"
ARMS = (
    Arm("adamw", ADAMW, (800,), SEEDS),
    Arm("recipe", "", (300, 500), SEEDS),
    Arm("part", "--optim.schedule cosine", (400,), SEEDS, like="recipe"),
    Arm("adamw again", ADAMW, (800,), OTHERS, like="recipe"),
)


@pytest.fixture
def runs(monkeypatch, tmp_path) -> list[list[str]]:
    """Flags of every `gpt2 train`, whose loss is made up: Muon learns twice as fast, in a cosine 1.6 times."""
    made = []

    def gpt2(*words: str) -> None:
        made.append(list(words))
        flags = dict(zip(words[2::2], words[3::2], strict=True))
        steps, speed = int(flags["--num-steps"]), 1.0 if "--optim.name" in flags else 2.0
        speed *= 0.8 if flags.get("--optim.schedule") == "cosine" and speed > 1 else 1.0
        loss = 4.0 - 0.4 * math.log(speed * steps) + 0.01 * math.sin(int(flags["--seed"]))
        out = Path(flags["--out"])
        out.mkdir(parents=True, exist_ok=True)
        with ONE_AT_A_TIME:
            resolved = {"device": flags.get("--optim.name", "muon"), "precision": "fp32"}  # told apart in the test
            config = to_dict(parse(list(words[1:]), "test")) | {"resolved": resolved}
            (out / "config.json").write_text(json.dumps(config))
        (out / "metrics.jsonl").write_text(json.dumps({"step": steps, "tokens": 1, "val_loss": loss}) + "\n")

    monkeypatch.setattr(learning, "gpt2", gpt2)
    monkeypatch.setattr(learning, "prepare", lambda case, directory: (Path("tuning"), Path("all")))
    monkeypatch.setattr(learning, "step_seconds", lambda case: {arm.name: [0.1, 0.2] for arm in case.arms})
    monkeypatch.setattr(learning, "CASES", (Case("tiny", "tiny", "bytes", ARMS),))
    monkeypatch.setattr(learning, "EIGHT", SEEDS)
    monkeypatch.setattr(learning.equal_loss, "DRAWS", 400)
    monkeypatch.setattr(learning.machine, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(learning.machine, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    return made


def test_each_recipe_s_tokens_and_seconds_and_no_run_is_made_twice(runs, tmp_path, monkeypatch):
    assert learning.main([str(tmp_path / "runs"), "--save"]) == 0
    assert len(runs) == 5 * 2
    (path,) = (tmp_path / "results").rglob("learning.json")
    rows = {row.peer: row for row in results.read(path)[1]}
    assert rows["recipe"].value("tokens") == pytest.approx(0.5, abs=0.01)
    assert rows["part"].value("tokens") == pytest.approx(0.625, abs=0.02)
    again = rows["adamw again"].figures["tokens"]
    assert again.low < 1.0 < again.high
    assert [len(losses) for losses in rows["recipe"].facts["losses"].values()] == [2, 2]
    assert rows["adamw"].note == "800 steps, 2 seeds, fp32 on adamw"  # what its runs say
    assert rows["recipe"].note == "500 steps, 2 seeds, fp32 on muon"
    assert (tmp_path / "docs/learning.png").read_bytes()[:4] == b"\x89PNG"
    assert learning.main([str(tmp_path / "runs")]) == 0
    assert len(runs) == 5 * 2
    one, another, *_ = tmp_path.rglob("metrics.jsonl")
    one.write_text("")  # killed before its first row, or in the middle of its last one
    another.write_text(another.read_text()[:-5])
    assert learning.main([str(tmp_path / "runs")]) == 0
    assert len(runs) == 5 * 2 + 2
    monkeypatch.setattr(learning, "CASES", (Case("tiny", "tiny --optim.clip 2", "bytes", ARMS[:2]),))
    assert learning.main([str(tmp_path / "runs")]) == 0  # other settings are other runs
    assert len(runs) == 5 * 2 + 2 + 3 * 2


def test_what_is_tuned_are_the_rates_with_other_seeds_on_other_text(runs, tmp_path):
    assert learning.main([str(tmp_path / "runs"), "--tune"]) == 0
    assert len(runs) == 3 * 3 * 2  # the arms with EIGHT's seeds
    flags = [dict(zip(words[2::2], words[3::2], strict=True)) for words in runs]  # the last value of each, as in gpt2
    assert {each["--data"] for each in flags} == {"tuning"}
    assert not {int(each["--seed"]) for each in flags} & {*SEEDS, *OTHERS}
    rates = {float(each["--optim.lr"]) for each in flags if "--optim.name" in each}
    assert sorted(rates) == pytest.approx([1.8e-3, 3e-3, 5.1e-3])
    of_muon = {(each["--optim.lr"], each.get("--optim.muon-lr")) for each in flags if "--optim.name" not in each}
    assert of_muon == {("0.0036", "0.024"), ("0.006", "0.04"), ("0.0102", "0.068")}  # FACTORS times the preset's


def documents(data: Path, split: str) -> list[bytes]:
    """Texts of a split, whose tokens are bytes."""
    words = tokenizer.load("bytes")
    stream = TokenStream.open(data, split, words.vocab_size)
    tokens = stream.read(0, len(stream))
    parts = np.split(tokens, np.flatnonzero(tokens == words.end_of_text))
    return [words.decode_bytes(part[1:].tolist()) for part in parts if len(part)]


def test_the_tuning_text_is_the_training_documents_and_no_validation_document(monkeypatch, tmp_path):
    library, texts = tmp_path / "library", [f"x{number} = {number}\n" * 9 for number in range(40)]
    library.mkdir()
    for number, text in enumerate(texts):
        (library / f"{number}.py").write_text(text)

    def gpt2(*words: object) -> None:
        words = [str(library if word == "stdlib" else word) for word in words]
        assert run(*words, "--workers", "1") == 0

    monkeypatch.setattr(learning, "gpt2", gpt2)
    tuning, whole = learning.prepare(Case("tiny", "tiny", "bytes", ()), tmp_path)
    rests, tails, reported = documents(tuning, "train"), documents(tuning, "val"), {*documents(whole, "val")}
    assert reported
    assert not {*rests, *tails} & reported
    tried = {rest + tail for rest, tail in zip(rests, tails, strict=True)}  # each document's tail is for validation
    assert not tried & reported
    assert tried == {*documents(whole, "train")}
    assert tried | reported == {text.encode() for text in texts}


def test_a_run_that_fails_ends_the_study_with_a_sentence(runs, tmp_path, monkeypatch, capsys):
    def gpt2(*words: str) -> None:
        raise subprocess.CalledProcessError(2, words)

    monkeypatch.setattr(learning, "gpt2", gpt2)
    assert learning.main([str(tmp_path / "runs")]) == 1
    assert "learning: a run must end well, got exit code 2 of" in capsys.readouterr().err
