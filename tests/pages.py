"""The report's page as a reader and as a parser see it."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags, attributes and text; elements left open or closed in the wrong order are `faults`."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.text: dict[str, str] = {"": ""}
        self.feed(data.decode())
        self.close()
        self.faults += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text[""] += data

    @property
    def words(self) -> str:
        """The text a reader sees, white space evened out."""
        return " ".join(self.text[""].split())


def first_page(data: bytes) -> str:
    text = data.decode()
    return " ".join(re.sub(r"<[^>]+>", " ", text[text.index("<section") : text.index("</section>")]).split())


def table_of(data: bytes, caption: str) -> str:
    """The inside of the table with that caption."""
    found = re.search(rf"<caption>{caption}</caption>(.*?)</table>", data.decode(), flags=re.DOTALL)
    assert found is not None
    return found[1]
