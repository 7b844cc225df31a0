"""This engine on one CUDA GPU, whole and in parts, against its peers: `python -m bench.gpu --out DIR [--minutes 9]`.

    python -m bench.gpu --out DIR --resume              # measures what the first call left out
    python -m bench.gpu --out DIR --only step,loss      # some sections of the plan
    python -m bench.gpu --out DIR --dry-run             # builds and checks every case on a CPU, times nothing

Ceilings of the machine, accuracy of the kernels against float64, training steps of GPT-2 124M against the plain
reference and `transformers`, whether their losses agree, each op against PyTorch eager and compiled and against SDPA's
backends, the kernel tests, the largest micro-batch, and the larger presets: in the order of gpu_plan.PLAN and as far as
the minutes go; what did not fit is listed. DIR/gpu.json and DIR/gpu.md (the tables) are rewritten after every result,
so a kill leaves what was measured. Needs torch and triton, pytest for the tests, and transformers to be a peer.

This process only watches: the work happens in others (gpu_worker.py, pytest), one at a time, which may die or hang
without taking the rest along. Exit codes: 0 done, 1 something failed (see the table), 2 bad input or no CUDA device.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import machine
from bench.gpu_plan import PLAN, SECTIONS, Part
from bench.gpu_report import Record

TESTS = (
    *("test_attention*.py", "test_layer_norm.py", "test_gelu.py", "test_cross_entropy*.py", "test_column_sum.py"),
    "test_kernel_model.py",
)
TESTS_LIMIT_S = 170.0
MOST_PROCESSES = 8  # that may die before the rest is given up
TEST_LINE = re.compile(r"::.* (PASSED|FAILED|ERROR|SKIPPED)\b|(PASSED|FAILED|ERROR|SKIPPED) \S+::")  # plain, xdist
SAME = ("commit", "torch", "triton")  # facts in which a resumed run must agree with what is there


def main(arguments: list[str] | None = None) -> int:
    """Runs the plan and prints the table; the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="This engine on a GPU, against its peers.")
    parser.add_argument("--out", type=Path, required=True, help="directory for gpu.json, gpu.md and the logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything; what does not fit is left out")
    parser.add_argument("--only", type=sections, default=SECTIONS, help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--resume", action="store_true", help="keep what is in --out, measure what it left out")
    parser.add_argument("--commit", default=None, help="recorded instead of what git says here")
    parser.add_argument("--dry-run", action="store_true", help="check every case on a CPU and time nothing")
    args = parser.parse_args(arguments)

    began = time.time()
    if not args.dry_run:
        import torch

        if not torch.cuda.is_available():
            return refuse("a CUDA device must be here, there is none; add --dry-run to check on a CPU")
    facts = machine.facts() | {"command": shlex.join(["python", "-m", "bench.gpu", *arguments])}
    facts["commit"] = args.commit or facts["commit"]
    if args.resume:
        try:
            record = Record.load(args.out.resolve())
        except (OSError, ValueError):
            return refuse(f"--resume goes on with a gpu.json, {args.out} holds none; leave --resume away")
        known = record.state["machine"]
        for name in SAME:
            if known.get(name) != facts[name]:
                return refuse(
                    f"--resume needs the {name} of the results in {args.out}, {known.get(name)}, got {facts[name]}"
                )
        if record.state["dry_run"] != args.dry_run:
            return refuse(f"--resume needs --dry-run exactly if the results in {args.out} are of a dry run")
        known["command"] += f"; {facts['command']}"
        record.state |= {"began": began, "running": None}
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "failures.log").unlink(missing_ok=True)
        record = Record.new(
            args.out.resolve(),
            machine=facts,
            dry_run=args.dry_run,
            started=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(began)),
            began=began,
            minutes=args.minutes,
        )
    left = [part for part in PLAN if str(part) not in record.state["done"]]
    chosen = [part for part in left if part.section in args.only]
    record.state["reasons"] = {str(part): "not among --only" for part in left if part not in chosen}
    record.save()

    deadline = began + 60.0 * args.minutes
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(machine.ROOT), os.environ.get("PYTHONPATH"))))
    environment["TRANSFORMERS_VERBOSITY"] = "error"
    if args.dry_run:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    tests = [part for part in chosen if part.section == "tests"]
    tests_at = chosen.index(tests[0]) if tests else len(chosen)
    before, after = chosen[:tests_at], chosen[tests_at + 1 :]
    if args.dry_run:  # no test runs, and one process is quicker
        before, after = before + after, []
    work(record.out, before, deadline, args.dry_run, environment)
    for part in tests:
        run_tests(Record.load(record.out), part, deadline, sum(each.seconds for each in after), environment)
    work(record.out, after, deadline, args.dry_run, environment)

    record = Record.load(record.out)
    print("\n" + record.table(), flush=True)
    return 1 if any(row["status"] == "failed" for row in record.state["rows"]) else 0


def refuse(what: str) -> int:
    """Says what must hold; the exit code."""
    print(f"bench.gpu: {what}", file=sys.stderr)
    return 2


