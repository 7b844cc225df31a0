"""The ops of a step: every implementation and tile is checked first, and only then timed.

Forward and backward together, at the shapes of a micro-batch. What PyTorch's compiler would fuse is
timed compiled if the step is. An op that is not in OPS keeps the implementation it has: a step runs
layer_norm once, and gelu not at all.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine import device
from engine.tuning.search import Race, descend, one_line, race
from kernels import tiles
from kernels.accuracy import inputs_as_in_the_model
from kernels.cases import TENSORS, Sizes, outputs_of, relative_error, values, with_gradients
from kernels.dispatch import ALTERNATIVES, implementation, triton_obstacle

OPS = {"attention": 0.5, "linear_cross_entropy": 0.2, "bias_gelu": 0.15, "add_layer_norm": 0.15}  # shares of the time
# ||got - truth|| / ||truth|| up to which outputs and gradients are right, as in the benchmarks.
ERROR_BOUND = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
CHECK_POSITIONS = 200  # T of the check: no multiple of a tile
WORTH_TILES = 1.5  # our kernels' tiles are not tried where they are this much slower than the fastest
FLUSH_BYTES = 2**28  # more than any cache: written between samples


@dataclass
class Bench:
    """Checks and times implementations of the ops of one model, precision and device."""

    sizes: Sizes
    precision: str
    dtype: torch.dtype
    device: torch.device
    is_compiled: bool
    clock: Callable[[], float] = time.monotonic

    def names(self, op: str, shipped: str) -> list[str]:
        """Implementations of an op that may run here, the shipped one first."""
        others = ["triton", "torch", *ALTERNATIVES.get(op, ())]
        is_gpu = self.device.type != "cpu"  # else Triton's interpreter, which is for tests
        if not is_gpu or triton_obstacle(op, self.device, self.dtype, self.sizes.D) is not None:
            others.remove("triton")
        if not is_gpu and self.sizes.N * self.sizes.Vp > 2**26:
            others = [name for name in others if name != "unchunked"]  # its logits could take all of the memory
        return [shipped, *(name for name in others if name != shipped)]

    def function(self, op: str, name: str) -> Callable:
        """An implementation, as a step runs it. Nothing fuses with attention: it is not compiled alone."""
        options = {"vocab_size": self.sizes.V} if op == "linear_cross_entropy" else {}
        fn = functools.partial(implementation(op, name), **options)
        is_fused = self.is_compiled and op != "attention" and name not in ("triton", "reference")
        return torch.compile(fn, dynamic=False) if is_fused else fn

    def tensors(self, op: str, sizes: Sizes) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs of an op, and incoming gradients."""
        inputs = inputs_as_in_the_model(op, sizes, self.dtype, torch.float32, self.device)
        with torch.no_grad():
            outputs = outputs_of(self.function(op, "reference"), inputs)
        return inputs, [torch.randn_like(out) if out.ndim else torch.ones_like(out) for out in outputs]

    def check(self, op: str, fn: Callable) -> None:
        """Raises ArithmeticError, naming the tensor, unless outputs and gradients are the definition's."""
        small = replace(self.sizes, B=1, T=min(self.sizes.T, CHECK_POSITIONS))
        inputs, douts = self.tensors(op, small)
        wide = with_gradients([t.double() if t.is_floating_point() else t for t in inputs])
        exact = values(self.function(op, "reference"), wide, [t.double() for t in douts])
        for name, got, truth in zip(TENSORS[op].split(), values(fn, inputs, douts), exact, strict=True):
            error = relative_error(got, truth)
            if not error <= ERROR_BOUND[self.precision]:  # NaN is not
                raise ArithmeticError(f"wrong: {name} is off by {error:.1e}")

    def sampler(self, fn: Callable, inputs: Sequence[Tensor], douts: Sequence[Tensor]) -> Callable[[], float]:
        """A function that returns the seconds of one forward and backward pass."""
        event = device.events(self.device)
        on_gpu = event is not None
        calls = 4 if on_gpu else 1  # recording an event costs microseconds
        flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device) if on_gpu else None

        def sample() -> float:
            if not on_gpu:
                began = time.perf_counter()
                values(fn, inputs, douts)
                return time.perf_counter() - began
            for _ in range(8):  # a millisecond or two, in which the CPU queues what is timed
                flush.zero_()
            began, ended = (event(enable_timing=True) for _ in range(2))
            began.record()
            for _ in range(calls):
                values(fn, inputs, douts)
            ended.record()
            ended.synchronize()
            return began.elapsed_time(ended) / 1e3 / calls

        sample()  # compiles
        return sample

    def tune(self, op: str, shipped: str, tuned: dict, until: float) -> tuple[Race, dict]:
        """The race of an op's implementations, and the tiles in use at its end.

        If the shipped one is refused, the next takes its place. tuned: the tiles so far. until:
        time of the clock after which nothing more is tried. Raises ArithmeticError if all are
        refused.
        """
        inputs, douts = self.tensors(op, self.sizes)
        tiles.use(tuned)
        samplers, refused = {}, {}
        for name in self.names(op, shipped):
            try:
                fn = self.function(op, name)
                self.check(op, fn)
                samplers[name] = self.sampler(fn, inputs, douts)
            except Exception as error:  # not here, too large, wrong: the types vary
                refused[name] = one_line(error)
        if not samplers:
            raise ArithmeticError(f"no implementation is right here: {refused[shipped]}")
        result = race(samplers, until, self.clock)
        ours = result.best("triton") if "triton" in samplers else float("inf")
        if self.device.type != "cpu" and ours <= WORTH_TILES * min(map(result.best, samplers)):
            before, tuned = tuned, self.tune_tiles(op, samplers["triton"], tuned, until)
            tiles.use(tuned)
            if tuned != before:
                racing = [name for name in samplers if name == "triton" or name not in result.left]
                result = race({name: samplers[name] for name in racing}, until, self.clock)
        result.left |= refused
        return result, tuned

    def tune_tiles(self, op: str, sample: Callable[[], float], tuned: dict, until: float) -> dict:
        """The tiles with those of this op's kernels replaced by the fastest near them."""
        tiles.use(tuned)
        sample()
        shipped = {key: tile for key, tile in tiles.used().items() if key not in tuned}  # another op may run it too

        def near(key: str, field: str) -> Callable[[dict], list[dict]]:
            return lambda now: [
                {**now, key: tile} for tile in tiles.neighbours(key, now[key], field) if self.clock() < until
            ]

        # A kernel that calls others, as attention_bwd does, was looked up before them: it comes after.
        moves = [near(key, field) for key, tile in reversed(shipped.items()) for field in tiles.fields(key, tile)]
        found = descend({**tuned, **shipped}, moves, functools.partial(self._contest, op, sample, until))
        return {key: tile for key, tile in found.items() if tile != shipped.get(key)}

    def _contest(self, op: str, sample: Callable[[], float], until: float, tiled: list[dict]) -> dict:
        """The fastest right one of these tiles. The first is in use."""
        candidates = {}

        def timed(tuned: dict) -> float:
            tiles.use(tuned)
            return sample()

        for number, tuned in enumerate(tiled):
            try:
                tiles.use(tuned)
                if number:
                    self.check(op, self.function(op, "triton"))
                sample()  # compiles, if the check did not
                candidates[str(number)] = functools.partial(timed, tuned)
            except Exception:  # spills, does not fit, is wrong: it is no candidate
                if not number:
                    raise
        return tiled[int(race(candidates, until, self.clock).winner)]
