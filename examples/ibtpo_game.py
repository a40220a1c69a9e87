"""Train a model to play Rush Hour with IB-TPO: boards of reasoning-gym, one move a turn, and trees over turns.

One GPU, vLLM beside the training in the same process (no dataset is downloaded, boards come with reasoning-gym):

    python examples/ibtpo_game.py --config examples/recipes/agent_qwen3_0.6b.yaml --max_tool_calling_iterations 12

Several GPUs, each with its own vLLM engine:

    accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/ibtpo_game.py \
        --config examples/recipes/agent_qwen3_0.6b.yaml --max_tool_calling_iterations 12

The environment has snapshots, so a branch goes on from the board that its prefix had reached. Every field of
IBTPOConfig and ModelConfig is a flag. The model's chat template must render tools, as that of Qwen3 does; see
docs/agents.md.
"""

import copy
from dataclasses import dataclass, field

import reasoning_gym
from datasets import Dataset
from reasoning_gym.games.rush_hour import Board
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from trl_ibtpo import IBTPOConfig, IBTPOTrainer

RULES = (
    "Bring the car A to the right edge of its row. Vehicles move along their length; x is a wall. Move step by step."
)


class RushHour:
    """A board and the moves that were made on it."""

    def reset(self, board: str, **kwargs) -> str:
        self.board = Board(board)
        return "\n\n" + self.board.board_str()

    def move(self, vehicle: str, steps: int) -> str:
        """
        Move a vehicle and look at the board.

        Args:
            vehicle: Its letter.
            steps: To the right or down; negative to the left or up. At most 4.
        """
        if len(vehicle) != 1 or vehicle not in str(self.board) or vehicle in ".x" or not -4 <= steps <= 4:
            raise ValueError("name a vehicle that is on the board and at most 4 steps")
        self.board.move(vehicle, steps)
        return "Solved." if self.board.solved else self.board.board_str()

    def get_reward(self) -> float:
        return float(self.board.solved)

    def _snapshot(self) -> Board:
        return copy.deepcopy(self.board)

    def _restore(self, state: Board) -> None:
        self.board = copy.deepcopy(state)


@dataclass
class TaskArguments:
    """How hard the boards are."""

    task_size: int = field(default=10_000, metadata={"help": "Training boards."})
    max_moves: int = field(default=8, metadata={"help": "Moves that the shortest solution of a board may take."})


def main(task_args: TaskArguments, training_args: IBTPOConfig, model_args: ModelConfig) -> None:
    task = reasoning_gym.create_dataset("rush_hour", size=task_args.task_size, seed=0, max_moves=task_args.max_moves)
    prompt = [{"role": "user", "content": RULES}]
    rows = [{"prompt": prompt, "board": entry["metadata"]["board_config"]} for entry in task]
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = IBTPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=Dataset.from_list(rows),
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        environment_factory=RushHour,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)


if __name__ == "__main__":
    main(*TrlParser((TaskArguments, IBTPOConfig, ModelConfig)).parse_args_and_config())
