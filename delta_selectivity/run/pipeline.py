"""Start and supervise the producer and the consumer thread.

The producer (device1) puts rows of activations on a bounded queue; the consumer (device2, `prober`) stores them, and as
soon as the last block of a dataset is done it probes that dataset, while the producer runs the texts of the next
one. An error in either thread ends the run with that thread's traceback.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from delta_selectivity.run.activations import Block, Item, Producer
from delta_selectivity.run.bounded_queue import BoundedQueue, ProducerFailed, QueueCancelled
from delta_selectivity.run.prober import Prober
from delta_selectivity.system import interrupts
from delta_selectivity.system.terminal import NOTE

log = logging.getLogger(__name__)


def run(
    producer: Producer,
    prober: Prober,
    blocks: Sequence[Block],
    queue: BoundedQueue[Item],
    on_texts: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Run both threads to their end.

    Raises the error of the thread that failed, or `KeyboardInterrupt` after Ctrl-C, SIGTERM or SIGHUP, once the current
    layer is written. After a second signal it is raised at once and the work in progress is lost; the package's
    programs end then. Files are written atomically, so none is damaged.
    """
    workers = [
        _Worker("producer", lambda: _produce(producer, blocks, queue, on_texts)),
        _Worker("consumer", lambda: _consume(prober, queue)),
    ]
    with _interruptible(stop, queue, prober):
        for worker in workers:
            worker.start()
        for worker in workers:
            # Wait in short intervals to handle signals; an interrupted `join` would mark the thread as ended.
            while not worker.ended.wait(timeout=0.1):
                continue
            worker.join()
    for worker in workers:
        if isinstance(worker.error, SystemExit):  # raised by foreign code; it must not end this program silently
            raise RuntimeError(f"code of a model or an SAE called exit ({worker.error!r})") from worker.error
        if worker.error is not None:
            raise worker.error
    if stop.is_set():
        raise KeyboardInterrupt


@contextmanager
def _interruptible(stop: threading.Event, queue: BoundedQueue[Item], prober: Prober) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and SIGHUP set `stop` in the context; a second one ends at once. Main thread only."""

    def on_signal(_number: int, _frame: object) -> None:
        if stop.is_set():
            if interrupts.exits_on_signals():
                os._exit(130)
            prober.abandon()
            raise KeyboardInterrupt
        log.log(NOTE, "interrupted: finishing the current layer; interrupt again to stop now")
        stop.set()
        queue.cancel()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, on_signal) for number in interrupts.handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _produce(
    producer: Producer, blocks: Sequence[Block], queue: BoundedQueue[Item], on_texts: Callable[[int], None]
) -> None:
    try:
        producer.run(blocks, queue.put, on_texts)
        queue.close()
    except QueueCancelled:
        return  # the consumer failed or was stopped, and reports its own error
    except BaseException as error:
        queue.fail(error)
        raise


def _consume(prober: Prober, queue: BoundedQueue[Item]) -> None:
    try:
        prober.run(queue)
    except ProducerFailed:
        return  # the producer reports its own error
    finally:
        queue.cancel()


class _Worker(threading.Thread):
    """A thread that stores its error, with the traceback, for the main thread."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.error: BaseException | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()
