"""What may change when a run goes on: one list of all fields, the lines of what changed, and the history."""

import dataclasses
import json
from pathlib import Path

import pytest
from conftest import SMALL

from engine import config
from engine.config import TrainConfig
from engine.errors import BadInput
from engine.run import directory, settings
from engine.run.checkpoint import Checkpoint

RESOLVED = {"tokenizer": "bytes", "data_digest": "d", "precision": "fp32"}
KINDS = (settings.FIXED, settings.COMPUTED, settings.SCHEDULE, settings.FREE)


def parsed(*flags: str) -> TrainConfig:
    return config.parse([*SMALL, *flags], "test")


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return "x" if value is None else f"{value}x" if isinstance(value, str) else value + 1


def changed(name: str, train: TrainConfig, value=None) -> TrainConfig:
    """The config with one field, by its dotted name, of another value."""
    part, _, field = name.rpartition(".")
    owner = getattr(train, part) if part else train
    made = object.__new__(type(owner))  # not checked: another n_head need not divide n_embd
    made.__dict__.update(owner.__dict__ | {field: other(getattr(owner, field)) if value is None else value})
    return dataclasses.replace(train, **{part: made}) if part else made


def lines(old: TrainConfig, new: TrainConfig, **resolved) -> list[str]:
    before, now = settings.in_force(old, RESOLVED), settings.in_force(new, RESOLVED | resolved)
    return list(settings.changes(before, now).values())


def test_each_field_of_a_config_is_in_one_list_and_each_list_holds_fields_only():
    listed = [name for kind in KINDS for name in kind]
    assert sorted(listed) == sorted(settings.flat(TrainConfig()))


@pytest.mark.parametrize("kind", KINDS, ids=["fixed", "computed", "schedule", "free"])
def test_what_changes_the_numbers_is_compared_and_nothing_else_is(kind):
    train = parsed("--optim.name", "muon", "--optim.schedule", "wsd", "--context", "32")
    is_compared = kind in (settings.FIXED, settings.COMPUTED)
    for name in set(kind) - {"precision", "context"}:  # which are resolved, or have a default that follows another
        new = changed(name, train)
        before, after = settings.flat(train)[name], settings.flat(new)[name]
        assert before != after
        assert lines(train, new) == ([f"{name} {before} -> {after}"] if is_compared else []), name


def test_a_field_in_its_other_spelling_is_no_change():
    train = parsed()
    assert lines(train, changed("context", train, 32)) == []  # which is the model's n_positions
    assert lines(train, changed("context", train, 16)) == ["context 32 -> 16"]
    assert lines(train, changed("optim.muon_lr", train)) == []  # AdamW reads no rate of Muon's
    cosine = parsed("--optim.schedule", "cosine")
    assert lines(cosine, changed("optim.decay_share", cosine)) == []  # nor a cosine this
    assert lines(cosine, parsed("--optim.schedule", "wsd")) == ["optim.schedule cosine -> wsd"]
    assert lines(train, changed("precision", train, "auto")) == []  # which was resolved to the same
    assert lines(train, train, precision="bf16") == ["precision fp32 -> bf16"]
    assert lines(train, train, precision=None) == []  # --precision fp32 says the same
    assert lines(train, changed("precision", train, "auto"), precision=None) == []  # unknown: not compared


def test_another_micro_batch_draws_other_masks_and_samples_and_is_compared():
    compared = ["micro_batch_size 4 -> 8"]
    for flags, expected in (("--model.dropout", "0.1"), compared), (("--head", "sampled"), compared), ((), []):
        train = parsed(*flags)
        before = settings.in_force(train, RESOLVED | {"micro_batch_size": 4})
        after = settings.in_force(train, RESOLVED | {"micro_batch_size": 8})
        assert list(settings.changes(before, after).values()) == expected
        assert not settings.changes(settings.in_force(train, RESOLVED), after)  # an older version noted none


def test_the_same_source_of_weights_in_another_spelling_is_no_change(tmp_path, monkeypatch):
    (tmp_path / "source").mkdir()
    monkeypatch.chdir(tmp_path)
    spellings = ("source", "source/", "./source", str(tmp_path / "source"))
    assert not any(lines(parsed("--init-from", "source"), parsed("--init-from", spelling)) for spelling in spellings)


