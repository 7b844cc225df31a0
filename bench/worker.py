"""The process that does the work of bench.gpu and bench.peers: `python -m bench.worker [--dry-run]`.

With --dry-run everything runs on a CPU at tiny sizes in float32, Triton's kernels in the interpreter, each sample once.
"""

import os
import sys

if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so before kernels is imported
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import math
import warnings

import torch
from torch import Tensor

from bench import steps
from bench.cases import ops, phase_of
from bench.measure import Ceiling, Stopwatch, in_turns, peak_memory, release_freed_memory, within
from bench.processes import serve
from bench.results import Figure, spread
from engine.checks import selfcheck
from engine.config import PRESETS as TRAINING
from engine.device import COMPUTE_DTYPES, apply_precision, peak_flops, tune_malloc
from kernels import accuracy
from kernels.cases import Sizes, outputs_of, values
from kernels.dispatch import select
from model.presets import PRESETS, GPT2Config

GPT2 = Sizes.of(PRESETS["gpt2"], B=64)
MODERATE = Sizes.of(PRESETS["gpt2"], B=2)  # the definition in float64 takes milliseconds
DRY = Sizes(B=2, T=5, H=1, D=16, V=61, Vp=64)


class Handlers:
    """What may be asked. One op, one ceiling and one training step are kept from request to request."""

    def __init__(self, is_dry: bool):
        self.is_dry = is_dry
        self.device = torch.device("cuda" if torch.cuda.is_available() and not is_dry else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.compiler = "aot_eager" if is_dry else "inductor"
        self.release()

    def clean_up(self) -> bool:
        """Gives memory back. False if the CUDA context is lost, after which nothing runs in this process."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            release_freed_memory()
        except RuntimeError:
            return False
        return True

    def release(self) -> None:
        """Forgets what was kept, so that other processes have the memory."""
        self.op = self.inputs = self.douts = self.exact = self.kept_ceiling = None
        self.step = self.micro_batches = self.watch = None
        torch.compiler.reset()  # compiled functions hold on to models and buffers
        self.clean_up()

    def ceiling(self, kind: str, precision: str) -> float:
        """One sample of a ceiling of this machine, in FLOP/s or B/s."""
        if self.kept_ceiling is None or self.kept_ceiling[0] != (kind, precision):
            self.kept_ceiling = None  # its memory may be needed
            found = Ceiling(kind, self.device, COMPUTE_DTYPES[precision], is_small=self.is_dry)
            self.kept_ceiling = (kind, precision), found
        return self.kept_ceiling[1].sample()

    def self_check(self, precision: str) -> dict[str, str]:
        """{op on Triton: why it is not used here, or ""}: the self-check of a GPT-2 run, made or remembered."""
        ops = select("auto", self.device, COMPUTE_DTYPES[precision], GPT2.D)
        asked = selfcheck.request(TRAINING["gpt2"], precision, ops, self.device)
        failed = selfcheck.failures(asked, lambda line: print(line, file=sys.stderr, flush=True))
        return {op: failed.get(op, "") for op in asked["ops"]}

    def accuracy(self, op: str, precision: str) -> dict[str, tuple[float, float]]:
        """{output or gradient: (our relative error, PyTorch's)} of Triton's op: see kernels.accuracy."""
        torch.manual_seed(0)
        sizes, dtype = DRY if self.is_dry else MODERATE, apply_precision(precision)
        inputs = accuracy.inputs_as_in_the_model(op, sizes, dtype, torch.float32, self.device)
        found = accuracy.errors(op, inputs, sizes)
        torch.set_float32_matmul_precision("highest")
        return found

    def peers(self, op: str) -> list[str]:
        self._enter(op)
        return [*self.op.peers]

    def check(self, op: str, peer: str) -> dict[str, float]:
        """Checks one implementation and compiles what the phases will run: largest error, bytes above the inputs."""
        self._enter(op)
        if self.exact is None:
            self.exact = self.op.exact(self.inputs, self.douts)
        function = self.op.peers[peer]
        error = self.op.check(values(function, self.inputs, self.douts), self.exact, self.dtype)
        with torch.no_grad():
            self.op.check(outputs_of(function, self.inputs), self.exact, self.dtype)
        with peak_memory(self.device) as peak:
            values(function, self.inputs, self.douts)
        return {"error": error, "peak": peak.above}

    def time(self, op: str, peers: list[str], seconds: float) -> dict[str, dict[str, tuple[Figure, float, str]]]:
        """{peer: {phase: (seconds, amount of work, unit of its rate)}}, all in turns."""
        self._enter(op)
        self.exact = None
        self.clean_up()
        watch = Stopwatch(self.device)
        keys = [(peer, phase) for peer in peers for phase in self.op.phases]
        calls = {(peer, phase): phase_of(self.op.peers[peer], self.inputs, self.douts, phase) for peer, phase in keys}
        samplers = {key: lambda prepare=prepare: watch(prepare) for key, prepare in calls.items()}
        samples = in_turns(samplers, within(0, 1, 1) if self.is_dry else within(seconds, 3, 15))
        found: dict[str, dict] = {peer: {} for peer in peers}
        for (peer, phase), times in samples.items():
            amount, unit = self.op.amount(phase, self.dtype.itemsize)
            found[peer][phase] = spread(times[1:] or times, "s"), amount, unit
        return found

    def _enter(self, op: str) -> None:
        """Makes the op and its inputs, unless they are those of the last request."""
        if self.op is not None and self.op.name == op:
            return
        self.release()
        torch.manual_seed(0)
        definition = ops(DRY if self.is_dry else GPT2, self.device.type == "cuda", self.compiler)[op]
        self.inputs, self.douts = definition.fresh(self.dtype, self.device)
        self.op = definition

    def build(self, model: dict, batch: int, is_tuned: bool, setup: dict) -> dict:
        """Makes a model and its step; the device's data-sheet peak in FLOP/s and the backend of a peer's attention."""
        if is_tuned:
            tune_malloc()
        self.release()
        self.config, self.batch = GPT2Config(**model), batch
        with self.device:  # a CPU would take seconds to draw the weights of a large model
            weights = steps.initial_weights(self.config)
        setup = steps.Setup(**({"compiler": self.compiler} | setup))
        self.step = steps.build(setup, self.config, weights, self.device)
        sdpa = None if setup.who == steps.OURS else steps.pinned(self.device, COMPUTE_DTYPES[setup.precision])
        return {"peak_flops": peak_flops(self.device, setup.precision), "sdpa": sdpa and sdpa.name}

    def losses(self, updates: int, sequences: int, context: int) -> list[float]:
        """The losses of updates on the same batches for all."""
        return [self.step(batch).item() for batch in self._batches(1, updates, sequences, context)]

    def warm_up(self) -> dict[str, int]:
        """Makes the timed batch and compiles for it; bytes of a step above weights and moments, and in all."""
        (self.micro_batches,) = self._batches(2, 1, self.batch, self.config.n_positions)
        self.step(self.micro_batches)
        release_freed_memory()
        with peak_memory(self.device) as peak:
            self.step(self.micro_batches)
        self.watch = Stopwatch(self.device, is_cold=False)
        release_freed_memory()  # the next peer is built beside this one
        return {"step": peak.above, "peak": peak.most}

    def time_steps(self, untimed: int, timed: int) -> float:
        """Seconds of an update, the mean of `timed` in a row. Raises ArithmeticError if the loss is not finite."""
        for _ in range(untimed):
            self.step(self.micro_batches)
        losses: list[Tensor] = []
        seconds = self.watch(lambda: lambda: losses.append(self.step(self.micro_batches)), timed)
        if not math.isfinite(loss := losses[-1].item()):
            raise ArithmeticError(f"the loss must stay finite, got {loss}")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the next peer needs the memory
        return seconds

    def _batches(self, seed: int, updates: int, sequences: int, context: int) -> list[steps.MicroBatches]:
        """Log-uniform tokens, which a model soon learns, in micro-batches of this step's size."""
        uniform = torch.rand(updates, sequences, context + 1, generator=torch.Generator().manual_seed(seed))
        tokens = ((self.config.vocab_size**uniform).long() - 1).to(self.device)  # 0 to V - 1
        parts = [rows.split(self.batch) for rows in tokens]
        return [[(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows] for rows in parts]


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    serve(Handlers("--dry-run" in sys.argv))
