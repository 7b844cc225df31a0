"""Tensors of a checkpoint: their names, shapes and dtypes are compared before a byte of them is loaded.

A file may be another than the manifest says, and a manifest may be made for a damaged file. So nothing
in a header is believed: sizes of a model are those of the tensors, or the model is not built.
"""

import math
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from engine.errors import BadInput
from engine.run.verify import SHARDED
from model.files import BadFile, check_fields, parse_json
from model.presets import GPT2Config, parameter_shapes
from model.pretrained import open_tensors

DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
OFFSETS = "DCP_SHARDING_INFO"  # in the header of a shard: where its part of each tensor begins


class Saved(NamedTuple):
    """Shape and dtype of a saved tensor, as safetensors writes them."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def saved_tensors(path: Path, prefix: str) -> dict[str, Saved]:
    """Every tensor of the checkpoint at `path` whose name begins with "model." or "optimizer.".

    Raises BadInput if a file is no safetensors file, or shards do not make up whole tensors.
    """
    try:
        found = _in_shards(path / SHARDED) if (path / SHARDED).is_dir() else _in_file(path, prefix)
    except Exception as error:  # safetensors raises many types; the digest fits, but it was never such a file
        raise BadInput(f"checkpoint: {path} must hold safetensors, got {prefix}safetensors: {error}") from error
    return {name: each for name, each in found.items() if name.startswith(prefix)}


def _in_file(path: Path, prefix: str) -> dict[str, Saved]:
    with open_tensors(path / f"{prefix}safetensors") as file:
        slices = {prefix + name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (file is no dict)
        return {name: Saved(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def _in_shards(folder: Path) -> dict[str, Saved]:
    pieces: dict[str, list[tuple[list[int], Saved]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path) as file:
            text = (file.metadata() or {}).get(OFFSETS)
            offsets = None if text is None else check_fields(parse_json(text), {})
            for name in file.keys():  # noqa: SIM118 (file is no dict)
                part = file.get_slice(name)
                piece = Saved(tuple(part.get_shape()), part.get_dtype())
                at = [0] * len(piece.shape)
                if offsets is not None:
                    at = check_fields(check_fields(offsets, {name: dict})[name], {"saved_offsets": list[int]})
                    at = at["saved_offsets"]
                pieces.setdefault(name, []).append((at, piece))
    return {name: _joined(name, parts) for name, parts in pieces.items()}


def _joined(name: str, parts: list[tuple[list[int], Saved]]) -> Saved:
    """The whole tensor of parts that follow each other along its first axis. Raises BadFile for others."""
    (_, first), *_ = parts
    rows = 0
    for at, part in sorted(parts, key=lambda each: each[0]):
        if not math.prod(part.shape) and len(parts) > 1:  # of a process that has no rows
            continue
        same = part.shape[1:] == first.shape[1:] and part.dtype == first.dtype
        if not same or at != [rows, *[0] * (len(part.shape) - 1)][: len(part.shape)]:
            raise BadFile(f"parts of {name} that do not make up a tensor")
        rows += part.shape[0] if part.shape else 1
    return Saved((rows, *first.shape[1:]) if first.shape else (), first.dtype)


def check(path: Path, found: dict[str, Saved], wanted: dict[str, Saved], prefix: str, what: str) -> None:
    """Raises BadInput, naming the first tensor that is missing, unknown, or of another shape or dtype."""
    wrong = sorted(set(found) ^ set(wanted)) or [name for name in wanted if found[name] != wanted[name]]
    if wrong:
        name, missing = wrong[0], "none"
        raise BadInput(
            f"checkpoint: {path} must hold this model's {what}, but {name.removeprefix(prefix)} differs: it must be "
            f"{wanted.get(name, missing)}, got {found.get(name, missing)}"
        )


def check_sizes(path: Path, config: GPT2Config) -> None:
    """Raises BadInput unless a checkpoint's weights are those of a model of these sizes, which is not built.

    Their number is compared first: sizes that a damaged file asks for may be beyond any memory.
    """
    found = saved_tensors(path, "model.")
    per_block, others = 12, 4
    if len(found) != per_block * config.n_layer + others:
        raise BadInput(
            f"checkpoint: {path} must hold the {per_block * config.n_layer + others:,} tensors of a model of "
            f"{config.n_layer:,} blocks, got {len(found):,}; use an older one"
        )
    wanted = {f"model.{name}": Saved(shape, "F32") for name, shape in parameter_shapes(config).items()}
    check(path, found, wanted, "model.", "parameters")


def fill(path: Path, targets: dict[str, Tensor], prefix: str, what: str) -> None:
    """Copies the saved tensors whose names begin with `prefix` into targets, by name.

    what: "parameters" or "optimizer's state", for the error message. Raises BadInput if names, shapes
    or dtypes differ. Of sharded targets all processes call this.
    """
    wanted = {name: Saved(tuple(t.shape), DTYPES.get(t.dtype, str(t.dtype))) for name, t in targets.items()}
    check(path, saved_tensors(path, prefix), wanted, prefix, what)
    if (path / SHARDED).is_dir():
        _load_shards(path, targets)
        return
    with open_tensors(path / f"{prefix}safetensors") as file:
        for name, target in targets.items():
            saved = file.get_tensor(name.removeprefix(prefix))
            if isinstance(target, DTensor):  # each process reads the whole tensor and keeps its shard
                saved = distribute_tensor(
                    saved.to(target.device), target.device_mesh, target.placements, src_data_rank=None
                )
            target.copy_(saved)


def _load_shards(path: Path, targets: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    is_alone = not any(isinstance(target, DTensor) for target in targets.values())
    reader = HuggingFaceStorageReader(str(path / SHARDED))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns if there is no process group
            dcp.load(dict(targets), storage_reader=reader, no_dist=is_alone)
    except dcp.api.CheckpointException as error:  # of every process, with the error of the one that failed
        failure = next(iter(error.failures.values()))[0]
        raise BadInput(f"checkpoint: {path} must hold shards that can be loaded, got {failure}") from error
