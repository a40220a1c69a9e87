"""What latents cost while branches are generated, and how different they make the branches of a fork.

    python -m benchmarks.latents --what time
    python -m benchmarks.latents --what diversity --warm_starts outputs/warm_starts

`time`: branches with pseudo self-attention against plain generation with transformers, for the same prefixes and
budgets, interleaved; a ratio is that of one pair of runs. Time is that of the processor, in one thread, so that other
work on the machine counts little.

`diversity`: one rollout of a chain task for each question, one fork in it at a token drawn from the 5% of highest
entropy, and K continuations of the same prefix from the same seeds in every arm. An answer is the last token of a
continuation. Self-BLEU is the mean of sacrebleu's sentence BLEU of each continuation with the other K - 1 as
references, from 0 to 100: the lower, the more they differ. Left out: other branching rules, training.
"""

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sacrebleu
import torch
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3ForCausalLM

from benchmarks import common
from benchmarks.tasks import TASKS, Chain
from trl_ibtpo.engines.base import Rollout, RolloutRequest
from trl_ibtpo.engines.transformers import TransformersEngine
from trl_ibtpo.latents.attention import LayerSteering
from trl_ibtpo.latents.noise import LATENT, latent_noise
from trl_ibtpo.latents.source import LatentSource, Steering
from trl_ibtpo.latents.strength import Strength
from trl_ibtpo.latents.training import Rows, embed, make_prior, train_injection, train_prior


def sampling(tokens: int, stop: int | None) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, eos_token_id=stop, pad_token_id=0
    )


def answers(engine: TransformersEngine, requests: list[RolloutRequest]) -> list[Rollout]:
    engine.submit(requests)
    return engine.poll()


# ----- time ----------------------------------------------------------------------------------------------------------


