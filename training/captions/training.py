"""The training: features of all pictures once, then captions and projections by a contrastive loss (CLIP, Radford et
al., 2021, arXiv:2103.00020)."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, VisionTextDualEncoderModel

from tarflow.common.files import check_writable, replaced, write_json
from tarflow.common.progress import progress_bar, write_line
from tarflow.data.files import hash_of
from tarflow.evaluation.features.caption_ranks import CaptionScore, check_among, score_of
from tarflow.evaluation.features.extractors import hash_weights
from tarflow.pipeline.loading.device import best_device
from tarflow.training.captions.config import CaptionModelConfig
from tarflow.training.captions.model import caption_tokenizer, load_vision, make_model, pooled_features
from tarflow.training.captions.pairs import Pairs, open_pairs
from tarflow.training.loop.config import OptimConfig
from tarflow.training.loop.schedule import schedule_factor

FEATURES, REPORT = "features.safetensors", "caption_model.json"
#: The largest factor of cosines in the loss, which learns it, as of CLIP.
MAX_LOGIT_SCALE = 100.0


def train_captions(config: CaptionModelConfig) -> CaptionScore:
    """Train, write the model's folder, and return how held-out pictures find their captions.

    The folder has the model, its tokenizer and image processor in the forms of Transformers, the pictures' features,
    and ``caption_model.json`` with the result and the settings.

    Raises:
        ValueError: if settings, data and vision model do not fit.
    """
    folder = Path(config.output).expanduser()
    check_writable(folder, folder=True)
    check_unused(folder)
    torch.manual_seed(config.seed)
    vision, processor = load_vision(config.vision, config.image_size)  # first: a stream takes long to read
    train, held_out = open_pairs(config)
    check_among(2, len(set(held_out.first)))
    tokenizer = caption_tokenizer(
        (text for texts in train.captions for text in texts), config.vocab_size, config.max_length
    )
    model = make_model(vision, config, len(tokenizer))
    features = cached_features(folder / FEATURES, model.vision_model, processor, [train, held_out])
    (train, learned), (held_out, measured) = (
        readable(pairs, found) for pairs, found in zip((train, held_out), features, strict=True)
    )
    check_among(2, len(set(held_out.first)))
    learn(model, tokenizer, learned, train, config)
    score = measure(model, tokenizer, measured, held_out, config.among)
    write_model(folder, [model, tokenizer, processor])
    about = {"pictures": len(train.indices), "left_out": train.left_out, "held_out": dataclasses.asdict(score)}
    write_json(folder / REPORT, about | {"settings": dataclasses.asdict(config)}, nan_as_null=True)
    return score


def check_unused(folder: Path) -> None:
    """Whether a folder has no model but one of an earlier training, whose features are taken again.

    Raises:
        ValueError: if it has another one.
    """
    if (folder / "config.json").exists() and not (folder / REPORT).exists():
        raise ValueError(f"{str(folder)!r} has another model, which would be replaced: give another --output")


def write_model(folder: Path, parts: list[Any]) -> None:
    """Write parts of Transformers into a folder, each file whole or not at all."""
    with tempfile.TemporaryDirectory() as made:
        for part in parts:
            part.save_pretrained(made)
        for file in sorted(Path(made).iterdir()):
            with replaced(folder / file.name) as temporary:
                shutil.copyfile(file, temporary)


def cached_features(path: Path, vision: PreTrainedModel, processor: Any, splits: list[Pairs]) -> list[Tensor]:
    """Features (N, D) of the splits' pictures, from the file if it has those of the same pictures and weights; not a number
    where one cannot be read."""
    facts = [pairs.facts for pairs in splits]
    made_of = hash_of([repr(facts), repr(splits[0].images.config), repr(processor.to_dict()), hash_weights(vision)])
    if path.is_file():
        with suppress(SafetensorError), safe_open(path, "pt") as file:  # a damaged one is made anew
            if (file.metadata() or {}).get("made_of") == made_of:
                return [file.get_tensor(str(number)) for number in range(len(splits))]
    vision.to(best_device(), memory_format=torch.channels_last)  # twice as fast on CPUs
    found = [features_of(pairs, vision, processor) for pairs in splits]
    vision.to("cpu")  # where the small model of captions learns
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary:
        save_file({str(number): part for number, part in enumerate(found)}, temporary, {"made_of": made_of})
    return found


def features_of(pairs: Pairs, vision: PreTrainedModel, processor: Any, batch_size: int = 32) -> Tensor:
    """Features (N, D) of the pictures, on the CPU; not a number where one cannot be read.

    Raises:
        ValueError: if none can be read, or of one that cannot and must be.
    """
    rows: list[Tensor | None] = [None] * len(pairs.indices)
    walk = pairs.pictures()
    for _ in progress_bar(range(0, len(pairs.indices), batch_size), desc="features", unit="batch"):
        usable = {number: picture for number, picture in islice(walk, batch_size) if picture is not None}
        if usable:
            found = pooled_features(vision, processor, torch.stack(list(usable.values()))).cpu()
            for number, row in zip(usable, found, strict=True):
                rows[number] = row
    known = [row for row in rows if row is not None]
    if not known:
        raise ValueError(f"none of the {len(rows)} pictures of the split {pairs.images.split!r} can be read")
    return torch.stack([torch.full_like(known[0], torch.nan) if row is None else row for row in rows])


def readable(pairs: Pairs, features: Tensor) -> tuple[Pairs, Tensor]:
    """The pictures that could be read, with their features; how many could not is said."""
    good = ~features.isnan().any(1)
    if not good.all():
        write_line(f"{int((~good).sum())} unreadable images of the split {pairs.images.split!r} are left out")
    return pairs.only(good.tolist()), features[good]


def learn(
    model: VisionTextDualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Tensor,
    pairs: Pairs,
    config: CaptionModelConfig,
) -> None:
    """Train all but the vision model on the pictures' features (N, D)."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, config.lr, weight_decay=config.weight_decay)
    schedule = OptimConfig(lr=config.lr, warmup_steps=config.warmup_steps, min_lr_ratio=0.0)
    generator = torch.Generator().manual_seed(config.seed)
    names = {name: number for number, name in enumerate(dict.fromkeys(pairs.first))}
    concepts = torch.tensor([names[name] for name in pairs.first])
    model.train()
    model.vision_model.eval()
    batch = min(config.batch_size, len(features))
    for step in (bar := progress_bar(range(config.steps), desc="steps", unit="step")):
        chosen = torch.randperm(len(features), generator=generator)[:batch]
        which = torch.rand(batch, generator=generator).tolist()
        texts = [
            pairs.captions[i][int(w * len(pairs.captions[i]))] for i, w in zip(chosen.tolist(), which, strict=True)
        ]
        pictures = model.visual_projection(F.dropout(features[chosen], config.dropout))
        loss = contrastive_loss(pictures, embed(model, tokenizer, texts), model.logit_scale.exp(), concepts[chosen])
        for group in optimizer.param_groups:
            group["lr"] = config.lr * schedule_factor(step, config.steps, config.warmup_steps, schedule)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=torch.tensor(MAX_LOGIT_SCALE).log())
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def embed(model: VisionTextDualEncoderModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Tensor:
    """Embeddings (B, D) of captions."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    output: Tensor = model.get_text_features(tokens["input_ids"], tokens["attention_mask"]).pooler_output
    return output


def contrastive_loss(pictures: Tensor, captions: Tensor, scale: Tensor, concepts: Tensor) -> Tensor:
    """Cross-entropy of each picture's captions among all of the batch, and of each caption's pictures.

    Args:
        pictures, captions: (B, D).
        scale: of cosines.
        concepts: (B,) int64; pictures of one concept have each other's captions too, as in other styles.
    """
    logits = scale * F.normalize(pictures, dim=1) @ F.normalize(captions, dim=1).T  # (B, B)
    same = (concepts[:, None] == concepts[None]).to(logits.dtype)
    targets = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


@torch.no_grad()
def measure(
    model: VisionTextDualEncoderModel,
    tokenizer: PreTrainedTokenizerBase,
    features: Tensor,
    pairs: Pairs,
    among: int,
) -> CaptionScore:
    """How pictures with the features (N, D) find their first captions."""
    distinct = list(dict.fromkeys(pairs.first))
    place = {caption: number for number, caption in enumerate(distinct)}
    own = torch.tensor([place[caption] for caption in pairs.first])
    captions = torch.cat([embed(model, tokenizer, distinct[i : i + 256]) for i in range(0, len(distinct), 256)])
    return score_of(model.visual_projection(features), captions, own, min(among, len(distinct)))
