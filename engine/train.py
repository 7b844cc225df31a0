"""Training, from top to bottom: `gpt2 train PRESET`, or `torchrun engine/train.py PRESET`.

The loop reads in time order. Step s evaluates, samples and saves with the weights that s updates
made, then makes one more update. A last pass evaluates and saves the final weights. What happens
before the loop is in engine/start.py, one update is engine/step.py. Nothing imports this file.
"""

import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__" and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # run as a file: import as from the repository root

from engine import packages

if __name__ == "__main__" and (problem := packages.shadowed()) is not None:  # before anything imports them
    print(problem, file=sys.stderr)
    sys.exit(2)

import torch.distributed as dist

from engine import device, distributed, optim, output, start, system
from engine.config import TrainConfig, parse
from engine.distributed import Ranks
from engine.errors import (
    BAD_INPUT,
    DONE,
    INTERRUPTED,
    STOPPED,
    BadInput,
    Diverged,
    Lost,
    PeerFailed,
    exit_code,
    warn,
)
from engine.health.heartbeat import Heartbeat
from engine.health.stopping import Stop, under_torchrun
from engine.parts import Run
from engine.run import directory, metrics, progress
from engine.step import OUT_OF_TIME, SIGNAL, Numbers, news


def train(config: TrainConfig, ranks: Ranks, stop: Stop) -> str | None:
    """Trains one run to its end, or until it is asked to stop.

    Returns the reason if it stopped early.
    """
    # Outermost the lock of --out, then what writes last and turns an exception into an error message.
    with ExitStack() as held, Heartbeat(config, ranks) as heartbeat:
        stop.on_leave = lambda reason: heartbeat.ends_with("stopped", reason)
        try:
            began = progress.launched() if stop.asked is None else time.monotonic()  # a caller's process may be old
            run = start.build(config, ranks, heartbeat, held, began)
            return None if run is None else loop(config, run, stop)
        except BaseException:
            stop.is_quiet = True  # torchrun may end this rank before it has said what is wrong
            raise


def loop(config: TrainConfig, run: Run, stop: Stop) -> str | None:
    """Makes the run's steps. Returns the reason if it stopped early."""
    ranks, data, record, guard, clock = run.ranks, run.data, run.record, run.update.guard, run.update.clock
    run.update.is_interrupted = stop.is_requested
    stop.last_saved, stop.is_over = run.saver.last_saved, lambda: run.saver.is_closed
    step, stopping, save_due = run.past.step, None, False
    saved, evaluated = step, (-1, None)  # step of the newest save; step and validation loss of the last evaluation
    with run.opened():
        while True:  # one pass more than updates, for the final weights
            is_last = step == config.num_steps
            asks = save_due or stopping is not None or due(step, config.save_every)
            saves = is_last or (step > saved and asks)
            run.trace.step(step)

            compares = config.check_replicas_every is not None and (saves or due(step, config.check_replicas_every))
            if compares and (drift := run.check_replicas()) is not None:
                raise Diverged(f"train: at step {step}: {drift}; nothing of it is saved: the same command goes on")
            if is_last or (due(step, config.eval_every) and stopping is None):
                with run.doing("evaluation", step):
                    evaluated = step, run.evaluate(step)
            if saves:
                with run.doing("checkpoint", step):
                    record.sync(row_is_complete=is_last)
                    run.saver.save(run.state(step, evaluated[1] if evaluated[0] == step else None))
                saved = step
            if is_last:  # done, unless a signal came before the loss was known: the same command evaluates
                stopping = SIGNAL if evaluated[1] is None else None
            if is_last or stopping is not None:
                stopping = stop.source if stopping == SIGNAL else stopping
                run.heartbeat.ends = ("stopped", stopping) if stopping is not None else ("done", "")
                break

            asked = (*stop.flags(run.saver.seconds), run.saver.is_due())
            with run.doing("data", step):
                micro_batches = data.batches.at(step)
            with run.doing("update", step), run.compiling(step, micro_batches[0]):
                lr = optim.learning_rate(step, config)
                numbers = run.update(step, micro_batches, lr, asked)  # on the device
                # Both waits for the GPU belong to the update's time: for the previous update, so that the
                # CPU runs at most one ahead, and for this one at a logged step and where weights are saved next.
                at_once = landmark(step + 1, config) or (ranks.world_size == 1 and stop.is_requested())
                made, stopping, save_due = news(step, numbers, run.mailbox, guard, at_once)
                now = Numbers(*numbers.tolist()) if due(step, config.log_every) else None
            if now is not None and not now.abandoned:
                record.log(step, lr=lr, **metrics.measured(now, clock.read(), config, run.precision, ranks))
            if made > step:
                record.end_step(step)
            step = made
    if stopping is not None:
        what = "saved" if saved == step > 0 else "no update was made, nothing is saved"
        ranks.print0(f"stopped at step {step} of {config.num_steps} by {stopping}: {what}; the same command goes on")
        ranks.print0(f"  {record.duration()}")
        return stopping
    ranks.print0(directory.report(config, data.tokenizer.unit, "done", *evaluated, record.duration()))
    return None


def due(step: int, every: int | None) -> bool:
    """Whether something done every so many steps is done at this one."""
    return every is not None and step % every == 0


def landmark(step: int, config: TrainConfig) -> bool:
    """Whether the weights of this step are evaluated or saved, if nothing else asks for it."""
    return step == config.num_steps or due(step, config.eval_every) or due(step, config.save_every)


def main(args: list[str]) -> int:
    """Exit code: 0 done, 2 bad input, 3 numbers not to be trusted, 4 process lost, 75 stopped early."""
    output.protect("gpt2 train")
    try:
        config = parse(args, "gpt2 train", warn)
        stop = Stop(config.grace_seconds, config.max_minutes)
        with (
            stop,
            device.deterministic(config.deterministic),
            distributed.process_group(config.timeout_minutes) as ranks,
        ):
            stopped_by = train(config, ranks, stop)
    except (BadInput, Diverged, Lost, PeerFailed) as error:
        if not isinstance(error, PeerFailed):
            warn(str(error))
        return distributed.leave(exit_code(error))
    except KeyboardInterrupt:  # before or after the loop, which takes it as a request to stop
        print("\ngpt2 train: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return distributed.leave(INTERRUPTED)
    except Exception as error:
        if (message := system.sentence(error, "gpt2 train")) is not None:
            warn(message)
            return distributed.leave(BAD_INPUT)
        if not dist.is_initialized():
            raise
        traceback.print_exc()
        return distributed.leave(exit_code(error))
    if stopped_by is None or (stopped_by == OUT_OF_TIME and under_torchrun()):
        return distributed.leave(DONE)  # with any other code torchrun --max-restarts would start again, past the limit
    return distributed.leave(STOPPED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
