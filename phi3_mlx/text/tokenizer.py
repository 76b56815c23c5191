"""A model directory's tokenizer: its vocabulary, and the settings in its other files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import files
from ..config import read_json
from ..errors import OptionError, TokenizerError
from ..fields import Fields, shorten
from ..paths import has_tokenizer, no_model
from .added_tokens import AddedToken
from .json_tokenizer import JsonTokenizer
from .sentencepiece_tokenizer import SentencePieceTokenizer
from .tiktoken_tokenizer import TiktokenTokenizer
from .vocabulary import MOST_IDS, Tokenizer

__all__ = ["Tokenizer", "read_tokenizer"]

# In order of preference: `tokenizer.json` is the reference; the others are read if it is absent.
_FILES = {"tokenizers": "tokenizer.json", "sentencepiece": "tokenizer.model", "tiktoken": "*.tiktoken"}

# The bos, eos and pad tokens if no file names them: the first of these that is in the vocabulary.
_USUAL = {"bos_token": ("<s>",), "eos_token": ("<|endoftext|>", "</s>"), "pad_token": ("<|endoftext|>", "</s>")}


def read_tokenizer(directory: Path, *, backend: str | None = None, of_family: bool = True) -> Tokenizer:
    """The tokenizer of a model directory: `tokenizer.json`, else `tokenizer.model`, else `*.tiktoken`.

    `backend` ("tokenizers", "sentencepiece" or "tiktoken") chooses one of them. `stop_ids` is the union of
    `eos_token_id` in generation_config.json, in config.json and of the tokenizer, and of the family's end-of-turn
    tokens by name. config.json alone is not enough, because the models end their turns with `<|end|>` or `<|im_end|>`.
    Of a model that is not `of_family` its files are taken at their word, as mlx-lm takes them: what ends an answer,
    and whether a chat begins with BOS.

    Raises TokenizerError for files that are missing, damaged or contradict each other, OptionError for an unknown
    `backend`.
    """
    directory = Path(directory)
    kind, path = _find(directory, backend)
    config = _read_json(directory / "tokenizer_config.json")
    given = Fields(config, directory / "tokenizer_config.json", TokenizerError)
    names = Fields(_read_json(directory / "special_tokens_map.json") | config, given.source, TokenizerError)
    declared = _declared_tokens(directory, given, names)
    tokenizer: Tokenizer
    if kind == "tokenizers":
        tokenizer = JsonTokenizer(path, declared, overrule=bool(config.get("added_tokens_decoder")))
    elif kind == "sentencepiece":
        tokenizer = SentencePieceTokenizer(path, declared)
    else:
        tokenizer = TiktokenTokenizer(path, declared)
    tokenizer.bos_token_id = _named_id(tokenizer, names, "bos_token")
    tokenizer.eos_token_id = _named_id(tokenizer, names, "eos_token")
    tokenizer.pad_token_id = _named_id(tokenizer, names, "pad_token")
    tokenizer.special_tokens = _special_tokens(tokenizer, names)
    if "add_bos_token" in config:
        tokenizer.add_bos_token = given.flag("add_bos_token", False)
    elif isinstance(tokenizer, JsonTokenizer):  # transformers 5 leaves the key out when it saves
        tokenizer.add_bos_token = tokenizer.frame()[:1] == [tokenizer.bos_token_id]
    templates = _chat_templates(directory, config)
    tokenizer.chat_template = templates.pop("default", None)
    tokenizer.named_templates = templates
    tokenizer.stop_ids = frozenset(_declared_stops(directory, tokenizer))
    if of_family:
        tokenizer.stop_ids |= _usual_stops(tokenizer)
    tokenizer.chat_begins_with_bos = of_family
    return tokenizer


def _find(directory: Path, backend: str | None) -> tuple[str, Path]:
    if backend is not None and backend not in _FILES:
        raise OptionError(f"backend {backend!r} is unknown: choose {', '.join(_FILES)}")
    wanted = {backend: _FILES[backend]} if backend else _FILES
    for kind, pattern in wanted.items():
        for path in sorted(directory.glob(pattern)):
            return kind, path
    if not (directory / "config.json").exists() and not has_tokenizer(directory):
        raise TokenizerError(no_model(directory))
    raise TokenizerError(
        f"{directory} has no tokenizer: looked for {', '.join(wanted.values())}; copy it there from the original model"
    )


def _declared_tokens(directory: Path, config: Fields, names: Fields) -> list[AddedToken]:
    """The added tokens of tokenizer_config.json with their flags, by id; else those of added_tokens.json."""
    tokens: dict[int, AddedToken] = {}
    decoder = config.fields("added_tokens_decoder")
    for number in decoder.raw:
        entry = decoder.fields(number)
        if not number.isdecimal() or len(number) > 9 or int(number) >= MOST_IDS or not entry.text("content"):
            decoder.fail(number, "a token's id, and its content")
        special = entry.flag("special", False)
        flags = {flag: entry.flag(flag, False) for flag in ("lstrip", "rstrip", "single_word")}
        flags["normalized"] = entry.flag("normalized", not special)
        tokens[int(number)] = AddedToken(int(number), entry.text("content"), special, **flags)
    if not tokens:
        roles = _special_names(names)
        source = directory / "added_tokens.json"
        listed = Fields(_read_json(source), source, TokenizerError)
        for content in listed.raw:
            if not content:
                listed.fail(content, "a token that is not empty")
            token = AddedToken(listed.whole(content, most=MOST_IDS - 1), content)
            control = token.marked or content in roles
            tokens[token.id] = replace(token, special=control, normalized=not control)
    return [tokens[number] for number in sorted(tokens)]


def _special_names(names: Fields) -> set[str]:
    """The strings that the files give a role: bos_token and the like, and the additional special tokens."""
    given = [value for key, value in names.raw.items() if key.endswith("_token")]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        given += names.raw[key] if isinstance(names.raw.get(key), list) else []
    contents = (value.get("content") if isinstance(value, dict) else value for value in given)
    return {content for content in contents if isinstance(content, str)}


def _named_id(tokenizer: Tokenizer, names: Fields, role: str) -> int | None:
    """The id of the token with this `role`; None if the files say that there is none, or name an unknown token."""
    if role in names.raw:
        if names.raw[role] is None:
            return None
        content = names.fields(role).text("content") if isinstance(names.raw[role], dict) else names.text(role)
        return tokenizer.token_to_id(content)
    return next((token_id for name in _USUAL[role] if (token_id := tokenizer.token_to_id(name)) is not None), None)


def _special_tokens(tokenizer: Tokenizer, names: Fields) -> dict[str, str]:
    """The tokens that a chat template knows by name: `bos_token`, `eos_token`, and all others that the files name."""
    usual = {"bos_token": tokenizer.bos_token_id, "eos_token": tokenizer.eos_token_id}
    tokens = {role: tokenizer.id_to_token(i) for role, i in usual.items() if i is not None and role not in names.raw}
    extra = names.raw.get("extra_special_tokens")
    named = {key: value for key, value in names.raw.items() if key.endswith("_token")}
    for key, value in (named | (extra if isinstance(extra, dict) else {})).items():
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[key] = content
    return {role: content for role, content in tokens.items() if content is not None}


def _chat_templates(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """The chat templates by name; the main one is "default".

    From chat_template.jinja, else chat_template.json, else tokenizer_config.json, which may list several; and from
    additional_chat_templates/NAME.jinja.
    """
    templates: dict[str, str] = {}
    main = directory / "chat_template.jinja"
    if not main.exists():
        source = directory / "chat_template.json"
        template = _read_json(source).get("chat_template")
        if template is None:
            source, template = directory / "tokenizer_config.json", config.get("chat_template")
        for entry in template if isinstance(template, list) else [{"name": "default", "template": template}]:
            name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            if isinstance(name, str) and isinstance(text, str):
                templates[name] = text
            elif template is not None:
                raise TokenizerError(f"{source} has a chat_template that is no text: {shorten(entry)}")
    for path in [main, *sorted(directory.glob("additional_chat_templates/*.jinja"))]:
        try:
            if path != main or path.exists():
                templates["default" if path == main else path.stem] = files.read_text(path)
        except OSError as error:
            raise TokenizerError(f"{path} is not readable: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path} is not readable: {error}") from None
    return templates


def _usual_stops(tokenizer: Tokenizer) -> set[int]:
    """The family's tokens that end a turn, by name."""
    names = ["<|end|>", "<|im_end|>", "<|endoftext|>"]
    if tokenizer.token_to_id("<0x0A>") is not None:
        # The SentencePiece models (mini, medium, 3.5) may open the next turn instead of ending their own.
        names.append("<|assistant|>")
    return {token_id for name in names if (token_id := tokenizer.token_to_id(name)) is not None}


def _declared_stops(directory: Path, tokenizer: Tokenizer) -> set[int]:
    """What ends an answer as the files say: EOS, and `eos_token_id` of two of them."""
    ids = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    for source in (directory / "generation_config.json", directory / "config.json"):
        listed = _read_json(source).get("eos_token_id")
        for token_id in listed if isinstance(listed, list) else [] if listed is None else [listed]:
            if type(token_id) is not int or not 0 <= token_id < MOST_IDS:
                raise TokenizerError(f"{source} has eos_token_id {shorten(listed)}: it must be an id or a list of ids")
            ids.add(token_id)
    return ids


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} if there is no such file."""
    return read_json(path, TokenizerError) if path.exists() else {}
