"""Several teachers: each row has its own. Against a padded computation in float64 by transformers' own pass."""

import gc
import json
import shutil
import types
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from abkd_fast import cache, train
from abkd_fast.config.recipe import load
from abkd_fast.data import quickstart
from abkd_fast.data.batches import count_labels, teacher_view
from abkd_fast.evaluation.runs import read_runs
from abkd_fast.evaluation.tables import write_report
from abkd_fast.models import loading
from abkd_fast.teacher import store
from abkd_fast.teacher.teacher import CachedTeacher, OnPolicyTeacher, Teacher
from abkd_fast.training.trainer import Trainer
from conftest import LLAMA
from runs import Killed, Run, assert_same, at_step, crash, crash_and_resume

MODEL = {**LLAMA, "vocab_size": 1024, "eos_token_id": 0, "bos_token_id": 0, "initializer_range": 0.3}
# They differ in all that a batch of both could mix up: widths, vocabularies' padding, what follows the projection.
TEACHERS = {
    "math": {**MODEL, "num_hidden_layers": 1, "hidden_size": 16},
    "code": {**MODEL, "model_type": "granite", "num_hidden_layers": 1, "vocab_size": 1040, "logits_scaling": 2.0},
}
PACKED = "train.batch_size=6", "data.max_length=40", "train.max_tokens=40", "data.dev=null"
EXACT = "train.dtype=float64", "loss=fkl", "optim.clip_norm=1e9", "student.dropout=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two teachers, and rows of both in turns; some of them have a prompt of the teacher's own."""
    folder = tmp_path_factory.mktemp("several")
    for seed, (name, config) in enumerate(TEACHERS.items()):
        torch.manual_seed(seed)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder / name)
        quickstart.tokenizer().save_pretrained(folder / name)
    rows = []
    for number in range(20):
        prompt = f"What is {number} plus 2?\n"
        rows.append({"prompt": prompt, "output": f"It is {number + 2}.", "teacher": ("math", "code")[number % 3 == 1]})
        if number % 4 == 1:
            rows[-1]["teacher_prompt"] = f"{number} plus 2 is {number + 2}.\n{prompt}"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make(folder, tmp_path):
    def make(method, *overrides, name="run", source="rows.jsonl"):
        teachers = {each: {"path": str(folder / each)} for each in TEACHERS}
        teachers["code"]["system"] = "Write code.\n"
        data = f"data.train={folder / source}", "data.train_rows=null"
        return Run(tmp_path / name, f"method={method}", *data, *overrides, teachers=teachers)

    return make


def config_of(run):
    return load(run.arguments[1], run.arguments[3::2])[0]


def trainer_of(run):
    trainer = Trainer(config_of(run))
    trainer.build()
    return trainer


def padded(model, sample):
    """The logits of the trained tokens [N, V] of a sample behind padding that attention must not see."""
    ids = F.pad(torch.tensor(sample["input_ids"]), (0, 7))[None]
    mask = (torch.arange(ids.shape[1]) < len(sample["input_ids"])).long()[None]
    start, stop = sample["spans"]
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, start - 1 : stop - 1]


def expected_losses(trainer, folder, samples):
    """Forward KL of every token, by teacher."""
    losses = {name: [] for name in TEACHERS}
    student = trainer.student.model.eval()
    student.set_attn_implementation("sdpa")
    models = {name: AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64) for name in TEACHERS}
    for sample in samples:
        name = trainer.data.teachers[sample["row"]]
        with torch.no_grad():
            p = padded(models[name], teacher_view(sample))[:, :1024].log_softmax(1)
        q = padded(student, sample).log_softmax(1)
        losses[name].append((p.exp() * (p - q)).sum(1))
    return {name: torch.cat(own) for name, own in losses.items() if own}


def mixed(trainer):
    """A step with a micro-batch of both teachers, and one of one teacher."""
    for batch in map(trainer.select_batch, trainer.batches()):
        if {1, 2} == {len(trainer.teachers.grouped(part.samples)) for part in batch.micro_batches}:
            return batch
    pytest.fail("no step has both kinds")


