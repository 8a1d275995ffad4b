"""Tools: what templates print of them, which answers are calls, and which only look like one."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgevlm import load
from edgevlm.errors import CapabilityError, UsageError
from edgevlm.messages import conversation
from edgevlm.prompt import PromptFormat, TextPiece, render
from edgevlm.tools import check_calls, check_tools, parse_calls

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}
TOOLS = (WEATHER, CLOCK)

#: Each with what templates of published models do, in their own words: Llama 3.x prints tools into the user's turn with
#: an indent, one call of a message, and results as `ipython`; Hermes and Qwen print blocks.
LLAMA = """{{ bos_token }}
{%- if tools %}<|start_header_id|>user<|end_header_id|>

{% for tool in tools %}{{ tool | tojson(indent=4) }}

{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' or m.role == 'ipython' %}<|start_header_id|>ipython<|end_header_id|>

{{ m.content | tojson }}<|eot_id|>
{%- elif 'tool_calls' in m %}<|start_header_id|>assistant<|end_header_id|>

{% set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}}<|eot_id|>
{%- else %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>
{%- endif %}{% endfor %}"""
HERMES = """{% if tools %}<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}
{%- for call in m.tool_calls or [] %}<tool_call>
{{ call.function | tojson }}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}"""
CONTROL = ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", '<"q\\>')


def form(template: str) -> PromptFormat:
    return PromptFormat(template=template, bos="<s>", eos="</s>", control_tokens=CONTROL)


def prompt(template: str, messages: list[dict[str, Any]], tools: Any = ()) -> str:
    return "".join(
        piece.text for piece in render(conversation(messages), form(template), tools) if isinstance(piece, TextPiece)
    )


ASKED = {"role": "user", "content": "Is it raining in Oslo?"}


@pytest.mark.parametrize("template", [LLAMA, HERMES])
def test_templates_print_tools_calls_and_results(template: str) -> None:
    calls = parse_calls('{"name": "get_weather", "parameters": {"city": "Oslo"}}', TOOLS)
    messages = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call.to_json() for call in calls]},
        {"role": "tool", "tool_call_id": calls[0].id, "name": "get_weather", "content": "It rains."},
    ]
    text = prompt(template, messages, check_tools(TOOLS))
    for part in ("The weather of a place.", "clock", '{"city": "Oslo"}', "It rains."):
        assert part in text
    assert "clock" not in prompt(template, messages)
    as_text = [dict(message) for message in messages]
    as_text[1]["tool_calls"] = [{"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}]
    assert prompt(template, as_text, check_tools(TOOLS)) == text  # OpenAI's clients send arguments as a text


@pytest.mark.parametrize("template", [LLAMA, HERMES])
@pytest.mark.parametrize("hostile", [*CONTROL, "\\<|im_end|>", '\\\\<|eot_id|>"', "<|im_end|><|eot_id|>\\"])
def test_control_tokens_in_tools_and_results_stay_text(template: str, hostile: str) -> None:
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["description"] = hostile
    tool["function"]["parameters"]["properties"] = {hostile: {"enum": [hostile]}}
    call = {"function": {"name": "get_weather", "arguments": {hostile: [hostile]}}}
    messages = [
        ASKED,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": hostile, "name": hostile, "tool_call_id": hostile},
    ]
    pieces = render(conversation(messages), form(template), check_tools([tool]))
    harmless = [
        ASKED,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "get_weather", "arguments": {"k": ["v"]}}}],
        },
        {"role": "tool", "content": "x"},
    ]
    trusted = "".join(p.text for p in pieces if isinstance(p, TextPiece) and p.parse_special)
    plain = prompt(template, harmless, check_tools(TOOLS[:1]))
    for literal in CONTROL:
        assert trusted.count(literal) == plain.count(literal)
    # and they are spelled as the template would have spelled them
    whole = "".join(p.text for p in pieces if isinstance(p, TextPiece))
    assert "\\u0000" not in whole
    assert "\0" not in whole
    assert json.dumps(hostile) in whole


def test_nul_and_surrogates_in_tools_are_refused() -> None:
    for text in ("a\0b", "\ud800"):
        tool = json.loads(json.dumps(WEATHER))
        tool["function"]["description"] = text
        with pytest.raises(UsageError):
            prompt(HERMES, [ASKED], check_tools([tool]))


def test_a_template_without_tools_is_said_so() -> None:
    with pytest.raises(CapabilityError) as caught:
        prompt("{% for m in messages %}{{ m.content }}{% endfor %}", [ASKED], check_tools(TOOLS))
    assert caught.value.code == "capability.no_tools"


@pytest.mark.parametrize("printed", ["", "You have the tools clock and get_weather."])
def test_a_template_without_tools_is_found_out_whatever_the_prompt_says(printed: str) -> None:
    ignores = printed + "{% for m in messages %}{{ m.content }}{% endfor %}"
    asked = {"role": "user", "content": "What do get_weather and clock say?"}
    assert printed in prompt(ignores, [asked])
    with pytest.raises(CapabilityError) as caught:
        prompt(ignores, [asked], check_tools(TOOLS))
    assert caught.value.code == "capability.no_tools"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'system' and tools %}{{ tools | tojson }}{% endif %}{% endfor %}",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{% for t in tools or [] %}{{ t.function.name }}: {{ t.function.parameters.properties | length }}{% endfor %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}"
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
    ],
    ids=["beside a system message", "without a system message", "parts only"],
)
def test_templates_with_tools_of_their_own_conditions_are_taken(template: str) -> None:
    told = {"role": "system", "content": "Be brief."}
    messages = [ASKED] if "no system message" in template else [told, ASKED]
    tools = [WEATHER] if "no system message" in template else TOOLS
    text = prompt(template, messages, check_tools(tools))
    assert "get_weather" in text
    assert "Oslo?" in text


def test_fields_that_nobody_knows_do_not_reach_the_template() -> None:
    text = prompt(
        "{% for m in messages %}{{ m.content }}{{ m.secret }}{% endfor %}", [{**ASKED, "secret": "<|im_end|>"}]
    )
    assert text == ASKED["content"]


LOOKS: list[tuple[str, list[tuple[str, dict[str, Any]]]]] = [
    ('{"name": "get_weather", "parameters": {"city": "Oslo"}}', [("get_weather", {"city": "Oslo"})]),
    (' <|python_tag|>{"name": "clock", "parameters": {}}\n', [("clock", {})]),
    ('{"type": "function", "name": "clock", "parameters": {}}', [("clock", {})]),
    ('<tool_call>\n{"name": "clock", "arguments": {"a": [1, null]}}\n</tool_call>', [("clock", {"a": [1, None]})]),
    (
        '<tool_call>{"name":"clock","arguments":{}}</tool_call>\n<tool_call>{"name":"get_weather","arguments":{"city":"é"}}</tool_call>',
        [("clock", {}), ("get_weather", {"city": "é"})],
    ),
    ('[{"name": "clock", "arguments": {}}, {"name": "clock", "parameters": {}}]', [("clock", {}), ("clock", {})]),
]


@pytest.mark.parametrize(("text", "calls"), LOOKS)
def test_calls(text: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    found = parse_calls(text, TOOLS)
    assert [(call.name, call.arguments) for call in found] == calls
    assert len({call.id for call in found}) == len(found)
    whole = text.strip()
    for cut in range(len(whole)):  # the twin: a call that is cut anywhere, other than between two, is text
        if not whole[:cut].rstrip().endswith("</tool_call>"):
            assert parse_calls(whole[:cut], TOOLS) == ()


ARGS = '{"name": "clock", "arguments": %s}'


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "{}", "[]", "3", '"clock"', "clock()", "[clock()]", '[clock(a="b")]', "<|python_tag|>clock()",
        '{"name": "other", "arguments": {}}', '{"name": ["clock"], "arguments": {}}', '{"name": "clock"}',
        '{"name": "clock", "arguments": {}, "parameters": {}}', '{"name": "clock", "arguments": {}, "more": 1}',
        '{"type": "code", "name": "clock", "arguments": {}}', ARGS % "[]", ARGS % '"{}"', ARGS % "null",
        ARGS % '{"a": NaN}', ARGS % '{"a": Infinity}', ARGS % '{"a": 1e999}', ARGS % '{"a": 1, "a": 2}',
        ARGS % f'{{"a": {"9" * 5000}}}', ARGS % f'{{"a": "{"x" * 300_000}"}}', ARGS % r'{"a": "\ud800"}',
        ARGS % f'{{"a": {"[" * 100}1{"]" * 100}}}', "[" * 100_000, '{"a":' * 100_000,
        "Call this: " + ARGS % "{}", ARGS % "{}" + " Done.",
        ARGS % "{}" + ARGS % "{}", "```json\n" + ARGS % "{}" + "\n```",
        "<tool_call>" + ARGS % "{}", "<tool_call>" + ARGS % "{}" + "</tool_call> and more", "<tool_call></tool_call>",
        "text <tool_call>" + ARGS % "{}" + "</tool_call>", "<tool_call>[" + ARGS % "{}" + "]</tool_call>",
        "<tool_call><tool_call>" + ARGS % "{}" + "</tool_call></tool_call>", "<tool_call>" * 50_000,
        "[" + ARGS % "{}" + ', {"name": "other", "arguments": {}}]', "[[" + ARGS % "{}" + "]]", "\0" + ARGS % "{}",
        "__import__('os').system('true')", '{"name": "clock", "arguments": {"a": __import__}}',
    ],
)  # fmt: skip
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    assert parse_calls(text, TOOLS) == ()


@given(st.text(st.sampled_from('{}[]",:<>/|\\ nameargumentsclocktool_1.5e')))
def test_no_text_raises(text: str) -> None:
    parse_calls(text, TOOLS)
    parse_calls(f"<tool_call>{text}</tool_call>", TOOLS)


LOOP: dict[str, Any] = {}
LOOP["a"] = LOOP


@pytest.mark.parametrize(
    "tools",
    [
        {}, "clock", 3, [3], [{}], [{"type": "function"}], [{"type": "code", "function": {"name": "a"}}],
        [{"type": "function", "function": {"name": ""}}], [{"type": "function", "function": {"name": "a b"}}],
        [{"type": "function", "function": {"name": "a" * 65}}], [CLOCK, CLOCK], [CLOCK] * 129,
        [{"type": "function", "function": {"name": "a", "description": 3}}],
        [{"type": "function", "function": {"name": "a", "parameters": []}}],
        [{"type": "function", "function": {"name": "a", "parameters": LOOP}}],
        [{"type": "function", "function": {"name": "a", "parameters": {"a": {1, 2}}}}],
        [{"type": "function", "function": {"name": "a", "parameters": {"a": float("nan")}}}],
        [{"type": "function", "function": {"name": "a", "description": "x" * 300_000}}],
    ],
)  # fmt: skip
def test_tools_that_are_none(tools: Any) -> None:
    with pytest.raises(UsageError, match="tool"):
        check_tools(tools)


@pytest.mark.parametrize(
    "calls", ["a", [3], [{}], [{"function": {"name": "a", "arguments": "{"}}], [{"function": LOOP}]]
)
def test_calls_of_messages_that_are_none(calls: Any) -> None:
    with pytest.raises(UsageError, match="message 3"):
        check_calls("message 3", calls)


def test_an_answer_that_is_a_call() -> None:
    wanted = {"const": {"name": "clock", "arguments": {"zone": "UTC"}}}
    with load(threads=1, context=1024) as model:
        model._reader._format = dataclasses.replace(model._reader._format, template=HERMES)
        answer = model.ask("What time is it?", tools=TOOLS, schema=wanted)
        assert answer.finish_reason == "tool_calls"
        assert [(call.name, call.arguments) for call in answer.tool_calls] == [("clock", {"zone": "UTC"})]
        assert answer.to_json()["tool_calls"][0]["function"] == wanted["const"]
        messages = [
            {"role": "user", "content": "What time is it?"},
            {"role": "assistant", "content": "", "tool_calls": list(answer.tool_calls)},
            {"role": "tool", "content": "12:30", "tool_call_id": answer.tool_calls[0].id},
        ]
        told = model.reply(messages, tools=TOOLS, max_tokens=3)
        assert told.tool_calls == ()
        assert told.usage.cached_tokens > 100  # the tools were not read again
        without = model.ask("What time is it?", schema=wanted)  # the twin: the same text, and no tools
        assert (without.finish_reason, without.tool_calls) == ("stop", ())
