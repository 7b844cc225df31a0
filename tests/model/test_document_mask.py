"""GPT2.mask_documents: each document is computed as if it were alone, in training and while generating."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tiny_model import build, some_tokens
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from model import GPT2
from model.cache import Decoder
from model.generate import generate

END = 256  # the end-of-text token, which begins a document
# Positions of END in the rows of a batch.
NAMED_ROWS = {
    "a document from the start, an empty one, a long one": (0, 5, 6),
    "begins inside a document, ends with the next one's first token": (3, 15),
    "one document from the start": (0,),
    "inside a document": (),
    "empty documents": tuple(range(16)),
}
ROWS = list(NAMED_ROWS.values())
restarts = pytest.mark.parametrize("restarts", [False, True], ids=["positions go on", "positions restart"])


def documents(rows: Sequence[Sequence[int]] = ROWS, T: int = 16) -> tuple[Tensor, Tensor]:
    """(tokens, targets) of rows with END at these places."""
    tokens = some_tokens(len(rows), T + 1, vocab_size=END)
    for row, places in zip(tokens, rows, strict=True):
        row[list(places)] = END
    return tokens[:, :-1], tokens[:, 1:]


def masked(restarts: bool = False, **changes) -> GPT2:
    model = build(**changes)
    with torch.no_grad():
        for p in model.parameters():  # biases are 0 at first
            p.add_(torch.randn_like(p), alpha=0.1)
    model.mask_documents(END, restarts)
    return model


def loss_and_gradients(model, run, *inputs) -> list[Tensor]:
    loss = run(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def one_by_one(model: GPT2, tokens: Tensor, targets: Tensor, restarts: bool) -> Tensor:
    """Mean loss of all tokens, of which each document is run alone, by the blocks of a model without a mask."""
    losses = []
    for row, wanted, places in zip(tokens, targets, ROWS, strict=True):
        edges = sorted({0, len(row), *places})
        for begin, end in pairwise(edges):
            positions = torch.arange(end - begin) + (0 if restarts else begin)
            x, branch = (model.wte(row[begin:end]) + model.wpe(positions))[None], None
            for block in model.h:
                x, branch = block(x, branch)
            losses.append(F.cross_entropy(model.head(model.ln_f(x, branch)[0])[0], wanted[begin:end], reduction="none"))
    assert sum(map(len, losses)) == tokens.numel()
    return torch.cat(losses).mean()


def test_a_document_begins_at_its_end_of_text_token():
    tokens, _ = documents()
    starts = masked().document_starts(tokens)
    assert (starts.dtype, starts.is_contiguous()) == (torch.int32, True)
    assert starts[0].tolist() == [0] * 5 + [5] + [6] * 10
    assert starts[1].tolist() == [0] * 3 + [3] * 12 + [15]
    assert starts[3].tolist() == [0] * 16
    assert starts[4].tolist() == list(range(16))
    assert build().document_starts(tokens) is None


@restarts
def test_loss_and_gradients_are_those_of_the_documents_one_by_one(restarts):
    model, batch = masked(restarts), documents()
    expected = loss_and_gradients(model, lambda *inputs: one_by_one(model, *inputs, restarts), *batch)
    for ours, theirs in zip(loss_and_gradients(model, model, *batch), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    model.mask_documents(END, not restarts)
    assert abs(model(*batch) - expected[0]) > 1e-3
    model.mask_documents(None)
    assert abs(model(*batch) - expected[0]) > 1e-3


@restarts
def test_no_token_of_one_document_reaches_the_logits_of_another(restarts):
    model, (tokens, _) = masked(restarts), documents()
    starts, embedded = model.document_starts(tokens), []
    model.wte.register_forward_hook(lambda _, __, out: embedded.append(out))
    for asked, places in enumerate(ROWS):
        for begin in {0, *places}:
            is_asked = torch.zeros_like(starts, dtype=torch.bool)
            is_asked[asked] = starts[asked] == begin
            logits = model(tokens)
            (gradient,) = torch.autograd.grad(logits[is_asked].square().sum(), embedded[-1])
            assert (gradient[~is_asked] == 0.0).all()
            assert (gradient[is_asked] != 0.0).any(1).all()


@restarts
def test_recomputing_changes_no_bit_of_a_masked_model(restarts):
    batch, found = documents(), []
    for recompute in ("none", "attention", "block"):
        model = masked(restarts, dropout=0.1)
        model.configure("torch", torch.float32, recompute)
        torch.manual_seed(1)
        found.append(loss_and_gradients(model, model, *batch))
    for got in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, found[0], strict=True))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_masked_model_compiles_to_one_graph_for_all_documents(backend):
    torch._dynamo.reset()
    model, counter = masked(True, n_layer=1), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for rows in (ROWS, ROWS[::-1]):
        batch = documents(rows)
        expected = loss_and_gradients(model, model, *batch)
        for ours, theirs in zip(loss_and_gradients(model, compiled, *batch), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


# ---- Generating ----------------------------------------------------------------------------------------------------


@restarts
@pytest.mark.parametrize("is_static", [False, True], ids=["slices", "static"])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [9, 1, 6]], ids=str)
def test_a_cache_has_the_logits_of_the_masked_forward_pass(lengths, is_static, restarts):
    model = masked(restarts).eval()
    tokens, _ = documents([(0, 2, 9), (5, 6, 14), (13,)])  # in the middle of a prompt, at its ends, and drawn later
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    decoder = Decoder(model, 3, 16, uses_graph=is_static)
    decoder.uses_graph = False  # here is no GPU; the shapes stay a graph's
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left", padding_value=END)
    logits = decoder.prefill(padded, lengths)
    for step in range(16 - max(lengths)):
        expected = torch.cat([model(row[None])[:, -1] for row in rows])
        assert (logits - expected).abs().max() < 1e-5
        new = torch.stack([row[length + step] for row, length in zip(tokens, lengths, strict=True)])[:, None]
        rows = [torch.cat([row, token]) for row, token in zip(rows, new, strict=True)]
        logits = decoder.step(new)


@restarts
def test_a_masked_model_draws_the_same_with_and_without_a_cache(restarts):
    model, (tokens, _) = masked(restarts), documents([(0, 2), (9,), ()])
    with torch.no_grad():  # END is likely, so documents end
        model.ln_f.bias += 6.0 * F.normalize(model.wte.weight[END], dim=0)
    expected = generate(model, tokens, 40, seed=5, context=12, use_cache=False)
    assert (expected[:, 16:] == END).sum() > 3
    assert torch.equal(generate(model, tokens, 40, seed=5, context=12), expected)


def test_a_token_that_the_model_lacks_is_refused():
    with pytest.raises(ValueError, match="end_of_text must be 0 to 256, got 50256"):
        build().mask_documents(50256)