def measure_time(args) -> list[dict]:
    """A row for each number of branches."""
    torch.manual_seed(args.seed)
    config = common.qwen3_config(args.layers, args.hidden, vocabulary=4096, pad_token_id=0)
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config = GenerationConfig()
    steering = LatentSource(Strength(), args.seed).attach(model, "psa")
    rows = []
    for branches in args.branches:
        rng = np.random.default_rng(args.seed)
        requests = [
            RolloutRequest(
                branch,
                rng.integers(1, 4096, args.prefix - int(rng.integers(0, args.prefix // 4))).tolist(),
                args.tokens,
                seed=branch,
            )
            for branch in range(branches)
        ]
        steered = [
            RolloutRequest(
                each.request_id,
                each.prefix_ids,
                each.max_tokens,
                each.seed,
                latent=latent_noise([each.seed]),
                fork=len(each.prefix_ids),
            )
            for each in requests
        ]
        engines = {
            "plain": (TransformersEngine(model, sampling(args.tokens, None), 0), requests),
            "psa": (TransformersEngine(model, sampling(args.tokens, None), 0, latents=steering), steered),
        }
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for repeat in tqdm(range(args.repeats + 1), desc=f"{branches} branches", unit="pair"):
            for name in ("plain", "psa") if repeat % 2 else ("psa", "plain"):
                begun = time.process_time()
                answers(*engines[name])
                if repeat:  # the first pair warms up
                    seconds[name].append(time.process_time() - begun)
        ratios = [psa / plain for psa, plain in zip(seconds["psa"], seconds["plain"], strict=True)]
        rows.append(
            {
                "layers": args.layers,
                "hidden": args.hidden,
                "branches": branches,
                "prefix": args.prefix,
                "tokens": args.tokens,
                "plain_cpu_seconds": statistics.median(seconds["plain"]),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "repeats": args.repeats,
            }
        )
        common.write_rows(rows, args)
    return rows


# ----- diversity -----------------------------------------------------------------------------------------------------


def trained_steering(task: Chain, model, tokenizer, args) -> Steering:
    """A prior and projections, trained on worked solutions of questions that are not measured."""
    rng = random.Random(f"latents {args.seed}")
    solved = [(row["prompt"], task.solution(row, rng)) for row in task.questions(args.rows, seed=-5)]
    rows = Rows(
        [tokenizer.encode(prompt) for prompt, _ in solved],
        [[*tokenizer.encode(solution), tokenizer.eos_token_id] for _, solution in solved],
    )
    embeddings = embed(model, rows, args.seed, 64)
    prior = make_prior(embeddings, LATENT, args.seed)
    untrained = LatentSource(Strength(), args.seed).attach(model, "psa").acting
    options = {"batch": 32, "learning_rate": 1e-3, "seed": args.seed}
    with tempfile.TemporaryDirectory() as folder:
        for name, steps, train, what in (
            ("Prior", args.prior_steps, train_prior, (prior, embeddings)),
            ("Projections", args.injection_steps, train_injection, (untrained, prior, rows)),
        ):
            with tqdm(total=steps, desc=name, unit="step") as bar:

                def advance(shown: str, bar=bar) -> None:
                    bar.update()
                    bar.set_postfix_str(shown, refresh=False)

                train(*what, steps=steps, checkpoint=Path(folder) / f"{name}.safetensors", advance=advance, **options)
    return Steering(untrained, prior.eval().requires_grad_(False))


def stronger_steering(steering: Steering, strength: float) -> Steering:
    """The same latents, acting more strongly than they were trained to."""
    return Steering(LayerSteering(steering.model, steering.acting.injection, Strength(strength)), steering.prior)


@torch.no_grad()
def forks(model, prompts: list[list[int]], completions: list[list[int]], seed: int) -> list[int]:
    """Completion tokens before a fork, drawn from the 5% of highest entropy after the first; one a question."""
    chosen = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        logprobs = torch.log_softmax(logits.float(), -1)
        entropies = -(logprobs.exp() * logprobs).sum(-1)[1:]
        top = entropies.argsort(descending=True)[: max(1, round(0.05 * len(entropies)))]
        rng = np.random.default_rng([seed, number])
        chosen.append(1 + int(top[rng.integers(len(top))]))
    return chosen


def self_bleu(texts: list[str]) -> float:
    """Mean BLEU of each text with the others as references."""
    scores = [
        sacrebleu.sentence_bleu(
            text, texts[:number] + texts[number + 1 :], tokenize="none", use_effective_order=True
        ).score
        for number, text in enumerate(texts)
    ]
    return statistics.fmean(scores)


def measure_diversity(args) -> list[dict]:
    """A row for each arm."""
    task = TASKS[args.task]
    with tempfile.TemporaryDirectory() as folder:
        warm = task.warm_start(args.warm_starts or Path(folder))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(warm)
        model = Qwen3ForCausalLM.from_pretrained(warm, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig()
    rows = task.questions(args.questions, seed=-7)
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    config = sampling(task.max_completion_length, tokenizer.eos_token_id)
    plain = TransformersEngine(model, config, tokenizer.pad_token_id, request_seeds=True)
    first = [
        rollout.token_ids
        for rollout in answers(
            plain,
            [RolloutRequest(n, ids, task.max_completion_length, seed=n) for n, ids in enumerate(prompts)],
        )
    ]
    places = forks(model, prompts, first, args.seed)
    trained = trained_steering(task, model, tokenizer, args)
    source = LatentSource(Strength(), args.seed)
    arms: dict[str, Steering | None] = {
        "none": None,
        "psa, untrained": source.attach(model, "psa"),
        "psa, trained": trained,
        "softmax, untrained": source.attach(model, "softmax"),
    }
    for strength in args.strengths:
        stronger = LatentSource(Strength(strength), args.seed)
        arms[f"psa, untrained, strength {strength:g}"] = stronger.attach(model, "psa")
        arms[f"psa, trained, strength {strength:g}"] = stronger_steering(trained, strength)
        arms[f"softmax, untrained, strength {strength:g}"] = stronger.attach(model, "softmax")
    found = []
    for name, steering in tqdm(arms.items(), unit="arm"):
        engine = TransformersEngine(model, config, tokenizer.pad_token_id, request_seeds=True, latents=steering)
        requests = [
            RolloutRequest(
                (question, branch),
                prompts[question] + first[question][: places[question]],
                task.max_completion_length - places[question],
                seed=1000 * question + branch,
                latent=None if steering is None else latent_noise([args.seed, question, branch]),
                fork=len(prompts[question]) + places[question],
            )
            for question in range(len(prompts))
            for branch in range(args.continuations)
        ]
        branches = answers(engine, requests)
        found.append({"arm": name, **figures(task, tokenizer, rows, first, places, branches, args.continuations)})
        common.write_rows(found, args)
    return found


def figures(
    task: Chain,
    tokenizer,
    rows: list[dict],
    first: list[list[int]],
    places: list[int],
    branches: list[Rollout],
    k: int,
) -> dict:
    """How different, how good and how long the continuations of an arm are."""
    decode: Callable = tokenizer.batch_decode
    distinct, overlap, success, tokens = [], [], [], []
    for question, row in enumerate(rows):
        continuations = [rollout.token_ids for rollout in branches[k * question : k * (question + 1)]]
        texts = decode(continuations, skip_special_tokens=True)
        wholes = decode([first[question][: places[question]] + ids for ids in continuations], skip_special_tokens=True)
        distinct.append(len({text.split()[-1] if text.split() else "" for text in wholes}))
        overlap.append(self_bleu(texts) if k > 1 else float("nan"))
        success.append(statistics.fmean(task.reward(wholes, [row["solution"]] * k)))
        tokens.append(statistics.fmean(map(len, continuations)))
    row = {"questions": len(rows), "continuations": k}
    for name, values in (("distinct", distinct), ("self_bleu", overlap), ("success", success), ("tokens", tokens)):
        row[name], row[f"{name}_se"] = common.mean_and_error(values)
    return row


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--what", choices=["time", "diversity"], required=True)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--hidden", type=int, default=256)
    arguments.add_argument("--branches", type=int, nargs="*", default=[8, 32], help="in one batch")
    arguments.add_argument("--prefix", type=int, default=192, help="tokens before the fork at most")
    arguments.add_argument("--tokens", type=int, default=128, help="generated for each branch")
    arguments.add_argument("--repeats", type=int, default=7)
    arguments.add_argument("--task", choices=list(TASKS), default="chain7")
    arguments.add_argument("--warm_starts", type=Path, metavar="FOLDER", help="keeps warm-started models")
    arguments.add_argument("--questions", type=int, default=256)
    arguments.add_argument("--continuations", type=int, default=3, help="K")
    arguments.add_argument(
        "--strengths", type=float, nargs="*", default=[10.0], help="gamma0 of further arms, beside 1"
    )
    arguments.add_argument("--rows", type=int, default=2048, help="worked solutions to train latents on")
    arguments.add_argument("--prior_steps", type=int, default=1500)
    arguments.add_argument("--injection_steps", type=int, default=400)
    args = arguments.parse_args()
    if args.quick:
        args.branches, args.prefix, args.tokens, args.repeats = [2], 16, 8, 2
        args.questions, args.rows, args.prior_steps, args.injection_steps = 4, 64, 10, 3
    torch.set_num_threads(1)
    if args.what == "time":
        common.report("Branches with latents, against plain generation", measure_time(args), args)
    else:
        common.report("How different the continuations of a fork are", measure_diversity(args), args)


if __name__ == "__main__":
    main()
