"""One update of the weights, and the guard that decides whether it is made.

    loss = mean over all micro-batches of all ranks;  g = its gradient;  clip g to a norm;  AdamW or Muon

The guard skips an update whose loss or gradient norm is not finite, and on request one whose loss
spikes. All of it runs on the device. Every rank judges the same two numbers, the mean loss and the
norm of the whole gradient, so all ranks skip together. The fused optimizer takes the verdict as its
`found_inf` and leaves weights, moments and step count alone. The host reads the verdict one step
later, together with the other numbers, and never waits for it.

A request to stop that comes between two micro-batches abandons the update: the rest of it would be
lost anyway if the process is killed before its end. Nothing of it stays, and a resume makes it anew.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import device, distributed, optim
from engine.distributed import Ranks
from engine.errors import Diverged
from engine.health.failures import out_of_memory
from engine.health.timing import Clock, phase
from engine.tokens.batches import derived_seed
from model.gpt2 import cast_once

SIGNAL, OUT_OF_TIME = "a signal", "--max-minutes"  # why a run stops early
WINDOW = 100  # updates in the running mean of the loss; as many must be made before a loss can be a spike
SKIPPED = 3  # index in Guard.state of the first of its two counts
FLAGS = 4  # in Numbers after loss and norm: ranks that say so


class Numbers(NamedTuple):
    """What one update tells the host.

    On the device it is one (8,) tensor, float64 where it has that, equal on all ranks.
    """

    loss: float  # mean over the global batch, nats per token
    grad_norm: float  # of the whole gradient, before clipping
    signalled: float  # ranks that have received a signal
    out_of_time: float  # ranks that are out of time
    save_due: float  # ranks (rank 0 alone asks) that want a save: see --save-every-minutes
    abandoned: float  # ranks that abandoned this update: it is not made
    skipped: float  # updates skipped in all, this one included
    streak: float  # updates skipped in a row, up to this one


class Mailbox:
    """Carries Numbers from the device to the host one step late, when the copy has long arrived.

    Every rank reads the numbers of the same step at the same step, so all ranks act on them
    together.
    """

    def __init__(self) -> None:
        self._sent: tuple[Tensor, torch.Event | None] | None = None

    def exchange(self, numbers: Tensor) -> Numbers | None:
        """Sends this step's numbers and returns those of the step before, or None the first time."""
        before = self._sent
        if (event := device.events(numbers.device)) is not None:
            copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            copy.copy_(numbers, non_blocking=True)
            arrival = event()
            arrival.record()
            self._sent = copy, arrival
        else:
            self._sent = numbers.cpu(), None
        return _received(before)

    def collect(self) -> Numbers | None:
        """Returns the numbers sent last, which it waits for, and keeps none."""
        sent, self._sent = self._sent, None
        return _received(sent)


def _received(sent: tuple[Tensor, torch.Event | None] | None) -> Numbers | None:
    if sent is None:
        return None
    numbers, arrival = sent
    if arrival is not None:
        arrival.synchronize()
    return Numbers(*numbers.numpy().tolist())


