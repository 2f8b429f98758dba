"""Conversations of the quickstart's tasks, and a tokenizer with a chat template of ChatML's kind."""

import copy
import itertools
import json

from abkd_fast.data import quickstart

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder):
    tokenizer = copy.deepcopy(quickstart.tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)


def write_conversations(path, count):
    """Rows of one to three turns."""
    tasks, lines = quickstart.rows("train"), []
    for number in range(count):
        messages = []
        for task in itertools.islice(tasks, 1 + number % 3):
            messages.append({"role": "user", "content": f"{task['instruction']} {task['input']}".strip()})
            messages.append({"role": "assistant", "content": task["output"]})
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))
    return str(path)
