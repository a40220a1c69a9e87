"""`trl-ibtpo view`: trees of a run as one HTML file, served while it trains, as pictures, or in the terminal."""

import contextlib
from collections.abc import Sequence
from pathlib import Path

from .common import Parser, UsageError

PICTURES = (".png", ".svg", ".pdf")
PROBLEMS_SHOWN = 5  # of lines that are no trees


def make_parser() -> Parser:
    parser = Parser(
        prog="trl-ibtpo view",
        description="Look at the trees of a run: writes one HTML file that opens in a browser without a network. Two "
        "or more runs are shown side by side where they have questions in common.",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="RUN_OR_FILE", help="output folder of a run with `log_trees`, or a file of trees"
    )
    parser.option(
        "out",
        metavar="FILE",
        help="file to write: .html, or .png, .svg or .pdf of one tree (default: trees.html in the run)",
    )
    parser.option("text", action="store_true", help="print one tree in the terminal instead")
    parser.option(
        "tree", type=int, metavar="N", help="which tree for --text or a picture, from 1 (default: most to see)"
    )
    parser.option("follow", action="store_true", help="serve the page to this machine while the run trains")
    parser.option("port", type=int, default=0, help="of --follow; 0 takes a free one")
    return parser


def run(argv: Sequence[str]) -> int:
    """Write, serve or print."""
    args = make_parser().parse_args(argv)
    out = None if args.out is None else Path(args.out)
    if out is not None and out.suffix not in (".html", *PICTURES):
        raise UsageError(f"--out is {args.out!r}; it must end with .html, .png, .svg or .pdf.")
    if args.follow and (out is not None or args.text):
        raise UsageError("--follow serves a page; leave --out and --text out.")
    if args.tree is not None and not args.text and (out is None or out.suffix == ".html"):
        raise UsageError("--tree is for --text or for a picture; a page shows all trees.")

    from rich.console import Console

    from ..viewing.library import Library

    library = Library(args.sources)
    console = Console()
    if args.follow:
        return _serve(library, args.port, console)
    if out is None and not args.text:
        out = _default(library.sources[0])
    if out is not None and out.resolve() in [source.resolve() for source in library.sources]:
        raise UsageError(
            f"{str(out)!r} is a file to read and the one to write. Name the folder of a run or a file of trees "
            "(.jsonl), or give another --out; a page that is written opens in a browser."
        )
    one_tree = args.text or out.suffix in PICTURES
    for problem in library.problems[:PROBLEMS_SHOWN]:
        console.print(problem, markup=False, highlight=False)
    if len(library.problems) > PROBLEMS_SHOWN:
        console.print(f"{len(library.problems) - PROBLEMS_SHOWN} more lines are left out.", highlight=False)
    curves = not one_tree and any(library.curves(each) for each in range(len(library.sources)))
    if not library.entries and not curves:
        raise ValueError(
            f"There are no trees in {', '.join(map(repr, map(str, library.sources)))}. A run records them with "
            "`log_trees=10`, and `trl-ibtpo tree --json FILE` writes one."
        )
    if one_tree:
        return _one_tree(library, args.tree, out, console)
    return _write(library, out, console)


def _write(library, out: Path, console) -> int:
    from tqdm import tqdm

    from ..viewing.page import write_page

    with tqdm(total=len(library.entries), desc="Trees", delay=2, leave=False) as progress:
        write_page(library, out, on_tree=progress.update)
    trees = "1 tree" if len(library.entries) == 1 else f"{len(library.entries)} trees"
    words = f"{trees}, {out.stat().st_size / 1e6:.1f} MB. Open in a browser: {out}"
    console.print(words, markup=False, highlight=False, soft_wrap=True)
    return 0


def _one_tree(library, number: int | None, out: Path | None, console) -> int:
    if number is not None and not 1 <= number <= len(library.entries):
        raise UsageError(f"--tree is {number}; there are trees 1 to {len(library.entries)}.")
    if number is None:
        number = 1 + max(range(len(library.entries)), key=lambda each: _interest(library.entries[each]))
    record = library.record(number - 1)
    if out is None:
        from ..viewing.text import render_tree

        console.print(render_tree(record))
    else:
        from ..viewing.drawing import draw_tree

        draw_tree(record, out)
        console.print(f"Tree {number} of {len(library.entries)}: {out}", markup=False, highlight=False, soft_wrap=True)
    return 0


def _interest(entry: dict) -> float:
    """Nearest to as many right as wrong answers."""
    return -1.0 if entry["success"] is None else -abs(entry["success"] - 0.5)


def _serve(library, port: int, console) -> int:
    from ..viewing.server import make_server

    server = make_server(library, port)
    address = "http://{}:{}/".format(*server.server_address[:2])
    console.print(f"Following {', '.join(library.names)} at {address} (Ctrl-C ends it)", markup=False, highlight=False)
    with contextlib.suppress(KeyboardInterrupt), server:
        server.serve_forever()
    return 0


def _default(source: Path) -> Path:
    """Beside the trees of a run, or beside the file."""
    return source.with_suffix(".html") if source.is_file() else source / "trees.html"
