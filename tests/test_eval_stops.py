"""What ends an answer of the released Phi-3 models ends it for lm-eval's tasks too: tokens 32000, 32001 and 32007."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from tokenizer_samples import ENDOFTEXT, TINY, copy_of, write_json

from phi3_mlx.models import build, parse_config
from phi3_mlx.text.tokenizer import read_tokenizer

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from phi3_mlx.evaluation.lm import HarnessLM

STOPS = {"<|endoftext|>": 32000, "<|assistant|>": 32001, "<|end|>": 32007}
RAW = {
    "model_type": "phi3",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 1,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "eos_token_id": [*STOPS.values()],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The bundled tokenizer, whose control tokens have the ids and the order of the released one's."""
    directory = tmp_path_factory.mktemp("released")
    moved = 32000 - ENDOFTEXT
    copy_of(TINY, directory, added_tokens_decoder=None)
    (directory / "tokenizer.model").unlink(missing_ok=True)
    description = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    for token in description["added_tokens"]:
        token["id"] += moved * (token["id"] >= ENDOFTEXT)
    description["model"]["vocab"] |= {f"no word {i}": i for i in range(ENDOFTEXT, 32000)}
    write_json(directory / "tokenizer.json", description)
    write_json(directory / "config.json", RAW)
    return read_tokenizer(directory)


def saying(ids):
    """A Phi-3 that says these tokens one after the other, the last for ever: its layers add nothing."""
    model = build(parse_config(RAW))
    model.update(tree_map(mx.zeros_like, model.parameters()))
    model.model.norm.weight = mx.ones(RAW["hidden_size"])
    for place, (token, after) in enumerate(zip(ids, [*ids[1:], ids[-1]], strict=True)):
        model.model.embed_tokens.weight[token, place] = 1
        model.lm_head.weight[after, place] = 1
    model.eval()
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize(("name", "stop"), STOPS.items())
def test_an_answer_ends_before_each_of_phi_3s_stops(tokenizer, name, stop):
    *words, last = tokenizer.encode("Once upon a time")
    assert tokenizer.encode("Once") == words[:1]
    assert tokenizer.token_to_id(name) == stop
    asked = [Instance("generate_until", {}, ("Once", {"max_gen_toks": 6}), 0)]
    lm = HarnessLM(saying([*words, stop, last]), tokenizer)
    assert lm.generate_until(asked) == ["upon a"]
    assert lm.cut_answers == 0
    other = tokenizer.encode("and")[-1]
    lm = HarnessLM(saying([*words, other, last]), tokenizer)  # no stop: it goes on
    (text,) = lm.generate_until(asked)
    assert text.startswith("upon a")
    assert text.endswith(" time time")
    assert lm.cut_answers == 1
