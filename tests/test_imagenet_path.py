"""The ImageNet recipe as it stands, on photographs few and small enough for two cores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.launcher.conftest import ROOT, finish, launch, scl


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Crops of the two photographs that scikit-learn ships, as JPEG files in class folders."""
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("photographs")
    sample: Any = load_sample_images()
    for name, pixels in zip(("china", "flower"), sample.images, strict=True):
        for i in range(60):
            split = "val" if i % 5 == 0 else "train"
            top, left = 11 * (i % 10), 37 * (i // 10)
            crop = Image.fromarray(pixels[top : top + 160 + i, left : left + 200])
            target = folder / split / name / f"{i:03d}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            crop.save(target, "JPEG", quality=90)
    return folder


def test_from_class_folders_to_a_sparse_resnet50(photographs: Path, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "shards", tmp_path / "run"
    code, output = finish(launch(scl("pack", "imagefolder", photographs, "--out", data)))
    assert code == 0, output
    rows = [re.findall(r"\w+", line)[:3] for line in output.splitlines()]
    assert ["train", "96", "2"] in rows and ["val", "24", "2"] in rows
    settings = (
        f"data.path={data}",
        f"run_dir={run_dir}",
        "data.image_size=64",
        "data.workers=1",
        "data.randaugment=rand-m9-mstd0.5-inc1",
        "data.random_erasing=0.25",
        "data.mixup=0.2",
        "data.cutmix=1.0",
        "data.progressive={start: 32, until: 0.5}",
        "optim.global_batch_size=32",
        "optim.epochs=2",
        "engine.ranks=2",
        "engine.max_micro_batch=8",
        # Six updates, half of them with masks that learn.
        "method.lam=0.3",
        "method.mask_lr=0.3",
        "tracking.wandb=off",
    )
    command = scl("train", "--recipe", ROOT / "recipes" / "resnet50_scl.yaml")
    for setting in settings:
        command += ["--set", setting]
    code, output = finish(launch(command), timeout=250)
    assert code == 0, output
    assert "2 rank(s) × 2 × 8 = batch 32" in output
    result = json.loads((run_dir / "summary.json").read_text())
    assert result["connections"] == 23_454_912 + 2 * 2048
    assert 0 < result["density"] < 0.99
    # An unmodified model of timm's takes the file as it is.
    model = timm.create_model("resnet50", num_classes=2)
    model.load_state_dict(load_file(run_dir / "model.safetensors"))
    assert torch.isfinite(model.eval()(torch.zeros(1, 3, 64, 64))).all()
