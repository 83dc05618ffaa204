#!/usr/bin/env python3
"""Writes cases.json: chat templates, conversations, and what `transformers` (with jinja2) renders.

    pip install transformers jinja2 && python3 generate.py

The templates are written for this file. The first group has the formats and idioms of well-known model families, the second
one construct each, the third random white space control. An expected text of null means that
rendering must fail. strftime_now, which the interpreter leaves undefined on purpose, is taken away.
"""

import json
import pathlib
import random

from transformers.utils.chat_template_utils import _compile_jinja_template

FAMILIES = {
    "chatml": """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "default-system": """{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
Be useful.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "inst": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'] %}{% else %}{% set rest = messages %}{% set sys = false %}{% endif %}{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if loop.index0 == 0 and sys != false %}{% set content = '<<SYS>>\\n' + sys + '\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}""",
    "inst-spread": """{%- if messages[0]["role"] == "system" %}
    {%- set sys = messages[0]["content"] %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set asked = rest | selectattr("role", "equalto", "user") | list %}

{#- Turns must alternate. #}
{%- set ns = namespace() %}
{%- set ns.turn = 0 %}
{%- for m in rest %}
    {%- if not (m.role == "tool" or (m.tool_calls is defined and m.tool_calls is not none)) %}
        {%- if (m["role"] == "user") != (ns.turn % 2 == 0) %}
            {{- raise_exception("Roles must alternate") }}
        {%- endif %}
        {%- set ns.turn = ns.turn + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for m in rest %}
    {%- if m["role"] == "user" %}
        {%- if tools is not none and (m == asked[-1]) %}
            {%- for tool in tools %}
                {%- for key, val in tool.items() if key != "return" %}
                    {{- '"' + key + '": ' + val|tojson }}
                {%- endfor %}
            {%- endfor %}
        {%- endif %}
        {%- if loop.last and sys is defined %}
            {{- "[INST] " + sys + "\\n\\n" + m["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + m["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif m["role"] == "assistant" %}
        {{- " " + m["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant") }}
    {%- endif %}
{%- endfor %}
""",
    "headers": """{% set turns = messages %}{% for m in turns %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>

'+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>

' }}{% endif %}""",
    "headers-dated": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message, so that it can be put where it belongs. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set sys = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set sys = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
    {%- endfor %}
{%- endif %}
{{- "Today: " + date_string + "\\n\\n" }}
{{- sys }}
{{- "<|eot_id|>" }}
{%- for m in messages %}
    {%- if not (m.role == 'ipython' or m.role == 'tool' or 'tool_calls' in m) %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'+ m['content'] | trim + '<|eot_id|>' }}
    {%- elif m.role == "tool" or m.role == "ipython" %}
        {%- if m.content is mapping or m.content is iterable %}
            {{- m.content | tojson }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "tools-unused": """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n{\\"name\\": <name>}<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nBe useful.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}
                {%- set call = call.function %}
            {%- endif %}
            {{- call.arguments | tojson }}
        {%- endfor %}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "thinking": """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not(message.content.startswith('<r>') and message.content.endswith('</r>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is defined and message.reasoning_content is not none %}
            {%- set thought = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in message.content %}
                {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
                {%- set thought = message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    "bars": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{% generation %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
""",
    "turns": """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<start_of_turn>user
{{ message['content'] | trim }}<end_of_turn>
{% elif message['role'] == 'assistant' %}<start_of_turn>model
{{ message['content'] | trim }}<end_of_turn>
{% else %}{{ raise_exception('no system') }}{% endif %}{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}""",
    "user-colon": """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0]['content'].strip() + ' ' %}{% else %}{% set rest = messages %}{% set sys = '' %}{% endif %}{{ bos_token + sys }}{% for m in rest %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'].strip() + '
' }}{% elif m['role'] == 'assistant' %}{{ 'ASSISTANT: ' + m['content'].strip() + eos_token + '
' }}{% endif %}{% if loop.last and m['role'] == 'user' and add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}{% endfor %}""",
    "collected": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_tool=false, system_prompt='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {% set ns.system_prompt = message['content'] %}
    {%- endif %}
{%- endfor %}
{{bos_token}}{{ns.system_prompt}}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- set ns.is_tool = false -%}
        {{'<｜User｜>' + message['content']}}
    {%- endif %}
    {%- if message['role'] == 'assistant' and message['content'] is not none %}
        {% set content = message['content'] %}
        {{'<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>'}}
    {%- endif %}
{%- endfor -%}
{% if ns.is_tool %}{{'x'}}{% endif %}
{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜><think>\\n'}}{% endif %}""",
    "titled": """{% for message in messages %}
    {% if loop.index0 == 0 %}
        {% set content = 'S: ' + message['content'] %}
    {% else %}
        {% set content = message['content'] %}
    {% endif %}
    {{ (message['role'] | title) + ': ' + content + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{ 'Assistant:' }}
{% endif %}
""",
}

CONSTRUCTS = [
    "{{ 1 + 2 * 3 - 4 }} {{ -7 // 2 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 'a' * 3 }} {{ 'a' ~ 1 ~ none ~ true }} {{ 2 - -1 }}",
    "{{ 'a' 'b' \"c\" }} {{ 'q\\'\\x41\\u00e9\\U0001F600\\t|\\q\\\\' }} {{ \"it's\" }}",
    "{{ true }} {{ False }} {{ none }} {{ nothing }}|{{ nothing.x if false else 'safe' }} {{ 12 }}", "{{ x is defined if true }}", "{{ 1 is odd is true }}",
    "{{ nothing.x }}", "{{ nothing + 'a' }}", "{{ nothing['x'] }}", "{{ 'a' + 1 }}", "{{ 1 < 'a' }}", "{{ -'a' }}", "{{ 1 // 0 }}", "{{ nothing() }}",
    "{{ 'a' < 'b' <= 'b' }} {{ 1 < 2 > 3 }} {{ 1 == true }} {{ 'a' == 1 }} {{ none == false }} {{ 3 != 3 }} {{ nothing == 'x' }} {{ nothing != 'x' }}",
    "{{ 'b' in 'abc' }} {{ 'b' not in ['a'] }} {{ 'role' in messages[0] }} {{ 'x' in messages[0] }} {{ 1 in nothing }} {{ not 'a' in 'b' }}",
    "{{ 'a' and '' }}|{{ '' or 'b' }}|{{ not '' }} {{ not none and true }} {{ 0 or none }} {{ 'x' if '' else 'y' }} {{ 'x' if '' }}| {{ 'a' if 1 else 'b' if 2 else 'c' }}",
    "{{ messages[0] is mapping }} {{ messages is iterable }} {{ messages is sequence }} {{ 'a' is string }} {{ 1 is number }} {{ 1 is integer }} {{ true is integer }} {{ true is boolean }} {{ none is none }} {{ x is none }} {{ x is undefined }} {{ x is not defined }} {{ 3 is odd }} {{ 4 is even }} {{ 3 is eq 3 }} {{ 3 is equalto(4) }} {{ 'a' is in ['a'] }} {{ true is true }} {{ 1 is true }} {{ false is false }}",
    "{{ not x is defined }} {{ x is defined and y }} {{ x is not defined or y }} {{ messages|length is eq 1 }} {{ messages|length > 1 }} {{ 'ab'|length + 1 }}",
    "{{ messages[0].content[1:3] }}|{{ 'héllo'[::-1] }}|{{ 'abc'[-2:] }}|{{ 'abc'[5:] }}|{{ 'abc'[:-1] }}|{{ 'abc'[-1] }}|{{ 'abc'[9] }}|{{ [1,2,3][::2]|join(',') }}|{{ [1,2,3][-1] }}|{{ [1,2,3][7] }}|{{ 'abcdef'[4:1:-2] }}|{{ 'abc'[:] }}",
    "{{ '  a b  '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'xya'.lstrip('yx') }}|{{ ' a '.rstrip() }}|{{ '\\u3000a\\u00a0\\x1c'.strip() }}|{{ ' a '|trim }}|{{ 'xax'|trim('x') }}|{{ none|trim }}|{{ 3|trim }}|{{ x|trim }}|{{ ''.strip('') }}",
    "{{ 'a,b,,c'.split(',')|join('-') }} {{ ' a  b\\tc '.split()|join('-') }} {{ 'a,b,c'.split(',', 1)|join('-') }}", "{{ 'abc'.split('')|join }}", "{{ 'a-b'.split('-')[0] }} {{ 'a-b'.split('-')|last }} {{ 'a-b'.split('-')|first }} {{ ''.split(',')|length }} {{ ''.split()|length }}",
    "{{ 'aXbX'.replace('X', '--') }} {{ 'aXbX'|replace('X', '') }} {{ 'ab'.replace('', '.') }} {{ 'héé'.replace('é', 'e') }}",
    "{{ 'Hello wORLD it\\'s'.upper() }} {{ 'HeLLo'|lower }} {{ 'hello wORLD-x'|title }} {{ 'hELLO w'|capitalize }} {{ 'ab'.title() }} {{ 'aB'.lower() }} {{ 'ab'.capitalize() }}",
    "{{ 'abc'.startswith('ab') }} {{ 'abc'.endswith('b') }} {{ ', '.join(['a', 'b']) }} {{ ['a', 1, true]|join(' ') }} {{ 'abc'|join('.') }}",
    "{{ x|default('d') }} {{ ''|default('d') }}| {{ ''|default('d', true) }} {{ none|d('e') }} {{ none|default('e', boolean=true) }} {{ x|default }}|",
    "{{ messages[0].get('role') }} {{ messages[0].get('x') }} {{ messages[0].get('x', 'y') }} {% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for k in messages[0] %}{{ k }},{% endfor %}{% for k, v in messages[0]|items %}{{ k }}{{ loop.index }}{% endfor %}",
    "{% for x in [1, 2, 3] %}{{ loop.index }}/{{ loop.length }}:{{ loop.revindex }}:{{ loop.revindex0 }}:{{ loop.first }}:{{ loop.last }}:{{ loop.previtem }}:{{ loop.nextitem }} {% endfor %}",
    "{% for x in [1, 2, 3, 4] if x is even %}{{ loop.index0 }}{{ x }}{% else %}none{% endfor %}{% for x in [] %}{{ x }}{% else %}none{% endfor %}{% for x in nothing %}{{ x }}{% else %}nothing{% endfor %}",
    "{% for a, b in [[1, 2], ['x', 'y']] %}{{ a }}{{ b }}{% endfor %}", "{% for a, b in [[1], [2]] %}{{ a }}{% endfor %}", "{% for c in 'héy' %}{{ c }}.{% endfor %}", "{% for c in 5 %}{% endfor %}",
    "{% for x in range(3) %}{{ x }}{% endfor %}{% for x in range(5, 1, -2) %}{{ x }}{% endfor %}{% for x in range(2, 4) %}{{ x }}{% endfor %}",
    "{% for x in range(6) %}{% if x == 1 %}{% continue %}{% endif %}{% if x == 4 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% set x = 1 %}{% for y in [1, 2] %}{{ x }}{% set x = y + 5 %}{{ x }}{% endfor %}{{ x }}{% if true %}{% set x = 9 %}{% endif %}{{ x }}",
    "{% set ns = namespace(a=1, b='x') %}{% for y in [1, 2] %}{% set ns.a = ns.a + y %}{% endfor %}{{ ns.a }}{{ ns.b }}{{ ns.c }}{{ ns['a'] }}", "{% set x = 'a' %}{% set x.y = 1 %}",
    "{% for x in [1, 2] %}{% for y in ['a', 'b'] %}{{ loop.index }}{{ x }}{{ y }}{% endfor %}{{ loop.index }}{% endfor %}",
    "{% set t %}a {{ 1 + 1 }}\n b{% endset %}[{{ t }}]{{ t|length }}", "{% set d = {'a': 1, 'b': {'c': [1, 2]}} %}{{ d.a }}{{ d['b'].c[1] }}{{ d.b.x }}{{ d|length }}{{ 'a' in d }}", "{{ {'a': 1}.a }} {{ [1, 2].0 }} {{ ['x'][0] }} {{ ('y') }} {{ (1 + 2) * 3 }}",
    "{% if x %}1{% elif messages|length == 1 %}2{% elif true %}3{% else %}4{% endif %}{% if not messages %}5{% endif %}",
    "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ messages|rejectattr('role', 'eq', 'user')|list|length }}{{ messages|selectattr('nope')|list|length }}{{ messages|selectattr('role', 'in', ['user'])|list|length }}",
    "{{ messages == messages }} {{ messages[0] == messages[-1] }} {{ [1, 'a'] == [1, 'a'] }} {{ {'a': 1} == {'a': 1} }} {{ ([1] + [2])|join }} {{ [] == '' }}",
    "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}",
    "{{ raise_exception('no') }}", "{{ 'a'|string + 1|string }}{{ true|string }}{{ 'ab'|list|join('.') }}{{ 'ab'|count }}", "{{ none|length }}", "{{ '%}' }}{{ '}}' }}{# {{ no }} #}{{ \"{{\" }}", "a{#- x -#} b {#+ y +#} c", "{{- '\\r\\n' -}} x\r\ny\rz\n",
    "{% if true %}\n  x\n{% endif %}\n\n", "a\n\n", "\n", "  {% if true %} x {% endif %}  \n  y", "  {{ 'x' }}  \n{{ 'y' }}\n", "{% if true -%}\n   x\n   {%- endif +%}\n y", "  {%+ if true %}x{% endif %}", "a { b } {x} %} }} #} {", "{%set x=1%}{{x}}", "{{ x", "{% if %}", "{% endif %}", "{% if true %}", "{% for x in %}{% endfor %}", "{{ }}", "{{ 1 2 }}", "{{ 'a }}", "{% set 1 = 2 %}", "{# never", "{% break %}", "{{ [1, }}", "{{ a.}}", "{{ !x }}", "{{ x | }}", "{{ (1 }}",
]

CONVERSATIONS = [[{"role": role, "content": content} for role, content in turns] for turns in [
    [("user", "Hello")], [("system", " You are terse.\n"), ("user", "  Hi there \n\n")], [("user", "Q1 é 日本"), ("assistant", " A1 "), ("user", "Q2")],
    [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "<think>\nhm\n</think>\n\nd")], [("user", "a"), ("user", "b")], [("assistant", "x")], [("user", "")],
    [("user", "{{ x }} {% raw %} \r\n </s>")],
]]


def random_template(rng):
    """Text, output, comments and balanced blocks with random white space around and in the tags."""
    space = lambda: "".join(rng.choice([" ", " ", "\n", "\n", "\t", "\r\n", ""]) for _ in range(rng.randint(0, 4)))
    begin = lambda: rng.choice(["{%", "{%", "{%-", "{%+"])
    end = lambda: rng.choice(["%}", "%}", "-%}", "+%}"])
    def block(depth):
        out = ""
        for _ in range(rng.randint(1, 4)):
            kind = rng.randint(0, 6 if depth < 3 else 3)
            out += space()
            if kind <= 1:
                out += rng.choice(["text", "x", "<|a|>", "{ }"])
            elif kind == 2:
                out += rng.choice(["{{", "{{-"]) + " v " + rng.choice(["}}", "-}}"])
            elif kind == 3:
                out += rng.choice(["{#", "{#-", "{#+"]) + " note " + rng.choice(["#}", "-#}", "+#}"])
            elif kind == 4:
                out += f"{begin()} if v {end()}{block(depth + 1)}{begin()} else {end()}{block(depth + 1)}{begin()} endif {end()}"
            elif kind == 5:
                out += f"{begin()} for i in [1, 2] {end()}{block(depth + 1)}{begin()} endfor {end()}"
            else:
                out += f"{begin()} set v = 'w' {end()}"
            out += space()
        return out
    return "{% set v = 'V' %}" + block(0)


def render(template, messages, add_generation_prompt):
    try:
        compiled = _compile_jinja_template(template)
        compiled.environment.globals.pop("strftime_now", None)
        compiled = compiled.environment.from_string(template)
        return compiled.render(messages=messages, tools=None, documents=None,
                               add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>")
    except Exception:
        return None


def main():
    rng = random.Random(4)
    cases = []
    for name, template in FAMILIES.items():
        for i, _ in enumerate(CONVERSATIONS):
            for prompt in (False, True):
                cases.append((name, template, i, prompt))
    cases += [(f"construct-{i}", template, 0, True) for i, template in enumerate(CONSTRUCTS)]
    cases += [(f"space-{i}", random_template(rng), 0, False) for i in range(250)]
    templates = {}
    for name, template, i, prompt in cases:
        entry = templates.setdefault(name, {"template": template, "cases": []})
        entry["cases"].append([i, prompt, render(template, CONVERSATIONS[i], prompt)])
    path = pathlib.Path(__file__).resolve().parent / "cases.json"
    path.write_text(json.dumps({"conversations": CONVERSATIONS, "templates": templates}, indent=0) + "\n")


if __name__ == "__main__":
    main()
