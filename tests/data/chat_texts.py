"""Conversations, and the texts that must come of them with each chat template, written down without Jinja."""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable

import chat_templates as jinja
from transformers import AddedToken

from abkd_fast.data import quickstart

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "What the sky looks like in Köln, <b>today</b>.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def calls(*cities):
    functions = [{"name": "get_weather", "arguments": {"city": city}} for city in cities]
    return [{"type": "function", "id": f"call0000{n}", "function": function} for n, function in enumerate(functions)]


SYSTEM = {"role": "system", "content": "Answer in few words."}
QUESTION, ANSWER = user("What is 2 plus 3?"), assistant("It is 5.")
THOUGHTFUL = assistant("It is 5.", reasoning_content="Two and\nthree.")
AS_WRITTEN = assistant("<think>\nAgain.\n</think>\n\nStill 5.")
RESULTS = [{"role": "tool", "name": "get_weather", "content": text} for text in ('{"sky": "blue"}', "rain")]
CITIES = user("How is the weather in Köln and Lima?")
LAST = assistant("Blue, and rain.")
CONVERSATIONS = {
    "plain": [QUESTION, ANSWER],
    "system": [SYSTEM, QUESTION, ANSWER],
    "turns": [QUESTION, ANSWER, user("And 4 more?"), assistant("Then 9."), user("Thanks."), assistant("Welcome!")],
    "spaces": [user("  Two\n"), assistant(" \n  words here \n\n"), user("\nAgain "), assistant("\n\nthe end  ")],
    "reasoning": [QUESTION, THOUGHTFUL, user("Sure?"), AS_WRITTEN],
    "tools": [CITIES, assistant("", tool_calls=calls("Köln", "Lima")), *RESULTS, LAST],
    "agent": [CITIES, assistant("", reasoning_content="Ask.", tool_calls=calls("Lima")), RESULTS[1], LAST],
    "odd": [
        user("👩\u200d👧 שלום [INST] مرحبا </SYS>"),
        assistant("[/INST]\u202eنعم 👍🏽"),
        user("e\u0301?"),
        assistant("."),
    ],
}
WITH_TOOLS = ("tools", "agent")


@dataclasses.dataclass(frozen=True)
class Format:
    """A chat template, and what it does in Python: what the model is given, and what it has to write."""

    template: str
    special: str  # tokens, with spaces between them
    eos: str
    end: str  # the token that ends a turn
    history: Callable[[list[dict], list | None], str]  # the text before a turn of the assistant
    ask: str  # the generation prompt
    answer: Callable[[dict], str]
    refused: dict[str, str]  # conversations that the template can't train, or not as the data has them, and why
    last_refused: dict[str, str]  # the same where the last turn alone is trained
    bos: str | None = None
    kwargs: dict | None = None


def build(template, special, eos, end, history, ask, answer, refused=None, last_refused=None, **more):
    """A format without a place for thoughts and tools, unless it says another."""
    lost = dict.fromkeys(WITH_TOOLS, "loses a tool")
    refused = {**lost, "reasoning": "loses reasoning_content", **(refused or {})}
    last_refused = {**lost, **(last_refused or {})}
    return Format(template, special, eos, end, history, ask, answer, refused, last_refused, **more)


@functools.cache
def tokenizer_of(name):
    form = FORMATS[name]
    tokenizer = copy.deepcopy(quickstart.tokenizer())
    marks = [mark for mark in form.special.split() if mark.startswith(("<think", "</think", "<tool_", "</tool_"))]
    special = [token for token in form.special.split() if token not in marks]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    tokenizer.eos_token, tokenizer.bos_token = form.eos, form.bos
    tokenizer.chat_template = form.template
    return tokenizer


def pairs(name, conversation, train_on="all"):
    """The text before each trained turn, and the turn."""
    form, messages = FORMATS[name], CONVERSATIONS[conversation]
    tools = TOOLS if conversation in WITH_TOOLS else None
    places = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [
        (form.history(messages[:place], tools) + form.ask, form.answer(messages[place]))
        for place in (places if train_on == "all" else places[-1:])
    ]


