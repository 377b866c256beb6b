"""One small network per rule, in which what is dead is known by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn

import sclcore.export.removal as removal
from sclcore.export import ExportError
from sclcore.export.removal import RemovalReport, remove_dead_features
from sclcore.export.removal.proof import COUPLED, LAST, NO_BIAS, PADDED, VARYING

# Sums of at most some hundred terms of size 1: float64 leaves 10⁻¹⁵ of each.
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-13}
ROUNDED: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}

Shape = tuple[int, ...]


class Net(nn.Module):
    """Modules by name, and a function that calls them."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)
        _randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def _randomise(model: nn.Module) -> None:
    """No number is 0 or trivial, batch norms are as after training."""
    for module in model.modules():
        for p in module.parameters(recurse=False):
            nn.init.normal_(p)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]


def zero(tensor: Tensor, *index: Any) -> None:
    with torch.no_grad():
        tensor[index] = 0.0


def fill(tensor: Any, index: Any, value: float) -> None:
    with torch.no_grad():
        tensor[index] = value


def check(model: nn.Module, shape: Shape, *others: Shape) -> tuple[Any, RemovalReport]:
    """Remove; outputs are equal in float64 and float32, on the example's shape and on others."""
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    smaller, report = remove_dead_features(model, torch.zeros(shape))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    exact, _ = remove_dead_features(model.double(), torch.zeros(shape))
    for size in (shape, *others):
        x = torch.randn(size, dtype=torch.float64)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(exact(x), expected, **EXACT)
            torch.testing.assert_close(smaller(x.float()), expected.float(), **ROUNDED)
        assert expected.std() > 0
    model.float()
    again = remove_dead_features(smaller, torch.zeros(shape))[1]
    assert again.features_after == again.features_before, "one pass finds everything"
    return smaller, report


def sizes(report: RemovalReport) -> dict[str, tuple[int, int]]:
    """Layer → (inputs, features) afterwards."""
    return {
        layer.layer.removesuffix(".weight"): (layer.inputs_after, layer.features_after)
        for layer in report.layers
    }


def test_a_neuron_without_inputs_or_without_readers_goes() -> None:
    net: Any = Net(
        lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))),
        a=nn.Linear(4, 6),
        b=nn.Linear(6, 5),
        c=nn.Linear(5, 3, bias=False),
    )
    zero(net.a.weight, 1)
    fill(net.a.bias, 1, 0.7)  # relu(0.7) goes into b's bias
    zero(net.a.weight, 2)
    fill(net.a.bias, 2, -0.7)  # relu(−0.7) is 0
    zero(net.b.weight, slice(None), 3)  # nobody reads a's 3
    zero(net.c.weight, slice(None), 0)  # nobody reads b's 0 …
    zero(net.b.weight, slice(1, None), 4)  # … which alone reads a's 4
    zero(net.b.weight, 1)
    fill(net.b.bias, 1, 0.9)  # a constant for c, which had no bias
    smaller, report = check(net, (1, 4), (7, 4))
    assert sizes(report) == {"a": (4, 2), "b": (2, 3), "c": (3, 3)}
    assert (smaller.a.out_features, smaller.b.in_features) == (2, 2)
    assert smaller.c.bias is not None
    assert report.parameters_after == (4 + 1) * 2 + (2 + 1) * 3 + (3 + 1) * 3
    assert report.macs_after == 4 * 2 + 2 * 3 + 3 * 3
    assert report.left == {}


def test_it_needs_no_gradients_of_the_caller() -> None:
    net: Any = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    zero(net[2].weight, slice(None), 1)
    with torch.no_grad():
        _, report = remove_dead_features(net, torch.zeros(1, 3))
    assert sizes(report) == {"0": (3, 3), "2": (3, 2)}


def _two_convolutions(padding: int, activation: nn.Module) -> Any:
    return Net(
        lambda m, x: m.b(m.act(m.bn(m.a(x)))),
        a=nn.Conv2d(2, 5, 3, padding=1, bias=False),
        bn=nn.BatchNorm2d(5),
        act=activation,
        b=nn.Conv2d(5, 4, 3, padding=padding, stride=2),
    )


def _constant_after_norm(net: Any, channel: int, value: float) -> None:
    """Give a dead filter the shift that makes the batch norm's result `value`."""
    with torch.no_grad():
        scale = (net.bn.running_var + net.bn.eps).rsqrt() * net.bn.weight
        net.bn.bias[channel] = value + (net.bn.running_mean * scale)[channel]


