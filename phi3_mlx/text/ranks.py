"""tiktoken's ranks: their file, how text is cut into words before merging, and Phi-3-small's names for what follows."""

import base64
from pathlib import Path

from ..errors import TokenizerError
from ..files import read_bytes

# How cl100k_base cuts text into words before merging: English clitics, letters with one sign before them, digits by
# threes, runs of signs with the line ends after them, line ends, spaces (the last one goes with the word).
CL100K_WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
CL100K_SIZE = 100_256


def phi3_small_tokens() -> dict[str, int]:
    """Phi-3-small's names for the ids behind the ranks, up to the end of its embedding; most stand for nothing.

    From tokenization_phi3_small.py of microsoft/Phi-3-small-8k-instruct.
    """
    names = ["endoftext", "fim_prefix", "fim_middle", "fim_suffix", "system", "user", "assistant"]
    names += ["dummy_id_0", "dummy_id_1", "end", *(f"dummy_id_{n}" for n in range(3, 12)), "endofprompt"]
    names = ["dummy_id_2", *names, *(f"dummy_id_{n}" for n in range(12, 87))]
    return {f"<|{name}|>": CL100K_SIZE + n for n, name in enumerate(names)}


def read_ranks(path: Path) -> dict[bytes, int]:
    """Lines `base64 rank`, ranks counting up from 0, each single byte among the tokens."""
    try:
        fields = [line.split() for line in read_bytes(path).splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in fields}
    except (OSError, ValueError) as error:
        raise TokenizerError(
            f"{path} is not a readable file of tiktoken ranks: {' '.join(str(error).split())}"
        ) from None
    if list(ranks.values()) != list(range(len(fields))):
        raise TokenizerError(f"{path} is damaged: its ranks do not count up from 0, each once; download it again")
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{path} is damaged: not every single byte has a rank; download it again")
    return ranks
