"""The Conv1D of transformers is a Linear whose weight is [in, out]."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from sclcore import SCL, connection_groups, layer_budgets, weight_uses


def train(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> SCL:
    optimizer = SCL(connection_groups(model), lr=0.05, lam=0.3, mask_lr=0.03)
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return optimizer


def test_it_learns_what_a_linear_learns() -> None:
    torch.manual_seed(0)
    conv, linear = Conv1D(7, 12), nn.Linear(12, 7)
    nn.init.normal_(conv.weight, std=0.3)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias)
    inputs, labels = torch.randn(64, 12), torch.randint(7, (64,))
    ours, theirs = train(conv, inputs, labels), train(linear, inputs, labels)
    [mine], [expected] = ours.masks().values(), theirs.masks().values()
    assert 0 < int(mine.sum()) < mine.numel()
    assert torch.equal(mine.T, expected)
    # Sums over a feature are added up in another order.
    torch.testing.assert_close(conv.weight.T, linear.weight, rtol=1e-5, atol=1e-6)


def test_it_is_counted_like_one() -> None:
    length = 5
    config = GPT2Config(
        vocab_size=11, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    uses = weight_uses(model, torch.zeros(1, length, dtype=torch.long))
    names = [f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc")]
    assert {uses[name] for name in names} == {length}
    [group, *_] = connection_groups(model)
    # The output layer is the embedding's weight: it stays dense.
    assert [name for name, _ in group["params"]] == [*names, "transformer.h.0.mlp.c_proj.weight"]
    budgets = {b.layer: b for b in layer_budgets(model, uses)}
    assert budgets[names[0]].macs_dense == length * 16 * 48
