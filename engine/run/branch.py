"""Going back: the branch of a run that its newest checkpoint belongs to, and what was set aside for it.

    OUT/latest                  name of the newest checkpoint that was announced: see checkpoint.write
    OUT/went_back               JSON: the checkpoint that this branch began at, and what is set aside
    OUT/checkpoints/aside_1/    checkpoints of the branch that was left, its metrics.jsonl and samples.txt

`--resume PATH` goes back once. The same command run again, and one without --resume, goes on from
the newest checkpoint of the branch. Nothing is deleted. What is to be moved is noted first, so that
after a kill the next command finishes it.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from engine import durable
from engine.errors import BadInput
from engine.run import checkpoint as checkpoints
from engine.run import metrics
from engine.run.checkpoint import Checkpoint
from engine.run.verify import CHECKPOINTS, LATEST
from model import files

WENT_BACK = "went_back"
LONGEST_NAME = 4096  # bytes
NAME, ASIDE = re.compile(r"step_[^/]*"), re.compile(r"aside_[0-9]+")
RECORD = (metrics.METRICS_FILE, metrics.SAMPLES_FILE)


def run_of(path: str | Path) -> Path:
    """Run directory of a checkpoint, which may be set aside in it."""
    folder = Path(path).parent
    return folder.parent if folder.name == CHECKPOINTS else folder.parent.parent


def source(out: str | Path, resume: str) -> Path:
    """Directory of the run that --resume goes on from, "auto" or a path. What is damaged is `find`'s to refuse."""
    back = None
    with contextlib.suppress(BadInput):
        back = _read(Path(out))
    is_back = back is not None and back["to"] == _name(Path(out), resume)
    return Path(out) if resume == "auto" or is_back else run_of(resume)


def find(out: str | Path, resume: str, warn: Callable[[str], None]) -> tuple[Checkpoint | None, bool]:
    """(checkpoint to go on from or None, whether the run goes back to it: see `go_back`).

    Raises BadInput if checkpoints that were announced cannot be read, or none is whole.
    """
    out = Path(out)
    names, back = _check_announced(out), _read(out)
    if back is not None and not back["done"]:
        _finish(out, back, warn)
        names = _check_announced(out)
    checkpoints.recover(out / CHECKPOINTS)
    if resume != "auto" and (back is None or back["to"] != _name(out, resume)):
        return checkpoints.read(resume), True
    if back is not None and not names:  # it went back to another run's, and has saved nothing since
        return checkpoints.read(out / back["to"]), False
    if names and (latest := _latest(out)) is not None and latest not in names:
        warn(f"passing over {out / CHECKPOINTS / latest}: it was saved, and is missing")
    newest = checkpoints.newest(out, warn)
    if resume != "auto" and newest is not None:
        warn(
            f"--resume {resume}: this run went back to it before, and goes on from its newest checkpoint, of step "
            f"{newest.step}; to go back once more, delete {out / WENT_BACK}"
        )
    return newest, False


def _latest(out: Path) -> str | None:
    """Name of the newest checkpoint that was announced, or None. Raises BadFile if it is no text file."""
    try:
        return files.read(out / LATEST, LONGEST_NAME).decode(errors="replace").strip()
    except FileNotFoundError:
        return None


def _check_announced(out: Path) -> list[str]:
    """Names of the checkpoints in OUT.

    Raises BadInput if they cannot be listed, or there are none although a save was announced: a
    fresh start would empty the record.
    """
    root, way_out = out / CHECKPOINTS, "to set this run aside and start afresh, add --resume never"
    names, latest, got = [], None, "none there"
    try:
        latest = _latest(out)
        names = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    except FileNotFoundError:
        got = "no such directory"
    except OSError as error:
        raise BadInput(
            f"train: the checkpoints of --out must be readable, got {error.filename}: {error.strerror}; make it "
            f"readable or mount it; {way_out}"
        ) from error
    except files.BadFile as error:
        raise BadInput(
            f"train: {out / LATEST} must be a file with the name of a checkpoint, got {error}; delete it, and the "
            f"newest checkpoint counts; {way_out}"
        ) from error
    names = [name for name in (name.removeprefix(".replaced_") for name in names) if name.startswith("step_")]
    if latest is not None and not names:
        raise BadInput(
            f"train: {root} must hold the checkpoints of this run, {latest} at least, got {got}; mount it or put it "
            f"back; {way_out}"
        )
    return names


# ---- Go back ------------------------------------------------------------------------------------------------------