def sections(text: str) -> list[str]:
    """The sections that --only names."""
    names = text.split(",")
    if wrong := [name for name in names if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"must name some of {','.join(SECTIONS)}, got {','.join(wrong)}")
    return names


def run_limited(command: list[str], environment: dict[str, str], is_over, output=None) -> int | None:
    """Runs a command in the repository's root until it ends, or stops it and all that it started once is_over().

    Gives the exit code, or None if it was stopped.
    """
    child = subprocess.Popen(
        command, cwd=machine.ROOT, env=environment, stdout=output, stderr=output and subprocess.STDOUT, process_group=0
    )
    try:
        while True:
            try:
                return child.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                if is_over():
                    return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def work(out: Path, parts: Sequence[Part], deadline: float, dry_run: bool, environment: dict[str, str]) -> None:
    """Has these parts measured, by another process after each one that dies or hangs."""
    command = [sys.executable, "-m", "bench.gpu_worker", "--out", str(out), "--deadline", str(deadline)]
    command += ["--parts", json.dumps([str(part) for part in parts]), *(["--dry-run"] if dry_run else [])]

    def is_over() -> bool:
        running = Record.load(out).state["running"]
        is_hanging = running is not None and time.time() > running["since"] + running["limit_s"]
        return is_hanging or time.time() > deadline + 10.0

    for _ in range(MOST_PROCESSES):
        if not parts or time.time() >= deadline:
            return
        code = run_limited(command, environment, is_over)
        if code == 0:
            return
        record = Record.load(out)
        running = record.state["running"]
        if running is None:
            print(f"bench.gpu: a process ended with exit code {code} before it measured anything", flush=True)
            return
        if time.time() > deadline:
            return  # the part stays in the list of what was left out, as begun and not finished
        place = running["section"], running["op"], running["contestant"]
        earlier = record.find(*place)
        if earlier is None or earlier["status"] != "failed":
            how = f"hung for {running['limit_s']:.0f} s" if code is None else f"ended with exit code {code}"
            row = dict(zip(("section", "op", "contestant"), place, strict=True))
            record.put(row | {"status": "failed", "reason": f"the process {how} at this"})
            print(f"{running['part']}, {running['contestant']}: FAILED: the process {how}", flush=True)


def run_tests(record: Record, part: Part, deadline: float, after_s: float, environment: dict[str, str]) -> None:
    """Runs the kernel tests on the GPU, in several processes where pytest-xdist is there; the log is tests.log.

    after_s: what they should leave to the parts that follow, if that leaves them what they need.
    """
    files = sorted(path for pattern in TESTS for path in (machine.ROOT / "tests").glob(pattern))
    row = {"section": "tests", "op": ", ".join(path.name for path in files), "contestant": "pytest"}
    left = deadline - time.time()
    limit_s = max(min(left, part.seconds), min(TESTS_LIMIT_S, left - after_s))
    if left <= (0.0 if record.state["dry_run"] else part.seconds):
        record.leave_out(part, f"needs {part.seconds:.0f} s or more, {max(0.0, left):.0f} s were left")
        return
    if importlib.util.find_spec("pytest") is None:
        record.leave_out(part, "pytest is not installed here")
        return
    if record.state["dry_run"]:
        record.put(row | {"status": "checked"})
        record.finish(part)
        return
    print(f"tests: {row['op']}, for at most {limit_s:.0f} s", flush=True)
    command = [sys.executable, "-m", "pytest", *map(str, files), "-v", "-rN", "--tb=short", "-o", "addopts="]
    command += ["-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(8, max(1, (os.cpu_count() or 1) // 2)))]
    stop_at = time.time() + limit_s
    with (record.out / "tests.log").open("wb") as log:
        code = run_limited(command, environment, lambda: time.time() > stop_at, output=log)
    text = (record.out / "tests.log").read_text(encoding="utf-8", errors="replace")
    record.put(row | test_results(text, code, limit_s))
    record.finish(part)


def test_results(log: str, code: int | None, limit_s: float) -> dict:
    """Counts and failures in the output of `pytest -v`, which may have been cut short (code None)."""
    lines = [(match[1] or match[2], line) for line in log.splitlines() if (match := TEST_LINE.search(line))]
    words = [word for word, _ in lines]
    counts = {
        "passed": words.count("PASSED"),
        "failed": words.count("FAILED") + words.count("ERROR"),
        "skipped": words.count("SKIPPED"),
    }
    found = {"counts": counts, "failures": [line[:200] for word, line in lines if word in ("FAILED", "ERROR")][-20:]}
    if code is None:
        found["stopped"] = f"stopped after {limit_s:.0f} s"
    elif code not in (0, 1):
        found["stopped"] = f"pytest ended with exit code {code}"
    if not counts["failed"] and code in (0, None) and counts["passed"]:
        return found | {"status": "measured"}
    said = f"{counts['failed']} tests failed" if counts["failed"] else found.get("stopped", "no test ran")
    return found | {"status": "failed", "reason": f"{said}; see tests.log"}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exit like any other: what was started is stopped
    sys.exit(main())
