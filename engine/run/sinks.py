"""Where a run's measurements go besides metrics.jsonl: TensorBoard and Weights & Biases. Neither can stop a run.

A sink that is not installed, does not open or fails once is dropped with one line, and training goes on: the record
of a run is metrics.jsonl, and both can be filled from it again.
"""

import contextlib
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from engine import config
from engine.config import TrainConfig

WANDB_PROJECT = "gpt2"
WANDB_ID_FILE = "wandb_id"
WANDB_FINISH_SECONDS = 60  # to send the rest at the end; without a network it would wait for one for ever
THREAD_SECONDS = 1.0
LONGEST_REASON = 300  # characters


class Sinks:
    """The sinks that a config asks for, as long as they work."""

    def __init__(self, train: TrainConfig, start: int, print0: Callable[[str], None]):
        self._print0 = print0
        self._open: dict[str, TensorBoard | WeightsAndBiases] = {}
        for name, asked, kind in (
            ("tensorboard", train.tensorboard, TensorBoard),
            ("wandb", train.wandb, WeightsAndBiases),
        ):
            if asked:
                try:
                    self._open[name] = kind(train, start, print0)
                except ImportError as error:
                    self._drop(name, f"{error} (pip install {name})")
                except Exception as error:  # whatever it is, it must not cost the run
                    self._drop(name, error)

    def write(self, row: dict[str, float]) -> None:
        """Sends a row of metrics.jsonl to every sink."""
        for name, sink in list(self._open.items()):
            try:
                sink.write(row)
            except Exception as error:
                self._drop(name, error)

    def close(self) -> None:
        """Sends what is still to be sent and closes every sink."""
        while self._open:
            name, sink = self._open.popitem()
            try:
                sink.close()
            except Exception as error:
                self._drop(name, error)

    def _drop(self, name: str, reason: Exception | str) -> None:
        words = " ".join(str(reason).split()) or type(reason).__name__
        self._print0(f"{name}: {words[:LONGEST_REASON]}; going on without it")
        if (sink := self._open.pop(name, None)) is not None:
            with contextlib.suppress(Exception):  # it has failed already
                sink.close()


class TensorBoard:
    """Event files in OUT/tensorboard."""

    def __init__(self, train: TrainConfig, start: int, print0: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        self._excepthook = threading.excepthook
        threading.excepthook = self._hear  # at once: opening already writes
        try:
            self._writer = SummaryWriter(Path(train.out) / "tensorboard", purge_step=start)
        except BaseException:
            threading.excepthook = self._excepthook
            raise

    def write(self, row: dict[str, float]) -> None:
        """Adds a scalar for each measurement."""
        for name, value in row.items():
            if name not in ("step", "tokens"):
                self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Writes what is held and closes the file."""
        try:
            self._writer.close()
        finally:
            for thread in threading.enumerate():
                if _is_tensorboard_s(thread):  # it failed, and is about to say so
                    thread.join(THREAD_SECONDS)
            threading.excepthook = self._excepthook

    def _hear(self, error: threading.ExceptHookArgs) -> None:
        # The thread that writes the file raises there, with a traceback on the terminal, what the next write raises
        # here: that one becomes our one line.
        if not _is_tensorboard_s(error.thread):
            self._excepthook(error)


def _is_tensorboard_s(thread: threading.Thread | None) -> bool:
    return type(thread).__module__.startswith("tensorboard.")


class WeightsAndBiases:
    """A run of the project gpt2, under the run's name. WANDB_MODE=offline keeps it in OUT/wandb.

    OUT/wandb_id holds its id: a run that goes on is the same one there, and --resume never, which sets OUT aside,
    begins another.
    """

    def __init__(self, train: TrainConfig, start: int, print0: Callable[[str], None]):
        import wandb

        path = Path(train.out) / WANDB_ID_FILE
        if not path.exists():
            path.write_text(secrets.token_hex(8) + "\n")
        self._run = wandb.init(
            project=WANDB_PROJECT,
            name=train.name,
            id=path.read_text().strip(),
            resume="allow",
            dir=train.out,
            config=config.to_dict(train),
            settings=wandb.Settings(silent=True, console="off", finish_timeout=WANDB_FINISH_SECONDS),
        )
        self._first = self._run.step  # the rows before it are there, and W&B takes no step twice
        later = f"offline; to send it later: wandb sync {train.out}/wandb/offline-run-*"
        print0(f"wandb: {later if self._run.offline else self._run.url or 'off, as WANDB_MODE says'}")

    def write(self, row: dict[str, float]) -> None:
        """Logs a row under its step."""
        if row["step"] >= self._first:
            self._run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])

    def close(self) -> None:
        """Sends the rest and ends the run: as failed, if an exception is on its way."""
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)
