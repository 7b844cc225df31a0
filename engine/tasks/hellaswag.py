"""HellaSwag: which of four endings goes on with a text, in two conventions.

    llm.c      The text is `ctx`; an ending is " " + ending, tokenised by itself. acc takes the ending
               with the highest log-probability, acc_norm the one with the highest per token.
    lm-eval    The text is activity label, ctx_a and ctx_b, without the artefacts of WikiHow; text and
               ending are tokenised as one. acc_norm takes the highest per character of the ending.

Sources: Zellers et al. 2019, arXiv:1905.07830; dev/data/hellaswag.py in github.com/karpathy/llm.c;
lm_eval/tasks/hellaswag in github.com/EleutherAI/lm-evaluation-harness, version 0.4.13.
"""

import re
from typing import Any, NamedTuple

import numpy as np

from engine.tasks import records
from engine.tasks.scoring import Request, Scores, Task, request, split
from engine.tokens.tokenizer import Tokenizer
from model.files import BadFile, check_fields, shown

CONVENTIONS = ("llm.c", "lm-eval")
ENDINGS = 4
TEXTS = {"llm.c": ("ctx",), "lm-eval": ("activity_label", "ctx_a", "ctx_b")}  # fields of a context
ARTEFACT = re.compile(r"\[.*?\]")  # headings such as [header] and [step] of the texts from WikiHow


class Example(NamedTuple):
    """An example, tokenised."""

    requests: list[Request]
    lengths: list[int]  # of the endings, in what acc_norm divides by
    label: int  # index of the right one


def load(path: str, convention: str, tokenizer: Tokenizer, most: int, limit: int | None = None) -> Task:
    """The examples of a file like hellaswag_val.jsonl.

    most: positions that the model reads; a longer context is cut at the left. limit: first examples
    to take. Raises BadInput if the file or a line of it is not good.
    """

    def make(record: dict[str, Any]) -> Example:
        check_fields(record, {**dict.fromkeys(TEXTS[convention], str), "endings": list[str], "label": int | str})
        if len(record["endings"]) != ENDINGS:
            raise BadFile(f"{len(record['endings'])} endings instead of {ENDINGS}")
        if str(record["label"]) not in map(str, range(ENDINGS)):
            raise BadFile(f"the label {shown(record['label'])} instead of 0 to {ENDINGS - 1}")
        context, endings = texts(record, convention)
        if not context.strip() or not all(ending.strip() for ending in endings):
            raise BadFile("an empty text" if not context.strip() else "an empty ending")
        pairs = [pair(tokenizer, convention, context, ending) for ending in endings]
        lengths = [len(tokens) for _, tokens in pairs] if convention == "llm.c" else list(map(len, endings))
        return Example([request(*both, most) for both in pairs], lengths, int(record["label"]))

    examples = records.read(path, "HellaSwag", make, limit)
    labels, lengths = np.array([one.label for one in examples]), np.array([one.lengths for one in examples])

    def judge(scores: Scores) -> dict[str, float]:
        log_p = scores.log_p.reshape(-1, ENDINGS)
        figures = {"acc": log_p, "acc_norm": log_p / lengths}
        return {name: float((values.argmax(1) == labels).mean()) for name, values in figures.items()}

    return Task("hellaswag", len(examples), [each for one in examples for each in one.requests], judge)


def texts(record: dict[str, Any], convention: str) -> tuple[str, list[str]]:
    """Context and endings of a record as a convention words them."""
    if convention == "llm.c":
        return record["ctx"], record["endings"]
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return _without_artefacts(context), [_without_artefacts(ending) for ending in record["endings"]]


def pair(tokenizer: Tokenizer, convention: str, context: str, ending: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of a context and of one of its endings."""
    if convention == "llm.c":
        return tokenizer.encode(context), tokenizer.encode(f" {ending}")
    return split(tokenizer, context, f" {ending}")


def _without_artefacts(text: str) -> str:
    with_stops = text.strip().replace(" [title]", ". ")
    return ARTEFACT.sub("", with_stops).replace("  ", " ")
