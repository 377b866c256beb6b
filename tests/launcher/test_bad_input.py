"""What cannot work is refused: one sentence, exit code 2, nothing written, no process left."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from launcher import cli
from launcher import train as rank
from launcher.errors import disk_refusal
from tests.launcher.conftest import Start, finish, processes_of, run_ranks, train

REFUSED = {
    "no data": (["data.path={tmp}/none"], "there is no folder .*none/train; pack a data set"),
    "unknown key": (["method.lambda=1"], "unknown key 'method.lambda'; did you mean 'lam'"),
    "negative lam": (
        ["method.lam=-1"],
        "method.lam: should be a number of at least 0 or null, not -1",
    ),
    "indivisible batch": (
        ["optim.global_batch_size=65"],
        "global_batch_size 65 cannot be divided among 2 ranks; the nearest possible: 64 or 66",
    ),
    "batch too large": (
        ["optim.global_batch_size=2000"],
        "1437 samples, fewer than one global batch of 2000 .*at most 1432",
    ),
    "too many workers": (
        ["data.workers=99"],
        "99 data workers per rank cannot all be fed: .*use at most 14 workers",
    ),
    "unknown model": (["model.name=resnet5"], "timm knows no model 'resnet5'; did you mean"),
    "model kwargs": (["model.kwargs.wings=2"], "cannot be built with kwargs .*wings"),
    "image size": (
        ["model.name=vit_tiny_patch16_224"],
        "does not take images of 1×8×8 .*; .* made for another size: set model.kwargs.img_size=8",
    ),
    "classes in kwargs": (
        ["model={name: resnet10t, kwargs: {num_classes: 2}}"],
        "model.kwargs.num_classes is 2 and the data has 10 classes: leave it out",
    ),
    "no scores": (
        ["model={name: resnet10t, kwargs: {features_only: true}}"],
        "gives a list for an image, where a score for each of the 10 classes is needed",
    ),
    "micro-batch of 1": (
        ["model={name: resnet10t}", "optim.global_batch_size=2"],
        "cannot be trained with micro-batches of 1 .*Expected more than 1 value .*give each rank 2",
    ),
    "a file in the way": (
        ["run_dir={tmp}/file/run"],
        "run_dir: .*/file/run.* cannot be made, for .*/file is no folder: choose another",
    ),
    "class folders": (
        ["data.path={tmp}/photos"],
        "photos holds folders of images, not shards: pack them once with `scl pack imagefolder "
        ".*/photos --out runs/data/photos-shards --val-fraction 0.1`",
    ),
    "unknown layer": (["method.exclude=[head]"], "'head' matches no layer"),
    "n_m that does not divide": (
        ["method.n_m=2:4"],
        "has 9 input connections per feature, which 4 does not divide: leave it out of n_m",
    ),
    "unknown granularity": (
        ["method.granularity=row"],
        "unknown granularity 'row' for .*: choose one of weight, kernel, feature",
    ),
    "fp16": (["engine.precision=fp16"], "fp16 needs loss scaling"),
    "zero stage 3 of whole tensors": (
        ["method={name: magnitude, density: 0.1}", "engine.zero_stage=3"],
        "method magnitude needs whole tensors on every rank: engine.zero_stage must be 0, not 3",
    ),
    "no such checkpoint": (["checkpoint.resume={tmp}/none"], "none"),
}


def assert_refused(code: int, output: str, sentence: str, run_dir: Path) -> None:
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert code == 2, output
    assert len(errors) == 1, output
    assert re.search(sentence, errors[0]), errors[0]
    assert "Traceback" not in output
    assert not run_dir.exists(), "something was written"
    assert processes_of(run_dir) == []


@pytest.mark.parametrize("case", REFUSED)
def test_scl_train_refuses(
    case: str, recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings, sentence = REFUSED[case]
    (tmp_path / "file").touch()
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    (tmp_path / "photos" / "cat" / "1.jpg").touch()
    run_dir = tmp_path / "run"
    command = train(recipe, run_dir, *(s.replace("{tmp}", str(tmp_path)) for s in settings))
    code = cli.main(command[3:])
    output = "".join(capfd.readouterr())
    assert_refused(code, output, sentence, run_dir)


def test_a_refusal_as_the_shell_sees_it(recipe: Path, tmp_path: Path, start: Start) -> None:
    run_dir = tmp_path / "run"
    code, output = finish(start(train(recipe, run_dir, "method.lamb=1")))
    assert_refused(code, output, "unknown key 'method.lamb'; did you mean 'lam'", run_dir)
    assert len(output.splitlines()) == 1


def test_a_manifest_that_disagrees_with_its_shards(
    recipe: Path, shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(shards, broken)
    shard = broken / "train" / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    run_dir = tmp_path / "run"
    code = cli.main(train(recipe, run_dir, f"data.path={broken}")[3:])
    assert_refused(code, "".join(capfd.readouterr()), "shard-000003.tar", run_dir)


def test_a_checkpoint_of_another_recipe_or_other_data(
    recipe: Path, shards: Path, tmp_path: Path, start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    [(code, output)] = run_ranks(start, recipe, run_dir, "optim.epochs=1", ranks=1)
    assert code == 0, output
    before = sorted((p, p.stat().st_mtime_ns) for p in run_dir.rglob("*"))
    for setting, sentence in (
        ("method.lam=0.7", "belongs to another recipe: method.lam is 0.7 here and 0.3 there"),
        ("seed=3", "belongs to another recipe: seed is 3 here and 0 there"),
    ):
        assert cli.main(train(recipe, run_dir, "optim.epochs=1", setting)[3:]) == 2
        assert sentence in capfd.readouterr().err
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    manifest = json.loads((other / "train" / "manifest.json").read_text())
    manifest["dataset"] = "other digits"
    (other / "train" / "manifest.json").write_text(json.dumps(manifest))
    assert cli.main(train(recipe, run_dir, "optim.epochs=1", f"data.path={other}")[3:]) == 2
    assert "was trained on other data" in capfd.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in run_dir.rglob("*")) == before


def test_a_rank_started_by_hand_refuses_too(recipe: Path, tmp_path: Path, start: Start) -> None:
    run_dir = tmp_path / "run"
    results = run_ranks(start, recipe, run_dir, "optim.global_batch_size=65", ranks=2)
    assert [code for code, _ in results] == [2, 2]
    assert_refused(*results[0], "nearest possible: 64 or 66", run_dir)
    # Nobody ended rank 1 after rank 0 had spoken, as a launcher does: it speaks for itself. Where
    # rank 0 ends in the moment in which it is asked, torch warns above.
    said = "error: rank 1: optim.global_batch_size 65 cannot be divided"
    assert sum(line.startswith(said) for line in results[1][1].splitlines()) == 1


def test_what_deepspeeds_launcher_adds_is_taken(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert rank.main(["--local_rank=0", "--recipe", "none.yaml"]) == 2
    assert "cannot read the recipe none.yaml" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (["eval", "{tmp}/none"], "holds no recipe.yaml"),
        (["report", "{tmp}/none"], "There is no run folder|there is no run folder"),
        (["pack", "imagefolder", "{tmp}/none", "--out", "{tmp}/out"], "there is no folder"),
        (["pack", "torchvision", "Nothing", "--out", "{tmp}/out"], "'Nothing' is unknown"),
        (["pack", "index", "{tmp}/none"], "there is no folder"),
        (["pack", "digits", "--out", "{tmp}/file/out"], "/file.*; a file is where a folder"),
    ],
)
def test_other_commands_refuse(
    command: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    code = cli.main([part.replace("{tmp}", str(tmp_path)) for part in command])
    assert_refused(code, "".join(capfd.readouterr()), sentence, tmp_path / "out")


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (errno.ENOSPC, 1, "/x/y: no space left on device; make room there, or choose another"),
        (errno.EROFS, 2, "/x/y: read-only file system; choose a place that you may write to"),
        (errno.EACCES, 2, "/x/y: permission denied; choose a place"),
        (errno.EISDIR, 2, "/x/y: is a directory; something else is there already"),
        (errno.EIO, 1, "/x/y: input/output error; the disk or its server fails"),
    ],
)
def test_what_a_file_system_refuses_is_a_sentence(number: int, code: int, sentence: str) -> None:
    refusal = disk_refusal(OSError(number, os.strerror(number), "/x/y"))
    assert refusal is not None and str(refusal).startswith(sentence)
    assert refusal.exit_code == code
    assert disk_refusal(ConnectionResetError(errno.ECONNRESET, "gone")) is None
