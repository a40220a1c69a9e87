"""What the commands of `trl-ibtpo` do. The arguments are read in `cli`."""

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .main import TREE_FIELDS, OneLineErrors, UsageError


def train(argv: Sequence[str]) -> int:
    """Train as `trl grpo` does: the same arguments and config file, with IBTPOConfig's fields."""
    from trl import DatasetMixtureConfig, ModelConfig, TrlParser, get_peft_config, get_quantization_config
    from trl.scripts.grpo import GRPOScriptArguments

    from ..ibtpo_config import IBTPOConfig

    class TrainParser(OneLineErrors, TrlParser):
        pass

    parser = TrainParser(
        (GRPOScriptArguments, IBTPOConfig, ModelConfig, DatasetMixtureConfig),
        prog="trl-ibtpo train",
        description="Train with IBTPOTrainer. `--config FILE.yaml` reads arguments from a file; those on the command "
        "line win. Several processes: accelerate launch -m trl_ibtpo train ...",
    )
    if list(argv)[-1:] == ["--config"]:
        raise UsageError("--config needs the name of a YAML file.")
    try:
        script, args, model, mixture = parser.parse_args_and_config(args=argv)
        reward_funcs = _reward_functions(script)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    if model.model_name_or_path is None:
        raise UsageError("--model_name_or_path is missing.")

    from ..ibtpo_trainer import IBTPOTrainer

    dataset = _load_dataset(script, mixture)
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": args.trust_remote_code,
        **(args.model_init_kwargs or {}),
    }
    trainer = IBTPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=_split(dataset, script.dataset_train_split),
        eval_dataset=_split(dataset, script.dataset_test_split) if args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Model saved to {args.output_dir}.")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
        trainer.accelerator.print(f"Model pushed to {trainer.hub_model_id}.")
    return 0


def _reward_functions(script: Any) -> list[str | Callable]:
    """A reward model, names in trl.rewards and dotted paths; the working directory is searched for modules too."""
    import trl.rewards

    functions: list[str | Callable] = [script.reward_model_name_or_path] if script.reward_model_name_or_path else []
    for name in script.reward_funcs or []:
        if name == "get_soft_overlong_punishment":  # with the values that TRL's own help gives
            functions.append(trl.rewards.get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256))
        elif "." not in name:
            if name.startswith("get_") or not callable(getattr(trl.rewards, name, None)):
                known = [each for each in dir(trl.rewards) if each.endswith("_reward") and not each.startswith("get_")]
                raise UsageError(f"There is no reward function {name!r}: give a dotted path or one of {known}.")
            functions.append(getattr(trl.rewards, name))
        else:
            module_name, function_name = name.rsplit(".", 1)
            sys.path.insert(0, os.getcwd())
            try:
                functions.append(getattr(importlib.import_module(module_name), function_name))
            except (ImportError, AttributeError) as error:
                raise UsageError(f"The reward function {name!r} cannot be imported: {error}.") from error
            finally:
                sys.path.remove(os.getcwd())
    if not functions:
        raise UsageError("--reward_funcs is missing; for example --reward_funcs accuracy_reward.")
    return functions


