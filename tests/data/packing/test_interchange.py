"""Our shards in webdataset, timm and open_clip; theirs here."""

from __future__ import annotations

import importlib
import inspect
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from webdataset.compat import WebDataset
from webdataset.writer import ShardWriter

from data.errors import DataError
from data.packing.adopt import index_shards
from data.packing.encoding import Encoding
from data.packing.pack import pack
from data.shards.index import SampleIndex
from data.shards.manifest import load_manifest
from data.sources.ilsvrc import find_files, imagenet
from tests.data.conftest import image_bytes
from tests.data.imagenet import MiniImageNet, write_imagenet


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> MiniImageNet:
    return write_imagenet(tmp_path_factory.mktemp("ilsvrc"))


@pytest.fixture(scope="module")
def packed(mini: MiniImageNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG, PNG, CMYK and grey, with captions; several shards in both splits."""
    out = tmp_path_factory.mktemp("packed")
    source = imagenet(find_files(mini.folder), out, progress=False)
    encoding = Encoding(captions="a photo of a {}")
    pack(source, out, shard_samples=8, encoding=encoding, progress=False)
    return out


def labels(out: Path) -> list[int]:
    return SampleIndex.load(out / "index.npz").label.tolist()


def wanted_sizes(images: dict[str, tuple[str, bytes]]) -> list[tuple[int, int]]:
    return sorted(Image.open(io.BytesIO(content)).size for _, content in images.values())


def test_webdataset_reads_ours(packed: Path, mini: MiniImageNet) -> None:
    shards = sorted(str(path) for path in (packed / "train").glob("*.tar"))
    opened: Any = WebDataset(shards, shardshuffle=False)
    found = list(opened.decode("pil").to_tuple("jpg;png", "cls"))
    assert [label for _, label in found] == labels(packed / "train")
    assert sorted(image.size for image, _ in found) == wanted_sizes(mini.train)
    assert {image.mode for image, _ in found} == {"RGB"}


@pytest.mark.parametrize(("split", "ours"), [("train", "train"), ("validation", "val")])
def test_timm_reads_ours(packed: Path, split: str, ours: str) -> None:
    opened: Any = create_dataset("wds/mini", root=str(packed), split=split)
    found = list(opened)
    assert [label for _, label in found] == labels(packed / ours)
    assert len(opened) == len(found)
    assert {image.mode for image, _ in found} == {"RGB"}


def test_timm_trains_on_ours(packed: Path) -> None:
    opened: Any = create_dataset(
        "wds/mini", root=str(packed), split="train", is_training=True, batch_size=5
    )
    loader: Any = create_loader(
        opened, (3, 32, 32), 5, is_training=True, num_workers=0, use_prefetcher=False
    )
    batches = list(loader)
    assert len(batches) == len(loader) == 12
    assert all(images.shape == (5, 3, 32, 32) for images, _ in batches)
    seen = torch.cat([targets for _, targets in batches])
    assert sorted(seen.tolist()) == sorted(labels(packed / "train"))


def test_timm_reads_ours_by_a_pattern_of_names(packed: Path) -> None:
    last = len(load_manifest(packed / "val").shards) - 1
    pattern = f"val/shard-{{000000..{last:06d}}}.tar"
    opened: Any = create_dataset("wds/mini", root=str(packed), split=pattern)
    assert [label for _, label in opened] == labels(packed / "val")


@pytest.fixture
def open_clip(monkeypatch: pytest.MonkeyPatch) -> Any:
    """open_clip's training module, beside a newer webdataset than its training extra asks for."""
    module = importlib.import_module("open_clip_train.data")
    if "eof_value" in inspect.signature(module.tar_file_expander).parameters:
        # webdataset after 0.2.86 marks the ends of shards, which open_clip takes for a sample.
        expander = partial(module.tar_file_expander, eof_value=None)
        monkeypatch.setattr(module, "tar_file_expander", expander)
    return module


def open_clip_loader(open_clip: Any, out: Path, split: str, samples: int, train: bool) -> Any:
    """What open_clip's training does with --dataset-type webdataset."""
    last = len(list((out / split).glob("*.tar"))) - 1
    pattern = f"{out / split}/shard-{{000000..{last:06d}}}.tar"
    options = SimpleNamespace(
        train_data=pattern,
        val_data=pattern,
        train_num_samples=samples,
        val_num_samples=samples,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=4,
        workers=1,
        world_size=1,
    )

    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.as_tensor(np.array(image.resize((8, 8)))).permute(2, 0, 1)

    def tokenise(text: str) -> list[str]:
        return [text]

    return open_clip.get_wds_dataset(options, preprocess, train, tokenizer=tokenise).dataloader


@pytest.mark.parametrize("train", [True, False])
def test_open_clip_reads_ours(open_clip: Any, packed: Path, train: bool) -> None:
    loader = open_clip_loader(open_clip, packed, "train", 60, train)
    # In this process: the functions above cannot be sent to another.
    batches = list(loader.pipeline[0].dataset)
    assert all(images.shape[1:] == (3, 8, 8) for images, _ in batches)
    texts = [text for _, batch in batches for text in batch]
    assert len(texts) == 60
    names = [name.split(",")[0] for name in load_manifest(packed / "train").names]
    wanted = [f"a photo of a {names[label]}" for label in labels(packed / "train")]
    assert sorted(texts) == sorted(wanted)
    if not train:
        assert texts == wanted


def write(folder: Path, sample: Callable[[int], dict[str, Any]], encoder: Any = True) -> list[int]:
    """Three shards of webdataset's own writer; returns the labels."""
    folder.mkdir(parents=True)
    pattern = str(folder / "%05d.tar")
    found = [(7 * k) % 5 for k in range(20)]
    with ShardWriter(pattern, maxcount=8, verbose=0, encoder=encoder) as writer:
        for k, label in enumerate(found):
            writer.write(sample(label) | {"__key__": f"n{label}/{k:09d}"})
    return found


def test_shards_of_webdataset(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def sample(label: int) -> dict[str, Any]:
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        return {"jpg": Image.fromarray(pixels), "cls": label}

    wanted = write(tmp_path / "train", sample)
    manifest = index_shards(tmp_path / "train", progress=False)
    assert labels(tmp_path / "train") == wanted
    assert [shard.samples for shard in manifest.shards] == [8, 8, 4]


def test_shards_like_img2dataset(tmp_path: Path) -> None:
    def sample(label: int) -> dict[str, Any]:
        about = {"url": "http://x/y.jpg", "status": "success", "width": 16, "label": label}
        return {"jpg": image_bytes(label, "JPEG"), "txt": "a caption", "json": about}

    wanted = write(tmp_path / "a", sample)
    (tmp_path / "a/00000_stats.json").write_text("{}")
    (tmp_path / "a/00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"'n0/000000000' in .* --label-from json:FIELD"):
        index_shards(tmp_path / "a", progress=False)
    manifest = index_shards(tmp_path / "a", label_from="json:label", progress=False)
    assert labels(tmp_path / "a") == wanted
    assert manifest.source == {"kind": "indexed", "label_from": "json:label"}
    write(tmp_path / "b", lambda label: sample(label) | {"cls": label + 1})
    index_shards(tmp_path / "b", progress=False)
    assert labels(tmp_path / "b") == [label + 1 for label in wanted]
    index_shards(tmp_path / "b", label_from="json:label", progress=False)
    assert labels(tmp_path / "b") == wanted


def test_shards_like_timms_on_the_hub(tmp_path: Path) -> None:
    """imagenet1k-*.tar of timm/imagenet-1k-wds: jpg, cls and json under keys with a folder."""

    def sample(label: int) -> dict[str, Any]:
        about = {"label": label, "width": 16, "height": 12, "filename": "n01440764_1.JPEG"}
        content = json.dumps(about).encode()
        return {"jpg": image_bytes(label, "JPEG"), "cls": str(label).encode(), "json": content}

    wanted = write(tmp_path / "train", sample, encoder=False)
    index_shards(tmp_path / "train", progress=False)
    assert labels(tmp_path / "train") == wanted


@pytest.mark.parametrize(
    ("about", "sentence"),
    [
        (b'{"label": "cat"}', r"has 'cat' in the field 'label' of its .json; name a field"),
        (b'{"label": -1}', r"has -1 in the field 'label'"),
        (b'{"label": true}', r"has True in the field 'label'"),
        (b'{"labels": 1}', r"has None in the field 'label'"),
        (b"[1]", r"has None in the field 'label'"),
        (b"torn", r"has None in the field 'label'"),
        (None, r"has an image but no label; add k\.json with an integer"),
    ],
)
def test_bad_labels_in_json_are_named(tmp_path: Path, make_tar, about, sentence: str) -> None:
    members = [("k.jpg", b""), ("k.cls", b"0")] + ([("k.json", about)] if about else [])
    make_tar(tmp_path / "train/0.tar", members)
    with pytest.raises(DataError, match=f"sample 'k' in .*0.tar {sentence}"):
        index_shards(tmp_path / "train", label_from="json:label", progress=False)


@pytest.mark.parametrize("label_from", ["label", "cls:", "json:", "txt:label"])
def test_a_label_from_elsewhere_is_refused(tmp_path: Path, label_from: str) -> None:
    with pytest.raises(DataError, match=r"write json: and a field, as in json:label"):
        index_shards(tmp_path, label_from=label_from, progress=False)
