"""From a model directory's tokenizer to a GGUF file's metadata: the other way of `tokenizer.py`.

llama.cpp has two kinds that the family needs. "llama" is SentencePiece: of two neighbours those are joined whose whole
has the best score. "gpt2" is byte-level BPE: merges in their order, inside the words that a rule of `words.py` cuts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from ...config import read_json
from ...errors import TokenizerError
from ...text.pieces import piece_types
from ...text.ranks import read_ranks
from ...text.streaming import bytes_to_symbols, fallback_byte
from ...text.tokenizer import Tokenizer
from .tokenizer import tokenizer_files
from .words import TokenKind, rule_name

_ADDED_SCORE, _PADDING_SCORE = -1000.0, -10000.0  # llama.cpp's converter's; nothing is ever joined to these tokens


def vocabulary_metadata(directory: Path, tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata `tokenizer.…` of the tokenizer in `directory`, padded to the `rows` of the model's embedding.

    Raises TokenizerError for a tokenizer that llama.cpp cannot follow.
    """
    if tokenizer.vocab_size > rows:
        raise TokenizerError(
            f"{directory} has {tokenizer.vocab_size:,} tokens, but the model's embedding has {rows:,} rows; they are "
            "of different models"
        )
    if (directory / "tokenizer.json").exists():
        kind = _of_json(directory / "tokenizer.json", tokenizer, rows)
    elif (directory / "tokenizer.model").exists():
        kind = _of_sentencepiece(directory / "tokenizer.model", tokenizer, rows)
    else:
        kind = _of_ranks(next(iter(sorted(directory.glob("*.tiktoken")))), tokenizer, rows)
    return {f"tokenizer.ggml.{key}": value for key, value in (kind | _roles(tokenizer)).items()} | _templates(tokenizer)


def unnamed_stops(tokenizer: Tokenizer) -> list[str]:
    """The stop tokens that llama.cpp is told of in no way: beyond its three roles, and not among those it knows."""
    told = {*_stops(tokenizer).values()}
    left = sorted(tokenizer.stop_ids - told)
    return [token for i in left if (token := tokenizer.id_to_token(i)) not in (None, *_ENDS_BY_NAME)]


# What ends an answer for llama.cpp under these names, whatever the metadata says (llama-vocab.cpp, special_eog_ids).
_ENDS_BY_NAME = ("<|end|>", "<|im_end|>", "<|endoftext|>")


def _stops(tokenizer: Tokenizer) -> dict[str, int]:
    """The roles that end an answer: of the text, of a turn, and one more, which llama.cpp calls a message's."""
    ends = {} if tokenizer.eos_token_id is None else {"eos_token_id": tokenizer.eos_token_id}
    others = [i for i in sorted(tokenizer.stop_ids) if i != tokenizer.eos_token_id]
    # The turn's own end first, then what llama.cpp does not know by its name.
    others.sort(key=lambda i: (tokenizer.id_to_token(i) not in _ENDS_BY_NAME[:2],
                               tokenizer.id_to_token(i) in _ENDS_BY_NAME))  # fmt: skip
    roles = ("eot_token_id", "eom_token_id") if ends else ("eos_token_id", "eot_token_id", "eom_token_id")
    return ends | dict(zip(roles, others, strict=False))


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of tokens with a role, and whether a prompt begins with BOS: explicitly, because defaults differ by kind."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "padding_token_id": tokenizer.pad_token_id} | _stops(tokenizer)
    begins = tokenizer.add_bos_token and tokenizer.bos_token_id is not None
    return {key: value for key, value in ids.items() if value is not None} | {
        "add_bos_token": begins,
        "add_eos_token": False,
    }


def _templates(tokenizer: Tokenizer) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if tokenizer.chat_template is not None:
        result["tokenizer.chat_template"] = tokenizer.chat_template
    if tokenizer.named_templates:
        result["tokenizer.chat_templates"] = sorted(tokenizer.named_templates)
        result |= {f"tokenizer.chat_template.{name}": text for name, text in tokenizer.named_templates.items()}
    return result


