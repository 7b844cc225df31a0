"""The record of a run is as safe as its weights: damage costs a line, a full disk nothing."""

import dataclasses
import errno
import json
import math
import os
import resource
import shutil
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import refuse, train

from engine import cli
from engine.config import PRESETS
from engine.errors import BAD_INPUT
from engine.run import curves, plots, repair, rows
from engine.run.appender import Appender
from engine.run.console import Bar
from engine.run.curves import Curves
from engine.run.metrics import Metrics, last_sample, read_rows
from engine.run.sinks import Sinks

ROWS = [{"step": 10 * n, "tokens": 2560 * n, "loss": 5.5 - n / 16, "lr": 1e-05 * n} for n in range(12)]
TEXT = [json.dumps(row).encode() + b"\n" for row in ROWS]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def reopened(path: Path, step: int = 1000) -> tuple[list[dict], list[str]]:
    """The rows that a run which resumes at `step` keeps, and what it says."""
    kept, said = [], []
    repair.drop_rows_from(path, step, kept.append, said.append)
    assert read_rows(path) == kept
    return kept, said


# ---- Damaged lines ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    at=st.integers(0, len(b"".join(TEXT)) - 1),
    byte=st.integers(0, 255),
    how=st.sampled_from(["replace", "insert", "delete"]),
)
def test_a_byte_costs_at_most_the_lines_it_touches(at, byte, how):
    content = b"".join(TEXT)
    harmed = content[:at] + bytes([byte])[: how != "delete"] + content[at + (how != "insert") :]
    first = content[:at].count(b"\n")
    touched = {first, first + 1} if content[at : at + 1] == b"\n" else {first}
    untouched = [row for number, row in enumerate(ROWS) if number not in touched]
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "metrics.jsonl", harmed)
        kept, said = reopened(path)
        assert [row for row in kept if row in untouched] == untouched
        assert [row["step"] for row in kept] == sorted({row["step"] for row in kept})
        copies = [copy.read_bytes() for copy in Path(folder).glob("*.damaged1")]
        assert copies == [harmed] * len(said)  # whatever is taken out is said, and kept
        assert reopened(path) == (kept, [])


def at_line(number: int, *lines: bytes, replaces: int = 0) -> bytes:
    return b"".join([*TEXT[:number], *lines, *TEXT[number + replaces :]])


def with_step(number: int, step: int) -> bytes:
    return at_line(number, json.dumps(ROWS[number] | {"step": step}).encode() + b"\n", replaces=1)


@pytest.mark.parametrize(
    ("content", "lost", "count"),
    [
        pytest.param(at_line(3, b'{"step"; 30}\n', replaces=1), [3], 1, id="a flipped bit"),
        pytest.param(at_line(0, b'{"stup": 0}\n', replaces=1), [0], 1, id="a flipped bit in the first"),
        pytest.param(at_line(3, b'{"step": 25, "tokens": 6400, "note": "\xff"}\n'), [], 1, id="no UTF-8"),
        pytest.param(at_line(3, b"\n"), [], 1, id="an empty line"),
        pytest.param(at_line(3, b"\n\n", b"[]\n", b'{"step": "30"}\n'), [], 4, id="four lines"),
        pytest.param(b"\xef\xbb\xbf" + b"".join(TEXT), [], 1, id="a byte order mark in front"),
        pytest.param(at_line(3, b"\xef\xbb\xbf" + TEXT[3], replaces=1), [3], 1, id="a byte order mark further on"),
        pytest.param(at_line(3, "\u2028\x85\x0b\x0c\x1c".encode() + b"\n"), [], 1, id="other ends of lines"),
        pytest.param(at_line(3, b"\0" * 4096 + TEXT[3], replaces=1), [3], 1, id="a page of zeros"),
        pytest.param(at_line(3, b"0" * 3_000_000 + b"\n"), [], 1, id="a line of three megabytes"),
        pytest.param(at_line(3, b"[" * 200_000 + b"\n"), [], 1, id="deep nesting"),
        pytest.param(at_line(3, b'{"step": 1' + b"0" * 30 + b"}\n"), [], 1, id="a step over 2^63"),
        pytest.param(with_step(5, 90), [5], 1, id="a step too high"),
        pytest.param(with_step(5, 10), [5], 1, id="a step too low"),
        pytest.param(with_step(5, 35), [5], 1, id="a step too low, by a little"),
        pytest.param(with_step(0, 14), [0], 1, id="a first step too high"),
        pytest.param(with_step(11, 90), [11], 1, id="a last step too low"),
        pytest.param(b"".join(TEXT) + b'{"step": 200, "tok', [], 0, id="cut short: no damage"),
        pytest.param(b"".join(TEXT)[:-1], [], 0, id="cut short before the end of the line"),
    ],
)
def test_a_bad_line_alone_is_dropped_said_and_kept_in_a_copy(tmp_path, content, lost, count):
    path = written(tmp_path / "metrics.jsonl", content)
    written(tmp_path / "metrics.jsonl.damaged1", b"an older copy")
    kept, said = reopened(path)
    assert kept == [row for number, row in enumerate(ROWS) if number not in lost]
    text = "1 line is damaged" if count == 1 else f"{count} lines are damaged"
    line = f"metrics.jsonl: {text} and left out; the file as it was is metrics.jsonl.damaged2"
    assert said == [line] * (count > 0)
    assert (tmp_path / "metrics.jsonl.damaged1").read_bytes() == b"an older copy"
    if count:
        assert (tmp_path / "metrics.jsonl.damaged2").read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 2 + (count > 0)


