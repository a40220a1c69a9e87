"""One HTML file of the trees of runs: it opens from disk, loads nothing from a network, and holds the trees packed.

The page is `web/page.html` with the style and the scripts beside it put in. Trees are in it as data, never as markup:
an index of all of them as JSON, and each tree compressed by itself, so that a page of thousands unpacks those looked
at.
"""

import base64
import gzip
import hashlib
import html
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .library import Library
from .lines import one_line
from .reading import parse_record, summary
from .records import Record, dump_record

WEB = Path(__file__).parent / "web"
SCRIPTS = ("data", "model", "layout", "draw", "pane", "panels", "list", "curves", "app")


def write_page(library: Library, path: str | Path, *, on_tree: Callable[[], Any] = lambda: None) -> None:
    """Write the page of a library: all of it or nothing.

    Args:
        library: the runs.
        path: the HTML file.
        on_tree: called after each tree, for progress bars.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            records = (library.record(each) for each in range(len(library.entries)))
            for piece in _pages(index_of(library), records, on_tree):
                file.write(piece)
        shutil.copymode(WEB / "page.html", part)
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def page_of(records: Sequence[Record], title: str = "trl_ibtpo") -> str:
    """The page of a few records."""
    records = [parse_record(dump_record(record)) for record in records]
    entries = [{**summary(record), "run": 0, "file": ""} for record in records]
    index = {"runs": [{"name": title, "curves": []}], "entries": entries, "problems": [], "version": 0}
    return "".join(_pages({**index, "served": False}, records))


def served_page(library: Library) -> str:
    """The page that asks its server for trees."""
    return "".join(_pages({**index_of(library), "served": True}, ()))


def index_of(library: Library, since: int = 0) -> Record:
    """What the page knows of all trees: summaries of those from `since`, the curves of the runs, and problems."""
    return {
        "runs": [{"name": name, "curves": library.curves(run)} for run, name in enumerate(library.names)],
        "entries": library.entries[since:],
        "problems": library.problems,
        "version": library.version,
        "served": False,
    }


def _pages(index: Record, records: Iterable[Record], on_tree: Callable[[], Any] = lambda: None) -> Iterator[str]:
    """The page in pieces, so that no more than one tree is held at a time."""
    style = (WEB / "style.css").read_text(encoding="utf-8")
    script = '"use strict";\n' + "".join((WEB / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    # Only this script and this style run, whatever else gets into the page.
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        f"connect-src {chr(39)}{'self' if index['served'] else 'none'}{chr(39)}; base-uri 'none'; form-action 'none'"
    )
    title = one_line(" and ".join(run["name"] for run in index["runs"]), 80)
    head, _, rest = (WEB / "page.html").read_text(encoding="utf-8").partition("{{data}}")
    before, _, after = rest.partition("{{script}}")
    head = head.replace("{{policy}}", policy).replace("{{style}}", style)
    yield head.replace("{{title}}", html.escape(title.encode("utf-8", "replace").decode()))
    yield f'<script type="application/json" id="index">{as_script(index)}</script>\n'
    for number, record in enumerate(records):
        yield f'<script type="text/plain" id="t{number}">{_packed(record)}</script>\n'
        on_tree()
    yield before + script + after


def as_script(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or a line, and all of it is ASCII."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packed(record: Record) -> str:
    return base64.b64encode(gzip.compress(dump_record(record).encode("ascii"), 6, mtime=0)).decode("ascii")


def _digest(text: str) -> str:
    """The name of a script or style in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
