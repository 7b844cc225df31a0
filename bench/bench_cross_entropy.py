"""The language-model head and its loss, forward and backward: time, and peak memory above inputs and gradients.

N = 8,192 rows, C = 768, Vp = 50,304, float32: whole logits would take 1.65 GB. Each implementation runs in a process
of its own, because the kernel's record of peak memory belongs to the process; both must give the same loss.
`pytest bench/bench_cross_entropy.py`
"""

import json
import subprocess
import sys

import pytest

N, C, VP, V = 8192, 768, 50304, 50257
LOGITS_BYTES = 4 * N * VP

CHILD = f"""
import json, resource, sys, time
import torch
import torch.nn.functional as F
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
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
loss = op(hidden, weight, targets, vocab_size={V})
loss.backward()
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({{"loss": loss.item(), "seconds": seconds, "bytes": 1024 * (peak - before)}}))
"""


def measure(name: str) -> dict:
    done = subprocess.run([sys.executable, "-c", CHILD, name], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_chunked_head_takes_a_quarter_of_the_logits_and_no_more_time(benchmark):
    rounds = [(measure("plain"), measure("chunked")) for _ in range(2)]  # interleaved
    plain, chunked = (min((pair[i] for pair in rounds), key=lambda result: result["seconds"]) for i in (0, 1))
    assert chunked["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    benchmark.pedantic(lambda: measure("chunked"), rounds=1)
    benchmark.extra_info.update(plain=plain, chunked=chunked)
    print(
        f"\nplain   {plain['seconds']:6.2f} s  {plain['bytes'] / 1e9:5.2f} GB\n"
        f"chunked {chunked['seconds']:6.2f} s  {chunked['bytes'] / 1e9:5.2f} GB  "
        f"{plain['seconds'] / chunked['seconds']:.2f}x the speed, {chunked['bytes'] / LOGITS_BYTES:.2f} of the logits"
    )
    assert chunked["bytes"] <= LOGITS_BYTES / 4
    assert chunked["seconds"] <= plain["seconds"]
