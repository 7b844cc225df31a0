"""Log-probabilities of continuations given contexts, in batches, computed by all ranks.

Requests are sorted by length and padded at the right, which a causal model does not see. The batches
do not depend on the number of ranks. Each rank scores whole batches, and each score is one rank's
alone. So the scores have the same bits on any number of ranks.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.device import widest
from engine.distributed import Ranks, is_sharded, outside_training
from engine.tasks.records import TooLong
from engine.tokens.tokenizer import Tokenizer
from model.files import BadFile
from model.generate import NotFinite, evaluation_mode
from model.gpt2 import GPT2

BATCH_TOKENS = 8192  # tokens per forward pass, with padding
PAD_TO = 32  # lengths are rounded up to a multiple of it, so that a GPU sees few shapes
IGNORED = -100  # target that is not predicted


class Request(NamedTuple):
    """Tokens of a context and its continuation, as many as the model reads."""

    tokens: np.ndarray  # (n,) uint16
    count: int  # tokens of the continuation, 1 to n - 1


class Scores(NamedTuple):
    """Scores of some requests."""

    log_p: np.ndarray  # (N,) float64: log-probability of each continuation in nats
    is_greedy: np.ndarray  # (N,) bool: whether each of its tokens is the most likely one


@dataclass(frozen=True)
class Task:
    """A set of examples: what the model is to score, and what the scores come to."""

    name: str  # the figures' prefix in metrics.jsonl
    num_examples: int
    requests: list[Request]
    judge: Callable[[Scores], dict[str, float]]  # figures by name

    def run(self, raw_model: GPT2, ranks: Ranks, *calls: Callable) -> dict[str, float] | None:
        """The figures, or None if a rank was interrupted. calls: progress and is_interrupted, as for `score`."""
        scores = score(raw_model, self.requests, ranks, *calls)
        return None if scores is None else self.judge(scores)


def digest(requests: Iterable[Request]) -> str:
    """Digest of requests, 12 hex digits: ranks that share them must have the same ones."""
    found = hashlib.sha256()
    for tokens, count in requests:
        found.update(f"{len(tokens)} {count} {tokens.dtype} ".encode())
        found.update(tokens.tobytes())
    return found.hexdigest()[:12]


def request(context: np.ndarray, continuation: np.ndarray, most: int) -> Request:
    """A request cut at the left to the `most` positions of the model.

    Raises TooLong if the continuation is longer, and BadFile if it is empty.
    """
    if not 1 <= len(continuation) <= most:
        kind = TooLong if len(continuation) else BadFile
        raise kind(f"{len(continuation)} tokens to predict where the model reads 1 to {most}")
    return Request(np.concatenate([context, continuation])[-(most + 1) :], len(continuation))


def split(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a context and of a continuation that are tokenised as one text, cut where the context ends.

    Spaces at the end of the context go to the continuation, since GPT-2's words begin with a space.
    """
    kept = context.rstrip()
    tokens, count = tokenizer.encode(context + continuation), len(tokenizer.encode(kept))
    return tokens[:count], tokens[count:]


def batches(requests: list[Request]) -> list[list[int]]:
    """Indices of the requests in each batch, longest first."""
    order = sorted(range(len(requests)), key=lambda index: -len(requests[index].tokens))
    groups, start = [], 0
    while start < len(order):
        size = max(1, BATCH_TOKENS // _padded(requests[order[start]]))
        groups.append(order[start : start + size])
        start += size
    return groups


def _padded(one: Request) -> int:
    return -(-(len(one.tokens) - 1) // PAD_TO) * PAD_TO


@torch.no_grad()
def score(
    raw_model: GPT2,
    requests: list[Request],
    ranks: Ranks,
    progress: Callable[[], None] = lambda: None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Scores of all requests, in their order, without dropout. All ranks call it.

    progress: called after each batch. is_interrupted: whether this rank is asked to stop; if any
    is, the rest is left out and every rank gets None. A sharded model scores all. Raises NotFinite,
    on every rank, if a score is not finite. Each module's mode is then as before.
    """
    groups, is_whole = batches(requests), not is_sharded(raw_model)
    wide = widest(ranks.device)
    found = torch.zeros(len(requests) + 1, 2, dtype=wide, device=ranks.device)  # the last: ranks interrupted
    end = len(groups)
    if not is_whole:  # each forward needs all ranks: spare ranks repeat the last batch and drop its scores
        end = -(-end // ranks.world_size) * ranks.world_size
    with evaluation_mode(raw_model), outside_training(raw_model):
        for index in range(ranks.rank, end, ranks.world_size):
            if is_whole and is_interrupted():
                found[-1] = 1.0
                break
            group = groups[min(index, len(groups) - 1)]
            scores = _score_batch(raw_model, [requests[one] for one in group], ranks.device)
            if index < len(groups):
                found[group] = scores
            progress()
    found = ranks.sum(found).cpu().numpy().astype(float)
    if found[-1].any():
        return None
    log_p, is_greedy = found[:-1].T
    if odd := int((~np.isfinite(log_p)).sum()):
        raise NotFinite(f"the model's log-probabilities must be finite, got {odd} of {len(log_p)} that are not")
    return Scores(log_p, is_greedy > 0)


def _score_batch(raw_model: GPT2, requests: list[Request], device: torch.device) -> Tensor:
    """(B, 2), wide: sum of the log-probabilities of each continuation, and 1 if all of it is most likely."""
    width = min(_padded(max(requests, key=_padded)), raw_model.config.n_positions)
    inputs, targets = np.zeros((len(requests), width), np.int64), np.full((len(requests), width), IGNORED, np.int64)
    for row, (tokens, count) in enumerate(requests):
        last = len(tokens) - 1
        inputs[row, :last] = tokens[:-1]
        targets[row, last - count : last] = tokens[-count:]
    inputs, targets = (torch.from_numpy(each).to(device) for each in (inputs, targets))
    log_p, is_likely = raw_model.log_probabilities(inputs, targets)
    each = torch.zeros(targets.shape, dtype=widest(device), device=device)
    each[targets != IGNORED] = log_p.to(each.dtype)
    right = torch.ones(targets.shape, dtype=torch.bool, device=device)
    right[targets != IGNORED] = is_likely
    return torch.stack([each.sum(1), right.all(1).to(each.dtype)], dim=1)
