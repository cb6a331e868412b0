"""Requests that a page elsewhere made a browser send are told from those that a person or a program sent."""

from __future__ import annotations

import pytest

from shared.foreign import OTHER_SITE, WRONG_HOST, allowed_hosts, refusal

HERE = allowed_hosts("127.0.0.1")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.7:8000", ""]
)
def test_this_machine_by_name_or_number_may_be_asked(host: str) -> None:
    assert refusal({"host": host}, HERE) is None


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:8000", "127.0.0.1.attacker.example", "localhost.evil", "[::1"]
)
def test_a_name_somebody_pointed_here_is_refused(host: str) -> None:
    """DNS rebinding: the browser believes that the page and the service are one site."""
    assert (refusal({"host": host}, HERE) is None) == (host == "[::1")  # half an address is still that address
    assert refusal({"host": host}, HERE, any_host=True) is None


def test_names_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOWED_HOSTS", "Assistant.example, inference")
    assert refusal({"host": "assistant.example:443"}, allowed_hosts()) is None
    assert refusal({"host": "inference:8001"}, allowed_hosts()) is None
    assert refusal({"host": "other.example"}, allowed_hosts()) == WRONG_HOST


@pytest.mark.parametrize("origin", ["https://attacker.example", "null", "http://localhost:3000", "http://127.0.0.1:8000"])
def test_a_page_of_another_origin_may_not_call(origin: str) -> None:
    assert refusal({"host": "localhost:8000", "origin": origin}, HERE) == OTHER_SITE
    assert refusal({"host": "localhost:8000", "origin": origin}, HERE, any_host=True) == OTHER_SITE


def test_the_own_page_may_call_and_a_link_may_lead_here() -> None:
    assert refusal({"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, HERE) is None
    assert refusal({"host": "localhost:8000", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, HERE) is None


def test_a_picture_on_another_page_is_no_request_of_ours() -> None:
    assert refusal({"host": "localhost:8000", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, HERE) == OTHER_SITE
