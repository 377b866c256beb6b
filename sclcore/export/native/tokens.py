"""Operators on tokens: a ViT's patches, which the runtime has as maps of one row."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sclcore.export.native.attention import ATTENTION, order_of
from sclcore.export.native.building import Builder, filled, float32, text_of
from sclcore.export.native.steps import Kind, Step, Weights
from sclcore.export.removal.program import Ref
from sclcore.export.removal.program import Step as Operation

TOKENS = {"transpose", "permute", "cat", "layer_norm", "select", ATTENTION}


class Tokens(Builder):
    """A method for each operator of TOKENS, by the name that torch.export gives it."""

    def _transpose(self, operation: Operation) -> None:
        """A map's pixels as tokens."""
        source = operation.args[0]
        root, made = self.root[source.name], self.program.values[operation.name]
        given = self.program.values[root]
        wanted = torch.arange(given.numel()).reshape(given.shape)
        if given.ndim != 4 or made.ndim != 3:
            raise self.refused(operation, f"to {text_of(made.shape)} has no kernel")
        order = order_of(self.program, operation.name, root)
        if not torch.equal(order, wanted.flatten(2).transpose(1, 2)):
            raise self.refused(operation, f"to {text_of(made.shape)} has no kernel")
        # What leads here is no map any more.
        name = source.name
        while name != root:
            self.known_views.add(name)
            name = next(self.operations[name].refs()).name
        tokens, channels = made.shape[1:]
        self._embed(operation, self.tensor[root], np.zeros((channels, tokens), np.float32))

    _permute = _transpose

    def _cat(self, operation: Operation) -> None:
        """Constant tokens before those of the image."""
        parts, dim = filled(operation.args, (None, 0))
        *constants, images = parts
        made = self.program.values[operation.name]
        depending = [part for part in parts if part.name in self.root]
        if made.ndim != 3 or dim not in (1, -2) or depending != [images]:
            raise self.refused(operation, f"to {text_of(made.shape)} has no kernel")
        first = torch.cat([self.program.value(part) for part in constants], 1)[0]
        added = np.zeros((made.shape[2], made.shape[1]), np.float32)
        added[:, : len(first)] = float32(first.T)
        self._embed(operation, self.of(images), added, prefix=len(first))

    def add_constants(self, operation: Operation) -> bool:
        """Lower an addition of tokens and constants, such as their places, if it is one."""
        parts = self._with_constant(operation)
        if parts is None:
            return False
        images, value = parts
        made = self.program.values[operation.name]
        self._embed(operation, self.of(images), float32(value.expand(made.shape)[0].T))
        return True

    def scale_channels(self, operation: Operation) -> bool:
        """Lower a product of tokens and a constant for each channel, if it is one."""
        parts = self._with_constant(operation)
        if parts is None:
            return False
        images, factor = parts
        made = self.program.values[operation.name]
        if factor.shape[-1] != made.shape[2] or factor.numel() != made.shape[2]:
            return False
        zeros = np.zeros(made.shape[2], np.float32)
        self.each_channel(operation, float32(factor.flatten()), zeros, self.of(images))
        return True

    def _with_constant(self, operation: Operation) -> tuple[Ref, Tensor] | None:
        """The images and the constant of an operation on tokens, if it has one of each."""
        images = [a for a in operation.args if isinstance(a, Ref) and a.name in self.root]
        others = [a for a in operation.args if isinstance(a, Ref) and a.name not in self.root]
        is_tokens = self.program.values[operation.name].ndim == 3
        if not is_tokens or len(images) != 1 or len(others) != 1:
            return None
        return images[0], self.program.value(others[0])

    def _embed(self, operation: Operation, source: int, added: Weights, prefix: int = 0) -> None:
        """Add an EMBED, or make one with an EMBED before it that nothing else reads."""
        made = self.network.steps[-1] if self.network.steps else None
        reads = {self.root[ref.name] for ref in operation.refs() if ref.name in self.root}
        alone = all(self.readers[name] == 1 for name in reads)
        step = Step(Kind.EMBED, source, -1, before=(0, prefix), bias=added)
        if made is not None and made.kind is Kind.EMBED and made.out == source and alone:
            assert made.bias is not None and step.bias is not None
            self.network.steps.pop()
            step.bias[:, prefix:] += made.bias
            step.source, step.before = made.source, (0, prefix + made.before[1])
        self.add_step(operation, step)

    def _layer_norm(self, operation: Operation) -> None:
        source, shape, weight, bias, epsilon, _ = filled(
            operation.args, (None, None, None, None, 1e-5, True)
        )
        value = self.program.values[source.name]
        if value.ndim not in (2, 3) or list(shape) != [value.shape[-1]]:
            raise self.refused(operation, f"of {text_of(value.shape)} has no kernel")
        # Of a vector it is a group norm with one group.
        kind = Kind.LAYERNORM if value.ndim == 3 else Kind.NORMALISE
        self.add_step(operation, Step(kind, self.of(source), -1, low=epsilon))
        step, channels = self.network.steps[-1], value.shape[-1]
        scale = np.ones(channels, np.float32) if weight is None else self.constant(weight)
        self.each_channel(operation, scale, self.bias_of(bias, channels), step.out)

    def _select(self, operation: Operation) -> None:
        source, dim, index = operation.args
        value = self.program.values[source.name]
        if value.ndim != 3 or dim not in (1, -2):
            raise self.refused(operation, f"of {text_of(value.shape)} has no kernel")
        step = Step(Kind.SELECT, self.of(source), -1, before=(0, index % value.shape[1]))
        self.add_step(operation, step)

    def _scaled_dot_product_attention(self, operation: Operation) -> None:
        queries, keys, values, mask, _, causal = filled(
            operation.args, (None, None, None, None, 0.0, False)
        )
        roots = {self.root[ref.name] for ref in (queries, keys, values)}
        value = self.program.values[queries.name]
        [root, *more] = roots
        given = self.program.values[root]
        plain = mask is None and not causal and not operation.kwargs.get("attn_mask")
        if not plain or more or value.ndim != 4 or given.ndim != 3:
            raise self.refused(operation, "other than of one Linear layer's thirds has no kernel")
        batch, heads, tokens, depth = value.shape
        thirds = torch.arange(given.numel()).reshape(batch, tokens, 3, heads, depth)
        for third, ref in zip(thirds.permute(2, 0, 3, 1, 4), (queries, keys, values), strict=True):
            found = order_of(self.program, ref.name, root)
            if found.shape != third.shape or not torch.equal(found, third):
                raise self.refused(
                    operation, "other than of one Linear layer's thirds has no kernel"
                )
        scale = operation.kwargs.get("scale") or depth**-0.5
        step = Step(Kind.ATTEND, self.tensor[root], -1, groups=heads, low=scale)
        self._add_attention(operation, step)

    def _add_attention(self, operation: Operation, step: Step) -> None:
        """Its outcome is the view of it that has heads beside each other, as channels."""
        name, value = operation.name, self.program.values[operation.name]
        batch, heads, tokens, depth = value.shape
        merged = [
            view
            for view in self.known_views
            if self.root.get(view) == name and self.program.values[view].ndim == 3
        ]
        wanted = torch.arange(value.numel()).reshape(value.shape).transpose(1, 2)
        if len(merged) != 1 or not torch.equal(
            order_of(self.program, merged[0], name), wanted.reshape(batch, tokens, -1)
        ):
            raise self.refused(operation, "whose heads do not become channels has no kernel")
        step.out = self.tensor[name] = self.network.new((heads * depth, 1, tokens))
        step.name = operation.place.name or name
        self.network.steps.append(step)
