"""Tools and environments of one generation batch, as the host of its turns (`engines.turns`).

The tool calls of a turn go through TRL's own loop, one turn of one trajectory at a time: it executes them, makes text
of their errors, tokenizes the observation and decides whether it fits. Here is what trees add: the turns of different
trajectories are answered beside each other and beside generation, within limits, and a branch gets its environment as
it was at the end of its prefix.
"""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

from transformers.utils import logging
from trl import GRPOTrainer
from trl.chat_template_utils import parse_response

from ..engines.base import RolloutRequest
from .environments import EnvironmentFailed, Environments, close, same_prompt
from .time_limit import DaemonThreads, TooManyStuckCalls
from .tool_calls import NO_TOOL_IMAGES, OneIteration

logger = logging.get_logger(__name__)

# What TRL takes for the prompt of a row that leaves it to the environment.
NO_PROMPT = [{"role": "user", "content": ""}]


@dataclass
class Conversation:
    """What was said in one trajectory so far."""

    row: int
    budget: int  # completion tokens
    completion_ids: list[int] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)  # of the turns that are over, and what followed them
    turn_start: int = 0  # where in `completion_ids` the turn begins that is being sampled
    rounds: list["Round"] = field(default_factory=list)
    calls: int = 0
    failures: int = 0
    failed: bool = False  # its environment is broken


@dataclass(frozen=True)
class Round:
    """The tool calls of one turn, and what followed them."""

    before: int  # completion tokens before the observation
    messages: list[dict[str, Any]]  # the turn's, and those of its tools
    observation: list[int]
    calls: int
    failures: int
    state: Any  # of the environment afterwards, see `Environments.save`


