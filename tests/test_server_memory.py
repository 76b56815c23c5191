"""A server with little memory: what it holds never passes its limit, what fits later waits, what never fits is told."""

import gc
import random
import re
import threading
import time
from collections import Counter

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import mlx.core as mx
from mlx.utils import tree_flatten
from served import serving

from phi3_mlx import load
from phi3_mlx.engine import machine
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import MemoryLimitError
from phi3_mlx.generation.request import Request
from phi3_mlx.server.models import Models
from phi3_mlx.server.worker import Worker


def body(draw):
    """A request of one of many sizes, from a word to one that never fits."""
    ids = [draw.randrange(300, 3000) for _ in range(draw.choice((3, 40, 120, 200)))]
    longest = draw.choice((1, 8, 20))
    return {"model": "tiny", "prompt": ids, "max_tokens": longest, "n": draw.choice((1, 1, 4)), "logprobs": 2}


NEVER = {"model": "tiny", "prompt": [5] * 3900, "max_tokens": 150}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 12))])
def test_memory_never_passes_the_limit_whatever_is_asked(seed):
    model, _ = load("tiny")
    size = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    del model
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    limit = int((before + 1.3 * size + 16e6) * 16 / 15)
    models = Models(["tiny"], memory=limit)
    worker = Worker(models, queue=3)
    told, faults = Counter(), []

    def client(number):
        draw = random.Random(seed * 100 + number)
        for turn in range(3):
            asked = NEVER if (number, turn) in ((0, 2), (5, 0)) else body(draw)
            status = 429
            while status == 429:
                status, headers, reply = served.request("POST", "/v1/completions", asked, seconds=120)
                told[status] += 1
                if status == 429:
                    faults.extend([] if int(headers["retry-after"]) >= 1 else ["no Retry-After"])
                    time.sleep(0.05)
            expected = 400 if asked is NEVER else 200
            if status != expected:
                faults.append((status, reply["error"]["message"]))
            elif asked is NEVER and not (
                reply["error"]["code"] == "memory_limit_exceeded"
                and len(re.findall(r"\d[\d.]* [GM]B", reply["error"]["message"])) >= 2
            ):
                faults.append(reply)

    try:
        with serving(worker, base=Request(lookup=0), listed=models.listed) as served:
            served.request("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 1})
            mx.reset_peak_memory()
            threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            peak = mx.get_peak_memory()
    finally:
        worker.close(wait=False)
    assert not faults
    assert told[400] == 2
    assert told[200] == 22
    assert told[429] > 0
    assert peak <= limit
    assert peak > before + size + 2e6, "nothing came near the limit"


class Busy:
    """Others that run: they were promised 5 MB more than they hold, and would give nothing else back."""

    reserved, freeable = 5_000_000, 0


def test_what_others_compute_with_makes_no_request_impossible(monkeypatch):
    model, _ = load("tiny")

    def fits(room, others=None):
        monkeypatch.setattr(machine, "room", lambda: room)
        try:
            Scheduler(model, elsewhere=others).submit(Job([5] * 500, 100))
        except MemoryLimitError:
            return False
        return True

    least, needed = 0, 1 << 30
    while needed - least > 1:
        middle = (least + needed) // 2
        least, needed = (least, middle) if fits(middle) else (middle, needed)
    assert fits(needed - Busy.reserved, Busy())  # all of it is in use now, and is given back
    assert not fits(needed - Busy.reserved - 1, Busy())


def test_a_model_that_just_fits_waits_until_nothing_else_is_computed(monkeypatch):
    models = Models(["tiny"])
    source = models.source("tiny")
    needed = models._loading_bytes(source)
    monkeypatch.setattr(models, "reserved", lambda besides=None: 1_000_000)
    monkeypatch.setattr(machine, "room", lambda: needed - 1_000_000)  # of what runs all is in use
    assert models.get("tiny") is None
    monkeypatch.setattr(models, "reserved", lambda besides=None: 0)
    with pytest.raises(MemoryLimitError):
        models.get("tiny")
    monkeypatch.setattr(machine, "room", lambda: needed)
    assert models.get("tiny") is not None
    models.clear()
