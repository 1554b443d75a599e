"""Check a built site: pages load nothing from elsewhere, links and anchors have a target, lists are lists."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself, by tag and attribute. `link` also names things that it does not fetch.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
FETCHED_RELATIONS = {
    "stylesheet",
    "preload",
    "preconnect",
    "dns-prefetch",
    "icon",
    "modulepreload",
    "manifest",
}
_STYLE_ADDRESS = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""")
# A line in a paragraph that starts like a list item.
_LOST_ITEM = re.compile(r"<p>(?:(?!</p>).)*\n(?:[*-]|\d+\.) ", re.DOTALL)
_CODE = re.compile(r"<pre.*?</pre>", re.DOTALL)


class Page(HTMLParser):
    """The anchors of a page, its links, and what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the anchors, links and addresses of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values:
            self.loaded.append(values[LOADED[tag]])
        if tag == "link" and FETCHED_RELATIONS & set(values.get("rel", "").split()):
            self.loaded.append(values.get("href", ""))


def check_site(site: Path) -> list[str]:
    """Return the problems of a built site, one line each."""
    # The page for a wrong address has links that start at the root of a host.
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    problems = [] if pages else [f"{site}: expected pages, got none."]
    for path, page in pages.items():
        place = path.relative_to(site)
        problems += [
            f"{place}: expected scripts, styles and images of the site itself, got {address}."
            for address in page.loaded
            if urlsplit(address).netloc
        ]
        problems += [
            f"{place}: expected a link with a target, got {link}."
            for link in [*page.links, *page.loaded]
            if not _leads_somewhere(link, path, site, pages)
        ]
        text = _CODE.sub("", path.read_text())
        if _LOST_ITEM.search(text):
            problems.append(f"{place}: expected a list, got a paragraph. Put an empty line before the list.")
        problems += _style_problems(text, str(place))
    for path in sorted(site.rglob("*.css")):
        problems += _style_problems(path.read_text(), str(path.relative_to(site)))
    return problems


def _style_problems(text: str, place: str) -> list[str]:
    return [
        f"{place}: expected styles without addresses, got {address}."
        for address in _STYLE_ADDRESS.findall(text)
    ]


def _leads_somewhere(link: str, page: Path, site: Path, pages: dict[Path, Page]) -> bool:
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target.is_dir():
        target /= "index.html"
    if not target.is_relative_to(site.resolve()) or not target.exists():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target not in pages or anchor in pages[target].anchors
