"""HellaSwag and LAMBADA in a run's evaluations: rows, the way they resume, and what is refused before training."""

import shutil
from pathlib import Path

import pytest
import question_sets
from conftest import SMALL
from runs import assert_same_run, measured, newest, run, torchrun, train

from engine import config
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.tasks import scoring

KEYS = {"hellaswag_acc", "hellaswag_acc_norm", "lambada_acc", "lambada_ppl"}


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("questions")
    sets = question_sets.short().items()
    paths = {name: str(question_sets.write(folder / f"{name}.jsonl", records)) for name, records in sets}
    questions = ["--hellaswag", paths["hellaswag"], "--hellaswag-every", "2", "--hellaswag-limit", "5"]
    return ["--num-steps", "2", "--eval-every", "1", "--save-every", "1", *questions, "--lambada", paths["lambada"]]


@pytest.fixture(scope="module")
def asked(shards, flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("asked") / "run"
    assert train(out, shards, *flags) == 0
    return out


def test_each_evaluation_that_is_due_has_the_figures_in_its_row_and_the_weights_stay_the_same(asked, trained):
    present = [KEYS & row.keys() for row in measured(asked)]
    assert present == [KEYS, {"lambada_acc", "lambada_ppl"}, KEYS]
    values = [float.fromhex(row["hellaswag_acc"]) for row in measured(asked)[::2]]
    assert all(value * 5 == pytest.approx(round(value * 5)) for value in values)
    assert (newest(asked) / "model.safetensors").read_bytes() == (newest(trained) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_goes_on_repeats_no_row_and_changes_none(asked, shards, flags, tmp_path):
    shutil.copytree(asked, tmp_path / "run")
    shutil.rmtree(newest(tmp_path / "run"))
    assert train(tmp_path / "run", shards, *flags) == 0
    assert_same_run(tmp_path / "run", asked)


def test_a_request_to_stop_amid_the_questions_records_nothing_and_the_same_command_goes_on(
    asked, shards, flags, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        score, calls = scoring.score, []

        def interrupted(*args):
            calls.append(1)
            return None if len(calls) == 4 else score(*args)

        patched.setattr(scoring, "score", interrupted)
        assert train(tmp_path / "run", shards, *flags) == 75
    assert measured(tmp_path / "run") == measured(asked)[:2]  # the row of step 2 is not begun
    assert train(tmp_path / "run", shards, *flags) == 0
    assert_same_run(tmp_path / "run", asked)


def test_what_is_wrong_is_a_sentence_before_anything_is_written(shards, tmp_path, capfd):
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n')
    bad = str(tmp_path / "bad.jsonl")
    for flags, words in (
        (["--hellaswag", bad], "line 1 must be a HellaSwag example, got no field ctx"),
        (["--lambada", bad], "line 1 must be a LAMBADA example, got a text that does not end in a space and a word"),
        (["--lambada", "nowhere"], "nowhere: must be a file of LAMBADA examples"),
        (["--hellaswag-every", "500"], "--hellaswag-every must go with --hellaswag FILE, got none"),
        (["--hellaswag", bad, "--hellaswag-limit", "0"], "--hellaswag-limit must be at least 1, got 0"),
        (
            ["--hellaswag", bad, "--eval-every", "4", "--hellaswag-every", "6"],
            "--hellaswag-every must be a multiple of --eval-every 4, got 6",
        ),
    ):
        command = ["train", *SMALL, "--data", str(shards), "--out", str(tmp_path / "run"), *flags]
        assert run(*command) == 2, flags
        assert words in capfd.readouterr().err
        assert not (tmp_path / "run").exists()
    with pytest.raises(BadInput, match="--hellaswag-every must be a multiple of --eval-every None, got 6"):
        config.parse(["tiny", "--hellaswag", bad, "--eval-every", "None", "--hellaswag-every", "6"], "train")


def test_ranks_must_hold_the_same_examples(shards, flags, tmp_path, monkeypatch):
    seen = []

    def checked(self, facts):
        seen.append(facts)
        raise BadInput("looked at")

    monkeypatch.setattr(Ranks, "check_alike", checked)
    folder = Path(flags[flags.index("--lambada") + 1]).parent
    shutil.copytree(folder, tmp_path / "sets")
    flags = [flag.replace(str(folder), str(tmp_path / "sets")) for flag in flags]
    assert train(tmp_path / "run", shards, *flags) == 2
    for name, old, new in (("hellaswag", "}\n", "} \n"), ("lambada", " x0", " y0")):
        file = tmp_path / "sets" / f"{name}.jsonl"
        file.write_text(file.read_text().replace(old, new))
        assert train(tmp_path / "run", shards, *flags) == 2
    same, spaced, other = seen
    assert same == spaced  # the same examples
    assert {name for name in same if same[name] != other[name]} == {"lambada examples"}
    assert "hellaswag examples" in same


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [[], ["--parallel", "fsdp"]], ids=["ddp", "fsdp"])
def test_two_processes_have_the_same_figures(parallel, asked, shards, flags, tmp_path):
    done = torchrun(2, tmp_path / "run", shards, *flags, *parallel)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(measured(tmp_path / "run"), measured(asked), strict=True):
        assert KEYS & ours.keys() == KEYS & theirs.keys()
        for name in KEYS & ours.keys():
            close = pytest.approx(float.fromhex(theirs[name]), rel=1e-3)
            assert float.fromhex(ours[name]) == close
