"""Text to token shards: `gpt2 prepare SOURCE... --out DIR`.

Sources are files and directories of .txt, .md, .py, .jsonl and .parquet, and the word `stdlib`.
See engine/tokens/sources.py for the files of a source, and documents.py for what lies in them.
Each document is written as the end-of-text token, then its text's tokens. A hash of the text
decides whether a document is for validation, so documents stay in their split when the corpus
grows. If that leaves a split empty, as with a single book, the tail of every document is for
validation instead.
The same sources make the same bytes with any number of workers.

Everything is written to a hidden directory inside DIR and moved into place at the end, the manifest
last. An interrupted preparation leaves nothing that could be mistaken for data.
"""

import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from engine import lock, system
from engine.errors import BadInput
from engine.lock import Lock
from engine.tokens import fast
from engine.tokens.building import build
from engine.tokens.names import NUMBERED
from engine.tokens.options import PrepareConfig as PrepareConfig
from engine.tokens.reading import hub
from engine.tokens.shards import BUILDING, MANIFEST, read_manifest
from engine.tokens.sources import Selection, find, find_by_rule_1, require_text, unreadable
from engine.tokens.summary import describe as describe
from engine.tokens.summary import left_out

SPARE = 4
MOST_KINDS = 50  # of files that are not read, in the manifest
RULES = 2  # which files of a directory are read; manifests without it are of rule 1, see sources.find_by_rule_1


def prepare(sources: list[str], config: PrepareConfig) -> dict:
    """Tokenises the sources into config.out and returns the manifest.

    Data already made by the same request is left as it is. Raises BadInput if a source cannot be
    read, the directory cannot be used, or a split would be empty.
    """
    found, out = find(sources), Path(config.out)
    request = _request(sources, found, config)
    if (existing := _existing(out, request, config)) is not None:
        return existing  # before the lock: such data may be read-only
    _refuse_older(out, sources, found, config)
    if warning := require_text(found, config.text_field):
        print(f"prepare: {warning}", file=sys.stderr, flush=True)
    with lock.acquire(out, "prepare") as held:
        _remove_orphans(out, out / BUILDING)
        if (existing := _existing(out, request, config)) is not None:
            return existing  # another process made it meanwhile
        return _replace(sources, found, request, config, held)


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
    if config.on_bad_text == "fail" and manifest["skipped"]:
        raise BadInput(
            f"prepare: every document must be text, got {out} made without some: {_left_out_note(manifest)}; "
            "mend them, or see --on-bad-text"
        )
    return manifest


def _refuse_older(out: Path, sources: list[str], found: Selection, config: PrepareConfig) -> None:
    """Raises BadInput if the same sources and options made the data when other files of them were read."""
    try:
        manifest = read_manifest(out)
        if manifest is None or "rules" in manifest or config.overwrite:
            return
        older = Selection(find_by_rule_1(sources))
        if manifest.get("request") != _request(sources, older, config):
            return
    except BadInput:  # what is wrong is said where it matters
        return
    now, then = set(found.files), set(older.files)
    which = next((f" ({path} ...)" for path in [*older.files, *found.files] if (path in now) != (path in then)), "")
    raise BadInput(
        f"prepare: {out} must be new or empty, got data of the same sources, made by a version that read other files "
        f"of them{which}; train on it as it is, or add --overwrite to make it again"
    )


