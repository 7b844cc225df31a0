"""Parameter shapes, parameter counts and FLOPs of model.presets: those of the model itself, and the published ones."""

import subprocess
import sys

import pytest
import torch

from model import GPT2, PRESETS, GPT2Config
from model.presets import flops_per_token, num_parameters, parameter_shapes

CONFIGS = {
    "one_of_everything": GPT2Config(n_layer=1, n_head=1, n_embd=1, n_positions=1, vocab_size=1),
    "odd_width": GPT2Config(n_layer=3, n_head=5, n_embd=35, n_positions=17, vocab_size=257),
    "no_padding": GPT2Config(n_layer=2, n_head=2, n_embd=6, n_positions=9, vocab_size=256),
    "eleven_blocks": GPT2Config(n_layer=11, n_head=1, n_embd=3, n_positions=5, vocab_size=129),
    "tiny": PRESETS["tiny"],
    "gpt2": PRESETS["gpt2"],
}


def model_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in GPT2(config).named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_shapes_are_the_models_in_its_order(config):
    assert list(parameter_shapes(config).items()) == list(model_shapes(config).items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_number_of_parameters_is_the_models_with_and_without_padding(config):
    with torch.device("meta"):
        model = GPT2(config)
    padding = model.wte.weight[config.vocab_size :].numel()
    elements = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters(config) == elements
    assert num_parameters(config, padded=False) == elements - padding == model.num_parameters()


def test_gpt2_has_the_published_number_of_parameters():
    assert num_parameters(PRESETS["gpt2"], padded=False) == 124_439_808
    assert num_parameters(PRESETS["gpt2"]) == 124_439_808 + 47 * 768  # 50,257 rows padded to 50,304


def test_gpt2_takes_the_published_flops_per_token():
    assert f"{flops_per_token(PRESETS['gpt2'], 1024) / 1e6:.1f}" == "855.4"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_flops_count_each_parameter_but_the_positions_six_times(config):
    shapes = model_shapes(config)
    elements = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name != "wpe.weight")
    attention = 12 * config.n_layer * config.n_embd * 7
    assert flops_per_token(config, 7) == 6 * elements + attention


def test_counting_imports_no_pytorch():
    program = "import sys; from model.presets import num_parameters, PRESETS; num_parameters(PRESETS['gpt2']); "
    program += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
