"""Nothing is run that was only to be read, nothing listens further than it must, no key is kept.

A malicious pickle as a part of a checkpoint: test_checkpoint.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from launcher.cluster.rendezvous import open_store
from launcher.cluster.world import World
from launcher.errors import UsageError
from launcher.evaluation.predictions import predict_run
from launcher.recipe.load import load_recipe
from launcher.recipe.yaml import Loader
from tests.launcher.conftest import ROOT, Start, finish, free_port, train, wait_until

CANARY = "c0ffee" + "0123456789abcdef" * 2 + "42"
# What would run code from a file that is read.
_DANGEROUS = re.compile(
    r"pickle\.loads?\(|Unpickler\(|yaml\.(unsafe_|full_)?load\((?!.*Loader=Loader\))"
    r"|from yaml import"
    r"|allow_pickle=True|torch\.load\((?!.*weights_only=True)|\beval\(|\bexec\("
)


class _Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize(
    "tag", ["object/apply:os.system", "object/new:os.system", "name:os.system"]
)
def test_a_recipe_that_would_call_something_is_refused(tag: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(f"name: !!python/{tag} ['touch {tmp_path}/pwned']\n")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_recipe(path)
    with pytest.raises(UsageError, match="not valid YAML"):
        load_recipe(
            ROOT / "recipes/digits_scl.yaml", [f"name=!!python/{tag} ['touch {tmp_path}/pwned']"]
        )
    assert not (tmp_path / "pwned").exists()


def test_a_model_file_that_is_a_pickle_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.read_text())
    torch.save({"w": _Malicious(f"touch {tmp_path}/pwned")}, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        predict_run(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_no_file_is_read_in_a_way_that_can_run_code() -> None:
    """Each loader in use is a harmless one; what is new here is to be tested, then listed."""
    files = [f for room in ("launcher", "data", "sclcore") for f in (ROOT / room).rglob("*.py")]
    assert len(files) > 30
    found = {
        str(path.relative_to(ROOT)): line.strip()
        for path in files
        for line in path.read_text().splitlines()
        if _DANGEROUS.search(line) and ".eval()" not in line
    }
    assert found == {}
    assert issubclass(Loader, yaml.SafeLoader), "the one that is left out above"


def test_an_address_is_listened_at_alone_and_a_taken_port_is_named() -> None:
    from datetime import timedelta

    def world(address: str, port: int) -> World:
        return World(0, 0, 1, address, port, "environment")

    port = int(free_port())
    store = open_store(world("127.0.0.1", port), timedelta(seconds=10))
    store.set("key", "value")
    assert listening(psutil.Process(), port) == {"127.0.0.1"}
    with pytest.raises(UsageError, match=rf"cannot listen at 127.0.0.1, port {port}.*MASTER_PORT"):
        open_store(world("127.0.0.1", port), timedelta(seconds=10))
    with pytest.raises(UsageError, match="MASTER_ADDR must be an address"):
        open_store(world("192.0.2.1", port), timedelta(seconds=10))
    # A name may mean another address to the other nodes.
    named = int(free_port())
    other = open_store(world("localhost", named), timedelta(seconds=10))
    assert listening(psutil.Process(), named) <= {"::", "0.0.0.0"}
    del store, other


def test_what_listens_while_training_and_where_the_key_goes(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    run_dir, port = tmp_path / "run", free_port()
    settings = ("tracking.wandb=offline", "optim.epochs=500", "data.workers=1")
    process = start(train(recipe, run_dir, *settings), WANDB_API_KEY=CANARY, MASTER_PORT=port)
    wait_until((run_dir / "checkpoints" / "latest").exists, what="first checkpoint")
    everything = psutil.Process(process.pid).children(recursive=True)
    addresses: dict[str, set[int]] = {}
    for below in [psutil.Process(process.pid), *everything]:
        for at in below.net_connections(kind="inet"):
            if at.status == psutil.CONN_LISTEN:
                addresses.setdefault(at.laddr.ip, set()).add(at.laddr.port)
    assert set(addresses) == {"127.0.0.1"}
    assert int(port) in addresses["127.0.0.1"], "the port is the user's to choose"
    process.terminate()
    code, output = finish(process, timeout=90)
    assert code == 143, output

    assert CANARY not in output
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"metrics.jsonl", "environment.jsonl", "recipe.yaml"} <= {p.name for p in written}
    assert any(path.suffix == ".wandb" for path in written)
    assert any("checkpoints" in path.parts for path in written)
    for path in written:
        assert CANARY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("key", ["tracking.api_key", "tracking.project.key", "api_key"])
def test_a_key_in_the_wrong_place_is_not_repeated(key: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_recipe(ROOT / "recipes/digits_scl.yaml", [f"{key}={CANARY}"])
    assert CANARY not in str(refused.value)


def listening(process: psutil.Process, port: int) -> set[str]:
    """The addresses at which `process` listens on `port`."""
    found = process.net_connections(kind="inet")
    return {c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port}
