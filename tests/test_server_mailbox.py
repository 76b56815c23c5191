"""What the engine's thread tells arrives in the event loop: all of it, in order, and waking it as seldom as can be."""

import asyncio
import threading

import pytest

pytest.importorskip("starlette")

from phi3_mlx.server.exchange import Mailbox


def test_what_is_told_before_the_loop_looks_wakes_it_once(monkeypatch):
    async def told():
        loop, woken, heard = asyncio.get_running_loop(), [], []
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: (woken.append(1), wake(call)))
        mailbox = Mailbox()
        for number in range(10):
            mailbox.put(lambda number=number: heard.append(number))
        assert heard == []
        await asyncio.sleep(0)
        assert heard == [*range(10)]
        mailbox.put(lambda: heard.append(10))
        await asyncio.sleep(0)
        return len(woken), heard[-1]

    assert asyncio.run(told()) == (2, 10)


def test_what_several_threads_tell_arrives_whole_and_in_each_ones_order():
    async def told():
        mailbox, heard = Mailbox(), [[] for _ in range(4)]

        def tell(thread):
            for number in range(2_000):
                mailbox.put(lambda number=number: heard[thread].append(number))

        threads = [threading.Thread(target=tell, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        return heard

    assert asyncio.run(told()) == [[*range(2_000)]] * 4


def test_a_call_that_fails_holds_up_no_other():
    async def told():
        faults, heard = [], []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(str(context["exception"])))
        mailbox = Mailbox()
        mailbox.put(lambda: [].pop())
        mailbox.put(lambda: heard.append(1))
        await asyncio.sleep(0)
        return faults, heard

    assert asyncio.run(told()) == (["pop from empty list"], [1])


def test_a_loop_that_has_ended_is_told_of_each_time():
    async def made():
        return Mailbox()

    mailbox = asyncio.run(made())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            mailbox.put(lambda: None)