@pytest.mark.parametrize(
    "activation", [nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Hardswish()]
)
def test_a_constant_goes_through_an_unpadded_convolution(activation: nn.Module) -> None:
    net: Any = _two_convolutions(0, activation)
    zero(net.a.weight, [0, 3])
    _constant_after_norm(net, 3, 0.8)
    _, report = check(net, (1, 2, 9, 9), (3, 2, 12, 11))
    assert sizes(report) == {"a": (2, 3), "b": (3, 4)}


def test_zero_padding_is_no_constant() -> None:
    net: Any = _two_convolutions(1, nn.ReLU())
    zero(net.a.weight, [0, 1, 2])
    _constant_after_norm(net, 0, 0.8)  # stays: the image's edge would differ
    _constant_after_norm(net, 1, -0.8)  # goes: relu makes it 0, as the padding is
    _constant_after_norm(net, 2, 0.8)
    zero(
        net.b.weight, slice(None), 2, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]
    )  # centre only
    _, report = check(net, (1, 2, 8, 8), (2, 2, 11, 7))
    assert sizes(report) == {"a": (2, 3), "b": (3, 4)}
    assert report.left == {PADDED: 1}


def test_a_map_of_one_pixel_hides_no_padding() -> None:
    """On the example's 1 × 1 map a constant looks constant after the convolution; at 4 × 4 not."""
    net: Any = Net(
        lambda m, x: m.c(torch.relu(m.b(m.a(x)))),
        a=nn.Conv2d(2, 3, 1),
        b=nn.Conv2d(3, 3, 3, padding=1, groups=3),
        c=nn.Conv2d(3, 2, 1),
    )
    zero(net.a.weight, 0)
    _, report = check(net, (1, 2, 1, 1), (1, 2, 4, 4))
    assert sizes(report)["a"] == (2, 3)
    assert report.left == {PADDED: 2}  # of each of the two layers one


def test_a_depthwise_convolution_passes_features_on() -> None:
    net: Any = Net(
        lambda m, x: m.c(torch.nn.functional.silu(m.bn(m.b(torch.relu(m.a(x)))))),
        a=nn.Conv2d(2, 6, 1),
        b=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        bn=nn.BatchNorm2d(6),
        c=nn.Conv2d(6, 3, 1),
    )
    zero(net.b.weight, 0)  # a constant whatever comes in
    zero(net.a.weight, 1)
    fill(net.a.bias, 1, -1.0)  # 0 comes in
    zero(net.a.weight, 2)
    fill(net.a.bias, 2, 1.0)  # 1 comes in and meets the padding: stays
    zero(net.c.weight, slice(None), 3)  # nobody reads it
    smaller, report = check(net, (1, 2, 6, 6), (2, 2, 9, 5))
    assert sizes(report) == {"a": (2, 3), "b": (3, 3), "c": (3, 3)}
    assert smaller.b.groups == smaller.b.in_channels == 3
    assert report.left == {PADDED: 2}  # a's feature and what b makes of it


def test_of_a_grouped_convolution_whole_groups_go() -> None:
    net: Any = Net(
        lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))),
        a=nn.Conv2d(2, 6, 1),
        b=nn.Conv2d(6, 9, 3, groups=3),
        c=nn.Conv2d(9, 3, 1),
    )
    zero(net.b.weight, slice(0, 3))  # the first group
    zero(net.b.weight, 5)  # a part of the second
    smaller, report = check(net, (1, 2, 6, 6), (2, 2, 7, 7))
    assert sizes(report) == {"a": (2, 4), "b": (4, 6), "c": (6, 3)}
    assert smaller.b.groups == 2
    assert report.left == {COUPLED: 1}


def test_a_residual_channel_goes_when_every_branch_allows_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = torch.relu(x + m.bn(m.block(x)))
        return m.head(x.mean((2, 3)))

    net: Any = Net(
        forward,
        stem=nn.Conv2d(2, 5, 1),
        block=nn.Conv2d(5, 5, 1),
        bn=nn.BatchNorm2d(5),
        head=nn.Linear(5, 3),
    )
    zero(net.stem.weight, [0, 1])
    zero(net.block.weight, [0, 2])  # 0: both constant; 1 and 2: one of the two is alive
    zero(net.head.weight, slice(None), 3)
    zero(net.block.weight, slice(None), 3)  # 3: alive, and nobody reads it
    _, report = check(net, (1, 2, 4, 4), (2, 2, 6, 5))
    assert sizes(report) == {"stem": (2, 3), "block": (3, 3), "head": (3, 3)}
    assert report.left == {COUPLED: 2}


