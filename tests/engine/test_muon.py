"""Muon: its polynomial, its update in float64, and the sharing of its work."""

import copy
import functools
import itertools
import threading

import pytest
import torch
import torch.distributed as dist

from engine import optim
from engine.config import OptimConfig
from engine.optim import muon, sharing
from engine.planning import owners
from model.gpt2 import GPT2, GPT2Config

SMALL = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=100, init="gpt2")


def with_values(rows: int, columns: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(matrix, u, vh) in float64, with these singular values."""
    generator = torch.Generator().manual_seed(rows * columns)
    random = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    u, _, vh = torch.linalg.svd(random, full_matrices=False)
    return u * values @ vh, u, vh


def polynomial(values: torch.Tensor) -> torch.Tensor:
    for a, b, c in muon.QUINTICS:
        values = a * values + b * values**3 + c * values**5
    return values


def test_singular_values_come_as_near_to_one_as_is_said():
    values = polynomial(torch.logspace(-2.69, 0, 100_001, dtype=torch.float64))  # from 0.002
    assert 0.68 <= values.min() < 0.69
    assert 1.20 < values.max() <= 1.21


@pytest.mark.parametrize(
    ("rows", "columns"), [(8, 8), (8, 12), (6, 24), (24, 6), (1, 5)], ids=["square", "wide", "4:1", "1:4", "one row"]
)
def test_the_result_is_the_polynomial_of_the_singular_values(rows, columns):
    values = torch.logspace(0, -4, min(rows, columns), dtype=torch.float64)
    matrix, u, vh = with_values(rows, columns, values)
    expected = u * polynomial(values / (values.norm() + 1e-7)) @ vh
    result = optim.orthogonalize(torch.stack([matrix, -matrix]))
    torch.testing.assert_close(result, torch.stack([expected, -expected]), rtol=0, atol=1e-10)
    single = optim.orthogonalize(matrix.float()[None])[0]
    assert single.dtype == torch.float32
    assert (single - expected).norm() / expected.norm() < 3e-5


def test_on_a_cpu_no_matrix_s_bits_depend_on_the_others():
    matrices = torch.randn(4, 32, 128, generator=torch.Generator().manual_seed(0))
    for batch in (matrices, matrices[:, :, :32], matrices.mT):
        whole = optim.orthogonalize(batch)
        assert all(torch.equal(whole[i : i + 2], optim.orthogonalize(batch[i : i + 2])) for i in range(3))
        assert torch.equal(whole[3:], optim.orthogonalize(batch[3:]))


# ---- The update ---------------------------------------------------------------------------------------------------


@functools.cache
def start() -> GPT2:
    torch.manual_seed(0)
    return GPT2(SMALL)


def train(settings: OptimConfig, steps: int = 3, replicas=None, found_inf=lambda step: None) -> dict[str, torch.Tensor]:
    """Weights and state of Muon's matrices after updates with random gradients, the same in every call."""
    model = copy.deepcopy(start())
    optimizer = optim.build(model, settings, replicas)
    for step in range(steps):
        optim.set_learning_rate(optimizer, settings.lr / (step + 1))
        if (flag := found_inf(step)) is not None:
            optimizer.found_inf = torch.tensor(flag)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + step))
            if flag:
                p.grad.fill_(torch.nan)
        optimizer.step()
    matrices = {name: p for name, p in model.named_parameters() if name.startswith("h.") and p.ndim == 2}
    found = {name: p.detach().clone() for name, p in matrices.items()}
    return found | {f"{name} {key}": t for name, p in matrices.items() for key, t in optimizer.state[p].items()}


def updates_of(values: dict[str, torch.Tensor], settings: OptimConfig, steps: int = 3) -> dict[str, torch.Tensor]:
    """The same in float64, part by part, from the equations. values: before."""
    expected = {}
    for name, start in values.items():
        count = 3 if "c_attn" in name else 1
        for part, weight in enumerate(start.double().chunk(count)):
            momentum, square = torch.zeros_like(weight), torch.zeros(len(weight), 1, dtype=torch.float64)
            for step in range(steps):
                lr = settings.muon_lr / (step + 1)
                whole = torch.randn(start.shape, generator=torch.Generator().manual_seed(start.numel() + step))
                g = whole.double().chunk(count)[part]
                momentum = 0.9 * momentum + 0.1 * g
                u, s, vh = torch.linalg.svd(0.9 * momentum + 0.1 * g, full_matrices=False)
                update = u * polynomial(s / s.norm()) @ vh
                if settings.muon_rows:
                    square = 0.95 * square + 0.05 * (update**2).mean(1, keepdim=True)
                    scaled = update / (square / (1 - 0.95 ** (step + 1))).sqrt()
                    update = scaled * update.norm() / scaled.norm()
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight = weight - lr * settings.weight_decay * weight - lr * scale * update
            for key, value in (("", weight), (" momentum", momentum), (" row_square", square)):
                expected[name + key] = torch.cat([expected.get(name + key, value[:0]), value])
    return expected


