"""How captions are put to a text encoder, and which of its hidden states the flow sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """What training and drawing must do alike with captions.

    Attributes:
        hidden_layer: number of the hidden states: −1 is the encoder's last, behind its final norm; 0 are the
            embeddings, k the output of layer k, −2 that of the last layer but one, all without the final norm.
        prefix: put before each caption, the empty one too, as it is: end it with a space if it needs one.
        chat_template: put prefix and caption as a user's message into the tokenizer's chat template, with the beginning
            of an answer.
    """

    hidden_layer: int = -1
    prefix: str | None = None
    chat_template: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.hidden_layer, int) or isinstance(self.hidden_layer, bool):
            raise ValueError(f"hidden_layer must be a whole number such as -1 or -2, got {self.hidden_layer!r}")
        if not isinstance(self.prefix, str | None):
            raise ValueError(f"prefix must be a text or None, got {self.prefix!r}")
        if not isinstance(self.chat_template, bool):
            raise ValueError(f"chat_template must be true or false, got {self.chat_template!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self:
        """The options of a mapping, such as a pipeline's configuration has; None, of older ones, are the defaults.

        Raises:
            ValueError: for other names or values.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values or ()) - set(names)):
            raise ValueError(f"text_options has {unknown[0]!r}, which is none of {', '.join(names)}")
        return cls(**(values or {}))

    @property
    def changed(self) -> dict[str, Any]:
        """The options that are not the defaults, by name."""
        plain = type(self)()
        return {name: value for name, value in asdict(self).items() if value != getattr(plain, name)}

    def filled(self, tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> list[str]:
        """The texts that are put to the tokenizer."""
        texts = [f"{self.prefix or ''}{caption}" for caption in captions]
        if not self.chat_template:
            return texts
        return [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
