"""Training a student, which makes in one pass what a pipeline's flow makes token after token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tarflow.common.checks import check
from tarflow.data.images import to_uint8
from tarflow.data.latents import CachedLatents
from tarflow.data.stream.first import AnyPictures
from tarflow.data.subset import spread_places
from tarflow.evaluation.reconstruction.noisy import NoisyPictures, noisy_cached, noisy_pictures
from tarflow.evaluation.samples.student_error import exact_samples
from tarflow.flows.student import StudentModel
from tarflow.flows.trajectory.kinds import check_flow_kind
from tarflow.pipeline.call.student_sampling import flow_hashes, student_samples
from tarflow.pipeline.conditions import check_class_names
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.training.loop.agreement import main_alone
from tarflow.training.loop.component import (
    ComponentFolders,
    check_posterior,
    example_line,
    open_cached_splits,
    open_splits,
    samples_posterior,
    write_rows,
)
from tarflow.training.loop.network_task import NetworkTask
from tarflow.training.loop.network_trainer import network_trainer
from tarflow.training.loop.parallel import verify_caches
from tarflow.training.loop.reading import reading
from tarflow.training.loop.task import Batch, State
from tarflow.training.student.config import StudentConfig
from tarflow.training.student.objective import StudentObjective

#: A checkpoint's pairs that are used again, a file for each process.
PAIRS = "pairs_{}.safetensors"


class StudentTask(NetworkTask):
    """What is trained: a student of a pipeline's flow.

    Args:
        config: of the run.
        accelerator: of the run.

    Raises:
        ValueError: if there is no such pipeline.
    """

    config: StudentConfig
    train: AnyPictures | CachedLatents
    network: StudentModel
    betas = (0.9, 0.95)

    def __init__(self, config: StudentConfig, accelerator: Accelerator):
        super().__init__(config, accelerator, config.folder)
        self.folders = ComponentFolders(config)
        self.held_out: NoisyPictures | None = None

    def make_parts(self, state: State | None) -> None:
        config = self.config
        self.pipe = self.folders.open(self.accelerator.device)
        check_posterior(config, self.pipe)
        check_flow_kind(self.pipe.flow, "students are")
        cached = config.data.source == "latents"
        train, held_out = (open_cached_splits if cached else open_splits)(config, self.pipe)
        check_conditions(self.pipe, train)
        if state is None and config.data.verify:
            verify_caches(self.accelerator, train, held_out)
        for module in (self.pipe.flow, self.pipe.vae, self.pipe.text_encoder):
            if module is not None:
                module.eval().requires_grad_(False)
        hashes = flow_hashes(self.pipe.flow)
        self.network = StudentModel(**student_arguments(config, self.pipe), flow_hashes=hashes)
        self.train, self.validation = train, held_out if len(held_out) else None
        main_alone(self.accelerator, lambda: self.prepare_held_out(held_out if len(held_out) else None, train))

    def prepare(self, fresh: bool) -> None:
        super().prepare(fresh)
        self.objective = StudentObjective(self.config, self.accelerator, self.network, self.pipe)

    def backward(self, batch: Batch, step: int, total: int, sample_ids: Sequence[int]) -> dict[str, Tensor]:
        losses = self.objective.losses(self.learner.model, batch, step, total, sample_ids)
        self.accelerator.backward(losses["loss"])
        return {**losses, "loss": losses["loss"].detach()}

    def write_own(self, checkpoint: Path, process: int) -> None:
        if self.objective.kept is not None:
            self.objective.kept.write(checkpoint / PAIRS.format(process))

    def read_own(self, checkpoint: Path, process: int) -> None:
        path = checkpoint / PAIRS.format(process)
        if self.objective.kept is not None and (process == 0 or path.exists()):
            with reading(path):
                self.objective.kept.read(path, self.accelerator.device)

    def prepare_held_out(
        self, held_out: AnyPictures | CachedLatents | None, train: AnyPictures | CachedLatents
    ) -> None:
        """What the student is measured by: held-out pictures if there are any, and the flow's own samples."""
        if held_out is not None and self.pipe.vae is not None:
            count, size = self.config.eval_images, self.config.batch_size
            if isinstance(held_out, CachedLatents):
                self.held_out = noisy_cached(self.pipe, held_out, count, size)
            else:
                self.held_out = noisy_pictures(self.pipe, held_out, count, size)
        self.prepare_samples(train if held_out is None else held_out)

    @torch.no_grad()
    def prepare_samples(self, images: AnyPictures | CachedLatents) -> None:
        """The flow's own samples from fixed noise and their pictures, which the student's are held against."""
        pipe, count = self.pipe, min(self.config.grid_images, len(images))
        places = spread_places(len(images), count)  # as folders are sorted by class
        kind, items = pipe.flow.config.conditioning, [images[place] for place in places]
        arguments = {}
        if kind == "prefix":
            arguments = {"prompt": [item["caption"] for item in items]}
        elif kind != "none":
            arguments = {"class_labels": [item["label"] for item in items]}
        scale = min(pipe.config.guidance_scale, self.network.config.max_guidance_scale)
        method = self.network.config.guidance_method
        self.exact = exact_samples(pipe, arguments, count, scale, method, self.config.seed)
        self.shown = self.decoded(self.exact.states[0], self.exact.class_labels, self.exact.cond, noisy=True)

    def ending(self) -> str:
        line = example_line(
            self.folders.target, self.train, self.pipe.flow.config.conditioning, "--decoding", "student"
        )
        return f"to draw with it:\n  {line}"

    def network_invariants(self) -> dict[str, Any]:
        settings = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        hashes = settings.pop("flow_hashes")
        reuse, size = self.config.reuse, self.config.reuse_from
        facts = {"the flow's SHA-256": hashes[0], "reuse": reuse, "reuse_from": size if reuse > 1 else None}
        facts |= {name: getattr(self.config, name) for name in ("guidance", "unguided_share")}
        facts["sample_posterior"] = samples_posterior(self.config, self.pipe)
        if isinstance(self.train, CachedLatents):
            facts["cached latents"] = self.train.order or self.train.fingerprints
        return facts | {f"student.{key}": value for key, value in settings.items()}

    def check_resume(self, checkpoint: Path, state: State) -> None:
        # Checkpoints from before pairs were used again do not say so.
        super().check_resume(checkpoint, {**state, "facts": {"reuse": 1, **state.get("facts", {})}})

    @torch.no_grad()
    def measure(self, step: int, last: bool) -> dict[str, Any]:
        """Measure the student: PSNR and SSIM of held-out pictures rebuilt from their noise, and how far its samples are
        from the flow's states. Write a grid, the flow's samples above the student's. The last call saves the
        student."""
        # A copy: Accelerate makes the network itself compute with mixed precision.
        student = StudentModel.from_config(self.network.config).eval()
        student.load_state_dict(self.network.state_dict())
        student.to(self.accelerator.device)
        metrics: dict[str, Any] = {} if self.held_out is None else self.reconstruction(student, self.held_out)
        exact = self.exact
        x, noisy = student_samples(student, exact.noise, exact.class_labels, exact.cond, exact.guidance_weight)
        errors = exact.errors(self.pipe.flow, noisy)
        metrics |= {"error_samples": errors[0], "error_noise": errors[-1], "errors_by_block": errors[1:]}
        pictures = self.decoded(x, exact.class_labels, exact.cond, self.config.target == "noisy")
        write_rows([self.shown, pictures], self.config.folder / "samples" / f"samples_{step:08d}.png")
        if last:
            self.folders.add("student", student)
        return metrics

    def reconstruction(self, student: StudentModel, held_out: NoisyPictures) -> dict[str, float]:
        """PSNR and SSIM of what the student makes of held-out pictures' noise, without guidance."""
        pictures = []
        for latents, condition in zip(held_out.latents, held_out.conditions, strict=True):
            z, _ = self.pipe.flow(latents, **condition)
            labels, cond = condition.get("class_labels"), condition.get("cond")
            pictures.append(self.decoded(student(z, labels, cond), labels, cond, self.config.target == "noisy"))
        return held_out.quality(pictures)

    def decoded(self, x: Tensor, labels: Tensor | None, cond: Tensor | None, noisy: bool) -> Tensor:
        """Pictures of latents, uint8 (B, 3, H, W), without the training noise if they have it."""
        pipe = self.pipe
        if noisy:
            x = pipe.remove_noise(x, pipe.check_outputs(None, "pt", "vae")[0], labels, cond)
        return to_uint8(pipe.decode_latents(x)).cpu()


