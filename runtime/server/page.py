"""The chat page at /chat: one file, under a policy that runs its own script and style and nothing else.

The page holds no secret and asks for the API key itself, so it is to be served without one. What it shows of a model's
answer it shows as text; the policy is the second wall: no other script runs, none may write markup (trusted types), and
nothing is fetched from, or sent to, any other origin.
"""

import base64
import functools
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

PATH = "/chat"
FILE = Path(__file__).with_name("chat.html")

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def routes() -> list[Route]:
    """The page's route."""
    return [Route(PATH, page)]


async def page(request: Request) -> Response:
    """The page; the headers that every answer of the server has are not its own affair."""
    html, content_policy = loaded()
    # It is small, and a new version is to be seen at once.
    return HTMLResponse(html, headers={"Content-Security-Policy": content_policy, "Cache-Control": "no-cache"})


@functools.cache
def loaded() -> tuple[str, str]:
    """The page and its policy."""
    html = FILE.read_text(encoding="utf-8")
    return html, policy(html)


def policy(html: str) -> str:
    """The Content-Security-Policy for a page whose scripts and styles are those in it."""
    hashes = {kind: " ".join(_hash(text) for found, text in _INLINE.findall(html) if found == kind) for kind in _KINDS}
    rules = {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "img-src": "data:",  # the icon
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


_KINDS = ("script", "style")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
