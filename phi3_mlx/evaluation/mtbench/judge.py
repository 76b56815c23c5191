"""A judge: a model behind an API as OpenAI's, which rates what another model wrote."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ...errors import JudgeError, OptionError

JUDGE_TOKENS = 2048  # of a judgment at most, as in FastChat
_HOPELESS = 8  # judgments that fail one after the other: the next will not be given either


class NoJudgmentError(Exception):
    """A judgment that the judge did not give. Another run may get it."""


class JudgeBrief(NamedTuple):
    """What a judge is asked; `system` may be empty."""

    system: str
    text: str


class Judge:
    """A model behind an API as OpenAI's, at temperature 0. Needs the package openai, which retries.

    `key` is what the server knows its client by. `timeout` is in seconds, of a try; a request is tried again `retries`
    times where the server says that it is too busy (429), fails (5xx) or does not answer, later each time, and not
    before it asks to (Retry-After, up to two minutes).
    """

    def __init__(self, url: str, model: str, *, key: str | None, timeout: float, retries: int):
        try:
            import openai
        except ImportError as error:
            raise OptionError('a judge needs the package openai: pip install "phi3-mlx[eval]"') from error
        if not url.startswith(("http://", "https://")):
            raise OptionError(f"judge {url!r} is no URL; write one such as http://127.0.0.1:8080/v1")
        self.url, self.model = url, model
        self._openai, self._heard = openai, False
        self._key, self._timeout, self._retries = key, timeout, retries

    def client(self) -> Any:
        """A client for one thread, to be closed there."""
        return self._openai.OpenAI(
            base_url=self.url, api_key=self._key or "none", timeout=self._timeout, max_retries=self._retries
        )

    def ask(self, asked: JudgeBrief, client: Any) -> str:
        """What the judge says. Raises NoJudgmentError, and JudgeError if it will say nothing to others either."""
        openai = self._openai
        messages: list[Any] = [{"role": "system", "content": asked.system}] if asked.system.strip() else []
        messages.append({"role": "user", "content": asked.text})
        try:
            reply = client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_tokens=JUDGE_TOKENS
            )
            self._heard = True
            text = reply.choices[0].message.content
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise JudgeError(
                f"{self.url} refuses the key ({_reason(error)}); name the environment variable that holds its key with "
                "judge_key=VARIABLE"
            ) from error
        except openai.NotFoundError as error:
            raise JudgeError(
                f"{self.url} knows no model {self.model!r}, or no /chat/completions ({_reason(error)}); OpenAI's URLs "
                "end with /v1"
            ) from error
        except openai.APITimeoutError as error:
            raise NoJudgmentError("it took too long") from error
        except openai.APIConnectionError as error:
            reason = _reason(error.__cause__ or error)
            if self._heard:
                raise NoJudgmentError(f"the connection broke ({reason})") from error
            raise JudgeError(f"{self.url} cannot be reached ({reason})") from error
        except openai.RateLimitError as error:
            raise JudgeError(f"{self.url} takes no more requests for now ({_reason(error)})") from error
        except openai.OpenAIError as error:
            raise NoJudgmentError(_reason(error)) from error
        except (AttributeError, IndexError, TypeError, ValueError) as error:  # a reply that is none of the API's
            raise NoJudgmentError("its reply is none of OpenAI's API") from error
        if not isinstance(text, str) or not text.strip():
            raise NoJudgmentError("its reply has no text")
        return text

    def ask_each(self, several: Sequence[JudgeBrief], parallel: int) -> Iterator[tuple[int, str | NoJudgmentError]]:
        """What the judge says to each, with its place, as it comes; `parallel` are asked at a time.

        Raises JudgeError for a judge that cannot be asked, or fails many times in a row. Whoever stops to ask waits for
        none of those on their way.
        """
        places: queue.SimpleQueue[int] = queue.SimpleQueue()
        told: queue.SimpleQueue[tuple[int, str | Exception]] = queue.SimpleQueue()
        stopped = threading.Event()
        for place in range(len(several)):
            places.put(place)

        def work() -> None:
            with self.client() as client:
                while not stopped.is_set():
                    try:
                        place = places.get_nowait()
                    except queue.Empty:
                        return
                    try:
                        told.put((place, self.ask(several[place], client)))
                    except Exception as error:
                        told.put((place, error))

        for _ in range(min(parallel, len(several))):
            threading.Thread(target=work, daemon=True, name="judge").start()
        in_a_row = 0
        try:
            for _ in several:
                place, answer = told.get()
                in_a_row = in_a_row + 1 if isinstance(answer, NoJudgmentError) else 0
                if in_a_row >= _HOPELESS:
                    raise JudgeError(f"{self.url} gave no judgment {in_a_row} times in a row: {answer}")
                if isinstance(answer, Exception) and not isinstance(answer, NoJudgmentError):
                    raise answer
                yield place, answer
        finally:
            stopped.set()


def _reason(error: BaseException) -> str:
    """The first line of what an error says, or of what the server said."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    text = str(message or error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
