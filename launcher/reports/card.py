"""The model card of an exported model: what it is, how it was made, what it can do, how to load it.

Markdown with the front matter that the Hugging Face Hub reads. Every number in it comes from the
files of the run and from what the exporter counted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import EvalResult, ModelCardData

from data.files import atomic_write
from launcher.folder.results import Layer, latest, name_of, percent, read_run, rows_of
from launcher.recipe.load import load_recipe
from launcher.recipe.model import CUT_FILE
from launcher.recipe.recipe import Recipe

CARD = "README.md"
_PAPER = "[Sparse Connectivity Learning](https://arxiv.org/abs/2201.05020)"
_UNKNOWN = "not recorded"


def write_card(run: Path, out: Path, report: Mapping[str, Any]) -> Path:
    """Write `README.md`, and the picture of the run where there is one, into `out`.

    `run` is the run's folder, `report` what the export of it says (its export.json). Raises
    ReportError or UsageError when `run` is no run.
    """
    recipe, record = load_recipe(run / "recipe.yaml"), read_run(run)
    origin = _json(run / "origin.json")
    results = latest(record)
    pictured = (run / "summary.png").is_file()
    if pictured:
        shutil.copyfile(run / "summary.png", out / "summary.png")
    sections = [
        _head(recipe, report, name_of(record, run)),
        "![Accuracy and density over training, and density by layer](summary.png)"
        if pictured
        else "",
        "## Results",
        _results(recipe, results, report),
        "## How to load it",
        *_loading(recipe, report),
        _images(recipe, report, origin),
        "## Density by layer",
        _layers(record.layers),
        "## How it was made",
        _making(run, report, origin),
        "Recipe, with every default filled in:",
        f"```yaml\n{yaml.safe_dump(recipe.as_dict(), sort_keys=False).rstrip()}\n```",
    ]
    body = "\n\n".join(section for section in sections if section)
    front = _front_matter(recipe, results, origin).to_yaml()
    atomic_write(out / CARD, f"---\n{front}\n---\n\n{body}\n")
    return out / CARD


def _front_matter(
    recipe: Recipe, results: Mapping[str, Any], origin: Mapping[str, Any]
) -> ModelCardData:
    dataset = origin.get("data", {}).get("dataset")
    measured = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="validation",
            metric_type="accuracy",
            metric_name=label,
            metric_value=round(100 * results[key], 4),
        )
        for key, label in (("top1", "top-1 accuracy, %"), ("top5", "top-5 accuracy, %"))
        if key in results and dataset
    ]
    return ModelCardData(
        model_name=recipe.name,
        library_name="timm" if _is_timms(recipe) and recipe.model.cut is None else "pytorch",
        pipeline_tag="image-classification",
        tags=["sparse", "pruning", recipe.method.name],
        # Without any, the library would ask for a name of the model's results all the same.
        eval_results=measured or None,
    )


def _head(recipe: Recipe, report: Mapping[str, Any], name: str) -> str:
    live, total = report["live"], report["connections"]
    text = (
        f"# {name}\n\n{recipe.model.name}, trained by the method `{recipe.method.name}`: "
        f"{live:,} of {total:,} connections are live ({percent(live / total)}). "
    )
    if recipe.method.name == "scl":
        text += f"Which they are was learned together with the weights, by {_PAPER}."
    if not report["source"]["finished"]:
        text += f" **Training had not finished: this is step {report['source']['step']:,}.**"
    return text


def _results(recipe: Recipe, results: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    rows = rows_of(dict(results))
    if (lam := getattr(recipe.method, "lam", None)) is not None:
        rows["λ"] = f"{lam:g}"
    rows |= {
        f"top-1 of the file, {what}": f"{100 * top1:.2f} %"
        for what, top1 in report.get("accuracy", {}).items()
    }
    text = _table(("", "on the validation split"), rows.items())
    return (
        f"{text}\n\nZeros alone make no dense kernel faster, only one that leaves them out (`scl "
        "export --format native`): what each file gains is said below."
    )


def _loading(recipe: Recipe, report: Mapping[str, Any]) -> Iterator[str]:
    files = report["files"]
    load = {
        "safetensors": ("from safetensors.torch import load_file", "load_file({!r})"),
        "state_dict": ("import torch", "torch.load({!r}, weights_only=True)"),
        "compact": ("from sclcore.export import load_compact", "load_compact({!r})"),
        "sham": ("from sclcore.export import load_huffman", "load_huffman({!r})"),
        "ham": ("from sclcore.export import load_huffman", "load_huffman({!r})"),
    }
    for kind, (imported, call) in load.items():
        if kind in files:
            builder, build = _build(recipe, report["network"])
            imports = sorted([builder, imported], key=lambda line: (line[0] == "f", line))
            state = call.format(files[kind]["file"])
            lines = [*imports, "", build, f"model.load_state_dict({state})", "model.eval()"]
            yield _python(lines)
            break
    if "onnx" in files:
        network = report["network"]
        shape = (1, network["in_chans"], network["image_size"], network["image_size"])
        yield _python(
            [
                "import numpy",
                "import onnxruntime",
                "",
                f"session = onnxruntime.InferenceSession({files['onnx']['file']!r})",
                "name = session.get_inputs()[0].name",
                f"[logits] = session.run(None, {{name: numpy.zeros({shape}, numpy.float32)}})",
            ]
        )
    rows = [
        (f"`{file['file']}`", f"{file['bytes']:,}", file["checked"], file["speed"])
        for file in files.values()
    ]
    yield _table(("file", "bytes", "how it was checked", "speed to expect"), rows)


def _build(recipe: Recipe, network: Mapping[str, Any]) -> tuple[str, str]:
    """(import, statement) that build the model."""
    classes, channels = network["num_classes"], network["in_chans"]
    if recipe.model.cut is not None or not _is_timms(recipe):
        # The copy beside the exported files.
        cut = f", cut={CUT_FILE!r}" if recipe.model.cut is not None else ""
        config = f"ModelConfig(name={recipe.model.name!r}, kwargs={recipe.model.kwargs!r}{cut})"
        return (
            "from launcher.models import ModelConfig, create_model",
            f"model = create_model({config}, num_classes={classes}, in_chans={channels})",
        )
    arguments = {"num_classes": classes, "in_chans": channels} | recipe.model.kwargs
    # Where weights came from at the start is nothing to do again.
    arguments.pop("pretrained_cfg_overlay", None)
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return "import timm", f"model = timm.create_model({recipe.model.name!r}, {given})"


def _is_timms(recipe: Recipe) -> bool:
    return timm.is_model(recipe.model.name.split(".")[0])


def _images(recipe: Recipe, report: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    data = recipe.data
    shorter = round(data.image_size / data.eval_crop_ratio)
    image = origin.get("data", {}).get("image") or report["network"]
    text = (
        f"Images: the shorter side scaled to {shorter} pixels ({data.interpolation}), the centre "
        f"square of {data.image_size}, values in [0, 1]"
    )
    if "mean" not in image:
        return f"{text}; mean and standard deviation: {_UNKNOWN}. {_reading(report)}"
    mean, std = (", ".join(f"{value:.6g}" for value in image[key]) for key in ("mean", "std"))
    return (
        f"{text}, less the mean ({mean}), divided by the standard deviation ({std}). "
        f"{_reading(report)}"
    )


def _reading(report: Mapping[str, Any]) -> str:
    """How bytes became pixels, where loaders differ (data/images/decode.py)."""
    mode = "L" if report["network"]["in_chans"] == 1 else "RGB"
    return (
        f'Files are read as Pillow\'s `convert("{mode}")` does, but for grey of 16 bits, which is '
        "divided by 256 and not clipped at 255; orientation in EXIF is ignored, and transparency "
        "without a background chosen at packing is dropped."
    )


def _layers(layers: list[Layer]) -> str:
    if not layers:
        return "The run has written no table of layers yet."
    return _table(
        ("layer", "connections", "live", "density"),
        [(f"`{x.name}`", f"{x.connections:,}", f"{x.live:,}", percent(x.density)) for x in layers],
    )


def _making(run: Path, report: Mapping[str, Any], origin: Mapping[str, Any]) -> str:
    path = run / "environment.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    starts = [json.loads(line) for line in lines]
    data = origin.get("data", {})
    rows = {
        "training data": f"{data['dataset']}, {data['samples']:,} samples" if data else _UNKNOWN,
        "data manifest, SHA-256": data.get("fingerprint", _UNKNOWN),
        "initial weights, SHA-256": origin.get("initial_weights_hash", _UNKNOWN),
    }
    if starts:
        last = starts[-1]
        rows |= {
            "git revision": last["git"] or _UNKNOWN,
            "versions": ", ".join(f"{k} {v}" for k, v in last["packages"].items()),
            "machine": f"{last['machine']}, Python {last['python']}",
            "ranks": str(last["world_size"]),
            "begun": starts[0]["started"],
        }
        if len(starts) > 1:
            rows["starts"] = f"{len(starts)}, the last at {last['started']}"
    rows["exported"] = report["written"]
    return _table(("", ""), rows.items())


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _python(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
