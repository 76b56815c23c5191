"""A judge on loopback that does as it is told, and questions in FastChat's files. The texts are ours."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CATEGORIES = ("writing", "math", "stem")


class FakeJudge(ThreadingHTTPServer):
    """OpenAI's chat completions. `script(number, body)` gives a text, or (status, body, headers), for a request."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.bodies, self.keys, self.lock = script, [], [], threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that gave up


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body)
            self.server.keys.append(self.headers["Authorization"])
        said = self.server.script(number, body)
        status, content, headers = said if isinstance(said, tuple) else (200, reply(said), {})
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        if "Content-Length" in headers:  # more was promised
            self.close_connection = True

    def log_message(self, *_):
        pass


def reply(text):
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
    }


@contextlib.contextmanager
def judging(script):
    server = FakeJudge(script)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def fault(status, message="no", **headers):
    return status, {"error": {"message": message}}, {"retry-after-ms": "10", **headers}


def slow(seconds, text="Rating: [[5]]"):
    time.sleep(seconds)
    return text


def write_bench(folder, each=2, categories=CATEGORIES, references=True):
    """FastChat's layout with `each` questions of each category, whose ids begin at 81."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"question_id": 81 + n, "category": category, "turns": [f"Tell me about duck {n}.", f"And frog {n}?"]}
        for n, category in enumerate(category for category in categories for _ in range(each))
    ]
    (folder / "question.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if references:
        (folder / "reference_answer").mkdir(exist_ok=True)
        right = [
            {"question_id": line["question_id"], "choices": [{"index": 0, "turns": ["It is 1.", "It is 2."]}]}
            for line in lines
            if line["category"] == "math"
        ]
        (folder / "reference_answer" / "gpt-4.jsonl").write_text("".join(json.dumps(line) + "\n" for line in right))
    return folder


PLACES = {
    "single-v1": "Q {question} A {answer} {{x}}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-v1-multi-turn": "Q {question_1} A {answer_1} Q {question_2} A {answer_2}",
    "single-math-v1-multi-turn": "{question_1} {ref_answer_1} {question_2} {ref_answer_2} {answer_1} {answer_2}",
    "pair-v2": "Q {question} A {answer_a} B {answer_b}",
    "pair-math-v1": "Q {question} R {ref_answer_1} A {answer_a} B {answer_b}",
    "pair-v2-multi-turn": "{question_1} {question_2} {answer_a_1} {answer_b_1} {answer_a_2} {answer_b_2}",
    "pair-math-v1-multi-turn": "{question_1} {ref_answer_1} {question_2} {ref_answer_2} {answer_a_1} {answer_b_1} "
    "{answer_a_2} {answer_b_2}",
}


def write_prompts(folder, places=PLACES):
    path = folder / "judge_prompts.jsonl"
    lines = [
        {"name": name, "type": "x", "system_prompt": f"You are {name}.", "prompt_template": template}
        for name, template in places.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
