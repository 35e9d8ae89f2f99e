"""The chat page in a real browser, on a real server; only what no server would say is put in the answer's place."""

import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from chat_page import DONE, answers, body_of, facts, idle, instead, piece, reused, say, set_options, use
from chromium import chromium, watched
from endless import endless_file
from playwright.sync_api import Browser, Page, expect
from served_models import NAME, PLAIN, write_models
from serving import Serving, running

KEY = "correct horse battery staple"
HOSTILE = (
    '<img src=x onerror="hurt()"> <script>hurt()</script> **<b onclick=hurt()>bold</b>** `<i>code</i>`\n\n'
    "</p></li><iframe srcdoc='<script>parent.hurt()</script>'></iframe>\n\n"
    "```html\"><svg/onload=hurt()>\n<script>hurt()</script>\n```\n\n<a href='javascript:hurt()'>a link</a>"
)

FOREIGN = "img, script, iframe, i:not(.reuse i), a, b[onclick], svg[onload]"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    demo, plain = write_models(tmp_path_factory.mktemp("models"))
    return [demo, plain, endless_file(demo)]


@pytest.fixture(scope="module")
def server(files: list[Path]) -> Iterator[Serving]:
    with running(*files) as found:
        yield found


@pytest.fixture(scope="module")
def locked(files: list[Path]) -> Iterator[Serving]:
    with running(files[0], api_key=KEY) as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, server: Serving) -> Iterator[Page]:
    """The page as a person has opened it, answers to be short and the likeliest."""
    with watched(browser, f"{server.url}/chat", permissions=["clipboard-read", "clipboard-write"]) as found:
        use(found, NAME)
        set_options(found, temperature="0", limit="12")
        yield found


def test_an_answer_comes_piece_by_piece_as_the_server_says_it(page: Page) -> None:
    page.evaluate("""() => {
        globalThis.seen = new Set();
        new MutationObserver(() => seen.add(document.querySelector(".running .body")?.innerText))
            .observe(document.querySelector("#turns"), { subtree: true, childList: true });
        const real = fetch;
        fetch = async (...given) => {
            const response = await real(...given);
            globalThis.said = response.clone().text();
            return response;
        };
    }""")
    set_options(page, limit="48")
    sent = say(page, "What is a gentleman?")
    parts = [json.loads(line) for line in page.evaluate("said").splitlines()]
    text = "".join(part["message"]["content"] for part in parts)
    assert text.strip()
    assert answers(page) == [text.strip()]
    seen = page.evaluate("[...seen].filter(Boolean)")
    assert seen  # how often the page is drawn on the way is the browser's affair
    assert all(text.startswith(one) for one in seen)
    assert sent == {
        "model": NAME,
        "messages": [{"role": "user", "content": "What is a gentleman?"}],
        "options": {"temperature": 0, "num_predict": 48},
        "stream": True,
    }
    last = parts[-1]
    assert f"{last['eval_count']} tokens" in facts(page)
    assert f"{last['eval_count'] / last['eval_duration'] * 1e9:.1f} tokens/s" in facts(page)
    assert reused(page) == (last["cached_tokens"], last["prompt_eval_count"])
    assert text.strip() in page.get_by_role("status").inner_text()  # read to those who cannot see it, once, at its end


def test_a_second_turn_and_a_regenerated_answer_reuse_what_was_read(page: Page) -> None:
    say(page, "What is a cynic?")
    first = answers(page)[0]
    sent = say(page, "And a saint?")
    assert [m["content"].strip() for m in sent["messages"]] == ["What is a cynic?", first, "And a saint?"]
    cached, prompt = reused(page)
    assert 0 < cached < prompt
    before = answers(page)
    with page.expect_request("**/api/chat") as asked:
        page.get_by_role("button", name="Regenerate").last.click()
    idle(page)
    assert body_of(asked.value) == sent
    assert answers(page) == before  # at temperature 0
    assert reused(page) == (prompt, prompt)


def test_the_last_message_can_be_edited(page: Page) -> None:
    say(page, "What is a cynic?")
    say(page, "And a sait?")
    assert page.get_by_role("button", name="Edit").count() == 1
    page.get_by_role("button", name="Edit").click()
    area = page.get_by_label("Your message")
    expect(area).to_be_focused()
    area.press("Escape")
    assert page.locator(".user .body").all_inner_texts() == ["What is a cynic?", "And a sait?"]
    page.get_by_role("button", name="Edit").click()
    area.fill("And a saint?")
    with page.expect_request("**/api/chat") as asked:
        area.press("Enter")
    idle(page)
    assert [m["content"] for m in body_of(asked.value)["messages"]][::2] == ["What is a cynic?", "And a saint?"]
    assert page.locator(".user .body").all_inner_texts() == ["What is a cynic?", "And a saint?"]
    assert len(answers(page)) == 2


