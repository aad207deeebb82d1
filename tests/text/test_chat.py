"""Prompts byte for byte as transformers makes them, and templates that mean harm."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from thermocline.errors import ChatTemplateError
from thermocline.text import chat
from thermocline.text.chat import ChatTemplate, render_chat
from thermocline.text.from_gguf import tokenizer_from_gguf

CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.content %}{{ message.content | trim }}{% endif %}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' ~ (call.function | tojson(indent=2)) ~ '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system_message = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system_message = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {% endif %}
    {% if loop.index0 == 0 and system_message != false %}
        {% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {% else %}
        {{ ' ' + content.strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}"""

LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(seen_system=false, count=0) %}
{%- if messages[0]['role'] == 'system' %}{% set system = messages[0]['content']|trim %}{% set messages = messages[1:] %}
{%- set ns.seen_system = true %}
{%- else %}{% set system = '' %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + (date_string if date_string is defined else strftime_now('%d %b %Y')) + "\\n\\n" }}
{{- system }}{{ "<|eot_id|>" }}
{%- for message in messages %}
    {%- set ns.count = ns.count + 1 %}
    {%- if message.content is not string %}{% continue %}{% endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- if ns.count > 20 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- macro text(m) %}
    {{- m["content"] if m["content"] is string else (m["content"] | map(attribute="text") | join) }}
{%- endmacro %}
{%- set turns = messages | rejectattr("role", "equalto", "system") | list %}
{%- set system = messages | selectattr("role", "equalto", "system") | map(attribute="content") | first %}
{{- bos_token }}
{%- for message in turns %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and loop.last %}
            {{- "[AVAILABLE_TOOLS] " }}{{ tools | tojson(sort_keys=True) }}[/AVAILABLE_TOOLS]
        {%- endif %}
        {%- if loop.last and system is defined %}
            {{- "[INST] " + system + "\\n\\n" + text(message) + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + text(message) + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {%- generation %}{{ " " + (message["content"] or "") + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "mistral": MISTRAL}

USER = {"role": "user", "content": "How deep is it?"}
ANSWER = {"role": "assistant", "content": "Ten metres."}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [{"role": "system", "content": "  Be <brief> & 'true'.\n"}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "\n 水は 👩‍👩‍👧‍👦 \t <|im_end|>[/INST]\u2028\x00 "}],
    "two turns": [USER, ANSWER, USER, ANSWER],
    "markup": [{"role": "user", "content": "{{ 7*7 }} {% for x in y %} {# no #} \\n </s> &amp;"}],
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "depth",
            "description": "<how> deep & 'why'; é",
            "parameters": {"type": "object", "b": 1.5},
        },
    }
]


def oracle(template: str, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, [])), bos_token="<s>", eos_token="</s>"
    )
    made: str = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
    return made


@pytest.fixture(scope="module", params=TEMPLATES.values(), ids=TEMPLATES.keys())
def template(request: pytest.FixtureRequest) -> Iterator[ChatTemplate]:
    with ChatTemplate(request.param, special_tokens={"bos_token": "<s>", "eos_token": "</s>"}) as made:
        yield made


@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS.keys())
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_equals_transformers(template: ChatTemplate, messages: Any, prompt: bool, tools: Any) -> None:
    made = template.render(messages, add_generation_prompt=prompt, tools=tools)
    assert made == oracle(template.source, messages, add_generation_prompt=prompt, tools=tools)


def test_tool_turns_equal_transformers() -> None:
    call = {"type": "function", "function": {"name": "depth", "arguments": {"lake": "Zürich", "n": [1, None, True]}}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"depth": 136}'},
    ]
    assert render_chat(CHATML, messages, tools=TOOLS) == oracle(
        CHATML, messages, tools=TOOLS, add_generation_prompt=True
    )


def test_options_equal_transformers() -> None:
    for options in ({"enable_thinking": False}, {"enable_thinking": True}, {}):
        made = render_chat(CHATML, [USER], **options)
        assert made == oracle(CHATML, [USER], add_generation_prompt=True, **options)
    made = render_chat(LLAMA3, [USER], bos_token="<s>", date_string="01 Feb 2026")
    assert made == oracle(LLAMA3, [USER], add_generation_prompt=True, date_string="01 Feb 2026")
    assert "01 Feb 2026" in made


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "a\nb"