@pytest.mark.parametrize(
    ("method", "mode", "kind"),
    [("kd", "off", Teacher), ("kd", "disk", CachedTeacher), ("imitkd", "auto", OnPolicyTeacher)],
)
def test_losses_and_gradients_are_those_of_a_padded_computation(make, folder, method, mode, kind):
    written = (
        ("on_policy.replay_rows=0", "sampling.max_new_tokens=6", "train.max_tokens=60") if method == "imitkd" else ()
    )
    more = (
        f"cache.mode={mode}",
        "train.batch_size=7",
        "data.max_length=48",
        "train.max_tokens=48",
        "data.dev=null",
        *written,
    )
    trainer = trainer_of(make(method, *EXACT, *more))
    assert {type(teacher) for teacher in trainer.teachers.built.values()} == {kind}
    batch = mixed(trainer)
    losses, gradients = {}, {}
    trainer.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in trainer.student.named_parameters()})
    )
    weights = {name: p.detach().clone() for name, p in trainer.student.named_parameters()}
    losses["loss"], _, parts = trainer.train_step(batch)
    trainer.student.load_state_dict(weights, strict=False)
    expected = expected_losses(trainer, folder, batch.samples)
    trainer.student.zero_grad()
    mean = torch.cat([*expected.values()]).mean()
    mean.backward()
    for name, values in expected.items():
        assert parts[f"loss_of_{name}"].item() == pytest.approx(values.mean().item(), rel=1e-10)
    assert losses["loss"].item() == pytest.approx(mean.item(), rel=1e-10)
    for name, parameter in trainer.student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-12)


def test_a_logged_loss_of_a_teacher_is_the_mean_over_the_steps_that_have_it(make):
    run = make(
        "kd",
        "train.batch_size=1",
        "train.steps=6",
        "data.dev=null",
        "log.every_steps=6",
        "optim.lr=1e-30",
        "optim.min_lr=0",
    )
    trainer = trainer_of(run)
    each = {name: [] for name in TEACHERS}
    for batch in trainer.batches():
        (sample,) = batch.samples
        each[trainer.data.teachers[sample["row"]]].append(trainer.train_step(batch)[0])
    assert 0 < len(each["code"]) < 6
    assert run() == 0
    (point,) = [point for point in run.points() if point.get("kind") == "train"]
    for name, losses in each.items():
        assert point[f"loss_of_{name}"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["ab", "gkd"])
def test_a_resumed_run_has_the_same_bits(make, monkeypatch, method):
    more = "checkpoint.every_steps=4", "sampling.max_new_tokens=6", "log.every_steps=3"
    whole = make(method, *more, name="whole")
    assert whole() == 0
    broken = make(method, *more, name="broken")
    crash_and_resume(broken, monkeypatch, 5)
    assert_same(broken, whole)
    assert any("loss_of_math" in point for point in whole.points())


