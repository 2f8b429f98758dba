"""Folders of finished runs, as training and evaluation leave them."""

import json
import pathlib


def score(mean, std, **seeds):
    return {"mean": mean, "std": std, "seeds": {key.removeprefix("seed"): value for key, value in seeds.items()}}


def write_run(
    root: pathlib.Path,
    name: str,
    method="sft",
    loss="ab:0.2,0.7",
    student="elsewhere",
    teacher=None,
    sets=None,
    rouge=(1.0, 3.0),
    **config,
):
    """Writes root/name. `sets`: ROUGE-L by test set, as `score` gives it; `rouge`: that on dev rows at steps 10, 20."""

    def model(spec):  # a path, or keys
        return {"path": None, "adapter": None, "lora": None} | (spec if isinstance(spec, dict) else {"path": spec})

    folder = root / name
    folder.mkdir(parents=True)
    config = {"method": method, "loss": loss, "train": {"batch_size": 8}, **config}
    config |= {"student": model(student), "teacher": teacher and model(teacher)}
    summary = {"steps": 20, "selected_step": 10, "dev_loss_before": 3.5, "dev_loss": 2.25}
    summary |= {"dev_rouge_l_before": None, "dev_rouge_l": None}
    summary |= {"seconds_per_sample": 0.0125, "peak_memory_bytes": 2_500_000_000}
    points = [{"kind": "dev", "step": 0, "loss": 3.5}]
    for step, value in zip((10, 20), rouge, strict=True):
        point = {"loss": 3.0 - step / 20, "samples_per_second": 80.0, "peak_memory_bytes": 2e9}
        points += [{"kind": "train", "step": step, **point}]
        points += [{"kind": "dev", "step": step, "loss": 3.0, **({} if value is None else {"rouge_l": value})}]
    for file, values in {"config": config, "summary": summary}.items():
        (folder / f"{file}.json").write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    if sets:
        (folder / "eval").mkdir()
        facts = {"rows": 2, "cut_prompts": 0, "content": "0f"}
        facts["exact_match"] = {"mean": 0.0, "std": None, "seeds": {}}
        scores = {key: {"rouge_l": value, **facts} for key, value in sets.items()}
        content = {"model": "x", "weights": {}, "settings": {"temperature": 1.0}, "sets": scores}
        (folder / "eval" / "scores.json").write_text(json.dumps(content))
    return folder
