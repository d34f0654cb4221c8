"""Token ids of captions, made once for each caption of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tarflow.pipeline.text.encoding import token_ids
from tarflow.pipeline.text.options import TextOptions


class CaptionTokens:
    """`token_ids` with a memory: a tokenizer takes longer than a step of a small model.

    Args:
        tokenizer, max_length, options: as of `token_ids`.
        most_bytes: of what is remembered; captions beyond that are tokenized anew each time.
    """

    def __init__(self, tokenizer: Any, max_length: int, options: TextOptions | None = None, most_bytes: int = 2**26):
        self.tokenizer, self.max_length, self.options = tokenizer, max_length, options
        self.most = most_bytes // (5 * max_length)
        self.places: dict[str, int] = {}
        self.ids = torch.empty(0, max_length, dtype=torch.int32)
        self.mask = torch.empty(0, max_length, dtype=torch.bool)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask (B, max_length), int64 on the CPU."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.places]
        if len(self.places) + len(new) > self.most:
            return token_ids(self.tokenizer, list(captions), self.max_length, self.options)
        if new:
            self.remember(new)
        rows = torch.tensor([self.places[caption] for caption in captions], dtype=torch.int64)
        return self.ids[rows].long(), self.mask[rows].long()

    def remember(self, captions: list[str]) -> None:
        ids, mask = token_ids(self.tokenizer, captions, self.max_length, self.options)
        first = len(self.places)
        while len(self.ids) < first + len(captions):  # twice as large each time, so that each row is copied twice or so
            room = max(64, len(self.ids))
            self.ids = torch.cat([self.ids, self.ids.new_empty(room, self.max_length)])
            self.mask = torch.cat([self.mask, self.mask.new_empty(room, self.max_length)])
        self.ids[first : first + len(captions)], self.mask[first : first + len(captions)] = ids.int(), mask.bool()
        self.places |= {caption: first + row for row, caption in enumerate(captions)}
