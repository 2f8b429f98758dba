"""Several teachers on several processes."""

import json

import pytest

from abkd_fast import distributed, train
from abkd_fast.teacher import store
from conftest import GPT2
from test_distributed import RECIPE, Ranks, assert_same_losses, context, models, recipe  # noqa: F401 - fixtures


@pytest.fixture
def arguments(tmp_path, recipe, models):  # noqa: F811
    """Writes a recipe of two teachers. The second has a few rows: not every rank has one in a step."""
    rows = [{"prompt": f"What is {number} plus 2?", "output": f"It is {number + 2}."} for number in range(40)]
    for number, row in enumerate(rows):
        row["teacher"] = "few" if number % 7 == 0 else "many"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    random = {**GPT2, "vocab_size": 1024, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}

    def write(name, parallel, **sections):
        training = {**RECIPE["train"], "steps": 6, "parallel": parallel}
        data = {**RECIPE["data"], "train": str(tmp_path / "rows.jsonl")}
        teachers = {"many": {"path": models}, "few": {"config": random}}
        values = {"method": "ab", "data": data, "teachers": teachers, "train": training, **sections}
        return [*recipe(name, **values), "--set", "teacher=null"]

    return write


def teacher_losses(folder):
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in point.items() if name.startswith("loss_of_")}
        for point in points
        if point["kind"] == "train"
    ]


def built(folder):
    """The bytes of all that teachers computed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize("mode", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_losses_are_those_of_one_process(context, tmp_path, arguments, cache_folder, mode):  # noqa: F811
    assert train.main(arguments("alone", "auto")) == 0
    cache_folder.rename(tmp_path / "other")  # the processes build their own
    ranks = Ranks(context, tmp_path, 2, arguments(mode, mode))
    assert ranks.wait() == [0, 0], ranks.output()
    if mode == "ddp":  # sharded teachers compute several samples at once, which rounds differently
        assert built(cache_folder) == built(tmp_path / "other")
    assert_same_losses(tmp_path / mode, tmp_path / "alone")
    ours, theirs = teacher_losses(tmp_path / mode), teacher_losses(tmp_path / "alone")
    for own, others in zip(ours, theirs, strict=True):
        assert own == pytest.approx(others, rel=1e-5)
    assert {*map(len, ours)} == {1, 2}, "some steps have one teacher"


def unreadable_on_rank_1():
    """Rank 1 is on a machine that doesn't have the cache folder."""
    read_head = store.read_head

    def wrapped(folder):
        return read_head(folder / "nowhere" if distributed.rank() == 1 else folder)

    store.read_head = wrapped


def test_states_that_one_rank_cannot_read_are_read_by_none(context, tmp_path, arguments):  # noqa: F811
    ranks = Ranks(context, tmp_path, 2, arguments("ddp", "ddp"), prepare=unreadable_on_rank_1)
    assert ranks.wait() == [0, 0], ranks.output()
    assert ranks.output()[0].count("runs in every step (") == 2


@pytest.mark.slow
def test_states_that_one_rank_cannot_read_where_the_mode_insists(context, tmp_path, arguments):  # noqa: F811
    ranks = Ranks(context, tmp_path, 2, arguments("disk", "ddp", cache={"mode": "disk"}), prepare=unreadable_on_rank_1)
    assert ranks.wait() == [2, 2], ranks.output()
    assert "No such file or directory; choose another" in "".join(ranks.output())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kd", "gkd"])
def test_live_teachers_in_ddp(context, tmp_path, arguments, method):  # noqa: F811
    """Steps may ask only some of them on a rank."""
    live = {"cache": {"mode": "off"}, "method": method}
    assert train.main(arguments("alone", "auto", **live)) == 0
    ranks = Ranks(context, tmp_path, 2, arguments("ddp", "ddp", **live))
    assert ranks.wait() == [0, 0], ranks.output()
    assert_same_losses(tmp_path / "ddp", tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"cache": {"mode": "off"}}, "error: teachers: cache.mode is off, but with train.parallel=fsdp"),
        (
            {"train": {**RECIPE["train"], "steps": 1, "parallel": "fsdp"}},
            "error: teachers.many: runs in every step (no sample is seen twice), but with train.parallel=fsdp",
        ),
        ({"method": "gkd"}, "error: teachers: method gkd asks them in training, but with train.parallel=fsdp"),
    ],
)
def test_sharded_teachers_that_run_in_training_are_refused(context, tmp_path, arguments, sections, problem):  # noqa: F811
    """Each rank would wait for the others at another teacher."""
    ranks = Ranks(context, tmp_path, 2, arguments("fsdp", "fsdp", **sections))
    assert ranks.wait() == [2, 2], ranks.output()
    assert problem in "".join(ranks.output())
