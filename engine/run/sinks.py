"""Sinks for the rows of metrics.jsonl: TensorBoard and Weights & Biases. Neither can stop a run.

A sink that is not installed, does not open or fails once is dropped with one line, and training
goes on. The record of a run is metrics.jsonl; either sink can be filled from it again.
"""

import contextlib
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from engine import config
from engine.config import TrainConfig
from model.files import read

WANDB_PROJECT = "gpt2"
WANDB_ID_FILE = "wandb_id"
WANDB_FINISH_SECONDS = 60  # most time to send the rest at the end; without a network wandb would wait for ever
THREAD_SECONDS = 1.0  # most time to wait for a writer thread of TensorBoard that has failed
LONGEST_REASON = 300  # characters


class Sinks:
    """The sinks that a config asks for, as long as they work."""

    def __init__(self, train: TrainConfig, start: int, print0: Callable[[str], None]):
        self._print0 = print0
        self._open: dict[str, TensorBoard | WeightsAndBiases] = {}
        for name, is_asked, connect in (
            ("tensorboard", train.tensorboard, lambda: TensorBoard(train.out, start)),
            ("wandb", train.wandb, lambda: WeightsAndBiases(train, print0)),
        ):
            if is_asked:
                try:
                    self._open[name] = connect()
                except ImportError as error:
                    self._drop(name, f"{error} (pip install {name})")
                except Exception as error:  # no error of a sink may end the run
                    self._drop(name, error)

    def write(self, row: dict[str, float]) -> None:
        """Sends a row of metrics.jsonl to every sink, without fields of None."""
        row = {name: value for name, value in row.items() if value is not None}
        for name, sink in list(self._open.items()):
            try:
                sink.write(row)
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """Sends what is left and closes every sink."""
        while self._open:
            name, sink = self._open.popitem()
            try:
                sink.close()
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, reason: Exception | str) -> None:
        one_line = " ".join(str(reason).split()) or type(reason).__name__
        self._print0(f"{name}: {one_line[:LONGEST_REASON]}; going on without it")
        if (sink := self._open.pop(name, None)) is not None:
            with contextlib.suppress(Exception):  # its failure has been printed
                sink.close()


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, out: str | Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self._excepthook = threading.excepthook
        threading.excepthook = self._on_thread_error  # before the writer opens: opening already writes
        try:
            self._writer = SummaryWriter(Path(out) / "tensorboard", purge_step=start)
        except BaseException:
            threading.excepthook = self._excepthook
            raise

    def write(self, row: dict[str, float]) -> None:
        """Adds a scalar for each measurement."""
        for name, value in row.items():
            if name not in ("step", "tokens"):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is buffered and closes the file."""
        try:
            self._writer.close()
        finally:
            for thread in threading.enumerate():
                if _is_tensorboard_thread(thread):  # it failed, and is about to call the hook
                    thread.join(THREAD_SECONDS)
            threading.excepthook = self._excepthook

    def _on_thread_error(self, error: threading.ExceptHookArgs) -> None:
        # TensorBoard's writer thread would print a traceback. The next write raises the same error
        # in this thread, where Sinks turns it into one line.
        if not _is_tensorboard_thread(error.thread):
            self._excepthook(error)


def _is_tensorboard_thread(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")


class WeightsAndBiases:
    """A W&B run in the project gpt2, named as this run. WANDB_MODE=offline keeps it in OUT/wandb.

    OUT/wandb_id holds its id, so a resumed run continues the same W&B run. --resume never sets OUT
    aside and so starts a new one.
    """

    def __init__(self, train: TrainConfig, print0: Callable[[str], None]):
        import wandb

        path = Path(train.out) / WANDB_ID_FILE
        if not path.exists():
            path.write_text(secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=WANDB_PROJECT,
            name=train.name,
            id=read(path, 1 << 10).decode(errors="replace").strip(),
            resume="allow",
            dir=train.out,
            config=config.to_dict(train),
            settings=wandb.Settings(silent=True, console="off", finish_timeout=WANDB_FINISH_SECONDS),
        )
        self._first = self._run.step  # W&B has the rows before it, and accepts no step twice
        offline = f"offline; to send it later: wandb sync {train.out}/wandb/offline-run-*"
        print0(f"wandb: {offline if self._run.offline else self._run.url or 'off, as WANDB_MODE says'}")

    def write(self, row: dict[str, float]) -> None:
        """Logs a row under its step."""
        if row["step"] >= self._first:
            self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        """Sends the rest and ends the W&B run, as failed if an exception is being handled."""
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)
