"""Recipes in YAML mean what the same recipes in JSON mean."""

import json

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from abkd_fast.config import yaml_files
from abkd_fast.config.recipe import load, packaged_recipes
from abkd_fast.errors import ConfigError

CHARACTERS = st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"])  # JSON writes others as two
TEXTS, KEYS = st.text(CHARACTERS), st.text(CHARACTERS, max_size=150)  # YAML's keys have at most 1,024 characters
FINITE = st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FINITE | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_json_is_yaml(value):
    assert yaml_files.read(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("5e-05", 5e-5), (".5", 0.5), ("3.", 3.0), ("-2", -2), ("010", 10),
        ("off", "off"), ("yes", "yes"), ("no", "no"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("2026-11-30", "2026-11-30"), ("12:30", "12:30"), ("0x1f", "0x1f"), ("ab:0.2,0.7", "ab:0.2,0.7"), ('"1"', "1"),
        ("stage:first", "stage:first"), ("1.5.2", "1.5.2"), (".inf", ".inf"), ("e5", "e5"), ("1_000", "1_000"),
        ("", None),
    ],
)  # fmt: skip
def test_plain_values(text, value):
    found = yaml_files.read(f"key: {text}")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {lr: 1, lr: 2}", "lr: written twice"),
        ("a: 1\nb:\n  - [", "line 3: broken YAML"),
        ("a: b: c", "line 1: broken YAML"),
        ("1: one", "expected a name before the colon"),
        ("a: !!python/name:os.system", "line 1: a tag .* is not read"),
        ("optim: !!set {lr}", "line 1: a tag .* is not read"),
        ("optim: {lr: !!bool abc}", "line 1: a tag .* is not read"),
        ("a: &x [*x]", "what an alias stands for is not read"),
        ("a: &x {b: 1}\nc: *x", "what an alias stands for is not read"),
        ("- 1", "expected a mapping"),
        ("a: \x07", "broken YAML"),
        ("optim: {lr: fast}", 'optim.lr must be a number, got "fast"'),
    ],
)
def test_broken_files(text, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        load(str(path))
    assert str(raised.value).startswith(str(path))


@pytest.mark.parametrize("name", ["quickstart", "gpt2/ab", "llama/distillm"])
@pytest.mark.parametrize("end", ["yaml", "yml"])
def test_packaged_recipes_as_yaml(name, end, tmp_path):
    """Bases may be of the other kind."""
    path = tmp_path / f"recipe.{end}"
    values = json.loads(packaged_recipes()[name].read_text())
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    assert load(str(path)) == load(name)


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=1e-4", "lr: unknown key; did you mean optim.lr?"),
        ("epochs=3", "did you mean train.epochs?"),
        ("steps=3", "did you mean train.steps?"),
        ("max_new_tokens=3", "did you mean sampling.max_new_tokens or eval.max_new_tokens?"),
        ("metod=ab", "did you mean method?"),
        ("optim.learning=1", "optim.learning: unknown key; valid are"),
    ],
)
def test_keys_outside_their_section(override, hint):
    with pytest.raises(ConfigError) as raised:
        load("gpt2/ab", [override])
    assert hint in str(raised.value)
