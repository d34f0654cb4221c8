"""The trainings that are compared: their settings, made of one recipe, and each one's run in a folder of its own."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from tarflow import configs
from tarflow.common.files import write_json
from tarflow.data.latents import CachedLatents
from tarflow.experiments.peers.diffusion import matched_layers, parameters_of
from tarflow.experiments.peers.diffusion_task import DiffusionTask
from tarflow.experiments.peers.settings import STEPS, DiffusionConfig, PeersComparison
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.config import RunConfig, VaeConfig
from tarflow.training.flow.setup import make_parts
from tarflow.training.flow.trainer import flow_trainer
from tarflow.training.latent_cache.caching import cache_latents
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.loop.config import RateSettings
from tarflow.training.loop.network_trainer import network_trainer
from tarflow.training.loop.stopping import exit_status
from tarflow.training.loop.trainer import Trainer
from tarflow.training.student.config import StudentConfig
from tarflow.training.student.task import StudentTask

RECIPES = {"caption": "quickstart_text", "class": "quickstart_class"}
#: What the small form changes.
SMALL = ["--flow.width=32", "--flow.head_dim=32", "--flow.layers_per_block=[1,1]", "--train.batch_size=4"]
TRAINED = "trained.json"
#: Scales that the student learns, so that others than the first can be drawn from it too.
STUDENT_GUIDANCE = 4.0


class Trainings:
    """All trainings of a comparison.

    Args:
        config: what to compare.

    Attributes:
        folder: of the comparison.
        cache: folder of the latents.
        fitting: steps of trainings that seconds have decided, by name; all others take the comparison's.

    Raises:
        ValueError: if the recipe is unknown, or of another condition.
    """

    def __init__(self, config: PeersComparison):
        self.config, self.folder = config, Path(config.output).expanduser()
        self.cache = self.folder / "latents"
        self.matched: int | None = None
        self.fitting: dict[str, int] = {}
        self.recipe, _ = parse_config(self.flow_arguments("flow_muon"))
        wanted = {"caption": "prefix", "class": "class"}[config.condition]
        if not str(self.recipe.flow.get("conditioning", "none")).startswith(wanted):
            raise ValueError(
                f"the recipe {config.recipe!r} is not for the condition {config.condition!r}: its flow.conditioning is {self.recipe.flow.get('conditioning', 'none')!r}"
            )
        if config.condition == "caption" and self.recipe.text.kind != "small":
            raise ValueError(
                f"the recipe {config.recipe!r} has text.kind {self.recipe.text.kind!r}: a DiT learns with 'small' here"
            )

    def steps(self, name: str) -> int:
        """Of a training; of one that is only timed, before seconds have decided, any number."""
        return self.fitting.get(name, self.config.steps or STEPS)

    def flow_arguments(self, name: str) -> list[str]:
        """The command line of a flow's training."""
        config, steps = self.config, self.steps(name)
        arguments = ["--config", configs.resolve(config.recipe or RECIPES[config.condition])]
        arguments += SMALL if config.small else []
        optimizer = name.removeprefix("flow_")
        given: dict[str, Any] = {
            "output": self.folder / name,
            "resume": "auto",
            "data.source": "latents",
            "data.path": self.cache,
            "data.flip": "false",
            "optim.name": optimizer,
            "train.steps": steps,
            "train.max_minutes": "null",
            "train.seed": config.seed,
            "log.trackers": "[]",
            "log.eval_every": 0,
            "log.sample_every": 0,
            "log.eval_images": config.held_out or 256,
            "log.checkpoint_every": max(1, steps // 4),
            "log.keep_checkpoints": 1,
        }
        if optimizer == "adamw":
            given |= {"optim.muon_lr": "null", "optim.muon_weight_decay": "null", "optim.muon_momentum": 0.95}
        return arguments + [f"--{key}={value}" for key, value in given.items()]

    def make_cache(self) -> CachedLatents:
        """The latents, encoded once."""
        config = self.config
        vae = VaeConfig(name=self.recipe.vae.name, sample_posterior=self.recipe.vae.sample_posterior)
        wanted = CacheConfig(
            output=str(self.cache),
            data=config.data,
            vae=vae,
            num_images=config.pictures,
            num_validation_images=config.held_out,
        )
        cache_latents(wanted)
        return CachedLatents(self.cache, "train")

    def diffusion(self, name: str) -> DiffusionConfig:
        """Settings of a DiT: the recipe's width, rates and averages, and as many layers as give the flow's parameters."""
        config, flow, text, train, optim = (
            self.config,
            self.recipe.flow,
            self.recipe.text,
            self.recipe.train,
            self.recipe.optim,
        )
        steps = self.steps(name)
        own = [field.name for field in fields(RateSettings) if field.name.startswith("muon_")]
        muon = {rate: getattr(optim, rate) for rate in own} if name.endswith("muon") and optim.name == "muon" else {}
        found = DiffusionConfig(
            cache=str(self.cache),
            output=str(self.folder / name),
            condition=config.condition,
            width=flow["width"],
            head_dim=flow["head_dim"],
            layers=1,
            text_unit=text.unit,
            vocab_size=text.vocab_size,
            vocab_captions=text.vocab_captions,
            text_width=text.width,
            text_layers=text.layers,
            text_heads=text.heads,
            max_length=text.max_length,
            drop_rate=train.drop_rate,
            steps=steps,
            batch_size=train.batch_size,
            mixed_precision=train.mixed_precision,
            ema_decay=train.ema_decays[0],
            lr=optim.lr,
            warmup_steps=optim.warmup_steps,
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            optimizer="muon" if name.endswith("muon") else "adamw",
            **muon,
            trackers=[],
            eval_every=0,
            checkpoint_every=max(1, steps // 4),
            keep_checkpoints=1,
            seed=config.seed,
            resume="auto",
        )
        return replace(found, layers=self.layers(found))

    def layers(self, config: DiffusionConfig) -> int:
        """How many give a DiT the flow's parameters; the same for each DiT."""
        if self.matched is None:
            parts = make_parts(self.recipe, None, torch.device("cpu"))
            shape = parts.flow_arguments["in_channels"], parts.flow_arguments["sample_size"]
            classes = parts.flow_arguments.get("num_classes", 0)
            encoder = parts.text_encoder if config.condition == "caption" else None
            self.matched = matched_layers(config, *shape, classes, encoder, parameters_of(parts.flow))
        return self.matched

    def student(self) -> StudentConfig:
        """Settings of the student of the flow with Muon: the flow's width and number of layers."""
        config, flow, train = self.config, self.recipe.flow, self.recipe.train
        steps = self.steps("student")
        return StudentConfig(
            pipeline=str(self.folder / "flow_muon/pipeline"),
            save_to=str(self.folder / "student/pipeline"),
            output=str(self.folder / "student"),
            data=replace(config.data, flip=False),
            num_layers=max(len(flow["layers_per_block"]) + 1, sum(flow["layers_per_block"])),
            width=flow["width"],
            head_dim=flow["head_dim"],
            guidance_scale=max(STUDENT_GUIDANCE, config.guidance_scale),
            steps=steps,
            batch_size=train.batch_size,
            mixed_precision="no" if train.mixed_precision == "no" else "bf16",
            ema_decay=train.ema_decays[0],
            lr=1e-3,
            optimizer="muon",
            trackers=[],
            eval_every=0,
            grid_images=4,
            eval_images=min(64, config.held_out or 64),
            checkpoint_every=max(1, steps // 4),
            keep_checkpoints=1,
            seed=config.seed,
            resume="auto",
        )

    def trainer(self, name: str, again_in: str | None = None) -> Trainer:
        """A run.

        Args:
            name: of what is trained.
            again_in: another folder, for a new run that only takes some steps.
        """
        moved = {} if again_in is None else {"output": again_in, "resume": None}
        if name == "student":
            student = replace(self.student(), **moved)  # type: ignore[arg-type]
            return network_trainer(StudentTask, student, "")
        if name.startswith("dit"):
            diffusion = replace(self.diffusion(name), **moved)  # type: ignore[arg-type]
            return network_trainer(DiffusionTask, diffusion, "")
        flow: RunConfig
        flow, resolved = parse_config(self.flow_arguments(name))
        return flow_trainer(replace(flow, **moved), resolved)  # type: ignore[arg-type]

    def train(self, name: str) -> dict[str, Any]:
        """What a training measured, which is made unless it is there; an interrupted one goes on.

        Raises:
            SystemExit: after a signal, when its checkpoint is saved.
        """
        path = self.folder / name / TRAINED
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        trainer = self.trainer(name)
        model = trainer.task.learner.model
        parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        metrics = trainer.run()
        if metrics.get("stopped"):
            raise SystemExit(exit_status(metrics))
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        found = {"parameters": parameters, **numbers}
        write_json(path, found, nan_as_null=True)
        return found
