"""Training a student, which makes in one pass what a pipeline's flow makes token after token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torchvision.utils import make_grid, save_image

from tarflow.data.images import Images, to_uint8
from tarflow.evaluation.noisy_pictures import NoisyPictures, noisy_pictures
from tarflow.evaluation.student_error import block_errors, exact_states
from tarflow.flows.guidance import Guidance
from tarflow.flows.student import StudentModel, flow_hashes
from tarflow.pipeline.folder import add_component, own_folder
from tarflow.pipeline.one_pass import draw
from tarflow.pipeline.opening import locate, open_pipeline
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.training.config import check
from tarflow.training.network_trainer import NetworkTrainer, network_accelerator
from tarflow.training.student_config import StudentConfig
from tarflow.training.student_step import StudentStepper


class StudentTask:
    """What is trained, see `tarflow.training.network_step.Task`: a student of a pipeline's flow.

    Args:
        config: of the run.
        accelerator: of the run.

    Raises:
        ValueError: if pipeline, data and settings do not fit.
    """

    def __init__(self, config: StudentConfig, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        place = locate(config.pipeline)
        self.target = own_folder(config.pipeline, config.save_to)
        self.source = Path(place) if Path(place).is_dir() else Path(TARFlowPipeline.download(place))
        self.pipe = open_pipeline(str(self.source), accelerator.device)
        self.train, held_out = Images(config.data, "train"), Images(config.data, "validation")
        check_data(self.pipe, self.train, config)
        for module in (self.pipe.flow, self.pipe.vae, self.pipe.text_encoder):
            if module is not None:
                module.eval().requires_grad_(False)
        self.hashes = flow_hashes(self.pipe.flow)
        self.network = StudentModel(**student_arguments(config, self.pipe), flow_hashes=self.hashes)
        self.held_out: NoisyPictures | None = None
        if accelerator.is_main_process:
            if len(held_out) and self.pipe.vae is not None:
                self.held_out = noisy_pictures(self.pipe, held_out, config.eval_images, config.batch_size)
            self.prepare_samples(held_out if len(held_out) else self.train)

    @torch.no_grad()
    def prepare_samples(self, images: Images) -> None:
        """The flow's own samples from fixed noise, their states and their pictures, which the student's are held
        against."""
        pipe, count = self.pipe, min(self.config.grid_images, len(images))
        flow, shape = pipe.flow, pipe.latent_shape(None, None)
        kind, items = flow.config.conditioning, [images[place] for place in range(count)]
        labels = cond = null = None
        if kind == "prefix":
            captions = [item["caption"] for item in items]
            cond, null = pipe.encode_prompt(captions, None, flow.device, do_guidance=True)
        elif kind != "none":
            labels = torch.tensor([item["label"] for item in items], device=flow.device)
        scale = min(pipe.config.guidance_scale, self.network.config.max_guidance_scale)
        guidance = Guidance(scale - 1, self.network.config.guidance_method)
        noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(self.config.seed))
        self.noise, self.guidance = flow.scale_noise(noise.to(flow.device)), guidance
        self.labels, self.cond = labels, cond
        self.condition = flow.condition(labels, cond, count)
        self.null = flow.condition(None, null, count) if guidance.active else None
        self.exact = exact_states(flow, self.noise, self.condition, self.null, guidance)
        clean = pipe.remove_noise(self.exact[0], pipe.check_outputs(None, "pt", "vae")[0], labels, cond)
        self.shown = to_uint8(pipe.decode_latents(clean)).cpu()

    def facts(self) -> dict[str, Any]:
        settings = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        hashes = settings.pop("flow_hashes")
        return {"the flow's SHA-256": hashes[0], **{f"student.{key}": value for key, value in settings.items()}}

    @torch.no_grad()
    def report(self, step: int, last: bool) -> dict[str, Any]:
        """PSNR and SSIM of held-out pictures, from their noise back to pictures; how far the flow takes the student's
        samples from where it should; and a grid, the flow's samples above the student's. The last one saves the
        student."""
        # A copy: Accelerate makes the network itself compute with mixed precision.
        student = StudentModel.from_config(self.network.config).eval()
        student.load_state_dict(self.network.state_dict())
        student.to(self.accelerator.device)
        metrics = {} if self.held_out is None else self.reconstruction(student)
        x, noisy = draw(student, self.noise, self.labels, self.cond, self.guidance.weight)
        errors = block_errors(self.pipe.flow, noisy, self.exact, self.condition, self.null, self.guidance)
        metrics |= {"error_samples": errors[0], "error_noise": errors[-1], "errors_by_block": errors[1:]}
        self.write_grid(self.decoded(x, self.labels, self.cond), step)
        if last:
            self.save(student)
        return metrics

    def reconstruction(self, student: StudentModel) -> dict[str, float]:
        """PSNR and SSIM of what the student makes of held-out pictures' noise, without guidance."""
        pictures = []
        for latents, condition in zip(self.held_out.latents, self.held_out.conditions, strict=True):
            z, _ = self.pipe.flow(latents, **condition)
            x = student(z, condition.get("class_labels"), condition.get("cond"))
            pictures.append(self.decoded(x, condition.get("class_labels"), condition.get("cond")))
        return self.held_out.quality(pictures)

    def decoded(self, x: Tensor, labels: Tensor | None, cond: Tensor | None) -> Tensor:
        """Pictures of a student's latents, uint8 (B, 3, H, W)."""
        pipe = self.pipe
        if self.config.target == "noisy":
            x = pipe.remove_noise(x, pipe.check_outputs(None, "pt", "vae")[0], labels, cond)
        return to_uint8(pipe.decode_latents(x)).cpu()

    def write_grid(self, pictures: Tensor, step: int) -> None:
        """Write the flow's samples and, below, the student's."""
        folder = self.config.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        rows = torch.cat([self.shown, pictures]).float() / 255
        save_image(make_grid(rows, nrow=len(pictures)), folder / f"samples_{step:08d}.png")

    def save(self, student: StudentModel) -> None:
        """Put the student into the pipeline's folder, or a copy of it."""
        if self.config.dtype != "float32":
            student.to(getattr(torch, self.config.dtype))
        add_component(self.source, self.target, "student", student)
        print(f"the student is in {self.target}")


def check_data(pipe: Any, images: Images, config: StudentConfig) -> None:
    """Whether pictures and pipeline fit.

    Raises:
        ValueError: if not.
    """
    size, kind = pipe.flow.config.sample_size * pipe.codec.factor, pipe.flow.config.conditioning
    check(
        config.data.image_size == size,
        f"the model has pictures of {size} pixels, but data.image_size is {config.data.image_size}",
    )
    check(len(images) > 0, "the data's training split is empty")
    check(kind != "prefix" or images.has_captions, "the model draws from captions, but the data has none")
    if kind.startswith("class"):
        found, count = len(images.class_names or ()), pipe.flow.config.num_classes
        check(found == count, f"the model has {count} classes, but the data has {found}")


def student_arguments(config: StudentConfig, pipe: Any) -> dict[str, Any]:
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
    accelerator = network_accelerator(config, config.folder)
    task = StudentTask(config, accelerator)
    stepper = StudentStepper(config, accelerator, task.network, task.pipe)
    return NetworkTrainer(config, resolved, config.folder, accelerator, task, stepper).run()
