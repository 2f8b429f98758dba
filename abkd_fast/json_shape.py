"""What JSON values must be like, for files that anybody may have changed."""

import json

NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    dict: "an object",
    list: "a list",
    None: "null",
}
LARGEST = 2**63  # whole numbers below it are read and printed everywhere


def problem(value: object, shape: object, key: str = "it") -> str | None:
    """The first difference between a value and a shape, with its dotted key; None where there is none.

    shape: one of these:

    - one of NAMES;
    - a tuple of shapes, one of which the value must have;
    - shapes by key, for an object. A key that ends in "?" may be missing; "*" is the shape of all other keys, of which
      there may be any.
    """
    if isinstance(shape, tuple):
        problems = [problem(value, each, key) for each in shape]
        return None if None in problems else problems[0]
    if isinstance(shape, dict) and isinstance(value, dict):
        return _problem_within(value, shape, "" if key == "it" else f"{key}.")
    shape = dict if isinstance(shape, dict) else shape
    is_right = value is None if shape is None else type(value) is shape or (shape is float and type(value) is int)
    if not is_right or (type(value) is int and abs(value) >= LARGEST):
        return f"{key} is {_show(value)}, expected {NAMES[shape]}"
    return None


def _problem_within(values: dict, shape: dict, prefix: str) -> str | None:
    known = {name.removesuffix("?"): inner for name, inner in shape.items() if name != "*"}
    for name in shape:
        if name != "*" and not name.endswith("?") and name not in values:
            return f"{prefix}{name} is missing"
    for name, value in values.items():
        inner = known.get(name, shape.get("*", ...))
        if inner is not ... and (found := problem(value, inner, f"{prefix}{name}")):
            return found
    return None


def _show(value: object) -> str:
    text = NAMES[type(value)] if isinstance(value, dict | list) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
