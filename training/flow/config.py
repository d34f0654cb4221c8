"""Settings of a training run: nested frozen dataclasses, filled from YAML and the command line, checked when built."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tarflow.common.checks import (
    AtLeastOne,
    BelowOne,
    Fraction,
    Interval,
    NotNegative,
    OffOrPositive,
    Positive,
    at_least,
    check,
    check_ranges,
)
from tarflow.data.config import DataConfig
from tarflow.models import is_hub_id, locate_autoencoder
from tarflow.pipeline.text.options import TextOptions
from tarflow.training.flow.joint_config import JointConfig, check_joint
from tarflow.training.flow.levels_config import NoiseLevels
from tarflow.training.flow.lora_config import LoraConfig, check_lora
from tarflow.training.flow.trajectory_config import check_trajectory_run
from tarflow.training.loop.config import LogSettings, LoopSettings, OptimConfig, StepSettings


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
    measure_images: OffOrPositive = 1024
    sample_posterior: bool = True
    train: Literal["frozen", "joint"] = "frozen"

    def __post_init__(self) -> None:
        check_ranges(self, "vae")

    @property
    def pixels(self) -> bool:
        """Whether the flow models pixels."""
        return self.name in (None, "none")

    def check_place(self) -> None:
        """An error for a name that no autoencoder has, before libraries are loaded; see `locate_autoencoder`."""
        if self.name is not None and self.name not in ("none", "new"):
            locate_autoencoder(self.name)


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text encoder; ``kind`` "none" for class-conditional and unconditional models.

    Attributes:
        kind: "none" for class-conditional and unconditional models; "pretrained" (frozen, by ``name``); "small" (a T5
            encoder of the sizes below, trained from scratch with the flow, with a tokenizer made of the training
            captions).
        name: a pretrained encoder: folder or hub id of any text encoder or decoder-only language model of Transformers,
            see `load_text_encoder`; None for other kinds.
        subfolder: where in ``name`` a pretrained encoder is; None is ``name`` itself.
        tokenizer_subfolder: where in ``name`` its tokenizer is; None looks in the same subfolder, in ``tokenizer``
            beside ``text_encoder``, and in ``name``.
        max_length: captions are padded or cut to this many tokens.
        hidden_layer: which hidden states of a pretrained encoder are taken: −1, the last, behind its final norm; 0, the
            embeddings; k, the output of layer k, or −2 that of the last layer but one, without the norm.
        prefix: put before each caption for a pretrained encoder, the empty one too, as it is; None puts nothing.
        chat_template: put captions as a user's message into the chat template of a pretrained encoder's tokenizer.
        vocab_size: of the small encoder's tokenizer.
        vocab_captions: how many captions, which lie evenly in the data, the small encoder's tokenizer is made of.
        unit: what a token of the small tokenizer is: "word", or "bpe" for open vocabularies.
        width: numbers of a token in the small encoder.
        layers: of the small encoder.
        heads: of attention in the small encoder.
        shard: with FSDP, divide a pretrained encoder's weights among the processes too.
    """

    kind: Literal["none", "small", "pretrained"] = "none"
    name: str | None = None
    subfolder: str | None = None
    tokenizer_subfolder: str | None = None
    max_length: AtLeastOne = 16
    hidden_layer: int = -1
    prefix: str | None = None
    chat_template: bool = False
    vocab_size: Annotated[int, at_least(4)] = 4000
    vocab_captions: AtLeastOne = 4000
    unit: Literal["word", "bpe"] = "word"
    width: AtLeastOne = 64
    layers: AtLeastOne = 2
    heads: AtLeastOne = 4
    shard: bool = False

    def __post_init__(self) -> None:
        check(not self.shard or self.kind == "pretrained", "text.shard is for text.kind 'pretrained', a frozen encoder")
        if self.kind == "pretrained":
            check(self.name is not None, "text.kind is 'pretrained', so text.name must be a folder or hub id")
        else:
            given = {name: getattr(self, name) for name in ("name", "subfolder", "tokenizer_subfolder")}
            given |= self.options.changed
            for name, value in given.items():
                check(
                    value is None,
                    f"text.{name} is for text.kind 'pretrained', but text.kind is {self.kind!r}: set it to that, or leave "
                    f"text.{name} out, which is {value!r}",
                )
        check_ranges(self, "text")
        check(self.width % self.heads == 0, f"text.heads ({self.heads}) must divide text.width ({self.width})")

    def check_place(self) -> None:
        """An error for a name that only a folder can have which is not there; the Hub is asked for half a minute."""
        name = self.name or ""
        if "/" in name and not Path(name).expanduser().exists() and not is_hub_id(name):
            raise ValueError(f"there is no folder {name!r}, which text.name names: give one, or a hub id")

    @property
    def options(self) -> TextOptions:
        """What drawing must do alike."""
        return TextOptions(hidden_layer=self.hidden_layer, prefix=self.prefix, chat_template=self.chat_template)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepSettings):
    """The steps.

    Attributes:
        seed: of weights, noise, drops and the pictures' order.
        images: the length in pictures, instead of ``train.steps``; None takes those.
        noise: "gaussian", or "uniform", which makes real numbers of 8-bit pixels for likelihoods in bits per dimension.
        noise_std: standard deviation σ of gaussian noise; without effect where ``noise_levels`` are given.
        noise_levels: one flow for many levels of the noise, see `NoiseLevels`; None is one level, ``noise_std``.
        drop_rate: share of conditions replaced by "none", which guidance needs.
        latent_norm_weight: weight of a penalty, the sum of the mean squares of all blocks' outputs but the last's;
            0 is off.
        compile: compile the Transformer layers (`torch.compile`); the first steps take minutes, the others less time.
        cuda_graphs: after some steps, launch each forward and backward pass as one CUDA graph: for small models, whose steps
            are bound by launching, on one GPU.
        checkpointing: activations that are computed again in the backward pass to save memory: "none", of each "block",
            of each "layer", or "both"; or "reversible", for coupling blocks, all of them, from the last output.
        checkpointing_every: with checkpointing "layer" and "both", of every so many layers only.
        more_ema_decays: of further averaged weights, which are evaluated at the end and saved beside the first.
        max_bad_steps: so many losses in a row that are not finite are skipped before training stops.
        trajectory: what a picture gives in a step of training a trajectory model, whose chain ends at ``noise_std``:
            "pair", one random step of a chain, or "all" steps of it, for so many times the work.
    """

    images: AtLeastOne | None = None
    noise: Literal["gaussian", "uniform"] = "gaussian"
    noise_std: NotNegative = 0.3
    noise_levels: NoiseLevels | None = None
    drop_rate: Fraction = 0.1
    latent_norm_weight: NotNegative = 0.0
    compile: bool = False
    cuda_graphs: bool = False
    checkpointing: Literal["none", "block", "layer", "both", "reversible"] = "none"
    checkpointing_every: AtLeastOne = 1
    more_ema_decays: list[BelowOne] = field(default_factory=list)
    max_bad_steps: AtLeastOne = 5
    trajectory: Literal["pair", "all"] = "pair"

    def __post_init__(self) -> None:
        check_ranges(self, "train")
        check(
            self.checkpointing_every == 1 or self.checkpointing in ("layer", "both"),
            f"train.checkpointing_every is for checkpointing 'layer' and 'both', not {self.checkpointing!r}",
        )
        if self.cuda_graphs:
            check(
                self.accumulation == 1, f"train.cuda_graphs takes one pass a step, not accumulation {self.accumulation}"
            )
            check(
                self.mixed_precision != "fp16", "train.cuda_graphs is for mixed_precision 'bf16' and 'no', not 'fp16'"
            )
            check(
                self.checkpointing == "none",
                f"train.cuda_graphs is for models that fit as they are, not with checkpointing {self.checkpointing!r}",
            )
        check(len(set(self.ema_decays)) == len(self.ema_decays), f"EMA decays must differ, got {self.ema_decays}")

    @property
    def ema_decays(self) -> list[float]:
        return [self.ema_decay, *self.more_ema_decays]


