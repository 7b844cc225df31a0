"""Metrics of a run: metrics.jsonl, samples.txt, console output, MFU, and rows for the sinks.

Row s of metrics.jsonl was measured with the weights after s updates: val_loss, and the loss and
gradient norm of the batch of step s. A row is written when its step ends, once per step. A run that
resumes at step k first drops the rows from k on, since it repeats those steps. No error of a disk
ends a run here: engine/run/repair.py reads what is there, engine/run/appender.py writes.
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import device
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.run import repair, rows
from engine.run.appender import Appender
from engine.run.curves import Curves
from engine.run.repair import last_sample as last_sample
from engine.run.rows import METRICS_FILE, SAMPLES_FILE
from engine.run.sinks import Sinks
from engine.step import Numbers
from model.presets import flops_per_token

PLAIN_EVERY = 5.0  # seconds between lines if the output is not a terminal


def measured(
    numbers: Numbers, times: dict[str, float], config: TrainConfig, precision: str, ranks: Ranks
) -> dict[str, float | None]:
    """Fields of one row of metrics.jsonl.

    times: milliseconds, from Clock.read. A row leaves out fields of None.
    """
    tokens_per_s = 1e3 * config.tokens_per_step / times["step_ms"]
    peak = device.peak_flops(ranks.device, precision)  # FLOP/s of one device, or None
    flops = flops_per_token(config.model, config.sequence_length)
    return {
        "loss": numbers.loss if math.isfinite(numbers.loss) else None,  # JSON has no NaN; the update was skipped
        "grad_norm": numbers.grad_norm if math.isfinite(numbers.grad_norm) else None,
        "skipped": int(numbers.skipped) or None,  # updates skipped so far
        "tokens_per_s": tokens_per_s,
        "mfu": flops * tokens_per_s / (peak * ranks.world_size) if peak else None,
        "peak_gib": device.peak_gib(ranks.device),
        "alloc_retries": device.alloc_retries(ranks.device),
        **times,
    }


class Metrics:
    """Writer of a run's metrics and samples on rank 0; on other ranks every call is a no-op."""

    def __init__(self, config: TrainConfig, start: int, active: bool, unit: str, tokens_before: int | None = None):
        self.config, self.active = config, active
        self._start = start
        self._tokens_before = start * config.tokens_per_step if tokens_before is None else tokens_before
        self.out = Path(config.out)
        self._row: dict[str, Any] | None = None
        self._console = None
        if not active:
            return
        self._console = (Bar if sys.stdout.isatty() else Lines)(config.num_steps, start, unit)
        self._curves = Curves()
        for name in (METRICS_FILE, SAMPLES_FILE) if start == 0 else ():
            repair.keep_before(self.out / name, self.print0)
        repair.drop_rows_from(self.out / METRICS_FILE, start, self._curves.add, self.print0)
        repair.drop_samples_from(self.out / SAMPLES_FILE, start, self.print0)
        self._rows = Appender(self.out / METRICS_FILE, "row", self.print0)
        self._samples = Appender(self.out / SAMPLES_FILE, "sample", self.print0)
        self._rows.write()  # a disk that fails is said before the first step
        self._sinks = Sinks(config, start, self.print0)

    def log(self, step: int, **fields: float) -> None:
        """Adds fields to the row of `step`. end_step, sync or close writes the row."""
        if not self.active:
            return
        if self._row is None:
            self._row = {"step": step, "tokens": self.tokens(step)}
        self._row |= {name: value for name, value in fields.items() if value is not None}
        self._console.update(step, fields)

    def tokens(self, step: int) -> int:
        """Tokens trained on before `step`.

        Steps before a resume may have had another number of tokens.
        """
        return self._tokens_before + (step - self._start) * self.config.tokens_per_step

    def rows(self) -> list[dict]:
        """Rows for `plots.draw`: as many points as a picture can show, and the row not yet written."""
        return self._curves.rows() + ([self._row] if self._row is not None else [])

    def sample(self, step: int, text: str) -> None:
        """Appends a sample to samples.txt."""
        if self.active:
            self._samples.append(f"=== step {step} ===\n{text}\n\n".encode(errors="replace"))

    def print0(self, line: str) -> None:
        """Prints one line without disturbing the progress bar."""
        if self._console is not None:
            self._console.print_line(line)

    def end_step(self, step: int) -> None:
        """Ends `step`: moves the bar and writes the row.

        So the row is in the file before a checkpoint of the next step.
        """
        if not self.active:
            return
        self._console.advance(step + 1)
        if self._row is not None:
            self._write_row()

    def sync(self, row_is_complete: bool) -> None:
        """Waits until the disk has metrics.jsonl; with row_is_complete, first writes this step's row.

        Call it before a checkpoint. That is saved also if rows are missing, and a line says so.
        """
        if not self.active:
            return
        if row_is_complete and self._row is not None:
            self._write_row()
        self._rows.sync()
        if self._samples.waiting:
            self._samples.write()
        if waiting := self._rows.waiting:
            self.print0(f"{METRICS_FILE}: lacks {waiting:,} rows at this checkpoint, which is saved all the same")

    def close(self) -> None:
        """Writes the last row, and closes the files, the sinks and the console."""
        if not self.active:
            return
        if self._row is not None:
            self._write_row()
        self._rows.close()
        self._samples.close()
        self._sinks.close()
        self._console.close()

    def _write_row(self) -> None:
        row, self._row = self._row, None
        self._curves.add(row)
        self._rows.append(rows.dump(row))
        self._sinks.write(row)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without damaged lines; [] if there is no file."""
    return [row for _, row in rows.read(path) if row is not None] if path.exists() else []


# ---- Console ------------------------------------------------------------------------------------------------------


def _format_field(name: str, value: float) -> str:
    forms: dict[str, Callable[[float], str]] = {
        "loss": lambda v: f"loss {v:.3f}",
        "val_loss": lambda v: f"val loss {v:.4f}",
        "lr": lambda v: f"lr {v:.2e}",
        "tokens_per_s": lambda v: f"{v:,.0f} {{unit}}s/s",
        "mfu": lambda v: f"MFU {100 * v:.1f}%",
        "peak_gib": lambda v: f"{v:.2f} GiB",
        "skipped": lambda v: f"{v} skipped",
    }
    return forms[name](value)


SHOWN = ("loss", "val_loss", "lr", "tokens_per_s", "mfu", "peak_gib", "skipped")


class Lines:
    """Console output for pipes and log files: a plain line every few seconds."""

    def __init__(self, num_steps: int, start: int, unit: str):
        self.num_steps, self.start, self.unit = num_steps, start, unit
        self._began = self._printed = time.monotonic()

    def update(self, step: int, fields: dict[str, float]) -> None:
        """Prints the fields: a validation loss always, others at most every PLAIN_EVERY seconds."""
        now = time.monotonic()
        if "val_loss" not in fields and now - self._printed < PLAIN_EVERY:
            return
        self._printed = now
        parts = [
            _format_field(name, fields[name]).format(unit=self.unit) for name in SHOWN if fields.get(name) is not None
        ]
        if (done := step - self.start) > 0 and "loss" in fields:
            left = (now - self._began) / done * (self.num_steps - step)
            parts.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        width = len(str(self.num_steps))
        self.print_line(f"step {step:>{width}}/{self.num_steps}  " + "  ".join(parts))

    def advance(self, step: int) -> None:
        """No-op: plain lines have no bar."""

    def print_line(self, line: str) -> None:
        """Prints a line."""
        print(line, flush=True)

    def close(self) -> None:
        """No-op: there is no bar to stop."""


class Bar:
    """Console output for a terminal: a progress bar, with a line above it per validation loss."""

    def __init__(self, num_steps: int, start: int, unit: str):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.num_steps, self.unit, self._fields = num_steps, unit, {}
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=Console(highlight=False),
        )
        self._task = self._progress.add_task("", total=num_steps, completed=start)
        self._progress.start()

    def update(self, step: int, fields: dict[str, float]) -> None:
        """Shows the newest value of each field."""
        self._fields |= {name: value for name, value in fields.items() if name in SHOWN and value is not None}
        parts = [
            _format_field(name, self._fields[name]).format(unit=self.unit) for name in SHOWN if name in self._fields
        ]
        self._progress.update(self._task, description="  ".join(parts))
        if fields.get("val_loss") is not None:
            self.print_line(f"step {step:>{len(str(self.num_steps))}}  val loss {fields['val_loss']:.4f}")

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step)

    def print_line(self, line: str) -> None:
        """Prints a line above the bar."""
        self._progress.console.print(line, markup=False)

    def close(self) -> None:
        """Stops the bar, and leaves its last state on the terminal."""
        self._progress.stop()
