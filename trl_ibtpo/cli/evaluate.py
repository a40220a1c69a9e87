"""`trl-ibtpo evaluate`: avg@k and pass@k of a JSONL or a benchmark."""

from collections.abc import Sequence

from .common import Parser, UsageError, say_written, write_json


def _parser() -> Parser:
    parser = Parser(
        prog="trl-ibtpo evaluate",
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
    parser.option("model", required=True, help="name on the Hub or folder, of a model or an adapter")
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
    parser.option(
        "gpu_memory_utilization", type=float, help="share of the memory for vllm (default: most of what is free)"
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Print avg@k and pass@k."""
    args = _parser().parse_args(argv)

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
    table = Table("metric", "value", "95% normal interval", title=f"{result['questions']} questions")
    for metric in result["metrics"]:
        value, low, high = (
            f"{metric[name]:.2%}" if metric["share"] else f"{metric[name]:.4g}" for name in ("value", "low", "high")
        )
        table.add_row(metric["name"], value, f"{low} to {high}")
    console = Console()
    console.print(table)
    if result.get("cut"):
        console.print(f"{result['cut']:.1%} of the completions were cut at {settings.max_new_tokens} tokens.")
    if result.get("unread"):
        console.print(f"{result['unread']:.1%} of the completions hold no answer that math-verify can read.")
    write_json(args.json, result)
    say_written(args.samples, args.json)
    return 0