def test_template_of_a_tokenizer(bpe_metadata: Callable[[str], dict[str, Any]]) -> None:
    metadata = bpe_metadata("qwen2") | {"tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}"}
    with ChatTemplate.of(tokenizer_from_gguf(metadata)) as template:
        assert template.render([USER]) == "|<|endoftext|>"
    with pytest.raises(
        ChatTemplateError, match="no chat template: it completes plain text only, without a system prompt"
    ):
        ChatTemplate.of(tokenizer_from_gguf(bpe_metadata("qwen2")))


BAD_MESSAGES: dict[str, tuple[Any, str]] = {
    "none": ([], "no messages"),
    "not an object": (["hello"], "message 0 is a str"),
    "no role": ([{"content": "x"}], "role is None; allowed: system"),
    "unknown role": ([USER, {"role": "root\x1b", "content": "x"}], r"message 1: role is 'root.*x1b"),
    "no content": ([{"role": "user"}], "content is missing"),
    "content is a number": ([{"role": "user", "content": 5}], "content is a int"),
    "content is an object": ([{"role": "user", "content": {}}], "content is a dict"),
    "part is an image": ([{"role": "user", "content": [{"type": "image_url"}]}], "'image_url'; this model reads only"),
    "part is a string": ([{"role": "user", "content": ["x"]}], "type a str"),
    "part has no text": ([{"role": "user", "content": [{"type": "text"}]}], "part of type 'text'"),
    "an object of Python": ([{"role": "user", "content": "x", "extra": object()}], "message 0 holds a object"),
    "a set": ([{"role": "user", "content": "x", "extra": {1}}], "holds a set"),
    "keys are numbers": ([{"role": "user", "content": "x", "extra": {1: 2}}], "holds a dict"),
}


@pytest.mark.parametrize("case", BAD_MESSAGES.values(), ids=BAD_MESSAGES.keys())
def test_bad_messages(case: Any) -> None:
    messages, words = case
    with pytest.raises(ChatTemplateError, match=words):
        ChatTemplate("x").render(messages)


def test_deep_message() -> None:
    deep: Any = "x"
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ChatTemplateError, match="nested deeper than 64"):
        ChatTemplate("x").render([{"role": "user", "content": "x", "extra": deep}])


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "bos_token", "messages2", "self", "return_tensors"])
def test_options_are_on_a_list(name: str) -> None:
    with pytest.raises((ChatTemplateError, TypeError), match=f"'{name}'"):
        ChatTemplate("x").render([USER], **{name: True})


def test_bad_tools() -> None:
    with pytest.raises(ChatTemplateError, match="tool 0 is a function"):
        ChatTemplate("x").render([USER], tools=[oracle])  # type: ignore[list-item]


def test_long_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_INPUT", 1000)
    with pytest.raises(ChatTemplateError, match="bytes as JSON; allowed: 1000"):
        ChatTemplate("x").render([{"role": "user", "content": "x" * 1000}])


def test_long_template_is_refused() -> None:
    with pytest.raises(ChatTemplateError, match=f"allowed: {chat.MAX_TEMPLATE}"):
        ChatTemplate("x" * (chat.MAX_TEMPLATE + 1))