def check_conditions(pipe: TARFlowPipeline, images: AnyPictures | CachedLatents) -> None:
    """Whether pictures have what the pipeline draws from.

    Raises:
        ValueError: if not.
    """
    kind = pipe.flow.config.conditioning
    check(kind != "prefix" or images.has_captions, "the model draws from captions, but the data has none")
    if kind.startswith("class"):
        names = images.class_names or ()
        found, count = len(names), pipe.flow.config.num_classes
        check(found == count, f"the model has {count} classes, but the data has {found}")
        check_class_names(pipe, names)


def student_arguments(config: StudentConfig, pipe: TARFlowPipeline) -> dict[str, Any]:
    """Arguments of `StudentModel` for a pipeline's flow.

    Raises:
        ValueError: if there are fewer layers than states to read.
    """
    flow = pipe.flow.config
    conditional = flow.conditioning != "none"
    scale = pipe.config.guidance_scale if config.guidance_scale is None else config.guidance_scale
    check(conditional or scale == 1, f"the model is unconditional: there is no guidance, but guidance_scale is {scale}")
    states = 0
    if config.alignment != "none":
        states = len(pipe.flow.blocks) - (config.target == "noisy")
    check(
        config.num_layers > states,
        f"num_layers must be at least {states + 1}, one more than the states of the flow to align with; "
        f"got {config.num_layers}",
    )
    return {
        "in_channels": flow.in_channels,
        "sample_size": flow.sample_size,
        "patch_size": flow.patch_size if config.patch_size is None else config.patch_size,
        "patch_layout": flow.patch_layout,
        "num_layers": config.num_layers,
        "width": config.width,
        "head_dim": config.head_dim,
        "conditioning": flow.conditioning,
        "num_classes": flow.num_classes,
        "cond_dim": flow.cond_dim if flow.conditioning == "prefix" else 0,
        "state_layers": tuple(range(config.num_layers - states, config.num_layers)),
        "through_states": config.alignment == "states",
        "max_guidance_scale": float(scale),
        "guidance_method": pipe.config.guidance_method,
        "target": config.target,
    }


def train_student(config: StudentConfig, resolved: str) -> dict[str, Any]:
    """Train, and save the student; returns the last metrics.

    Args:
        config: the settings.
        resolved: their YAML, saved with the run.

    Raises:
        ValueError: if settings, pipeline, data or checkpoint do not fit.
        OSError: if a file cannot be written.
    """
    return network_trainer(StudentTask, config, resolved).run()
