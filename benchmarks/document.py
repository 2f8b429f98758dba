"""Puts measured and predicted tables into docs/performance.md and docs/models.md: `python benchmarks/document.py`.

Between `<!-- NAME SECTION: TITLE -->` (TITLE is optional) and `<!-- end -->` go tables of benchmarks/results' newest
NAME.json; `NAME@SCALE/COUNT` takes the newest at a scale with so many methods. Without such a file nothing changes.
"""

import json
import pathlib
import re

FOLDER = pathlib.Path(__file__).parent
PLACE = re.compile(r"(<!-- (\w+)(?:@(\w+)(?:/(\d+))?)? (\w+)(?:: ([^\n]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: pathlib.Path) -> str:
    def tables(place: re.Match) -> str:
        begin, name, scale, count, section, title, end = place.groups()
        content = {"sections": {}}
        for file in sorted(results.glob(f"*/{name}.json"), key=lambda file: file.stat().st_mtime):
            found = json.loads(file.read_text())
            options = found["options"]
            if scale in (None, options.get("scale")) and (not count or len(options["methods"]) == int(count)):
                content = found
        chosen = [table for table in content["sections"].get(section, []) if title in (None, table["title"])]
        if not chosen:
            return place[0]
        where = " ({device}, torch {torch}, commit {commit})"  # a prediction is the same everywhere
        where = "" if name == "predict" else where.format(**content["machine"])
        body = "".join(f"**{table['title']}**{where}\n\n{table['markdown']}\n\n" for table in chosen)
        return f"{begin}{body}{end}"

    return PLACE.sub(tables, text)


if __name__ == "__main__":
    for name in ("performance", "models"):
        page = FOLDER.parent / "docs" / f"{name}.md"
        page.write_text(fill(page.read_text(), FOLDER / "results"))
