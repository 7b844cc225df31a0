"""KV cache: what it draws equals what reading the whole window for each token draws."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny_model import build, some_tokens

from model import cache
from model.cache import Decoder, Weights
from model.generate import COPIES_FROM, generate, window_start

LONG = COPIES_FROM + 9  # new tokens, with the weights' copies
PROMPTS = [1, 7, 3, 16, 11]  # lengths; the longest fills the window


@pytest.fixture(autouse=True)
def nan_memory(monkeypatch):
    """Fills the memory of a cache with NaN when it is allocated."""
    plain = cache.LayerCache.__init__

    def filled(self, owner, keys, values):
        plain(self, owner, keys.fill_(torch.nan), values.fill_(torch.nan))

    monkeypatch.setattr(cache.LayerCache, "__init__", filled)


def prompts(lengths: list[int]) -> list[torch.Tensor]:
    return [some_tokens(1, length, seed=length)[0] for length in lengths]


SHAPES = [
    pytest.param(1, 1, {}, id="one token"),
    pytest.param(2, 7, {}, id="odd length"),
    pytest.param(3, 13, {"n_embd": 36, "n_head": 3}, id="D of 12"),
    pytest.param(4, 5, {"n_embd": 33, "n_head": 3, "n_layer": 3}, id="D of 11"),
    pytest.param(5, 16, {"dropout": 0.5}, id="full window and dropout"),
    pytest.param(1, 40, {"n_positions": 5}, id="prompt beyond a window of 5"),
    pytest.param(2, 3, {"n_positions": 1}, id="window of 1"),
]


@pytest.mark.parametrize(("B", "T", "changes"), SHAPES)
@pytest.mark.parametrize("copies_from", [0, 99], ids=["copied weights", "own weights"])
def test_the_cache_draws_the_tokens_of_the_uncached_path(B, T, changes, copies_from, monkeypatch):
    monkeypatch.setattr("model.generate.COPIES_FROM", copies_from)
    model, tokens, new = build(**changes).train(), some_tokens(B, T), 14
    for options in ({"temperature": 0.0}, {"seed": 5}):
        expected = generate(model, tokens, new, use_cache=False, **options)
        assert expected.shape == (B, T + new)
        assert torch.equal(generate(model, tokens, new, **options), expected)


@pytest.mark.parametrize("is_static", [False, True], ids=["slices", "static"])
@pytest.mark.parametrize("lengths", [[9], [7, 7, 7], PROMPTS], ids=str)
def test_logits_are_within_1e_5_of_a_forward_pass(lengths, is_static):
    model, rows = build().eval(), prompts(lengths)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):  # which are 0 at first
                p.normal_(std=0.1)
    decoder, steps = Decoder(model, len(rows), 16, uses_graph=is_static), 17 - max(lengths)
    decoder.uses_graph = False  # here is no GPU; the shapes stay a graph's
    assert decoder.cache.is_static == is_static
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left", padding_value=99)
    logits = decoder.prefill(tokens, lengths)
    for step in range(steps):
        expected = torch.cat([model(row[None])[:, -1] for row in rows])
        assert (logits - expected).abs().max() < 1e-5
        if step < steps - 1:
            new = logits.argmax(-1, keepdim=True)
            rows = [torch.cat([row, token]) for row, token in zip(rows, new, strict=True)]
            logits = decoder.step(new)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 40}, {"context": 6}], ids=str)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_row_among_prompts_of_other_lengths_is_as_alone(options, use_cache):
    model, rows = build(), prompts(PROMPTS)
    out = generate(model, rows, 20, use_cache=use_cache, seed=3, repetition_penalty=1.3, **options)
    for i, row in enumerate(rows):
        alone = generate(model, row[None], 20, seed=3 + i, repetition_penalty=1.3, **options)
        assert torch.equal(out[i], alone[0]), i


def test_past_the_window_the_cache_reads_what_the_uncached_path_reads():
    model, rows = build(), prompts([15, 2])
    read = []
    plain = model.last_logits
    model.last_logits = lambda tokens, *cache: read.append(tokens.shape[1]) or plain(tokens, *cache)
    cached = generate(model, rows, 40, temperature=0.0)
    assert max(read) == 16
    slides = sum(window_start(15 + n, 16) != window_start(14 + n, 16) for n in range(1, 40))
    other = sum(window_start(2 + n, 16) != window_start(1 + n, 16) for n in range(1, 40))
    assert sum(width > 1 for width in read) <= 1 + slides + other  # the others read one token
    assert [row.tolist() for row in generate(model, rows, 40, temperature=0.0, use_cache=False)] == [
        row.tolist() for row in cached
    ]


def test_bfloat16_is_as_near_to_float32_as_the_uncached_path():
    exact, model, tokens = build().eval(), build().eval(), some_tokens(3, 14)
    model.configure("torch", torch.bfloat16)
    decoder = Decoder(model, 3, 16)
    logits = [decoder.prefill(tokens[:, :5], [5] * 3)] + [decoder.step(tokens[:, t : t + 1]) for t in range(5, 14)]
    truth, uncached = exact(tokens)[:, 4:], model(tokens)[:, 4:].float()
    error, allowed = (torch.stack(logits, 1) - truth).abs().max(), 2 * (uncached - truth).abs().max() + 2**-8
    assert error <= allowed
    assert generate(model, tokens, LONG, seed=0).shape == (3, 14 + LONG)


def test_the_weights_copies_are_gone_after_a_step_and_are_of_the_current_weights():
    model, tokens = build(), some_tokens(2, 4)
    before = generate(model, tokens, LONG, temperature=0.0)
    assert not any({"cast", "head", "product"} & set(vars(module)) for module in model.modules())
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.2)
    after = generate(model, tokens, LONG, temperature=0.0)
    assert not torch.equal(before, after)
    assert torch.equal(after, generate(model, tokens, LONG, temperature=0.0, use_cache=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_forward_of_another_thread_with_gradients_does_not_use_the_copies(dtype):
    model, tokens = build(), some_tokens(2, 8)
    model.configure("torch", dtype)
    alone = torch.autograd.grad(model(tokens).float().square().mean(), list(model.parameters()))
    with Weights(model, 2):  # as a thread that generates has them during its forward
        beside = torch.autograd.grad(model(tokens).float().square().mean(), list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(alone, beside, strict=True))


def test_without_packed_weights_the_tokens_are_the_same(monkeypatch):
    model, tokens = build(), some_tokens(3, 4)
    packed = generate(model, tokens, LONG, temperature=0.0)
    calls = []
    monkeypatch.setattr(cache, "_packed", lambda *a, plain=cache._packed: calls.append(plain(*a)))
    monkeypatch.setattr(torch.ops, "mkldnn", object())  # the ops are not public: a PyTorch may lack them
    assert torch.equal(generate(model, tokens, LONG, temperature=0.0), packed)
    assert len(calls) > 1
    assert not any(calls)


@pytest.fixture
def cuda(monkeypatch):
    """CUDA's streams and graphs, without a GPU: a capture that fails leaves its stream current, as PyTorch's does."""
    main, other = (SimpleNamespace(wait_stream=lambda stream: None) for _ in range(2))
    state = SimpleNamespace(stream=main, main=main, is_models=False, error=None, replays=0)

    @contextmanager
    def device_of(tensor):
        state.is_models = True
        yield
        state.is_models = False

    @contextmanager
    def graph(graph, capture_error_mode):
        assert state.is_models
        state.stream = other
        yield
        if state.error:
            raise state.error
        state.stream = main

    def replay():
        assert state.is_models
        state.replays += 1

    def new_stream():
        assert state.is_models
        return other

    fakes = {
        "device_of": device_of,
        "graph": graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=replay),
        "Stream": new_stream,
        "stream": nullcontext,
        "current_stream": lambda: state.stream,
        "set_stream": lambda stream: setattr(state, "stream", stream),
        "synchronize": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return state


def test_a_graph_that_cannot_be_captured_is_a_sentence_and_changes_no_token(cuda):
    model, tokens = build().eval(), some_tokens(2, 5)
    plain, decoder = Decoder(model, 2, 16), Decoder(model, 2, 16, uses_graph=True)
    assert torch.equal(plain.prefill(tokens, [5, 5]), decoder.prefill(tokens, [5, 5]))
    cuda.error = RuntimeError("invalidated\nmore")
    with pytest.warns(UserWarning, match="^generate: no CUDA graph, slower: invalidated$"):
        logits = decoder.step(tokens[:, :1])
    assert (logits - plain.step(tokens[:, :1])).abs().max() < 1e-5
    assert cuda.stream is cuda.main


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), KeyError("a fault of ours")], ids=["memory", "bug"])
def test_another_error_in_a_capture_is_not_hidden(cuda, error):
    model, tokens = build().eval(), some_tokens(2, 5)
    decoder, cuda.error = Decoder(model, 2, 16, uses_graph=True), error
    decoder.prefill(tokens, [5, 5])
    with pytest.raises(type(error)):
        decoder.step(tokens[:, :1])
    assert cuda.stream is cuda.main


def test_a_graph_is_captured_and_replayed_on_the_model_s_device(cuda):
    model, tokens = build().eval(), some_tokens(2, 5)
    decoder = Decoder(model, 2, 16, uses_graph=True)
    decoder.prefill(tokens, [5, 5])
    for _ in range(2):
        decoder.step(tokens[:, :1])
    assert cuda.replays == 2
