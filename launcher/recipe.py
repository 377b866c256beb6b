"""Recipes: one YAML file says everything about a run; it is typed, and validated once."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from data.stream.pipeline import DataConfig
from launcher.checkpoints.checkpoint import CheckpointConfig
from launcher.engine import EngineConfig
from launcher.errors import UsageError
from launcher.init import InitConfig
from launcher.methods import MethodConfig, OptimConfig
from launcher.models import ModelConfig
from launcher.tracking import TrackingConfig
from sclcore import Schedule

# Where a run may differ from the checkpoint it continues: nothing here changes what is learned.
_FREE_ON_RESUME = ("name", "run_dir", "tracking", "checkpoint", "engine", "data.path")
_FREE_DATA_KEYS = (
    *("data.workers", "data.prefetch", "data.eval_batch_size"),
    *("data.cache_dir", "data.cache_gb", "data.fetch_ahead", "data.fetch_timeout_s"),
    *("data.retries", "data.retry_wait_s"),
)


class Recipe(BaseModel):
    """A run. `base: other.yaml` at the top of a file takes everything else from there."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="name of the run")
    run_dir: Path | None = Field(
        default=None, description="where everything is written; null for runs/<name>"
    )
    seed: int = Field(
        default=0, ge=0, description="decides initial weights, order and augmentation"
    )
    model: ModelConfig
    init: InitConfig = Field(default_factory=InitConfig)
    data: DataConfig
    method: MethodConfig
    optim: OptimConfig
    schedule: Schedule = Field(default_factory=Schedule)  # type: ignore[arg-type]
    engine: EngineConfig = Field(default_factory=EngineConfig)  # type: ignore[arg-type]
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)  # type: ignore[arg-type]
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)  # type: ignore[arg-type]

    @model_validator(mode="after")
    def _method_fits_engine(self) -> Self:
        if self.engine.zero_stage and self.method.needs_whole_tensors:
            raise ValueError(
                f"method {self.method.name} needs whole tensors on every rank: engine.zero_stage "
                f"must be 0, not {self.engine.zero_stage}"
            )
        return self

    @property
    def folder(self) -> Path:
        return self.run_dir or Path("runs") / self.name

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, every default filled in."""
        return self.model_dump(mode="json")


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read `path`, follow its `base`, apply overrides such as `method.lam=0.2`, validate.

    Raises UsageError with one sentence: the file, the key, what is wrong with it.
    """
    return build_recipe(_read(path, ()), overrides, str(path))


def build_recipe(values: dict[str, Any], overrides: Iterable[str], where: str) -> Recipe:
    """Apply overrides to the plain values of a recipe and validate; `where` is for messages."""
    # All of them at once: what is set for a method holds wherever in the line its name is set.
    values = _merge(values, functools.reduce(_merge, map(_parse_override, overrides), {}))
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UsageError(f"{where}: {_sentence(error)}") from None


def resume_difference(saved: dict[str, Any], recipe: Recipe) -> str | None:
    """The first setting that makes a checkpoint's recipe another run, as a phrase; None if none."""
    ours, theirs = dict(_flatten(recipe.as_dict())), dict(_flatten(_completed(saved)))
    for key in sorted(ours.keys() | theirs.keys()):
        free = key in _FREE_DATA_KEYS or any(
            key == prefix or key.startswith(f"{prefix}.") for prefix in _FREE_ON_RESUME
        )
        # Precision decides the arithmetic, though it belongs to the engine.
        if (not free or key == "engine.precision") and ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key)!r} here and {theirs.get(key)!r} there"
    return None


def _completed(saved: dict[str, Any]) -> dict[str, Any]:
    """`saved` with the defaults of keys that did not exist yet when it was written."""
    try:
        return Recipe.model_validate(saved).as_dict()
    except ValidationError:
        return saved


def describe() -> str:
    """Every key of a recipe with its default and meaning, one a line."""
    return "\n".join(_describe(Recipe, ""))


