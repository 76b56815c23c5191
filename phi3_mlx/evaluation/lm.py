"""A model as the language model of lm-eval: what the harness asks goes through the engine.

The harness asks with texts; how they become token ids, what is cut where they are too long, and what is scored, is as
in its own `hf` backend. Three things differ on purpose: a text never gets two BOS tokens (there `loglikelihood_rolling`
scores the BOS that the tokenizer adds behind one of its own), a system message that the chat template would drop goes
to the front of the user's text, and what is cut is counted.

Importing this module needs lm-eval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from ..engine.continuations import Continued, score_each
from ..engine.prefill import common_length
from ..engine.prefixes import LEAST, PrefixStore
from ..errors import OptionError, PromptError
from ..generation.answering import answer_each
from ..generation.loading import check_loaded, check_tokenizer
from ..generation.request import Request
from ..models.decoder import Model
from ..text.chat import chat_text, template_source
from .harness_request import harness_request

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise OptionError('lm-eval is not installed: pip install "phi3-mlx[eval]"') from error

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .journal import Journal

_GENERATED = 256  # tokens of an answer at most, where the task does not say: lm-eval's default
_CONTEXTS_AT_ONCE = 256  # contexts of which is seen whether a store pays

Pair = tuple[list[int], list[int]]  # context and continuation
_Result = TypeVar("_Result")
_Finding = Generator[tuple[int, _Result], None, None]  # places, and what was found of each


class HarnessLM(LM):
    """A loaded model, for `lm_eval.simple_evaluate(model=HarnessLM(model, tokenizer), tasks=[...])`.

    `max_length`: tokens that a question may have with its answer; None: the model's context. What is longer loses its
    beginning, and `cut_prompts` counts how many did; `cut_answers` counts answers that their budget ended.
    `prefix_token_id`: what stands before a text that has nothing before it; None: BOS, else EOS. `kv_bits` and
    `kv_group_size` pack the cache, as `generate`'s. `prefixes` keeps what questions begin with; None: a store of its
    own. `seed`: of tasks that draw answers. `journal` has the answers of a run that was interrupted, and gets each that
    comes. `progress(done, total)` counts the contexts of questions that were read, or the answers. `notify` gets a
    sentence that the user should know.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        kv_bits: int | tuple[int, int] | None = None,
        kv_group_size: int | None = None,
        prefixes: PrefixStore | None = None,
        seed: int = 1234,
        force: bool = False,
        journal: Journal | None = None,
        progress: Callable[[int, int], None] | None = None,
        notify: Callable[[str], None] | None = None,
    ):
        super().__init__()
        check_loaded(model)
        check_tokenizer(tokenizer)
        context = model.config.max_position_embeddings
        if max_length is not None and not 2 <= max_length <= context:
            raise OptionError(f"max_length {max_length} is outside its range; give 2 to {context}, the model's context")
        self.max_length: int = max_length or context
        self.cut_prompts = self.cut_answers = 0
        self._model, self._tokenizer = model, tokenizer
        self._cache = Request(kv_bits=kv_bits, kv_group_size=kv_group_size, force=force)
        self._given, self._store = prefixes, PrefixStore() if prefixes is None else prefixes
        self._prefix, self._seed, self._progress, self._notify = prefix_token_id, seed, progress, notify
        self.journal = journal
        self._said: set[str] = set()

    # What lm-eval asks of a model.

    @property
    def eot_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        known = (self._prefix, self._tokenizer.bos_token_id, self._tokenizer.eos_token_id)
        prefix = next((token for token in known if token is not None), None)
        if prefix is None:
            raise OptionError("this tokenizer has neither BOS nor EOS; give prefix_token_id")
        return prefix

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval keeps prompts under: they depend on the template alone."""
        from hashlib import sha256

        return sha256(template_source(self._tokenizer).encode()).hexdigest()[:16]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the chat template; None if none is asked for."""
        if isinstance(chat_template, str):
            raise OptionError(f"a chat template is not chosen by name ({chat_template!r}); give True")
        return template_source(self._tokenizer) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages in the model's template, up to where it answers.

        Without `add_generation_prompt` the last message is the beginning of the answer.
        """
        continued = not add_generation_prompt
        return chat_text(self._tokenizer, chat_history, continued=continued, notify=self._say_once)

    def tok_encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids, with a BOS if the tokenizer adds one, or as `add_special_tokens` says; never with a second."""
        ids = self._tokenizer.encode(text, special=True)
        wanted = self._tokenizer.add_bos_token if add_special_tokens is None else add_special_tokens
        return self._tokenizer.with_bos(ids) if wanted else ids

    def count_tokens(self, text: str) -> int:
        """How many tokens of a text `loglikelihood_rolling` scores."""
        return len(self._text_ids(text))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-probability of the continuation, and whether it is the greedy one.

        White space at the end of a context counts with the continuation. An empty context is `prefix_token_id`.
        Raises PromptError for a continuation without tokens, or with more than `max_length`.
        """
        whole = [*self._pairs(request.args for request in requests)]
        pairs = [self._fitted(*pair) for pair in whole]
        self.cut_prompts += len({tuple(all_of[0]) for all_of, pair in zip(whole, pairs, strict=True) if all_of != pair})
        questions = [(request.task_name, request.doc_id) for request in requests]
        results = self._answered("loglikelihood", pairs, partial(self._scored, questions))
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, its first token behind `prefix_token_id`.

        A text longer than `max_length` is read in windows; every token is scored once, with what the window has before.
        """
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for pair in self._windows(request.args[0]):
                pairs.append(pair)
                owners.append(number)
        parts: list[list[float]] = [[] for _ in requests]
        scored = self._answered("loglikelihood_rolling", pairs, partial(self._scored, owners))
        for owner, (logprob, _) in zip(owners, scored, strict=True):
            parts[owner].append(logprob)
        totals = [math.fsum(part) for part in parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The answer to each (context, generation_kwargs), up to the first text of `until` or what ends a turn.

        A context that leaves no room for the longest answer loses its beginning. Raises OptionError for options that
        have no meaning here, and for an answer that may be as long as the context.
        """
        asked = [self._asked(place, *request.args) for place, request in enumerate(requests)]
        texts = []
        for request, (text, reason) in zip(
            requests, self._answered("generate_until", asked, self._generated), strict=True
        ):
            texts.append(text)
            self.cut_answers += reason == "length"
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    # How texts become token ids.

    def _pairs(self, asked: Iterable[tuple[str, str]]) -> Iterator[Pair]:
        """The ids of contexts and continuations; choices of one question have its ids in common."""
        last, ids = None, []
        for context, continuation in asked:
            spaces = len(context) - len(context.rstrip())
            context, continuation = context[: len(context) - spaces], context[len(context) - spaces :] + continuation
            if not context:
                yield self._behind_prefix(continuation)
                continue
            if context != last:
                last, ids = context, self.tok_encode(context)
            yield ids, self.tok_encode(context + continuation)[len(ids) :]

    def _behind_prefix(self, text: str) -> Pair:
        ids = self.tok_encode(text, add_special_tokens=False)
        return ([self.prefix_token_id], ids[1:] if ids[:1] == [self.prefix_token_id] else ids)

    def _fitted(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair, without the beginning of a context that is too long: the last token is not read."""
        if not continuation:
            raise PromptError("a choice has no tokens of its own behind its question; give it some text")
        if len(continuation) > self.max_length:
            raise PromptError(f"a choice has {len(continuation):,} tokens, and max_length is {self.max_length:,}")
        over = len(context) + len(continuation) - (self.max_length + 1)
        return context[max(over, 0) :], continuation

    def _windows(self, text: str) -> Iterator[Pair]:
        windows = get_rolling_token_windows(self._text_ids(text), self.prefix_token_id, self.max_length, 1)
        return map(make_disjoint_window, windows)

    def _text_ids(self, text: str) -> list[int]:
        """The ids of a text, without the prefix that it may begin with."""
        ids = self._tokenizer.encode(text, special=True)
        return ids[1:] if ids[:1] == [self.prefix_token_id] else ids

    def _asked(self, place: int, context: str, options: dict[str, Any]) -> tuple[list[int], Request]:
        """A prompt's ids, as many as leave room for the answer, and how it is to be answered."""
        request = harness_request(options, max_tokens=_GENERATED, seed=self._seed + place)
        room = self.max_length - request.max_tokens
        if room < 1:
            raise OptionError(
                f"answers of {request.max_tokens:,} tokens leave no room for a question in {self.max_length:,}; "
                "set max_gen_toks lower"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.cut_prompts += len(ids) > room
        return ids[-room:], request

    # How they are read.

    def _answered(self, kind: str, asked: Sequence[Any], answer: Callable[..., _Finding[Any]]) -> list[Any]:
        """What was found of each that is asked, without asking again what the journal has.

        `answer(asked, left)` gives the place of each that is `left`, and what was found, as it comes.
        """
        known = {} if self.journal is None else self.journal.begin(kind, asked)
        with closing(answer(asked, [place for place in range(len(asked)) if place not in known])) as results:
            for place, result in results:
                known[place] = result
                if self.journal is not None:
                    self.journal.add(kind, place, result)
        return [tuple(known[place]) for place in range(len(asked))]

    def _scored(
        self, questions: Sequence[Hashable], pairs: Sequence[Pair], left: Sequence[int]
    ) -> _Finding[tuple[float, bool]]:
        """The scores of pairs, each with its place, as they come. Contexts that begin alike are read in turn.

        Pairs of one of the `questions` whose contexts are the same are read together. The context alone does not say
        so: that of all plain texts is the prefix, and none would be told before the last was read.
        """
        keys = [(tuple(context), question) for (context, _), question in zip(pairs, questions, strict=True)]
        together: dict[tuple[tuple[int, ...], Hashable], list[int]] = {}
        for place in left:
            together.setdefault(keys[place], []).append(place)
        order, count = sorted(together, key=lambda key: key[0]), len({*keys})
        done = count - len(order)
        for first in range(0, len(order), _CONTEXTS_AT_ONCE):
            some = order[first : first + _CONTEXTS_AT_ONCE]
            scores = score_each(
                self._model,
                [[Continued((*key[0], *pairs[at][1]), len(key[0])) for at in together[key]] for key in some],
                kv_bits=self._cache.cache_bits(),
                force=self._cache.force,
                prefixes=self._store_for([context for context, _ in some]),
            )
            with closing(scores):
                for key, of_context in zip(some, scores, strict=True):
                    for place, tokens in zip(together[key], of_context, strict=True):
                        total = math.fsum(token.logprob for token in tokens)
                        yield place, (total, all(token.is_likeliest for token in tokens))
                    done += 1
                    self._tell(done, count)

    def _generated(self, asked: Sequence[tuple[list[int], Request]], left: Sequence[int]) -> _Finding[tuple[str, str]]:
        """The answers to prompts, each with its place and why it ended. Prompts that begin alike are read in turn."""
        order = sorted(left, key=lambda place: asked[place][0])
        done = len(asked) - len(order)
        answers = answer_each(
            self._model,
            self._tokenizer,
            [asked[place] for place in order],
            prefixes=self._store_for([asked[place][0] for place in order]),
            force=self._cache.force,
        )
        with closing(answers):
            for number, answer in answers:
                yield order[number], (answer.text, answer.finish_reason)
                done += 1
                self._tell(done, len(asked))

    def _tell(self, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(done, total)

    def _store_for(self, contexts: Sequence[list[int] | tuple[int, ...]]) -> PrefixStore | None:
        """What keeps their beginnings; none of its own where no two neighbours begin alike: to keep takes a while."""
        alike = any(common_length([*ids], [*after]) >= LEAST for ids, after in pairwise(contexts))
        return self._store if alike or self._given is not None else None

    def _say_once(self, sentence: str) -> None:
        if self._notify is not None and sentence not in self._said:
            self._said.add(sentence)
            self._notify(sentence)
