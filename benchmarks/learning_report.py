"""The page `docs/results.md`, whose tables and sentences are made of the rows of `benchmarks.learning` alone."""

from pathlib import Path
from typing import Any

from benchmarks.learning_methods import METHODS
from benchmarks.learning_pictures import draw, draw_by_steps, tasks_by_steps
from benchmarks.learning_tables import (
    MAIN,
    PARTS,
    Results,
    claim_table,
    claims,
    difference,
    dynamics_table,
    method_table,
    name_of,
    others,
    part_table,
    run_table,
    task_table,
    verdict,
)

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"


def marks(part: str) -> tuple[str, str]:
    """What stands around a part of the page that is made of rows."""
    return f"<!-- {part}: begin -->", f"<!-- {part}: end -->"


def put(text: str, part: str, made: str) -> str:
    """The page with a part made anew."""
    begin, end = marks(part)
    return f"{text.split(begin)[0]}{begin}\n\n{made}\n{end}{text.split(end)[1]}"


def sentence(row: dict[str, Any]) -> str:
    """What is known of one claim with at least two pairs, in words."""
    said = {"better": "is better than", "worse": "is worse than", "undecided": "cannot be told from"}
    ours, theirs = name_of(row["method"]), name_of(row["base"])
    return (
        f"{ours[0].upper()}{ours[1:]} {said[verdict(row['area'], row['p_area'])]} {theirs}: "
        f"{row['area'].text(sign=True)} points of area, {row['final'].text(sign=True)} points of final accuracy "
        f"({row['area'].count} pairs)."
    )


def first_line(results: Results, task: str) -> str:
    """What is and is not known of IB-TPO and GRPO with 8 completions."""
    row = claims(results, task)[0]
    judged, area, done = verdict(row["area"], row["p_area"]), row["area"], results.complete
    opening = {
        "better": "IB-TPO learns more than GRPO with 8 completions from as many generated tokens",
        "worse": "IB-TPO learns less than GRPO with 8 completions from as many generated tokens",
        "undecided": "IB-TPO was not shown to learn more than GRPO with 8 completions from as many generated tokens",
        "not known": "It is not known whether IB-TPO learns more than GRPO with 8 completions from as many generated "
        "tokens",
    }[judged]
    figures = "" if judged == "not known" else f": {area.text(sign=True)} points of accuracy over the whole run"
    done, started = (sum(run.task == task for run in runs) for runs in (results.complete, results.started))
    again = sum(run.task == task and times > 1 for run, times in results.started.items())
    again = f", {again} of them again after they had failed or been cut off" if again else ""
    return (
        f"{opening}, on the small task `{task}`{figures} ({area.count} pairs of runs; {done} runs of all methods are "
        f"done, of {started} started{again}).\n"
    )


def price(results: Results, task: str) -> str:
    """What methods cost beside the generated tokens, over the seeds that they share with GRPO; empty without any."""
    said = []
    for method in MAIN[1:]:
        ratios = []
        for key in ("trained_tokens", "cpu_seconds"):
            ours, theirs = (results.measured(task, name, key) for name in (method, MAIN[0]))
            seeds = [seed for seed in ours if seed in theirs]
            ratios.append(sum(ours[seed] for seed in seeds) / sum(theirs[seed] for seed in seeds) if seeds else None)
        if None not in ratios:
            said.append(f"{name_of(method)} {ratios[0]:.2f} and {ratios[1]:.2f}")
    if not said:
        return ""
    return f"Trained tokens and CPU seconds, as multiples of those of {name_of(MAIN[0])}: {'; '.join(said)}.\n"


def better(results: Results, task: str) -> list[str]:
    """Methods that were shown to be better than GRPO with 8 completions, by area and after Holm's correction."""
    rows = [row for row in claims(results, task) if row["base"] == MAIN[0]]
    return [row["method"] for row in rows if verdict(row["area"], row["p_area"]) == "better"]


def settings_of(method: str) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in METHODS[method].settings.items())


def what_follows(results: Results, task: str) -> str:
    """Which settings the task speaks for."""
    said = [f"{name_of(method)}: {settings_of(method)}" for method in better(results, task)]
    if not said:
        return f"On `{task}` no method was shown to learn more than GRPO with 8 completions.\n"
    return (
        f"On `{task}` these learn more than GRPO with 8 completions from as many generated tokens, after correction: "
        f"{'; '.join(said)}. Defaults stay the paper's.\n"
    )


def claim_list(results: Results, task: str) -> str:
    rows = claims(results, task)
    lines = [f"- {sentence(row)}" for row in rows if row["area"].count > 1]
    unknown = [f"{name_of(row['method'])} against {name_of(row['base'])}" for row in rows if row["area"].count < 2]
    if unknown:
        lines.append(f"- Not known, for want of runs (fewer than two pairs): {'; '.join(unknown)}.")
    return "\n".join(lines) + "\n"


def generated_part(results: Results) -> str:
    """Everything on the page that depends on rows."""
    if not results.complete:
        return "Not known: no run is done yet.\n"
    first = results.tasks()[0]
    parts = [first_line(results, first), what_follows(results, first)]
    parts.append(
        "Figures are differences in points of accuracy with their 95% intervals; see below for what was measured.\n"
    )
    if table := task_table(results):
        parts += ["The claims on each task, with Holm's correction over those of the task:\n", table]
    if tasks_by_steps(results):
        parts.append("![What trees add, by the steps of a solution](images/gain_by_steps.png)\n")
    parts += [
        "## Which part does it\n",
        "What each part adds to the area, all else equal, judged by its own interval without correction:\n",
    ]
    for task in results.tasks():
        if any(difference(results, task, *pair, "area").count > 1 for _, *pair in PARTS):
            parts += [f"Task `{task}`:\n", part_table(results, task)]
            parts += [] if task == first else [what_follows(results, task)]
    for task in results.tasks():
        complete = any(run.task == task for run in results.complete)
        parts += [f"## Task `{task}`\n", claim_list(results, task)]
        if any(row["area"].count > 1 for row in claims(results, task)):
            parts.append(f"![Paired differences](images/differences_{task}.png)\n")
        parts.append(claim_table(results, task))
        if complete:
            parts += [price(results, task), f"![Learning curves](images/learning_{task}.png)\n"]
        parts.append(method_table(results, task))
        if any(difference(results, task, name, MAIN[0], "area").count > 1 for name in others(results, task)):
            parts += ["The other methods against GRPO with 8 completions:\n"]
            parts += [f"![Paired differences of the other methods](images/others_{task}.png)\n"]
        parts += ["Final accuracy / area of every run, in percent:\n", run_table(results, task)]
        if complete:
            parts += ["What was logged, from the first checkpoint to the last:\n", dynamics_table(results, task)]
            parts.append(f"![Training dynamics](images/dynamics_{task}.png)\n")
    return "\n".join(part for part in parts if part)


def write(results: Results, page: Path = PAGE, images: Path = IMAGES) -> None:
    """Draw the pictures, and put tables and sentences between the two marks of the page."""
    for task in results.tasks():
        if any(run.task == task for run in results.complete):
            draw(results, task, images)
    if tasks_by_steps(results):
        draw_by_steps(results, images)
    page.write_text(put(page.read_text(), "from the rows", generated_part(results)))
