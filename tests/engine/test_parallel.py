"""`--parallel` ddp, fsdp and hsdp train, evaluate and sample as one process does, and detect replicas that differ.

parallel_replicas.py tries every mode in two launches. Each test reads its report.
"""

import json
from pathlib import Path

import forks
import pytest
import torch
from parallel_replicas import BATCH, CONFIG, NUM_STEPS, WAYS, build

from engine import distributed
from engine.health import replicas

SLOW = {4: [pytest.mark.slow], 2: []}
EACH_WAY = [
    pytest.param(n, name, id=f"{n} processes, {name}", marks=SLOW[n]) for n, ways in WAYS.items() for name in ways
]
EXACT = [way for way in EACH_WAY if "bf16" not in way.id]


class Reports(dict):
    """Report by number of processes. Launches them when their report is first read."""

    def __missing__(self, n: int) -> dict:
        script = Path(__file__).with_name("parallel_replicas.py")
        done = forks.run(script, ranks=n, seconds=300, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, done.stderr
        self[n] = json.loads(done.stdout.splitlines()[-1])
        return self[n]


@pytest.fixture(scope="module")
def reports() -> dict[int, dict]:
    return Reports()


@pytest.mark.parametrize(("n", "name"), EXACT)
def test_five_steps_are_those_of_one_process(reports, n, name):
    seen = reports[n][name]
    assert seen["losses"] < 1e-5
    assert seen["norms"] < 1e-5
    assert seen["weights"] < 1e-5
    assert seen["moved"] > 1e-3  # training did change the weights
    assert seen["smallest norm"] > 2 * CONFIG.optim.clip  # and clipping did act


def test_bfloat16_weights_travel_and_float32_ones_train(reports):
    seen = reports[2]["fsdp, bf16"]
    assert 0.0 < seen["losses"] < 1e-2
    assert seen["norms"] < 1e-2
    assert seen["evaluation"] < 1e-3
    assert seen["dtypes"] == ["torch.float32"]


def test_bfloat16_gradients_under_fsdp_are_those_of_ddp(reports):
    """Also the tied weight's, which would be 1% off if the head's part were rounded before the ranks add theirs."""
    assert max(reports[2]["fsdp, bf16"]["gradients off ddp"].values()) < 1e-6


@pytest.mark.parametrize(("n", "name"), EACH_WAY)
def test_the_norm_is_a_plain_tensor_with_the_same_bits_on_each_rank(reports, n, name):
    first, *others = reports[n][name]["norms on each rank"]
    assert {kind for kind, _ in first} == {"Tensor"}
    assert others == [first] * (n - 1)


@pytest.mark.parametrize(("n", "name"), EACH_WAY)
def test_each_rank_holds_its_share(reports, n, name):
    seen = reports[n][name]
    assert seen["share of the weights"] == {"ddp": 1.0, "fsdp": 1.0 / n, "hsdp": 0.5}[WAYS[n][name]["parallel"]]
    assert seen["in shards again"] == (WAYS[n][name]["parallel"] != "ddp")  # after evaluating and sampling


@pytest.mark.parametrize(("n", "name"), EXACT)
def test_evaluation_and_sampling_are_those_of_one_process_to_the_bit(reports, n, name):
    assert reports[n][name]["evaluation"] == 0.0
    assert reports[n][name]["sampled alike"]


def test_blocks_compile_alike_and_only_for_training(reports):
    """Blocks share two graphs, since the first block gets no residual branch. Other shapes run uncompiled."""
    seen = reports[2]["fsdp, block, compiled, masked"]
    assert seen["graphs"] == 2
    assert seen["graphs outside training"] == 0


@pytest.mark.slow
def test_replicas_are_summed_once_a_step(reports):
    """One all-reduce for each block and one for the rest, at the last micro-batch."""
    assert reports[4]["hsdp, attention, masked"]["sums over replicas"] == NUM_STEPS * (CONFIG.model.n_layer + 1)


@pytest.mark.parametrize(("n", "name"), EACH_WAY)
def test_found_inf_skips_the_whole_update(reports, n, name):
    assert reports[n][name]["skipped"]


@pytest.mark.parametrize(("n", "name"), EACH_WAY)
def test_a_weight_off_by_one_bit_is_found_among_replicas(reports, n, name):
    seen = reports[n][name]
    group, ranks = {"ddp": ([0, 1], "0, 1"), "fsdp": (None, None), "hsdp": ([0, 2], "1, 3")}[WAYS[n][name]["parallel"]]
    assert seen["group"] == group
    assert seen["replicas"] is None
    if group is None:
        assert seen["replicas, one nudged"] is None
    else:
        assert f"got others on rank {ranks}, first in h.1.mlp.c_fc.weight" in seen["replicas, one nudged"]


@pytest.mark.slow
def test_the_majority_of_replicas_names_the_one_that_is_wrong(reports):
    assert reports[4]["one of four"] == (
        "replicas: 4 of them must hold the same weights to the bit, got others on rank 1, first in ln_f.bias"
    )


@pytest.mark.slow
def test_shards_that_do_not_come_out_even_are_refused(reports):
    assert "must divide all 4 processes, got 3; set --shard-size to one of 1, 2, 4" in reports[4]["uneven"]


@pytest.mark.parametrize("parallel", ["fsdp", "hsdp"])
def test_one_process_shards_with_itself(parallel):
    gradients = []
    for way in ("ddp", parallel):
        with distributed.process_group() as ranks:
            raw_model = build(CONFIG, torch.float32)
            model = distributed.wrap(raw_model, ranks, parallel=way)
            tokens = BATCH.to(ranks.device)
            model(tokens[:, :-1], tokens[:, 1:]).backward()
            assert distributed.clip(model, 1e9) > 0.5
            assert replicas.group(model, ranks) is None
            if way == "hsdp":  # its own groups, which PyTorch gives half an hour
                for group in next(model.parameters()).device_mesh.get_all_groups():
                    assert group._get_backend(ranks.device).options._timeout == distributed.TIMEOUT
            grads = [p.grad for p in model.parameters()]
            gradients.append([g.full_tensor() if way != "ddp" else g for g in grads])
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


def test_the_checksum_sees_every_swap_and_every_bit(monkeypatch):
    monkeypatch.setattr(replicas, "CHECKSUM_CHUNK", 5)
    weights = torch.randn(13, generator=torch.Generator().manual_seed(0))
    changed = [weights]
    for i in range(13):
        for j in range(i):
            swapped = weights.clone()
            swapped[[i, j]] = weights[[j, i]]
            changed.append(swapped)
        for bit in range(32):
            flipped = weights.clone()
            flipped.view(torch.int32)[i] ^= 1 << bit if bit < 31 else -(1 << 31)
            changed.append(flipped)
    sums = [replicas._checksum(tensor).item() for tensor in changed]
    assert len(set(sums)) == len(sums) == 1 + 13 * 12 // 2 + 13 * 32
    monkeypatch.undo()
    assert replicas._checksum(weights).item() == sums[0]
