"""What a loss is: `(out, batch) -> [B, T]` nats per token, unmasked and not yet divided by anything."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Array, Float


@dataclass(frozen=True)
class Loss(ABC):
    """A per-token loss and its settings; masks and divisions belong to `total`.

    local: its value at t depends on hidden states and batch entries at t alone, so that it may be cut along T
      (see `Chunked`).
    of_pairs: its value is of a pair of replies, and its term's mask `pair_mask`, which counts each pair once.
    reads: what it reads of every layer, of the student's `out.kept` and the teacher's: names among `lmx.nn.KEPT`.
    """

    local: ClassVar[bool] = True
    of_pairs: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def __call__(self, out: Any, batch: Mapping[str, Any]) -> Float[Array, "B T"]:
        """The loss of every token, float32, in nats.

        Args:
          out: what the model answers: `hidden` [B, T, D] and `logits` [B, T, V] float32, computed when read;
            `routing` of a model with experts: router `logits` [L, B, T, E] float32 and `top_k`.
          batch: arrays [B, T, ...]: `tokens`, `labels`, `loss_mask`, `positions`, `segment_ids`, ...
        """
