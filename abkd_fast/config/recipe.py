"""Recipes: JSON or YAML files with bases and stages, and values from the command line, become configurations."""

import copy
import dataclasses
import difflib
import functools
import json
import math
import pathlib
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from ..errors import JSON_ERRORS, TOO_DEEP, ConfigError, is_deep, nearest, of_stage, reading
from . import yaml_files
from .methods import ON_POLICY_READERS
from .schema import Config
from .section import Text

YAML = (".yaml", ".yml")
RECIPES = pathlib.Path(__file__).parents[1] / "recipes"


class Layer(typing.NamedTuple):
    """Some values of a configuration. `place` tells the user in a message where they come from."""

    place: str
    values: dict


def load(recipe: str | dict, overrides: list[str] = (), values: Iterable[dict] = ()) -> list[Config]:
    """Reads a recipe and its bases, applies the overrides, and returns the stages: one, unless the recipe lists more.

    A shared key of `on_policy` goes to the stages whose methods read it. It is refused if no method does.

    Args:
        recipe: a JSON or YAML file, the name of a packaged recipe, with or without ".json", or what a file would have.
        overrides: "key=value" for all stages, or "STAGE:key=value" for one stage, which wins. Keys are dotted. A value
            that is not JSON is text.
        values: keys of a recipe, for all stages; later ones win.

    Raises ConfigError, which names the file (or override), the key, the value, and the stage if others don't have it.
    """
    shared = _read_with_bases(recipe)
    stages = _take_stages(shared)
    shared += [Layer("the arguments", _checked(keys, "the arguments")) for keys in values if keys]
    last = shared[-1].place
    places = {name: f"{last} stage {name}" for name in stages}
    for name, layers in stages.items():
        layers.append(Layer(places[name], {"run": {"stage": name}}))
    for override in overrides:
        stage, layer = _parse_override(override, stages)
        (stages[stage] if stage else shared).append(layer)
    if not stages:
        return [_configure(shared, last)]
    methods = {name: _merged([*shared, *own]).get("method") or Config.method for name, own in stages.items()}
    configs, problems = [], {}
    for name, own in stages.items():
        try:
            layers = [*_for_method(shared, methods[name], methods.values()), *own]
            configs.append(_configure(layers, places[name]))
        except ConfigError as error:
            problems[name] = error
    if problems:
        is_shared = len(problems) == len(stages) and len({*map(str, problems.values())}) == 1
        with of_stage(None if is_shared else next(iter(problems))):
            raise next(iter(problems.values()))
    return configs


def merged(recipe: str | dict) -> dict:
    """The values of a recipe, as `load` takes it, and of its bases. Raises ConfigError where it can't be read."""
    return _merged(_read_with_bases(recipe))


def _for_method(shared: list[Layer], method: str, methods: Iterable[str]) -> list[Layer]:
    """The shared layers for one method: without keys of `on_policy` that only other stages' methods read."""
    foreign = {
        key
        for key, readers in ON_POLICY_READERS.items()
        if method not in readers and any(other in readers for other in methods)
    }
    layers = []
    for place, values in shared:
        if isinstance(section := values.get("on_policy"), dict):
            values = {**values, "on_policy": {key: section[key] for key in section if key not in foreign}}
        layers.append(Layer(place, values))
    return layers


