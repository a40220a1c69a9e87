"""A tree of every recorded step, in the trackers that a run reports to; the scalars get there by `report_to` itself.

A page to look around in where a tracker shows HTML (Weights & Biases, Trackio), a picture in TensorBoard.
"""

import io
from typing import Any

from .drawing import draw_tree
from .page import page_of
from .records import Record


def show_in_trackers(trainer: Any, record: Record, step: int) -> None:
    """Send a tree to each tracker of `report_to` that can show it; called by the main process.

    Args:
        trainer: a trainer of transformers; its callbacks know TensorBoard's writer.
        record: the tree.
        step: of training.
    """
    trackers = trainer.args.report_to or []
    if "wandb" in trackers:
        import wandb

        if wandb.run is not None:  # as TRL does
            wandb.log({"tree": wandb.Html(page_of([record]), inject=False), "train/global_step": step})
    if "trackio" in trackers:
        import trackio

        if hasattr(trackio, "Html"):
            trackio.log({"tree": trackio.Html(page_of([record]), inject=False)}, step=step)
        else:
            trackio.log({"tree": trackio.Image(_pixels(record))}, step=step)
    for callback in trainer.callback_handler.callbacks if "tensorboard" in trackers else ():
        writer = getattr(callback, "tb_writer", None)
        if writer is not None:
            writer.add_image("tree", _pixels(record), step, dataformats="HWC")
            writer.flush()


def _pixels(record: Record) -> Any:
    """The picture as an array, `(height, width, 3)` of bytes."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    draw_tree(record).savefig(file, format="png", dpi=100)
    return np.asarray(Image.open(file).convert("RGB"))
