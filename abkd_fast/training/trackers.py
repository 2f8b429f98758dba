"""Weights & Biases and trackio: runs there get the points of a run, and go on when it is resumed."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from ..config.schema import Config
from ..config.training import LogConfig
from ..console import console, styled
from ..errors import RESUME, ConfigError, first_line
from ..files import read_json, write_json

TRACKERS = {"wandb": "id", "trackio": "name"}  # modules, and the attribute by which each knows a run again
FILE = "trackers.json"  # in the run folder: those attributes, by "MODULE/PROJECT"


def check_trackers(log: LogConfig) -> None:
    """Raises ConfigError where a tracker is asked for, but not installed."""
    for module in TRACKERS:
        project = getattr(log, module)
        if project is not None and importlib.util.find_spec(module) is None:
            problem = f'log.{module} is "{project}", but {module} is not installed'
            raise ConfigError(f"{problem}: pip install {module}, or leave it out", f"log.{module}")


class Trackers:
    """The runs at the trackers that a configuration asks for. On rank 0 alone."""

    def __init__(self, config: Config, logged: set[tuple[str, int]]) -> None:
        """Starts a run at each tracker, or continues it where the run folder knows one.

        logged: kinds and steps of the points that a resumed run had logged and comes to again. A run that is continued
            has them: Weights & Biases refuses steps that go back, trackio would show them twice.

        Raises ConfigError where a tracker can't be used, for example without a login.
        """
        known, self.runs = _known(config), {}
        for module in TRACKERS:
            if (project := getattr(config.log, module)) is not None:
                key = f"{module}/{project}"
                run = _start(module, project, config, known.get(key))
                self.runs[module] = run, logged if key in known else set()
                known[key] = getattr(run, TRACKERS[module])
        if self.runs:
            try:
                write_json(config.run.folder / FILE, known)
            except OSError as error:
                rest = f" ({error}): with {RESUME} the trackers will begin another run"
                console.print(styled(f"no {FILE}", "bold red", rest))

    def log(self, kind: str, step: int, values: dict[str, float | None]) -> None:
        """Gives a point to all. If one fails it lacks the point, and training goes on."""
        for module, (run, logged) in self.runs.items():
            if (kind, step) not in logged:
                try:
                    run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)
                except Exception as error:  # of many kinds
                    rest = f": step {step} ({first_line(error)}); training goes on"
                    console.print(styled(f"not at {module}", "bold red", rest))

    def finish(self) -> None:
        """Ends the runs. If one fails its points are not all there, and the run is as it is."""
        for module, (run, _) in self.runs.items():
            try:
                run.finish()
            except Exception as error:  # of many kinds
                console.print(styled(f"not all at {module}", "bold red", f" ({first_line(error)})"))


def _known(config: Config) -> dict[str, str]:
    try:
        return read_json(config.run.folder / FILE, shape={"*": str})
    except ConfigError:
        return {}


def _start(module: str, project: str, config: Config, known: str | None) -> Any:
    """A run at a tracker: that which is known there by its id or name, or a new one."""
    folder = str(config.run.folder)
    options = {"project": project, "name": folder, "group": folder, "config": config.to_dict()}
    if module == "wandb":
        options["dir"] = folder
    if known is not None:
        options |= {TRACKERS[module]: known, "resume": "allow"}
    try:
        return importlib.import_module(module).init(**options)
    except Exception as error:  # of many kinds
        hint = "; WANDB_MODE=offline does without a login" if module == "wandb" else ""
        raise ConfigError(f"log.{module}: {first_line(error)}{hint}", f"log.{module}") from None
