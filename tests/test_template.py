"""Chat templates are rendered as transformers renders them, and end: in bounded time, of bounded size."""

import json
import threading
import time

import pytest
from templates import CONSTRUCTS, ENDLESS, GOLDEN, MESSAGES, VARIABLES, rendered_by_transformers

from phi3_mlx.errors import ChatError
from phi3_mlx.text import metering, template

NAMES = {name: value for name, value in VARIABLES.items() if name != "messages"}


def rendered(source: str, **options: str) -> str | None:
    try:
        return template.render(source, MESSAGES, NAMES, **options)
    except ChatError:
        return None


@pytest.mark.parametrize("n", range(len(CONSTRUCTS)))
def test_a_construct_is_rendered_as_by_transformers(n: int):
    """The same text, or refused like there."""
    assert rendered(CONSTRUCTS[n]) == json.loads(GOLDEN.read_text(encoding="utf-8"))[n]


def test_transformers_still_renders_so():
    pytest.importorskip("transformers")
    assert rendered_by_transformers() == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_what_the_model_generates_is_marked_where_the_template_says_so():
    source = "{% for m in messages[:2] %}{{ m.role }}{% generation %}{{ loop.index }}{% endgeneration %};{% endfor %}"
    assert rendered(source) == "system1;user2;"
    assert rendered(source, mark="|") == "system|1|;user|2|;"
    assert rendered(source) == "system1;user2;"


def test_the_guard_in_a_text_survives_ascii_json():
    text = template.render("{{ messages | tojson(true) }}", [{"a": "<\ue000\u00e9"}], {}, guard="\ue000")
    assert text == '[{"a": "<\ue000\\u00e9"}]'
    assert template.render("{{ messages }}", [{"a": "<\ue000"}], {}, guard="\ue000") == "[{'a': '<\ue000'}]"


def test_reasoning_is_known_by_every_name_that_templates_use():
    for key in ("reasoning_content", "thinking", "reasoning"):
        source = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
        assert template.render(source, [{key: "hm"}], {}) == "hmhm"


# ------------------------------------------------------------------------------------------- bounded work


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_does_too_much_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch):
    """With a small allowance, so that the test is quick; each is stopped by it alone, and not by an accident."""
    monkeypatch.setattr(metering, "_ALLOWED", 200_000)
    with pytest.raises(ChatError, match="the chat template was stopped: it does more than 200,200 steps"):
        template.render(ENDLESS[name], [], {"x": "y"})


def spent(source: str, monkeypatch: pytest.MonkeyPatch, names: dict[str, object]) -> int:
    meter = metering.Meter(100_000, 0)
    monkeypatch.setattr(template, "Meter", lambda size, messages: meter)
    template.render(source, [], names)
    return meter.allowed - meter.left


BIG = {
    "text": "a" * 1000,
    "words": "a " * 500,
    "items": [*range(1000)],
    "others": [*range(1000)],
    "lists": [[1] * 10 for _ in range(100)],
    "mapping": {str(n): n for n in range(1000)},
}


