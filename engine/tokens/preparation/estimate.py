"""Estimate of a preparation, from a sample of its sources: `gpt2 prepare SOURCE... --dry-run`. Writes nothing.

The places of the sample lie at equal distances in the bytes of all files. Each stands for as many
bytes as any other, so the mean of their documents, tokens and seconds per byte is that of all files.
A file with several places is read so many times as far; a long text at as many places in it.
Of the files on the hub those that are here already stand for all of them. Nothing is downloaded.
"""

import os
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import system
from engine.errors import BadInput
from engine.tokens.preparation import fast
from engine.tokens.preparation.options import PrepareConfig
from engine.tokens.reading import formats, hub
from engine.tokens.reading.documents import parse, parts, read
from engine.tokens.reading.packed import suffixes
from engine.tokens.reading.parts import NotText, Raw, ReadOptions
from engine.tokens.reading.sources import Selection, find, require_text, unreadable
from model.files import few

PLACES = 40
STRIDE = 17  # places are read in this order, and so lie apart also where the time ends
PLACE_BYTES = 1 << 19  # bytes of the sources that are read for a place: 20 MB in all
MOST_SECONDS = 5.0
TOKEN_BYTES = 2


@dataclass
class Sample:
    """What some bytes of the sources hold."""

    bytes: int = 0
    documents: int = 0  # of files that hold several
    tokens: float = 0.0
    lost: int = 0  # bytes that are no text
    seconds: float = 0.0  # to read and tokenise them in one process

    def per_byte(self) -> np.ndarray:
        """documents, tokens, lost bytes and seconds per byte of the sources, (4,)."""
        return np.array([self.documents, self.tokens, self.lost, self.seconds]) / max(self.bytes, 1)


def estimate(sources: list[str], config: PrepareConfig) -> str:
    """The estimate for the terminal. Raises BadInput if a source cannot be read."""
    if "-" in [*sources, *config.val]:
        raise BadInput("prepare: --dry-run must have files to read, got standard input; write it to a file")
    found = find([*sources, *config.val])
    require_text(found, config.text_field)
    options = ReadOptions(config.text_field, config.separator, config.on_bad_text == "replace", is_sample=True)
    here, weights, num_bytes = _here(found, Path(config.out))
    if not here:
        return _unknown(config, found, num_bytes)
    samples, files, encoder = _measured(here, weights, options, config)
    rates = np.mean([one.per_byte() for one in samples], axis=0) if samples else np.zeros(4)
    totals = rates * num_bytes
    if options.split_on is None:
        several = {suffixes(here[index]) for index, one in files.items() if one.documents}
        totals[0] += sum(suffixes(path) not in several for path in found.files)
    read_bytes = sum(one.bytes for one in {id(one): one for one in samples}.values())
    head = f"estimate from {_amount(read_bytes)} of {len(files):,} of the files; nothing was written"
    return "\n".join([head, *_lines(config, found.files, num_bytes, totals, encoder)])


def _here(found: Selection, out: Path) -> tuple[list[Path], list[int], int]:
    """The files that a sample can read, the bytes that each stands for, and the bytes of all files.

    No file, if one of the files on the hub would have to stand for the others and none is here.
    """
    local = {path: _size(path) for path in found.files if path not in found.remote}
    here = {hub.downloaded(one, out): one.size for one in found.remote.values()}
    here.pop(None, None)
    of_remote = sum(one.size for one in found.remote.values())
    num_bytes = sum(local.values()) + of_remote
    if found.remote and not here:
        return [], [], num_bytes
    each = of_remote / max(sum(here.values()), 1)
    return [*local, *here], [*local.values(), *(round(size * each) for size in here.values())], num_bytes


def _unknown(config: PrepareConfig, found: Selection, num_bytes: int) -> str:
    """What is known of sources on the hub, and how to know more."""
    first = next(iter(found.remote.values()))
    words = f"--revision {first.commit} {shlex.quote(first.repository)} {shlex.quote(first.name)}"
    return "\n".join(
        [
            "no estimate: none of the files on the hub is here; nothing was downloaded or written",
            _files(found.files, num_bytes),
            f"  for more    hf download --repo-type dataset {words}",
            f"              ({_amount(first.size)}), then the same command again: an estimate from this file",
        ]
    )


def _measured(
    files: list[Path], weights: list[int], options: ReadOptions, config: PrepareConfig
) -> tuple[list[Sample], dict[int, Sample], str]:
    """As _samples, and what encoded them: what the preparation would take."""
    try:
        is_fast, encoder = config.fast, fast.batch_encoder(config.tokenizer, config.fast)
        measured = _samples(files, weights, options, encoder)
    except fast.Unusable:
        is_fast, encoder = False, fast.batch_encoder(config.tokenizer, False)
        measured = _samples(files, weights, options, encoder)
    return *measured, fast.version(config.tokenizer, is_fast)


