"""Trains one model in every `--parallel` mode and, for comparison, on one process.

torchrun runs it for test_parallel.py. The last line is JSON: for each mode, its differences from the one process, and
what each rank saw.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor

from engine import distributed, evaluation, optim
from engine.config import OptimConfig, TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.health import replicas
from engine.tokens.shards import TokenStream
from model.gpt2 import GPT2, GPT2Config

MODEL = GPT2Config(n_layer=3, n_head=2, n_embd=32, n_positions=16, vocab_size=97)
# With an eps of 1e-8 AdamW would make steps of the rounding error in gradients that should be zero.
CONFIG = TrainConfig(model=MODEL, eval_tokens=16 * 21, optim=OptimConfig(clip=0.5, eps=1e-5))
MUON = replace(CONFIG.optim, name="muon", muon_rows=True)
NUM_STEPS, ACCUMULATION = 5, 2
MASK = {"document_mask": True, "document_positions": True}  # documents begin with token 1
WAYS = {
    2: {
        "ddp, block, masked": {"parallel": "ddp", "recompute": "block", "optim": MUON, **MASK},
        "fsdp, block, compiled, masked": {"parallel": "fsdp", "recompute": "block", "optim": MUON, **MASK},
        "fsdp, bf16": {"parallel": "fsdp"},
    },
    4: {
        "fsdp": {"parallel": "fsdp"},
        "fsdp, block, no reshard": {"parallel": "fsdp", "recompute": "block", "reshard": False},
        "hsdp, attention, masked": {
            "parallel": "hsdp",
            "shard_size": 2,
            "recompute": "attention",
            "optim": MUON,
            **MASK,
        },
    },
}

BATCH = torch.randint(97, (2, 17), generator=torch.Generator().manual_seed(2))

graphs, sums = [], []
all_reduce = dist.all_reduce


def count(graph, inputs):
    """Backend of torch.compile that counts graphs and needs no C++ compiler."""
    graphs.append(graph)
    return aot_eager(graph, inputs)


def count_all_reduce(tensor, *args, **options):
    """Counts all-reduces of gradients, which FSDP2 sums over replicas; norms and losses have one element."""
    if tensor.numel() > 1:
        sums.append(tensor)
    return all_reduce(tensor, *args, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Trains; returns loss and gradient norm of each step. batches: (steps, ACCUMULATION, B, T + 1)."""
    losses, norms = [], []
    for micro_batches in batches:
        total = torch.zeros(())
        for index, batch in enumerate(micro_batches):
            distributed.synchronize_gradients(model, index == ACCUMULATION - 1)
            loss = model(batch[:, :-1], batch[:, 1:])
            assert loss.dtype == torch.float32
            (loss / ACCUMULATION).backward()
            total += loss.detach() / ACCUMULATION
        norms.append(distributed.clip(model, CONFIG.optim.clip))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


def build(config: TrainConfig, compute_dtype: torch.dtype) -> GPT2:
    """Model with the same initial weights every time."""
    torch.manual_seed(0)
    model = GPT2(config.model)
    model.configure("torch", compute_dtype, config.recompute)
    model.mask_documents(1 if config.document_mask else None, config.document_positions)
    return model


def full_weights(model: GPT2) -> dict[str, Tensor]:
    """Weights of the raw model, unsharded, on every rank."""
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in weights.items()}


