"""Metrics of a run: metrics.jsonl, samples.txt, console output, MFU, and rows for the sinks.

Row s of metrics.jsonl was measured with the weights after s updates: val_loss, and the loss and
gradient norm of the batch of step s. A row is written when its step ends, once per step. A run that
resumes at step k first drops the rows from k on, since it repeats those steps.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine import device
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.run.sinks import Sinks
from engine.step import Numbers
from model.presets import flops_per_token

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.txt"
SAMPLE_HEADING = re.compile(r"^=== step ([0-9]{1,18}) ===\n", re.MULTILINE)
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
        drop_rows_from(self.out / METRICS_FILE, start)
        drop_samples_from(self.out / SAMPLES_FILE, start)
        self._file = (self.out / METRICS_FILE).open("a", encoding="utf-8")
        self._console = (Bar if sys.stdout.isatty() else Lines)(config.num_steps, start, unit)
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
        """Every row so far, including the one not yet written."""
        return read_rows(self.out / METRICS_FILE) + ([self._row] if self._row is not None else [])

    def sample(self, step: int, text: str) -> None:
        """Appends a sample to samples.txt."""
        if self.active:
            with (self.out / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.write(f"{_sample_heading(step)}{text}\n\n")

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
        """Fsyncs metrics.jsonl; with row_is_complete, first writes this step's row.

        Call it before a checkpoint.
        """
        if not self.active:
            return
        if row_is_complete and self._row is not None:
            self._write_row()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes the last row, and closes the file, the sinks and the console."""
        if not self.active:
            return
        if self._row is not None:
            self._write_row()
        self._file.close()
        self._sinks.close()
        self._console.close()

    def _write_row(self) -> None:
        row, self._row = self._row, None
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON has no NaN
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        self._sinks.write(row)


# ---- Files --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, up to a line that was cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def drop_rows_from(path: Path, step: int) -> None:
    """Keeps only the rows before `step`."""
    if path.exists():
        _replace(path, "".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] < step))


def _sample_heading(step: int) -> str:
    return f"=== step {step} ===\n"


def drop_samples_from(path: Path, step: int) -> None:
    """Keeps only the samples of steps before `step`, read from their headings."""
    if not path.exists():
        return
    lines, is_kept = [], True
    with path.open(encoding="utf-8", newline="\n") as file:  # a sample may contain other line ends, such as \r
        for line in file:
            if heading := SAMPLE_HEADING.fullmatch(line):
                is_kept = int(heading[1]) < step
            if is_kept:
                lines.append(line)
    _replace(path, "".join(lines))


def last_sample(path: Path) -> str:
    """The newest sample of a samples.txt, or "" if there is no file."""
    return SAMPLE_HEADING.split(path.read_text(encoding="utf-8"))[-1].strip("\n") if path.exists() else ""


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
        if "val_loss" in fields:
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
