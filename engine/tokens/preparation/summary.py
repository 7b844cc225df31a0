"""Summary of prepared data for the terminal: what was read, what was made, and what was left out."""

from typing import Any

from engine.tokens.reading import formats
from engine.tokens.reading.sources import not_read
from engine.tokens.tokenizer import END_OF_TEXT
from model.files import few

LOUD = 0.1  # share of the bytes that is left out from which the summary begins with a warning
WAYS = {
    "not UTF-8": "--on-bad-text replace keeps the rest of such documents",
    "no text field": "--text-field names another field",
}


def left_out(manifest: dict[str, Any]) -> list[str]:
    """Lines on the documents that were left out; [] if there are none.

    They name reasons, bytes, the files that lose most, and what keeps them.
    """
    skipped = manifest["skipped"]
    if not skipped:
        return []
    line = "left out: " + ", ".join(f"{count:,} {why}" for why, count in sorted(skipped.items()))
    losses = manifest.get("left_out")  # data made by an older version has none
    if not losses or not losses["bytes"] or set(skipped) == {"empty"}:
        return [line]
    read = manifest["source_bytes"]
    line += f"; {losses['bytes']:,} of {read:,} bytes ({100 * losses['bytes'] / max(read, 1):.1f}%)"
    lines = [line, *(f"  {one['file']}, {one['bytes']:,} bytes: {one['first']}" for one in losses["files"])]
    ways = sorted({way for why in skipped for begin, way in WAYS.items() if why.startswith(begin)})
    return [*lines, *(f"  {way}" for way in ways)]


def describe(manifest: dict[str, Any], out: str) -> str:
    """Summary of a manifest: three lines, and more if something was left out or not read."""
    lines = [
        f"{out}: {_size(manifest['text_bytes'])} of text{_sources(manifest)}, "
        f"tokenizer {manifest['tokenizer']}{_encoder(manifest)}, validation by {manifest['split']}"
    ]
    for split in ("train", "val"):
        lines.append(
            f"  {split:<5} {manifest['tokens'][split]:>14,} tokens  {manifest['documents'][split]:>9,} documents  "
            f"{sum(shard['split'] == split for shard in manifest['shards']):>4} shards"
        )
    if why := manifest.get("not_fast"):
        lines.append(f"  {why}, so tiktoken made all tokens")
    if replaced := manifest.get("replaced"):
        lines.append(f"  U+FFFD in place of bad bytes: {replaced:,}")
    if markers := manifest.get("markers"):
        lines.append(
            f"  {markers:,} literal {END_OF_TEXT} are text like any other; --split-on '{END_OF_TEXT}' ends documents "
            "of text files there"
        )
    if with_nul := manifest.get("with_nul"):
        lines.append(f"  {with_nul:,} with NUL bytes, which are text like any other")
    if duplicates := manifest.get("duplicates"):
        lines.append(f"  duplicates left out: {duplicates['documents']:,} documents, {_size(duplicates['bytes'])}")
        if duplicates["leaked"]:
            lines.append(f"  {duplicates['leaked']:,} of them are validation documents that are for training too")
    if linked := manifest.get("linked"):
        lines.append(f"  linked directories that were read: {linked:,}")
    lines += [f"  {line}" for line in left_out(manifest)]
    if counts := manifest.get("not_read"):
        way = "; a file that is named as a source is read" if any("beside" in why for why in counts) else ""
        lines.append(f"  {not_read(counts)}{way}")
    if (held_out := manifest.get("held_out")) and held_out["count"]:
        more = f" and {held_out['count'] - 1:,} more" if held_out["count"] > 1 else ""
        lines.append(
            f"  held out: {held_out['first']}{more}, test or validation sets beside a train set; "
            "name them as sources to read them"
        )
    lost, read = manifest.get("left_out", {}).get("bytes", 0), manifest.get("source_bytes", 0)
    if lost and lost >= LOUD * read:
        lines.insert(0, f"WARNING: {100 * lost / read:.0f}% of the sources' bytes were left out, see below")
    return "\n".join(lines)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e6 else f"{num_bytes:,} bytes"


def _encoder(manifest: dict[str, Any]) -> str:
    """Text such as " by tiktoken 0.14.0", or "" for bytes and for data made by an older version."""
    encoder = manifest.get("encoder", manifest["tokenizer"])
    return "" if encoder == manifest["tokenizer"] else f" by {encoder}"


def _sources(manifest: dict[str, Any]) -> str:
    """Text such as " from 12 .py, 3 .txt", or "" for data made by an older version."""
    counts = sorted(manifest.get("files", {}).items(), key=lambda one: (-one[1], one[0]))
    if not counts:
        return ""
    return f" from {few([f'{count:,} {suffix}' for suffix, count in counts], formats.MOST_NAMED)}"