@pytest.mark.parametrize("rows", [False, True], ids=["", "rows"])
def test_a_muon_step_is_its_equation_for_each_of_q_k_and_v(rows):
    settings = OptimConfig("muon", muon_momentum=0.9, muon_rows=rows, weight_decay=0.3)
    before = {name: t for name, t in train(settings, steps=0).items() if " " not in name}
    found, expected = train(settings), updates_of(before, settings)
    assert len(before) == 8
    assert any(name.endswith("row_square") for name in found) == rows
    for name in found:
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-4, atol=2e-6, msg=name)


def test_where_a_check_would_synchronise_the_flag_has_the_same_effect_to_the_bit(monkeypatch):
    """The GPU's path, on a CPU: the update with a flag is a `where`."""
    settings = OptimConfig("muon", muon_rows=True)
    plain = train(settings, steps=2)
    for readable in (True, False):
        monkeypatch.setattr(muon, "is_readable", lambda flag, readable=readable: readable)
        skipped = train(settings, steps=3, found_inf=lambda step: float(step == 2))
        assert plain.keys() == skipped.keys()
        assert all(torch.equal(plain[name], skipped[name]) for name in plain)


def test_a_matrix_of_zeros_stays_finite():
    update, square = muon.normalize_rows(optim.orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 1))
    assert not update.any()
    assert not square.any()


# ---- Sharing ------------------------------------------------------------------------------------------------------


def on_ranks(size: int, work) -> list:
    """Results of work(rank) in threads, each a rank of a process group."""
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    results, store = [None] * size, dist.HashStore()

    def run(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
            results[rank] = work(rank)
        except BaseException as error:
            threaded.ProcessLocalGroup.exception_handle(error)
            raise

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    return results


@pytest.mark.parametrize("size", [2, 3, 11])
def test_replicas_share_the_work_and_get_the_bits_of_one_process(size, monkeypatch):
    """On 11 ranks three have no matrix."""
    settings, calls = OptimConfig("muon", muon_rows=True), []
    iterate = muon._iterate
    monkeypatch.setattr(muon, "_iterate", lambda *inputs: calls.append(threading.get_ident()) or iterate(*inputs))
    alone = train(settings)
    count = len(calls)
    for found in on_ranks(size, lambda rank: train(settings, replicas=dist.group.WORLD)):
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)
    assert len(calls) == 2 * count  # every matrix once, on one of the ranks
    assert len(set(calls[count:])) == min(size, 8)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_rows_go_to_a_matrix_s_owner_and_come_back(size):
    """Also where ranks hold different numbers of rows, or none."""
    matrices = [torch.randn(rows, columns) for rows, columns in ((6, 4), (7, 1), (1, 5), (4, 4))]
    rows, owner_of = [len(matrix) for matrix in matrices], [0, size - 1, 0, 1]

    def work(rank: int) -> list[torch.Tensor]:
        each = [matrix.split([owners.share(len(matrix), r, size) for r in range(size)]) for matrix in matrices]
        pieces = [parts[rank].clone() for parts in each]
        peers = sharing.Peers(dist.group.WORLD, is_sharded=True)
        whole = peers.collect(pieces, rows, owner_of)
        assert sorted(whole) == [index for index, owner in enumerate(owner_of) if owner == rank]
        assert all(torch.equal(matrix, matrices[index]) for index, matrix in whole.items())
        peers.distribute({index: 2 * matrix for index, matrix in whole.items()}, pieces, owner_of)
        return pieces

    pieces = on_ranks(size, work)
    assert all(torch.equal(torch.cat(parts), 2 * matrix) for *parts, matrix in zip(*pieces, matrices, strict=True))


@pytest.mark.parametrize(("blocks", "size"), itertools.product([2, 12, 48], [1, 2, 8, 64]))
def test_ranks_get_alike_work(blocks, size):
    shapes = [((4, 1), 1), ((1, 4), 1), ((3, 1), 3), ((1, 1), 1)]
    costs = [owners.work([128 * side for side in shape], parts) for shape, parts in shapes * blocks]
    loads = [0] * size
    for cost, owner in zip(costs, owners.assign(costs, size), strict=True):
        loads[owner] += cost
    assert max(loads) <= max(4 / 3 * sum(costs) / size, max(costs))  # Graham 1969
