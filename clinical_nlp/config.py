"""Strict configuration: YAML plus dotted overrides, unknown keys refused, every field documented.

A config is a pydantic model that forbids extra keys; the docstring under a field is its help text.
"""

from __future__ import annotations

import difflib
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from clinical_nlp.errors import ConfigError, MissingDataError, nearest


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, field docstrings are the help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        coerce_numbers_to_str=True,
        validate_default=True,
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_sections(cls, values: Any) -> Any:
        """Fill a section that is given in part from the section's default here, which may differ from its class's.

        A section that is chosen by another name starts from its class: a rank meant for one strategy is for no other.
        """
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        for name, info in cls.model_fields.items():
            default, given = info.default, values.get(name)
            if not isinstance(default, Config) or not isinstance(given, dict):
                continue
            if "name" in given and given["name"] != getattr(default, "name", None):
                continue
            filled[name] = {**default.model_dump(), **given}
        return filled


class NamedConfig(Config):
    """A section that is chosen by `name`; a plain string stands for `{name: string}`."""

    name: str
    """Which one."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class CorpusConfig(NamedConfig):
    """Where the notes and their gold come from."""

    name: str = "synthetic_hospitals"
    """Name of a corpus; see `clinical-nlp list corpora`."""
    path: str | None = None
    """Folder or file of the corpus; default `$CLINICAL_NLP_DATA/<its folder>`."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the corpus's own `load`, as `corpus.options.KEY`."""


class SplitConfig(NamedConfig):
    """How patients are divided into train, development and test."""

    name: Literal["official", "random", "institution", "time"] = "official"
    """official: the corpus's own parts where it has them, else random. random: by patient. institution: whole
    institutions held out. time: patients whose notes begin after the cut are held out."""
    development: float = Field(default=0.1, ge=0, lt=1)
    """Share of patients kept for choosing (early stopping, thresholds)."""
    test: float = Field(default=0.2, ge=0, lt=1)
    """Share of patients kept for the reported score."""
    test_institutions: list[str] = Field(default_factory=list)
    """With `institution`: which institutions are held out."""
    after: str | None = None
    """With `time`: ISO date; patients whose first note is on or after it are the test part."""


class RecipeConfig(Config):
    """Keys that every recipe shares."""

    corpus: CorpusConfig = CorpusConfig()
    """The corpus."""
    split: SplitConfig = SplitConfig()
    """The split, always by patient."""
    seed: int = 0
    """One seed for data, adapter initialisation and order."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after this many optimiser steps."""
    max_minutes: float | None = Field(default=None, gt=0)
    """Stop, save and evaluate after this many minutes of training."""


ConfigType = TypeVar("ConfigType", bound=Config)