class Guard:
    """Decides which updates are made. Its state is saved with the checkpoints, so a resumed run
    decides alike.

    state: (5,) on the device, float64 where it has that: running mean and variance of the loss, updates made, skipped,
    skipped in a row.
    """

    def __init__(self, on: torch.device, max_skipped: int = 20, skip_z_score: float | None = None):
        self.max_skipped, self.skip_z_score = max_skipped, skip_z_score
        self.state = torch.zeros(5, dtype=device.widest(on), device=on)

    def judge(self, loss: Tensor, grad_norm: Tensor, is_abandoned: Tensor | None = None) -> Tensor:
        """Whether to skip this update: 1.0 or 0.0, a float32 scalar on the device.

        is_abandoned: scalar bool; such an update is not made and not counted. Does not wait for the
        device.
        """
        before = self.state
        mean, variance, count, skipped, streak = self.state
        loss = loss.to(self.state.dtype)
        skip = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self.skip_z_score is not None:
            skip |= (count >= WINDOW) & (loss > mean + self.skip_z_score * variance.sqrt())
        weight = 1.0 / (count + 1).clamp(max=WINDOW)  # plain mean at first, then over about the last WINDOW
        delta = loss - mean
        made = torch.stack([mean + weight * delta, (1 - weight) * (variance + weight * delta**2), count + 1])
        made = torch.where(skip, self.state[:SKIPPED], made)  # a skipped loss must not move the mean
        self.state = torch.cat([made, torch.stack([skipped + skip, (streak + 1) * skip])])
        if is_abandoned is None:
            return skip.float()
        self.state = torch.where(is_abandoned, before, self.state)
        return (skip | is_abandoned).float()

    def counts(self) -> Tensor:
        """Updates skipped in all, and in a row up to the last one: (2,) on the device."""
        return self.state[SKIPPED:]

    def verdict(self, numbers: Numbers, step: int) -> str | None:
        """Why the run must stop, or None, given the numbers of an update before `step`.

        Raises Diverged after max_skipped skipped updates in a row: more of them will not help.
        """
        if numbers.streak >= self.max_skipped:
            raise Diverged(
                f"train: loss and gradient must be finite, got {int(numbers.streak)} updates in a row that were not, "
                f"or spiked, up to step {step}; no checkpoint holds them: run again with a lower --optim.lr, or with "
                "--precision bf16 or fp32 in place of fp16"
            )
        return SIGNAL if numbers.signalled else OUT_OF_TIME if numbers.out_of_time else None

    def state_dict(self) -> list[float]:
        """The state as JSON holds it, exactly. Waits for the device."""
        return self.state.tolist()

    def load_state_dict(self, state: list[float]) -> None:
        """Takes the state of a checkpoint."""
        self.state = torch.tensor(state, dtype=self.state.dtype, device=self.state.device)


class News(NamedTuple):
    """What the host knows after an update, the same on every rank."""

    step: int  # updates made
    stopping: str | None  # why the run stops early, or None
    save_due: bool  # whether --save-every-minutes have passed


def news(step: int, numbers: Tensor, mailbox: Mailbox, guard: Guard, at_once: bool) -> News:
    """Sends the numbers of update `step`, and returns what is known now.

    That is what the update before told. Where weights are to be saved next, their last update may
    have been abandoned, so its own numbers are read too, which waits for the device. at_once: read
    them in any case; the same on every rank. Raises Diverged as Guard.verdict does.
    """
    read = [(step - 1, mailbox.exchange(numbers))]
    before = read[0][1]
    if at_once or (before is not None and any(before[2:][:FLAGS])):
        read.append((step, mailbox.collect()))
    stopping, save_due = None, False
    for made, known in read:
        if known is not None and known.abandoned:
            return News(made, SIGNAL, save_due)
        if known is not None:
            stopping, save_due = guard.verdict(known, made + 1) or stopping, save_due or known.save_due > 0
    return News(step + 1, stopping, save_due)


