"""As much of huggingface.co as an upload needs, on the loopback: repositories, large files, commits."""

from __future__ import annotations

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_thisIsNoTokenOfAnybodyAtAll123"


class Hub:
    """What the server has and was asked: `repositories` by name, each with `private` and `files`; `objects` by hash."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.breaks_after: int | None = None  # large files, after which the line is cut
        self.host = ""

    def count(self, beginning: str) -> int:
        return sum(line.startswith(beginning) for line in self.asked)


@contextmanager
def fake_hub():
    """A hub that runs while the block does."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.host = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _is_private(given):
    """Versions of the library say it in two ways."""
    return given["private"] if "private" in given else given["visibility"] == "private"


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        repo_id = self.path.split("?")[0].removeprefix("/api/models/")
        if not self.asked():
            return
        there = self.hub.repositories.get(repo_id)
        if there is None:
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        else:
            self.answer(200, {"id": repo_id, "private": there["private"], "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if not self.asked():
            return
        if self.path == "/api/repos/create":
            given = json.loads(body)
            repo_id = f"{given['organization']}/{given['name']}"
            self.hub.repositories[repo_id] = {"private": _is_private(given), "files": {}, "commits": 0}
            self.answer(200, {"url": f"{self.hub.host}/{repo_id}"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".gguf")) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer(200, {"transfer": "basic", "objects": [self.wanted(o) for o in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self.commit(self.path.split("/commit/")[0].removeprefix("/api/models/"), body)
        else:
            self.answer(404, {"error": f"no {self.path}"})

    def wanted(self, given):
        if given["oid"] in self.hub.objects:
            return given
        return {**given, "actions": {"upload": {"href": f"{self.hub.host}/objects/{given['oid']}"}}}

    def do_PUT(self):
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked(open_to_all=True)
        if self.hub.breaks_after is not None and len(self.hub.objects) >= self.hub.breaks_after:
            self.answer(400, {"error": f"cut while {TOKEN} was sent"})
            return
        self.hub.objects[self.path.rpartition("/")[2]] = data
        self.answer(200, {})

    def commit(self, repo_id, body):
        repository = self.hub.repositories[repo_id]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                repository["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository["files"][value["path"]] = self.hub.objects[value["oid"]]
        repository["commits"] += 1
        url = f"{self.hub.host}/{repo_id}/commit/{'1' * 40}"
        self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""})

    def asked(self, *, open_to_all=False):
        """Whether who asks may; notes the request."""
        self.hub.asked.append(f"{self.command} {self.path}")
        if open_to_all or self.headers["Authorization"] == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": f"Invalid token {self.headers['Authorization']}"})
        return False

    def answer(self, status, value, headers=None):
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, text)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass
