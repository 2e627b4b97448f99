"""SAEs that are Python objects: ``register`` gives one a name, and the program measures it under that name.

    register("mine", my_sae, layer=5, hookpoint="resid_post", d_in=768)
    main.main(["`model`", "EleutherAI/pythia-160m", "`saes`", "mine"])

The object has ``encode(x [rows, d_in]) -> [rows, d_sae]`` and ``decode(codes) -> [rows, d_in]``, both dense, each row
for itself. A ``torch.nn.Module`` is measured in evaluation mode, in float32 and on ``device1``, on a copy if it is in
another state; any other object is given tensors on the CPU.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.dense_coder import DenseCoder, EncodesDensely
from delta_selectivity.saes.files import check_finite, digest_tensors
from delta_selectivity.saes.hookpoints import canonical
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.source import SaeHeader

SEPARATORS = frozenset(",*?[]<>")
"""What ``saes`` gives a meaning of its own."""


@dataclass(frozen=True)
class RegisteredMember:
    """One object under a name."""

    name: str
    header: SaeHeader
    make: Callable[[], EncodesDensely]
    version: str | None
    """What stands for its weights; None if they speak for themselves."""

    @property
    def where(self) -> str:
        return f"{self.name}, registered for layer {self.header.layer}"

    def prepare(self) -> None:
        """There is nothing to fetch."""

    def check_values(self) -> None:
        sae = self.make()
        _try_out(sae, self.header, self.where)
        for name, tensor in _state(sae).items():
            check_finite(self.where, name, tensor)

    def build(self) -> tuple[Coder, InputNorm]:
        sae = self.make()
        if isinstance(sae, nn.Module) and sae.training:
            sae = copy.deepcopy(sae).eval()
        return DenseCoder.of(sae, self.header.d_out), "none"

    def digest(self) -> str:
        header = self.header
        said = (header.hookpoint, header.input_hookpoint, header.d_in, header.d_sae, header.d_out, self.version)
        weights = digest_tensors(_state(self.make())) if self.version is None else ""
        return hashlib.sha256(f"{said} {weights}".encode()).hexdigest()


_members: dict[str, dict[tuple[int, str], RegisteredMember]] = {}


def register(
    name: str,
    sae: EncodesDensely | Callable[[], EncodesDensely],
    *,
    layer: int,
    hookpoint: str,
    d_in: int,
    d_sae: int | None = None,
    version: str | None = None,
    k: int | None = None,
    architecture: str | None = None,
    prepend_bos: bool | None = None,
    trained_on_bos: bool = False,
    model_name: str | None = None,
    context_size: int | None = None,
    input_hookpoint: str | None = None,
    d_out: int | None = None,
) -> None:
    """Give an SAE of one layer a name that ``open_sae`` and ``saes`` find, in this process.

    Call it once for each layer. The same name, layer and hook point again replaces what was there.

    Args:
        name: without commas and wildcards; it wins over folders and repositories of the same name.
        sae: the object, or a function without arguments that makes it whenever it is needed.
        layer: counted from 0.
        hookpoint: the place that it reconstructs: ``resid_post``, ``mlp_out``, ..., or a module path with ``<layer>``.
        d_in: width of what it reads.
        d_sae: number of latents; of an object, found by encoding two rows.
        version: stands for the weights where results are kept apart by them: change it when they change. Needed for
            functions, and for objects that have no ``state_dict`` of tensors.
        k: latents per activation, if their number is fixed.
        architecture: shown with the results; by default the name of its class.
        prepend_bos: whether its training texts began with BOS; None if unknown.
        trained_on_bos: whether activations of BOS were in its training data.
        model_name: the model it was trained on.
        context_size: tokens in a training text.
        input_hookpoint: where a transcoder reads; None for an autoencoder.
        d_out: width of a transcoder's output, if not d_in.

    Raises:
        RequestError: the arguments do not fit together, or the object does not do what they say.
    """
    _check_name(name)
    make, made = _maker(name, sae)
    if not made and (d_sae is None or version is None):
        raise RequestError(f"register({name!r}): a function that makes an SAE needs d_sae and version beside it")
    if made and version is None and not _state(make()):
        raise RequestError(f"register({name!r}): the object has no state_dict of tensors; say a version in its stead")
    header = SaeHeader(
        format="registered",
        layer=layer,
        hookpoint=canonical(hookpoint),
        d_in=d_in,
        d_sae=_width_of_codes(name, make(), d_in) if d_sae is None else d_sae,
        k=k,
        architecture=architecture or (type(sae).__name__ if made else "unnamed"),
        config={},
        prepend_bos=prepend_bos,
        counts_bos=trained_on_bos,
        model_name=model_name,
        input_hookpoint=None if input_hookpoint is None else canonical(input_hookpoint),
        width_out=d_out,
        context_size=context_size,
    )
    member = RegisteredMember(name, header, make, version)
    if made:
        member.check_values()
    _members.setdefault(name, {})[layer, header.hookpoint] = member


def unregister(name: str) -> None:
    """Forget a name and the objects behind it; nothing happens if there is none."""
    _members.pop(name, None)


def registered_members(name: str) -> list[RegisteredMember]:
    """What was registered under a name; empty if nothing was."""
    return list(_members.get(name, {}).values())


def _check_name(name: str) -> None:
    if not name or name != name.strip() or SEPARATORS & set(name):
        raise RequestError(f"register({name!r}): a name without commas, wildcards and spaces around it is needed")


def _maker(name: str, sae: EncodesDensely | Callable[[], EncodesDensely]) -> tuple[Callable[[], EncodesDensely], bool]:
    """A function that gives the object, and whether the object is there already."""
    if hasattr(sae, "encode") and hasattr(sae, "decode"):
        return lambda: sae, True
    if not callable(sae):
        raise RequestError(f"register({name!r}): an SAE has encode and decode; this {type(sae).__name__} has not")
    return sae, False


def _state(sae: EncodesDensely) -> dict[str, Tensor]:
    """The tensors of its ``state_dict``, if it has one."""
    state = sae.state_dict() if hasattr(sae, "state_dict") else {}
    return {str(name): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def _width_of_codes(name: str, sae: EncodesDensely, d_in: int) -> int:
    return _run(sae.encode, _two_rows(sae, d_in), f"register({name!r}): encode").shape[1]


def _try_out(sae: EncodesDensely, header: SaeHeader, where: str) -> None:
    """Encode and decode two rows. Raises `RequestError` if that fails or gives other shapes than the header says."""
    codes = _run(sae.encode, _two_rows(sae, header.d_in), f"{where}: encode")
    recon = _run(sae.decode, codes, f"{where}: decode")
    for what, found, width in (("encode", codes, header.d_sae), ("decode", recon, header.d_out)):
        if found.shape != (2, width):
            raise RequestError(f"{where}: {what} gives {list(found.shape)} for two rows, not [2, {width}]")


def _two_rows(sae: EncodesDensely, d_in: int) -> Tensor:
    coder = DenseCoder.of(sae, d_in)
    rows = torch.randn(2, d_in, generator=torch.Generator().manual_seed(0))
    return rows.to(coder.home, coder.dtype)


@torch.no_grad()
def _run(method: Callable[[Tensor], Any], rows: Tensor, what: str) -> Tensor:
    try:
        found = method(rows)
    except Exception as error:  # somebody else's code
        raise RequestError(f"{what} fails on {list(rows.shape)}: {type(error).__name__}: {error}") from error
    if not isinstance(found, Tensor) or found.layout != torch.strided or found.dim() != 2:
        raise RequestError(f"{what} gives no dense tensor of two dimensions")
    return found