def _replace(sources: list[str], found: Selection, request: str, config: PrepareConfig, held: Lock) -> dict:
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
        spare += (os.open(out, os.O_RDONLY) for _ in range(SPARE))
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        try:
            manifest = _build(found, config, building)
        except fast.Unusable as error:  # what it has made by then is not to be trusted either
            print(f"prepare: {error}; all documents are tokenised again, with tiktoken", file=sys.stderr, flush=True)
            shutil.rmtree(building)
            building.mkdir()
            manifest = _build(found, replace(config, fast=False), building) | {"not_fast": str(error)}
        if not all(manifest["tokens"].values()):
            raise BadInput(
                f"prepare: the text must fill both splits, got {manifest['tokens']['train']} training and "
                f"{manifest['tokens']['val']} validation tokens from {len(found.files)} "
                f"files{_left_out_note(manifest, ', ')}; give more text or a larger --val-fraction"
            )
        manifest |= {"request": request, "rules": RULES, "sources": sources, **_account(found)}
        with system.naming(building / MANIFEST):
            (building / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        held.check()
        if config.overwrite:
            (out / MANIFEST).unlink(missing_ok=True)
            for stale in out.iterdir():
                if stale.suffix == ".bin" and NUMBERED.fullmatch(stale.name):
                    stale.unlink()
        for name in [*(shard["file"] for shard in manifest["shards"]), MANIFEST]:
            os.replace(building / name, out / name)
        shutil.rmtree(out / hub.DOWNLOADS, ignore_errors=True)  # after the manifest: until then they may be needed
    except OSError as error:  # of a source it is BadInput already
        raise BadInput(
            f"prepare: --out must be a directory that can be written, got {error.filename or out}: "
            f"{system.reason(error)}; {system.advice(error, 'another --out')}"
        ) from error
    finally:
        for descriptor in spare:
            os.close(descriptor)
        with suppress(OSError):  # what cannot be removed now, the same command removes when it begins
            _remove_orphans(out, building)
        shutil.rmtree(building, ignore_errors=True)
    return manifest


def _build(found: Selection, config: PrepareConfig, building: Path) -> dict:
    """The shards, with whole documents for validation if there are enough. Returns the manifest."""
    manifest = build(found, config, building, by_tail=False)
    return manifest if all(manifest["tokens"].values()) else build(found, config, building, by_tail=True)


def _account(found: Selection) -> dict:
    """What of the sources is read and what is not, for the manifest."""
    account = {"not_read": dict(found.not_read.most_common(MOST_KINDS)), "linked": found.linked}
    if found.held_out:
        first = found.held_out[0]
        account["held_out"] = {"count": len(found.held_out), "first": f"{first}/" if first.is_dir() else str(first)}
    return account


def _remove_orphans(out: Path, building: Path) -> None:
    """Removes shards that an interrupted preparation moved into place without the manifest."""
    if (out / MANIFEST).exists() or not (building / MANIFEST).exists():
        return  # it completed, or moved nothing
    try:
        shards = read_manifest(building)["shards"]
    except BadInput:  # interrupted while it wrote the manifest: it moved nothing
        return
    for shard in shards:
        if not (building / shard["file"]).exists():
            (out / shard["file"]).unlink(missing_ok=True)


def _is_complete(out: Path, manifest: dict) -> bool:
    """Whether every shard of the manifest exists with the listed number of bytes."""
    shards = [(out / shard["file"], shard.get("bytes")) for shard in manifest["shards"]]
    return all(path.is_file() and path.stat().st_size == size for path, size in shards)


def _request(sources: list[str], found: Selection, config: PrepareConfig) -> str:
    """Digest of the options, and of each file's path, size and time. Sets found.num_bytes.

    Equal requests make the same bytes.
    """
    options = [config.tokenizer, config.val_fraction, config.shard_tokens, config.text_field, sources]
    if config.on_bad_text == "replace":  # skip and fail make the same bytes, or fail makes none
        options.append(config.on_bad_text)
    stats = [_identity(path, found) for path in found.files]
    found.num_bytes = sum(size for _, size, _ in stats)
    return hashlib.sha256(json.dumps([options, stats]).encode()).hexdigest()


def _identity(path: Path, found: Selection) -> tuple[str, int, int | str]:
    """Path, size and time of a file, or its commit if it is on the hub."""
    if path in found.remote:
        return str(path), found.remote[path].size, found.remote[path].commit
    one = _stat(path)
    return str(path), one.st_size, one.st_mtime_ns


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error


def _left_out_note(manifest: dict, before: str = "") -> str:
    """Text such as "left out: 3 not UTF-8, 1 empty", or "" if nothing was."""
    lines = [line.strip() for line in left_out(manifest)]
    return before + "; ".join(lines) if lines else ""
