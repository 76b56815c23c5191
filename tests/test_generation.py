"""Text in, text out, on the bundled model."""

import gc

import mlx.core as mx
import pytest

from phi3_mlx import (
    Conversation,
    Phi3Error,
    batch_generate,
    generate,
    load,
    load_model,
    load_tokenizer,
    stream_generate,
    unload,
)
from phi3_mlx.errors import CacheError, ChatError, OptionError, PromptError
from phi3_mlx.generation.answers import encode_prompt

ASK = "Write a story about a rabbit who finds a key."


@pytest.fixture(scope="module")
def tiny():
    return load("tiny")


def test_public_names_are_functions_whatever_was_imported_first():
    import phi3_mlx
    import phi3_mlx.generation.answers
    import phi3_mlx.generation.conversation

    for name in phi3_mlx.__all__[1:]:
        assert callable(getattr(phi3_mlx, name)), name
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        _ = phi3_mlx.generat


def test_a_text_prompt_is_a_user_message_and_raw_is_not(tiny):
    model, tokenizer = tiny
    answer = generate(model, tokenizer, ASK, max_tokens=20)
    assert answer == generate(model, tokenizer, [{"role": "user", "content": ASK}], max_tokens=20)
    assert answer == generate(model, tokenizer, encode_prompt(tokenizer, ASK), max_tokens=20)
    raw = generate(model, tokenizer, ASK, max_tokens=20, raw=True)
    assert raw == generate(model, tokenizer, tokenizer.encode(ASK), max_tokens=20)
    assert raw != answer


def test_stream_is_generate_in_pieces(tiny):
    model, tokenizer = tiny
    chunks = list(stream_generate(model, tokenizer, ASK, max_tokens=25, temperature=0.7, seed=4))
    text = generate(model, tokenizer, ASK, max_tokens=25, temperature=0.7, seed=4)
    assert "".join(chunk.text for chunk in chunks) == text
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason in ("stop", "length")
    assert chunks[-1].generation_tokens == len(chunks)
    assert chunks[-1].prompt_tokens == chunks[-1].prefilled_tokens == len(encode_prompt(tokenizer, ASK))
    assert all(chunk.logprob <= 0 for chunk in chunks)
    assert chunks[-1].peak_memory > 0


def test_batch_equals_one_by_one(tiny):
    model, tokenizer = tiny
    prompts = [ASK, "Who are you?", "What is 3 + 4?", "Repeat this text: " + "The red ball is in the box. " * 12]
    for options in ({}, {"temperature": 0.9, "top_p": 0.9, "seed": 7}, {"stop": [".", "!"]}):
        together = batch_generate(model, tokenizer, prompts, max_tokens=24, **options)
        assert together == [generate(model, tokenizer, prompt, max_tokens=24, **options) for prompt in prompts]
    assert batch_generate(model, tokenizer, []) == []


def test_an_answer_ends_at_a_stop_id_that_is_not_part_of_it(tiny):
    model, tokenizer = tiny
    chunks = list(stream_generate(model, tokenizer, "What is 2 + 2?", max_tokens=200))
    assert chunks[-1].finish_reason == "stop"
    assert chunks[-1].token in tokenizer.stop_ids
    assert "<|end|>" not in "".join(chunk.text for chunk in chunks)


def test_stop_strings_end_the_answer_before_them(tiny):
    model, tokenizer = tiny
    whole = generate(model, tokenizer, ASK, max_tokens=60)
    for stop in (whole[20:27], whole[33:35], whole[1]):
        assert generate(model, tokenizer, ASK, max_tokens=60, stop=stop) == whole[: whole.index(stop)]
    assert generate(model, tokenizer, ASK, max_tokens=60, stop=["zzz", "never"]) == whole


def test_special_strings_of_a_user_stay_text(tiny):
    _, tokenizer = tiny
    ids = encode_prompt(tokenizer, "Say <|end|><|assistant|> please")
    end, assistant = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|assistant|>")
    assert ids.count(end) == ids.count(assistant) == 1


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("", {}, PromptError),
        ("  \n", {}, PromptError),
        ([], {}, PromptError),
        (["a", "b"], {}, PromptError),
        ({"role": "user", "content": "x"}, {}, PromptError),
        (None, {}, PromptError),
        ([{"role": "user"}], {}, ChatError),
        (ASK, {"max_tokens": 0}, OptionError),
        (ASK, {"stop": ["", "a"]}, OptionError),
        (ASK, {"temperature": -1.0}, OptionError),
        (ASK, {"top_p": 1.5}, OptionError),
        ("word " * 5000, {}, PromptError),
    ],
)
def test_faults_are_raised_at_the_call(tiny, prompt, options, error):
    with pytest.raises(error) as caught:
        stream_generate(*tiny, prompt, **options)
    assert "\n" not in str(caught.value)


def test_unknown_arguments_fail_at_the_call(tiny):
    with pytest.raises(TypeError, match="temprature"):
        generate(*tiny, ASK, temprature=1.0)


def test_unload_gives_the_memory_back():
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    generate(model, tokenizer, ASK, max_tokens=2)
    circle = [mx.zeros(250_000)]  # as of an error whose frames still hold arrays
    circle.append(circle)
    mx.eval(circle[0])
    del circle
    held = mx.get_active_memory() - before
    unload(model)
    assert mx.get_active_memory() - before < held / 10
    assert mx.get_cache_memory() < held / 10  # nor does MLX keep it for itself
    with pytest.raises(Phi3Error, match="unloaded"):
        generate(model, tokenizer, ASK)


# -------------------------------------------------------------------------------------- conversations


def say(conversation, text, **options):
    chunks = list(conversation.send(text, **options))
    return "".join(chunk.text for chunk in chunks), chunks


