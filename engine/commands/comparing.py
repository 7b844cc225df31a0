"""`gpt2 compare` and `gpt2 report`."""

from pathlib import Path

from engine import flags
from engine.errors import BadInput


def compare(args: list[str], prog: str) -> None:
    """Prints what differs between runs, and whether it is more than noise."""
    from dataclasses import dataclass

    import tyro

    @dataclass(frozen=True)
    class Compare:
        """Prints how runs differ: settings, loss at equal tokens and equal time, speed, memory.

        Says of several seeds whether their difference is more than noise.
        """

        runs: tyro.conf.Positional[tuple[str, ...]]  # two or more run directories
        json: bool = False  # print one JSON object instead

    asked = flags.checked(Compare, args, prog)
    if len(asked.runs) < 2:
        raise BadInput(f"compare: at least two runs must be given, got {len(asked.runs)}; name directories of runs")
    from engine.comparison import compare as comparison
    from engine.comparison import records

    found = records.read_all(asked.runs, "compare")
    print(comparison.as_json(found) if asked.json else comparison.as_text(found))


def report(args: list[str], prog: str) -> None:
    """Writes the report of runs and prints its path."""
    from dataclasses import dataclass

    import tyro

    @dataclass(frozen=True)
    class Report:
        """Writes runs as one HTML file: curves, samples, settings, speed. It needs no network and no server."""

        runs: tyro.conf.Positional[tuple[str, ...]]  # run directories
        out: str = "report.html"  # file to write
        reference: tuple[str, ...] = ()  # curves of others: gpt2-124m, llm.c, first-run

    asked = flags.checked(Report, args, prog)
    out = new_file(asked.out, "report")
    from engine.comparison import page, records, references

    found = records.read_all(asked.runs, "report")
    print(page.write(found, references.load_all(asked.reference, found, "tokens", "report"), out))


def new_file(out: str, command: str) -> Path:
    """The path of a file to write. Raises BadInput if --out is no name of a file in a directory that is there."""
    path = Path(out)
    got, do = None, "choose another --out"
    if not path.name or path.is_dir():
        got, do = (f"the directory {out}" if out else "''"), "name a file"
    elif not path.parent.is_dir():
        got, do = f"{out}, where {path.parent} is no directory", f"make the directory {path.parent}, or {do}"
    if got is not None:
        raise BadInput(f"{command}: --out must be a file that can be written, got {got}; {do}")
    return path
