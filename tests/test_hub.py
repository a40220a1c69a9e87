"""Pushed with the real client to a hub on this machine, then loaded by name in a process with an empty cache."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hub_server import HubServer

ROOT = Path(__file__).parent.parent
REPOS = ("tester/tiny-model", "tester/tiny-adapter", "tester/tiny-checkpoint")
PNG = b"\x89PNG"


def run_client(command: str, hub: HubServer, folder: Path) -> None:
    """A process of its own, since the client reads the endpoint when it is imported."""
    cache = folder / f"cache-{command}"
    cache.mkdir()
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/hub_client.py"), command, str(folder)],
        env=environment,
        cwd=cache,  # where no folder has the name of a repository
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    assert (cache / "hub/models--tester--tiny-base").is_dir()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder):
    """A hub to which a model, an adapter and a checkpoint were pushed while they were trained."""
    with HubServer() as hub:
        run_client("train", hub, folder)
        yield hub


@pytest.fixture(scope="module")
def findings(hub, folder) -> dict:
    run_client("load", hub, folder)
    return json.loads((folder / "findings.json").read_text())


@pytest.mark.parametrize("kind", ["model", "adapter", "checkpoint"])
def test_loaded_weights_are_the_trained_ones(findings, kind):
    assert findings[kind] and not findings["untrained"]


def test_loaded_adapter_generates(findings):
    assert 1 <= findings["generated"] <= 4


def test_training_resumes_from_the_pushed_checkpoint(findings):
    assert findings["resumed"] == [1, 2, 3]


def test_every_save_is_pushed(hub):
    for repo in REPOS:
        messages = [commit.message for commit in hub.repos[repo].commits]
        assert [message for message in messages if message.endswith(("step 1", "step 2"))] == [
            "Training in progress, step 1",
            "Training in progress, step 2",
        ]
    assert hub.repos["tester/tiny-adapter"].commits[-1].message == "End of training"
    assert "last-checkpoint/optimizer.pt" in hub.repos["tester/tiny-checkpoint"].files
    assert "model.safetensors" not in hub.repos["tester/tiny-adapter"].files


@pytest.mark.parametrize("repo", REPOS)
def test_card_and_pictures_are_in_every_push(hub, repo):
    pushes = [commit for commit in hub.repos[repo].commits if commit.message.endswith(("step 1", "step 2"))]
    for commit in pushes:
        card = commit.files["README.md"].decode()
        pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", card)
        assert pictures == ["figures/training_curves.png", "figures/tree.png"]
        assert all(commit.files[picture].startswith(PNG) for picture in pictures)
    assert pushes[0].files["figures/tree.png"] != pushes[1].files["figures/tree.png"]


@pytest.mark.parametrize("repo", REPOS)
def test_card_says_what_was_done(hub, findings, repo):
    card = hub.repos[repo].files["README.md"].decode()
    assert "2605.28109" in card and "Long Live The Balance" in card
    assert "[tester/tiny-base]" in card and "None" not in card.partition("### Rollout trees")[0]
    assert "| `tree_levels` | L | 9 |" in card and "| `num_generations` | G | 12 |" in card
    assert "| `success_reward` |  | even_length |" in card
    assert card.index("### Rollout trees") < card.index("### Framework versions") < card.index("## Citations")
    assert "What is" not in card  # prompts are not published
    assert "datasets:" not in card and tempfile.gettempdir() not in card  # nor are places on this machine

    metadata = findings["cards"][repo]
    assert {"ibtpo", "trl", "generated_from_trainer"} <= set(metadata["tags"])
    assert metadata["base_model"] == "tester/tiny-base"
    assert metadata["library_name"] == ("peft" if repo == "tester/tiny-adapter" else "transformers")


def test_hub_knew_every_request(hub, findings):
    assert hub.refused == []