class _DuplicateKeyError(yaml.MarkedYAMLError):
    """A YAML mapping names one key twice; plain YAML would silently keep the last."""


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2, so that `no` and `2020-01-01` stay words and `1e-4` is a number."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Refuse a key that is given twice."""
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise _DuplicateKeyError(
                        problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or `_Loader` would not read back as a word."""


_Loader.yaml_implicit_resolvers = {}

for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?(?:0|[1-9][0-9_]*)$", list("-+0123456789")),
    ("float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$", list("-+.0123456789")),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", list("-+.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _represent_word(dumper: Any, word: str) -> Any:
    # PyYAML folds these line breaks into plain ones unless the word is in double quotes, where it escapes them.
    quoted = any(character in word for character in "\r\x85\u2028\u2029\ufeff")
    return dumper.represent_scalar("tag:yaml.org,2002:str", word, style='"' if quoted else None)


_Dumper.add_representer(str, _represent_word)


def _from_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_config(
    config_class: type[ConfigType],
    file: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> ConfigType:
    """Build a config from a YAML file and overrides.

    Parameters
    ----------
    config_class : the pydantic class.
    file : YAML file, or None for the defaults.
    overrides : keys may be dotted (`strategy.rank`). A path stands for its string; for a key that takes a list, one
        value or `a,b` stands for the list.

    Raises
    ------
    ConfigError : unknown key (the message names the nearest right one), or a value that does not fit.
    MissingDataError : the file is not there.
    """
    values: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise MissingDataError(f"config file {file} does not exist")
        try:
            loaded = _from_yaml(file.read_text("utf-8-sig"))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            reason = f": {error.problem}" if isinstance(error, _DuplicateKeyError) else ""
            raise ConfigError(f"config file {file}{where} is not valid YAML{reason}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"config file {file} must hold keys and values")
        values = loaded or {}
    lists = {name for name, kind, *_ in fields(config_class) if kind.startswith("list of")} if overrides else ()
    for key, value in (overrides or {}).items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if key in lists and isinstance(value, str | int | float):
            value = [part.strip() for part in value.split(",")] if isinstance(value, str) else [value]
        _set_dotted(values, key, value)
    return validate(config_class, values)


def validate(config_class: type[ConfigType], values: Mapping[str, Any]) -> ConfigType:
    """Validate plain values; see `load_config` for the errors."""
    try:
        return config_class.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(config_class, item) for item in error.errors())) from None


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `--strategy.rank 8 --seed=3` into `{"strategy.rank": 8, "seed": 3}`; a flag without a value is true."""
    overrides: dict[str, Any] = {}
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        if not argument.startswith("--") or len(argument) < 3:
            raise ConfigError(f"argument {argument!r} is not understood; options look like --key value")
        key, separator, text = argument[2:].partition("=")
        if not separator:
            following = arguments[index + 1] if index + 1 < len(arguments) else None
            if following is None or following.startswith("--"):
                text = "true"
            else:
                text = following
                index += 1
        if key.replace("-", "_") in overrides:
            raise ConfigError(f"option --{key} is given twice")
        overrides[key.replace("-", "_")] = _scalar(text)
        index += 1
    return overrides


def _scalar(text: str) -> Any:
    try:
        return _from_yaml(text) if text.strip() else text
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if isinstance(inner, str):
            inner = {"name": inner}
        elif isinstance(inner, Config):
            inner = inner.model_dump()
        if not isinstance(inner, dict | None):
            raise ConfigError(f"config key {key!r}: {parent!r} holds a value, not keys")
        values[parent] = inner = dict(inner or {})
        values = inner
    present = values.get(last)
    # `--strategy lora` over a file that says more about the strategy changes its name and keeps the rest.
    values[last] = {**present, "name": value} if isinstance(present, dict) and isinstance(value, str) else value


def _config_of(annotation: Any) -> type[Config] | None:
    """Return the config class inside an annotation, if there is one."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for part in typing.get_args(annotation):
            if found := _config_of(part):
                return found
    return None


def fields(config_class: type[Config], prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """Yield (dotted key, type, default, help) for every leaf field."""
    yield from _fields(config_class, prefix, None)


def _fields(config_class: type[Config], prefix: str, given: Config | None) -> Iterator[tuple[str, str, Any, str]]:
    for name, info in config_class.model_fields.items():
        default = "(required)" if info.is_required() else info.get_default(call_default_factory=True)
        if given is not None:
            default = getattr(given, name)
        inner = _config_of(info.annotation)
        if inner is not None:
            # A section's own default may differ from the defaults of its class.
            section = default if isinstance(default, Config) else None
            yield from _fields(type(section) if section else inner, f"{prefix}{name}.", section)
            continue
        yield f"{prefix}{name}", _type_name(info.annotation), default, " ".join((info.description or "").split())


def _type_name(annotation: Any) -> str:
    """Return a type as a user reads it: `int or none`, `official|random`, `list of str`."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return "|".join(str(part) for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(part) for part in parts)
    if origin in (list, tuple, set, frozenset) and parts:
        return f"list of {_type_name(parts[0])}"
    if origin is typing.Annotated:
        return _type_name(parts[0])
    if annotation is type(None):
        return "none"
    if annotation is Path:
        return "path"
    return annotation.__name__ if isinstance(annotation, type) and not parts else str(annotation).replace("typing.", "")


def _describe(config_class: type[Config], item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"]) or config_class.__name__
    if item["type"] == "extra_forbidden":
        return f"config key {key!r} is not known{nearest_key(config_class, key)}"
    if item["type"] == "missing":
        return f"config key {key!r} is required"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    shown = f" (got {value!r})" if isinstance(value, (str, int, float, bool)) and len(str(value)) < 80 else ""
    return f"config key {key!r}: {message[0].lower() + message[1:]}{shown}"


def nearest_key(config_class: type[Config], key: str) -> str:
    """Return `"; did you mean 'strategy.rank'?"` for a key that is not known; a bare `rank` finds it too."""
    known = list(dict.fromkeys([*(name for name, *_ in fields(config_class)), *config_class.model_fields]))
    section, _, last = key.rpartition(".")
    inside = [name for name in known if section and name.startswith(f"{section}.")]
    for names in (inside, [name for name in known if name != section]):
        if close := difflib.get_close_matches(key, names, n=1, cutoff=0.7):
            return f"; did you mean {close[0]!r}?"
    for name in known:
        if difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio() >= 0.8:
            return f"; did you mean {name!r}?"
    return nearest(key, known) if len(known) <= 10 else "; --help lists the keys"


def to_yaml(config: Config) -> str:
    """Render a config as YAML that `load_config` reads back."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
