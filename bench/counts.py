"""What one call does, counted: calls of PyTorch's operators, tensors' allocations and their bytes.

Counts repeat whatever else the machine does. They depend on the versions of Python and PyTorch.
"""

import contextlib
import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def counts(function: Callable[[], object]) -> dict:
    """Counts of one call: op_calls, op_calls_by_name, allocations, allocated_bytes, peak_bytes.

    Each is taken twice; those that differ are named under "uneven" instead.
    """
    is_on = gc.isenabled()
    gc.disable()  # collections come when they like
    try:
        first, second = (operators(function) | memory(function) for _ in range(2))
    finally:
        gc.enable() if is_on else None
    uneven = [name for name in first if first[name] != second[name]]
    return {name: value for name, value in first.items() if name not in uneven} | {"uneven": uneven}


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Standard error off: PyTorch's profiler notes each of its starts there."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def operators(function: Callable[[], object]) -> dict:
    """Calls of ATen and registered operators, those of the backward pass among them."""
    found: Counter = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found[str(op)] += 1
            return op(*args, **(kwargs or {}))

    with Count():
        function()
    return {"op_calls": found.total(), "op_calls_by_name": dict(sorted(found.items()))}


def memory(function: Callable[[], object]) -> dict:
    """Allocations of tensors, the bytes of all of them, and the most bytes at once above what was held before."""
    with silenced(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    taken, peak = [change for change in changes if change > 0], max(accumulate(changes, initial=0))
    return {"allocations": len(taken), "allocated_bytes": sum(taken), "peak_bytes": peak}
