"""Text in, text out: loading, answers, conversations, prompt caches."""
