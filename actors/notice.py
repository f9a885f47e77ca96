"""SIGTERM to a worker's process, taken as the wish that it leave."""

import os
import signal
import threading


class Notice:
    """`is_given` once this process was sent SIGTERM. To be made in the main thread.

    Ray's own handler is Python code that ends the process, and runs in the main thread when that next does: in an actor after the
    method it is in, so in the middle of training minutes later, as a death. What the operating system wakes here is a thread.
    """

    def __init__(self) -> None:
        self._given = threading.Event()
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._wait, args=(reading,), name="notice", daemon=True).start()

    @property
    def is_given(self) -> bool:
        """Whether this process is to go."""
        return self._given.is_set()

    def _wait(self, reading: int) -> None:
        while signal.SIGTERM not in os.read(reading, 1):
            continue
        self._given.set()
