"""Sampling: continues the prompt, draws from the requested distribution, refuses bad requests."""

import math
import threading

import pytest
import torch
from tiny_model import build, some_tokens

from model.generate import Options, draw, filter_logits, penalize, stream, window_start


def test_generate_continues_the_prompt():
    tokens = some_tokens(3, 5)
    out = build().generate(tokens, 7, seed=0)
    assert out.shape == (3, 12)
    assert out.dtype == torch.int64
    assert torch.equal(out[:, :5], tokens)
    assert torch.equal(build().generate(tokens, 0), tokens)


def test_greedy_is_the_argmax_of_the_full_forward_pass():
    model, tokens = build(), some_tokens(2, 4)
    out = model.generate(tokens, 10, temperature=0.0)
    for t in range(4, 14):
        assert torch.equal(out[:, t], model(out[:, :t])[:, -1].argmax(-1))


def test_a_full_window_drops_its_first_quarter():
    assert [window_start(n, 16) for n in (1, 16, 17, 20, 21, 24, 25)] == [0, 0, 4, 4, 8, 8, 12]
    for context in (1, 2, 3, 5, 7, 16, 1024):
        read = [n - window_start(n, context) for n in range(1, 4 * context)]
        assert max(read) == context
        assert min(read[context:]) > context - max(1, context // 4) - 1
    model, tokens = build(), some_tokens(2, 30)
    out = model.generate(tokens, 9, temperature=0.0)
    for t in range(30, 39):
        assert torch.equal(out[:, t], model(out[:, window_start(t, 16) : t])[:, -1].argmax(-1))


def test_a_seed_reproduces_and_the_global_state_is_left_alone():
    model, tokens = build(), some_tokens(2, 4)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = model.generate(tokens, 20, seed=3)
    model.generate(tokens, 20)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(8)
    assert torch.equal(model.generate(tokens, 20, seed=3), first)
    assert not torch.equal(model.generate(tokens, 20, seed=4), first)
    assert not torch.equal(model.generate(tokens, 20), model.generate(tokens, 20))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}], ids=str)
def test_the_narrowest_choice_is_greedy(options):
    model, tokens = build(), some_tokens(2, 4)
    assert torch.equal(model.generate(tokens, 12, seed=0, **options), model.generate(tokens, 12, temperature=0.0))


@pytest.mark.parametrize("options", [{"top_k": 257}, {"top_k": 10_000}, {"top_p": 1.0}], ids=str)
def test_the_widest_choice_is_no_filter(options):
    model, tokens = build(), some_tokens(2, 4)
    assert torch.equal(model.generate(tokens, 12, seed=0, **options), model.generate(tokens, 12, seed=0))


FILTERS = [
    pytest.param(1.0, None, None, [1, 1, 1, 1], id="no filter"),
    pytest.param(1.0, 2, None, [1, 1, 0, 0], id="two likeliest"),
    pytest.param(1.0, None, 0.75, [1, 1, 0, 0], id="fewest that reach p"),
    pytest.param(1.0, None, 0.85, [1, 1, 1, 0], id="one more for a larger p"),
    pytest.param(1.0, None, 0.1, [1, 0, 0, 0], id="the first alone passes p"),
    pytest.param(1.0, 3, 0.6, [1, 1, 0, 0], id="top_p among the top k"),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "kept"), FILTERS)
def test_filters_keep_exactly_the_tokens_they_say(temperature, top_k, top_p, kept):
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    order = torch.tensor([2, 0, 3, 1])  # logits come unsorted
    filtered = filter_logits(probs.log()[:, order], temperature, top_k, top_p)
    assert torch.equal(filtered[0].isfinite(), torch.tensor(kept).bool()[order])
    expected = torch.where(torch.tensor(kept).bool(), probs, 0.0)
    torch.testing.assert_close(filtered.softmax(-1), (expected / expected.sum())[:, order])


@pytest.mark.parametrize(("min_p", "kept"), [(0.29, 3), (0.31, 2), (1.0, 1), (0.0, 4)])
def test_min_p_keeps_tokens_at_least_that_many_times_as_likely_as_the_likeliest(min_p, kept):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log() + 7.0
    filtered = filter_logits(logits, 1.0, None, None, min_p)
    assert filtered[0].isfinite().tolist() == [number < kept for number in range(4)]
    sharper = filter_logits(logits, 0.5, None, None, min_p)  # of the probabilities that the temperature made
    assert sharper[0].isfinite().tolist() == [p**2 >= min_p * 0.25 for p in (0.5, 0.3, 0.15, 0.05)]


