"""The site builds, its links lead somewhere, and what it quotes is in the code."""

import ast
import os
import re
import subprocess
import sys
import textwrap
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from trl_ibtpo import IBTPOConfig

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def build(source: Path, site: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    site = tmp_path_factory.mktemp("site")
    result = build(ROOT, site)
    assert result.returncode == 0, result.stderr
    return site


class Page(HTMLParser):
    """Links, anchors and text of a page."""

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.text = [], [], set(), ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        if tag == "a" and attributes.get("href"):
            self.links.append(attributes["href"])
        if tag in ("script", "img", "link", "iframe") and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.loaded += [attributes[key] for key in ("src", "href") if attributes.get(key)]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html")}


def test_links_and_anchors_exist(pages):
    checked = 0
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or path.name == "404.html":  # served from anywhere, so its links are absolute
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"
            checked += 1
    assert checked > 200


def test_nothing_is_loaded_from_a_network(pages):
    assert [link for page in pages.values() for link in page.loaded if urlsplit(link).scheme] == []


def test_every_page_is_built_and_in_the_navigation(pages, site):
    index = pages[site / "index.html"]
    for page in DOCS.glob("*.md"):
        assert page.with_suffix(".html").name in index.links


def test_details_are_numbered_and_lead_to_lines(pages, site):
    details = (DOCS / "details.md").read_text()
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", details, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) > 20
    starts = re.findall(r'<ol(?: start="(\d+)")?>\n<li>', (site / "details.html").read_text())
    sections = re.findall(r"^## .*\n\n(\d+)\. ", details, flags=re.MULTILINE)
    assert [start or "1" for start in starts] == sections
    items = re.split(r"^\d+\. ", details, flags=re.MULTILINE)[1:]
    assert all("](../trl_ibtpo/" in item for item in items)
    lines = [link for link in pages[site / "details.html"].links if "#__codelineno-0-" in link]
    assert len(lines) == details.count("](../trl_ibtpo/")


def test_a_link_leads_to_the_line_that_defines_the_name(pages, site):
    (link, *_) = [link for link in pages[site / "method.html"].links if "/tree.py" in link]
    source = (ROOT / "trl_ibtpo/tree.py").read_text().splitlines()
    assert "def add_reward" in source[int(link.rsplit("-", 1)[1]) - 1]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "[`tree.RolloutTree.gone`](../trl_ibtpo/tree.py)",
            "docs name `tree.RolloutTree.gone`, but .*tree.py does not",
        ),
        ("[a page](nowhere.md)", "nowhere.md"),
        ("[`growth.TreeGrower`](../trl_ibtpo/no_such_file.py)", "no_such_file.py"),
    ],
)
def test_a_stale_link_fails_the_build(tmp_path, text, message):
    """In a copy of the site's sources that has one page and the stale link."""
    for name in ("mkdocs.yml", "README.md", "docs/hooks.py", "trl_ibtpo/tree.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    settings = (tmp_path / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"nav:\n(  - .*\n)+", "nav:\n  - Overview: index.md\n", settings))
    (tmp_path / "README.md").write_text("# Overview\n")
    (tmp_path / "docs/page.md").write_text("# Page\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    (tmp_path / "docs/page.md").write_text(f"# Page\n\n{text}\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode != 0 and re.search(message, result.stderr), result.stderr


def test_every_own_field_is_in_the_reference(pages, site):
    page = (site / "configuration.html").read_text()
    for name in IBTPOConfig.__annotations__:
        assert page.count(f"<td><code>{name}</code></td>") == 1, name
    text = pages[site / "configuration.html"].text
    assert "Rollouts from the question before any branching. The paper's B0." in text
    assert "\\(" not in text and "<!--" not in text


def test_the_committed_reference_is_current():
    """What `python docs/hooks.py` would write is what is there."""
    path = DOCS / "configuration.md"
    code = "import hooks; print(hooks.with_fields(hooks.CONFIGURATION.read_text()), end='')"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{DOCS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert path.read_text() == result.stdout, "Run `python docs/hooks.py` and commit docs/configuration.md."


def test_formulas_are_typeset(pages, site):
    method = DOCS / "method.md"
    prose = re.sub(r"`[^`\n]+`", "", method.read_text())
    blocks, inline = (
        len(re.findall(r"\$\$.+?\$\$", prose, flags=re.DOTALL)),
        re.sub(r"\$\$", "", prose).count("$") // 2,
    )
    html = (site / "method.html").read_text()
    assert blocks >= 5 and html.count('display="block"') == blocks
    assert inline > 20 and html.count('display="inline"') == inline
    for path, page in pages.items():
        assert not set("\ue000\ue001") & set(page.text), path.name
    assert "$" not in pages[site / "method.html"].text


# ----- quotations and examples ---------------------------------------------------------------------------------------


def template(node: ast.Constant | ast.JoinedStr) -> str:
    """A text of the code with `…` where a value is filled in and white space made single."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return " ".join("".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts).split())


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def package_nodes() -> list[tuple[Path, ast.AST]]:
    paths = (ROOT / "trl_ibtpo").rglob("*.py")
    return [(path, node) for path in paths for node in ast.walk(ast.parse(path.read_text()))]


def quotations() -> list[str]:
    return re.findall(
        r"^```text\n(.+?)\n```", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE | re.DOTALL
    )


def is_quoted_from(quotation: str, text: str) -> bool:
    """Whether the pieces between the values of a quotation stand in a text in this order."""
    pieces = [piece for piece in quotation.split("…") if piece.strip()]
    return re.search(".*".join(map(re.escape, pieces)), text) is not None


def warned_by(node: ast.AST) -> list[ast.AST]:
    """Texts that a statement warns of; of one put together with `+`, its beginning."""
    call = node.value if isinstance(node, ast.Expr) else None
    name = call.func.attr if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) else None
    if name not in ("warning", "_warn_once"):
        return []
    return [text for text in map(beginning, call.args) if is_text(text)]


def beginning(node: ast.AST) -> ast.AST:
    return beginning(node.left) if isinstance(node, ast.BinOp) else node


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Every text of the package."""
    return [template(node) for _, node in package_nodes() if is_text(node)]


@pytest.mark.parametrize("quotation", quotations())
def test_quoted_messages_are_in_the_code(quotation, texts):
    assert any(is_quoted_from(quotation, text) for text in texts)


def test_every_quotation_is_explained():
    """The page has no message that says everything itself: each is followed by prose, or by one that shares it."""
    page = (DOCS / "troubleshooting.md").read_text()
    for section in re.split(r"^#+ .*$", page, flags=re.MULTILINE):
        last = section.rstrip().rsplit("```", 1)[-1]
        assert "```text" not in section or last.strip(), section


def test_every_warning_is_explained():
    """A warning lets the run go on, so the page says what it means; an error has to say so itself."""
    warnings = {
        f"{path.name}:{node.lineno}": template(text) for path, node in package_nodes() for text in warned_by(node)
    }
    missing = [place for place, text in warnings.items() if not any(is_quoted_from(q, text) for q in quotations())]
    assert len(warnings) >= 5 and missing == []


EXAMPLES = [
    (page.name, number, code)
    for page in sorted([*DOCS.glob("*.md"), ROOT / "README.md"])
    for number, code in enumerate(re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("name, number, code", EXAMPLES, ids=[f"{name}-{number}" for name, number, _ in EXAMPLES])
def test_examples_compile_and_name_real_fields(name, number, code):
    tree = ast.parse(textwrap.dedent(code))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "IBTPOConfig":
            given = {keyword.arg for keyword in node.keywords}
            assert given <= set(IBTPOConfig.__dataclass_fields__)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "trl_ibtpo":
            assert find_spec(node.module), node.module


def test_pages_with_examples_have_them():
    assert {"quickstart.md", "migrating.md", "README.md"} <= {name for name, _, _ in EXAMPLES}
