"""Which tensors are connections, how often they are used, what the groups look like."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from sclcore import SCL, connection_groups, layer_budgets, weight_uses
from sclcore.network.connections import find_connections
from sclcore.network.latency import nanoseconds
from tests.sclcore.nets import MIXED_USES, Mixed


def _names(model: nn.Module, *exclude: str) -> list[str]:
    return [c.name for c in find_connections(model, exclude)]


class _Tied(nn.Module):
    """A language model's usual tie: the output layer uses the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.body = nn.Linear(6, 6)
        self.out = nn.Linear(6, 10, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.body(self.embedding(tokens)))


class _Twice(nn.Module):
    """One layer called twice, and a second layer that shares another's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(4, 4)
        self.left = nn.Linear(4, 4)
        self.right = nn.Linear(4, 4)
        self.right.weight = self.left.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.right(self.left(self.block(self.block(x))))


# --- finding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(3, 2), {"weight": 0}),
        (nn.Conv1d(3, 2, 3), {"weight": 0}),
        (nn.Conv2d(4, 4, 3, groups=4), {"weight": 0}),
        (nn.Conv3d(3, 2, 3), {"weight": 0}),
        (nn.ConvTranspose1d(3, 2, 3), {"weight": 1}),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), {"weight": 2}),
        (nn.MultiheadAttention(4, 2), {"in_proj_weight": 0, "out_proj.weight": 0}),
        (
            nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
            {"q_proj_weight": 0, "k_proj_weight": 0, "v_proj_weight": 0, "out_proj.weight": 0},
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_kinds_of_connections(module: nn.Module, expected: dict[str, int]) -> None:
    found = find_connections(module)
    assert {c.name: c.transposed_groups for c in found} == expected
    for c in found:
        assert c.parameter is module.get_parameter(c.name)


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Embedding(5, 4), nn.PReLU(4)],
    ids=lambda m: type(m).__name__,
)
def test_other_parameters_are_no_connections(module: nn.Module) -> None:
    assert _names(nn.Sequential(module, nn.Linear(4, 4))) == ["1.weight"]


def test_exclude_patterns() -> None:
    model = nn.ModuleDict(
        {
            "stem": nn.Conv2d(3, 4, 3),
            "blocks": nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))]),
            "attention": nn.MultiheadAttention(4, 2),
            "head": nn.Linear(4, 2),
        }
    )
    blocks = ["blocks.0.0.weight", "blocks.0.1.weight"]
    attention = ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert _names(model) == ["stem.weight", *blocks, *attention, "head.weight"]
    assert _names(model, "head") == ["stem.weight", *blocks, *attention]
    assert _names(model, "head.weight", "stem") == [*blocks, *attention]
    assert _names(model, "blocks.*", "attention*") == ["stem.weight", "head.weight"]
    assert _names(model, "blocks.?.1", "*out_proj") == [
        "stem.weight",
        blocks[0],
        attention[0],
        "head.weight",
    ]


@pytest.mark.parametrize("pattern", ["haed", "Stem", "1", "bias"])
def test_a_pattern_without_a_match_is_refused(pattern: str) -> None:
    model = nn.ModuleDict({"stem": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=f"'{pattern}' matches no layer"):
        find_connections(model, ["head", pattern])


def test_a_tied_embedding_stays_dense() -> None:
    model = _Tied()
    assert _names(model) == ["body.weight"]
    groups = connection_groups(model)
    assert [c[0] for c in groups[0]["params"]] == ["body.weight"]
    assert "embedding.weight" in [n for g in groups[1:] for n, _ in g["params"]]


def test_a_weight_shared_by_layers_is_one_connection_tensor() -> None:
    assert _names(_Twice()) == ["block.weight", "left.weight"]


def test_frozen_parameters_are_left_out_altogether() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert _names(model) == ["1.weight"]
    names = [n for g in connection_groups(model) for n, _ in g["params"]]
    assert sorted(names) == ["1.bias", "1.weight"]


def test_a_lazy_layer_is_refused_until_it_has_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
        find_connections(model)
    model(torch.zeros(1, 3))
    assert _names(model) == ["0.weight"]


# --- groups ---------------------------------------------------------------------------------------


def test_groups_hold_each_trainable_parameter_once() -> None:
    model = Mixed()
    groups = connection_groups(model, exclude=["head"], lam=0.3, proxy="softplus")
    names = [n for g in groups for n, _ in g["params"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    connections, matrices, vectors = groups
    assert connections["connections"] and connections["lam"] == 0.3
    assert connections["proxy"] == "softplus"
    assert [n for n, _ in connections["params"]] == [n for n in MIXED_USES if n != "head.weight"]
    assert connections["transposed_groups"] == [0, 2, 0, 0]
    assert connections["costs"] == [1.0] * 4
    assert not matrices["connections"] and not vectors["connections"]
    assert [n for n, _ in matrices["params"]] == ["head.weight"]
    assert "weight_decay" not in matrices and "weight_decay" not in connections
    assert vectors["weight_decay"] == 0.0
    assert all(p.ndim <= 1 for _, p in vectors["params"])
    assert "lam" not in vectors


class Embedded(nn.Module):
    """A Linear on tokens with a position embedding and a class token, as timm's transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.other = nn.Parameter(torch.zeros(2, 4))
        self.head = nn.Linear(4, 3)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "dist_token"}


