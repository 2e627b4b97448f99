"""Tokenise texts and locate the tokens of a name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from delta_selectivity.errors import RequestError
from delta_selectivity.tasks.types import Int64Array, Mention

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_CHUNK = 1024  # texts tokenised at once; details of every token do not fit into memory for all texts


@dataclass(frozen=True, eq=False)
class TokenisedMentions:
    """Token ids of every mention and the position of its name in them."""

    ids: tuple[npt.NDArray[np.int32], ...]  # per mention [n_tokens], BOS first when has_bos
    first: Int64Array  # [n_mentions] first token of the name, counted in ids (so shifted by BOS)
    last: Int64Array  # [n_mentions] last token of the name, inclusive
    has_bos: bool
    n_cut: int = 0  # texts that `tokenise` truncated to the model's length
    n_own_bos: int = 0  # texts that already began with BOS before `tokenise`

    def select(self, mentions: Int64Array) -> TokenisedMentions:
        """Return only these mentions, in this order."""
        return TokenisedMentions(
            tuple(self.ids[m] for m in mentions), self.first[mentions], self.last[mentions], self.has_bos
        )

    def with_other_bos(self, bos: int, max_length: int) -> TokenisedMentions:
        """Return the same texts without BOS if they have it, else with BOS; full texts lose their first token."""
        if self.has_bos:
            return TokenisedMentions(tuple(ids[1:] for ids in self.ids), self.first - 1, self.last - 1, False)
        cut = tuple(ids[len(ids) + 1 - max_length :] if len(ids) >= max_length else ids for ids in self.ids)
        shift = np.array([1 + len(rest) - len(ids) for rest, ids in zip(cut, self.ids, strict=True)])
        ids = tuple(np.concatenate([np.array([bos], dtype=np.int32), rest]) for rest in cut)
        return TokenisedMentions(ids, np.maximum(self.first + shift, 1), np.maximum(self.last + shift, 1), True)


@dataclass(frozen=True)
class _Tokens:
    """One mention without BOS: token ids and the name's inclusive span in them."""

    ids: Sequence[int]
    first: int
    last: int


def tokenise(
    mentions: Sequence[Mention],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prepend_bos: bool,
    max_length: int,
    n_embeddings: int | None = None,
    last_only: bool = False,
) -> TokenisedMentions:
    """Tokenise `mentions` to at most `max_length` tokens each, including BOS.

    Longer texts are truncated on the left, or before the name if its start would be cut. A warning says how many.
    Tokens after the name are kept if they fit: in a causal model they do not affect the name, but they count in
    mse_whole. The tokenizer adds no special tokens; BOS is prepended here. If a text already begins with BOS, as
    with chat templates, that one is removed, so that only `prepend_bos` decides. Pre-tokenised mentions keep their ids.

    Args:
        mentions: Texts and the characters of the names in them.
        tokenizer: A fast tokenizer.
        prepend_bos: Whether texts begin with BOS.
        max_length: Maximum number of tokens per text.
        n_embeddings: Number of tokens that the model supports; None: all of the tokenizer's.
        last_only: Keep only the end of a name that does not fit.

    Raises:
        RequestError: The tokenizer is slow, lacks a required BOS, or does not belong to the model; a token has no
            embedding in the model; or the name of a mention has no token or does not fit.
    """
    own_bos = _opening_token(tokenizer)
    bos = _bos(tokenizer) if prepend_bos else []
    max_tokens = max_length - len(bos)
    rows: list[_Tokens] = []
    n_cut = n_own_bos = 0
    for given, mention in zip(_all_tokens(mentions, tokenizer), mentions, strict=True):
        tokens = _without_bos(given, own_bos)
        n_own_bos += tokens is not given
        if n_embeddings is not None:
            _refuse_unknown([*bos, *tokens.ids], n_embeddings, tokenizer, mention)
        rows.append(_window(tokens, max_tokens, mention, last_only))
        n_cut += len(tokens.ids) > max_tokens
    tokenised = TokenisedMentions(
        ids=tuple(np.array([*bos, *row.ids], dtype=np.int32) for row in rows),
        first=np.array([row.first + len(bos) for row in rows], dtype=np.int64),
        last=np.array([row.last + len(bos) for row in rows], dtype=np.int64),
        has_bos=prepend_bos,
        n_cut=n_cut,
        n_own_bos=n_own_bos,
    )
    warn_of_changes(tokenised, max_length)
    return tokenised


def warn_of_changes(tokenised: TokenisedMentions, max_length: int) -> None:
    """Warn about the number of truncated texts and of texts that already began with BOS, if any."""
    if tokenised.n_own_bos:
        action = "no second one is added" if tokenised.has_bos else "it is removed, since this run has no BOS"
        logger.warning("%d of %d texts already begin with BOS: %s", tokenised.n_own_bos, len(tokenised.ids), action)
    if tokenised.n_cut:
        logger.warning(
            "%d of %d texts are longer than the model's %d tokens: their beginning is cut, or their end if they begin "
            "with the name", tokenised.n_cut, len(tokenised.ids), max_length,
        )  # fmt: skip


