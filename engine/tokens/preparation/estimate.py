"""Estimate of a preparation, from a sample of its sources: `gpt2 prepare SOURCE... --dry-run`. Writes nothing.

The places of the sample lie at equal distances in the bytes of all files. Each stands for as many
bytes as any other, so the mean of their documents, tokens and seconds per byte is that of all files.
A file with several places is read so many times as far; a long text at as many places in it.
"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine import system
from engine.errors import BadInput
from engine.tokens import tokenizer
from engine.tokens.preparation.options import PrepareConfig
from engine.tokens.reading import formats
from engine.tokens.reading.documents import parse, parts, read
from engine.tokens.reading.parts import NotText, Raw, ReadOptions
from engine.tokens.reading.sources import find, require_text, unreadable
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
    sizes = [_size(path) for path in found.files]
    samples, files = _samples(found.files, sizes, options, tokenizer.load(config.tokenizer))
    rates = np.mean([one.per_byte() for one in samples], axis=0) if samples else np.zeros(4)
    totals = rates * sum(sizes)
    if options.split_on is None:
        several = {_suffixes(found.files[index]) for index, one in files.items() if one.documents}
        totals[0] += sum(_suffixes(path) not in several for path in found.files)
    read_bytes = sum(one.bytes for one in {id(one): one for one in samples}.values())
    head = f"estimate from {_amount(read_bytes)} of {len(files):,} of the files; nothing was written"
    return "\n".join([head, *_lines(config, found.files, sum(sizes), totals)])


def _samples(
    files: list[Path], sizes: list[int], options: ReadOptions, encoder: tokenizer.Tokenizer
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


def _sample(raws: Iterator[Raw], options: ReadOptions, encoder: tokenizer.Tokenizer) -> Sample:
    """Reads documents until they are PLACE_BYTES of the file, or all. A longer text is tokenised at its begin."""
    sample, began = Sample(), time.perf_counter()
    for raw in raws:
        sample.bytes += raw.num_bytes
        try:
            text, _ = parse(raw.kind, raw.content, options.text_field, options.is_replacing)
        except NotText:
            sample.lost += raw.num_bytes
        else:
            sample.documents += raw.kind != "file" or options.split_on is not None
            begin, before = text[:PLACE_BYTES], time.perf_counter()
            scale = len(text) / max(len(begin), 1)
            sample.tokens += len(encoder.encode(begin)) * scale
            sample.seconds += (time.perf_counter() - before) * (scale - 1)  # of the rest
        if sample.bytes >= PLACE_BYTES:
            break
    sample.seconds += time.perf_counter() - began
    return sample


def _lines(config: PrepareConfig, files: list[Path], num_bytes: int, totals: np.ndarray) -> list[str]:
    documents, tokens, lost, seconds = totals
    tokens += documents  # the end-of-text tokens
    workers = config.workers or os.cpu_count() or 1
    rate = num_bytes / max(seconds, 1e-9)
    place = next(one for one in [Path(config.out).absolute(), *Path(config.out).absolute().parents] if one.exists())
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise BadInput(f"prepare: --out must be a directory, got {place}: {system.reason(error)}") from error
    kinds = Counter(path.suffix.lower() for path in files).most_common()
    needed = TOKEN_BYTES * tokens
    names = few([f"{count:,} {suffix}" for suffix, count in kinds], formats.MOST_NAMED)
    return [
        f"  files       {len(files):,} ({names}), {_amount(num_bytes)}",
        f"  documents   {_rounded(documents)}",
        f"  tokens      {_rounded(tokens)}, tokenizer {config.tokenizer}",
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


def _suffixes(path: Path) -> str:
    return "".join(path.suffixes[-2:]).lower()


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
