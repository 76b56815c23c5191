"""Jobs that are wrong, fail, or are broken off: the others go on, no thread matters, and nothing is left behind."""

import gc
import math
import weakref

import mlx.core as mx
import pytest
from test_threads import elsewhere
from test_traffic import MODELS, SAMPLINGS, Fails, ids_of, traffic

from phi3_mlx.engine import batch
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.lookup import LookupDrafter
from phi3_mlx.engine.processors import Bias
from phi3_mlx.engine.rows import Row
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import MemoryLimitError, OptionError, Phi3Error
from phi3_mlx.models.cache import KVBits, KVCache
from phi3_mlx.models.decoder import Decoder
from phi3_mlx.models.slots import SharedKVCache

MODEL = MODELS["3.5-mini"]
VOCABULARY = MODEL.config.vocab_size


class Gives:
    """A processor that is a function of the logits."""

    def __init__(self, function, reads_answer=False):
        self.function, self.reads_answer = function, reads_answer

    def __call__(self, answer, logits):
        return self.function(logits)


def breaks_off(*_):
    raise KeyboardInterrupt


def job(seed, **options):
    return Job(**{"prompt": ids_of(MODEL, 10 + seed, seed), "max_tokens": 8, **options})


def ids_alone(job):
    return [token[0] for token in traffic(MODEL, [job], [0])[0][0]]


WRONG = {
    "too few logits": (lambda logits: logits[:5], r"shape \(5,\); expected the logits, of shape \(96,\)"),
    "a batch": (lambda logits: logits[None], r"shape \(1, 96\)"),
    "nothing": (lambda logits: None, "returned None"),
    "all excluded": (lambda logits: mx.full(logits.shape, -math.inf), "exclude every token"),
    "a NaN": (lambda logits: mx.where(mx.arange(VOCABULARY) == 3, math.nan, logits), "make a logit NaN"),
    "an id too large": (lambda logits: Bias({VOCABULARY: 1.0})((), logits), "a bias has token id 96, outside"),
    "a negative id": (lambda logits: Bias({-1: 1.0, 3: 1.0})((), logits), "a bias has token id -1, outside"),
}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("reads_answer", [False, True])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_processor_that_gives_what_cannot_be_drawn_from_ends_its_job_alone(wrong, reads_answer, temperature):
    function, message = WRONG[wrong]
    bad = job(2, sampling=Sampling(temperature, seed=1), processors=[Gives(function, reads_answer)])
    said, failed = traffic(MODEL, [job(0), bad, job(1)], [0, 0, 0])
    assert list(failed) == [1]
    with pytest.raises(Exception, match=message):
        raise failed[1]
    assert not said[1]
    for i in (0, 1):
        assert [token[0] for token in said[2 * i]] == ids_alone(job(i))


def test_a_processor_may_give_another_number_type():
    said, failed = traffic(
        MODEL, [job(0, processors=[Gives(lambda logits: logits.astype(mx.float16))]), job(1)], [0, 0]
    )
    assert not failed
    assert [token[0] for token in said[1]] == ids_alone(job(1))


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": -1},
        {"stop_ids": 5},
        {"stop_ids": ["x"]},
        {"kv_bits": 4},
        {"kv_bits": KVBits(4, 4, 64)},  # heads are 96 wide
        {"processors": [lambda answer, logits: logits]},
        {"processors": [3]},
    ],
)
def test_wrong_options_are_refused_before_a_job_waits(options):
    runs = Scheduler(MODEL, room=math.inf)
    with pytest.raises(OptionError):
        runs.submit(job(0, **options))
    assert not runs.busy


def test_a_job_that_was_cancelled_while_it_waited_lacks_nothing():
    measure = Scheduler(MODEL, room=math.inf)
    measure.submit(job(0, max_tokens=30))
    measure.admit()
    runs = Scheduler(MODEL, room=measure._plan.total - measure._plan.weights + 1000)
    rows = [runs.submit(job(0, max_tokens=30)) for _ in range(2)]
    runs.step()
    assert runs.lacks
    rows[1].finish()
    assert not runs.lacks
    while runs.busy:
        assert not runs.step().failed
    assert not runs.lacks
    assert not rows[1].answer