def test_text_with_other_ends_of_lines_is_one_row_and_a_number_that_is_none_is_null(tmp_path):
    odd = '{"step": 5, "note": "a\u2028b\u2029c\x85d", "loss": NaN, "val_loss": -Infinity}\n'.encode()
    kept, said = reopened(written(tmp_path / "metrics.jsonl", at_line(1, odd)))
    assert kept[1] == {"step": 5, "note": "a\u2028b\u2029c\x85d", "loss": None, "val_loss": None}
    assert (len(kept), said) == (13, [])


def test_of_rows_made_twice_the_later_stay(tmp_path):
    again = [json.dumps(row | {"loss": 1.0}).encode() + b"\n" for row in ROWS[4:9]]
    kept, said = reopened(written(tmp_path / "metrics.jsonl", b"".join(TEXT[:8] + again)))
    assert kept == ROWS[:4] + [row | {"loss": 1.0} for row in ROWS[4:9]]
    assert said == ["metrics.jsonl: 4 lines are damaged and left out; the file as it was is metrics.jsonl.damaged1"]


def test_rows_from_the_checkpoint_on_are_cut_off_in_place(tmp_path):
    """A file of gigabytes is not written anew, and damage behind the cut is not worth a line."""
    path = written(tmp_path / "metrics.jsonl", b"".join(TEXT) + b"\xff\n")
    inode = path.stat().st_ino
    assert reopened(path, step=40) == (ROWS[:4], [])
    assert path.read_bytes() == b"".join(TEXT[:4])
    assert path.stat().st_ino == inode


def test_a_disk_without_room_for_a_new_file_leaves_the_damaged_one(tmp_path, monkeypatch):
    path = written(tmp_path / "metrics.jsonl", at_line(3, b"\xff\n"))
    with monkeypatch.context() as patch:
        patch.setattr(repair, "_copy", raising(OSError(errno.ENOSPC, "No space left on device")))
        kept, said = reopened(path, step=80)
    assert kept == ROWS[:8]
    assert "1 line is damaged and cannot be taken out of it: No space left on device" in said[0]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert path.read_bytes() == at_line(3, b"\xff\n")[: len(b"".join(TEXT[:8])) + 2]  # the rest is cut off all the same


def test_without_hard_links_the_copy_is_written(tmp_path, monkeypatch):
    path = written(tmp_path / "metrics.jsonl", at_line(3, b"\xff\n"))
    monkeypatch.setattr(os, "link", raising(OSError(errno.EPERM, "Operation not permitted")))
    assert reopened(path)[0] == ROWS
    assert (tmp_path / "metrics.jsonl.damaged1").read_bytes() == at_line(3, b"\xff\n")


