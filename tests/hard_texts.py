"""A thousand texts that tokenizers get wrong first, always the same ones."""

from __future__ import annotations

import random
import re

# After control tokens llama.cpp takes C's white space away, and tokenizers take Unicode's.
BLANK_OF_UNICODE = re.compile(r"(\|>|</s>)\s*[^\S \t\n\v\f\r]")
CONTROL = (
    "<|user|> <|assistant|> <|system|> <|end|> <|endoftext|> <s> </s> <unk> <|im_start|> <|im_sep|> <|tool|>".split()
)
_CODE = (
    "def f(x, *, y=None):\n    return [i ** 2 for i in range(x) if i % 3]\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] * b[i];\n}\n",
    "SELECT name, COUNT(*) FROM t WHERE x <> 'it''s' GROUP BY name;",
    '{"a": [1, 2.5e-3, null], "b": {"c": "\\u00e9\\n"}}',
    "<div class='a'>&nbsp;<!-- x --></div>",
    "\\frac{a}{b} \\le \\sum_{i=1}^{n} x_i^2",
    "#!/bin/sh\nset -eu\necho \"$HOME\" | sed 's/a/b/g' >> /dev/null\n",
)
_WORDS = (
    "The quick brown fox jumps over the lazy dog. It's 3,141.59 o'clock; isn't it? "
    "Once upon a time there was a little duck who wanted to swim. NASA's JPL-42 in the U.S.A. I'LL we'VE"
).split(" ")
_SCRIPTS = (
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF),
    (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x20A0, 0x20BF), (0x2190, 0x21FF),
    (0x2500, 0x257F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0xFF00, 0xFFEF),
    (0x1F300, 0x1F6FF), (0x1F900, 0x1F9FF), (0x20000, 0x2A6DF), (0xE000, 0xE0FF),
)  # fmt: skip
_EMOJI = ("👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "☺️", "🫠", "1️⃣", "🙂")
_WHITE = (" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u3000", " \n ", "    ", "\ufeff")


def hard_texts(count: int = 1000, seed: int = 0) -> list[str]:
    """Texts of words, scripts, emoji, blanks, long runs, digits, code, control tokens, and of all of these mixed."""
    rng = random.Random(seed)

    def script() -> str:
        first, last = rng.choice(_SCRIPTS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 12)))

    kinds = (
        lambda: " ".join(rng.choice(_WORDS) for _ in range(rng.randint(1, 20))),
        script,
        lambda: rng.choice(_EMOJI) * rng.randint(1, 3),
        lambda: rng.choice(_WHITE) * rng.randint(1, 5),
        lambda: rng.choice("aA .-=_#\n0é世🙂") * rng.randint(2, 120),
        lambda: str(rng.randrange(10 ** rng.randint(1, 18))),
        lambda: rng.choice(_CODE),
        lambda: rng.choice(CONTROL),
        lambda: rng.choice(("<|", "|>", "<|user|", "<0x0A>", "▁", "▁▁a", "[PAD5]", "\\n")),
    )
    texts = ["", " ", "\n", "a", "▁", "é", "e\u0301", *CONTROL, *_CODE, *_EMOJI, *_WHITE]
    while len(texts) < count:
        mixed = [rng.choice(kinds)() for _ in range(rng.randint(1, 6))]
        texts.append(rng.choice(("", " ")).join(mixed))
    return texts[:count]