def _load_dataset(script: Any, mixture: Any) -> Any:
    """By name on the Hub, or a folder: files that `load_dataset` knows, or what `save_to_disk` wrote."""
    import datasets
    from trl import get_dataset

    if mixture.datasets and script.dataset_name:
        raise UsageError("Both `datasets` and `dataset_name` are given; leave one out.")
    if mixture.datasets:
        return get_dataset(mixture)
    if not script.dataset_name:
        raise UsageError("--dataset_name is missing: a name on the Hub or a folder.")
    folder = Path(script.dataset_name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return datasets.load_from_disk(script.dataset_name)
    return datasets.load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


def _split(dataset: Any, name: str) -> Any:
    if not isinstance(dataset, dict):  # saved to disk without splits
        return dataset
    if name not in dataset:
        raise ValueError(f"The dataset has no split {name!r}; it has: {', '.join(dataset)}.")
    return dataset[name]


def evaluate(args: argparse.Namespace) -> int:
    """Print avg@k and pass@k of a JSONL or a task."""
    from rich.console import Console
    from rich.table import Table

    from ..evaluation.estimates import pass_at_k
    from ..evaluation.harness import evaluate_task
    from ..evaluation.questions import evaluate
    from ..evaluation.samples import SamplingSettings

    try:
        settings = SamplingSettings(
            model=args.model,
            engine=args.engine,
            num_samples=max(args.k) if args.num_samples is None else args.num_samples,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            max_new_tokens=args.max_new_tokens,
            chat_template=not args.no_chat_template,
            seed=args.seed,
        )
        for k in args.k:
            pass_at_k(settings.num_samples, 0, k)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.include_path is not None and args.task is None:
        raise UsageError("--include_path is for --task; --data reads one file.")
    engine = {}
    if args.engine == "vllm":
        names = ("tensor_parallel_size", "gpu_memory_utilization")
        engine = {name: getattr(args, name) for name in names}
    if args.task is not None:
        result = evaluate_task(settings, args.task, args.k, args.samples, engine, args.include_path)
    else:
        result = evaluate(settings, args.data, args.k, args.samples, engine)
    _write_json(args.json, result)
    table = Table("metric", "value", "95% normal interval", title=f"{result['questions']} questions")
    for metric in result["metrics"]:
        table.add_row(metric["name"], f"{metric['value']:.2%}", f"{metric['low']:.2%} to {metric['high']:.2%}")
    console = Console()
    console.print(table)
    if result.get("cut"):
        console.print(f"{result['cut']:.1%} of the completions were cut at {settings.max_new_tokens} tokens.")
    return 0


def tree(args: argparse.Namespace) -> int:
    """Grow one tree, print it, draw it and write it as JSON."""
    from rich.console import Console

    from ..viewing.drawing import draw_tree
    from ..viewing.text import describe_tree, render_tree

    if args.out is not None and Path(args.out).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--out is {args.out!r}; it must end with .png, .svg or .pdf.")
    question = args.question if args.question is not None else Path(args.question_file).read_text(encoding="utf-8")
    if not question.strip():
        raise UsageError("The question is empty.")
    grown, decode = _grow(args, question)
    Console().print(render_tree(grown, decode, question))
    if args.out is not None:
        draw_tree(grown, args.out, title=question, decode=decode)
    described = describe_tree(grown, decode)
    _write_json(args.json, {"question": question, "answer": args.answer, "arguments": vars(args), **described})
    return 0


def _grow(args: argparse.Namespace, question: str) -> tuple[Any, Callable[[list[int]], str]]:
    """One tree by the trainer's own way of growing them, and the tokenizer's decoder."""
    import torch
    from datasets import Dataset

    from ..evaluation.questions import Grader
    from ..evaluation.samples import load_tokenizer
    from ..ibtpo_config import IBTPOConfig
    from ..ibtpo_trainer import IBTPOTrainer

    grader = None if args.answer is None else Grader(args.answer)

    def success(completions: list, **kwargs: Any) -> list[float | None]:
        texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
        return [None if grader is None else float(grader(text)) for text in texts]

    tokenizer = load_tokenizer(args.model)
    chat = tokenizer.chat_template is not None and not args.no_chat_template
    row = {"prompt": [{"role": "user", "content": question}] if chat else question}
    on_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = IBTPOConfig(
                output_dir=folder,
                **{name: getattr(args, name) for name in TREE_FIELDS},
                seed=args.seed,
                use_vllm=args.use_vllm,
                reproducible_rollouts=True,
                model_init_kwargs={"dtype": "auto"},
                beta=0.0,  # no reference model
                gradient_checkpointing=False,
                bf16=on_gpu and torch.cuda.is_bf16_supported(),
                use_cpu=not on_gpu,
                report_to="none",
            )
        except ValueError as error:
            raise UsageError(str(error)) from error
        trainer = IBTPOTrainer(args.model, success, config, Dataset.from_list([row]), processing_class=tokenizer)
        trainer.model.eval()
        (grown,) = trainer.grow_trees([row])
    return grown, tokenizer.decode


def doctor(args: argparse.Namespace) -> int:
    """Print what is installed and what works; 1 where something required is broken."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from .doctor import examine

    report = examine()
    if args.json == "-":
        print(json.dumps(report, indent=1))
    else:
        _write_json(args.json, report)
        console = Console()
        packages = [
            {
                "package": row["package"],
                "found": row["found"],
                "supported": row["supported"],
                "imports": row["imports"],
                "what for": "; ".join(filter(None, (row["purpose"], row["note"]))),
            }
            for row in report["packages"]
        ]
        for title, rows in (("Installed", packages), ("Devices", report["devices"]), ("On", report["on"])):
            table = Table(title=title, title_justify="left")
            for name in rows[0]:
                table.add_column(name, overflow="fold", no_wrap=name in ("package", "found", "supported", "feature"))
            for row in rows:
                table.add_row(*(Text(_word(value)) for value in row.values()))
            console.print(table)
        for problem in report["problems"]:
            console.print(Text(f"Broken: {problem}"))
    return 1 if report["problems"] else 0


def _word(value: Any) -> str:
    words = {None: "-", True: "yes", False: "no"}
    return value if isinstance(value, str) else words[value]


def _write_json(path: str | None, value: Any) -> None:
    """Strict JSON: a figure that is not a number becomes null."""
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(_without_nan(value), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
