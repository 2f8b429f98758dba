"""Puts measured and predicted tables into docs/performance.md: `python benchmarks/document.py`.

There a line `<!-- NAME SECTION -->`, or `<!-- NAME SECTION: TITLE -->` for one table of several, stands before what is
in NAME.json, the newest in benchmarks/results, and `<!-- end -->` after it; `NAME@SCALE` is of the newest at a scale,
and `NAME@SCALE/COUNT` of the newest there of so many methods. Without such a file or table, all stays as it is.
"""

from __future__ import annotations

import json
import pathlib
import re

FOLDER = pathlib.Path(__file__).parent
PLACE = re.compile(r"(<!-- (\w+)(?:@(\w+)(?:/(\d+))?)? (\w+)(?:: ([^\n]+))? -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: pathlib.Path) -> str:
    def tables(place: re.Match) -> str:
        begin, name, scale, count, section, title, end = place.groups()
        found = sorted(results.glob(f"*/{name}.json"), key=lambda file: file.stat().st_mtime)
        contents = [json.loads(file.read_text()) for file in found]
        contents = [content for content in contents if scale in (None, content["options"].get("scale"))]
        if count:
            contents = [content for content in contents if len(content["options"]["methods"]) == int(count)]
        if not contents:
            return place[0]
        content = contents[-1]
        machine = content["machine"]
        where = f" ({machine['device']}, torch {machine['torch']}, commit {machine['commit']})"
        if name == "predict":  # the same everywhere
            where = ""
        chosen = [t for t in content["sections"].get(section, []) if title in (None, t["title"])]
        if not chosen:
            return place[0]
        body = "".join(f"**{table['title']}**{where}\n\n{table['markdown']}\n\n" for table in chosen)
        return f"{begin}{body}{end}"

    return PLACE.sub(tables, text)


def main() -> None:
    page = FOLDER.parent / "docs" / "performance.md"
    page.write_text(fill(page.read_text(), FOLDER / "results"))


if __name__ == "__main__":
    main()
