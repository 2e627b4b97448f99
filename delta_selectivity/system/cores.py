"""Limits the number of threads that compute at the same time to the number of cores.

    cores = Cores(2)
    for batch, activations in cores.map_in_order(batches, forward, "forward"):    # in one thread
    for layer, scores in cores.map_in_order(layers, probe, "probes"):             # in another thread: two in total

More threads than cores would compete for the caches and for the GIL.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


class Cores:
    """A pool of n cores, granted in the order of requests."""

    def __init__(self, n: int, start_thread: Callable[[], None] = lambda: None) -> None:
        """Create a pool. start_thread: run first in each thread that `map_in_order` creates."""
        self.n, self._start_thread = n, start_thread
        self._free = n
        self._lock = threading.Lock()
        self._turns: deque[threading.Lock] = deque()  # of waiting threads; released when it is their turn

    def __enter__(self) -> None:
        """Acquire a core, waiting if none is free."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._turns.append(turn)
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        """Pass the core to the thread that has waited longest, if any."""
        with self._lock:
            if self._turns:
                self._turns.popleft().release()
            else:
                self._free += 1

    def map_in_order(self, items: Iterable[T], work: Callable[[T], R], name: str) -> Generator[tuple[T, R], None, None]:
        """Yield each item with `work(item)`, in order, computed by one thread per core with one more item queued.

        Items are taken from the iterable only when there is capacity, so no work starts after the generator is closed.
        With one core the work runs in the calling thread. Exceptions of the work are re-raised.
        """

        def on_a_core(item: T) -> R:
            with self:
                return work(item)

        if self.n == 1:
            for item in items:
                yield item, on_a_core(item)
            return
        waiting: deque[tuple[T, Future[R]]] = deque()
        with ThreadPoolExecutor(self.n, thread_name_prefix=name, initializer=self._start_thread) as pool:
            try:
                for item in items:
                    waiting.append((item, pool.submit(on_a_core, item)))
                    if len(waiting) > self.n:
                        item, result = waiting.popleft()
                        yield item, result.result()
                while waiting:
                    item, result = waiting.popleft()
                    yield item, result.result()
            finally:
                for _, result in waiting:  # the consumer has stopped
                    result.cancel()


@contextmanager
def sharing_cores(device: str | torch.device) -> Iterator[Cores]:
    """Yield cores for work on a device: one for a GPU; all for a CPU, with one thread of torch and BLAS on each.

    Two threads that both parallelise their matrix products wait for each other at every barrier: on 2 cores, a fit of
    0.3 s took up to 8 s during a forward pass. Batches that run in parallel as a whole need no barriers.
    """
    import torch  # deferred: a caller with its own `Cores` does not need torch

    from delta_selectivity.system.processor import cpu_count

    if torch.device(device).type != "cpu":
        yield Cores(1)
        return
    n = _threads.enter()
    try:
        yield Cores(min(n, cpu_count()), _threads.start)  # torch ignores container quotas
    finally:
        _threads.leave()


def probing_cores(cores: Cores, model_device: str | torch.device, probe_device: str | torch.device) -> Cores:
    """Return the cores for probes next to a model: the model's own if both are on the CPU, else one, for a GPU."""
    import torch

    both = {torch.device(model_device).type, torch.device(probe_device).type}
    return cores if both == {"cpu"} else Cores(1)


class _OneThread:
    """Sets the number of threads of torch and BLAS to 1 while any thread is inside, and restores it after the last one.

    Torch keeps a number per thread, a default for new threads and, with MKL, a global one; setting it sets all three.
    SciPy's BLAS is what compiled loops multiply with (`probing.backends.descent_kernels`).
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, 1
        self._blas: Any = None  # the threadpool_limits in force

    def enter(self) -> int:
        """Limit torch and BLAS to one thread, and return torch's number before the first entry."""
        import scipy.linalg.cython_blas  # noqa: F401 - loads the library, so that it is found
        import torch
        from threadpoolctl import threadpool_limits

        with self._lock:
            if not self._inside:
                self._before = torch.get_num_threads()
                self._blas = threadpool_limits(1, user_api="blas")
            self._inside += 1
            torch.set_num_threads(1)
            return self._before

    def start(self) -> None:
        """Limit a new thread, whose default may be that of a thread that is leaving."""
        import torch

        with self._lock:
            torch.set_num_threads(1)

    def leave(self) -> None:
        import torch

        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._before)
            if not self._inside:
                self._blas.restore_original_limits()
            else:  # restored for this thread; the default for others stays 1
                other = threading.Thread(target=torch.set_num_threads, args=(1,))
                other.start()
                other.join()


_threads = _OneThread()
