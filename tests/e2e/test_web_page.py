"""The web page in a real browser, against the real service with a fake assistant: what a person sees, hears and can do."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect
from pydantic import SecretStr

sys.path.append(str(Path(__file__).parent))  # test folders are not packages
from live_page import CONTRAST, NEEDS_CHROMIUM, PHONE, serving

from shared import feedback

pytestmark = [pytest.mark.slow, NEEDS_CHROMIUM]


@pytest.fixture
def page(context: BrowserContext, address: str) -> Iterator[Page]:
    """The opened page. A script error, a breach of the content policy or a request elsewhere fails the test."""
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if "Content Security Policy" in message.text else None)
    page.on("request", lambda request: None if request.url.startswith(address) else troubles.append(request.url))
    page.goto(address)
    expect(page.get_by_text("Read the 6 leaflets")).to_be_visible()
    yield page
    assert troubles == []


def say(page: Page, message: str) -> None:
    """Send a message and wait until its reply is complete."""
    before = page.locator(".foot").count()
    page.get_by_label("Your message").fill(message)
    page.get_by_label("Your message").press("Enter")
    expect(page.locator(".foot")).to_have_count(before + 1)


def test_a_citation_opens_the_sentence_it_quotes(page: Page) -> None:
    say(page, "What helps?")
    expect(page.locator(".theirs .text p").first).to_have_text(re.compile("fact 1 helps people at home"))
    source = page.get_by_role("button", name="Source 2: Sunburn, Self care")
    source.click()
    panel = page.get_by_role("complementary", name="Sunburn")
    quoted = panel.locator(".quoted")
    expect(quoted).to_have_text(re.compile("Sunburn self-care fact 2"))
    expect(quoted).to_be_in_viewport()
    expect(quoted).to_be_focused()
    expect(source).to_have_attribute("aria-expanded", "true")
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    expect(source).to_be_focused()


def test_the_answer_streams_in(context: BrowserContext, tmp_path: Path, mini_datasets: Path) -> None:
    with serving(tmp_path / "slow", mini_datasets, pause=0.8) as url:
        page = context.new_page()
        page.goto(url)
        page.get_by_label("Your message").fill("What helps?")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".working")).to_have_text("Looking in the library")
        expect(page.locator(".theirs .text")).to_contain_text("Sunburn")
        assert page.locator(".foot").count() == 0  # words are there before the answer is complete
        expect(page.get_by_role("button", name="Send")).to_be_disabled()
        expect(page.locator(".foot")).to_have_count(1, timeout=30_000)


def test_a_clarifying_question_is_answered_by_a_button_or_in_own_words(page: Page) -> None:
    say(page, "It hurts")
    choices = page.get_by_role("group", name="Choose one")
    expect(choices.get_by_role("button")).to_have_text(["throbbing or pounding", "pressing like a band", "stabbing"])
    choices.get_by_role("button", name="stabbing").click()
    expect(page.locator(".foot")).to_have_count(2)
    expect(choices).to_have_count(0)
    expect(page.locator(".mine").last).to_have_text(re.compile("stabbing"))
    expect(page.locator(".theirs").last).to_contain_text("self-care fact 1")


def test_an_emergency_is_loud_and_says_what_to_do(page: Page) -> None:
    say(page, "crushing pain in my chest")
    banner = page.locator(".emergency")
    expect(banner.get_by_role("heading", name="This may be an emergency")).to_be_in_viewport()
    expect(banner).to_contain_text("Call your emergency number now")
    expect(page.get_by_role("alert")).to_contain_text("Call your emergency number now")
    banner.get_by_role("button", name="Source 1").click()
    expect(page.locator(".quoted")).to_contain_text("emergency signs fact 1")


def test_a_warning_stands_over_the_answer_and_opens_its_sign(page: Page) -> None:
    say(page, "I am worried")
    reply = page.locator(".theirs")
    expect(reply.locator(".warning")).to_contain_text("This can be an emergency.")
    expect(reply).to_contain_text("self-care fact 1")
    assert reply.locator(".warning").bounding_box()["y"] < reply.locator(".text").bounding_box()["y"]
    reply.get_by_role("button", name="Read the warning signs").click()
    expect(page.locator(".quoted")).to_contain_text("emergency signs fact 1")
    page.reload()
    expect(page.locator(".theirs .warning")).to_have_count(1)


def test_an_unanswered_question_names_what_to_read_and_why(page: Page) -> None:
    say(page, "retract this")
    reply = page.locator(".theirs")
    expect(reply).to_contain_text("The library does not answer this.")
    expect(reply).not_to_contain_text("will not let through")
    expect(reply).to_contain_text("Answer withheld: not grounded")
    reply.get_by_role("button", name="Sunburn", exact=True).click()
    expect(page.get_by_role("complementary", name="Sunburn")).to_be_visible()


def test_markup_from_anyone_is_shown_as_text(page: Page) -> None:
    title = page.title()
    say(page, "<b>markup</b> <img src=x onerror=alert(1)>")
    expect(page.locator(".mine")).to_contain_text("<b>markup</b> <img src=x")
    expect(page.locator(".theirs")).to_contain_text("<b>bold</b>")
    assert page.locator("#log img, #log b").count() == page.locator("#log .steps b").count()
    assert page.title() == title


def test_how_the_answer_came_about(page: Page) -> None:
    say(page, "What helps?")
    page.get_by_text("How this answer came about").click()
    panel = page.locator(".how")
    expect(panel).to_contain_text("508 tokens")
    expect(panel).to_contain_text("cost 0.000213")
    expect(panel.locator(".steps > li")).to_have_count(4)
    expect(panel.locator(".steps > li").last).to_contain_text("352 tokens")
    expect(panel.locator(".found > li")).to_have_count(5)
    expect(panel.locator(".found > li").first).to_contain_text("0.910")
    expect(page.locator(".badge")).to_have_text("Judge: grounded, safe, helpful 4/5")


def test_thumbs_go_to_the_feedback_file(page: Page, tmp_path: Path) -> None:
    say(page, "What helps?")
    page.get_by_role("button", name="Not helpful").click()
    reason = page.get_by_label("What was wrong?")
    expect(reason).to_be_focused()
    reason.fill("I'm Ann Lee and it was about another burn")
    reason.press("Enter")
    expect(page.get_by_text("It will be looked at")).to_be_visible()
    expect(page.get_by_role("button", name="Not helpful")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Helpful", exact=True).click()
    expect(page.get_by_role("button", name="Helpful", exact=True)).to_have_attribute("aria-pressed", "true")
    records, _ = feedback.read(tmp_path / "artifacts" / "feedback")
    assert [(r.kind, r.reason) for r in records] == [
        ("thumbs_down", "I'm [name] and it was about another burn"),
        ("thumbs_up", ""),
    ]


def test_a_conversation_outlives_a_reload_until_it_is_deleted(page: Page) -> None:
    say(page, "What helps?")
    page.reload()
    expect(page.locator(".mine")).to_contain_text("What helps?")
    expect(page.locator(".cite")).to_have_count(2)
    page.get_by_role("button", name="Delete my conversation").click()
    page.get_by_role("button", name="Keep it").click()
    expect(page.locator(".mine")).to_have_count(1)
    page.get_by_role("button", name="Delete my conversation").click()
    page.get_by_role("button", name="Delete it").click()
    expect(page.locator("#log > li")).to_have_count(0)
    expect(page.get_by_role("status")).to_have_text("Your conversation has been deleted.")
    page.reload()
    expect(page.get_by_text("Read the 6 leaflets")).to_be_visible()
    expect(page.locator("#log > li")).to_have_count(0)
    say(page, "And a new one begins")


def test_everything_works_with_the_keyboard(page: Page) -> None:
    expect(page.get_by_label("Your message")).to_be_focused()
    page.keyboard.type("It hurts")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a lot")
    page.keyboard.press("Enter")
    expect(page.locator(".mine")).to_contain_text("It hurts\na lot")
    expect(page.locator(".foot")).to_have_count(1)
    for _ in range(20):
        if page.evaluate("document.activeElement.closest('.choices') !== null"):
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator(".foot")).to_have_count(2)
    page.locator(".cite").first.focus()
    page.keyboard.press("Enter")
    expect(page.locator(".quoted")).to_be_focused()


def test_a_screen_reader_is_told_what_happens(page: Page) -> None:
    say(page, "What helps?")
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^Answer: Sunburn self-care fact 1"))
    say(page, "unknown")
    expect(page.get_by_role("status")).to_have_text("Answer: The library does not answer this.")
    nameless = page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, summary, progress")]
             .filter((e) => !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length))
             .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    expect(page.get_by_role("note")).to_have_count(1)  # the stance is there once, not in every reply
    assert page.content().count("not a diagnosis") == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_can_be_read_in_light_and_dark(browser: Browser, address: str, scheme: Any) -> None:
    context = browser.new_context(viewport=PHONE, color_scheme=scheme, has_touch=True, is_mobile=True, reduced_motion="reduce")
    page = context.new_page()
    page.goto(address)
    for message in ("What helps?", "crushing pain in my chest", "retract " + "verylongword" * 12):
        say(page, message)
        page.get_by_text("How this answer came about").last.click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && scrollY === 0")
    too_faint = page.evaluate(CONTRAST)
    assert too_faint == []
    page.locator(".cite").first.click()
    box = page.locator("#leaflet").bounding_box()
    assert box is not None
    assert box["width"] == PHONE["width"]
    page.get_by_role("button", name="Close the leaflet").click()
    expect(page.locator("#leaflet")).to_be_hidden()
    context.close()


def test_faults_are_told_in_one_sentence_and_the_message_is_not_lost(page: Page) -> None:
    page.get_by_label("Your message").fill("crash")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".problem").last).to_contain_text("Something went wrong on our side")
    expect(page.get_by_label("Your message")).to_have_value("crash")
    page.route("**/chat", lambda route: route.abort())
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".theirs").last).to_contain_text("cannot be reached")
    page.unroute("**/chat")
    say(page, "What helps?")


def test_a_service_with_a_token_asks_for_it(context: BrowserContext, tmp_path: Path, mini_datasets: Path) -> None:
    with serving(tmp_path / "closed", mini_datasets, token=SecretStr("s3cret")) as url:
        page = context.new_page()
        page.goto(url)
        dialog = page.get_by_role("dialog", name="This service needs a token")
        dialog.get_by_label("Token").fill("wrong")
        page.keyboard.press("Enter")
        expect(dialog.get_by_label("Token")).to_have_value("")
        dialog.get_by_label("Token").fill("s3cret")
        page.keyboard.press("Enter")
        expect(page.get_by_text("Read the 6 leaflets")).to_be_visible()
        say(page, "What helps?")
