"""What a directory stands for, and all that is no text: said by name and place, never dropped or read in silence."""

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpora import run, set_batch, texts, write_library

from engine import cli
from engine.errors import BadInput
from engine.tokens import prepare
from engine.tokens.preparation.progress import Progress
from engine.tokens.prepare import PrepareConfig
from engine.tokens.reading import sources
from engine.tokens.shards import MAGIC

WORDS = "Some words that are text.\n"


def tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}) + "\n" if name.lower().endswith("jsonl") else name)
    return root


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    """Ends what hangs."""

    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def found(root: Path) -> tuple[list[str], dict[str, int]]:
    """Names of the files that are read, and counts of what is not."""
    walked = sources.find([str(root)])
    return [str(path.relative_to(root)) for path in walked.files], dict(walked.not_read)


# ---- Directories --------------------------------------------------------------------------------------------------


def test_a_directory_says_what_of_it_is_not_read(tmp_path):
    hidden = ".git/a.txt", "sub/.venv/b.py", "node_modules/c.md", "__MACOSX/d.txt", "sub/__pycache__/e.py", ".f.txt"
    root = tree(tmp_path / "in", "a.TXT", "sub/b.Jsonl", "c.csv", "x.csv.gz", "y.csv.gz", "LICENSE", *hidden)
    tree(root, "two/train/a.txt", "two/val/b.txt")
    files, not_read = found(root)
    assert files == ["a.TXT", "sub/b.Jsonl", "two/train/a.txt"]
    directories = dict.fromkeys([".git/", ".venv/", "node_modules/", "__MACOSX/", "__pycache__/"], 1)
    assert not_read == {".csv": 1, ".csv.gz": 2, "without a suffix": 1, "hidden": 1, **directories}
    text = prepare.describe(run(root, tmp_path / "out", val_fraction=0.5), "out")
    assert "of text from 2 .txt, 1 .jsonl, " in text
    assert "\n  not read: 2 .csv.gz, 1 .csv, 1 .git/, " in text
    assert f"\n  held out: {root}/two/val/, test or validation sets beside a train set; name them as sources" in text


@pytest.mark.parametrize(
    ("names", "left"),
    [
        (["train.jsonl", "test.jsonl", "my_val.JSONL"], {"test.jsonl"}),
        (["a/train-00.parquet", "a/validation-00.parquet", "b/test-00.parquet"], {"a/validation-00.parquet"}),
        (["c4-train.00000-of-01024.jsonl", "c4-validation.00000-of-8.jsonl"], {"c4-validation.00000-of-8.jsonl"}),
        (["train/a.txt", "dev/b.txt", "notes.txt"], {"dev/b.txt"}),
        (["The Girl on the Train.txt", "The Electric Kool-Aid Acid Test.txt", "test.txt"], set()),
        (["src/train/a.py", "src/train/notes.txt", "src/eval/b.py", "src/dev/b.txt"], set()),
        (["docs/training/a.txt", "docs/test/b.txt"], set()),
        (["train.txt", "train_test.txt", "contest.txt", "evaluate.txt"], set()),
        (["train.py", "test.py", "eval.py", "a.txt"], set()),
        (["test.txt", "eval.txt"], set()),
    ],
)
def test_held_out_sets_beside_train_sets_are_left_out_with_a_word(tmp_path, names, left):
    walked = sources.find([str(tree(tmp_path / "in", *names))])
    assert {str(path.relative_to(tmp_path / "in")) for path in walked.files} == set(names) - left
    assert {str(path) for path in walked.held_out} == {
        str(tmp_path / "in" / name).removesuffix("/b.txt") for name in left
    }
    named = [str(tmp_path / "in" / name) for name in names]
    assert [str(path) for path in sources.find(named).files] == named  # what is named is read


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["README.md", "LICENSE.txt", "en/a.jsonl"], ["en/a.jsonl"]),
        (["README.md", "en/a.json.gz"], ["en/a.json.gz"]),
        (["README.md", "a.json"], ["a.json"]),
        (["README.md", "b.py", "package.json"], ["README.md", "b.py", "package.json"]),
        (["README.md", "LICENSE"], ["README.md"]),
        (["README.md", ".git/config"], ["README.md"]),
        (["README.md", "tests/fixtures/a.jsonl"], ["README.md", "tests/fixtures/a.jsonl"]),
        (
            ["License to Kill.txt", "Notice to Quit.txt", "a.jsonl"],
            ["License to Kill.txt", "Notice to Quit.txt", "a.jsonl"],
        ),
    ],
)
def test_the_card_of_a_data_set_is_no_corpus(tmp_path, names, read):
    assert found(tree(tmp_path / "in", *names))[0] == read


