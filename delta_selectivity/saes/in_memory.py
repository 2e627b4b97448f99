"""SAEs in memory as sources: ``wrap_sae`` does for an object what ``open_sae`` does for a name.

source = wrap_sae(my_sae, layer=5)                  # a torch.nn.Module with encode and decode
sae = source.load(5, "cpu")
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from torch import nn

from delta_selectivity.errors import RequestError
from delta_selectivity.saes.coders import Coder
from delta_selectivity.saes.contents import Contents
from delta_selectivity.saes.files import digest_tensors
from delta_selectivity.saes.input_norm import InputNorm
from delta_selectivity.saes.library_objects import wrap_library_object
from delta_selectivity.saes.other_objects import DenseObject, WrappedSae, check_methods
from delta_selectivity.saes.sae import Sae
from delta_selectivity.saes.source import SaeHeader, SaeSource
from delta_selectivity.saes.wrap_arguments import WrapArguments

SEPARATORS = frozenset(",*?[]<>")
"""Characters with a special meaning in a list of SAEs."""

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}


@dataclass(frozen=True)
class ObjectMember:
    """One object and its name."""

    where: str  # its name in the results
    header: SaeHeader
    contents: Contents
    version: str | None  # the caller's identifier of the weights, used in addition to the tensors or in place of them

    def prepare(self) -> None:
        """Do nothing: there are no files to download."""

    def check_values(self) -> None:
        self.contents.build(self.header)

    def build(self) -> tuple[Coder, InputNorm]:
        return self.contents.build(self.header)

    def digest(self) -> str:
        """Return the digest of the current weights and metadata; training the object changes it."""
        header = self.header
        facts = {
            "places": [header.hookpoint, header.input_hookpoint],
            "widths": [header.d_in, header.d_sae, header.d_out],
            "bos": [header.prepend_bos, header.counts_bos],
            "config": header.config,
            "settings": self.contents.settings(),
            "version": self.version,
            "weights": digest_tensors(self.contents.tensors()),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def wrap_sae(
    obj: Any,
    *,
    layer: int | None = None,
    hookpoint: str | None = None,
    d_in: int | None = None,
    name: str | None = None,
    version: str | None = None,
    k: int | None = None,
    architecture: str | None = None,
    prepend_bos: bool | None = None,
    trained_on_bos: bool | None = None,
    model_name: str | None = None,
    context_size: int | None = None,
    input_hookpoint: str | None = None,
    d_out: int | None = None,
    scaling_factor: float | None = None,
) -> SaeSource:
    """Wrap an SAE object of this process so that it can be measured like one on disk.

    Objects of SAE Lens, sparsify and dictionary_learning use the readers of these formats, with the same speed and
    bit-identical codes. Any other object needs ``encode(x [rows, d_in]) -> [rows, d_sae]`` and
    ``decode(codes [rows, d_sae]) -> [rows, d_out]``, both dense and with independent rows. A ``torch.nn.Module`` is
    measured in evaluation mode and float32 and is never modified; other objects receive CPU tensors. Weights are read
    when the source is loaded or fingerprinted, not here.

    Arguments that the object itself states may be omitted, and must not contradict it.

    Args:
        obj: the SAE.
        layer: layer index, from 0.
        hookpoint: the hook point that it reconstructs: ``resid_post`` (the default if the object does not name one),
            ``mlp_out``, ..., a module path with ``<layer>``, or a name with a layer, ``blocks.5.hook_resid_post``.
        d_in: width of its input; by default its attribute ``d_in``, or inferred from the encoder's weights.
        name: name in the results, without commas and wildcards; by default class and layer, ``topksae_layer_3``. SAEs
            that are measured together need different names.
        version: identifier of the weights, required for an object without a ``state_dict``; change it whenever the
            weights change. For other objects it is used in addition to the tensors of the ``state_dict``, and has to
            cover what these leave out: tensors in plain attributes, code.
        k: latents per activation, if fixed.
        architecture: name of the architecture in the results; by default the class.
        prepend_bos: whether training texts began with BOS; None if unknown.
        trained_on_bos: whether BOS activations were in the training data; False if unknown.
        model_name: the model that it was trained on.
        context_size: tokens per training text.
        input_hookpoint: the hook point that a transcoder reads; None for an autoencoder.
        d_out: width of a transcoder's output; by default found with a trial run.
        scaling_factor: factor applied to activations before encoding, for SAEs of SAE Lens with
            ``normalize_activations="expected_average_only_in"``.

    Returns:
        A source of one layer, as ``open_sae`` returns.

    Raises:
        RequestError: an argument is missing, is inconsistent, or contradicts the object, or the object does not behave
            like an SAE. The message names the argument.

    Example:
        >>> from torch import nn
        >>> class Linear(nn.Linear):
        ...     encode = nn.Linear.forward
        ...     decode = lambda self, codes: codes @ self.weight
        >>> source = wrap_sae(Linear(16, 64), layer=3, d_in=16)
        >>> source.name, source.layers, source.d_in
        ('linear_layer_3', (3,), 16)
    """
    given = WrapArguments(
        layer=layer,
        hookpoint=hookpoint,
        d_in=d_in,
        d_out=d_out,
        k=k,
        architecture=architecture,
        prepend_bos=prepend_bos,
        trained_on_bos=trained_on_bos,
        model_name=model_name,
        context_size=context_size,
        input_hookpoint=input_hookpoint,
        scaling_factor=scaling_factor,
    ).checked()
    obj = _unwrapped(obj)
    contents = _contents(obj)
    try:
        header = contents.header(given)
        _check_version(contents, version)
    except RequestError as error:  # the libraries' readers do not name the argument
        raise error if error.field else RequestError(f"`obj` {error}") from error
    member = ObjectMember(_choose_name(name, obj, contents, header), header, contents, version)
    return SaeSource(member.where, (member,), requested_hookpoint=None if hookpoint is None else header.hookpoint)


def _unwrapped(obj: Any) -> Any:
    """Return the module inside the wrappers of ``torch.compile`` and PyTorch's parallel training."""
    while (attribute := _WRAPPERS.get(type(obj).__name__)) is not None and isinstance(obj, nn.Module):
        obj = getattr(obj, attribute)
    return obj


def _contents(obj: Any) -> Contents:
    if isinstance(obj, Sae):
        return WrappedSae(obj)
    check_methods(obj)
    return wrap_library_object(obj) or DenseObject(obj)


def _check_version(contents: Contents, version: Any) -> None:
    if version is not None and (not isinstance(version, str) or not version):
        raise RequestError(f"`version` is {version!r}, but must be a string")
    if version is None and contents.needs_version:
        raise RequestError(
            f"`version` is missing: {contents.label} has no state_dict of tensors, so give a string that identifies its"
            " weights, and change it when they change"
        )


def _choose_name(name: Any, obj: Any, contents: Contents, header: SaeHeader) -> str:
    if name is None:
        sae_name = obj.name if isinstance(obj, Sae) else None
        return (
            sae_name
            if sae_name is not None and _is_usable(sae_name)
            else f"{contents.label.lower()}_layer_{header.layer}"
        )
    if not isinstance(name, str) or not _is_usable(name):
        raise RequestError(
            f"`name` is {name!r}, but must have a letter or digit, and none of {' '.join(sorted(SEPARATORS))}"
        )
    return name


def _is_usable(name: str) -> bool:
    return name == name.strip() and any(map(str.isalnum, name)) and name.isprintable() and not SEPARATORS & set(name)
