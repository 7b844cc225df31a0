"""The process of one contestant of bench.peers, which starts it and asks it, a line for a line of JSON.

"prepare": makes 50 updates of a small batch, warms up, and gives loss_1, loss_50 and the memory of a step.
"time": makes one update and gives its seconds. The contestant "ceiling" multiplies two large matrices instead.
"""

import ctypes
import json
import os
import sys
import time
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402 (after the environment that its libraries read)

from bench import machine, peers  # noqa: E402
from engine.distributed import keep_freed_memory  # noqa: E402

UPDATES, SMALL_BATCH, SMALL_CONTEXT = 50, 2, 32
CEILING_PRODUCTS = 4


class Ceiling:
    """A large matrix product."""

    def __init__(self, precision: str):
        n, dtype = peers.CEILING_SIZE, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.left, self.right = (torch.randn(n, n, dtype=dtype) for _ in range(2))
        self.out = torch.empty(n, n, dtype=dtype)

    def time(self) -> dict:
        """The best of a few products: a ceiling is what the machine can do."""
        best = float("inf")
        for _ in range(CEILING_PRODUCTS):
            began = time.perf_counter()
            torch.mm(self.left, self.right, out=self.out)
            best = min(best, time.perf_counter() - began)
        return {"seconds": best}


class Trainer:
    """A contestant and its batches."""

    def __init__(self, who: str, is_compiled: bool, precision: str, case: tuple[int, ...]):
        from bench.contestants import TrainingStep, initial_weights

        config = peers.config_of(case)
        _, _, T, B = case
        weights = initial_weights(config)
        torch.manual_seed(1)  # the same batches for all
        small = torch.randint(config.vocab_size, (UPDATES, SMALL_BATCH, SMALL_CONTEXT + 1))
        batch = torch.randint(config.vocab_size, (B, T + 1))
        self.small = [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in small]
        self.batch = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
        self.step = TrainingStep(who, config, weights, "cpu", is_compiled=is_compiled, precision=precision)

    def prepare(self) -> dict:
        """Losses of the updates that all share; then the memory of a step at the size that will be timed."""
        losses = [self.step(*batch).item() for batch in self.small]
        for _ in range(2):  # the first compiles for this size
            self.step(*self.batch)
        ctypes.CDLL(None).malloc_trim(0)  # what is free does not count as held
        with machine.peak_memory() as peak:
            for _ in range(2):
                self.step(*self.batch)
        return {"loss_1": losses[0], "loss_50": losses[-1], "step_bytes": peak.above, "process_bytes": peak.most}

    def time(self) -> dict:
        """Of one step."""
        began = time.perf_counter()
        self.step(*self.batch)
        return {"seconds": time.perf_counter() - began}


def main(who: str, is_compiled: str, keeps_memory: str, precision: str, *case: str) -> None:
    """Answers until there are no more requests."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if int(keeps_memory):
        keep_freed_memory()
    sizes = tuple(map(int, case))
    worker = Ceiling(precision) if who == "ceiling" else Trainer(who, bool(int(is_compiled)), precision, sizes)
    for request in sys.stdin:
        answers.write(json.dumps(getattr(worker, request.strip())()) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
