"""Which configurations are points of one curve: those that differ in the knob of sparsity alone."""

from __future__ import annotations

from collections.abc import Iterable

from launcher.compare.configurations import Configuration

# What a method is told of how sparse to become; all else that differs is another experiment.
_KNOBS = {
    f"method.{name}"
    for name in ("lam", "target_density", "target_macs", "density", "s_weight_decay")
}


def series_of(configurations: Iterable[Configuration]) -> list[list[Configuration]]:
    """The curves, each of one method. A run whose recipe is unknown is on none."""
    curves: dict[str, list[Configuration]] = {}
    for c in configurations:
        if c.settings:
            curves.setdefault(_rest(c), []).append(c)
    return [*curves.values()]


def _rest(c: Configuration) -> str:
    """What runs on one curve share: all settings but the knobs' values, and which target is set."""
    rest = {key: value for key, value in c.settings.items() if key not in _KNOBS}
    rest["data.path"] = c.runs[0].data
    targets = [key for key in _KNOBS if "target" in key and c.settings.get(key) is not None]
    return repr((c.method, targets, sorted((k, str(v)) for k, v in rest.items())))
