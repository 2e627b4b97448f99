"""Token positions compared with a count of characters, the context window, and the batches."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import people, write_csv
from runs import Request, numbers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from delta_selectivity import tasks as dw
from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import ModelInfo, open_model
from delta_selectivity.run.planning import _decide_bos
from delta_selectivity.tasks.people import name_span
from delta_selectivity.tasks.tokens import TokenisedMentions

BOS = "<|endoftext|>"
TINY_PYTHIA = Path(__file__).parent.parent / "assets" / "tiny-pythia" / "tokenizer.json"
TRAINING_TEXT = [
    "The book was written by Ada Byron and read by Barack Obama in the town of Lyon.",
    "Barack Obama met Ada Byron. José Ramos met Beyoncé Knowles, said the paper.",
] * 20
NAMES = [
    "They spoke of Barack Obama",
    "Barack Obama",
    "a speech by José Muñoz-Peña",
    "sung by Beyoncé Knowles",
    "the emoji 🎉 and 🎉🎈 Party🎈",
    "written by 村上 春樹",
    "नरेन्द्र मोदी",
    "ligature ﬁ Zoë\u0308 Ångström",  # decomposed and compatibility characters
    "(Linda Hamilton",
    "so said Ada Byron \n ",
    "Unseen Qwzxk Vbnmp",
]


def byte_level_bpe(trim_offsets: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING_TEXT, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS)


@pytest.fixture(scope="module", params=[False, True], ids=["offsets with space", "offsets trimmed"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return byte_level_bpe(request.param)


def mention(text: str, name: str | None = None) -> dw.Mention:
    """Return the mention of `name` in `text`; without a name, of the name that ends it."""
    if name is None:
        span = name_span(text)
        assert span is not None
        return dw.Mention(text, *span, person=text)
    start = text.index(name)
    return dw.Mention(text, start, start + len(name), person=name)


def brute_force_span(mention: dw.Mention, ids: list[int], tokenizer: PreTrainedTokenizerFast) -> tuple[int, int]:
    """Count bytes: every byte-level token has a number of bytes, and together they are the text's bytes."""
    alphabet = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]  # one character per byte
    ends = np.cumsum(alphabet)
    begin = len(mention.text[: mention.start].encode())
    end = len(mention.text[: mention.end].encode())
    assert ends[-1] == len(mention.text.encode())
    inside = [i for i in range(len(ids)) if ends[i] > begin and ends[i] - alphabet[i] < end]
    return inside[0], inside[-1]


