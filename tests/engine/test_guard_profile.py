"""Updates never synchronise: the guard adds an all-reduce of five numbers, and reads no tensor's value.

On a CPU the profiler shows it. On a GPU PyTorch's sync debug mode raises at every synchronisation.
"""

import json
from pathlib import Path

import forks
import pytest
import torch

from engine import optim
from engine.config import OptimConfig
from engine.distributed import Ranks
from engine.health.timing import Clock
from engine.step import Guard, Mailbox, Numbers, Step
from model.gpt2 import GPT2, GPT2Config

EACH_RANK = pytest.mark.parametrize("rank", [0, 1])


@pytest.fixture(scope="module")
def seen() -> dict:
    """Report of profile_replicas.py on two ranks."""
    done = forks.run(Path(__file__).with_name("profile_replicas.py"), ranks=2, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@EACH_RANK
def test_an_update_sums_the_gradient_once_and_five_numbers(seen, rank):
    profile = seen["ranks"][rank]["Guard"]
    assert len(profile["sums"]) == 3
    for sizes, num_calls in zip(profile["sums"], profile["calls"], strict=True):
        *buckets, last = sizes
        assert last == [5]  # loss, signals, time-outs, saves that are due, abandoned updates
        assert sum(size for (size,) in buckets) == seen["num_parameters"]  # each once, for both micro-batches
        assert num_calls == len(buckets) + 1
    assert len(profile["sums"][-1]) == 3, "the model must fill more than one bucket"


@EACH_RANK
def test_neither_the_step_nor_the_guard_reads_a_number(seen, rank):
    profiles = seen["ranks"][rank]
    assert len(profiles["Guard"]["reads"]) == 3
    for reads in profiles["Guard"]["reads"]:
        assert "" not in reads
        # The head checks its targets and fused AdamW reads its step count, both for tensors on a CPU only.
        assert reads.keys() == {"DistributedDataParallel.forward", "Optimizer.step#AdamW.step"}
    for kind in ("Guard", "NoGuard"):  # two buckets on their way at once may be recorded in either order
        profiles[kind] = profiles[kind] | {"sums": [sorted(sums) for sums in profiles[kind]["sums"]]}
    assert profiles["Guard"] == profiles["NoGuard"]  # reads and sums alike


@EACH_RANK
def test_a_guard_that_reads_its_verdict_is_seen(seen, rank):
    profiles = seen["ranks"][rank]
    assert profiles["WaitingGuard"]["reads"] == [reads | {"": 2} for reads in profiles["NoGuard"]["reads"]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only there can an update wait for the device")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_update_waits_for_the_gpu(precision):
    ranks = Ranks(0, 0, 1, torch.device("cuda", 0))
    shape = GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=32, vocab_size=257)
    torch.manual_seed(0)
    model = GPT2(shape).to(ranks.device)
    model.configure("auto", torch.float16 if precision == "fp16" else torch.float32)
    optimizer, guard = optim.build(model, OptimConfig(lr=1e-3)), Guard(ranks.device, skip_z_score=3.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=256.0, enabled=precision == "fp16")  # small: no update is skipped
    make, mailbox = Step(model, optimizer, scaler, guard, 1, 1.0, ranks, Clock(ranks.device)), Mailbox()
    tokens = torch.randint(257, (2, 4, 33))  # micro-batch, B, T + 1
    micro_batches = [(b[:, :-1].contiguous().pin_memory(), b[:, 1:].contiguous().pin_memory()) for b in tokens]

    def update(step: int) -> Numbers | None:
        return mailbox.exchange(make(step, micro_batches, 1e-3))

    for step in range(3):  # compiles kernels, allocates, fills the mailbox: these may synchronise
        update(step)
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        known = [update(step) for step in range(3, 8)]
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):  # the mode does detect a read
            guard.state.tolist()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(numbers is not None and numbers[4:] == (0.0, 0.0) for numbers in known)  # nothing was skipped
    losses = [numbers.loss for numbers in known]
    assert losses == sorted(losses, reverse=True)  # each is its own step's, in order