# ---- History ------------------------------------------------------------------------------------------------------


def checkpoint(train: TrainConfig, step: int, **state) -> Checkpoint:
    """A checkpoint of a run, without files."""
    state = {"step": step, "config": config.to_dict(train), "identity": dict(RESOLVED)} | state
    return Checkpoint(Path(train.out) / "checkpoints" / f"step_{step:08d}", state)


def begin(train: TrainConfig, past: Checkpoint | None) -> list[tuple[int | None, float]]:
    """Writes config.json as a run does that begins or goes on, and reads its history back."""
    directory.write_config(train, "bytes", {}, settings.history(train, RESOLVED, past))
    entries = json.loads((Path(train.out) / "config.json").read_text())["history"]
    return [(entry["step"], entry["config"]["optim"]["lr"]) for entry in entries]


def test_every_config_that_a_run_had_stays_with_its_first_step(tmp_path):
    old, new = (parsed("--out", str(tmp_path), "--optim.lr", lr) for lr in ("2e-3", "1e-3"))
    assert begin(old, None) == [(0, 2e-3)]
    assert begin(old, checkpoint(old, 10)) == [(0, 2e-3)]
    assert begin(dataclasses.replace(old, log_every=5), checkpoint(old, 12)) == [(0, 2e-3)]  # changes nothing
    assert begin(new, checkpoint(old, 20)) == [(0, 2e-3), (20, 1e-3)]
    assert begin(new, checkpoint(new, 30)) == [(0, 2e-3), (20, 1e-3)]
    assert begin(new, checkpoint(old, 10)) == [(0, 2e-3), (20, 1e-3), (10, 1e-3)]  # it went back
    longer = dataclasses.replace(new, num_steps=9000)
    assert begin(longer, checkpoint(new, 30)) == [(0, 2e-3), (20, 1e-3), (10, 1e-3), (30, 1e-3)]
    assert config.load(tmp_path) == longer


@pytest.mark.parametrize("content", ["{}", "{", '{"history": [{"step": "x"}]}', '{"history": 4}', "\ud800"])
def test_a_run_that_noted_no_history_has_its_checkpoint_s_config_first(tmp_path, content):
    old, new = (parsed("--out", str(tmp_path), "--optim.lr", lr) for lr in ("2e-3", "1e-3"))
    (tmp_path / "config.json").write_text(content, errors="surrogatepass")
    assert begin(new, checkpoint(old, 7)) == [(None, 2e-3), (7, 1e-3)]
    assert begin(new, checkpoint(new, 8)) == [(None, 2e-3), (7, 1e-3)]


def test_another_run_s_history_is_taken_up_to_its_checkpoint(tmp_path):
    old, new = (parsed("--out", str(tmp_path / "one"), "--optim.lr", lr) for lr in ("2e-3", "1e-3"))
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    begin(old, None)
    begin(new, checkpoint(old, 20))
    there = dataclasses.replace(old, out=str(tmp_path / "two"))
    assert begin(there, checkpoint(old, 10)) == [(0, 2e-3)]


def test_a_config_of_an_older_version_has_the_defaults_of_today_and_what_is_none_is_a_sentence(tmp_path):
    train = parsed("--out", str(tmp_path))
    fields, identity = config.to_dict(train), dict(RESOLVED)
    del fields["skip_z_score"], fields["optim"]["clip"], identity["precision"]
    (tmp_path / "config.json").write_text('{"resolved": {"precision": "bf16"}}')
    past, resolved = settings.of_checkpoint(checkpoint(train, 3, config=fields, identity=identity))
    assert past == train
    assert resolved == RESOLVED | {"precision": "bf16", "micro_batch_size": None}
    for broken in ({"config": {}}, {"config": None}, {"identity": None}, {"config": {"model": 4, "optim": {}}}):
        with pytest.raises(BadInput, match=r"must hold the config of the run that made it, got .*; use an older one"):
            settings.of_checkpoint(checkpoint(train, 3, **broken))
