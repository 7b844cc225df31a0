"""Learning rate of every step, weight decay by tensor, AdamW and Muon against their equations."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from engine import optim
from engine.config import PRESETS, OptimConfig, TrainConfig
from engine.optim import learning_rate, warmup_steps
from model.gpt2 import GPT2, GPT2Config

quick = settings(deadline=None, max_examples=60)
SMALL = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=8, vocab_size=100, init="gpt2")


@st.composite
def schedules(draw) -> TrainConfig:
    ratio, warmup_tokens = draw(st.sampled_from([0.0, 0.1, 1.0])), draw(st.sampled_from([0, 1, 1000, 20_000, 10**9]))
    return TrainConfig(
        num_steps=draw(st.integers(1, 300)),
        tokens_per_step=1000,
        optim=OptimConfig(
            lr=6e-4,
            min_lr_ratio=ratio,
            warmup_tokens=warmup_tokens,
            schedule=draw(st.sampled_from(["cosine", "wsd"])),
            decay_share=draw(st.sampled_from([0.2, 1.0])),
        ),
    )


@quick
@given(config=schedules())
def test_the_rate_rises_in_a_line_to_the_peak_then_never_rises_again(config):
    rates = [learning_rate(step, config) for step in range(config.num_steps + 1)]
    rise, peak = warmup_steps(config), config.optim.lr
    assert rates[:rise] == pytest.approx([peak * (step + 1) / rise for step in range(rise)])
    assert max(rates) == rates[max(0, rise - 1)] == pytest.approx(peak)
    falling = rates[max(0, rise - 1) :]
    assert all(later <= earlier for earlier, later in itertools.pairwise(falling))
    if config.num_steps > rise:
        assert rates[-1] == pytest.approx(peak * config.optim.min_lr_ratio, abs=1e-12)


@quick
@given(config=schedules())
def test_warm_up_takes_its_tokens_but_at_most_a_tenth_of_the_run(config):
    asked = -(-config.optim.warmup_tokens // config.tokens_per_step)
    assert warmup_steps(config) == min(asked, max(1, config.num_steps // 10))


def test_gpt2_warms_up_for_716_steps():
    assert warmup_steps(PRESETS["gpt2"]) == 716  # 375e6 / 524,288 = 715.3
    assert warmup_steps(dataclasses.replace(PRESETS["gpt2"], num_steps=1000)) == 100


def test_the_cosine_is_half_way_down_in_the_middle():
    config = TrainConfig(num_steps=1100, tokens_per_step=1000, optim=OptimConfig(lr=1e-3, warmup_tokens=100_000))
    assert learning_rate(600, config) == pytest.approx(0.55e-3)  # between 1e-3 and 0.1e-3


def test_wsd_stays_at_the_peak_until_its_share_is_left_then_falls_in_a_line():
    optim_config = OptimConfig(lr=1e-3, warmup_tokens=50_000, schedule="wsd", decay_share=0.4)
    config = TrainConfig(num_steps=1000, tokens_per_step=1000, optim=optim_config)
    rates = [learning_rate(step, config) for step in (49, 50, 599, 600, 700, 800, 1000)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 1e-3, 0.775e-3, 0.55e-3, 0.1e-3])


def test_exactly_the_matrices_and_embeddings_decay():
    model = GPT2(SMALL)
    decayed, kept = optim.build(model, OptimConfig()).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert {names[p] for p in kept["params"]} == {
        name for name in names.values() if name.endswith("bias") or ".ln_" in f".{name}"
    }
    assert sorted(names[p] for group in (decayed, kept) for p in group["params"]) == sorted(names.values())


def test_a_step_sets_the_rate_of_both_groups():
    optimizer = optim.build(GPT2(SMALL), OptimConfig())
    optim.set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_adamw_follows_its_equations():
    """Algorithm 2 of Loshchilov & Hutter 2019 in float64, for three steps with a learning rate each."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
    with torch.no_grad():  # LayerNorm's bias not at its initial zero, so that decay would show
        model[1].bias += 0.5
    config = TrainConfig(optim=OptimConfig(lr=1e-2, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3))
    rates = [1e-2, 5e-3, 2e-2]
    optimizer = optim.build(model, config.optim)
    expected = {name: [p.detach().double(), 0.0, 0.0] for name, p in model.named_parameters()}
    for step, lr in enumerate(rates, start=1):
        optim.set_learning_rate(optimizer, lr)
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            theta, m, v = expected[name]
            g = p.grad.double()
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            theta = theta - lr * (0.3 if p.ndim == 2 else 0.0) * theta
            theta = theta - lr * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-3)
            expected[name] = [theta, m, v]
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach().double(), expected[name][0], rtol=0, atol=3e-7)  # 3 roundings near 1
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), expected[name][1], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"].double(), expected[name][2], rtol=1e-6, atol=1e-6)
        assert p.dtype == optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == torch.float32


# ---- Muon ---------------------------------------------------------------------------------------------------------


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = GPT2(SMALL)
    config = TrainConfig(model=SMALL, optim=OptimConfig("muon", lr=1e-3, muon_lr=0.02))
    optimizer = optim.build(model, config.optim)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(itertools.chain(*groups)) == sorted(names.values())
    assert groups[0] == ["wte.weight", "wpe.weight"]
    assert all(name.startswith("h.") and name.endswith("weight") for name in groups[2])
    assert len(groups[2]) == 4 * SMALL.n_layer
    optim.set_learning_rate(optimizer, 5e-4)  # half the peak
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-4, 0.01])


def test_muon_leaves_adamw_s_part_alone():
    torch.manual_seed(0)
    models = [GPT2(SMALL), GPT2(SMALL)]
    models[1].load_state_dict(models[0].state_dict())
    configs = [TrainConfig(model=SMALL, optim=OptimConfig(name, lr=1e-3, muon_lr=0.02)) for name in ("adamw", "muon")]
    optimizers = [optim.build(model, config.optim) for model, config in zip(models, configs, strict=True)]
    tokens = torch.randint(100, (2, 8), generator=torch.Generator().manual_seed(1))
    for model, optimizer, config in zip(models, optimizers, configs, strict=True):
        model(tokens, tokens).backward()
        optim.set_learning_rate(optimizer, config.optim.lr)
    for optimizer in optimizers:
        optimizer.step()
    for name in ("wte.weight", "wpe.weight", "ln_f.bias", "h.1.mlp.c_fc.bias"):
        assert torch.equal(*(model.get_parameter(name) for model in models)), name


def test_muon_allocates_a_momentum_once(monkeypatch):
    model = GPT2(SMALL)
    optimizer = optim.build(model, OptimConfig("muon"))
    zeros_like, made = torch.zeros_like, []
    monkeypatch.setattr(torch, "zeros_like", lambda t, **options: made.append(t) or zeros_like(t, **options))
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones(p.shape)
        optimizer.step()
    moments = [2 if "exp_avg" in state else 1 for state in optimizer.state.values()]
    assert len(made) == sum(moments)
