"""Our kernels in somebody else's model: the GPT-2 of `transformers`.

    python examples/someone_elses_model.py

Three things change: its LayerNorms, its MLPs (the bias and GELU in one op), and its loss (without
the logits of all tokens at once). The weights stay where they are. The loss and every gradient are
then compared with those of the model as it was.
"""

import argparse
import copy

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from kernels import Ops, select


class FusedLayerNorm(nn.LayerNorm):
    """nn.LayerNorm on our op."""

    ops: Ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.eps)


class FusedMLP(GPT2MLP):
    """The MLP with its first bias and GELU in one op. Its weights are (in, out)."""

    ops: Ops

    def forward(self, hidden_states: Tensor) -> Tensor:
        h = self.ops.bias_gelu(hidden_states @ self.c_fc.weight, self.c_fc.bias)
        return self.dropout(self.c_proj(h))


def fuse(model: nn.Module, ops: Ops) -> None:
    """Puts our ops into a model, in place. Its parameters and their names stay."""
    for module in model.modules():
        fused = {nn.LayerNorm: FusedLayerNorm, GPT2MLP: FusedMLP}.get(type(module))
        if fused is not None:
            module.__class__, module.ops = fused, ops


def fused_loss(model: GPT2LMHeadModel, tokens: Tensor, targets: Tensor, ops: Ops) -> Tensor:
    """Mean loss of targets (B, T), from the hidden states: the head and the loss are one op."""
    hidden = model.transformer(tokens).last_hidden_state  # (B, T, C)
    return ops.linear_cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets.flatten())


def main() -> None:
    """Prints the ops, the two losses, and the largest difference of a gradient."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    config = GPT2Config(n_layer=args.layers, n_head=4, n_embd=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    theirs = GPT2LMHeadModel(config).to(device)
    fused = copy.deepcopy(theirs)
    ops = select("auto", device, torch.float32, head_dim=config.n_embd // config.n_head)
    fuse(fused, ops)
    print(ops.explain())

    text = torch.randint(config.vocab_size, (2, 65), device=device)
    tokens, targets = text[:, :-1], text[:, 1:]
    loss = nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
    loss.backward()
    ours = fused_loss(fused, tokens, targets, ops)
    ours.backward()

    gradients = zip(theirs.parameters(), fused.parameters(), strict=True)
    error = max(((a.grad - b.grad).norm() / a.grad.norm()).item() for a, b in gradients)
    print(f"loss {loss.item():.6f} as it was, {ours.item():.6f} with our ops")
    print(f"gradients differ by at most {error:.1e} of their norm")


if __name__ == "__main__":
    main()