def test_a_row_that_changes_its_teacher_can_not_be_resumed(make, folder, tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows = [{key: row[key] for key in ("prompt", "output", "teacher")} for row in rows]  # both read the same
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make("ab", f"data.train={tmp_path}/rows.jsonl", "checkpoint.every_steps=2", "teachers.code.system=null")
    lines = (tmp_path / "rows.jsonl").read_text().splitlines(keepends=True)
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(Killed):
            run()
    lines[2] = lines[2].replace('"math"', '"code"')
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    assert run("--resume") == 2
    assert 'data.train, column "teacher": its text or the tokenizer has changed' in capsys.readouterr().err


def test_one_teacher_is_in_memory_at_a_time_while_caches_are_built(make, monkeypatch):
    alive, load_model = [], loading.load

    def load_one(spec, whole, role, *arguments):
        gc.collect()
        assert not [ref for ref in alive if ref() is not None], "the last one is still there"
        model = load_model(spec, whole, role, *arguments)
        if role == "teacher":
            alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load", load_one)
    trainer = trainer_of(make("kd", "cache.mode=disk"))
    assert len(alive) == 2
    assert [type(teacher) for teacher in trainer.teachers.built.values()] == [CachedTeacher, CachedTeacher]


def test_caches_are_shared_with_runs_of_one_teacher(make, folder, tmp_path, capsys):
    make("kd", "cache.mode=disk", "train.steps=1", "data.dev=null")()
    rows = [line for line in (folder / "rows.jsonl").read_text().splitlines() if '"math"' in line]
    (tmp_path / "math.jsonl").write_text("\n".join(rows))
    one = Run(
        tmp_path / "one",
        "method=kd",
        f"data.train={tmp_path}/math.jsonl",
        "data.train_rows=null",
        "cache.mode=disk",
        "train.steps=1",
        "data.dev=null",
        f"teacher.path={folder}/math",
    )
    capsys.readouterr()
    assert one() == 0
    assert "; found," in capsys.readouterr().out.replace("\n", " ")


def test_states_that_were_built_alone_give_the_same_bits_without_the_teachers(make, folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "there")
    sets = [f"teachers.{name}.path={tmp_path}/there/{name}" for name in TEACHERS]
    whole = make("ab", *sets, name="whole")
    assert whole() == 0
    run = make("ab", *sets, f"cache.dir={tmp_path}/states")
    capsys.readouterr()
    assert cache.main(run.arguments) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    given = out.rpartition("to train")[2].split("--set ")[1:]
    given = [each.strip().strip("'") for each in given if "hidden_states" in each]
    assert len(given) == 2
    shutil.move(tmp_path / "states", tmp_path / "copied")
    shutil.rmtree(tmp_path / "there")
    given = [each.replace(f"{tmp_path}/states", f"{tmp_path}/copied") for each in given]
    alone = make("ab", *(f"teachers.{name}.path=null" for name in TEACHERS), *given, name="alone")
    assert alone() == 0
    assert_same(alone, whole)


def test_a_teacher_with_hidden_states_and_one_with_a_model(make, folder, tmp_path, capsys):
    run = make("kd", f"cache.dir={tmp_path}/states")
    assert cache.main(run.arguments) == 0
    (states,) = [path.parent for path in (tmp_path / "states").glob("*/index.json") if "math" in path.read_text()]
    both = trainer_of(make("kd", "teachers.math.path=null", f"teachers.math.hidden_states={states}", name="both"))
    batch = next(both.batches()).micro_batches[0]
    live = trainer_of(make("kd", "cache.mode=off", name="live"))
    for ours, theirs in zip(both.teachers.lessons(batch), live.teachers.lessons(batch), strict=True):
        assert torch.equal(ours.head.hidden, theirs.head.hidden)


def test_a_micro_batch_that_is_read_ahead_has_the_states_of_all_its_teachers(make, monkeypatch):
    trainer = trainer_of(make("kd", "cache.mode=disk", *PACKED))
    empty = torch.empty
    monkeypatch.setattr(CachedTeacher, "_is_on_device", False)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    for batch in mixed(trainer).micro_batches:
        ahead, plain = trainer.teachers.read_ahead(batch), trainer.teachers.lessons(batch)
        with monkeypatch.context() as patch:
            patch.setattr(CachedTeacher, "_gather", lambda *_: pytest.fail("the step waits for the disk"))
            lessons = trainer.teachers.lessons(ahead)
        for ours, theirs in zip(lessons, plain, strict=True):
            assert torch.equal(ours.head.hidden, theirs.head.hidden)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["teachers.chess.path=MATH"], "teachers.chess: no row of"),
        (["teacher.path=MATH"], "teachers: there is a teacher, too; give null for one of the two"),
        (
            ["method=minillm", "loss=rkl"],
            "teachers: minillm draws tokens from a mixture of the student and one teacher",
        ),
        (["teachers.math.top_k=FILE", "teachers.math.path=null"], "teachers.math.top_k: a server's likeliest tokens"),
        (["teachers.a b.path=MATH"], 'teachers: "a b" is no name of a teacher'),
        (["data.teachers.rows.jsonl=math"], 'data.teachers.rows must be text, got {"jsonl": "math"}'),
        (['data.teachers={"rows.jsonl": "chess"}'], 'data.teachers: rows.jsonl has teacher "chess", expected one of'),
        (['data.teachers={"other.jsonl": "math"}'], "data.teachers names other.jsonl, but no row is of that file"),
        (["teachers.math.path=/nowhere"], "teachers.math.path: /nowhere"),
        (["teachers.math=null", "teachers.code=null"], "teachers: is empty; name some, or give teacher"),
        (["teachers=null"], 'teacher: missing, and method "ab" needs one'),
        (["teachers.math.hidden_states=/nowhere", "teachers.math.path=null"], "teachers.math.hidden_states: /nowhere"),
        (["teachers.code.chat_template=/nowhere"], "teachers.code.chat_template"),
    ],
)
def test_what_can_not_be_is_one_line(make, folder, capsys, overrides, problem):
    run = make("ab", *(each.replace("MATH", str(folder / "math")) for each in overrides))
    capsys.readouterr()
    assert run() == 2
    error = capsys.readouterr().err.strip()
    assert problem in error
    assert "\n" not in error
    assert not run.folder.exists()


