"""Loading and saving in the Hugging Face layout, compared with transformers' own GPT-2."""

import socket
import sys

import pytest
import torch
import transformers
from hugging_face import (
    SMALL,
    assert_same_weights,
    hf_config,
    hf_model,
    in_our_layout,
    randomized,
    rewrite_config,
    rewrite_weights,
)
from torch import Tensor

from model import pretrained
from model.gpt2 import GPT2, PRESETS, GPT2Config

SHAPES = [
    pytest.param(GPT2Config(n_layer=1, n_head=1, n_embd=16, n_positions=5, vocab_size=128), id="one-head-no-padding"),
    pytest.param(GPT2Config(n_layer=2, n_head=3, n_embd=33, n_positions=9, vocab_size=131), id="odd-width"),
    pytest.param(GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=32, vocab_size=257), id="small"),
]


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Asserts that the largest error is at most 1e-4 * the largest value + 1e-7."""
    assert actual.shape == expected.shape, what
    error, scale = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 1e-4 * scale + 1e-7, f"{what}: error {error:.2e} of {scale:.2e}"


@pytest.fixture
def poisoned_memory():
    """Fills fresh memory with NaN, so that an element that loading did not write shows."""
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(was_on)


@pytest.fixture
def directory(tmp_path):
    """A small model as transformers saves it."""
    hf_model(SMALL).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("direction", ["transformers_to_ours", "ours_to_transformers"])
@pytest.mark.parametrize("config", SHAPES)
def test_logits_loss_and_every_gradient_match_transformers(config, direction, attention, tmp_path):
    if direction == "transformers_to_ours":
        hf = hf_model(config, attn_implementation=attention)
        hf.save_pretrained(tmp_path)
        ours = GPT2.from_pretrained(tmp_path)
    else:
        ours = randomized(GPT2(config))
        ours.save_pretrained(tmp_path)
        hf, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation=attention, output_loading_info=True
        )
        assert isinstance(hf, transformers.GPT2LMHeadModel)
        assert hf.dtype == torch.float32
        assert not any(report.values()), report
    assert ours.config == config
    assert hf.config._attn_implementation == attention

    tokens = torch.randint(config.vocab_size, (2, config.n_positions), generator=torch.Generator().manual_seed(2))
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)  # transformers shifts inside
    theirs = hf(input_ids=tokens, labels=tokens)
    assert_close(ours(tokens), theirs.logits, "logits")
    loss = ours(tokens, targets)
    assert_close(loss, theirs.loss, "loss")
    loss.backward()
    theirs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert not gradients["wte.weight"][config.vocab_size :].any()
    gradients["wte.weight"] = gradients["wte.weight"][: config.vocab_size]
    expected = in_our_layout(hf)
    assert gradients.keys() == expected.keys()
    for name, (_, gradient) in expected.items():
        assert_close(gradients[name], gradient, f"gradient of {name}")


@pytest.mark.parametrize("name", pretrained.RELEASED)
def test_names_and_shapes_of_the_released_sizes_are_transformers(name):
    with torch.device("meta"):
        ours, hf = GPT2(PRESETS[name]), transformers.GPT2LMHeadModel(hf_config(PRESETS[name]))
    expected = {name.removeprefix("transformer."): parameter.shape for name, parameter in hf.named_parameters()}
    assert {name: view.shape for name, view in pretrained.released_views(ours).items()} == expected


def test_round_trip_is_bitwise_and_padding_stays_zero(tmp_path, poisoned_memory):
    model = randomized(GPT2(SMALL))
    model.save_pretrained(tmp_path / "once")
    loaded = GPT2.from_pretrained(str(tmp_path / "once"))
    loaded.save_pretrained(tmp_path / "twice")
    for (name, a), (_, b) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        assert torch.equal(a, b), name
        assert (b.dtype, b.requires_grad, b.is_contiguous()) == (torch.float32, True, True), name
    assert loaded.wte.weight.shape[0] == 128
    assert not loaded.wte.weight[SMALL.vocab_size :].any()
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


def test_written_files_are_readable_like_any_other_and_nothing_else_is_left(tmp_path):
    GPT2(SMALL).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "other").touch()
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_loaded_model_does_not_share_memory_with_the_file(directory):
    model = GPT2.from_pretrained(directory)
    before = (directory / "model.safetensors").read_bytes()
    randomized(model)
    assert (directory / "model.safetensors").read_bytes() == before
    (directory / "model.safetensors").write_bytes(b"")  # a mapped page would be gone now
    assert model.wpe.weight.isfinite().all()


def test_loading_leaves_the_random_state_and_takes_no_dropout_over(directory):
    rewrite_config(directory, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1)
    state = torch.get_rng_state()
    assert GPT2.from_pretrained(directory).config.dropout == 0.0
    assert pretrained.load(GPT2, directory, dropout=0.2).config.dropout == 0.2
    assert torch.equal(torch.get_rng_state(), state)


def test_keys_without_prefix_with_masks_and_head_load_the_same(directory):
    def as_the_released_files(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 6, 6, dtype=torch.uint8)
        tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite_weights(directory, as_the_released_files)
    assert_same_weights(GPT2.from_pretrained(directory), hf_model(SMALL))


def test_a_file_that_keeps_the_head_in_place_of_the_embedding_loads(directory):
    def drop_embedding(tensors):
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")

    rewrite_weights(directory, drop_embedding)
    assert_same_weights(GPT2.from_pretrained(directory), hf_model(SMALL))


def test_sharded_files_load(tmp_path):
    hf_model(SMALL).save_pretrained(tmp_path, max_shard_size="2KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_weights(GPT2.from_pretrained(tmp_path), hf_model(SMALL))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_exactly(dtype, tmp_path):
    hf = hf_model(SMALL).to(dtype)
    hf.save_pretrained(tmp_path)
    model = GPT2.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_weights(model, hf)


@pytest.mark.parametrize(
    "fields",
    [{"activation_function": "gelu_pytorch_tanh"}, {"reorder_and_upcast_attn": True}, {"n_inner": 32}, {"n_ctx": 6}],
)
def test_fields_that_mean_the_same_model_are_accepted(fields, directory):
    rewrite_config(directory, **fields)
    assert_same_weights(GPT2.from_pretrained(directory), hf_model(SMALL))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    import huggingface_hub.constants as constants

    def refuse(*args, **kwargs):
        raise OSError("the network is not reachable")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", [*pretrained.RELEASED, "someone/their-gpt2"])
def test_a_name_without_a_network_says_what_to_do(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"download config\.json and model\.safetensors by other means"):
        GPT2.from_pretrained(name)


def test_a_name_without_huggingface_hub_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="huggingface_hub must be installed"):
        GPT2.from_pretrained("gpt2")


@pytest.mark.parametrize("name", ["gpt3", "a/b/c", "./missing", "/missing/directory", "../x"])
def test_what_is_neither_a_directory_nor_a_name_is_refused_at_once(name, no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="must be a directory that exists"):
        GPT2.from_pretrained(name)


def test_a_directory_wins_over_a_name(no_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_model(SMALL).save_pretrained("gpt2")
    assert_same_weights(GPT2.from_pretrained("gpt2"), hf_model(SMALL))


def test_a_short_name_is_the_repository_of_the_release(monkeypatch, tmp_path, directory):
    import huggingface_hub

    asked = []
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repository, allow_patterns: asked.append((repository, allow_patterns)) or str(directory),
    )
    for name in ("gpt2-xl", "someone/their-gpt2"):
        assert_same_weights(GPT2.from_pretrained(name), hf_model(SMALL))
    assert [repository for repository, _ in asked] == ["openai-community/gpt2-xl", "someone/their-gpt2"]
    assert not any("bin" in pattern for _, patterns in asked for pattern in patterns)


@pytest.mark.parametrize("broken", ["save_file", "fsync"])
def test_an_interrupted_save_leaves_the_old_files_whole(broken, directory, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    monkeypatch.setattr(pretrained if broken == "save_file" else pretrained.os, broken, fail)
    with pytest.raises(ValueError, match="no space left on device; choose another or make room"):
        GPT2(SMALL).save_pretrained(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_saving_where_a_file_is_says_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="must be a directory that can be written"):
        GPT2(SMALL).save_pretrained(tmp_path / "file")
