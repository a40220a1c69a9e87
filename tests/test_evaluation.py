"""avg@k and pass@k against counts made by hand, and runs that go on where they were stopped."""

import itertools
import json
import os
import random
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

os.environ["VLLM_CPU_CI_ENV"] = "1"  # a quick start rather than fast steps
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB

import digits
import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl.rewards import accuracy_reward

from trl_ibtpo.cli.main import main
from trl_ibtpo.engines.base import Rollout
from trl_ibtpo.evaluation import harness
from trl_ibtpo.evaluation.adapters import load_tokenizer
from trl_ibtpo.evaluation.estimates import estimate, pass_at_k, summarise
from trl_ibtpo.evaluation.questions import Grader, read_questions
from trl_ibtpo.evaluation.samples import (
    SamplesFile,
    SamplingSettings,
    as_applied,
    encode_prompts,
    free_share,
    sample,
)


@pytest.fixture(scope="module")
def guesser(tmp_path_factory) -> str:
    return digits.save_guesser(tmp_path_factory.mktemp("guesser"))


@pytest.fixture
def command(guesser, tmp_path):
    """The command line of an evaluation in `tmp_path`; further arguments win."""

    def build(*extra: str, engine="transformers", name="samples") -> list[str]:
        data = digits.write_rows(tmp_path / "data.jsonl")
        files = ["--samples", str(tmp_path / f"{name}.jsonl"), "--json", str(tmp_path / f"{name}.json")]
        sampling = ["--temperature", "1", "--top_k", "0", "--max_new_tokens", "4"]
        return ["evaluate", "--model", guesser, "--data", data, "--engine", engine, *sampling, *files, *extra]

    return build


def test_questions_are_put_into_the_chat_template(model_path):
    """As a user message, where the tokenizer has one and it is not left out."""
    settings = SamplingSettings(model_path, max_new_tokens=4)
    tokenizer = load_tokenizer(model_path)
    asked = as_applied(settings)
    assert asked.chat_template
    written = tokenizer.encode("<user>3 + 4<eos><assistant>", add_special_tokens=False)
    messages = [{"role": "user", "content": "3 + 4"}]
    assert encode_prompts(asked, ["3 + 4", messages]) == [written, written]
    plain = replace(settings, chat_template=False)
    assert encode_prompts(as_applied(plain), ["3 + 4"]) == [tokenizer("3 + 4")["input_ids"]]
    with pytest.raises(ValueError, match="chat messages, which need a chat template"):
        encode_prompts(plain, [messages])


def figures(path: Path) -> dict[str, float]:
    return {metric["name"]: metric["value"] for metric in json.loads(path.read_text())["metrics"]}


def count_by_hand(path: Path) -> np.ndarray:
    """Which completions are right, `(50, 4)`, by comparing texts."""
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    answers = [row["answer"] for row in digits.rows()]
    lines.sort(key=lambda line: line["index"])
    assert [line["index"] for line in lines] == list(range(50))
    assert {text for line in lines for text in line["completions"]} == set(digits.DIGITS)  # easy to compare
    return np.array(
        [[text.strip() == answer for text in line["completions"]] for line, answer in zip(lines, answers, strict=True)]
    )


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_figures_equal_a_hand_count(command, engine, tmp_path, capfd):
    arguments = command("--k", "1", "2", "4", engine=engine)
    assert main(arguments) == 0
    right = count_by_hand(tmp_path / "samples.jsonl")
    assert right.shape == (50, 4)
    assert right.mean() + 0.2 < right.any(axis=1).mean() < 0.9, "right sometimes, and not on the same questions"
    pairs = [[row[i] or row[j] for i, j in itertools.combinations(range(4), 2)] for row in right]
    expected = {
        "avg@4": right.sum() / 200,
        "pass@1": right.sum() / 200,
        "pass@2": np.mean(pairs),
        "pass@4": sum(any(row) for row in right) / 50,
    }
    found = figures(tmp_path / "samples.json")
    assert found == pytest.approx(expected, abs=1e-12)
    printed, said = capfd.readouterr()
    assert "50 questions" in printed
    assert f"{expected['avg@4']:.2%}" in printed and f"{expected['pass@4']:.2%}" in printed
    assert f"with {engine}" in said and said.index("Loading ") < said.index("Evaluating")
    assert f"Written: {tmp_path / 'samples.jsonl'}\nWritten: {tmp_path / 'samples.json'}\n" in said
    settings, first = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines()[:2])
    assert first["question"] == digits.rows()[first["index"]]["question"] and first["parsed"] == first["completions"]
    # One was asked for, and the tokenizer has none.
    assert settings["settings"]["chat_template"] is False
    assert json.loads((tmp_path / "samples.json").read_text())["settings"]["chat_template"] is False


