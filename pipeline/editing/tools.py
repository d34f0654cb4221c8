"""What an exact flow can do with a picture beside drawing one: encode it, tell its likelihood, and change it.

All of it goes through z, the flow's noise, to and from which pictures map one to one.
"""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from tarflow.flows import editing
from tarflow.flows.likelihood import log_prob, nats_per_dim, token_log_prob
from tarflow.pipeline.call.arguments import check_types
from tarflow.pipeline.call.checks import check_generator, check_guidance_scale
from tarflow.pipeline.call.flow_pipeline import FlowPipeline, Generators
from tarflow.pipeline.call.inputs import Labels
from tarflow.pipeline.editing.editor import FlowEditor
from tarflow.pipeline.editing.inputs import Mask, Pictures, read_images, read_mask, tokens_of_mask
from tarflow.pipeline.editing.outputs import EditingOutput, EncodingOutput, LikelihoodOutput

INPAINTINGS = ("fill", "metropolis")


class ExactFlowTools(FlowPipeline):
    """The tools, for `TARFlowPipeline`.

    All take pictures as a PIL picture, a list of them, or a tensor (B, 3, H, W) of 8 bits or in [0, 1]; of the model's
    size, or with ``fit`` cut to it. A condition is ``prompt`` (captions), ``prompt_embeds`` (encoded ones, (B, L, E)) or
    ``class_labels`` (indices or names), one or one for each picture; without any, it is "no condition". ``noise`` says
    whether pictures get the training noise, as all that the flow was trained on had it: without it they lie where no
    picture of the training did, and look likelier than any. ``generator`` draws it, and what else is random.

    They raise a ValueError, in one sentence, for input that does not fit.
    """

    @torch.no_grad()
    @check_types
    def encode(
        self,
        image: Pictures,
        prompt: str | list[str] | None = None,
        class_labels: Labels | None = None,
        prompt_embeds: Tensor | None = None,
        generator: Generators = None,
        noise: bool = True,
        fit: bool = False,
    ) -> EncodingOutput:
        """Pictures → z, and how exactly z leads back; exact to rounding with or without ``noise``."""
        editor = FlowEditor(self)
        x = editor.read(image, fit, generator, noise)
        condition = editor.condition(len(x), prompt, class_labels, prompt_embeds)
        z = editor.encoded(x, condition)
        error = (editor.decoded(z, condition) - x).abs().flatten(1).amax(1)
        self.maybe_free_model_hooks()
        return EncodingOutput(z=z, latents=x, error=error)

    @torch.no_grad()
    @check_types
    def log_likelihood(
        self,
        image: Pictures,
        prompt: str | list[str] | None = None,
        class_labels: Labels | None = None,
        prompt_embeds: Tensor | None = None,
        generator: Generators = None,
        noise: bool = True,
        fit: bool = False,
        noise_level: float | None = None,
    ) -> LikelihoodOutput:
        """log p of the pictures' latents under the condition, and where on the picture it comes from.

        Args:
            noise_level: of a flow of many levels, that of the noise which pictures get, and of the density; the highest if
                not given.
        """
        editor = FlowEditor(self, noise_level)
        x = editor.read(image, fit, generator, noise)
        condition = editor.condition(len(x), prompt, class_labels, prompt_embeds)
        self.run_offload_hook(self.flow)
        autoregressive = not any(block.one_pass for block in self.flow.blocks)
        with editor.exactly():
            shares = token_log_prob(self.flow, x, **condition) if autoregressive else None
            total = log_prob(self.flow, x, **condition) if shares is None else shares.flatten(1).sum(1)
        self.maybe_free_model_hooks()
        return LikelihoodOutput(log_prob=total, nats_per_dim=nats_per_dim(total, x[0].numel()), map=shares)

    @torch.no_grad()
    @check_types
    def interpolate(
        self,
        first: Pictures,
        second: Pictures,
        steps: int = 8,
        path: str = "spherical",
        prompt: str | None = None,
        class_labels: int | str | None = None,
        generator: Generators = None,
        noise: bool = True,
        fit: bool = False,
        output_type: str = "pil",
        prompt_embeds: Tensor | None = None,
    ) -> EditingOutput:
        """``steps`` pictures from ``first`` to ``second``, both included, along a path in z.

        Args:
            first, second: one picture each.
            path: "spherical" or "linear", see `tarflow.flows.editing.interpolate`.
        """
        editor = FlowEditor(self, generator=generator, output_type=output_type)
        editing.check_path(path, steps)
        ends = torch.cat([read_images(end, editor.size, fit) for end in (first, second)])
        if len(ends) != 2:
            raise ValueError(f"first and second are one picture each, got {len(ends)} together")
        x = editor.noisy(editor.latents(ends), generator, noise)
        first_z, second_z = editor.encoded(x, editor.condition(2, prompt, class_labels, prompt_embeds))
        z = editing.interpolate(first_z, second_z, steps, path)
        return editor.edited(z, editor.condition(steps, prompt, class_labels, prompt_embeds), output_type)

    @torch.no_grad()
    @check_types
    def vary(
        self,
        image: Pictures,
        strength: float,
        prompt: str | list[str] | None = None,
        class_labels: Labels | None = None,
        generator: Generators = None,
        noise: bool = True,
        fit: bool = False,
        output_type: str = "pil",
        prompt_embeds: Tensor | None = None,
    ) -> EditingOutput:
        """The pictures with a part of their z drawn anew, see `tarflow.flows.editing.resample`.

        Args:
            strength: 0 gives the picture itself, 1 one that has nothing to do with it but the condition.
        """
        editor = FlowEditor(self, generator=generator, output_type=output_type)
        editing.check_strength(strength)
        x = editor.read(image, fit, generator, noise)
        condition = editor.condition(len(x), prompt, class_labels, prompt_embeds)
        z = editor.encoded(x, condition)
        check_generator(generator, len(x))
        fresh = randn_tensor(z.shape, generator, z.device, z.dtype)
        return editor.edited(editing.resample(z, fresh, strength), condition, output_type)

    @torch.no_grad()
    @check_types
    def swap(
        self,
        image: Pictures,
        source_prompt: str | list[str] | None = None,
        target_prompt: str | list[str] | None = None,
        source_labels: Labels | None = None,
        target_labels: Labels | None = None,
        guidance_scale: float = 1.0,
        generator: Generators = None,
        noise: bool = True,
        fit: bool = False,
        output_type: str = "pil",
        source_prompt_embeds: Tensor | None = None,
        target_prompt_embeds: Tensor | None = None,
    ) -> EditingOutput:
        """Encode pictures under one caption or class, and decode them under another. What the first does not describe is
        in z, and stays.

        Args:
            source_prompt, source_labels, source_prompt_embeds: what the picture shows.
            target_prompt, target_labels, target_prompt_embeds: what it shall show. The same as the source gives the same picture.
            guidance_scale: of the decoding, away from no condition; 1 is off. With guidance the same condition no longer
                gives the same picture.
        """
        editor = FlowEditor(self, generator=generator, output_type=output_type)
        check_guidance_scale(guidance_scale)
        x = editor.read(image, fit, generator, noise)
        source = editor.condition(len(x), source_prompt, source_labels, source_prompt_embeds)
        target = editor.condition(len(x), target_prompt, target_labels, target_prompt_embeds)
        return editor.edited(editor.encoded(x, source), target, output_type, guidance_scale)

    @torch.no_grad()
    @check_types
    def inpaint(
        self,
        image: Pictures,
        mask: Mask,
        prompt: str | list[str] | None = None,
        class_labels: Labels | None = None,
        method: str = "fill",
        passes: int = 3,
        steps: int = 20,
        step_size: float = 0.3,
        generator: Generators = None,
        noise: bool = True,
        fit: bool = False,
        output_type: str = "pil",
        prompt_embeds: Tensor | None = None,
    ) -> EditingOutput:
        """Make the masked part of pictures anew, so that it goes with the rest.

        Pixels outside the mask are the given ones, and latents of tokens that it does not touch are the autoencoder's.
        What the mask hides is replaced by the mean colour of the rest before it is encoded, so nothing of it is seen;
        each further pass encodes the picture with what the last one has made there.

        Args:
            mask: white or True where to make; see `read_mask`.
            method: "fill" (`tarflow.flows.editing.HeldFlow`): tokens are drawn one after the other in each block, known
                ones held; "metropolis" (`tarflow.flows.editing.metropolis`): after that, a chain that leads to the
                model's exact conditional distribution.
            passes: how often to fill, at least 1.
            steps, step_size: of the chain.

        Returns:
            pictures; with "metropolis" also the chain's log_prob and acceptance.
        """
        editor = FlowEditor(self, generator=generator, output_type=output_type)
        if method not in INPAINTINGS:
            raise ValueError(f"the method must be one of {', '.join(INPAINTINGS)}, got {method!r}")
        if passes < 1 or steps < 0:
            raise ValueError(f"passes must be at least 1 and steps 0 or more, got {passes} and {steps}")
        editing.check_step_size(step_size)
        pixels = read_images(image, editor.size, fit).to(self._execution_device)
        check_generator(generator, len(pixels))
        mask = read_mask(mask, len(pixels), editor.size).to(pixels.device)
        hole = tokens_of_mask(mask, self.codec.factor * self.flow.config.patch_size)
        condition, hidden = editor.condition(len(pixels), prompt, class_labels, prompt_embeds), mask[:, None]
        mean = (pixels * ~hidden).sum((2, 3), keepdim=True) / (~hidden).sum((2, 3), keepdim=True)
        picture, chain = torch.where(hidden, mean, pixels), None
        for turn in range(passes + (method == "metropolis")):
            clean = editor.latents(picture)
            x = editor.noisy(clean, generator, noise)
            if turn < passes:
                x = editor.fill(x, hole, condition, generator, turn == 0)
            else:
                chain = editor.chain(x, hole, condition, steps, step_size, generator)
                x = chain.x
            picture, latents = editor.composed(x, (pixels, clean), hidden, hole, condition)
        return EditingOutput(
            log_prob=editor.log_prob(x, condition) if chain is None else chain.log_prob,
            images=editor.postprocessed(picture, latents, output_type),
            latents=latents,
            acceptance=None if chain is None else chain.acceptance,
        )

    @torch.no_grad()
    @check_types
    def best_of(
        self,
        num: int,
        prompt: str | None = None,
        class_labels: int | str | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        prompt_embeds: Tensor | None = None,
    ) -> EditingOutput:
        """``num`` pictures of one caption or class, the likeliest first, with their log_prob under it.

        Args:
            guidance_scale: of the drawing, as of a call; the likelihood is the model's own, without guidance.
        """
        editor = FlowEditor(self, generator=generator, output_type=output_type)
        if num < 1:
            raise ValueError(f"num must be at least 1, got {num}")
        for name, given in (("prompt", prompt), ("class_labels", class_labels), ("prompt_embeds", prompt_embeds)):
            if isinstance(given, list | tuple | Tensor) and len(given) != 1:
                raise ValueError(f"best_of draws from one caption or class, and {name} has {len(given)}")
        drawn = self(
            prompt=prompt,
            class_labels=class_labels,
            prompt_embeds=prompt_embeds,
            num_images_per_prompt=num,
            guidance_scale=guidance_scale,
            generator=generator,
            denoise=False,
            output_type="latent",
        ).images
        condition = editor.condition(num, prompt, class_labels, prompt_embeds)
        values, order = editor.log_prob(drawn, condition).sort(descending=True)
        return editor.finished(drawn[order], condition, output_type, values)
