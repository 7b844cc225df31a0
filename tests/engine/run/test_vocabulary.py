"""Weights of others: those of another tokenizer are refused, padded ones are cut, wrapped ones are read."""

import json
import math
import re

import pytest
import safetensors.torch
import torch
import transformers
from runs import run

from engine.config import TrainConfig
from engine.errors import BadInput
from engine.run import export, vocabulary
from engine.tokens import tokenizer as tokenizers
from model.gpt2 import GPT2, GPT2Config

PADDED = 50304


def test_padded_weights_have_transformers_logits_for_every_token_and_are_exported_without_padding(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=PADDED)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    theirs.transformer.wte.weight.data[50257:] += 5.0  # padding whose logits would count, were it not left out
    theirs.save_pretrained(tmp_path / "hf")
    assert run("import", str(tmp_path / "hf"), "--out", str(tmp_path / "run")) == 0
    model, tokenizer, _ = export.load_model(tmp_path / "run")
    assert (tokenizer.name, model.config.vocab_size) == ("gpt2", 50257)
    tokens = torch.randint(50257, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = theirs(tokens).logits
    assert model(tokens).shape == (2, 16, 50257)
    assert (model(tokens) - logits[..., :50257]).abs().max() <= 1e-5 * logits.abs().max()
    with torch.no_grad():
        ours = model(tokens[:, :-1], tokens[:, 1:]).item()
        expected = logits[:, :-1, :50257].log_softmax(-1).gather(2, tokens[:, 1:, None]).mean().neg().item()
    assert math.isclose(ours, expected, rel_tol=1e-5)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert again.config.vocab_size == 50257
    assert torch.equal(again.transformer.wte.weight, theirs.transformer.wte.weight[:50257])


def weights(directory, vocab_size=257):
    torch.manual_seed(0)
    GPT2(GPT2Config(1, 1, 8, 8, vocab_size)).save_pretrained(directory)
    return directory


def test_a_note_says_when_no_tokenizer_lies_beside(tmp_path, capfd):
    weights(tmp_path / "hf")
    model, name = export.released_weights("import", str(tmp_path / "hf"))
    assert (model.config.vocab_size, name) == (257, "bytes")
    assert "are taken to be those of bytes" in capfd.readouterr().out
    export.save_tokenizer(tokenizers.load("bytes"), tmp_path / "hf", 8)
    export.released_weights("import", str(tmp_path / "hf"))
    assert capfd.readouterr().out == ""


def tokenizer_json(vocab: dict, added: list) -> str:
    return json.dumps({"added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}})


BYTES = vocabulary.written("bytes")
TEXT = {token: i for token, i in BYTES.items() if i < 256}
END = {"id": 256, "content": "<|endoftext|>"}
PAD = {"id": 257, "content": "<pad>"}
SHIFTED = {token: (i + 1) % 257 for token, i in BYTES.items()}
SWAPPED = BYTES | {"é": BYTES["ê"], "ê": BYTES["é"]}
NEW = {token: i for token, i in BYTES.items() if i != 7} | {"<mask>": 7}
SAME = {
    "vocab.json": {"vocab.json": json.dumps(BYTES)},
    "tokenizer.json": {"tokenizer.json": tokenizer_json(TEXT, [END])},
    "a token that the weights have no row for": {"tokenizer.json": tokenizer_json(TEXT, [END, PAD])},
    "a class alone": {"tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2TokenizerFast"})},
}
OTHER = {
    "every id is another": ({"vocab.json": json.dumps(SHIFTED)}, "'a' is 97 here and 98 there"),
    "two ids are swapped": ({"vocab.json": json.dumps(SWAPPED)}, f"is {BYTES['é']} here and {BYTES['ê']} there"),
    "a token is another": ({"vocab.json": json.dumps(NEW)}, "is 7 here and no token there"),
    "the end is elsewhere": ({"tokenizer.json": tokenizer_json(TEXT, [END | {"id": 0}])}, "is 256 here and 0 there"),
    "one of two files": (
        SAME["vocab.json"] | {"tokenizer.json": tokenizer_json(SHIFTED, [])},
        "another's in tokenizer.j",
    ),
    "another class": ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "another's, LlamaTokenizer"),
    "SentencePiece": ({"tokenizer.model": ""}, "another's, tokenizer.model"),
    "Unigram": ({"tokenizer.json": '{"model": {"vocab": [["a", 0.5]]}}'}, "a vocabulary of another kind than GPT-2's"),
    "no JSON": ({"vocab.json": "["}, "must be a tokenizer's vocabulary, got no JSON"),
    "ids that are text": ({"vocab.json": '{"a": "b"}'}, "an id that is no integer"),
}


def place(directory, files):
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(content)
    return directory


@pytest.mark.parametrize("case", SAME)
def test_the_same_tokenizer_is_taken_in_every_form(case, tmp_path):
    assert vocabulary.check("import", place(tmp_path / "hf", SAME[case]), "bytes", 257) is None or "class" in case


