"""Checkpoints while training goes on: a copy of all tensors in memory, written by a thread.

Training waits for the copy alone. The next save waits for the last one, and so does the end of the run. A disk that
refuses costs one checkpoint and a warning; if it refuses twice in a row, or the last one, the run ends with the
reason. Where the model is sharded every process copies and writes its own part.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from engine import distributed
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.run import checkpoint
from model.gpt2 import GPT2


class Saver:
    """Saves one run's model and optimizer. Every rank calls every method, whether or not it has something to write."""

    def __init__(
        self,
        config: TrainConfig,
        ranks: Ranks,
        raw_model: GPT2,
        optimizer: torch.optim.Optimizer,
        print0: Callable[[str], None],
    ):
        self.config, self.raw_model, self.optimizer, self.print0 = config, raw_model, optimizer, print0
        is_sharded = distributed.is_sharded(raw_model)
        self.writes = is_sharded or ranks.is_first
        # Collectives of the thread must not mix with those of training: a group of their own, on the CPU.
        self.group = dist.new_group(backend="gloo") if is_sharded and ranks.world_size > 1 else None
        self.seconds = 0.0  # that the slowest save took, from the copy to the last flush
        self.last_step: int | None = None  # whose checkpoint is known to be whole
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failures = 0
        self._stager = None

    def save(self, state: dict) -> None:
        """Saves the weights and moments of now, with a state. Raises BadInput if the last two saves failed."""
        self.wait()
        if not self.writes:
            return
        tensors = checkpoint.named_tensors(self.raw_model, self.optimizer)
        if not self.config.async_save:
            self._write(state, tensors)
            self._settle(state["step"])
            return
        self._thread = threading.Thread(target=self._write, args=(state, self._copy(tensors)), name="saver")
        self._thread.start()
        self._step = state["step"]

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Closes it, but only says that the last save failed if the run ends by something worse."""
        try:
            self.close()
        except BadInput as failure:
            if error is None:
                raise
            self.print0(str(failure))

    def close(self) -> None:
        """Waits for the last save. Raises BadInput if it failed."""
        self.wait(is_last=True)

    def wait(self, is_last: bool = False) -> None:
        """Waits for the save under way. Raises BadInput if it is the second in a row that failed, or the last one."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._settle(self._step)
        if self._error is not None and (is_last or self._failures > 1):
            said, self._error = f"{self._sentence()}; the run ends here, {self._known()}", None  # said once
            raise BadInput(said)

    def _copy(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors on the CPU, in memory that is kept from save to save: touching new pages costs more than this."""
        if self._stager is None:
            on_gpu = next(iter(tensors.values())).is_cuda
            self._stager = DefaultStager(
                StagingOptions(
                    use_pinned_memory=on_gpu,
                    use_shared_memory=False,
                    use_async_staging=False,
                    use_non_blocking_copy=on_gpu,
                )
            )
        return self._stager.stage(tensors)

    def _write(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        began = time.perf_counter()
        self._error = None
        try:
            checkpoint.write(self.config.out, state, tensors, self.config.keep_last, self.print0, self.group)
        except Exception as error:  # in a thread of its own, it would end nothing but the thread
            self._error = error
        self.seconds = max(self.seconds, time.perf_counter() - began)

    def _settle(self, step: int) -> None:
        """Takes note of how a save ended. Raises what is not the disk's fault."""
        if self._error is None:
            self.last_step, self._failures = step, 0
            return
        if not isinstance(self._error, OSError):
            error, self._error = self._error, None  # told once: `close` must not say another thing
            raise error
        self._failures += 1
        self.print0(f"{self._sentence()}; training goes on, {self._known()}")

    def _sentence(self) -> str:
        tensors = checkpoint.named_tensors(self.raw_model, self.optimizer).values()
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        try:
            free = f"{shutil.disk_usage(Path(self.config.out)).free / 2**20:,.1f} MiB free"
        except OSError:
            free = "no directory"
        return (
            f"checkpoint: saving must write {needed / 2**20:,.1f} MiB to {self.config.out}, got {free}: {self._error}; "
            "make room there"
        )

    def _known(self) -> str:
        return "nothing is saved yet" if self.last_step is None else f"saved up to step {self.last_step}"
