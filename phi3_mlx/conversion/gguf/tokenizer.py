"""From a GGUF file's metadata to the tokenizer files of a model directory.

GGUF knows the vocabulary, but not in the form of `tokenizer.json`: a SentencePiece one ("llama") has scores where
that has merges, and a byte-level one ("gpt2") names the rule that cuts text into words where that spells it out. The
names are llama.cpp's (`tokenizer.ggml.pre`), the rules those of the models they are named after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ...errors import TokenizerError
from .words import PRE_TOKENIZERS, WHOLE_WORDS, TokenKind, byte_level

_ADDED = (TokenKind.UNKNOWN, TokenKind.CONTROL, TokenKind.USER_DEFINED)
_PREFIX = "tokenizer.ggml."
# llama.cpp calls every `<|…|>` a control token; Phi-4-mini's own files do not call these so, and answers show them.
_TOOL_TOKENS = ("<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>")


@dataclass(frozen=True)
class TokenizerFiles:
    """How many ids there are, and what tokenizer.json, tokenizer_config.json and generation_config.json hold."""

    tokenizer_size: int  # one more than the highest id
    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]


def tokenizer_files(metadata: Mapping[str, Any], source: str) -> TokenizerFiles:
    """The tokenizer of a GGUF file, from its metadata; `source` names the file in the TokenizerError.

    Of a Phi-3 chat vocabulary the control tokens get the flag that GGUF has no place for: they swallow the white
    space after them, as in the released tokenizer.json of Phi-3, Phi-3.5 and Phi-4-mini.
    """
    return _Reader(metadata, source).files()


class _Reader:
    def __init__(self, metadata: Mapping[str, Any], source: str):
        self.metadata, self.source = metadata, source
        self.kind = self.get("model", str)
        if self.kind not in ("llama", "gpt2"):
            self.fail(f"has a tokenizer of the kind {self.kind!r}; llama (SentencePiece) and gpt2 can be converted")
        self.tokens: list[str] = self.get("tokens", list)
        self.types: list[int] = self.get("token_type", list)
        if len(self.tokens) != len(self.types):
            self.fail(f"has {len(self.tokens):,} tokens but {len(self.types):,} token types")
        # Padding of the embedding ("[PAD32011]") is no vocabulary; further down it holds the place of its id.
        used = max((i for i, kind in enumerate(self.types) if kind != TokenKind.UNUSED), default=-1) + 1
        self.vocab = {token: i for i, token in enumerate(self.tokens[:used])}
        if len(self.vocab) != used:
            twice = next(token for i, token in enumerate(self.tokens[:used]) if self.vocab[token] != i)
            self.fail(f"has the token {twice!r} twice")
        # Added tokens at the end are no part of the model's vocabulary, as in the files they came from.
        ordinary = [i for i, kind in enumerate(self.types[:used]) if kind not in _ADDED]
        self.size = max(ordinary, default=-1) + 1
        self.pre = "" if self.kind == "llama" else self.get("pre", str)
        if self.kind == "gpt2" and self.pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            self.fail(f"has the pre-tokenizer {self.pre!r}, whose rules this package does not know; known: {known}")

    def fail(self, why: str) -> NoReturn:
        raise TokenizerError(f"{self.source} {why}")

    def get(self, key: str, kind: type) -> Any:
        value = self.metadata.get(_PREFIX + key)
        if not isinstance(value, kind):
            self.fail(
                f"has no {_PREFIX}{key} in its metadata, which its tokenizer needs; use a newer GGUF of the model"
            )
        return value

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.metadata.get(_PREFIX + key, default))

    def named(self, role: str) -> int | None:
        """The id that metadata gives a role ("bos"), None where it gives none."""
        number = self.metadata.get(f"{_PREFIX}{role}_token_id")
        if number is None:
            return None
        if type(number) is not int or not 0 <= number < len(self.tokens):
            self.fail(f"has {_PREFIX}{role}_token_id {number!r}, which is none of its {len(self.tokens):,} tokens")
        return number

    def files(self) -> TokenizerFiles:
        bos, eos, pad, unknown = (self.named(role) for role in ("bos", "eos", "padding", "unknown"))
        if unknown is None and TokenKind.UNKNOWN in self.types:
            unknown = self.types.index(TokenKind.UNKNOWN)
        add_bos = self.flag("add_bos_token", self.kind == "llama" or self.pre in WHOLE_WORDS) and bos is not None
        added = self.added_tokens()
        name = lambda number: None if number is None else self.tokens[number]  # noqa: E731
        config = {
            "add_bos_token": add_bos,
            "add_eos_token": self.flag("add_eos_token", False),
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
            },
            "bos_token": name(bos),
            "clean_up_tokenization_spaces": False,
            "eos_token": name(eos),
            "pad_token": name(pad),
            # Reads tokenizer.json as it is, where a model's own class would rebuild it.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": name(unknown),
        }
        prefix = "tokenizer.chat_template"
        templates = {"default": self.metadata.get(prefix)}
        templates |= {
            key.removeprefix(f"{prefix}."): self.metadata[key] for key in self.metadata if f"{prefix}." in key
        }
        listed = [{"name": name, "template": text} for name, text in templates.items() if isinstance(text, str)]
        if listed:
            alone = [entry["name"] for entry in listed] == ["default"]
            config["chat_template"] = listed[0]["template"] if alone else listed
        stops = [number for role in ("eos", "eot", "eom") if (number := self.named(role)) is not None]
        generation = {"bos_token_id": bos, "eos_token_id": list(dict.fromkeys(stops)), "pad_token_id": pad}
        generation = {key: value for key, value in generation.items() if value not in (None, [])}
        parts = self.sentencepiece(unknown) if self.kind == "llama" else self.byte_level()
        return TokenizerFiles(
            len(self.vocab),
            {
                "version": "1.0",
                "truncation": None,
                "padding": None,
                "added_tokens": added,
                **parts,
                "post_processor": self.post_processor(bos) if add_bos and bos is not None else None,
            },
            config,
            generation,
        )

    def added_tokens(self) -> list[dict[str, Any]]:
        phi3 = "<|user|>" in self.vocab and "<|end|>" in self.vocab
        plain = ("<unk>", "<s>", "<|endoftext|>", "<|endofprompt|>")
        return [
            {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": phi3 and token not in plain,
                "normalized": False,
                "special": self.types[number] != TokenKind.USER_DEFINED and token not in _TOOL_TOKENS,
            }
            for token, number in self.vocab.items()
            if self.types[number] in _ADDED and token
        ]

    def byte_level(self) -> dict[str, Any]:
        merges = [merge.split(" ") for merge in self.get("merges", list)]
        for n, pair in enumerate(merges):
            if len(pair) != 2 or any(piece not in self.vocab for piece in (*pair, "".join(pair))):
                self.fail(
                    f"has the merge {' '.join(pair)!r} (number {n}), whose parts or whole are not in its vocabulary"
                )
        return {
            "normalizer": None,
            "pre_tokenizer": PRE_TOKENIZERS[self.pre],
            "decoder": byte_level(True),
            "model": self.model(merges, unknown=None, ignore_merges=self.pre in WHOLE_WORDS),
        }

    def sentencepiece(self, unknown: int | None) -> dict[str, Any]:
        if self.flag("remove_extra_whitespaces", False):
            self.fail("has a tokenizer that removes white space (remove_extra_whitespaces), which no Phi-3 model does")
        scores = self.get("scores", list)
        if len(scores) != len(self.tokens):
            self.fail(f"has {len(self.tokens):,} tokens but {len(scores):,} scores")
        prefix = self.flag("add_space_prefix", True)
        spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        marks = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
        prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
        strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
        return {
            "normalizer": {"type": "Sequence", "normalizers": [*prepend, spaces]},
            "pre_tokenizer": None,
            "decoder": {"type": "Sequence", "decoders": [marks, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
            "model": self.model(
                self.merges_of(scores),
                unknown=None if unknown is None else self.tokens[unknown],
                byte_fallback=TokenKind.BYTE in self.types,
            ),
        }

    def merges_of(self, scores: list[float]) -> list[list[str]]:
        """SentencePiece joins the two neighbours whose whole has the best score: every way to cut a token in two.

        Of several ways to one token the order does not matter, as long as it is one: the one of the ids is
        that of the released files.
        """
        ordinary = {token: number for token, number in self.vocab.items() if self.types[number] == TokenKind.NORMAL}
        ranked = []
        for token, number in ordinary.items():
            for cut in range(1, len(token)):
                left, right = ordinary.get(token[:cut]), ordinary.get(token[cut:])
                if left is not None and right is not None:
                    ranked.append((-scores[number], left, right, token[:cut], token[cut:]))
        return [[left, right] for *_, left, right in sorted(ranked)]

    def model(
        self,
        merges: list[list[str]],
        *,
        unknown: str | None,
        byte_fallback: bool = False,
        ignore_merges: bool = False,
    ) -> dict[str, Any]:
        return {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": self.kind == "llama",
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": {token: number for token, number in self.vocab.items() if number < self.size},
            "merges": merges,
        }

    def post_processor(self, bos: int) -> dict[str, Any]:
        token = self.tokens[bos]
        begin = {"SpecialToken": {"id": token, "type_id": 0}}
        sequences = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
        return {
            "type": "TemplateProcessing",
            "single": [begin, sequences[0]],
            "pair": [begin, sequences[0], sequences[1]],
            "special_tokens": {token: {"id": token, "ids": [bos], "tokens": [token]}},
        }
