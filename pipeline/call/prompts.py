"""Captions of a call as the flow's condition."""

from __future__ import annotations

import torch
from torch import Tensor

from tarflow.pipeline.call.arguments import check_types
from tarflow.pipeline.call.aspect import check_aspect_ratio, fill_template
from tarflow.pipeline.call.checks import check_caption_options, check_counts, check_texts
from tarflow.pipeline.call.parts import PipelineParts
from tarflow.pipeline.text.encoding import encode_captions, warn_of_cuts
from tarflow.pipeline.text.options import TextOptions


def check_embeds(embeds: Tensor, name: str) -> None:
    """Whether encoded captions have three axes, and at least a row and a token."""
    if embeds.ndim != 3 or 0 in embeds.shape:
        raise ValueError(f"{name} must be (captions, tokens, numbers), none of them 0, got {tuple(embeds.shape)}")


class PromptEncoding(PipelineParts):
    """`TARFlowPipeline`'s way from texts to encoded captions."""

    @check_types
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        aspect_ratio: str = "1:1",
    ) -> tuple[Tensor, Tensor | None]:
        """Encoded captions and, with guidance, encoded negative ones, (B, L, E) each; B counts images.

        Args:
            prompt: one or several captions, or None with ``prompt_embeds``.
            device: of the result; where the pipeline computes if not given.
            num_images_per_prompt: each row is repeated so often.
            do_classifier_free_guidance: whether negative ones are wanted; else the second result is None.
            negative_prompt: one, or one for each caption; the empty caption if not given.
            prompt_embeds, negative_prompt_embeds: encoded captions (B, L, E) instead of texts, B counting captions.
            max_sequence_length: the pipeline's own if not given.
            aspect_ratio: for the caption's template.

        Raises:
            ValueError: for negative captions that are not as many, or texts without a text encoder.
        """
        device = self._execution_device if device is None else device
        check_counts("prefix", None, num_images_per_prompt)
        check_caption_options("prefix", max_sequence_length)
        check_aspect_ratio(aspect_ratio)
        check_texts("prompt", prompt)
        length = self.config.max_sequence_length if max_sequence_length is None else max_sequence_length
        if prompt_embeds is None:
            if prompt is None:
                raise ValueError("there is nothing to encode: give prompt or prompt_embeds")
            captions = [prompt] if isinstance(prompt, str) else prompt
            prompt_embeds = self.encoded_captions(captions, length, aspect_ratio, warn=True)
        else:
            check_embeds(prompt_embeds, "prompt_embeds")
            length = prompt_embeds.shape[1]  # the empty caption is to have as many tokens
        prompt_embeds = prompt_embeds.to(device)
        count = len(prompt_embeds)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)
        if not do_classifier_free_guidance:
            return prompt_embeds, None
        if negative_prompt_embeds is None:
            texts = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""]
            if len(texts) not in (1, count):
                raise ValueError(f"negative_prompt has {len(texts)} texts for {count} prompts; give one or as many")
            negative_prompt_embeds = self.encoded_captions(texts, length, aspect_ratio, warn=True)
        check_embeds(negative_prompt_embeds, "negative_prompt_embeds")
        negative_prompt_embeds = negative_prompt_embeds.to(device)
        if len(negative_prompt_embeds) not in (1, count):
            raise ValueError(f"negative_prompt_embeds has {len(negative_prompt_embeds)} rows for {count} prompts")
        if negative_prompt_embeds.shape[1:] != prompt_embeds.shape[1:]:
            found, expected = (tuple(embeds.shape[1:]) for embeds in (negative_prompt_embeds, prompt_embeds))
            raise ValueError(
                f"negative_prompt_embeds has {found} numbers a row, and prompt_embeds {expected}: encode both with one "
                "max_sequence_length"
            )
        negative_prompt_embeds = negative_prompt_embeds.expand(count, -1, -1)
        return prompt_embeds, negative_prompt_embeds.repeat_interleave(num_images_per_prompt, dim=0)

    def encoded_captions(
        self, captions: list[str], length: int | None = None, aspect_ratio: str = "1:1", warn: bool = False
    ) -> Tensor:
        """Captions in the pipeline's template, as hidden states of its text encoder (B, length, E).

        Args:
            length: tokens of a caption; the pipeline's own if not given.
            warn: of captions that are cut, as is wanted of a user's own, and not of each batch of data.

        Raises:
            ValueError: if there is no text encoder.
        """
        length = self.config.max_sequence_length if length is None else length
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("this pipeline has no text encoder: give prompt_embeds and negative_prompt_embeds")
        self.run_offload_hook(self.text_encoder)
        captions = fill_template(self.config.caption_template, captions, aspect_ratio)
        options = TextOptions.of(self.config.get("text_options"))
        embeds = encode_captions(self.text_encoder, self.tokenizer, captions, length, options, self._execution_device)
        if warn:
            warn_of_cuts(self.tokenizer, captions, length, options)
        return embeds
