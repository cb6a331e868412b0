"""The review page in a real browser: failed answers are looked at, by keyboard too, and what two people say becomes a label."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from pydantic import SecretStr

sys.path.append(str(Path(__file__).parent))  # test folders are not packages
from live_page import CONTRAST, NEEDS_CHROMIUM, PHONE, serving

from shared import labels

pytestmark = [pytest.mark.slow, NEEDS_CHROMIUM]


@pytest.fixture
def failed(address: str) -> str:
    """The address of a service that gave one bad answer in a conversation of two messages, with markup in it."""
    with httpx.Client(base_url=address) as client:
        session_id = client.post("chat", json={"message": "It hurts <b>here</b>"}).json()["session_id"]
        client.post("chat", json={"message": "retract <img src=x onerror=alert(1)>", "session_id": session_id})
    return address


@pytest.fixture
def page(context: BrowserContext, failed: str) -> Iterator[Page]:
    """The opened page. A script error, a breach of the content policy or a request elsewhere fails the test."""
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if "Content Security Policy" in message.text else None)
    page.on("request", lambda request: None if request.url.startswith(failed) else troubles.append(request.url))
    page.goto(failed + "review")
    yield page
    assert troubles == []


def begin(page: Page, reviewer: str) -> None:
    page.evaluate("sessionStorage.clear()")
    page.reload()
    page.get_by_label("Your initials").fill(reviewer)
    page.get_by_role("button", name="Begin").click()


def test_two_people_mark_the_same_sentences_and_a_label_is_written(page: Page, tmp_path: Path) -> None:
    begin(page, "ab")
    expect(page.locator("#question")).to_have_text("retract <img src=x onerror=alert(1)>")  # text, not markup
    expect(page.locator("#task")).to_contain_text("It hurts <b>here</b>")
    expect(page.locator("#task")).to_contain_text("this judge is not trusted")
    save = page.get_by_role("button", name="Save and go on")
    expect(save).to_be_disabled()
    page.get_by_role("checkbox", name="Sunburn overview fact 2").check()
    expect(page.get_by_role("radio", name="Answer with these sentences")).to_be_checked()
    page.get_by_role("searchbox", name="Search the library").fill("sunburn treatment")
    page.get_by_role("searchbox").press("Enter")
    page.get_by_role("checkbox", name="Sunburn treatment fact 1").check()
    expect(page.get_by_role("checkbox", name="Sunburn overview fact 2")).to_be_checked()
    save.click()
    expect(page.locator(".done")).to_have_text("Nothing is left for you to look at. Thank you.")
    begin(page, "cd")
    page.get_by_role("checkbox", name="Sunburn overview fact 2").check()
    page.get_by_role("searchbox").fill("sunburn treatment")
    page.get_by_role("searchbox").press("Enter")
    page.get_by_role("checkbox", name="Sunburn treatment fact 1").check()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#progress")).to_contain_text("1 of 1 labelled")
    (label,), _ = labels.read(tmp_path / "artifacts" / "feedback")
    assert label.answer_sentences == ["sunburn/overview/2", "sunburn/treatment/1"]
    assert label.question == "It hurts <b>here</b>"  # what began the problem
    assert label.reviewers == ["ab", "cd"]


def test_everything_works_with_the_keyboard_and_is_announced(page: Page) -> None:
    expect(page.get_by_label("Your initials")).to_be_focused()
    page.keyboard.type("ab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("Question: retract")
    page.keyboard.press("4")
    expect(page.get_by_role("radio", name="Send to the emergency number")).to_be_checked()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("Nothing is left for you to look at.")
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input")]
             .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
             .map((e) => e.outerHTML)"""
    )
    assert nameless == []


def test_where_two_differ_the_third_sees_both(page: Page, failed: str) -> None:
    for reviewer, action in (("ab", "decline"), ("cd", "clarify")):
        answer = httpx.get(failed + "reviews/next", params={"reviewer": reviewer}).json()["task"]["answer_id"]
        httpx.post(failed + "reviews", json={"answer_id": answer, "reviewer": reviewer, "action": action}).raise_for_status()
    begin(page, "ef")
    expect(page.locator(".opinion")).to_have_text(["ab: Decline", "cd: Ask back"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_light_and_dark(browser: Browser, failed: str, scheme: Any) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True, reduced_motion="reduce")
    page = context.new_page()
    page.goto(failed + "review")
    page.get_by_label("Your initials").fill("ab")
    page.get_by_role("button", name="Begin").click()
    page.get_by_role("checkbox", name="Sunburn overview fact 1").check()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && scrollY === 0")
    assert page.evaluate(CONTRAST) == []
    context.close()


def test_a_service_with_a_token_asks_for_it(context: BrowserContext, tmp_path: Path, mini_datasets: Path) -> None:
    with serving(tmp_path / "closed", mini_datasets, token=SecretStr("s3cret")) as url:
        page = context.new_page()
        page.goto(url + "review")
        page.get_by_label("Your initials").fill("ab")
        page.get_by_role("button", name="Begin").click()
        page.get_by_role("dialog", name="This service needs a token").get_by_label("Token").fill("s3cret")
        page.keyboard.press("Enter")
        expect(page.locator(".done")).to_have_text("Nothing is left for you to look at. Thank you.")