@pytest.mark.parametrize("how", ["ends", "fails", "breaks off"])
def test_a_cache_that_a_job_brought_keeps_nothing_of_the_rows_beside_it(how, monkeypatch):
    runs = Scheduler(MODEL, room=math.inf)
    caches = []
    for seed in range(3):
        cache = MODEL.make_cache()
        MODEL(mx.array([ids_of(MODEL, 9, seed)]), cache)
        caches.append(cache)
    for seed, cache in enumerate(caches):
        failing = [Fails(16)] if how == "fails" else []
        runs.submit(job(seed, cache=cache, max_tokens=20, processors=failing))
    shared = False
    for _ in range(12):
        runs.step()
        shared = shared or all(isinstance(cache[0], SharedKVCache) for cache in caches)
    assert shared
    if how == "breaks off":
        with monkeypatch.context() as patch:
            patch.setattr(batch, "queue_pass", breaks_off)
            with pytest.raises(KeyboardInterrupt):
                runs.step()
    while runs.busy:
        runs.step()
    assert [type(layer) is KVCache for cache in caches for layer in cache] == [True] * 6
    assert all(len(layer.state[0]) == 1 for cache in caches for layer in cache)


def test_a_processor_that_fails_while_drafts_are_verified_ends_its_job_alone(monkeypatch):
    monkeypatch.setattr(LookupDrafter, "length", lambda self, most: most)
    drafting = job(0, prompt=ids_of(MODEL, 4, 0) * 4, max_tokens=30, lookup=4, processors=[Fails(6, False)])
    runs = Scheduler(MODEL, room=math.inf)
    row, failed, drafted, said = runs.submit(drafting), [], 0, []
    other = None
    while runs.busy:
        step = runs.step()
        failed += step.failed
        drafted += step.drafted
        said += [token.id for token in step.tokens if token.row != row.index]
        if failed and other is None:
            other = runs.submit(job(1))
    assert failed == [row]
    assert str(row.error) == "cannot go on"
    assert said == ids_alone(job(1))


def test_a_cache_that_has_read_nothing_is_taken_as_a_new_one():
    assert ids_alone(job(0, cache=MODEL.make_cache())) == ids_alone(job(0))


# ------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("name", MODELS)
def test_each_step_may_be_taken_by_another_thread(name):
    model = MODELS[name]
    jobs = [Job(ids_of(model, 50 + 30 * i, i), 6, SAMPLINGS[i]) for i in range(3)]  # several chunks each
    runs, said = Scheduler(model, room=math.inf, chunk=16), [[], [], []]
    for wanted in jobs:
        elsewhere(runs.submit, wanted)
    while runs.busy:
        step = elsewhere(runs.step)
        assert not step.failed
        for token in step.tokens:
            said[token.row].append(token.id)
    for ours, wanted in zip(said, jobs, strict=True):
        assert ours == [token[0] for token in traffic(model, [wanted], [0])[0][0]]


def test_what_a_broken_prefill_has_read_serves_a_run_of_another_thread():
    def broken(done, total):
        if done == 32:
            raise InterruptedError

    prompt = ids_of(MODEL, 90, 0)
    first = Generation(
        MODEL, [prompt], max_tokens=4, sampling=Sampling(), room=math.inf, prefill_chunk=16, on_prefill=broken
    )
    with pytest.raises(InterruptedError):
        elsewhere(list, first)
    again = Generation(MODEL, [prompt], max_tokens=4, sampling=Sampling(), room=math.inf, cache=first.cache)
    tokens = [token.id for token in again]
    assert 32 <= 90 - again.statistics.prefilled_tokens < 90
    assert tokens == ids_alone(Job(prompt, 4))


# ------------------------------------------------------------------------------------------ broken off