def packaged_recipes() -> dict[str, pathlib.Path]:
    """The files of the packaged recipes by name, for example "quickstart" or "gpt2/kd"."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.rglob("*.json"))}


def _read_with_bases(recipe: str | dict) -> list[Layer]:
    """The contents of a recipe and its bases. The base of all others is first."""
    if isinstance(recipe, dict):
        name = "the recipe"
        files, paths = [Layer(name, copy.deepcopy(_checked(recipe, name)))], [pathlib.Path(name)]
    else:
        name = recipe
        paths = [_find(name, pathlib.Path(), "")]
        files = [Layer(name, _read(paths[0], name))]
    while (base := files[0].values.pop("base", None)) is not None:
        owner = files[0].place
        if not isinstance(base, str):
            raise ConfigError(f"{owner}: base must be text, got {json.dumps(base)}")
        path = _find(base, paths[0].parent, f"{owner}: base: ")
        place = f"{base} (base of {name})"
        if any(other.exists() and path.samefile(other) for other in paths):
            raise ConfigError(f"{owner}: base: {base} leads back to itself; no recipe can be its own base")
        paths.insert(0, path)
        files.insert(0, Layer(place, _read(path, place)))
    return files


def _find(name: str, folder: pathlib.Path, where: str) -> pathlib.Path:
    """The path of a file in `folder`, or of a packaged recipe. Raises ConfigError, which begins with `where`."""
    path = folder / name
    try:
        is_folder = path.is_dir()
        if path.exists() and not is_folder:
            return path
    except OSError as error:
        raise ConfigError(f"{where}{name}: can't be read ({error.strerror})") from None
    packaged, stem = packaged_recipes(), name.removesuffix(".json")
    # Flat names were used before the recipes had folders: "gpt2-kd" is gpt2/kd, and "gpt2" is gpt2/ab.
    flat = {key.replace("/", "-").removesuffix("-ab"): key for key in packaged}
    if found := packaged.get(flat.get(stem, stem)):
        return found
    if is_folder:
        raise ConfigError(f"{where}{name}: is a folder, expected a JSON or YAML file")
    near = difflib.get_close_matches(path.stem, [*flat, *packaged], n=1)
    hint = f"packaged recipes are {', '.join(packaged)}"
    if near:
        hint = f"did you mean {flat.get(near[0], near[0])}.json?"
    raise ConfigError(f"{where}{name}: no such file; {hint}")


def _read(path: pathlib.Path, place: str) -> dict:
    """The object in a file, JSON or YAML by its name. Raises ConfigError if it is broken."""
    is_yaml = path.suffix.lower() in YAML
    with reading(f"{place}: can't be read"):
        text = path.read_text(encoding="utf-8-sig")
        try:
            values = yaml_files.read(text) if is_yaml else json.loads(text, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{place} line {error.lineno}: broken JSON: {error.msg}") from None
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: expected a {'mapping' if is_yaml else 'JSON object'}")
    return _checked(values, place)


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [key for key, _ in pairs]
        raise ConfigError(f"{next(key for key in names if names.count(key) > 1)}: written twice")
    return values


def _checked(values: dict, place: str) -> dict:
    """The recipe, or some values of it. Raises ConfigError where `stages` has another shape, and for deep nesting."""
    if is_deep(values):
        raise ConfigError(f"{place}: {TOO_DEEP}")
    stages = {} if values.get("stages") is None else values["stages"]
    if not isinstance(stages, dict) or not all(name and isinstance(own, dict | None) for name, own in stages.items()):
        raise ConfigError(f'{place}: stages: expected an object of objects, {{"NAME": {{…}}, …}}')
    return values


def _take_stages(files: list[Layer]) -> dict[str, list[Layer]]:
    """Removes `stages` from the files. Returns the layers of each stage by its name. A null removes a base's stage."""
    stages = None
    for place, values in files:
        if "stages" not in values:
            continue
        here = values.pop("stages")
        stages = None if here is None else stages or {}
        for name, own in (here or {}).items():
            if own is not None:
                stages.setdefault(name, []).append(Layer(f"{place} stage {name}", own))
            elif name in stages:
                del stages[name]
            else:
                raise ConfigError(f"{place}: stages.{name} is null, but no base has it{_known(name, stages)}")
    if stages == {}:
        raise ConfigError(f"{files[-1].place}: stages: none is left; null instead of all of them means no stages")
    return stages or {}


def _known(name: str, stages: dict) -> str:
    return nearest(name, stages) if stages else "; there are no stages"