def check_against_brute_force(mentions: list[dw.Mention], tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = dw.tokenise(mentions, tokenizer, prepend_bos=True, max_length=512)
    for i, m in enumerate(mentions):
        ids = tokenizer(m.text, add_special_tokens=False)["input_ids"]
        assert tokens.ids[i].dtype == np.int32
        assert tokens.ids[i].tolist() == [tokenizer.bos_token_id, *ids]
        first, last = brute_force_span(m, ids, tokenizer)
        assert (tokens.first[i], tokens.last[i]) == (first + 1, last + 1), m.text
        decoded = tokenizer.decode(ids[first : last + 1], clean_up_tokenization_spaces=False)
        assert m.text[m.start : m.end] in decoded


def test_positions_equal_a_count_of_bytes(tokenizer: PreTrainedTokenizerFast) -> None:
    inside = [mention("I met Barack Obama in Lyon.", "Barack Obama"), mention("🎉José🎉 came", "José")]
    check_against_brute_force([mention(text) for text in NAMES] + inside, tokenizer)


@pytest.mark.skipif(not TINY_PYTHIA.is_file(), reason="the bundled demo model is not here")
def test_positions_with_the_demo_tokenizer() -> None:
    demo = PreTrainedTokenizerFast(tokenizer_file=str(TINY_PYTHIA), bos_token=BOS, eos_token=BOS)
    plain = [text for text in NAMES if text.isascii()]  # its normalizer may change the bytes of other texts
    check_against_brute_force([mention(text) for text in plain], demo)


def test_space_after_the_name_is_not_probed(tokenizer: PreTrainedTokenizerFast) -> None:
    plain, padded = (
        dw.tokenise([mention(text)], tokenizer, prepend_bos=True, max_length=64)
        for text in ("so said Ada Byron", "so said Ada Byron \n  ")
    )
    assert plain.last[0] == padded.last[0] == len(plain.ids[0]) - 1 < len(padded.ids[0]) - 1


def test_without_bos_positions_are_one_less(tokenizer: PreTrainedTokenizerFast) -> None:
    mentions = [mention(text) for text in NAMES]
    with_bos = dw.tokenise(mentions, tokenizer, prepend_bos=True, max_length=512)
    without = dw.tokenise(mentions, tokenizer, prepend_bos=False, max_length=512)
    assert with_bos.has_bos and not without.has_bos
    assert np.array_equal(with_bos.first, without.first + 1) and np.array_equal(with_bos.last, without.last + 1)
    assert all(np.array_equal(a[1:], b) for a, b in zip(with_bos.ids, without.ids, strict=True))


def test_long_texts_are_truncated_from_the_left(tokenizer: PreTrainedTokenizerFast) -> None:
    m = mention("one two three four five six seven eight and then Barack Obama")
    full = dw.tokenise([m], tokenizer, prepend_bos=False, max_length=512)
    cut = dw.tokenise([m], tokenizer, prepend_bos=True, max_length=10)
    assert len(full.ids[0]) > 10
    assert cut.ids[0].tolist() == [tokenizer.bos_token_id, *full.ids[0][-9:].tolist()]
    assert cut.last[0] == 9
    assert cut.last[0] - cut.first[0] == full.last[0] - full.first[0]


@pytest.mark.parametrize("room", range(8, 60))
def test_the_window_never_cuts_the_name(tokenizer: PreTrainedTokenizerFast, room: int) -> None:
    m = mention("one two three Ada Byron four five six seven eight nine ten", "Ada Byron")
    full = dw.tokenise([m], tokenizer, prepend_bos=False, max_length=512)
    cut = dw.tokenise([m], tokenizer, prepend_bos=False, max_length=room)
    ids, first, last = full.ids[0].tolist(), int(full.first[0]), int(full.last[0])
    kept = cut.ids[0].tolist()
    assert len(kept) == min(room, len(ids))
    assert kept[cut.first[0] : cut.last[0] + 1] == ids[first : last + 1]
    ends_with_text = kept == ids[-len(kept) :]
    assert ends_with_text == (len(ids) - first <= room or len(ids) <= room)
    assert ends_with_text or cut.first[0] == 0


def test_a_name_longer_than_the_window_is_rejected(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match=r"'Qwzxk Vbnmp' has \d+ tokens, but the model accepts 3"):
        dw.tokenise([mention("Qwzxk Vbnmp")], tokenizer, prepend_bos=True, max_length=4)


def test_text_without_tokens_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RequestError, match="no token for 'ab' in the text 'ab'"):
        dw.tokenise([dw.Mention("ab", 0, 2, "ab")], _deaf(), prepend_bos=False, max_length=8)
    with pytest.raises(RequestError, match="no token for"):
        dw.tokenise([dw.Mention("", 0, 0, "nobody")], tokenizer, prepend_bos=True, max_length=8)


