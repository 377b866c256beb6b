"""One export, from what was asked for to the folder that holds all of it or does not exist."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.config import DataConfig
from data.files import new_folder, remove_leftovers
from data.stream.pipeline import ShardDataset
from launcher.checkpoints.disk_space import shortage
from launcher.errors import RunError, UsageError, disk_refusal
from launcher.evaluation.samples import ORIGIN_NAME, read_known
from launcher.export.asked import ONNX, Options, check_options
from launcher.export.formats import WRITERS
from launcher.export.job import Job, Written
from launcher.export.source import Described, Source, open_source
from launcher.folder.results import ReportError
from launcher.recipe.model import CUT_FILE
from launcher.reports.card import write_card
from sclcore.export import ExportError
from sclcore.export.folding import fold_batch_norm
from sclcore.export.graphs import same_outputs
from sclcore.export.removal import remove_dead_features

REPORT = "export.json"
_PACKAGES = ("scl-train", "torch", "timm", "safetensors", *ONNX)


def export(
    options: Options, said: Described | None = None, say: Callable[[str], object] = lambda _: None
) -> dict[str, Any]:
    """Write the folder `options.out` and return what its export.json says.

    All is written and checked in a hidden folder beside `out`, which then gets its name: whatever
    fails, and wherever it is killed, there is no half of an export. `say` hears of each step.

    Raises UsageError before anything is written, RunError where a format does not hold what it
    should; CheckpointError from a checkpoint.
    """
    check_options(options)
    source = open_source(options.source, said)
    _check_live(source)
    out = options.out
    _make_room(source, out)
    try:
        with new_folder(out) as staging:
            return _write(options, source, staging, say)
    except ExportError as error:
        raise RunError(f"{error}; nothing was written to {out}") from error
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error}") from error


def _check_live(source: Source) -> None:
    """UsageError where the model of a finished run has other connections than its table says."""
    for name, parameter in source.model.named_parameters():
        live = (source.live or {}).get(name)
        nonzero = int(torch.count_nonzero(parameter))
        if live is not None and nonzero > live:
            raise UsageError(
                f"{source.file} is not the model of {source.run}: {name} has {nonzero:,} weights, "
                f"and layers.csv says {live:,}"
            )


def _make_room(source: Source, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Of exports that were killed.
        remove_leftovers(out.parent)
    except OSError as error:
        refusal = disk_refusal(error)
        raise refusal or UsageError(f"--out {out} cannot be made: {error.strerror}") from error
    size = sum(v.numel() * v.element_size() for v in source.model.state_dict().values())
    if lack := shortage(out.parent, size):
        raise UsageError(f"--out {out}: {lack}; choose another place")


def _write(
    options: Options, source: Source, folder: Path, say: Callable[[str], object]
) -> dict[str, Any]:
    job = Job(options, source, source.model)
    changes = _changed(job, say)
    written: dict[str, Written] = {}
    for name in options.formats:
        say(f"writing {name}")
        written[name] = WRITERS[name](job, folder)
    if (cut := source.network.cut) is not None:
        (folder / CUT_FILE).write_text(cut.model_dump_json() + "\n", encoding="utf-8")
    report = _report(job, folder, written, changes)
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    _add_card(source, folder, report, say)
    return report


def _changed(job: Job, say: Callable[[str], object]) -> dict[str, Any]:
    """Remove dead features and fold batch norm in `job.graph`, as asked; what was done."""
    options, example = job.options, job.example[:1]
    changes: dict[str, Any] = {}
    if options.remove_dead:
        say("removing dead features")
        job.graph, removal = remove_dead_features(job.graph, example)
        changes["removed"] = removal.as_dict()
    if options.fold_bn:
        say("folding batch norm")
        job.graph, changes["folded"], changes["not_folded"] = fold_batch_norm(job.graph, example)
    if changes:
        changes["difference"] = same_outputs(
            job.source.model, job.graph, job.example, "the changed model"
        )
    return changes


def _report(
    job: Job, folder: Path, written: dict[str, Written], changes: dict[str, Any]
) -> dict[str, Any]:
    source = job.source
    budgets = job.budgets()
    total, live = (sum(getattr(b, key) for b in budgets) for key in ("connections", "live"))
    files = {}
    for name, file in written.items():
        size = (folder / file.file).stat().st_size
        files[name] = {"bytes": size, **{k: v for k, v in asdict(file).items() if v != {}}}
    return {
        "scl_export": 1,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": {
            "file": str(source.file),
            "run": str(source.run) if source.run else None,
            "step": source.step,
            "finished": source.finished,
        },
        "network": source.network.as_dict() | _of_images(source, job.options.data),
        "connections": total,
        "live": live,
        "density": live / total if total else 1.0,
        "macs_dense": sum(b.macs_dense for b in budgets),
        "macs": sum(b.macs for b in budgets),
        "parameters": sum(p.numel() for p in source.model.parameters()),
        "files": files,
        "changes": changes,
        "sizes": job.sizes,
        "accuracy": job.accuracy,
        "2:4": job.patterns,
        "versions": _versions(),
    }


def _of_images(source: Source, data: str | None) -> dict[str, Any]:
    """How images become inputs and outputs names, where a run or shards at hand say it."""
    validation = source.validation_set(data)
    if validation is not None:
        dataset: ShardDataset = validation[0]
        stats, names = dataset.manifest.image, dataset.manifest.names
    elif source.run is not None and (source.run / ORIGIN_NAME).is_file():
        known = read_known(source.run)
        stats, names = known.image, known.names
    else:
        return {}
    values = (source.recipe or {}).get("data") or {}
    config = DataConfig.model_validate(
        {"path": "", **values, "image_size": source.network.image_size}
    )
    return {
        "shorter_side": round(config.image_size / config.eval_crop_ratio),
        "interpolation": config.interpolation,
        "mean": stats.mean,
        "std": stats.std,
        "classes": names,
    }


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _add_card(
    source: Source, folder: Path, report: dict[str, Any], say: Callable[[str], object]
) -> None:
    if source.run is None:
        return
    try:
        write_card(source.run, folder, report)
    except (UsageError, ReportError) as error:
        # The recipe of a run by another version: the model is no worse for it.
        say(f"no model card: {error}")
