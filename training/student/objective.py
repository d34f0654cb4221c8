"""What a student minimises: batches as the flow was trained on them, and how far it is from the flow's way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tarflow.flows.denoising import score_denoise
from tarflow.flows.student import StudentModel
from tarflow.pipeline.conditions import condition_of
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.training.loop.component import noisy_latents, posterior_of
from tarflow.training.loop.draws import draw_chances, draw_flipped, draw_noise
from tarflow.training.loop.task import Batch
from tarflow.training.losses.perceptual import make_perceptual
from tarflow.training.student.config import StudentConfig
from tarflow.training.student.loss import alignment_loss, extrapolated, teacher_states
from tarflow.training.student.pairs import KeptPairs, Pairs, Pictures


class StudentObjective:
    """The losses of a student.

    Args:
        config: of the run.
        accelerator: of the run.
        network: the student.
        pipe: the pipeline with its flow, whose modules are on the run's device.

    Raises:
        ValueError: if the perceptual loss does not fit its weights or the pictures.
    """

    def __init__(self, config: StudentConfig, accelerator: Accelerator, network: StudentModel, pipe: TARFlowPipeline):
        self.config, self.accelerator, self.network, self.pipe = config, accelerator, network, pipe
        self.largest_weight = network.config.max_guidance_scale - 1
        self.kept = KeptPairs(config.reuse_from) if config.reuse > 1 else None
        self.null_cond: Tensor | None = None
        if pipe.flow.config.conditioning == "prefix":
            self.null_cond = pipe.encode_prompt([""], accelerator.device, do_classifier_free_guidance=False)[0]
        self.perceptual = make_perceptual(config)
        if self.perceptual is not None:
            self.perceptual.to(accelerator.device)
            self.perceptual.check_size(pipe.flow.config.sample_size * pipe.codec.factor)

    def losses(
        self, model: nn.Module, batch: Batch, step: int, total: int, sample_ids: Sequence[int]
    ) -> dict[str, Tensor]:
        """Of one pass: "loss", the weighted sum, and its parts without weights and gradients.

        Args:
            model: ``network`` as it must be called, in one forward pass.
            batch: of the training pictures.
            step: its number.
            total: steps of the run, as far as is known.
            sample_ids: of the pictures in the step's batch of all processes and passes.
        """
        config, pairs = self.config, self.pairs(batch, step, total, sample_ids)
        z, led = pairs.states[:, 0], pairs.states[:, 1:].unbind(1)
        found, read = model(z, pairs.labels, pairs.cond, pairs.weight, return_states=True)
        wanted = pairs.clean if config.target == "clean" else led[-1]
        if self.largest_weight > 0 and config.guidance == "extrapolated":
            wanted = self.away_from_unconditional(wanted, z, pairs)
        latents = (found - wanted).pow(2).mean()
        loss, parts = latents, {"latents": latents.detach()}
        if read:
            aligned = alignment_loss(read, led[: len(read)])
            loss, parts["alignment"] = loss + config.alignment_weight * aligned, aligned.detach()
        if self.perceptual is not None:
            seen = slice(config.perceptual_pictures)
            with self.accelerator.autocast():
                decoded = self.pipe.codec.decode(found[seen]).float()
                with torch.no_grad():
                    original = self.pipe.codec.decode(wanted[seen]).float()
                perceptual = self.perceptual(decoded, original)
            loss, parts["perceptual"] = loss + config.perceptual * perceptual, perceptual.detach()
        return {"loss": loss, **parts}

    @torch.no_grad()
    def pairs(self, batch: Batch, step: int, total: int, sample_ids: Sequence[int]) -> Pairs:
        """What the flow makes of a batch, with earlier pairs behind it if these are used again."""
        pairs, again = self.new_pairs(batch, step, total, sample_ids), self.config.reuse - 1
        if self.kept is None:
            return pairs
        drawn = [number * again + time for number in sample_ids for time in range(again)]
        chances = draw_chances(self.config.seed, step, drawn, self.accelerator.device, "reuse")
        more = self.kept.among(pairs, chances)
        self.kept.add(pairs)
        return more

    def new_pairs(self, batch: Batch, step: int, total: int, sample_ids: Sequence[int]) -> Pairs:
        """What the flow makes of a batch."""
        config, pictures = self.config, self.pictures(batch, step, sample_ids)
        if config.own_share > 0 and step >= config.own_after * total:
            with self.accelerator.autocast():
                self.put_own_samples(pictures, step, sample_ids)
        guided = self.largest_weight > 0 and config.guidance == "flow"
        # What is learned is computed exactly: with bf16 the targets would be off by up to 0.4.
        states = self.states(pictures, pictures.weight if guided else None)
        labels, cond, weight = pictures.labels, pictures.cond, pictures.weight
        return Pairs(clean=pictures.clean, labels=labels, cond=cond, weight=weight, states=torch.stack(states, 1))

    @torch.no_grad()
    def pictures(self, batch: Batch, step: int, sample_ids: Sequence[int]) -> Pictures:
        """A batch as the flow was trained on it, with guidance weights; some conditions are dropped if guidance is
        extrapolated."""
        config, pipe, device = self.config, self.pipe, self.accelerator.device
        flipped = draw_flipped(config.data.flip, config.seed, step, sample_ids, device)
        posterior = posterior_of(pipe, self.accelerator, batch, flipped)
        noisy = noisy_latents(pipe, config, posterior, step, sample_ids)
        clean = pipe.codec.normalise(posterior[0]).float()
        condition = condition_of(pipe, batch, len(clean), with_condition=True)
        labels, cond = condition.get("class_labels"), condition.get("cond")
        lone = draw_chances(config.seed, step, sample_ids, device, "unguided")
        unguided = lone < config.unguided_share
        chance = draw_chances(config.seed, step, sample_ids, device, "guidance")
        weight = torch.where(unguided, 0.0, self.largest_weight * chance)
        if self.largest_weight > 0 and config.guidance == "extrapolated":
            dropped = lone < config.unguided_share / 2
            if labels is not None:
                labels = torch.where(dropped, pipe.flow.null_label, labels)
            if cond is not None and self.null_cond is not None:
                cond = torch.where(dropped[:, None, None], self.null_cond, cond)
        return Pictures(clean=clean, labels=labels, cond=cond, weight=weight, noisy=noisy)

    def states(self, pictures: Pictures, weight: Tensor | None) -> list[Tensor]:
        """The flow's states of the pictures, see `teacher_states`."""
        flow, batch, level = self.pipe.flow, len(pictures.noisy), self.pipe.drawing_level
        condition = flow.condition(pictures.labels, pictures.cond, batch, level)
        null = None if weight is None else flow.condition(None, self.null_cond, batch, level)
        return teacher_states(flow, pictures.noisy, condition, null, weight, self.network.config.guidance_method)

    def put_own_samples(self, pictures: Pictures, step: int, sample_ids: Sequence[int]) -> None:
        """Replace the first pictures of the batch by samples of the student, with new noise; without it they are what
        the flow's score step makes of them."""
        config, flow, count = self.config, self.pipe.flow, round(self.config.own_share * len(pictures.clean))
        if count == 0:
            return
        shape, sigma = tuple(pictures.clean.shape[1:]), self.pipe.config.noise_std
        place = (config.seed, step, sample_ids[:count], shape, pictures.clean.device)
        prior, noise = draw_noise(*place, "student prior"), draw_noise(*place, "student noise")
        labels, cond = (None if part is None else part[:count] for part in (pictures.labels, pictures.cond))
        own = self.network(flow.scale_noise(prior), labels, cond, pictures.weight[:count])
        noisy = own + sigma * noise if config.target == "clean" else own
        pictures.noisy[:count] = noisy
        pictures.clean[:count] = score_denoise(flow, noisy, sigma, class_labels=labels, cond=cond)

    @torch.no_grad()
    def away_from_unconditional(self, wanted: Tensor, z: Tensor, pairs: Pairs) -> Tensor:
        """Latents as guidance changes them, see `extrapolated`."""
        labels = None if pairs.labels is None else torch.full_like(pairs.labels, self.pipe.flow.null_label)
        with self.accelerator.autocast():
            unconditional = self.network(z, labels, self.null_cond, 0.0)
        return extrapolated(wanted, unconditional, pairs.weight)
