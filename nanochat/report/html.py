"""
The report as one page: its Markdown, through markdown-it, into the template page.html.

Nothing on the page is loaded from elsewhere, and nothing on it runs: there is no script, the
template forbids them, and whatever markup a text brings along is shown as text. Of HTML only the
report's own <details> pass, of pictures only those drawn here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nanochat.common import atomic_write
from nanochat.report.plot import Panel, save_panels, svg

_TEMPLATE = Path(__file__).with_name("page.html")
_DETAILS = re.compile(r"<details><summary>[\w ,]+</summary>\s*|</details>\s*")


def write_pages(
    lines: Sequence[str], panels: Sequence[Panel], out: Path, picture: str, columns: int = 2
) -> None:
    """The same content twice: as Markdown in `out`, with all panels in one `picture` beside it, and
    as a page, which holds them itself, under the same name with .html."""
    text = "\n".join(lines).rstrip() + "\n"
    save_panels(panels, out.with_name(picture), columns)
    with atomic_write(out, "w") as f:
        f.write(text)
    write_html(text, {picture: panels}, out.with_suffix(".html"))


def write_html(text: str, pictures: Mapping[str, Sequence[Panel]], out: Path) -> None:
    """Writes Markdown as a page. `pictures`: what stands where an image of that name would."""
    body, contents = render(text, pictures)
    title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), "nanochat")
    page = _TEMPLATE.read_text(encoding="utf-8")
    # In one pass: what is put in is not searched for the next name.
    values = {"title": escape(title), "contents": contents, "body": body}
    page = re.sub(r"\{\{(\w+)\}\}", lambda m: values[m[1]], page)
    with atomic_write(out, "w") as f:
        f.write(page)


def render(text: str, pictures: Mapping[str, Sequence[Panel]]) -> tuple[str, str]:
    """(body, table of contents) of Markdown, as HTML; a heading of level 2 begins a section."""
    from markdown_it import MarkdownIt

    md = MarkdownIt("commonmark", {"html": True}).enable("table")
    rules: dict[str, Any] = {
        "html_block": lambda t, i, *_: (
            t[i].content if _DETAILS.fullmatch(t[i].content) else _text(t[i])
        ),
        "html_inline": lambda t, i, *_: _text(t[i]),
        "image": lambda t, i, *_: escape(t[i].content),
        "table_open": lambda *_: '<div class="scroll" tabindex="0"><table>\n',
        "table_close": lambda *_: "</table></div>\n",
        "figures": lambda t, i, *_: t[i].content,
    }
    for name, rule in rules.items():
        md.add_render_rule(name, _method(rule))
    contents: list[str] = []
    shown: list[Any] = []
    tokens = md.parse(text)
    for i, token in enumerate(tokens):
        image = token.children[0] if token.type == "inline" and token.children else None
        if image is not None and image.type == "image" and len(token.children or []) == 1:
            panels = pictures.get(str(image.attrs["src"]))
            if panels is not None:
                token.type, token.content = "figures", _figures(panels)
                # A paragraph holds no figures.
                tokens[i - 1].hidden = tokens[i + 1].hidden = True
        if token.type == "heading_open" and token.tag == "h2":
            name = tokens[i + 1].content
            anchor = re.sub(r"\W+", "-", name.lower()).strip("-")
            if contents:
                shown.append(_raw("</section>\n"))
            shown.append(_raw(f'<section id="{anchor}">\n'))
            contents.append(f'<a href="#{anchor}">{escape(name)}</a>')
        shown.append(token)
    body = md.renderer.render(shown, md.options, {})
    return body + ("</section>\n" if contents else ""), "\n".join(contents)


def _method(rule: Any) -> Any:
    """A render rule, as a method of the renderer that ignores it."""
    return lambda self, *args: rule(*args)


def _text(token: Any) -> str:
    """Markup as text."""
    return escape(token.content)


def _raw(html: str) -> Any:
    from markdown_it.token import Token

    return Token("figures", "", 0, content=html)


def _figures(panels: Sequence[Panel]) -> str:
    """Pictures side by side, as many as there is room for."""
    drawn = "".join(
        f"<figure><figcaption>{escape(panel.title)}</figcaption>{svg(panel, f'p{i}')}</figure>\n"
        for i, panel in enumerate(panels)
    )
    return f'<div class="figures">\n{drawn}</div>\n'
