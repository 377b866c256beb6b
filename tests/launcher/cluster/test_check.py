"""What `scl doctor --cluster` makes of what ranks found; on real nodes: tests/slurm."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from launcher.doctor.node_facts import Facts, Reply, place_token, reply_to
from launcher.doctor.problems import problems, ranks, remarks
from tests.launcher.conftest import Start, finish, free_port, scl

SOUND = Facts(
    rank=0,
    host="n0",
    versions={"python": "3.12.3", "torch": "2.11.0"},
    device="NVIDIA H100, 80 GiB, 2 visible",
    gpu="GPU-a",
    driver="580.1",
    data="12345678/9abcdef0",
    free_gib=500.0,
)
CLOCK = 1_800_000_000.0
FINE = Reply(CLOCK + 0.01, sees_token=True, write_error=None)


def four(**of_the_last: object) -> list[Facts]:
    """Two nodes of two ranks; the last rank differs in what is given."""
    sound = [
        dataclasses.replace(SOUND, rank=r, host=f"n{r // 2}", gpu=f"GPU-{r}") for r in range(4)
    ]
    return [*sound[:3], dataclasses.replace(sound[3], **of_the_last)]


def found(facts: list[Facts], last: Reply = FINE, world_size: int = 4) -> list[str]:
    replies = {fact.rank: FINE for fact in facts} | {3: last}
    return problems(facts, replies, CLOCK, world_size)


def test_sound_nodes_have_no_problem() -> None:
    assert found(four()) == []
    assert remarks(four(), dict.fromkeys(range(4), FINE), CLOCK) == []


def test_each_difference_is_one_sentence_that_names_the_node() -> None:
    cases = [
        ({"versions": SOUND.versions | {"torch": "2.10.0"}}, "torch 2.10.0, others have 2.11.0"),
        ({"versions": {"python": "3.12.3"}}, "torch None, others have 2.11.0"),
        ({"data": "0/0"}, "manifests 0/0, others have 12345678/9abcdef0"),
        ({"driver": "570.0"}, "driver 570.0, others have 580.1"),
        ({"gpu": None, "driver": None}, "ranks on the CPU, others have GPU"),
        ({"free_gib": 0.2}, "less than 1 GiB is free"),
        ({"errors": ("cannot import timm: install it",)}, "cannot import timm: install it"),
    ]
    for changes, expected in cases:
        [sentence] = found(four(**changes))
        assert sentence.startswith("n1 (rank 3): ") and expected in sentence


def test_two_ranks_of_one_gpu() -> None:
    [sentence] = found(four(gpu="GPU-2"))
    assert sentence.startswith("n1 (ranks 2–3): 2 ranks would share one GPU")
    # The same name on another node is another GPU.
    assert found(four(gpu="GPU-0")) == []


def test_of_two_the_value_of_rank_0_is_the_usual_one() -> None:
    facts = [SOUND, dataclasses.replace(SOUND, rank=1, host="n1", data="1/1")]
    [sentence] = problems(facts, {}, CLOCK, 2)
    assert sentence.startswith("n1 (rank 1): data with the manifests 1/1")


def test_ranks_that_did_not_come() -> None:
    [sentence] = found(four()[:2], world_size=4)
    assert sentence.startswith("ranks 2–3 of 4 did not come; those here: n0 (ranks 0–1)")


def test_clocks() -> None:
    slow, wrong = (dataclasses.replace(FINE, clock=CLOCK - s) for s in (5.0, 50.0))
    assert found(four(), slow) == []
    [remark] = remarks(four(), {3: slow}, CLOCK)
    assert "n1 (rank 3): the clock differs by -5.0 s" in remark
    [sentence] = found(four(), wrong)
    assert "the clock differs by -50.0 s" in sentence
    assert remarks(four(), {3: wrong}, CLOCK) == []


def test_folders() -> None:
    [sentence] = found(four(), dataclasses.replace(FINE, sees_token=False))
    assert "n1 (rank 3): the run's folder is not the one" in sentence
    [sentence] = found(four(), dataclasses.replace(FINE, write_error="Permission denied"))
    assert "n1 (rank 3): cannot write to the run's folder (Permission denied)" in sentence


def test_ranks_in_words() -> None:
    assert ranks([3]) == "rank 3"
    assert ranks([9, 0, 1, 2, 4]) == "ranks 0–2, 4, 9"


def test_the_token(tmp_path: Path) -> None:
    token = place_token(tmp_path / "run")
    reply = reply_to(token)
    assert reply.sees_token and reply.write_error is None
    assert abs(reply.clock - time.time()) < 5
    assert list(token.parent.iterdir()) == [token]


def test_a_rank_that_does_not_come_is_named_in_time(
    recipe: Path, tmp_path: Path, start: Start
) -> None:
    command = scl("doctor", "--cluster", "--recipe", recipe, "--timeout", "8")
    command += ["--set", f"run_dir={tmp_path / 'run'}"]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    alone = start(command, RANK="0", LOCAL_RANK="0", MASTER_PORT=free_port(), **world)
    lost = start(command, RANK="1", LOCAL_RANK="0", MASTER_PORT=free_port(), **world)
    code, output = finish(alone, timeout=120)
    assert code == 1 and "problem: rank 1 of 2 did not come" in output, output
    code, output = finish(lost, timeout=120)
    assert code == 1 and "cannot reach rank 0 at 127.0.0.1" in output, output
    assert not (tmp_path / "run").exists()
