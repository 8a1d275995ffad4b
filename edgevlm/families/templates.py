"""Chat templates for models that carry none. Declarations only.

LLaVA's are after its `llava/conversation.py` and write what that code writes: system text, turns, and `<image>` where a
picture goes, each followed by a line break. SmolVLM's writes what the one in its repositories writes.
"""

from edgevlm.families.schema import Template

_SYSTEM_OR = (
    "{% if messages[0]['role'] == 'system' %}{% set system, turns = messages[0]['content'], messages[1:] %}"
    "{% else %}{% set turns = messages %}{% set system = '"
)
_SAY = (
    "' %}{% endif %}{% macro say(m) %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human\\'s questions."
)
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user\\'s questions."
)

LLAVA_LLAMA3 = Template(
    name="llama3",
    token="<|start_header_id|>",
    source=f"{_SYSTEM_OR}{_CURIOUS_USER}{_SAY}"
    "{{ '<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n' + system + '<|eot_id|>' }}"
    "{% for m in turns %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + say(m) + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
)
LLAVA_V1 = Template(
    name="v1",
    source=f"{_SYSTEM_OR}{_CURIOUS_HUMAN}{_SAY}"
    "{{ system + ' ' }}{% for m in turns %}{% if m['role'] == 'user' %}{{ 'USER: ' + say(m) + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + say(m) + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
)
LLAVA_V0 = Template(
    name="v0",
    source=f"{_SYSTEM_OR}{_CURIOUS_HUMAN}{_SAY}"
    "{{ system + '###' }}{% for m in turns %}"
    "{{ ('Human: ' if m['role'] == 'user' else 'Assistant: ') + say(m) + '###' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
)
SMOLVLM = Template(
    name="smolvlm",
    token="<end_of_utterance>",
    source="<|im_start|>{% for m in messages %}{{ m['role'] | capitalize + ':' }}{% if m['content'] is string %}"
    "{{ ' ' + m['content'] }}{% else %}{% if m['content'][0]['type'] != 'image' %}{{ ' ' }}{% endif %}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
)