def go_back(out: str | Path, checkpoint: Checkpoint, warn: Callable[[str], None]) -> None:
    """Makes a checkpoint the one that OUT goes on from: sets aside what OUT saved after it.

    If it is another run's, or set aside itself, all of OUT's checkpoints are set aside, and OUT has
    its run's record from then on. Call it once the checkpoint is verified. Raises BadInput if the
    disk refuses; the next command finishes it.
    """
    out = Path(out)
    root = out / CHECKPOINTS
    path = checkpoint.path.resolve()
    is_own = path.parent == root.resolve() and path.name.startswith("step_")
    saved = [saved.name for saved in checkpoints.step_directories(root)]
    moves = [name for name in saved if not is_own or name > path.name]
    has_record = any((out / name).exists() for name in RECORD)
    number = next(n for n in range(1, 10**6) if not (root / f"aside_{n}").exists())
    back = {
        "to": _name(out, path),
        "aside": f"aside_{number}" if moves or (has_record and not is_own) else None,
        "moves": moves,
        "is_own": is_own,
        "done": False,
    }
    try:
        durable.write(out / WENT_BACK, json.dumps(back, indent=1) + "\n")
    except OSError as error:
        raise _refused(out, error) from error
    _finish(out, back, warn)


def _finish(out: Path, back: dict, warn: Callable[[str], None]) -> None:
    """Does what `back` notes, as far as it is not done yet."""
    root, to = out / CHECKPOINTS, Path(back["to"])
    try:
        if back["is_own"]:
            durable.write(out / LATEST, to.name + "\n")
        else:
            (out / LATEST).unlink(missing_ok=True)  # of this branch none is announced yet
        if back["aside"] is not None:
            _set_aside(out, root / back["aside"], back["moves"])
            warn(
                f"went back to {out / to}: {len(back['moves'])} checkpoints, and a copy of the record, are set aside "
                f"in {root / back['aside']}"
            )
        if not back["is_own"]:
            _take_record(out, to)
        durable.write(out / WENT_BACK, json.dumps(back | {"done": True}, indent=1) + "\n")
    except OSError as error:
        raise _refused(out, error) from error


def _set_aside(out: Path, aside: Path, moves: list[str]) -> None:
    root = aside.parent
    gone = [name for name in moves if not (aside / name).exists() and not (root / name).exists()]
    if gone:
        raise BadInput(
            f"train: {root} must hold {gone[0]}, which was to be set aside, got none there; mount it or put it back; "
            "to set this run aside and start afresh, add --resume never"
        )
    aside.mkdir(parents=True, exist_ok=True)
    for name in RECORD:  # before the checkpoints: once they are moved the record may be cut
        if (out / name).exists() and not (aside / name).exists():
            durable.write(aside / name, _content(out / name))
    for name in moves:
        if not (aside / name).exists():
            (root / name).rename(aside / name)
    durable.fsync(aside)
    durable.fsync(root)


def _take_record(out: Path, to: Path) -> None:
    """Gives OUT the record of another branch or run up to its checkpoint `to`.

    Metrics drops the rows after it.
    """
    path = out / to
    folder = path.parent if path.parent.name != CHECKPOINTS else run_of(path)
    for name in RECORD:
        if (folder / name).exists():
            durable.write(out / name, _content(folder / name))
        else:
            (out / name).unlink(missing_ok=True)


def _content(path: Path) -> bytes:
    """A file's content. Raises OSError if it is no file that can be read."""
    try:
        with files.open_file(path) as file:
            return file.read()
    except files.BadFile as error:
        raise OSError(errno.EINVAL, str(error), str(path)) from error


def _name(out: Path, path: str | Path) -> str:
    """A checkpoint's path below OUT if it is there, so that OUT may be moved, else its absolute one."""
    whole, base = Path(path).resolve(), out.resolve()
    return str(whole.relative_to(base) if whole.is_relative_to(base) else whole)


def _read(out: Path) -> dict | None:
    """What OUT/went_back notes, or None if OUT never went back. Raises BadInput if it is damaged."""
    path, kinds = out / WENT_BACK, {"to": str, "aside": str | None, "moves": list[str], "is_own": bool, "done": bool}
    try:
        back = files.read_json(path, kinds)
        wrong = [name for name in back["moves"] if not NAME.fullmatch(name)]
        if wrong or not ASIDE.fullmatch(back["aside"] or "aside_1"):
            raise files.BadFile(f"another name, {[*wrong, back['aside']][0]!r:.80}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(
            f"train: {path} must be as gpt2 train wrote it, got {error}; delete it, then --resume PATH goes back "
            "to PATH anew"
        ) from error
    return back


def _refused(out: Path, error: OSError) -> BadInput:
    return BadInput(
        f"train: --out must be a directory that can be written, got {out}: {error}; nothing is deleted, and the same "
        "command goes on"
    )
