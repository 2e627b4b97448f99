"""Limit the number of threads that compute at a time to the number of cores.

    cores = Cores(2)
    for batch, activations in cores.in_order(batches, forward, "forward"):    # in one thread
    for layer, scores in cores.in_order(layers, probe, "probes"):             # in another: still two at a time in all

More threads than cores take each other's cache, and Python's lock from each other at every call.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")


class Cores:
    """n cores: who finds none free waits for its turn, first come, first served."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._free = n
        self._lock = threading.Lock()
        self._turns: deque[threading.Lock] = deque()  # of those that wait: released when it is theirs

    def __enter__(self) -> None:
        """Take one."""
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._turns.append(turn)
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        """Hand it to who has waited longest."""
        with self._lock:
            if self._turns:
                self._turns.popleft().release()
            else:
                self._free += 1

    def in_order(self, items: Iterable[T], work: Callable[[T], R], name: str) -> Generator[tuple[T, R], None, None]:
        """Each item with `work(item)`, in order, by threads of this name: one a core, and one item more waits.

        Items are taken when there is room for them: once they end, or the generator is closed, no other work begins.
        Of one core, the work is done in the caller's own thread. Raises what the work raises.
        """

        def on_a_core(item: T) -> R:
            with self:
                return work(item)

        if self.n == 1:
            for item in items:
                yield item, on_a_core(item)
            return
        waiting: deque[tuple[T, Future[R]]] = deque()
        with ThreadPoolExecutor(self.n, thread_name_prefix=name) as pool:
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
                for _, result in waiting:  # nobody wants them any more
                    result.cancel()


@contextmanager
def sharing_cores(device: str | torch.device) -> Iterator[Cores]:
    """Cores for work on a device: one on a GPU; on a CPU all of them, and torch computes with one thread on each.

    Two threads that both split their matrix products over the same cores wait for each other at every barrier: on 2
    cores a 0.3 s fit took up to 8 s beside a forward pass. Whole batches side by side have no barriers.
    """
    import torch  # not for those who bring their own number of cores

    from delta_selectivity.system.processor import cpu_count

    if torch.device(device).type != "cpu":
        yield Cores(1)
        return
    n = _torch_threads.enter()
    try:
        yield Cores(min(n, cpu_count()))  # torch does not see the quota of a container
    finally:
        _torch_threads.leave()


def probing_cores(cores: Cores, model_device: str | torch.device, probe_device: str | torch.device) -> Cores:
    """Cores for the probes beside a model: the model's own if both are on the CPU, else one, for a GPU."""
    import torch

    both = {torch.device(model_device).type, torch.device(probe_device).type}
    return cores if both == {"cpu"} else Cores(1)


class _TorchThreads:
    """Torch's number of threads: 1 while somebody is inside, in whatever thread; after the last, what it was before.

    Torch keeps a number for each thread, one for threads to come and, with MKL, one for all: setting it sets all three.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, 1

    def enter(self) -> int:
        """Return the number that it was before the first entered."""
        import torch

        with self._lock:
            if not self._inside:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)
            return self._before

    def leave(self) -> None:
        import torch

        with self._lock:
            self._inside -= 1
            torch.set_num_threads(self._before)
            if self._inside:  # this thread has its number back; the others still count on 1
                other = threading.Thread(target=torch.set_num_threads, args=(1,))
                other.start()
                other.join()


_torch_threads = _TorchThreads()
