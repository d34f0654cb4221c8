"""A pipeline's parts and settings, which may be replaced at any time, what is made of them, and where they compute."""

from __future__ import annotations

from typing import Any, Self

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tarflow.flows.decoding.fast_step import FastSteps
from tarflow.flows.model import TARFlowModel
from tarflow.flows.student import StudentModel
from tarflow.flows.trajectory.model import TrajectoryFlowModel
from tarflow.pipeline.call.inputs import Labels, label_indices, latent_shape
from tarflow.pipeline.call.labels import labels_by_name
from tarflow.pipeline.call.walk import check_levels
from tarflow.vae.codec import LatentCodec
from tarflow.vae.decoder import DecoderHalf


class PipelineParts(DiffusionPipeline):
    """The parts of a `TARFlowPipeline`, by the names of its folder; see there."""

    flow: TARFlowModel | TrajectoryFlowModel
    vae: Any  # of any class with Diffusers' ``encode`` and ``decode``
    text_encoder: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    finetuned_decoder: DecoderHalf | None
    student: StudentModel | None
    scheduler: Any  # one of levels, see `scheduler_for`
    config: Any

    model_cpu_offload_seq = "text_encoder->flow->student->vae->finetuned_decoder"
    _optional_components = ["vae", "text_encoder", "tokenizer", "finetuned_decoder", "student", "scheduler"]  # noqa: RUF012 (the library's interface)

    _image_processor: VaeImageProcessor | None = None
    _fast_steps: FastSteps | None = None

    @property
    def codec(self) -> LatentCodec:
        """Pictures to latents and back, by the present autoencoder and latent statistics."""
        return LatentCodec(self.vae, self.config.latents_mean, self.config.latents_std)

    @property
    def noise_levels(self) -> tuple[float, float] | None:
        """The lowest and the highest level that the flow is trained for; None if it knows one, ``config.noise_std``."""
        levels = self.config.get("noise_levels")
        return None if levels is None else check_levels(levels)

    @property
    def drawing_level(self) -> float | None:
        """The highest of `noise_levels`, which samples are drawn at."""
        return None if self.noise_levels is None else self.noise_levels[1]

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent position along each side."""
        return self.codec.factor

    @property
    def image_processor(self) -> VaeImageProcessor:
        """Diffusers' processor, for the present autoencoder unless another was set."""
        if self._image_processor is not None:
            return self._image_processor
        return VaeImageProcessor(vae_scale_factor=self.codec.factor)

    @image_processor.setter
    def image_processor(self, processor: VaeImageProcessor | None) -> None:
        self._image_processor = processor

    @property
    def labels(self) -> dict[str, int]:
        """Indices of the classes by name, see `labels_by_name`."""
        return labels_by_name(self.config.id2label)

    def label_indices(self, class_labels: Labels) -> list[int]:
        """Class labels, given by index or name, as indices."""
        return label_indices(class_labels, self.labels, self.flow.config.num_classes)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Channels, height and width of the latents for an image size."""
        return latent_shape(self.flow.config, self.codec.factor, height, width)

    @property
    def _execution_device(self) -> torch.device:
        """The device that calls compute on. Diffusers' own property walks all modules several times, which takes longer
        than a student's pass; it is used only where a module is offloaded."""
        parts = (self.flow, self.student, self.vae, self.finetuned_decoder, self.text_encoder)
        modules = (module for part in parts if part is not None for module in part.modules())
        if any("_hf_hook" in vars(module) or "_diffusers_hook" in vars(module) for module in modules):
            return super()._execution_device
        return next(self.flow.parameters()).device

    def run_offload_hook(self, module: nn.Module | None) -> None:
        """Bring an offloaded module to its device, and send the others away. Its hook would act at ``forward``, which is
        not called here, and would send away only the module before it."""
        hook: Any = getattr(module, "_hf_hook", None)
        if hook is None:
            return
        for other in getattr(self, "_all_hooks", ()):
            if other.model is not module:
                other.offload()
        hook.pre_forward(module)

    def __setattr__(self, name: str, value: Any) -> None:
        """As in Diffusers. Also, a part that was None is saved from now on, and the fast steps of a replaced flow are
        dropped, as they would keep its weights in memory."""
        steps = self.__dict__.get("_fast_steps")
        if name == "flow" and steps is not None and value is not self.flow:
            self._fast_steps = FastSteps(steps.backend)
        super().__setattr__(name, value)
        config = self.__dict__.get("_internal_dict", {})
        if value is not None and name in self._optional_components and tuple(config.get(name, ())) == (None, None):
            self.register_modules(**{name: value})

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self:
        """A pipeline of another's parts, which they share; see Diffusers.

        Args:
            pipeline: the other.
            kwargs: parts and settings instead of its own; ``torch_dtype``, which is float32 if not given.
        """
        if kwargs.get("custom_pipeline") is not None:
            return super().from_pipe(pipeline, **kwargs)
        # Diffusers compares classes with annotations, and an autoencoder may be of any class.
        expected, _ = cls._get_signature_keys(cls)
        types = cls._get_signature_types()
        shared = {
            name: part
            for name, part in pipeline.components.items()
            if name in expected and (name == "vae" or part is None or fits(part, types[name]))
        }
        return super().from_pipe(pipeline, **{**shared, **kwargs})

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles compile their steps anew: compiled code belongs to a process."""
        state = dict(self.__dict__)
        if self._fast_steps is not None:
            state["_fast_steps"] = FastSteps(self._fast_steps.backend)
        state["_fast_student"] = None
        return state


def fits(part: Any, types: tuple[Any, ...]) -> bool:
    """Whether a part is of one of the classes; compiled and wrapped ones are what they wrap."""
    part = getattr(part, "_orig_mod", part)
    return not isinstance(part, nn.Module) or any(
        kind is Any or (isinstance(kind, type) and isinstance(part, kind)) for kind in types
    )
