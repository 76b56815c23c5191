"""The model card: YAML that the hub reads, and a page that says what this is and how to run it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..files import read_text
from .contents import CARD, Contents
from .facts import KnownFacts

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

    from ..conversion.opening import AboutGguf


def make_card(contents: Contents, facts: KnownFacts, repo_id: str) -> ModelCard:
    """The card of `repo_id`. A README.md of the directory is kept; what its YAML lacks is added.

    Raises CheckpointError for a README.md whose YAML is not valid.
    """
    from huggingface_hub import ModelCard

    data = _metadata(contents, facts, repo_id)
    text = read_text(contents.files[CARD]) if CARD in contents.files else _page(contents, facts, repo_id)
    if not text.startswith("---"):
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    try:
        card = ModelCard(text)
    except Exception as error:  # YAML's errors, and the hub library's own
        why = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{contents.files[CARD]} does not begin with a card's YAML: {why}") from error
    for key, value in data.to_dict().items():
        if card.data.get(key) is None:
            setattr(card.data, key, value)
    return card


def _metadata(contents: Contents, facts: KnownFacts, repo_id: str) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    packed = facts.packing is not None
    if contents.kind == "adapter" or _is_gguf_adapter(facts):
        relation = "adapter"
    else:
        relation = "quantized" if packed or contents.kind == "gguf" else "finetune"
    results = [
        EvalResult("text-generation", score.task, score.task, score.metric, score.value, task_name="Text Generation")
        for score in facts.scores
    ]
    about: dict[str, Any] = {"base_model_relation": relation} if facts.base else {}
    return ModelCardData(
        base_model=facts.base,
        license=facts.licence,
        library_name="peft" if _is_peft(contents) else "gguf" if contents.kind == "gguf" else "mlx",
        pipeline_tag="text-generation",
        tags=["phi3-mlx", "mlx" if contents.kind != "gguf" else "gguf"],
        model_name=repo_id.partition("/")[2] if results else None,
        eval_results=results or None,
        **about,
    )


def _is_peft(contents: Contents) -> bool:
    return "adapter_model.safetensors" in contents.files


def _is_gguf_adapter(facts: KnownFacts) -> bool:
    """Whether there are GGUF files, and all of them adapters."""
    return bool(facts.ggufs) and all(about.is_adapter for about in facts.ggufs.values())


def _page(contents: Contents, facts: KnownFacts, repo_id: str) -> str:
    sections = [
        f"# {repo_id.partition('/')[2]}",
        _capital(_what(contents, facts)),
        *_measured(facts),
        *_trained(contents, facts),
        "## How to run it",
        *_runs(contents, facts, repo_id),
    ]
    return "\n\n".join(sections) + "\n"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _what(contents: Contents, facts: KnownFacts) -> str:
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else "a model of the Phi family"
    if facts.base and facts.revision:
        base += f" at revision `{facts.revision}`"
    maker = "[phi3-mlx](https://pypi.org/project/phi3-mlx/)"
    if contents.kind == "adapter":
        return f"An adapter of {base}, made with {maker}."
    if contents.kind == "gguf" and _is_gguf_adapter(facts):
        return f"An adapter of {base} as a GGUF file for llama.cpp and ollama, made with {maker}."
    if contents.kind == "gguf":
        return f"{base} as GGUF files for llama.cpp and ollama, made with {maker}.\n\n{_files(facts.ggufs)}"
    if facts.packing is None:
        return f"{base} in MLX's format, made with {maker}."
    layers = sum(isinstance(value, dict) for value in facts.packing.values())
    mixed = f", {layers} layers otherwise" if layers else ""
    bits = f", {facts.bits_per_weight:.2f} bits a weight in all" if facts.bits_per_weight else ""
    recipe = " `recipe.json` has the bits of each layer." if "recipe.json" in contents.files else ""
    return (
        f"{base}, quantized to {facts.packing.get('bits')} bits in groups of {facts.packing.get('group_size')}"
        f"{mixed}{bits}, with {maker}.{recipe}"
    )


def _files(ggufs: Mapping[str, AboutGguf]) -> str:
    """A table of GGUF files, and what its figures are."""
    measured = {about.measured.text for about in ggufs.values() if about.measured is not None}
    columns = ["file", "what", "bits a weight", *(["KL, nats a token", "same likeliest token"] if measured else [])]
    lines = [f"| {' | '.join(columns)} |", f"|---|---|{'--:|' * (len(columns) - 2)}"]
    for name, about in sorted(ggufs.items()):
        what = ("adapter", "") if about.is_adapter else (about.type or "model", f"{about.bits_per_weight:.2f}")
        figures: tuple[str, ...] = ("", "") if measured else ()
        if about.measured is not None:
            figures = f"{about.measured.kl:.5f}", f"{about.measured.top1:.1%}"
        lines.append(f"| {' | '.join((name, *what, *figures))} |")
    if measured:
        texts = " and ".join(sorted(measured))
        lines += [
            "",
            "KL: how far the next-token distributions are from those of the model that a file was made of, on "
            f"{texts}, as phi3-mlx computes both. llama.cpp rounds activations as well.",
        ]
    return "\n".join(lines)


def _measured(facts: KnownFacts) -> Iterator[str]:
    if facts.report is not None and isinstance(facts.report.get("kl"), int | float):
        yield "## What quantization cost"
        ppl, lines = facts.report.get("perplexity"), ["| figure | value |", "|---|---|"]
        lines.append(f"| KL divergence from the original, nats a token | {facts.report['kl']:.5f} |")
        if isinstance(facts.report.get("top1"), int | float):
            lines.append(f"| same likeliest token | {facts.report['top1']:.1%} |")
        if isinstance(ppl, dict) and {"source", "result"} <= ppl.keys():
            lines.append(f"| perplexity, the original's and this one's | {ppl['source']:.4f}, {ppl['result']:.4f} |")
        yield "\n".join(lines)
        if isinstance(facts.report.get("text"), str):
            yield f"Measured on {facts.report['text']}; REPORT.md has each layer."
    if facts.scores:
        yield "## Evaluation"
        lines = ["| task | shots | metric | value |", "|---|---|---|---|"]
        for score in facts.scores:
            error = f" ± {score.stderr:.4f}" if score.stderr is not None else ""
            shots = "" if score.shots is None else f"{score.shots}"
            lines.append(f"| {score.task} | {shots} | {score.metric} | {score.value:.4f}{error} |")
        yield "\n".join(lines)
        yield "With lm-eval's tasks; ± is a standard error."


def _trained(contents: Contents, facts: KnownFacts) -> Iterator[str]:
    if contents.kind != "adapter":
        return
    yield "## How it was trained"
    lines = ["| setting | value |", "|---|---|"]
    lines += [f"| data | {_cell(', '.join(facts.data))} |"] if facts.data else []
    lines += [
        f"| {key.replace('_', ' ')} | {_cell(value)} |" for key, value in facts.settings.items() if value is not None
    ]
    yield "\n".join(lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _runs(contents: Contents, facts: KnownFacts, repo_id: str) -> Iterator[str]:
    if contents.kind == "adapter":
        yield from _runs_adapter(contents, facts, repo_id)
        return
    if contents.kind == "gguf":
        yield from _runs_gguf(contents, facts, repo_id)
        return
    yield f'phi3-mlx:\n\n```shell\npip install phi3-mlx\nphi3-mlx generate -m {repo_id} -p "Hello"\n```'
    yield f'mlx-lm:\n\n```shell\nmlx_lm.generate --model {repo_id} --prompt "Hello"\n```'
    yield (
        "llama.cpp and ollama:\n\n```shell\n"
        f"phi3-mlx export -m {repo_id} -o model.gguf --modelfile\n"
        "llama-cli -m model.gguf\nollama create mine -f model.Modelfile\n```"
    )
    if facts.packing is None:
        yield (
            "transformers:\n\n```py\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")\n```'
        )
    else:
        yield (
            "transformers does not read MLX's packed weights; in floats it does:\n\n```shell\n"
            f"phi3-mlx convert {repo_id} --dequantize -o floats\n```"
        )


def _runs_gguf(contents: Contents, facts: KnownFacts, repo_id: str) -> Iterator[str]:
    models = sorted(name for name, about in facts.ggufs.items() if not about.is_adapter)
    for name in sorted(facts.ggufs.keys() - models):
        base = f"{(facts.base or 'BASE').rpartition('/')[2]}.gguf"  # as the Modelfile has it
        modelfile = f"{name.removesuffix('.gguf')}.Modelfile"
        create = f'\nollama create mine -f "{modelfile}"' if modelfile in contents.files else ""
        yield (
            "The adapter beside its base as a GGUF file, in llama.cpp and ollama:\n\n```shell\n"
            f"hf download {repo_id} --local-dir .\n"
            f"phi3-mlx export -m {facts.base or 'BASE'} -o {base}\n"
            f'llama-cli -m {base} --lora "{name}" -p "Hello"{create}\n```'
        )
    if not models:
        return
    yield f'llama.cpp:\n\n```shell\nllama-cli -hf {repo_id} -p "Hello"\n```'
    if sum(name.endswith(".gguf") for name in contents.files) == len(facts.ggufs):  # ollama takes no parts
        yield f"ollama:\n\n```shell\nollama run hf.co/{repo_id}\n```"
    files = models[0].replace("-00001-of-", "-*-of-")
    yield (
        "phi3-mlx, mlx-lm and transformers, once it is converted:\n\n```shell\n"
        f'hf download {repo_id} --include "{files}" --local-dir .\nphi3-mlx convert "{models[0]}" -o model\n```'
    )


def _runs_adapter(contents: Contents, facts: KnownFacts, repo_id: str) -> Iterator[str]:
    base, peft = facts.base or "BASE", _is_peft(contents)
    yield f"```shell\npip install phi3-mlx\nhf download {repo_id} --local-dir adapter\n```"
    if peft:
        yield f"phi3-mlx:\n\n```shell\nphi3-mlx adapter import adapter -m {base} -o mine\n```"
    folder = "mine" if peft else "adapter"
    yield f'phi3-mlx:\n\n```shell\nphi3-mlx generate -m {base} --adapter {folder} -p "Hello"\n```'
    yield f'mlx-lm:\n\n```shell\nmlx_lm.generate --model {base} --adapter-path {folder} --prompt "Hello"\n```'
    if facts.settings["kind"] == "lora":
        file = f"{base.rpartition('/')[2]}.gguf"  # as the Modelfile has it
        yield (
            "llama.cpp and ollama, beside the base as a GGUF file:\n\n```shell\n"
            f"phi3-mlx export -m {base} -o {file}\n"
            f"phi3-mlx export -m {base} --adapter {folder} --adapter-only -o adapter.gguf --modelfile\n"
            f'llama-cli -m {file} --lora adapter.gguf -p "Hello"\nollama create mine -f adapter.Modelfile\n```'
        )
    else:  # llama.cpp's adapters have no place for magnitudes or whole weights
        yield (
            "llama.cpp and ollama, merged into the base:\n\n```shell\n"
            f"phi3-mlx export -m {base} --adapter {folder} -o mine.gguf --modelfile\n"
            "llama-cli -m mine.gguf\nollama create mine -f mine.Modelfile\n```"
        )
    if not peft and facts.settings["kind"] != "full":
        yield "transformers, with PEFT:\n\n```shell\nphi3-mlx adapter export adapter -o peft-adapter\n```"
