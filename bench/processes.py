"""Processes that answer requests, a line of JSON each (`serve`, in bench.worker), and who asks them (`Worker`)."""

import contextlib
import ctypes
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from bench import machine

WORKER = ("-m", "bench.worker")


class Failed(RuntimeError):
    """A request that brought no result, in a sentence. out_of_memory: whether memory ran out."""

    def __init__(self, sentence: str, out_of_memory: bool = False):
        super().__init__(sentence)
        self.out_of_memory = out_of_memory


class Worker:
    """A process that starts when it is first asked, and anew after it died, hung or was stopped."""

    def __init__(self, *flags: str, environment: dict[str, str] | None = None, log: Path | None = None):
        self.command = [sys.executable, *WORKER, *flags]
        path = os.pathsep.join(filter(None, (str(machine.ROOT), os.environ.get("PYTHONPATH"))))
        self.environment = os.environ | {"PYTHONPATH": path} | (environment or {})
        self.log, self.process = log, None

    def ask(self, do: str, limit_s: float = 600.0, **what: Any) -> Any:
        """The answer to a request. Raises Failed if the process refuses, dies, or has no answer within limit_s."""
        if self.process is None:
            self._start()
        deadline, line = time.monotonic() + limit_s, b""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **what}).encode() + b"\n")
            line = self._read_line(deadline)
        if line is None:
            self.stop()
            raise Failed(f"the process hung for {limit_s:.0f} s at this")
        if not line:
            code, said = self.process.wait(), self._last_words()
            self.stop()
            raise Failed(f"the process ended with exit code {code} at this: {said}", "out of memory" in said)
        answer = json.loads(line)
        if "failed" in answer:
            if answer["is_lost"]:
                self.stop()
            raise Failed(answer["failed"], answer["out_of_memory"])
        return answer["answer"]

    def stop(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout, self._said):
                pipe.close()
            self.process = None

    def _start(self) -> None:
        self._said = tempfile.TemporaryFile("w+b") if self.log is None else self.log.open("a+b")  # noqa: SIM115
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said, "bufsize": 0}
        where = {"cwd": machine.ROOT, "env": self.environment, "process_group": 0}
        self.process = subprocess.Popen(self.command, **pipes, **where)

    def _read_line(self, deadline: float) -> bytes | None:
        """A whole line, b"" at the end of the process, None after the deadline."""
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return None
                if not (part := os.read(self.process.stdout.fileno(), 1 << 16)):
                    return b""
                line += part
        return line

    def _last_words(self) -> str:
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 4096))
        said = self._said.read().decode(errors="replace").strip().splitlines()
        return said[-1][:300] if said else "no message"


def serve(handlers: object) -> None:
    """Answers requests by the methods of `handlers` until the asking process is gone."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(handlers, request.pop("do"))(**request)}
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines() or ["no message"]
            words = ("out of memory", "can't allocate memory")  # also where a compiler passes the error on as its own
            out_of_memory = isinstance(error, MemoryError) or any(word in str(error) for word in words)
            answer = {"failed": f"{type(error).__name__}: {said[0]}"[:300], "out_of_memory": out_of_memory}
        if "failed" in answer:  # out here the error is gone, and with it the frames that hold memory
            answer["is_lost"] = not handlers.clean_up()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def end_with_parent() -> None:
    """Lets Linux end this process with the one that started it, which a busy process would not notice."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
