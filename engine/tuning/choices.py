"""What a run runs on: its precision, tuning, micro-batch and ops. engine.start asks, in this order."""

import os
from contextlib import suppress
from dataclasses import replace

import torch

from engine import device
from engine.checks import compiler, selfcheck
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput, warn
from engine.planning import memory
from engine.planning.memory import Place
from engine.run import resume
from engine.tuning import record
from engine.tuning.record import Setup, Tuning
from kernels import tiles
from kernels.dispatch import Ops, select


def precision_and_tuning(config: TrainConfig, ranks: Ranks) -> tuple[Tuning | None, tuple[str, str]]:
    """The tuning to heed, or None, and (precision, why): rank 0's, on every rank.

    The precision is the one that a flag asks for, else that of the run to go on from, else the
    tuning's, else chosen here. A tuning in another precision is ignored, and so is one that the run
    to go on from began without, unless a flag names it. Prints which was read.
    """
    with ranks.fail_together():
        precision = device.choose_precision(config.precision, ranks.device) if config.precision != "auto" else None
        tuning, note = record.find(config, ranks.device) if ranks.is_first else (None, "")
    before = resume.resolved_before(config) if ranks.is_first else None
    if tuning is not None and before is not None and config.tuned == "auto" and before.get("tuned") != tuning.key:
        tuning, note = None, "tuned: ignored, this run began without it or with another; --tuned FILE takes it"
    if ranks.is_first and config.precision == "auto":
        if before is not None and before.get("device") == ranks.device.type and "precision" in before:
            with suppress(BadInput):  # this GPU may be an older one
                precision = device.choose_precision(before["precision"], ranks.device)[0], "as this run began"
        elif tuning is not None:
            precision = tuning.setup.precision, "tuned"
        if precision is None:  # on this rank alone: a CPU is timed, and the ranks of a host would share it
            model = replace(config.model, n_positions=config.sequence_length)
            precision = device.choose_precision("auto", ranks.device, model=model)
    if tuning is not None and tuning.setup.precision != precision[0]:
        tuning, note = None, f"tuned: ignored, it is for {tuning.setup.precision} and this run is in {precision[0]}"
    if os.environ.get("GPT2_AUTOTUNE") == "1":
        note = f"GPT2_AUTOTUNE is now `gpt2 tune`: run it once, and gpt2 train reads what it finds\n{note}".strip()
    if note:
        ranks.print0(note)
    return ranks.broadcast_object((tuning, precision))


def largest_micro_batch(config: TrainConfig, precision: str, ranks: Ranks) -> int:
    """Most sequences per forward pass without --micro-batch-size, the same on every rank.

    On a GPU as many as fit by an estimate; a run that goes on keeps its number if that fits, so
    that its sums keep their order. On a CPU 16.
    """
    if ranks.device.type == "cpu":
        return 16
    is_compiled, _ = compiler.wanted(config.compile, False, ranks)
    place = Place(ranks.world_size, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), is_compiled=is_compiled)
    free_bytes = device.free_bytes(ranks.device)
    fits = min(ranks.gather(memory.largest_micro_batch(config, precision, free_bytes, place)))
    earlier = resume.resolved_before(config) or {}
    return min(fits, ranks.broadcast_object(earlier.get("micro_batch_size", fits)))  # rank 0 alone may see --out


def is_tried(config: TrainConfig, is_new: bool, ranks: Ranks) -> bool:
    """Whether the micro-batch is a choice of largest_micro_batch that may be halved before the first update.

    A run that goes on keeps its size, and the passes of a sharded model need all ranks.
    """
    return ranks.device.type == "cuda" and config.micro_batch_size is None and is_new and config.parallel == "ddp"


def use(tuning: Tuning | None, on: torch.device) -> None:
    """Sets what a tuning has for the whole process: tiles, and malloc and threads of a CPU."""
    tiles.use(tuning.setup.tiles if tuning is not None else {})
    if on.type == "cpu":
        if tuning is None or tuning.setup.malloc_tuned:
            device.tune_malloc()
        if tuning is not None and tuning.setup.threads is not None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(tuning.setup.threads)


def ops(config: TrainConfig, precision: str, ranks: Ranks, tuned: Setup | None) -> Ops:
    """The model's ops. On a GPU those on Triton are checked first, by one rank of each host.

    Raises BadInput on every rank if --kernels asks for what cannot run here or is wrong here.
    """
    model, found = config.model, {}
    tuned_ops = dict(tuned.ops) if tuned is not None else {}
    if config.deterministic and tuned_ops.get("attention") == "cudnn":  # PyTorch refuses it in that mode
        del tuned_ops["attention"]
    inputs = (config.kernels, ranks.device, device.COMPUTE_DTYPES[precision], model.head_dim)
    options = {"dropout_p": model.dropout, "has_documents": config.document_mask, "tuned": tuned_ops}
    try:
        chosen = select(*inputs, **options)
        if ranks.local_rank == 0 and ranks.device.type != "cpu":
            asked = selfcheck.request(config, precision, chosen, ranks.device, tuned.tiles if tuned is not None else {})
            found = selfcheck.failures(asked, warn)
        failed = {op: why for each in ranks.gather(found) for op, why in each.items()}
        return select(*inputs, **options, failed=failed) if failed else chosen
    except ValueError as error:
        raise BadInput(f"train: {error}") from error