@dataclass
class Step:
    """Makes updates: forward and backward over the micro-batches, clipping, the optimizer."""

    model: nn.Module  # compiled and wrapped: the one that is run
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: Guard
    seed: int  # of the run: draws are a function of (seed, step, place of the micro-batch in the global batch)
    clip: float  # largest norm of the whole gradient
    ranks: Ranks
    clock: Clock
    cuda_graphs: bool = False  # whether Inductor replays the model as CUDA graphs: see _begin_replay
    is_interrupted: Callable[[], bool] = lambda: False  # whether this rank is asked to stop: read between micro-batches
    progress: Callable[[], None] = lambda: None  # called after each micro-batch

    def __call__(
        self,
        index: int,
        micro_batches: list[tuple[Tensor, Tensor]],
        lr: float,
        asked: tuple[bool, bool, bool] = (False, False, False),
    ) -> Tensor:
        """Makes update `index`, or skips it if the guard says so. Waits for nothing.

        micro_batches: (tokens, targets), each (B, T) int64, of this rank. lr: learning rate of
        AdamW at this step; Muon's follows in proportion. asked: whether this rank has a signal,
        whether it is out of time, and whether it wants a save. Returns Numbers as a (8,) tensor.
        """
        wide = self.guard.state.dtype
        shared = torch.zeros(1 + FLAGS, device=self.ranks.device)  # loss and flags: one all-reduce for all
        is_abandoned = self._add_gradients(index, micro_batches, shared[0])
        for flag, is_set in enumerate((*asked, is_abandoned), start=1):
            shared[flag] = float(is_set)
        if is_abandoned and self.ranks.world_size == 1:
            self.optimizer.zero_grad()
            return torch.cat([shared[:1].to(wide), shared.to(wide), self.guard.counts()])
        self.clock.synchronized()
        with phase("optimizer"):
            self.scaler.unscale_(self.optimizer)
            grad_norm = distributed.clip(self.model, self.clip)
            shared = self.ranks.sum(shared)
            mean_loss = shared[:1] / self.ranks.world_size
            is_abandoned = shared[FLAGS] > 0  # by any rank
            # 1.0: the optimizer changes nothing
            self.optimizer.found_inf = self.guard.judge(mean_loss[0], grad_norm, is_abandoned)
            optim.set_learning_rate(self.optimizer, lr)
            if device.heeds_found_inf(self.ranks.device) or not self.optimizer.found_inf.item():  # else read it here
                self.optimizer.step()
            self._update_scale(is_abandoned)
            self.optimizer.zero_grad(set_to_none=not self.cuda_graphs)
        return torch.cat([mean_loss.to(wide), grad_norm.to(wide).reshape(1), shared[1:].to(wide), self.guard.counts()])

    def _add_gradients(self, index: int, micro_batches: list[tuple[Tensor, Tensor]], total: Tensor) -> bool:
        """Adds the micro-batches' gradients to .grad, and their share of the loss to `total`, ().

        Returns whether this rank was interrupted, so that some of them were left out.
        """
        ranks, is_sharded = self.ranks, distributed.is_sharded(self.model)
        is_alone, is_abandoned = ranks.world_size == 1, False
        with nullcontext() if is_sharded else cast_once(self.model):
            for position, (tokens, targets) in enumerate(micro_batches):
                is_last = position == len(micro_batches) - 1
                # Other ranks wait for the gradients of the last one, and where the model is sharded for every forward.
                if is_alone or not (is_last or is_sharded):
                    is_abandoned = is_abandoned or self.is_interrupted()
                if is_abandoned and (is_alone or not is_last):
                    continue
                # Dropout and samples of the head need no saved random state, and any number of ranks draws the same.
                torch.manual_seed(derived_seed(self.seed, index, position * ranks.world_size + ranks.rank))
                distributed.synchronize_gradients(self.model, is_last)
                tokens, targets = device.send(ranks.device, tokens, targets)
                loss = self._pass(tokens, targets, len(micro_batches))
                total += loss.detach()
                self.progress()
        return is_abandoned

    def _pass(self, tokens: Tensor, targets: Tensor, share: int) -> Tensor:
        """Adds one micro-batch's gradients, over `share`, to .grad. Returns its part of the loss."""
        if self.cuda_graphs:
            self._begin_replay()
        with phase("forward"):
            loss = self.model(tokens, targets) / share
        with phase("backward"):
            self.scaler.scale(loss).backward()
        return loss

    def fits(self, micro_batch_size: int, context: int, count: int) -> bool:
        """Whether micro-batches of this size fit into memory: makes at most two of `count`, uncompiled.

        Not for a sharded model, whose passes need all ranks. No rank waits for another, nothing is
        updated, and no gradient stays.
        """
        tokens = torch.zeros(micro_batch_size, context, dtype=torch.int64, device=self.ranks.device)
        distributed.synchronize_gradients(self.model, False)
        try:
            optim.allocate_state(self.optimizer)  # as the first update does
            with torch.compiler.set_stance("force_eager"), cast_once(self.model):
                for _ in range(min(2, count)):  # the second has gradients beside it
                    self._pass(tokens, tokens, count)
        except Exception as error:
            if not out_of_memory(error):
                raise
            return False
        finally:
            for parameter in self.model.parameters():
                parameter.grad = None
        return True

    def _update_scale(self, is_abandoned: Tensor) -> None:
        """Updates the loss scale of float16, unless the update was abandoned, which must leave no trace."""
        tensors = [t for t in map(self.scaler.__dict__.get, ("_scale", "_growth_tracker")) if t is not None]
        before = [tensor.clone() for tensor in tensors]
        self.scaler.update()
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(is_abandoned, old, tensor))

    def _begin_replay(self) -> None:
        """Allows the next replay to overwrite the tensors that the last one returned.

        Its gradients are among them. So autograd must add them to memory outside of the graphs, and
        not keep the first micro-batch's as .grad.
        """
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch.compiler.cudagraph_mark_step_begin()
