"""In-memory SAEs outside the three libraries: `Sae`, and any object with dense ``encode`` and ``decode``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.dense_coder import DenseCoder, isolated, misshapen
from delta_selectivity.saes.files import check_finite
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.object_state import attempt, coder_parts, runnable_copy, settings_of, tensors_of
from delta_selectivity.saes.sae import Sae
from delta_selectivity.saes.source import SaeHeader
from delta_selectivity.saes.wrap_arguments import WrapArguments

_WIDTHS = ("d_in", "activation_dim")
"""Attributes of the object or its ``cfg`` that may hold the width of its input."""


_KNOWN = (Tensor, bool, int, float, str, type(None))
"""Types of the parts of this package's coders; anything else is a foreign object."""


@dataclass(frozen=True)
class WrappedSae:
    """A wrapped `Sae`."""

    sae: Sae

    @property
    def label(self) -> str:
        return "Sae"

    def header(self, given: WrapArguments) -> SaeHeader:
        given.refuse_scaling()
        sae = self.sae
        found = SaeHeader(
            format="object",
            layer=sae.layer,
            hookpoint=sae.hookpoint,
            d_in=sae.d_in,
            d_sae=sae.d_sae,
            k=sae.k,
            architecture=sae.architecture,
            config={} if sae.promised_l0 is None else {"l0": sae.promised_l0},
            input_hookpoint=sae.input_hookpoint,
            width_out=sae.width_out,
        )
        return given.complete(found, says_bos=False)

    def tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, part in coder_parts(self.sae.coder):
            if isinstance(part, Tensor):
                found[name] = part
            else:
                found |= {f"{name}.{key}": tensor for key, tensor in tensors_of(part, self.label).items()}
        return found

    def settings(self) -> Any:
        parts = coder_parts(self.sae.coder)
        return [self.sae.input_norm, [[name, _setting(part)] for name, part in parts if not isinstance(part, Tensor)]]

    @property
    def needs_version(self) -> bool:
        foreign = [part for _, part in coder_parts(self.sae.coder) if not isinstance(part, _KNOWN)]
        return any(not tensors_of(part, self.label) for part in foreign)

    def build(self, header: SaeHeader) -> tuple[Coder, InputNorm]:
        for name, tensor in self.tensors().items():  # infinity is valid: the threshold of a disabled latent
            if tensor.isnan().any():
                raise RequestError(f"`obj` {self.label}: {name.removeprefix('.')} has NaN")
        return self.sae.coder, self.sae.input_norm


