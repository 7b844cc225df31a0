"""The output of `gpt2 data`: tables and windows, in colour on a terminal, plain at 80 columns in a pipe."""

import unicodedata
from io import StringIO
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.tokens.inspection import view
from engine.tokens.preparation import summary
from model.files import few

WIDTH = 80  # of a pipe
HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # Unicode categories that a terminal does not show, or obeys
MOST_ROWS = 40  # of whole shards
MOST_SOURCES = 6
STYLES = {view.SAME: "green", view.OTHER: "bold red"}


def write(found: dict[str, Any], stream: TextIO) -> None:
    """Prints what `view.view` has found."""
    is_terminal = stream.isatty()
    console = Console(file=stream if is_terminal else StringIO(), highlight=False)
    # A narrow terminal breaks the lines, and loses nothing.
    console.width = max(console.width, WIDTH) if is_terminal else WIDTH
    console.print(_line(f"{found['directory']}: tokens of {found['tokenizer']}, {found['kind']}", "bold"))
    console.print(_shards(found))
    for row in found["shards"]:
        if row["damage"]:
            console.print(_line(f"{Path(found['directory'], row['file'])}: {row['damage']}", "bold red"))
    for name in found["unlisted"]:
        console.print(_line(f"{Path(found['directory'], name)}: not in manifest.json, so nothing reads it", "yellow"))
    console.print("", _splits(found), "", _lengths(found), sep="\n")
    for line, style in _facts(found):
        console.print(_line(line, style))
    is_wide = (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
    border = "── document ──" if is_wide else "-- document --"
    for number, window in enumerate(found["windows"], 1):
        head = f"window {number}: {window['split']}, {window['file']} from token {window['first_token']:,}"
        console.print("", _line(head, "bold"), sep="\n")
        for place, document in enumerate(window["documents"]):
            if place:
                console.print(Text(border, style="bold cyan"))
            if document:
                console.print(Text(shown(document), overflow="fold"))
    if not is_terminal:
        stream.writelines(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


def shown(text: str) -> str:
    """Text that can be printed as it is: escapes in place of what a terminal would hide or obey. Lines stay."""
    return "".join(_escaped(one) if one != "\n" and unicodedata.category(one) in HIDDEN else one for one in text)


def _escaped(one: str) -> str:
    return one.encode("unicode_escape").decode("ascii")


def _line(text: str, style: str | None = None) -> Text:
    return Text(shown(text).replace("\n", "\\n"), style=style or "", overflow="fold")


def _table(words: tuple[str, ...], numbers: tuple[str, ...], last: tuple[str, ...] = ()) -> Table:
    """A table without rows. words, numbers, last: heads of its columns; the first may be folded."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for place, head in enumerate((*words, *numbers, *last)):
        table.add_column(
            head,
            justify="right" if head in numbers else "left",
            no_wrap=place > 0,
            overflow="fold" if place == 0 else "ellipsis",
        )
    return table


def _shards(found: dict[str, Any]) -> Table:
    table = _table(("file", "split"), ("tokens", "documents", "size"), ("digest",))
    rows = found["shards"]
    half = MOST_ROWS // 2
    for place, row in enumerate(rows):
        if len(rows) > MOST_ROWS + 1 and half <= place < len(rows) - half and not row["damage"]:
            if place == half:
                table.add_row("...")
            continue
        counts = ["-" if row[name] is None else f"{row[name]:,}" for name in ("tokens", "documents")]
        digest = Text(row["digest"], style=STYLES.get(row["digest"], ""))
        style = "red" if row["damage"] else None
        table.add_row(_line(row["file"]), _line(row["split"]), *counts, _size(row["bytes"]), digest, style=style)
    return table


def _splits(found: dict[str, Any]) -> Table:
    numbers = ("shards", "tokens", "documents")
    table = _table(("split",), numbers)
    for name, split in found["splits"].items():
        table.add_row(_line(name), *(f"{split[key]:,}" for key in numbers))
    return table


def _lengths(found: dict[str, Any]) -> Table:
    numbers = ("shortest", "median", "mean", "longest")
    table = _table(("tokens of a document",), numbers)
    for name, split in found["splits"].items():
        lengths = split["lengths"] or {}
        table.add_row(_line(name), *(f"{lengths[key]:,.0f}" if lengths else "-" for key in numbers))
    return table


def _facts(found: dict[str, Any]) -> list[tuple[str, str | None]]:
    """Lines under the totals, and the style of each."""
    lines: list[tuple[str, str | None]] = [("", None)]
    tokens = sum(split["tokens"] for split in found["splits"].values())
    if found["bytes_per_token"] is not None:
        measured = found["measured_tokens"]
        how = "all counted" if measured >= tokens else f"a sample of {measured:,} tokens"
        lines.append((f"bytes per token  {found['bytes_per_token']:.3f} ({how})", None))
    for name, split in found["splits"].items():
        if split["tokens"] and not split["ends_of_text"]:
            lines.append((f"documents        {name}: no end-of-text token, so all of it counts as one", "yellow"))
        lines += _copies(name, split["duplicates"], found["compared"])
    if (manifest := found["manifest"]) is not None:
        lines += [(line, None) for line in _noted(manifest | {"shards": found["shards"]})]
    return lines


def _copies(name: str, counts: dict[str, int] | None, compared: str) -> list[tuple[str, str | None]]:
    if not counts or not counts["compared"]:
        return []
    share = f"{counts['copies'] / counts['compared']:.2%}"
    of = "" if compared == "1 in 1" else f"; compared is {compared} of all documents, chosen by hash"
    line = f"{share}, {counts['copies']:,} of {counts['compared']:,} documents copy an earlier one{of}"
    lines: list[tuple[str, str | None]] = [(f"duplicates       {name}: {line}", None)]
    if leaked := counts.get("in_train"):
        share = f"{leaked / counts['compared']:.2%}"
        lines.append((f"leakage          {name}: {share}, {leaked:,} of them are in train too", "bold red"))
    return lines


def _noted(manifest: dict[str, Any]) -> list[str]:
    """What `prepare` wrote into the manifest, as it printed it then; [] for a manifest of another program."""
    if "request" not in manifest:
        return []
    lines = ["", "manifest.json says:"]
    if isinstance(sources := manifest.get("sources"), list):
        lines.append(f"  sources: {few([str(one) for one in sources], MOST_SOURCES)}")
    if isinstance(options := manifest.get("options"), dict):
        lines.append("  options: " + ", ".join(f"{name} {value}" for name, value in options.items()))
    try:
        said = summary.describe(manifest, "text").splitlines()
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # it was edited
        return [*lines, f"  no summary of prepare's ({error!r})"]
    return lines + [f"  {line}" for line in said]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB" if num_bytes >= 1e5 else f"{num_bytes:,} B"
