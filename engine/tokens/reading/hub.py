"""Files of a data set on the Hugging Face hub: which there are, and downloads one file ahead.

A source is hf:OWNER/NAME[/SUBSET][@REVISION] or a short name. SUBSET is a subset that the data
set's card names, a directory, or a pattern of files such as shard_0000*. HF_HOME, HF_ENDPOINT,
HF_TOKEN and HF_HUB_OFFLINE are as huggingface_hub has them.
The list of files is made once and pins the commit. A file that lies in the hub's cache is read
there. Others are downloaded, into the cache to keep them, else into a directory of the
preparation, from which they are removed once their tokens are safe. A broken connection goes on in
the middle of the file; a killed preparation begins with that file again.
"""

import os
import re
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from engine import system
from engine.errors import BadInput
from engine.output import program
from model.files import few

PREFIX = "hf:"
SHORT = {  # name: repository, and the subset if none is named
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    "climbmix": ("karpathy/climbmix-400b-shuffle", ""),  # as text; NVIDIA's own repository holds GPT-2 tokens
}
LIST_TIMEOUT = 30.0  # seconds for the list of files
DOWNLOADS = ".downloads"  # directory inside --out
MOST_NAMED = 12  # subsets in a message


class Remote(NamedTuple):
    """One file of a data set on the hub."""

    repository: str
    commit: str
    name: str  # path in the repository
    size: int  # bytes
    blob: str  # its sha256 or git's id of its content: the same in every commit that does not change it

    @property
    def label(self) -> Path:
        """What stands for the file before it is downloaded. No file of this name exists."""
        return Path(f"{PREFIX}{self.repository}/{self.name}")


def is_remote(source: str) -> bool:
    """Whether a source lies on the hub. A short name does not if a file has that name."""
    return source.startswith(PREFIX) or (source.partition("/")[0] in SHORT and not os.path.lexists(source))


def find(source: str, suffixes: tuple[str, ...]) -> list[Remote]:
    """The files of a source that have one of the suffixes, sorted by name. Raises BadInput if there are none."""
    repository, subset, revision = _parse(source)
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise BadInput(
            f"prepare: {source} needs the package huggingface_hub, got {error}; install it with: pip install "
            "huggingface_hub"
        ) from error
    try:
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True, timeout=LIST_TIMEOUT)
    except Exception as error:  # of the HTTP library that this version of the package uses
        raise _refusal(source, repository, error) from error
    known = {one.rfilename: one for one in info.siblings or ()}
    card = getattr(info, "card_data", None)
    names = _of_subset(source, subset, list(known), (card.to_dict() if card else {}).get("configs") or [])
    files = [_remote(repository, info.sha, known[name]) for name in sorted(names) if _has(name, suffixes)]
    if not files:
        kinds = Counter(PurePosixPath(name).suffix or "without a suffix" for name in names)
        got = few([f"{count:,} {kind}" for kind, count in kinds.most_common()], MOST_NAMED)
        raise BadInput(f"prepare: {source} must hold files in {', '.join(suffixes)}, got {got or 'none'}")
    return files


def _remote(repository: str, commit: str, one: Any) -> Remote:
    blob = one.lfs.sha256 if one.lfs else one.blob_id
    return Remote(repository, commit, one.rfilename, one.size or 0, blob or commit)


def _has(name: str, suffixes: tuple[str, ...]) -> bool:
    path = PurePosixPath(name)
    is_card = path.suffix.lower() in (".md", ".txt") and path.stem.lower() in ("readme", "license")
    return name.lower().endswith(suffixes) and not is_card and not path.name.startswith(".")


def _parse(source: str) -> tuple[str, str, str | None]:
    """Repository, subset or "", and revision or None."""
    path, _, revision = source.removeprefix(PREFIX).partition("@")
    first, _, rest = path.strip("/").partition("/")
    if not source.startswith(PREFIX):
        repository, subset = SHORT[first]
        return repository, rest or subset, revision or None
    name, _, subset = rest.partition("/")
    if not first or not name:
        raise BadInput(f"prepare: a source on the hub must be hf:OWNER/NAME[/SUBSET][@REVISION], got {source}")
    return f"{first}/{name}", subset, revision or None


