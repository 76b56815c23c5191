"""Jobs that join, leave and fail at any step: each gives what it gives alone, within the memory that was planned."""

import dataclasses
import functools
import gc
import itertools
import math
from collections import Counter

import mlx.core as mx
import moe_models
import oracle
import pytest
import small_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import CONFIGS, ORIGINAL, slim
from peaks import fair_peak
from rails import MaskAlone, Rails

from phi3_mlx.engine import batch, machine, scheduler
from phi3_mlx.engine.continuations import Continued, _Group
from phi3_mlx.engine.generation import Generation
from phi3_mlx.engine.jobs import Job
from phi3_mlx.engine.lookup import LookupDrafter
from phi3_mlx.engine.processors import Bias, Constraint, processed
from phi3_mlx.engine.sampling import Sampling
from phi3_mlx.engine.scheduler import Scheduler
from phi3_mlx.errors import CacheError, MemoryLimitError, OptionError, Phi3Error, PromptError
from phi3_mlx.models.cache import KVBits

pytestmark = pytest.mark.usefixtures("sharing_at_once")
MODELS = {
    "3.5-mini": oracle.make_ours(slim(CONFIGS["3.5-mini"])),
    "mini-4k": oracle.make_ours(slim(CONFIGS["mini-4k"])),
    "long-and-window": oracle.make_ours(slim(CONFIGS["long-and-window"])),
    "phi-4-mini": oracle.make_ours(slim(CONFIGS["phi-4-mini"])),
    "phi3-small": small_models.make({**small_models.RAW, **small_models.LONG}),
    "moe": moe_models.make_ours(moe_models.CONFIGS["gain by regime"]),
}
# Log-probabilities are this near to those of the job alone, and the two best values may change places where they are
# nearer. In a packed cache a key between two steps of its scale is rounded either way, up to 3e-3 off.
NEAR = {None: 1e-4, 8: 5e-3}
SAMPLINGS = [
    Sampling(),
    Sampling(repetition_penalty=1.1),
    Sampling(0.8, seed=1),
    Sampling(0.7, top_p=0.9, top_k=20, min_p=0.02, repetition_penalty=1.05, seed=2),
    Sampling(presence_penalty=0.5, frequency_penalty=0.3),
    Sampling(0.9, repetition_penalty=1.1, frequency_penalty=-0.2, seed=3),
]


class Alternate:
    """Excludes every other id, by the parity of the last token: a constraint that depends on the answer."""

    reads_answer = True

    def __call__(self, answer, logits):
        ids = mx.arange(logits.shape[-1])
        return mx.where(ids % 2 == (answer[-1] % 2 if answer else 0), -math.inf, logits)


class Fails:
    """Raises at the token after `after`."""

    def __init__(self, after, reads_answer=True):
        self.after, self.reads_answer, self.calls = after, reads_answer, 0

    def __call__(self, answer, logits):
        self.calls += 1
        if self.calls > self.after:
            raise RuntimeError("cannot go on")
        return logits


class Ends:
    """Raises once the answer has `after` tokens, or excludes every token."""

    reads_answer = True

    def __init__(self, after, raises):
        self.after, self.raises = after, raises

    def __call__(self, answer, logits):
        if len(answer) < self.after:
            return logits
        if self.raises:
            raise RuntimeError("cannot go on")
        return mx.full(logits.shape, -math.inf)


PROCESSORS = [
    (),
    (Bias({3: 2.0, 5: -1.5}),),
    (Alternate(),),
    (Alternate(), Bias({8: 1.0})),
    (Constraint(Rails(5)),),
    (Ends(3, True),),
    (Bias({3: 2.0}), Ends(2, False)),
]
RAILS, FAILING = 4, {5, 6}  # places of some


