"""How fast the viewer's page opens, goes from tree to tree, and is written, in a real headless browser.

    python -m benchmarks.viewer            # 1,000 trees of 12 trajectories, about 50 MB of records, and 10,000
    python -m benchmarks.viewer --quick
    python -m benchmarks.viewer --recording    # what recording costs alone

Each row is one page. `open_seconds` is from asking the browser for the file to the first tree drawn; `tree_ms` from a
key press to the next tree drawn, the median and the slowest of many. The page is the same for every repeat.
`--recording` measures the processor time of writing the trees of a step of the quickstart, as a share of that of the
step.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from benchmarks import common
from trl_ibtpo.advantages import GradedTree, token_advantages
from trl_ibtpo.engines.base import Rollout
from trl_ibtpo.grown_tree import GrowthSettings
from trl_ibtpo.growth import drive
from trl_ibtpo.tree_grower import TreeGrower
from trl_ibtpo.viewing.library import Library
from trl_ibtpo.viewing.page import write_page
from trl_ibtpo.viewing.records import dump_record, record_tree

CHROMIUM = "/usr/bin/chromium"
# Without these a closed network gives the browser a long time to fail in.
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
QUIET += ["--disable-component-update", "--disable-sync"]
TEXT = "so let us add the next term and check that the sum of both sides is even when n grows by one, which gives"
WORDS = TEXT.split()


class InstantEngine:
    """Finishes whatever it was given at the next poll, with tokens and probabilities that the seed decides."""

    clock, max_length = "tokens", None

    def __init__(self, tokens: int, seed: int):
        self._tokens, self._seed, self._waiting = tokens, seed, []

    def submit(self, requests):
        self._waiting += requests

    def poll(self):
        requests, self._waiting = self._waiting, []
        return [self._sample(request) for request in requests]

    def generated(self, request_id):
        return 0

    def abort(self):
        self._waiting = []

    def _sample(self, request) -> Rollout:
        rng = random.Random(f"{self._seed} {request.seed}")
        length = max(1, min(request.max_tokens, int(self._tokens * rng.uniform(0.6, 1.3)) - len(request.prefix_ids)))
        unsure = [rng.choice([0.03, 0.1, 0.3, 0.9]) for _ in range(length // 20 + 1)]
        logprobs = [-rng.expovariate(1 / unsure[position // 20]) for position in range(length)]
        return Rollout(request.request_id, [rng.randrange(len(WORDS)) for _ in range(length)], logprobs)


class Scorer:
    """Knows the success of a leaf at once."""

    def __init__(self, seed: int):
        self._scored, self._seed = [], seed

    def submit(self, leaves):
        share = random.Random(self._seed).uniform(0.1, 0.8)
        for tree, leaf, ids in leaves:
            self._scored.append((tree, leaf, float(random.Random(f"{ids}").random() < share)))

    def collect(self, wait):
        scored, self._scored = self._scored, []
        return scored

    def cancel(self):
        self._scored = []


def decode(token_ids: Sequence[int]) -> str:
    return "".join(f"{WORDS[token_id]} " for token_id in token_ids)


def sample_record(seed: int, *, levels: int = 9, tokens: int = 320, step_tokens: int = 24, **fields) -> dict:
    """A tree as training records it, of words without sense."""
    settings = GrowthSettings(tree_levels=levels, max_completion_length=4 * tokens)
    grower = TreeGrower([1], settings, common.FixedSteps(step_tokens), seed=(seed,))
    drive([grower], InstantEngine(tokens, seed), Scorer(seed))
    grown = grower.grown()
    success = np.array(grown.tree.success)
    advantage_L = (success - success.mean()) / (success.std() + 1e-4)
    advantages = token_advantages(GradedTree(grown.tree, grown.scores, advantage_L))
    rewards = {"accuracy_reward": success, "format_reward": np.round(success * 0.5 + 0.25, 2)}
    defaults = {"question": f"Question {seed}: what is {seed} + {seed % 7}?", "step": seed // 4 + 1}
    return record_tree(grown, decode, rewards=rewards, advantages=advantages, **{**defaults, **fields})


def write_run(folder: Path, trees: int) -> int:
    """Records of a run and its curves; how many bytes they are. A hundred trees are grown, the rest are like them."""
    (folder / "trees").mkdir(parents=True)
    rests, size = {}, 0
    for number in range(trees):
        kind, step = number % 100, number // 4 + 1
        if kind not in rests:
            record = sample_record(kind)
            rests[kind] = dump_record({key: record[key] for key in record if key not in ("step", "question")})[1:]
        start = dump_record({"step": step, "question": {"text": f"Question {number}", "messages": None}})[:-1]
        size += len(start) + len(rests[kind]) + 2
        with (folder / "trees" / f"step-{step:06d}.jsonl").open("a") as file:
            file.write(f"{start},{rests[kind]}\n")
    with (folder / "trees" / "metrics.jsonl").open("w") as file:
        for step in range(1, trees // 4 + 1):
            rate = 0.2 + 0.6 * step / (trees // 4 + 1) + 0.1 * random.Random(step).random()
            file.write(
                f'{{"step": {step}, "reward": {rate}, "tree/average_success": {rate}, "entropy": {1 - rate}}}\n'
            )
    return size


def measure(page, path: Path, moves: int) -> dict[str, list[float]]:
    """Seconds until the first tree is drawn, and milliseconds from each key press to the next one.

    Both by the clock, and as processor time of the page's main thread, which a busy machine does not lengthen.
    """
    devtools = page.context.new_cdp_session(page)
    devtools.send("Performance.enable", {"timeDomain": "threadTicks"})

    def busy() -> float:
        metrics = devtools.send("Performance.getMetrics")["metrics"]
        return next(each["value"] for each in metrics if each["name"] == "TaskDuration")

    begin = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("svg[role=tree] [role=treeitem]")
    opened, opened_busy = time.perf_counter() - begin, busy()
    milliseconds = page.evaluate(
        """async (moves) => {
            const taken = [];
            for (let move = 0; move < moves; move++) {
                const before = document.getElementById("where").textContent;
                const begin = performance.now();
                const drawn = new Promise((resolve) => new MutationObserver((_, observer) => {
                    if (document.querySelector("svg[role=tree]")) { observer.disconnect(); resolve(); }
                }).observe(document.getElementById("panes"), { childList: true }));
                document.body.dispatchEvent(new KeyboardEvent("keydown", { key: "j", bubbles: true }));
                await drawn;
                await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
                taken.push(performance.now() - begin);
                if (before === document.getElementById("where").textContent) throw new Error("no other tree");
            }
            return taken;
        }""",
        moves,
    )
    moved_busy = 1000 * (busy() - opened_busy) / moves
    return {"open": [opened], "open_cpu": [opened_busy], "tree": milliseconds, "tree_cpu": [moved_busy]}


def recording(steps: int, warm_steps: int) -> dict:
    """Processor time of recording 4 trees in every step of the quickstart, and of those steps."""
    from transformers import TrainerCallback

    from examples import quickstart
    from trl_ibtpo.viewing.recorder import TreeLog

    taken, whole = [], []
    record = TreeLog.record

    def timed(self, *args, **kwargs):
        self.every = 1
        begin = time.process_time()
        record(self, *args, **kwargs)
        taken.append(time.process_time() - begin)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.begin = time.process_time()

        def on_step_end(self, *args, **kwargs):
            whole.append(time.process_time() - self.begin)

    _, entries = quickstart.make_questions(0)
    model, tokenizer = quickstart.warm_start(entries, 0, warm_steps)
    TreeLog.record = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            quickstart.train_ibtpo(model, tokenizer, entries, 0, steps, [Clock()], folder)
            size = sum(path.stat().st_size for path in Path(folder).glob("trees/step-*.jsonl"))
    finally:
        TreeLog.record = record
    shares = np.array(taken) / np.array(whole)
    return {
        "steps": steps,
        "record_ms": 1000 * float(np.median(taken)),
        "step_ms": 1000 * float(np.median(whole)),
        "share": float(np.median(shares[1:])),  # the first step also warms caches up
        "share_worst": float(shares[1:].max()),
        "kb_a_step": size / 1000 / steps,
    }


def main() -> None:
    arguments = common.parser(__doc__.splitlines()[0])
    arguments.add_argument("--trees", type=int, nargs="+", default=[1000, 10_000], help="trees of a page")
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--recording", action="store_true", help="only what recording costs")
    args = arguments.parse_args()
    if args.recording:
        common.report("Recording 4 trees in every step", [recording(20, 100)], args)
        return
    if args.quick:
        args.trees, args.repeats = [40], 2

    from playwright.sync_api import sync_playwright

    rows = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        for trees in tqdm(args.trees, desc="pages"):
            run, path = Path(folder) / f"run-{trees}", Path(folder) / f"{trees}.html"
            size = write_run(run, trees)
            begin = time.perf_counter()
            library = Library([run])
            listed = time.perf_counter() - begin
            write_page(library, path)
            written = time.perf_counter() - begin
            found: dict[str, list[float]] = {}
            for _ in range(args.repeats):
                browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
                for name, values in measure(browser.new_page(), path, moves=20).items():
                    found.setdefault(name, []).extend(values)
                browser.close()
            rows.append(
                {
                    "trees": trees,
                    "records_mb": size / 1e6,
                    "page_mb": path.stat().st_size / 1e6,
                    "list_seconds": listed,
                    "write_seconds": written,
                    "open_seconds": float(np.median(found["open"])),
                    "open_seconds_worst": max(found["open"]),
                    "open_cpu_seconds": float(np.median(found["open_cpu"])),
                    "tree_ms": float(np.median(found["tree"])),
                    "tree_ms_worst": max(found["tree"]),
                    "tree_cpu_ms": float(np.median(found["tree_cpu"])),
                }
            )
    common.report("The viewer's page in Chromium", rows, args)


if __name__ == "__main__":
    main()
