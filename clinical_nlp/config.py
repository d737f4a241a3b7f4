"""Strict configuration: YAML plus dotted overrides, unknown keys refused, every field documented.

A config is a pydantic model that forbids extra keys; the docstring under a field is its help text.
"""

from __future__ import annotations

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

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


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
    overrides : keys may be dotted (`strategy.rank`); string values are parsed as YAML scalars.

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
            loaded = yaml.safe_load(file.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            raise ConfigError(f"config file {file}{where} is not valid YAML") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"config file {file} must hold keys and values")
        values = loaded or {}
    for key, value in (overrides or {}).items():
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
        return yaml.safe_load(text) if text.strip() else text
    except yaml.YAMLError:
        return text


def _set_dotted(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if isinstance(inner, str):
            inner = {"name": inner}
        values[parent] = inner = {} if inner is None else dict(inner)
        values = inner
    present = values.get(last)
    if isinstance(present, dict) and isinstance(value, str):
        present["name"] = value
    else:
        values[last] = value


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
    for name, info in config_class.model_fields.items():
        inner = _config_of(info.annotation)
        if inner is not None:
            yield from fields(inner, f"{prefix}{name}.")
            continue
        annotation = info.annotation
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        default = info.get_default(call_default_factory=True) if not info.is_required() else "(required)"
        yield f"{prefix}{name}", kind, default, " ".join((info.description or "").split())


def _describe(config_class: type[Config], item: Mapping[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"]) or config_class.__name__
    if item["type"] == "extra_forbidden":
        known = [name for name, *_ in fields(config_class)] + list(config_class.model_fields)
        return f"config key {key!r} is not known{nearest(key, known)}"
    if item["type"] == "missing":
        return f"config key {key!r} is required"
    message = item["msg"].removeprefix("Value error, ")
    value = item.get("input")
    shown = f" (got {value!r})" if isinstance(value, (str, int, float, bool)) and len(str(value)) < 80 else ""
    return f"config key {key!r}: {message[0].lower() + message[1:]}{shown}"


def to_yaml(config: Config) -> str:
    """Render a config as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
