"""Tokens per second of model.generate, for one sequence and for several at once, and `transformers`' beside it."""

import statistics
import time

import pytest
import torch
from torch import Tensor

from bench.results import rate, spread
from bench.steps import absence, build_model, initial_weights
from bench.suites.conftest import DEVICE, ON_GPU, case
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


BESIDE_TOKENS, TURNS = 256, 3  # new tokens, and calls of each
BESIDE = [case(sequences, precision, is_quick=False) for sequences in ("1", "16") for precision in ("fp32", "bf16")]


def can_bfloat16() -> bool:
    return ON_GPU or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(("sequences", "precision"), BESIDE)
def test_generate_beside_transformers(sequences: str, precision: str, measure, request):
    """Greedy, GPT-2 124M with random weights. Each call follows one of `transformers` with its cache."""
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
    length = {"max_new_tokens": BESIDE_TOKENS, "min_new_tokens": BESIDE_TOKENS, "pad_token_id": 0}
    seconds: list[float] = []
    found: list[Tensor] = []

    def run_theirs() -> None:
        began = time.perf_counter()
        found[:] = [theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)]
        if ON_GPU:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)

    def check(ids: Tensor) -> None:
        assert ids.shape == found[0].shape == (B, PROMPT + BESIDE_TOKENS)
        if dtype == torch.float32:
            assert torch.equal(ids[:, PROMPT], found[0][:, PROMPT])

    work = (B * BESIDE_TOKENS, "tokens/s")
    measure(
        lambda: ours.generate(prompt, BESIDE_TOKENS, temperature=0.0), check, before=run_theirs, work=work, rounds=TURNS
    )
    seconds = seconds[-TURNS:]
    measure.info["transformers"] = rate(spread(seconds, "s"), *work)._asdict()
    if measure.benchmark.stats is not None:
        measure.info["speed"] = statistics.median(seconds) / measure.benchmark.stats.stats.median
        print(f"{request.node.name}: {measure.info['speed']:.2f}x of transformers", flush=True)
