"""`gpt2 prepare` against plain tiktoken in one process, on the same text: `python -m bench.prepare DIR --workers 2`.

DIR holds .txt, .md and .py files in UTF-8; without it the standard library is read. Plain tiktoken has all documents in
memory before its clock starts. Ours is timed from the start of its process to its end, when all is on the disk. They
take turns, and must make as many tokens. "speed" is plain's time over ours, divided by the workers. Exit codes: 0 done,
1 a side failed or the numbers of tokens differ.
"""

import argparse
import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import machine, results, tables
from bench.measure import in_turns
from bench.results import Row, exact, rate, spread
from engine.tokens import tokenizer
from engine.tokens.reading import sources


def plain(source: str) -> str:
    """Seconds and number of tokens of plain tiktoken, as JSON."""
    encode = tokenizer.load("gpt2")._encoding.encode_ordinary
    texts = [path.read_bytes().decode() for path in sources.find([source]).files]
    began = time.perf_counter()
    count = sum(len(encode(text)) for text in texts)
    return json.dumps([time.perf_counter() - began, count])


def prepared(source: str, workers: int, flag: str, row: Row) -> tuple[float, int]:
    """Seconds of a preparation, and its number of tokens. Adds the peaks of memory to the row."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        command = [sys.executable, "-m", "engine.cli", "prepare", source, "--out", f"{folder}/out", flag]
        began = time.perf_counter()
        with subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                with contextlib.suppress(OSError, TypeError):  # a process that has ended
                    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                    for pid in (process.pid, *children):
                        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
                        name = "memory" if pid == process.pid else "largest worker"
                        row.figures[name] = exact(max(1024 * int(found[1]), row.value(name) or 0), "B")
                time.sleep(0.1)
            seconds = time.perf_counter() - began
        manifest = json.loads(Path(folder, "out/manifest.json").read_text())
    return seconds, sum(manifest["tokens"].values()) - sum(manifest["documents"].values())


def main(arguments: list[str] | None = None) -> int:
    """Measures, prints a table, and with --save writes it; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", default=sources.STDLIB)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="samples of each side")
    parser.add_argument("--save", action="store_true", help="write prepare.json to this machine's directory")
    args = parser.parse_args(arguments)
    files = sources.find([args.source]).files
    size, counts = sum(path.stat().st_size for path in files), set()
    case = f"{size / 1e6:,.0f} MB in {len(files):,} files, {args.workers} workers"
    flags = {"ours": "--no-fast"} | ({"ours, fast": "--fast"} if importlib.util.find_spec("gigatoken") else {})
    rows = {name: Row("prepare", case, name) for name in (*flags, "tiktoken")}

    def sample(name: str) -> float:
        if name in flags:
            seconds, count = prepared(args.source, args.workers, flags[name], rows[name])
        else:
            command = [sys.executable, "-c", "import sys; from bench.prepare import plain; print(plain(sys.argv[1]))"]
            seconds, count = json.loads(subprocess.check_output([*command, args.source]))
        counts.add(count)
        return seconds

    samples = in_turns({name: lambda name=name: sample(name) for name in rows}, lambda done: done < args.rounds)
    for name, row in rows.items():
        row.figures |= {"time": spread(samples[name], "s"), "text": rate(spread(samples[name], "s"), size, "B/s")}
        pairs = zip(samples["tiktoken"], samples[name], strict=True) if name in flags else ()
        row.figures |= {"speed": spread([its / ours / args.workers for its, ours in pairs], "x")} if pairs else {}
    print(tables.of([*rows.values()]))
    if args.save and len(counts) == 1:
        results.save("prepare", machine.facts(), [*rows.values()])
    return int(len(counts) > 1)


if __name__ == "__main__":
    sys.exit(main())
