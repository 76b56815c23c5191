"""Work that nobody waits for: it is done in order in a thread of its own, which lives while there is some."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable


class Background:
    """Pieces of work, one after another. Python does not end before they are done.

    They must compute nothing with MLX: arrays that they read were computed before. They raise nothing.
    """

    def __init__(self) -> None:
        self._work: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, work: Callable[[], None]) -> None:
        """Do this once all before it is done."""
        with self._lock:
            self._work.append(work)
            if self._thread is not None:
                return
            self._thread = thread = threading.Thread(target=self._run, name="phi3-mlx prefixes")
        try:
            thread.start()
        except RuntimeError:  # Python ends, and starts none any more
            self._run()

    def settle(self) -> None:
        """Wait until all is done that was added before."""
        thread = self._thread
        if thread is not None and thread.is_alive():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._work:
                    self._thread = None
                    return
                work = self._work.popleft()
            work()
            del work  # it holds arrays
