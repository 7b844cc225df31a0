"""The language-model head and its loss, forward and backward: whole logits against chunks, time and peak memory.

Quick: N = 1,024 rows, C = 128, in this process, checked against the definition in float64. Full: N = 8,192 rows,
C = 768, where whole logits would take 1.65 GB; each implementation runs in a process of its own, because the kernel's
record of peak memory belongs to the process, and both must give the same loss. Vp = 50,304, float32, on the CPU.
`pytest bench/bench_cross_entropy.py`
"""

import functools
import json
import subprocess
import sys

import pytest
import torch
from bench_kernels import require_close
from conftest import ON_GPU
from torch import Tensor

from bench import gpu_cases
from bench.gpu_timing import values, with_gradients
from bench.machine import ROOT
from kernels.cross_entropy import linear_cross_entropy_torch

N, C, VP, V = 8192, 768, 50304, 50257
LOGITS_BYTES = 4 * N * VP
SMALL = gpu_cases.Sizes(B=1, T=1024, H=2, D=64, V=V, Vp=VP)
TOLERANCE = 1e-5  # ||error|| / ||exact||
HEADS = {
    "whole": lambda *tensors: gpu_cases.plain_linear_cross_entropy(*tensors, V),
    "chunked": functools.partial(linear_cross_entropy_torch, vocab_size=V),
}

CHILD = f"""
import json, sys, time
import torch
import torch.nn.functional as F
from bench.machine import peak_memory
from kernels.cross_entropy import linear_cross_entropy_torch

def plain(hidden, weight, targets, vocab_size):
    return F.cross_entropy((hidden @ weight.T)[:, :vocab_size], targets)

op = {{"plain": plain, "chunked": linear_cross_entropy_torch}}[sys.argv[1]]
torch.manual_seed(0)
hidden = torch.randn({N}, {C}, requires_grad=True)
weight = (torch.randn({VP}, {C}) * 0.03).requires_grad_()
targets = torch.randint({V}, ({N},))
op(hidden[:64], weight, targets[:64], vocab_size={V}).backward()  # starts the libraries and fills both gradients
hidden.grad.zero_(), weight.grad.zero_()
with peak_memory() as peak:
    start = time.perf_counter()
    loss = op(hidden, weight, targets, vocab_size={V})
    loss.backward()
    seconds = time.perf_counter() - start
print(json.dumps({{"loss": loss.item(), "seconds": seconds, "bytes": peak.above}}))
"""

clock = [0.0]  # seconds that children measured: what these cases are timed by


def child(name: str) -> dict:
    """One measurement in a process of its own, whose seconds pass on the clock."""
    done = subprocess.run([sys.executable, "-c", CHILD, name], capture_output=True, text=True, check=True, cwd=ROOT)
    result = json.loads(done.stdout)
    clock[0] += result["seconds"]
    return result


@pytest.mark.skipif(ON_GPU, reason="on a GPU bench_kernels.py has the head at its sizes")
@pytest.mark.parametrize("head", HEADS)
def test_head(head: str, measure):
    definition = gpu_cases.ops(SMALL, ON_GPU)["linear_cross_entropy"]
    torch.manual_seed(0)
    inputs = with_gradients(definition.inputs(torch.float32, torch.device("cpu")))
    douts = [torch.ones(())]

    def check(got: list[Tensor]) -> None:
        wide = with_gradients([t.double() if t.is_floating_point() else t for t in inputs])
        require_close(got, values(definition.reference, wide, [douts[0].double()]), definition.tensors, TOLERANCE)

    measure(lambda: values(HEADS[head], inputs, douts), check, rounds=5, tokens=SMALL.N)


@pytest.mark.slow
@pytest.mark.benchmark(timer=lambda: clock[0], group="bench/bench_cross_entropy.py")
def test_chunked_head_takes_a_quarter_of_the_logits_and_no_more_time(benchmark):
    rounds = [(child("plain"), child("chunked")) for _ in range(2)]  # interleaved
    plain, chunked = (min((pair[i] for pair in rounds), key=lambda result: result["seconds"]) for i in (0, 1))
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    benchmark.pedantic(lambda: child("chunked"), rounds=3)
    benchmark.extra_info.update(
        plain=plain,
        chunked=chunked,
        peak_bytes=chunked["bytes"],
        note=f"whole logits: {plain['seconds']:.2f} s, {plain['bytes'] / 1e9:.2f} GB; chunked: "
        f"{chunked['seconds']:.2f} s, {chunked['bytes'] / 1e9:.2f} GB, "
        f"{plain['seconds'] / chunked['seconds']:.2f}x the speed, {chunked['bytes'] / LOGITS_BYTES:.2f} of the logits",
    )
    assert chunked["bytes"] <= LOGITS_BYTES / 4
    assert chunked["seconds"] <= plain["seconds"]