class _Loader(yaml.SafeLoader):
    """Safe, and YAML 1.2 where 1.1 surprises: `off` and 2:4 are words, and 1e-3 is a number."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own way to say it)
        first: [both for both in resolvers if not both[0].endswith((":bool", ":float", ":int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# Before floats, whose pattern takes whole numbers as well.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$|^0x[0-9a-fA-F]+$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """The YAML file `path`, which should hold a `kind`. Raises UsageError with one sentence."""
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} holds no {kind}: it should be a mapping of keys to values")
    return values


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UsageError(f"{path}: its chain of `base` files comes back to itself")
    values = read_mapping(path, "recipe")
    base = values.pop("base", None)
    if base is None:
        return values
    return _merge(_read(path.parent / str(base), (*seen, path.resolve())), values)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` wins; a block whose `name` changes is another thing and is replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            renamed = "name" in old and value.get("name", old["name"]) != old["name"]
            merged[key] = value if renamed else _merge(old, value)
        else:
            merged[key] = value
    return merged


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"--set {text}: write it as key.sub=value, such as method.lam=0.2")
    try:
        parsed: Any = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not valid YAML") from error
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _sentence(error: ValidationError) -> str:
    """The first problem as a sentence, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    location = [str(part) for part in first["loc"]]
    # The discriminator's value stands in the location, though not in the file.
    if len(location) > 1 and location[0] == "method":
        location.pop(1)
    key = ".".join(location)
    given = first.get("input")
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location[-1], _valid_names(first["loc"]), n=1, cutoff=0.5)
        names = ", ".join(_valid_names(first["loc"]))
        hint = f"did you mean {close[0]!r}?" if close else f"valid here: {names}"
        text = f"unknown key {key!r}; {hint}"
    elif first["type"] == "missing":
        text = f"the key {key!r} is missing"
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        *others, last = _method_names()
        text = (
            f"method.name must be {', '.join(others)} or {last}, not {(given or {}).get('name')!r}"
        )
    else:
        reason = first["msg"].removeprefix("Value error, ")
        # Not what is in a mapping: a key of W&B's that somebody put there must not be repeated.
        shown = "a mapping" if isinstance(given, dict) else repr(given)
        text = f"{key}: {reason[0].lower()}{reason[1:]}, not {shown}" if key else reason
    more = len(problems) - 1
    return text + (f" (and {more} more problem{'s' if more > 1 else ''})" if more else "")


def _method_names() -> list[str]:
    """Of all methods, as recipes call them."""
    methods = get_args(Recipe.model_fields["method"].annotation)
    return [get_args(method.model_fields["name"].annotation)[0] for method in methods]


def _valid_names(location: tuple[int | str, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        for candidate in _models_of(model, str(part)):
            model = candidate
    return list(model.model_fields)


def _models_of(model: type[BaseModel], key: str) -> list[type[BaseModel]]:
    """The models a field may hold; a union's member is named by its discriminator instead."""
    if key in model.model_fields:
        annotation = model.model_fields[key].annotation
        options = get_args(annotation) if get_origin(annotation) else (annotation,)
        return [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)][:1]
    siblings = get_args(Recipe.model_fields["method"].annotation)
    return [m for m in siblings if get_args(m.model_fields["name"].annotation) == (key,)]


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _describe(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for key, info in model.model_fields.items():
        options = [info.annotation, *get_args(info.annotation)]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        for block in nested:
            variant = (
                f" ({get_args(block.model_fields['name'].annotation)[0]})"
                if key == "method"
                else ""
            )
            yield f"{prefix}{key}{variant}: {(block.__doc__ or '').splitlines()[0]}"
            yield from _describe(block, f"  {prefix}{key}.")
        if not nested:
            default = "required" if info.is_required() else f"default {_default(info)!r}"
            yield f"{prefix}{key} ({default}): {info.description or ''}"


def _default(info: Any) -> Any:
    value = info.get_default(call_default_factory=True)
    return str(value) if isinstance(value, Path) else value
