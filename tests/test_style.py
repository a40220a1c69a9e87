"""ruff, and what ruff does not know: which floor imports which, and that the package speaks of itself alone."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_pure_floors_load_neither_torch_nor_trl():
    modules = [
        "steps",
        "tree",
        "scores",
        "values",
        "weights",
        "forks",
        "pivot",
        "branching",
        "budget",
        "advantages",
        "grown_tree",
        "tree_grower",
        "growth",
        "segments",
        "paths",
        "config_checks",
    ]
    code = (
        f"import importlib, sys\nfor name in {modules}:\n    importlib.import_module(f'trl_ibtpo.{{name}}')\n"
        "    print(name, *(other for other in ('torch', 'trl', 'transformers') if other in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split("\n") == [*modules, ""]


# From the bottom up: a file imports from floors below its own, and no two files import each other.
FLOORS = [
    [
        "steps",
        "tree",
        "budget",
        "i2b_lpo",
        "engines/base",
        "training/time_limit",
        "training/group_statistics",
        "training/hooks",
        "training/regularization",
        "training/teacher_forcing",
        "prefix_sharing/trie",
        "viewing/lines",
        "training/reward_checks",
        "training/generation_checks",
        "training/step_check",
        "latents/noise",
        "latents/strength",
    ],
    [
        "scores",
        "values",
        "weights",
        "forks",
        "prefix_sharing/attention",
        "prefix_sharing/comparison",
        "evaluation/estimates",
        "evaluation/adapters",
        "training/checkpoints",
        "training/reward_calls",
        "training/success",
        "training/dataset_checks",
        "training/model_checks",
        "training/environments",
        "training/tool_calls",
        "latents/injection",
        "latents/prior",
        "latents/vllm",
    ],
    ["pivot"],
    ["branching", "advantages", "prefix_sharing/trainer_mixin", "latents/attention", "latents/logits"],
    ["grown_tree", "config_checks", "latents/proof", "latents/training"],
    ["tree_grower", "paths", "latents/source"],
    ["growth", "segments"],
    ["viewing/records"],
    ["viewing/drawing", "viewing/reading"],
    ["viewing/text", "viewing/library"],
    ["viewing/page"],
    ["viewing/trackers", "viewing/server"],
    ["viewing/recorder"],
    [
        *("engines/transformers", "engines/vllm", "engines/vllm_server", "engines/vllm_cpu", "engines/entropies"),
        "engines/routed",
        "engines/turns",
        "ibtpo_config",
    ],
    [
        *("training/rewards", "training/checks", "training/metrics", "training/model_card", "evaluation/samples"),
        *("training/completions_table", "training/progress", "training/path_filter", "training/latent_branches"),
    ],
    ["training/tools", "training/policy_engine"],
    ["training/reports", "training/generation", "evaluation/questions", "evaluation/harness"],
    ["ibtpo_trainer"],
    ["cli/common"],
    ["cli/train", "cli/evaluate", "cli/tree", "cli/view", "cli/doctor", "cli/latents"],
    ["cli/main"],
    ["__main__"],
]


def test_a_file_imports_from_the_floors_below_it():
    package = ROOT / "trl_ibtpo"
    floor_of = {module: number for number, modules in enumerate(FLOORS) for module in modules}
    for path in package.rglob("*.py"):
        name = path.relative_to(package).with_suffix("").as_posix()
        if path.name == "__init__.py":
            continue
        assert name in floor_of, f"{name} has no floor; add it to FLOORS."
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = path.parents[node.level - 1]
                module = base.joinpath(*(node.module or "").split("."))
                targets = [module] if module.with_suffix(".py").is_file() else [module / a.name for a in node.names]
                for target in targets:
                    if target.with_suffix(".py").is_file():
                        below = target.relative_to(package).as_posix()
                        assert floor_of[below] < floor_of[name], f"{name} imports {below}, which is not below it."


def test_no_machine_paths_or_registry_addresses():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = re.compile("/ro" + "ot/|/wo" + "rk/|py" + r"pi\.org|python" + "hosted")
    for name in files:
        if (ROOT / name).is_file() and (ROOT / name).suffix not in (".png", ".gif"):
            found = words.search((ROOT / name).read_text(errors="replace"))
            assert not found, f"{name} contains {found.group()!r}."
