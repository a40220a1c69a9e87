"""`trl-ibtpo latents train`: the prior that latents are drawn from, and what they do to a model."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from .common import Parser, UsageError, load_named, say_written, split_of

HELD_OUT = 256  # rows at most, a tenth of all, that the figures at the end are about


def _parser() -> Parser:
    parser = Parser(
        prog="trl-ibtpo latents train",
        description="Train the prior of latents on questions with rationales, for `latent_prior=FOLDER`; with "
        "--injection also what a latent does to the model, which stays as it is. The same command goes on where it "
        "was interrupted.",
    )
    parser.option("model", required=True, help="name on the Hub or folder of the policy, or of an adapter")
    parser.option("dataset_name", required=True, help="a file such as rows.jsonl, a folder, or a name on the Hub")
    parser.option("output_dir", required=True, metavar="FOLDER", help="where to write; give it as latent_prior")
    parser.option("dataset_split", default="train", help="split of the dataset")
    parser.option("question_column", default="question", help="column with text, or with chat messages")
    parser.option("rationale_column", default="rationale", help="column with the text that follows the question")
    parser.option("injection", choices=["none", "psa", "softmax"], default="none", help="projections to train as well")
    parser.option("steps", type=int, default=2000, help="steps of the prior")
    parser.option("injection_steps", type=int, default=500, help="steps of the projections")
    parser.option("batch_size", type=int, default=32, help="rows a step")
    parser.option("learning_rate", type=float, default=1e-3, help="of AdamW, without decay")
    parser.option("max_length", type=int, default=2048, help="tokens of a row; longer ones are left out")
    parser.option("latent_strength", type=float, default=1.0, help="gamma0 while projections are trained")
    parser.option("latent_decay", type=float, default=128.0, help="tau while projections are trained, in tokens")
    parser.option("seed", type=int, default=0, help="of weights, batches and noise")
    return parser


def run(argv: Sequence[str]) -> int:
    """Train, and print what was learned."""
    if list(argv)[:1] != ["train"]:
        if {"-h", "--help"} & set(argv):
            _parser().print_help()
            return 0
        raise UsageError(f"give `train` as the first word, not {' '.join(argv[:1]) or 'nothing'!r}.")
    args = _parser().parse_args(argv[1:])
    for name in ("steps", "injection_steps", "batch_size", "max_length"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}; give 1 or more.")

    import torch
    from rich.console import Console
    from rich.table import Table
    from safetensors.torch import load_file, save_file

    from ..latents.noise import LATENT
    from ..latents.source import INJECTIONS, LatentSource, save_projections
    from ..latents.strength import Strength
    from ..latents.training import (
        Embeddings,
        embed,
        make_prior,
        prior_losses,
        rest_losses,
        train_injection,
        train_prior,
    )

    folder = Path(args.output_dir)
    work = folder / "training"
    rows, left_out = _rows(args)
    _same_settings(args, rows, work / "settings.json")
    held_out = min(HELD_OUT, len(rows) // 10)
    train_rows, test_rows = rows.halves(held_out)
    model = _load_model(args.model)

    kept = work / "embeddings.safetensors"
    if kept.is_file():
        found = load_file(kept)
    else:
        with _progress(len(rows), "Embeddings", "row") as advance:
            made = embed(model, rows, args.seed, args.batch_size, advance)
        found = {"conditions": made.conditions, "whole": made.whole}
        save_file(found, kept.with_suffix(".partial"))
        kept.with_suffix(".partial").replace(kept)  # whole, or not at all
    train_part, test_part = (
        Embeddings(found["conditions"][part], found["whole"][part])
        for part in (slice(len(train_rows)), slice(len(train_rows), None))
    )

    prior = make_prior(train_part, LATENT, args.seed)
    before = prior_losses(prior, test_part, args.seed)
    with _progress(args.steps, "Prior", "step") as advance:
        train_prior(
            prior,
            train_part,
            steps=args.steps,
            batch=args.batch_size,
            learning_rate=args.learning_rate,
            seed=args.seed,
            checkpoint=work / "prior.safetensors",
            advance=advance,
        )
    after = prior_losses(prior, test_part, args.seed)
    table = Table("held-out rows", "before", "after", title=f"{held_out} of {len(rows)} rows held out")
    for name, first, last in zip(("squared error", "KL in nats"), before, after, strict=True):
        table.add_row(name, f"{first:.4g}", f"{last:.4g}")
    prior.eval().requires_grad_(False)
    settings: dict[str, Any] = {"model": args.model, "rows": len(rows), "steps": args.steps, "injection": None}
    if args.injection != "none":
        source = LatentSource(Strength(args.latent_strength, args.latent_decay), args.seed)
        steering = source.attach(model, args.injection).acting
        prior.to(model.device)
        with _progress(args.injection_steps, "Projections", "step") as advance:
            train_injection(
                steering,
                prior,
                train_rows,
                steps=args.injection_steps,
                batch=args.batch_size,
                learning_rate=args.learning_rate,
                seed=args.seed,
                checkpoint=work / INJECTIONS[args.injection],
                advance=advance,
            )
        for given, name in (
            (None, "no latent"),
            ("prior", "latent of the prior"),
            ("posterior", "of the whole"),
        ):
            generator = torch.Generator().manual_seed(args.seed)
            with torch.no_grad():
                losses = [
                    rest_losses(steering, prior, test_rows, [row], generator, given) for row in range(len(test_rows))
                ]
            table.add_row(f"nats a token, {name}", "", f"{torch.cat(losses).mean():.4f}")
        save_projections(steering.injection, folder)
        settings |= {
            "injection": args.injection,
            "injection_steps": args.injection_steps,
            "strength": args.latent_strength,
            "decay": args.latent_decay,
        }
    prior.cpu().save(folder, settings)
    console = Console()
    console.print(table)
    if left_out:
        console.print(f"{left_out} rows were longer than {args.max_length} tokens and left out.")
    say_written(folder)
    return 0


def _same_settings(args: Any, rows: Any, path: Path) -> None:
    """Raise where a folder holds a run of other settings, weights or rows, except for how long it is."""
    from ..evaluation.adapters import model_stamp

    given = {
        name: value for name, value in vars(args).items() if name not in ("steps", "injection_steps", "output_dir")
    }
    digest = sha256(repr((rows.questions, rows.rationales)).encode()).hexdigest()
    weights = model_stamp(args.model)
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.pop("rows", digest) != digest:
            raise UsageError(
                f"--output_dir {str(path.parent.parent)!r} holds a run on other rows than --dataset_name "
                f"{args.dataset_name!r} has now. Give another folder."
            )
        if before.pop("model_files", weights) != weights:
            raise UsageError(
                f"--output_dir {str(path.parent.parent)!r} holds a run with other weights than --model {args.model!r} "
                "has now. Give another folder."
            )
        for name, value in given.items():
            # Projections may be asked for once the prior is there.
            if before.get(name) != value and not (name == "injection" and before.get(name) == "none"):
                raise UsageError(
                    f"--output_dir {str(path.parent.parent)!r} holds a run with --{name} {before.get(name)}, not "
                    f"{value}. Give another folder."
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**given, "rows": digest, "model_files": weights}, indent=1) + "\n", encoding="utf-8")


def _rows(args: Any) -> tuple[Any, int]:
    """Token ids of all rows that are short enough, and how many are not."""
    from ..evaluation.adapters import load_tokenizer
    from ..latents.training import Rows

    dataset = split_of(load_named(args.dataset_name), args.dataset_split)
    for column in (args.question_column, args.rationale_column):
        if column not in dataset.column_names:
            raise UsageError(
                f"--dataset_name {args.dataset_name!r} has no column {column!r}; it has: "
                f"{', '.join(dataset.column_names)}. Name the columns with --question_column and --rationale_column."
            )
    tokenizer = load_tokenizer(args.model)
    rows, left_out = Rows([], []), 0
    for row in dataset:
        question, rationale = row[args.question_column], row[args.rationale_column]
        if not question or not rationale:
            raise ValueError(f"A row of {args.dataset_name!r} has no question or no rationale: {row!r:.200}.")
        ids = (
            tokenizer.encode(question)
            if isinstance(question, str)
            else tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
        answer = [*tokenizer.encode(rationale, add_special_tokens=False), tokenizer.eos_token_id]
        if len(ids) + len(answer) > args.max_length:
            left_out += 1
            continue
        rows.questions.append(ids)
        rows.rationales.append(answer)
    if len(rows) < 20:
        raise ValueError(
            f"{args.dataset_name!r} has {len(rows)} rows of at most {args.max_length} tokens ({left_out} are longer); "
            "give at least 20, of which a tenth is held out."
        )
    return rows, left_out


def _load_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    from ..evaluation.adapters import base_of, merged

    arguments = {"dtype": "auto", "device_map": "auto"}
    base = base_of(name)
    if base is not None:
        return merged(name, base, **arguments).eval()
    return AutoModelForCausalLM.from_pretrained(name, **arguments).eval()


@contextmanager
def _progress(total: int, description: str, unit: str) -> Iterator[Any]:
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=description, unit=unit) as bar:

        def advance(text: str) -> None:
            bar.update()
            bar.set_postfix_str(text, refresh=False)

        yield advance
