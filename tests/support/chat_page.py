"""Using the chat page as a person does."""

import json
from typing import Any

from playwright.sync_api import Page, Request, Route, expect


def use(page: Page, model: str) -> None:
    """Choose a model."""
    page.get_by_label("Model").select_option(model)


def set_options(page: Page, **values: str) -> None:
    """Fill fields of the settings."""
    page.get_by_role("button", name="Settings").click()
    for name, value in values.items():
        page.locator(f"[name={name}]").fill(value)
    page.get_by_role("button", name="Settings").click()


def say(page: Page, text: str) -> dict[str, Any]:
    """Send a message and wait for the end of its answer; the request's body."""
    page.get_by_label("Message", exact=True).fill(text)
    with page.expect_request("**/api/chat") as asked:
        page.get_by_label("Message", exact=True).press("Enter")
    idle(page)
    return body_of(asked.value)


def body_of(request: Request) -> dict[str, Any]:
    """What was sent."""
    body: dict[str, Any] | None = request.post_data_json
    assert body is not None
    return body


def idle(page: Page) -> None:
    """Wait for the end of the running answer."""
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()


def answers(page: Page) -> list[str]:
    """The texts of all answers."""
    return [text.strip() for text in page.locator(".assistant .body").all_inner_texts()]


def facts(page: Page) -> str:
    """What stands under the last answer."""
    return page.locator(".assistant .stats").last.inner_text()


def reused(page: Page) -> tuple[int, int]:
    """Of the last answer: prompt tokens that were reused, and all of them."""
    words = facts(page).split()
    of = words.index("of")
    return int(words[of - 1]), int(words[of + 1])


def instead(page: Page, *lines: dict[str, Any] | str, status: int = 200, **headers: str) -> None:
    """From now on an answer is these lines, whatever is asked."""
    body = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)

    def fulfil(route: Route) -> None:
        route.fulfill(status=status, body=body, headers=headers)

    page.route("**/api/chat", fulfil)


def piece(text: str) -> dict[str, Any]:
    """A line of a streamed answer."""
    return {"message": {"role": "assistant", "content": text}, "done": False}


DONE = piece("") | {"done": True, "done_reason": "stop", "eval_count": 2, "eval_duration": 10**9}
