"""The command `trl-ibtpo`: what a user types, and what is said when it goes wrong.

Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted. An error is one line on stderr; `trl-ibtpo --debug ...`
shows the traceback. torch and TRL are loaded after the arguments are read, except for `train`, whose arguments are
TRL's.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from trl_ibtpo import __version__

from ..branching import STRATEGIES
from ..growth import GrowthSettings

TREE = GrowthSettings()
# Fields of IBTPOConfig that `tree` takes, with their defaults there.
TREE_FIELDS: dict[str, tuple[Any, str]] = {
    "tree_initial_rollouts": (TREE.tree_initial_rollouts, "rollouts from the question, the paper's B0"),
    "tree_levels": (TREE.tree_levels, "the initial rollouts and L - 1 rounds of branching"),
    "tree_nodes_per_level": (TREE.tree_nodes_per_level, "steps chosen per round, the paper's K"),
    "tree_branches_per_node": (TREE.tree_branches_per_node, "rollouts that continue a chosen step, the paper's B"),
    "branching": (TREE.branching, "which steps to branch"),
    "allow_root_branching": (TREE.allow_root_branching, "a round may choose the question itself"),
    "ib_beta": (TREE.ib_beta, "weight of the answer in the IB-Score, the paper's beta"),
    "step_delimiter": ("\n\n", "text that ends a step (default: a blank line, in bash $'\\n\\n')"),
    "max_completion_length": (TREE.max_completion_length, "tokens of a trajectory at most"),
    "temperature": (0.7, "sampling temperature"),
    "top_p": (0.95, "share of probability to sample from"),
    "top_k": (20, "tokens to sample from; 0 for all"),
}


class OneLineErrors:
    """Mixed into a parser: a wrong argument is one line, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)} ({self.prog} --help shows the arguments)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        blank = isinstance(action.default, str) and not action.default.strip()
        hidden = action.default is None or action.default is False or blank
        return action.help if hidden else super()._get_help_string(action)


class Parser(OneLineErrors, argparse.ArgumentParser):
    """Options with underscores, as TRL's; hyphens are accepted too, and defaults are shown."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False, **kwargs})

    def option(self, name: str, **kwargs: Any) -> None:
        names = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        self.add_argument(*names, **kwargs)


def make_parser() -> Parser:
    """The parser of everything but the arguments of `train`."""
    parser = Parser(
        prog="trl-ibtpo",
        description="Tree-based policy optimisation (IB-TPO) for TRL.",
        epilog="`trl-ibtpo COMMAND --help` shows the arguments of a command.",
    )
    parser.option("version", action="version", version=f"trl_ibtpo {__version__}")
    parser.option("debug", action="store_true", help="show the traceback of an error; stands before the command")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # `train --help` is that of TRL's parser, made when it is asked for.
    commands.add_parser("train", add_help=False, help="train with IBTPOTrainer, as `trl grpo` does with GRPOTrainer")
    for add in (_add_evaluate, _add_tree, _add_doctor):
        add(commands)
    return parser


def _add_evaluate(commands: Any) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="avg@k and pass@k on a JSONL or a benchmark",
        description="avg@k and pass@k with 95% confidence intervals, on a JSONL of questions and answers graded with "
        "math-verify, or on a benchmark through lm-evaluation-harness.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", metavar="FILE", help="JSONL with question, problem or prompt, and answer or solution, in every row"
    )
    source.add_argument(
        "--task", help="math_500, aime24, aime25, gpqa_diamond, ifeval, or any task of the harness that generates text"
    )
    parser.option("model", required=True, help="name on the Hub or folder")
    parser.option("engine", choices=["vllm", "transformers"], default="vllm", help="what generates")
    parser.option("num_samples", type=int, help="completions per question (default: the largest k)")
    parser.option("k", type=int, nargs="+", default=[4], help="for pass@k; none above num_samples")
    parser.option("temperature", type=float, default=0.7, help="sampling temperature")
    parser.option("top_p", type=float, default=0.95, help="share of probability to sample from")
    parser.option("top_k", type=int, default=20, help="tokens to sample from; 0 for all")
    parser.option("max_new_tokens", type=int, default=2048, help="tokens of a completion at most")
    parser.option("seed", type=int, default=0, help="of the samples")
    parser.option("no_chat_template", action="store_true", help="give the question to the model as it stands")
    parser.option("samples", metavar="FILE", help="JSONL to append graded completions to; a rerun goes on from it")
    parser.option("json", metavar="FILE", help="also write the result to FILE")
    parser.option("include_path", metavar="FOLDER", help="folder with your own tasks for the harness")
    parser.option("tensor_parallel_size", type=int, default=1, help="GPUs that share the model, with vllm")
    parser.option("gpu_memory_utilization", type=float, default=0.9, help="share of a GPU's memory for vllm")


def _add_tree(commands: Any) -> None:
    parser = commands.add_parser(
        "tree",
        help="grow and draw one tree",
        description="Grow one tree of rollouts for a question, print it, and draw it. The success of a trajectory is "
        "math-verify's verdict on it; without an answer it is unknown.",
    )
    parser.option("model", required=True, help="name on the Hub or folder")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--question", help="text")
    question.add_argument("--question_file", "--question-file", metavar="FILE", help="file that holds the text")
    parser.option("answer", help="the right answer, for example 42 or \\frac{1}{2}")
    parser.option("no_chat_template", action="store_true", help="give the question to the model as it stands")
    parser.option("use_vllm", action="store_true", help="generate with vLLM instead of transformers")
    parser.option("seed", type=int, default=42, help="of the rollouts")
    parser.option("out", metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.option("json", metavar="FILE", help="also write the tree to FILE")
    for name, (default, help_text) in TREE_FIELDS.items():
        choices = list(STRATEGIES) if name == "branching" else None
        if default is False:
            parser.option(name, action="store_true", help=help_text)
        else:
            parser.option(name, type=type(default), default=default, choices=choices, help=help_text)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what is installed, and what of this package will be on",
        description="Versions against what is supported, GPUs, vLLM, TRL's hooks, and what of this package works "
        "here and why. Exit code 1 where something required is broken.",
    )
    parser.option("json", metavar="FILE", nargs="?", const="-", help="write JSON to FILE, or to stdout, as well")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return the exit code."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "train":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        from . import commands

        return getattr(commands, args.command)(rest if args.command == "train" else args)
    except KeyboardInterrupt:
        if args.debug:
            raise
        code, message = 130, "interrupted"
    except UsageError as error:
        if args.debug:
            raise
        code, message = 2, str(error)
    except Exception as error:
        if args.debug:
            raise
        code, message = 1, f"{error}" or type(error).__name__
    print(f"trl-ibtpo {args.command}: error: {_one_line(message)}", file=sys.stderr, flush=True)
    return code


class UsageError(Exception):
    """Arguments that are wrong by themselves, whatever the files and the machine."""


def _one_line(message: str, longest: int = 600) -> str:
    message = " ".join(message.split())
    if len(message) > longest:
        message = f"{message[:longest]} ... (`trl-ibtpo --debug ...` shows all)"
    return "".join(char if char.isprintable() else "\ufffd" for char in message)