def _opening_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that begins a text: BOS, or EOS if the tokenizer has no BOS, as in TransformerLens."""
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return None if found is None else int(found)


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    bos = _opening_token(tokenizer)
    if bos is None:
        raise RequestError(
            f"the tokenizer {tokenizer.name_or_path!r} has no BOS token to prepend: use an SAE trained without BOS"
        )
    return [bos]


def _without_bos(tokens: _Tokens, bos: int | None) -> _Tokens:
    """Return the tokens without a leading BOS, unless the BOS is part of the name."""
    n = 0
    while n < tokens.first and tokens.ids[n] == bos:
        n += 1
    return _Tokens(tokens.ids[n:], tokens.first - n, tokens.last - n) if n else tokens


def _refuse_unknown(
    ids: Sequence[int], n_embeddings: int, tokenizer: PreTrainedTokenizerBase, mention: Mention
) -> None:
    if max(ids) < n_embeddings:
        return
    token = next(token for token in ids if token >= n_embeddings)
    raise RequestError(
        f"`model`: it has embeddings for {n_embeddings} tokens, but its tokenizer gives token {token} "
        f"({tokenizer.convert_ids_to_tokens(token)!r}) in the text {_shorten(mention.text)!r}: the tokenizer was "
        "extended, but not the model (resize_token_embeddings)"
    )


def _all_tokens(mentions: Sequence[Mention], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Tokens]:
    for begin in range(0, len(mentions), _CHUNK):
        chunk = mentions[begin : begin + _CHUNK]
        tokenised = _tokenise_texts([mention for mention in chunk if mention.token_ids is None], tokenizer)
        for mention in chunk:
            yield next(tokenised) if mention.token_ids is None else _given_tokens(mention, tokenizer)


def _tokenise_texts(mentions: Sequence[Mention], tokenizer: PreTrainedTokenizerBase) -> Iterator[_Tokens]:
    if not mentions:
        return
    if not tokenizer.is_fast:
        raise RequestError(
            f"the tokenizer {tokenizer.name_or_path!r} is slow, and does not give the positions of tokens in the text: "
            "use a model with a fast tokenizer"
        )
    backend: Tokenizer = tokenizer.backend_tokenizer  # gives token positions without listing all tokens
    backend.no_truncation()  # texts longer than the model are truncated in `_window`
    backend.no_padding()
    try:
        encoded = backend.encode_batch([mention.text for mention in mentions], add_special_tokens=False)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by Rust; not a subclass of Exception
            raise
        raise RequestError(f"the tokenizer {tokenizer.name_or_path!r} fails on a text ({error})") from error
    for mention, encoding in zip(mentions, encoded, strict=True):
        yield _locate(mention, encoding)


def _locate(mention: Mention, encoding: Encoding) -> _Tokens:
    """Return the tokens that share a character with the name.

    The criterion is overlap, not equal boundaries: a token may include the space before the name, and all tokens of
    one multi-byte character have that character's offsets. A name at the very end of the text ends with the last
    token, which has no position in some tokenizers if it is a space.
    """
    tokens = (encoding.char_to_token(place) for place in range(mention.start, mention.end))
    first = next((token for token in tokens if token is not None), None)
    if mention.end == len(mention.text) and len(encoding):
        last = len(encoding) - 1
        return _Tokens(encoding.ids, last if first is None else first, last)
    if first is None:
        name = mention.text[mention.start : mention.end]
        raise RequestError(f"the tokenizer gives no token for {name!r} in the text {_shorten(mention.text)!r}")
    last = first
    for token in range(first + 1, len(encoding)):
        span = encoding.token_to_chars(token)
        if span is None or span[0] >= mention.end:
            break
        last = token if span[1] > mention.start else last
    return _Tokens(encoding.ids, first, last)


def _given_tokens(mention: Mention, tokenizer: PreTrainedTokenizerBase) -> _Tokens:
    assert mention.token_ids is not None and mention.token_span is not None
    if max(mention.token_ids) >= len(tokenizer):
        raise RequestError(
            f"token {max(mention.token_ids)} of the text {_shorten(mention.text)!r} is not in the vocabulary of "
            f"{tokenizer.name_or_path!r} ({len(tokenizer)}): its tokens are of another tokenizer"
        )
    return _Tokens(mention.token_ids, *mention.token_span)


def _window(tokens: _Tokens, max_tokens: int, mention: Mention, last_only: bool) -> _Tokens:
    """Return at most `max_tokens` of `tokens`: the last ones, or those from the name on if the name would be cut."""
    length = tokens.last - tokens.first + 1
    if length > max_tokens and last_only and max_tokens > 0:
        first = tokens.last + 1 - max_tokens
        return _Tokens(tokens.ids[first : tokens.last + 1], 0, max_tokens - 1)
    if length > max_tokens:
        raise RequestError(
            f"the name in the text {_shorten(mention.text)!r} has {length} tokens, but the model accepts {max_tokens}"
        )
    cut = min(max(len(tokens.ids) - max_tokens, 0), tokens.first)
    return _Tokens(tokens.ids[cut : cut + max_tokens], tokens.first - cut, tokens.last - cut)


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"...{text[-limit:]}"