def raising(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
@pytest.mark.parametrize(
    "make", [Path.mkdir, make_fifo, lambda path: path.symlink_to(path)], ids=["dir", "fifo", "loop"]
)
def test_what_cannot_be_read_is_set_aside_and_the_run_goes_on(tmp_path, make, name, capsys):
    make(tmp_path / name)
    run = record(tmp_path, start=7)
    run.log(7, loss=1.0)
    run.sample(7, "text")
    run.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [7]
    assert last_sample(tmp_path / "samples.txt") == "text"
    assert os.path.lexists(tmp_path / f"{name}.damaged1")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{name}: must be a file that can be read, got: ")
    assert line.endswith(f"; it is kept as {name}.damaged1, and a new one begins")


def record(out: Path, start: int = 0) -> Metrics:
    return Metrics(dataclasses.replace(PRESETS["tiny"], out=str(out), num_steps=1000), start, True, "byte")


# ---- Samples ------------------------------------------------------------------------------------------------------

SAMPLES = [f"=== step {step} ===\n".encode() + b"caf\xe9 \xe2\x80\xa8 of \xff\n\n" for step in (0, 10, 20, 30)]


def test_samples_keep_their_bytes(tmp_path):
    path = written(tmp_path / "samples.txt", b"".join(SAMPLES))
    repair.drop_samples_from(path, 20, refuse)
    assert path.read_bytes() == b"".join(SAMPLES[:2])
    assert last_sample(path) == "caf\ufffd \u2028 of \ufffd"


def test_a_heading_with_a_wrong_step_costs_its_sample_alone(tmp_path):
    harmed = b"".join(SAMPLES).replace(b"step 10", b"step 90")
    path, said = written(tmp_path / "samples.txt", harmed), []
    repair.drop_samples_from(path, 30, said.append)
    assert path.read_bytes() == SAMPLES[0] + SAMPLES[2]
    assert said == ["samples.txt: 1 sample is damaged and left out; the file as it was is samples.txt.damaged1"]
    assert (tmp_path / "samples.txt.damaged1").read_bytes() == harmed


@pytest.mark.parametrize("before", [0, 5, repair.CHUNK - 20, repair.CHUNK, 3 * repair.CHUNK])
def test_the_last_sample_is_found_whatever_its_size(tmp_path, before):
    path = written(tmp_path / "samples.txt", SAMPLES[0] + b"=== step 7 ===\n" + b"x" * before + b"\n\n")
    assert last_sample(path) == "x" * before
    text = b"x=== step 9 ===\n" + b"y" * (repair.CHUNK - 17)  # read from the = on, it would seem a heading
    assert last_sample(written(path, SAMPLES[0] + text + b"\n\n")).endswith(text.decode())


def test_the_last_sample_costs_no_reading_of_the_others(tmp_path):
    path = tmp_path / "samples.txt"
    with path.open("wb") as file:
        file.truncate(1 << 28)
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + SAMPLES[0])
    tracemalloc.start()
    text, peak = last_sample(path), tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text.startswith("caf")
    assert peak < 1_000_000


# ---- A disk that fails --------------------------------------------------------------------------------------------


