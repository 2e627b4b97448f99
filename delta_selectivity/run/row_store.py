"""Store rows of activations and reconstructions until their datasets are probed.

Rows are on the probes' GPU if they fit there, else in memory; beyond the limit they are in memory-mapped temporary
files, which are slower. The files are unnamed, so that the kernel removes them however the process ends. They are
allocated in full, so that a full disk raises an error here instead of a signal at a later write. Codes are in a
`CodeStore`.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from delta_selectivity.models.language_model import Site
from delta_selectivity.run.activations import NO_MENTION, LayerRows, SaeId
from delta_selectivity.run.code_store import CodeStore
from delta_selectivity.system.out_of_memory import ERRORS, is_out_of_memory, release

log = logging.getLogger(__name__)
T = TypeVar("T")


NOT_FINITE = "NaN, Inf or values beyond 1e19, whose squares are Inf in float32,"


class NonFiniteError(ValueError):
    """Error for NaN, Inf, or numbers too large for the sums computed from them."""

    def __init__(self, site: Site, sae_id: SaeId | None, mention: int) -> None:
        super().__init__(f"{NOT_FINITE} at {site}, SAE {sae_id}, mention {mention}")
        self.site = site
        self.sae_id = sae_id  # None: in the activation itself
        self.mention = mention  # index into ProbeTexts.mentions


class RowStore:
    """float32 matrices [n_rows, d], one for x of each site and one for each SAE's reconstruction of it.

    widths: d of each matrix.
    """

    def __init__(
        self, widths: Mapping[tuple[Site, SaeId | None], int], n_rows: int, device: torch.device, max_bytes: int
    ) -> None:
        self._codes = CodeStore(n_rows, max_bytes)
        self._broken: dict[tuple[Site, SaeId | None], Tensor] = {}  # first mention with NaN or Inf, by view; int64 []
        shapes = {view: (n_rows, d) for view, d in widths.items()}
        self._in_files = sum(n * d * 4 for n, d in shapes.values()) > max_bytes  # when they are not on the GPU
        rows = _allocate_on_gpu(list(shapes.values()), device) if device.type == "cuda" else None
        self._on_gpu = rows is not None
        self._rows = dict(zip(shapes, rows or [self._on_host(shape) for shape in shapes.values()], strict=True))

    @property
    def place(self) -> str:
        """Where the rows are stored: gpu, memory or files."""
        return "gpu" if self._on_gpu else "files" if self._in_files else "memory"

    def put(self, rows: LayerRows) -> None:
        """Store a batch's rows, without waiting for the GPU that computes them.

        Raises `NonFiniteError` if a value is not finite; for rows on a GPU, `get` raises it.
        """
        for sae_id, values in ((None, rows.x), *rows.recons.items()):
            view, broken = (rows.site, sae_id), rows.broken[sae_id]
            self._broken[view] = torch.minimum(broken, self._broken.get(view, broken))
            if broken.device.type == "cpu":
                self._check(*view)
            self._within_memory(partial(self._write_rows, rows.site, sae_id, rows.row_ids, values))
        for sae_id, latents in rows.latents.items():
            self._codes.put(rows.site, sae_id, rows.row_ids, latents)

    def _check(self, site: Site, sae_id: SaeId | None) -> None:
        broken = self._broken.get((site, sae_id))
        if broken is not None and int(broken) != NO_MENTION:
            raise NonFiniteError(site, sae_id, int(broken))

    def _write_rows(self, site: Site, sae_id: SaeId | None, row_ids: Tensor, values: Tensor) -> None:
        target = self._rows[site, sae_id]
        target.index_copy_(0, row_ids.to(target.device), values.to(target.device))

    def get(self, site: Site, sae_id: SaeId | None, row_ids: Tensor, device: torch.device) -> Tensor:
        """Return rows [len(row_ids), d] of x (`sae_id` None) or of an SAE's reconstruction, on `device`.

        Raises `NonFiniteError` as `put`.
        """
        self._check(site, sae_id)
        return self._within_memory(partial(self._read_rows, site, sae_id, row_ids, device))

    def get_latents(self, site: Site, sae_id: SaeId, row_ids: Tensor, device: torch.device) -> Tensor:
        """Return an SAE's codes of these rows: a sparse CSR tensor, float32 [len(row_ids), d_sae], on `device`.

        Entries of a row are neither sorted nor distinct: repeated entries of a latent have to be added.
        """
        return self._within_memory(partial(self._codes.get, site, sae_id, row_ids, device))

    def _read_rows(self, site: Site, sae_id: SaeId | None, row_ids: Tensor, device: torch.device) -> Tensor:
        source = self._rows[site, sae_id]
        return source.index_select(0, row_ids.to(source.device)).to(device)

    def _within_memory(self, work: Callable[[], T]) -> T:
        """Return the work's result; if GPU memory runs out, move the rows to the host and retry."""
        try:
            return work()
        except ERRORS as error:
            if not self._on_gpu or not is_out_of_memory(error):
                raise
        self._move_to_host()
        return work()

    def _move_to_host(self) -> None:
        """Move all rows to host memory; nothing else on the GPU can move."""
        for view, rows in self._rows.items():
            self._rows[view] = self._on_host(rows.shape).copy_(rows)
        self._on_gpu = False
        release()
        log.warning("out of memory: moved the collected rows from the GPU to %s; results do not change", self.place)

    def _on_host(self, shape: tuple[int, ...]) -> Tensor:
        return _in_file(*shape) if self._in_files else torch.empty(shape, dtype=torch.float32)

    def close(self) -> None:
        """Release the rows and their files."""
        self._rows = {}
        self._codes.close()

    def __enter__(self) -> RowStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _allocate_on_gpu(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor] | None:
    """Allocate matrices on the GPU; None if they need over half of the free memory, or allocation fails."""
    if sum(n * d * 4 for n, d in shapes) >= torch.cuda.mem_get_info(device)[0] // 2:
        return None
    try:
        return [torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes]
    except ERRORS as error:
        if not is_out_of_memory(error):
            raise
    release()
    return None


def _in_file(n_rows: int, d: int) -> Tensor:
    """Create a matrix [n_rows, d] in a temporary file. Raises OSError if the disk is full."""
    n_bytes = max(n_rows * d * 4, 1)
    descriptor, path = tempfile.mkstemp(prefix="delta-selectivity-")
    try:
        try:
            _allocate(descriptor, n_bytes)
        finally:
            os.close(descriptor)
        return torch.from_file(path, shared=True, size=n_rows * d, dtype=torch.float32).view(n_rows, d)
    finally:
        with suppress(PermissionError):  # Windows keeps the name of a file in use
            os.unlink(path)  # noqa: PTH108


def _allocate(descriptor: int, n_bytes: int) -> None:
    """Allocate the full size of a new file. Raises OSError if the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
        return
    zeros = bytes(min(n_bytes, 2**24))
    for start in range(0, n_bytes, len(zeros)):
        os.write(descriptor, zeros[: n_bytes - start])
