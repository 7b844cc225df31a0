"""Scores of continuations: those of the plain definition and of lm-evaluation-harness, on any number of ranks."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import question_sets
import torch

from engine.distributed import Ranks
from engine.run import export
from engine.tasks import hellaswag, lambada, scoring
from engine.tokens import tokenizer as tokenizers
from model.files import BadFile
from model.generate import NotFinite
from model.gpt2 import GPT2, GPT2Config

ALONE = Ranks(0, 0, 1, torch.device("cpu"))
LM_EVAL = json.loads(Path(__file__).with_name("lm_eval.json").read_text())
MOST = 64  # positions of the model


@pytest.fixture(scope="module")
def model() -> GPT2:
    return question_sets.model()


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.load("gpt2")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("questions")
    sets = {"hellaswag": question_sets.hellaswag(), "lambada": question_sets.lambada()}
    return {name: str(question_sets.write(folder / f"{name}.jsonl", records)) for name, records in sets.items()}


def counts(task: scoring.Task, scores: scoring.Scores) -> dict[str, float]:
    return {name: value * task.num_examples for name, value in task.judge(scores).items()}


def test_hellaswag_equals_lm_evaluation_harness(model, tokenizer, files):
    task = hellaswag.load(files["hellaswag"], "lm-eval", tokenizer, MOST)
    scores, theirs = scoring.score(model, task.requests, ALONE), LM_EVAL["hellaswag"]
    assert scores.log_p == pytest.approx(theirs["log_p"], abs=2e-3)
    assert counts(task, scores) == {"acc": theirs["acc"], "acc_norm": theirs["acc_norm"]}
    assert theirs["acc"] != theirs["acc_norm"]


def test_lambada_equals_lm_evaluation_harness(model, tokenizer, files):
    task = lambada.load(files["lambada"], tokenizer, MOST)
    scores, theirs = scoring.score(model, task.requests, ALONE), LM_EVAL["lambada"]
    assert scores.log_p == pytest.approx(theirs["log_p"], abs=2e-3)
    assert scores.is_greedy.tolist() == [bool(one) for one in theirs["is_greedy"]]
    assert 0 < counts(task, scores)["acc"] == theirs["acc"] < 40
    assert task.judge(scores)["ppl"] == pytest.approx(np.exp(-np.mean(theirs["log_p"])), rel=1e-3)


def plain(exact: GPT2, context: np.ndarray, continuation: np.ndarray) -> float:
    """Log-probability by the definition: one sequence, one token after the other, in float64."""
    tokens = np.concatenate([context, continuation])[-(MOST + 1) :].astype(np.int64)
    hidden = exact.hidden(torch.from_numpy(tokens[None, :-1]))[0, -len(continuation) :]
    logits = (hidden @ exact.wte.weight.T)[:, : exact.config.vocab_size]
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    return sum(float(log_p[place, token]) for place, token in enumerate(continuation.tolist()))


@torch.no_grad()
def test_the_convention_of_llm_c_equals_its_plain_definition(model, tokenizer, files):
    exact = copy.deepcopy(model).double()
    exact.configure("torch", torch.float64)
    records = question_sets.hellaswag()[:8]
    task = hellaswag.load(files["hellaswag"], "llm.c", tokenizer, MOST, limit=8)
    scores = scoring.score(model, task.requests, ALONE)
    right = {"acc": 0, "acc_norm": 0}
    for index, record in enumerate(records):
        endings = [tokenizer.encode(" " + ending) for ending in record["endings"]]
        sums = [plain(exact, tokenizer.encode(record["ctx"]), ending) for ending in endings]
        assert scores.log_p[4 * index : 4 * index + 4] == pytest.approx(sums, abs=1e-3)
        means = [total / len(ending) for total, ending in zip(sums, endings, strict=True)]
        right["acc"] += sums.index(max(sums)) == int(record["label"])
        right["acc_norm"] += means.index(max(means)) == int(record["label"])
    assert counts(task, scores) == right


def small() -> tuple[GPT2, list[scoring.Request]]:
    torch.manual_seed(0)
    made = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=40, vocab_size=97, dropout=0.3))
    drawn = np.random.default_rng(0)
    lengths = drawn.integers(2, 42, 100)
    return made, [
        scoring.Request(drawn.integers(0, 97, n).astype(np.uint16), int(drawn.integers(1, n))) for n in lengths
    ]


@pytest.mark.parametrize("world_size", [2, 3, 16])
def test_any_number_of_ranks_gives_the_same_bits(world_size, monkeypatch):
    """Ranks run one after the other: each adds its part, and the last gets the full sum."""
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 320)
    model, requests = small()
    alone, parts = scoring.score(model, requests, ALONE), []

    def collect(self, value):
        parts.append(value)
        return torch.stack(parts).sum(0)

    monkeypatch.setattr(Ranks, "sum", collect)
    for rank in range(world_size):
        scores = scoring.score(model, requests, Ranks(rank, rank, world_size, torch.device("cpu")))
    assert scores.log_p.tobytes() == alone.log_p.tobytes()
    assert scores.is_greedy.tolist() == alone.is_greedy.tolist()
    assert ((torch.stack(parts)[:, :-1, 0] != 0).sum(0) == 1).all()  # no request twice, none left out
    assert scoring.score(model, requests, ALONE, is_interrupted=lambda: True) is None


def test_the_scores_do_not_depend_on_what_shares_a_batch_and_leave_everything_as_it_was():
    model, requests = small()
    state, marks = torch.get_rng_state(), []
    model.train().h[0].eval()
    modes = [module.training for module in model.modules()]
    together = scoring.score(model, requests, ALONE, lambda: marks.append(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert len(marks) == len(scoring.batches(requests))
    one_by_one = [scoring.score(model, [each], ALONE) for each in requests]
    assert together.log_p == pytest.approx([each.log_p[0] for each in one_by_one], abs=1e-4)
    assert together.is_greedy.tolist() == [each.is_greedy[0] for each in one_by_one]


def test_a_batch_has_at_most_the_tokens_it_may_have_or_one_request(monkeypatch):
    _, requests = small()
    for most in (1, 64, 500, 10**6):
        monkeypatch.setattr(scoring, "BATCH_TOKENS", most)
        groups = scoring.batches(requests)
        assert sorted(index for group in groups for index in group) == list(range(100))
        sizes = [len(group) * max(scoring._padded(requests[one]) for one in group) for group in groups]
        assert all(size <= most or len(group) == 1 for size, group in zip(sizes, groups, strict=True))


def test_a_context_is_cut_at_the_left_and_a_continuation_never():
    context, continuation = np.arange(10, dtype=np.uint16), np.arange(50, 54, dtype=np.uint16)
    assert scoring.request(context, continuation, 6).tokens.tolist() == [7, 8, 9, 50, 51, 52, 53]
    assert scoring.request(context, continuation, 4).tokens.tolist() == [9, 50, 51, 52, 53]
    for most, words in ((3, "4 tokens to predict where the model reads 1 to 3"), (0, "reads 1 to 0")):
        with pytest.raises(BadFile, match=words):
            scoring.request(context, continuation, most)


def test_a_model_that_has_diverged_has_no_scores():
    model, requests = small()
    torch.nn.init.constant_(model.ln_f.weight, float("nan"))
    with pytest.raises(NotFinite, match=r"log-probabilities must be finite, got 100 of 100 that are not"):
        scoring.score(model, requests, ALONE)


HELLASWAG = """dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
task: hellaswag_local
training_split: null
include: {tasks}/hellaswag/hellaswag.yaml
"""
LAMBADA = """dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {file}
task: lambada_local
include: {tasks}/lambada/lambada_openai.yaml
"""


def lm_eval() -> Path | None:
    """The lm_eval of this environment, or the one on PATH."""
    beside = Path(sys.executable).with_name("lm_eval")
    return beside if beside.is_file() else Path(found) if (found := shutil.which("lm_eval")) else None


@pytest.mark.slow
@pytest.mark.skipif(lm_eval() is None, reason="lm-evaluation-harness is not installed: pip install lm-eval[hf]")
def test_lm_evaluation_harness_gives_the_recorded_counts_today(model, tokenizer, files, tmp_path):
    model.save_pretrained(tmp_path / "model")
    export.save_tokenizer(tokenizer, tmp_path / "model", MOST)
    code = "import lm_eval.tasks, sys; sys.stdout.write(lm_eval.tasks.__path__[0])"
    python = lm_eval().with_name("python")
    tasks = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    for name, text in (("hellaswag", HELLASWAG), ("lambada", LAMBADA)):
        (tmp_path / f"{name}_local.yaml").write_text(text.format(file=files[name], tasks=tasks))
    command = [lm_eval(), "run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}"]
    command += ["--include_path", tmp_path, "--tasks", "hellaswag_local,lambada_local", "--device", "cpu"]
    subprocess.run([*command, "--output_path", tmp_path / "found"], check=True, timeout=600)
    (found,) = (tmp_path / "found").rglob("results_*.json")
    results = json.loads(found.read_text())["results"]
    for name in ("hellaswag", "lambada"):
        for figure in {"acc", "acc_norm"} & LM_EVAL[name].keys():
            assert results[f"{name}_local"][f"{figure},none"] * 40 == pytest.approx(LM_EVAL[name][figure])
