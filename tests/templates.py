"""What chat templates in use are made of, one construct each, and what they are rendered with.

    python tests/templates.py

writes tests/golden/templates.json: what transformers renders of each, null where it refuses.
"""

import json
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "golden" / "templates.json"

MESSAGES = [
    {"role": "system", "content": "  Be kind.\n", "tools": '[{"name": "look"}]'},
    {"role": "user", "content": "Grüße, <b>\"you\"</b> & 'me' 🙂", "name": "Ann"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nSo: 4",
        "reasoning_content": "hm",
        "tool_calls": [
            {"type": "function", "id": "c1", "function": {"name": "add", "arguments": {"a": 2, "b": [1.5, None, True]}}}
        ],
    },
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "image"}, {"type": "text", "text": "5?"}]},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds é < ü",
            "parameters": {
                "type": "object",
                "properties": {"b": {"type": "number", "default": 1e-7}, "a": {"type": ["integer", "null"]}},
                "required": ["a"],
            },
        },
    }
]
VARIABLES = {
    "messages": MESSAGES,
    "tools": TOOLS,
    "documents": None,
    "add_generation_prompt": True,
    "bos_token": "<s>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "image_token": "<|image|>",
}

CONSTRUCTS = [
    # Names and what is absent
    "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ image_token }}{{ sep_token }}",
    "{{ documents is none }}{{ documents is defined }}{{ custom_tools is defined }}{{ tools is not none }}",
    "{% if not custom_tools is defined %}{% set custom_tools = none %}{% endif %}{{ custom_tools }}",
    "{% if enable_thinking is defined and enable_thinking is false %}a{% else %}b{% endif %}",
    "{{ nothing }}|{{ nothing is defined }}|{{ messages[0].nothing }}|{{ messages[0]['nothing'] is undefined }}",
    "{{ nothing.deeper }}",
    "{{ messages[9] }}|{{ messages[9] is defined }}",
    "{{ messages[0].get('nothing', 'd') }}{{ messages[0].get('nothing') }}",
    "{{ date_string | default('26 Jul 2024') }}{{ bos_token | d('x') }}{{ '' | default('e', true) }}",
    "{{ strftime_now('%Y') | length }}{{ strftime_now is defined }}",
    # Loops
    "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }} {% endfor %}",
    "{% for m in messages %}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem.role if loop.previtem is defined }}>{{ (loop.nextitem or {}).role }} {% endfor %}",
    "{% for m in messages %}{{ loop.cycle('a', 'b', 'c') }}{{ loop.changed(m.role) }}{{ loop.depth }}{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}/{{ loop.length }} {% else %}none{% endfor %}",
    "{% for m in messages if m.role == 'x' %}{{ m }}{% else %}none{% endfor %}",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% elif loop.index == 4 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for i in range(3) %}{% for j in range(i) %}{{ i }}{{ j }}{{ loop.last }} {% endfor %}{% endfor %}",
    "{% for key, value in messages[1].items() %}{{ key }}={{ value }};{% endfor %}",
    "{% for key in messages[1] %}{{ key }};{% endfor %}{% for c in 'abc' %}{{ c }}.{% endfor %}",
    "{% for key, value in messages[1] | dictsort %}{{ key }}={{ value }};{% endfor %}",
    "{% for m in messages | reverse %}{{ m.role }} {% endfor %}{% for m in messages[::-1] %}{{ m.role }} {% endfor %}",
    "{% for a, b in [(1, 2), (3, 4)] %}{{ a + b }} {% endfor %}{% for x in nothing %}x{% endfor %}",
    "{% for x in none %}{% endfor %}",
    "{% for x in [[1, [2]], 3] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}@{{ loop.depth }}{% endif %}{% endfor %}",
    "{% for i in range(10, 0, -3) %}{{ i }} {% endfor %}{{ range(4) | list }}{{ range(4)[2] }}",
    # Setting, namespaces, scopes
    "{% set x = 1 %}{% for m in messages %}{% set x = x + 1 %}{% endfor %}{{ x }}",
    "{% set ns = namespace(found=false, n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.found }}{{ ns.no }}",
    "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns['b'] }}{{ ns }}",
    "{% set ns = namespace(_x=1) %}",
    "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "{% set ns = namespace(self=3) %}{{ ns.self }}",
    "{% set a, b = 'x', 'y' %}{{ b }}{{ a }}{% set c = (1, 2) %}{{ c }}",
    "{% set text %}one {{ messages[0].role }}{% endset %}[{{ text }}]{{ text | length }}",
    "{% set text | upper %}one{% endset %}{{ text }}",
    "{% with a = 1, b = 2 %}{{ a }}{{ b }}{% endwith %}{{ a }}",
    "{% if true %}{% set y = 5 %}{% endif %}{{ y }}",
    "{% set loop_messages = messages[1:] %}{{ loop_messages | length }}{{ loop_messages[0].role }}{{ loop_messages[-1].role }}",
    "{{ messages[1:4:2] | length }}{{ 'abcdef'[1:-1] }}{{ 'abcdef'[::-1] }}{{ (1, 2, 3)[:2] }}",
    # Macros, calls, blocks
    "{% macro turn(role, text='none') %}<{{ role }}>{{ text }}{% endmacro %}{{ turn('a') }}{{ turn('b', text='c') }}{{ turn(text=1, role=2) }}",
    "{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 'x', a=3) }}",
    "{% macro m(x) %}[{{ caller(x) }}]{% endmacro %}{% call(y) m(3) %}{{ y + 1 }}{% endcall %}",
    "{% macro m(n) %}{{ n }}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(3) }}{{ m.name }}{{ m.arguments }}",
    "{% macro m(x) %}{{ x }}{% endmacro %}{{ m() }}{{ m(1, 2) }}",
    "{%- macro m(x) -%}  {{ x }}  {%- endmacro -%}  {{ m('a') ~ m('b') }}  ",
    "{% block b %}in {{ bos_token }}{% endblock %}{{ self.b() }}",
    "{% filter upper %}abc {{ messages[0].role }}{% endfilter %}",
    "{% generation %}{{ messages[2].content }}{% endgeneration %}|",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{% for m in messages %}{%- generation -%}  {{ loop.index }}{{ m.role }}  {%- endgeneration -%}{% endfor %}",
    "{% macro m(x) %}{% generation %}{{ x }}{% endgeneration %}{% endmacro %}{{ m('a') | upper }}",
    # Tests and conditions
    "{% for m in messages %}{{ m.content is string }}{{ m.content is iterable }}{{ m.content is sequence }}{{ m is mapping }} {% endfor %}",
    "{{ 1 is number }}{{ 1.0 is float }}{{ 1 is integer }}{{ true is boolean }}{{ true is true }}{{ none is none }}{{ bos_token is callable }}",
    "{{ 3 is odd }}{{ 4 is even }}{{ 9 is divisibleby 3 }}{{ 1 is in [1, 2] }}{{ 1 is eq 1 }}{{ 2 is gt 1 }}{{ 1 is sameas 1 }}",
    "{{ 'a' in 'abc' }}{{ 'x' not in ['x'] }}{{ 'tools' in messages[0] }}{{ 'tools' in messages[1] }}{{ 1 < 2 < 3 }}{{ 1 < 3 > 5 }}",
    "{{ 'a' == 'a' }}{{ 1 == 1.0 }}{{ [1] == [1] }}{{ {'a': 1} == {'a': 1} }}{{ 'b' > 'a' }}{{ 1 != 2 }}{{ 2 >= 2 }}{{ 2 <= 1 }}",
    "{{ 'yes' if tools else 'no' }}{{ 'yes' if documents }}{{ (tools and 1) or 2 }}{{ not tools }}{{ documents or 'x' and 'y' }}",
    "{{ messages[0].role == 'system' and messages | length > 1 }}{% if messages[0]['role'] in ['system', 'developer'] %}s{% endif %}",
    "{% if not (loop is defined) and loop is undefined %}ok{% endif %}",
    # Filters
    "{{ messages[0].content | trim }}|{{ messages[0]['content'].strip() }}|{{ 'xxaxx' | trim('x') }}|{{ 'a\n' | trim }}|",
    "{{ 'aBc dE' | upper }}{{ 'aBc' | lower }}{{ 'aBc dE' | capitalize }}{{ 'aBc dE' | title }}",
    "{{ ['a', 'b'] | join }}{{ ['a', 'b'] | join(', ') }}{{ messages | join(',', attribute='role') }}{{ [1, none, true] | join('-') }}",
    "{{ messages | map(attribute='role') | list }}{{ messages | map(attribute='name', default='?') | join(' ') }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'eq', 'user') | map(attribute='role') | join }}",
    "{{ messages | selectattr('name', 'defined') | map(attribute='name') | list }}{{ messages | selectattr('name') | list | length }}",
    "{{ [3, 0, 1] | select | list }}{{ [1, 2, 3] | select('odd') | list }}{{ [1, 2, 3] | reject('odd') | list }}{{ ['a', 'B'] | map('upper') | join }}",
    "{{ [3, 1, 2] | sort }}{{ ['b', 'A'] | sort }}{{ [3, 1] | sort(reverse=true) }}{{ [1, 1, 2] | unique | list }}{{ [1, 2] | sum }}{{ [[1], [2]] | sum(start=[]) }}",
    "{{ [1, 2] | first }}{{ [1, 2] | last }}{{ [] | first }}{{ [3, 1] | min }}{{ [3, 1] | max }}{{ 'abc' | first }}{{ 'abc' | last }}{{ [1, 2] | count }}",
    "{{ 'a-b-a' | replace('a', 'x') }}{{ 'aaa' | replace('a', 'b', 2) }}{{ 'a'.replace('', '.') }}",
    "{{ 'one\ntwo\n\nthree' | indent }}|{{ 'one\ntwo' | indent(2, true) }}|{{ 'one\n\ntwo' | indent('> ', first=true, blank=true) }}",
    "{{ 'abc' | center(9) }}|{{ 'abc'.center(9, '*') }}{{ 'a'.ljust(3) }}{{ 'a'.rjust(3, '.') }}{{ '7'.zfill(3) }}{{ 'a\tb'.expandtabs(4) }}",
    "{{ '%s is %05.1f %d%%' % ('x', 2.25, 3) }}{{ '%(a)s' % {'a': 1} }}{{ '%s-%s' | format(1, 'b') }}{{ '%5s|%-5s|' % ('a', 'b') }}",
    "{{ '{} {1}'.format(1, 2) }}",
    "{{ '{0}-{1:>4}-{a!r}-{m[role]}'.format(1, 'x', a='q', m=messages[0]) }}{{ '{x}'.format_map({'x': 1}) }}{{ '{:{w}}|'.format('a', w=3) }}",
    "{{ '1.5' | float }}{{ '7' | int }}{{ 'x' | int(3) }}{{ 'ff' | int(base=16) }}{{ 2.567 | round(2) }}{{ 2.5 | round | int }}{{ 7.2 | round(0, 'ceil') }}{{ -3 | abs }}",
    "{{ {'a': 1} | items | list }}{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2} | dictsort(by='value', reverse=true) }}",
    "{{ [1, 2, 3, 4, 5] | batch(2, 'x') | list }}{{ [1, 2, 3, 4, 5] | slice(2) | list }}",
    "{% for group in messages | groupby('role') %}{{ group.grouper }}:{{ group.list | length }} {% endfor %}",
    "{{ '<a href=\"x\">' | escape }}{{ '<b>' | e }}{{ '<b>' | safe }}{{ '<p>a <b>b</b></p>' | striptags }}{{ 'a b&c' | urlencode }}{{ ('<' | e) ~ '>' }}",
    "{{ 'a long text of words' | truncate(10) }}|{{ 'a long text of words' | wordwrap(6) }}|{{ 'a b c' | wordcount }}|{{ 12345678 | filesizeformat }}",
    "{{ {'a': [1, 'é']} | string }}{{ [1, 'x', none] | string | length }}{{ {'a': 1} | pprint }}{{ 'http://a.b' | urlize }}{{ {'k': 'v'} | xmlattr }}",
    "{{ messages[0] | attr('role') }}{{ 'abc' | attr('nothing') }}{{ 'x' | random }}{{ 'abc' | list }}{{ 'abc' | reverse }}",
    # JSON
    "{{ tools | tojson }}",
    "{{ tools | tojson(indent=4) }}{{ tools[0] | tojson(indent=2) }}",
    "{{ tools | tojson(ensure_ascii=True) }}{{ tools | tojson(ensure_ascii=False, sort_keys=True) }}",
    "{{ tools | tojson(separators=(',', ':')) }}{{ {'b': 1, 'a': [true, none, 1.0, 'x']} | tojson(indent=2, separators=(', ', ' = '), sort_keys=true) }}",
    "{{ tools | tojson(false, 1, none, true) }}{{ [] | tojson }}{{ {} | tojson(indent=2) }}{{ 'x' | tojson }}{{ none | tojson }}{{ 1.0 | tojson }}",
    "{{ messages[1].content | tojson }}{{ messages[2].tool_calls[0].function.arguments | tojson }}",
    "{{ nothing | tojson }}",
    "{{ [1] | tojson(indent='--') }}{{ (1, 2) | tojson }}",
    "{{ range(2) | tojson }}",
    # Texts and numbers
    "{{ 'a' ~ 1 ~ none ~ 1.5 ~ [1] }}{{ 'a' + 'b' }}{{ 'ab' * 3 }}{{ [1] + [2] }}{{ [0] * 3 }}{{ (1,) + (2,) }}",
    "{{ 'a' + 1 }}",
    "{{ 7 / 2 }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ -7 // 2 }}{{ 1 - 0.5 }}{{ 2 * 3.0 }}{{ 3.0 * 2 }}{{ 1e3 }}{{ 1_000 }}{{ 0x1f }}{{ -(2) }}{{ +3 }}",
    "{{ 1 / 0 }}",
    "{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{{ messages[2].content.split('</think>')[0].rstrip().split('<think>')[-1] }}",
    "{{ 'a,b,c'.split(',', 1) }}{{ 'a b'.split() }}{{ 'a\nb'.splitlines() }}{{ 'a-b'.rsplit('-') }}{{ 'k=v'.partition('=') }}{{ ', '.join(['a', 'b']) }}",
    "{{ 'abc'.startswith('a') }}{{ 'abc'.endswith(('x', 'c')) }}{{ 'abcb'.find('b') }}{{ 'abcb'.count('b') }}{{ 'abc'.index('c') }}{{ 'a1'.isalnum() }}{{ 'A'.lower() }}{{ 'abc'.removeprefix('a') }}",
    "{{ 'é'.encode('utf-8') }}{{ 'é'.encode('utf-8').decode('utf-8') }}{{ 'abc'.translate({97: 'x'}) }}{{ 'aB'.swapcase() }}{{ 'a b'.title() }}",
    "{{ dict(a=1, b=2) }}{{ dict({'a': 1}, b=2).items() | list }}{{ dict(a=1).keys() | list }}{{ dict.fromkeys(['a'], 1) }}",
    "{{ {'a': 1}.items() }}{{ {'a': 1}.values() | list }}{{ {'a': {'b': 2}}.a.b }}{{ {1: 'x'}[1] }}{{ [1, 2].index(2) }}{{ [1, 1].count(1) }}{{ {'a': 1}.copy() }}",
    "{{ true }}{{ false }}{{ none }}{{ True }}{{ None }}{{ [] }}{{ {} }}{{ () }}{{ (1,) }}{{ 'q\\'s' }}{{ ['é', \"it's\"] }}",
    "{{ cycler('a', 'b').next() }}{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b",
    # White space and text
    "a\n  {% if true %}\n  b\n  {% endif %}\nc\n\n",
    "a  {%- if true -%}  b  {%- endif %}  c {{- 'd' -}} e\n",
    "  {%+ if true %}x{% endif +%}\ny{# a comment #}\n{#- another -#}  z",
    "{% raw %}{{ not this }}{% endraw %}\n\n{{ '{{' }}{{ '\\n\\t\\u00e9' }}|{{ 'a\\\\b' }}",
    "tail\n",
    "{{ 'a\n' }}{{ '\n' }}\n",
    "# for x in y\n## comment\n{{ 1 }}",
    # Refusals
    "{{ raise_exception('Roles must alternate') }}",
    "{% if messages[0].role != 'user' %}{{ raise_exception('first is ' + messages[0].role) }}{% endif %}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}{{ messages[0].pop('role') }}",
    "{{ ''.__class__ }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__len__() }}",
    "{{ raise_exception.__globals__ }}|{{ raise_exception.__globals__.x }}",
    "{{ namespace.__init__ }}|{{ dict.__subclasses__ }}|{{ cycler.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ dict.mro() }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{% extends 'x' %}",
    "{% do messages %}",
    "{% trans %}x{% endtrans %}",
    "{{ messages | nofilter }}",
    "{{ 1 is notest }}",
    "{% for %}",
    "{% if true %}",
    "{{ 'a' }",
    "{% break %}",
    "{% for x in [1] %}{% generation %}{% break %}{% endgeneration %}{% endfor %}",
    "{% autoescape true %}{{ '<b>' }}{{ '<i>' | safe }}{{ '<' ~ 'a' }}{% endautoescape %}{{ '<b>' }}",
    # Whole templates, as models have them
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + (message['content'] | string) + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    "{%- if tools %}\n    {{- '<|im_start|>system\\n' }}\n    {%- for tool in tools %}\n        {{- \"\\n\" }}\n        {{- tool | tojson }}\n    {%- endfor %}\n    {{- '<|im_end|>\\n' }}\n{%- endif %}",
    "{%- for message in messages %}\n    {%- if message.tool_calls is defined and message.tool_calls %}\n        {%- for call in message.tool_calls %}\n            {%- set f = call.function %}\n            {{- '{\"name\": \"' ~ f.name ~ '\", \"arguments\": ' ~ f.arguments | tojson ~ '}' }}\n        {%- endfor %}\n    {%- elif message.content is string %}\n        {{- message.role + ': ' + message.content }}\n    {%- else %}\n        {%- for part in message.content %}{{ part.text if part.type == 'text' else '<|image|>' }}{% endfor %}\n    {%- endif %}\n{%- endfor %}",
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' and m.content is string and not (m.content.startswith('<tool>') and m.content.endswith('</tool>')) %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages[::-1] %}{% set index = (messages | length - 1) - loop.index0 %}{{ index }}{{ index > ns.last }} {% endfor %}",
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    "{%- set reasoning = '' %}{%- if messages[2].reasoning_content is string %}{%- set reasoning = messages[2].reasoning_content %}{%- endif %}{{ reasoning }}{{ messages[2].thinking }}{{ messages[1].thinking is defined }}",
]  # fmt: skip

