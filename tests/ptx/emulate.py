"""Runs cases on the emulator: a process that reads requests, and the fixture of the tests that asks it.

`python tests/ptx/emulate.py sm_90 "T=100 D=64 bf16"` at the repository's root prints the errors of every
case whose name contains the text. `python tests/ptx/emulate.py sm_90` reads requests in JSON, one per line, and
answers each with a line: a process of the tests' own interprets kernels, so it cannot compile them.
"""

import argparse
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Process:
    """A process that runs cases for one target."""

    def __init__(self, target: str):
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), target],
            cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def ask(self, **request: object) -> dict:
        """Answer to one request, the arguments of `answer`."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            pytest.fail(f"the emulator's process ended at {request}:\n{self.errors.read()}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@pytest.fixture(scope="session")
def emulate() -> Iterator[Callable[..., dict]]:
    """emulate(target, **request): answers of one process per target, started at the first request."""
    from emulator import HAS_COMPILER

    from kernels.launch import HAS_TRITON

    if not HAS_COMPILER or not HAS_TRITON:
        pytest.skip("needs g++, which builds the emulator" if HAS_TRITON else "Triton comes for Linux")
    processes: dict[str, Process] = {}

    def ask(target: str, **request: object) -> dict:
        if target not in processes:
            processes[target] = Process(target)
        return processes[target].ask(**request)

    yield ask
    for process in processes.values():
        process.close()


def answer(emulator, case: str, order: int = 0, fault: str | None = None) -> dict:
    """Runs a case, perhaps in another order or with a planted fault.

    Returns a failure of the comparison or "", the problems, the launches, a digest of the results, and for each of
    them its largest error and PyTorch's.
    """
    from faults import planted
    from tolerances import assert_accurate

    emulator.problems, emulator.launches, emulator.order = [], [], order
    failure, comparison = "", None
    try:
        with planted(emulator, fault) if fault else contextlib.nullcontext():
            comparison = _cases()[case]()
        assert_accurate(*comparison)
    except AssertionError as error:
        failure = str(error)
    except Exception:
        failure = traceback.format_exc()
    report = {"failure": failure, "problems": emulator.problems, "launches": emulator.launches}
    if comparison is None:
        return report | {"digest": "", "errors": {}}
    data = b"".join(tensor.double().numpy().tobytes() for tensor in comparison.got)
    errors = {
        name: [(one.double() - exact).abs().max().item() for one in (ours, theirs)]
        for name, ours, theirs, exact in zip(comparison.names.split(), *comparison[:3], strict=True)
    }
    return report | {"digest": hashlib.sha256(data).hexdigest(), "errors": errors}


def _cases() -> dict[str, Callable]:
    from cases import CASES
    from training import training_case

    return CASES | {"training": training_case, "long training": lambda: training_case(updates=5)}


def main() -> None:
    """Prints the errors of the cases asked for; without any, answers the requests on standard input."""
    parser = argparse.ArgumentParser(prog="python tests/ptx/emulate.py", description=__doc__.partition("\n")[0])
    parser.add_argument("target", choices=("sm_80", "sm_90"))
    parser.add_argument("text", nargs="?", help='part of the names of cases, such as "D=64 bf16"')
    asked = parser.parse_args()
    target, text = asked.target, asked.text
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import emulator
    import torch

    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh tensors are NaN, so a missing store shows
    out, sys.stdout = sys.stdout, sys.stderr  # so that nothing else is taken for an answer
    with emulator.install(target) as emulated:
        if text is None:
            for line in sys.stdin:
                print(json.dumps(answer(emulated, **json.loads(line))), file=out, flush=True)
            return
        print("case: for each result, its largest error / PyTorch's", file=out)
        for case in _cases():
            if text in case:
                report = answer(emulated, case)
                errors = "  ".join(
                    f"{name} {ours:.1e}/{theirs:.1e}" for name, (ours, theirs) in report["errors"].items()
                )
                print(f"{case:<40} {errors}", report["failure"], *report["problems"], file=out, flush=True)


if __name__ == "__main__":
    main()
