"""Memory and disk that ran out or will: telling it from other errors, saying what to do, and counting bytes ahead."""

import math
import os
import re
import shutil
from pathlib import Path

import torch

from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from model.presets import GPT2Config

# How PyTorch says it where the error has no type of its own: its CPU allocator on Linux and on Windows, the CUDA
# runtime, and cuBLAS asking for a workspace.
_SAID = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_REST_OF_A_RUN = 2**20  # bytes left for metrics, samples and pictures
_HEADER = 128  # bytes that safetensors' header has for one tensor, at most
_JSON = 8192  # bytes of state.json and manifest.json


# ---- Memory -------------------------------------------------------------------------------------------------------


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def sentence(error: BaseException, config: TrainConfig, micro_batch_size: int, ranks: Ranks) -> str:
    """What a user can do when a step did not fit, the cheapest first; given an error that is out_of_memory."""
    asked = _request(error)
    got = f"at --micro-batch-size {micro_batch_size}" + (f", asking for {asked} more" if asked else "")
    return f"train: one step must fit into the memory of {_device(ranks)}, got out of memory {got}; " + _advice(
        config, micro_batch_size, ranks
    )


def _advice(config: TrainConfig, micro_batch_size: int, ranks: Ranks) -> str:
    if micro_batch_size > 1:
        sequences = config.tokens_per_step // (config.sequence_length * ranks.world_size)  # of one rank, per step
        smaller = max(size for size in range(1, micro_batch_size) if sequences % size == 0)
        also = " or --recompute block" if config.recompute == "none" else ""
        return f"try --micro-batch-size {smaller} (the batch stays the same, in more micro-batches){also}"
    steps = {"none": ["--recompute attention", "--recompute block"], "attention": ["--recompute block"]}
    left = steps.get(config.recompute, []).copy()
    if config.parallel == "ddp" and ranks.device.type == "cuda":
        left.append(
            "--parallel fsdp over more GPUs" + (" with --optim.name adamw" if config.optim.name == "muon" else "")
        )
    left.append(f"a --context shorter than {config.sequence_length}")
    return f"try {', then '.join(left)} or a smaller preset"


def _request(error: BaseException) -> str | None:
    """The allocation that failed, as PyTorch's message has it."""
    if found := re.search(r"[Tt]ried to allocate (\d[\d.]* [KMG]iB)", str(error)):
        return found[1]
    found = re.search(r"tried to allocate (\d+) bytes", str(error))
    return _size(int(found[1])) if found else None


def _device(ranks: Ranks) -> str:
    if ranks.device.type == "cuda":
        gpu = torch.cuda.get_device_properties(ranks.device)
        return f"{ranks.device}, {gpu.name}, {_size(gpu.total_memory)}"
    try:
        return f"this machine's CPU, {_size(os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'))}"
    except (AttributeError, ValueError):  # not Linux
        return "this machine's CPU"


def retries(device: torch.device) -> int | None:
    """How often the GPU's allocator had to give cached memory back to find room, which is slow; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.memory_stats(device).get("num_alloc_retries", 0)  # empty before the first allocation


# ---- Disk ---------------------------------------------------------------------------------------------------------


def checkpoint_bytes(model: GPT2Config, optimizer: str | None) -> int:
    """The size of a checkpoint on the disk, to a fraction of a percent: float32 weights and what the optimizer keeps.

    AdamW keeps two moments of each parameter, Muon one of each matrix of a block and AdamW's of the rest; None keeps
    nothing, as for imported weights.
    """
    C, L = model.n_embd, model.n_layer
    matrices = 12 * C * C * L  # c_attn 3, the projection 1, c_fc 4, the MLP's projection 4
    vectors = (13 * L + 2) * C  # of a block: biases 3 + 1 + 4 + 1, two LayerNorms 4; the last LayerNorm
    embeddings = (model.padded_vocab_size + model.n_positions) * C
    parameters, tensors = matrices + vectors + embeddings, 12 * L + 4
    if optimizer == "adamw":
        moments, kept = 2 * parameters, 3 * tensors  # each with its number of updates, a float32
    elif optimizer == "muon":
        moments, kept = 2 * (parameters - matrices) + matrices, 3 * (tensors - 4 * L) + 4 * L
    else:
        moments, kept = 0, 0
    return 4 * (parameters + moments + kept) + _HEADER * (tensors + kept) + _JSON


def check_disk(config: TrainConfig) -> None:
    """Raises BadInput unless --out's disk has room for all checkpoints that will exist at one time.

    These are keep_last, the one with the lowest validation loss, and the one being written; no more than the run
    saves. Those that are there already count as room. Call it on one rank when something is left to train, after an
    old run was set aside.
    """
    each = checkpoint_bytes(config.model, config.optim.name)
    saves = 1 if config.save_every is None else math.ceil(config.num_steps / config.save_every)
    count = min(config.keep_last + 2, saves)
    there = _bytes_under(Path(config.out) / "checkpoints")
    needed = max(each * count - there, each) + _REST_OF_A_RUN  # one is written before any is deleted
    free = shutil.disk_usage(_existing(Path(config.out))).free
    if free < needed:
        most = (free - _REST_OF_A_RUN + there) // each - 2
        lower = f"lower --keep-last to {most}, " if 1 <= most < config.keep_last else ""
        raise BadInput(
            f"train: the disk of --out {config.out} must have {_size(needed)} free, for {count} checkpoint"
            f"{'s' if count > 1 else ''} of {_size(each)}{f' less the {_size(there)} there' if there else ''}, got "
            f"{_size(free)}; {lower}make room there or choose another --out"
        )


def _existing(path: Path) -> Path:
    """The nearest of path and its parents that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _bytes_under(directory: Path) -> int:
    return sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.1f} KiB"