def test_a_run_goes_on_where_it_was_stopped(command, guesser, tmp_path, capsys):
    assert main(command(name="whole")) == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    # Killed while the 21st question was being written.
    (tmp_path / "cut.jsonl").write_bytes(b"".join(lines[:21]) + lines[21][:30])
    assert main(command(name="cut")) == 0
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    assert (tmp_path / "cut.json").read_text() == (tmp_path / "whole.json").read_text()
    # Nothing is left to sample.
    assert main(command(name="cut")) == 0
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    assert f"50 of 50 questions come from {tmp_path / 'cut.jsonl'}" in capsys.readouterr().err
    assert main(command("--seed", "1", name="cut")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "cut.jsonl was made with other settings (seed: 0 there, 1 now)" in error
    assert (tmp_path / "cut.jsonl").read_bytes() == whole
    weights = Path(guesser) / "model.safetensors"
    before = weights.stat()
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # trained further, in the same folder
    assert main(command(name="cut")) == 1
    assert "cut.jsonl was made with other settings (model_files: " in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "cut.jsonl").read_bytes() == whole


class Lottery:
    """Continues a request with a number drawn from its seed, and ends requests in an order of its own."""

    max_length = None

    def __init__(self, clock, order):
        self.clock, self.random, self.waiting = clock, random.Random(order), []

    def submit(self, requests):
        assert not (self.waiting and self.clock == "polls"), "two questions in one batch"
        self.waiting += requests

    def poll(self):
        self.random.shuffle(self.waiting)
        count = len(self.waiting) if self.clock == "polls" else 1
        ended, self.waiting = self.waiting[:count], self.waiting[count:]
        return [Rollout(each.request_id, [*each.prefix_ids, each.seed], [0.0] * 2) for each in ended]


@pytest.mark.parametrize("clock", ["polls", "tokens"])
def test_completions_depend_on_the_settings_and_the_number_of_the_question(clock):
    settings = SamplingSettings("model", num_samples=3)
    prompts = {index: [index] for index in range(8)}
    found = [dict(sample(settings, prompts, Lottery(clock, order))) for order in range(3)]
    assert found[0] == found[1] == found[2]
    assert dict(sample(settings, {5: [5]}, Lottery(clock, 0))) == {5: found[0][5]}
    seeds = [token_ids[1] for completions in found[0].values() for token_ids in completions]
    assert len(set(seeds)) == 24