@dataclass(frozen=True)
class DenseObject:
    """Any object with ``encode(x [rows, d_in]) -> [rows, d_sae]`` and ``decode(codes) -> [rows, d_out]``."""

    obj: Any

    @property
    def label(self) -> str:
        return type(self.obj).__name__

    def header(self, given: WrapArguments) -> SaeHeader:
        given.refuse_scaling()
        hook = given.hook(self.label)
        runs = self._runnable()
        d_in = self._d_in(given, runs)
        codes = self._encode(runs, d_in, given)
        recon = _run(runs.decode, runs, codes.to(DenseCoder.of(runs, 0).dtype), f"`obj` {self.label}: decode")
        return SaeHeader(
            format="object",
            layer=hook.layer,
            hookpoint=hook.place,
            d_in=d_in,
            d_sae=codes.shape[1],
            k=given.k,
            architecture=given.architecture or self.label,
            config={},
            prepend_bos=given.prepend_bos,
            counts_bos=bool(given.trained_on_bos),
            model_name=given.model_name,
            input_hookpoint=given.input_hookpoint,
            width_out=self._width_out(given, d_in, recon.shape[1]),
            context_size=given.context_size,
        )

    def tensors(self) -> dict[str, Tensor]:
        return tensors_of(self.obj, self.label)

    def settings(self) -> Any:
        return settings_of(self.obj)

    @property
    def needs_version(self) -> bool:
        return not self.tensors()

    def build(self, header: SaeHeader) -> tuple[Coder, InputNorm]:
        # Check only a module's parameters: a buffer may validly hold infinity, such as the best loss so far.
        parameters: Mapping[str, Tensor] = (
            dict(self.obj.named_parameters()) if isinstance(self.obj, nn.Module) else self.tensors()
        )
        for name, tensor in parameters.items():
            check_finite(f"`obj` {self.label}", name, tensor)
        return DenseCoder.of(self._runnable(), header.d_out, header.d_sae), "none"

    def _runnable(self) -> Any:
        """Return an object to run in place of the original, which must not change."""
        return runnable_copy(self.obj, self.label) if isinstance(self.obj, nn.Module) else self.obj

    def _d_in(self, given: WrapArguments, runs: Any) -> int:
        found = _width_attribute(self.obj)
        if given.d_in is not None and found is not None and given.d_in != found:
            raise RequestError(f"`d_in` is {given.d_in}, but the object says {found}")
        d_in = given.d_in or found or self._width_by_trial(runs)
        if d_in is None:
            raise RequestError(f"`d_in` is missing: it cannot be found from the attributes or weights of {self.label}")
        return d_in

    def _width_by_trial(self, runs: Any) -> int | None:
        """Return the side of the encoder's matrices that ``encode`` accepts as width, if there is exactly one."""
        sides = {
            side for name, t in self.tensors().items() if t.dim() == 2 and "enc" in name.lower() for side in t.shape
        }
        accepted = [side for side in sorted(sides) if _accepts(runs, side)]
        return accepted[0] if len(accepted) == 1 else None

    def _encode(self, runs: Any, d_in: int, given: WrapArguments) -> Tensor:
        field = f"`obj` {self.label}" if given.d_in is None else f"`d_in` {d_in}: {self.label}"
        return _run(runs.encode, runs, _two_rows(runs, d_in), f"{field}: encode")

    def _width_out(self, given: WrapArguments, d_in: int, found: int) -> int | None:
        if given.d_out is not None and given.d_out != found:
            raise RequestError(f"`d_out` is {given.d_out}, but decode of {self.label} returned {found} columns")
        if given.input_hookpoint is None and found != d_in:
            raise RequestError(
                f"`input_hookpoint` is missing: {self.label} has input width {d_in} and output width {found}, so it is"
                " a transcoder, whose input has another hook point"
            )
        return None if found == d_in else found


def check_methods(obj: Any) -> None:
    """Raise `RequestError` if an object lacks ``encode`` or ``decode``."""
    if isinstance(obj, type):
        raise RequestError(f"`obj` {obj.__name__} is a class: give an instance")
    name = type(obj).__name__
    methods = ("encode", "decode")
    missing = [
        method for method in methods if not callable(attempt(f"`obj` {name}.{method}", getattr, obj, method, None))
    ]
    if missing:
        hint = "; load_sae opens an SAE by its name" if isinstance(obj, str) else ""
        raise RequestError(
            f"`obj` {name} has no {' and no '.join(missing)}: an SAE has encode(x [rows, d_in]) -> [rows, d_sae] and"
            f" decode(codes [rows, d_sae]) -> [rows, d_out]{hint}"
        )


def _width_attribute(obj: Any) -> int | None:
    for holder in (obj, getattr(obj, "cfg", None)):
        for name in _WIDTHS:
            width = getattr(holder, name, None)
            if isinstance(width, int) and not isinstance(width, bool) and width > 0:
                return width
    return None


def _accepts(runs: Any, width: int) -> bool:
    """Return whether ``encode`` accepts rows of this width. Raises `RequestError` if it exits the process."""
    try:
        _call(runs.encode, runs, _two_rows(runs, width), f"`obj` {type(runs).__name__}: encode")
    except RequestError as error:
        if isinstance(error.__cause__, SystemExit):
            raise
        return False
    return True


def _two_rows(runs: Any, width: int) -> Tensor:
    coder = DenseCoder.of(runs, width)
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    return rows.to(coder.compute_device, coder.dtype)


def _run(method: Callable[[Tensor], Any], runs: Any, rows: Tensor, what: str) -> Tensor:
    """Call encode or decode on two rows. Raises `RequestError` unless it returns a dense matrix with two rows."""
    found = _call(method, runs, rows, what)
    if problem := misshapen(found, len(rows)):
        raise RequestError(f"{what} returned {problem}: wrap the SAE in a class with such methods")
    return found


def _call(method: Callable[[Tensor], Any], runs: Any, rows: Tensor, what: str) -> Any:
    with torch.no_grad(), isolated(runs, DenseCoder.of(runs, 0).compute_device):
        return attempt(f"{what} of {list(rows.shape)}", method, rows)


def _setting(part: Any) -> Any:
    return part if isinstance(part, _KNOWN) else settings_of(part)