def _of_subset(source: str, subset: str, names: list[str], configs: list[dict[str, Any]]) -> list[str]:
    """The names that belong to a subset; if none is named, to the card's default, or all."""
    known = {str(config.get("config_name")): config for config in configs if config.get("data_files")}
    if subset in known:
        chosen = known[subset]
    elif subset:
        if of_subset := [name for name in names if name.startswith(f"{subset}/") or _matches(name, [subset])]:
            return of_subset
        others = [*known] or sorted({name.partition("/")[0] for name in names if "/" in name})
        raise BadInput(
            f"prepare: {source} must name a subset, a directory or files that exist, got {subset}; it has "
            f"{few(others, MOST_NAMED) or 'files without subsets'}"
        )
    else:
        defaults = [config for name, config in known.items() if name == "default" or config.get("default")]
        if len(known) > 1 and not defaults:
            raise BadInput(
                f"prepare: {source} must name one of its {len(known)} subsets, got none; they are "
                f"{few([*known], MOST_NAMED)}"
            )
        if not known:
            return names
        chosen = defaults[0] if defaults else next(iter(known.values()))
    patterns = _patterns(chosen["data_files"])
    return [name for name in names if _matches(name, patterns)]


def _matches(name: str, patterns: list[str]) -> bool:
    """Whether a path fits a pattern of the hub: * and ? stay within a directory, ** is any directories, or none."""
    return any(name == pattern or _expression(pattern).fullmatch(name) for pattern in patterns)


@cache
def _expression(pattern: str) -> re.Pattern:
    signs = {"**/": "(.+/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]\\/]+\])", pattern.removeprefix("./"))
    words = [part.replace("[!", "[^") if i % 2 else re.escape(part) for i, part in enumerate(parts)]
    try:
        return re.compile("".join(signs.get(word, word) for word in words))
    except re.error:  # such as [z-a], which fits nothing but itself
        return re.compile(re.escape(pattern))


def _patterns(data_files: Any) -> list[str]:
    """Patterns of the train split in a card's data_files, or of all splits if none has that name."""
    if isinstance(data_files, str):
        return [data_files]
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    splits = [one for one in data_files if isinstance(one, dict)]
    train = [one for one in splits if one.get("split") == "train"]
    patterns = [one for one in data_files if isinstance(one, str)]
    for one in train or splits:
        paths = one.get("path") or []
        patterns += [paths] if isinstance(paths, str) else paths
    return patterns


def _refusal(source: str, repository: str, error: Exception) -> BadInput:
    """Why the files of a source cannot be listed, and what to do."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/datasets/{repository}"
    if isinstance(error, errors.GatedRepoError):
        return BadInput(
            f"prepare: {source} must be open to you, got a data set behind terms of use; accept them at {page}, then "
            "set HF_TOKEN, or run: hf auth login"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return BadInput(
            f"prepare: {source} must be a data set on the hub, got none of the name {repository} that you may read; "
            f"look at {page}, and set HF_TOKEN if it is private"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return BadInput(f"prepare: {source} must name a branch, tag or commit that exists, got another; look at {page}")
    if isinstance(error, errors.HFValidationError):
        return BadInput(f"prepare: {source} must be hf:OWNER/NAME[/SUBSET][@REVISION], got {_line(error)}")
    return BadInput(
        f"prepare: {source} must be reached, got {_line(error)}; without network: on another machine run "
        f"`hf download --repo-type dataset {repository}` (--include takes a pattern) and name the directory that you "
        f"copied here as the source, or copy parquet files by hand, or take shards that are tokenised already and "
        f"train on them as they are: {program()} train --data DIR"
    )


def _line(error: BaseException) -> str:
    """The first line of an error's text, or its kind."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