def _samples(
    files: list[Path], sizes: list[int], options: ReadOptions, encoder: fast.BatchEncoder
) -> tuple[list[Sample], dict[int, Sample]]:
    """The sample of each place, the same one again where a file has no more; and the last one of each file."""
    began, ends = time.perf_counter(), np.cumsum(sizes)
    raws: dict[int, Iterator[Raw]] = {}
    last: dict[int, Sample] = {}
    samples: list[Sample] = []
    for place in range(PLACES if sum(sizes) else 0):
        at = (2 * (place * STRIDE % PLACES) + 1) * sum(sizes) // (2 * PLACES)
        index = int(np.searchsorted(ends, at, side="right"))
        if index not in raws:
            raws[index] = _documents(files[index], options)
        sample = _sample(raws[index], options, encoder)
        if sample.bytes or index not in last:
            last[index] = sample
        samples.append(last[index])
        if time.perf_counter() - began > MOST_SECONDS:
            break
    return samples, last


def _documents(path: Path, options: ReadOptions) -> Iterator[Raw]:
    for part, _ in parts(path, options):
        yield from read(part, options)


def _sample(raws: Iterator[Raw], options: ReadOptions, encoder: fast.BatchEncoder) -> Sample:
    """Reads documents until they are PLACE_BYTES of the file, or all. A longer text is tokenised at its begin."""
    sample, began = Sample(), time.perf_counter()
    begins, sizes = [], []  # characters of the whole text
    for raw in raws:
        sample.bytes += raw.num_bytes
        try:
            text, _ = parse(raw.kind, raw.content, options.text_field, options.is_replacing)
        except NotText:
            sample.lost += raw.num_bytes
        else:
            sample.documents += raw.kind != "file" or options.split_on is not None
            begins.append(text[:PLACE_BYTES])
            sizes.append(len(text))
        if sample.bytes >= PLACE_BYTES:
            break
    before, lengths = time.perf_counter(), [max(len(one), 1) for one in begins]
    ids = encoder.encode_batch(begins)  # together, as in a preparation: of a batch gigatoken's are compared once
    sample.tokens = sum(len(one) * size / length for one, size, length in zip(ids, sizes, lengths, strict=True))
    now = time.perf_counter()
    rest = max(sum(sizes) / max(sum(lengths), 1) - 1, 0)  # of the texts, for what was tokenised
    sample.seconds = now - began + (now - before) * rest
    return sample


def _files(files: list[Path], num_bytes: int) -> str:
    kinds = Counter(path.suffix.lower() for path in files).most_common()
    names = few([f"{count:,} {suffix}" for suffix, count in kinds], formats.MOST_NAMED)
    return f"  files       {len(files):,} ({names}), {_amount(num_bytes)}"


def _lines(config: PrepareConfig, files: list[Path], num_bytes: int, totals: np.ndarray, encoder: str) -> list[str]:
    documents, tokens, lost, seconds = totals
    tokens += documents  # the end-of-text tokens
    workers = config.workers or os.cpu_count() or 1
    rate = num_bytes / max(seconds, 1e-9)
    place = next(one for one in [Path(config.out).absolute(), *Path(config.out).absolute().parents] if one.exists())
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise BadInput(f"prepare: --out must be a directory, got {place}: {system.reason(error)}") from error
    needed, by = TOKEN_BYTES * tokens, "" if encoder == config.tokenizer else f" by {encoder}"
    return [
        _files(files, num_bytes),
        f"  documents   {_rounded(documents)}",
        f"  tokens      {_rounded(tokens)}, tokenizer {config.tokenizer}{by}",
        f"  shards      {_amount(needed)} in {config.out}, where {_amount(free)} are free"
        + ("; WARNING: that is too little" if needed > free else ""),
        f"  time        {_duration(seconds / workers)} with {workers} workers: {rate / 1e6:,.1f} MB/s measured on one "
        f"core, times {workers}",
        f"  not text    {100 * lost / max(num_bytes, 1):.1f}% of the bytes",
    ]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def _amount(num_bytes: float) -> str:
    unit, name = next(
        ((size, name) for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if num_bytes >= size), (1e3, "kB")
    )
    return f"{num_bytes / unit:,.1f} {name}"


def _rounded(count: float) -> str:
    """A count with three digits, such as 1,230,000."""
    return f"{float(f'{count:.3g}'):,.0f}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(max(round(seconds), 1), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"
