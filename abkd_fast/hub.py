"""The Hugging Face Hub: logins are checked before training, results are pushed with a model card after it."""

import json
import pathlib
import shlex

from huggingface_hub import CommitOperationAdd, HfApi

from .config.schema import Config
from .console import console, format_bytes
from .errors import ConfigError, Interrupted, first_line, reading
from .evaluation import model_card
from .evaluation.runs import Run, read_runs
from .files import atomic_write, check_path_length, entries, read_json
from .models.identity import ADAPTER_SETTINGS

CARD = "README.md"
OF_CARD = {"run": dict, "data": {"train": str, "dev": (str, None)}}  # what a card says besides a report
LOG_IN = "log in by `hf auth login`, or set HF_TOKEN"


def check(stages: list[Config], creates: bool) -> None:
    """Raises ConfigError, before any training, where a stage's result could not be pushed.

    creates: makes the repositories, which shows that the account may.
    """
    wishes = {config.run.stage: config.run.push_to_hub for config in stages if config.run.push_to_hub is not None}
    trained = {config.run.stage for config in stages if config.method != "generate"}
    for name in dict.fromkeys(wishes.values()):
        having = [stage for stage, wish in wishes.items() if wish == name and stage in trained]
        if not having:
            raise ConfigError(f"run.push_to_hub: {name}: method generate trains no model that could be pushed")
        if len(having) > 1:
            problem = f"the stages {', '.join(having)} would all be pushed to {name}"
            raise ConfigError(f"run.push_to_hub: {problem}; name one: --set {having[-1]}:run.push_to_hub={name}")
        later = "or leave run.push_to_hub out, and push the result later: abkd-fast push RUN NAME"
        log_in("run.push_to_hub", name, later, creates)


def log_in(key: str, name: str, otherwise: str, creates: bool = True, private: bool = False) -> str:
    """The full name of a repository that this account may write to; it is made if it is missing.

    Raises ConfigError, which begins with `key` and says in `otherwise` what else one can do.
    """
    api = HfApi()
    try:
        account = api.whoami()
        problem = _problem(account, name)
        if problem is None and creates:
            name = api.create_repo(name, private=private or None, exist_ok=True).repo_id
            if private and not api.model_info(name).private:
                problem = "is there already, and public: change that on the Hub, or leave --private out"
    except Exception as error:  # of many kinds: no token, a wrong one, no network, HF_HUB_OFFLINE
        problem = f"the Hub can't be used ({first_line(error)}): {LOG_IN}, {otherwise}"
    if problem is not None:
        raise ConfigError(f"{key}: {name}: {problem}", key)
    return name


def _problem(account: dict, name: str) -> str | None:
    """Why an account can't write to a repository, as far as it says so itself."""
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        return "the token may only read; use one that may write"
    names = [account["name"], *(group["name"] for group in account.get("orgs", ()))]
    owner = name.partition("/")[0] if "/" in name else account["name"]
    if role == "write" and owner.lower() not in map(str.lower, names):
        return f"the token is that of {names[0]}, and may write for {', '.join(names)}"
    return None


def push_stages(stages: list[Config]) -> None:
    """Pushes what `run.push_to_hub` names. Raises Interrupted, with the way out, where that fails: all is saved."""
    for config in stages:
        name, folder = config.run.push_to_hub, config.run.folder
        if name is None or config.method == "generate":
            continue
        try:
            push(*find_run(folder), name)
        except (ConfigError, Interrupted) as error:
            again = f"{shlex.join(['abkd-fast', 'push', str(folder), name])} pushes it"
            raise Interrupted(f"{folder / 'final'} is saved, but not on the Hub: {error}; {again}") from None


def push(run: Run, runs: list[Run], name: str, private: bool = False) -> None:
    """Uploads a run's final/ with its card, as one commit, and prints where it is. `runs` are those of its recipe.

    Raises ConfigError for a name or an account that can't be used, Interrupted if the upload fails.
    """
    name = log_in("NAME", name, "and push again", private=private)
    files = contents(run, runs, name)
    size = sum(content.stat().st_size for content in files.values() if isinstance(content, pathlib.Path))
    console.print(f"pushing {len(files)} files, {format_bytes(size)}, to {name}")
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    try:
        commit = HfApi().create_commit(name, operations, commit_message=f"Result of {run.folder.name}")
    except Exception as error:  # of many kinds: the network, the server, what a file contains
        raise Interrupted(f"{name}: the upload has failed ({first_line(error)})") from None
    console.print(f"pushed to {commit.repo_url}")


def find_run(folder: pathlib.Path, stage: str | None = None) -> tuple[Run, list[Run]]:
    """A run with a model in its folder final/, and all finished runs of its recipe, with this one among them.

    folder: of a run, its final/, or of a recipe with stages; the latter needs `stage`.

    Raises ConfigError.
    """
    check_path_length("run", folder)
    if folder.name == "final" and (folder.parent / "summary.json").exists():
        folder = folder.parent
    stages = [path.name for path in entries(folder) if (path / "summary.json").exists()]
    is_run = (folder / "summary.json").exists()
    if stage is not None and (is_run or stage not in stages):
        there = f"its stages are {', '.join(stages)}" if stages and not is_run else "it has no stages"
        raise ConfigError(f"stage: {folder} has no finished stage {stage}; {there}", "stage")
    if stage is None and not is_run and stages:
        raise ConfigError(f"{folder} has the stages {', '.join(stages)}: name one with --stage")
    folder = folder / (stage or "")
    if not (folder / "final").is_dir():
        raise ConfigError(f"{folder}: no finished run there (final/, summary.json)")
    if not (folder / "metrics.jsonl").exists():
        raise ConfigError(f"{folder}: its result is rows, not a model: method generate trains none")
    (run,) = read_runs([folder])
    read_json(folder / "config.json", shape=OF_CARD)
    runs = read_runs([folder.parent]) if run.config.get("run", {}).get("stage") else [run]
    return next(other for other in runs if other.folder.samefile(folder)), runs


def contents(run: Run, runs: list[Run], name: str) -> dict[str, pathlib.Path | bytes]:
    """What the Hub gets, by its name there: the files of final/, its card, and the report's figure if there is one.

    The card is written into final/, unless somebody has written one there. Raises ConfigError if it can't be.
    """
    final, figure = run.folder / "final", run.folder / model_card.FIGURE
    card = final / CARD
    with reading(f"{card} can't be written"):
        if not card.exists() or model_card.is_own(card.read_text(encoding="utf-8")):
            atomic_write(card, model_card.write(run, runs, name))
    files = {path.relative_to(final).as_posix(): path for path in sorted(final.rglob("*")) if path.is_file()}
    if figure.exists():
        files[model_card.FIGURE] = figure
    if ADAPTER_SETTINGS in files:
        files[ADAPTER_SETTINGS] = _without_folder(files[ADAPTER_SETTINGS])
    return files


def _without_folder(settings: pathlib.Path) -> pathlib.Path | bytes:
    """The settings of an adapter. The name of a base in a folder of this machine is shortened, which is said."""
    values = read_json(settings, "get it again", {"base_model_name_or_path": str})
    base = values["base_model_name_or_path"]
    if model_card.is_hub_name(base) or (name := model_card.shown(base)) == base:
        return settings
    console.print(f"the adapter's base is a folder: users have to get {name} themselves")
    return (json.dumps(values | {"base_model_name_or_path": name}, indent=2) + "\n").encode()