@pytest.mark.parametrize("way", ["the button", "Escape"])
def test_an_answer_can_be_stopped_and_its_slot_is_free_then(page: Page, server: Serving, way: str) -> None:
    use(page, "endless")
    set_options(page, limit="")
    before = server.said.count("the client went away")
    page.get_by_label("Message", exact=True).fill("Once upon a time")
    page.get_by_role("button", name="Send").click()
    expect(page.locator(".running .body")).to_have_text(re.compile(".{40}"))
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    idle(page)
    (kept,) = answers(page)
    assert len(kept) >= 40
    assert "Stopped." in facts(page)
    wait(lambda: server.said.count("the client went away") == before + 1)
    use(page, NAME)
    set_options(page, limit="4")
    sent = say(page, "Go on.")  # what was said until then is part of the conversation
    assert sent["messages"][1]["content"].strip() == kept


def wait(true: Any) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_server_s_refusal_is_shown_and_can_be_tried_again(page: Page) -> None:
    use(page, PLAIN)
    say(page, "What is a cynic?")
    notice = page.get_by_role("alert")
    expect(notice).to_contain_text("no chat template")
    assert answers(page) == []
    use(page, NAME)
    page.get_by_role("button", name="Try again").click()
    idle(page)
    expect(notice).to_be_hidden()
    assert len(answers(page)) == 1


REFUSALS: list[tuple[Sequence[Any], int, dict[str, str], str]] = [
    ([{"error": "all slots are taken"}], 429, {"Retry-After": "7"}, "all slots are taken (there may be room in 7 s)"),
    ([{"error": {"message": "what OpenAI says"}}], 400, {}, "what OpenAI says"),
    (["<h1>Bad gateway</h1>"], 502, {}, "The server says 502 Bad Gateway"),
    ([{"error": "the device failed"}], 200, {}, "the device failed"),
    ([DONE], 200, {}, "The model ended at once, without a word."),
    ([], 200, {}, "The answer broke off."),
    (["{no JSON"], 200, {}, "The answer is garbled."),
]


def test_whatever_goes_wrong_is_told(page: Page) -> None:
    for lines, status, headers, told in REFUSALS:
        instead(page, *lines, status=status, **headers)
        say(page, "Hello?")
        expect(page.get_by_role("alert").get_by_text(told, exact=True)).to_be_visible()
        expect(page.get_by_role("button", name="Try again")).to_be_visible()


def test_what_came_before_a_failure_stays(page: Page) -> None:
    instead(page, piece("Half an "), {"error": "engine: stopped"})
    say(page, "Hello?")
    assert answers(page) == ["Half an"]
    assert "engine: stopped" in facts(page)


def test_a_failed_regeneration_leaves_the_answer(page: Page) -> None:
    say(page, "What is a cynic?")
    before = answers(page)
    instead(page, {"error": "all slots are taken"}, status=429)
    page.get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("alert")).to_contain_text("all slots are taken")
    assert answers(page) == before


def test_a_server_that_is_gone_is_told(page: Page) -> None:
    page.route("**/api/chat", lambda route: route.fulfill(json={"error": "the server is ending"}, status=503))
    say(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("the server is ending")
    page.unroute("**/api/chat")
    page.evaluate("() => { fetch = () => Promise.reject(new TypeError('no connection')); }")
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")


def test_a_hostile_answer_stays_text(page: Page) -> None:
    page.evaluate("() => { globalThis.hurt = () => { globalThis.harmed = true; }; }")
    before = page.locator(FOREIGN).count()
    instead(page, *map(piece, [HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)]), DONE)
    say(page, HOSTILE)
    shown = answers(page)[0]
    for part in ('<img src=x onerror="hurt()">', "<script>hurt()</script>", "<iframe srcdoc=", "<a href='javascript:"):
        assert part in shown
    assert page.locator(".user .body").inner_text() == HOSTILE
    instead(page, {"error": HOSTILE}, status=500)
    say(page, "again")
    assert '<img src=x onerror="hurt()">' in page.get_by_role("alert").inner_text()
    assert page.locator(FOREIGN).count() == before
    assert page.evaluate("globalThis.harmed") is None
    page.reload()  # the same, from what was kept
    assert "<script>hurt()</script>" in answers(page)[0]
    assert page.locator(FOREIGN).count() == before