@pytest.mark.parametrize("after", range(0, 40, 3))
def test_after_a_ctrl_c_the_scheduler_runs_what_waits(monkeypatch, after):
    calls, together = [0], Decoder._through

    def interrupted(self, *args):
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt
        return together(self, *args)

    runs = Scheduler(MODEL, room=math.inf, chunk=4)
    rows = [runs.submit(job(i, max_tokens=40)) for i in range(2)]
    monkeypatch.setattr(Decoder, "_through", interrupted)
    try:
        while runs.busy:
            runs.step()
    except KeyboardInterrupt:
        assert all(row.finished and row.error is None for row in rows)
    monkeypatch.undo()
    row, said = runs.submit(job(2)), []
    while runs.busy:
        said += [token.id for token in runs.step().tokens if token.row == row.index]
    assert said == ids_alone(job(2))
    assert not runs._workloads


def test_a_scheduler_without_jobs_holds_none():
    runs = Scheduler(MODEL, room=math.inf, chunk=16)
    runs.submit(job(0, max_tokens=30, stop_ids={ids_alone(job(0))[-1]}))  # it ends while a further step is queued
    caches = []
    while runs.busy:
        runs.step()
        caches += [weakref.ref(layer) for row in runs._batch.rows for layer in row.cache if not caches]
    assert caches
    assert not any(cache() for cache in caches)


def test_jobs_that_failed_hold_no_memory_and_say_where():
    gc.collect()
    runs, rows = Scheduler(MODEL, room=math.inf, chunk=16), []

    def fail(count):
        for i in range(count):
            rows.append(runs.submit(job(0, processors=[Fails(i % 3, bool(i % 2))])))
        while runs.busy:
            runs.step()
        assert "in __call__" in str(rows[-1].error.__cause__)
        rows.clear()
        mx.synchronize()

    gc.disable()
    try:
        fail(5)
        before = mx.get_active_memory()
        fail(20)
        assert mx.get_active_memory() - before < 1000  # numbers that compiled steps keep; a cache has far more
    finally:
        gc.enable()


def test_a_row_that_waits_may_be_cancelled_and_the_next_one_joins():
    least = Scheduler(MODEL, room=math.inf, chunk=16)
    for i in range(2):
        least.submit(job(i, max_tokens=500 - 400 * i))
    least.admit()
    runs = Scheduler(MODEL, room=least._plan.total - least._plan.weights, chunk=16)
    first, large, small = (runs.submit(job(i, max_tokens=n)) for i, n in enumerate((500, 600, 100)))
    runs.step()
    assert first.begun
    assert not large.begun
    large.finish()
    runs.step()
    assert small.begun
    assert not first.finished


def test_a_row_that_pauses_frees_the_cache_that_its_job_brought():
    cache = MODEL.make_cache()
    runs = Scheduler(MODEL, room=math.inf, chunk=16)
    row = runs.submit(job(0, cache=cache, max_tokens=20))
    other = runs.submit(job(1, max_tokens=20))
    said = {row.index: [], other.index: []}
    for count in range(100):
        if count == 6:
            runs._batch.remove(row)
            row.pause()
            assert not sum(layer.nbytes for layer in cache)
            assert (row.main.brought, row.reused) == (0, 0)  # no room is counted for it, and nothing is spared
        if count == 9:
            runs._batch.add(row, 16)
        for token in runs.step().tokens:
            said[token.row].append(token.id)
    assert said[row.index] == ids_alone(job(0, max_tokens=20))
    assert said[other.index] == ids_alone(job(1, max_tokens=20))


def test_a_row_that_pauses_leaves_a_cache_alone_that_another_run_took_over():
    cache = MODEL.make_cache()
    runs, thief = Scheduler(MODEL, room=math.inf, chunk=16), Scheduler(MODEL, room=math.inf, chunk=16)
    row = runs.submit(job(0, cache=cache))
    runs.step()
    thief.submit(job(0, cache=cache))
    thief.admit()
    thief.step()
    runs._batch.remove(row)
    row.pause()
    said = []
    while thief.busy:
        said += [token.id for token in thief.step().tokens]
    assert said == ids_alone(job(0))