def _deaf() -> PreTrainedTokenizerFast:
    """Return a tokenizer that knows one letter and has neither an unknown token nor BOS."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"h": 0}, [])))


@pytest.mark.parametrize("n_own", [0, 1, 2])
@pytest.mark.parametrize("prepend", [True, False])
def test_texts_that_begin_with_bos_have_one_or_none_as_asked(tokenizer, caplog, n_own: int, prepend: bool) -> None:
    """Chat templates and exported texts may begin with BOS; it is not part of the text."""
    plain = mention("Ada Byron wrote it")
    own = dw.Mention(n_own * BOS + plain.text, plain.start + n_own * len(BOS), plain.end + n_own * len(BOS), "p")
    found = dw.tokenise([own, plain], tokenizer, prepend_bos=prepend, max_length=64)
    assert found.ids[0].tolist() == found.ids[1].tolist()
    assert found.first[0] == found.first[1] and found.last[0] == found.last[1]
    told = "no second one is added" if prepend else "it is removed"
    assert (f"1 of 2 texts already begin with BOS: {told}" in caplog.text) == (n_own > 0)


def test_a_name_that_begins_with_bos_keeps_it(tokenizer) -> None:
    m = dw.Mention(f"{BOS}Ada", 0, len(BOS), "p")
    assert dw.tokenise([m], tokenizer, prepend_bos=True, max_length=64).ids[0][:2].tolist() == [0, 0]


def test_eos_is_prepended_if_there_is_no_bos(tokenizer) -> None:
    """As in TransformerLens: the SAEs of Qwen in SAE Lens were trained in this way."""
    qwen = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=BOS)
    assert qwen.bos_token_id is None
    found = dw.tokenise([mention("Ada Byron")], qwen, prepend_bos=True, max_length=64)
    assert (
        found.ids[0].tolist()
        == dw.tokenise([mention("Ada Byron")], tokenizer, prepend_bos=True, max_length=64).ids[0].tolist()
    )


def test_a_token_outside_the_vocabulary_is_reported_with_its_text(tokenizer) -> None:
    m = mention("Ada Byron")
    ids = dw.tokenise([m], tokenizer, prepend_bos=False, max_length=64).ids[0].tolist()
    most = max(ids)
    dw.tokenise([m], tokenizer, prepend_bos=False, max_length=64, n_embeddings=most + 1)
    token = tokenizer.convert_ids_to_tokens(most)
    with pytest.raises(RequestError, match=re.escape(f"token {most} ({token!r}) in the text 'Ada Byron'")):
        dw.tokenise([m], tokenizer, prepend_bos=False, max_length=64, n_embeddings=most)


def test_a_missing_bos_token_is_rejected() -> None:
    with pytest.raises(RequestError, match="no BOS token"):
        dw.tokenise([mention("hello")], _deaf(), prepend_bos=True, max_length=8)


def test_slow_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(RequestError, match="slow"):
        dw.tokenise([mention("Ada Byron")], tokenizer, prepend_bos=True, max_length=8)


def test_pretokenised_mentions_keep_their_ids_and_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    own = dw.Mention("Ada Byron", 0, 9, "ada", token_ids=(5, 0, 7, 8), token_span=(2, 3))
    plain = mention("met Barack Obama")
    mixed = dw.tokenise([plain, own, plain], tokenizer, prepend_bos=True, max_length=64)
    assert mixed.ids[1].tolist() == [tokenizer.bos_token_id, 5, 0, 7, 8]
    assert (mixed.first[1], mixed.last[1]) == (3, 4)
    assert mixed.ids[0].tolist() == mixed.ids[2].tolist()
    cut = dw.tokenise([own], tokenizer, prepend_bos=True, max_length=3)
    assert (cut.ids[0].tolist(), cut.first[0], cut.last[0]) == ([tokenizer.bos_token_id, 7, 8], 1, 2)


def test_tokens_of_another_tokenizer_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    fits = dw.Mention("a", 0, 1, "a", token_ids=(len(tokenizer) - 1,), token_span=(0, 0))
    dw.tokenise([fits], tokenizer, prepend_bos=True, max_length=8)
    other = dw.Mention("a", 0, 1, "a", token_ids=(1, len(tokenizer)), token_span=(0, 1))
    with pytest.raises(RequestError, match="of another tokenizer"):
        dw.tokenise([other], tokenizer, prepend_bos=True, max_length=8)


# --- batches


def tokenised(lengths: list[int]) -> TokenisedMentions:
    rng = np.random.default_rng(0)
    ends = np.array([length - 1 for length in lengths], dtype=np.int64)
    ids = tuple(rng.integers(0, 9, length).astype(np.int32) for length in lengths)
    return TokenisedMentions(ids=ids, first=ends - 1, last=ends, has_bos=True)


LENGTHS = [3, 9, 5, 5, 2, 7, 9, 4, 30, 5]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("max_tokens", [None, 1, 18, 64])
def test_batches_hold_every_mention_once_within_the_limits(batch_size: int, max_tokens: int | None) -> None:
    tokens = tokenised(LENGTHS)
    asked = np.array([8, 1, 0, 2, 3, 9, 6, 5], dtype=np.int64)
    made = list(dw.batches(tokens, asked, batch_size=batch_size, max_tokens=max_tokens))
    assert sorted(np.concatenate([batch.mentions for batch in made])) == sorted(asked)
    for batch in made:
        b, t = batch.ids.shape
        assert b <= batch_size
        assert max_tokens is None or b * t <= max_tokens or b == 1
        assert t == batch.lengths.max() and batch.has_bos
        tensors = (batch.ids, batch.lengths, batch.first, batch.last)
        assert {tensor.dtype for tensor in tensors} == {torch.int64}
        for row, index in enumerate(batch.mentions):
            length = int(batch.lengths[row])
            assert batch.ids[row, :length].tolist() == tokens.ids[index].tolist()
            assert batch.ids[row, length:].tolist() == [0] * (t - length)
            assert (batch.first[row], batch.last[row]) == (tokens.first[index], tokens.last[index])


def test_batches_run_from_long_to_short_with_ties_by_index_whatever_the_order_asked() -> None:
    tokens = tokenised(LENGTHS)
    forward, backward = (
        np.concatenate([batch.mentions for batch in dw.batches(tokens, asked, batch_size=2)]).tolist()
        for asked in (np.arange(10), np.arange(10)[::-1])
    )
    assert forward == backward == [8, 1, 6, 5, 2, 3, 9, 7, 0, 4]


def test_no_mentions_give_no_batches() -> None:
    assert list(dw.batches(tokenised([3]), np.array([], dtype=np.int64), batch_size=4)) == []
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(dw.batches(tokenised([3]), np.arange(1), batch_size=0))


def test_an_sae_that_was_trained_with_bos_is_measured_with_eos_where_the_model_has_no_bos(
    tiny_model, tiny_saes, people_csv, tmp_path, capsys, caplog
):
    folder = shutil.copytree(tiny_model, tmp_path / "EleutherAI" / "pythia-nobos")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    assert not open_model(str(folder)).has_bos
    sources = [SimpleNamespace(prepend_bos=wish, counts_bos=False) for wish in (True, None)]
    assert _decide_bos("auto", open_model(str(folder)), sources) == (True, [False, False])
    assert _decide_bos("auto", open_model(str(folder)), sources[1:]) == (False, [False])
    assert "has no BOS token: texts begin with EOS" in caplog.text
    with_eos = Request(folder, (tiny_saes,), people_csv, tmp_path / "eos").plus("--bos", "excluded", "--layers", "1")
    with_bos = Request(tiny_model, (tiny_saes,), people_csv, tmp_path / "bos").plus("--layers", "1")
    assert with_eos.run() == with_bos.run() == 0  # this tokenizer uses one token for both
    (found,), (expected,) = numbers(with_eos.out).values(), numbers(with_bos.out).values()
    assert found == expected


def test_added_tokens_without_embeddings_are_found_before_the_run(tiny_model, tiny_saes, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "EleutherAI" / "pythia-extended")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["Zebedee"])
    tokenizer.save_pretrained(folder)
    rows = people(60)
    rows[7] = {**rows[7], "text": f"Zebedee met {rows[7]['group']}", "start": "", "end": ""}
    request = Request(folder, (tiny_saes,), write_csv(tmp_path / "women.csv", rows), tmp_path / "out")
    monkeypatch.setattr(ModelInfo, "load", lambda *_: pytest.fail("the model was loaded"))
    assert request.run() == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert "'Zebedee'" in told and "Zebedee met" in told and "--model_name" in told
