"""From predictions to numbers: accuracy, calibration, and which classes pay for sparsity.

scikit-learn has the curve of a reliability diagram, but neither its counts nor the calibration
error; torchmetrics has the error alone. Both are what the tests compare with.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binomtest, false_discovery_control

from launcher.errors import UsageError
from launcher.evaluation.predictions import Predictions

BINS = 15
FALSE_DISCOVERIES = 0.05


def measure(p: Predictions) -> dict[str, Any]:
    """Plain values: counts, shares of 1, nats; `calibration` has one entry per bin that is used.

    The expected calibration error is Σ share of the bin · |accuracy - mean confidence| over 15
    equal bins of confidence (Guo et al. 2017, arXiv 1706.04599), of the samples that decoded.
    """
    size, sound = len(p.label), p.sound
    bins = _calibration(p)
    off = sum(b["samples"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
    return {
        "samples": size,
        "corrupt": int((~sound).sum()),
        "correct": int(p.correct.sum()),
        "top1": float(p.correct.sum() / size),
        "top5": float((p.in_top5 & sound).sum() / size),
        "loss": float(p.loss[sound].mean()) if sound.any() else None,
        "ece": off / int(sound.sum()) if sound.any() else None,
        "calibration": bins,
        "classes": [
            {"class": name, "samples": int(here.sum()), "correct": int((p.correct & here).sum())}
            for name, here in zip(p.classes, _by_class(p), strict=True)
        ],
        "confusions": _confusions(p),
    }


def _confusions(p: Predictions) -> list[dict[str, Any]]:
    """Which class is taken for which other, and how often; the most frequent first."""
    wrong = p.sound & ~p.correct
    pairs, counts = np.unique(
        np.stack([p.label[wrong], p.predicted[wrong]]), axis=1, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    return [
        {
            "class": p.classes[pairs[0, k]],
            "predicted": p.classes[pairs[1, k]],
            "samples": int(counts[k]),
        }
        for k in order
    ]


def confusion_matrix(results: dict[str, Any]) -> np.ndarray:
    """Samples [class, predicted class] of what `measure` returned, in order of the classes."""
    place = {row["class"]: k for k, row in enumerate(results["classes"])}
    matrix = np.diag([row["correct"] for row in results["classes"]])
    for row in results["confusions"]:
        matrix[place[row["class"]], place[row["predicted"]]] += row["samples"]
    return matrix


def _calibration(p: Predictions) -> list[dict[str, Any]]:
    confidence, correct = p.confidence[p.sound], p.correct[p.sound]
    # Bins are closed on the right; the least confidence of all belongs to the first.
    edges = np.linspace(0, 1, BINS + 1)
    place = np.searchsorted(edges[1:-1], confidence, side="left")
    return [
        {
            "from": float(edges[i]),
            "to": float(edges[i + 1]),
            "samples": int((place == i).sum()),
            "confidence": float(confidence[place == i].mean()),
            "accuracy": float(correct[place == i].mean()),
        }
        for i in range(BINS)
        if (place == i).any()
    ]


def compare(p: Predictions, dense: Predictions) -> dict[str, Any]:
    """What `p` gets right and wrong where `dense` does otherwise, in all and by class.

    `lost` are the samples that only `dense` has right, `gained` those that only `p` has; `p` is
    McNemar's exact test that both are equally likely. Classes come with the greatest loss first;
    `significant` controls the false discovery rate over them at 5 % (Benjamini and Hochberg).

    Raises UsageError when the two did not see the same samples.
    """
    if p.classes != dense.classes or not np.array_equal(p.label, dense.label):
        raise UsageError(
            f"{p.run} and {dense.run} were not evaluated on the same samples ({p.source} and "
            f"{dense.source}): give both the same --data"
        )
    rows = []
    for name, here in zip(p.classes, _by_class(p), strict=True):
        size = int(here.sum())
        if size:
            counts = _discordant(p, dense, here)
            right = int((dense.correct & here).sum())
            change = counts["gained"] - counts["lost"]
            row = {"class": name, "samples": size, "dense": right, "sparse": right + change}
            rows.append(row | {"change": change / size} | counts)
    discovered = false_discovery_control([row["p"] for row in rows]) <= FALSE_DISCOVERIES
    for row, significant in zip(rows, discovered.tolist(), strict=True):
        row["significant"] = significant
    rows.sort(key=lambda row: (row["change"], row["p"]))
    everything = np.ones(len(p.label), np.bool_)
    both = p.sound & dense.sound
    return {
        "run": dense.run,
        "results": measure(dense),
        "disagreement": float((p.predicted != dense.predicted)[both].mean()),
        **_discordant(p, dense, everything),
        "classes": rows,
    }


def _by_class(p: Predictions) -> list[np.ndarray]:
    """The sound samples of each class."""
    return [(p.label == label) & p.sound for label in range(len(p.classes))]


def _discordant(p: Predictions, dense: Predictions, where: np.ndarray) -> dict[str, Any]:
    lost = int((dense.correct & ~p.correct & where).sum())
    gained = int((p.correct & ~dense.correct & where).sum())
    chance = binomtest(gained, lost + gained).pvalue if lost + gained else 1.0
    return {"lost": lost, "gained": gained, "p": float(chance)}