def ids_of(model, length, seed):
    return [2 + (i * 7 + seed * 31 + i * i) % (min(model.config.vocab_size, 96) - 2) for i in range(length)]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A job of a random mix: when it joins, and after how many tokens it is cancelled."""

    join: int
    cancel: int | None
    length: int
    seed: int
    max_tokens: int
    sampling: int
    processors: int
    bits: int | None
    lookup: int
    scored: str = ""  # "prompt", or "continuations": a few of them, of one trunk

    def job(self, model, stop_ids=frozenset({40, 41})):
        packs = self.bits is not None and model.config.head_dim % 32 == 0
        bits = None if not packs else KVBits(self.bits, self.bits)
        prompt = ids_of(model, self.length, self.seed)
        if self.scored:
            return Job(prompt, 0, kv_bits=bits, scored_from=1 + len(prompt) // 2, candidates=[3, 9, 40])
        return Job(
            prompt,
            self.max_tokens,
            SAMPLINGS[self.sampling],
            stop_ids,
            kv_bits=bits,
            lookup=self.lookup,
            processors=PROCESSORS[self.processors],
        )


plots = st.builds(
    Plot,
    join=st.integers(0, 25),
    cancel=st.none() | st.integers(0, 12),
    length=st.integers(1, 12) | st.integers(ORIGINAL - 14, ORIGINAL + 4) | st.integers(13, 70),
    seed=st.integers(0, 2),
    max_tokens=st.integers(1, 20),
    sampling=st.integers(0, len(SAMPLINGS) - 1),
    processors=st.integers(0, len(PROCESSORS) - 1),
    bits=st.none() | st.just(8),
    lookup=st.sampled_from([0, 4]),
    scored=st.sampled_from(["", "", "", "prompt", "continuations"]),
)


class Scored:
    """A job that scores, or the continuations of a trunk, while it goes on; `scores` once it has ended."""

    def __init__(self, plot, model, runs):
        self._runs, self.scores, self._group, job = runs, None, None, plot.job(model)
        if plot.scored == "prompt":
            self._row = runs.submit(job)
            return
        prompt = tuple(job.prompt)
        continued = [Continued((*prompt, *ids), len(prompt)) for ids in ([7, 8, 9], [7, 8, 10], [11], [12, 13])]
        if len({model.model.is_long(len(each.ids)) for each in continued}) > 1:  # a group is of one regime
            continued = continued[:2]
        self._group, self._count = _Group(enumerate(continued), job.kv_bits), len(continued)
        self._group.begin(runs)

    def go_on(self):
        """Whether it has not ended."""
        if self._group is None:
            if self._row.finished:
                self.scores = list(self._row.scores)
        elif not self._group.go_on(self._runs):
            self.scores = [token for i in range(self._count) for token in self._group.scores[i]]
        return self.scores is None


@functools.cache
def alone(name, plot):
    """What a job gives by itself, a token a step: (id, logprob, reason) each. Or its scores."""
    model = MODELS[name]
    runs = Scheduler(model, room=math.inf)
    if plot.scored:
        scored = Scored(plot, model, runs)
        while scored.go_on():
            assert not runs.step().failed
        return scored.scores
    job = dataclasses.replace(plot, lookup=0).job(model)
    if plot.processors == RAILS:
        job = dataclasses.replace(job, processors=(MaskAlone(Rails(5)),))
    runs.submit(job)
    tokens = []
    while runs.busy:
        step = runs.step()
        assert bool(step.failed) <= (plot.processors in FAILING)
        tokens += [(token.id, token.logprob, token.finish_reason) for token in step.tokens]
    return tokens


def mixed(model, mix, chunk, **options):
    """Run a mix: what each said or scored, those that failed, and how many paused."""
    runs = Scheduler(model, chunk=chunk, **{"room": math.inf, **options})
    said, failed, rows, scored, paused = [[] for _ in mix], set(), {}, {}, set()
    order = sorted(range(len(mix)), key=lambda i: mix[i].join)
    count = 0
    while True:
        for i in [i for i in order if mix[i].join <= count]:
            order.remove(i)
            if mix[i].scored:
                scored[i] = Scored(mix[i], model, runs)
                continue
            row = runs.submit(mix[i].job(model))
            rows[row.index] = i, row
            if mix[i].cancel == 0:
                row.finish()
        for i, each in list(scored.items()):
            if not each.go_on():
                said[i] = scored.pop(i).scores
        if not runs.busy and not order and not scored:
            return said, failed, len(paused)
        step, count = runs.step(), count + 1
        failed |= {rows[row.index][0] for row in step.failed}
        for token in step.tokens:
            i, row = rows[token.row]
            if mix[i].cancel is None or len(said[i]) < mix[i].cancel:
                said[i].append((token.id, token.logprob, token.finish_reason))
            if len(said[i]) == mix[i].cancel:
                row.finish()
        paused |= {i for i, row in rows.values() if said[i] and not row.begun and not row.finished}


def traffic(model, jobs, joins, cancels=(), chunk=16, **options):
    """Run jobs that join at the given steps; `cancels` (row, tokens): a row is ended once it has said so many."""
    runs = Scheduler(model, chunk=chunk, **{"room": math.inf, **options})
    said, failed, rows = [[] for _ in jobs], {}, {}
    cancels, order = dict(cancels), sorted(range(len(jobs)), key=lambda i: joins[i])
    for count in itertools.count():
        for i in list(order):
            if joins[i] <= count:
                order.remove(i)
                rows[runs.submit(jobs[i])] = i
                if cancels.get(i) == 0:
                    list(rows)[-1].finish()
        if not runs.busy and not order:
            break
        step = runs.step()
        for row in step.failed:
            failed[rows[row]] = row.error
        for row in step.ended:
            row.let_go()
        by_index = {row.index: row for row in rows}
        for token in step.tokens:
            row = by_index[token.row]
            i = rows[row]
            if i in cancels and len(said[i]) >= cancels[i]:
                continue
            said[i].append((token.id, token.logprob, token.finish_reason))
            if len(said[i]) == cancels.get(i):
                row.finish()
    return said, failed


def is_tie(model, plot, tokens, place):
    """Whether the two best values of the token at `place` are near; of a packed cache, or it is drawn by chance."""
    job, answer = plot.job(model), [token for token, _, _ in tokens[:place]]
    if job.sampling.temperature:
        return plot.bits is not None
    logits = model(mx.array([[*job.prompt, *answer]]), model.make_cache(bits=job.kv_bits))[0, -1].astype(mx.float32)
    best = mx.sort(processed(job.processors, answer, logits))[-2:].tolist()
    return best[1] - best[0] < NEAR[plot.bits]


def excluded(name, plot, said, expected):
    """How many of the expected tokens are excluded, because of a tie before; all others must be what was said."""
    near = NEAR[plot.bits]
    if plot.scored:
        assert [ours.logprob for ours in said] == pytest.approx([theirs.logprob for theirs in expected], abs=near), plot
        return 0
    for place, (ours, theirs) in enumerate(zip(said, expected, strict=False)):
        if ours[0] != theirs[0]:
            assert is_tie(MODELS[name], plot, expected, place), (plot, place)
            return len(expected) - place
        assert ours[1] == pytest.approx(theirs[1], abs=near), (plot, place)
        assert ours[2] == theirs[2]
    return 0


def check_mix(name, mix, chunk, counts, **options):
    """Everything in a mix is what it is alone; what is excluded is counted."""
    said, failed, paused = mixed(MODELS[name], mix, chunk, **options)
    for i, plot in enumerate(mix):
        expected = alone(name, plot)[: None if plot.scored else plot.cancel]
        without = excluded(name, plot, said[i], expected)
        counts["all"] += len(expected)
        counts["excluded"] += without
        assert i not in failed or plot.processors in FAILING, plot
        # Of a draft that fails no token is said.
        assert without or len(said[i]) == len(expected) or (i in failed and plot.lookup), plot
        counts["scored"] += bool(plot.scored)
    counts["paused"] += paused
    counts["failed"] += len(failed)


@pytest.mark.parametrize("name", MODELS)
def test_every_job_gives_what_it_gives_alone(name):
    counts = Counter()

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(mix=st.lists(plots, min_size=1, max_size=7), chunk=st.sampled_from([5, 16, 64]))
    def check(mix, chunk):
        check_mix(name, mix, chunk, counts)

    check()
    assert counts["excluded"] <= 0.01 * counts["all"], counts


def test_drafts_are_made_for_a_row_that_is_alone_and_change_nothing(monkeypatch):
    monkeypatch.setattr(LookupDrafter, "length", lambda self, most: most)  # whether they pay or not
    model = MODELS["3.5-mini"]
    drafted = []
    step = Scheduler.step
    monkeypatch.setattr(Scheduler, "step", lambda self: drafted.append(step(self)) or drafted[-1])
    plots = [Plot(0, None, 12, 0, 30, 0, 0, None, 4), Plot(6, None, 9, 1, 5, 0, 0, None, 4)]
    jobs = [dataclasses.replace(plot.job(model), prompt=ids_of(model, 4, 0) * 4) for plot in plots]
    said, _ = traffic(model, jobs, [0, 6])
    assert sum(step.drafted for step in drafted)
    assert all(len({token.row for token in step.tokens}) <= 1 for step in drafted if step.drafted)
    drafted.clear()
    for i, job in enumerate(jobs):
        plain, _ = traffic(model, [dataclasses.replace(job, lookup=0)], [0])
        assert [token[0] for token in plain[0]] == [token[0] for token in said[i]]
    assert not sum(step.drafted for step in drafted)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("reads_answer", [False, True])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_error_in_one_job_ends_that_job_alone(after, reads_answer):
    model = MODELS["3.5-mini"]
    good = [Plot(0, None, 10, seed, 8, seed, 0, None, 0) for seed in (0, 2)]
    jobs = [plot.job(model) for plot in good]
    bad = dataclasses.replace(jobs[0], processors=(Fails(after, reads_answer),))
    said, failed = traffic(model, [jobs[0], bad, jobs[1]], [0, 1, 2])
    assert list(failed) == [1]
    assert str(failed[1]) == "cannot go on"
    assert len(said[1]) <= after
    for i, plot in ((0, good[0]), (2, good[1])):
        assert [token[0] for token in said[i]] == [token[0] for token in alone("3.5-mini", plot)]


@pytest.mark.parametrize("name", MODELS)
def test_nan_ends_its_job_alone(name):
    model = MODELS[name]
    plot = Plot(0, None, 10, 0, 8, 0, 0, None, 0)
    healthy = plot.job(model)
    runs = Scheduler(model, room=math.inf)
    rows = [runs.submit(healthy), runs.submit(dataclasses.replace(healthy, prompt=ids_of(model, 11, 1)))]
    runs.step()
    for layer in rows[1].cache:
        layer.state = [array * math.nan for array in layer.state]
    said, failed = [], []
    while runs.busy:
        step = runs.step()
        said += [token.id for token in step.tokens if token.row == 0]
        failed += step.failed
    assert failed == [rows[1]]
    assert isinstance(rows[1].error, Phi3Error)
    assert "NaN" in str(rows[1].error)
    assert said == [token[0] for token in alone(name, plot)]


def test_a_cache_that_another_run_took_over_ends_its_job_alone():
    model = MODELS["3.5-mini"]
    plot = Plot(0, None, 10, 0, 12, 0, 0, None, 0)
    runs = Scheduler(model, room=math.inf)
    first = runs.submit(plot.job(model))
    other = runs.submit(dataclasses.replace(plot, seed=1).job(model))
    for _ in range(3):
        runs.step()
    thief = Scheduler(model, room=math.inf)
    thief.submit(dataclasses.replace(plot.job(model), cache=first.cache))
    thief.admit()
    failed, said = [], []
    while runs.busy:
        step = runs.step()
        failed += step.failed
        said += [token.id for token in step.tokens if token.row == other.index]
    assert failed == [first]
    assert isinstance(first.error, CacheError)
    expected = [token[0] for token in alone("3.5-mini", dataclasses.replace(plot, seed=1))]
    assert said == expected[len(expected) - len(said) :]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"prompt": []}, PromptError),
        ({"prompt": [5, 10**6]}, PromptError),
        ({"prompt": "text"}, PromptError),
        ({"max_tokens": 1.5}, OptionError),
        ({"lookup": 99}, OptionError),
        ({"sampling": 0.7}, OptionError),
    ],
)
def test_a_job_that_cannot_be_is_refused_at_once(options, error):
    runs = Scheduler(MODELS["3.5-mini"])
    with pytest.raises(error):
        runs.submit(Job(**{"prompt": [5, 6], **options}))
    with pytest.raises(OptionError, match=r"^job is .+; expected a Job$"):
        runs.submit([5, 6])
    assert not runs.busy


# ------------------------------------------------------------------------------------------ memory


def plans_of(monkeypatch):
    made, together = [], scheduler.plan_together
    monkeypatch.setattr(scheduler, "plan_together", lambda *args: made.append(together(*args)) or made[-1])
    return made


def test_what_does_not_fit_beside_others_waits_and_what_never_fits_is_refused(monkeypatch):
    model = MODELS["3.5-mini"]
    plots = [Plot(0, None, 200, seed, 100, 0, 0, None, 0) for seed in range(4)]
    jobs = [plot.job(model) for plot in plots]
    least = Scheduler(model, room=math.inf, chunk=16)
    least.submit(jobs[0])
    least.admit()
    room = least._plan.total - least._plan.weights
    with pytest.raises(MemoryLimitError, match="may be used"):
        Scheduler(model, room=room - 1, chunk=16).submit(jobs[0])
    runs = Scheduler(model, room=1.6 * room, chunk=16)
    rows = [runs.submit(job) for job in jobs]
    plans = plans_of(monkeypatch)
    most, said = 0, [[] for _ in rows]
    while runs.busy:
        for token in runs.step().tokens:
            said[token.row].append(token.id)
        most = max(most, sum(row.begun and not row.finished for row in rows))
    assert most == 1
    assert len(plans) <= 2 * len(jobs)  # not one each step: it takes as long as a step of a small model
    for i, plot in enumerate(plots):
        assert said[i] == [token[0] for token in alone("3.5-mini", plot)]


def test_an_answer_without_a_limit_grows_by_blocks_and_the_youngest_pauses_where_none_is_left(monkeypatch):
    monkeypatch.setattr(scheduler, "ANSWER_BLOCK", 226)
    monkeypatch.setattr("phi3_mlx.engine.fitting.ANSWER_BLOCK", 226)
    model = MODELS["3.5-mini"]
    plots = [Plot(0, None, 30, seed, 400, seed, 0, None, 0) for seed in (0, 2)]
    limited = [dataclasses.replace(plot.job(model), stop_ids=frozenset()) for plot in plots]
    jobs = [dataclasses.replace(job, max_tokens=None) for job in limited]
    expected = [traffic(model, [job], [0])[0][0] for job in limited]
    measure = Scheduler(model, room=math.inf, chunk=16)
    for job in limited:  # two blocks of 256 tokens: a row of two has no room beside it
        measure.submit(dataclasses.replace(job, max_tokens=226))
    measure.admit()
    runs = Scheduler(model, room=measure._plan.total - measure._plan.weights, chunk=16)
    rows = [runs.submit(job) for job in jobs]
    said, paused = [[], []], 0
    for _ in range(3000):
        for token in runs.step().tokens:
            said[token.row].append((token.id, token.logprob))
        paused += bool(said[1]) and not rows[1].begun
        if len(said[0]) >= 400:
            rows[0].finish()
        if len(said[1]) >= 400:
            break
    assert paused > 50
    assert len(rows[1].job.prompt) < len(rows[1].prompt)
    for ours, theirs in zip(said, expected, strict=True):
        assert [token[0] for token in ours[:400]] == [token[0] for token in theirs]
        assert [token[1] for token in ours[:400]] == pytest.approx([token[1] for token in theirs], abs=1e-4)


def test_an_answer_that_can_never_go_on_ends_with_length():
    model = MODELS["3.5-mini"]
    job = dataclasses.replace(Plot(0, None, 30, 0, 1, 0, 0, None, 0).job(model), max_tokens=None, stop_ids=frozenset())
    measure = Scheduler(model, room=math.inf, chunk=16)
    measure.submit(dataclasses.replace(job, max_tokens=700))
    measure.admit()
    runs = Scheduler(model, room=measure._plan.total - measure._plan.weights, chunk=16)
    runs.submit(job)
    tokens = []
    while runs.busy:
        tokens += runs.step().tokens
    assert tokens[-1].finish_reason == "length"
    assert 480 <= len(tokens) <= 760
    assert len(job.prompt) + len(tokens) < model.config.max_position_embeddings


def test_the_peak_of_a_mix_stays_under_its_plan_and_all_memory_comes_back(monkeypatch):
    plans, model = plans_of(monkeypatch), oracle.make_ours({**CONFIGS["3.5-mini"], "num_hidden_layers": 6})
    mx.eval(model.parameters())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    for seed in range(4):
        plots = [
            Plot(3 * i, 5 if i == 2 else None, (700, 40, 300, 1000, 12, 90)[(i + seed) % 6], i, 40, i % 4, 0, None, 0)
            for i in range(6)
        ]
        plans.clear()

        def fits(taken):
            return taken + plans[0].weights < 1.05 * max(plan.total for plan in plans) + 250_000

        jobs, joins = [plot.job(model) for plot in plots], [plot.join for plot in plots]
        assert fits(fair_peak(lambda jobs=jobs, joins=joins: traffic(model, jobs, joins, {2: 5}, 64), fits))
    gc.collect()
    assert mx.get_active_memory() - before < 1000  # numbers that compiled steps keep


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.long)])
def test_memory_is_back_after_many_requests_some_cancelled_and_some_failed(count):
    model = MODELS["mini-4k"]
    mx.eval(model.parameters())
    runs = Scheduler(model, room=math.inf, chunk=16)

    def requests(count):
        for i in range(count):
            plot = Plot(0, None, 1 + i % 40, i % 3, 1 + i % 5, i % 4, 0, 8 if i % 3 else None, 0)
            job = plot.job(model)
            row = runs.submit(dataclasses.replace(job, processors=(Fails(1),)) if i % 7 == 0 else job)
            runs.step()
            if i % 5 == 0:
                row.finish()
        while runs.busy:
            runs.step()

    requests(20)
    gc.collect()
    before = mx.get_active_memory()
    requests(count)
    gc.collect()
    assert mx.get_active_memory() - before < 1000  # numbers that compiled steps keep; a cache has far more
    assert not runs.busy


def test_a_job_that_no_longer_fits_when_its_turn_comes_fails_with_the_numbers(monkeypatch):
    model, free = MODELS["3.5-mini"], [1 << 40]
    monkeypatch.setattr(machine, "room", lambda: free[0])
    runs = Scheduler(model)
    row = runs.submit(Job([5, 6, 7], 4))
    free[0] = 0
    step = runs.step()
    assert step.failed == [row]
    assert isinstance(row.error, MemoryLimitError)
    assert not runs.busy


# ------------------------------------------------------------------------------------------ fairness


def test_while_a_newcomer_is_read_a_running_row_gets_a_token_with_every_chunk():
    model = MODELS["3.5-mini"]
    plots = [Plot(0, None, 5, 0, 60, 0, 0, None, 0), Plot(4, None, 320, 1, 4, 0, 0, None, 0)]
    runs = Scheduler(model, room=math.inf, chunk=16, chunk_seconds=math.inf)
    first = runs.submit(dataclasses.replace(plots[0].job(model), stop_ids=frozenset()))
    for _ in range(4):
        runs.step()
    second = runs.submit(plots[1].job(model))
    gap, gaps = 0, []
    while second.reading or not second.begun:
        step = runs.step()
        gap += step.read_tokens
        if any(token.row == first.index for token in step.tokens):
            gaps.append(gap)
            gap = 0
    assert len(gaps) >= 20
    assert max(gaps) <= 16


def read_at(speed, monkeypatch):
    """Let prompts be read with so many tokens a second: all alike, or each pass with the next of some speeds.

    On a CPU a pass is computed while it is queued: its time must not count for the pass before it.
    """
    now, queue_pass = [0.0], batch.queue_pass
    speeds = itertools.cycle(speed if isinstance(speed, list) else [speed])
    monkeypatch.setattr(batch.time, "perf_counter", lambda: now[0])

    def slow(*args):
        queued = queue_pass(*args)
        now[0] += queued.read_tokens / next(speeds)
        return queued

    monkeypatch.setattr(batch, "queue_pass", slow)


@pytest.mark.parametrize(("speed", "chunk"), [(100, 200), (10, 32)])
def test_chunks_follow_the_clock_of_their_own_while_nobody_answers(speed, chunk, monkeypatch):
    read_at(speed, monkeypatch)
    runs = Scheduler(MODELS["3.5-mini"], room=math.inf, chunk=512, chunk_seconds=0.5, alone_seconds=2.0)
    runs.submit(Plot(0, None, 400, 0, 4, 0, 0, None, 0).job(MODELS["3.5-mini"]))
    read = [runs.step().read_tokens for _ in range(4)]
    assert read[1:3] == [32, chunk]  # how fast it goes is known from the first on


def test_chunks_follow_the_newest_speed(monkeypatch):
    """A longer context is read more slowly."""
    read_at([100, 50, 200, 25, 100], monkeypatch)
    runs = Scheduler(MODELS["3.5-mini"], room=math.inf, chunk=512, chunk_seconds=0.5, alone_seconds=1.0)
    runs.submit(Plot(0, None, 400, 0, 4, 0, 0, None, 0).job(MODELS["3.5-mini"]))
    assert [runs.step().read_tokens for _ in range(5)] == [0, 32, 100, 50, 200]


def test_buffers_are_given_back_between_chunks_and_not_between_tokens(monkeypatch):
    model, order, clear_cache = MODELS["3.5-mini"], [], mx.clear_cache
    monkeypatch.setattr(mx, "clear_cache", lambda: order.append("cleared") or clear_cache())
    runs = Scheduler(model, room=math.inf, chunk=16)
    row = runs.submit(dataclasses.replace(Plot(0, None, 48, 0, 6, 0, 0, None, 0).job(model), stop_ids=frozenset()))
    while runs.busy:
        step = runs.step()
        order += [f"read {step.read_tokens}"] * bool(step.read_tokens) + ["token"] * len(step.tokens)
    assert len(row.answer) == 6
    assert order == ["cleared", "read 16"] * 3 + ["token"] * 6


@pytest.mark.parametrize(("speed", "chunk"), [(100, 50), (10, 32)])
def test_chunks_follow_the_clock_while_rows_answer(speed, chunk, monkeypatch):
    model = MODELS["3.5-mini"]
    read_at(speed, monkeypatch)
    runs = Scheduler(model, room=math.inf, chunk=256, chunk_seconds=0.5)
    runs.submit(dataclasses.replace(Plot(0, None, 300, 0, 90, 0, 0, None, 0).job(model), stop_ids=frozenset()))
    read = []
    while not runs._batch.answering:
        read.append(runs.step().read_tokens)
    assert max(read) == 256  # nobody waits
    runs.submit(Plot(0, None, 300, 1, 4, 0, 0, None, 0).job(model))
    read = [tokens for _ in range(16) if (tokens := runs.step().read_tokens)]  # not of steps that only queue a pass
    assert read[1:6] == [chunk] * 5  # a slow machine reads a few at least


def test_rows_of_a_batch_that_have_ended_hold_no_keys_while_others_go_on():
    model = MODELS["3.5-mini"]
    prompts = [ids_of(model, 10 + i, i) for i in range(4)]
    generation = Generation(model, prompts, max_tokens=300, sampling=Sampling())
    held = []
    for token in generation:
        if token.row < 3:
            generation.finish(token.row)
        held.append([row.begun for row in generation._rows])
    assert [True] * 4 in held
    assert held[-1] == [False, False, False, True]


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("name", MODELS)
def test_of_each_sequence_only_the_newest_token_is_what_it_is_among_all(name, bits):
    model, lengths = MODELS[name], [1, 40, 17]
    if bits and model.config.head_dim % 32:
        pytest.skip("heads that cannot be packed")
    hidden = []
    for newest in (False, True):
        caches = [model.make_cache(bits=None if bits is None else KVBits(bits, bits)) for _ in lengths]
        for seed, cache in enumerate(caches):
            model(mx.array([ids_of(model, 30, seed)]), cache)
        ids = mx.array([[token for seed, length in enumerate(lengths) for token in ids_of(model, length, 3 + seed)]])
        hidden.append(model.model.together(ids, lengths, caches, newest=newest))
        assert [layer.offset for cache in caches for layer in cache[-1:]] == [30 + length for length in lengths]
    everything, newest = hidden
    assert newest.shape == (1, 3, model.config.hidden_size)
    assert mx.allclose(everything[:, mx.array([0, 40, 57])], newest, atol=1e-5)