def _listed(ordinary: Mapping[int, tuple[str, TokenKind]], tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """Tokens and their types: the `ordinary` ones, the added ones, and padding where there is neither.

    A token that anyone may write is user-defined, which llama.cpp finds in any text; the others are control tokens.
    """
    tokens, kinds = [f"[PAD{i}]" for i in range(rows)], [int(TokenKind.UNUSED)] * rows
    for i, (token, kind) in ordinary.items():
        tokens[i], kinds[i] = token, int(kind)
    for added in tokenizer.added_tokens.values():
        tokens[added.id] = added.content
        if kinds[added.id] != TokenKind.UNKNOWN:
            anyones = tokenizer.encode(added.content) == [added.id]
            kinds[added.id] = int(TokenKind.USER_DEFINED if anyones else TokenKind.CONTROL)
    if len({*tokens}) != rows:
        twice = next(token for n, token in enumerate(tokens) if tokens.index(token) != n)
        raise TokenizerError(f"the tokenizer has {twice!r} twice, which llama.cpp refuses")
    return {"tokens": tokens, "token_type": kinds}


def _of_json(path: Path, tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    description = read_json(path, TokenizerError)
    model = description.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        _refuse(path, f"is of the kind {model.get('type')}, and phi3 in llama.cpp has BPE and SentencePiece's BPE")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    if not any(step["type"] == "ByteLevel" for step in _steps(description.get("decoder"))):
        return _of_json_pieces(path, description, merges, tokenizer, rows)
    rule = rule_name(description.get("pre_tokenizer"), whole_words=bool(model.get("ignore_merges")))
    if rule is None or description.get("normalizer") is not None:
        what = "cuts texts into words by a rule" if rule is None else "normalizes texts in a way"
        _refuse(path, f"{what} that llama.cpp has no name for")
    ordinary = {i: (token, TokenKind.NORMAL) for token, i in model["vocab"].items()}
    return {
        "model": "gpt2",
        "pre": rule,
        **_listed(ordinary, tokenizer, rows),
        "merges": [" ".join(merge) for merge in merges],
    }


def _of_json_pieces(
    path: Path, description: Mapping[str, Any], merges: Sequence[tuple[str, ...]], tokenizer: Tokenizer, rows: int
) -> dict[str, Any]:
    model, unknown = description["model"], description["model"].get("unk_token")
    steps = [step["type"] for key in ("normalizer", "pre_tokenizer") for step in _steps(description.get(key))]
    if not {*steps} <= {"Prepend", "Replace", "Metaspace"}:
        _refuse(path, f"normalizes texts in a way that llama.cpp does not ({', '.join(steps)})")
    scores = _scores(merges, model["vocab"])
    ordinary = {i: (token, _piece_kind(token, unknown)) for token, i in model["vocab"].items()}
    made = {
        "model": "llama",
        "pre": "default",
        **_listed(ordinary, tokenizer, rows),
        "scores": [scores.get(i, _PADDING_SCORE) for i in range(rows)],
        "add_space_prefix": _begins_with_space(description),
    }
    if unknown in model["vocab"]:
        made["unknown_token_id"] = model["vocab"][unknown]
    _score_added(made, tokenizer)
    read = tokenizer_files({f"tokenizer.ggml.{key}": value for key, value in made.items()}, str(path))
    if [tuple(merge) for merge in read.tokenizer["model"]["merges"]] != list(merges):
        _refuse(path, "has merges that scores of tokens cannot say, which are all that llama.cpp has for SentencePiece")
    return made


def _scores(merges: Sequence[tuple[str, ...]], vocabulary: Mapping[str, int]) -> dict[int, float]:
    """A score for each token, by its id: the earlier its first merge, the better. What no merge makes needs none."""
    scores: dict[int, float] = {}
    for left, right in merges:
        scores.setdefault(vocabulary[left + right], -float(len(scores)))
    return {i: scores.get(i, -float(len(scores))) for i in vocabulary.values()}


def _score_added(made: dict[str, Any], tokenizer: Tokenizer) -> None:
    for token in tokenizer.added_tokens.values():
        made["scores"][token.id] = _ADDED_SCORE


def _piece_kind(token: str, unknown: str | None) -> TokenKind:
    if token == unknown:
        return TokenKind.UNKNOWN
    return TokenKind.NORMAL if fallback_byte(token) is None else TokenKind.BYTE


def _begins_with_space(description: Mapping[str, Any]) -> bool:
    steps = [*_steps(description.get("normalizer")), *_steps(description.get("pre_tokenizer"))]
    return any(step["type"] == "Prepend" or step.get("prepend_scheme") in ("first", "always") for step in steps)


def _steps(description: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if description is None:
        return []
    lists = (description[key] for key in ("normalizers", "pretokenizers", "decoders") if key in description)
    return next(lists, [description])


def _of_sentencepiece(path: Path, tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    size = model.get_piece_size()
    ids = range(size)
    kinds = [TokenKind(kind) for kind in piece_types(model.serialized_model_proto())]  # the same numbers
    made = {
        "model": "llama",
        "pre": "default",
        **_listed({i: (model.id_to_piece(i), kinds[i]) for i in ids}, tokenizer, rows),
        "scores": [*(model.get_score(i) for i in ids), *[_PADDING_SCORE] * (rows - size)],
        "add_space_prefix": model.id_to_piece(model.encode("a")[0]).startswith("▁"),
    }
    if model.unk_id() >= 0:
        made["unknown_token_id"] = model.unk_id()
    _score_added(made, tokenizer)
    return made


def _of_ranks(path: Path, tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """tiktoken's ranks are cl100k_base's, whose words llama.cpp calls "dbrx"."""
    ranks = read_ranks(path)
    ordinary = {i: (bytes_to_symbols(token), TokenKind.NORMAL) for token, i in ranks.items()}
    merges = [" ".join(map(bytes_to_symbols, _halves(token, ranks))) for token in ranks if len(token) > 1]
    return {"model": "gpt2", "pre": "dbrx", **_listed(ordinary, tokenizer, rows), "merges": merges}


def _halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge makes `token`: what is left of its bytes when all merges before its own are done."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [(ranks.get(left + right, len(ranks)), n) for n, (left, right) in enumerate(pairwise(parts))]
        rank, n = min(joined)
        if rank >= ranks[token]:
            raise TokenizerError(f"tiktoken's ranks are damaged: no merges make {token!r}; download the file again")
        parts[n : n + 2] = [parts[n] + parts[n + 1]]
    return parts[0], parts[1]


def _refuse(path: Path, why: str) -> NoReturn:
    raise TokenizerError(f"{path} {why}; the model cannot be exported as GGUF")