def test_what_the_model_names_is_not_decayed() -> None:
    connections, decayed, spared = connection_groups(Embedded())
    assert [n for n, _ in connections["params"]] == ["head.weight"]
    assert [n for n, _ in decayed["params"]] == ["other"] and "weight_decay" not in decayed
    assert [n for n, _ in spared["params"]] == ["pos_embed", "cls_token", "head.bias"]
    assert spared["weight_decay"] == 0.0


def test_a_model_without_connections_is_refused() -> None:
    with pytest.raises(ValueError, match="no connections to learn"):
        connection_groups(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match="no connections to learn"):
        connection_groups(nn.Sequential(nn.Linear(3, 3)), exclude=["0"])


def test_unknown_cost_and_missing_input_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown cost 'flops'.*connections, macs or latency"):
        connection_groups(Mixed(), cost="flops")
    with pytest.raises(ValueError, match="example_input"):
        connection_groups(Mixed(), cost="macs")


def test_cost_macs_is_proportional_to_uses_with_mean_one() -> None:
    model = Mixed()
    group = connection_groups(model, cost="macs", example_input=torch.zeros(1, 2, 6, 6))[0]
    costs = {n: c for (n, _), c in zip(group["params"], group["costs"], strict=True)}
    sizes = {n: p.numel() for n, p in group["params"]}
    mean = sum(costs[n] * sizes[n] for n in costs) / sum(sizes.values())
    assert mean == pytest.approx(1, abs=1e-12)
    for name, cost in costs.items():
        assert cost / costs["head.weight"] == pytest.approx(MIXED_USES[name])


def test_cost_latency_is_the_time_of_a_weight_in_the_native_runtime() -> None:
    """By hand, for a map of 5 vectors and 1 pixel: what it costs by itself, and 6 vectors' time."""
    layers = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.AvgPool2d(9), nn.Flatten(), nn.Linear(2, 3, bias=False)
    )
    group = connection_groups(layers, cost="latency", example_input=torch.zeros(1, 1, 9, 9))[0]
    convolution, linear = group["costs"]
    assert 2 * convolution + 6 * linear == pytest.approx(8)
    assert convolution / linear == pytest.approx(nanoseconds(81) / nanoseconds(1))
    vector = nanoseconds(32) - nanoseconds(16)
    assert nanoseconds(81) == pytest.approx(nanoseconds(16) + 5 * vector) == nanoseconds(96)
    assert 0 < vector < nanoseconds(1)


