"""Hooks of the documentation site: whatever could go stale is made from the code when the site is built.

- A link to a file outside docs/ goes to a page with that file. Where its text is a name in code font, as in
  [`growth.drive`](../trl_ibtpo/growth.py), it goes to the line that defines the name, and the build fails when
  nothing does.
- The overview is README.md.
- Formulas between dollar signs, which GitHub shows as they are, become MathML, which browsers show without a script.

    python docs/hooks.py    # writes the fields of IBTPOConfig into docs/configuration.md; `make docs` does so first
"""

import ast
import inspect
import posixpath
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path

import latex2mathml.converter
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
LINK = re.compile(r"\[(?P<label>[^]\n]+)\]\((?P<target>[^):#\s]+)(?P<anchor>#[^)\s]+)?\)")
NAME = re.compile(r"`([A-Za-z_][\w.]*)`")
# Code first, so that dollar signs in it are left alone; then a formula on lines of its own, then one within a line.
FORMULA = re.compile(
    r"^ *```.*?^ *```|`[^`\n]+`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL | re.MULTILINE
)
CONFIGURATION = DOCS / "configuration.md"
FIELDS_MARK = "<!-- Below: written by `python docs/hooks.py` from IBTPOConfig. -->\n"


def on_config(config):
    known = {page for entry in config.nav for page in entry.values()}
    config.nav += sorted(path.name for path in DOCS.glob("*.md") if path.name not in known)
    return config


