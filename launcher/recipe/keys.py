"""Every key of a recipe, in order: what messages, `scl recipe`, its YAML and completion go by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from launcher.recipe.kinds import kind_of
from launcher.recipe.recipe import Recipe
from sclcore.registry import find_method, known_methods

# What stands in examples where a key has no default: ResNet-18 on anybody's shards.
EXAMPLES: dict[str, Any] = {
    "name": "my_run",
    "model.name": "resnet18",
    "data.path": "runs/data/my_images",
    "data.image_size": 224,
    "data.progressive.start": 128,
    "optim.global_batch_size": 256,
    "optim.epochs": 90,
    "optim.lr": 0.1,
    "distill.teacher": "runs/my_dense_run",
    "method.lam": 0.1,
    "method.density": 0.1,
    "method.iterations": 5,
    "method.radius": 0.3,
    "method.values": 32,
    "method.s_init": -5,
    "method.s_weight_decay": 0.05,
}


@dataclass(frozen=True)
class Key:
    """One key: its dotted path, its field, and the method that has it (None: all have)."""

    path: str
    field: FieldInfo
    method: str | None = None

    @property
    def kind(self) -> str:
        return kind_of(self.field)

    @property
    def default(self) -> Any:
        return self.field.get_default(call_default_factory=True)

    @property
    def about(self) -> str:
        return self.field.description or ""

    @property
    def example(self) -> Any:
        """A value that may stand there: the default, or one for want of it."""
        if self.field.is_required() or self.default is None:
            return EXAMPLES.get(self.path)
        return self.default


@dataclass(frozen=True)
class Section:
    """A mapping of keys. `optional`: it may be left out, and is then null."""

    path: str
    about: str
    method: str | None
    items: tuple[Key | Section, ...]
    optional: bool = False


def sections() -> tuple[Key | Section, ...]:
    """The whole tree, with a section `method` for each method that is installed."""
    return tuple(_of_model(Recipe, ""))


def all_keys() -> Iterator[Key]:
    """Every key, those of the methods with each of them."""

    def walk(items: tuple[Key | Section, ...]) -> Iterator[Key]:
        for item in items:
            if isinstance(item, Key):
                yield item
            else:
                yield from walk(item.items)

    return walk(sections())


def all_sections() -> Iterator[Section]:
    """Every section, the methods' with each of them."""

    def walk(items: tuple[Key | Section, ...]) -> Iterator[Section]:
        for item in items:
            if isinstance(item, Section):
                yield item
                yield from walk(item.items)

    return walk(sections())


def key_at(location: list[str], method: str | None) -> Key | None:
    """The key in which `location` lies, of a recipe of `method`; None where it is no key's."""
    ends = [".".join(location[:end]) for end in range(len(location), 0, -1)]
    found = [k for k in all_keys() if k.path in ends and k.method in (None, method)]
    if not found and method is not None and ":" in method:
        # A class of another package, which the recipe names by its path.
        with contextlib.suppress(ValueError):
            own = _of_model(find_method(method), "method.", method)
            found = [k for k in own if isinstance(k, Key) and k.path in ends]
    return max(found, key=lambda key: len(key.path), default=None)


def _of_model(
    model: type[BaseModel], prefix: str, method: str | None = None
) -> Iterator[Key | Section]:
    for name, field in model.model_fields.items():
        path = f"{prefix}{name}"
        if path == "method":
            for kind_name, kind in known_methods().items():
                items = tuple(_of_model(kind, "method.", kind_name))
                yield Section(path, _first_line(kind), kind_name, items)
            continue
        if (block := _block_of(field)) is None:
            yield Key(path, field, method)
            continue
        optional = not isinstance(field.annotation, type)
        items = tuple(_of_model(block, f"{path}.", method))
        yield Section(path, _first_line(block), method, items, optional)


def _block_of(field: FieldInfo) -> type[BaseModel] | None:
    for option in (field.annotation, *get_args(field.annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _first_line(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0]
