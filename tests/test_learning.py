"""The comparison of learning: its tables are recomputed by a second reader, and its runs repeat."""

import hashlib
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import estimates, learning, learning_pictures, learning_report, learning_tables, sensitivity
from benchmarks.estimates import Estimate, holm
from benchmarks.learning_methods import FIRST, METHODS, STEPS, Setting
from benchmarks.learning_tables import Run

# Of Student's distribution, from printed tables: 97.5% points by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
T_975 |= {11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 30: 2.042}


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def small_file(path: Path) -> Path:
    """Two methods with four seeds, of which one is missing, one was cut off and run again, and one failed."""
    lines = []
    finals = {("grpo_8", 0): 0.5, ("grpo_8", 1): 0.4, ("grpo_8", 2): 0.45, ("grpo_8", 3): 0.6}
    finals |= {("ibtpo", 0): 0.55, ("ibtpo", 1): 0.52, ("ibtpo", 2): 0.47}
    finals |= {("confidence_once", 1): 0.52, ("confidence_once", 2): 0.47, ("random_once", 0): 0.3}
    finals |= {("random_once", 1): 0.33, ("independent_8", 0): 0.5}
    for (method, seed), final in finals.items():
        named = {"task": "chain7", "method": method, "seed": seed}
        started = {**named, "event": "started"}
        half = {**named, "generated_tokens": 50, "trained_tokens": 70, "cpu_seconds": 1.0, "accuracy": final / 2}
        half |= {"final": final, "area": final / 2, "entropy": 0.2, "effective_rate": 0.5 + 0.01 * seed}
        if method == "ibtpo":
            half |= {"covariance": 0.02 * final, "trained_tokens": 30, "cpu_seconds": 3.0}
        if (method, seed) == ("grpo_8", 2):
            lines += [started, {**half, "final": 0.0}]  # killed while its rows were written
        whole = {"generated_tokens": 100, "trained_tokens": 2 * half["trained_tokens"], "cpu_seconds": 4.0 + seed}
        begun = {**half, "generated_tokens": 0, "trained_tokens": 0, "cpu_seconds": 0.0, "accuracy": 0.1}
        for name in ("entropy", "effective_rate", "covariance"):
            begun.pop(name, None)
        lines += [started, begun, half, {**half, **whole, "accuracy": final, "entropy": 0.1 * final}]
    lines += [{"task": "chain7", "method": "ibtpo", "seed": 3, "event": "started"}]
    lines += [{"task": "chain7", "method": "ibtpo", "seed": 3, "event": "failed", "error": "ValueError: no"}]
    lines += [{"task": "chain7", "method": "grpo_8", "seed": 4, "event": "started"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(params=["small", "real"])
def results_file(request, tmp_path):
    return small_file(tmp_path / "rows.jsonl") if request.param == "small" else learning.RESULTS


def second_reader(path: Path, task: str, method: str, key: str) -> dict[int, float]:
    """From the lines alone: the last word of each seed, where it came after the run's last start."""
    found = {}
    for row in rows(path):
        if (row["task"], row["method"]) == (task, method):
            if row.get("event") == "started":
                found.pop(row["seed"], None)
            elif key in row:
                found[row["seed"]] = row[key]
    return found


def interval(values) -> str:
    """Mean and 95% interval in points, by hand."""
    values = [100 * value for value in values]
    mean = statistics.mean(values)
    half = T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return [mean, mean - half, mean + half]


def numbers(text: str) -> list[float]:
    return [float(word.strip("[],")) for word in text.split()]


@pytest.mark.parametrize("key", ["final", "area"])
def test_a_second_reader_finds_the_same_means_differences_and_intervals(results_file, key, capsys):
    results, checked = learning_tables.load(results_file), 0
    for row in learning_tables.tables(results):
        ours = second_reader(results_file, row["task"], row["method"], key)
        assert row["done"] == len(ours)
        if len(ours) > 1:
            assert numbers(row[key]) == pytest.approx(interval(ours.values()), abs=0.06)
            checked += 1
        theirs = second_reader(results_file, row["task"], "grpo_8", key)
        pairs = [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
        assert row["pairs"] == len(pairs)
        if row["method"] != "grpo_8" and len(pairs) > 1:
            assert numbers(row[f"{key} - grpo_8"]) == pytest.approx(interval(pairs), abs=0.06)
            checked += 1
    assert checked >= 2 or results_file == learning.RESULTS  # which may be at its beginning
    for task in results.tasks():
        for claim in learning_tables.claims(results, task):
            ours, theirs = (second_reader(results_file, task, claim[name], key) for name in ("method", "base"))
            pairs = [ours[seed] - theirs[seed] for seed in sorted(set(ours) & set(theirs))]
            assert claim[key].count == len(pairs)
            if len(pairs) > 1:
                assert numbers(claim[key].text()) == pytest.approx(interval(pairs), abs=0.06)


def cells(table: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return {first: rest for first, *rest in lines}


def last_rows(path: Path, task: str, method: str, last: int = -1) -> dict[int, dict]:
    """A row of each seed, by its place among those that have a figure, after the run's last start."""
    found = {}
    for row in rows(path):
        if (row["task"], row["method"]) == (task, method) and row.get("event") == "started":
            found[row["seed"]] = []
        elif (row["task"], row["method"]) == (task, method) and "entropy" in row:
            found[row["seed"]].append(row)
    return {seed: lines[last] for seed, lines in found.items() if lines}


def test_a_second_reader_finds_the_same_in_the_tables_of_the_page(results_file):
    results = learning_tables.load(results_file)
    for task in results.tasks():
        table = cells(learning_tables.method_table(results, task))
        logged = cells(learning_tables.dynamics_table(results, task))
        price = learning_report.price(results, task)
        base = last_rows(results_file, task, "grpo_8")
        for method in results.methods(task):
            name = learning_tables.name_of(method)
            last, first = last_rows(results_file, task, method), last_rows(results_file, task, method, 0)
            _, final, area, apart, pairs, trained, seconds = table[name]
            if not last:
                assert (final, area, trained, seconds, name in logged) == ("none done", "none done", "-", "-", False)
                continue
            for key, shown in (("trained_tokens", trained), ("cpu_seconds", seconds)):
                assert int(shown.replace(",", "")) == pytest.approx(
                    statistics.mean(row[key] for row in last.values()), abs=0.51
                )
            for key, shown in (("final", final), ("area", area)):
                if len(last) > 1:
                    assert numbers(shown) == pytest.approx(interval([row[key] for row in last.values()]), abs=0.06)
            both = sorted(set(last) & set(base))
            if method != "grpo_8":
                assert int(pairs) == len(both)
            if method != "grpo_8" and len(both) > 1:
                differences = [last[seed]["area"] - base[seed]["area"] for seed in both]
                assert numbers(apart) == pytest.approx(interval(differences), abs=0.06)
            for key, shown in zip(("entropy", "effective_rate", "covariance"), logged[name], strict=True):
                if key in last[both[0]]:
                    means = [statistics.mean(row[key] for row in found.values()) for found in (first, last)]
                    assert [float(word) for word in shown.split(" to ")] == pytest.approx(means, abs=6e-4)
                else:
                    assert shown == "-"
            if both and method in learning_tables.MAIN[1:]:
                ratios = [
                    sum(last[seed][key] for seed in both) / sum(base[seed][key] for seed in both)
                    for key in ("trained_tokens", "cpu_seconds")
                ]
                shown = price.split(f"{name} ")[1].split(";")[0].rstrip(".\n").split(" and ")
                assert [float(word) for word in shown] == pytest.approx(ratios, abs=6e-3)


def test_a_second_reader_finds_the_same_of_every_part(results_file):
    results, checked = learning_tables.load(results_file), 0
    for task in results.tasks():
        table = cells(learning_tables.part_table(results, task))
        assert len(table) == len(learning_tables.PARTS)
        for part, method, base in learning_tables.PARTS:
            ours, theirs = (second_reader(results_file, task, name, "area") for name in (method, base))
            pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            count, area, judged = table[part]
            assert int(count) == len(pairs)
            if len(pairs) < 2:
                assert (area, judged) == ("-", "not known")
                continue
            mean, low, high = interval(pairs)
            assert numbers(area) == pytest.approx([mean, low, high], abs=0.06)
            told = {"it helps": low > -0.01, "it hurts": high < 0.01, "not told from nothing": low < 0.01 > -high}
            assert told[judged]
            checked += 1
    assert checked or results_file != learning.RESULTS


def test_a_second_reader_finds_the_same_of_every_task(tmp_path):
    """The same rows as those of a second task, with one method's area shifted by a point."""
    lines = []
    for task, shift in (("chain7", 0.0), ("chain10", 0.01)):
        for seed in range(4):
            for method, area in (
                ("grpo_8", 0.3),
                ("confidence_sampled", 0.4 + 0.001 * seed + shift),
                ("ibtpo", 0.302),
            ):
                named = {"task": task, "method": method, "seed": seed}
                lines += [{**named, "event": "started"}, {**named, "final": area, "area": area + 1e-3 * seed**2}]
    lines.append({"task": "sums", "method": "grpo_8", "seed": 0, "event": "started"})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file in (path, learning.RESULTS):
        results, checked = learning_tables.load(file), 0
        text = learning_tables.task_table(results)
        tasks = re.findall(r"`(\w+)`", text.splitlines()[0])
        assert file == learning.RESULTS or tasks == ["chain7", "chain10"]
        table = cells(text)
        for question, method, base in learning_tables.CLAIMS:
            name = f"{question}: {learning_tables.name_of(method)} - {learning_tables.name_of(base)}"
            for task, shown in zip(tasks, table[name], strict=True):
                ours, theirs = (second_reader(file, task, each, "area") for each in (method, base))
                pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
                if len(pairs) < 2:
                    assert shown == "not known"
                    continue
                figures, judged = shown.split(f", {len(pairs)} pairs: ")
                assert numbers(figures) == pytest.approx(interval(pairs), abs=0.06)
                row = next(row for row in learning_tables.claims(results, task) if row["question"] == question)
                assert judged == learning_tables.verdict(row["area"], row["p_area"])
                checked += 1
        assert checked


def test_settings_are_named_where_a_method_was_shown_to_be_better(tmp_path):
    lines = []
    for seed in range(6):
        for method, area in (("grpo_8", 0.3), ("confidence_sampled", 0.4 + 0.001 * seed), ("ibtpo", 0.2)):
            named = {"task": "chain7", "method": method, "seed": seed}
            lines += [{**named, "event": "started"}, {**named, "final": area, "area": area + 1e-4 * seed**2}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = learning_report.what_follows(learning_tables.load(path), "chain7")
    assert "`shared_token_weight='sampled'`" in said and "IB-TPO" not in said
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line["method"] != "confidence_sampled"))
    assert "no method was shown" in learning_report.what_follows(learning_tables.load(path), "chain7")


def test_the_readme_says_what_the_rows_say():
    readme = (Path(learning.__file__).parent.parent / "README.md").read_text()
    said = readme.split("**Learning")[1].split("**Time")[0]
    results = learning_tables.load(learning.RESULTS)
    table = cells(said[said.index("| task") :].split("\n\n")[0])
    assert list(table) == [f"`{task}`" for task in sorted(results.tasks(), key=lambda task: STEPS[task])]
    for task in results.tasks():
        steps, course, *differences, pairs = table[f"`{task}`"]
        theirs = second_reader(learning.RESULTS, task, "grpo_8", "final")
        starts = [
            row["accuracy"]
            for row in rows(learning.RESULTS)
            if (row["task"], row["method"], row.get("generated_tokens")) == (task, "grpo_8", 0)
        ]
        ends = statistics.mean(theirs.values())
        assert (int(steps), course) == (STEPS[task], f"{100 * statistics.mean(starts):.0f}% to {100 * ends:.0f}%")
        for method, shown in zip(("confidence_sampled", "confidence_once", "ibtpo"), differences, strict=True):
            ours = second_reader(learning.RESULTS, task, method, "final")
            both = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            assert numbers(shown.strip("*")) == pytest.approx(interval(both), abs=0.06) and int(pairs) == len(both)
            assert shown.startswith("**") == (method in learning_report.better(results, task))


def seed_of(run: list[dict]) -> int:
    return run[-1]["seed"]


def test_the_page_says_where_trees_pay():
    page = " ".join((Path(learning.__file__).parent.parent / "docs" / "results.md").read_text().split())
    said = page.split("## Where trees pay")[1].split("## ")[0]
    measured = [("chain3", "area", "area to GRPO"), ("chain3", "final", "final accuracy")]
    measured += [(task, "area", "area") for task in ("chain8", "chain12")]
    for task, key, words in measured:
        ours, theirs = (second_reader(learning.RESULTS, task, name, key) for name in ("confidence_sampled", "grpo_8"))
        mean, low, high = interval([ours[seed] - theirs[seed] for seed in ours])
        assert f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] points of {words}" in said
    results = learning_tables.load(learning.RESULTS)
    longer = [task for task in results.tasks() if STEPS[task] > 3]
    gains = {
        task: learning_tables.difference(results, task, "confidence_sampled", "grpo_8", "area") for task in longer
    }
    # "1.4 or more"
    assert len(gains) == 5 and min(gain.mean for gain in gains.values()) > 0.0135
    assert all(gain.low > 0 for gain in gains.values())
    assert sorted(gains, key=lambda task: gains[task].mean)[::4] == ["chain12", "sums"]
    # Where GRPO is as right on `sums` as on `chain3`.
    curves = {
        method: [[row["accuracy"] for row in rows] for rows in sorted(results.runs("sums", method), key=seed_of)]
        for method in ("grpo_8", "confidence_sampled")
    }
    passed = []
    for checkpoint, words in ((2, "and"), (3, "points")):
        theirs, ours = ([run[checkpoint] for run in curves[method]] for method in curves)
        mean, low, high = interval([our - their for our, their in zip(ours, theirs, strict=True)])
        assert f"{mean:+.1f} [{low:+.1f}, {high:+.1f}] {words}" in said
        passed.append(f"{100 * statistics.mean(theirs):.0f}%")
    assert f"GRPO passed from {' to '.join(passed)}" in said


def test_pictures_show_what_the_rows_say(tmp_path):
    file = small_file(tmp_path / "rows.jsonl")
    results = learning_tables.load(file)
    figures = learning_pictures.draw(results, "chain7", tmp_path)
    assert set(figures) == {f"{kind}_chain7" for kind in ("learning", "dynamics", "differences", "others")}
    assert {path.stem for path in tmp_path.glob("*.png")} == set(figures)
    for figure in figures.values():
        texts = [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
        assert any(texts) and not any("`" in text for text in texts)
    curves = {line.get_color(): line.get_ydata() for line in figures["learning_chain7"].axes[0].lines}
    for method in ("grpo_8", "ibtpo", "confidence_once"):
        ends = statistics.mean(second_reader(file, "chain7", method, "accuracy").values())
        curve = curves[f"C{learning_tables.MAIN.index(method)}"]
        assert (curve[0], curve[-1]) == pytest.approx((0.1, ends))
    grpo = f"C{learning_pictures.DRAWN.index('independent_8')}"  # whose covariance TRL does not log
    assert grpo in {line.get_color() for line in figures["dynamics_chain7"].axes[0].lines} and grpo not in curves
    final, area = (line for line in figures["others_chain7"].axes[0].lines if len(line.get_xdata()) == 1)
    pairs = [0.3 - 0.5, 0.33 - 0.4]
    assert (final.get_xdata()[0], area.get_xdata()[0]) == pytest.approx((50 * sum(pairs), 25 * sum(pairs)))


def test_the_picture_by_steps_shows_what_the_rows_say(tmp_path):
    from benchmarks.tasks import TASKS

    results = learning_tables.load(learning.RESULTS)
    tasks = learning_pictures.tasks_by_steps(results)
    assert [STEPS[task] for task in tasks] == sorted(STEPS[task] for task in tasks) and len(tasks) > 2
    assert {name: getattr(task, "steps", None) or task.digits for name, task in TASKS.items()} == STEPS
    (axis,) = learning_pictures.draw_by_steps(results, tmp_path).axes
    for number, method in enumerate(learning_pictures.BY_STEPS):
        (points,) = (line for line in axis.lines if line.get_color() == f"C{number}")
        for place, shown in zip(points.get_xdata(), points.get_ydata(), strict=True):
            ours, theirs = (
                second_reader(learning.RESULTS, tasks[round(place)], name, "area") for name in (method, "grpo_8")
            )
            assert shown == pytest.approx(interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])[0])


def test_every_run_that_was_started_is_in_the_tables(results_file):
    results = learning_tables.load(results_file)
    started = [
        (row["task"], row["method"], row["seed"]) for row in rows(results_file) if row.get("event") == "started"
    ]
    assert {(run.task, run.method, run.seed) for run in results.started} == set(started)
    assert sum(row["started"] for row in learning_tables.tables(results)) == len(started)
    for task in results.tasks():
        table = learning_tables.run_table(results, task)
        missing = [run for run in results.started if run.task == task and run not in results.complete]
        assert table.count("not done") + table.count("failed") == len(missing)


def test_what_was_cut_off_does_not_count(tmp_path):
    results = learning_tables.load(small_file(tmp_path / "rows.jsonl"))
    assert results.measured("chain7", "grpo_8", "final") == {0: 0.5, 1: 0.4, 2: 0.45, 3: 0.6}
    assert results.failed == {Run("chain7", "ibtpo", 3): "ValueError: no"}
    assert Run("chain7", "grpo_8", 4) not in results.complete


@pytest.mark.parametrize("degrees", T_975)
def test_quantiles_of_students_distribution(degrees):
    assert estimates.t_quantile(degrees) == pytest.approx(T_975[degrees], abs=6e-4)
    assert estimates.two_sided_p(T_975[degrees], degrees) == pytest.approx(0.05, abs=5e-5)


def test_holm_by_hand():
    nan = float("nan")
    # Sorted 0.01, 0.02, 0.04 of three claims: 3 x 0.01, 2 x 0.02, and 0.04, which may not be below the one before.
    assert holm([0.04, nan, 0.01, 0.02]) == pytest.approx([0.04, nan, 0.03, 0.04], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_one_pair_is_no_interval():
    alone = Estimate.of([0.1])
    assert "one seed" in alone.text() and learning_tables.verdict(alone, alone.p) == "not known"


@pytest.mark.parametrize(
    "part, made",
    [
        ("from the rows", lambda: learning_report.generated_part(learning_tables.load(learning.RESULTS))),
        ("sensitivity", lambda: sensitivity.section(learning_tables.load(sensitivity.RESULTS))),
    ],
)
def test_the_page_is_made_of_the_rows(part, made):
    """Stale tables or sentences on the page would say something that the rows do not."""
    begin, end = learning_report.marks(part)
    page = learning_report.PAGE.read_text()
    assert page.split(begin)[1].split(end)[0].strip() == made().strip()
    assert learning_report.put(page, part, made()) == page


def sensitivity_file(path: Path) -> Path:
    lines = []
    for name, method in sensitivity.variants().items():
        for seed in range(3):
            named = {"task": "chain7", "method": name, **method.labels, "seed": seed}
            lines.append({**named, "event": "started"})
            final = 0.2 + 0.01 * seed + 0.001 * ((7 * len(name) + seed) % 11)
            lines.append({**named, "generated_tokens": 100, "final": final, "area": final / 2})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("real", [False, True])
def test_a_second_reader_finds_the_same_settings(real, tmp_path):
    """By `setting` and `value` of the lines, where the tables go by the names of runs."""
    file = sensitivity.RESULTS if real else sensitivity_file(tmp_path / "rows.jsonl")
    results = learning_tables.load(file)

    def found(setting: str, value: str, key: str) -> dict[int, float]:
        by_seed = {}
        for row in rows(file) if file.exists() else []:
            if (row["setting"], str(row["value"])) == (setting, value):
                by_seed = {**by_seed, row["seed"]: row.get(key)}
        return {seed: value for seed, value in by_seed.items() if value is not None}

    published, checked = {"ib_beta": "5.0", "ib_coef": "0.1", "step_noise": "0.0", "temperature": "1.0"}, 0
    published["shape"] = "(4, 9, 1, 1)"
    table = [line.strip("| ").split(" | ") for line in sensitivity.table(results, "chain7").splitlines()[2:]]
    base = {}
    for setting, value, count, *shown in table:
        setting = "shape" if setting.startswith("shape") else setting.strip("`")
        value = value.replace("infinite", "inf")
        is_published = published.get(setting) == value
        place = ("published", "published") if is_published else (setting, value)
        first = setting not in base
        base.setdefault(setting, place)
        for number, key in enumerate(("final", "area")):
            ours, theirs = found(*place, key), found(*base[setting], key)
            assert int(count) == len(ours)
            if len(ours) > 1:
                assert numbers(shown[number]) == pytest.approx(interval(ours.values()), abs=0.06)
            pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
            assert first == (shown[2 + number] == "-")
            if len(pairs) > 1 and not first:
                assert numbers(shown[2 + number]) == pytest.approx(interval(pairs), abs=0.06)
                checked += 1
        if not real:
            same = [
                row
                for row in sensitivity.rows(results, "chain7")
                if (row["setting"], row["value"]) == (setting, value)
            ]
            assert {row["seed"]: row["final"] for row in same} == found(*place, "final")
    assert real or checked == 2 * (len(table) - len(base))
    assert {*base} == {"ib_beta", "ib_coef", "step_noise", "temperature", "shape", "sibling_kappa"}


def test_settings_differ_from_the_published_ones_in_one_thing():
    for name, method in sensitivity.variants().items():
        assert method.leaves == 12
        changed = {key: value for key, value in method.settings.items() if (key, value) != ("advantage", "sibling")}
        assert len(changed) + (method.shape != (4, 9, 1, 1)) == (name != "published")


def test_the_plan_names_the_runs_that_are_planned():
    plan = (Path(learning.__file__).parent / "learning_plan.md").read_text()
    for method in {run.method for run in learning.planned()}:
        assert f"`{method}`" in plan


def test_a_plan_that_has_begun_keeps_its_order():
    """What is added comes later, so that what is done is a prefix of the same comparison."""
    stage = ("chain7", ["grpo_8", "confidence", "confidence_once", "confidence_sampled"], range(4))
    weights = [Run(stage[0], method, seed) for seed in stage[2] for method in stage[1]]
    begun = learning.planned()[:380]
    assert begun[:16] == weights
    digest = hashlib.sha256(repr([(run.task, run.method, run.seed) for run in begun]).encode()).hexdigest()
    assert digest.startswith("d8fb2ed080a734d3")
    assert {run.method for run in begun} == set(FIRST)


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory):
    task = replace(learning.QUICK, warm_steps=(2,), warm_rows=4)
    return task, task.warm_start(tmp_path_factory.mktemp("warm"))


@pytest.mark.parametrize("name", [name for name in METHODS if name not in FIRST])
def test_every_method_trains_on_a_batch(name, quick_start):
    from benchmarks.learning_run import make_trainer

    (task, warm), method = quick_start, METHODS[name]
    setting = Setting(budget=400, learning_rate=1e-3, questions=4, updates=1)
    trainer = make_trainer(task, method, 0, setting, warm)
    trainer.args.max_steps = 1
    seen = []

    def reward(completions, **kwargs):
        seen.extend(completions)
        return [float(place % 2) for place in range(len(seen) - len(completions), len(seen))]

    trainer.reward_funcs[0] = reward
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    assert trainer.args.num_generations == method.leaves
    assert len(seen) == 4 * (16 if "path_filter" in method.settings else method.leaves)
    assert method.leaves == method.group or method.leaves in (8, 12, 16)
    assert any(not value.equal(before[key]) for key, value in trainer.model.state_dict().items())
    logs = trainer.state.log_history[0]
    assert math.isfinite(logs["loss"]) and logs["grad_norm"] > 0
    assert ("tree/generated_tokens" in logs) == (not method.group)


@pytest.mark.parametrize(
    "name, called",
    {
        **{"treerl": "TreeRL", "treepo": "TreePO", "deep_grpo": "DEEP-GRPO", "tree_grpo": "Tree-GRPO"},
        **{"spo": "SPO-tree", "grpo_ibro": "IBRO", "independent_8": "GRPO"},
    }.items(),
)
def test_methods_of_other_papers_have_the_settings_of_the_documentation(name, called):
    page = (learning_report.ROOT / "docs" / "methods.md").read_text()
    (recipe,) = re.findall(rf"^\| {called} \| `(\{{.*\}})` \|$", page, re.MULTILINE)
    # A tree of another size, steps where the task has them, and no text that could mark an answer.
    scaled = re.compile("tree_|step_|answer_marker")
    settings = {key: value for key, value in json.loads(recipe).items() if not scaled.match(key)}
    assert METHODS[name].settings == settings


def test_the_same_seed_gives_the_same_run(tmp_path):
    from benchmarks.learning_run import run

    task = replace(learning.QUICK, warm_steps=(10,), warm_rows=8)
    setting = Setting(budget=1_000, learning_rate=1e-3, questions=8, checkpoints=2)

    def repeated(method: str, seed: int) -> list[dict]:
        found = run(task, METHODS[method], seed, setting, tmp_path, tmp_path / "log")
        return [{key: value for key, value in row.items() if "seconds" not in key} for row in found]

    once = repeated("grpo_8", 0)
    assert once == repeated("grpo_8", 0)
    assert [row["entropy"] for row in repeated("grpo_8", 1)[1:]] != [row["entropy"] for row in once[1:]]
    assert once[-1]["generated_tokens"] >= setting.budget > once[-2]["generated_tokens"]
    assert repeated("confidence_once", 0) == repeated("confidence_once", 0)


def test_columns_are_read_as_the_library_reads_numbers():
    from benchmarks.tasks import Columns

    task = Columns("sums", digits=3)
    rows = task.questions(400, seed=-2)
    for row in rows:
        first, op, second = (
            int("".join(str(column[place]) for column in row["columns"][::-1])) if place != 1 else row["columns"][0][1]
            for place in range(3)
        )
        assert int(row["answer"]) == (first + second if op == "+" else first - second)
    right, answers = [row["solution"] for row in rows], [row["answer"] for row in rows]
    assert task.reward(right, solution=right, answer=answers) == [1.0] * len(rows)
    assert sum(task.reward(right, solution=right, answer=answers[1:] + answers[:1])) < 5
    assert any(answer.startswith("-") for answer in answers) and any(len(answer) == 4 for answer in answers)
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in task.questions(400, seed=2)}

    by_hand = "c1 7 + 5 k0 2 k1 \n\n c2 4 + 1 k1 6 k0 \n\n c3 9 + 3 k0 2 k1"  # 947 + 315
    assert task.answer(by_hand) == "1262"
    assert task.answer("c1 7 - 9 k0 8 k1 \n\n c2 4 - 1 k1 2 k0 \n\n c3 1 - 3 k0 8 k1") == "-172"  # 147 - 319
    for wrong in ("", by_hand[:-1], by_hand + " \n\n c4", by_hand.replace("k1", "1"), by_hand.replace(" 6 ", " k0 ")):
        assert task.answer(wrong) == "" and task.reward([wrong], solution=[by_hand], answer=["1262"]) == [0.0]
    lucky = by_hand.replace("c2 4 + 1", "c2 3 + 2")
    assert task.answer(lucky) == "1262" and task.reward([lucky], solution=[by_hand], answer=["1262"]) == [0.0]


def test_quick_sampling_computes_what_the_model_computes():
    import torch
    from transformers import Qwen3ForCausalLM

    from benchmarks.sampling import QuickQwen3, _Step

    torch.manual_seed(0)
    tokenizer = learning.QUICK.tokenizer()
    model = learning.QUICK.model(tokenizer)
    quick = QuickQwen3(model.config)
    quick.load_state_dict(model.state_dict())
    ids, present = torch.randint(4, len(tokenizer), (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    present[0, :4] = present[2, :1] = False  # padded on the left
    step = _Step(quick, present)
    with torch.no_grad():
        ours = torch.stack([step(ids, 0, 7)] + [step(ids, place - 1, place) for place in range(8, 13)], 1)
        theirs = Qwen3ForCausalLM.forward(model, ids, attention_mask=present.long()).logits[:, 6:]
    assert (ours - theirs).abs().max() < 1e-5

    torch.manual_seed(1)
    sampled = quick.generate(ids, attention_mask=present.long(), max_new_tokens=40)
    assert (sampled[:, :12] == ids).all()
    for row in sampled[:, 12:].tolist():
        stop = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
        assert set(row[stop:]) <= {tokenizer.pad_token_id}