class ToolHost:
    """Answers the turns of one generation batch.

    Args:
        trainer: TRL's, after it has reset the environments of the batch.
        prompts: as TRL has tokenized them, one per row.
        prompt_ids: their token ids.
        inputs: dataset rows, one per trajectory: G equal rows per tree, trees in order.
        leaves_per_tree: G.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        prompts: Sequence[Any],
        prompt_ids: Sequence[list[int]],
        inputs: Sequence[dict[str, Any]],
        leaves_per_tree: int,
    ):
        args = trainer.args
        self.conversations: dict[int, Conversation] = {}  # of each row
        self.restored = self.replayed = self.mismatches = self.timeouts = 0
        self.limit = trainer._limited_calls  # of all batches, so that what is stuck is counted over the run
        self.environments: Environments | None = None
        self._as_reset = list(trainer.environments or [])  # which TRL's tools are methods of
        if trainer.environments is not None:
            self.environments = Environments(trainer.environments, args.environment_branching, self.limit)
        self._trainer = trainer
        self._prompts, self._prompt_ids, self._inputs = prompts, prompt_ids, inputs
        self._leaves_per_tree = leaves_per_tree
        # Of each tree, what is known at the end of an observation: the completion so far to its rounds.
        self._moments: dict[int, dict[tuple[int, ...], list[Round]]] = {}
        self.tokenizing = threading.Lock()  # fast tokenizers cannot be set up by two threads at a time
        self._counting = threading.Lock()
        self.tasks: set[asyncio.Task] = set()
        self._discarded: set[int] = set()  # rows whose broken environment is closed
        self.stopped = False  # nothing may start any more
        self._threads = DaemonThreads(args.tool_concurrency, "tools")

    # ----- the host's side of `TurnEngine` ---------------------------------------------------------------------------

    def begin(self, request: RolloutRequest) -> Future[RolloutRequest] | None:
        tree, leaf = request.request_id
        row = tree * self._leaves_per_tree + leaf
        prefix = request.prefix_ids[len(self._prompt_ids[row]) :]
        rounds = self._rounds_before(tree, prefix)
        self.conversations[row] = Conversation(
            row,
            budget=len(prefix) + request.max_tokens,
            completion_ids=prefix,
            messages=[message for each in rounds for message in each.messages],
            turn_start=rounds[-1].before + len(rounds[-1].observation) if rounds else 0,
            rounds=rounds,
            calls=sum(each.calls for each in rounds),
            failures=sum(each.failures for each in rounds),
        )
        if self.environments is None or not rounds:
            return None
        return self._threads.submit(self._bring_about, self.conversations[row], request)

    def respond(self, request_id: tuple[int, int], token_ids: list[int]) -> Future[list[int] | None] | None:
        tree, leaf = request_id
        conversation = self.conversations[tree * self._leaves_per_tree + leaf]
        conversation.completion_ids += token_ids
        turn = conversation.completion_ids[conversation.turn_start :]
        so_far = self._prompt_ids[conversation.row] + conversation.completion_ids[: conversation.turn_start]
        with self.tokenizing:
            message = parse_response(
                self._trainer._tokenizer, turn, prefix=so_far, tools=self._tools_in_prompt(conversation.row)
            )
        conversation.messages.append(message)
        most = self._trainer.max_tool_calling_iterations
        if conversation.failed or not message.get("tool_calls") or len(conversation.rounds) >= most:
            return None
        return self._threads.submit(self._answer, conversation, message)

    def abort(self) -> None:
        self.stopped = True
        for task in list(self.tasks):
            self._trainer.async_loop.call_soon_threadsafe(task.cancel)
        self.close()

    def close(self) -> None:
        """End the threads and close what was copied; whoever makes a host closes it."""
        self._threads.close()
        self.limit.interrupt_stuck()
        if self.environments is not None:
            self.discard_broken()
            self.environments.close_copies()

    # ----- for the trainer -------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """What is logged, by metric."""
        counts = {}
        if self.environments is not None:
            counts = {
                "tree/restored": self.restored,
                "tree/replayed": self.replayed,
                "tree/replay_mismatch": self.mismatches,
            }
        if self.limit.seconds is not None:
            counts["tools/timeouts"] = self.timeouts
        return counts

    def failed_rows(self) -> set[int]:
        """Rows whose environment is broken."""
        return {row for row, conversation in self.conversations.items() if conversation.failed}

    def discard_broken(self) -> None:
        """Close environments that failed, and take them from those that TRL uses again."""
        for row in self.failed_rows() - self._discarded:
            self._discarded.add(row)
            broken = self._as_reset[row]
            pool = self._trainer._environment_pool[self._trainer._batch_environments[row]]
            pool[:] = [environment for environment in pool if environment is not broken]
            close(broken, self.limit)

    def completion(self, row: int) -> list[dict[str, Any]]:
        """The messages of a trajectory, which the caller may change."""
        return deepcopy(self.conversations[row].messages)

    # ----- in threads ------------------------------------------------------------------------------------------------

    def _answer(self, conversation: Conversation, message: dict[str, Any]) -> list[int] | None:
        """Execute the tool calls of a turn; the observation, or None where the trajectory ends here."""
        row, before = conversation.row, len(conversation.completion_ids)
        try:
            done = self._execute(conversation.row, message, conversation.completion_ids, conversation.budget)
            conversation.calls += done.calls
            conversation.failures += done.failures
            if not done.observation:  # too long for the budget
                return None
            state = None if self.environments is None else self.environments.save(row)
        except EnvironmentFailed as error:
            self._give_up(conversation, error)
            return None
        conversation.completion_ids += done.observation
        conversation.messages += done.messages[1:]
        conversation.turn_start = len(conversation.completion_ids)
        conversation.rounds = [*conversation.rounds, replace(done, before=before, state=state)]
        # Known before the first token of the observation is seen by growth.
        moments = self._moments.setdefault(row // self._leaves_per_tree, {})
        moments.setdefault(tuple(conversation.completion_ids), conversation.rounds)
        return done.observation

    def _bring_about(self, conversation: Conversation, request: RolloutRequest) -> RolloutRequest:
        """Give a branch its environment as it was at the end of its prefix."""
        row = conversation.row
        try:
            if self.environments.rung(row) != "replay":
                self.environments.restore(row, conversation.rounds[-1].state)
                self.count("restored")
                return request
            self.count("replayed")
            if self._replay(conversation):
                return request
            self.count("mismatches")
            observation = self.environments.reset(row, self._reset_arguments(row))
            if not same_prompt(self._prompts[row], self._inputs[row].get("prompt", NO_PROMPT), observation):
                raise EnvironmentFailed(
                    f"reset of {type(self.environments.instances[row]).__name__} gave another prompt for the same row"
                )
        except EnvironmentFailed as error:
            self._give_up(conversation, error)
        conversation.completion_ids, conversation.messages, conversation.rounds = [], [], []
        conversation.turn_start = conversation.calls = conversation.failures = 0
        question = self._prompt_ids[row]
        fork = min(request.fork, len(question))
        return replace(request, prefix_ids=question, max_tokens=conversation.budget, fork=fork)

    def _replay(self, conversation: Conversation) -> bool:
        """Execute the actions of a prefix once more; whether every observation is the same, token by token."""
        for each in conversation.rounds:
            recorded = [message for message in each.messages if message["role"] == "tool"]
            done = self._execute(
                conversation.row,
                deepcopy(each.messages[0]),
                conversation.completion_ids[: each.before],
                conversation.budget,
                recorded,
            )
            if done.observation != each.observation:
                return False
        return True

    def _execute(
        self,
        row: int,
        message: dict[str, Any],
        completion_ids: list[int],
        budget: int,
        recorded: list[dict[str, Any]] | None = None,
    ) -> Round:
        """One iteration of TRL's loop for one trajectory.

        Args:
            row: whose tools and environment.
            message: the turn, with its tool calls.
            completion_ids: up to the end of the turn.
            budget: completion tokens, the observation included.
            recorded: results of the same calls, which tools without state are not asked for again.
        """
        once = OneIteration(self, self._trainer, row, budget, recorded)
        messages = [message]
        try:
            _, _, (after,), _, calls, failures, _ = GRPOTrainer._tool_call_loop(
                once, [[]], [self._prompt_ids[row]], [list(completion_ids)], [messages], None, None, {}
            )
        except TooManyStuckCalls as error:
            raise RuntimeError(str(error)) from error
        except Exception:
            if not once.returned_image:
                raise
        if once.returned_image:
            raise ValueError(NO_TOOL_IMAGES)
        if once.environment_error is not None:
            raise EnvironmentFailed(once.environment_error)
        return Round(len(completion_ids), messages, after[len(completion_ids) :], calls, failures, None)

    def _give_up(self, conversation: Conversation, error: EnvironmentFailed) -> None:
        conversation.failed = True
        logger.warning(
            f"An environment failed: {error}. Its trajectory ends there and counts as unscored; the others go on."
        )

    def method(self, row: int, tool: Callable) -> Callable | None:
        """The method of the environment of `row` that TRL's `tool` is; None for a tool that is not the environment's.

        A branch may have another instance than TRL has taken the method from.
        """
        if not self._as_reset or getattr(tool, "__self__", None) is not self._as_reset[row]:
            return None
        return tool.__func__.__get__(self.environments.instances[row])

    # ----- small things ----------------------------------------------------------------------------------------------

    def _rounds_before(self, tree: int, prefix: list[int]) -> list[Round]:
        """The rounds of a prefix."""
        moments = self._moments.get(tree, {})
        for length in sorted({len(each) for each in list(moments)}, reverse=True):
            if length <= len(prefix) and (rounds := moments.get(tuple(prefix[:length]))) is not None:
                return rounds
        return []

    def _tools_in_prompt(self, row: int) -> list[Callable]:
        trainer = self._trainer
        if trainer.environment_factories is None:
            return trainer.tools
        return trainer._env_tools[trainer._batch_environments[row]]

    def _reset_arguments(self, row: int) -> dict[str, Any]:
        """What TRL resets an environment with."""
        left_out = {"environment"} if self._trainer._multi_environment else set()
        return {name: value for name, value in self._inputs[row].items() if name not in left_out}

    def count(self, what: str) -> None:
        with self._counting:
            setattr(self, what, getattr(self, what) + 1)