def samples(name, conversation, train_on="all"):
    """The pairs of each sample: a turn goes on with a sample whose text its own prompt begins with."""
    result = []
    for prompt, trained in pairs(name, conversation, train_on):
        if result and prompt.startswith("".join(result[-1][-1])):
            result[-1].append((prompt, trained))
        else:
            result.append([(prompt, trained)])
    return result


def dump(value):
    return json.dumps(value, ensure_ascii=False)


def turns(begin="", change=str, **texts):
    """A history that is one text after the other, by role; `change` is what the template does to contents."""
    return lambda messages, tools: (
        begin + "".join(texts[message["role"]].replace("TEXT", change(message["content"])) for message in messages)
    )


def closed(end, change=str, before=""):
    return lambda message: before + change(message["content"]) + end


def chatml(role, text="TEXT"):
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


CHATML_ROLES = {role: chatml(role) for role in ("system", "user", "assistant")}
CHATML_SPECIAL = "<|endoftext|> <|im_start|> <|im_end|>"


def llama2(messages, tools):
    head = ""
    if messages[0]["role"] == "system":
        head, messages = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n", messages[1:]
    text = ""
    for message in messages:
        content = message["content"]
        text += (
            f"<s>[INST] {(head + content).strip()} [/INST]" if message["role"] == "user" else f" {content.strip()} </s>"
        )
        head = ""
    return text


LLAMA3_ROLES = {
    role: f"<|start_header_id|>{role}<|end_header_id|>\n\nTEXT<|eot_id|>" for role in ("system", "user", "assistant")
}

QWEN_SPECIAL = CHATML_SPECIAL + " <tool_call> </tool_call>"


def qwen_calls(message):
    called = [
        f'<tool_call>\n{{"name": "get_weather", "arguments": {dump(call["function"]["arguments"])}}}\n</tool_call>'
        for call in message.get("tool_calls", ())
    ]
    return "\n".join([message["content"]] * bool(message["content"]) + called)


def qwen_history(default, answer):
    """`answer` gives the text of an earlier turn; it is told whether a question of the user follows."""

    def history(messages, tools):
        system = messages[0]["content"] if messages[0]["role"] == "system" else default
        listed = "".join(["\n\nTools:", *("\n" + dump(tool) for tool in tools)]) if tools else ""
        text = f"<|im_start|>system\n{system}{listed}<|im_end|>\n" if system or tools else ""
        for place, message in enumerate(messages):
            later = messages[place + 1 :]
            if message["role"] == "user":
                text += chatml("user", message["content"])
            elif message["role"] == "assistant":
                text += chatml("assistant", answer(message, any(other["role"] == "user" for other in later)))
            elif message["role"] == "tool":
                text += "" if messages[place - 1]["role"] == "tool" else "<|im_start|>user"
                text += f"\n<tool_response>\n{message['content']}\n</tool_response>"
                text += "" if later and later[0]["role"] == "tool" else "<|im_end|>\n"
        return text

    return history


def qwen3_thinks(message):
    thoughts, content = message.get("reasoning_content", ""), message["content"]
    if content == AS_WRITTEN["content"]:
        thoughts, content = "Again.", "Still 5."
    return f"<think>\n{thoughts}\n</think>\n\n", qwen_calls({**message, "content": content.lstrip("\n")})


def qwen3_earlier(message, is_question_later):
    if message.get("reasoning_content") and not is_question_later:
        return "".join(qwen3_thinks(message))
    return qwen_calls(message)


def r1_answer(message):
    """Called for answers with thoughts alone."""
    if message is AS_WRITTEN:
        return "Again.\n</think>\n\nStill 5.<|end|>"
    return message["reasoning_content"] + "\n</think>\n\n" + message["content"] + "<|end|>"


MISTRAL_SPECIAL = (
    "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
)