def furthest(got: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference between two lists of tensors."""
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(got, expected, strict=True))


def try_way(name: str, changes: dict, ranks: Ranks) -> dict:
    """Compares one `--parallel` mode with one process that gets the batches of all ranks."""
    config = replace(CONFIG, **changes)
    compute_dtype = torch.bfloat16 if "bf16" in name else torch.float32
    shape = (NUM_STEPS, ACCUMULATION, ranks.world_size, 2, 17)
    batches = torch.randint(97, shape, generator=torch.Generator().manual_seed(1))
    batches[..., 9] = 1
    alone = build(replace(config, recompute="none"), compute_dtype)
    optimizer = optim.build(alone, config.optim)
    optim.set_learning_rate(optimizer, config.optim.lr)
    expected_losses, expected_norms = train(alone, optimizer, batches.flatten(2, 3))

    raw_model = build(config, compute_dtype)
    graphs.clear()
    sums.clear()
    model = distributed.wrap(
        raw_model,
        ranks,
        parallel=config.parallel,
        shard_size=config.shard_size,
        reshard=config.reshard,
        is_compiled="compiled" in name,
        compute_dtype=compute_dtype,
    )
    optimizer = optim.build(raw_model, config.optim, replicas.group(model, ranks))
    optim.set_learning_rate(optimizer, config.optim.lr)
    losses, norms = train(model, optimizer, batches[:, :, ranks.rank])
    report = {"graphs": len(graphs), "sums over replicas": len(sums)}
    weights = full_weights(raw_model)
    report["losses"] = furthest([ranks.sum(loss) / ranks.world_size for loss in losses], expected_losses)
    report["dtypes"] = sorted({str(t.dtype) for p in raw_model.parameters() for t in (p, *optimizer.state[p].values())})
    report["norms"] = furthest(norms, expected_norms)
    report["smallest norm"] = min(norm.item() for norm in norms)
    report["weights"] = furthest(list(weights.values()), list(full_weights(alone).values()))
    report["moved"] = furthest(list(weights.values()), list(full_weights(build(CONFIG, compute_dtype)).values()))
    report["norms on each rank"] = ranks.gather([(type(norm).__name__, norm.item().hex()) for norm in norms])
    share = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in raw_model.parameters())
    report["share of the weights"] = share / sum(p.numel() for p in weights.values())

    alone.load_state_dict(weights)
    generator = np.random.default_rng(0)
    text = TokenStream([Path("memory")], [generator.integers(0, 97, 5000).astype(np.uint16)], 97)
    chosen = evaluation.windows(text, config.sequence_length, config.eval_tokens)
    one = Ranks(0, 0, 1, ranks.device)
    expected = evaluation.mean_loss(alone, text, chosen, config.sequence_length, one)
    loss = evaluation.mean_loss(raw_model, text, chosen, config.sequence_length, ranks)
    report["evaluation"] = abs(loss / expected - 1.0)
    prompt = torch.tensor([[1, 2, 3]])
    with distributed.outside_training(raw_model):
        tokens = raw_model.generate(prompt, 20, temperature=0.8, top_k=20, seed=3)  # beyond the 16 positions
    report["sampled alike"] = all(ranks.gather(torch.equal(tokens, alone.generate(prompt, 20, 0.8, 20, seed=3))))
    report["graphs outside training"] = len(graphs) - report["graphs"]
    report["in shards again"] = all(isinstance(p, DTensor) for p in raw_model.parameters())

    report["skipped"] = skips_an_update(model, optimizer, batches[0, 0, ranks.rank])
    group = replicas.group(model, ranks)
    report["group"] = group and dist.get_process_group_ranks(group)
    report["replicas"] = replicas.check(raw_model, ranks, group)
    if ranks.rank == 1:
        weight = raw_model.h[1].mlp.c_fc.weight.detach()
        weight = (weight.to_local() if isinstance(weight, DTensor) else weight).flatten()
        weight[7] = torch.nextafter(weight[7], torch.tensor(torch.inf))
    report["replicas, one nudged"] = replicas.check(raw_model, ranks, group)
    return report


def gradients_off_ddp(ranks: Ranks) -> dict[str, float]:
    """For each parameter, the norm of FSDP's gradient minus DDP's over DDP's norm, in bfloat16."""
    gradients = []
    for parallel in ("ddp", "fsdp"):
        model = build(CONFIG, torch.bfloat16)
        wrapped = distributed.wrap(model, ranks, parallel=parallel, compute_dtype=torch.bfloat16)
        batch = torch.randint(97, (ranks.world_size, 8, 17), generator=torch.Generator().manual_seed(3))[ranks.rank]
        wrapped(batch[:, :-1], batch[:, 1:]).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        gradients.append({n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()})
    ddp, fsdp = gradients
    return {name: ((fsdp[name] - grad).norm() / grad.norm()).item() for name, grad in ddp.items()}


def skips_an_update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor) -> bool:
    """Whether found_inf = 1.0 leaves weights, moments and step counts unchanged, and 0.0 does not."""

    def everything() -> list[Tensor]:
        state = [t for p in model.parameters() for t in (p, *optimizer.state[p].values())]
        return [(t.to_local() if isinstance(t, DTensor) else t).detach().clone() for t in state]

    same = []
    for found_inf in (1.0, 0.0):
        before = everything()
        model(batch[:, :-1], batch[:, 1:]).backward()
        for p in model.parameters():
            if found_inf:
                (p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).fill_(torch.nan)
        optimizer.found_inf = torch.tensor(found_inf)
        optimizer.step()
        del optimizer.found_inf
        optimizer.zero_grad()
        same.append([torch.equal(left, right) for left, right in zip(before, everything(), strict=True)])
    return all(same[0]) and not any(same[1])


def main(ranks: Ranks) -> None:
    compile_module = nn.Module.compile
    nn.Module.compile = lambda self, **options: compile_module(self, backend=count, **options)
    dist.all_reduce = count_all_reduce
    evaluation.BATCH_TOKENS = 16 * 5  # 21 windows: four batches of five and one of one
    reports = {name: try_way(name, changes, ranks) for name, changes in WAYS[ranks.world_size].items()}
    if ranks.world_size == 4:
        raw_model = build(CONFIG, torch.float32)
        if ranks.rank == 1:
            raw_model.ln_f.bias.data[3] = 2.0**-149  # the smallest float32 above zero
        reports["one of four"] = replicas.check(raw_model, ranks, dist.group.WORLD)
        try:
            distributed.wrap(GPT2(MODEL), ranks, parallel="hsdp", shard_size=3)
        except BadInput as error:
            reports["uneven"] = str(error)
    if ranks.world_size == 2:
        reports["fsdp, bf16"]["gradients off ddp"] = gradients_off_ddp(ranks)
    ranks.print0(json.dumps(reports))


if __name__ == "__main__":
    with distributed.process_group() as ranks:
        main(ranks)
    distributed.leave(0)