@dataclass(frozen=True, kw_only=True)
class LogConfig(LogSettings):
    """What is written while training; 0 turns an interval off.

    Attributes:
        eval_every: steps between evaluations of held-out nats per dimension; 0 leaves the one at the end.
        sample_every: steps between grids of samples from fixed noise, raw and denoised; 0 is off.
        sample_images: samples of a grid.
        save_pipeline_every: steps between pipeline folders; the last step always saves one.
        prompts: captions of the grid; None takes held-out ones.
        guidance_scale: of the grid, and the saved pipeline's default; 1 is off.
        guidance_method: the same, of guidance: "gaussian" (STARFlow), "linear" (TARFlow) or "linear_scale" (iTARFlow).
        temperature: the same, a factor on the prior noise: below 1 pictures are likelier and less varied.
        num_inference_steps: the same, for ``train.noise_levels``: steps down from level to level; None is 10.
    """

    sample_every: Interval = 1000
    sample_images: AtLeastOne = 36
    save_pipeline_every: Interval = 0
    prompts: list[str] | None = None
    guidance_scale: Annotated[float, at_least(1)] = 1.0
    guidance_method: Literal["gaussian", "linear", "linear_scale"] = "gaussian"
    temperature: Positive = 1.0
    num_inference_steps: AtLeastOne | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "log")
        check(self.prompts != [], "log.prompts is an empty list: name captions, or give null for held-out ones")


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """The Fréchet distance of samples to held-out pictures while training, and at the end.

    Attributes:
        every: steps between measurements; 0 is off.
        images: how many samples, and held-out pictures at most. Distances of fewer pictures than features are biased;
            compare only equal numbers.
        extractor: "inception" (then it is FID), a Torchvision classifier such as "mobilenet_v2", or others, see
            `load_extractor`.
        weights: file of the extractor's weights; None downloads those of "inception".
        normalize: of pixels for Torchvision's classifiers: "imagenet", or "half" for [−1, 1].
        batch_size: samples drawn at once.
    """

    every: Interval = 0
    images: Annotated[int, at_least(2)] = 1000
    extractor: str = "inception"
    weights: str | None = None
    normalize: Literal["imagenet", "half"] = "imagenet"
    batch_size: AtLeastOne = 64

    def __post_init__(self) -> None:
        check_ranges(self, "metric")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything about one run.

    Attributes:
        output: folder of the run: resolved config, logs, grids, checkpoints, pipeline.
        data: where pictures, captions and labels come from.
        vae: the autoencoder.
        joint: an autoencoder that is trained along, with ``vae.train`` "joint" (SimFlow, arXiv 2512.04084).
        text: the text encoder.
        lora: an adapter of the flow of ``init_from``, instead of all weights.
        flow: arguments of `TARFlowModel`, or with ``kind`` "trajectory" of `TrajectoryFlowModel`. in_channels,
            sample_size, num_classes and cond_dim may be left out: they follow from the autoencoder, the data and the
            text encoder.
        optim: the optimizer, with linear warm-up and then a schedule.
        train: the steps.
        log: what is written while training.
        metric: the Fréchet distance of samples to held-out pictures, while training and at the end.
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
        check_trajectory_run(self)
        if self.data.source == "latents":
            check(not self.vae.pixels, "data.source is 'latents', but vae.name is none, which models pixels")
        check_noise_levels(self)
        if self.train.noise == "uniform":
            check(self.vae.pixels, "train.noise is 'uniform', which is for pixels: set vae.name to none")
        check(
            not (self.train.cuda_graphs and (self.vae.train == "joint" or self.lora.dropout)),
            "train.cuda_graphs is for flows alone: not with vae.train 'joint' or lora.dropout",
        )
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

    @property
    def loop(self) -> LoopSettings:
        """What the loop goes by."""
        return LoopSettings(
            folder=Path(self.output).expanduser(),
            resume=self.resume,
            train=self.train,
            optim=self.optim,
            log=self.log,
            images=self.train.images,
            ema_decays=tuple(self.train.ema_decays),
            max_bad_steps=self.train.max_bad_steps,
        )