def _parse_override(override: str, stages: dict) -> tuple[str, Layer]:
    """The stage ("" means all) and the layer of "STAGE:key.key=value"."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f'--set {override}: expected key=value, for example "optim.lr=1e-4"')
    stage, colon, rest = key.rpartition(":")
    if colon and stage not in stages:
        raise ConfigError(f'--set {override}: no stage "{stage}"{_known(stage, stages)}')
    keys = rest.split(".")
    if keys[0] in ("base", "stages"):
        raise ConfigError(f'--set {override}: {keys[0]} is the file\'s; a stage is changed by "STAGE:key=value"')
    try:
        value = json.loads(text)
    except JSON_ERRORS:
        value = text
    place, values = f"--set {override}", functools.reduce(lambda inner, key: {key: inner}, reversed(keys), value)
    return stage, Layer(place, _checked(values, place))


def _configure(layers: list[Layer], otherwise: str) -> Config:
    """Merges the layers. An error names the place of the layer with the wrong key, or else `otherwise`."""
    try:
        return _build(Config, _merged(layers))
    except ConfigError as error:
        place = next((layer.place for layer in reversed(layers) if _has(layer.values, error.key)), otherwise)
        raise ConfigError(f"{place}: {error}", error.key) from None


def _merged(layers: list[Layer]) -> dict:
    return functools.reduce(_merge, (layer.values for layer in layers))


def _merge(base: dict, over: dict) -> dict:
    """`over` on top of `base`, merged section by section."""
    both = {key for key, value in over.items() if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return {**base, **over, **{key: _merge(base[key], over[key]) for key in both}}


def _has(values: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _build(cls: type, values: Any, prefix: str = "") -> Any:
    """Builds a dataclass from a JSON object. `prefix` is its dotted name with a dot at the end, for messages."""
    if not isinstance(values, dict):
        section = prefix.removesuffix(".")
        raise ConfigError(f"{section}: expected an object, got {_show(values)}", section)
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        name = prefix + key
        if key == "comment":
            continue
        if key not in fields:
            raise ConfigError(f"{name}: unknown key{_other_place(key, prefix) or nearest(key, fields)}", name)
        if value is not None or type(None) in typing.get_args(hints[key]):  # else null is the default
            arguments[key] = _convert(hints[key], value, name)
    for key, field in fields.items():
        if key not in arguments and field.default is dataclasses.MISSING:
            raise ConfigError(f"{prefix}{key}: missing", prefix + key)
    try:
        return cls(**arguments)
    except ConfigError as error:
        where = prefix if error.key or not prefix else f"{prefix.removesuffix('.')}: "
        raise ConfigError(f"{where}{error}", prefix + error.key) from None


def _other_place(key: str, prefix: str) -> str | None:
    """A hint for a message: the sections that have a key which was given outside of them."""
    having = []
    for name, hint in typing.get_type_hints(Config).items() if not prefix else ():
        section = next((kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)), None)
        if section and key in {field.name for field in dataclasses.fields(section)}:
            having.append(f"{name}.{key}")
    return f"; did you mean {' or '.join(having)}?" if having else None


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Converts a JSON value to the type of its key."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (option,) = (option for option in typing.get_args(hint) if option is not type(None))
        return None if value is None else _convert(option, value, name)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.")
    if typing.get_origin(hint) is Literal:
        valid = typing.get_args(hint)
        if not any(type(value) is type(option) and value == option for option in valid):
            options = ", ".join(option if isinstance(option, str) else json.dumps(option) for option in valid)
            raise ConfigError(f"{name} is {_show(value)}, expected one of {options}", name)
        return value
    if typing.get_origin(hint) is tuple:
        return _convert_list(hint, value, name)
    if typing.get_origin(hint) is dict:
        _, section = typing.get_args(hint)
        named = {key: inner for key, inner in _convert(dict, value, name).items() if inner is not None}
        named.pop("comment", None)
        return {key: _convert(section, inner, f"{name}.{key}") for key, inner in named.items()}
    if hint is float and type(value) is int and abs(value) < 1e300:
        return float(value)
    is_prose, hint = hint is Text, getattr(hint, "__supertype__", hint)
    expected = {float: "a number", int: "a whole number", bool: "true or false", str: "text", dict: "an object"}[hint]
    if type(value) is not hint or (hint is float and not math.isfinite(value)):
        raise ConfigError(f"{name} must be {expected}, got {_show(value)}", name)
    if hint is int and abs(value) >= 2**63:
        raise ConfigError(f"{name} is too large: {_show(value)}", name)
    if value == "":
        raise ConfigError(f"{name} is empty: give a text, or leave it out", name)
    is_name = hint is str and not is_prose
    parts = value.encode("utf-8", "surrogatepass").split(b"/") if is_name else [b""]
    if is_name and ("\0" in value or len(value) >= 4096 or max(map(len, parts)) >= 256):
        raise ConfigError(f"{name} has a NUL character or is too long, for a name or path: {_show(value)}", name)
    return value


def _convert_list(hint: Any, value: Any, name: str) -> tuple:
    """Converts a JSON list to a tuple of texts, or of a number of numbers."""
    item, *rest = typing.get_args(hint)
    length = None if rest == [...] else 1 + len(rest)
    if not isinstance(value, list) or (length is not None and len(value) != length):
        items = "texts" if item is str else "numbers" if length is None else f"{length} numbers"
        raise ConfigError(f"{name} must be a list of {items}, got {_show(value)}", name)
    return tuple(_convert(item, part, name) for part in value)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"