def mistral_answer(message):
    if called := message.get("tool_calls"):
        return f"[TOOL_CALLS] {dump([{**call['function'], 'id': call['id']} for call in called])}</s>"
    return f" {message['content'].strip()}</s>"


def mistral(messages, tools):
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    text = "<s>"
    for place, message in enumerate(messages):
        if message["role"] == "user":
            text += f"[AVAILABLE_TOOLS] {dump(tools)}[/AVAILABLE_TOOLS]" if tools and place == last else ""
            text += f"[INST] {system if place == len(messages) - 1 else ''}{message['content']}[/INST]"
        elif message["role"] == "assistant":
            text += mistral_answer(message)
        elif message["role"] == "tool":
            text += f'[TOOL_RESULTS] {{"content": {dump(message["content"])}}}[/TOOL_RESULTS]'
    return text


COMMAND_R_ROLES = {
    role: f"<|START_OF_TURN_TOKEN|><|{name}_TOKEN|>TEXT<|END_OF_TURN_TOKEN|>"
    for role, name in (("system", "SYSTEM"), ("user", "USER"), ("assistant", "CHATBOT"))
}


ANOTHER_WAY = "renders the messages before an answer in another way"
NO_THOUGHTS = dict.fromkeys(("plain", "system", "turns", "spaces", "odd"), "opens <think>")
THINKS = {"reasoning": None, "agent": None, "tools": None}
FORMATS = {
    "llama2": build(
        jinja.LLAMA2,
        "<s> </s>",
        "</s>",
        "</s>",
        llama2,
        "",
        closed(" </s>", str.strip, " "),
        None,
        dict.fromkeys(WITH_TOOLS, "roles must alternate"),
        bos="<s>",
    ),
    "llama3": build(
        jinja.LLAMA3,
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        turns("<|begin_of_text|>", str.strip, **LLAMA3_ROLES),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        closed("<|eot_id|>", str.strip),
        bos="<|begin_of_text|>",
    ),
    "qwen2.5": build(
        jinja.QWEN25,
        QWEN_SPECIAL,
        "<|im_end|>",
        "<|im_end|>",
        qwen_history("You are a helpful assistant.", lambda message, _: qwen_calls(message)),
        "<|im_start|>assistant\n",
        lambda message: qwen_calls(message) + "<|im_end|>",
        {"tools": None, "agent": "loses reasoning_content"},
        {"tools": None, "agent": None},
    ),
    "qwen3": build(
        jinja.QWEN3,
        QWEN_SPECIAL + " <think> </think>",
        "<|im_end|>",
        "<|im_end|>",
        qwen_history("", qwen3_earlier),
        "<|im_start|>assistant\n",
        lambda message: "".join(qwen3_thinks(message)) + "<|im_end|>",
        THINKS,
        THINKS,
    ),
    "qwen3 that may not think": build(
        jinja.QWEN3,
        QWEN_SPECIAL + " <think> </think>",
        "<|im_end|>",
        "<|im_end|>",
        qwen_history("", qwen3_earlier),
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        lambda message: qwen3_thinks(message)[1] + "<|im_end|>",
        {"tools": None, "reasoning": ANOTHER_WAY, "agent": ANOTHER_WAY},
        {"tools": None, "reasoning": ANOTHER_WAY, "agent": None},
        kwargs={"enable_thinking": False},
    ),
    "qwen3 that has to think": build(  # the generation prompt opens the thoughts, and the answers keep them
        jinja.QWEN3.replace("enable_thinking is false", "true").replace("<think>\n\n</think>\n\n", "<think>\n"),
        QWEN_SPECIAL + " <think> </think>",
        "<|im_end|>",
        "<|im_end|>",
        qwen_history("", qwen3_earlier),
        "<|im_start|>assistant\n<think>\n",
        lambda message: "".join(qwen3_thinks(message)).removeprefix("<think>\n") + "<|im_end|>",
        THINKS,
        THINKS,
    ),
    "r1": build(
        jinja.R1,
        "<|begin|> <|end|> <|User|> <|Assistant|> <think> </think>",
        "<|end|>",
        "<|end|>",
        turns("<|begin|>", system="TEXT", user="<|User|>TEXT", assistant="<|Assistant|>TEXT<|end|>"),
        "<|Assistant|><think>\n",
        r1_answer,
        {**NO_THOUGHTS, "reasoning": None},
        NO_THOUGHTS,
        bos="<|begin|>",
    ),
    "gemma": build(
        jinja.GEMMA,
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        "<eos>",
        "<end_of_turn>",
        turns(
            "<bos>",
            str.strip,
            user="<start_of_turn>user\nTEXT<end_of_turn>\n",
            assistant="<start_of_turn>model\nTEXT<end_of_turn>\n",
        ),
        "<start_of_turn>model\n",
        closed("<end_of_turn>", str.strip),
        {"system": "no place for a system message"},
        {"system": "no place for a system message", "tools": "roles must alternate", "agent": "roles must alternate"},
        bos="<bos>",
    ),
    "phi3": build(
        jinja.PHI3,
        "<|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
        "<|endoftext|>",
        "<|end|>",
        turns(**{role: f"<|{role}|>\nTEXT<|end|>\n" for role in ("system", "user", "assistant")}),
        "<|assistant|>\n",
        closed("<|end|>"),
    ),
    "mistral": build(
        jinja.MISTRAL,
        MISTRAL_SPECIAL,
        "</s>",
        "</s>",
        mistral,
        "",
        mistral_answer,
        {"tools": None, "agent": "loses reasoning_content", "system": "loses a system message"},
        {"tools": None, "agent": None, "system": "loses a system message"},
        bos="<s>",
    ),
    "chatml": build(
        jinja.CHATML,
        CHATML_SPECIAL,
        "<|endoftext|>",
        "<|im_end|>",
        turns(**CHATML_ROLES),
        "<|im_start|>assistant\n",
        closed("<|im_end|>"),
    ),
    "command-r": build(
        jinja.COMMAND_R,
        "<BOS> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
        turns("<BOS>", str.strip, **COMMAND_R_ROLES),
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        closed("<|END_OF_TURN_TOKEN|>", str.strip),
        None,
        dict.fromkeys(WITH_TOOLS, "the chat template fails"),  # it has no name for the role
        bos="<BOS>",
    ),
    "trims": build(
        jinja.TRIMS,
        "<|endoftext|> <|sep|>",
        "<|endoftext|>",
        "<|sep|>",
        turns(
            "",
            str.strip,
            **{role: f"### {role.title()}:\nTEXT<|sep|>\n\n" for role in ("system", "user", "assistant")},
        ),
        "### Assistant:\n",
        closed("<|sep|>", str.strip),
    ),
    "no generation prompt": build(
        jinja.WITHOUT_PROMPT,
        CHATML_SPECIAL,
        "<|endoftext|>",
        "<|im_end|>",
        turns(**CHATML_ROLES),
        "",
        closed("<|im_end|>", before="<|im_start|>assistant\n"),
    ),
    "no end token": build(
        jinja.BARE,
        "",
        "<end>",
        "<end>",
        turns(**{role: f"{role}: TEXT\n" for role in ("system", "user", "assistant")}),
        "assistant: ",
        closed("<end>"),
    ),
    "zephyr": build(
        jinja.ZEPHYR,
        "</s>",
        "</s>",
        "</s>",
        turns(**{role: f"<|{role}|>\nTEXT</s>\n" for role in ("system", "user", "assistant")}),
        "<|assistant|>\n",
        closed("</s>"),
    ),
    "generation blocks": build(
        jinja.GENERATION_BLOCKS,
        CHATML_SPECIAL,
        "<|im_end|>",
        "<|im_end|>",
        turns(**CHATML_ROLES),
        "<|im_start|>assistant\n",
        closed("<|im_end|>"),
    ),
}