@contextmanager
def largest_file(size: int):
    """Lets no file of this process grow beyond `size`: writes stop in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_that_does_not_fit_waits_and_no_half_of_it_stays(tmp_path):
    path, said = tmp_path / "metrics.jsonl", []
    file = Appender(path, "row", said.append)
    file.append(TEXT[0])
    with largest_file(len(TEXT[0]) + 7):
        for number in (1, 2):
            file.append(TEXT[number])
            assert path.read_bytes() == TEXT[0]
        file.sync()
        assert file.waiting == 2
    assert len(said) == 1
    assert said[0].startswith("metrics.jsonl: must be written, got: File too large; training goes on, each row waits")
    file.append(TEXT[3])
    assert said[1:] == ["metrics.jsonl: can be written again, and holds the 3 rows that waited"]
    assert path.read_bytes() == b"".join(TEXT[:4])
    with largest_file(path.stat().st_size + 7):
        file.append(TEXT[4])
        file.close()
    assert said[-1] == "metrics.jsonl: must be written, got: File too large; 1 row missing"
    assert path.read_bytes() == b"".join(TEXT[:4])


def test_rows_that_wait_are_bounded_and_the_loss_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run.appender.MOST_WAITING", 3 * len(TEXT[0]))
    said = []
    file = Appender(tmp_path / "missing" / "metrics.jsonl", "row", said.append)
    for _ in range(10):
        file.append(TEXT[0])
    assert file.waiting == 3
    (tmp_path / "missing").mkdir()
    file.close()
    assert (tmp_path / "missing" / "metrics.jsonl").read_bytes() == 3 * TEXT[0]
    assert said[-1] == "metrics.jsonl: must be written, got: No such file or directory; 7 rows missing"


def test_a_checkpoint_that_lacks_rows_is_said_and_saved(tmp_path, capsys):
    run = record(tmp_path)
    run._rows._path = tmp_path / "gone" / "metrics.jsonl"
    run._rows._leave()
    for step in range(2):
        run.log(step, loss=1.0)
        run.end_step(step)
    run.sync(row_is_complete=False)
    assert "metrics.jsonl: lacks 2 rows at this checkpoint, which is saved all the same" in capsys.readouterr().out
    run.close()


def test_a_run_goes_on_from_a_damaged_record_and_through_a_full_disk(trained, shards, tmp_path, monkeypatch, capfd):
    out, full = tmp_path / "run", [False]
    shutil.copytree(trained, out)
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(b"\xff" + whole)
    write = Appender._write_whole

    def fail_once(self, piece):
        if not full[0] and piece.startswith(b'{"step": 2'):
            full[0] = True
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, piece)

    monkeypatch.setattr(Appender, "_write_whole", fail_once)
    assert train(out, shards, "--num-steps", "4", "--eval-every", "None") == 0
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_rows(out / "metrics.jsonl")[0] == json.loads(whole.splitlines()[1])
    assert (out / "metrics.jsonl.damaged1").read_bytes() == b"\xff" + whole
    output = capfd.readouterr().out
    assert "metrics.jsonl: 1 line is damaged and left out; the file as it was is metrics.jsonl.damaged1\n" in output
    assert "metrics.jsonl: must be written, got: No space left on device; training goes on" in output
    assert "metrics.jsonl: can be written again, and holds the 2 rows that waited\n" in output


# ---- Numbers that are not finite ----------------------------------------------------------------------------------


def test_a_number_that_is_not_finite_is_null_and_stops_no_reader(tmp_path, capsys):
    run = record(tmp_path)
    for step, value in enumerate((math.nan, math.inf, -math.inf, 2.0)):
        run.log(step, val_loss=value, loss=value, lr=value)
        run.end_step(step)
    run.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert [row["val_loss"] for row in found] == [None, None, None, 2.0]
    run = record(tmp_path, start=9)
    assert [row["val_loss"] for row in run.rows() if "val_loss" in row] == [2.0]
    run.close()
    odd = [{"step": 1, "tokens": 1, "loss": 1e308, "lr": 10**400}, {"loss": 1.0}, {"tokens": "1", "loss": [1]}]
    plots.draw(run.config, [*found, *curves.read(tmp_path), *odd], "byte")
    Bar(1000, "byte", run.pace).update(0, {"val_loss": None, "loss": None})


def test_sinks_get_no_null(tmp_path):
    got = []
    sinks = Sinks(record(tmp_path).config, 0, refuse)
    sinks._open["one"] = type("Sink", (), {"write": lambda self, row: got.append(row)})()
    sinks.write({"step": 1, "loss": None, "lr": 0.5})
    assert got == [{"step": 1, "lr": 0.5}]


def test_plot_of_a_record_that_is_no_file_is_a_sentence(trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    assert cli.main(["plot", "--run", str(tmp_path / "run")]) == BAD_INPUT
    assert "metrics.jsonl must be a file of rows that can be read, got: it is a directory" in capsys.readouterr().err


# ---- Curves -------------------------------------------------------------------------------------------------------


def test_curves_are_bounded_and_keep_their_first_lowest_and_last_values():
    whole, count = Curves(), 20_001
    values = [5 - 3 * step / count for step in range(count)]
    values[3_456] = 0.25
    for step, value in enumerate(values):
        whole.add({"tokens": 8 * step} | dict.fromkeys(curves.MOST_POINTS, value))
    for name, most in curves.MOST_POINTS.items():
        points = [(row["tokens"], row[name]) for row in whole.rows() if name in row]
        assert most / 2 <= len(points) <= most + 3
        assert points == sorted(points)
        assert points[0] == (0, 5.0)
        assert (8 * 3_456, 0.25) in points
        assert points[-1] == (8 * (count - 1), values[-1])
        means = [y for x, y in points if 40_000 < x < 120_000 and y > 1 and abs(x - 8 * 3_456) > 1000]
        assert means == pytest.approx([5 - 3 * x / 8 / count for x, y in points if y in means], abs=1e-6)


def test_a_line_of_any_length_is_never_in_memory_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_LINE", 1000)
    path = written(tmp_path / "metrics.jsonl", TEXT[0] + b"0" * 5_000_000 + b"\n" + TEXT[1])
    tracemalloc.start()
    read = [row for _, row in rows.read(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == [ROWS[0], None, ROWS[1]]
    assert peak < 1_000_000


def test_an_evaluation_does_not_read_the_rows_again(tmp_path):
    written(tmp_path / "metrics.jsonl", b"".join(TEXT))
    run = record(tmp_path, start=50)
    run.log(50, loss=0.5)
    run.end_step(50)
    run.log(60, val_loss=0.25)
    (tmp_path / "metrics.jsonl").unlink()
    assert [row["loss"] for row in run.rows() if "loss" in row] == [row["loss"] for row in ROWS[:5]] + [0.5]
    assert run.rows()[-1] == {"step": 60, "tokens": run.tokens(60), "val_loss": 0.25}
    run.close()
