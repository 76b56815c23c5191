"""Measure a model on held-out data: bits per character, requested words, endings, planted facts, samples.

python weights/training/evaluate.py --corpus DIR --model weights/tiny --json weights/tiny/evaluation.json
"""

import argparse
import json
import math
from pathlib import Path

import phi3_mlx  # noqa: F401  (before MLX, which then multiplies with a fast BLAS on a CPU)

# isort: split
import data
import mlx.core as mx
import sentencepiece as spm
import vocab

from phi3_mlx import Generation, Sampling, batch_generate, encode_prompt, load

LENGTHS = (256, 496, 1024, 2048, 4000)  # of prompts with a planted fact; 496 and its answer end below 512
ROWS = 20  # prompts decoded together
SAMPLES = (
    "Tell me a story about a duck and a frog.",
    "Tell me a story about a squirrel and a bird.",
    "Write a story about a boy named Tim who loses his toy car.",
    "Write a short story with the words: dog, park, ball.",
    "Tell me a story about a fox and a bunny.",
    "The dog ran home. The secret word of the owl is castle. What is the secret word of the owl?",
    "What is 3 + 4?",
    "Who are you?",
)


def held_out_loss(model, tokenizer, texts) -> dict[str, float]:
    """Bits a character and perplexity a token: each text by itself after <|endoftext|>, up to the original length.

    The end of the text is not counted.
    """
    nats, characters, tokens = 0.0, 0, 0
    longest = model.config.original_max_position_embeddings
    for text in texts:
        ids = mx.array([[vocab.ENDOFTEXT, *tokenizer.encode(text.strip())][: longest + 1]])
        logits = model(ids[:, :-1])[0]
        losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, ids[0, 1:, None], axis=-1)[:, 0]
        nats += losses.sum().item()
        characters += len(tokenizer.decode(ids[0, 1:].tolist()))
        tokens += ids.shape[1] - 1
    return {
        "bits_per_character": nats / math.log(2) / characters,
        "perplexity": math.exp(nats / tokens),
        "characters_per_token": characters / tokens,
    }


def answers(model, tokenizer, prompts, max_tokens, temperature) -> list[tuple[str, bool]]:
    """(text, whether the model ended it) of each prompt."""
    done = []
    for first in range(0, len(prompts), ROWS):
        rows = [encode_prompt(tokenizer, prompt) for prompt in prompts[first : first + ROWS]]
        ids: list[list[int]] = [[] for _ in rows]
        ended = [False] * len(rows)
        sampling = Sampling(temperature, seed=first)
        for token in Generation(
            model, rows, max_tokens=max_tokens, sampling=sampling, stop_ids=tokenizer.stop_ids, prefill_chunk=512
        ):
            ids[token.row].append(token.id)
            ended[token.row] = token.finish_reason == "stop"
        done += [(tokenizer.decode(row), end) for row, end in zip(ids, ended, strict=True)]
    return done


def requested_words(model, tokenizer, documents, held_out, count) -> dict[str, float]:
    """Requests, `count` at most, the share of their words used and that of answers that end, at temperature 0.7."""
    asked = []
    for story in held_out:
        words = documents.words_of(story, 3)
        if len(words) == 3 and len(asked) < count:
            asked.append(words)
    prompts = [f"Write a short story with the words: {', '.join(words)}." for words in asked]
    done = answers(model, tokenizer, prompts, max_tokens=480, temperature=0.7)
    used = [bool(data.use_of(word, text)) for words, (text, _) in zip(asked, done, strict=True) for word in words]
    return {
        "requests": len(asked),
        "requested_words_used": sum(used) / len(used),
        "answers_that_end": sum(ended for _, ended in done) / len(done),
    }


def planted_facts(model, tokenizer, documents, target: int, count: int) -> float:
    """Share of planted facts repeated word for word, greedily, in prompts of `target` tokens, 16 more or less."""
    right = 0
    for _ in range(count):
        length, prompt = target, []
        while abs(len(prompt) - target) > 16:
            runs = documents.secrets(length=length, n=3)
            prompt, answer = runs[0][0], runs[1][0]
            length += target - len(prompt)
        text = batch_generate(model, tokenizer, [prompt], max_tokens=24)[0]
        right += text.strip() == tokenizer.decode(answer).strip()
    return right / count


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--count", type=int, default=200, help="stories asked for")
    parser.add_argument("--facts", type=int, default=40, help="texts a length")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model, tokenizer = load(args.model)
    train, held_out = data.split_stories(args.corpus)
    sp = spm.SentencePieceProcessor(model_file=str(Path(args.model) / "tokenizer.model"))
    documents = data.Documents(train, [], sp, seed=1)
    found = {"held_out_stories": len(held_out), **held_out_loss(model, tokenizer, held_out)}
    print(json.dumps(found), flush=True)
    # Facts are planted in stories the model has not read.
    documents.stories = held_out
    found |= {"facts_of_each_length": args.facts, "planted_facts": {}}
    for target in LENGTHS:
        found["planted_facts"][target] = planted_facts(model, tokenizer, documents, target, args.facts)
        print(target, found["planted_facts"][target], flush=True)
    # The same beyond the original length as a reader would do who never changes to the long factors.
    pinned, _ = load(args.model, longrope="short")
    found["planted_facts_with_short_factors"] = {
        target: planted_facts(pinned, tokenizer, documents, target, args.facts) for target in LENGTHS if target > 512
    }
    print(json.dumps(found), flush=True)
    found |= requested_words(model, tokenizer, documents, held_out, args.count)
    print(json.dumps(found), flush=True)
    found["samples"] = {
        prompt: batch_generate(model, tokenizer, [encode_prompt(tokenizer, prompt)], max_tokens=400)[0]
        for prompt in SAMPLES
    }
    text = json.dumps(found, indent=2, ensure_ascii=False)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