def test_a_refusal_says_how_long_an_answer_fits_and_nothing_of_answers_where_none_is_wanted():
    least = Scheduler(MODEL, room=math.inf, chunk=16)
    least.submit(job(0, max_tokens=200))
    least.admit()
    runs = Scheduler(MODEL, room=least._plan.total - least._plan.weights, chunk=16)
    with pytest.raises(MemoryLimitError, match=r"10 of the prompt, 900 for the answer.*max_tokens=\d+ fits"):
        runs.submit(job(0, max_tokens=900))
    with pytest.raises(MemoryLimitError, match=r"up to \d+ tokens fit") as refused:
        runs.submit(Job(ids_of(MODEL, 900, 0), 0))
    assert "answer" not in str(refused.value)
    assert "max_tokens" not in str(refused.value)


@pytest.mark.parametrize("reads_answer", [False, True])
def test_the_error_of_one_prompt_of_several_says_which_it_is(reads_answer):
    bad = Gives(lambda logits: mx.full(logits.shape, -math.inf), reads_answer)
    processors = [[], [], [bad], []]
    generation = Generation(
        MODEL, [job(i).prompt for i in range(4)], max_tokens=4, sampling=Sampling(), processors=processors
    )
    with pytest.raises(Phi3Error, match=r"^prompt 2: the processors of this request exclude every token"):
        list(generation)
    alone = Generation(MODEL, [job(2).prompt], max_tokens=4, sampling=Sampling(), processors=[[bad]])
    with pytest.raises(Phi3Error, match=r"^the processors"):
        list(alone)
    with pytest.raises(MemoryLimitError, match=r"^prompt 1: .* fit"):
        Generation(MODEL, [[5], job(0).prompt * 60], max_tokens=4, sampling=Sampling(), room=600_000)


def test_an_error_of_a_callers_own_processor_is_raised_as_it_is():
    generation = Generation(
        MODEL, [job(0).prompt, job(1).prompt], max_tokens=4, sampling=Sampling(), processors=[[], [Fails(1)]]
    )
    with pytest.raises(RuntimeError, match=r"^cannot go on$"):
        list(generation)


@pytest.mark.parametrize("answers", [True, False])
def test_newcomers_are_read_in_small_parts_only_while_others_answer(answers):
    """A row that others branch from stays without an answer, and nobody waits for it."""
    rows = batch.Batch(MODEL)
    first = Row(0, job(0, max_tokens=50) if answers else job(0, max_tokens=0, branches=1), MODEL)
    rows.add(first, 64)
    for _ in range(4):
        rows.step(64, (0.0, math.inf))
    assert rows.answering == answers
    rows.add(Row(1, job(150), MODEL), 64)
    read = [rows.step(64, (0.0, math.inf)).read_tokens for _ in range(4)]
    assert max(read) == (32 if answers else 64)


def test_what_must_follow_is_bounded_for_all_rows_together():
    class Forced:
        answer = (1,)

        def forced(self, answer, most):
            return [7] * min(most, 5)

    first, second, third = rows = [Forced(), Forced(), Forced()]
    assert batch.Batch._runs(rows, None, 8) == {first: [1, *[7] * 5], second: [1, *[7] * 3]}
    assert batch.Batch._runs([third], None, 1) == {third: [1, 7]}


def test_half_of_a_chunk_is_left_to_those_who_read(monkeypatch):
    most = []
    monkeypatch.setattr(batch.Batch, "_runs", staticmethod(lambda rows, last, tokens: most.append(tokens) or {}))
    runs = Scheduler(MODEL, room=math.inf, chunk=16)
    runs.submit(job(0, max_tokens=50))
    for _ in range(4):
        runs.step()
    assert most[-1] == 16
    runs.submit(job(100))
    for _ in range(4):
        runs.step()
    assert most[-1] == 8
