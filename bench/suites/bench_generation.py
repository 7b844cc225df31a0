"""Tokens per second of model.generate, for one sequence and for several at once, and `transformers`' beside it."""

import statistics
import time

import pytest
import torch
from torch import Tensor

from bench.results import rate, spread
from bench.steps import absence, build_model, initial_weights
from bench.suites.conftest import DEVICE, ON_GPU, case
from model.generate import stream
from model.gpt2 import GPT2
from model.presets import PRESETS

NEW_TOKENS, PROMPT = 32, 16
CASES = [case("gpt2" if ON_GPU else "tiny", sequences, is_quick=True) for sequences in ("1", "8")]
CASES += [case("gpt2-medium" if ON_GPU else "gpt2", "1", is_quick=False)]


@pytest.mark.parametrize(("preset", "sequences"), CASES)
def test_generate(preset: str, sequences: str, measure):
    config, B = PRESETS[preset], int(sequences)
    torch.manual_seed(0)
    model = GPT2(config).to(DEVICE).eval()
    prompt = torch.randint(config.vocab_size, (B, PROMPT), device=DEVICE)

    def check(ids: Tensor) -> None:
        assert ids.shape == (B, PROMPT + NEW_TOKENS)
        assert torch.equal(ids[:, :PROMPT], prompt)
        with torch.no_grad():
            logits = model(ids[:, : PROMPT + 1])  # (B, T, V)
        assert torch.equal(ids[:, PROMPT : PROMPT + 2], logits[:, PROMPT - 1 :].argmax(-1))
        one, other = (model.generate(prompt, 4, temperature=1.0, seed=1) for _ in range(2))
        assert torch.equal(one, other)

    measure(lambda: model.generate(prompt, NEW_TOKENS, temperature=0.0), check, work=(B * NEW_TOKENS, "tokens/s"))


BESIDE_TOKENS = 256  # new tokens
BESIDE = [case(sequences, precision, is_quick=False) for sequences in ("1", "16") for precision in ("fp32", "bf16")]


def can_bfloat16() -> bool:
    return ON_GPU or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def now() -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@pytest.mark.parametrize(("sequences", "precision"), BESIDE)
def test_generate_beside_transformers(sequences: str, precision: str, measure):
    """Greedy, GPT-2 124M with random weights. A token of ours follows each of `transformers`, by its generate with its
    cache: what else the machine does slows both. Prompt, copies of the weights and the loop are in both times."""
    if reason := absence("transformers"):
        pytest.skip(reason)
    if precision == "bf16" and not can_bfloat16():
        pytest.skip("this CPU has no bfloat16 products")
    config, B = PRESETS["gpt2"], int(sequences)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    weights = initial_weights(config)
    ours, theirs = (build_model(who, config, weights).to(DEVICE).eval() for who in ("ours", "transformers"))
    ours.configure("auto", dtype)
    theirs.to(dtype)
    theirs.config.use_cache = theirs.generation_config.use_cache = True
    prompt = torch.randint(config.vocab_size, (B, PROMPT), device=DEVICE)
    greedy = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}

    def alternate(tokens: int) -> tuple[list[Tensor], Tensor, list[float], list[float]]:
        """New tokens of ours, text of theirs, and the seconds of each token of ours and of theirs."""
        drawn, own, other, times = [], [], [], [now()]

        def lap() -> float:
            times.append(now())
            return times[-1] - times[-2]

        continued = stream(ours, prompt, tokens, temperature=0.0)
        copying = lap()  # the weights, and a cache

        def turn(*_, **__) -> Tensor:  # a stopping criterion, which transformers calls after each token
            other.append(lap())
            drawn.append(next(continued))
            own.append(lap())
            return torch.zeros(B, dtype=torch.bool, device=DEVICE)

        length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        text = theirs.generate(prompt, stopping_criteria=[turn], **greedy, **length)
        own[0] += copying
        return drawn, text, own, other

    alternate(3)
    drawn, text, own, other = measure.benchmark.pedantic(alternate, (BESIDE_TOKENS,))
    assert text.shape == (B, PROMPT + len(drawn)) == (B, PROMPT + BESIDE_TOKENS)
    if dtype == torch.float32:
        assert torch.equal(drawn[0], text[:, PROMPT : PROMPT + 1])
    for name, times in (("throughput", own), ("transformers", other)):
        measure.info[name] = rate(spread(times, "s"), B, "tokens/s")._asdict()
    measure.info["speed"] = sum(other) / sum(own)
    ms = f"{1e3 * sum(own) / len(own):.1f} and {1e3 * sum(other) / len(other):.1f} ms"
    medians = statistics.median(other) / statistics.median(own)
    measure.info["note"] = f"{measure.info['speed']:.2f}x of transformers, {ms}; medians {medians:.2f}x"
