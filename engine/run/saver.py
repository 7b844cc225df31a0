"""Asynchronous checkpoints: tensors are copied in memory, and a thread writes the copy to the disk.

Training waits only for the copy. The next save, and the end of the run, wait until the thread has
finished. A save that fails is lost, and a warning says so. If two saves in a row fail, or the last
one does, the run ends with the reason. If the model is sharded, every process copies and writes its
own part.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from engine import device, distributed, lock
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.errors import BadInput
from engine.run import checkpoint
from model.gpt2 import GPT2


class Saver:
    """Saves one run's model and optimizer.

    Every rank calls every method, also those that write nothing.
    """

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
        self.is_first, self.writes = ranks.is_first, is_sharded or ranks.is_first
        # The thread's collectives must not mix with training's: they have a group on the CPU.
        self.group = (
            dist.new_group(backend="gloo", timeout=distributed.TIMEOUT) if is_sharded and ranks.world_size > 1 else None
        )
        self.seconds = 0.0  # duration of the slowest save's writing, after the copy, to the last fsync
        self.last_step: int | None = None  # step of the last save that succeeded, or that the run went on from
        self.is_closed = False
        self._asked = time.monotonic()  # when the last save began, or was asked for
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._failures = 0  # in a row
        self._buffers: dict[str, Tensor] = {}  # by name, on the CPU

    def save(self, state: dict) -> None:
        """Saves the current weights and optimizer state, and `state`.

        Raises BadInput if the last two saves failed.
        """
        lock.check_all()
        self._asked = time.monotonic()
        self.wait()
        if not self.writes:
            return
        tensors = checkpoint.named_tensors(self.raw_model, self.optimizer)
        if not self.config.async_save:
            self._write(state, tensors)
            self._record_result(state["step"])
            return
        self._thread = threading.Thread(target=self._write, args=(state, self._copy(tensors)), name="saver")
        self._thread.start()
        self._step = state["step"]

    def is_due(self) -> bool:
        """Whether --save-every-minutes have passed since the last save. True once for each."""
        minutes, moment = self.config.save_every_minutes, time.monotonic()
        if minutes is None or not self.is_first or moment - self._asked < 60 * minutes:
            return False
        self._asked = moment
        return True

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Waits for the last save.

        If another exception ends the run, a failed save is printed, not raised.
        """
        try:
            self.close()
        except BadInput as failure:
            if error is None:
                raise
            self.print0(str(failure))

    def close(self) -> None:
        """Waits for the last save. Raises BadInput if it failed."""
        self.wait(is_last=True)
        self.is_closed = True

    def wait(self, is_last: bool = False) -> None:
        """Waits for the save in progress.

        Raises BadInput after two failures in a row, or if is_last after one.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._record_result(self._step)
        if self._error is not None and (is_last or self._failures > 1):
            message = f"{self._failure_message()}; the run ends here, {self.last_saved()}"
            self._error = None  # raised only once
            raise BadInput(message)

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies the tensors to CPU memory that saves reuse: new pages cost more than the copy.

        Waits for the device. torch's own DefaultStager closes itself after one use in 2.11 and 2.12.
        """
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            part = distributed.local(tensor)
            runs_beside = device.events(part.device) is not None  # else the copy waits
            if name not in self._buffers:
                self._buffers[name] = torch.empty_like(part, device="cpu", pin_memory=runs_beside)
            copy = self._buffers[name].copy_(part, non_blocking=runs_beside)
            # Not DTensor.from_local, which would move the copy back to the mesh's device.
            is_sharded = isinstance(tensor, DTensor)
            copies[name] = DTensor(copy, tensor._spec, requires_grad=False) if is_sharded else copy
        device.synchronize(self.raw_model.wte.weight.device)
        return copies

    def _write(self, state: dict, tensors: dict[str, Tensor]) -> None:
        began = time.perf_counter()
        self._error = None
        try:
            checkpoint.write(self.config.out, state, tensors, self.config.keep_last, self.print0, self.group)
            self.last_step = state["step"]
        except Exception as error:  # raised in the thread, it would not reach the main thread
            self._error = error
        self.seconds = max(self.seconds, time.perf_counter() - began)

    def _record_result(self, step: int) -> None:
        """Records whether a save succeeded. Raises its error unless that is an OSError."""
        if self._error is None:
            self._failures = 0
            return
        if not isinstance(self._error, OSError):
            error, self._error = self._error, None  # raised only once: `close` must not report it again
            raise error
        self._failures += 1
        self.print0(f"{self._failure_message()}; training goes on, {self.last_saved()}")

    def _failure_message(self) -> str:
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

    def last_saved(self) -> str:
        """What can be gone on from, in words; on rank 0, or on every rank where the model is sharded."""
        return "nothing was saved" if self.last_step is None else f"saved up to step {self.last_step}"