class Downloads:
    """Files of the hub as local files, each downloaded while the one before it is read.

    remote: by label, in the order in which they are read. directory: inside --out. keep: download
    into the hub's cache, where they stay.
    """

    def __init__(self, remote: dict[Path, Remote], directory: Path, keep: bool):
        self._remote, self._directory, self._keep = remote, directory.resolve(), keep
        self._next = dict(zip(remote, [*remote][1:], strict=False))
        self._started: dict[Path, Future] = {}
        for broken in directory.rglob("*.incomplete"):  # of a preparation that was killed: nothing goes on with them
            broken.unlink(missing_ok=True)

    def fetch(self, path: Path) -> Path:
        """Waits for a file and begins with the next one. A path that is not remote is returned.

        Raises BadInput if it cannot be downloaded.
        """
        if path not in self._remote:
            return path
        local = self._start(path).result()
        if path in self._next:
            self._start(self._next[path])
        return local

    def done(self, path: Path) -> None:
        """Removes a file whose tokens are safe, if it was downloaded only for them, by whichever start."""
        if path in self._remote:
            self._started.pop(path, None)
            local = (_inside(self._remote[path], self._directory) / self._remote[path].name).resolve()
            if self._directory in local.parents:  # whatever name the hub gave
                with suppress(OSError):
                    local.unlink()

    def _start(self, path: Path) -> Future:
        if path not in self._started:
            future: Future = Future()

            def run() -> None:
                try:
                    future.set_result(_download(self._remote[path], self._directory, self._keep))
                except BaseException as error:
                    future.set_exception(error)

            self._started[path] = future
            threading.Thread(target=run, daemon=True).start()  # daemon: a failed command does not wait for it
        return self._started[path]


def _what(remote: Remote) -> dict[str, str]:
    """The file, in huggingface_hub's words."""
    return {
        "repo_id": remote.repository,
        "filename": remote.name,
        "repo_type": "dataset",
        "revision": remote.commit,
    }


def _inside(remote: Remote, directory: Path) -> Path:
    """Where the files of a repository lie that are not kept."""
    return directory / remote.repository.replace("/", "--")


def downloaded(remote: Remote, out: Path) -> Path | None:
    """A file of the hub that is here already, in the hub's cache or of a preparation of `out` that was stopped."""
    from huggingface_hub import try_to_load_from_cache

    places = try_to_load_from_cache(**_what(remote)), _inside(remote, out / DOWNLOADS) / remote.name
    paths = [Path(one) for one in places if isinstance(one, str | Path)]  # else None, or that it does not exist
    return next((one for one in paths if one.is_file() and one.stat().st_size == remote.size), None)


def _download(remote: Remote, directory: Path, keep: bool) -> Path:
    """The local path of a file, downloaded if it is not there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    what = _what(remote)
    try:
        local = try_to_load_from_cache(**what)
        if not isinstance(local, str):
            local = hf_hub_download(**what, **({} if keep else {"local_dir": _inside(remote, directory)}))
        size = os.stat(local).st_size
    except Exception as error:
        why = system.reason(error) if isinstance(error, OSError) and error.errno else _line(error)
        raise BadInput(
            f"{remote.label}: must be downloaded whole, got {why}; the same command goes on with it"
        ) from error
    if size != remote.size:
        raise BadInput(
            f"{remote.label}: must have {remote.size:,} bytes, got {size:,} in {local}; remove it and begin again"
        )
    return Path(local)


def new(files: Iterable[Remote], known: dict[Path, Remote]) -> list[Remote]:
    """Those of the files that are not known, by label. Raises BadInput if a repository would be read at two commits."""
    commits = {one.repository: one.commit for one in known.values()}
    for one in files:
        if commits.get(one.repository, one.commit) != one.commit:
            raise BadInput(
                f"prepare: sources of one data set must be of one commit, got {one.repository} at "
                f"{commits[one.repository]} and {one.commit}; give all of them the same @REVISION"
            )
    return [one for one in files if one.label not in known]


def held_out(files: Iterable[Remote], train: set[str], tests: set[str]) -> list[Remote]:
    """Files whose names say test or validation, if there are others that say train."""
    words = {one: set(one.name.lower().replace("/", " ").replace("-", " ").replace("_", " ").split()) for one in files}
    words = {one: {word.partition(".")[0] for word in found} for one, found in words.items()}
    if not any(found & train for found in words.values()):
        return []
    return [one for one, found in words.items() if found & tests and not found & train]
