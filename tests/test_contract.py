"""The hooks of TRL that this package overrides: still there, still the same, and named when they are not."""

import inspect

import pytest
from trl import GRPOTrainer

from trl_ibtpo import IBTPOTrainer
from trl_ibtpo.training import hooks

# What IBTPOTrainer and the classes it mixes in define themselves.
OURS = IBTPOTrainer.__mro__[: IBTPOTrainer.__mro__.index(GRPOTrainer)]
MINE = {name: value for each in OURS for name, value in vars(each).items()}


def test_installed_trl_has_every_hook():
    hooks.check_hooks(GRPOTrainer)


def test_overrides_keep_the_signature_of_trl():
    overridden = [name for name in hooks.HOOKS if name in MINE]
    assert {"_generate_and_score_completions", "_generate_single_turn", "_calculate_rewards"} <= set(overridden)
    for name in overridden:
        ours, theirs = (tuple(inspect.signature(getattr(c, name)).parameters) for c in (IBTPOTrainer, GRPOTrainer))
        assert ours == theirs, f"IBTPOTrainer.{name}({', '.join(ours)}) no longer matches TRL's ({', '.join(theirs)})."


def test_no_private_method_of_trl_is_overridden_by_accident():
    """A new TRL release may add a method whose name this package already uses."""
    meant = {*hooks.HOOKS, "train", "evaluate", "predict", "log", "create_model_card"}
    mine = {name for name, value in MINE.items() if callable(value) and not name.startswith("__")}
    clashes = {name for name in mine - meant if hasattr(GRPOTrainer, name)}
    assert not clashes, f"These names are TRL's too, and would replace its methods: {sorted(clashes)}."


def test_changed_hook_is_named_in_a_sentence():
    class Renamed(GRPOTrainer):
        def _calculate_rewards(self, inputs, prompts, completions):
            pass

    with pytest.raises(hooks.UnsupportedTRLError) as error:
        hooks.check_hooks(Renamed)
    message = str(error.value)
    assert (
        "changed `Renamed._calculate_rewards` from (self, inputs, prompts, completions, completion_ids_list)"
        in message
    )
    assert "to (self, inputs, prompts, completions)," in message and "pip install 'trl~=1.16.0'" in message


def test_missing_hook_is_named_in_a_sentence():
    class Other:
        pass

    with pytest.raises(hooks.UnsupportedTRLError, match=r"has no `Other\._generate_and_score_completions`"):
        hooks.check_hooks(Other)
