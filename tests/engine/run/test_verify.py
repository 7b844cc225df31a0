"""`gpt2 verify` finds and names every kind of damage to shards, manifests, checkpoints and rows."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL

from engine import cli
from engine.errors import BadInput
from engine.run import checkpoint, verify
from engine.tokens import shards
from engine.tokens.prepare import PrepareConfig, prepare


def check(*paths: Path) -> tuple[int, list[str]]:
    """Number of damaged files and checkpoints, and the lines printed."""
    lines = []
    return verify.verify(paths, lines.append), lines


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Token shards of bytes, several for each split."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"record {i} " * 9}) + "\n" for i in range(60)))
    out = tmp_path / "corpus"
    prepare(
        [str(tmp_path / "text.jsonl")],
        PrepareConfig(str(out), tokenizer="bytes", workers=1, val_fraction=0.3, shard_tokens=500),
    )
    return out


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "small"
    flags = ["--num-steps", "2", "--save-every", "1", "--keep-last", "5", "--eval-every", "None"]
    with pytest.raises(SystemExit) as done:
        cli.main(["train", *SMALL, "--data", str(shards), "--out", str(out), *flags])
    assert done.value.code == 0
    return out


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def rewrite_manifest(corpus: Path, change) -> None:
    path = corpus / shards.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# ---- Data ---------------------------------------------------------------------------------------------------------


def test_whole_data_is_one_line_per_file_and_nothing_is_changed(corpus):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in corpus.iterdir()}
    damaged, lines = check(corpus)
    assert damaged == 0
    assert sorted(lines[:-1]) == sorted(f"{path}: ok" for path in corpus.iterdir())
    assert len(lines) > 4
    assert lines[-1] == f"all {len(lines) - 1} whole"
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in corpus.iterdir()} == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def zero_a_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1024:1100] = bytes(76)
    path.write_bytes(content)


def put_a_token_over_the_vocabulary(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1024 + 2 * 7 : 1026 + 2 * 7] = (257).to_bytes(2, "little")
    path.write_bytes(content)


def replace_by_a_shorter_shard(path: Path) -> None:
    shards.write_shard(path, np.array([256, 1, 2], dtype=np.uint16))


def change_the_unused_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[1000] = 1
    path.write_bytes(content)


HARMS = [
    (cut, "500 tokens take 2024 bytes, got 2022; the file is cut short or damaged"),
    (empty, "the header must be 1024 bytes, got 0"),
    (lambda path: path.write_bytes(b"x" * 2024), "the magic number must be 20240520, got 2021161080"),
    (zero_a_page, "must have sha256 "),
    (put_a_token_over_the_vocabulary, "token 7 must be below the vocabulary size 257, got 257; must have sha256 "),
    (replace_by_a_shorter_shard, "must have 2024 bytes, got 1030; must have 500 tokens, got 3; must have sha256 "),
    (change_the_unused_header, "must have sha256 "),
    (os.unlink, "is missing"),
    (lambda path: (path.unlink(), path.mkdir()), "must be a readable token shard, got "),
]


@pytest.mark.parametrize(("harm", "reason"), HARMS, ids=[reason[:40] for _, reason in HARMS])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_shard_is_named_with_found_and_expected_and_no_other(corpus, split, harm, reason):
    bad = corpus / f"corpus_{split}_000000.bin"
    harm(bad)
    damaged, lines = check(corpus)
    wrong = [line for line in lines[:-1] if not line.endswith(": ok")]
    assert damaged == len(wrong) == 1
    assert wrong[0].startswith(f"{bad}: {reason}")
    assert lines[-1] == f"1 of {len(lines) - 1} damaged"


def test_any_flipped_bit_of_a_shard_is_found(corpus):
    path = corpus / "corpus_val_000000.bin"
    whole = path.read_bytes()
    for position in range(0, len(whole), 97):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert check(corpus)[0] == 1, position


def test_a_bad_token_is_found_beyond_the_part_that_training_scans_first(corpus, monkeypatch):
    monkeypatch.setattr(verify, "SCANNED_TOKENS", 64)
    path = corpus / "corpus_train_000000.bin"
    content = bytearray(path.read_bytes())
    content[-2:] = b"\xff\xff"
    path.write_bytes(content)
    assert f"{path}: token 499 must be below the vocabulary size 257, got 65535" in "\n".join(check(corpus)[1])


def test_a_shard_that_is_not_listed_is_a_warning(corpus):
    (corpus / "stray_train_000000.bin").write_bytes(b"whatever")
    damaged, lines = check(corpus)
    assert damaged == 0
    assert f"{corpus / 'stray_train_000000.bin'}: not in manifest.json, so nothing reads it" in lines


OF_SHARDS = "must be a manifest of shards, got "
MANIFESTS = [
    pytest.param(lambda m: m.clear(), OF_SHARDS + "no field tokenizer", id="empty"),
    pytest.param(lambda m: m["shards"][0].pop("sha256"), OF_SHARDS + "no field sha256", id="no digest"),
    pytest.param(lambda m: m["shards"][0].update(file=7), OF_SHARDS + "an integer", id="a number"),
    pytest.param(lambda m: m["shards"][0].update(file="../x"), OF_SHARDS + "a shard in ", id="outside"),
    pytest.param(lambda m: m.update(text_bytes="1"), OF_SHARDS + "text in ", id="a summary"),
    pytest.param(lambda m: m["tokens"].pop("val"), OF_SHARDS + "no field val", id="no summary"),
    pytest.param(lambda m: m.update(tokenizer="byte"), "the tokenizer must be one that exists, got 'byte'", id="name"),
]


@pytest.mark.parametrize(("change", "reason"), MANIFESTS)
def test_a_damaged_manifest_is_named_and_the_shards_are_checked_all_the_same(corpus, change, reason):
    rewrite_manifest(corpus, change)
    cut(corpus / "corpus_train_000001.bin")
    damaged, lines = check(corpus)
    assert damaged == 2
    assert lines[0].startswith(f"{corpus / 'manifest.json'}: {reason}")
    assert f"{corpus / 'corpus_train_000001.bin'}: 500 tokens take 2024 bytes" in "\n".join(lines)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"\x00" * 50], ids=repr)
def test_a_manifest_of_any_bytes_is_named(corpus, content):
    (corpus / shards.MANIFEST).write_bytes(content)
    damaged, lines = check(corpus)
    assert damaged == 1
    assert lines[0].startswith(f"{corpus / 'manifest.json'}: must be a manifest of shards")


def test_shards_without_a_manifest_are_checked_against_gpt2_s_vocabulary(tmp_path):
    shards.write_shard(tmp_path / "x_train_000000.bin", np.array([50256, 1], dtype=np.uint16))
    shards.write_shard(tmp_path / "x_val_000000.bin", np.array([50256, 50257], dtype=np.uint16))
    np.save(tmp_path / "x_val_000001.npy", np.arange(9, dtype=np.uint16))
    damaged, lines = check(tmp_path)
    assert damaged == 1
    assert lines == [
        f"{tmp_path / 'x_train_000000.bin'}: ok",
        f"{tmp_path / 'x_val_000000.bin'}: token 1 must be below the vocabulary size 50257, got 50257",
        f"{tmp_path / 'x_val_000001.npy'}: ok",
        "1 of 3 damaged",
    ]


def test_a_preparation_that_was_stopped_is_damage(tmp_path):
    (tmp_path / shards.BUILDING).mkdir()
    damaged, lines = check(tmp_path)
    assert damaged == 1
    assert "a preparation that was stopped; run gpt2 prepare again" in lines[0]


def test_shards_are_checked_without_pytorch(corpus):
    code = (
        "import sys\nfrom engine import cli\n"
        f"code = cli.main(['verify', {str(corpus)!r}])\nsys.exit(code or ('torch' in sys.modules and 9) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- Runs ---------------------------------------------------------------------------------------------------------


def test_a_whole_run_is_one_line_per_checkpoint(run):
    damaged, lines = check(run)
    assert damaged == 0
    names = ["config.json", "metrics.jsonl", "checkpoints/step_00000001", "checkpoints/step_00000002"]
    assert lines == [*(f"{run / name}: ok" for name in names), "all 4 whole"]


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("harm", [cut, empty, os.unlink], ids=["cut", "empty", "missing"])
def test_a_damaged_checkpoint_is_named_with_its_file_and_no_other(run, name, harm):
    bad = run / "checkpoints" / "step_00000001"
    harm(bad / name)
    damaged, lines = check(run)
    wrong = [line for line in lines[:-1] if not line.endswith(": ok")]
    assert damaged == len(wrong) == 1
    assert wrong[0].startswith(f"{bad}: {name} ")


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE])
def test_a_flipped_bit_in_a_checkpoint_is_found(run, name):
    path = run / "checkpoints" / "step_00000002" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    damaged, lines = check(run)
    assert damaged == 1
    assert f"{path.parent}: {name} does not match its sha256" in lines


def test_checkpoints_that_are_gone_or_set_aside_are_looked_for(run):
    aside = run / "checkpoints" / "aside_1"
    aside.mkdir()
    (run / "checkpoints" / "step_00000002").rename(aside / "step_00000002")
    empty(aside / "step_00000002" / checkpoint.MODEL)
    damaged, lines = check(run)
    assert damaged == 1
    assert lines[3].startswith(f"{aside / 'step_00000002'}: {checkpoint.MODEL} must have")
    shutil.rmtree(run / "checkpoints")
    damaged, lines = check(run)
    assert damaged == 1
    assert f"{run / 'checkpoints'}: must hold the checkpoints that this run saved, got none" in lines


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", "must be the config of a run", id="empty"),
        pytest.param(b"[]", "must be the config of a run", id="a list"),
        pytest.param(b"\xff\xfe", "must be the config of a run", id="no text"),
        pytest.param(None, "is missing", id="missing"),
    ],
)
def test_a_damaged_config_is_named(run, content, reason):
    path = run / "config.json"
    path.unlink() if content is None else path.write_bytes(content)
    damaged, lines = check(run)
    assert damaged == 1
    assert lines[0].startswith(f"{path}: {reason}")


GOOD = b'{"step": 0, "tokens": 0}\n{"step": 10, "tokens": 9}\n'


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(b"", None, id="no row yet"),
        pytest.param(GOOD + b'{"step": 20, "tok', None, id="a last line cut short"),
        pytest.param(GOOD + b"\0" * 40, None, id="zeros after a power cut"),
        pytest.param(GOOD[:5] + b"\n" + GOOD, "line 1 must be a row with a step, got b'{\"ste'", id="a cut in front"),
        pytest.param(GOOD + b'{"stup": 20}\n', "line 3 must be a row with a step", id="a flipped bit in a name"),
        pytest.param(GOOD + b"\xff\xfe\n", "line 3 must be a row with a step", id="no text"),
        pytest.param(GOOD + GOOD, "line 3 must have a step above 10, got 0", id="rows twice"),
        pytest.param(GOOD + b'{"step": "20"}\n', "line 3 must be a row with a step", id="a word for a step"),
    ],
)
def test_rows_are_read_one_by_one(run, content, reason):
    (run / "metrics.jsonl").write_bytes(content)
    damaged, lines = check(run)
    assert damaged == (reason is not None)
    assert lines[1].startswith(f"{run / 'metrics.jsonl'}: {reason or 'ok'}")


# ---- The command --------------------------------------------------------------------------------------------------


def test_the_exit_code_is_0_for_whole_and_1_for_damaged(corpus, run, capsys):
    assert cli.main(["verify", str(corpus), str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all ")
    cut(run / "checkpoints" / "step_00000002" / checkpoint.MODEL)
    assert cli.main(["verify", str(corpus), str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("1 of ")


def test_a_path_that_is_neither_is_bad_input_before_anything_is_read(corpus, tmp_path, capsys):
    (tmp_path / "neither").mkdir()
    for path in (tmp_path / "neither", tmp_path / "nowhere", corpus / "manifest.json"):
        assert cli.main(["verify", str(corpus), str(path)]) == 2
        out, err = capsys.readouterr()
        assert err.startswith("verify: a path must be a directory of token shards, made by gpt2 prepare, or of a")
        assert str(path) in err
        assert out == ""
    with pytest.raises(BadInput, match="must be a directory"):
        check(tmp_path / "nowhere")


def test_no_path_is_bad_input(capsys):
    assert cli.main(["verify"]) == 2
    assert "a path must be given" in capsys.readouterr().err