def test_methods_without_a_teacher_leave_teachers_and_their_column_alone(make, capsys):
    assert make("sft", "train.steps=1", "data.dev=null")() == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not read: teacher" in printed


def test_a_dry_run_and_first_lines_name_every_teacher(make, capsys):
    run = make("ab", "train.steps=1", "data.dev=null", "cache.mode=disk")
    assert run("--dry-run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in TEACHERS:
        assert f"cache teachers.{name}: " in printed
    assert "teachers samples of each: math 13, code 7" in printed
    assert run() == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in TEACHERS:
        assert f"teacher teachers.{name}: states cached" in printed
    assert ", teachers.math 0." in printed


def test_show_rows_show_what_each_teacher_reads(make, capsys):
    run = make("ab")
    capsys.readouterr()
    assert train.main([*run.arguments, "--show-rows", "3"]) == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert "teacher_text" not in shown[0]
    assert [row["teacher"] for row in shown] == ["math", "code", "math"]
    assert shown[1]["teacher_text"].startswith("Write code.\n1 plus 2 is 3.\nWhat is 1 plus 2?")


def test_samples_of_a_teacher_are_counted_and_placed_in_all_data(make):
    trainer = trainer_of(make("kd", "cache.mode=disk"))
    dataset = trainer.data.train_set
    by_name = {name: sum(each == name for each in trainer.data.teachers) for name in TEACHERS}
    for key, teacher in trainer.teachers.built.items():
        assert teacher.samples == by_name[key.rpartition(".")[2]]
        rows = [index for index in range(len(dataset)) if trainer.teachers.key_of(dataset[index]) == key]
        hidden = [teacher.hidden_states(dataset[index] | {"index": index}) for index in rows]
        assert [len(each) for each in hidden] == [count_labels(dataset[index]) for index in rows]
    assert np.isfinite(trainer.teachers.seconds_saved(10))


def test_the_order_of_random_teachers_decides_nothing(tmp_path, folder):
    """No order of keys in a recipe does. Their weights are drawn as the run's seed says."""
    random = {name: {"config": {**MODEL, "num_hidden_layers": layers}} for name, layers in (("math", 1), ("code", 2))}
    results = []
    for number, names in enumerate((("math", "code"), ("code", "math"))):
        teachers = {name: random[name] for name in names}
        data = f"data.train={folder / 'rows.jsonl'}", "data.train_rows=null", "data.dev=null"
        run = Run(tmp_path / str(number), "method=kd", *data, "train.steps=2", "log.every_steps=1", teachers=teachers)
        assert run() == 0
        results.append([point["loss"] for point in run.points() if point.get("kind") == "train"])
    assert results[0] == results[1]


def test_both_models_are_measured_for_each_teacher(make, folder, capsys):
    run = make("kd", *EXACT, "train.steps=1", "data.dev=null", "train.batch_size=8")
    trainer = trainer_of(run)
    student, samples = trainer.student.model.eval(), next(trainer.batches()).samples
    student.set_attn_implementation("sdpa")
    assert run() == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name in TEACHERS:
        teacher = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        means = {"student": [], "teacher": []}
        for sample in (sample for sample in samples if trainer.data.teachers[sample["row"]] == name):
            labels = torch.tensor(sample["input_ids"][sample["spans"][0] :])[:, None]
            views = {"student": (student, sample), "teacher": (teacher, teacher_view(sample))}
            for role, view in views.items():
                means[role].append(padded(*view).log_softmax(1).gather(1, labels))
        of_student, of_teacher = (torch.cat(values).mean().item() for values in means.values())
        assert f"a token: student {of_student:.3f}, teachers.{name} {of_teacher:.3f}" in printed
        assert (f"(student.path, teachers.{name}.path)" in printed) == (of_teacher < of_student)


def test_stages_hand_rows_and_models_on(make, folder, tmp_path, capsys):
    """Answers keep the teacher of their prompt, a stage's result is one of several teachers, a report knows them."""
    student = {"path": str(folder / "math"), "config": None}
    stages = {
        "tuned": {"method": "sft", "student": student},
        "answers": {"method": "generate", "student": student},
        "taught": {
            "method": "kd",
            "data": {"train": "stage:answers"},
            "teachers": {"math": {"path": "stage:tuned"}},
        },
    }
    small = "train.steps=2", "train.batch_size=2", "data.dev_rows=1", "eval.every_steps=2", "sampling.max_new_tokens=4"
    run = make("kd", *small, "teachers.code.system=null", "data.max_length=64")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe | {"stages": stages}))
    assert run() == 0
    answers = (tmp_path / "run/test/answers/final/answers.jsonl").read_text().splitlines()
    assert {json.loads(line)["teacher"] for line in answers} == {"math", "code"}
    capsys.readouterr()
    assert run("--resume") == 0
    assert capsys.readouterr().out.count("is finished already") == 3
    runs = {run.folder.name: run for run in read_runs([tmp_path / "run/test/tuned", tmp_path / "run/test/taught"])}
    assert runs["taught"].learns_from(runs["tuned"])
    write_report([*runs.values()], tmp_path / "report")
    report = (tmp_path / "run/test/taught/report.md").read_text()
    for key, path in {"student": "random weights", "teachers.math": "tuned/final", "teachers.code": "code"}.items():
        assert f"- {key}: " in report
        assert path in report
    assert run("--resume", "--set", f"taught:teachers.code.path={folder}/math") == 2
    assert "teachers.code.path was" in capsys.readouterr().err


