"""Every recipe in the docs loads as it stands there, and every part of one in a small recipe."""

import json
import pathlib
import re

import pytest

from abkd_fast.config.recipe import load

ROOT = pathlib.Path(__file__).parents[2]
OF_RECIPES = {"run", "base", "student", "data", "stages"}
LEAST = {
    "run": {"name": "mine"},
    "method": "ab",
    "student": {"path": "models/small"},
    "teacher": {"path": "models/large"},
    "data": {"train": "rows.jsonl"},
}


def blocks():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.finditer(r"^ *```json\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE):
            line = path.read_text()[: block.start()].count("\n") + 1
            yield pytest.param(block[1].strip(), id=f"{path.name} line {line}")


@pytest.mark.parametrize("text", [*blocks()])
def test_what_the_docs_show_can_be_typed(tmp_path, text):
    recipe = json.loads(text if text.startswith("{") else f"{{{text}}}")
    if not OF_RECIPES & {*recipe}:
        return  # a row
    if not text.startswith("{"):
        (tmp_path / "least.json").write_text(json.dumps(LEAST))
        recipe["base"] = "least.json"
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    for stage in load(str(tmp_path / "recipe.json")):
        assert stage.run.name == "mine"
