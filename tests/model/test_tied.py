"""The tied matrix's gradient: the embedding's rows are added to the head's gradient in place."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.cross_entropy import linear_cross_entropy_reference
from model.gpt2 import GPT2, cast_once
from model.presets import GPT2Config
from model.tied import Tied

CONFIG = GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=61)  # padded to 64 or more


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens that come several times, and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(5, (3, 8), generator=generator) * 12 for _ in range(2))
    targets[0, :3] = -100
    return tokens, targets


def model_of(dtype: torch.dtype = torch.float32) -> GPT2:
    torch.manual_seed(0)
    model = GPT2(CONFIG)
    model.configure("torch", dtype)
    return model


def as_one_leaf(model: GPT2, tokens: Tensor, targets: Tensor) -> Tensor:
    """The definition: the matrix is read by the embedding and by the head, and autograd adds up."""
    h = model.hidden(tokens).flatten(0, 1)
    return linear_cross_entropy_reference(h, model.wte.weight, targets.flatten(), vocab_size=61)


@pytest.mark.parametrize("scale", [1.0, 0.25], ids=["whole", "a share"])
def test_gradients_are_those_of_the_definition_in_float64(scale):
    ours, exact = model_of(), model_of().double()
    exact.configure("torch", torch.float64)
    for seed in range(2):  # the second is added to the first
        (ours(*batch(seed)) * scale).backward()
        (as_one_leaf(exact, *batch(seed)) * scale).backward()
    assert ours.wte.weight.grad.layout == torch.strided
    for got, expected in zip(ours.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_bf16_with_shared_casts_gives_the_gradients_of_two_plain_reads(monkeypatch):
    gradients = []
    for apply in (Tied.apply, lambda weight: (None, weight)):
        monkeypatch.setattr(Tied, "apply", apply)
        model = model_of(torch.bfloat16)
        with cast_once(model):
            model(*batch()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_a_kept_graph_gives_the_same_gradients_again_and_leaves_the_first():
    model = model_of()
    loss = model(*batch())
    first = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for retain_graph in (True, False):
        again = torch.autograd.grad(loss, [*model.parameters()], retain_graph=retain_graph)
        for gradients in (first, again):
            assert all(torch.equal(got, expected) for got, expected in zip(gradients, kept, strict=True))


def test_backward_makes_no_second_matrix_of_the_embedding_s_size():
    made = []

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.layout == torch.strided and result.shape == shape:
                made.append((function.__name__, result.data_ptr()))
            return result

    model = model_of()
    shape, loss = model.wte.weight.shape, model(*batch())
    with Made():
        loss.backward()
    assert len({address for _, address in made}) == 1, made
    assert [name for name, _ in made if not name.startswith("detach")] == ["mul_.Tensor", "add_.Tensor"]


@pytest.mark.parametrize("given", [(True, False), (False, True)], ids=["embedding", "head"])
def test_one_gradient_alone_is_the_matrix_s(given):
    weight = torch.randn(7, 3, requires_grad=True)
    embedding, head = Tied.apply(weight)
    read = torch.nn.functional.embedding(torch.tensor([2, 5, 2]), embedding, sparse=True)
    (read if given[0] else head).sum().backward()
    expected = torch.tensor([0.0, 0, 2, 0, 0, 1, 0])[:, None].expand(7, 3) if given[0] else torch.ones(7, 3)
    assert torch.equal(weight.grad, expected)