def test_cost_macs_means_the_learned_connections_only() -> None:
    """λ keeps its meaning whatever is excluded."""
    group = connection_groups(
        Mixed(), cost="macs", example_input=torch.zeros(1, 2, 6, 6), exclude=["conv"]
    )[0]
    sizes = [p.numel() for _, p in group["params"]]
    weighted = sum(c * n for c, n in zip(group["costs"], sizes, strict=True))
    assert weighted == pytest.approx(sum(sizes))


# --- uses and budgets -----------------------------------------------------------------------------


class _Attention(nn.Module):
    """Queries and keys of different lengths: 3 and 7 tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **kwargs)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.attention(query, key=key, value=value)[0]


@pytest.mark.parametrize(
    ("build", "inputs", "expected"),
    [
        pytest.param(lambda: nn.Linear(3, 2), [(1, 3)], {"weight": 1}, id="linear"),
        pytest.param(lambda: nn.Linear(3, 2), [(1, 5, 3)], {"weight": 5}, id="linear-tokens"),
        pytest.param(
            # (9 + 2·1 − 3) / 2 + 1 = 5 by (7 + 2·0 − 3) / 1 + 1 = 5
            lambda: nn.Conv2d(3, 8, 3, stride=(2, 1), padding=(1, 0)),
            [(1, 3, 9, 7)],
            {"weight": 25},
            id="conv",
        ),
        pytest.param(
            lambda: nn.Conv2d(8, 8, 3, groups=8, padding=1), [(1, 8, 6, 6)], {"weight": 36}, id="dw"
        ),
        pytest.param(
            # dilated: 10 − 2·(3 − 1) = 6
            lambda: nn.Conv1d(2, 4, 3, dilation=2),
            [(1, 2, 10)],
            {"weight": 6},
            id="dilated",
        ),
        pytest.param(
            # each weight meets each of the 4 × 5 input positions
            lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2),
            [(1, 4, 4, 5)],
            {"weight": 20},
            id="transposed",
        ),
        pytest.param(
            lambda: _Attention(batch_first=True),
            [(1, 3, 4)] * 3,
            {"attention.in_proj_weight": 3, "attention.out_proj.weight": 3},
            id="self-attention",
        ),
        pytest.param(
            # a third of in_proj works on 3 queries, a third on 7 keys, a third on 7 values
            lambda: _Attention(batch_first=True),
            [(1, 3, 4), (1, 7, 4), (1, 7, 4)],
            {"attention.in_proj_weight": (3 + 7 + 7) / 3, "attention.out_proj.weight": 3},
            id="cross-attention",
        ),
        pytest.param(
            lambda: _Attention(kdim=5, vdim=6),
            [(3, 1, 4), (7, 1, 5), (7, 1, 6)],
            {
                "attention.q_proj_weight": 3,
                "attention.k_proj_weight": 7,
                "attention.v_proj_weight": 7,
                "attention.out_proj.weight": 3,
            },
            id="kdim-vdim",
        ),
        pytest.param(_Twice, [(1, 4)], {"block.weight": 2, "left.weight": 2}, id="shared"),
        pytest.param(Mixed, [(1, 2, 6, 6)], MIXED_USES, id="mixed"),
    ],
)
def test_weight_uses_by_hand(
    build: Callable[[], nn.Module], inputs: list[tuple[int, ...]], expected: dict[str, float]
) -> None:
    uses = weight_uses(build(), tuple(torch.zeros(s) for s in inputs))
    assert uses == pytest.approx(expected)


def test_weight_uses_of_a_transformer_layer_see_past_the_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    uses = weight_uses(layer, torch.zeros(1, 5, 8))
    assert uses == {
        "self_attn.in_proj_weight": 5,
        "self_attn.out_proj.weight": 5,
        "linear1.weight": 5,
        "linear2.weight": 5,
    }
    assert torch.backends.mha.get_fastpath_enabled()


def _total_macs(model: nn.Module, size: int) -> int:
    uses = weight_uses(model, torch.zeros(1, 3, size, size))
    return sum(b.macs_dense for b in layer_budgets(model, uses))


def test_resnet18_has_the_published_macs() -> None:
    # 1.814 G at 224 × 224 for convolutions and the classifier (timm, torchvision: "1.81 GFLOPS").
    assert _total_macs(timm.create_model("resnet18"), 224) == 1_814_073_344


def test_weight_uses_leaves_the_model_as_it_was() -> None:
    model = Mixed()
    model.bn.eval()  # modes that differ between modules must come back as they were
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    weight_uses(model, torch.ones(1, 2, 6, 6))
    assert [m.training for m in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu" and torch.equal(value, before[name]), name
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


class _Recurrent(nn.Module):
    """One block under two names, as weight-shared networks have it, and a weight of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.again = self.first
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(self.again(self.first(x))))


