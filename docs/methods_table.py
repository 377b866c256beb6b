"""The table at the head of docs/methods.md, from what the methods say of themselves.

python docs/methods_table.py            prints it
python docs/methods_table.py --write    puts it into docs/methods.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data.files import atomic_write
from sclcore.driver.method import Method
from sclcore.registry import known_methods

DOCUMENT = Path(__file__).with_name("methods.md")
BEGIN, END = "<!-- python docs/methods_table.py -->", "<!-- end -->"


def table() -> str:
    """One line for each method: what it is, what has to be set, where it works."""
    head = ["| `method.name` | what it is | to be set | ZeRO |", "| --- | --- | --- | --- |"]
    return "\n".join([*head, *(_row(name, kind) for name, kind in known_methods().items())])


def _row(name: str, kind: type[Method]) -> str:
    what = (kind.__doc__ or "").splitlines()[0].rstrip(".")
    needed = [f"`{key}`" for key, field in kind.model_fields.items() if field.is_required()]
    stages = ", ".join(map(str, kind.zero_stages))
    return f"| [{name}](#{name}) | {what} | {', '.join(needed) or '–'} | {stages} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args().write:
        print(table())
        return
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    atomic_write(DOCUMENT, f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
