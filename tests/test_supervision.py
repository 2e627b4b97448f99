"""The two threads: a failure of either ends the run with its own error, while the other is busy, waiting or done."""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback

import pytest

from delta_selectivity.run.bounded_queue import BoundedQueue
from delta_selectivity.run.pipeline import run


class FakeProducer:
    def __init__(self, work):
        self.work = work

    def run(self, blocks, put, on_texts):
        self.work(put)


class FakeProber:
    def __init__(self, work):
        self.work = work

    def run(self, queue):
        self.work(queue)


def run_both(produce, consume, stop=None):
    """Run the two in a thread of their own with a time limit; return the error."""
    queue = BoundedQueue[int](max_bytes=2, size_of=lambda item: 1)
    errors = []

    def body():
        try:
            run(FakeProducer(produce), FakeProber(consume), [], queue, lambda n: None, stop or threading.Event())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive(), "hangs"
    return errors[0] if errors else None


def put_many(put):
    for i in range(50):
        put(i)


def explode_in_forward_pass(put):
    put(1)
    raise ZeroDivisionError("forward")


def explode_in_probe(queue):
    for _ in queue:
        raise ArithmeticError("probe")


def test_both_threads_finish():
    taken = []
    assert run_both(put_many, taken.extend) is None
    assert taken == list(range(50))


def test_the_producers_error_ends_the_run_while_the_consumer_waits():
    error = run_both(explode_in_forward_pass, list)
    assert isinstance(error, ZeroDivisionError)
    assert "explode_in_forward_pass" in "".join(traceback.format_exception(error))


def test_the_producers_error_is_raised_while_the_consumer_is_busy():
    def slow(queue):
        for _ in queue:
            time.sleep(0.3)

    assert isinstance(run_both(explode_in_forward_pass, slow), ZeroDivisionError)


def test_the_consumers_error_ends_the_run_while_the_producer_waits_for_room():
    error = run_both(put_many, explode_in_probe)
    assert isinstance(error, ArithmeticError)
    assert "explode_in_probe" in "".join(traceback.format_exception(error))


def test_the_consumers_error_before_its_first_item():
    def die(queue):
        raise MemoryError("cuML")

    assert isinstance(run_both(put_many, die), MemoryError)


def test_an_error_after_the_other_thread_has_finished():
    def late(queue):
        list(queue)
        raise OSError("No space left on device")

    assert isinstance(run_both(put_many, late), OSError)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_both_threads(number):
    stop = threading.Event()

    def consume_until_told(queue):
        os.kill(os.getpid(), number)
        for _ in queue:
            time.sleep(0.01)

    def produce_for_ever(put):
        while True:
            put(0)

    before = signal.getsignal(number)
    queue = BoundedQueue[int](max_bytes=2, size_of=lambda item: 1)
    with pytest.raises(KeyboardInterrupt):
        run(FakeProducer(produce_for_ever), FakeProber(consume_until_told), [], queue, lambda n: None, stop)
    assert stop.is_set()
    assert signal.getsignal(number) is before