HOSTILE = {
    "class of a string": ("{{ ''.__class__.__mro__ }}", "sandbox refuses"),
    "globals of a function": ("{{ raise_exception.__globals__['json'] }}", "sandbox refuses"),
    "format string": ("{{ '{0.__class__.__mro__}'.format(1).x.y }}", "sandbox refuses|undefined|no attribute"),
    "namespace of dunders": ("{% set ns = namespace(__class__=1) %}", "sandbox refuses"),
    "namespace item": ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "sandbox refuses"),
    "change of a list": ("{{ messages.append(1) }}", "sandbox refuses"),
    "long range": ("{{ range(10**9) | list }}", "Range too big"),
    "6000 nested ifs": ("{% if 1 %}" * 6000 + "{% endif %}" * 6000, "nested too deep|too complex"),
    "6000 parentheses": ("{{ " + "(" * 6000 + "1" + ")" * 6000 + " }}", "nested too deep|too complex"),
    "200 nested ifs": ("{% if 1 %}" * 200 + "{% endif %}" * 200, "too complex"),
    "25 nested loops": ("{% for x in [1] %}" * 25 + "{% endfor %}" * 25, "nested blocks"),
    "many nodes": ("{{ 1 }}" * 20_001, "too complex; allowed: 20000"),
    "output of 50 MB": ("{% for i in range(50000) %}{{ 'x' * 1000 }}{% endfor %}", "output is longer than"),
    "one string of 10 GB": ("{{ 'x' * 10**10 }}", "too much memory"),
    "doubling": (
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "too much memory|took longer",
    ),
    "wide format": ("{{ '%1000000000d' | format(3) }}", "too much memory|longer than"),
    "endless macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "syntax": ("{% if %}", "does not compile, line 1"),
    "unknown name": ("\n\n{{ nothing.at.all }}", "'nothing' is undefined"),
    "refusal": ("{{ raise_exception('only\x1b[31m one turn') }}", r"the template refuses: only\\x1b\[31m one turn"),
    "endless refusal": ("{{ raise_exception('a' * 10**6) }}", "the template refuses: a{400}"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_template(case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, words = case
    if "too complex" in words:  # is found in a second or two, by how fast the processor is
        monkeypatch.setattr("thermocline.text.chat.RENDER_SECONDS", 30)
    with pytest.raises(ChatTemplateError, match=words) as caught:
        render_chat(source, [USER])
    assert len(str(caught.value)) < 700


ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "one long operation": "{{ (messages | length + 5) ** 9999999 % 10 }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_endless_template_is_stopped(source: str) -> None:
    before = psutil.Process().memory_info().rss
    template = ChatTemplate("{% if messages|length > 1 %}" + source + "{% endif %}done")
    assert template.render([USER]) == "done"
    with pytest.raises(ChatTemplateError, match="took longer than 2 s and was stopped"):
        template.render([USER, ANSWER])
    assert template.render([USER]) == "done"  # in a new process
    template.close()
    assert psutil.Process().memory_info().rss - before < 64 << 20


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


def test_no_process_is_left_behind() -> None:
    before = children()
    template = ChatTemplate("x")
    template.render([USER])
    assert len(children() - before) == 1
    template.close()
    assert children() <= before
    template.render([USER])
    del template
    gc.collect()
    assert children() <= before
    with pytest.raises(ChatTemplateError):
        render_chat("{{ raise_exception('x') }}", [USER])
    assert children() <= before


def test_worker_ends_with_its_parent() -> None:
    script = (
        "import psutil, sys\nfrom thermocline.text.chat import ChatTemplate\nt = ChatTemplate('x')\n"
        "t.start()\nprint(psutil.Process().children()[0].pid, flush=True)\nimport os, signal\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=False, text=True)
    worker = int(done.stdout)
    for _ in range(100):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.02)
    pytest.fail("the rendering process outlived its parent")


def test_killed_worker_is_replaced() -> None:
    with ChatTemplate("{{ messages[0].content }}") as template:
        before = children()
        template.start()
        for pid in children() - before:
            psutil.Process(pid).kill()
        with pytest.raises(ChatTemplateError, match="process died"):
            template.render([USER])
        assert template.render([USER]) == USER["content"]


def test_worker_cannot_reach_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET", "hidden")
    with ChatTemplate("x") as template:
        before = children()
        template.start()
        (worker,) = (psutil.Process(pid) for pid in children() - before)
        assert "SECRET" not in worker.environ()
        assert worker.rlimit(psutil.RLIMIT_NOFILE) == (0, 0)
        assert worker.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert worker.rlimit(psutil.RLIMIT_AS)[1] == chat.MAX_MEMORY


def test_threads_share_a_template() -> None:
    results: list[bool] = []
    with ChatTemplate("{{ messages[0].content }}") as template:

        def work(word: str) -> None:
            results.extend(template.render([{"role": "user", "content": word}]) == word for _ in range(100))

        threads = [threading.Thread(target=work, args=(letter * 1000,)) for letter in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * 400


def test_everything_jinja_imports_late_is_there() -> None:
    source = "{{ 'a b' | wordwrap(1) }} {{ [2] | pprint }} {{ lipsum(n=1) != '' }} {{ [3] | random }} {{ '\\u00e9' }}"
    assert render_chat(source, [USER]) == "a\nb [2] True 3 é"


def test_long_chat() -> None:
    messages = [USER, ANSWER] * 500 + [{"role": "user", "content": "深" * 1_000_000}]
    assert render_chat(CHATML, messages) == oracle(CHATML, messages, add_generation_prompt=True)
