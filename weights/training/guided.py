"""Stories that use the words they were asked to: sampled from the model itself, led towards the words, and chosen.

    python weights/training/guided.py --corpus DIR --checkpoint A/checkpoint B/checkpoint --tokenizer A --minutes 15 \
      --out guided.jsonl

The model has read each story with few requests, and learns rather which story it is than to use the words. Here the
requests are made from its training stories, the answers are its own: the next piece of a word not yet used gets a
bonus of logits. Answers are kept which use every word, end by themselves, do not repeat themselves and are likely
to the model without the bonus (expert iteration; Anthony et al. 2017). `train.py --guided` reads them.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import data
import sentencepiece as spm
import torch
import torch.nn.functional as F
import vocab
from train import mean_of
from transformers import LogitsProcessor

MOST = 256  # tokens of an answer


class TowardsWords(LogitsProcessor):
    """Adds `bonus` to the logit of the next piece of each word that a row has not used yet."""

    def __init__(self, sp, words: list[list[str]], prompt: int, bonus: float):
        self.sp, self.left, self.prompt, self.bonus = sp, [set(row) for row in words], prompt, bonus
        self.pieces = {w: sp.encode(w) for row in words for w in row}

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        for row, left in enumerate(self.left):
            answer = ids[row, self.prompt :].tolist()
            text = self.sp.decode([i for i in answer[-8:] if i < vocab.PIECES])
            left -= {word for word in left if data.use_of(word, text)}
            for word in left:
                pieces = self.pieces[word]
                begun = next((n for n in range(len(pieces) - 1, 0, -1) if answer[-n:] == pieces[:n]), 0)
                # Late is better than never, and better than all words in the first line.
                logits[row, pieces[begun]] += self.bonus * min(1.5, 0.5 + len(answer) / 100)
        return logits


def repeats(ids: list[int], n: int = 8) -> bool:
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n)]
    return len(set(grams)) < len(grams)


@torch.no_grad()
def answer(model, sp, requests: list[tuple[str, list[str]]], bonus: float, temperature: float):
    """(text, its ids, whether it ended, mean log-likelihood without the bonus) of each request, sampled together.

    An answer with a control token in it has no text.
    """
    prompts = [[vocab.USER, *sp.encode(request), vocab.END, vocab.ASSISTANT] for request, _ in requests]
    longest = max(map(len, prompts))
    ids = torch.tensor([[vocab.ENDOFTEXT] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    towards = TowardsWords(sp, [words for _, words in requests], longest, bonus)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=MOST, do_sample=True, temperature=temperature, top_k=0,
        logits_processor=[towards], eos_token_id=[vocab.END, vocab.ENDOFTEXT], pad_token_id=vocab.ENDOFTEXT,
    )  # fmt: skip
    mask = torch.cat([mask, torch.ones(len(out), out.shape[1] - longest, dtype=mask.dtype)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(out, attention_mask=mask, position_ids=positions).logits[:, longest - 1 : -1].float()
    likely = -F.cross_entropy(logits.transpose(1, 2), out[:, longest:], reduction="none")
    for row, tokens in enumerate(out[:, longest:].tolist()):
        ends = [i for i, t in enumerate(tokens) if t in (vocab.END, vocab.ENDOFTEXT)]
        length = ends[0] if ends else len(tokens)
        text = "" if max(tokens[:length], default=0) >= vocab.PIECES else sp.decode(tokens[:length])
        yield text, tokens[:length], bool(ends), likely[row, :length].mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path, required=True, nargs="+")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--draws", type=int, default=2, help="answers to each request, of which the likeliest is kept")
    parser.add_argument("--bonus", type=float, default=4.0)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = mean_of(args.checkpoint).eval()
    model.generation_config.use_cache = True
    sp = spm.SentencePieceProcessor(model_file=str(args.tokenizer / "tokenizer.model"))
    train, _ = data.split_stories(args.corpus)
    documents = data.Documents(train, [], sp, args.seed)
    rng = random.Random(args.seed)
    started, kept, drawn, complete = time.time(), 0, 0, 0
    with args.out.open("a", encoding="utf-8") as file:
        while time.time() - started < 60 * args.minutes:
            asked = []
            while len(asked) < args.rows // args.draws:
                request = documents.request(rng.choice(train))
                what = re.search(r"(words:?|about) .*", request)
                words = [w for w in re.findall(r"[a-z]+", what[0])[1:] if w in documents.askable] if what else []
                if words:
                    asked += [(request, words)]
            found = list(answer(model, sp, [a for a in asked for _ in range(args.draws)], args.bonus, args.temperature))
            drawn += len(found)
            for i, (request, words) in enumerate(asked):
                good = [
                    (likely, text)
                    for text, ids, ended, likely in found[i * args.draws : (i + 1) * args.draws]
                    if ended and len(ids) > 50 and all(data.use_of(w, text) for w in words) and not repeats(ids)
                ]
                complete += len(good)
                if good:
                    likely, text = max(good)
                    line = {"request": request, "story": text, "likely": round(likely, 3)}
                    file.write(json.dumps(line) + "\n")
                    kept += 1
            file.flush()
            print(f"{time.time() - started:.0f} s: {drawn} drawn, {complete} complete, {kept} kept", flush=True)


if __name__ == "__main__":
    main()
