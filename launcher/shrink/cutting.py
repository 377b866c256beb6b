"""One cut of a network: judged by samples, made, measured, and written as a folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from data.files import remove_leftovers
from launcher.errors import UsageError
from launcher.export.source import Source
from launcher.run.validate import evaluate
from launcher.shrink.asked import Asked
from launcher.shrink.samples import training_samples
from launcher.shrink.stopwatch import Stopwatch
from launcher.shrink.ways import Say, Smaller, make_smaller, random_images
from launcher.shrink.write import fine_tuning, size_of, write_network
from sclcore.export import ExportError
from sclcore.export.cut import Cut


def begin(asked: Asked, source: Source, say: Say) -> dict[str, Any]:
    """What all cuts are compared with: accuracy, size and latency of the network as it is."""
    example = source.network.example(1)
    start: dict[str, Any] = size_of(source.model, example) | {"top1": top1(source, asked.data)}
    if asked.by == "latency":
        say("measuring the network as it is")
        watch = _stopwatch(asked, source, None)
        start["today_ms"] = watch.today
    return start


def _stopwatch(asked: Asked, source: Source, today: float | None) -> Stopwatch:
    images = random_images(source.network.example(1), asked.batch)
    return Stopwatch(source.model, images, threads=asked.threads, rounds=asked.rounds, today=today)


def top1(source: Source, data: str | None) -> float | None:
    """Top-1 on the validation split, a share of 1; None where there are no shards."""
    validation = source.validation_set(data)
    if validation is None:
        return None
    dataset, config = validation
    config = config.model_copy(update={"workers": 0})
    dtype = next(source.model.parameters()).dtype
    model = source.model.eval()
    results = evaluate(
        lambda images: model(images.to(dtype)), dataset, config, device=torch.device("cpu")
    )
    return results["val/top1"]


def make_cut(
    asked: Asked,
    source: Source,
    now: Source,
    folder: Path,
    number: int,
    start: dict[str, Any],
    say: Say,
) -> bool:
    """Cut the network `now` once more, into `folder`; whether anything could go.

    `source` is what the whole shrinking began with.
    """
    samples = training_samples(source, asked.data, asked.samples)
    example = source.network.example(1)
    watch = _stopwatch(asked, source, start["today_ms"]) if asked.by == "latency" else None
    try:
        smaller = make_smaller(now.model, example, samples, asked, watch, number / asked.cuts, say)
        if smaller.cut is None:
            if asked.in_one:
                raise UsageError(nothing_to_take(asked))
            return False
        _write(asked, source, now, folder, number, start, smaller, samples[0][0])
    except ExportError as error:
        raise UsageError(f"{asked.source} cannot be made smaller: {error}") from error
    return True


def nothing_to_take(asked: Asked) -> str:
    """Why there was nothing to cut, and what would help."""
    if asked.by == "latency":
        return f"{asked.source} is as fast as asked already"
    if asked.share is None:
        return (
            f"nothing of {asked.source} can go without loss, for no unit depends on others: let "
            "--share 10% take those that come nearest"
        )
    return f"nothing of {asked.source} can go: each layer has one feature left"


def _write(
    asked: Asked,
    source: Source,
    now: Source,
    folder: Path,
    number: int,
    start: dict[str, Any],
    smaller: Smaller,
    images: torch.Tensor,
) -> None:
    assert smaller.cut is not None
    cut = Cut(model=source.network.config.name)
    cut = (now.network.cut or cut).then(smaller.cut)
    network = dataclasses.replace(source.network, cut=cut)
    written = dataclasses.replace(source, model=smaller.model, network=network)
    report = {
        "scl_shrink": 1,
        "source": str(asked.source),
        "by": asked.by,
        "cut": number,
        "before": start,
        "after": size_of(smaller.model, network.example(1)) | {"top1": top1(written, asked.data)},
        **dict(smaller.facts),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent)
    recipe = fine_tuning(source, folder, cut, asked)
    write_network(folder, smaller.model, network, recipe, report, images)