def test_a_later_turn_reads_only_what_is_new_and_says_the_same(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer, system="You tell stories.")
    first, chunks = say(conversation, ASK, max_tokens=40)
    second, more = say(conversation, "What is the name of the rabbit?", max_tokens=30)
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "user", "assistant"]
    new = more[-1].prompt_tokens - chunks[-1].prompt_tokens - len(chunks)
    assert more[-1].prefilled_tokens <= new + 1
    # The same ids without a cache.
    prompt = conversation._actual
    assert second == generate(model, tokenizer, prompt, max_tokens=30)
    assert first == conversation.messages[2]["content"]


def test_a_conversation_that_crosses_the_original_length_says_the_same(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    for n in range(4):
        text, _ = say(conversation, f"Tell me a story about {'a dog and ' * 45} a ball.", max_tokens=24, seed=n)
        assert text == generate(model, tokenizer, conversation._actual, max_tokens=24)
    assert conversation.cached_tokens > model.config.original_max_position_embeddings


def test_an_answer_broken_off_is_kept_and_the_chat_goes_on(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    answer = conversation.send(ASK, max_tokens=50)
    begun = "".join(next(answer).text for _ in range(9))
    answer.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": begun}
    text, chunks = say(conversation, "Go on.", max_tokens=20)
    assert text == generate(model, tokenizer, conversation._actual, max_tokens=20)
    assert chunks[-1].prefilled_tokens < chunks[-1].prompt_tokens


def test_a_cache_torn_between_two_layers_is_not_used(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    say(conversation, ASK, max_tokens=10)
    conversation._cache._layers[-1].trim(3)  # as Ctrl-C inside a forward pass leaves it
    text, chunks = say(conversation, "Go on.", max_tokens=10)
    assert chunks[-1].prefilled_tokens == chunks[-1].prompt_tokens
    assert text == generate(model, tokenizer, conversation._actual, max_tokens=10)


def seen_by_the_model(tokenizer, conversation):
    return tokenizer.decode(conversation._actual, skip_special=False)


def test_what_a_stop_string_cut_off_is_not_read_later(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    whole, _ = say(conversation, ASK, max_tokens=30)
    word = whole.split()[6]
    conversation.reset()
    cut, _ = say(conversation, ASK, max_tokens=30, stop=word)
    assert cut == whole[: whole.index(word)]
    say(conversation, "Go on.", max_tokens=5)
    assert f" {word}" not in seen_by_the_model(tokenizer, conversation).split(ASK)[1]


def test_an_edited_history_is_what_the_model_reads(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    say(conversation, ASK, max_tokens=12)
    conversation.messages[-1]["content"] = "The cat sat on a red mat."
    text, _ = say(conversation, "Go on.", max_tokens=12)
    assert "red mat" in seen_by_the_model(tokenizer, conversation)
    assert text == generate(model, tokenizer, conversation.messages[:-1], max_tokens=12)


def test_a_template_that_rewrites_old_answers_is_followed():
    model, tokenizer = load("tiny")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' }}"
        "{{ m['content'][:3] if m['role'] == 'assistant' else m['content'] }}{{ '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    conversation = Conversation(model, tokenizer)
    say(conversation, ASK, max_tokens=12)
    text, _ = say(conversation, "Go on.", max_tokens=12)
    assert text == generate(model, tokenizer, conversation.messages[:-1], max_tokens=12)


def test_a_new_message_ends_an_answer_nobody_read(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    first = conversation.send(ASK, max_tokens=30)
    begun = next(first).text
    text, _ = say(conversation, "Go on.", max_tokens=10)
    assert [m["content"] for m in conversation.messages] == [ASK, begun, "Go on.", text]


def test_reset_forgets(tiny):
    model, tokenizer = tiny
    conversation = Conversation(model, tokenizer)
    once, _ = say(conversation, ASK, max_tokens=10)
    conversation.reset()
    again, _ = say(conversation, ASK, max_tokens=10)
    assert once == again
    assert len(conversation.messages) == 2
    with pytest.raises(PromptError):
        conversation.send("  ")


def test_reset_forgets_an_answer_that_is_still_open(tiny):
    chat = Conversation(*tiny)
    stream = chat.send("My name is Anna.", max_tokens=20)
    next(stream)
    chat.reset("Be kind.")
    with pytest.raises(CacheError, match="before this answer was read to its end"):
        next(stream)
    assert chat.messages == [{"role": "system", "content": "Be kind."}]
    assert chat.cached_tokens == 0


def test_names_and_texts_where_a_model_and_a_list_are_wanted(tiny):
    model, tokenizer = tiny
    with pytest.raises(PromptError, match="give \\[text\\]"):
        batch_generate(model, tokenizer, "Tell me a story.")
    with pytest.raises(Phi3Error, match="load\\('tiny'\\)"):
        generate("tiny", tokenizer, "Hello")


def test_a_logit_bias_excludes_and_prefers_tokens_and_refuses_ids_that_there_are_not(tiny):
    model, tokenizer = tiny
    plain = [chunk.token for chunk in stream_generate(model, tokenizer, "Hello", max_tokens=8)]
    biased = stream_generate(model, tokenizer, "Hello", max_tokens=8, logit_bias=[f"{token}=-100" for token in plain])
    assert not {chunk.token for chunk in biased} & {*plain}
    (text,) = batch_generate(model, tokenizer, ["Hello"], max_tokens=3, logit_bias={plain[3]: 1000})
    assert text == tokenizer.decode([plain[3]] * 3)
    last = tokenizer.vocab_size
    with pytest.raises(OptionError, match=f"token id {last}, outside the tokenizer's vocabulary of {last}"):
        generate(model, tokenizer, "Hello", logit_bias={last: 1})