def test_a_hostile_model_name_stays_text(page: Page) -> None:
    name = '<img src=x onerror="hurt()">@</h2><script>hurt()</script>'
    page.route("**/api/tags", lambda route: route.fulfill(json={"models": [{"name": name}]}))
    page.reload()
    expect(page.get_by_role("heading", level=2)).to_have_text("Ask about </h2><script>hurt()</script>")
    assert page.locator("option").all_inner_texts() == [name]


def test_the_policy_lets_nothing_else_run(browser: Browser, server: Serving) -> None:
    page = browser.new_page()  # unwatched: it is to violate its policy
    page.goto(f"{server.url}/chat")
    assert page.evaluate("try { document.body.innerHTML = '<b>x</b>' } catch (error) { error.name }") == "TypeError"
    assert page.evaluate("""() => new Promise((done) => requestAnimationFrame(() => {
        try { done(eval("1")) } catch (error) { done(error.name) }
    }))""") == "EvalError"  # fmt: skip
    page.evaluate("""() => {
        const style = document.createElement("style");
        style.textContent = "body { display: none }";
        document.head.append(style);
    }""")
    assert page.evaluate("getComputedStyle(document.body).display") == "flex"
    assert page.evaluate("fetch('http://127.0.0.1:1/').catch((error) => error.name)") == "TypeError"
    page.close()


def test_the_key_is_asked_for_once_and_kept_for_this_tab_only(browser: Browser, locked: Serving) -> None:
    with watched(browser, f"{locked.url}/chat") as page:
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.get_by_text("The server does not take this API key.")).to_be_visible()
        field.fill(KEY)
        field.press("Enter")
        expect(field).to_be_hidden()
        expect(page.get_by_label("Model")).to_have_value(NAME)
        set_options(page, limit="4")
        say(page, "What is a cynic?")
        assert len(answers(page)) == 1
        page.reload()
        expect(page.get_by_label("Model")).to_have_value(NAME)
        assert KEY in page.evaluate("JSON.stringify(sessionStorage)")
        assert KEY not in page.evaluate("JSON.stringify(localStorage)")


def test_what_was_asked_of_a_locked_server_is_answered_with_the_key(browser: Browser, locked: Serving) -> None:
    with watched(browser, f"{locked.url}/chat") as page:
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use").click()
        expect(page.get_by_label("Model")).to_have_value(NAME)
        set_options(page, limit="4")
        page.evaluate("sessionStorage.clear()")
        say(page, "What is a cynic?")
        page.get_by_label("API key").fill(KEY)
        page.get_by_role("button", name="Use").click()
        expect(page.locator(".assistant .stats")).to_contain_text("tokens")


def test_a_conversation_outlives_the_page(page: Page) -> None:
    set_options(page, system="Be brief.", seed="7")
    sent = say(page, "What is a cynic?")
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert sent["options"] == {"temperature": 0, "num_predict": 12, "seed": 7}
    before = answers(page), facts(page)
    page.reload()
    assert (answers(page), facts(page)) == before
    expect(page.get_by_label("Model")).to_have_value(NAME)
    assert page.locator("[name=system]").input_value() == "Be brief."
    page.get_by_role("button", name="New chat").click()
    assert answers(page) == []
    page.reload()
    assert answers(page) == []
    page.get_by_role("button", name="Back to the last chat").click()
    assert (answers(page), facts(page)) == before


def test_a_new_chat_ends_the_answer_of_the_old_one(page: Page, server: Serving) -> None:
    use(page, "endless")
    set_options(page, limit="")
    before = server.said.count("the client went away")
    page.get_by_label("Message", exact=True).fill("Once upon a time")
    page.keyboard.press("Enter")
    expect(page.locator(".running .body")).to_have_text(re.compile(".{10}"))
    page.get_by_role("button", name="New chat").click()
    wait(lambda: server.said.count("the client went away") == before + 1)
    idle(page)
    assert page.locator("#turns li").count() == 0


def test_keys(page: Page) -> None:
    page.reload()
    draft = page.get_by_label("Message", exact=True)
    expect(draft).to_be_focused()
    draft.press("Enter")  # nothing to send
    draft.press_sequentially("one")
    draft.press("Shift+Enter")
    draft.press_sequentially("two")
    draft.press("Enter")
    idle(page)
    assert page.locator(".user .body").all_inner_texts() == ["one\ntwo"]
    assert draft.input_value() == ""


def test_a_value_out_of_range_is_not_sent(page: Page) -> None:
    set_options(page, temperature="-1")
    page.get_by_label("Message", exact=True).fill("Hello")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Temperature")).to_be_visible()
    assert page.get_by_label("Temperature").evaluate("(field) => field.matches(':invalid:focus')")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Try again").click()
    idle(page)
    assert len(answers(page)) == 1


