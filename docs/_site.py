"""A hook of mkdocs: pages link to files outside docs/ as on GitHub, and the site shows those files too.

A link `../notebooks/longrope.ipynb` leads to the notebook as a page, `../bench/results/x.png` shows the picture, and
`../weights/tiny/README.md` is a page. Notebooks are shown as they were saved, with their outputs; nothing is run. Text
of one line, or with a line of more than 80 columns, is a message or an answer, and is broken to the page's width; other
text is set in columns, as help pages are, and is left as it is.
"""

from __future__ import annotations

import posixpath
import re
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
_PAGES = {  # file of the repository -> page of the site
    "weights/tiny/README.md": "tiny.md",
    "weights/tiny/REPORT.md": "tiny-report.md",
    "bench/betterdata/README.md": "better-data-plan.md",
    "CHANGELOG.md": "changelog.md",
    **{f"notebooks/{path.stem}.ipynb": f"notebooks/{path.stem}.md" for path in (ROOT / "notebooks").glob("*.ipynb")},
}
_FILES = {
    path.relative_to(ROOT).as_posix(): f"files/{path.name}"
    for pattern in ("bench/results/*.png", "weights/tiny/*.png", "weights/tiny/evaluation.json")
    for path in ROOT.glob(pattern)
}
_COLUMNS = 80
_TEXT = re.compile(r'<div class="language-text highlight">(?=<pre>(.*?)</pre>)', re.S)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add pages and pictures from elsewhere."""
    from mkdocs.structure.files import File

    for source, page in _PAGES.items():
        path = ROOT / source
        text = _notebook(path, files, config) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=linked(text, source, page)))
    for source, there in _FILES.items():
        files.append(File.generated(config, there, content=(ROOT / source).read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Lead links out of docs/ to where the site has the file."""
    here = page.file.src_uri
    return markdown if page.file.generated_by else linked(markdown, f"docs/{here}", here)


def on_page_content(html: str, **_: Any) -> str:
    """Mark the blocks of text whose lines may be broken; site.css does it."""

    def marked(block: re.Match[str]) -> str:
        lines = unescape(re.sub("<[^>]+>", "", block[1])).splitlines()
        columns = len(lines) > 1 and max(map(len, lines)) <= _COLUMNS
        return block[0] if columns else block[0].replace("highlight", "highlight wrapped")

    return _TEXT.sub(marked, html)


def linked(text: str, source: str, page: str) -> str:
    """A file's text with its links made those of a page of the site."""

    def there(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[1]))
        place = _PAGES.get(target) or _FILES.get(target)
        if place is None and target.startswith("docs/"):
            place = target.removeprefix("docs/")
        return posixpath.relpath(place, posixpath.dirname(page) or ".") if place else found[1]

    return _LINK.sub(there, text)


def _notebook(path: Path, files: Files, config: Any) -> str:
    """A notebook as Markdown; its pictures become files of the site."""
    from mkdocs.structure.files import File
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(path))
    for name, content in resources["outputs"].items():
        files.append(File.generated(config, f"notebooks/{path.stem}-{name}", content=content))
        text = text.replace(f"]({name})", f"]({path.stem}-{name})")
    return str(text)
