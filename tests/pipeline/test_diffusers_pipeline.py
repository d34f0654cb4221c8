"""What a user of Diffusers types with a pipeline; docs/diffusers.md has a row for each."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import accelerate.hooks
import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.callbacks import PipelineCallback
from diffusers.training_utils import EMAModel
from PIL import Image
from pipelines import CAPTIONS, draw, make_pipeline
from students import with_student
from torch import nn

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.pipeline.call import inversion
from tarflow.pipeline.call.choices import STUDENT
from tarflow.pipeline.call.student_sampling import flow_hashes
from tarflow.vae.decoder import LatentDecoder

LATENT = {"output_type": "latent", "decoding": "sequential"}


def other_autoencoder(**changes: Any) -> AutoencoderKL:
    """A random one with other factors, of 8 channels and, unless changed, 4 pixels per latent position."""
    arguments = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 8, 8),
        "norm_num_groups": 4,
        "latent_channels": 8,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**{**arguments, **changes}).eval()


def picture(side: int = 32) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


class TestComponents:
    def test_a_replaced_autoencoder_is_used_everywhere(self) -> None:
        pipe, vae = make_pipeline("none"), other_autoencoder()
        for replace in (lambda: setattr(pipe, "vae", vae), lambda: pipe.register_modules(vae=vae)):
            pipe.vae = make_pipeline("none").vae
            replace()
            assert pipe.codec.vae is vae
            assert pipe.codec.factor == pipe.vae_scale_factor == pipe.image_processor.config.vae_scale_factor == 4
            assert pipe.codec.factors == (0.0, 0.5)
            assert draw(pipe, num_images=2).shape == (2, 16, 16, 3)
            encoded = pipe.encode(picture(16), noise=False).latents
            wanted = vae.encode(torch.from_numpy(np.array(picture(16))).permute(2, 0, 1)[None] / 127.5 - 1)
            wanted = (wanted.latent_dist.mode() * 0.5 - 0.1) / 1.2
            torch.testing.assert_close(encoded, wanted, rtol=1e-4, atol=1e-5)

    def test_settings_may_change(self) -> None:
        pipe = make_pipeline("none")
        latents = torch.randn(1, 8, 4, 4)
        before = pipe.codec.raw(latents)
        pipe.register_to_config(latents_mean=[0.6] * 8)
        torch.testing.assert_close(
            pipe.codec.raw(latents) - before, torch.full_like(before, 0.5 / pipe.codec.factors[1])
        )
        pipe = make_pipeline()
        pipe.register_to_config(id2label={0: "cat", 1: "dog", 2: "bird"})
        assert pipe.label_indices(["dog", "bird"]) == [1, 2]

    def test_a_replaced_flow_and_student_are_used(self) -> None:
        pipe = with_student(make_pipeline())
        pipe.enable_fast_decoding("eager")
        options = {"class_labels": [0, 1], "decoding": "student", "output_type": "latent", "denoise": False}
        first = draw(pipe, **options)
        other = with_student(make_pipeline())
        for parameter in other.student.parameters():
            parameter.data.mul_(1.1)
        pipe.student = other.student
        pipe.flow = other.flow
        second = draw(pipe, **options)
        other.enable_fast_decoding("eager")
        assert torch.equal(second, draw(other, **options))
        assert not torch.equal(first, second)

    def test_a_replaced_flow_is_not_held_by_fast_steps(self) -> None:
        pipe = make_pipeline()
        pipe.enable_fast_decoding(None)
        for replace in (lambda flow: setattr(pipe, "flow", flow), lambda flow: pipe.register_modules(flow=flow)):
            draw(pipe, class_labels=[0, 1], **LATENT)
            assert pipe._fast_steps.steps
            pipe.vae = other_autoencoder(latent_channels=8)
            pipe.flow = pipe.flow
            assert pipe._fast_steps.steps
            replace(make_pipeline().flow)
            assert pipe._fast_steps.steps == {}
            assert pipe._fast_steps.backend is None

    def test_a_part_that_was_none_is_saved(self, tmp_path) -> None:
        pipe = make_pipeline("none")
        pipe.finetuned_decoder = LatentDecoder.from_autoencoder(pipe.vae)
        pipe.save_pretrained(tmp_path)
        assert TARFlowPipeline.from_pretrained(tmp_path).finetuned_decoder is not None

    def test_from_pipe(self) -> None:
        pipe = make_pipeline("prefix")
        other = TARFlowPipeline.from_pipe(pipe)
        assert other.components == pipe.components
        assert other.vae is not None
        assert other.parameters == pipe.parameters
        assert np.array_equal(draw(pipe, CAPTIONS, **LATENT), draw(other, CAPTIONS, **LATENT))
        changed = TARFlowPipeline.from_pipe(pipe, noise_std=0.1, vae=other_autoencoder())
        assert changed.config.noise_std == 0.1
        assert changed.codec.factor == 4
        assert pipe.config.noise_std == 0.3

    def test_from_pipe_between_classes(self) -> None:
        pipe = make_pipeline("none")

        class Own(TARFlowPipeline):
            """A user's."""

        class Reconstruction(diffusers.DiffusionPipeline):
            """A user's, of one part."""

            def __init__(self, vae: AutoencoderKL, noise_std: float = 0.0):
                super().__init__()
                self.register_modules(vae=vae)
                self.register_to_config(noise_std=noise_std)

        own = Own.from_pipe(pipe)
        assert type(own) is Own
        assert own.components == pipe.components
        part = Reconstruction.from_pipe(pipe)
        assert part.vae is pipe.vae
        assert part.config.noise_std == 0.3
        whole = TARFlowPipeline.from_pipe(part, flow=pipe.flow)
        assert whole.vae is pipe.vae
        assert whole.config.noise_std == 0.3
        assert draw(whole, num_images=2).shape == (2, 32, 32, 3)

    @pytest.mark.parametrize("conditioning", ["class_prefix", "prefix"])
    def test_components_and_parameters_go_through_the_constructor(self, conditioning: str, tmp_path) -> None:
        make_pipeline(conditioning).save_pretrained(tmp_path)
        pipe = TARFlowPipeline.from_pretrained(tmp_path)
        other = TARFlowPipeline(**pipe.components, **pipe.parameters)
        assert other.components == pipe.components
        assert other.parameters == pipe.parameters

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
    def test_copies(self, duplicate: Callable) -> None:
        pipe = with_student(make_pipeline())
        pipe.enable_fast_decoding("eager")
        labels = {"class_labels": [0, 1], **LATENT}
        before = draw(pipe, **labels), draw(pipe, **{**labels, "decoding": "student"})
        other = duplicate(pipe)
        assert other.flow is not pipe.flow
        assert other._fast_steps is not None
        assert other._fast_steps is not pipe._fast_steps
        after = draw(other, **labels), draw(other, **{**labels, "decoding": "student"})
        for one, two in zip(before, after, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def through_data(flow: TARFlowModel) -> None:
    for parameter in flow.parameters():
        parameter.data.mul_(1.01)


def by_assignment(flow: TARFlowModel) -> None:
    flow.load_state_dict({name: 1.01 * one for name, one in flow.state_dict().items()}, assign=True)


def by_averages(flow: TARFlowModel) -> None:
    EMAModel([1.01 * parameter.detach() for parameter in flow.parameters()]).copy_to(flow.parameters())


class TestStudentKnowsItsFlow:
    @pytest.mark.parametrize(("stored", "read"), [("float16", "bfloat16"), ("bfloat16", "float16")])
    def test_from_the_other_16_bits(self, stored: str, read: str, tmp_path) -> None:
        pipe = with_student(make_pipeline())
        older = with_student(make_pipeline())  # its student was made when fewer hashes were kept
        older.flow, older.student = copy.deepcopy(pipe.flow), copy.deepcopy(pipe.student)
        older.student.register_to_config(flow_hashes=pipe.student.config.flow_hashes[:3])
        for one in (pipe, older):
            one.flow.to(getattr(torch, stored))
            one.save_pretrained(tmp_path)
            loaded = TARFlowPipeline.from_pretrained(tmp_path, torch_dtype=getattr(torch, read))
            loaded.check_student()
            with torch.no_grad():
                next(loaded.flow.parameters()).add_(1)
            with pytest.raises(ValueError, match="this student is of another flow"):
                loaded.check_student()

    @pytest.mark.parametrize("write", [through_data, by_assignment, by_averages])
    def test_weights_that_are_written_unseen(self, write: Callable[[TARFlowModel], None]) -> None:
        pipe = with_student(make_pipeline())
        pipe.flow.load_state_dict({name: one.clone() for name, one in pipe.flow.state_dict().items()}, assign=True)
        pipe.check_student()
        store = pipe.calibration_store()
        versions = [one._version for one in pipe.flow.parameters()]
        write(pipe.flow)
        assert versions == [one._version for one in pipe.flow.parameters()]  # PyTorch has counted nothing
        with pytest.raises(ValueError, match="this student is of another flow"):
            pipe.check_student()
        assert pipe.calibration_store() is not store
        assert pipe.calibration_store() is pipe.calibration_store()

    def test_beside_a_compiled_flow(self) -> None:
        pipe = with_student(make_pipeline())
        plain = flow_hashes(pipe.flow)
        pipe.flow = torch.compile(pipe.flow, backend="eager")
        assert flow_hashes(pipe.flow) == plain
        pipe.check_student()


class TestInferenceMode:
    @pytest.mark.parametrize("conditioning", ["none", "class_prefix", "prefix"])
    def test_calls(self, conditioning: str) -> None:
        pipe = make_pipeline(conditioning)
        arguments = {
            "prefix": {"prompt": CAPTIONS},
            "class_prefix": {"class_labels": [0, 1]},
            "none": {"num_images": 2},
        }
        options = {**arguments[conditioning], "decoding": "sequential"}
        plain = draw(pipe, **options)
        with torch.inference_mode():
            assert np.array_equal(plain, draw(pipe, **options))
        loss = pipe.flow(torch.randn(1, 8, 4, 4), **condition_for(pipe))[0].square().mean()
        loss.backward()  # nothing that inference made is kept
        assert all(parameter.grad is not None for parameter in pipe.flow.blocks[-1].layers.parameters())

    def test_a_pipeline_that_was_loaded_in_it(self, tmp_path) -> None:
        pipe = make_pipeline()
        pipe.save_pretrained(tmp_path)
        plain = draw(pipe, class_labels=[0, 1], decoding="sequential")
        with torch.inference_mode():
            loaded = TARFlowPipeline.from_pretrained(tmp_path)
            loaded.set_progress_bar_config(disable=True)
            found = draw(loaded, class_labels=[0, 1], decoding="sequential")
            draw(loaded, class_labels=[0, 1])  # calibrates
        np.testing.assert_allclose(plain, found, rtol=0, atol=1e-5)

    def test_tools(self) -> None:
        pipe = make_pipeline("class_prefix")
        with torch.inference_mode():
            assert torch.isfinite(pipe.log_likelihood(picture()).log_prob).all()
            assert pipe.inpaint(picture(), half_mask(), passes=1).images[0].size == (32, 32)


def condition_for(pipe: TARFlowPipeline) -> dict[str, Any]:
    kind = pipe.flow.config.conditioning
    if kind == "prefix":
        return {"cond": torch.randn(1, 8, 16)}
    return {"class_labels": torch.tensor([0])} if kind.startswith("class") else {}


def half_mask() -> torch.Tensor:
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[:, 16:] = True
    return mask


@pytest.fixture
def weights_away(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Model offloading for a CPU: an offloaded module's tensors are on "meta", so that any use of them fails."""
    held: dict[nn.Module, tuple[torch.Tensor, dict, str]] = {}

    def tensors(module: nn.Module) -> Iterator[tuple[dict, str]]:
        for part in module.modules():
            for store in (part._parameters, part._buffers):
                yield from ((store, name) for name, value in store.items() if value is not None)

    def take(hook: Any, module: nn.Module) -> nn.Module:
        if module not in held:
            held[module] = [(store, name, store[name]) for store, name in tensors(module)]
            for store, name, value in held[module]:
                away = value.detach().to("meta")
                store[name] = nn.Parameter(away, value.requires_grad) if isinstance(value, nn.Parameter) else away
        return module

    def bring(module: nn.Module) -> nn.Module:
        for store, name, value in held.pop(module, ()):
            store[name] = value
        return module

    def pre_forward(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if hook.prev_module_hook is not None:
            hook.prev_module_hook.offload()
        bring(module)
        return args, kwargs

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", take)
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", pre_forward)
    monkeypatch.setattr(accelerate.hooks.CpuOffload, "detach_hook", lambda hook, module: bring(module))
    yield
    held.clear()
    gc.collect()


@pytest.mark.usefixtures("weights_away")
class TestModelOffload:
    def offloaded(self, pipe: TARFlowPipeline) -> TARFlowPipeline:
        pipe.enable_model_cpu_offload(device="cpu")
        assert pipe.flow.blocks[0].proj_in.weight.device.type == "meta"
        return pipe

    def same(self, pipe: TARFlowPipeline, call: Callable[[TARFlowPipeline], Any]) -> None:
        """A call gives the same with offloading, and leaves nothing on the device."""
        plain = call(pipe)
        pipe = self.offloaded(pipe)
        for _ in range(2):
            np.testing.assert_allclose(np.asarray(plain), np.asarray(call(pipe)), rtol=0, atol=1e-5)
            parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
            assert all(parameter.device.type == "meta" for part in parts for parameter in part.parameters())

    @pytest.mark.parametrize("conditioning", ["none", "class_prefix", "prefix"])
    def test_calls(self, conditioning: str) -> None:
        arguments = {
            "prefix": {"prompt": CAPTIONS, "guidance_scale": 2.0},
            "class_prefix": {"class_labels": [0, 1], "guidance_scale": 2.0},
            "none": {"num_images": 2},
        }[conditioning]
        self.same(make_pipeline(conditioning), lambda pipe: draw(pipe, decoding="sequential", **arguments))

    def test_learned_prior_and_learned_denoiser(self) -> None:
        pipe = make_pipeline("none", learned_prior=True, learned_denoiser="unconditional", denoiser_layers=1)
        self.same(pipe, lambda pipe: draw(pipe, num_images=2, decoding="sequential", denoise="learned"))

    def test_finetuned_decoder(self) -> None:
        pipe = make_pipeline("none")
        pipe.finetuned_decoder = LatentDecoder.from_autoencoder(pipe.vae)
        self.same(pipe, lambda pipe: draw(pipe, num_images=2, decoding="sequential", decoder="finetuned"))

    def test_a_callback_that_decodes_a_preview(self) -> None:
        def preview(pipe: TARFlowPipeline, index: int, step: int, tensors: dict) -> dict:
            assert torch.isfinite(pipe.decode_latents(tensors["latents"])).all()
            assert torch.isfinite(pipe.vae.decode(tensors["latents"]).sample).all()
            return tensors

        options = {"class_labels": [0, 1], "decoding": "sequential", "return_residual": True}
        self.same(make_pipeline(), lambda pipe: draw(pipe, callback_on_step_end=preview, **options))

    def test_a_student_that_is_measured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(inversion, "check_flow", lambda *_: None)  # it reads weights where they are
        options = {"class_labels": [0, 1], "decoding": "student", "guidance_scale": 2.0, "return_residual": True}
        for target in ("clean", "noisy"):
            self.same(with_student(make_pipeline(), target=target), lambda pipe: draw(pipe, **options))
        pipe = self.offloaded(with_student(make_pipeline()))
        assert pipe(**options).residual_max.isfinite().all()

    def test_calibration(self) -> None:
        pipe = self.offloaded(make_pipeline())
        assert np.isfinite(draw(pipe, class_labels=[0, 1])).all()

    def test_encoded_captions_need_no_text_encoder(self) -> None:
        pipe = self.offloaded(make_pipeline("prefix"))
        pipe.run_offload_hook(pipe.flow)
        embeds = torch.ones(1, 8, pipe.flow.config.cond_dim)
        pipe.encode_prompt(None, prompt_embeds=embeds, negative_prompt_embeds=embeds)
        assert pipe.flow.device.type == "cpu" and pipe.text_encoder.device.type == "meta"
        pipe.encode_prompt(CAPTIONS)
        assert pipe.flow.device.type == "meta" and pipe.text_encoder.device.type == "cpu"

    def test_fast_decoding_keeps_nothing_on_the_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        said: list[str] = []
        monkeypatch.setattr(inversion.logger, "warning_once", said.append)
        pipe, labels = make_pipeline(), {"class_labels": [0, 1]}
        pipe.enable_fast_decoding(None)
        plain = draw(pipe, decoding="sequential", **labels)
        assert pipe._fast_steps.steps and not said
        self.offloaded(pipe)
        np.testing.assert_allclose(plain, draw(pipe, decoding="sequential", **labels), rtol=0, atol=1e-5)
        assert pipe._fast_steps.steps == {}
        draw(pipe, **labels)  # calibrates
        assert pipe._fast_steps.steps == {}
        assert all("not compiled where weights leave" in text for text in said) and said

    @pytest.mark.parametrize("conditioning", ["none", "class_prefix", "prefix"])
    def test_tools(self, conditioning: str) -> None:
        label = {"prefix": {"prompt": CAPTIONS[0]}, "class_prefix": {"class_labels": 1}, "none": {}}[conditioning]
        seeded = lambda: torch.Generator().manual_seed(3)

        def tools(pipe: TARFlowPipeline) -> np.ndarray:
            found = [
                pipe.encode(picture(), generator=seeded(), **label).z,
                pipe.log_likelihood(picture(), generator=seeded(), **label).log_prob / 1000,
                pipe.inpaint(
                    picture(), half_mask(), method="metropolis", passes=1, steps=2, generator=seeded(), **label
                ).latents,
                pipe.inpaint(picture(), half_mask(), passes=1, generator=seeded(), **label).log_prob / 1000,
                pipe.vary(picture(), 0.5, generator=seeded(), **label).latents,
                pipe.interpolate(picture(), picture(), 2, generator=seeded(), **label).latents,
            ]
            return np.concatenate([one.flatten().numpy() for one in found])

        self.same(make_pipeline(conditioning, learned_prior=True), tools)

    def test_best_of_and_swap(self) -> None:
        def tools(pipe: TARFlowPipeline) -> np.ndarray:
            generator = torch.Generator().manual_seed(3)
            best = pipe.best_of(2, class_labels=1, generator=generator)
            swapped = pipe.swap(picture(), source_labels=0, target_labels=1, guidance_scale=2.0, generator=generator)
            return np.concatenate([best.log_prob.numpy() / 1000, swapped.latents.flatten().numpy()])

        self.same(make_pipeline(), tools)


@pytest.fixture
def sequential_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers names a device "cpu:0", which is another one than "cpu" for accelerate, and fails after the first layer."""
    plain = accelerate.cpu_offload
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda model, _, **options: plain(model, torch.device("cpu"), **options)
    )


@pytest.mark.usefixtures("sequential_on_a_cpu")
class TestOtherOffloading:
    @pytest.mark.parametrize("conditioning", ["none", "class_prefix", "class_vectors", "prefix"])
    def test_sequential_offload(self, conditioning: str) -> None:
        arguments = {"prefix": {"prompt": CAPTIONS}, "none": {"num_images": 2}}.get(
            conditioning, {"class_labels": [0, 1]}
        )
        if conditioning != "none":
            arguments["guidance_scale"] = 2.0
        pipe = make_pipeline(conditioning, learned_prior=True)
        plain = draw(pipe, decoding="sequential", **arguments)
        pipe.enable_sequential_cpu_offload(device="cpu")
        assert pipe.flow.blocks[0].proj_in.weight.device.type == "meta"
        for decoding in ("auto", "sequential", "jacobi"):
            np.testing.assert_allclose(plain, draw(pipe, decoding=decoding, **arguments), rtol=0, atol=2e-3)
        assert torch.isfinite(pipe.log_likelihood(picture()).log_prob).all()
        assert pipe.inpaint(picture(), half_mask(), passes=1).images[0].size == (32, 32)
        assert pipe.calibrations == {}

    def test_sequential_offload_with_a_student(self) -> None:
        pipe = with_student(make_pipeline())
        options = {"class_labels": [0, 1], "decoding": "student"}
        plain = draw(pipe, **options)
        pipe.enable_sequential_cpu_offload(device="cpu")
        pipe._checked_student = None
        np.testing.assert_allclose(plain, draw(pipe, **options), rtol=0, atol=1e-5)

    def test_device_map(self, tmp_path) -> None:
        pipe = make_pipeline("prefix")
        pipe.save_pretrained(tmp_path)
        plain = draw(pipe, CAPTIONS, decoding="sequential")
        mapped = TARFlowPipeline.from_pretrained(tmp_path, device_map="cpu")
        mapped.set_progress_bar_config(disable=True)
        np.testing.assert_allclose(plain, draw(mapped, CAPTIONS, decoding="sequential"), rtol=0, atol=1e-5)


class TestCallbacks:
    def test_interrupt(self) -> None:
        pipe, seen = make_pipeline(), []

        def stop(pipe: TARFlowPipeline, index: int, step: int, tensors: dict) -> dict:
            seen.append(tensors["latents"])
            pipe._interrupt = True
            assert pipe.interrupt
            return {}

        options = {"class_labels": [0, 1], **LATENT}
        output = pipe(callback_on_step_end=stop, return_residual=True, **options)
        assert len(seen) == 1
        assert torch.equal(output.images, seen[0])
        assert output.residual_max is None
        assert draw(pipe, class_labels=[0, 1], callback_on_step_end=stop).shape == (2, 32, 32, 3)
        assert not torch.equal(draw(pipe, **options), output.images)
        assert not pipe.interrupt

    def test_at_the_last_block_nothing_is_left_out(self) -> None:
        pipe = make_pipeline()

        def stop(pipe: TARFlowPipeline, index: int, step: int, tensors: dict) -> dict:
            pipe._interrupt = index == pipe.num_timesteps - 1
            return {}

        options = {"class_labels": [0, 1], **LATENT}
        assert torch.equal(draw(pipe, callback_on_step_end=stop, **options), draw(pipe, **options))

    def test_what_a_callback_may_ask(self) -> None:
        pipe, seen = make_pipeline(), []

        def look(pipe: TARFlowPipeline, index: int, step: int, tensors: dict) -> dict:
            seen.append(
                (pipe.guidance_scale, pipe.do_classifier_free_guidance, pipe.num_timesteps, pipe.vae_scale_factor)
            )
            return tensors

        draw(pipe, class_labels=[0, 1], callback_on_step_end=look, guidance_scale=2.5)
        draw(with_student(pipe), class_labels=[0, 1], callback_on_step_end=look, decoding="student")
        assert seen == [(2.5, True, 2, 8)] * 2 + [(1.0, False, 1, 8)]

    @pytest.mark.parametrize("conditioning", ["class_prefix", "prefix"])
    @pytest.mark.parametrize(("first", "then"), [(3.0, 1.0), (1.0, 3.0), (3.0, 0.0), (2.0, 4.0)])
    def test_guidance_may_change(self, conditioning: str, first: float, then: float) -> None:
        pipe = make_pipeline(conditioning)
        condition = {"prompt": CAPTIONS} if conditioning == "prefix" else {"class_labels": [0, 1]}

        def change(pipe: TARFlowPipeline, index: int, step: int, tensors: dict) -> dict:
            pipe._guidance_scale = then
            return {}

        options = {**condition, **LATENT, "denoise": False, "latents": torch.randn(2, 8, 4, 4)}
        states = []

        def keep(pipe: TARFlowPipeline, index: int, step: int, tensors: dict) -> dict:
            states.append(tensors["latents"])
            return {}

        pipe(guidance_scale=first, callback_on_step_end=keep, **options)
        middle = states[0]  # after the deep block, guided by the first scale

        def put(pipe: TARFlowPipeline, index: int, step: int, tensors: dict) -> dict:
            return {"latents": middle} if index == 0 else {}

        wanted = pipe(guidance_scale=max(then, 1.0), callback_on_step_end=put, **options).images
        found = pipe(guidance_scale=first, callback_on_step_end=change, return_residual=True, **options)
        torch.testing.assert_close(found.images, wanted, rtol=1e-5, atol=1e-5)
        assert found.residual_max.max() < 1e-4
        assert not torch.allclose(found.images, pipe(guidance_scale=first, **options).images, atol=1e-4)

    def test_diffusers_own_callbacks(self) -> None:
        class Cutoff(PipelineCallback):
            tensor_inputs = ("latents",)

            def callback_fn(self, pipeline: Any, step_index: int, timestep: int, callback_kwargs: dict) -> dict:
                if step_index == int(pipeline.num_timesteps * self.config.cutoff_step_ratio):
                    pipeline._guidance_scale = 0.0
                return callback_kwargs

        pipe = make_pipeline()
        options = {"class_labels": [0, 1], "guidance_scale": 3.0, "latents": torch.randn(2, 8, 4, 4), **LATENT}
        cut = pipe(callback_on_step_end=Cutoff(cutoff_step_ratio=0.0), **options).images
        assert not torch.allclose(cut, pipe(**options).images, atol=1e-4)


class TestArguments:
    def test_encode_prompt_in_diffusers_order(self) -> None:
        pipe = make_pipeline("prefix")
        embeds, null = pipe.encode_prompt(CAPTIONS, "cpu", 2, True, "a blue ring")
        assert embeds.shape == null.shape == (4, 8, 16)
        assert torch.equal(embeds[0], embeds[1])
        again, negative = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=True, negative_prompt="a blue ring")
        assert torch.equal(again, embeds[::2])
        assert torch.equal(negative, null[::2])
        assert pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)[1] is None
        given, away = pipe.encode_prompt(None, None, 2, prompt_embeds=again, negative_prompt_embeds=negative)
        assert torch.equal(given, embeds)
        assert torch.equal(away, null)
        with pytest.raises(ValueError, match="give prompt or prompt_embeds"):
            pipe.encode_prompt(None)

    @pytest.mark.parametrize(
        ("conditioning", "arguments", "message"),
        [
            ("none", {"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least 1, got 0"),
            ("none", {"num_images_per_prompt": 1.5}, "num_images_per_prompt must be a whole number, got 1.5"),
            ("none", {"num_images": 0}, "num_images must be a whole number of at least 1, got 0"),
            ("class_prefix", {"class_labels": 1, "num_images": 4}, "from classes: say num_images_per_prompt=4"),
            ("prefix", {"prompt": "a", "num_images": 4}, "from captions: say num_images_per_prompt=4"),
            (
                "class_prefix",
                {"class_labels": 1, "negative_prompt_embeds": torch.zeros(1, 8, 16)},
                "takes no negative_prompt_embeds",
            ),
            ("prefix", {"prompt": "a", "negative_prompt": "b"}, "no effect without guidance, and guidance_scale is 1"),
            (
                "prefix",
                {"prompt": "a", "negative_prompt": "", "negative_prompt_embeds": torch.zeros(1, 8, 16)},
                "either negative_prompt or negative_prompt_embeds",
            ),
            (
                "none",
                {"decoding": "sequential", "segment": 2},
                "segment is for decoding='gs_jacobi', and has no effect",
            ),
            ("none", {"decoding": "sequential", "tolerance": 0.1}, "tolerance is for .*no effect with decoding='seq"),
            ("none", {"decoding": "fast", "tolerance": 0.1}, "tolerance is for .*no effect with decoding='fast'"),
            ("none", {"decoding": STUDENT, "tolerance": 0.1}, "no effect with decoding='student'"),
            ("none", {"max_sequence_length": 8}, "'none' and takes no max_sequence_length"),
            ("prefix", {"prompt": "a", "max_sequence_length": 0}, "max_sequence_length must be at least 1, got 0"),
        ],
    )
    def test_arguments_without_effect(self, conditioning: str, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_pipeline(conditioning)(**arguments)

    def test_a_learned_prior_has_one_size(self) -> None:
        pipe = make_pipeline("none", learned_prior=True)
        with pytest.raises(ValueError, match="height must be 32, got 64: the model has learned its prior"):
            pipe(height=64)
        with pytest.raises(ValueError, match=r"learned its prior for samples \(8, 4, 4\), got \(8, 4, 1\)"):
            pipe.flow.scale_noise(torch.zeros(2, 8, 4, 1))

    def test_a_flow_that_lacks_a_tensor(self, tmp_path) -> None:
        from safetensors.torch import load_file, save_file

        from tarflow.pipeline.opening import open_pipeline

        make_pipeline("none").save_pretrained(tmp_path)
        file = tmp_path / "flow" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        del tensors["blocks.0.proj_in.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        for load in (TARFlowPipeline.from_pretrained, lambda folder: open_pipeline(str(folder), "cpu")):
            with pytest.raises(
                ValueError, match=r"the flow of .* lacks the tensors blocks\.0\.proj_in\.weight: its files"
            ):
                load(tmp_path)
