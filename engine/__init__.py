"""Training: data, optimisation, checkpoints, and the command line.

`run_training` trains from a program, as `gpt2 train` does from a shell.
"""

import threading
from typing import TYPE_CHECKING

from engine import packages

if TYPE_CHECKING:
    from engine.config import TrainConfig

__all__ = ["run_training"]

packages.come_first()

_training = threading.Lock()


def run_training(config: "TrainConfig", stop: threading.Event | None = None) -> str | None:
    """Trains one run in this process to its end, in any thread; a run that is there goes on.

        config = dataclasses.replace(engine.config.PRESETS["tiny"], data="data/mine", num_steps=100)
        engine.run_training(config)

    stop: set it, from another thread or a signal handler, and the run saves and returns. Returns
    None once all steps are done, else why it stopped early: "its caller" or "--max-minutes".
    The function touches no signal handler. It puts back PyTorch's random state, thread count and
    modes, which belong to the whole process: while it runs no other thread should rely on them.
    The model is freed before it returns. A caller's no_grad or inference_mode does not reach it.

    Raises BadInput (engine.errors) if config, data or machine cannot be used, or if another run
    trains in this process, or it has a process group; Diverged if losses or gradients are not
    finite. Several processes are torchrun's: `torchrun engine/train.py`.
    """
    import gc
    import os
    import runpy

    import torch
    import torch.distributed as dist

    from engine import device, distributed
    from engine.errors import BadInput
    from engine.health.stopping import Stop

    if wrong := config.problems():
        raise BadInput("train: " + "\n  ".join(wrong))
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise BadInput(f"train: run_training must have one process, got WORLD_SIZE={processes}; use engine/train.py")
    if not _training.acquire(blocking=False):
        raise BadInput("train: a process must train one run at a time, got a second call of run_training; wait for it")
    try:
        if dist.is_initialized():
            raise BadInput(
                "train: run_training must begin without a process group, got one that this process has made; call "
                "torch.distributed.destroy_process_group() first"
            )
        train = runpy.run_module("engine.train")["train"]  # a program of its own, which nothing imports
        listening = Stop(config.grace_seconds, config.max_minutes, stop or threading.Event())
        with (
            device.modes_kept(),
            device.deterministic(config.deterministic),
            listening,
            torch.inference_mode(False),
            torch.enable_grad(),
            distributed.process_group(config.timeout_minutes) as ranks,
        ):
            stopped_by = train(config, ranks, listening)
        gc.collect()  # a run's parts refer to each other
        device.forget_memory(ranks.device)
        return stopped_by
    finally:
        _training.release()
