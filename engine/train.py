"""Training, from top to bottom: `gpt2 train PRESET`, or `torchrun engine/train.py PRESET`.

The loop reads in time order. Step s evaluates, samples and saves with the weights that s updates
made, then makes one more update. A last pass evaluates and saves the final weights. What happens
before the loop is in engine/start.py, one update is engine/step.py. Nothing imports this file.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a file: import as from the repository root

from engine import device, distributed, optim, output, start
from engine.config import TrainConfig, parse
from engine.distributed import Ranks
from engine.errors import (
    BAD_INPUT,
    DIVERGED,
    DONE,
    INTERRUPTED,
    LOST,
    STOPPED,
    BadInput,
    Diverged,
    Lost,
    missing_package,
)
from engine.health.heartbeat import limited
from engine.health.stopping import Stop, under_torchrun
from engine.run import directory, metrics
from engine.step import OUT_OF_TIME, Numbers


def train(config: TrainConfig, ranks: Ranks, stop: Stop) -> str | None:
    """Trains one run to its end, or until it is asked to stop.

    Returns the reason if it stopped early.
    """
    with limited(ranks, config.timeout_minutes):
        run = start.build(config, ranks)
    if run is None:
        return None
    data, record, guard, clock = run.data, run.record, run.update.guard, run.update.clock
    stopping = None  # why the run stops early, once every rank knows
    with run.opened():
        for step in range(run.past.step, config.num_steps + 1):  # one pass more than updates, for the final weights
            is_last, val_loss = step == config.num_steps, None
            saves = step > run.past.step and (is_last or stopping is not None or due(step, config.save_every))
            run.trace.step(step)

            compares = config.check_replicas_every is not None and (saves or due(step, config.check_replicas_every))
            if compares and (drift := run.check_replicas()) is not None:
                raise Diverged(f"train: at step {step}: {drift}; nothing of it is saved: the same command goes on")
            if is_last or (due(step, config.eval_every) and stopping is None):
                with run.doing("evaluation", step):
                    val_loss = run.validation_loss()
                    record.log(step, val_loss=val_loss)
                    record.sample(step, run.sample())
                    if ranks.is_first:
                        run.painter.draw(record.rows())
            if saves:
                with run.doing("checkpoint", step):
                    record.sync(row_is_complete=is_last)
                    run.saver.save(run.state(step, val_loss))
            if is_last or stopping is not None:
                run.heartbeat.ends = ("done", "") if is_last else ("stopped", stopping)
                break

            asked = stop.flags(run.saver.seconds)
            with run.doing("data", step):
                micro_batches = data.batches.at(step)
            with run.doing("update", step), run.compiling(step, micro_batches[0]):
                lr = optim.learning_rate(step, config)
                numbers = run.update(step, micro_batches, lr, asked)  # on the device
                # Both waits for the GPU belong to the update's time: for the previous update, so that
                # the CPU runs at most one ahead, and at a logged step for this one.
                known = run.mailbox.exchange(numbers)
                now = Numbers(*numbers.tolist()) if due(step, config.log_every) else None
            if now is not None:
                record.log(step, lr=lr, **metrics.measured(now, clock.read(), config, run.precision, ranks))
            record.end_step(step)
            if known is not None:
                stopping = guard.verdict(known, step)
    if not is_last:
        ranks.print0(f"stopped at step {step} of {config.num_steps} by {stopping} and saved; the same command goes on")
        return stopping
    ranks.print0(directory.report(config, data.tokenizer.unit, "done"))
    return None


def due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is done at this one."""
    return every is not None and step % every == 0


def main(args: list[str]) -> int:
    """Exit code: 0 done, 2 bad input, 3 numbers not to be trusted, 4 process lost, 75 stopped early."""
    output.protect("gpt2 train")
    try:
        config = parse(args, "gpt2 train")
        stop = Stop(config.grace_seconds, config.max_minutes)
        with (
            stop,
            device.deterministic(config.deterministic),
            distributed.process_group(config.timeout_minutes) as ranks,
        ):
            stopped_by = train(config, ranks, stop)
    except (BadInput, Diverged, Lost) as error:
        print(error, file=sys.stderr, flush=True)
        if isinstance(error, Lost):
            os._exit(LOST)  # a process group with a lost member may never be taken down
        return BAD_INPUT if isinstance(error, BadInput) else DIVERGED
    except ModuleNotFoundError as error:
        if (message := missing_package(error, "gpt2 train")) is None:
            raise
        print(message, file=sys.stderr, flush=True)
        return BAD_INPUT
    except KeyboardInterrupt:  # before or after the loop, which takes it as a request to stop
        print("\ngpt2 train: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return INTERRUPTED
    if stopped_by is None or (stopped_by == OUT_OF_TIME and under_torchrun()):
        return DONE  # with any other code torchrun --max-restarts would start again, past the limit
    return STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
