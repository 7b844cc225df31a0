"""Processes that begin with everything imported: forks of one process, which pays for the imports once.

A fresh process spends 5 to 7 s of CPU on importing PyTorch and the engine, a fork nothing. Tests whose claim is what
processes do, and not how they are launched, take forks. test_faults kills a worker of torchrun itself.
"""

import atexit
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PRELOADED = ("engine.start", "engine.cli", "torch._dynamo", "tyro", "matplotlib.backends.backend_agg")


class Server:
    """The process that forks. It ends with this one, and ends what it forked."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, cwd=ROOT, **pipes)
        atexit.register(self.process.communicate)  # which closes its input, at which it ends

    def ask(self, **request: object) -> int | None:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, command: Sequence[str], environment: dict[str, str], out: str, err: str) -> int:
        """Forks `FILE ARGS` or `-c CODE ARGS` and returns its process id. Its output is added to two files."""
        return self.ask(command=list(map(str, command)), environment=environment, out=out, err=err)

    def wait(self, pid: int, seconds: float = 120.0) -> int | None:
        """The exit code, negative for a signal; None after so many seconds, when the process is ended."""
        return self.ask(wait=pid, seconds=seconds)


server = functools.cache(Server)


class Done(NamedTuple):
    """What a process, or several ranks, left."""

    codes: list[int]  # every rank's exit code
    stdout: str  # of all
    stderr: str

    @property
    def returncode(self) -> int:
        """The code of a rank that failed, or 0."""
        return max(self.codes, key=abs)


def run(*command: str | Path, ranks: int = 1, seconds: float = 120.0, **environment: str) -> Done:
    """Runs forks of a command, which are ranks as torchrun starts them if there are several. Waits for all.

    Variables that a module reads while it is imported are those of the server. Raises TimeoutError, with what they
    said, if they do not end in time; none is left.
    """
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    meeting |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    base = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    with tempfile.TemporaryDirectory(prefix="forks_") as directory:
        out, err = Path(directory, "out"), Path(directory, "err")
        each = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] if ranks > 1 else [{}]
        pids = [server().start(command, base | of_rank, str(out), str(err)) for of_rank in each]
        deadline = time.monotonic() + seconds
        codes = [server().wait(pid, max(0.0, deadline - time.monotonic())) for pid in pids]
        if None in codes:
            said = err.read_text(errors="replace")[-2000:] if err.exists() else ""
            raise TimeoutError(f"{command} did not end within {seconds:.0f} s, exit codes {codes}: {said}")
        return Done(codes, *(path.read_text(errors="replace") for path in (out, err)))


def child(command: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """What a fork does: it becomes the process that was asked for, and ends as that would."""
    import runpy
    import threading
    import traceback

    for number, path in ((0, os.devnull), (1, out), (2, err)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    first, *arguments = command
    code = 0
    try:
        if first == "-c":
            sys.argv = ["-c", *arguments[1:]]
            exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path[0], sys.argv = str(Path(first).parent), command
            runpy.run_path(first, run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Forks, and waits for forks, as asked on stdin until it is closed."""
    import importlib
    import signal

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for name in PRELOADED:
        importlib.import_module(name)
    running: set[int] = set()
    for line in sys.stdin:
        request, answer = json.loads(line), None
        if "command" in request:
            if (answer := os.fork()) == 0:
                answers.close()
                child(**request)
            running.add(answer)
        else:
            deadline, pid = time.monotonic() + request["seconds"], request["wait"]
            while (waited := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
                time.sleep(0.01)
            if waited[0]:
                answer = os.waitstatus_to_exitcode(waited[1])
            else:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            running.discard(pid)
        print(json.dumps(answer), file=answers)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # at once: taking all modules down would take a second


if __name__ == "__main__":
    serve()