DOUBLED = "{{% set ns = namespace(x={}) %}}{{% for i in range(60) %}}{}{{% endfor %}}{{{{ ns.x }}}}"
LOOPS = "{{% for i in range(99999) %}}{{% for j in range(99999) %}}{}{{% endfor %}}{{% endfor %}}"
MACRO = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
# Each does more than a template may, in its own way
ENDLESS = {
    "a billion steps": LOOPS.format("x"),
    "a billion empty steps": LOOPS.format(""),
    "steps that a condition skips": "{% for i in range(999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "steps of a recursive loop": "{% for i in range(999) recursive %}{% if loop.depth < 9 %}{{ loop(range(999)) }}{% endif %}{% endfor %}",
    "skipped steps of a recursive loop": "{% for i in range(999) if i < 1 recursive %}{% if loop.depth < 9 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}",
    "long text in a loop": "{% for i in range(9999) %}" + "text" * 999 + "{% endfor %}",
    "long text in a macro": "{% macro m() %}" + "text" * 999 + "{% endmacro %}{% for i in range(999) %}{% set x = m() %}{% endfor %}",
    "calls of a block": "{% block b %}x{% endblock %}" + LOOPS.format("{{ self.b() }}"),
    "blocks of what is generated": LOOPS.format("{% generation %}{% endgeneration %}"),
    "macros that call themselves twice": MACRO,
    "filters in a loop": LOOPS.format("{{ j | abs }}"),
    "lists in a loop": "{% for i in range(999) %}{% set x = range(9999) | list %}{% endfor %}",
    "maps in a loop": "{% for i in range(999) %}{% set x = range(9999) | map('string') | list %}{% endfor %}",
    "sorts in a loop": "{% for i in range(999) %}{% set x = range(9999) | sort | unique | list %}{% endfor %}",
    "comparisons of lists": "{% set a = range(9999) | list %}{% set b = range(9999) | list %}{% for i in range(9999) %}{{ a == b }}{{ a is eq(b) }}{% endfor %}",
    "searches": "{% set a = 'a' * 90000 %}{% for i in range(9999) %}{{ 'b' in a }}{% endfor %}",
    "slices": "{% set a = 'a' * 9000 %}{% for i in range(999) %}{% set x = a[1:] %}{% endfor %}",
    "methods": "{% set a = 'a' * 9000 %}{% for i in range(999) %}{% set x = a.upper() %}{% endfor %}",
    "arguments by the thousand": "{% for i in range(99) %}{{ cycler(*range(9999)).current }}{% endfor %}",
    "words of nonsense": "{{ lipsum(n=100000) }}",
    "sums of lists": "{{ ([[1] * 99] * 999) | sum(start=[]) | length }}",
    "tags": "{{ ('<!---->' * 9999) | striptags }}",
    "lines": "{{ ('a' * 99999) | wordwrap(1) | length }}",
    "dates": "{{ strftime_now('%c' * 99999) | length }}",
    "doubled by ~": DOUBLED.format("'ab'", "{% set ns.x = ns.x ~ ns.x %}"),
    "doubled by +": DOUBLED.format("'ab'", "{% set ns.x = ns.x + ns.x %}"),
    "doubled by a block": DOUBLED.format("'ab'", "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"),
    "doubled by replace": DOUBLED.format("'ab'", "{% set ns.x = ns.x | replace('a', ns.x) %}"),
    "doubled by .replace": DOUBLED.format("'ab'", "{% set ns.x = ns.x.replace('a', ns.x) %}"),
    "doubled by %": DOUBLED.format("'ab'", "{% set ns.x = '%s%s' % (ns.x, ns.x) %}"),
    "doubled by format": DOUBLED.format("'ab'", "{% set ns.x = '{0}{0}'.format(ns.x) %}"),
    "doubled by join": DOUBLED.format("'ab'", "{% set ns.x = [ns.x, ns.x] | join %}"),
    "doubled by .join": DOUBLED.format("'ab'", "{% set ns.x = ns.x.join(['', '', '']) %}"),
    "doubled by translate": DOUBLED.format("'ab'", "{% set ns.x = ns.x.translate({97: ns.x}) %}"),
    "doubled in a list": DOUBLED.format("[1]", "{% set ns.x = ns.x + ns.x %}"),
    "lists in lists": DOUBLED.format("[1]", "{% set ns.x = [ns.x, ns.x] %}"),
    "mappings in mappings": DOUBLED.format("1", "{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
    "mappings made by dict": DOUBLED.format("1", "{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
    "namespaces in namespaces": DOUBLED.format("1", "{% set ns.x = namespace(a=ns.x, b=ns.x) %}"),
    "arguments of arguments": "{% macro m(n) %}{% if n %}{{ m(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}{% endmacro %}{{ m(30, 1, 1) }}",
    "a text times a number": "{{ 'a' * 10 ** 10 }}",
    "a number times a list": "{{ (10 ** 10 * [0]) | length }}",
    "center": "{{ 'a' | center(10 ** 10) }}",
    "center by name": "{{ 'a' | center(width=10 ** 10) }}",
    ".center": "{{ 'a'.center(10 ** 10) }}",
    "ljust": "{{ 'a'.ljust(10 ** 10) }}{{ 'a'.rjust(10 ** 10) }}",
    "zfill": "{{ 'a'.zfill(10 ** 10) }}",
    "tabs": "{{ '\t'.expandtabs(10 ** 10) }}",
    "bytes": "{{ (5).to_bytes(length=10 ** 10, byteorder='big') | length }}",
    "indent": "{{ 'a' | indent(10 ** 10, true) }}",
    "indent by a text": "{{ ('\n' * 9999) | indent('x' * 9999) }}",
    "a width of %": "{{ '%9999999999d' % 1 }}",
    "a width of % in the arguments": "{{ '%*d' % (10 ** 10, 1) }}",
    "a precision of %": "{{ '%.9999999999f' | format(1.0) }}",
    "a width of format": "{{ '{:9999999999}'.format('a') }}",
    "a width of format in the arguments": "{{ '{:{}}'.format('a', '9999999999') }}{{ '{:{w}}'.format_map({'w': 10 ** 10}) }}",
    "a text between parts": "{{ range(9999) | join('x' * 9999) | length }}",
    "a text between .join's parts": "{{ ('x' * 9999).join(range(9999) | map('string')) | length }}",
    "parts of a batch": "{{ [1] | batch(10 ** 10, 'x') | list }}",
    "slices of a list": "{{ [1] | slice(10 ** 10) | list }}",
    "an indent of JSON": "{{ [[1]] | tojson(indent=10 ** 9) }}",
    "separators of JSON": "{{ ([1] * 9999) | tojson(separators=('x' * 9999, '')) }}",
    "digits to round to": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "names in XML": "{{ ('http://a.b ' * 9999) | urlize(rel='x' * 9999) | length }}",
}  # fmt: skip


def rendered_by_transformers() -> list[str | None]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts: list[str | None] = []
    for construct in CONSTRUCTS:
        names = {name: value for name, value in VARIABLES.items() if name != "messages"}
        try:
            texts.append(render_jinja_template([MESSAGES], chat_template=construct, **names)[0][0])
        except Exception:
            texts.append(None)
    return texts


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(rendered_by_transformers(), indent=0) + "\n", encoding="utf-8")
