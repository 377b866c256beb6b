"""An evaluation from folders to results, and into a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data.files import atomic_write
from launcher.evaluation import measures, picture
from launcher.evaluation.predictions import predict_run
from launcher.evaluation.room import FILES


def evaluate(
    run: Path,
    *,
    against: Path | None = None,
    split: str = "val",
    data: str | None = None,
    model: Path | None = None,
) -> dict[str, Any]:
    """Everything that is measured of the run's model, as plain values; raises as `predict_run`."""
    predictions = predict_run(run, split=split, data=data, model=model)
    report: dict[str, Any] = {
        "run": predictions.run,
        "model": str(model or run / "model.safetensors"),
        "data": predictions.source,
        "results": measures.measure(predictions),
    }
    if against is not None:
        dense = predict_run(against, split=split, data=data)
        report["against"] = measures.compare(predictions, dense)
    return report


def write(report: dict[str, Any], out: Path) -> list[Path]:
    """Write `eval.json`, `eval.png` and `confusion.png` into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    content = (
        json.dumps(report, indent=1, ensure_ascii=False) + "\n",
        picture.draw(report),
        picture.draw_confusion(report),
    )
    for name, values in zip(FILES, content, strict=True):
        atomic_write(out / name, values)
    return [out / name for name in FILES]
