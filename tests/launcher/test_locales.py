"""Commands in locales that are not UTF-8, made here with localedef; real interpreters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.launcher.conftest import ROOT, environment, launch, train

LOCALES = {
    "de_DE": "ISO-8859-1",
    "ru_RU": "KOI8-R",
    "zh_CN": "GB2312",
    "ko_KR": "EUC-KR",
}
# The command line's own way, several times in one process.
_PROGRAM = """
import json, locale, sys
from launcher import cli
print("encoding", locale.getpreferredencoding(), file=sys.stderr)
for words in json.loads(sys.argv[1]):
    try:
        code = cli.main(words)
    except SystemExit as ended:
        code = ended.code
    print("code", code, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="session")
def locales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales").is_dir():
        pytest.skip("localedef, or what it makes locales from, is not installed")
    folder = tmp_path_factory.mktemp("locales")
    for language, encoding in LOCALES.items():
        command = ["localedef", "-i", language, "-f", encoding, f"{folder}/{language}.{encoding}"]
        # It ends with 1 where it has only warned.
        subprocess.run(command, capture_output=True, timeout=60)
    return folder


def commands(locales: Path, language: str, *commands: list[str]) -> tuple[str, str, list[int]]:
    """Output, errors and exit codes of `scl` commands in the locale of `language`."""
    name = f"{language}.{LOCALES[language]}"
    assert (locales / name).exists()
    more = {"LOCPATH": str(locales), "LC_ALL": name, "PYTHONUTF8": "0"}
    unset = ("LANG", "LANGUAGE", "PYTHONIOENCODING")
    env = {k: v for k, v in environment(**more).items() if k not in unset}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(commands)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        timeout=240,
    )
    errors = done.stderr.decode("utf-8", "replace")
    assert done.returncode == 0 and "Traceback" not in errors, errors
    assert f"encoding {LOCALES[language]}" in errors
    codes = [int(line.split()[1]) for line in errors.splitlines() if line.startswith("code ")]
    return done.stdout.decode("utf-8", "replace"), errors, codes


@pytest.mark.parametrize("language", LOCALES)
def test_help_recipes_and_mistakes(language: str, locales: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"# λ, Bär, Ж, 图, 한\nbase: {ROOT}/recipes/digits_scl.yaml\n", encoding="utf-8"
    )
    said, errors, codes = commands(
        locales,
        language,
        ["train", "--help"],
        ["recipe"],
        ["train", "--recipe", str(recipe), "--set", "method.lamb=1"],
        ["sweep", str(recipe), "--dry-run"],
    )
    assert codes == [0, 0, 2, 2], errors
    assert "--recipe" in said and "method" in said
    assert "unknown key 'method.lamb'" in errors and "YAML" not in errors


@pytest.fixture(scope="session")
def bears(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders whose names are in three scripts, as UTF-8 on the disk."""
    folder = tmp_path_factory.mktemp("bears")
    for label, name in enumerate((b"B\xc3\xa4r", b"\xe7\x86\x8a", b"plain")):
        for split in ("train", "val"):
            place = Path(os.fsdecode(os.fsencode(folder / split) + b"/" + name))
            place.mkdir(parents=True)
            for i in range(8):
                Image.new("L", (8, 8), 60 * label + i).save(place / f"{i}.png")
    return folder


@pytest.mark.long
@pytest.mark.timeout(900)
def test_classes_of_other_scripts_are_the_same_everywhere(
    locales: Path, bears: Path, recipe: Path, tmp_path: Path
) -> None:
    """Packed and evaluated in these locales, trained in the usual one."""
    packed = {language: tmp_path / language for language in ("de_DE", "zh_CN")}
    for language, out in packed.items():
        words = ["pack", "imagefolder", str(bears), "--out", str(out)]
        _, errors, codes = commands(locales, language, words)
        assert codes == [0], errors
    manifests = [json.loads((out / "train/manifest.json").read_bytes()) for out in packed.values()]
    assert [m["classes"] for m in manifests] == [["Bär", "plain", "熊"]] * 2
    run = tmp_path / "run"
    settings = (f"data.path={packed['zh_CN']}", "optim.epochs=1", "optim.global_batch_size=8")
    process = launch(train(recipe, run, *settings, ranks=1))
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    for language in ("ru_RU", "ko_KR"):
        shards = ["eval", str(run), "--data", str(packed["de_DE"])]
        folders = ["eval", str(run), "--data", str(bears / "val")]
        _, errors, codes = commands(locales, language, shards, folders)
        assert codes == [0, 0], errors
