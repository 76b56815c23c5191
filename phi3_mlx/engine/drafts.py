"""Decoding one row with drafts: where earlier text suggests what comes next, a step verifies several tokens."""

from __future__ import annotations

import time
from collections.abc import Iterator

import mlx.core as mx

from .lookup import Drafter, accepted_of
from .rows import Row
from .steps import Drawn, Step, Stepper, read_drawn


def decode_with_drafts(stepper: Stepper, row: Row, pending: Drawn, most: int) -> Iterator[Step]:
    """The steps of the one row until it is finished, with drafts of `most` tokens at most.

    `pending`: what was drawn after the prompt. The tokens are those of plain decoding: one that was drafted counts only
    if the same was drawn in its place.
    """
    drafter = Drafter(row.prompt, most)
    queued: Drawn | None = pending
    last = 0  # the newest token, once one was read
    while not row.finished:
        started = time.perf_counter()
        draft: list[int] = []
        if queued is None:
            draft = drafter.draft(stepper.most_ahead(row.left - 1))
            if not draft:
                queued = stepper.queue(mx.array([[last]]))
                continue
            read = _verify(stepper, last, draft)
            drafter.saw_draft(len(draft), len(read) - 1, time.perf_counter() - started)
        else:
            drawn, queued = queued, None
            # A step is queued before the last token is read, unless it is likely to become a draft's.
            if row.left > 1 and not drafter.draft(1):
                queued = stepper.queue(drawn[0][:, None])
            read = read_drawn(drawn)
            if queued is not None:
                drafter.saw_plain(time.perf_counter() - started)
        for last, _ in read:
            drafter.add(last)
        yield Step([(row, *token) for token in read], len(draft))


def _verify(stepper: Stepper, last: int, draft: list[int]) -> list[tuple[int, float]]:
    """Read `last` and the draft in one step; what is drawn after `last` and after every right token of the draft."""
    drawn, states = stepper.draw_each(stepper.forward(mx.array([[last, *draft]])))
    read = read_drawn(drawn)
    accepted = accepted_of(draft, [token for token, _ in read])
    stepper.take_back(len(draft) - accepted, states[accepted])
    return read[: accepted + 1]
