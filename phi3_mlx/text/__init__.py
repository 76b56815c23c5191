"""Text to ids and back: tokenizers, streaming decode, chat templates, messages, stop strings. Calls no model."""
