"""Settings of a training run: nested frozen dataclasses, filled from YAML and the command line, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tarflow.common.checks import check
from tarflow.data.config import DataConfig
from tarflow.pipeline.text.options import TextOptions
from tarflow.training.flow.joint_config import JointConfig, check_joint
from tarflow.training.flow.lora_config import LoraConfig, check_lora


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """The autoencoder.

    Attributes:
        name: a shipped one ("drawings_emoji_f8c8"), a folder, a hub id, "new" (one of `JointConfig`'s arguments), or
            "none" (or null) to model pixels.
        subfolder: where in the folder or hub id it lies, for example "vae".
        measure_images: how many training pictures the latents' mean and standard deviation are measured on; 0 leaves
            latents as the autoencoder's own scaling factor makes them.
        sample_posterior: train on draws from the autoencoder's posterior, or else on its means. An autoencoder with a
            constant posterior deviation is as noisy as that; ``train.noise_std`` comes on top. For frozen ones.
        train: "frozen", or "joint" to train it along with the flow, see `JointConfig`.
    """

    name: str | None = "drawings_emoji_f8c8"
    subfolder: str | None = None
    measure_images: int = 1024
    sample_posterior: bool = True
    train: Literal["frozen", "joint"] = "frozen"

    def __post_init__(self) -> None:
        check(self.measure_images >= 0, f"vae.measure_images must be 0 (off) or positive, got {self.measure_images}")

    @property
    def pixels(self) -> bool:
        """Whether the flow models pixels."""
        return self.name in (None, "none")


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder; ``kind`` "none" for class-conditional and unconditional models.

    Attributes:
        kind: "none"; "pretrained" (frozen, by ``name``: a folder or hub id of any text encoder or decoder-only language
            model of Transformers, see `load_text_encoder`); "small" (a T5 encoder of the sizes below, trained from
            scratch with the flow, with a tokenizer made of the training captions).
        subfolder, tokenizer_subfolder: where in ``name`` a pretrained encoder and its tokenizer are; without the second
            the tokenizer is looked for in the same subfolder, in ``tokenizer`` beside ``text_encoder``, and in ``name``.
        max_length: captions are padded or cut to this many tokens.
        hidden_layer, prefix, chat_template: of a pretrained encoder, see `TextOptions`.
        vocab_size: of the small encoder's tokenizer.
        shard: with FSDP, divide a pretrained encoder's weights among the processes too.
        vocab_captions: how many captions the tokenizer is made of.
        unit: what a token of the small tokenizer is: "word", or "bpe" for open vocabularies.
    """

    kind: Literal["none", "small", "pretrained"] = "none"
    name: str | None = None
    subfolder: str | None = None
    tokenizer_subfolder: str | None = None
    max_length: int = 16
    hidden_layer: int = -1
    prefix: str | None = None
    chat_template: bool = False
    vocab_size: int = 4000
    vocab_captions: int = 4000
    unit: Literal["word", "bpe"] = "word"
    width: int = 64
    layers: int = 2
    heads: int = 4
    shard: bool = False

    def __post_init__(self) -> None:
        check(not self.shard or self.kind == "pretrained", "text.shard is for text.kind 'pretrained', a frozen encoder")
        if self.kind == "pretrained":
            check(self.name is not None, "text.kind is 'pretrained', so text.name must be a folder or hub id")
        else:
            given = {**self.options.changed, "tokenizer_subfolder": self.tokenizer_subfolder}
            for name, value in given.items():
                check(value is None, f"text.{name} is for text.kind 'pretrained', but text.kind is {self.kind!r}")
        for name in ("max_length", "vocab_size", "vocab_captions", "width", "layers", "heads"):
            check(getattr(self, name) >= 1, f"text.{name} must be at least 1, got {getattr(self, name)}")
        check(self.width % self.heads == 0, f"text.heads ({self.heads}) must divide text.width ({self.width})")

    @property
    def options(self) -> TextOptions:
        """What drawing must do alike."""
        return TextOptions(hidden_layer=self.hidden_layer, prefix=self.prefix, chat_template=self.chat_template)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and then a schedule; gradients clipped by their norm.

    Attributes:
        lr: the peak; ``denoiser_lr`` is that of a learned denoiser, an optimizer group of its own, clipped by itself.
        lr_scaling: what both are multiplied by: "none", 1; "linear", the pictures of one step over
            ``reference_batch``; "sqrt", its square root.
        schedule: after the warm-up "cosine", down to ``min_lr_ratio`` of the peak at the last step, or "constant".
        warmup_steps: of the warm-up; ``warmup_images`` gives it in pictures instead.
        max_grad_norm: gradients of a larger norm are scaled down to it.
        skip_grad_norm: steps with a larger norm are left out, counted and logged; None leaves none out.
    """

    lr: float = 1e-3
    denoiser_lr: float = 1e-4
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    reference_batch: int = 256
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 100
    warmup_images: int | None = None
    min_lr_ratio: float = 0.01
    max_grad_norm: float = 1.0
    skip_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "denoiser_lr", "max_grad_norm"):
            check(getattr(self, name) > 0, f"optim.{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_steps"):
            check(getattr(self, name) >= 0, f"optim.{name} must be 0 or positive, got {getattr(self, name)}")
        check(all(0 <= b < 1 for b in self.betas), f"optim.betas must be in [0, 1), got {self.betas}")
        check(0 <= self.min_lr_ratio <= 1, f"optim.min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        check(self.reference_batch >= 1, f"optim.reference_batch must be at least 1, got {self.reference_batch}")
        if self.warmup_images is not None:
            check(self.warmup_images >= 0, f"optim.warmup_images must be 0 or positive, got {self.warmup_images}")
        if self.skip_grad_norm is not None:
            check(self.skip_grad_norm > 0, f"optim.skip_grad_norm must be positive, got {self.skip_grad_norm}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: optimizer steps; ``images`` gives them in pictures instead. ``max_minutes`` lowers them, from the
            measured speed, so that the training takes about as long (the schedule then ends there; resuming keeps the
            checkpoint's number).
        batch_size: pictures of one process in one forward pass; gradients of ``accumulation`` passes are added.
        noise: "gaussian", added with standard deviation ``noise_std`` (σ), or "uniform", which makes real numbers of
            8-bit pixels for likelihoods in bits per dimension, and leaves σ unused.
        drop_rate: share of conditions replaced by "none", which guidance needs.
        latent_norm_weight: weight of a penalty, the sum of the mean squares of all blocks' outputs but the last's;
            0 is off.
        mixed_precision: "no", "bf16" or "fp16".
        compile: compile the Transformer layers (`torch.compile`); the first steps take minutes, the others less time.
        checkpointing: activations that are computed again in the backward pass to save memory: "none", of each
            "block", of each "layer" (with ``checkpointing_every`` only of every so many layers), or "both"; or
            "reversible", for coupling blocks, all of them, from the last output.
        ema_decay: of the averaged weights that are evaluated and saved; averages with ``more_ema_decays`` are kept,
            evaluated at the end and saved beside them.
        max_bad_steps: so many losses in a row that are not finite are skipped before training stops.
        seed: of weights, noise and drops.
    """

    steps: int = 10000
    images: int | None = None
    max_minutes: float | None = None
    batch_size: int = 64
    accumulation: int = 1
    noise: Literal["gaussian", "uniform"] = "gaussian"
    noise_std: float = 0.3
    drop_rate: float = 0.1
    latent_norm_weight: float = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "bf16"
    compile: bool = False
    checkpointing: Literal["none", "block", "layer", "both", "reversible"] = "none"
    checkpointing_every: int = 1
    ema_decay: float = 0.9999
    more_ema_decays: list[float] = field(default_factory=list)
    max_bad_steps: int = 5
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "checkpointing_every", "max_bad_steps"):
            check(getattr(self, name) >= 1, f"train.{name} must be at least 1, got {getattr(self, name)}")
        check(self.images is None or self.images >= 1, f"train.images must be at least 1, got {self.images}")
        if self.max_minutes is not None:
            check(self.max_minutes > 0, f"train.max_minutes must be positive, got {self.max_minutes}")
        for name in ("noise_std", "latent_norm_weight", "num_workers"):
            check(getattr(self, name) >= 0, f"train.{name} must be 0 or positive, got {getattr(self, name)}")
        check(0 <= self.drop_rate <= 1, f"train.drop_rate must be in [0, 1], got {self.drop_rate}")
        check(
            self.checkpointing_every == 1 or self.checkpointing in ("layer", "both"),
            f"train.checkpointing_every is for checkpointing 'layer' and 'both', not {self.checkpointing!r}",
        )
        for decay in self.ema_decays:
            check(0 <= decay < 1, f"train.ema_decay and more_ema_decays must be in [0, 1), got {decay}")
        check(len(set(self.ema_decays)) == len(self.ema_decays), f"EMA decays must differ, got {self.ema_decays}")

    @property
    def ema_decays(self) -> list[float]:
        return [self.ema_decay, *self.more_ema_decays]


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training; 0 turns an interval off.

    Attributes:
        trackers: names of Accelerate trackers.
        log_every: steps between logged losses.
        eval_every: steps between evaluations of held-out nats per dimension, on ``eval_images`` pictures.
        sample_every: steps between grids of ``sample_images`` pictures from fixed noise, raw and denoised.
        checkpoint_every: steps between checkpoints, of which the last ``keep_checkpoints`` stay.
        save_pipeline_every: steps between pipeline folders; the last step always saves one.
        prompts: captions of the grid; None takes held-out ones.
        guidance_scale, guidance_method: of the grid, and the saved pipeline's defaults; a scale of 1 is off.
    """

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    log_every: int = 10
    eval_every: int = 1000
    eval_images: int = 512
    sample_every: int = 1000
    sample_images: int = 36
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    save_pipeline_every: int = 0
    prompts: list[str] | None = None
    guidance_scale: float = 1.0
    guidance_method: Literal["gaussian", "linear"] = "gaussian"

    def __post_init__(self) -> None:
        for name in ("log_every", "eval_images", "sample_images", "keep_checkpoints"):
            check(getattr(self, name) >= 1, f"log.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("eval_every", "sample_every", "checkpoint_every", "save_pipeline_every"):
            check(getattr(self, name) >= 0, f"log.{name} must be 0 (off) or positive, got {getattr(self, name)}")
        check(self.guidance_scale >= 1, f"log.guidance_scale must be at least 1, got {self.guidance_scale}")


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """The Fréchet distance of samples to held-out pictures while training, and at the end.

    Attributes:
        every: steps between measurements; 0 is off.
        images: how many samples, and held-out pictures at most. Distances of fewer pictures than features are biased;
            compare only equal numbers.
        extractor: "inception" (then it is FID), a Torchvision classifier such as "mobilenet_v2", or others, see
            `load_extractor`; ``weights`` are its file; ``normalize`` is what Torchvision's classifiers expect.
        batch_size: samples drawn at once.
    """

    every: int = 0
    images: int = 1000
    extractor: str = "inception"
    weights: str | None = None
    normalize: Literal["imagenet", "half"] = "imagenet"
    batch_size: int = 64

    def __post_init__(self) -> None:
        check(self.every >= 0, f"metric.every must be 0 (off) or positive, got {self.every}")
        check(self.images >= 2, f"metric.images must be at least 2, got {self.images}")
        check(self.batch_size >= 1, f"metric.batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about one run.

    Attributes:
        output: folder of the run: resolved config, logs, grids, checkpoints, pipeline.
        data, vae, joint, text, lora, optim, train, log, metric: the sections.
        flow: arguments of `TARFlowModel`. in_channels, sample_size, num_classes and cond_dim may be left out: they
            follow from the autoencoder, the data and the text encoder.
        init_from: folder or hub id of a pipeline whose flow, small text encoder and latent statistics training starts
            from. Settings of ``flow`` may be left out, and must be the pipeline's if given; another ``data.image_size``
            rescales the positions.
        resume: "latest", a checkpoint folder, "auto" (the latest if there is one), or None to start anew.
    """

    output: str
    data: DataConfig
    vae: VaeConfig = field(default_factory=VaeConfig)
    joint: JointConfig = field(default_factory=JointConfig)
    text: TextConfig = field(default_factory=TextConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    flow: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    metric: MetricConfig = field(default_factory=MetricConfig)
    init_from: str | None = None
    resume: str | None = None

    def __post_init__(self) -> None:
        check_joint(self)
        check_lora(self)
        if self.data.source == "latents":
            check(not self.vae.pixels, "data.source is 'latents', but vae.name is none, which models pixels")
        if self.train.noise == "uniform":
            check(self.vae.pixels, "train.noise is 'uniform', which is for pixels: set vae.name to none")
        check(
            self.train.checkpointing != "reversible" or self.train.latent_norm_weight == 0,
            "train.latent_norm_weight needs the blocks' outputs, which train.checkpointing 'reversible' does not keep",
        )
        if self.flow.get("learned_denoiser", "none") != "none":
            check(
                self.train.noise == "gaussian" and self.train.noise_std > 0,
                "flow.learned_denoiser needs gaussian noise: train.noise 'gaussian' and train.noise_std above 0",
            )
            check(
                self.train.latent_norm_weight == 0,
                "flow.learned_denoiser learns from the gradient of the likelihood alone: set train.latent_norm_weight "
                "to 0",
            )


def has_denoiser(config: RunConfig) -> bool:
    """Whether a learned denoiser is trained along."""
    return config.flow.get("learned_denoiser", "none") != "none"


def is_joint(config: RunConfig) -> bool:
    """Whether the autoencoder is trained along."""
    return config.vae.train == "joint"


def noise_std(config: RunConfig) -> float:
    """σ of the Gaussian noise that the flow's latents or pixels have; 0 with uniform noise."""
    if is_joint(config):
        return config.joint.posterior_std
    return config.train.noise_std if config.train.noise == "gaussian" else 0.0