def test_the_penalty_divides_positive_logits_of_seen_tokens_and_multiplies_negative_ones():
    logits, seen = torch.tensor([[2.0, -2.0, 3.0, 0.0]]), torch.tensor([[True, True, False, True]])
    torch.testing.assert_close(penalize(logits, seen, 1.25), torch.tensor([[1.6, -2.5, 3.0, 0.0]]))
    model, tokens = build(), some_tokens(2, 4)
    out = model.generate(tokens, 30, temperature=0.0, repetition_penalty=1.5)
    for t in range(4, 16):
        for row in range(2):
            logits = model(out[row : row + 1, :t])[0, -1]
            for token in set(out[row, :t].tolist()):
                logits[token] = logits[token] / 1.5 if logits[token] > 0 else logits[token] * 1.5
            assert out[row, t] == logits.argmax()
    plain = model.generate(tokens, 30, temperature=0.0)
    assert len(set(out[0].tolist())) > len(set(plain[0].tolist()))
    assert torch.equal(model.generate(tokens, 30, temperature=0.0, repetition_penalty=1.0), plain)


def test_a_row_s_draws_are_multinomial_s_with_the_seed_plus_its_number():
    logits = torch.randn(3, 257, generator=torch.Generator().manual_seed(0))
    options = Options(temperature=0.7, top_k=40)
    drawn = draw(logits, options, [torch.Generator().manual_seed(5 + i) for i in range(3)])
    probs = filter_logits(logits, 0.7, 40, None).softmax(-1)
    for i in range(3):
        assert drawn[i] == torch.multinomial(probs[i], 1, generator=torch.Generator().manual_seed(5 + i))
    model, prompt = build(), some_tokens(1, 4)
    together = model.generate(prompt.expand(3, 4), 12, seed=5)
    for i in range(3):
        assert torch.equal(together[i], model.generate(prompt, 12, seed=5 + i)[0])


def test_a_row_ends_at_the_end_of_text_and_the_stream_when_all_have():
    model, tokens = build(), some_tokens(3, 4)
    free = model.generate(tokens, 60, seed=0)
    end = int(free[0, 9])
    first = [(row[4:] == end).nonzero().flatten().tolist() for row in free]
    assert first[0][0] <= 5
    out = model.generate(tokens, 60, seed=0, end_of_text=end)
    for row, ours, at in zip(free, out, first, strict=True):
        kept = 4 + (at[0] + 1 if at else 60)
        assert torch.equal(ours[:kept], row[:kept])
        assert (ours[kept:] == end).all()
    alone = model.generate(tokens[:1], 60, seed=0, end_of_text=end)
    assert alone.shape == (1, 4 + first[0][0] + 1)


def test_a_list_of_prompts_returns_a_list_and_streams_columns():
    model, rows = build(), [some_tokens(1, n)[0] for n in (2, 5)]
    out = model.generate(rows, 3, seed=0)
    assert [row.tolist()[:n] for row, n in zip(out, (2, 5), strict=True)] == [row.tolist() for row in rows]
    assert torch.equal(torch.cat([*stream(model, rows, 3, seed=0)], 1), torch.stack([row[-3:] for row in out]))
    assert [row.tolist() for row in model.generate(rows, 0)] == [row.tolist() for row in rows]


def test_samples_follow_the_distribution():
    model, tokens = build(), some_tokens(1, 4)
    draws = model.generate(tokens.expand(4000, 4), 1, temperature=0.5, seed=0)[:, -1]
    expected = (model(tokens)[0, -1] / 0.5).softmax(-1)
    frequencies = torch.bincount(draws, minlength=257) / 4000
    assert (frequencies - expected).abs().max() < 5 * math.sqrt(0.25 / 4000)