def on_files(files, config):
    files.append(File.generated(config, "index.md", content=README.read_text()))
    linked = {path for page in [README, *DOCS.rglob("*.md")] for _, path in links(page.read_text(), page)}
    sources = {path for path in linked if path != README and DOCS not in path.parents}
    for path in sorted(sources):
        page = File.generated(config, source_page(path), content=show(path), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(page)
    return files


def on_page_markdown(markdown, page, config, files):
    place = README if page.file.src_uri == "index.md" else DOCS / page.file.src_uri
    if not place.is_file():  # a page that shows a file
        return markdown
    for match, path in reversed(list(links(markdown, place))):
        target = posixpath.relpath(site_page(path), posixpath.dirname(page.file.src_uri) or ".")
        target += match["anchor"] or ""
        name = NAME.fullmatch(match["label"])
        if name and path.suffix == ".py" and not name[1].endswith(".py"):
            target += f"#__codelineno-0-{line_of(name[1], path)}"
        markdown = f"{markdown[: match.start()]}[{match['label']}]({target}){markdown[match.end() :]}"
    return hide_formulas(markdown)


def on_page_content(html, page, config, files):
    return show_formulas(html)


# ----- formulas ------------------------------------------------------------------------------------------------------


def hide_formulas(markdown: str) -> str:
    """Formulas as hexadecimal digits between two private characters, in which Markdown finds nothing to change."""

    def hide(match: re.Match) -> str:
        kind = match.lastgroup
        return f"\ue000{kind} {match[kind].strip().encode().hex()}\ue001" if kind else match[0]

    return FORMULA.sub(hide, markdown)


def show_formulas(html: str) -> str:
    """The same formulas as MathML."""

    def show(match: re.Match) -> str:
        return latex2mathml.converter.convert(bytes.fromhex(match[2]).decode(), display=match[1])

    return re.sub("\ue000(block|inline) ([0-9a-f]+)\ue001", show, html)


# ----- links to source lines -----------------------------------------------------------------------------------------


def links(markdown: str, page: Path) -> Iterator[tuple[re.Match, Path]]:
    """Links of a page to files of the repository that exist."""
    for match in LINK.finditer(markdown):
        path = (page.parent / match["target"]).resolve()
        if ROOT in path.parents and path.is_file():
            yield match, path


def site_page(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path == README:
        return "index.md"
    return path.relative_to(DOCS).as_posix() if DOCS in path.parents else source_page(path)


def source_page(path: Path) -> str:
    return f"source/{path.relative_to(ROOT).as_posix()}.md"


def show(path: Path) -> str:
    """A page with a file; its lines have anchors."""
    language = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}.get(path.suffix, "text")
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {path.relative_to(ROOT).as_posix()}\n\n"
    return f'{head}~~~~~~~~ {{ .{language} linenums="1" }}\n{path.read_text()}\n~~~~~~~~\n'


def line_of(name: str, path: Path) -> int:
    """The line of `path` that defines a dotted name; its module may be written before it."""
    parts = name.split(".")
    modules = path.relative_to(ROOT).with_suffix("").parts
    while parts and parts[0] in modules:
        parts = parts[1:]
    line, body = 1, ast.parse(path.read_text()).body
    for part in parts:
        found = next((node for node in body if part in defined(node)), None)
        if found is None:
            raise PluginError(f"docs name `{name}`, but {path.relative_to(ROOT)} does not define `{part}`.")
        line, body = found.lineno, getattr(found, "body", [])
    return line


def defined(node: ast.stmt) -> list[str]:
    """Names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
    return [target.id for target in targets if isinstance(target, ast.Name)]


# ----- the configuration reference -----------------------------------------------------------------------------------


def with_fields(page: str) -> str:
    """The page of the configuration with current tables."""
    return page.split(FIELDS_MARK)[0] + FIELDS_MARK + field_tables()


def field_tables() -> str:
    """The fields that IBTPOConfig adds or gives another meaning, in its docstring's order; then its other defaults."""
    from trl import GRPOConfig

    from trl_ibtpo import IBTPOConfig

    own = {field.name: field for field in fields(IBTPOConfig) if field.name in IBTPOConfig.__annotations__}
    inherited = {field.name: field for field in fields(GRPOConfig)}
    text, documented = "", set()
    for section, entries in docstring_sections(inspect.getdoc(IBTPOConfig)):
        text += f"\n## {section}\n\n| field | type | default | meaning |\n|---|---|---|---|\n"
        for name, meaning in entries:
            if name not in own:
                raise PluginError(f"The docstring of IBTPOConfig describes `{name}`, which is not a field of its own.")
            text += f"| `{name}` | {kind(own[name])} | `{default(own[name])}` | {formulas(meaning)} |\n"
            documented.add(name)
    text += (
        "\n## Parameters with another default or meaning\n\n| field | type | default | in `GRPOConfig` | meaning |\n"
    )
    text += "|---|---|---|---|---|\n"
    for name, field in own.items():
        if name in documented:
            continue
        if name not in inherited:
            raise PluginError(f"The docstring of IBTPOConfig does not describe its field `{name}`.")
        before = default(inherited[name])
        meaning = field.metadata["help"].replace("%%", "%")
        text += f"| `{name}` | {kind(field)} | `{default(field)}` | `{before}` | {meaning} |\n"
    return text


def docstring_sections(docstring: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Title, and names with their descriptions, of each `> Parameters ...` part."""
    parameters = docstring.split("Parameters:\n", 1)[1].split("\n> [!NOTE]")[0]
    sections = []
    for part in re.split(r"^    > ", parameters, flags=re.MULTILINE)[1:]:
        title, text = part.split("\n", 1)
        entries = re.findall(r"^    (\w+) \(.*\):\n((?:        .*\n?)+)", text, flags=re.MULTILINE)
        sections.append((title, [(name, " ".join(meaning.split())) for name, meaning in entries]))
    return sections


def kind(field) -> str:
    """In words, since a vertical bar would end the cell of a table."""
    names = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    return " or ".join(f"`{name}`" for name in names.split(" | "))


def default(field) -> str:
    return repr(field.default) if field.default is not MISSING else "required"


def formulas(text: str) -> str:
    r"""`\( B_0 \)` as `$B_0$`."""
    return re.sub(r"\\\((.+?)\\\)", lambda match: f"${match[1].strip()}$", text)


if __name__ == "__main__":
    CONFIGURATION.write_text(with_fields(CONFIGURATION.read_text()))
