"""A causal language model as a source of activations: no LM head, no layer beyond the last one asked for.

`open_model` reads the config and the tokenizer alone, so that a wrong request fails in seconds;
`ModelInfo.load` brings the weights. Hooks take module outputs, which for GPT-NeoX equal TransformerLens's
`hook_resid_post` and `hook_mlp_out` without weight processing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from errors import RequestError

MLP_NAMES = ("mlp",)
ATTENTION_NAMES = ("attention", "self_attn", "attn")
NO_CODE = {"trust_remote_code": False}  # unsaid, transformers would ask on the terminal


class Site(NamedTuple):
    """Where activations are taken: the output of one module."""

    layer: int
    hookpoint: str  # resid_post, mlp_out, attn_out, or a module path with <layer>


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before its weights are read."""

    name: str  # as typed
    config: Any  # transformers.PretrainedConfig
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    n_layers: int
    d_model: int
    max_length: int  # tokens

    @property
    def has_bos(self) -> bool:
        """Whether the tokenizer knows a token that begins a text."""
        return self.tokenizer.bos_token_id is not None

    def choose_dtype(self, asked: str) -> str:
        """`auto`: bfloat16 for a model that was saved in it, so nothing is lost that was there; else float32."""
        saved = str(getattr(self.config, "dtype", None)).removeprefix("torch.")
        if asked != "auto":
            return asked
        return "bfloat16" if saved == "bfloat16" else "float32"

    def fingerprint(self) -> str:
        """Commit of a hub model; sha256 over the files of a local one. It changes whenever a number could."""
        folder = Path(self.name)
        if not os.path.isdir(folder):  # noqa: PTH112
            return str(getattr(self.config, "_commit_hash", None) or "unknown")
        digest = hashlib.sha256()
        for path in sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".bin"}):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def load(self, sites: Collection[Site], device: str, dtype: str) -> LanguageModel:
        """Read the weights up to the last layer among `sites`. Raises `RequestError` if weights are missing."""
        from transformers import AutoModel
        from transformers.utils import logging as hf_logging

        config = _truncated(self.config, max(site.layer for site in sites) + 1)
        verbosity = hf_logging.get_verbosity()
        hf_logging.set_verbosity_error()  # it lists the LM head and the upper layers, left out on purpose
        hf_logging.disable_progress_bar()
        try:
            module, report = AutoModel.from_pretrained(
                self.name, config=config, dtype=getattr(torch, dtype), output_loading_info=True, **NO_CODE
            )
        except (OSError, ValueError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise RequestError(f"--model_name {self.name}: weights cannot be read: {_first_line(error)}") from error
        finally:
            hf_logging.set_verbosity(verbosity)
            hf_logging.enable_progress_bar()
        bad = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        if bad:
            raise RequestError(f"--model_name {self.name}: {len(bad)} weights are missing or misshapen: {bad[0]} ...")
        module = _in_own_memory(module).to(device).eval().requires_grad_(False)
        hooked = {site: find_module(module, site) for site in sorted(sites)}
        return LanguageModel(module, hooked, torch.device(device))


@dataclass(frozen=True)
class LanguageModel:
    """The loaded model with the modules whose outputs are wanted."""

    module: nn.Module
    hooked: dict[Site, nn.Module]
    device: torch.device

    @torch.inference_mode()
    def activations(self, ids: Tensor) -> dict[Site, Tensor]:
        """Outputs of the hooked modules for right-padded token ids [texts, tokens]: site -> [texts, tokens, d].

        No attention mask: attention is causal and padding comes last, so no real token ever sees it. What
        stands at padded positions is meaningless.
        """
        with _capture(self.hooked) as outputs:
            self.module(input_ids=ids.to(self.device, non_blocking=True), use_cache=False)
        return outputs


def open_model(name: str) -> ModelInfo:
    """Config and tokenizer of a hub id or local folder. Raises `RequestError` if either cannot be had."""
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(os.path.expanduser(name))  # noqa: PTH111 - leaves an unknown ~user as it is
    local = os.path.isdir(folder)  # noqa: PTH112 - False, not an error, for a name too long to be a path
    if local:
        name = str(folder)
        if not (folder / "config.json").is_file():
            raise RequestError(f"--model_name {name}: the folder has no config.json")
    elif folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
        raise RequestError(f"--model_name {name!r}: no such folder (and not a hub id of the form owner/name)")
    try:
        config = AutoConfig.from_pretrained(name, **NO_CODE)
        tokenizer = AutoTokenizer.from_pretrained(name, **NO_CODE)
    except Exception as error:  # the hub client and the parsers raise many kinds; all mean that this name is unusable
        raise RequestError(
            f"--model_name {name}: not a local folder, and not to be had from the hub: {_first_line(error)}"
            if not local
            else f"--model_name {name}: config or tokenizer cannot be read: {_first_line(error)}"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise RequestError(f"--model_name {name}: needs a fast tokenizer (tokenizer.json) to place the name's tokens")
    text = config.get_text_config()
    try:
        return ModelInfo(
            name=name,
            config=config,
            tokenizer=tokenizer,
            n_layers=int(text.num_hidden_layers),
            d_model=int(text.hidden_size),
            max_length=int(text.max_position_embeddings),
        )
    except AttributeError as error:
        raise RequestError(f"--model_name {name}: not a decoder-only language model ({error})") from error


def find_module(model: nn.Module, site: Site) -> nn.Module:
    """The module whose output `site` names, in a model without its LM head.

    `resid_post` is the whole block, `mlp_out` and `attn_out` its parts; anything else is a module path with
    `<layer>`, such as `gpt_neox.layers.<layer>.mlp`. Raises `RequestError` if there is no such module.
    """
    layer, hookpoint = site
    if "<layer>" in hookpoint:
        path = hookpoint.replace("<layer>", str(layer))
        path = path.removeprefix(f"{getattr(model, 'base_model_prefix', '')}.")
        try:
            return model.get_submodule(path)
        except AttributeError as error:
            raise RequestError(f"--hookpoint {hookpoint}: the model has no module {path} ({error})") from error
    block = _blocks(model)[layer]
    if hookpoint == "resid_post":
        return block
    names = {"mlp_out": MLP_NAMES, "attn_out": ATTENTION_NAMES}.get(hookpoint)
    if names is None:
        raise RequestError(f"--hookpoint {hookpoint!r}: use resid_post, mlp_out, attn_out or a path with <layer>")
    for name in names:
        if isinstance(part := getattr(block, name, None), nn.Module):
            return part
    raise RequestError(f"--hookpoint {hookpoint}: {type(block).__name__} has none of {', '.join(names)}")


def _blocks(model: nn.Module) -> nn.ModuleList:
    for name in ("layers", "h"):
        if isinstance(blocks := getattr(model, name, None), nn.ModuleList):
            return blocks
    raise RequestError(f"{type(model).__name__}: no list of layers found; give --hookpoint as a module path")


def _truncated(config: Any, n_layers: int) -> Any:
    """A copy of the config that builds only the first `n_layers` layers."""
    copy = type(config).from_dict(config.to_dict())
    text = copy.get_text_config()
    text.num_hidden_layers = n_layers
    return copy


def _in_own_memory(module: nn.Module) -> nn.Module:
    """The module with its weights copied out of the mapped file: what is done to that file now is no matter."""
    for weight in (*module.parameters(), *module.buffers()):
        weight.data = weight.data.clone()
    return module


@contextlib.contextmanager
def _capture(modules: dict[Site, nn.Module]) -> Iterator[dict[Site, Tensor]]:
    """Collect the modules' outputs while inside; the hooks are gone afterwards, whatever happens.

    Only those of this thread: several may run the model at a time.
    """
    outputs: dict[Site, Tensor] = {}
    owner = threading.get_ident()

    def keep(site: Site) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if threading.get_ident() == owner:
                outputs[site] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    try:
        for site, module in modules.items():
            handles.append(module.register_forward_hook(keep(site)))
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