def test_a_card_beside_packed_data_is_refused_with_the_way_to_unpack_it(tmp_path):
    root = tree(tmp_path / "c4", "README.md", "en/c4-train.csv.gz")
    (root / "en" / "c4-train.csv.gz").write_bytes(b"\x1f\x8b\x08 packed")
    (root / ".gitattributes").touch()
    with pytest.raises(BadInput, match=r"not read: 1 .csv.gz, 1 README.md .*gzip data; try: gunzip -c .*csv"):
        found(root)


def test_tokens_as_a_source_are_refused_with_the_command_that_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "engine.cli", "prepare"])
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(bytes([198, 0, 80, 40]) * 50)
    for source in (tmp_path, tmp_path / "train.bin"):
        with pytest.raises(BadInput, match=rf"; python -m engine.cli train --data {tmp_path} reads them as they are$"):
            sources.find([str(source)])
    (tmp_path / "x.bin").write_bytes(MAGIC.to_bytes(4, "little"))
    with pytest.raises(BadInput, match=r"needs no preparation: python -m engine.cli train takes its directory"):
        sources.find([str(tmp_path / "x.bin")])


def test_linked_directories_are_read_once_and_circles_end(tmp_path):
    root = tree(tmp_path / "in", "a.txt", "b/c.txt")
    tree(tmp_path / "else", "d.txt")
    tree(tmp_path, "outside.txt")
    for link, target in (("a_loop", root), ("b/up", root), ("above", tmp_path), ("also", tmp_path / "else")):
        (root / link).symlink_to(target)
    (root / "again").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "back").symlink_to(tmp_path / "else")
    assert found(root) == (["a.txt", "b/c.txt", "again/d.txt"], {"linked directory that leads upwards": 4})
    assert "\n  linked directories that were read: 1\n" in prepare.describe(run(root, tmp_path / "out"), "out")


