"""Settings of a model of pictures and captions."""

# Annotations are types here, not texts: the parser reads them.
from dataclasses import dataclass, field
from typing import Annotated

from tarflow.common.checks import AtLeastOne, BelowOne, NotNegative, Positive, at_least, check_ranges
from tarflow.data.config import DataConfig


@dataclass(frozen=True, kw_only=True)
class CaptionModelConfig:
    """What to train.

    Attributes:
        data: real pictures with captions, never samples. ``validation_fraction`` of them is held out, and all others
            whose first caption, or a column of ``concept``, is that of one that is held out are not trained on either.
        vision: folder or hub id of a vision model of Transformers with pooled features, such as
            "google/mobilenet_v2_1.0_224"; it stays as it is.
        output: folder of the model, which has its features too: the same pictures are not read again.
        num_images: how many training pictures, from the first on; None takes all, of a stream too, of which captions
            and features are held in memory.
        num_validation_images: how many held-out pictures, likewise.
        concept: columns of ``metadata.jsonl``, or of a stream, that say what a picture shows, whatever its style: [text, emoji].
        remove: a regular expression; what it finds in captions is left out, for example ", \\w+ style$".
        image_size: side that pictures are brought to for the vision model; None is its own. Smaller ones are faster.
        width: numbers of a token in the Transformer that reads captions, BERT's.
        layers: of that Transformer.
        heads: of its attention.
        vocab_size: of its tokens, byte pairs that the captions give.
        max_length: of captions, in tokens; longer ones are cut.
        projection: numbers of an embedding.
        dropout: in the Transformer and of the picture's features.
        steps: optimizer steps, of AdamW.
        batch_size: pictures of a step.
        lr: the peak, after the warm-up; a cosine takes it down to 0.
        warmup_steps: of the warm-up.
        weight_decay: of AdamW.
        among: of how many captions the right one of a held-out picture is to be found; fewer if there are fewer.
        seed: of weights and batches.
    """

    data: DataConfig
    vision: str
    output: str = "runs/captions"
    num_images: AtLeastOne | None = None
    num_validation_images: AtLeastOne | None = None
    concept: list[str] = field(default_factory=list)
    remove: str | None = None
    image_size: AtLeastOne | None = None
    width: AtLeastOne = 128
    layers: AtLeastOne = 1
    heads: AtLeastOne = 4
    vocab_size: Annotated[int, at_least(10)] = 4000
    max_length: Annotated[int, at_least(4)] = 32
    projection: AtLeastOne = 128
    dropout: BelowOne = 0.2
    steps: AtLeastOne = 1500
    batch_size: Annotated[int, at_least(2)] = 512
    lr: Positive = 1e-3
    warmup_steps: AtLeastOne = 50
    weight_decay: NotNegative = 0.1
    among: Annotated[int, at_least(2)] = 100
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")