def test_rows_of_a_stage_that_will_name_no_teacher_are_refused_before_they_are_written(make, folder, tmp_path, capsys):
    student = {"path": str(folder / "math"), "config": None}
    stages = {
        "answers": {"method": "generate", "student": student, "data": {"train": "quickstart:small", "train_rows": 2}},
        "taught": {"data": {"train": "stage:answers"}},
    }
    run = make("kd")
    recipe = json.loads((tmp_path / "run" / "recipe.json").read_text())
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe | {"stages": stages}))
    sets = ("--set", "answers:data.train=quickstart:small", "--set", "taught:data.train=stage:answers")
    assert run("--dry-run", *sets, "--set", "answers:teachers=null") == 2
    error = capsys.readouterr().err
    assert 'stage:answers: quickstart:small row 1: has no "teacher" that is one of math, code' in error


def test_room_on_the_disk_is_for_all_caches_together(make, capsys, monkeypatch):
    run = make("kd", "cache.mode=disk")
    sizes = [cache.file.missing_bytes for cache in Trainer(config_of(run)).teachers.caches.values()]
    assert min(sizes) > 0

    def dry_run(room):
        usage = types.SimpleNamespace(free=store.DISK_MARGIN + room)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        return run("--dry-run")

    assert dry_run(sum(sizes)) == 0
    assert dry_run(sum(sizes) - 1) == 2
    assert "error: teachers.code: cache.dir: " in capsys.readouterr().err


def test_a_teacher_whose_rows_are_all_too_long_is_told_so(make, tmp_path, capsys):
    rows = [{"prompt": "a", "output": "b", "teacher": "math"}] * 4
    rows += [{"prompt": "What is 1 plus 2? " * 9, "output": "b", "teacher": "code"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make("kd", f"data.train={tmp_path}/rows.jsonl", "data.max_prompt_length=40", "data.dev=null")
    assert run("--dry-run") == 2
    assert "error: teachers.code: all 2 rows with this teacher are left out: bad ones" in capsys.readouterr().err