def has_denoiser(config: RunConfig) -> bool:
    """Whether a learned denoiser is trained along."""
    return config.flow.get("learned_denoiser", "none") != "none"


def is_joint(config: RunConfig) -> bool:
    """Whether the autoencoder is trained along."""
    return config.vae.train == "joint"


def check_noise_levels(config: RunConfig) -> None:
    """Errors of settings that do not fit ``train.noise_levels``."""
    levels, wants = config.train.noise_levels, bool(config.flow.get("noise_conditioning", False))
    if levels is None:
        check(
            not wants or (config.init_from is not None and config.lora.rank > 0),
            "flow.noise_conditioning is for many noise levels: give train.noise_levels, with low and high",
        )
        check(
            config.log.num_inference_steps in (None, 1),
            f"log.num_inference_steps is {config.log.num_inference_steps}, but this flow knows one noise level, which one "
            "score step removes: leave it out, or give train.noise_levels",
        )
        return
    check(
        wants or "noise_conditioning" not in config.flow,
        "train.noise_levels are given, but flow.noise_conditioning is false: leave that out",
    )
    check(config.train.noise == "gaussian", "train.noise_levels are of gaussian noise: set train.noise to gaussian")
    check(
        config.vae.train == "frozen",
        "train.noise_levels are for a frozen autoencoder: the decoder that vae.train 'joint' trains knows one level only",
    )
    check(
        config.flow.get("learned_denoiser", "none") == "none",
        "train.noise_levels need no flow.learned_denoiser, as the flow's own score goes down from level to level: leave it "
        "out",
    )


def noise_invariants(config: RunConfig) -> dict[str, Any] | None:
    """What a run that goes on must have alike of the noise, by name; None for many levels, which have their own."""
    if config.train.noise_levels is not None:
        return None
    return {"train.noise": config.train.noise, "train.noise_std": config.train.noise_std}


def noise_std(config: RunConfig) -> float:
    """σ of the Gaussian noise that the flow's latents or pixels have, of many levels the highest; 0 with uniform noise."""
    if config.train.noise_levels is not None:
        return config.train.noise_levels.high
    if is_joint(config):
        return config.joint.posterior_std
    return config.train.noise_std if config.train.noise == "gaussian" else 0.0
