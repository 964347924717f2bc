"""
The chat page in a real Chromium, against a real server whose engine says what a test tells it to.

    python -m tests.serve.test_page docs/chat.png      # takes the picture in the README anew
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nanochat.serve.page import content_security_policy
from tests.engines_for_tests import ScriptedEngine, ScriptedScheduler, script_of
from tests.serving_for_tests import serving
from tests.tokenizers_for_tests import tiny_tokenizer

try:
    from playwright.sync_api import Browser, Page, expect, sync_playwright
except ImportError:
    pytest.skip("no playwright: these tests drive a browser", allow_module_level=True)

TOKENIZER = tiny_tokenizer()
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")

Parts = list[dict[str, str]]
TOOL_REPLY = [
    {"type": "text", "text": "27 + 15 = "},
    {"type": "python", "text": "27+15"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "42. So it is **42**."},
]
DESKTOP = {"viewport": {"width": 1100, "height": 760}}
PHONE = {"viewport": {"width": 390, "height": 760}, "has_touch": True, "is_mobile": True}


class Place:
    """The server, its engine and the browser that all tests of this file share."""

    def __init__(self, browser: Browser, url: str, engine: ScriptedEngine) -> None:
        self.browser, self.url, self.engine = browser, url, engine

    def says(self, *replies: str | Parts, endless: bool = False, delay: float = 0.0) -> None:
        """What the model replies next, in turn; the last one for ever."""
        scripts = [script_of(TOKENIZER, reply) for reply in replies]
        # Without the token that ends a reply, where it is to go on for ever
        self.engine.scripts = [script[:-1] if endless else script for script in scripts]
        self.engine.endless, self.engine.delay, self.engine.gate = endless, delay, None
        self.engine.closed.clear()

    @contextmanager
    def page(self, **context: Any) -> Iterator[Page]:
        """The page in a browser nobody used before. Fails if it threw, or asked for what its
        headers forbid."""
        troubles: list[str] = []
        with self.browser.new_context(**{**DESKTOP, **context}) as session:
            page = session.new_page()
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on(
                "console",
                lambda m: troubles.append(m.text) if "Content Security Policy" in m.text else None,
            )
            page.goto(self.url)
            expect(page.locator("#model")).to_contain_text("tiny")
            yield page
        assert not troubles, troubles


@contextmanager
def browsing() -> Iterator[Place]:
    engine = ScriptedEngine(script_of(TOKENIZER, "Hello!"))
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    limits = {"max_context": 8192, "max_new_tokens": 6000, "make_scheduler": ScriptedScheduler}
    with serving([engine], TOKENIZER, **limits) as served, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        expect.set_options(timeout=60_000)  # ms; a loaded machine is slow
        yield Place(browser, str(served.client.base_url), engine)
        browser.close()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with browsing() as place:
        yield place


def reply(page: Page) -> Any:
    return page.locator("article.assistant").last


def done(page: Page) -> None:
    expect(reply(page)).to_have_attribute("aria-busy", "false")


def ask(page: Page, text: str) -> None:
    """Writes and sends, waits for the whole reply."""
    page.fill("#input", text)
    page.click("#send")
    done(page)


def prompt_of(*messages: tuple[str, str | Parts]) -> list[int]:
    """The token ids that the engine should have been given for these turns."""
    turns = [{"role": role, "content": content} for role, content in messages]
    return TOKENIZER.render_for_completion({"messages": turns})


# ---- talking


def test_a_conversation(place: Place) -> None:
    place.says("It is a **harbour** town.", "Yes.")
    with place.page() as page:
        expect(page.locator("#welcome h2")).to_be_visible()
        page.keyboard.type("What is")  # the message box has the focus
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("Selby?")
        page.keyboard.press("Enter")
        done(page)
        expect(page.locator("#welcome")).to_be_hidden()
        expect(reply(page).locator(".md")).to_have_text("It is a harbour town.")
        expect(reply(page).locator("strong")).to_have_text("harbour")
        expect(reply(page).locator(".note")).to_have_text(re.compile(r"^\d+ tokens · [\d.,]+ t"))
        expect(page.locator("#room")).to_have_text(re.compile(r"^\d+ of 8,192 tokens used$"))
        expect(page.locator("#title")).to_have_text("What is Selby?")
        assert page.locator("#input").input_value() == ""
        ask(page, "Really?")
        expect(page.locator("article")).to_have_count(4)
    asked = [("user", "What is\nSelby?"), ("assistant", "It is a **harbour** town.")]
    assert place.engine.calls[-1]["tokens"] == prompt_of(*asked, ("user", "Really?"))


def test_an_example_question_is_asked_by_a_click(place: Place) -> None:
    place.says("I am small.")
    with place.page() as page:
        page.get_by_role("button", name="Who are you?").click()
        done(page)
        expect(page.locator(".bubble")).to_have_text("Who are you?")
        expect(reply(page).locator(".md")).to_have_text("I am small.")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stop_keeps_what_was_said_and_frees_the_server(place: Place, way: str) -> None:
    with place.page() as page:
        place.says("water ", endless=True, delay=0.005)
        page.fill("#input", "Go on")
        page.keyboard.press("Enter")
        expect(reply(page).locator(".md")).to_contain_text("water")
        expect(page.locator("#send")).to_have_attribute("aria-label", "Stop")
        if way == "button":
            page.click("#send")
        else:
            page.keyboard.press("Escape")
        done(page)
        expect(reply(page).locator(".note")).to_have_text(re.compile("^about .* · stopped$"))
        assert place.engine.closed.wait(timeout=60), "the server went on without a reader"
        said = reply(page).locator(".md").inner_text()
        assert said.startswith("water")
        place.says("Next.")
        ask(page, "And now?")
        expect(reply(page).locator(".md")).to_have_text("Next.")
        expect(page.locator("article.assistant .md").first).to_have_text(said)


def test_editing_a_message_cuts_what_follows(place: Place) -> None:
    place.says("One.", "Two.", "Three.", "Four.")
    with place.page() as page:
        for question in ("first", "second", "third"):
            ask(page, question)
        second = page.locator("article.user").nth(1)
        second.hover()
        second.get_by_role("button", name="Edit").click()
        area = page.get_by_label("Your message, edited")
        expect(area).to_be_focused()
        page.keyboard.press("Escape")  # takes it back
        expect(page.locator("article.user .bubble").nth(1)).to_have_text("second")
        page.keyboard.press("Enter")  # the button has the focus again
        area.fill("second, better")
        page.keyboard.press("Enter")
        done(page)
        expect(page.locator(".bubble")).to_have_text(["first", "second, better"])
        expect(page.locator(".md")).to_have_text(["One.", "Four."])
    turns = [("user", "first"), ("assistant", "One."), ("user", "second, better")]
    assert place.engine.calls[-1]["tokens"] == prompt_of(*turns)


def test_a_reply_is_regenerated(place: Place) -> None:
    place.says("One.", "Two.", "Other.")
    with place.page() as page:
        ask(page, "first")
        ask(page, "second")
        page.get_by_role("button", name="Regenerate").last.click()
        expect(page.locator(".md")).to_have_text(["One.", "Other."])
        expect(page.locator(".bubble")).to_have_text(["first", "second"])
    turns = [("user", "first"), ("assistant", "One."), ("user", "second")]
    assert place.engine.calls[-1]["tokens"] == prompt_of(*turns)


def test_tool_calls_are_folded_within_their_sentence(place: Place) -> None:
    place.says(TOOL_REPLY, "Yes.")
    with place.page() as page:
        ask(page, "What is 27 + 15?")
        tool = page.locator("p > details.tool")
        expect(tool.locator("summary")).to_have_text("Used the calculator")
        expect(tool.locator("dd").first).to_be_hidden()
        tool.locator("summary").click()
        expect(tool.locator("dd")).to_have_text(["27+15", "42"])
        expect(tool.locator("dd").first).to_be_visible()
        expect(reply(page).locator("strong")).to_have_text("42")
        ask(page, "Sure?")
        expect(tool.locator("dd").first).to_be_visible()  # it stays as the reader left it
    turns = [("user", "What is 27 + 15?"), ("assistant", TOOL_REPLY), ("user", "Sure?")]
    assert place.engine.calls[-1]["tokens"] == prompt_of(*turns)


# ---- what is kept in the browser


def test_a_reload_keeps_the_conversation(place: Place) -> None:
    place.says(TOOL_REPLY, "Yes.")
    with place.page() as page:
        ask(page, "What is 27 + 15?")
        page.reload()
        expect(page.locator(".bubble")).to_have_text(["What is 27 + 15?"])
        expect(page.locator("details.tool dd")).to_have_text(["27+15", "42"])
        expect(page.locator(".note")).to_contain_text("tokens/s")
        ask(page, "Sure?")
        expect(page.locator(".md")).to_have_count(2)
    turns = [("user", "What is 27 + 15?"), ("assistant", TOOL_REPLY), ("user", "Sure?")]
    assert place.engine.calls[-1]["tokens"] == prompt_of(*turns)


def test_a_reload_in_the_middle_of_a_reply_keeps_what_was_said(place: Place) -> None:
    place.says("water ", endless=True, delay=0.005)
    with place.page() as page:
        page.fill("#input", "Go on")
        page.keyboard.press("Enter")
        expect(reply(page).locator(".md")).to_contain_text("water")
        page.reload()
        expect(reply(page).locator(".md")).to_contain_text("water")
        expect(reply(page).locator(".note")).to_contain_text("stopped")


def test_conversations_are_listed_renamed_deleted_and_brought_back(place: Place) -> None:
    place.says("Hello!")
    with place.page() as page:
        names = page.locator("#chats .name")
        for question in ("about bread", "about clocks"):
            page.click("#fresh")
            ask(page, question)
        expect(names).to_have_text(["about clocks", "about bread"])
        names.nth(1).click()
        expect(page.locator(".bubble")).to_have_text(["about bread"])
        page.go_back()
        expect(page.locator(".bubble")).to_have_text(["about clocks"])
        page.get_by_role("button", name="Rename “about clocks”").click()
        page.keyboard.type("time")
        page.keyboard.press("Enter")
        expect(page.locator("#title")).to_have_text("time")
        expect(names.get_by_text("time")).to_be_focused()
        page.reload()
        expect(names).to_have_text(["time", "about bread"])
        page.get_by_role("button", name="Delete “time”").click()
        expect(names).to_have_text(["about bread"])
        expect(page.locator("#welcome")).to_be_visible()
        page.get_by_role("button", name="Undo").click()
        expect(page.locator(".bubble")).to_have_text(["about clocks"])
        page.get_by_role("button", name="Delete “time”").click()
        page.reload()
        expect(names).to_have_text(["about bread"])


def test_a_reply_goes_on_while_another_conversation_is_read(place: Place) -> None:
    with place.page() as page:
        place.says("Hello!")
        ask(page, "about bread")
        place.says("water.", delay=0.01)
        gate = place.engine.gate = threading.Event()
        page.click("#fresh")
        page.fill("#input", "about clocks")
        page.keyboard.press("Enter")
        expect(page.locator("#chats li.busy")).to_have_count(1)
        page.locator("#chats .name").last.click()
        expect(page.locator(".md")).to_have_text(["Hello!"])
        gate.set()
        expect(page.locator("#chats li.busy")).to_have_count(0)
        page.locator("#chats .name").first.click()
        expect(page.locator(".md")).to_have_text(["water."])


def test_two_tabs_share_the_list(place: Place) -> None:
    place.says("Hello!")
    with place.page() as page:
        other = page.context.new_page()
        other.goto(place.url)
        ask(page, "about bread")
        expect(other.locator("#chats .name")).to_have_text(["about bread"])
        page.get_by_role("button", name="Delete “about bread”").click()
        expect(other.locator("#chats .name")).to_have_count(0)


BROKEN = [
    '"text"', "null", "{", "[]", '{"turns": {}}', '{"turns": []}', '{"turns": [1]}',
    '{"turns": [{"text": 5, "parts": []}]}', '{"turns": [{"text": "x"}]}',
]  # fmt: skip
HALF = """{"title": 7, "renamed": 3, "updated": "x", "turns": [{"text": "kept", "state": "?",
  "tokens": "many", "parts": [{"type": "text", "text": "good"}, {"type": "odd", "text": "x"}, 4]},
  {"text": "lost"}, {"text": "too", "parts": []}]}"""


def test_broken_storage_loses_only_what_is_broken(place: Place) -> None:
    place.says("Hello!")
    with place.page() as page:
        for i, text in enumerate([*BROKEN, HALF]):
            page.evaluate("([k, v]) => localStorage.setItem(k, v)", [f"nanochat/chat/{i}", text])
        for key, text in {
            "settings": '{"top_k": "x", "seed": -1, "system": 4}',
            "theme": "5",
        }.items():
            page.evaluate("([k, v]) => localStorage.setItem(k, v)", [f"nanochat/{key}", text])
        page.reload()
        expect(page.locator("#chats .name")).to_have_text(["kept"])
        page.locator("#chats .name").click()
        expect(page.locator(".md")).to_have_text(["good"])
        ask(page, "still there?")
        expect(page.locator(".md")).to_have_text(["good", "Hello!"])


def test_full_storage_says_so_and_the_conversation_goes_on(place: Place) -> None:
    place.says("Hello!")
    with place.page() as page:
        fill = "for (let n = 1 << 22; n > 0; n >>= 1)"
        fill += " try { for (let i = 0; i < 9; i++) localStorage[`x${n}${i}`] = 'y'.repeat(n); }"
        page.evaluate(f"() => {{ {fill} catch {{}} }}")
        ask(page, "anyone?")
        expect(page.locator(".md")).to_have_text(["Hello!"])
        expect(page.locator("#unkept")).to_be_visible()
        page.evaluate("() => localStorage.clear()")
        ask(page, "and now?")
        expect(page.locator("#unkept")).to_be_hidden()
        page.reload()
        expect(page.locator(".md")).to_have_count(2)


def test_without_storage_the_page_works(place: Place) -> None:
    place.says("Hello!")
    with place.page() as page:
        deny = "{ get() { throw new DOMException('denied', 'SecurityError'); } }"
        names = ("localStorage", "sessionStorage")
        script = "".join(f"Object.defineProperty(window, '{name}', {deny});" for name in names)
        page.add_init_script(script)
        page.reload()
        ask(page, "anyone?")
        expect(page.locator(".md")).to_have_text(["Hello!"])
        expect(page.locator("#unkept")).to_be_visible()


# ---- settings


def body_of(page: Page, text: str) -> dict[str, Any]:
    """Asks, and returns what the page sent."""
    with page.expect_request("**/v1/chat/completions") as request:
        ask(page, text)
    return request.value.post_data_json


CHOSEN = {"temperature": 0.3, "top_p": 0.9, "top_k": 5, "max_tokens": 40, "seed": 11}


def test_settings_are_sent_and_kept(place: Place) -> None:
    place.says("Hello!")
    sampled = {*CHOSEN}
    with place.page() as page:
        assert not sampled & body_of(page, "plain").keys()  # the server's own hold
        page.click("#settings-open")
        expect(page.locator("#temperature")).to_have_attribute("placeholder", "0.8")
        expect(page.locator("#model_id")).to_have_value("tiny")
        for key, value in CHOSEN.items():
            page.fill(f"#{key}", str(value))
        page.fill("#system", "Be brief.")
        page.get_by_role("button", name="Done").click()
        page.reload()
        page.click("#fresh")
        body = body_of(page, "chosen")
        assert {key: body[key] for key in sampled} == CHOSEN
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
        page.click("#settings-open")
        page.fill("#temperature", "9")  # out of range: not taken
        page.fill("#top_p", "")
        page.keyboard.press("Escape")
        expect(page.locator("#temperature")).to_have_value("")
        body = body_of(page, "again")
        assert "temperature" not in body and "top_p" not in body and body["top_k"] == 5
        page.click("#settings-open")
        page.locator("#temperature-slide").fill("0.5")
        expect(page.locator("#temperature")).to_have_value("0.5")
        page.get_by_role("button", name="Back to defaults").click()
        page.get_by_role("button", name="Done").click()
        body = body_of(page, "reset")
        assert not sampled & body.keys() and body["messages"][0]["role"] == "user"


def test_the_engine_gets_what_was_chosen(place: Place) -> None:
    place.says("water ", endless=True)
    with place.page() as page:
        page.click("#settings-open")
        page.fill("#max_tokens", "7")
        page.fill("#system", "Be brief.")
        page.get_by_role("button", name="Done").click()
        ask(page, "Go on")
        expect(page.locator(".note")).to_have_text(
            re.compile("^7 tokens .* cut at the token limit")
        )
    system = ("system", "Be brief.")
    assert place.engine.calls[-1]["tokens"] == prompt_of(system, ("user", "Go on"))


def test_a_key_is_asked_for_and_sent(place: Place) -> None:
    place.says("Hello!")
    refusal = {"error": {"message": "a key is needed", "type": "invalid_request_error"}}
    with place.page() as page:

        def guard(route: Any) -> None:
            if route.request.headers.get("authorization") == "Bearer sesame":
                route.continue_()
            else:
                route.fulfill(status=401, json=refusal)

        page.route("**/v1/**", guard)
        page.fill("#input", "Let me in")
        page.keyboard.press("Enter")
        expect(page.locator("#api_key")).to_be_focused()
        page.keyboard.type("sesame")
        page.keyboard.press("Escape")
        expect(page.locator(".failed")).to_contain_text("a key is needed")
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".md")).to_have_text(["Hello!"])
        assert "sesame" not in page.evaluate("() => JSON.stringify(localStorage)")


# ---- when something fails


def test_a_server_that_is_away_is_said_and_found_again(place: Place) -> None:
    place.says("Hello!")
    with place.page() as page:
        page.context.set_offline(True)
        page.fill("#input", "Are you there?")
        page.keyboard.press("Enter")
        expect(page.locator(".failed")).to_contain_text("The server does not answer")
        expect(page.locator("#offline")).to_be_visible()
        page.context.set_offline(False)
        expect(page.locator("#offline")).to_be_hidden()
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".md")).to_have_text(["Hello!"])
        expect(page.locator(".failed")).to_be_hidden()
    assert place.engine.calls[-1]["tokens"] == prompt_of(("user", "Are you there?"))


HALF_A_REPLY = 'data: {"choices": [{"index": 0, "delta": {"content": "Half"}}]}\n\n'
ENDINGS = {
    "error": 'data: {"error": {"message": "it broke"}}\n\ndata: [DONE]\n\n',
    "cut": "",
    "nonsense": "data: {\n\n",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_reply_that_breaks_off_can_be_asked_for_again(place: Place, ending: str) -> None:
    place.says("Whole.")
    with place.page() as page:
        body, kind = HALF_A_REPLY + ENDINGS[ending], "text/event-stream"
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(body=body, content_type=kind),
            times=1,
        )
        page.fill("#input", "Well?")
        page.keyboard.press("Enter")
        expect(page.locator(".failed")).to_be_visible()
        expect(page.locator(".md")).to_have_text(["Half"])
        if ending == "error":
            expect(page.locator(".failed")).to_contain_text("it broke")
        page.reload()
        page.get_by_role("button", name="Retry").click()
        expect(page.locator(".md")).to_have_text(["Whole."])
        expect(page.locator(".failed")).to_be_hidden()


def test_a_refusal_is_shown_and_not_made_part_of_the_conversation(place: Place) -> None:
    place.says("Hello!")
    with place.page() as page:
        page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=429, json={"error": {"message": "<b>busy</b>"}}),
            times=1,
        )
        page.fill("#input", "first")
        page.keyboard.press("Enter")
        expect(page.locator(".failed span")).to_have_text("<b>busy</b>")
        ask(page, "second")
    assert place.engine.calls[-1]["tokens"] == prompt_of(("user", "second"))


# ---- Markdown

MARKDOWN = {
    "plain\ntwo": "<p>plain<br>two</p>",
    "# One\n### Three ##\n####### seven": "<h3>One</h3><h5>Three</h5><p>####### seven</p>",
    "a **b** *c* ***d*** ~~e~~ __f__ _g_": (
        "<p>a <strong>b</strong> <em>c</em> <strong><em>d</em></strong> <s>e</s>"
        " <strong>f</strong> <em>g</em></p>"
    ),
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "2*3*4, 2**3**4, a_b_c, 2 * 3 * 4, **open": "<p>2*3*4, 2**3**4, a_b_c, 2 * 3 * 4, **open</p>",
    r"\*a\* \`b\` \\": r"<p>*a* `b` \</p>",
    "`a*b*` ``c`d`` `open": "<p><code>a*b*</code> <code>c`d</code> `open</p>",
    "- a\n- b\n  - c\n\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. a\n4. b": '<ol start="3"><li>a</li><li>b</li></ol>',
    "text\n- a": "<p>text</p><ul><li>a</li></ul>",
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "---": "<hr>",
    "1 < 2 && <b>x</b> &amp;": "<p>1 &lt; 2 &amp;&amp; &lt;b&gt;x&lt;/b&gt; &amp;amp;</p>",
    "a|b\n-|:-:\n1|`2`": (
        "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td><code>2</code></td></tr></tbody></table>"
    ),
    "a | b, no table": "<p>a | b, no table</p>",
    "```py\nx = '<b>'\n\n# y\n```\nz": "<pre><code>x = '&lt;b&gt;'\n\n# y</code></pre><p>z</p>",
    "- a\n  ```\n  x\n    y\n  ```": "<ul><li>a<pre><code>x\n  y</code></pre></li></ul>",
    "~~~~\n~~~\n": "<pre><code>~~~</code></pre>",
    "[a **b**](https://x.org/?q=1) [c](http://y.org/(z))": (
        '<p><a href="https://x.org/?q=1">a <strong>b</strong></a>'
        ' <a href="http://y.org/(z)">c</a></p>'
    ),
    "see https://x.org/a_b_c. (http://y.org)": (
        '<p>see <a href="https://x.org/a_b_c">https://x.org/a_b_c</a>.'
        ' (<a href="http://y.org/">http://y.org</a>)</p>'
    ),
    "![a](https://x.org/y.png)": '<p>!<a href="https://x.org/y.png">a</a></p>',
    "[a](javascript:alert(1)) [b](/c) [d](data:text/html,x)": (
        "<p>[a](javascript:alert(1)) [b](/c) [d](data:text/html,x)</p>"
    ),
    "\ue0000\ue001": "<p>\ufffd0\ufffd</p>",  # the mark of a tool call, forged
}
UNTOLD = "dir|title|target|rel|style|class|role|tabindex|aria-label"  # attributes
DRAW = """(sources) => sources.map((source) => {
  const markdown = new Markdown(document.createElement("div"));
  markdown.show(withoutMarks(source));
  for (const bar of markdown.node.querySelectorAll(".bar")) bar.remove();
  return markdown.node.innerHTML;
})"""


def test_markdown(place: Place) -> None:
    with place.page() as page:
        drawn = page.evaluate(DRAW, list(MARKDOWN))
    for (source, wanted), html in zip(MARKDOWN.items(), drawn, strict=True):
        plain = re.sub(
            r' (?:dir|title|target|rel|style|class|role|tabindex|aria-label)="[^"]*"', "", html
        )
        assert plain.replace("<div>", "").replace("</div>", "") == wanted, source


FRAGMENTS = [
    *("*", "**", "_", "__", "~~", "`", "``", "```", "~~~", "\n", "\n\n", " ", "  ", "    ", "\t"),
    *("- ", "1. ", "> ", "# ", "|", "|-|", "---", "[", "](", ")", "https://a.b/c", "javascript:x"),
    *("<script>", "<img src=x onerror=boom()>", '"', "\\", "word", "2*3", "é", "\r\n", "\ue000"),
    "\ue0000\ue001",
]


# Grown piece by piece, as a reply does, the page must end up as if it had come at once; and
# whatever came, nothing but these elements and addresses may stand there.
GROW = """(sources) => sources.map((pieces) => {
  const grown = new Markdown(document.createElement("div"));
  const once = new Markdown(document.createElement("div"));
  let source = "";
  for (const piece of pieces) grown.show(withoutMarks(source += piece));
  once.show(withoutMarks(source));
  return [grown.node.isEqualNode(once.node),
    [...new Set([...once.node.querySelectorAll("*")].flatMap((node) => [node.localName,
      ...[...node.attributes].map((a) => `@${a.name}`)]))],
    [...once.node.querySelectorAll("a")].map((a) => [a.href, a.rel])];
})"""
ELEMENTS = """p h3 h4 h5 h6 ul ol li blockquote hr br strong em s code pre a div span button svg use
    table thead tbody tr th td"""
ATTRIBUTES = """@href @title @target @rel @dir @start @class @role @tabindex @aria-label
    @aria-hidden @type @style"""
ALLOWED = {*ELEMENTS.split(), *ATTRIBUTES.split()}


def test_markdown_of_anything_is_harmless_and_the_same_in_pieces(place: Place) -> None:
    draw = random.Random(7)
    sources = [draw.choices(FRAGMENTS, k=draw.randint(1, 30)) for _ in range(400)]
    with place.page() as page:
        for source, (same, names, links) in zip(sources, page.evaluate(GROW, sources), strict=True):
            assert same, source
            assert set(names) <= ALLOWED, source
            for href, rel in links:
                assert href.startswith("https://") and "noopener" in rel, source


HEAVY = [
    "[",
    "*",
    "*a ",
    "**a",
    "`",
    "` ``",
    "~~~`",
    "~",
    " ",
    "https://x.y/.",
    "> ",
    "- ",
    "  - a\n",
    "|",
    "a|b\n",
    "\\",
    "~~~\n",
    "[a](",
]


def test_markdown_of_a_hostile_reply_does_not_freeze_the_page(place: Place) -> None:
    time_it = """(source) => {
      const began = performance.now();
      new Markdown(document.createElement("div")).show(source);
      return performance.now() - began; }"""
    with place.page() as page:
        for piece in HEAVY:
            source = piece * (40_000 // len(piece))
            assert page.evaluate(time_it, source) < 30_000, piece  # ms


# ---- what a model or a user may write and nobody wants to run

HOSTILE = """<script>window.pwned = 1</script><img src=x onerror="window.pwned = 1">