BAD_REQUESTS = [
    pytest.param(torch.zeros(1, 0, dtype=torch.int64), {}, "T >= 1, got .1, 0.", id="empty prompt"),
    pytest.param(torch.zeros(4, dtype=torch.int64), {}, "got .4,. ", id="no batch axis"),
    pytest.param(torch.zeros(1, 4), {}, "int64 .*got .1, 4. torch.float32", id="floating tokens"),
    pytest.param(torch.tensor([[0, 257]]), {}, "tokens must be 0 to 256, got 0 to 257", id="padding id"),
    pytest.param(torch.tensor([[-1, 5]]), {}, "tokens must be 0 to 256, got -1 to 5", id="negative id"),
    pytest.param(
        some_tokens(1, 4),
        {"temperature": -0.1},
        "temperature must be at least 0 and finite, got -0.1",
        id="temperature",
    ),
    pytest.param(some_tokens(1, 4), {"temperature": math.nan}, "temperature must be .*, got nan", id="NaN temperature"),
    pytest.param(some_tokens(1, 4), {"top_k": 0}, "top_k must be at least 1, got 0", id="top_k"),
    pytest.param(some_tokens(1, 4), {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0", id="top_p of 0"),
    pytest.param(some_tokens(1, 4), {"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5", id="top_p over 1"),
    pytest.param(some_tokens(1, 4), {"min_p": 1.5}, "min_p must be 0 to 1, got 1.5", id="min_p"),
    pytest.param(
        some_tokens(1, 4),
        {"repetition_penalty": 0.0},
        "repetition_penalty must be 0.01 to 100, got 0.0",
        id="repetition_penalty",
    ),
    pytest.param(some_tokens(1, 4), {"end_of_text": 257}, "end_of_text must be 0 to 256, got 257", id="end_of_text"),
    pytest.param([], {}, "at least one prompt, got none", id="no prompt"),
    pytest.param([torch.zeros(1, 4, dtype=torch.int64)], {}, "a list of .T,. int64 .*got .1, 4.", id="batches"),
    pytest.param([[1, 2], [3]], {}, "a list of .T,. int64 .*got one of type list; make it a tensor", id="Python lists"),
    pytest.param(torch.tensor(3), {}, "got .. torch.int64", id="a number"),
    pytest.param(7, {}, "tokens must be a tensor or a list of tensors, got int", id="no tensor"),
    pytest.param(some_tokens(1, 4), {"top_k": 2.5}, "top_k must be an integer, got 2.5", id="floating top_k"),
    pytest.param(some_tokens(1, 4), {"context": 8.0}, "context must be an integer, got 8.0", id="floating context"),
    pytest.param(
        some_tokens(1, 4), {"end_of_text": "x"}, "end_of_text must be an integer, got 'x'", id="an end's text"
    ),
    pytest.param(
        some_tokens(1, 4), {"max_new_tokens": 2.0}, "max_new_tokens must be an integer, got 2.0", id="floating"
    ),
    pytest.param(some_tokens(1, 4), {"seed": 1.5}, "seed must be an integer, got 1.5", id="floating seed"),
    pytest.param(some_tokens(1, 4), {"seed": 2**64}, "seed must be -2.63 to 2.64 - 1, got 18446744", id="seed"),
    pytest.param(some_tokens(2, 4), {"seed": 2**64 - 1}, "seed must be .* - 2, got", id="the second row's seed"),
    pytest.param(some_tokens(1, 4), {"use_graph": True}, "use_graph must be False or None .* on cpu", id="graph"),
    pytest.param(some_tokens(1, 4), {"max_new_tokens": -1}, "max_new_tokens must be at least 0, got -1", id="negative"),
]


@pytest.mark.parametrize(("tokens", "options", "sentence"), BAD_REQUESTS)
def test_a_bad_request_is_a_sentence(tokens, options, sentence):
    with pytest.raises(ValueError, match=f"generate: .*{sentence}"):
        build().generate(tokens, **{"max_new_tokens": 1, **options})


def test_all_that_is_wrong_with_a_request_is_reported_at_once():
    with pytest.raises(ValueError, match=r"tokens must .*; temperature must .*; top_k must .*; top_p must "):
        build().generate(torch.tensor([[999]]), 1, temperature=-1.0, top_k=0, top_p=0.0)


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_sampling_leaves_each_module_s_mode_between_tokens_and_keeps_no_graph(use_cache):
    model = build(dropout=0.5)
    model.h[0].eval()
    modes = [module.training for module in model.modules()]
    assert any(modes)
    drawn = stream(model, some_tokens(1, 4), 8, temperature=0.0, use_cache=use_cache)
    first = [next(drawn) for _ in range(3)]
    assert [module.training for module in model.modules()] == modes
    model.eval()
    expected = model.generate(some_tokens(1, 4), 3, temperature=0.0)[:, 4:]
    assert torch.equal(torch.cat(first, dim=1), expected)  # dropout was off
    model.train()
    drawn.close()
    assert all(module.training for module in model.modules())
    assert not first[0].requires_grad


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_stream_may_be_made_and_read_in_different_autograd_modes(use_cache):
    model, tokens = build(), some_tokens(2, 14)
    options = {"seed": 0, "repetition_penalty": 1.3, "end_of_text": 256, "use_cache": use_cache}
    expected = model.generate(tokens, 50, **options)
    with torch.inference_mode():
        drawn = stream(model, tokens.clone(), 50, **options)
        first = [next(drawn) for _ in range(3)]
        assert torch.is_inference_mode_enabled()
    rest = list(drawn)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.cat([tokens, *first, *rest], dim=1), expected)
    assert not any(token.is_inference() or token.requires_grad for token in first + rest)


def test_threads_that_generate_from_one_model_draw_as_if_alone():
    model, tokens = build(dropout=0.5), some_tokens(2, 4)
    alone = [model.generate(tokens, 30, seed=seed) for seed in range(3)]
    found, start = [None] * 3, threading.Barrier(3)

    def draw_all(seed: int) -> None:
        start.wait()
        found[seed] = model.generate(tokens, 30, seed=seed)

    threads = [threading.Thread(target=draw_all, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(ours is not None and torch.equal(ours, expected) for ours, expected in zip(found, alone, strict=True))
    assert all(module.training for module in model.modules())
