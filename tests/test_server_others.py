"""Other people's programs over the server: `llm`, and lm-evaluation-harness with the bundled model."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from served import serving

from phi3_mlx import load, score
from phi3_mlx.server.models import Models
from phi3_mlx.server.worker import Worker
from phi3_mlx.store.hub import resolve


@pytest.mark.skipif(not find_spec("llm"), reason="llm is not installed: pip install llm")
@pytest.mark.parametrize("more", [[], ["--no-stream", "-o", "temperature", "0.5", "--system", "Be short."]])
def test_llm_asks_a_model_that_it_is_told_of(tmp_path, more):
    with serving() as served:
        lines = ["- model_id: here", "  model_name: echo", f"  api_base: {served.url}/v1"]
        (tmp_path / "extra-openai-models.yaml").write_text("\n".join(lines))
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
        command = [sys.executable, "-m", "llm", "-m", "here", "one two three", *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
        assert (done.returncode, done.stdout.strip()) == (0, "one two three"), done.stderr
        assert ("temperature" in more) == (served.engine.tickets[-1].work.request.temperature == 0.5)


PAIRS = [
    ("Once upon a time, there was a little duck", " named Ducky."),
    ("Once upon a time, there was a little duck", " who could not swim at all."),
    ("The frog was sad because", " it could not swim."),
]


@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed: pip install lm-eval[api]")
@pytest.mark.skipif(not (find_spec("transformers") and find_spec("tenacity")), reason="lm-eval[api] needs them")
@pytest.mark.filterwarnings("ignore")  # of its packages
@pytest.mark.parametrize("batch_size", [1, 3])
def test_lm_eval_scores_over_http_what_score_gives(batch_size):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    models = Models(["tiny"])
    worker = Worker(models)
    try:
        with serving(worker, listed=models.listed) as served:
            harness = LocalCompletionsAPI(
                model="tiny",
                base_url=f"{served.url}/v1/completions",
                tokenizer=str(resolve("tiny")),
                tokenizer_backend="huggingface",
                batch_size=batch_size,
            )
            requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(PAIRS)]
            told = harness.loglikelihood(requests, disable_tqdm=True)
            encoded = [harness._encode_pair(*pair) for pair in PAIRS]
    finally:
        worker.close(wait=False)
    model, tokenizer = load("tiny")
    for (logprob, is_greedy), (context, continuation) in zip(told, encoded, strict=True):
        (expected,) = score(model, tokenizer, context, [continuation])
        assert logprob == pytest.approx(expected.total, abs=1e-4)
        assert is_greedy == expected.is_greedy
