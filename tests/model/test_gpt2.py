"""Whole model: sizes, names, initial state, both ways to call it, padding and compilation."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_model import build, some_tokens

from model import GPT2, PRESETS, GPT2Config

# ---- Sizes and names ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_released_sizes_are_exact(preset, expected):
    with torch.device("meta"):
        assert GPT2(PRESETS[preset]).num_parameters() == expected


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("gpt3-small", 125e6),
        ("gpt3-medium", 350e6),
        ("gpt3-large", 760e6),
        ("gpt3-xl", 1.3e9),
        ("gpt3-2.7b", 2.7e9),
        ("gpt3-6.7b", 6.7e9),
        ("gpt3-13b", 13.0e9),
        ("gpt3-175b", 175.0e9),
    ],
)
def test_gpt3_sizes_are_the_papers(preset, expected):
    with torch.device("meta"):
        assert GPT2(PRESETS[preset]).num_parameters() == pytest.approx(expected, rel=0.025)


def test_parameter_names_and_shapes_are_the_released_ones():
    C = 32
    block = {
        "ln_1.weight": (C,),
        "ln_1.bias": (C,),
        "attn.c_attn.weight": (3 * C, C),
        "attn.c_attn.bias": (3 * C,),
        "attn.c_proj.weight": (C, C),
        "attn.c_proj.bias": (C,),
        "ln_2.weight": (C,),
        "ln_2.bias": (C,),
        "mlp.c_fc.weight": (4 * C, C),
        "mlp.c_fc.bias": (4 * C,),
        "mlp.c_proj.weight": (C, 4 * C),
        "mlp.c_proj.bias": (C,),
    }
    expected = {"wte.weight": (384, C), "wpe.weight": (16, C), "ln_f.weight": (C,), "ln_f.bias": (C,)}
    expected |= {f"h.{layer}.{name}": shape for layer in range(2) for name, shape in block.items()}
    model = build()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert set(model.state_dict()) == set(expected)  # the head is wte, and nothing else is stored


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_heads_that_kernels_take_and_a_padded_vocabulary(name):
    config = PRESETS[name]
    assert 16 <= config.head_dim <= 256
    assert config.padded_vocab_size % 128 == 0
    assert 0 <= config.padded_vocab_size - config.vocab_size < 128


def test_config_names_everything_that_is_off():
    with pytest.raises(ValueError, match="model: ") as raised:
        GPT2Config(n_layer=0, n_head=5, n_embd=32, vocab_size=-1, dropout=1.0, init="xavier")
    for part in (
        "n_layer must be at least 1, got 0",
        "vocab_size must be at least 1, got -1",
        "n_embd must be a multiple of n_head, got 32 and 5",
        "dropout must be at least 0 and below 1, got 1.0",
        "init must be one of fan_in, gpt2, zero_residual, got 'xavier'",
    ):
        assert part in str(raised.value)


# ---- Initial state ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("init", "above"), [("fan_in", 0.5), ("gpt2", 0.0)])
def test_first_loss_is_near_ln_v(init, above):
    model = build(GPT2Config(n_layer=2, n_head=2, n_embd=128, n_positions=64, vocab_size=1000, init=init))
    tokens = some_tokens(4, 64, 1000)
    targets = some_tokens(4, 64, 1000, seed=2)
    assert model(tokens, targets).item() == pytest.approx(math.log(1000) + above, abs=0.15)


@pytest.mark.parametrize("init", ["fan_in", "gpt2", "zero_residual"])
def test_weights_have_the_scheme_s_spread(init):
    L, C = 8, 64
    model = build(GPT2Config(n_layer=L, n_head=2, n_embd=C, n_positions=64, vocab_size=257, init=init))
    std = {"fan_in": 1 / math.sqrt(C), "gpt2": 0.02, "zero_residual": 1 / math.sqrt(C)}[init]
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            into_stream = name.endswith("c_proj.weight")  # two per block
            scale = {"fan_in": 1.0, "gpt2": 1 / math.sqrt(2 * L), "zero_residual": 0.0}[init] if into_stream else 1.0
            assert parameter[:257].std().item() == pytest.approx(std * scale, rel=0.06), name
            assert parameter[:257].mean().abs().item() <= 0.1 * std * scale, name


def test_weights_follow_the_seed():
    first, again, other = (build(seed=seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])


# ---- Calls --------------------------------------------------------------------------------------------------------


def test_loss_is_the_cross_entropy_of_the_logits():
    model, tokens, targets = build(), some_tokens(), some_tokens(seed=2)
    targets[0, :5] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected, rtol=1e-5, atol=1e-6)


def test_forward_is_the_plain_formula():
    model, tokens = build(seed=5), some_tokens()
    w = {name: p.double() for name, p in model.state_dict().items()}

    def norm(x, name):
        return F.layer_norm(x, (32,), w[f"{name}.weight"], w[f"{name}.bias"])

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["wte.weight"][tokens] + w["wpe.weight"][:16]
    for layer in ("h.0", "h.1"):
        qkv = linear(norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn").split(32, dim=-1)
        q, k, v = (part.view(2, 16, 2, 16).transpose(1, 2) for part in qkv)  # (B, H, T, D)
        scores = (q @ k.transpose(-2, -1) / 4).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 16, 32)
        x = x + linear(out, f"{layer}.attn.c_proj")
        h = F.gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc"), approximate="tanh")
        x = x + linear(h, f"{layer}.mlp.c_proj")
    logits = norm(x, "ln_f") @ w["wte.weight"][:257].T
    torch.testing.assert_close(model(tokens).double(), logits, rtol=1e-4, atol=1e-4)


def test_a_later_token_never_changes_earlier_logits():
    model, tokens = build(), some_tokens()
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 257
    torch.testing.assert_close(model(changed)[:, :9], model(tokens)[:, :9], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(changed)[:, 9:], model(tokens)[:, 9:])


def test_a_sequence_over_the_positions_is_a_sentence():
    with pytest.raises(ValueError, match="a sequence must have at most 16 tokens, got 17"):
        build()(some_tokens(T=17))
    assert build()(some_tokens(T=16)).shape == (2, 16, 257)


def test_padded_vocabulary_is_never_seen_outside():
    model, tokens = build(), some_tokens()
    logits, loss = model(tokens), model(tokens, tokens)
    loss.backward()
    gradient = model.wte.weight.grad
    assert logits.shape == (2, 16, 257)
    assert (gradient[257:] == 0).all()
    assert (gradient[:257] != 0).any(dim=1).all()
    with torch.no_grad():
        model.wte.weight[257:] = 100.0  # their values must not matter
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=0)
    torch.testing.assert_close(model(tokens, tokens), loss, rtol=1e-6, atol=1e-6)
    assert model.generate(tokens, 40, temperature=50.0, seed=0).max() < 257


def test_ids_over_gpt2_s_vocabulary_are_never_drawn():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=1, n_head=1, n_embd=16, n_positions=4, vocab_size=50257))
    with torch.no_grad():
        model.wte.weight[50257:].normal_(std=100.0)  # the 47 rows of padding: one of them would always be likeliest
    tokens = torch.full((4, 1), 50256)
    for options in ({}, {"temperature": 0.0}, {"temperature": 50.0}, {"top_k": 50}, {"top_p": 0.9}):
        assert model.generate(tokens, 6, seed=0, **options).max() < 50257


def test_every_parameter_gets_a_gradient():
    model, tokens = build(), some_tokens()
    model(tokens, tokens).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_dropout_is_active_in_training_and_off_in_evaluation():
    model, tokens = build(dropout=0.2), some_tokens()
    plain = build(dropout=0.0)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=0)


def test_dropout_acts_at_each_of_its_places(monkeypatch):
    model, tokens = build(dropout=0.2), some_tokens()
    rates, attention_rates = [], []
    plain_dropout = F.dropout

    def recorded(x, p=0.5, training=True, inplace=False):
        rates.append(p if training else 0.0)
        return plain_dropout(x, p, training, inplace)

    def attention(qkv, dropout_p=0.0):
        attention_rates.append(dropout_p)
        return model.h[0].ln_1.ops.attention(qkv, dropout_p=dropout_p)

    monkeypatch.setattr(F, "dropout", recorded)
    for block in model.h:
        block.attn.ops = dataclasses.replace(model.ops, attention=attention)
    model(tokens)
    assert rates == [0.2] * 5
    assert attention_rates == [0.2] * 2
    rates.clear(), attention_rates.clear()
    model.eval()(tokens)
    assert set(rates) == {0.0}
    assert attention_rates == [0.0] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_keeps_parameters_and_gradients_in_float32(dtype):
    model, tokens = build(), some_tokens()
    exact = model(tokens, tokens).item()
    model.configure("torch", dtype)
    assert model(tokens).dtype == dtype
    loss = model(tokens, tokens)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=0.01)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name


def test_attention_reads_the_projection_in_place():
    model, tokens = build(), some_tokens()
    projected, received = [], []
    attention = model.ops.attention

    def recorded(qkv, **options):
        received.append((qkv.untyped_storage().data_ptr(), tuple(qkv.shape)))
        return attention(qkv, **options)

    ops = dataclasses.replace(model.ops, attention=recorded)
    model.configure(ops, torch.float32)
    for block in model.h:
        block.attn.c_attn.register_forward_hook(lambda _, __, out: projected.append(out))
    model(tokens)
    assert received == [(out.untyped_storage().data_ptr(), (2, 16, 3, 2, 16)) for out in projected]
    assert len(received) == 2


def test_configure_reaches_every_op_of_the_model():
    model, called = build(), set()

    def recorded(name):
        def op(*args, **options):
            called.add(name)
            return getattr(plain, name)(*args, **options)

        return op

    plain = model.ops
    names = [field.name for field in dataclasses.fields(plain) if field.name not in ("choices", "gelu")]
    model.configure(dataclasses.replace(plain, **{name: recorded(name) for name in names}), torch.float32)
    model(some_tokens(), some_tokens())
    assert called == set(names)


@pytest.mark.slow  # test_kernel_model compiles the model with its kernels
def test_compiles_fullgraph_and_equals_eager():
    torch._dynamo.reset()
    model, tokens, targets = build(), some_tokens(), some_tokens(seed=2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(tokens, targets)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=1e-5, atol=1e-5)
