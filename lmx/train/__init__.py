"""Training: one state, one step, one loop."""

from lmx.train.loop import Session, cache_folder, session, steps
from lmx.train.program import Program, batch_shapes
from lmx.train.state import State, new_state
from lmx.train.step import Enrich, train_step

__all__ = [
    "Enrich",
    "Program",
    "Session",
    "State",
    "batch_shapes",
    "cache_folder",
    "new_state",
    "session",
    "steps",
    "train_step",
]
