"""Ranks started with different flags, code, data or versions are refused before the first step."""

import dataclasses
import shutil

import pytest
import torch
from conftest import SMALL

from engine import config
from engine.config import OptimConfig, TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.run import resume
from model.presets import GPT2Config

CPU = torch.device("cpu")


def facts(*flags: str, data_digest: str = "d1", tokenizer: str = "bytes") -> dict:
    train = config.parse([*SMALL, *flags], "test")
    return resume.facts(train, resume.identity(train, tokenizer, data_digest))


def checked(monkeypatch, everyone: list[dict]) -> str | None:
    """Error of check_alike, which must be the same on every rank, or None. everyone: facts of each rank."""
    monkeypatch.setattr(Ranks, "gather", lambda self, value: everyone)
    messages = set()
    for rank, mine in enumerate(everyone):
        try:
            Ranks(rank, 0, len(everyone), CPU).check_alike(mine)
            messages.add(None)
        except BadInput as error:
            messages.add(str(error))
    assert len(messages) == 1  # else one rank would wait for the others
    return messages.pop()


def test_the_facts_are_every_flag_and_the_code_the_data_and_the_versions():
    names = set()
    for kind, prefix in ((TrainConfig, ""), (GPT2Config, "model."), (OptimConfig, "optim.")):
        names |= {"--" + prefix + field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    names -= {"--model", "--optim"}
    assert facts().keys() == names | {"data", "tokenizer", "code", "torch"}
    assert facts("--optim.lr", "0.125", "--model.n-layer", "7")["--optim.lr"] == 0.125


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        (dict(flags=["--seed", "3"]), "--seed: 1 on rank 0, 2; 3 on rank 1"),
        (dict(flags=["--optim.lr", "0.5"]), "--optim.lr: 0.002 on rank 0, 2; 0.5 on rank 1"),
        (dict(flags=["--model.n-layer", "4"]), "--model.n-layer: 2 on rank 0, 2; 4 on rank 1"),
        (dict(flags=["--save-every", "None"]), "--save-every: 190 on rank 0, 2; None on rank 1"),
        (dict(data_digest="d2"), "data: d1 on rank 0, 2; d2 on rank 1"),
        (dict(tokenizer="gpt2"), "tokenizer: bytes on rank 0, 2; gpt2 on rank 1"),
    ],
    ids=str,
)
def test_what_differs_is_named_with_the_ranks(monkeypatch, changed, named):
    other = facts(*changed.pop("flags", []), **changed)
    assert checked(monkeypatch, [facts(), other, facts()]) == (
        f"train: every rank must run the same thing, but these differ\n  {named}\n  "
        "start all of them with the same flags, code, data and versions"
    )


def test_all_that_differs_is_listed_and_three_ways_too(monkeypatch):
    message = checked(monkeypatch, [facts("--seed", "3"), facts(data_digest="d2"), facts("--seed", "2"), facts()])
    assert "--seed: 3 on rank 0; 1 on rank 1, 3; 2 on rank 2\n" in message
    assert "data: d1 on rank 0, 2, 3; d2 on rank 1\n" in message


def test_ranks_that_are_alike_go_on(monkeypatch):
    assert checked(monkeypatch, [facts(), facts(), facts()]) is None
    Ranks(0, 0, 1, CPU).check_alike(facts())


def test_a_rank_of_another_version_is_refused_on_both_sides(monkeypatch):
    """Another version may lack a flag."""
    older = {name: value for name, value in facts().items() if name != "--grace-seconds"} | {"code": "0"}
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [facts(), older])
    with pytest.raises(
        BadInput, match=r"--grace-seconds: 25.0 on rank 0; None on rank 1\n  code: \w{12} on rank 0; 0 on"
    ):
        Ranks(0, 0, 2, CPU).check_alike(facts())
    with pytest.raises(BadInput, match=r"code: \w{12} on rank 0; 0 on rank 1"):
        Ranks(1, 1, 2, CPU).check_alike(older)


@pytest.mark.parametrize("package", ["kernels", "model", "engine"])
def test_any_changed_line_of_code_is_another_fact(tmp_path, monkeypatch, package):
    copies = []
    for source in resume.PACKAGES:
        copies.append(tmp_path / source.name)
        shutil.copytree(source, copies[-1], ignore=shutil.ignore_patterns("__pycache__"))
    here = facts()["code"]
    monkeypatch.setattr(resume, "PACKAGES", copies)
    assert facts()["code"] == here  # in any directory
    file = sorted((tmp_path / package).rglob("*.py"))[-1]
    file.write_text(file.read_text() + "\n# another line\n")
    assert facts()["code"] != here
    assert len(here) == 12
