"""Ways to damage a file: its bytes, its JSON or header, and what lies at its place."""

import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checks import facts
from engine.tokens import shards

Harm = Callable[[Path, random.Random], None]
VALUES = [None, True, -1, 0, 1, 3, 2**31, 2**40, 2**62, 2**64, 10**30, 0.5, -1e308, float("nan"), float("inf")]
VALUES += ["", "x", "../../etc/passwd", "\ud800", "\0", "x" * 5000, [], {}, [[]], [1, "x"], {"x": 1}, [None], [{}]]


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    most = len(content) if rng.random() < 0.3 else min(len(content), 1200)
    for _ in range(rng.choice([1, 1, 2, 9])):
        place = rng.randrange(most)
        content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, 1, 7, 8, 9, 11, len(content) - 1, rng.randrange(len(content))])])


def zero(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.choice([0, rng.randrange(len(content))])
    content[at : at + 64] = bytes(len(content[at : at + 64]))
    path.write_bytes(content)


def noise(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    at = rng.choice([0, rng.randrange(len(content))])
    content[at : at + 16] = rng.randbytes(len(content[at : at + 16]))
    path.write_bytes(content)


def more(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.choice([b"\0", b"{}", b"\n\xff", b"=" * 3000]))


def bracket(path: Path, rng: random.Random) -> None:
    path.write_bytes(rng.choice([b"[", b'{"x":', b'{"step":1,"x":']) * 100_000 + rng.choice([b"", b"\n"]))


def value(path: Path, rng: random.Random) -> None:
    """Replaces or deletes a value of JSON, of a header in JSON, or of one line of JSON."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(_changed(json.loads(content[8 : 8 + size]), rng)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    elif path.suffix == ".npy":
        texts = [b"(%d,)" % n for n in (2**62, 2**31, -1, 0)] + [b"(True,)", b"()", b"(1.5,)", b"(1, 2)", b"[1]", b"1"]
        new = re.sub(rb"\(\d+,\)", rng.choice(texts), content[10:128].rstrip())
        kinds = [b"|O", b"<f4", b">u2", b"x", b"<i2", b"<M8[", b"(9,)u2"]
        new = rng.choice([new, new.replace(b"<u2", rng.choice(kinds))])
        path.write_bytes(content[:10] + new.ljust(117)[:117] + b"\n" + content[128:])
    elif path.suffix == ".bin":
        at = rng.choice([0, 4, 8])
        new = rng.choice([-1, 0, 1, 2**31 - 1, -(2**31), 20240520])
        path.write_bytes(content[:at] + new.to_bytes(4, "little", signed=True) + content[at + 4 :])
    elif path.suffix == ".jsonl":
        lines = content.splitlines()
        at = rng.randrange(len(lines))
        lines[at] = json.dumps(_changed(json.loads(lines[at]), rng)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    elif path.suffix == ".json" or path.name in ("went_back", "heartbeat"):
        path.write_text(json.dumps(_changed(json.loads(content), rng)))
    else:
        path.write_bytes(rng.choice([b"", b"\xff\xfe", b"../../x\n", b"step_99999999\n", b"\0", b"x" * 100_000]))


def _changed(found: Any, rng: random.Random) -> Any:
    """JSON with one value replaced, or without one, at any depth."""
    if isinstance(found, str) and found.startswith("{") and rng.random() < 0.8:  # JSON in text
        return json.dumps(_changed(json.loads(found), rng))
    keys = list(found) if isinstance(found, dict) else list(range(len(found))) if isinstance(found, list) else []
    if not keys or rng.random() < 0.03:
        return rng.choice(VALUES)
    key = rng.choice(keys)
    if rng.random() < 0.15:
        del found[key]
    elif isinstance(found[key], int) and rng.random() < 0.2:
        found[key] += rng.choice([-1, 1])
    elif isinstance(found[key], dict | list | str) and rng.random() < 0.8:
        found[key] = _changed(found[key], rng)
    else:
        found[key] = rng.choice(VALUES)
    return found


def pipe(path: Path, rng: random.Random) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def dangling(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice(["nowhere", path.name]))


def device(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/tty"]))


def unreadable(path: Path, rng: random.Random) -> None:
    path.chmod(0)


def gone(path: Path, rng: random.Random) -> None:
    path.unlink()


CONTENT: list[Harm] = [flip, flip, cut, zero, noise, more, bracket, value, value, value, value]
PLACE: list[Harm] = [pipe, directory, dangling, device, unreadable, gone]


def fit_digests(path: Path) -> None:
    """Writes the digest of a damaged file anew, as a bug or a person would have made it."""
    folder = path.parent.parent if path.parent.name == "sharded" else path.parent
    if path.name == "tune.json":
        fields = json.loads(path.read_bytes())
        if isinstance(fields, dict):
            fields.pop("digest", None)
            path.write_text(json.dumps(fields | {"digest": facts.key(fields)}))
    elif (manifest := folder / "manifest.json") != path and manifest.exists():
        listed, new = json.loads(manifest.read_text()), {"bytes": path.stat().st_size, "sha256": shards.sha256(path)}
        if isinstance(listed.get("files"), dict):
            listed["files"][str(path.relative_to(folder))] = new
        for shard in listed.get("shards", []):
            if shard["file"] == path.name:
                shard |= {"sha256": new["sha256"]} | ({"bytes": new["bytes"]} if "bytes" in shard else {})
        manifest.write_text(json.dumps(listed))
