"""HAM and sHAM files: few different values in each layer, as Huffman codewords."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from launcher.errors import UsageError
from launcher.export.asked import read_sharing
from launcher.export.job import Job, Written
from launcher.export.sizes import coded_bound, coded_sizes
from sclcore.export import ExportError, NothingSmaller, save_huffman
from sclcore.export.huffman.file import CodedEntry
from sclcore.network.connections import find_connections
from sclcore.sharing import Sharing, shared_weight


def write_ham(job: Job, folder: Path) -> Written:
    return _write(job, folder, "ham")


def write_sham(job: Job, folder: Path) -> Written:
    return _write(job, folder, "sham")


def _write(job: Job, folder: Path, form: str) -> Written:
    path, share = folder / f"model.{form}", job.options.share
    connections = [c.name for c in find_connections(job.source.model)]
    state = job.dense_state()
    if share is not None:
        state |= _shared({name: state[name] for name in connections}, share)
    try:
        entries = save_huffman(
            state, path, form=form, connections=connections, metadata=job.about()
        )
    except NothingSmaller as error:
        mend = f"with fewer values than --share {share}" if share else "with --share kmeans:32"
        raise UsageError(f"--format {form}: {error}: let them share values, {mend}") from error
    job.add_sizes(folder, coded_sizes(form, path, entries, state))
    checked = "read back, bit for bit"
    if share is not None:
        checked = f"read back, bit for bit what {share} shares"
        _measure_shared(job, state, share)
    speed = "a smaller file; loaded, it is dense again and as fast"
    return Written(path.name, checked, speed, {"share": share, "layers": _layers(entries, state)})


def _shared(weights: dict[str, Tensor], share: str) -> dict[str, Tensor]:
    kind, count = read_sharing(share)
    sharing, shared = Sharing(kind, count), {}
    for name, weight in weights.items():
        try:
            shared[name] = shared_weight(weight, sharing)
        except ValueError as error:
            raise ExportError(f"{name} cannot be shared: {error}") from None
    return shared


def _measure_shared(job: Job, state: dict[str, Tensor], share: str) -> None:
    if job.measure("as trained", job.source.model) is None:
        return
    model = copy.deepcopy(job.source.model)
    model.load_state_dict(state)
    job.measure(f"shared, {share}", model)


def _layers(entries: Sequence[CodedEntry], state: dict[str, Tensor]) -> dict[str, Any]:
    """Of each layer that is coded: ψ, the share of the bytes of its elements in float32."""
    return {
        entry.name: {
            "psi": sum(entry.sections) / (4 * state[entry.name].numel()),
            "psi_bound": coded_bound(entry, state[entry.name]) / (4 * state[entry.name].numel()),
        }
        for entry in entries
        if entry.form != "plain"
    }
