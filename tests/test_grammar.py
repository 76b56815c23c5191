"""Which tokens a form allows: the matcher against a naive enumeration, with every kind of vocabulary."""

from __future__ import annotations

import gc
import json
import random
import re
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from tokenizer_samples import PHI4_MINI_TOKENS, TINY, byte_level, tiktoken_ranks, write_json

from phi3_mlx import Conversation, generate, load
from phi3_mlx.conversion.gguf.tokenizer import tokenizer_files
from phi3_mlx.engine import processors
from phi3_mlx.errors import OptionError, Phi3Error
from phi3_mlx.generation.request import Request
from phi3_mlx.text import grammar, spelling
from phi3_mlx.text.grammar import Form, matchers
from phi3_mlx.text.tokenizer import Tokenizer, read_tokenizer

pytest.importorskip("llguidance")


def matcher(tokenizer, kind, text):
    return matchers(Form(kind, text), tokenizer, 1)[0]


@pytest.fixture(scope="module", params=["json", "sentencepiece", "gguf", "byte level", "tiktoken"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("vocabulary")
    if request.param == "json":
        return read_tokenizer(TINY)
    if request.param == "sentencepiece":
        return read_tokenizer(TINY, backend="sentencepiece")
    if request.param == "gguf":
        pytest.importorskip("gguf")
        from gguf_samples import sentencepiece_metadata

        declared = json.loads((TINY / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        ends = {"tokenizer.ggml.eos_token_id": 4000, "tokenizer.ggml.eot_token_id": 4007}
        files = tokenizer_files({**sentencepiece_metadata(TINY, declared), **ends}, "model.gguf")
        for name in ("tokenizer", "tokenizer_config", "generation_config"):
            write_json(directory / f"{name}.json", getattr(files, name))
        return read_tokenizer(directory)
    if request.param == "byte level":
        return read_tokenizer(byte_level(directory, PHI4_MINI_TOKENS, strip=False))
    return read_tokenizer(tiktoken_ranks(directory))


class Naive:
    """Allows what begins a text of a list, token by token; knows a token by its bytes alone."""

    def __init__(self, tokenizer, texts):
        self.tokenizer, self.texts = tokenizer, [text.encode() for text in texts]
        control = {token.id for token in tokenizer.added_tokens.values() if token.special or token.marked}
        self.spelled = {
            token: tokenizer.token_bytes(token)
            for token in range(tokenizer.vocab_size)
            if token not in control | tokenizer.stop_ids and tokenizer.token_bytes(token)
        }

    def leaves_one_text(self, answer):
        """Whether the next byte is certain."""
        shown = self.shown(b"".join(self.tokenizer.token_bytes(token) for token in answer))
        nexts = {text[len(shown) :][:1] for text in self.texts if text.startswith(shown)}
        return len(nexts) == 1 and b"" not in nexts

    def shown(self, generated):
        return generated.removeprefix(b" ") if self.tokenizer.drops_first_space else generated

    def allowed(self, answer):
        generated = b"".join(self.tokenizer.token_bytes(token) for token in answer)
        ids = {
            token
            for token, spelled in self.spelled.items()
            if any(text.startswith(self.shown(generated + spelled)) for text in self.texts)
        }
        return ids | (self.tokenizer.stop_ids if self.shown(generated) in self.texts else set())


LANGUAGES = [
    ["yes", "no", "yes, but"],
    ["é", "ée", "日本語", "日", "😀"],
    [" two", "  three"],  # begins with a space, which the first token must not lose
    ['a"b', "a\\b", "a\nb", "/"],
    ["the duck and the frog", "the duck", "then"],
]


@pytest.mark.parametrize("texts", LANGUAGES, ids=lambda texts: texts[0].strip())
def test_a_matcher_allows_what_a_naive_enumeration_does(tokenizer, texts):
    naive, rng = Naive(tokenizer, texts), random.Random(0)
    form = Request(choices=texts).form
    assert form is not None
    for _ in range(6):
        ours, answer = matchers(form, tokenizer, 1)[0], []
        while True:
            mask = ours.allowed(answer)
            assert mask.shape == (tokenizer.vocab_size,)
            ids, right = {*map(int, mask.nonzero()[0])}, naive.allowed(answer)
            assert ids == right or (ids and ids < right and naive.leaves_one_text(answer))
            token = int(rng.choice(mask.nonzero()[0]))
            if token in tokenizer.stop_ids:
                break
            answer.append(token)
        assert tokenizer.decode(answer) in texts


@pytest.mark.parametrize("text", ['{"name":"duck","the best":["frog",', "日本語 and ducks", "a\nb  c\td"])
def test_a_text_without_a_choice_is_spelled_as_the_tokenizer_does(tokenizer, text):
    ids = tokenizer.encode(text)
    begun = ids[:1] if tokenizer.drops_first_space else []  # with a space or without
    ours = matchers(Request(choices=[text]).form, tokenizer, 1)[0]
    assert ours.forced(begun, 100) == ids[len(begun) :]
    assert ours.forced(begun, 3) == ids[len(begun) :][:3]
    assert ours.forced(ids, 100) == []  # it may only end
    assert ours.forced([*begun, tokenizer.vocab_size], 100) == []
    for n in range(len(begun), len(ids)):
        assert ours.allowed(ids[:n]).nonzero()[0].tolist() == [ids[n]]


PATTERNS = ["[a-z]+(, [a-z]+)*", "(ä|ö|ü|ß|日){2,5}!", r'\{"x":-?[0-9]{1,3}\}', ".{3}", "a?"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_what_ends_matches_the_whole_regular_expression(tokenizer, pattern):
    rng, ended = random.Random(0), 0
    for _ in range(10):
        ours, answer = matcher(tokenizer, "regex", pattern), []
        while len(answer) < 30:
            ids = [int(token) for token in ours.allowed(answer).nonzero()[0]]
            stops = [token for token in ids if token in tokenizer.stop_ids]
            token = stops[0] if stops and rng.random() < 0.5 else rng.choice(ids)
            if token in tokenizer.stop_ids:
                assert re.fullmatch(pattern, tokenizer.decode(answer))
                ended += 1
                break
            answer.append(token)
    assert ended >= 8


def test_an_answer_may_go_back_and_on_another_way(tokenizer):
    form, rng = Form("regex", "(ab|ba|ä|[0-9]+ )*[a-f]{2,4}"), random.Random(1)
    ours, answer = matchers(form, tokenizer, 1)[0], []
    for _ in range(60):
        ids = [int(token) for token in ours.allowed(answer).nonzero()[0]]
        assert ids == [*map(int, matchers(form, tokenizer, 1)[0].allowed(answer).nonzero()[0])]
        if rng.random() < 0.3:
            answer = answer[: rng.randrange(len(answer) + 1)]
        for _ in range(rng.randrange(4)):  # drafts, right or wrong
            ids = [int(token) for token in ours.allowed(answer).nonzero()[0] if token not in tokenizer.stop_ids]
            wrong = rng.choice([*tokenizer.stop_ids, *tokenizer.special_ids, tokenizer.vocab_size + 3])
            assert ours.allowed([*answer, wrong]) is None
            assert ours.allowed([*answer, wrong, *ids[:1]]) is None
            if ids:
                answer = [*answer, rng.choice(ids)]


def test_matchers_of_one_constraint_go_their_own_ways():
    tokenizer = read_tokenizer(TINY)
    first, second = matchers(Form("regex", "ab|ba"), tokenizer, 2)
    a, b = tokenizer.token_to_id("a"), tokenizer.token_to_id("b")
    assert first.allowed([a])[b]
    assert second.allowed([b])[a]
    assert not first.allowed([a])[a]


def test_ids_that_a_matcher_does_not_know_are_excluded():
    class Two:
        def allowed(self, answer):
            return np.array([True, False])

    logits = mx.array([1.0, 2.0, 3.0, 4.0])
    changed = processors.Constraint(Two())([], logits)
    assert changed.tolist() == [1.0, -np.inf, -np.inf, -np.inf]
    assert processors.Constraint(Two())([], logits[:1]).tolist() == [1.0]


def test_behind_a_token_that_is_not_allowed_logits_stay():
    class Nothing:
        def allowed(self, answer):
            return None

    assert processors.Constraint(Nothing())([3], mx.array([1.0, 2.0])).tolist() == [1.0, 2.0]


FAULTS = [
    ({"schema": "{a"}, "schema is no JSON: Expecting property name"),
    ({"schema": '{"a": 1,\n "b": }'}, "schema is no JSON: Expecting value: line 2 column 7 (char 15)"),
    ({"schema": "true"}, "schema is True; expected a JSON schema as a dict or a text, a pydantic model or a dataclass"),
    ({"schema": 3}, "schema is 3; expected a JSON schema as a dict or a text, a pydantic model or a dataclass"),
    ({"schema": {"const": {3}}}, "schema holds what JSON has no form for: "),
    ({"schema": {"type": "strin"}}, "schema cannot be followed: Invalid type: strin"),
    ({"schema": {"not": {}}}, 'schema has "not", which cannot be constrained; leave it out'),
    ({"schema": {"oneOf": [{}, {}]}}, 'schema has "oneOf" with branches that one value could fit, which cannot be'),
    ({"schema": {"$ref": "#/x"}}, "schema cannot be followed: Pointer '/x' does not exist"),
    ({"schema": {"enum": []}}, "schema cannot be followed: Unsatisfiable schema"),
    ({"schema": {"type": "string", "format": "bogus"}}, "schema cannot be followed: Unknown format: bogus"),
    ({"regex": "ab("}, "regex 'ab(' is no regular expression: unclosed group, at character 3"),
    ({"regex": "a{2,1}"}, "regex 'a{2,1}' is no regular expression: invalid repetition count range"),
    ({"regex": "(?=a)b"}, "regex '(?=a)b' is no regular expression: look-around, including look-ahead"),
    ({"regex": r"a\b"}, r"regex 'a\\b' is no regular expression: lookarounds not supported yet; WordUnicode"),
    ({"regex": 3}, "regex is 3; expected a text"),
    ({"grammar": "start: foo"}, 'grammar has an error in line 1, column 8: unknown name: "foo"'),
    ({"grammar": "start: b\nb: /x(/"}, 'grammar has an error in line 2, column 4: invalid regex "x(", unclosed group'),
    ({"grammar": 'start: "'}, "grammar has an error in line 1, column 9: lexer error"),
    ({"grammar": 'other: "a"'}, "grammar cannot be followed: no start rule found"),
    ({"choices": []}, "choices has an empty answer to choose; give texts of at least one character"),
    ({"choices": "a,,b"}, "choices has an empty answer to choose; give texts of at least one character"),
    ({"choices": [3]}, "choices holds 3; expected a list of texts"),
    ({"choices": 3}, "choices is 3; expected a list of texts"),
    ({"schema": {}, "regex": "a"}, "schema has no place beside regex: an answer follows one alone; leave one out"),
    ({"grammar": "a", "choices": "a"}, "grammar has no place beside choices: an answer follows one alone"),
]


def test_choices_in_one_text_have_no_spaces_around_them():
    assert Request(choices="yes, no ,not at all").choices == ("yes", "no", "not at all")
    assert Request(choices=["yes", " no"]).choices == ("yes", " no")
    with pytest.raises(OptionError, match="an empty answer"):
        Request(choices="yes, ,no")


@pytest.mark.parametrize(("given", "message"), FAULTS, ids=[message for _, message in FAULTS])
def test_a_constraint_that_is_none_is_refused_in_one_line(given, message):
    with pytest.raises(OptionError) as caught:
        Request(**given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


UNSUPPORTED = [
    *("not if then else uniqueItems contains minContains maxContains propertyNames dependentRequired").split(),
    *("dependentSchemas dependencies unevaluatedProperties unevaluatedItems $dynamicRef $recursiveRef").split(),
]


@pytest.mark.parametrize("keyword", UNSUPPORTED)
@pytest.mark.parametrize("place", ["top", "property", "items", "definition"])
def test_keywords_of_json_schema_that_cannot_be_constrained_are_refused_by_name(keyword, place):
    wrong = {keyword: {"a": {}}}
    schema = {
        "top": wrong,
        "property": {"type": "object", "properties": {"a": wrong}},
        "items": {"type": "array", "items": wrong},
        "definition": {"$ref": "#/$defs/a", "$defs": {"a": wrong}},
    }[place]
    with pytest.raises(OptionError, match=re.escape(f'schema has "{keyword}", which cannot be constrained')):
        Request(schema=schema)


def test_a_schema_cannot_switch_the_refusal_off():
    with pytest.raises(OptionError, match=r'^schema has "not"'):
        Request(schema={"not": {}, "x-guidance": {"lenient": True}})


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError) as caught:
        Request(regex="not seen before")
    assert str(caught.value).endswith('which is not installed: pip install "phi3-mlx[schema]"')
    Request()


def test_a_tokenizer_that_names_no_end_cannot_be_constrained():
    tokenizer = read_tokenizer(TINY)
    tokenizer.stop_ids = frozenset()
    with pytest.raises(OptionError, match=r"^regex needs a token that ends an answer"):
        matchers(Form("regex", "a"), tokenizer, 1)


def test_an_answer_may_end_with_an_id_that_the_tokenizer_has_no_token_for():
    tokenizer = read_tokenizer(TINY)
    end = tokenizer.vocab_size + 37
    tokenizer.stop_ids = frozenset([end])
    (matcher,) = matchers(Form("regex", "ab?"), tokenizer, 1)
    first = next(n for n in matcher.allowed([]).nonzero()[0].tolist() if tokenizer.token_bytes(n) == b"a")
    allowed = matcher.allowed([first])
    assert len(allowed) == end + 1
    assert allowed[end]
    assert matcher.allowed([first, end]) is None or not matcher.allowed([first, end]).any()


def nested(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize("levels", [64, 100, 200, 900, 100_000])
@pytest.mark.parametrize("written", [False, True])
def test_a_schema_that_is_nested_too_deep_is_refused_in_one_line(levels, written):
    if levels > 900 and not written:
        pytest.skip("Python writes no such object")
    schema = '{"items":' * levels + "{}" + "}" * levels if written else nested(levels)
    with pytest.raises(OptionError, match=r"^schema (is no JSON: it is nested deeper|holds what JSON has no form for)"):
        Request(schema=schema)
    Request(schema=nested(30))


FIELDS = {f"field {n}": {"type": ["string", "integer", "boolean"][n % 3]} for n in range(500)}
HUGE = {
    "values": {"enum": [f"value number {n}" for n in range(10_000)]},
    "fields": {"type": "object", "properties": FIELDS, "required": [*FIELDS], "additionalProperties": False},
    "options": {"type": "object", "properties": FIELDS, "additionalProperties": False},
    "branches": {"anyOf": [{"type": "array", "prefixItems": [{"const": n}]} for n in range(500)]},
    "text": {"const": "a duck, a frog. " * 600},
    "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 5000, "maxItems": 5000},
}


@pytest.mark.parametrize("name", HUGE)
def test_a_huge_schema_is_followed_in_bounded_time(name):
    tokenizer, began = read_tokenizer(TINY), time.process_time()
    ours, answer, rng = matcher(tokenizer, "schema", json.dumps(HUGE[name])), [], random.Random(0)
    assert time.process_time() - began < 20
    began = time.thread_time()
    while len(answer) < 100:
        token = int(rng.choice(ours.allowed(answer).nonzero()[0]))
        if token in tokenizer.stop_ids:
            break
        answer.append(token)
    assert time.thread_time() - began < 20


def test_a_schema_that_turns_out_too_large_ends_the_answer_and_does_not_let_it_go_free():
    tokenizer = read_tokenizer(TINY)
    branches = [{"type": "object", "properties": {f"k{n}": {"const": n}}} for n in range(500)]
    ours = matcher(tokenizer, "schema", json.dumps({"anyOf": branches}))
    answer = [tokenizer.token_to_id("<0x7B>")]
    for _ in range(2):
        with pytest.raises(Phi3Error, match=r"^the constraint cannot be followed further: .*max is 2000"):
            ours.allowed(answer)
    assert ours.forced(answer, 3) == []


def test_a_schema_that_is_too_large_to_follow_is_refused_in_one_line():
    with pytest.raises(OptionError, match=r"^schema cannot be followed: .*too big"):
        Request(schema={"enum": [str(n) for n in range(100_000)]})


def test_a_long_text_without_a_choice_is_spelled_as_the_tokenizer_does(tokenizer):
    text = "the duck and the frog, and the owl. " * 60
    ids = tokenizer.encode(text)
    ours = matchers(Request(choices=[text]).form, tokenizer, 1)[0]
    begun = ids[:1] if tokenizer.drops_first_space else []
    assert ours.forced(begun, 10_000) == ids[len(begun) :]


class Changing(Tokenizer):
    """A tokenizer that changes a text before it encodes it."""

    def __init__(self, tokenizer):
        self.__dict__.update(tokenizer.__dict__)
        self._inner = tokenizer

    def _encode_text(self, text, *, first):
        return self._inner._encode_text(text.upper(), first=first)

    drops_first_space = property(lambda self: self._inner.drops_first_space)
    token_bytes = property(lambda self: self._inner.token_bytes)
    token_to_id = property(lambda self: self._inner.token_to_id)
    id_to_token = property(lambda self: self._inner.id_to_token)
    _stream = property(lambda self: self._inner._stream)


def test_a_text_that_the_tokenizer_would_change_is_spelled_in_its_longest_tokens(tokenizer):
    changing, text = Changing(tokenizer), "the end of it, é"
    ours = matcher(changing, "choices", json.dumps([text], ensure_ascii=False))
    answer = [] if ours.forced([], 1) else [int(ours.allowed([]).nonzero()[0][0])]
    if tokenizer.decode(answer).strip():
        answer = []
    ids = [*answer, *ours.forced(answer, 100)]
    spelled = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert spelled.removeprefix(" ") == text
    assert len(ids) < len(text.encode())


class Lacking(Changing):
    """A tokenizer that has no token for one of the bytes."""

    def _encode_text(self, text, *, first):
        return self._inner._encode_text(text, first=first)

    @property
    def token_bytes(self):
        return lambda token: b"" if self._inner.token_bytes(token) == b"!" else self._inner.token_bytes(token)


def test_a_vocabulary_that_cannot_spell_everything_is_not_forced():
    tokenizer = Lacking(read_tokenizer(TINY))
    ours = matcher(tokenizer, "regex", "(duck|duck!)")
    answer = []
    while not ours.allowed(answer)[min(tokenizer.stop_ids)]:
        assert ours.forced(answer, 3) == [] or len(ours.allowed(answer).nonzero()[0]) == 1
        answer.append(int(ours.allowed(answer).nonzero()[0][-1]))
    assert tokenizer.decode(answer) == "duck"


@pytest.fixture
def compiled(monkeypatch):
    """The forms that the library compiles or checks while a test runs."""
    import llguidance

    seen = []

    class Matcher:
        def __new__(cls, view, grammar, **options):
            seen.append(grammar)
            return llguidance.LLMatcher(view, grammar, **options)

        @staticmethod
        def validate_grammar(grammar):
            seen.append(grammar)
            return llguidance.LLMatcher.validate_grammar(grammar)

        grammar_from_regex = staticmethod(llguidance.LLMatcher.grammar_from_regex)
        grammar_from_json_schema = staticmethod(llguidance.LLMatcher.grammar_from_json_schema)

    monkeypatch.setattr(grammar, "guidance_library", lambda: SimpleNamespace(LLMatcher=Matcher))
    return seen


def test_a_second_request_compiles_nothing_and_another_tokenizer_does(compiled):
    tokenizer, other = read_tokenizer(TINY), read_tokenizer(TINY)
    schema = {"type": "object", "properties": {"a second request": {"type": "integer"}}}
    first = matchers(Request(schema=schema).form, tokenizer, 1)[0].allowed([])
    assert compiled
    compiled.clear()
    assert (matchers(Request(schema=schema).form, tokenizer, 2)[1].allowed([]) == first).all()
    assert compiled == []
    matchers(Request(schema=schema).form, other, 1)
    assert compiled


def test_conversations_and_tools_compile_a_form_once(compiled):
    model, tokenizer = load("tiny")
    tools = [{"name": "asked_twice", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}]
    for number in range(2):
        list(Conversation(model, tokenizer).send("Hi.", tools=tools, max_tokens=3))
        generate(model, tokenizer, "Hi.", regex="a form asked for twice", max_tokens=3)
        assert bool(compiled) is (number == 0)
        compiled.clear()


def test_forms_used_last_are_kept_within_bounds(monkeypatch):
    monkeypatch.setattr(spelling, "_FORMS_KEPT", 3)
    monkeypatch.setattr(spelling, "_CHARACTERS_KEPT", 10)
    kept, made = spelling.Kept(), []

    def get(text):
        return kept.get(("regex", text), lambda: made.append(text) or text.upper())

    for text in ("a", "b", "c", "a", "d"):  # "b" was used longest ago
        assert get(text) == text.upper()
    assert made == [*"abcd"]
    for text in ("a", "c", "d", "b"):
        get(text)
    assert made == [*"abcdb"]
    get("x" * 11)  # keeps none and moves none
    get("x" * 11)
    get("d")
    assert made == [*"abcdb", "x" * 11, "x" * 11]
    get("y" * 9)  # leaves room for one character
    get("d")
    get("b")
    assert made[7:] == ["y" * 9, "b"]
    with pytest.raises(ZeroDivisionError):
        kept.get(("regex", "bad"), lambda: 1 / 0)
    assert kept.get(("regex", "bad"), lambda: "good") == "good"


def test_threads_that_answer_in_one_form_do_not_share_their_places(tokenizer):
    form = Form("regex", "(ab|ba|ä|[0-9]{3} )*[a-f]{2,40}")

    def run(seed):
        rng, answer, masks = random.Random(seed), [], []
        ours = matchers(form, tokenizer, 1)[0]
        while len(answer) < 40 and (not answer or answer[-1] not in tokenizer.stop_ids):
            mask = ours.allowed(answer)
            masks.append(mask.nonzero()[0].tolist())
            answer.append(rng.choice(masks[-1]))
        return masks

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(run, range(24)))
    assert together == [run(seed) for seed in range(24)]
    assert len({len(masks) for masks in together}) > 1


def test_what_is_kept_of_forms_goes_with_the_tokenizer():
    tokenizer = read_tokenizer(TINY)
    matchers(Form("regex", "a"), tokenizer, 1)
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None
