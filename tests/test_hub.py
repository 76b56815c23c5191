"""Names become directories, from disk where they can, with one plain line where they cannot. No network."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import huggingface_hub
import oracle
import pytest
from huggingface_hub import constants, errors

from phi3_mlx.errors import ModelNotFoundError, OptionError
from phi3_mlx.store import hub
from phi3_mlx.store.hub import ALIASES, list_models, on_disk, resolve

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TWO = {"model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'}
FILES = {
    "config.json": json.dumps(oracle.BASE),
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "generation_config.json": "{}",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, and no way to the network."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.chdir(tmp_path)
    return folder


def put(cache: Path, repo_id: str, files=FILES, ref: str = "main") -> Path:
    """A snapshot as huggingface_hub lays it out: files are links to blobs."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for part in (folder / "refs", folder / "blobs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(COMMIT)
    for name, text in files.items():
        (folder / "blobs" / name).write_text(text)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    return snapshot


def refusal(name: str, revision: str | None = None) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name, revision)
    text = str(caught.value)
    assert "\n" not in text
    return text


# Directories.


def test_tiny(tmp_path, monkeypatch):
    assert resolve("tiny") == resolve("TINY") == ROOT / "weights" / "tiny"
    (tmp_path / "tiny").mkdir()
    assert resolve("./tiny") == tmp_path / "tiny"
    package = tmp_path / "site-packages" / "phi3_mlx"
    monkeypatch.setattr(hub, "__file__", str(package / "store" / "hub.py"))
    assert "bundled model tiny is missing" in refusal("tiny")
    (package / "weights" / "tiny").mkdir(parents=True)
    assert resolve("tiny") == package / "weights" / "tiny"


