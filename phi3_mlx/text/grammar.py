"""What an answer must look like, and which tokens may come next: a constraint and a matcher over ids. Calls no model.

The automaton is llguidance's. It gets the vocabulary as bytes, so that every kind of tokenizer goes the same way, and
the text that it matches is the one that the answer shows.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ..errors import OptionError
from .deep import call_deep
from .schema_limits import as_followed, fault_of, schemas_in
from .spelling import Kept, guidance_library, ids_known, spelling
from .tool_grammar import CallForm

if TYPE_CHECKING:
    import numpy as np

    from .vocabulary import Tokenizer

# No white space between the parts of JSON: a model that may write some may never end.
_COMPACT = {
    "whitespace_flexible": False,
    "whitespace_pattern": None,
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,  # refuses keywords that it would else ignore
    "coerce_one_of": False,
    # One spelling for each string: a key that is excluded could else be written another way.
    "json_allowed_escapes": '"\\bfnrt',
    "json_allow_general_unicode_escapes": False,
}
# Arguments of a call are spelled as models were shown them, and as `json.dumps` writes them in later prompts.
_AS_WRITTEN = {**_COMPACT, "item_separator": ", ", "key_separator": ": "}
# For a vocabulary that cannot spell every text.
_NO_FORCING = '%llguidance {"no_forcing": true}\n'
# Characters of a constraint that can be followed: one of more rules takes seconds at a token.
_MOST_CHARACTERS = {"schema": 1_000_000, "choices": 1_000_000, "tools": 1_000_000, "regex": 100_000, "grammar": 100_000}
_LARK_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)")

_faults: Kept[str] = Kept()

FormKind = Literal["schema", "regex", "grammar", "choices"]


class Form(NamedTuple):
    """What all of an answer's text must be.

    `kind` says how `text` is read: as a JSON schema, a regular expression in Rust's syntax, a grammar in llguidance's
    form of Lark, a JSON list of the texts to choose from, or what `tool_grammar.CallForm` holds.
    """

    kind: FormKind | Literal["tools"]
    text: str


def check_form(form: Form) -> None:
    """OptionError, with the place, for a constraint that is none, or has a keyword of JSON schema without support."""
    fault = _faults.get(form, lambda: _fault(form))
    if fault:
        raise OptionError(f"{form.kind} {fault}")


def matchers(form: Form, tokenizer: Tokenizer, count: int) -> list[AnswerMatcher]:
    """As many matchers, each at the beginning of an answer. The form is compiled once for several requests."""
    check_form(form)
    if not tokenizer.stop_ids:
        raise OptionError(f"{form.kind} needs a token that ends an answer, and this tokenizer names none")
    first = spelling(tokenizer).matchers.get(form, lambda: _first(form, tokenizer))
    return [AnswerMatcher(first.deep_copy(), tokenizer) for _ in range(count)]


def _first(form: Form, tokenizer: Tokenizer) -> Any:
    """The library's matcher at the beginning of an answer."""
    first = _begun(form, tokenizer, "")
    allowed = AnswerMatcher(first, tokenizer).allowed([])  # raises where no text fits
    assert allowed is not None
    if tokenizer.drops_first_space:
        # What is generated may begin with a space that is not shown, and must if the text shown begins with another.
        spaced = any(tokenizer.token_bytes(int(token)).startswith(b" ") for token in allowed.nonzero()[0])
        first = _begun(form, tokenizer, '" " ' if spaced and form.kind != "tools" else '" "? ')
    return first


