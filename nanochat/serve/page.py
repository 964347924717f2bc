"""
The chat page as a route: page.html, one file, and headers that let a browser run nothing else.

What a model writes reaches the page as text nodes only (page.html says how). The headers are the
second wall: the Content-Security-Policy admits the inline script and style by the hash of what is
in the file, no others, no address but this server's, and (Trusted Types) no sink that would parse
a string as markup or code.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route


def page_route() -> Route:
    """GET /: the page, read once, with its headers."""
    from starlette.responses import HTMLResponse
    from starlette.routing import Route

    # As text: a checkout with CRLF would hash to something else than what a browser computes.
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",  # a link the model wrote does not tell where it stood
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-cache",
    }

    async def page(_: Request) -> Response:
        return HTMLResponse(html, headers=headers)

    return Route("/", page, methods=["GET"])


def content_security_policy(html: str) -> str:
    """The policy for a self-contained page: nothing is allowed but what stands in `html` itself."""
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {_hashes(html, 'script')}",
            f"style-src {_hashes(html, 'style')}",
            "img-src data:",  # the icon
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        ]
    )


def _hashes(html: str, tag: str) -> str:
    """Sources of a policy that admit every inline element `tag` of the page, by SHA-256."""
    texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
