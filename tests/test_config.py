"""Strict config: nothing unknown passes, words stay words, and every shipped YAML is its class's defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from clinical_nlp.config import (
    Config,
    CorpusConfig,
    NamedConfig,
    RecipeConfig,
    SplitConfig,
    fields,
    load_config,
    parse_overrides,
    to_yaml,
)
from clinical_nlp.errors import ConfigError, MissingDataError
from clinical_nlp.recipe import Recipe, Shelf, list_recipes


class Way(NamedConfig):
    """A section that is chosen by name."""

    name: Literal["short", "long"] = "short"
    """Which."""
    rank: int = Field(default=8, ge=1)
    """How wide."""


class Example(Config):
    """A config with one field of each kind."""

    word: str = "a"
    """A word."""
    number: float | None = None
    """A number."""
    flag: bool = False
    """A switch."""
    many: list[str] = Field(default_factory=list)
    """Several words."""
    counts: list[int] = Field(default_factory=list)
    """Several numbers."""
    free: dict[str, Any] = Field(default_factory=dict)
    """Anything."""
    way: Way = Way(name="long", rank=3)
    """A section with a default of its own."""


def load(*words: str) -> Example:
    return load_config(Example, None, parse_overrides(words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--wrod", "b"], "config key 'wrod' is not known; did you mean 'word'?"),
        (["--way.rnak", "2"], "config key 'way.rnak' is not known; did you mean 'way.rank'?"),
        (["--rank", "2"], "config key 'rank' is not known; did you mean 'way.rank'?"),
        (["--number", "many"], "config key 'number': input should be a valid number"),
        (["--way.rank", "0"], "config key 'way.rank': input should be greater than or equal to 1 (got 0)"),
        (["--way", "middle"], "config key 'way.name': input should be 'short' or 'long' (got 'middle')"),
        (["--word.inner", "1"], "config key 'word': input should be a valid string"),
        (["--word", "a", "--word", "b"], "option --word is given twice"),
        (["word"], "argument 'word' is not understood"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_with_the_remedy(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(*words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("2020-01-01", "2020-01-01"),
        ("12:30", "12:30"),
        ("007", "007"),
        ("2024", "2024"),
        ("a: b", None),
        ("C:\\data", "C:\\data"),
    ],
)
def test_a_word_stays_the_word_that_was_typed(text: str, value: str | None) -> None:
    if value is None:
        with pytest.raises(ConfigError):
            load("--word", text)
    else:
        assert load("--word", text).word == value


def test_values_take_their_types() -> None:
    config = load("--number", "1e-4", "--flag", "--many", "a,b", "--counts=[1, 2]", "--free.x=3", "--way", "short")
    assert (config.number, config.flag, config.many, config.counts) == (1e-4, True, ["a", "b"], [1, 2])
    assert config.free == {"x": 3}
    assert (config.way.name, load("--number", "-3").number) == ("short", -3)


def test_a_name_over_a_section_in_a_file_keeps_the_rest_of_the_section(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("way:\n  name: long\n  rank: 5\n")
    assert load_config(Example, file, {"way": "short"}).way == Way(name="short", rank=5)
    file.write_text("way: long\n")
    assert load_config(Example, file, {"way.rank": 4}).way == Way(name="long", rank=4)


def test_python_values_are_taken_too(tmp_path: Path) -> None:
    config = load_config(RecipeConfig, None, {"corpus": CorpusConfig(name="x"), "corpus.path": tmp_path, "seed": 4})
    assert (config.corpus.name, config.corpus.path, config.seed) == ("x", str(tmp_path), 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"word: [", "line 1 is not valid YAML"),
        (b"word: a\nword: b\n", "line 2 is not valid YAML: key 'word' is given twice"),
        (b"- a\n", "must hold keys and values"),
        (b"word: \xff\xfe\n", "is not valid YAML"),
        (b"word: !!python/object/apply:os.system [true]\n", "is not valid YAML"),
        (b"wrd: a\n", "did you mean 'word'?"),
        (b"1: a\n", "config key"),
    ],
)
def test_a_broken_file_is_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(Example, file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="does not exist"):
        load_config(Example, tmp_path / "none.yaml")


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("# nothing\n")
    assert load_config(Example, tmp_path / "c.yaml") == Example()


def test_fields_show_the_default_of_the_section_not_of_its_class() -> None:
    shown = {key: (kind, default) for key, kind, default, _ in fields(Example)}
    assert shown["way.rank"] == ("int", 3)
    assert shown["way.name"] == ("short|long", "long")
    assert shown["number"] == ("float or none", None)
    assert shown["many"] == ("list of str", [])


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(
    word=words, many=st.lists(words, max_size=3), number=st.none() | st.floats(allow_nan=False, allow_infinity=False)
)
def test_a_config_survives_its_own_yaml(
    word: str, many: list[str], number: float | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = Example(word=word, many=many, number=number, free={"x": word})
    file = tmp_path_factory.getbasetemp() / "survives.yaml"
    file.write_text(to_yaml(config), "utf-8")
    assert load_config(Example, file) == config


SHELVES: tuple[Shelf, ...] = ("recipes", "eval")
SHIPPED = [(recipe, file) for shelf in SHELVES for recipe in list_recipes(shelf) for file in recipe.config_files]


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_every_field_of_a_recipe_is_documented(recipe: Recipe) -> None:
    for key, _, _, text in fields(recipe.load().CONFIG):
        assert text, f"{key} has no help text"


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_ships_its_yaml(recipe: Recipe) -> None:
    assert [file.name for file in recipe.config_files][:1] == [f"{recipe.name}.yaml"]


@pytest.mark.parametrize(("recipe", "file"), SHIPPED, ids=[file.name for _, file in SHIPPED])
def test_a_shipped_yaml_binds_to_its_recipe(recipe: Recipe, file: Path) -> None:
    config_class = recipe.load().CONFIG
    values = yaml.safe_load(file.read_text("utf-8")) or {}
    config = load_config(config_class, file)
    if file.stem == recipe.name:
        required = {name: values[name] for name, info in config_class.model_fields.items() if info.is_required()}
        assert config == config_class(**required), "the YAML beside a recipe shows the defaults"
    first, second = file.read_text("utf-8").splitlines()[:2]
    verb = "evaluate" if recipe.shelf == "eval" else "run"
    commands = [f"clinical-nlp {verb} {recipe.name}", f"clinical-nlp {recipe.name}"]
    assert first.startswith("#"), "the first line is the command that runs it"
    assert any(command in f"{first} {second}" for command in commands), "the first lines hold the command that runs it"


def test_every_yaml_belongs_to_a_recipe() -> None:
    for shelf in SHELVES:
        folder = Path(__file__).parent.parent / shelf / "configs"
        known = {file.name for recipe in list_recipes(shelf) for file in recipe.config_files}
        assert {file.name for file in folder.glob("*.yaml")} <= known


def test_split_after_takes_a_date_as_typed() -> None:
    config = load_config(RecipeConfig, None, parse_overrides(["--split", "time", "--split.after", "2020-01-01"]))
    assert config.split == SplitConfig(name="time", after="2020-01-01")
