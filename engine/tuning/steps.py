"""Whole training steps, each setup in a process of its own: `python -m engine.tuning.steps`.

malloc and the number of threads belong to a process, a setup that runs out of memory leaves none
behind, and one that hangs can be ended. The process reads a job as one line of JSON. It answers
with the losses of its first updates, then with the seconds of an update for every line it gets.
Every setup makes the same updates, so that their losses show which of them compute something else.
"""

import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch

from engine import config as configs
from engine import device as devices
from engine import distributed, optim
from engine.checks import facts
from engine.distributed import Ranks
from engine.health.failures import out_of_memory
from engine.health.timing import Clock
from engine.step import Guard, Step
from engine.tuning.record import Setup
from engine.tuning.search import ROUNDS, one_line
from kernels import tiles
from kernels.dispatch import select
from model.gpt2 import GPT2

OUT_OF_MEMORY = "out of memory"
SAMPLE_LIMIT = 60.0  # seconds after which a sample is given up
WARM_UP = 4  # updates before the first sample, whose losses are compared
SAMPLE_SECONDS = 0.25  # least time of a sample
# Share by which these losses may differ from those of the shipped setup. On a CPU, `tiny`'s differed
# by 2e-7 between correct setups in fp32, and by 9e-4 between fp32 and bf16.
LOSS_BOUND = {"fp32": 1e-4, "tf32": 3e-3, "fp16": 1e-2, "bf16": 1e-2}


# ---- The process that asks ----------------------------------------------------------------------------------------


class Refused(Exception):
    """A setup that cannot run here, is too late, or computes something else."""


class Worker:
    """A process that makes training steps. `losses`: of its first updates; calling it: a sample.

    On a GPU all samples are taken at once and the process ends, so that two never share its memory.
    """

    def __init__(self, job: dict, until: float):
        """until: time of time.monotonic() at which an unfinished first answer is given up. Raises Refused."""
        self._said, self._taken = tempfile.TemporaryFile("w+b"), []  # noqa: SIM115
        path = os.pathsep.join([str(facts.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "engine.tuning.steps"],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._said, "bufsize": 0},
            **{"env": {**os.environ, "PYTHONPATH": path}, "process_group": 0},
        )
        try:
            self.losses: list[float] = self._ask(job, until)["losses"]
            if job["device"] != "cpu":
                self._taken = [self._sample() for _ in range(ROUNDS)]
                self.close()
        except BaseException:
            self.close()
            raise

    def __call__(self) -> float:
        """Seconds of one update."""
        if self._taken:  # a race takes each once; a second race begins again
            self._taken.append(self._taken.pop(0))
            return self._taken[-1]
        return self._sample()

    def _sample(self) -> float:
        return self._ask({}, time.monotonic() + SAMPLE_LIMIT)["seconds"]

    def close(self) -> None:
        """Ends the process, and those that it started. A second call does nothing."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._said):
            pipe.close()

    def _ask(self, request: dict, until: float) -> dict:
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, until - time.monotonic())):
                    raise Refused("not finished in the time left")
                if not (part := os.read(self._process.stdout.fileno(), 1 << 16)):
                    raise Refused(f"its process ended: {self._last_words()}")
                line += part
        answer = json.loads(line)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer

    def _last_words(self) -> str:
        self._said.seek(0)
        return (self._said.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1][:80]


def difference(losses: list[float], shipped: list[float], precision: str) -> str | None:
    """Why a setup with these losses is not right, or None. Both begin with the same weights."""
    for one, other in zip(losses, shipped, strict=True):
        apart = abs(one - other) / abs(other)
        if not apart <= LOSS_BOUND[precision]:  # NaN is not
            return f"wrong: its loss is off by {apart:.1e}"
    return None


# ---- The process that answers -------------------------------------------------------------------------------------


def build(preset: str, setup: Setup, sequences: int, device: torch.device) -> Callable[[], torch.Tensor]:
    """An update of the preset's model on so many random sequences, always the same; it returns the loss.

    Changes settings of the whole process.
    """
    config = configs.PRESETS[preset]
    if device.type == "cpu":
        if setup.malloc_tuned:
            devices.tune_malloc()
        if setup.threads is not None:
            torch.set_num_threads(setup.threads)
    dtype = devices.apply_precision(setup.precision)
    tiles.use(setup.tiles)
    torch.manual_seed(config.seed)
    tokens = torch.randint(config.model.vocab_size, (sequences, config.sequence_length + 1))
    raw_model, ranks = GPT2(config.model), Ranks(0, 0, 1, device)
    model = distributed.wrap(raw_model, ranks, is_compiled=setup.compile, compute_dtype=dtype)
    options = {"dropout_p": config.model.dropout, "tuned": setup.ops}
    raw_model.configure(select("auto", device, dtype, config.model.head_dim, **options), dtype, setup.recompute)
    scaler = torch.amp.GradScaler(device.type, enabled=setup.precision == "fp16")
    optimizer = optim.build(raw_model, config.optim)
    step = Step(model, optimizer, scaler, Guard(device), config.seed, config.optim.clip, ranks, Clock(device))
    parts = [part.to(device) for part in tokens.split(setup.micro_batch_size)]
    micro_batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]
    lr = 0.1 * config.optim.lr  # as in warm-up: on the same tokens again and again, more would diverge
    return lambda: step(0, micro_batches, lr)[0]


def main() -> None:
    """Answers one job after another line until the asking process is gone."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**fields) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    try:
        update = build(job["preset"], Setup(**job["setup"]), job["sequences"], torch.device(job["device"]))
        losses = [update().item() for _ in range(WARM_UP - 1)]
        began = time.perf_counter()
        losses.append(update().item())
        calls = max(1, math.ceil(SAMPLE_SECONDS / (time.perf_counter() - began)))
        answer(losses=losses)
        for _ in sys.stdin:
            began = time.perf_counter()
            for _ in range(calls):
                loss = update()
            loss.item()  # waits for the device
            answer(seconds=(time.perf_counter() - began) / calls)
    except Exception as error:  # of a compiler or a kernel: the types vary
        answer(refused=OUT_OF_MEMORY if out_of_memory(error) else f"{type(error).__name__}: {one_line(error)}")
        raise


def job(preset: str, setup: Setup, sequences: int, device: torch.device) -> dict:
    """What the process reads first."""
    return {
        "preset": preset,
        "setup": dataclasses.asdict(setup),
        "sequences": sequences,
        "device": device.type,
    }


if __name__ == "__main__":
    main()