def test_a_module_with_two_names_comes_back_whole() -> None:
    model = _Recurrent()
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    assert weight_uses(model, torch.ones(1, 4)) == {"first.0.weight": 2, "one.weight": 2}
    after = dict(model.named_parameters(remove_duplicate=False))
    assert {name: id(p) for name, p in after.items()} == before
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    optimizer = SCL(
        connection_groups(model, cost="macs", example_input=torch.ones(1, 4)), lr=0.1, lam=0.1
    )
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_weight_uses_cleans_up_after_a_failure() -> None:
    model = Mixed().train()
    with pytest.raises(RuntimeError):
        weight_uses(model, torch.zeros(1, 5, 6, 6))  # five channels, the model takes two
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_layer_budgets() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(32, 3))
    uses = weight_uses(model, torch.zeros(1, 1, 4, 4))
    mask = torch.zeros(2, 1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = True
    conv, linear = layer_budgets(model, uses, {"0.weight": mask})
    assert (conv.layer, conv.shape) == ("0.weight", (2, 1, 3, 3))
    assert (conv.connections, conv.live, conv.density) == (18, 3, 3 / 18)
    assert (conv.macs_dense, conv.macs) == (18 * 16, 3 * 16)
    # Without a mask it counts as dense: opted-out layers are part of the budget.
    assert (linear.connections, linear.live, linear.density) == (96, 96, 1.0)
    assert (linear.macs_dense, linear.macs) == (96, 96)


def test_layer_budgets_of_a_trained_network_count_its_zeros() -> None:
    model = Mixed()
    optimizer = SCL(connection_groups(model, exclude=["head"]), lr=0.1, lam=0.5, mask_lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 6, 6)).square().mean().backward()
        optimizer.step()
    uses = weight_uses(model, torch.zeros(1, 2, 6, 6))
    budgets = layer_budgets(model, uses, optimizer.masks())
    assert [b.layer for b in budgets] == list(MIXED_USES)
    for b in budgets:
        assert b.live == int(model.get_parameter(b.layer).count_nonzero())
        assert b.macs == MIXED_USES[b.layer] * b.live
    assert sum(b.live for b in budgets) < sum(b.connections for b in budgets)


def test_shared_weights_are_budgeted_once() -> None:
    model = _Twice()
    budgets = layer_budgets(model, weight_uses(model, torch.zeros(1, 4)))
    assert [(b.layer, b.connections, b.macs_dense) for b in budgets] == [
        ("block.weight", 16, 32),
        ("left.weight", 16, 32),
    ]


def test_every_option_of_scl_is_an_option_of_its_groups_and_no_other() -> None:
    model = nn.Linear(4, 3)
    options = {
        name: parameter.default
        for name, parameter in inspect.signature(SCL.__init__).parameters.items()
        if name not in ("self", "params", "lr", "lam")
    }
    group = connection_groups(model, lr=0.1, lam=0.2, **options)[0]
    assert options.items() <= group.items()
    with pytest.raises(ValueError, match="unknown option 'mask_Ir': SCL knows "):
        SCL(connection_groups(model, mask_Ir=0.1), lr=0.1, lam=0.2)
