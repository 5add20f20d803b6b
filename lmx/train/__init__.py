"""Training: one state, one step, one loop."""

from lmx.train.load import Load
from lmx.train.loop import Session, cache_folder, metric_names, session, steps
from lmx.train.program import Program, batch_shapes
from lmx.train.state import State, new_state
from lmx.train.step import Enrich, Reference, train_step
from lmx.train.teacher import Teacher, Teachers

__all__ = [
    "Enrich",
    "Load",
    "Program",
    "Reference",
    "Session",
    "State",
    "Teacher",
    "Teachers",
    "batch_shapes",
    "cache_folder",
    "metric_names",
    "new_state",
    "session",
    "steps",
    "train_step",
]