@pytest.mark.parametrize(
    ("source", "least", "most"),
    [
        # What is read: a thousand items or characters, some of them many at once
        ("{% if items == others %}{% endif %}", 1_000, 4_000),
        ("{% if items is eq(others) %}{% endif %}", 1_000, 20_000),
        ("{% if 5000 in items %}{% endif %}", 500, 4_000),
        ("{% if 'x' in text %}{% endif %}", 100, 1_000),
        ("{% if 'x' not in text %}{% endif %}", 100, 1_000),
        ("{% if 'x' in mapping %}{% endif %}", 1, 50),
        ("{% if text == 'x' %}{% endif %}", 1, 50),
        ("{% if text ~ 'x' == text ~ 'y' %}{% endif %}", 2_000, 4_000),
        ("{% set x = items | length %}", 1, 100),
        ("{% for x in items %}{% endfor %}", 4_000, 6_000),
        ("{% for x in items %}ten letters{% endfor %}", 11_000, 20_000),
        # What is made
        ("{{ text }}", 1_000, 2_000),
        ("{{ items }}", 4_000, 20_000),
        ("{% set x = text ~ 'b' %}", 1_000, 3_000),
        ("{% set x = [text ~ 'b'] %}", 1_000, 3_000),
        ("{% set x = {'a': text ~ 'b'} %}", 1_000, 3_000),
        ("{% set x = (text + 'a')[1:] %}", 2_000, 4_000),
        ("{% set x = text.upper() %}", 1_000, 3_000),
        ("{% set x = text | upper %}", 1_000, 3_000),
        ("{% set x = text.split('a') %}", 8_000, 20_000),
        ("{% set x = words.split() %}", 4_000, 20_000),
        ("{% set x = items | list %}", 8_000, 20_000),
        ("{% set x = items | map('abs') %}", 8_000, 20_000),
        ("{% set x = items | batch(2) %}", 8_000, 20_000),
        ("{% set x = '{0}{0}'.format(text) %}", 2_000, 8_000),
        ("{% set x = '{:{}}'.format('a', 3000) %}", 3_000, 8_000),
        ("{% set x = '%3000d' % 1 %}", 3_000, 8_000),
        ("{% set x = text | wordwrap(1) %}", 2_000, 30_000),
        ("{% set x = items | join(text) %}", 1_000_000, 3_000_000),
        ("{% set x = items | tojson(separators=(text, '')) %}", 1_000_000, 3_000_000),
        ("{% set x = lists | sum(start=[]) %}", 50_000, 2_000_000),
    ],
)
def test_work_costs_about_what_it_takes(source: str, least: int, most: int, monkeypatch: pytest.MonkeyPatch):
    """Never less than the items and characters that are read or made, and not many times as much."""
    assert least <= spent(source, monkeypatch, BIG) <= most


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ (10 ** (10 ** 8)) > 1 }}", "an integer of 400,000,000 bits"),
        ("{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "an integer"),
        ("{{ ('f' * 99999) | int(base=16) > 1 }}", "an integer of 399,996 bits"),
        ("{% set ns = namespace(x=1) %}{% for i in range(99) %}{% set ns.x = (ns.x,) %}{% endfor %}", "nested more"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "cannot render these messages: maximum recursion depth"),
        ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "nested too deep"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "nested too deep"),
        ("{{ 1" + " + 1" * 20_000 + " }}", "nested too deep"),
        ("{% for i in [1] %}" * 30 + "{% endfor %}" * 30, "not valid Jinja: too many statically nested blocks"),
        ("{{ raise_exception('x' * 90000) }}", r"cannot render these messages: x{490,500} \.\.\.$"),
        ("{{ x }}" * 40_000, "has 280,000 characters; 262,144 are the most"),
        (
            "{% for i in range(40000) %}{{ 'x' * 30 }}{% endfor %}",
            "makes 1,200,000 characters of messages that have 2,",
        ),
    ],
)
def test_what_grows_otherwise_has_bounds_as_well(source: str, message: str):
    with pytest.raises(ChatError, match=message) as caught:
        template.render(source, [], {"x": 1})
    assert "\n" not in str(caught.value)


def test_what_may_be_done_grows_with_the_messages():
    """Long documents, and conversations of a thousand turns that a template goes through for each of its turns."""
    long = [{"role": "user", "content": "word " * 400_000}]
    source = "{% for m in messages %}{{ m.content | trim | replace('w', 'W') | tojson }}{% endfor %}"
    assert len(template.render(source, long, {})) == 2_000_001
    many = [{"role": "user", "content": "word " * 20}] * 1000
    source = "{% for m in messages %}{% for n in messages %}{% if n.role == 'x' %}x{% endif %}{% endfor %}y{% endfor %}"
    assert template.render(source, many, {}) == "y" * 1000


def test_threads_are_measured_each_for_itself():
    """And the one that is stopped leaves the others, and its own thread, as they were."""
    source = "{{ messages[0].content }}" + "{% for i in range(n) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    results: dict[int, object] = {}

    def work(n: int) -> None:
        for turns in (n, 1, n):
            try:
                results[n, turns] = template.render(source, [{"content": str(n)}], {"n": turns})
            except ChatError as error:
                results[n, turns] = str(error)

    started = time.perf_counter()
    threads = [threading.Thread(target=work, args=(n,)) for n in (2, 99_999)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: result for key, result in results.items() if key[1] != 99_999} == {
        (2, 2): "2", (2, 1): "2", (99_999, 1): "99999"
    }  # fmt: skip
    assert "was stopped" in str(results[99_999, 99_999])
    assert time.perf_counter() - started < 120
