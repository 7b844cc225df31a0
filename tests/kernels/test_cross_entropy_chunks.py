"""Chunks of rows in the LM head: their size, results independent of it, and less work in evaluation."""

import pytest
import torch
from cross_entropy_cases import compare, inputs
from tolerances import (
    DEVICE,
    DTYPES,
    poisoned_memory,  # noqa: F401  (a fixture)
    set_tiles,  # noqa: F401  (a fixture)
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.cross_entropy
from kernels.cross_entropy import (
    linear_cross_entropy_reference,
    linear_cross_entropy_torch,
    linear_cross_entropy_triton,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")

IMPLEMENTATIONS = [
    pytest.param(linear_cross_entropy_torch, id="torch"),
    pytest.param(linear_cross_entropy_triton, id="triton"),
]


def cut_into(monkeypatch, size):
    """Sets chunks to at most `size` rows, and PyTorch's strips of a chunk to half of that."""
    in_chunks = kernels.cross_entropy._in_chunks

    def in_small_chunks(outputs, hidden, weight, rows, softmax):
        in_chunks(outputs, hidden, weight, size, softmax)

    monkeypatch.setattr(kernels.cross_entropy, "_rows", lambda weight, dtype: (size, -(-size // 2)))
    monkeypatch.setattr(kernels.cross_entropy, "_in_chunks", in_small_chunks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 5, 36, 37, 1000])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_chunks_of_any_size_give_the_same(op, size, dtype, monkeypatch):
    cut_into(monkeypatch, size)
    compare(op, inputs(37, 33, 257, 384, dtype, torch.float32), vocab_size=257)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_many_chunks_do_not_round_the_weight_gradient_away(op, dtype, monkeypatch):
    cut_into(monkeypatch, 1)
    compare(op, inputs(256, 8, 17, 32, dtype), vocab_size=17)


def test_chunk_sizes_are_what_the_loop_uses(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels.cross_entropy, "_rows", lambda weight, dtype: asked.append(weight.shape[0]) or (7, 2))
    linear_cross_entropy_torch(*inputs(37, 33, 257, 384), vocab_size=257)
    assert asked == [384]


def test_triton_takes_at_most_8192_rows_at_a_time(monkeypatch):
    sizes = []

    class Kernel:
        def __getitem__(self, grid):
            sizes.append(grid[0])  # a program for each row
            return lambda *arguments, **options: None

    monkeypatch.setattr(kernels.cross_entropy, "_cross_entropy_kernel", Kernel())
    hidden, weight = torch.ones(20_000, 1, device=DEVICE), torch.ones(2, 1, device=DEVICE)
    linear_cross_entropy_triton(hidden, weight, torch.zeros(20_000, dtype=torch.int64, device=DEVICE))
    assert sizes == [6666, 6667, 6667]  # equal parts: the products of a small rest would be slow


@pytest.mark.parametrize("num_warps", [1, 4, 16])
@pytest.mark.parametrize("Vp", [2, 128, 257, 50304])
def test_every_thread_has_columns_of_its_own(Vp, num_warps, monkeypatch, set_tiles):  # noqa: F811
    """Else warps that hold copies of a column race: one stores dz where another still reads the logit."""
    blocks = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, BLOCK_V, num_warps, **options: blocks.append((BLOCK_V, num_warps))

    monkeypatch.setattr(kernels.cross_entropy, "_cross_entropy_kernel", Kernel())
    set_tiles(lambda name, arch, size: {"BLOCK_V": 8192, "num_warps": num_warps})
    linear_cross_entropy_triton(*inputs(2, 1, 2, Vp), vocab_size=2)
    assert blocks == [(min(8192, max(64 * num_warps, 1 << (Vp - 1).bit_length())), num_warps)]


NO_GRADIENTS = [
    pytest.param(lambda t: t.requires_grad_(), torch.no_grad, id="under no_grad"),
    pytest.param(lambda t: t.requires_grad_(), torch.inference_mode, id="in inference mode"),
    pytest.param(lambda t: t, torch.enable_grad, id="no input asks for one"),
]


@pytest.mark.parametrize(("prepare", "mode"), NO_GRADIENTS)
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_without_gradients_only_the_loss_is_computed(op, prepare, mode, monkeypatch):
    hidden, weight, targets = inputs(37, 33, 257, 384)
    expected = op(hidden.requires_grad_(), weight, targets, vocab_size=257).detach()
    outputs, in_chunks = [], kernels.cross_entropy._in_chunks
    monkeypatch.setattr(
        kernels.cross_entropy, "_in_chunks", lambda out, *rest: outputs.extend(out) or in_chunks(out, *rest)
    )
    monkeypatch.setattr(kernels.cross_entropy, "_add_product", lambda *_: pytest.fail("a gradient was computed"))
    with mode():
        loss = op(prepare(hidden.detach()), prepare(weight.detach()), targets, vocab_size=257)
    assert torch.equal(loss, expected)
    assert [tuple(t.shape) for t in outputs] == [(), (0, 33), (0, 33)]


def test_pytorch_makes_no_gradient_of_the_logits_in_evaluation(monkeypatch):
    monkeypatch.setattr(Tensor, "mul_", lambda *_, **__: pytest.fail("made a gradient"))
    with torch.no_grad():
        assert linear_cross_entropy_torch(*inputs(7, 5, 11, 16), vocab_size=11).isfinite()


def test_the_mean_s_factor_is_not_rounded_to_bfloat16():
    # 1/192 is 0.195% off in bfloat16, to which CUDA rounds a 0-dim factor; a CPU keeps it in float32.
    # Rounding of single elements averages out over 192 x 256 of them.
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 256, generator=generator).div(4).to(DEVICE, torch.bfloat16) for n in (192, 128))
    targets = torch.randint(128, (192,), generator=generator).to(DEVICE)
    gradients = []
    for dtype, op in ((torch.bfloat16, linear_cross_entropy_torch), (torch.float64, linear_cross_entropy_reference)):
        leaf = hidden.detach().clone().to(dtype).requires_grad_()
        op(leaf, weight.to(dtype), targets).backward()
        gradients.append(leaf.grad.double())
    found, exact = gradients
    assert (found * exact).sum() / (exact * exact).sum() == pytest.approx(1.0, abs=5e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_makes_one_pass_over_each_gradient(dtype):
    passes = []

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.ndim == 2:
                passes.append((function.__name__, tuple(result.shape)))
            return result

    hidden, weight, targets = inputs(37, 33, 257, 384, dtype, torch.float32)
    loss = linear_cross_entropy_torch(hidden.requires_grad_(), weight.requires_grad_(), targets)
    with Passes():
        torch.autograd.grad(loss, [hidden, weight])
    assert [made for made in passes if not made[0].startswith(("new_empty", "empty", "detach"))] == [
        ("mul.out", (37, 33)),
        ("mul_.Tensor" if DEVICE.type == "cpu" else "mul.out", (384, 33)),
    ]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", IMPLEMENTATIONS)
def test_a_kept_graph_gives_the_same_gradients_again_and_leaves_the_first(op, weight_dtype):
    dtype = torch.float16 if op is linear_cross_entropy_triton else torch.bfloat16  # the interpreter has fp16
    weight_dtype = dtype if weight_dtype == torch.bfloat16 else weight_dtype
    hidden, weight, targets = inputs(37, 33, 257, 384, dtype, weight_dtype)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = op(*leaves, targets, vocab_size=257) * 3.0
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for retain_graph in (True, False):
        again = torch.autograd.grad(loss, leaves, retain_graph=retain_graph)
        for gradients in (first, again):
            assert all(torch.equal(got, expected) for got, expected in zip(gradients, kept, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)
