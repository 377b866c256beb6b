"""Samples vote for the units that they need.

Alqahtani, Xie, Essa and Jones (ICPR 2020) let activations vote for neurons; who votes, and how, is
not public. These rules are ours: in each layer a sample votes for the fewest units that make four
fifths of all that the layer's units contribute to its margin (`contributions`); classes have the
same say.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sclcore.export.shrink.units import Units

PART = 0.8
"""On a ConvNet of 160 channels 0.8 loses less than 0.5 or 0.3; on an MLP it makes no difference."""


def ballots(contributed: Tensor, layer_of: Tensor, part: float = PART) -> Tensor:
    """bool [samples, units]: whom each sample votes for.

    `contributed` [samples, units] is what each unit contributes, `layer_of` [units] the number of
    its layer. In each layer a sample's votes go to its largest contributions, whatever their sign,
    until they are `part` of the layer's sum. Where all are 0 it abstains.
    """
    voted = torch.zeros(contributed.shape, dtype=torch.bool)
    for layer in layer_of.unique().tolist():
        units = (layer_of == layer).nonzero().flatten()
        size = contributed[:, units].abs().double()
        ranked, order = size.sort(1, descending=True)
        # Those before which less than the part is reached: the one that reaches it has a vote too.
        before = ranked.cumsum(1) - ranked
        needed = (before < part * size.sum(1, keepdim=True)) & (ranked > 0)
        voted[:, units] = torch.zeros_like(needed).scatter(1, order, needed)
    return voted


def tally(voted: Tensor, labels: Tensor) -> Tensor:
    """The share of votes of each unit, 0 to 1: [units]. The mean over the classes that voted."""
    classes = labels.unique().tolist()
    return torch.stack([voted[labels == c].double().mean(0) for c in classes]).mean(0)


def votes(contributed: Tensor, labels: Tensor, units: Units) -> Tensor:
    """The share of votes of each unit of a network, and below them, among equals, the size.

    [units]; units with few votes can go first. Layers compete: a unit's votes are counted in its
    own layer, and compared with those of all others.
    """
    shares = tally(ballots(contributed, layers_of_units(units)), labels)
    size = contributed.double().abs().mean(0)
    # Less than any vote: it orders those that nobody, or equally many, voted for.
    return shares + 1e-6 * size / size.max().clamp_min(1e-300)


def layers_of_units(units: Units) -> Tensor:
    """The number of the layer that each unit is a feature of (the first, of several): [units]."""
    layer_of = torch.full((units.count,), -1)
    for number, reader in enumerate(units.readers):
        own = reader.units[reader.units >= 0]
        own = own[layer_of[own] < 0]
        layer_of[own] = number
    return layer_of
