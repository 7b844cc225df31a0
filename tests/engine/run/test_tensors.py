"""What a checkpoint's files must hold, also where the digests fit: nothing else is loaded, or built in memory."""

import json
import os
import time
from pathlib import Path

import pytest
import runs
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from engine.errors import BadInput
from engine.run import checkpoint, resume, tensors
from engine.run.verify import checkpoint_damage
from engine.step import Guard
from engine.tokens.shards import sha256
from model.presets import GPT2Config

MODEL = {"n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": 4, "vocab_size": 5}


def fit_digests(saved: Path) -> None:
    """Writes the manifest anew, as for files that were written so."""
    names = [str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()]
    files = {name: {"bytes": (saved / name).stat().st_size, "sha256": sha256(saved / name)} for name in names}
    files.pop("manifest.json", None)
    (saved / "manifest.json").write_text(json.dumps({"version": 1, "files": files}))


@pytest.fixture
def single(tmp_path) -> Path:
    return runs.save_filled(tmp_path, 3)


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The checkpoint of `runs.save_filled`, as a sharded model's."""
    saved = checkpoint.read(runs.save_filled(tmp_path / "one", 3))
    model = nn.Linear(3, 2)
    checkpoint.load_weights(saved, model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.load_optimizer(saved, model, optimizer)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        named = checkpoint.named_tensors(model, optimizer)
        return checkpoint.write(tmp_path / "two", saved.state, named, 9, print, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def load(saved: Path) -> None:
    assert runs.load_filled(checkpoint.read(saved)) == 3


def rewrite(path: Path, change) -> None:
    """Changes the header of a safetensors file, and the digests to fit."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    folder = path.parent
    fit_digests(folder.parent if folder.name == "sharded" else folder)


def weights_of(saved: Path) -> tuple[Path, str]:
    """The file of a checkpoint with the weights, and the name of one of them there."""
    if (saved / "sharded").is_dir():
        return next((saved / "sharded").iterdir()), "model.weight"
    return saved / "model.safetensors", "weight"


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_tensors_of_another_dtype_or_shape_are_refused_although_the_digest_fits(kind, request):
    saved = request.getfixturevalue(kind)
    load(saved)
    path, name = weights_of(saved)
    for change, got in (
        (lambda header: header[name].update(dtype="I32"), "weight differs: it must be F32 [2, 3], got I32 [2, 3]"),
        (lambda header: header[name].update(dtype="F32", shape=[3, 2]), "must be F32 [2, 3], got F32 [3, 2]"),
    ):
        rewrite(path, change)
        with pytest.raises(BadInput) as raised:
            load(saved)
        assert got in str(raised.value)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_damaged_header_is_a_sentence_although_the_digest_fits(kind, request):
    saved = request.getfixturevalue(kind)
    path, _ = weights_of(saved)
    whole = path.read_bytes()
    for content in (b"", b"\xff" * 8 + whole[8:], whole[:8] + b"[" * 100 + whole[108:], whole[:-1], bytes(9)):
        path.write_bytes(content)
        fit_digests(saved)
        with pytest.raises(BadInput, match=r"checkpoint: .* must hold safetensors, got "):
            load(saved)


@pytest.mark.parametrize(
    "info",
    ["[" * 100_000, "{}", "[]", "null", '{"model.weight": {"saved_offsets": [1, 0]}}', '{"model.weight": 3}', "x"],
    ids=lambda info: info[:12],
)
def test_shards_whose_offsets_make_up_no_tensor_are_refused(sharded, info):
    path, _ = weights_of(sharded)
    rewrite(path, lambda header: header["__metadata__"].update(DCP_SHARDING_INFO=info))
    with pytest.raises(BadInput, match=r"checkpoint: .* must hold safetensors, got "):
        load(sharded)


def test_parts_of_a_tensor_must_follow_each_other():
    rows = [([0, 0], tensors.Saved((2, 3), "F32")), ([2, 0], tensors.Saved((1, 3), "F32"))]
    assert tensors._joined("w", rows[::-1]) == tensors.Saved((3, 3), "F32")
    assert tensors._joined("w", [*rows, ([3, 0], tensors.Saved((0, 3), "F32"))]).shape == (3, 3)
    for at, shape in (([1, 0], (1, 3)), ([3, 0], (1, 3)), ([2, 1], (1, 3)), ([2, 0], (1, 2)), ([2], (1, 3))):
        with pytest.raises(ValueError, match="parts of w that do not make up a tensor"):
            tensors._joined("w", [rows[0], (at, tensors.Saved(shape, "F32"))])


def test_sizes_that_the_files_do_not_hold_are_refused_before_a_model_of_them_is_built(tmp_path):
    named = {name: torch.zeros(shape) for name, shape in tensors.parameter_shapes(GPT2Config(**MODEL)).items()}
    save_file(named, tmp_path / "model.safetensors")
    tensors.check_sizes(tmp_path, GPT2Config(**MODEL))
    began = time.monotonic()
    for change in (
        {"n_layer": 10**7},
        {"n_layer": 2},
        {"n_embd": 2**40},
        {"n_positions": 2**40},
        {"vocab_size": 2**40},
    ):
        with pytest.raises(BadInput, match=r"checkpoint: .* must "):
            tensors.check_sizes(tmp_path, GPT2Config(**MODEL | change))
    assert time.monotonic() - began < 2


# ---- State --------------------------------------------------------------------------------------------------------

IDENTITY = {"model": MODEL, "sequence_length": 4, "tokenizer": "bytes"}


@pytest.mark.parametrize(
    "change",
    [
        *({"step": value} for value in (None, "3", 3.0, -1, True, 2**63)),
        *({"tokens": value} for value in (None, -1, [])),
        *({"val_loss": value} for value in ("x", [], True)),
        *({"trained_positions": value} for value in (0, "4")),
        *({"identity": value} for value in (None, [], {}, IDENTITY | {"model": {}, "tokenizer": 3})),
        *({"identity": IDENTITY | {"model": MODEL | sizes}} for sizes in ({"n_head": 3}, {"n_embd": 4.0}, {"init": 1})),
        {"identity": IDENTITY | {"sequence_length": 0}},
        {"config": []},
        {"guard": {}},
        {"scaler": []},
    ],
    ids=str,
)
def test_a_state_with_a_mistyped_field_is_damage_although_its_digest_fits(single, change):
    path = single / "state.json"
    path.write_text(json.dumps({"step": 3, "tokens": 1, "identity": IDENTITY} | change))
    fit_digests(single)
    assert checkpoint_damage(single).startswith("state.json must be the state of a run, got ")
    with pytest.raises(BadInput, match=r"state\.json must be the state of a run"):
        checkpoint.read(single)


def test_a_state_without_a_field_is_refused_where_that_is_used(single):
    load(single)  # whose state has a step and no more
    with pytest.raises(BadInput, match="must hold the state of a run, got none with identity; use an older one"):
        checkpoint.read(single).model_config()


@pytest.mark.parametrize("state", [{"guard": [1.0]}, {"guard": ["x"] * 99}, {"scaler": {"scale": "x"}}], ids=str)
def test_a_guard_or_a_loss_scale_of_no_run_is_a_sentence(single, state):
    saved = checkpoint.Checkpoint(single, {"step": 3} | state)
    scaler, guard = torch.amp.GradScaler("cpu", enabled=True), Guard(torch.device("cpu"), 3, None)
    with pytest.raises(BadInput, match="must hold the loss scale and the guard of a run, got "):
        resume.restore_counts(saved, scaler, guard)


def test_a_file_of_tensors_that_the_manifest_does_not_list_is_damage(single):
    manifest = json.loads((single / "manifest.json").read_text())
    del manifest["files"]["optimizer.safetensors"]
    (single / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint_damage(single) == "manifest.json must list optimizer.safetensors"


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "\0", "x" * 300])
def test_a_manifest_that_names_no_file_of_its_directory_is_damage(single, name):
    manifest = json.loads((single / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": ""}
    (single / "manifest.json").write_text(json.dumps(manifest))
    assert "must" in checkpoint_damage(single)


def test_weights_that_are_whole_are_read_as_they_are(single):
    assert (load_file(single / "model.safetensors")["weight"] == 3).all()
    os.rename(single, single.with_name("aside"))
    load(single.with_name("aside"))
