"""The errors a user can cause. Each message is one line: what you gave, why it fails, what to type."""


class Phi3Error(Exception):
    """A fault in what the user gave; the command line prints its message alone and exits with `exit_code`."""

    exit_code = 1


class ConfigError(Phi3Error):
    """A config.json that contradicts itself or asks for something this package does not compute."""


class CheckpointError(Phi3Error):
    """A model directory that lacks a file, or whose weights do not fit its config."""


class ModelNotFoundError(Phi3Error):
    """No alias, directory or repository of that name, or no network to look for it."""


class TokenizerError(Phi3Error):
    """Tokenizer files that are missing, damaged or of an unknown kind."""


class ChatError(Phi3Error):
    """Messages that the chat template cannot render."""


class PromptError(Phi3Error):
    """A prompt that cannot be run: empty, not text, or longer than the model's context."""


class ContextLengthError(PromptError):
    """A prompt of `tokens` tokens, which leaves no room to answer in the model's `context`."""

    def __init__(self, message: str, tokens: int, context: int):
        super().__init__(message)
        self.tokens, self.context = tokens, context


class DataError(Phi3Error):
    """Training data or questions that cannot be read, or that are not of a form this package knows."""


class JudgeError(Phi3Error):
    """A judge of answers that cannot be reached, refuses the key, or gives no judgments."""


class AdapterError(Phi3Error):
    """An adapter that is damaged, or that was trained on another model."""


class TrainingError(Phi3Error):
    """A training run that cannot begin, be resumed or go on."""


class PublishError(Phi3Error):
    """An upload that the hub or the network refuses."""


class OptionError(Phi3Error, ValueError):
    """An option outside its range; a usage fault, so the exit code is 2."""

    exit_code = 2


class MemoryLimitError(Phi3Error):
    """A run that needs more memory than there is; refused before anything large is allocated."""


class CacheError(Phi3Error):
    """A prompt cache that is damaged, or belongs to another model or prompt."""


class QueueFullError(Phi3Error):
    """More requests wait than may. In about `retry_after` seconds some will have ended."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class ClosedError(Phi3Error):
    """A server that is ending, or whose engine died, takes no request."""
