"""The largest micro-batch of a contestant that fits the GPU, for bench.gpu: found by trying, not by arithmetic.

The memory of a batch that ran says which should just fit; from there the search goes up or down in growing strides
until one multiple ran and the next did not. Every trial is a fresh contestant that makes three updates.
"""

import time
from collections.abc import Callable

import torch

from bench import machine
from bench.gpu_plan import Part
from bench.gpu_step import CONTEXT, Runner, Setting, allocated, is_out_of_memory

START, UNIT, MOST = 64, 8, 4096  # sequences
ROOM = 0.97  # of the memory that is free, for the first guess: the allocator's blocks never fit without gaps


def largest(
    probe: Callable[[int], int | None], start: int, unit: int, most: int, is_over: Callable[[], bool]
) -> tuple[int | None, int | None]:
    """(the largest batch that ran, the smallest that did not), None where there is none; all are multiples of unit.

    probe(batch) gives the batch that should just fit, or None if this one did not. Stops when the two are `unit` apart,
    when `most` ran, when `unit` did not, or, after at least one probe, once is_over().
    """
    ran, too_large, before = None, None, None
    batch, stride = start, unit
    while True:
        aim = probe(batch)
        stride = 2 * stride if (aim is not None) == before else unit
        before = aim is not None
        if aim is None:
            too_large = batch
            batch = max(batch - stride, unit if ran is None else ran + unit)
        else:
            if ran is None and too_large is None:
                stride, before = max(unit, aim // unit * unit - batch), None  # straight to the aim, then by units
            ran = batch
            batch = min(ran + stride, most if too_large is None else too_large - unit)
        is_settled = ran == most or too_large == unit or (None not in (ran, too_large) and too_large - ran <= unit)
        if is_settled or is_over():
            return ran, too_large


def search(worker, part: Part) -> None:
    """A part of the section batch; its name is the contestant's."""
    start, unit, most = (2, 1, 2) if worker.dry_run else (START, UNIT, MOST)
    setting = Setting.new(worker, part, "gpt2", "bf16", most, CONTEXT, updates=1)
    capacity = 0 if worker.dry_run else torch.cuda.mem_get_info()[0]  # of which PyTorch holds next to nothing by now
    step = worker.record.find("step", "gpt2 bf16", part.name)
    if step is not None and "peak_gib" in step:  # its memory at another batch is known
        kept = 12 * sum(tensor.numel() for tensor in setting.weights.values())  # float32 weights and two moments
        full = guess(step["batch"], int(step["peak_gib"] * 2**30), kept, ROOM * capacity)
        start = min(most, max(unit, full // unit * unit))
    peaks: dict[int, int] = {}
    began = last = time.time()
    longest = 0.0

    def probe(batch: int) -> int | None:
        nonlocal last, longest
        runner = None
        try:
            runner = setting.enter(part.name, batch)
            kept = updates(runner)
            peaks[batch] = runner.peak
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        del runner
        worker.clean_up()  # out here the error is gone, and with it the frames that held the model
        torch.compiler.reset()
        spent, last = time.time() - last, time.time()
        longest = max(longest, spent)
        worker.say(f"{part}, B = {batch}: {'ran' if batch in peaks else 'out of memory'}, {spent:.0f} s")
        if batch not in peaks:
            return None
        return most if worker.dry_run else guess(batch, peaks[batch], kept, ROOM * capacity)

    def is_over() -> bool:
        return time.time() + longest > min(began + part.seconds, worker.deadline - 2.0)

    with worker.attempt(part, "gpt2 bf16", part.name) as row:
        if row is None:
            return
        ran, too_large = largest(probe, start, unit, most, is_over)
        if ran is None:
            raise ArithmeticError(f"a batch must fit into memory, got out of memory at B = {too_large}")
        facts = {
            **{"preset": "gpt2", "precision": "bf16", "context": setting.context, "batch": ran, "too_large": too_large},
            **{"is_exact": too_large is not None and too_large - ran <= unit, "unit": unit},
            **{"peak_gib": peaks[ran] / 2**30},
        }
        worker.put(row, f"{ran} fits, {too_large} does not", **facts)


def updates(runner: Runner) -> int:
    """Makes three updates, waits, and notes their peak; the bytes that stay: weights and optimizer state."""
    runner.advance(1)  # makes the optimizer's state
    with machine.peak_memory(runner.setting.device) as peak:
        runner.advance(2)
    runner.peak = peak.most - runner.before
    return allocated(runner.setting.device) - runner.before


def guess(batch: int, peak: int, kept: int, capacity: float) -> int:
    """The batch that should fill the capacity, in bytes, where memory above what is kept grows with the batch."""
    return int((capacity - kept) / max(1.0, (peak - kept) / batch))