def test_concatenation_keeps_count_of_who_is_who() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = torch.cat([x, m.a(torch.relu(m.n1(x)))], 1)
        z = torch.cat([y, m.b(torch.relu(m.n2(y)))], 1)
        return m.head(torch.nn.functional.adaptive_avg_pool2d(torch.relu(m.n3(z)), 1).flatten(1))

    net: Any = Net(
        lambda m, x: forward(m, m.stem(x)),
        stem=nn.Conv2d(1, 4, 3),
        n1=nn.BatchNorm2d(4),
        a=nn.Conv2d(4, 3, 1),
        n2=nn.BatchNorm2d(7),
        b=nn.Conv2d(7, 3, 1),
        n3=nn.BatchNorm2d(10),
        head=nn.Linear(10, 2),
    )
    zero(net.stem.weight, 1)  # constant for all three readers
    zero(net.a.weight, 2)
    zero(net.head.weight, slice(None), 7)
    _, report = check(net, (1, 1, 6, 6), (3, 1, 8, 8))
    assert sizes(report) == {"stem": (1, 3), "a": (3, 2), "b": (5, 2), "head": (7, 2)}


def test_squeeze_and_excitation_follows_its_channel() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = torch.nn.functional.silu(m.bn(m.a(x)))
        gate = m.excite(torch.relu(m.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return m.c(x * gate)

    net: Any = Net(
        forward,
        a=nn.Conv2d(2, 6, 1, bias=False),
        bn=nn.BatchNorm2d(6),
        squeeze=nn.Conv2d(6, 3, 1),
        excite=nn.Conv2d(3, 6, 1),
        c=nn.Conv2d(6, 4, 3, padding=1),
    )
    zero(net.a.weight, [0, 1])
    zero(net.bn.bias, 0)
    zero(net.bn.running_mean, 0)  # silu(0) = 0, times whatever the gate says
    _constant_after_norm(net, 1, 0.5)  # times a gate that varies: stays
    zero(net.excite.weight, 2)  # a constant gate is as good as any other
    _, report = check(net, (1, 2, 5, 5), (2, 2, 6, 7))
    assert sizes(report)["a"] == (2, 5)
    assert sizes(report)["excite"] == (3, 5)
    assert sizes(report)["c"] == (5, 4)
    assert report.left == {COUPLED: 2}


def test_flattening_makes_a_channel_several_inputs() -> None:
    net: Any = Net(
        lambda m, x: m.head(torch.nn.functional.adaptive_avg_pool2d(m.a(x), 2).flatten(1)),
        a=nn.Conv2d(1, 4, 3, padding=1),
        head=nn.Linear(16, 3),
    )
    zero(net.a.weight, 1)
    zero(net.head.weight, slice(None), slice(8, 12))  # channel 2
    zero(net.head.weight, slice(None), slice(12, 15))  # three of the four of channel 3
    _, report = check(net, (1, 1, 6, 6), (2, 1, 9, 8))
    assert sizes(report) == {"a": (1, 2), "head": (8, 3)}


def _attention_net(**options: Any) -> Any:
    net: Any = Net(
        lambda m, x: m.head(x + m.attention(m.norm(x))),
        norm=nn.LayerNorm(8),
        attention=Attention(8, num_heads=4, qkv_bias=True, **options),
        head=nn.Linear(8, 3),
    )
    zero(net.attention.qkv.weight, slice(16, 18))  # values of head 0: constants, their bias
    zero(net.attention.proj.weight, slice(None), slice(4, 6))  # nobody reads head 2
    zero(net.attention.qkv.weight, slice(0, 2))  # queries of head 0
    zero(net.attention.qkv.weight, 22)  # one of two values of head 3
    return net


def test_heads_of_timms_attention_go() -> None:
    smaller, report = check(_attention_net(), (1, 5, 8), (2, 9, 8))
    assert smaller.attention.num_heads == 2
    assert sizes(report)["attention.qkv"] == (8, 12)
    assert sizes(report)["attention.proj"] == (4, 8)
    assert report.left == {COUPLED: 1}


def test_norms_over_what_a_head_holds_keep_it() -> None:
    net: Any = _attention_net(qk_norm=True, norm_layer=nn.LayerNorm)
    _, report = check(net, (1, 5, 8))
    assert report.features_after == report.features_before
    assert "layer_norm takes its statistics over it" in report.left


def test_layer_norm_keeps_its_stream_but_not_the_hidden_neurons() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.embed(x)
        return m.head(x + m.scale * m.fc2(torch.nn.functional.gelu(m.fc1(m.norm(x)))))

    net: Any = Net(
        forward,
        embed=nn.Linear(3, 6),
        norm=nn.LayerNorm(6),
        fc1=nn.Linear(6, 10),
        fc2=nn.Linear(10, 6),
        head=nn.Linear(6, 2),
    )
    net.scale = nn.Parameter(torch.randn(6))
    zero(net.embed.weight, 0)
    zero(net.fc2.weight, 0)  # a constant in the stream, but a part of the norm's statistics
    zero(net.fc1.weight, [2, 3])
    zero(net.fc2.weight, slice(None), 4)
    _, report = check(net, (1, 4, 3), (2, 7, 3))
    assert sizes(report) == {"embed": (3, 6), "fc1": (6, 7), "fc2": (7, 6), "head": (6, 2)}
    assert report.left == {"layer_norm takes its statistics over it": 2}


def test_a_scale_of_zero_ends_a_branch() -> None:
    """Layer scale: all of a block dies, but a layer keeps one feature."""
    net: Any = Net(
        lambda m, x: m.head(m.a(x) + m.scale * m.fc2(torch.relu(m.fc1(x)))),
        a=nn.Linear(3, 4),
        fc1=nn.Linear(3, 6),
        fc2=nn.Linear(6, 4),
        head=nn.Linear(4, 2),
    )
    net.scale = nn.Parameter(torch.zeros(4))
    smaller, report = check(net, (1, 3), (4, 3))
    assert sizes(report) == {"a": (3, 4), "fc1": (3, 1), "fc2": (1, 4), "head": (4, 2)}
    assert smaller.scale.shape == (4,)
    assert report.left == {LAST: 1, COUPLED: 4}


def test_a_scale_goes_with_its_feature() -> None:
    net: Any = Net(lambda m, x: m.head(m.scale * m.a(x)), a=nn.Linear(3, 4), head=nn.Linear(4, 2))
    net.scale = nn.Parameter(torch.randn(4))
    zero(net.a.weight, 1)
    smaller, _ = check(net, (1, 3), (5, 3))
    assert smaller.scale.shape == (3,)


def test_a_constant_that_differs_between_positions_stays() -> None:
    net: Any = Net(lambda m, x: m.head(m.a(x) + m.places), a=nn.Linear(3, 4), head=nn.Linear(4, 2))
    net.places = nn.Parameter(torch.randn(1, 5, 4))
    zero(net.a.weight, [0, 1])
    zero(net.head.weight, slice(None), 1)  # unread: goes, with its part of the embedding
    smaller, report = check(net, (1, 5, 3), (3, 5, 3))
    assert report.left == {VARYING: 1}
    assert smaller.places.shape == (1, 5, 3)


def test_a_layer_used_twice_takes_up_no_constant() -> None:
    net: Any = Net(
        lambda m, x: m.head(torch.tanh(m.b(torch.tanh(m.b(torch.tanh(m.a(x))))))),
        a=nn.Linear(3, 4),
        b=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    zero(net.a.weight, 0)
    zero(net.b.weight, 0)  # a constant, but another one on the way in than on the way round
    _, report = check(net, (1, 3), (6, 3))
    assert sizes(report)["b"] == (4, 4)
    assert set(report.left) == {NO_BIAS}


def test_tied_weights_stay_tied() -> None:
    net: Any = Net(
        lambda m, x: m.head(torch.tanh(m.b(torch.tanh(m.a(x)))) + torch.tanh(m.c(x))),
        a=nn.Linear(4, 4),
        b=nn.Linear(4, 4),
        c=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    )
    net.c.weight = net.b.weight
    zero(net.head.weight, slice(None), 1)
    smaller, report = check(net, (1, 4), (6, 4))
    assert smaller.c.weight is smaller.b.weight
    assert sizes(report)["b"] == (4, 3)


def test_a_normalisation_whose_scale_is_zero_makes_a_constant() -> None:
    net: Any = _two_convolutions(0, nn.ReLU())
    zero(net.bn.weight, 2)
    _, report = check(net, (1, 2, 9, 9))
    assert sizes(report) == {"a": (2, 4), "b": (4, 4)}


def test_classes_and_colours_stay() -> None:
    net: Any = Net(lambda m, x: m.head(m.a(x)), a=nn.Linear(3, 4), head=nn.Linear(4, 3))
    zero(net.a.weight, slice(None), 0)
    zero(net.head.weight, 1)
    _, report = check(net, (1, 3), (5, 3))
    assert sizes(report) == {"a": (3, 4), "head": (4, 3)}
    assert report.left == {"the network's output": 1}


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda m, x: m.head(m.a(x)[:, :2] * m.a(x)[:, 2:]), "cut at fixed numbers (slice in Net)"),
        (lambda m, x: m.head(m.a(x).cumsum(1)[:, 2:]), "cumsum is not understood"),
        (
            lambda m, x: m.head(m.a(x).view(-1, 2, 2).softmax(1).flatten(1)[:, :2]),
            "split into a fixed shape (view in Net)",
        ),
        (
            lambda m, x: m.head((m.a(x) * torch.arange(4.0))[:, 2:]),
            "combined with numbers the code holds (mul in Net)",
        ),
        (
            lambda m, x: m.head(m.a(x).mean(1, True) * x[:, :2]),
            "mean over the features (mean in Net)",
        ),
    ],
)
def test_what_is_not_understood_is_left_with_the_reason(
    forward: Callable[[Any, Tensor], Tensor], reason: str
) -> None:
    net: Any = Net(forward, a=nn.Linear(3, 4), head=nn.Linear(2, 2))
    zero(net.a.weight, 3)
    _, report = check(net, (1, 3), (5, 3))
    assert sizes(report)["a"] == (3, 4)
    assert set(report.left) == {reason}


