"""Packed files, .gz, .zst, .bz2 and .xz, as streams of the bytes that are in them.

A file may consist of several packed streams, one behind the other. One that is damaged or cut off
is BadFile, which names the byte: it is never read as a shorter text.
"""

import bz2
import io
import lzma
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import BadInput
from model.files import BadFile, open_file

PACKINGS = {".gz": "gzip", ".zst": "Zstandard", ".bz2": "bzip2", ".xz": "xz"}
BUFFER = 1 << 20  # bytes that a stream reads ahead, of which its head can be seen
BLOCK = 1 << 20  # bytes of lines that become one part
INPUT = 1 << 16  # packed bytes that are read at once
INPUT_OF_PACKAGE = 1 << 12  # for the package zstandard, which unpacks all that it is given at once
ZSTANDARD = b"\x28\xb5\x2f\xfd"  # first bytes of a frame
ZSTANDARD_HEADER = 18  # bytes of the longest header of a frame
GZIP_END = 4  # bytes at the end of a member that tell the size of what is in it, modulo 2^32
WIDEST = 31  # log2 of the largest window of Zstandard, as `zstd --long=31` writes it


def suffixes(path: str | Path) -> tuple[str, str]:
    """Suffixes of the content and of the packing: (".json", ".gz") of a.JSON.gz, (".txt", "") of a.txt."""
    stem, suffix = _split(os.path.basename(path))  # a Path would take most of the time of reading a small file
    return (_split(stem)[1], suffix) if suffix in PACKINGS else (suffix, "")


def _split(name: str) -> tuple[str, str]:
    """Stem and suffix of a name, as of a Path, the suffix in lower case."""
    stem, _, last = name.rpartition(".")
    return (stem, f".{last.lower()}") if stem and last else (name, "")


def stem(path: str | Path) -> str:
    """Name of a file without the suffixes of its content and its packing."""
    stem = Path(path).stem
    return Path(stem).stem if suffixes(path)[1] else stem


def open_stream(path: Path) -> io.BufferedReader:
    """Opens a file for reading what is in it. Its `raw` is an Unpacked. Raises BadFile or FileNotFoundError."""
    packing = suffixes(path)[1]
    make, most = _unpacker(path, packing) if packing else (None, INPUT)
    return io.BufferedReader(Unpacked(open_file(path), packing, make, most), BUFFER)


def unpacked_size(path: Path) -> int | None:
    """Bytes in a packed file, as its header or its end tells; None if neither does.

    Of a file of several streams only one tells: None if what it tells is less than the packed bytes.
    Raises BadFile or OSError.
    """
    packing = suffixes(path)[1]
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        told = None
        if packing == ".gz" and size > GZIP_END:
            file.seek(-GZIP_END, os.SEEK_END)
            told = int.from_bytes(file.read(), "little")
        elif packing == ".zst":
            told = _size_of_frame(file.read(ZSTANDARD_HEADER))
    return told if told is not None and told >= size else None


def _size_of_frame(head: bytes) -> int | None:
    """The content size in the header of a Zstandard frame, if it has one. Source: RFC 8878, section 3.1.1.1."""
    if not head.startswith(ZSTANDARD) or len(head) < ZSTANDARD_HEADER:
        return None
    flags = head[len(ZSTANDARD)]
    is_one_segment = flags >> 5 & 1
    num_bytes = (is_one_segment, 2, 4, 8)[flags >> 6]
    begin = len(ZSTANDARD) + 1 + (not is_one_segment) + (0, 1, 2, 4)[flags & 3]  # after the window and the dictionary
    size = int.from_bytes(head[begin : begin + num_bytes], "little") + (256 if num_bytes == 2 else 0)
    return size if num_bytes else None


