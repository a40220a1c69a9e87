"""`trl-ibtpo tree`: grow one tree, print it, draw it and write it as JSON."""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..grown_tree import GrownTree, GrowthSettings
from .common import Parser, UsageError, say_written

# Fields of IBTPOConfig that are arguments here, with their types, defaults and help there.
NOT_HERE = ("adaptive_budget", "path_filter")  # one is about several questions, the other about what is trained on
CONFIG_FIELDS = [field.name for field in dataclasses.fields(GrowthSettings) if field.name not in NOT_HERE]
CONFIG_FIELDS += ["step_delimiter", "temperature", "top_p", "top_k"]


def make_parser() -> Parser:
    """The parser of this command; loads TRL."""
    from ..ibtpo_config import IBTPOConfig

    parser = Parser(
        prog="trl-ibtpo tree",
        description="Grow one tree of rollouts for a question, print it, and draw it. The success of a trajectory is "
        "math-verify's verdict on it; without an answer it is unknown.",
    )
    parser.option("model", required=True, help="name on the Hub or folder, of a model or an adapter")
    question = parser.add_mutually_exclusive_group(required=True)
    question.add_argument("--question", help="text")
    question.add_argument("--question_file", "--question-file", metavar="FILE", help="file that holds the text")
    parser.option("answer", help="the right answer, for example 42 or \\frac{1}{2}")
    parser.option("no_chat_template", action="store_true", help="give the question to the model as it stands")
    parser.option("use_vllm", action="store_true", help="generate with vLLM instead of transformers")
    parser.option("seed", type=int, default=42, help="of the rollouts")
    parser.option("out", metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.option("json", metavar="FILE", help="also write the tree to FILE, for `trl-ibtpo view`")
    for field in dataclasses.fields(IBTPOConfig):
        if field.name in CONFIG_FIELDS:
            is_switch = isinstance(field.default, bool)
            kind = {"type": type(field.default)}
            if is_switch:
                kind = {"action": argparse.BooleanOptionalAction}
            elif field.default is None:  # a list of texts or of numbers
                kind = {"nargs": "+", "type": str if "str" in str(field.type) else float}
            parser.option(field.name, **kind, default=field.default, **field.metadata)
    return parser


def run(argv: Sequence[str]) -> int:
    """Grow, print, draw and write."""
    args = make_parser().parse_args(argv)

    from rich.console import Console

    from ..viewing.drawing import draw_tree
    from ..viewing.lines import one_line
    from ..viewing.records import dump_record, record_tree
    from ..viewing.text import render_tree

    if args.out is not None and Path(args.out).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out is {args.out!r}; it must end with .png, .svg or .pdf.")
    question = args.question if args.question is not None else Path(args.question_file).read_text(encoding="utf-8")
    if not question.strip():
        raise UsageError("The question is empty.")
    grown, tokenizer, unread = _grow(args, question)
    record = record_tree(
        grown,
        tokenizer.decode,
        question=question,
        rewards={"math-verify": grown.tree.rewards},
        end_ids=[tokenizer.eos_token_id],
    )
    record |= {"answer": args.answer, "arguments": vars(args)}
    Console().print(render_tree(record))
    if unread:
        print(
            f"In {len(unread)} of {len(grown.tree.leaves)} completions math-verify found no answer, so they count as "
            f"wrong; one of them ends in '{one_line(unread[0][-60:])}'. It reads numbers, formulas and \\boxed{{}}.",
            file=sys.stderr,
        )
    if args.out is not None:
        draw_tree(record, args.out)
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(dump_record(record) + "\n", encoding="ascii")
    say_written(args.out, args.json)
    return 0


def _grow(args: argparse.Namespace, question: str) -> tuple[GrownTree, Any, list[str]]:
    """One tree by the trainer's own way of growing them, the tokenizer, and completions that hold no answer."""
    import torch
    from datasets import Dataset

    from ..evaluation.adapters import base_of, load_tokenizer, merged
    from ..evaluation.questions import Grader
    from ..ibtpo_config import IBTPOConfig
    from ..ibtpo_trainer import IBTPOTrainer

    grader = None if args.answer is None else Grader(args.answer)

    unread: list[str] = []

    def success(completions: list, **kwargs: Any) -> list[float | None]:
        if grader is None:
            return [None] * len(completions)
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        grades = [grader.grade(text) for text in texts]
        unread.extend(text for text, (_, parsed) in zip(texts, grades, strict=True) if parsed is None)
        return [float(right) for right, _ in grades]

    tokenizer = load_tokenizer(args.model)
    chat = tokenizer.chat_template is not None and not args.no_chat_template
    row = {"prompt": [{"role": "user", "content": question}] if chat else question}
    base, on_gpu = base_of(args.model), torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = IBTPOConfig(
                output_dir=folder,
                **{name: getattr(args, name) for name in CONFIG_FIELDS},
                seed=args.seed,
                use_vllm=args.use_vllm,
                reproducible_rollouts=True,
                model_init_kwargs={"dtype": "auto"} if base is None else None,
                beta=0.0,  # no reference model
                gradient_checkpointing=False,
                bf16=on_gpu and torch.cuda.is_bf16_supported(),
                use_cpu=not on_gpu,
                report_to="none",
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        model = args.model if base is None else merged(args.model, base, dtype="auto")
        trainer = IBTPOTrainer(model, success, config, Dataset.from_list([row]), processing_class=tokenizer)
        trainer.model.eval()
        (grown,) = trainer.grow_trees([row])
    return grown, tokenizer, unread
