"""Checkpoints behind a URL: copied, verified, retired, brought back; by servers that fail."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from launcher.checkpoints import checkpoint, mirror
from launcher.checkpoints.manifest import CheckpointError, folders
from launcher.checkpoints.mirror import Mirror, Place, bring_newest
from launcher.errors import UsageError
from tests.data.servers import Wire
from tests.launcher.checkpoints.saving import save
from tests.launcher.conftest import Start, finish, scl, summary
from tests.launcher.test_resume import assert_identical, segment

RULES = {"keep": 2, "keep_pareto": 0}


def saved(root: Path, *steps: int) -> None:
    for step in steps:
        parts = {"model": {"w": [float(step)] * 2000, "step": step}}
        save(root, step=step, parts=parts, meta={"step": step}, keep=2)


def names(folder: Path) -> list[str]:
    return [each.name for each in folders(folder)]


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_retired_while_it_is_copied_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, there = tmp_path / "run", tmp_path / "mirror"
    saved(root, 10, 20)
    write, seen = Place._write, []

    def retired_after_a_file(self: Place, name: str, path: Path) -> None:
        if name.startswith("step-00000010/"):
            seen.append(name)
            if len(seen) == 2:
                shutil.rmtree(path.parent)
        write(self, name, path)

    monkeypatch.setattr(Place, "_write", retired_after_a_file)
    copying = Mirror(root, there.as_uri(), **RULES)
    copying.copy_soon()
    copying.close(60)
    assert len(seen) == 2
    assert names(there) == names(root) == ["step-00000020"]


def test_the_mirror_is_kept_by_the_same_rules_and_brought_back(tmp_path: Path) -> None:
    root, there = tmp_path / "run", tmp_path / "mirror"
    copying = Mirror(root, there.as_uri(), **RULES)
    for step in (10, 20, 30):
        saved(root, step)
        copying.copy_soon()
    copying.close(60)
    assert names(there) == names(root) == ["step-00000020", "step-00000030"]
    assert not checkpoint.verify(there / "step-00000030")
    # A machine that was lost.
    shutil.rmtree(root)
    bring_newest(root, there.as_uri(), "auto")
    found = checkpoint.find(root)
    assert found is not None and found.step == 30
    assert checkpoint.load_part(found, "model")["step"] == 30
    # What is newer here stays.
    saved(root, 40)
    bring_newest(root, there.as_uri(), "auto")
    found = checkpoint.find(root)
    assert found is not None and found.step == 40
    with pytest.raises(CheckpointError, match="already holds checkpoints"):
        bring_newest(root, there.as_uri(), "never")


def test_the_newest_sound_one_on_either_side(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root, there = tmp_path / "run", tmp_path / "mirror"
    saved(root, 10, 20)
    copying = Mirror(root, there.as_uri(), **RULES)
    copying.copy_soon()
    copying.close(60)
    # The newest is damaged here: the mirror's is taken.
    (root / "step-00000020" / "model.pt").write_bytes(b"torn")
    bring_newest(root, there.as_uri(), "auto")
    found = checkpoint.find(root)
    assert found is not None and found.step == 20
    assert names(root)[-2:] == ["step-00000020", "step-00000020.1"]
    # And there as well, and the one that came from there: what is older and sound is taken.
    for folder in (*root.glob("step-00000020*"), there / "step-00000020"):
        (folder / "model.pt").write_bytes(b"torn")
    bring_newest(root, there.as_uri(), "auto")
    assert "step-00000020 of the mirror" in caplog.text and "passed over" in caplog.text
    found = checkpoint.find(root)
    assert found is not None and found.step == 10


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Wire]]:
    """A bucket on a real S3 protocol server, behind a wire."""
    boto3 = pytest.importorskip("boto3")
    s3fs = pytest.importorskip("s3fs")
    from moto.server import ThreadedMotoServer

    service = ThreadedMotoServer(port=0, verbose=False)
    service.start()
    host, port = service.get_host_and_port()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="runs")
    with Wire(port).running() as wire:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{wire.port}")
        s3fs.S3FileSystem.clear_instance_cache()
        # Servers of one process share what they hold.
        yield f"s3://runs/{uuid4().hex}", wire
    service.stop()


# The client of a server that hangs up tries on its own for half a minute.
@pytest.mark.parametrize("mood", [pytest.param("drop", marks=pytest.mark.long), "delay", "lie"])
def test_a_server_that_fails_is_a_warning_until_it_answers(
    mood: str,
    s3: tuple[str, Wire],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, wire = s3
    monkeypatch.setattr(mirror, "_FIRST_WAIT_S", 0.2)
    root = tmp_path / "run"
    saved(root, 10)
    wire.mood = mood
    copying = Mirror(root, url, **RULES)
    copying.copy_soon()
    if mood == "delay":
        wait_until(lambda: bool(Place(url).manifests()))
    else:
        wait_until(lambda: "is behind, and is tried again" in caplog.text, 120)
        # Half a copy is no checkpoint.
        wire.mood = ""
    copying.close(120)
    assert [*Place(url).manifests()] == ["step-00000010"]
    shutil.rmtree(root)
    bring_newest(root, url, "auto")
    found = checkpoint.find(root)
    assert found is not None and checkpoint.load_part(found, "model")["step"] == 10


def test_a_run_goes_on_elsewhere_from_its_mirror(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    """Stopped, its folder lost, and the same to the bit as one that was left in peace.

    What is only looked at before is not fetched.
    """
    run_dir, there, left = tmp_path / "run", tmp_path / "mirror", tmp_path / "left"
    settings = ("optim.epochs=3", "model.kwargs.norm=batch")
    mirrored = (*settings, f"checkpoint.mirror={there.as_uri()}")
    segment(start, recipe, run_dir, *mirrored, ranks=2, stop=17)
    shutil.copytree(run_dir, tmp_path / "lost")
    shutil.rmtree(run_dir / "checkpoints")
    before = sorted(tmp_path.rglob("*"))
    asked = [f"run_dir={run_dir}", "engine.ranks=2", *mirrored]
    command = scl("train", "--recipe", recipe, "--set", *asked, "--dry-run")
    code, said = finish(start(command))
    assert code == 0, said
    assert f"continues from step-00000017 of {there.as_uri()}, once that is fetched" in said
    assert "All checks but those of that checkpoint passed; nothing was written." in said
    assert sorted(tmp_path.rglob("*")) == before
    segment(start, recipe, run_dir, *mirrored, ranks=2)
    segment(start, recipe, left, *settings, ranks=2)
    assert_identical(run_dir, left)
    assert names(there) == names(run_dir / "checkpoints")
    assert summary(run_dir)["epochs"] == 3


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nowhere://bucket/x", "checkpoint.mirror: nothing here writes to nowhere://bucket/x"),
        ("/a/folder", "checkpoint.mirror: nothing here writes to /a/folder"),
        ("gs://bucket/x", "checkpoint.mirror: gs://bucket/x needs the package gcsfs"),
    ],
)
def test_a_mirror_that_cannot_be_is_refused_before_any_process(
    url: str, sentence: str, recipe: Path, tmp_path: Path, start: Start
) -> None:
    settings = ("--set", f"checkpoint.mirror={url}", "--set", f"run_dir={tmp_path / 'run'}")
    code, output = finish(start(scl("train", "--recipe", recipe, *settings)))
    assert code == 2 and sentence in output and "Traceback" not in output, output
    assert not (tmp_path / "run").exists()


def test_no_credentials_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refused(place: Place) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(Place, "manifests", refused)
    with pytest.raises(UsageError, match=r"file:///x cannot be used: Access Denied"):
        bring_newest(tmp_path, "file:///x", "auto")


def test_a_mirror_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning where there is something to go on from; never a silent start from nothing."""

    def silent(place: Place) -> None:
        raise TimeoutError("nothing came for 60 s")

    monkeypatch.setattr(Place, "manifests", silent)
    with pytest.raises(CheckpointError, match=r"checkpoint\.mirror=null"):
        bring_newest(tmp_path / "run", "file:///x", "auto")
    saved(tmp_path / "run", 10)
    bring_newest(tmp_path / "run", "file:///x", "auto")
    assert "file:///x does not answer: nothing came for 60 s" in caplog.text