class Unpacked(io.RawIOBase):
    """Bytes in a packed file, or those of a plain one. Not seekable: they are read once, from the begin."""

    def __init__(self, file: BinaryIO, packing: str = "", make: Any = None, most: int = INPUT):
        """packing: of PACKINGS, or "". make: makes the object that unpacks one stream. most: packed bytes for it."""
        self.file, self.packing, self.make, self.most = file, packing, make, most
        self.consumed = self.produced = 0  # bytes of the file, and of what is in it
        self.is_at_end = False
        self._streams = 0  # that have begun
        self._is_packed = False  # whether the first bytes could be unpacked
        self._unpacker: Any = None
        self._packed = b""  # read, and not given to the unpacker
        self._ready = memoryview(b"")  # unpacked, and not given to the caller

    @property
    def size(self) -> int:
        """Bytes of the file; of a pipe, those that were read."""
        return max(os.fstat(self.file.fileno()).st_size, self.consumed)

    def share(self, position: int) -> int:
        """Bytes of the file that the first `position` bytes in it stand for, as far as it is read."""
        return self.consumed * position // max(self.produced, 1)

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        """Fills the whole buffer, except at the end of the file."""
        view, filled = memoryview(buffer).cast("B"), 0
        while filled < len(view) and not self.is_at_end:
            if not len(self._ready):
                self._ready = memoryview(self._next(len(view) - filled))
                self.is_at_end = not len(self._ready)
            count = min(len(self._ready), len(view) - filled)
            view[filled : filled + count] = self._ready[:count]
            self._ready = self._ready[count:]
            filled += count
        self.produced += filled
        return filled

    def _read(self, most: int) -> bytes:
        content = self.file.read(most)
        self.consumed += len(content)
        return content

    def _next(self, most: int) -> bytes:
        """The next bytes, about `most` of them; b"" at the end."""
        if self.make is None:
            return self._read(most)
        name = PACKINGS[self.packing]
        while True:
            if self._unpacker is None and not self._begin():
                return b""
            try:
                content = self._unpacker.decompress(self._packed, most)
            except Exception as error:  # each library has its own
                what = f"{name} data that is damaged" if self._is_packed else f"no {name} data, or damaged"
                raise BadFile(f"{what}, {self._where()}") from error
            self._packed, self._is_packed = b"", True
            if self._unpacker.eof:
                self._packed, self._unpacker = self._unpacker.unused_data, None
            if content:
                return content
            if self._unpacker is not None and not (packed := self._read(self.most)):
                raise BadFile(f"{name} data that is cut off, {self._where()}")
            self._packed = packed if self._unpacker is not None else self._packed

    def _begin(self) -> bool:
        """Begins the next stream of the file. Returns whether there is one."""
        while True:
            self._packed = self._packed.lstrip(b"\0") if self._streams else self._packed  # tapes and .xz pad with zeros
            if self._packed or not (packed := self._read(self.most)):
                break
            self._packed = packed
        if not self._packed and not self._streams:
            raise BadFile(f"no {PACKINGS[self.packing]} data: the file is empty")
        if self._packed:
            self._streams += 1
            self._unpacker = self.make()
        return bool(self._packed)

    def _where(self) -> str:
        return f"at or before byte {self.consumed:,}"


class _Stream:
    """One stream of a packed file."""

    inner: Any  # what zlib or the package zstandard unpacks it with

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data


class _Gzip(_Stream):
    """One member of a gzip file."""

    def __init__(self) -> None:
        self.inner = zlib.decompressobj(16 + zlib.MAX_WBITS)  # 16: with gzip's header and checksum

    def decompress(self, packed: bytes, most: int) -> bytes:
        return self.inner.decompress(self.inner.unconsumed_tail + packed, most)


class _Zstandard(_Stream):
    """One frame of a Zstandard file, by the package zstandard."""

    def __init__(self, package: Any) -> None:
        self.inner = package.ZstdDecompressor(max_window_size=1 << WIDEST).decompressobj()

    def decompress(self, packed: bytes, most: int) -> bytes:
        return self.inner.decompress(packed) if packed else b""  # it holds nothing back


def _unpacker(path: Path, packing: str) -> tuple[Any, int]:
    """What makes the object that unpacks one stream of a packed file, and the bytes to give it at once."""
    if packing == ".gz":
        return _Gzip, INPUT
    if packing == ".bz2":
        return bz2.BZ2Decompressor, INPUT
    if packing == ".xz":
        return lzma.LZMADecompressor, INPUT
    try:
        from compression import zstd  # from Python 3.14 on
    except ImportError:
        pass
    else:
        return lambda: zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WIDEST}), INPUT
    try:
        import zstandard
    except ImportError as error:
        raise BadInput(f"prepare: {path} needs zstandard; install it with: pip install zstandard") from error
    return lambda: _Zstandard(zstandard), INPUT_OF_PACKAGE
