"""The field's benchmarks, through lm-evaluation-harness (the package `lm_eval`).

The harness owns questions, prompts and grading. A run is `num_samples` passes over the task, each with a seed of its
own, so that every question gets that many completions and verdicts; avg@k and pass@k follow as in `evaluation`.
"""

import numbers
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from .adapters import base_of, files_stamp, model_stamp, rank_of
from .estimates import pass_at_k, summarise
from .samples import SamplesFile, SamplingSettings, as_applied, free_share, seed_of

# Short names of the field's benchmarks; any other name is taken as the harness's own.
TASKS = {
    "math_500": "minerva_math500",
    "aime24": "aime24",
    "aime25": "aime25",
    "gpqa_diamond": "gpqa_diamond_cot_zeroshot",
    "ifeval": "ifeval",
}
THROUGH_DATA = ("amc23", "amc24")  # not in the harness


def evaluate_task(
    settings: SamplingSettings,
    task: str,
    ks: Sequence[int] = (),
    samples: str | Path | None = None,
    engine_arguments: dict[str, Any] | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Any]:
    """Run a task of the harness `settings.num_samples` times and summarise over its questions.

    Args:
        settings: model and sampling, in place of the task's own; its prompt, stop texts and grading stay.
        task: a key of `TASKS` or a name of the harness.
        ks: for pass@k; none above `settings.num_samples`.
        samples: JSONL to which every pass is appended; passes already there are not repeated.
        engine_arguments: passed on to the harness's model class.
        include_path: folder with task files of your own, read instead of the harness's.

    Returns:
        As `evaluation.evaluate`, with the estimates of every number that the harness gives for a question. Where a
        task reads its completions in several ways, names end with the way.
    """
    for k in ks:
        pass_at_k(settings.num_samples, 0, k)
    if task in THROUGH_DATA:
        raise ValueError(f"The harness has no task {task!r}. Give its questions and answers as a JSONL with --data.")
    name = TASKS.get(task, task)
    manager = _task_manager(include_path)
    _check_task(manager, name)
    settings = as_applied(settings)
    fingerprint = {**asdict(settings), "model_files": model_stamp(settings.model), "task": name}
    if include_path is not None:
        fingerprint["task_files"] = files_stamp(include_path, ("**/*.yaml", "**/*.py"))
    records = SamplesFile(samples, fingerprint)
    records.say_found(settings.num_samples, "passes")
    model = None
    for index in range(settings.num_samples):
        if index not in records:
            model = model or _load_model(settings, engine_arguments or {})
            records.append({"index": index, **_run(model, manager, name, settings, index)})
        if not records[index]["values"]:
            raise ValueError(
                f"The harness gives no number for a question of {name!r}, only for all together (as BLEU does), so "
                "that there is nothing to average over completions. Give a task with a metric such as exact_match."
            )
    passes = [records[index]["values"] for index in range(settings.num_samples)]
    metrics = []
    for key in passes[0]:
        by_question = list(zip(*(values[key] for values in passes), strict=True))  # (Q, n)
        metrics += summarise(by_question, ks, prefix=f"{key} ")
    return {
        "settings": fingerprint,
        "questions": len(by_question),
        "metrics": [asdict(each) for each in metrics],
    }


def _task_manager(include_path: str | Path | None):
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"Benchmarks by name need lm-evaluation-harness, which cannot be imported ({error}). Install it with: "
            "pip install '.[evaluation]' in a copy of the repository."
        ) from error
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"`include_path` is {str(include_path)!r}, which is not a folder.")
    if include_path is None:
        return TaskManager()
    return TaskManager(include_path=str(include_path), include_defaults=False)


def _check_task(manager: Any, name: str) -> None:
    if name not in manager.all_tasks:
        raise ValueError(
            f"lm-evaluation-harness has no task {name!r} there ({len(manager.all_tasks)} were found). Short names: "
            f"{', '.join(TASKS)}; `lm_eval ls tasks` lists all; `include_path` is a folder with your own."
        )
    tasks = manager.load([name])["tasks"]
    kinds = {task.get_config("output_type") for task in tasks.values()}
    if len(tasks) != 1 or kinds != {"generate_until"}:
        raise ValueError(
            f"{name!r} is {len(tasks)} tasks of type {', '.join(map(str, kinds))}; avg@k and pass@k need one task "
            "that generates text."
        )


def _load_model(settings: SamplingSettings, engine_arguments: dict[str, Any]):
    from lm_eval.api.registry import get_model

    base = base_of(settings.model)
    tqdm.write(f"Loading {settings.model} with {settings.engine}", file=sys.stderr)
    if settings.engine == "vllm":
        try:
            model_class = get_model("vllm")
        except PackageNotFoundError as error:
            raise ImportError(
                "lm-evaluation-harness takes only a vLLM that is installed under the name 'vllm', which a CPU build "
                "is not. Choose the engine transformers."
            ) from error
        if engine_arguments.get("gpu_memory_utilization") is None:
            share = free_share(on_cpu=False, gpus=engine_arguments.get("tensor_parallel_size", 1))
            engine_arguments = {**engine_arguments, "gpu_memory_utilization": share}
        adapter = {} if base is None else {"lora_local_path": settings.model, "max_lora_rank": rank_of(settings.model)}
        return model_class(pretrained=base or settings.model, batch_size="auto", **adapter, **engine_arguments)
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if base is not None:
        engine_arguments = {**engine_arguments, "peft": settings.model}
    return get_model("hf")(pretrained=base or settings.model, batch_size=8, device=device, **engine_arguments)


def _run(model: Any, manager: Any, name: str, settings: SamplingSettings, index: int) -> dict[str, Any]:
    """One pass: each number that the harness gives for a question, in the order of the questions, and completions."""
    from lm_eval import simple_evaluate

    seed = seed_of(settings.seed, index)
    sampling = {"do_sample": False, "temperature": 0.0}
    if settings.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    if settings.engine == "vllm":
        sampling["seed"] = seed
    result = simple_evaluate(
        model=model,
        tasks=[name],
        task_manager=manager,
        gen_kwargs={**sampling, "max_gen_toks": settings.max_new_tokens},
        apply_chat_template=settings.chat_template,
        bootstrap_iters=0,
        torch_random_seed=seed,
    )
    rows = sorted(result["samples"][name], key=lambda row: row["doc_id"])
    filters = sorted({row["filter"] for row in rows})
    values: dict[str, list[float]] = {}
    for row in rows:
        for metric in row["metrics"]:
            if isinstance(row[metric], numbers.Number):  # IFEval also gives one verdict per instruction
                key = metric if len(filters) == 1 else f"{metric} ({row['filter']})"
                values.setdefault(key, []).append(float(row[metric]))
    rows = [row for row in rows if row["filter"] == filters[0]]
    return {
        "values": values,
        "questions": [row["arguments"][0][0] for row in rows],
        "completions": [row["resps"][0][0] for row in rows],
        "parsed": [row["filtered_resps"][0] for row in rows],
    }
