"""Text to token shards: `gpt2 prepare SOURCE... --out DIR`.

Sources are files and directories of text, JSON and tables, `-` for standard input, and the word `stdlib`.
See engine/tokens/reading/sources.py for the files of a source, and documents.py for what lies in them.
Each document is written as the end-of-text token, then its text's tokens. A hash of the text
decides whether a document is for validation, so documents stay in their split when the corpus
grows. If that leaves a split empty, as with a single book, the tail of every document is for
validation instead. --val names documents for validation instead of the hash.
The same sources make the same bytes with any number of workers.

Everything is written to a hidden directory inside DIR and moved into place at the end, the manifest
last. An interrupted preparation leaves nothing that could be mistaken for data, and a journal: the
same command goes on from there. Standard input cannot come again, so it leaves no journal.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from engine import durable, lock, system
from engine.errors import BadInput
from engine.lock import Lock
from engine.tokens.names import NUMBERED
from engine.tokens.preparation import fast, journal
from engine.tokens.preparation.account import Totals
from engine.tokens.preparation.building import NOT_FAST, TAIL, TAILS, build, clear, stem
from engine.tokens.preparation.encode import Difference
from engine.tokens.preparation.journal import Request
from engine.tokens.preparation.options import PrepareConfig as PrepareConfig
from engine.tokens.preparation.summary import describe as describe
from engine.tokens.preparation.summary import left_out
from engine.tokens.reading import hub
from engine.tokens.reading.sequential import STDIN
from engine.tokens.reading.sources import Selection, find, find_by_rule, require_text, unreadable
from engine.tokens.shards import BUILDING, MANIFEST, read_manifest

SPARE = 4
MOST_KINDS = 50  # of files that are not read, in the manifest
NEW = ("val", "dedup")  # options of which other values than the default are in the request
RULES = 3  # which files of a directory are read; manifests without it are of rule 1, see sources.find_by_rule


def prepare(sources: list[str], config: PrepareConfig) -> dict:
    """Tokenises the sources into config.out and returns the manifest.

    Data already made by the same request is left as it is, and what it had begun is completed. Raises
    BadInput if a source cannot be read, the directory cannot be used, or a split would be empty.
    """
    found, out = find(sources), Path(config.out)
    num_train = len(found.files) if config.val else None
    if config.val:
        _add(found, find(config.val))
    files = _identities(found)
    found.num_bytes = sum(size for _, size, _ in files)
    request = _request(sources, files, config)
    if (existing := _existing(out, request, config)) is not None:
        return existing  # before the lock: such data may be read-only
    _refuse_older(out, sources, found, config)
    if warning := require_text(found, config.text_field):
        print(f"prepare: {warning}", file=sys.stderr, flush=True)
    with lock.acquire(out, "prepare") as held:
        if (existing := _existing(out, request, config)) is not None:
            return existing  # another process made it meanwhile
        if (unmoved := _unmoved(out, request, config)) is not None:
            return _move(unmoved, out)
        asked = Request(request, _options(sources, config), stem(out), files, num_train)
        _refuse_progress(out, asked, config)
        _remove_orphans(out, out / BUILDING)
        return _replace(sources, found, asked, config, held)


def _add(found: Selection, val: Selection) -> None:
    """Adds the files of the validation sources. Raises BadInput if one is a training file too."""
    train = {os.path.realpath(path) for path in found.files}
    for path in val.files:
        if os.path.realpath(path) in train:
            raise BadInput(
                f"prepare: --val must name other files than the sources for training, got {path} in both; "
                "name files or directories that do not overlap"
            )
    hub.new(val.remote.values(), found.remote)  # one commit of each data set
    found.files += val.files
    found.remote |= val.remote
    found.not_read += val.not_read
    found.linked += val.linked
    found.examples = val.examples | found.examples
    named = {parent for path in val.files for parent in (path, *path.parents)}
    found.held_out = [path for path in (*found.held_out, *val.held_out) if path not in named]


def _existing(out: Path, request: str, config: PrepareConfig) -> dict | None:
    """The manifest of complete data that the same request made, or None.

    Raises BadInput if the manifest cannot be read, unless the data is to be overwritten, and if the
    data lacks documents without which --on-bad-text fail must not make it.
    """
    try:
        manifest = read_manifest(out)
        if manifest is None or manifest.get("request") != request or not _is_complete(out, manifest):
            return None
        describe(manifest, "")  # shows that all counts are there
    except BadInput:
        if not config.overwrite:
            raise
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a manifest that was edited
        if not config.overwrite:
            raise BadInput(
                f"{out / MANIFEST}: must be as prepare wrote it, got {error!r}; add --overwrite to make the data again"
            ) from error
        return None
    _refuse_gaps(out, manifest, config)
    return manifest


def _refuse_gaps(made: Path, manifest: dict, config: PrepareConfig) -> None:
    """Raises BadInput if documents were left out, without which --on-bad-text fail must make nothing."""
    if config.on_bad_text == "fail" and manifest["skipped"]:
        raise BadInput(
            f"prepare: every document must be text, got {made} made without some: {_left_out_note(manifest)}; "
            "mend them, or see --on-bad-text"
        )


def _refuse_progress(out: Path, request: Request, config: PrepareConfig) -> None:
    """Raises BadInput if another command's progress must not be removed, or this command's not be gone on with."""
    building = out / BUILDING
    state = journal.read(building)
    if state is not None and state["key"].partition(" ")[0] != request.options and not config.overwrite:
        raise BadInput(
            f"prepare: {out} must be new or empty, got {building} of another command, which has read "
            f"{state['totals']['source_bytes']:,} bytes; go on with that command, choose another --out, or add "
            "--overwrite to remove it"
        )
    if (state := journal.usable(building, request)) is not None:
        totals = Totals.from_json(state["totals"])
        left = {"bytes": totals.losses.bytes, "files": totals.losses.largest()}
        counts = {"skipped": totals.skipped, "source_bytes": totals.source_bytes, "left_out": left}
        _refuse_gaps(building, counts, config)


def _refuse_older(out: Path, sources: list[str], found: Selection, config: PrepareConfig) -> None:
    """Raises BadInput if the same sources and options made the data when other files of them were read."""
    try:
        manifest = read_manifest(out)
        if manifest is None or (rules := manifest.get("rules", 1)) not in range(1, RULES) or config.overwrite:
            return
        older = find_by_rule(sources, rules)
        if manifest.get("request") != _request(sources, _identities(older), config):
            return
    except BadInput:  # what is wrong is said where it matters
        return
    now, then = set(found.files), set(older.files)
    which = next((f" ({path} ...)" for path in [*older.files, *found.files] if (path in now) != (path in then)), "")
    raise BadInput(
        f"prepare: {out} must be new or empty, got data of the same sources, made by a version that read other files "
        f"of them{which}; train on it as it is, or add --overwrite to make it again"
    )


def _replace(sources: list[str], found: Selection, request: Request, config: PrepareConfig, held: Lock) -> dict:
    """Makes the data and moves it into place. Returns the manifest."""
    out = Path(config.out)
    building = out / BUILDING
    others = [path for path in out.iterdir() if not path.name.startswith(".")]
    if others and not config.overwrite:
        raise BadInput(
            f"prepare: {out} must be new or empty, got {len(others)} files, such as {others[0].name}; "
            "choose another --out, or add --overwrite to replace them"
        )
    spare: list[int] = []  # file descriptors to clean up with, should the process have no more
    try:
        with _refusals(out):
            spare += (os.open(out, os.O_RDONLY) for _ in range(SPARE))
            _begin(building, request)
            manifest = _make(found, request, config, building)
            if not all(manifest["tokens"].values()):
                (building / journal.FILE).unlink(missing_ok=True)
                raise BadInput(
                    f"prepare: the text must fill both splits, got {manifest['tokens']['train']} training and "
                    f"{manifest['tokens']['val']} validation tokens from {len(found.files)} "
                    f"files{_left_out_note(manifest, ', ')}; give more text or "
                    f"{'other sources' if config.val else 'a larger --val-fraction'}"
                )
            manifest |= {"request": request.whole, "rules": RULES, "sources": sources}
            manifest |= _account(found, sources, config)
            durable.write(building / MANIFEST, json.dumps(manifest, indent=1) + "\n")
            held.check()
        return _move(manifest, out)
    except BadInput as error:
        if not (promise := _promise(found, building, str(error))):
            raise
        raise BadInput(f"{error}{promise}") from error
    finally:
        for descriptor in spare:
            os.close(descriptor)
        if journal.read(building) is None and not (building / MANIFEST).exists():
            shutil.rmtree(building, ignore_errors=True)


def _promise(found: Selection, building: Path, error: str) -> str:
    """From where the same command goes on after an error, also once the file that it names is mended; "" if nowhere."""
    state = journal.read(building)
    if state is None or not sum(state["tokens"].values()):
        return ""
    promise = f"; the same command goes on after {state['totals']['source_bytes']:,} of {found.num_bytes:,} bytes"
    index, position = state["place"]
    if position and f"{found.files[index]}:" in error:
        earlier = state["earlier"]["totals"]["source_bytes"] if state["earlier"] else 0
        promise += f", or after {earlier:,} once that file has changed"
    return promise


def _make(found: Selection, request: Request, config: PrepareConfig, building: Path) -> dict:
    """Builds the shards, with tiktoken alone once gigatoken has given other tokens. Returns the manifest."""
    plain = replace(config, fast=False)
    if STDIN in found.files:  # after a difference it could not be read again
        return build(found, request, plain, building)
    note = building / NOT_FAST
    if not note.exists():
        try:
            return build(found, request, config, building)
        except fast.Unusable as error:  # what it has made by then is not to be trusted either
            why = error.locate() if isinstance(error, Difference) else str(error)
            print(f"prepare: {why}; all documents are tokenised again, with tiktoken", file=sys.stderr, flush=True)
            clear(building)
            note.write_text(why)
    return build(found, request, plain, building) | {"not_fast": note.read_text()}


def _begin(building: Path, request: Request) -> None:
    """Makes the directory to build in, without what cannot be gone on with."""
    state, is_usable = journal.read(building), journal.usable(building, request) is not None
    if state is not None and state["key"].partition(" ")[0] != request.options:
        print(f"prepare: removes {building}, which another command has left", file=sys.stderr, flush=True)
    elif state is not None and not is_usable:
        why = "files that it had read have changed" if state["key"] == request.key else "--out has another name now"
        print(f"prepare: begins anew: {why}", file=sys.stderr, flush=True)
    if not is_usable or (building / MANIFEST).exists():
        clear(building)


@contextmanager
def _refusals(out: Path) -> Iterator[None]:
    """BadInput for what the disk refuses. Of a source it is BadInput already."""
    try:
        yield
    except OSError as error:
        raise BadInput(
            f"prepare: --out must be a directory that can be written, got {error.filename or out}: "
            f"{system.reason(error)}; {system.advice(error, 'another --out')}"
        ) from error


def _move(manifest: dict, out: Path) -> dict:
    """Moves what is built into place, the manifest last, also if a part of it has been moved. Returns the manifest."""
    building, shards = out / BUILDING, [shard["file"] for shard in manifest["shards"]]
    with _refusals(out):
        (out / MANIFEST).unlink(missing_ok=True)
        for stale in out.iterdir():
            if stale.suffix == ".bin" and NUMBERED.fullmatch(stale.name) and stale.name not in shards:
                stale.unlink()
        for name in shards:
            if (_made(manifest, building) / name).exists():
                os.replace(_made(manifest, building) / name, out / name)
        durable.fsync(out)
        for rest in building.iterdir():
            if rest.name != MANIFEST:
                shutil.rmtree(rest) if rest.is_dir() else rest.unlink()
        os.replace(building / MANIFEST, out / MANIFEST)
        shutil.rmtree(out / hub.DOWNLOADS, ignore_errors=True)  # after the manifest: until then they may be needed
        shutil.rmtree(building, ignore_errors=True)
        durable.fsync(out)
    return manifest


def _made(manifest: dict, building: Path) -> Path:
    """Where the shards of a manifest lie before they are moved."""
    return building / TAILS if manifest["split"] == TAIL else building


def _unmoved(out: Path, request: str, config: PrepareConfig) -> dict | None:
    """The manifest of data of this request that was being moved into place when it was stopped, or None."""
    if (out / MANIFEST).exists() and not config.overwrite:
        return None
    try:
        manifest = read_manifest(out / BUILDING)
        if manifest is None or manifest.get("request") != request:
            return None
    except BadInput:
        return None
    for shard in manifest["shards"]:
        path = _made(manifest, out / BUILDING) / shard["file"]
        path = path if path.exists() else out / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            return None
    _refuse_gaps(out / BUILDING, manifest, config)
    return manifest


def _account(found: Selection, sources: list[str], config: PrepareConfig) -> dict:
    """What of the sources is read and what is not, and with which options, for the manifest."""
    account = {"not_read": dict(found.not_read.most_common(MOST_KINDS)), "linked": found.linked}
    if found.held_out:
        first = found.held_out[0]
        account["held_out"] = {"count": len(found.held_out), "first": f"{first}/" if first.is_dir() else str(first)}
    if found.remote:
        account["hub"] = {one.repository: one.commit for one in found.remote.values()}
    if config.val:
        account["val_sources"] = list(config.val)
    names = ("shard_tokens", "text_field", "on_bad_text", "split_on", "dedup", *(["format"] if "-" in sources else []))
    return account | {"options": {name: getattr(config, name) for name in names}}


def _remove_orphans(out: Path, building: Path) -> None:
    """Removes shards that an interrupted preparation moved into place without the manifest."""
    if (out / MANIFEST).exists() or not (building / MANIFEST).exists():
        return  # it completed, or moved nothing
    try:
        shards = read_manifest(building)["shards"]
    except BadInput:  # interrupted while it wrote the manifest: it moved nothing
        return
    for shard in shards:
        if not (building / shard["file"]).exists() and not (building / TAILS / shard["file"]).exists():
            (out / shard["file"]).unlink(missing_ok=True)


def _is_complete(out: Path, manifest: dict) -> bool:
    """Whether every shard of the manifest exists with the listed number of bytes."""
    shards = [(out / shard["file"], shard.get("bytes")) for shard in manifest["shards"]]
    return all(path.is_file() and path.stat().st_size == size for path, size in shards)


def _request(sources: list[str], files: list[tuple], config: PrepareConfig) -> str:
    """Digest of the options, and of what each file is known by. Equal requests make the same bytes."""
    options = _choices(sources, config)
    if any(path == str(STDIN) for path, *_ in files):  # nobody knows whether it is the same as before
        options.append(os.urandom(16).hex())
    return hashlib.sha256(json.dumps([options, files]).encode()).hexdigest()


def _options(sources: list[str], config: PrepareConfig) -> str:
    """Digest of the options."""
    return hashlib.sha256(json.dumps(_choices(sources, config)).encode()).hexdigest()


def _choices(sources: list[str], config: PrepareConfig) -> list:
    """The options that decide what is made, and the words of the sources."""
    options = [config.tokenizer, config.val_fraction, config.shard_tokens, config.text_field, sources]
    if config.on_bad_text == "replace":  # skip and fail make the same bytes, or fail makes none
        options.append(config.on_bad_text)
    options += [[name, getattr(config, name)] for name in NEW if getattr(config, name) != getattr(PrepareConfig, name)]
    if config.separator is not None:
        options.append(["split_on", config.separator])
    return options


def _identities(found: Selection) -> list[tuple[str, int, int | str]]:
    """What each file is known by."""
    return [_identity(path, found) for path in found.files]


def _identity(path: Path, found: Selection) -> tuple[str, int, int | str]:
    """Path, size and time of a file; if it is on the hub, the digest of its content, which other commits have too."""
    if path in found.remote:
        return str(path), found.remote[path].size, found.remote[path].blob
    one = _stat(path)
    return str(path), one.st_size, one.st_mtime_ns


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(0) if path == STDIN else path.stat()
    except OSError as error:
        raise unreadable(path, error) from error


def _left_out_note(manifest: dict, before: str = "") -> str:
    """Text such as "left out: 3 not UTF-8, 1 empty", or "" if nothing was."""
    lines = [line.strip() for line in left_out(manifest)]
    return before + "; ".join(lines) if lines else ""
