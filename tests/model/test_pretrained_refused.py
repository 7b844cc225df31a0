"""Weights that are refused: damaged, incomplete, able to run code, or of another model."""

import contextlib
import json
import os
import pickle
import time

import pytest
import torch
from hugging_face import SMALL, hf_model, rewrite_config, rewrite_weights

from model.gpt2 import GPT2


@pytest.fixture
def directory(tmp_path):
    """A small model as transformers saves it."""
    hf_model(SMALL).save_pretrained(tmp_path)
    return tmp_path


def test_a_missing_shard_is_named(tmp_path):
    hf_model(SMALL).save_pretrained(tmp_path, max_shard_size="2KB")
    lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=f"{lost.name} must be a complete safetensors file"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], {"wte.weight": "../../secret"}, {"wte.weight": ["x"]}])
def test_an_index_that_names_no_files_of_its_directory_is_refused(directory, weight_map):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="must give file names"):
        GPT2.from_pretrained(directory)


def test_an_untied_head_is_refused(directory):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1e-3

    rewrite_weights(directory, untie)
    with pytest.raises(ValueError, match=r"lm_head\.weight must equal wte\.weight"):
        GPT2.from_pretrained(directory)


def test_everything_off_in_the_weights_is_named_at_once(directory):
    def spoil(tensors):
        del tensors["transformer.h.1.ln_2.bias"]
        tensors["score.weight"] = torch.zeros(2, 8)
        tensors["transformer.wpe.weight"] = torch.zeros(5, 8)
        tensors["transformer.h.0.attn.c_attn.weight"] = torch.zeros(24, 8)  # not transposed
        tensors["transformer.ln_f.weight"] = torch.ones(8, dtype=torch.int8)

    rewrite_weights(directory, spoil)
    with pytest.raises(ValueError, match="must hold the tensors of the GPT-2 in its config") as error:
        GPT2.from_pretrained(directory)
    for problem in (
        "h.1.ln_2.bias is missing",
        "score.weight is unknown",
        "wpe.weight must be (6, 8), got (5, 8)",
        "h.0.attn.c_attn.weight must be (8, 24), got (24, 8)",
        "ln_f.weight must be float32, float16 or bfloat16, got torch.int8",
    ):
        assert problem in str(error.value)
    assert str(error.value).count(";") == 5


def test_a_tensor_stored_twice_is_refused(directory):
    rewrite_weights(directory, lambda tensors: tensors.update({"ln_f.bias": torch.zeros(8)}))
    with pytest.raises(ValueError, match=r"ln_f\.bias once"):
        GPT2.from_pretrained(directory)


@pytest.mark.parametrize("kept", [0, 5, 300, -1], ids=["empty", "in-the-length", "in-the-header", "last-byte-lost"])
def test_a_truncated_file_is_refused(kept, directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="must be a complete safetensors file"):
        GPT2.from_pretrained(directory)


def test_a_pickle_is_refused_without_being_opened(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(ValueError, match="is a pickle and could run code"):
        GPT2.from_pretrained(directory)


class Bomb:
    """Makes a directory when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "config.json", "model.safetensors.index.json"]
)
@pytest.mark.parametrize("clothes", ["pickle", "torch.save"])
def test_a_malicious_pickle_in_any_place_is_refused_and_does_not_run(directory, tmp_path, name, clothes):
    mark = tmp_path / "it ran"
    if name not in ("model.safetensors", "config.json"):
        (directory / "model.safetensors").unlink()
    with (directory / name).open("wb") as file:
        pickle.dump(Bomb(mark), file) if clothes == "pickle" else torch.save(Bomb(mark), file)
    with pytest.raises(ValueError, match=r"weights: .* must "):
        GPT2.from_pretrained(directory)
    assert not mark.exists()
    with (directory / name).open("rb") as file, contextlib.suppress(Exception):  # loading it would have run it
        pickle.load(file) if clothes == "pickle" else torch.load(file, weights_only=False)
    assert mark.exists()


def test_a_directory_without_weights_or_config_says_what_is_missing(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold model\.safetensors"):
        GPT2.from_pretrained(directory)
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        GPT2.from_pretrained(directory)


@pytest.mark.parametrize("field", ["n_layer", "n_embd", "n_positions", "vocab_size"])
def test_sizes_beyond_the_files_are_refused_at_once(field, directory):
    began = time.monotonic()
    for value in (10**7, 2**40, 2**62):
        rewrite_config(directory, **{field: value})
        with pytest.raises(
            ValueError, match=rf"must hold the tensors of the GPT-2 in its config.json, .*{field} {value:,}"
        ):
            GPT2.from_pretrained(directory)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_pipe_or_a_device_is_not_waited_for(directory, name):
    if "index" in name:
        (directory / "model.safetensors").unlink()
    path = directory / name
    for make, got in ((os.mkfifo, "a named pipe"), (lambda path: os.symlink("/dev/zero", path), "a device")):
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(ValueError, match=rf"weights: .*{name} must .*, got {got}; download"):
            GPT2.from_pretrained(directory)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"", b"[1]", b'{"n_layer": 2', b"\xff\xfe"])
def test_a_damaged_config_is_refused(content, directory):
    (directory / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json must hold a JSON object"):
        GPT2.from_pretrained(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("activation_function", "relu"),
        ("activation_function", "gelu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("tie_word_embeddings", False),
        ("n_inner", 31),
        ("n_head", None),
        ("n_head", "2"),
        ("n_layer", True),
        ("n_head", 3),
        ("vocab_size", 0),
    ],
)
def test_a_config_of_another_model_is_refused_by_field(field, value, directory):
    rewrite_config(directory, **{field: value})
    with pytest.raises(ValueError, match=rf"(?=.*{field}).* must be .*, got"):
        GPT2.from_pretrained(directory)