@pytest.fixture(scope="module")
def adapter(guesser, tmp_path_factory) -> str:
    """On top of the guesser, with other favourites."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(AutoModelForCausalLM.from_pretrained(guesser), settings).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_temperature_0_is_the_likeliest_continuation(command, engine, adapter, guesser, tmp_path):
    """Of an adapter, whose folder has no tokenizer."""
    arguments = ["--temperature", "0", "--k", "1", "--num_samples", "1", "--model", adapter]
    assert main(command(*arguments, engine=engine)) == 0
    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    base = AutoModelForCausalLM.from_pretrained(guesser)
    tokenizer = load_tokenizer(guesser)
    lines, others = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()[1:]], 0
    for line in lines:
        ids = tokenizer(digits.rows()[line["index"]]["question"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
            plain = base(ids).logits[0, -1]
        chosen = tokenizer(line["completions"][0])["input_ids"][0]
        # vLLM computes in bfloat16, whose numbers of this size are 1/32 apart.
        assert logits[chosen] > logits.max() - (0.04 if engine == "vllm" else 1e-4)
        others += plain.argmax().item() != chosen
    assert others > 10, "without the adapter other answers would be given"


def test_a_failure_of_vllm_is_its_cause_in_one_line(command, monkeypatch, capfd):
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    capfd.readouterr()
    assert main(command("--gpu_memory_utilization", "0.0001", engine="vllm")) == 1
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("trl-ibtpo evaluate: error: vLLM does not start with ")
    assert "memory" in lines[-1] and "See root cause above" not in lines[-1]
    assert "It was given 0.00 of the memory: --gpu_memory_utilization sets another share" in lines[-1]
    assert len(lines) < 10 and "Traceback" not in "".join(lines)


def test_memory_beside_other_things(monkeypatch):
    memory = SimpleNamespace(total=100, available=60)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: [(80, 100), (40, 80)][device])
    assert free_share(on_cpu=True) == pytest.approx(0.3)
    assert free_share(on_cpu=False) == pytest.approx(0.72)
    assert free_share(on_cpu=False, gpus=2) == pytest.approx(0.45)  # all take the same share


def test_tasks_of_the_harness(guesser, tmp_path, capsys):
    data = digits.write_rows(tmp_path / "data.jsonl")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "digits.yaml").write_text(
        "task: tiny_digits\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\n"
        "output_type: generate_until\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "target_delimiter: ''\n"
        'generation_kwargs: {until: ["\\n"]}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    arguments = ["evaluate", "--model", guesser, "--engine", "transformers", "--temperature", "1"]
    arguments += ["--top_k", "0", "--max_new_tokens", "4", "--k", "4", "--task", "tiny_digits"]
    arguments += ["--include_path", str(tmp_path / "tasks"), "--samples", str(tmp_path / "samples.jsonl")]
    assert main([*arguments, "--json", str(tmp_path / "whole.json")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()[1:]]
    answers = [row["answer"] for row in digits.rows()]
    right = np.array(
        [[text == answer for text, answer in zip(line["completions"], answers, strict=True)] for line in lines]
    )
    assert lines[0]["questions"] == [row["question"] for row in digits.rows()]
    assert lines[0]["parsed"] == lines[0]["completions"]
    assert right.shape == (4, 50)
    assert right.mean() + 0.2 < right.any(axis=0).mean() < 0.9
    expected = {"exact_match avg@4": right.mean(), "exact_match pass@4": right.any(axis=0).mean()}
    assert figures(tmp_path / "whole.json") == pytest.approx(expected, abs=1e-12)
    # Stopped in the third pass.
    content = (tmp_path / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "samples.jsonl").write_bytes(b"".join(content[:3]) + content[3][:50])
    assert main([*arguments, "--json", str(tmp_path / "resumed.json")]) == 0
    assert (tmp_path / "resumed.json").read_text() == (tmp_path / "whole.json").read_text()

    # A task file that changed asks or grades otherwise.
    task = tmp_path / "tasks" / "digits.yaml"
    task.write_text(task.read_text().replace("{{question}}", "{{question}} "))
    capsys.readouterr()
    assert main(arguments) == 1
    assert "samples.jsonl was made with other settings (task_files: " in capsys.readouterr().err.splitlines()[-1]
    # Only the whole corpus has a figure.
    task.write_text(
        task.read_text().replace("metric: exact_match, aggregation: mean", "metric: bleu, aggregation: bleu")
    )
    arguments[arguments.index("--samples") + 1] = str(tmp_path / "bleu.jsonl")
    assert main(arguments) == 1
    assert "gives no number for a question of 'tiny_digits'" in capsys.readouterr().err.splitlines()[-1]
    assert len((tmp_path / "bleu.jsonl").read_text().splitlines()) == 2, "found after one pass"

    arguments[arguments.index("transformers")] = "vllm"
    arguments[arguments.index("--samples") + 1] = str(tmp_path / "other.jsonl")
    assert main(arguments) == 1
    assert "Choose the engine transformers." in capsys.readouterr().err.splitlines()[-1]


def test_names_of_benchmarks(guesser, capsys):
    manager = harness._task_manager(None)
    assert set(harness.TASKS.values()) <= set(manager.all_tasks)
    with pytest.raises(ValueError, match=r"has no task 'no_such_task' there .*Short names: math_500, aime24"):
        harness._check_task(manager, "no_such_task")
    assert main(["evaluate", "--model", guesser, "--task", "amc23"]) == 1
    assert "no task 'amc23'. Give its questions and answers as a JSONL with --data" in capsys.readouterr().err


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    for n, k in [(4, 1), (4, 2), (4, 4), (7, 3)]:
        for c in range(n + 1):
            draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_interval_is_the_normal_one_over_questions():
    # Values 1, 0, 0.5, 0.5: mean 0.5, standard deviation sqrt(1/6), standard error sqrt(1/24).
    found = estimate("avg", [1, 0, 0.5, 0.5])
    assert (found.value, found.low, found.high) == pytest.approx(
        (0.5, 0.5 - 1.959964 * 24**-0.5, 0.5 + 1.959964 * 24**-0.5)
    )
    assert [(each.low, each.high) for each in summarise([[1, 1], [1, 1]], [2])] == [(1, 1), (1, 1)]
    assert (estimate("one", [0.5]).low, estimate("one", [0.5]).high) == (0, 1)


def test_values_between_0_and_1_have_no_pass_at_k():
    assert [each.name for each in summarise([[0.5, 1], [0, 1]], [1], prefix="f1 ")] == ["f1 avg@2"]


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("7", "so it is 7", 1),
        ("7", "so it is 8", 0),
        ("7", "", 0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1),
        (r"\frac{1}{2}", "I say $\\frac{2}{4}$.", 1),
        (r"\frac{1}{2}", "2", 0),
        (r"First 3, then \boxed{12}.", "The answer is 12", 1),
        ("She pays 70 and 2.\n#### 72", "72", 1),
        ("She pays 70 and 2.\n#### 72", "70", 0),
        ("1,000", r"\boxed{1000}", 1),
        ("(1, 2)", r"\boxed{(1,2)}", 1),
        ("B", r"\boxed{B}", 1),
        ("B", r"\boxed{C}", 0),
    ],
)
def test_grading(answer, completion, right):
    assert Grader(answer)(completion) == right


def test_figures_of_any_size_are_not_clipped():
    # Values 20 and 33: mean 26.5, standard error 6.5.
    found = estimate("chrf", [20.0, 33.0])
    assert (found.value, found.low, found.high) == pytest.approx((26.5, 26.5 - 1.959964 * 6.5, 26.5 + 1.959964 * 6.5))
    assert not found.share and estimate("f1", [0.5, 1.0]).share and not estimate("loss", [-4.4]).share
    with pytest.raises(ValueError, match="`k` is 0; it must be at least 1"):
        pass_at_k(4, 2, 0)


UNREADABLE = ["Answer: -12", "Tuesday", "yes", "no", "sin x", "ln 2", "2pi", "???", "x^", ""]
UNREADABLE += ["1e-3", "2.5e10", "2023-01-01", "1/2/2023", "10:30"]


@pytest.mark.parametrize("answer", UNREADABLE)
def test_answers_that_cannot_be_read_are_refused(answer):
    with pytest.raises(ValueError, match=f"math-verify cannot read the answer {re.escape(repr(answer))}"):
        Grader(answer)


def test_what_was_read():
    assert Grader("7").grade("so it is 7") == (1, "7")
    assert Grader("7").grade("no idea") == (0, None)
    assert Grader(r"Words before \boxed{x + y}").grade(r"\boxed{y+x}")[0] == 1
    assert Grader("3:2").grade(r"\boxed{\frac{3}{2}}")[0] == Grader("5 cm").grade(r"\boxed{5}")[0] == 1
    assert Grader(r"\text{Tuesday}").grade(r"\boxed{Tuesday}")[0] == Grader("2xy").grade("$2yx$")[0] == 1


def test_training_grades_as_the_docs_say():
    """Both tables of docs/evaluation.md, cell by cell."""
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    completions, answers = re.findall(r"^\|---\|---\|---\|\n((?:\|.*\n)+)", page.split("### How training")[1], re.M)[
        :2
    ]
    rows = [[cell.strip() for cell in row.strip("|\n").split("|")] for row in completions.splitlines()]
    assert len(rows) == 4
    for cell, here, in_training in rows:
        text = cell.strip("`")
        assert ["wrong", "right"][Grader("-12")(text)] == here
        assert {1.0: "right", 0.0: "wrong"}[accuracy_reward([[{"content": text}]], ["-12"])[0]] == in_training
    for cell, here, in_training in ([c.strip() for c in row.strip("|\n").split("|")] for row in answers.splitlines()):
        for answer in re.findall("`([^`]+)`", cell):
            if here.startswith("an error"):
                with pytest.raises(ValueError, match="cannot read"):
                    Grader(answer)
            else:
                Grader(answer)
            found = accuracy_reward([[{"content": r"\boxed{3}"}]], [answer])[0]
            assert (found is None) == in_training.startswith("not read")
    Grader(r"\text{yes}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no questions"),
        ('{"question": "a", "answer": "1"}\n{"question', r"line 2, is not JSON"),
        ("[1]", r"line 1, is a list; it must be an object"),
        ('{"question": "a"}', r"line 1, has none of the fields answer, solution \(it has: question\)"),
        ('{"text": "a", "answer": 1}', r"line 1, has none of the fields question, problem, prompt"),
        ('{"question": " ", "answer": 1}', r"line 1: the question is ' '"),
    ],
)
def test_bad_data_names_the_line(tmp_path, content, message):
    (tmp_path / "data.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "data.jsonl")


def test_fields_of_the_data(tmp_path):
    chat = [{"role": "user", "content": "b"}]
    lines = [{"problem": "a", "answer": 3}, {"prompt": chat, "solution": "4", "question": None}]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [(each.prompt, each.answer) for each in read_questions(tmp_path / "data.jsonl")] == [
        ("a", "3"),
        (chat, "4"),
    ]


def test_samples_file_refuses_what_is_not_one(tmp_path):
    (tmp_path / "file").write_text("hello\n")
    with pytest.raises(ValueError, match="is not a samples file"):
        SamplesFile(tmp_path / "file", {})
    (tmp_path / "file").write_text('{"question": "a file without a line feed"}')
    with pytest.raises(ValueError, match="is not a samples file"):
        SamplesFile(tmp_path / "file", {})
    assert "line feed" in (tmp_path / "file").read_text()
    # Cut within its first line: nothing is lost by starting again.
    (tmp_path / "file").write_text('{"settin')
    SamplesFile(tmp_path / "file", {"seed": 1}).append({"index": 0})
    assert (tmp_path / "file").read_text() == '{"settings": {"seed": 1}}\n{"index": 0}\n'
