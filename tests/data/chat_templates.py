"""Chat templates of the kinds that people bring, after the published behavior of the models of these names."""

# Llama 2: a system text goes into the first question.
LLAMA2 = """{%- set head = "" %}
{%- set rest = messages %}
{%- if messages[0].role == "system" %}
    {%- set head = "<<SYS>>\n" + messages[0].content + "\n<</SYS>>\n\n" %}
    {%- set rest = messages[1:] %}
{%- endif %}
{%- for message in rest %}
    {%- if message.role != ("user", "assistant")[loop.index0 % 2] %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- if message.role == "user" %}
        {{- bos_token + "[INST] " + ((head if loop.first else "") + message.content).strip() + " [/INST]" }}
    {%- else %}
        {{- " " + message.content.strip() + " " + eos_token }}
    {%- endif %}
{%- endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- "<|start_header_id|>" + message.role + "<|end_header_id|>\n\n" + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" }}{% endif %}"""

# Qwen 2.5 and 3 share how they show tools, calls and results.
QWEN_SYSTEM = """{%- set system = messages[0].content if messages[0].role == "system" else DEFAULT %}
{%- if system or tools %}
    {{- "<|im_start|>system\n" + system }}
    {%- if tools %}{{ "\n\nTools:" }}{% for tool in tools %}{{ "\n" + tool | tojson }}{% endfor %}{% endif %}
    {{- "<|im_end|>\n" }}
{%- endif %}"""

QWEN_CALLS = """{%- for call in message.tool_calls or [] %}
            {{- "" if loop.first and not message.content else "\n" }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + "}\n</tool_call>" }}
        {%- endfor %}"""

QWEN_TOOL = """{%- if loop.first or messages[loop.index0 - 1].role != "tool" %}{{ "<|im_start|>user" }}{% endif %}
        {{- "\n<tool_response>\n" + message.content + "\n</tool_response>" }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}{{ "<|im_end|>\n" }}{% endif %}"""

QWEN25 = (
    QWEN_SYSTEM.replace("DEFAULT", '"You are a helpful assistant."')
    + """{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- "<|im_start|>assistant\n" + message.content }}
        """
    + QWEN_CALLS
    + """{{- "<|im_end|>\n" }}
    {%- elif message.role == "tool" %}
        """
    + QWEN_TOOL
    + """{%- elif message.role == "user" %}
        {{- "<|im_start|>user\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""
)

QWEN3 = (
    QWEN_SYSTEM.replace("DEFAULT", '""')
    + """{%- set state = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set state.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thoughts = message.reasoning_content or "" %}
        {%- if not thoughts and "</think>" in content %}
            {%- set thoughts = content.split("</think>")[0].split("<think>")[-1].strip("\n") %}
            {%- set content = content.split("</think>")[-1].lstrip("\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\n" }}
        {%- if loop.index0 > state.question and (loop.last or thoughts) %}
            {{- "<think>\n" + thoughts.strip("\n") + "\n</think>\n\n" + content.lstrip("\n") }}
        {%- else %}
            {{- content }}
        {%- endif %}
        """
    + QWEN_CALLS
    + """{{- "<|im_end|>\n" }}
    {%- elif message.role == "tool" %}
        """
    + QWEN_TOOL
    + """{%- elif message.role == "user" %}
        {{- "<|im_start|>user\n" + message.content + "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
    {%- if enable_thinking is false %}{{ "<think>\n\n</think>\n\n" }}{% endif %}
{%- endif %}"""
)

# R1: the generation prompt opens the thoughts, and those of earlier turns are taken away.
R1 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "system" %}{{ message.content }}
    {%- elif message.role == "user" %}{{ "<|User|>" + message.content }}
    {%- elif message.role == "assistant" %}{{ "<|Assistant|>" + message.content.split("</think>")[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|Assistant|><think>\n" }}{% endif %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == "system" %}{{ raise_exception("no place for a system message") }}{% endif %}
{%- for message in messages %}
    {%- if message.role != ("user", "assistant")[loop.index0 % 2] %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
    {%- set role = "model" if message.role == "assistant" else message.role %}
    {{- "<start_of_turn>" + role + "\n" + message.content | trim + "<end_of_turn>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<start_of_turn>model\n" }}{% endif %}"""

PHI3 = """{%- for message in messages %}{{ "<|" + message.role + "|>\n" + message.content + "<|end|>\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>\n" }}{% else %}{{ eos_token }}{% endif %}"""

# Mistral: tools stand before the last question. A system text is in the last message alone, and only if that is a
# question: once there is an answer, the text is gone.
MISTRAL = """{%- set system = messages[0].content + "\n\n" if messages[0].role == "system" else "" %}
{%- set rest = messages[1:] if system else messages %}
{{- bos_token }}
{%- set state = namespace(is_user=true, question=0) %}
{%- for message in rest %}
    {%- if message.role == "user" %}{% set state.question = loop.index0 %}{% endif %}
    {%- if message.role != "tool" and not message.tool_calls %}
        {%- if (message.role == "user") != state.is_user %}{{ raise_exception("roles must alternate") }}{% endif %}
        {%- set state.is_user = not state.is_user %}
    {%- endif %}
{%- endfor %}
{%- for message in rest %}
    {%- if message.role == "user" %}
        {%- if tools and loop.index0 == state.question %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + (system if loop.last else "") + message.content + "[/INST]" }}
    {%- elif message.tool_calls %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
            {{- ', "id": "' + call.id + '"}' + ("" if loop.last else ", ") }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message.role == "assistant" %}{{ " " + message.content | trim + eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content | tojson + "}[/TOOL_RESULTS]" }}
    {%- endif %}
{%- endfor %}"""

CHATML = """{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" + message.content + "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""

WITHOUT_PROMPT = CHATML[: CHATML.index("{%- if add")]

GENERATION_BLOCKS = """{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" }}
    {%- if message.role == "assistant" %}{% generation %}{{ message.content + "<|im_end|>" }}{% endgeneration %}
    {%- else %}{{ message.content + "<|im_end|>" }}
    {%- endif %}
    {{- "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}{% endif %}"""

COMMAND_R = """{{- bos_token }}
{%- for message in messages %}
    {%- set names = {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"} %}
    {{- "<|START_OF_TURN_TOKEN|><|" + names[message.role] + "_TOKEN|>" + message.content.strip() }}
    {{- "<|END_OF_TURN_TOKEN|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>" }}{% endif %}"""

TRIMS = """{%- for message in messages %}
    {{- "### " + message.role | capitalize + ":\n" + message.content | trim + "<|sep|>\n\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "### Assistant:\n" }}{% endif %}"""

BARE = """{%- for message in messages %}{{ message.role + ": " + message.content + "\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "assistant: " }}{% endif %}"""

ZEPHYR = """{%- for message in messages %}
    {{- "<|" + message.role + "|>\n" + message.content + eos_token + "\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>\n" }}{% endif %}"""