def test_what_cannot_be_opened_is_a_sentence_and_never_a_hang(tmp_path, monkeypatch):
    root = tree(tmp_path / "in", "a.txt", "b.txt")
    os.mkfifo(root / "p.txt")
    assert found(root) == (["a.txt", "b.txt"], {"named pipe": 1})
    for source, sentence in (
        (str(root / "p.txt"), "a source must be a file or a directory, got .*p.txt, a named pipe"),
        ("/dev/zero", "a source must be a file or a directory, got /dev/zero, a device"),
        ("", "got an empty word"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(BadInput, match=sentence):
            sources.find([source])
    walked = sources.find([str(root)])
    (root / "b.txt").unlink()  # between the walk and the reading
    monkeypatch.setattr(prepare, "find", lambda *_: walked)
    with pytest.raises(BadInput, match=r"b.txt: must be a file that can be read, got No such file"):
        run(root, tmp_path / "out")
    monkeypatch.setattr(prepare, "_stat", lambda path: os.stat(root))
    with pytest.raises(BadInput, match=r"b.txt: must be a file that can be read, got No such file"):
        run(root, tmp_path / "out")
    os.mkfifo(root / "b.txt")
    with alarm(20), pytest.raises(BadInput, match=r"b.txt: must be a file that can be read, got a named pipe"):
        run(root, tmp_path / "out")
    (root / "b.txt").unlink()
    (root / "b.txt").symlink_to("nowhere")
    with pytest.raises(BadInput, match=r"b.txt: must be .* got a link to nowhere, which does not exist"):
        found(root)


# ---- Bad text -----------------------------------------------------------------------------------------------------


def bad_byte(root: Path) -> Path:
    """A corpus with one wrong byte, at 1,000, and a small file beside it."""
    root.mkdir()
    (root / "corpus.txt").write_bytes(b"x" * 1000 + b"\xff" + b"y" * 8999)
    (root / "notes.txt").write_text(WORDS * 4)
    return root


def test_one_bad_byte_is_named_and_a_large_loss_is_loud(tmp_path):
    (bad_byte(tmp_path / "in") / "empty.txt").touch()
    text = prepare.describe(run(tmp_path / "in", tmp_path / "out"), "out")
    assert "empty.txt" not in text
    assert text.startswith("WARNING: 99% of the sources' bytes were left out")
    assert "left out: 1 empty, 1 not UTF-8; 10,000 of 10,104 bytes (99.0%)" in text
    assert "in/corpus.txt, 10,000 bytes: not UTF-8 at byte 1,000 of 10,000 (0xff)" in text
    assert "--on-bad-text replace" in text
    small = write_library(tmp_path / "library")
    (small / "bad.txt").write_bytes(b"\xff")
    assert not prepare.describe(run(small, tmp_path / "other"), "other").startswith("WARNING")


def test_replace_keeps_the_rest_and_counts(tmp_path):
    root = bad_byte(tmp_path / "in")
    (root / "a.jsonl").write_bytes(b'{"text": "caf\xe9 and \\ud800 more \xef\xbf\xbd words"}\n')
    (root / "b.txt").write_bytes(b"\xef\xbb\xbfa NUL\x00in text")
    (root / "c.jsonl").write_bytes(b'{"other": "' + b"\xff" * 90 + b'", "text": "whole"}\n')
    (root / "cyrillic.txt").write_bytes("Это не UTF-8".encode("cp1251"))
    manifest = run(root, tmp_path / "out", on_bad_text="replace")
    kept = texts(tmp_path / "out", "train") + texts(tmp_path / "out", "val")
    assert set(kept) == {
        "x" * 1000 + "\ufffd" + "y" * 8999,
        WORDS * 4,
        "caf\ufffd and \ufffd more \ufffd words",
        "a NUL\0in text",
        "whole",
    }
    assert (manifest["replaced"], manifest["skipped"]) == (3, {"mostly not UTF-8": 1})
    assert "U+FFFD in place of bad bytes: 3" in prepare.describe(manifest, "out")


def test_the_files_that_lose_most_are_named_and_few(tmp_path, monkeypatch):
    set_batch(monkeypatch, 300)  # a file's lines in several batches
    root = write_library(tmp_path / "in")
    for i in range(300):
        (root / f"bad_{i:03d}.txt").write_bytes(b"\xff" * (i + 1))
    (root / "z.jsonl").write_bytes(b'{"text": "fine"}\n' + b"no JSON\n" * 100)
    losses = run(root, tmp_path / "out", workers=2)["left_out"]
    assert [(Path(one["file"]).name, one["bytes"]) for one in losses["files"]] == [
        ("z.jsonl", 800),
        ("bad_299.txt", 300),
        ("bad_298.txt", 299),
    ]
    assert losses["files"][0]["first"].startswith("line 2, not JSON at character 0")
    assert losses["bytes"] == 800 + 300 * 301 // 2


def test_fail_is_not_answered_with_what_skip_made(tmp_path):
    root = bad_byte(tmp_path / "in")
    first = run(root, tmp_path / "out")
    with pytest.raises(BadInput, match=r"every document must be text, got .*out made without some: left out: 1 not"):
        run(root, tmp_path / "out", on_bad_text="fail")
    assert run(root, tmp_path / "out") == first
    with pytest.raises(BadInput, match=r"must be new or empty"):
        run(root, tmp_path / "out", on_bad_text="replace")
    clean = tree(tmp_path / "clean", "a.txt", "b.txt")
    assert run(clean, tmp_path / "two", on_bad_text="fail") == run(clean, tmp_path / "two")  # the same bytes


def test_an_edited_manifest_is_a_sentence(tmp_path):
    root = tree(tmp_path / "in", "a.txt", "b.txt")
    manifest = run(root, tmp_path / "out")
    for field in ("skipped", "tokens", "text_bytes", "left_out"):
        broken = json.dumps({**manifest, field: "no", "source_bytes": {}})
        (tmp_path / "out" / "manifest.json").write_text(broken)
        with pytest.raises(BadInput, match=r"manifest.json: must be (as prepare wrote it|a manifest of shards)"):
            run(root, tmp_path / "out")
    assert run(root, tmp_path / "out", overwrite=True) == manifest


# ---- Formats ------------------------------------------------------------------------------------------------------

FOREIGN = [
    ("data.txt", b"\x1f\x8b\x08 and more", "gzip data; try: mv .*data.txt .*data.txt.gz"),
    ("data.jsonl", b"\x28\xb5\x2f\xfd and more", "Zstandard data; try: mv .*data.jsonl .*data.jsonl.zst"),
    ("data.txt", b"PK\x03\x04 and more", "a zip archive; try: unzip"),
    ("data.txt", b"PAR1 and more", "a parquet file; try: mv .*data.txt .*data.parquet"),
    ("data.md", b"%PDF-1.7 and more", "a PDF document; try: pdftotext"),
    ("data.txt", WORDS.encode("utf-16"), "UTF-16 text; try: iconv -f UTF-16 -t UTF-8 .*data.txt > .*data_text.txt"),
    ("data.txt", WORDS.encode("utf-16-le"), "binary data, or UTF-16 text without a byte-order mark"),
    ("data.jsonl", b'[\n{"text": "a"},\n{"text": "b"}]', "a JSON array; try: mv .*data.jsonl .*data.json"),
    ("data.log", b'{"text": "a"}\n{"text": "b"}\n', "JSON lines; try: mv .*data.log .*data.jsonl"),
    ("data.json", b'[\n {"content": "a"}]', 'without the field "text", .* are: content; add --text-field content'),
    ("data.txt", b"ARROW1 and more", "an Arrow file; try: mv .*data.txt .*data.arrow"),
    ("data.tar.gz", b"\x1f\x8b\x08", "a packed tar archive; try: tar -xf .*data.tar.gz"),
    ("data.csv.xz", b"\xfd7zXZ\0", "xz data; try: xz -dc .*data.csv.xz > .*data.csv"),
    ("data.gz", b"\x1f\x8b\x08", "gzip data; try: mv .*data.gz .*data.txt.gz"),
    ("data.tex", b"Plain words.", "text; try: cp .*data.tex .*data.txt"),
    ("data.csv", b"a,b\n1,2\n", "a table; write one column"),
    (
        "data.jsonl",
        b'{"content": "a", "id": 7}\n',
        'without the field "text", .* are: content; add --text-field content',
    ),
    ("data.jsonl", b"Plain words.\n", "records that are no JSON objects"),
    ("data.bin", MAGIC.to_bytes(4, "little") + bytes(100), "a token shard, which needs no preparation"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), FOREIGN, ids=[f"{one[0]} {one[2][:12]}" for one in FOREIGN])
def test_another_format_under_a_name_is_named_with_the_way_in(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=sentence):
        run(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_odd_records_are_no_reason_to_refuse_a_file_or_the_files_after_it(tmp_path, capsys):
    root, odd = tmp_path / "in", '{"version": 1}\n'
    root.mkdir()
    (root / "a.jsonl").write_text("[INFO] a log's line\n" + odd * 5000 + '{"text": "long"}\n')
    assert run(root, tmp_path / "one", val_fraction=0.5)["documents"] == {"train": 1, "val": 1}  # its tail
    assert 'a.jsonl begins with records without the field "text", whose' in capsys.readouterr().err
    for i in range(17):
        (root / f"b{i:02d}.jsonl").write_text(odd)
    tree(root, "c.txt")
    manifest = run(root, tmp_path / "two", val_fraction=0.5)
    assert manifest["skipped"] == {"not JSON": 1, 'no text field "text"': 5017}
    assert manifest["text_bytes"] == len("long") + len("c.txt")


def test_a_directory_without_permission_is_counted_and_one_that_fails_is_refused(tmp_path, monkeypatch):
    root, scandir, errors = tree(tmp_path / "in", "a.txt", "sub/b.txt"), os.scandir, {}

    def refuse(path):
        if str(path) in errors:
            raise OSError(errors[str(path)], os.strerror(errors[str(path)]), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    errors[str(root / "sub")] = errno.EACCES
    assert found(root) == (["a.txt"], {"directory without permission": 1})
    for path, code in ((root / "sub", errno.EIO), (root, errno.EACCES)):
        errors[str(path)] = code
        with pytest.raises(BadInput, match=f"{path}: must be a directory that can be read, got {os.strerror(code)}"):
            found(root)


# ---- Options and progress -----------------------------------------------------------------------------------------


def test_options_beyond_what_can_work_are_refused_at_once():
    wrong = {"shard_tokens": 2**31, "workers": 10**6, "val_fraction": 1e-320}
    with pytest.raises(
        BadInput, match=r"from 1e-09 .*1e-320; .*to 2,147,483,647, the int32 .*; .*1 to 1,024, got 1000"
    ):
        PrepareConfig("out", **wrong)
    PrepareConfig("out", shard_tokens=2**31 - 1, workers=1024, val_fraction=1e-9)


def test_a_long_preparation_prints_a_line_every_ten_seconds_and_a_short_one_none(capsys):
    now = [0.0]
    progress = Progress(40_000_000, clock=lambda: now[0])
    for _ in range(21):
        progress.advance(1_000_000, 250_000)
        now[0] += 1.0
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "prepare: 11 of 40 MB, 1.1 MB/s, 0:26 left, 2.8M tokens",
        "prepare: 21 of 40 MB, 1.1 MB/s, 0:18 left, 5.2M tokens",
    ]


def test_a_terminal_shows_a_bar_that_goes_away(monkeypatch):
    import io

    stream, now = io.StringIO(), [0.0]
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    progress = Progress(48_000_000_000, stream=stream, clock=lambda: now[0])
    progress.advance(1, 1)
    assert stream.getvalue() == ""  # not at once
    now[0] = 3600.0
    progress.advance(45_000_000_000, 9_876_000_000)
    progress.close()
    assert "45.0 of 48.0 GB, 12.5 MB/s, 4:00 left, 9.88B tokens" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("\x1b[2K")


def test_the_command_ends_with_the_code_and_the_sentence(tmp_path, capsys):
    (tmp_path / "content.jsonl").write_text('{"content": "words"}\n')
    args = ["prepare", str(tmp_path / "content.jsonl"), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert cli.main(args) == 2
    assert "add --text-field content" in capsys.readouterr().err
    assert cli.main([*args, "--text-field", "content", "--tokenizer", "bytes", "--val-fraction", "0.4"]) == 0
