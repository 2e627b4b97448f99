"""An unreachable Hub is tried once, and then the cache is used."""

from __future__ import annotations

import socket
import time

import pytest
from huggingface_hub import constants

from delta_selectivity.errors import RequestError
from delta_selectivity.models.language_model import open_model
from delta_selectivity.saes import open_sae
from delta_selectivity.system import hub_access
from delta_selectivity.system.hub_access import use_cache_if_unreachable


@pytest.fixture
def hub(monkeypatch):
    """Return a function that starts a Hub at a local address: `hub(answers)`."""
    monkeypatch.setattr(hub_access, "_last_check", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))

        def at(answers: bool) -> None:
            if answers:
                server.listen()
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")

        yield at


def test_a_reachable_hub_is_used_normally(hub):
    hub(answers=True)
    assert use_cache_if_unreachable()
    assert not constants.HF_HUB_OFFLINE


def test_an_unreachable_hub_fails_at_once_with_one_line(hub, caplog):
    hub(answers=False)
    start = time.monotonic()
    with pytest.raises(RequestError, match="`model` owner/name: not a local folder, not in the local Hub cache"):
        open_model("owner/name")
    with pytest.raises(RequestError, match="and the Hub does not answer: check the name and the connection"):
        open_sae("owner/name")
    assert time.monotonic() - start < 5
    assert not caplog.records


def test_the_hub_is_tried_again_after_a_minute(hub, monkeypatch):
    hub(answers=False)
    assert not use_cache_if_unreachable()
    hub(answers=True)
    assert not use_cache_if_unreachable()
    monkeypatch.setattr(hub_access, "VALID_FOR", 0.0)
    assert use_cache_if_unreachable()
    assert not constants.HF_HUB_OFFLINE


def test_offline_mode_is_respected(hub, monkeypatch):
    hub(answers=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not use_cache_if_unreachable()
    assert constants.HF_HUB_OFFLINE


def test_a_proxy_disables_the_check(hub, monkeypatch):
    hub(answers=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert use_cache_if_unreachable()