def test_code_that_needs_its_sizes_keeps_them() -> None:
    net: Any = Net(
        lambda m, x: m.head(m.a(x).view(-1, 4 * 4)), a=nn.Conv2d(1, 4, 3), head=nn.Linear(16, 2)
    )
    zero(net.a.weight, 1)
    smaller, report = check(net, (1, 1, 4, 4))
    assert smaller.a.out_channels == 4
    assert "the code needs the sizes it was built with" in report.problem


def test_a_network_that_decides_by_values_is_refused() -> None:
    net: Any = Net(lambda m, x: m.a(x) if x.sum() > 0 else x, a=nn.Linear(3, 3))
    with pytest.raises(ExportError, match=r"Net cannot be traced .*must not depend on the values"):
        remove_dead_features(net, torch.zeros(1, 3))


def test_the_report_is_json() -> None:
    net: Any = Net(lambda m, x: m.head(m.a(x)), a=nn.Linear(3, 4), head=nn.Linear(4, 3))
    zero(net.a.weight, 1)
    _, report = check(net, (1, 3))
    told = json.loads(json.dumps(report.as_dict()))
    assert told["features_before"] - told["features_after"] == 1
    assert told["layers"][0] == {
        "layer": "a.weight",
        "inputs_before": 3,
        "inputs_after": 3,
        "features_before": 4,
        "features_after": 3,
        "left": {},
    }


def test_half_precision_stays_half_precision() -> None:
    net: Any = Net(lambda m, x: m.head(torch.relu(m.a(x))), a=nn.Linear(3, 4), head=nn.Linear(4, 3))
    zero(net.a.weight, 1)
    smaller: Any
    smaller, _ = remove_dead_features(net.bfloat16(), torch.zeros(1, 3, dtype=torch.bfloat16))
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert smaller.a.out_features == 3


def test_a_wrong_proof_does_not_get_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were padding forgotten, the comparison of outputs would say so."""
    from sclcore.export.removal import dependence, proof

    for module in (dependence, proof):
        monkeypatch.setattr(module, "touching_taps", lambda *_: None)
    net: Any = _two_convolutions(1, nn.ReLU())
    zero(net.a.weight, 0)
    _constant_after_norm(net, 0, 0.8)
    with pytest.raises(ExportError, match="computes something else"):
        removal.remove_dead_features(net.eval(), torch.zeros(1, 2, 8, 8))
