"""The command `trl-ibtpo`: which command to run, and what is said when it goes wrong.

Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted. An error is one line on stderr, with the traceback of a
reward function below it; `trl-ibtpo --debug ...` shows the traceback of any error. Each command is a module here with
a function `run(arguments) -> exit code`, imported when it is chosen.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

from trl_ibtpo import __version__

from ..viewing.lines import one_line
from .common import Parser, UsageError

COMMANDS = {
    "train": "train with IBTPOTrainer, as `trl grpo` does with GRPOTrainer",
    "evaluate": "avg@k and pass@k on a JSONL or a benchmark",
    "tree": "grow and draw one tree",
    "view": "look at the trees of a run, in one HTML file or while it trains",
    "latents": "train latents that steer branches, for latent_prior",
    "doctor": "what is installed, and what of this package will be on",
}


# Loggers that say of every machine without a GPU what it lacks, whatever the command.
CHATTY = ("vllm.triton_utils.importing", "bitsandbytes.cextension", "bitsandbytes.backends.cpu.ops")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    parser = Parser(
        prog="trl-ibtpo",
        description="Tree-based policy optimisation (IB-TPO) for TRL.",
        epilog="`trl-ibtpo COMMAND --help` shows the arguments of a command.",
    )
    parser.option("version", action="version", version=f"trl_ibtpo {__version__}")
    parser.option("debug", action="store_true", help="show the traceback of an error; stands before the command")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=help_text)  # the command reads what follows its name
    args, rest = parser.parse_known_args(argv)
    if not args.debug:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        logging.getLogger("DeepSpeed").addFilter(
            lambda record: "Setting accelerator to CPU" not in record.getMessage()
        )
    try:
        return importlib.import_module(f".{args.command}", __package__).run(rest)
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            raise
        details = getattr(error, "details", "")  # of a reward function: where in the user's own code
        code, message = 1, f"{error}" or type(error).__name__
        if isinstance(error, KeyboardInterrupt):
            code, message = 130, "interrupted"
        elif isinstance(error, UsageError):
            code = 2
    line = one_line(message.removesuffix(details), 600)
    hint = " (`trl-ibtpo --debug ...` shows all)" if line.endswith("\u2026") else ""
    print(f"trl-ibtpo {args.command}: error: {line}{hint}", file=sys.stderr, flush=True)
    for detail in details.splitlines():
        # Indented as it was, and without what a terminal would obey.
        print("".join(char if char.isprintable() else "\ufffd" for char in detail), file=sys.stderr, flush=True)
    return code