class AnswerMatcher:
    """Follows one answer, token by token; of an answer that goes back, a draft's, it forgets what was taken back.

    A text that the form leaves no choice of is spelled as the tokenizer spells it. All else may be spelled in any way.
    """

    def __init__(self, matcher: Any, tokenizer: Tokenizer):
        import numpy as np

        self._matcher, self._tokenizer = matcher, tokenizer  # which the matcher asks how a text is spelled
        self._size, self._stop_ids = ids_known(tokenizer), tokenizer.stop_ids
        self._seen: list[int] = []
        self._bits = np.zeros(-(-self._size // 32), dtype=np.uint32)
        self._filled: int | None = None  # for how many tokens seen `_bits` says what comes next

    def allowed(self, answer: Sequence[int]) -> np.ndarray | None:
        """1 for each id that may come next, else 0 (ids,), uint8; None if no answer can begin like this.

        The tokenizer's stop ids are among them where the answer may end. Raises OptionError if the constraint turns
        out to be too large to be followed, or one that no text fits.
        """
        import numpy as np

        if not self._fill(answer):
            return None
        return np.unpackbits(self._bits.view(np.uint8), count=self._size, bitorder="little")

    def forced(self, answer: Sequence[int], most: int) -> list[int]:
        """The ids that must follow, `most` at most: each is the only one allowed in its place, and no stop id.

        They end before what the constraint cannot follow, which `allowed` says.
        """
        ids: list[int] = []
        with contextlib.suppress(OptionError):
            while len(ids) < most and self._fill([*answer, *ids]):
                (places,) = self._bits.nonzero()
                bits = int(self._bits[places[0]]) if len(places) == 1 else 0
                token = 32 * int(places[0]) + bits.bit_length() - 1
                if bits.bit_count() != 1 or token in self._stop_ids:
                    break
                ids.append(token)
        return ids

    def _fill(self, answer: Sequence[int]) -> bool:
        """Let `_bits` say what may come next; False if no answer can begin like this."""
        if not self._follow([*answer]):
            return False
        if self._filled != len(self._seen):
            self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
            self._check()
            self._filled = len(self._seen)
        return True

    def _follow(self, answer: list[int]) -> bool:
        """Read `answer` from where it differs from what was read; whether all of it can be."""
        shared = len(self._seen)
        if answer[:shared] != self._seen:
            pairs = enumerate(zip(answer, self._seen, strict=False))
            shared = next((n for n, (a, b) in pairs if a != b), min(len(answer), shared))
            self._matcher.rollback(len(self._seen) - shared)
            del self._seen[shared:]
            self._filled = None
        new = answer[shared:]
        text = next((n for n, token in enumerate(new) if token in self._stop_ids or token >= self._size), len(new))
        self._seen += new[: self._matcher.try_consume_tokens(new[:text])] if text else []
        self._check()
        return len(self._seen) == len(answer)

    def _check(self) -> None:
        """OptionError where the library has given up, which is not to be taken for a token that it refuses."""
        if self._matcher.is_error():
            raise OptionError(f"the constraint cannot be followed further: {_fault_of_matcher(self._matcher)}")


def _grammars(form: Form) -> list[dict[str, Any]]:
    """The constraint as grammars of the library's own form: "answer", and those that it refers to."""
    if form.kind != "tools":
        return [{**_grammar(form), "name": "answer"}]
    calls = CallForm.read(form.text)
    parts = [{**_grammar(part, _AS_WRITTEN), "name": name} for name, part in _parts(calls).items()]
    return [{"name": "answer", "lark_grammar": calls.lark}, *parts]


def _parts(calls: CallForm) -> dict[str, Form]:
    """What a grammar of calls refers to: each tool's arguments, and what a text must be."""
    parts = {f"arguments_{n}": Form("schema", schema) for n, (_, schema) in enumerate(calls.tools)}
    return parts if calls.text is None else {**parts, "text": Form(*calls.text)}  # type: ignore[arg-type]


def _grammar(form: Form, json_form: Mapping[str, Any] = _COMPACT) -> dict[str, Any]:
    """The constraint as a grammar of the library's own form."""
    grammars, (kind, text) = guidance_library().LLMatcher, form
    if kind == "schema":
        made = grammars.grammar_from_json_schema(json.dumps(as_followed(json.loads(text))), overrides=json_form)
    elif kind == "regex":
        made = grammars.grammar_from_regex(text)
    else:
        if kind == "choices":
            # One lexeme: the parser could not tell thousands of them apart.
            text = "start: ANY\nANY: " + " | ".join(json.dumps(each, ensure_ascii=False) for each in json.loads(text))
        return {"lark_grammar": text}
    grammar: dict[str, Any] = json.loads(made)["grammars"][0]
    return grammar


def _begun(form: Form, tokenizer: Tokenizer, space: str) -> Any:
    """The library's matcher of `space`, a part of a grammar, and what the constraint allows behind it."""
    known = spelling(tokenizer)
    whole = {"name": "all", "lark_grammar": f"{'' if known.spells_all else _NO_FORCING}start: {space}@answer"}
    grammar = json.dumps({"grammars": [whole, *_grammars(form)]})
    # The library calls itself along chains of rules or references, as deep as they are long.
    matcher = call_deep(lambda: guidance_library().LLMatcher(known.view, grammar, log_level=0))
    if matcher.is_error():
        raise OptionError(f"{form.kind} cannot be followed: {_fault_of_matcher(matcher)}")
    return matcher


def _fault_of_matcher(matcher: Any) -> str:
    message = _first_line(matcher.get_error())
    return "no text fits it" if "NoExtensionBias" in message else message


def _fault(form: Form) -> str:
    """What is wrong with a form, as the end of a sentence; "" if nothing."""
    if len(form.text) > _MOST_CHARACTERS[form.kind]:
        return f"has {len(form.text):,} characters, more than the {_MOST_CHARACTERS[form.kind]:,} that can be followed"
    if fault := _fault_not_told(form):
        return fault
    grammar = json.dumps({"grammars": _grammars(form)})
    message: str = call_deep(guidance_library().LLMatcher.validate_grammar, grammar)
    if not message or message.startswith("WARNING"):
        return ""
    kind, text = form
    if kind == "schema":
        keywords = re.fullmatch(r"Unimplemented keys: \[(.*)\]", message)
        if keywords:
            return f"has {keywords[1]}, which cannot be constrained; leave it out"
        if message.startswith("oneOf"):
            return 'has "oneOf" with branches that one value could fit, which cannot be constrained; write "anyOf"'
        return f"cannot be followed: {_first_line(message)}"
    if kind == "regex":
        return f"{text!r} is no regular expression: {_regex_fault(message)}"
    place = _LARK_PLACE.match(message)
    if place is None:
        return f"cannot be followed: {_first_line(message)}"
    line, column, rest = place.groups()
    if "regex parse error" in message:
        rest = f"{rest.split(' (in regex)')[0]}, {_regex_fault(message)}"
    return f"has an error in line {line}, column {column}: {rest}"


def _fault_not_told(form: Form) -> str:
    """What the library would not tell: numbers that end the process, and the end of an escape, which it drops."""
    kind, text = form
    if kind == "regex" and (len(text) - len(text.rstrip("\\"))) % 2:
        return f"{text!r} is no regular expression: incomplete escape sequence, at character {len(text)}"
    if form.kind == "tools":
        return _fault_of_tools(CallForm.read(form.text))
    schemas = [json.loads(form.text)] if form.kind == "schema" else []
    schemas += schemas_in(form.text) if form.kind == "grammar" else []
    return next(filter(None, map(fault_of, schemas)), "")


def _fault_of_tools(calls: CallForm) -> str:
    for (name, _), part in zip([*calls.tools, ("", "")], _parts(calls).values(), strict=False):
        if fault := _fault(part):
            return f"{name}: parameters {fault}" if name else f"{part.kind} {fault}"
    return ""


def _regex_fault(message: str) -> str:
    """What a message of several lines, which draws an arrow under the place, says of a regular expression."""
    lines = message.splitlines()
    arrow = next((line for line in lines if line.strip(" ^") == "" and "^" in line), None)
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), None)
    if reason is None:  # boundaries within it: "lookarounds not supported yet; WordUnicode in regex /.../"
        reason = _first_line(message).split(" (in regex): ")[-1].split(" in regex /")[0]
    return reason if arrow is None else f"{reason}, at character {arrow.index('^') - 3}"  # behind a margin of four


def _first_line(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return ": ".join([lines[0].removesuffix(":"), *errors]) if lines else "the grammar is empty"
