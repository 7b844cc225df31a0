"""Metrics of a run: metrics.jsonl, samples.txt, MFU, what the console shows, and rows for the sinks.

Row s of metrics.jsonl was measured with the weights after s updates: val_loss, and the loss and
gradient norm of the batch of step s. A row is written when its step ends, once per step. A run that
resumes at step k first drops the rows from k on, since it repeats those steps. No error of a disk
ends a run here: engine/run/repair.py reads what is there, engine/run/appender.py writes.
"""

import math
from pathlib import Path
from typing import Any

from engine import device
from engine.config import TrainConfig
from engine.distributed import Ranks
from engine.health.busy import Busy
from engine.run import console, repair, rows
from engine.run.appender import Appender
from engine.run.curves import Curves
from engine.run.progress import Pace, Past
from engine.run.repair import last_sample as last_sample
from engine.run.rows import METRICS_FILE, SAMPLES_FILE
from engine.run.sinks import Sinks
from engine.step import Numbers
from model.presets import flops_per_token


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
        self.unit, self.pace, self._past = unit, Pace(config, start), Past()
        if not active:
            return
        self._console = console.open_console(config.num_steps, unit, self.pace)
        self._curves, self._busy = Curves(), Busy()
        for name in (METRICS_FILE, SAMPLES_FILE) if start == 0 else ():
            repair.keep_before(self.out / name, self.print0)
        repair.drop_rows_from(self.out / METRICS_FILE, start, self._add, self.print0)
        repair.drop_samples_from(self.out / SAMPLES_FILE, start, self.print0)
        self._rows = Appender(self.out / METRICS_FILE, "row", self.print0)
        self._samples = Appender(self.out / SAMPLES_FILE, "sample", self.print0)
        self._rows.write()  # a disk that fails is said before the first step
        self._sinks = Sinks(config, start, self.print0)

    def log(self, step: int, **fields: float) -> None:
        """Adds fields to the row of `step`. end_step, sync or close writes the row."""
        if "val_loss" in fields:
            self.pace.evaluated()
        if not self.active:
            return
        if self._row is None:
            self._row = {"step": step, "tokens": self.tokens(step)}
        self._row |= {name: value for name, value in fields.items() if value is not None}
        self._console.update(step, fields)
        if (line := self._busy.check(fields)) is not None:
            self.print0(f"step {step}: {line}")

    def progress(self) -> None:
        """Counts a micro-batch, or a batch of an evaluation, and shows what it tells of the time left."""
        self.pace.tick()
        if self.active:
            self._console.tick()

    def duration(self) -> str:
        """How long the run took and how fast it was, in a line."""
        return self.pace.report(self.unit, self._past, self._tokens_before)

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
        self.pace.end_step(step + 1)
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

    def _add(self, row: dict[str, Any]) -> None:
        """Takes a row that an earlier launch wrote."""
        self._curves.add(row)
        self._past.add(row)

    def _write_row(self) -> None:
        row, self._row = self._row, None
        self._curves.add(row)
        self._rows.append(rows.dump(row))
        self._sinks.write(row)


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl, without damaged lines; [] if there is no file."""
    return [row for _, row in rows.read(path) if row is not None] if path.exists() else []
