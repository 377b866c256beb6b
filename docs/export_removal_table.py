"""The table of docs/export_removal.md: networks in which rows and columns were zeroed at random.

    python docs/export_removal_table.py [NETWORK …]

Random weights and, in a fifth of the filters and a fifth of the input channels of every layer
(not in depthwise ones), zeros; batch norm shifts are normal with standard deviation 1/2. No
training: the table shows what the rules reach in each architecture, not what a trained one loses.
"""

from __future__ import annotations

import sys

import timm
import torch
from torch import nn

from sclcore.export.removal import RemovalReport, remove_dead_features

NETWORKS = (
    *("resnet18", "resnet50", "mobilenetv2_100", "efficientnet_b0", "regnety_002", "densenet121"),
    *("convnext_atto", "vit_tiny_patch16_224"),
)


@torch.no_grad()
def pruned(name: str) -> nn.Module:
    """The same channels for all layers of a width, so that those of residual sums meet."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    chosen: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
            nn.init.ones_(module.weight)  # timm starts the last of each residual branch at 0
        elif isinstance(module, nn.Linear | nn.Conv2d):
            for dim in (0, 1):
                size = module.weight.shape[dim]
                dead = chosen.setdefault(size, torch.rand(size) < 0.2)
                if size > 3 and getattr(module, "groups", 1) == 1:
                    module.weight.index_fill_(dim, dead.nonzero().flatten(), 0.0)
    return model


def row(name: str, report: RemovalReport) -> str:
    left = ", ".join(f"{count:,} {reason}" for reason, count in report.left.items())
    features = f"{report.features_before:,} → {report.features_after:,}"
    parameters = f"{report.parameters_before / 1e6:.1f} → {report.parameters_after / 1e6:.1f} M"
    macs = f"{report.macs_before / 1e6:,.0f} → {report.macs_after / 1e6:,.0f} M"
    return f"| {name} | {features} | {parameters} | {macs} | {left} |"


def main() -> None:
    print("| network | features | parameters | MACs | dead, but left |")
    print("| --- | --- | --- | --- | --- |")
    for name in sys.argv[1:] or NETWORKS:
        _, report = remove_dead_features(pruned(name), torch.zeros(1, 3, 224, 224))
        print(row(name, report), flush=True)


if __name__ == "__main__":
    main()