<svg onload="window.pwned=1"><iframe srcdoc="<script>parent.pwned=1</script>"></iframe>

[click](javascript:window.pwned=1) [or](jAvAsCrIpT:window.pwned=1) [or](java\tscript:pwned=1)
[data](data:text/html,<script>window.pwned=1</script>) [vb](vbscript:x) [file](file:///etc/passwd)
![x](https://evil.example/pixel.png) <https://evil.example/"onmouseover="pwned=1>
[a](https://evil.example/"onmouseover="window.pwned=1) [<img src=x onerror=pwned=1>](https://e.example)

```html"><script>window.pwned=1</script>
</code></pre><script>window.pwned = 1</script>
```

| <img src=x onerror=pwned=1> | b |
|---|---|
| `</td><script>pwned=1</script>` | <style>*{display:none}</style> |

<form action="https://evil.example"><input autofocus onfocus="window.pwned=1"></form>
<a href="javascript:window.pwned=1">x</a> <base href="https://evil.example/"> {{constructor}}"""


def test_nothing_that_is_written_runs(place: Place) -> None:
    tool = [
        {"type": "text", "text": HOSTILE},
        {"type": "python", "text": HOSTILE},
        {"type": "python_output", "text": HOSTILE},
    ]
    place.says(tool)
    asked: list[str] = []
    with place.page() as page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: asked.append(dialog.message))
        page.click("#settings-open")
        page.fill("#system", HOSTILE)
        page.keyboard.press("Escape")
        ask(page, HOSTILE)
        page.reload()
        done(page)
        page.locator("details.tool summary").click()
        for box in page.locator("#log a").all():
            box.hover()
        found = page.evaluate(
            """() => ({ pwned: window.pwned, hash: location.hash,
            tags: [...document.querySelectorAll("#log *, #chats *")].map((n) => n.localName),
            handlers: [...document.querySelectorAll("*")].flatMap((node) => [...node.attributes])
              .filter((a) => a.name.startsWith("on")).length,
            links: [...document.querySelectorAll("#log a")].map((a) => [a.protocol, a.rel]) })"""
        )
        expect(page.locator(".bubble")).to_have_text(
            HOSTILE.replace("\t", " "), use_inner_text=False
        )
        expect(page.locator("details.tool dd")).to_have_count(2)
    assert found["pwned"] is None and found["handlers"] == 0
    assert not {"script", "img", "iframe", "style", "form", "input", "base"} & set(found["tags"])
    assert found["links"] and all(p == "https:" and "noopener" in rel for p, rel in found["links"])
    assert all(url.startswith(place.url) for url in asked), asked


# What would run if markup or an address of the model's ever got through: each must be refused,
# which the browser tells by an event (within 30 s on a very slow machine).
INJECTIONS = """async (url) => {
  const node = document.body.appendChild(document.createElement("div"));
  const tries = [
    () => { node.innerHTML = "<img src=x onerror='window.pwned = 1'>"; },
    () => { node.insertAdjacentHTML("beforeend", "<b>x</b>"); },
    () => { document.createElement("script").text = "window.pwned = 1"; },
    () => { node.setAttribute("onclick", "window.pwned = 1"); node.click(); },
    () => { node.setAttribute("style", "position: fixed"); },
    () => node.appendChild(document.createElement("style")).append("*{}"),
    () => { node.appendChild(document.createElement("img")).src = url; },
    () => { node.appendChild(document.createElement("iframe")).src = url; },
    () => fetch(url),
  ];
  const refused = [];
  for (const run of tries) {
    const told = new Promise((resolve) => {
      document.addEventListener("securitypolicyviolation", () => resolve(true), { once: true });
      setTimeout(() => resolve(false), 30_000);
    });
    try { await run(); } catch { /* told by the event */ }
    refused.push(await told);
  }
  return [refused, window.pwned ?? null];
}"""


def test_the_headers_refuse_what_the_page_does_not_bring(place: Place) -> None:
    with place.browser.new_context() as session:
        page = session.new_page()
        response = page.goto(place.url)
        assert response is not None
        policy = response.headers["content-security-policy"]
        assert policy == content_security_policy(response.text()) and "unsafe" not in policy
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        refused, pwned = page.evaluate(INJECTIONS, "http://127.0.0.2:9/elsewhere")
        assert refused == [True] * 9 and pwned is None


# ---- every reader


def axe_findings(page: Page) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{v['id']}: {[node['target'] for node in v['nodes']]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


RICH = """# Bread

Some **text** with `code` and [a link](https://example.com).

1. one
2. two

> quoted

| a | b |
|---|---|
| 1 | 2 |

```python
print("a line that is so long that it has to scroll sideways on every screen there is", 1, 2, 3, 4)
```"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_serious(place: Place, scheme: str, screen: dict[str, Any]) -> None:
    place.says([*TOOL_REPLY, {"type": "text", "text": f"\n\n{RICH}"}])
    with place.page(color_scheme=scheme, **screen) as page:
        assert axe_findings(page) == []
        ask(page, "What is 27 + 15?")
        page.locator("details.tool summary").click()
        page.get_by_role("button", name="Edit").first.click()
        page.route("**/v1/chat/completions", lambda route: route.abort())
        page.fill("#input", "Well?")
        page.click("#send")
        expect(page.locator("#offline")).to_be_visible()
        assert axe_findings(page) == []  # a reply, an editor, an error, a banner
        page.click("#settings-open")
        assert axe_findings(page) == []
        page.keyboard.press("Escape")
        if screen is PHONE:
            page.click("#toggle")
            page.get_by_role("button", name="Delete").click()
            expect(page.locator("#toast")).to_be_visible()
            assert axe_findings(page) == []


def test_the_theme_follows_the_system_until_one_is_chosen(place: Place) -> None:
    with place.page(color_scheme="dark") as page:
        dark = "rgb(27, 27, 26)"
        expect(page.locator("body")).to_have_css("background-color", dark)
        page.get_by_label("Light").check()
        expect(page.locator("body")).not_to_have_css("background-color", dark)
        page.reload()
        expect(page.get_by_label("Light")).to_be_checked()
        expect(page.locator("body")).not_to_have_css("background-color", dark)
        page.get_by_label("Auto").check()
        expect(page.locator("body")).to_have_css("background-color", dark)


def test_the_list_is_folded_away_and_stays_so(place: Place) -> None:
    with place.page() as page:
        toggle = page.locator("#toggle")
        expect(toggle).to_have_attribute("aria-expanded", "true")
        toggle.click()
        expect(page.locator("#side")).to_be_hidden()
        page.reload()
        expect(page.locator("#side")).to_be_hidden()
        expect(toggle).to_have_attribute("aria-expanded", "false")
        toggle.click()
        expect(page.locator("#side")).to_be_visible()


def test_everything_is_reached_by_the_keyboard_and_shows_it(place: Place) -> None:
    place.says(TOOL_REPLY)
    with place.page() as page:
        ask(page, "What is 27 + 15?")
        page.evaluate("() => document.activeElement.blur()")
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            name, visible = page.evaluate(
                """() => { const node = document.activeElement, style = getComputedStyle(node);
                const shown = node.id === "input" ? getComputedStyle(node.form).boxShadow
                  : node.type === "radio" ? getComputedStyle(node.nextSibling).outlineStyle
                  : style.outlineStyle;
                return [node.getAttribute("aria-label") || node.textContent || node.value,
                  node === document.body || shown !== "none"]; }"""
            )
            seen.append(name.strip())
            assert visible, f"no focus ring on {name!r}"
        order = ["Skip to the message box", "New chat", "What is 27 + 15?"]
        order += [
            "Rename “What is 27 + 15?”",
            "Delete “What is 27 + 15?”",
            "Conversations",
            "Settings",
        ]
        order += [
            "Edit and ask again",
            "Copy the question",
            "Used the calculator",
            "Copy the reply",
        ]
        order += ["Regenerate the reply", "Message"]
        at = [seen.index(name) for name in order]
        assert at == sorted(at), seen
        page.evaluate("() => document.activeElement.blur()")
        page.locator(".skip").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#input")).to_be_focused()


def test_a_screen_reader_hears_the_reply_once(place: Place) -> None:
    place.says("one two three four five six seven eight", delay=0.005)
    with place.page() as page:
        page.evaluate(
            """() => { window.heard = []; new MutationObserver(() =>
            heard.push(document.getElementById("spoken").textContent))
            .observe(document.getElementById("spoken"), { childList: true }); }"""
        )
        ask(page, "Count")
        heard = page.evaluate("() => heard")
        live = page.evaluate(
            "() => document.querySelectorAll('#log [aria-live], #log[aria-live]').length"
        )
    assert heard == ["Waiting for the reply", "Reply: one two three four five six seven eight"]
    assert live == 0


def test_a_narrow_screen(place: Place) -> None:
    place.says([*TOOL_REPLY, {"type": "text", "text": f"\n\n{RICH}\n\n{'long' * 40}"}])
    with place.page(**PHONE) as page:

        def fits() -> None:
            wide = page.evaluate(
                "() => [document.documentElement, document.getElementById('scroll')]"
                ".map((node) => node.scrollWidth - node.clientWidth)"
            )
            assert wide == [0, 0]
            box = page.locator("#form").bounding_box()
            assert box and box["x"] >= 0 and box["x"] + box["width"] <= 390
            assert box["y"] + box["height"] <= page.viewport_size["height"]

        fits()
        page.fill("#input", "What is 27")
        page.press("#input", "Enter")  # a phone has no Shift+Enter: this begins a new line
        page.keyboard.type("+ 15?")
        page.click("#send")
        done(page)
        expect(page.locator(".bubble")).to_have_text("What is 27\n+ 15?")
        fits()
        page.locator("details.tool summary").click()
        fits()
        page.locator("#scroll").evaluate("(node) => { node.scrollTop = 1e6; }")
        expect(page.locator("#jump")).to_be_hidden()  # the page knows where its reader is
        page.set_viewport_size({"width": 390, "height": 400})  # the keyboard is up
        expect(page.locator("#form")).to_be_in_viewport(ratio=1)
        fits()
        expect(page.locator("article.assistant .actions")).to_be_in_viewport()
        page.set_viewport_size({"width": 390, "height": 760})
        expect(page.locator("#form")).to_be_in_viewport(ratio=1)
        expect(page.locator("#side")).to_be_hidden()
        page.click("#toggle")
        expect(page.locator("#chats .name")).to_be_in_viewport()
        page.click("#fresh")
        expect(page.locator("#welcome")).to_be_visible()
        expect(page.locator("#side")).to_be_hidden()
        page.click("#toggle")
        page.keyboard.press("Escape")
        expect(page.locator("#side")).to_be_hidden()
        expect(page.locator("#toggle")).to_be_focused()
        page.click("#settings-open")
        fits()


def test_copying(place: Place) -> None:
    place.says("Do:\n```python\nx = 1\n```")
    with place.page(permissions=["clipboard-read", "clipboard-write"]) as page:
        ask(page, "How?")
        page.locator(".code").get_by_role("button", name="Copy").click()
        expect(page.locator("#spoken")).to_have_text("Copied")
        assert page.evaluate("() => navigator.clipboard.readText()") == "x = 1"
        page.get_by_role("button", name="Copy the reply").click()
        expect(page.get_by_role("button", name="Copy the reply").locator("use")).to_have_attribute(
            "href", "#i-check"
        )
        assert page.evaluate("() => navigator.clipboard.readText()") == "Do:\n```python\nx = 1\n```"


def test_reading_further_up_is_not_disturbed(place: Place) -> None:
    place.says("a line\n\n" * 60)
    with place.page() as page:
        ask(page, "Write")
        expect(reply(page).locator(".actions")).to_be_in_viewport()
        place.says("water\n\n", endless=True, delay=0.01)
        page.fill("#input", "Go on")
        page.click("#send")
        expect(reply(page).locator(".md")).to_contain_text("water")
        page.locator("#scroll").evaluate("(node) => { node.scrollTop = 0; }")
        expect(page.locator("#jump")).to_be_visible()
        before = reply(page).locator(".md p").count()
        expect(reply(page).locator(".md p").nth(before + 5)).to_be_attached()
        assert page.locator("#scroll").evaluate("(node) => node.scrollTop") == 0
        page.click("#jump")
        expect(page.locator("#jump")).to_be_hidden()
        page.keyboard.press("Escape")
        done(page)


# ---- the picture in the README

STORY: Parts = [
    {"type": "text", "text": "A loaf takes 3 cups of flour, so eight take "},
    {"type": "python", "text": "8*3"},
    {"type": "python_output", "text": "24"},
    {
        "type": "text",
        "text": """24 cups. For **one** loaf:

1. Mix the flour, a spoon of salt and some yeast.
2. Add water until the dough is soft, and wait *two hours*.
3. Bake it for 40 minutes.

```python
def cups(loaves: int) -> int:
    return 3 * loaves
```""",
    },
]


def take_picture(path: Path) -> None:
    """The page in the middle of a day, as a PNG of less than 200 KB."""
    screen = {"viewport": {"width": 1060, "height": 730}, "device_scale_factor": 1.5}
    with browsing() as place, place.page(**screen) as page:
        place.says("I am a small language model, trained from raw text with nanochat.", delay=0.01)
        for question in ("Spell the word lantern", "A story of a lighthouse", "Who are you?"):
            page.click("#fresh")
            ask(page, question)
        place.says(STORY, delay=0.01)
        ask(page, "How much flour do I need for eight loaves?")
        page.mouse.move(0, 0)
        page.screenshot(path=path)


def test_the_picture_can_be_taken(place: Place) -> None:
    committed = Path(__file__).parents[2] / "docs" / "chat.png"
    assert committed.read_bytes().startswith(b"\x89PNG")
    assert committed.stat().st_size < 200_000


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]))
