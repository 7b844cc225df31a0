"""Which updates are made: none with a loss or gradient that is not finite, none after a spike if asked.

All of it is arithmetic on the device. Every rank judges the same two numbers, the mean loss and the norm of the whole
gradient, and so skips together; the fused optimizer takes the verdict as its `found_inf` and leaves weights, moments
and step count alone. The host learns of it with the numbers that it logs, and never waits for a verdict.
"""

import torch
from torch import Tensor

from engine.config import TrainConfig
from engine.errors import Diverged

SIGNAL, OUT_OF_TIME = "a signal", "--max-minutes"  # why a run stops early
WINDOW = 100  # updates over which the loss is averaged, and that must be made before a spike is one
MEAN, VARIANCE, COUNT, SKIPPED, STREAK = range(5)


class Mailbox:
    """Numbers of the device, read on the host one step after they were sent, when they have long arrived.

    Every rank reads the same step's numbers at the same step, whatever its device was doing.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, torch.cuda.Event | None] | None = None

    def exchange(self, numbers: Tensor) -> list[float] | None:
        """Sends this step's numbers and returns the last step's, or None at first."""
        before = self._sent
        if numbers.is_cuda:
            copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            copy.copy_(numbers, non_blocking=True)
            arrival = torch.cuda.Event()
            arrival.record()
            self._sent = copy, arrival
        else:
            self._sent = numbers, None
        if before is None:
            return None
        if before[1] is not None:
            before[1].synchronize()  # of the step before this one: this one's work is queued behind it
        return before[0].numpy().tolist()


class Guard:
    """The judge of one run. Its five numbers travel with the checkpoints, so that a resumed run judges alike."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.max_skipped, self.z_score = config.max_skipped, config.skip_z_score
        self.state = torch.zeros(5, dtype=torch.float64, device=device)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """1.0 if this update must be skipped, else 0.0: a float32 scalar on the device, not waited for."""
        mean, variance, count, skipped, streak = self.state
        loss = loss.double()
        skip = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self.z_score is not None:
            skip |= (count >= WINDOW) & (loss > mean + self.z_score * variance.sqrt())
        weight = 1.0 / (count + 1).clamp(max=WINDOW)  # a mean of all at first, then of about the last WINDOW
        delta = loss - mean
        made = torch.stack([mean + weight * delta, (1 - weight) * (variance + weight * delta**2), count + 1])
        made = torch.where(skip, self.state[:SKIPPED], made)  # a skipped loss says nothing of what is usual
        self.state = torch.cat([made, torch.stack([skipped + skip, (streak + 1) * skip])])
        return skip.float()

    def counts(self) -> Tensor:
        """Updates skipped in all, and in a row up to the last one: (2,) float64 on the device."""
        return self.state[SKIPPED:]

    def verdict(self, numbers: list[float], step: int) -> str | None:
        """Why the run must stop, or None, by the numbers of a train_step that ended before `step`.

        Raises Diverged once so many updates in a row were skipped that more of them will not help.
        """
        _, _, signalled, out_of_time, _, streak = numbers
        if streak >= self.max_skipped:
            raise Diverged(
                f"train: loss and gradient must be finite, got {int(streak)} updates in a row that were not, or "
                f"spiked, up to step {step}; no checkpoint holds them: run again with a lower --optim.lr, or with "
                "--precision bf16 or fp32 in place of fp16"
            )
        return SIGNAL if signalled else OUT_OF_TIME if out_of_time else None

    def state_dict(self) -> list[float]:
        """The numbers as JSON holds them, exactly. Waits for the device."""
        return self.state.tolist()

    def load_state_dict(self, state: list[float]) -> None:
        """Takes a checkpoint's numbers."""
        self.state = torch.tensor(state, dtype=torch.float64, device=self.state.device)
