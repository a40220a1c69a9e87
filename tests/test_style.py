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


@pytest.mark.parametrize("module", ["steps", "tree", "scores", "branching", "advantages", "growth"])
def test_pure_floors_load_neither_torch_nor_trl(module):
    code = f"import sys, trl_ibtpo.{module}; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# A file may import from its own floor and those below it.
FLOORS = [
    {"steps", "tree", "time_limit"},
    {"scores", "branching", "advantages"},
    {
        "engines",
        "growth",
        "rewards",
        "packing",
        "shared_forward",
        "generation",
        "metrics",
        "drawing",
        "model_card",
        "compat",
        "checkpoints",
    },
    {"ibtpo_config", "ibtpo_trainer"},
    {"samples", "sampling", "treeview", "evaluation", "harness", "doctor", "cli", "commands", "__main__"},
]


def test_files_import_downwards_only():
    floor_of = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}
    for path in (ROOT / "trl_ibtpo").rglob("*.py"):
        relative = path.relative_to(ROOT / "trl_ibtpo")
        name = relative.parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        assert name in floor_of, f"{relative} has no floor; add it to FLOORS."
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(relative.parts):
                for target in [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]:
                    assert floor_of[target] <= floor_of[name], f"{relative} imports {target} from a floor above it."


def test_no_machine_paths_or_registry_addresses():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    words = re.compile("/ro" + "ot/|/wo" + "rk/|py" + r"pi\.org|python" + "hosted")
    for name in files:
        if (ROOT / name).is_file() and (ROOT / name).suffix not in (".png", ".gif"):
            found = words.search((ROOT / name).read_text(errors="replace"))
            assert not found, f"{name} contains {found.group()!r}."
