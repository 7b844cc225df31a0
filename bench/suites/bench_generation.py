"""Tokens per second of model.generate, for one sequence and for several at once."""

import pytest
import torch
from torch import Tensor

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