def test_directories(tmp_path, monkeypatch):
    for name in ("mine", "models/mine", "owner/repository", "phi-4"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("mine", "./mine", "mine/", "models/mine", "owner/repository", "./phi-4", "models/../mine", "."):
        assert resolve(name) == Path(os.path.abspath(name))
    assert resolve(str(tmp_path / "mine")) == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/mine") == tmp_path / "mine"


@pytest.mark.parametrize(
    "name",
    ["./no", "../no", "/no/no", "~/no", "~nobody-of-that-name/no", "no/", "a/b/c", "there/no", f"./{'x' * 255}"],
)
def test_absent_directories_are_not_looked_for_elsewhere(tmp_path, name):
    (tmp_path / "there").mkdir()
    assert refusal(name).startswith(f"no such directory: {name}; check the path")


def test_a_file(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "is a file, not a model directory" in refusal("model.safetensors")
    assert "is a file, not a model directory" in refusal(str(tmp_path / "model.safetensors"))


def test_revision_of_a_directory(tmp_path):
    for name in ("tiny", str(tmp_path)):
        with pytest.raises(OptionError, match="a revision is for Hugging Face repositories"):
            resolve(name, "main")


def test_directories_do_not_import_huggingface_hub(tmp_path):
    code = f"""
import sys
from phi3_mlx.store.hub import resolve
resolve("tiny"), resolve({str(tmp_path)!r})
heavy = {{"huggingface_hub", "mlx", "numpy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Names.


def test_aliases(cache):
    Path("phi-4").mkdir()  # an alias is never a directory; ./phi-4 is
    assert len({alias.name for alias in ALIASES}) == len({alias.repo_id for alias in ALIASES}) == len(ALIASES)
    for alias in ALIASES:
        assert alias.name == alias.name.lower()
        snapshot = put(cache, alias.repo_id)
        assert resolve(alias.name) == resolve(alias.name.upper()) == resolve(alias.repo_id) == snapshot


def test_alias_sizes(shared):
    """Sizes and contexts against the released configs."""
    repositories = {alias.repo_id: alias for alias in ALIASES}
    seen = 0
    for path in sorted((shared / "configs").glob("*.json")):
        alias = repositories.get(f"microsoft/{path.stem}")
        if alias is None:
            continue
        seen += 1
        raw = json.loads(path.read_text())
        hidden, heads = raw["hidden_size"], raw["num_attention_heads"]
        qkv = hidden + 2 * raw["num_key_value_heads"] * (hidden // heads)
        experts = raw.get("num_local_experts", 1)
        small = raw["model_type"] == "phi3small"
        inner = raw["ff_intermediate_size"] if small else raw["intermediate_size"]
        layer = hidden * (qkv + hidden + experts * 3 * inner + 2)
        tables = 1 if raw.get("tie_word_embeddings", small) else 2
        parameters = raw["num_hidden_layers"] * layer + tables * raw["vocab_size"] * hidden + hidden
        if raw["model_type"] == "phimoe":  # routers, and biases of projections, norms and head
            more = experts * hidden + qkv + hidden + 2 * hidden
            parameters += raw["num_hidden_layers"] * more + hidden + raw["vocab_size"]
        if small:  # biases of projections and norms
            parameters += raw["num_hidden_layers"] * (qkv + hidden + 2 * inner + hidden + 2 * hidden) + hidden
        assert (alias.bytes, alias.bits, alias.parameters) == (2 * parameters, 16, parameters)
        assert alias.shape.max_position_embeddings == raw["max_position_embeddings"]
    assert seen >= 6
    packed = next(alias for alias in ALIASES if alias.name == "phi-3-mini-4k-4bit")
    assert (packed.bits, round(packed.bytes / 1e9, 2)) == (4, 2.15)


@pytest.mark.parametrize(
    ("name", "near"),
    [("phi3-mini-4k", "phi-3-mini-4k"), ("phi-4-mini-instruct", "phi-4-mini"), ("tyni", "tiny"), ("Phi4", "phi-4")],
)
def test_unknown_alias(name, near):
    text = refusal(name)
    assert text.startswith(f"no model {name!r}: did you mean ")
    assert near in text.split("?")[0].split()
    assert "`phi3-mlx models`" in text


@pytest.mark.parametrize("name", ["", "llama", "owner name/repository", "owner/repo:4bit"])
def test_no_possible_name(name):
    assert refusal(name).startswith(f"no model {name!r}: ")


@pytest.mark.parametrize("name", [None, 3, b"tiny", ["tiny"], ("a model", "a tokenizer"), "a\0b"])
def test_what_is_no_name(name):
    with pytest.raises(OptionError, match=r"model is .*; expected the name or directory of a model"):
        resolve(name)


# The cache.


def test_revisions_on_disk(cache):
    snapshot = put(cache, "owner/repository", ref="v1")
    assert resolve("owner/repository", "v1") == resolve("owner/repository", COMMIT) == snapshot
    assert on_disk("owner/repository") is None


@pytest.mark.parametrize(
    ("change", "complete"),
    [
        ({}, True),
        ({"generation_config.json": None}, True),
        ({"tokenizer.json": None}, False),
        ({"tokenizer.json": None, "tokenizer.model": ""}, True),
        ({"tokenizer.json": None, "cl100k_base.tiktoken": ""}, True),
        ({"config.json": None}, False),
        ({"model.safetensors": None}, False),
        ({"model.safetensors": None, "pytorch_model.bin": ""}, False),
        ({"model.safetensors.index.json": '{"weight_map": {"a": "model.safetensors"}}'}, True),
        # Beside a whole file no index is read.
        ({"model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors"}}'}, True),
        ({"model.safetensors.index.json": "{"}, True),
        ({"model.safetensors": None, "model-1.safetensors": "", "model.safetensors.index.json": "{"}, False),
        ({"model.safetensors": None, "model-1.safetensors": "", **TWO}, False),
        ({"model.safetensors": None, "model-1.safetensors": "", "model-2.safetensors": "", **TWO}, True),
        ({"model.safetensors": None, "model-00001-of-00002.safetensors": ""}, False),
    ],
)
def test_complete_or_not(cache, change, complete):
    files = {name: text for name, text in {**FILES, **change}.items() if text is not None}
    snapshot = put(cache, "owner/repository", files)
    assert on_disk("owner/repository") == (snapshot if complete else None)


def test_a_lost_blob(cache):
    snapshot = put(cache, "owner/repository")
    (snapshot / "model.safetensors").resolve().unlink()
    assert on_disk("owner/repository") is None


def test_list_models(cache):
    alias = put(cache, "mlx-community/phi-4-4bit")
    mine = put(cache, "me/my-phi", {**FILES, "config.json": json.dumps({**oracle.BASE, "quantization": {"bits": 3}})})
    put(cache, "me/unfinished", {"config.json": FILES["config.json"]})
    put(cache, "me/llama", {**FILES, "config.json": '{"model_type": "llama"}'})
    (cache / "version.txt").touch()
    rows = {row.name: row for row in list_models()}
    assert [row for row in rows if not row.startswith(("tiny", "phi-"))] == ["me/my-phi"]
    assert rows["me/my-phi"] == hub.ModelRow("me/my-phi", "me/my-phi", None, 3, len("weights"), 4096, mine)
    assert {name for name, row in rows.items() if row.path} - {"tiny"} == {"phi-4-4bit", "me/my-phi"}
    assert rows["phi-4-4bit"].path == alias
    assert [row for row in rows if row.startswith("phi-")] == [alias.name for alias in ALIASES]


def test_list_models_without_a_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "absent"))
    assert len(list_models()) >= len(ALIASES)


# Downloads.


def test_asks_for_what_is_needed(cache, monkeypatch):
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        return str(put(cache, repo_id, ref=revision or "main"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    first = resolve("Phi-4-mini", "v2")
    assert asked == [("microsoft/Phi-4-mini-instruct", "v2")]
    assert resolve("phi-4-mini", "v2") == first
    assert len(asked) == 1


def test_a_shape_and_a_tokenizer_cost_no_download_of_weights(cache, monkeypatch):
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append(allow_patterns)
        shutil.rmtree(cache, ignore_errors=True)
        whole = "model*.safetensors" in allow_patterns
        files = {name: text for name, text in FILES.items() if whole or not name.endswith(".safetensors")}
        return str(put(cache, repo_id, files))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    first = resolve("phi-4-mini", weights=False)
    assert "config.json" in asked[0]
    assert not any("safetensors" in pattern for pattern in asked[0])
    assert resolve("phi-4-mini", weights=False) == first
    assert len(asked) == 1
    assert resolve("phi-4-mini") == first
    assert "model*.safetensors" in asked[1]


def http_error(kind, status=404):
    return kind("first line\nsecond line", response=SimpleNamespace(headers={}, request=None, status_code=status))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            http_error(errors.RepositoryNotFoundError, 401),
            "no repository o/r at https://huggingface.co; check",
        ),
        (http_error(errors.GatedRepoError, 403), "o/r is gated: accept its terms at https://huggingface.co/o/r, then"),
        (http_error(errors.RevisionNotFoundError), "o/r has no revision 'v9'; see https://huggingface.co/o/r/commits"),
        (http_error(errors.HfHubHTTPError, 500), "the download of o/r stopped (first line); the same command again"),
        (OSError(28, "No space left on device"), "the download of o/r stopped ([Errno 28] No space left on device)"),
        (
            errors.LocalEntryNotFoundError("no route"),
            "o/r is not on this disk, and https://huggingface.co did",
        ),
        (errors.HFValidationError("bad"), "o/r is not a possible repository name"),
        (RuntimeError(""), "the download of o/r stopped (RuntimeError)"),
    ],
)
def test_failed_downloads(monkeypatch, error, expected):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(constants, "ENDPOINT", "https://huggingface.co")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert expected in refusal("o/r", "v9")


class FakeHub(BaseHTTPRequestHandler):
    """As much of huggingface.co as a download needs: o/good, o/pickle and o/gated exist."""

    fetched: ClassVar[list[str]] = []
    repositories: ClassVar[dict[str, dict[str, str]]] = {
        "o/good": {**FILES, "pytorch_model.bin": "pickle", "modeling_phi3.py": "code", "onnx/model.onnx": "onnx"},
        "o/pickle": {"config.json": FILES["config.json"], "tokenizer.json": "{}", "pytorch_model.bin": "pickle"},
    }

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        repo_id, kind, revision, name = "/".join(path[:2]), *[*path[2:], "", "", ""][:2], "/".join(path[4:])
        files = self.repositories.get(repo_id)
        if repo_id == "o/gated":
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif files is None:
            self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", COMMIT):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            self.answer(200, json.dumps({"id": repo_id, "sha": COMMIT, "siblings": siblings}).encode())
        elif kind == "tree":
            tree = [
                {"type": "file", "path": file, "size": len(text), "oid": f"{i:040x}"}
                for i, (file, text) in enumerate(files.items())
            ]
            self.answer(200, json.dumps(tree).encode())
        elif name in files:
            self.fetched.append(name)
            headers = {"ETag": f'"{list(files).index(name):040x}"', "X-Repo-Commit": COMMIT}
            self.answer(200, files[name].encode(), headers)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def answer(self, status: int, body: bytes, headers=None):
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def outcomes(names, **environment) -> list[str]:
    """What `resolve` says to each (name, revision), in a fresh process: the real huggingface_hub, its environment."""
    code = """
import json, sys
from phi3_mlx.errors import ModelNotFoundError
from phi3_mlx.store.hub import resolve
for name, revision in json.loads(sys.argv[1]):
    try:
        print(resolve(name, revision))
    except ModelNotFoundError as error:
        print(error)
"""
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1", **environment}
    for variable in ("HF_HUB_CACHE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", code, json.dumps(names)]
    done = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()


def test_the_real_library(tmp_path):
    """Downloads only what is wanted, says what is wrong, and needs no server for what it has."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"http://127.0.0.1:{server.server_port}"
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": host, "NO_PROXY": "127.0.0.1"}
    snapshots = tmp_path / "home" / "hub" / "models--o--good" / "snapshots"
    try:
        names = [("o/good", None), ("o/absent", None), ("o/gated", None), ("o/good", "v9"), ("o/pickle", None)]
        good, absent, gated, revision, pickled = outcomes(names, **environment)
    finally:
        server.shutdown()
        server.server_close()
    assert good == str(snapshots / COMMIT)
    assert sorted(file.name for file in Path(good).iterdir()) == sorted(FILES)
    assert set(FakeHub.fetched) == set(FILES)
    assert absent.startswith(f"no repository o/absent at {host}; ")
    assert gated.startswith(f"o/gated is gated: accept its terms at {host}/o/gated, then type `hf auth login`")
    assert revision == f"o/good has no revision 'v9'; see {host}/o/good/commits"
    assert pickled.startswith("o/pickle has no model*.safetensors; pickle weights (*.bin) are never read")

    again, absent = outcomes([("o/good", None), ("o/absent", None)], **environment)
    assert again == good
    assert absent.startswith(f"o/absent is not on this disk, and {host} did not answer (")
    assert absent.endswith("; a local directory and the bundled model, tiny, work without it")

    (snapshots / COMMIT / "tokenizer.json").unlink()
    names = [("o/good", None), ("phi-4", None)]
    for name, text in zip(names, outcomes(names, **environment, HF_HUB_OFFLINE="1"), strict=True):
        assert text.startswith(
            f"{hub._REPO_IDS.get(name[0], name[0])} is not, or not wholly, on this disk, and HF_HUB_OFFLINE"
        )


def test_a_directory_may_be_given_as_a_path():
    assert hub.resolve(ROOT / "weights" / "tiny") == hub.resolve("tiny")
