"""Whether a run's folder has the result of its configuration."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator

from . import distributed, manifest
from .config.models import IN_MEMORY
from .config.recipe import load
from .config.sampling import OPTIONS
from .config.schema import Config
from .console import console, styled
from .errors import RESUME, ConfigError, reading
from .files import LOCK, check_folder, leftovers, locked, read_json
from .losses.divergences import AlphaNet, parse

SUMMARY = {"dev_loss_before": (float, None), "dev_loss": (float, None), "seconds_per_sample": float}
WAY_OUT = "move the run's folder aside to run it again"


def find_result(config: Config, resume: bool, is_locked: bool = False) -> dict | None:
    """The summary of a finished run; None where it has to run. Raises what `is_finished` raises. Collective."""
    if not distributed.run_on_rank0(is_finished, config, resume, is_locked):
        return None
    distributed.run_on_rank0(check_result, config.run.folder)
    console.print(styled(f"{config.run.folder}", "bold", "  is finished already: its result is used"))
    return distributed.run_on_rank0(read_summary, config.run.folder)


def check_result(folder: pathlib.Path) -> None:
    """Raises ConfigError where final/ is not as the run has written it. Earlier versions left no checksums."""
    final, written = folder / "final", folder / manifest.NAME
    if written.exists() and (reason := manifest.damage(final, written, may_have_more=True)):
        way_out = f"move final/ aside, and {RESUME} makes it again; if it was changed on purpose, delete {written}"
        raise ConfigError(f"{final} is damaged ({reason}): {way_out}")


@contextlib.contextmanager
def locked_run(config: Config, resume: bool) -> Iterator[dict | None]:
    """Holds the lock of a run's folder. Gives what `find_result` finds then. Collective.

    Another process may have begun, changed or finished the run since this one looked without the lock.
    """
    with distributed.rank0_context(locked(config.run.folder)):
        yield find_result(config, resume, is_locked=True)


def is_finished(config: Config, resume: bool, is_locked: bool = False) -> bool:
    """Whether this run has its result. Raises ConfigError where its folder can't be used, or needs --resume.

    is_locked: this process has made the folder's lock.
    """
    folder = config.run.folder
    if not folder.exists():
        return False
    if not (folder / "config.json").exists():
        is_begun = folder.is_dir() and {*folder.iterdir()} <= {folder / LOCK, *leftovers(folder, "config.json.")}
        check_folder(folder, (resume or is_locked) and is_begun)
        return False
    finished = (folder / "final").exists()
    if finished and not resume and not config.run.stage:
        check_folder(folder)
    if not finished and not resume:
        raise ConfigError(f"{folder} exists, but was not finished: add {RESUME}, or choose another run.name")
    then = _read_config(folder / "config.json")
    changed = "; ".join(_differences(*(_deciding(one.to_dict(), finished) for one in (then, config))))
    if changed:
        way_out = "choose another run.name" if finished else "undo that to resume it, or choose another run.name"
        raise ConfigError(f"{folder} is the result of another configuration ({changed}): {way_out}")
    return finished


def _read_config(path: pathlib.Path) -> Config:
    """The configuration of a run. A value that an earlier version left out is what it meant then, not today's default.

    It trained the last turn alone, without a begin token, and AlphaNet decided per micro-batch.
    """
    given = read_json(path, WAY_OUT, {"data": dict, "stages?": None})["data"]
    with reading(f"{path} is not a run's configuration"):
        (then,) = load(str(path))
    meant = {"train_on": "last", "begin_token": False}
    left_out = {key: value for key, value in meant.items() if key not in given}
    loss = parse(then.loss)
    if isinstance(loss, AlphaNet) and then.loss.count(",") < 2:
        loss = dataclasses.replace(loss, per="batch")
    return dataclasses.replace(then, loss=str(loss), data=dataclasses.replace(then.data, **left_out))


def read_summary(folder: pathlib.Path) -> dict:
    """The summary of a finished run. Raises ConfigError where it has not what is printed of it."""
    return read_json(folder / "summary.json", WAY_OUT, SUMMARY)


def _deciding(values: dict, finished: bool) -> dict:
    """The values that a run's weights depend on. Paths within the folder of the runs become relative.

    The type of final/ counts as soon as that is written.
    """
    root = pathlib.Path(values["run"].pop("dir"), values["run"]["name"])
    for key in ("push_to_hub", *([] if finished else ["save_dtype"])):
        values["run"].pop(key)
    models = [values["student"], values["teacher"] or {}, *(values["teachers"] or {}).values()]
    for section in models:
        (section.get("config") or {}).pop(IN_MEMORY, None)  # a copy has another name, or none
    for section, key in [*itertools.product(models, ("path", "adapter")), (values["data"], "train")]:
        path = section.get(key)
        if path is not None and pathlib.Path(path).is_relative_to(root):
            section[key] = str(pathlib.Path(path).relative_to(root))
    test_sampling = {*OPTIONS} - {"max_new_tokens"}  # responses to dev rows follow none of these
    for section, key in (
        *(("train", key) for key in ("on_nonfinite", "gradient_checkpointing", "parallel", "timeout_minutes")),
        *(("eval", key) for key in ("sets", "seeds", "begin_token", *test_sampling)),
    ):
        values[section].pop(key, None)
    exact = {"dtype": values["cache"]["dtype"]}
    return {key: value for key, value in values.items() if key not in ("log", "checkpoint")} | {"cache": exact}


def _differences(then: dict, now: dict, prefix: str = "") -> Iterator[str]:
    for key in sorted({*then, *now}):
        old, new = then.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {json.dumps(old)}, is {json.dumps(new)}"