@pytest.mark.parametrize("case", OTHER)
def test_weights_of_another_tokenizer_are_refused_with_the_ids_of_a_sample(case, tmp_path):
    files, sentence = OTHER[case]
    with pytest.raises(BadInput, match=re.escape(sentence)) as raised:
        vocabulary.check("import", place(tmp_path / "hf", files), "bytes", 257)
    assert len(str(raised.value)) < 400


def test_a_padded_model_s_own_token_among_the_padding_is_left_out_and_named(tmp_path):
    gpt2 = vocabulary.written("gpt2")
    place(tmp_path / "hf", {"vocab.json": json.dumps(gpt2)})
    assert vocabulary.check("import", tmp_path / "hf", "gpt2", PADDED) is None
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(gpt2 | {"<|im_start|>": 50257}))
    assert vocabulary.check("import", tmp_path / "hf", "gpt2", 50257) is None  # no row of its own
    note = vocabulary.check("import", tmp_path / "hf", "gpt2", PADDED)
    assert note == "tokens of its own among the padding are left out: <|im_start|>"
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(gpt2 | {"Ġthe": 50257}))
    with pytest.raises(BadInput, match="' the' is 262 here and 50257 there"):
        vocabulary.check("import", tmp_path / "hf", "gpt2", PADDED)


BESIDE = {
    "a run's checkpoints": "checkpoints/step_1/state.json",
    "metrics": "metrics.jsonl",
    "a manifest": "manifest.json",
    "a numbered shard": "x_train_000000.bin",
    "a text": "a.txt",
}


@pytest.mark.parametrize("what", BESIDE)
def test_weights_are_read_whatever_lies_beside_them(what, tmp_path):
    directory = weights(tmp_path / "hf")
    path = directory / BESIDE[what]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    for read in (
        lambda: export.released_weights("import", str(directory))[0],
        lambda: export.initial_weights(TrainConfig(init_from=str(directory), model=GPT2Config(1, 1, 8, 8, 257)))[0],
    ):
        assert torch.equal(read().wte.weight, GPT2.from_pretrained(directory).wte.weight)
    (directory / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match="must be a complete safetensors file"):  # and not "which is a run"
        export.released_weights("import", str(directory))


def test_import_and_init_from_refuse_another_tokenizer_and_leave_nothing(shards, tmp_path, capfd):
    (weights(tmp_path / "hf") / "vocab.json").write_text(json.dumps(SHIFTED))
    with pytest.raises(BadInput, match=r"^train: --init-from: the weights in .* must be of the tokenizer bytes"):
        export.released_weights("train: --init-from", str(tmp_path / "hf"))
    assert run("import", str(tmp_path / "hf"), "--out", str(tmp_path / "run")) == 2
    assert "import: the weights in" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_of_no_tokenizer_here_is_named_with_those_that_are(tmp_path):
    weights(tmp_path / "hf", vocab_size=65)
    with pytest.raises(BadInput, match=r"50,257 tokens of gpt2 or the 257 tokens of bytes .* 50,304.* got 65 in "):
        export.released_weights("import", str(tmp_path / "hf"))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.transformer."])
def test_names_that_torch_compile_and_ddp_wrote_are_read(prefix, tmp_path):
    expected = GPT2.from_pretrained(weights(tmp_path))
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    wrapped = {prefix + name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(wrapped, tmp_path / "model.safetensors")
    for ours, theirs in zip(GPT2.from_pretrained(tmp_path).parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_names_of_another_wrapper_are_named_in_a_short_sentence(tmp_path):
    tensors = safetensors.torch.load_file(weights(tmp_path) / "model.safetensors")
    safetensors.torch.save_file(
        {f"net.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"got net.transformer.wte.weight; write them without .* 'net.transformer.'"):
        GPT2.from_pretrained(tmp_path)
    safetensors.torch.save_file({f"x.{n}": torch.ones(1) for n in range(300)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"wte.weight is missing; .* and 310 more") as raised:
        GPT2.from_pretrained(tmp_path)
    assert len(str(raised.value)) < 500


def test_nanogpt_s_checkpoint_becomes_a_run_that_samples(tmp_path, capfd):
    model = GPT2(GPT2Config(1, 2, 8, 16, PADDED))
    arguments = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 16, "bias": True, "vocab_size": PADDED}
    tensors = {f"_orig_mod.transformer.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": tensors, "model_args": arguments}, tmp_path / "ckpt.pt")
    assert run("import", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "run")) == 0
    out = capfd.readouterr().out
    for note in ("exact GELU", "no tokenizer lies beside", "the last 47 of 50,304 token rows are padding"):
        assert note in out
    loaded, tokenizer, _ = export.load_model(tmp_path / "run")
    assert tokenizer.name == "gpt2"
    tokens = torch.arange(16)[None]
    assert torch.equal(loaded(tokens), model(tokens)[..., :50257])


def test_a_path_with_a_typo_is_told_from_a_name_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("the network is not reachable")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt-2", "runs/gpt2", "openapi"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(BadInput, match=r"got runs/gtp2, which does not exist; did you mean runs/gpt2\?"):
        export.released_weights("import", "runs/gtp2")
    for name in ("gpt2", "openai/gpt2"):
        with pytest.raises(BadInput, match="the network is not reachable"):
            export.released_weights("import", name)