@pytest.mark.parametrize("clipboard", ["there", "absent"])  # as on http from another machine
def test_an_answer_and_a_piece_of_code_can_be_copied(page: Page, clipboard: str) -> None:
    text = "Look:\n\n```python\nprint(1)\n```"
    instead(page, piece(text), DONE)
    say(page, "Hello")
    page.evaluate("() => { globalThis.read = navigator.clipboard.readText.bind(navigator.clipboard); }")
    if clipboard == "absent":
        page.evaluate("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    for button, wanted in ((page.locator(".assistant .foot"), text), (page.locator(".code"), "print(1)")):
        button.get_by_role("button", name="Copy").click()
        expect(button.get_by_text("Copied")).to_be_visible()
        assert page.evaluate("() => read()") == wanted


TEXTS: dict[str, list[tuple[str, str]]] = {
    "": [],
    "one": [("P", "one")],
    "one\ntwo\n\n\nthree\n": [("P", "one\ntwo"), ("P", "three")],
    "a `b < c` d **e** f": [("P", "a b < c d e f")],
    "2 * 3 ** 4 ` 5": [("P", "2 * 3 ** 4 ` 5")],
    "before\n```py\nx = 1\n\ny = 2\n```\nafter": [("P", "before"), ("DIV", "x = 1\n\ny = 2"), ("P", "after")],
    "```\nopen": [("DIV", "open")],
    "````\n```\ninner\n```\n````": [("DIV", "```\ninner\n```")],
    "~~~sh\n```\n~~~": [("DIV", "```")],
    "```py\n```": [("DIV", "")],
}


def test_text_is_paragraphs_and_code_however_it_came(page: Page) -> None:
    drawn = page.evaluate("""(texts) => texts.map((text) => {
        const textOf = (node) => (node.querySelector("pre code") ?? node).textContent;
        const read = (body) => [...body.children].map((node) => [node.tagName, textOf(node)]);
        const whole = document.createElement("div"), grown = document.createElement("div");
        drawText(whole, text);
        for (let size = 0; size <= text.length; size++) drawText(grown, text.slice(0, size));
        return [read(whole), read(grown)];
    })""", list(TEXTS))  # fmt: skip
    for text, found in zip(TEXTS, drawn, strict=True):
        assert found == [[list(block) for block in TEXTS[text]]] * 2, text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_telephone_scrolls_one_way_only(browser: Browser, server: Serving, scheme: str) -> None:
    telephone = {"viewport": {"width": 360, "height": 640}, "is_mobile": True, "has_touch": True}
    with watched(browser, f"{server.url}/chat", color_scheme=scheme, **telephone) as page:
        many = {"cached_tokens": 10**6, "prompt_eval_count": 10**6}
        instead(page, piece("w" * 300 + "\n\n```\n" + "c" * 300 + "\n```"), DONE | many)
        say(page, "m" * 300)
        assert [page.locator(part).evaluate("(node) => node.scrollWidth") for part in ("html", "main")] == [360] * 2
        assert page.evaluate("document.documentElement.scrollHeight") == 640
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 29)"}[scheme]


def test_a_long_conversation_keeps_to_its_end_unless_read(page: Page) -> None:
    instead(page, piece("\n\n".join(["A paragraph."] * 60)), DONE)
    at_end = "view.scrollHeight - view.scrollTop - view.clientHeight < 2"
    say(page, "Hello")
    assert page.evaluate(at_end)
    page.evaluate("view.scrollTop = 0")
    down = page.get_by_role("button", name="To the end")
    down.click()
    assert page.evaluate(at_end)
    expect(down).to_be_hidden()


def test_every_control_has_a_name(page: Page) -> None:
    say(page, "What is a cynic?")
    page.get_by_role("button", name="Edit").click()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea")]
        .filter((node) => !node.ariaLabel && !node.textContent.trim() && !node.labels?.[0]?.textContent.trim())
        .map((node) => node.outerHTML)""")
    assert nameless == []


def test_the_page_is_for_all_and_never_in_a_frame(locked: Serving) -> None:
    with urlopen(f"{locked.url}/chat") as response:
        headers = response.headers
        html = response.read().decode()
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    rules = dict(rule.strip().split(" ", 1) for rule in headers["Content-Security-Policy"].split(";"))
    assert rules["default-src"] == rules["frame-ancestors"] == "'none'"
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert "innerHTML" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "").replace("on https", "")
