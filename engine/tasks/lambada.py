"""LAMBADA: the last word of a passage, in OpenAI's variant, which keeps the text as it was written.

acc: share of passages whose last word is what greedy decoding gives, in all its tokens.
ppl: exp of the mean negative log-probability of the last word, in nats per word.
Passage and word are tokenised as one text, as lm-evaluation-harness does in lambada_openai.
Sources: Paperno et al. 2016, arXiv:1606.06031; lm_eval/tasks/lambada in
github.com/EleutherAI/lm-evaluation-harness, version 0.4.13.
"""

from typing import Any

from engine.evaluation import perplexity
from engine.tasks import records
from engine.tasks.scoring import Request, Scores, Task, request, split
from engine.tokens.tokenizer import Tokenizer
from model.files import BadFile, check_fields


def load(path: str, tokenizer: Tokenizer, most: int, limit: int | None = None) -> Task:
    """The passages of a file like lambada_test.jsonl, the text in the field `text`.

    most: positions that the model reads; a longer passage is cut at the left. limit: first passages
    to take. Raises BadInput if the file or a line of it is not good.
    """

    def make(record: dict[str, Any]) -> Request:
        context, _, word = check_fields(record, {"text": str})["text"].rpartition(" ")
        if not context.strip() or not word.strip():
            raise BadFile("a text that does not end in a space and a word")
        return request(*split(tokenizer, context, f" {word}"), most)

    requests = records.read(path, "LAMBADA", make, limit)

    def judge(scores: Scores) -> dict[str, float]:
        return {"acc": float(scores.is_greedy.mean()), "ppl": perplexity(-float(scores.log_p.mean()))}

    return Task("lambada", len(requests), requests, judge)
