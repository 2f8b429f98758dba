"""A chat template is a program: where it fails or never ends, one line has file, row and the template's own words."""

import json
import signal
import threading
import time

import pytest

import chat
from abkd_fast.data import chat as templates
from abkd_fast.data import quickstart
from abkd_fast.data.chat import ChatTemplate
from abkd_fast.data.time_limit import time_limit
from abkd_fast.train import main
from bad_recipes import GOOD

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
FAULTS = {
    "raises": ("{{ raise_exception('no place for this') }}", "no place for this"),
    "unknown filter": ("{{ messages | nofilter }}", "No filter named 'nofilter' found."),
    "unknown test": ("{{ messages is notest }}", "No test named 'notest' found."),
    "broken": ("\n{% for %}", "line 3: Expected an expression, got 'end of statement block'"),
    "missing message": ("{{ messages[9].role.x }}", "list object has no element 9"),
    "missing key": ("{{ messages[0].nope.x }}", "'dict object' has no attribute 'nope'"),
    "no number": ("{{ messages + 1 }}", 'can only concatenate list (not "int") to list'),
    "division": ("{{ 1 / (messages | length - 2) }}", "division by zero"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it is nested too deeply"),
    "changes the row": ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe."),
    "other file": ("{% include 'x' %}", "no loader for this environment specified"),
    "large range": ("{{ range(10 ** 9) }}", "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
    "no text": ("{{ '\\ud800' }}", "'utf-8' codec can't encode character"),
    "endless": (ENDLESS, "it computes for more than 0.3 s: has it an endless loop?"),
}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Writes a recipe with two rows of messages and this template. Gives the arguments that train with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(templates, "SECONDS", 0.3)

    def write(template):
        question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
        rows = [{"messages": [question, answer]}, {"messages": [{"role": "system", "content": "x"}, question, answer]}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "template.jinja").write_text(template)
        data = {**GOOD["data"], "train": "rows.jsonl", "chat_template": "template.jinja"}
        (tmp_path / "recipe.json").write_text(json.dumps({**GOOD, "data": data}))
        return ["--config", "recipe.json", "--set", "train.batch_size=1"]

    return write


@pytest.mark.parametrize("fault", FAULTS)
def test_a_template_that_fails_at_a_row_names_file_row_and_its_own_words(recipe, capsys, fault):
    program, words = FAULTS[fault]
    template = f"{{% if messages[0].role == 'system' %}}\n{program}{{% endif %}}{chat.CHATML}"
    assert main(recipe(template)) == 2
    line = capsys.readouterr().err
    is_broken = fault == "broken"  # which is found before any row
    assert line.startswith(f"error: {'data.chat_template: template.jinja' if is_broken else 'rows.jsonl line 2'}: ")
    assert f"the chat template fails ({words}" in line
    assert line.count("\n") == 1


def test_a_template_that_never_ends_is_found_with_its_file(recipe, capsys):
    assert main(recipe(ENDLESS)) == 2
    assert capsys.readouterr().err.startswith("error: data.chat_template: template.jinja: the chat template can't")


def test_a_limit_counts_computing_alone_and_leaves_no_trace():
    heard = []
    before = signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
    try:
        with time_limit(0.2):
            time.sleep(0.5)  # another program may have the machine, or the user has stopped this one
        assert not heard
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # somebody else's timer goes on
        with time_limit(0.2):
            pass
        time.sleep(0.2)
        assert heard
    finally:
        signal.signal(signal.SIGALRM, before)


def loop_forever():
    while True:
        pass


def test_a_block_that_computes_is_ended_soon():
    started = time.thread_time()
    with pytest.raises(TimeoutError, match=r"^it computes for more than 0.2 s"), time_limit(0.2):
        loop_forever()
    assert time.thread_time() - started < 2
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_templates_are_rendered_in_other_threads_too():
    tokenizer, texts = quickstart.tokenizer(), []
    tokenizer.chat_template = chat.CHATML
    message = [{"role": "user", "content": "Hi"}]
    thread = threading.Thread(target=lambda: texts.append(ChatTemplate(tokenizer, None).render(message, True)))
    thread.start()
    thread.join()
    assert texts == ["<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]
