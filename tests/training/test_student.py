"""Students that make a sample in one pass: the network, the pipeline's mode, the training."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from autoencoders import save_autoencoder
from fid_helpers import write_pictures
from helpers import ROOT, condition_of, files_of, random_images, small_model
from pipelines import CAPTIONS, draw, make_pipeline
from safetensors.torch import load_file, save_file
from students import small_student, tiny_pipeline, train, with_student
from torchvision.models import mobilenet_v2

from tarflow import TARFlowPipeline
from tarflow.cli.main import main
from tarflow.common.arguments import parse_dataclass
from tarflow.data.config import DataConfig
from tarflow.evaluation.reports.settings import SweepConfig
from tarflow.evaluation.reports.sweep import run_sweep
from tarflow.evaluation.samples.generation import generate_images
from tarflow.evaluation.samples.record import read_record
from tarflow.evaluation.samples.settings import GenerationConfig
from tarflow.evaluation.samples.student_error import block_errors, exact_states
from tarflow.experiments.settings import StudentComparisonConfig
from tarflow.experiments.students import compare_student
from tarflow.flows.decoding import sampling
from tarflow.flows.decoding.method import guided_states
from tarflow.flows.layers.guidance import Guidance
from tarflow.flows.student import StudentModel
from tarflow.training.flow.config import VaeConfig
from tarflow.training.latent_cache.caching import cache_latents
from tarflow.training.latent_cache.config import CacheConfig
from tarflow.training.loop.step import Stepper
from tarflow.training.student.config import StudentConfig
from tarflow.training.student.loss import alignment_loss, extrapolated, teacher_states
from tarflow.training.student.objective import StudentObjective
from tarflow.training.student.pairs import KeptPairs, Pairs


class TestPairs:
    @pytest.mark.parametrize("method", ["gaussian", "linear"])
    @pytest.mark.parametrize("conditioning", ["class_prefix", "class_vectors", "prefix"])
    def test_the_guided_flow_maps_its_samples_back(self, conditioning, method) -> None:
        model = small_model(conditioning=conditioning).double()
        condition = condition_of(model, 3)
        null = model.condition(None, torch.zeros(1, 3, 5).double() if conditioning == "prefix" else None, 3)
        cond, z = (
            model.condition(*(condition.get(name) for name in ("class_labels", "cond")), 3),
            random_images(model, 3),
        )
        weights = torch.tensor([0.0, 0.7, 2.0]).double()
        drawn = [
            sampling.generate(
                model, z[i : i + 1], cond[i : i + 1], null[i : i + 1], Guidance(float(weights[i]), method)
            )[0]
            for i in range(3)
        ]
        states = teacher_states(model, torch.cat(drawn), cond, null, weights, method)
        assert len(states) == len(model.blocks) + 1
        torch.testing.assert_close(states[0], z, rtol=0, atol=1e-9)

    def test_plain_states_are_the_flows_own(self) -> None:
        model = small_model(conditioning="class_prefix").double()
        x, condition = random_images(model, 2), condition_of(model, 2)
        z, _, outputs = model(x, **condition, return_block_outputs=True)
        states = teacher_states(model, x, model.condition(condition["class_labels"], None, 2), None, None, "linear")
        for state, wanted in zip(states, [z, outputs[0], x], strict=True):
            torch.testing.assert_close(state, wanted, rtol=0, atol=1e-12)

    def test_errors_of_the_exact_inverse_are_zero(self) -> None:
        model = small_model(conditioning="class_prefix").double()
        labels, z, guidance = torch.tensor([0, 2]), random_images(model, 2), Guidance(1.5)
        conditions = model.condition(labels, None, 2), model.condition(None, None, 2), guidance
        exact = exact_states(model, z, *conditions)
        assert max(block_errors(model, exact[0], exact, *conditions)) < 1e-9
        moved = block_errors(model, exact[0] + 0.5, exact, *conditions)
        assert len(moved) == len(model.blocks) + 1
        assert moved[0] == pytest.approx(0.5)
        assert min(moved[1:]) > 0.1

    def test_coupling_blocks_have_states_too(self) -> None:
        model = small_model(conditioning="class_prefix", block="coupling").double()
        labels, z = torch.tensor([0, 2]), random_images(model, 2)
        conditions = model.condition(labels, None, 2), model.condition(None, None, 2), Guidance(1.5)
        x, _ = sampling.generate(model, z, *conditions)
        torch.testing.assert_close(
            model.unpatchify(guided_states(model, x, *conditions)[-1], (2, 2)), z, rtol=0, atol=1e-9
        )

    def test_losses(self) -> None:
        a, b, c = (torch.full((2, 1, 2, 2), value) for value in (1.0, 3.0, 0.0))
        assert float(alignment_loss([a, a], [b, c])) == pytest.approx((4 + 1) / 2)
        assert torch.equal(extrapolated(b, a, torch.tensor([0.0, 2.0]))[:, 0, 0, 0], torch.tensor([3.0, 7.0]))


class TestModel:
    @pytest.mark.parametrize("conditioning", ["none", "class_prefix", "class_vectors", "prefix"])
    @pytest.mark.parametrize("through_states", [True, False])
    def test_everything_is_seen_and_learns(self, conditioning, through_states, tmp_path) -> None:
        flow = small_model(conditioning=conditioning)
        student = small_student(flow, through_states=through_states)
        z, condition = random_images(flow, 2).requires_grad_(), condition_of(flow, 2)
        weight = {} if conditioning == "none" else {"guidance_weight": torch.tensor([0.5, 2.0])}
        x, states = student(z, **condition, **weight, return_states=True)
        (gradient,) = torch.autograd.grad(x[0, 0, 0, 0], z, retain_graph=True)
        assert gradient[0].abs().min() > 0  # the first token sees the last
        assert not gradient[1].any()
        (x.pow(2).mean() + sum(state.pow(2).mean() for state in states)).backward()
        assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []
        if conditioning != "none":
            assert not torch.allclose(x, student(z, **condition, guidance_weight=0.0))
        student.save_pretrained(tmp_path)
        loaded = StudentModel.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(z, **condition, **weight), x, rtol=0, atol=1e-5)

    def test_another_size_and_bfloat16(self) -> None:
        student = small_student(small_model(conditioning="none"))
        assert student(torch.randn(1, 2, 8, 6)).shape == (1, 2, 8, 6)
        z = torch.randn(2, 2, 4, 4)
        torch.testing.assert_close(student.bfloat16()(z.bfloat16()), student.float()(z), rtol=0.1, atol=0.02)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"width": 48}, r"head_dim \(32\) must divide the student's width \(48\)"),
            ({"target": "other"}, "target must be one of clean, noisy, got 'other'"),
            ({"state_layers": (2, 4)}, r"state_layers must rise within 1 to 3.*got \[2, 4\]"),
            ({"max_guidance_scale": 0.5}, r"max_guidance_scale must be at least 1 \(off\), got 0.5"),
        ],
    )
    def test_bad_settings(self, changes, message) -> None:
        with pytest.raises(ValueError, match=message):
            small_student(small_model(conditioning="class_prefix"), **changes)

    def test_conditions_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match=r"class_labels must have the shape \(2,\), got None"):
            small_student(small_model(conditioning="class_prefix"))(torch.randn(2, 2, 4, 4))
        with pytest.raises(ValueError, match=r"cond must have the shape \(2, L, 5\), got \(2, 3, 6\)"):
            small_student(small_model(conditioning="prefix"))(torch.randn(2, 2, 4, 4), cond=torch.randn(2, 3, 6))


class TestPipeline:
    @pytest.mark.parametrize("conditioning", ["none", "class_prefix", "prefix"])
    def test_a_saved_student_draws(self, conditioning, tmp_path) -> None:
        pipe = with_student(make_pipeline(conditioning))
        pipe.save_pretrained(tmp_path / "pipeline")
        loaded = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
        loaded.set_progress_bar_config(disable=True)
        options = {
            "none": {"num_images": 2},
            "class_prefix": {"class_labels": [0, "church"], "guidance_scale": 2.0},
            "prefix": {"prompt": CAPTIONS, "guidance_scale": 2.0},
        }[conditioning]
        images = draw(pipe, decoding="student", **options)
        np.testing.assert_allclose(draw(loaded, decoding="student", **options), images, rtol=0, atol=1e-5)
        loaded.enable_model_cpu_offload(device="cpu")
        np.testing.assert_allclose(draw(loaded, decoding="student", **options), images, rtol=0, atol=1e-5)
        latents = draw(pipe, decoding="student", output_type="latent", **options)
        noise = torch.cat([torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)])
        labels = torch.tensor([0, 1]) if conditioning == "class_prefix" else None
        cond = (
            pipe.encode_prompt(CAPTIONS, "cpu", do_classifier_free_guidance=False)[0]
            if conditioning == "prefix"
            else None
        )
        wanted = pipe.student(noise, labels, cond, options.get("guidance_scale", 1.0) - 1)
        torch.testing.assert_close(latents, wanted.detach(), rtol=0, atol=1e-5)
        assert not np.array_equal(images, draw(pipe, decoding="sequential", **options))

    def test_compiled_it_draws_the_same(self) -> None:
        pipe = with_student(make_pipeline("class_prefix"))
        options = {"class_labels": [0, 1], "decoding": "student", "output_type": "latent"}
        plain = [draw(pipe, guidance_scale=scale, **options) for scale in (1.0, 2.5)]
        pipe.enable_fast_decoding(backend="aot_eager")
        for scale, latents in zip((1.0, 2.5), plain, strict=True):
            torch.testing.assert_close(draw(pipe, guidance_scale=scale, **options), latents, rtol=0, atol=1e-5)
        assert not torch.allclose(*plain)
        pipe.disable_fast_decoding()
        assert torch.equal(draw(pipe, guidance_scale=1.0, **options), plain[0])

    def test_noise_of_its_targets(self) -> None:
        pipe, calls = with_student(make_pipeline("none"), target="noisy", state_layers=(1,)), []
        options = {"num_images": 2, "decoding": "student", "output_type": "latent"}
        raw, denoised = (draw(pipe, denoise=flag, **options) for flag in (False, True))
        torch.testing.assert_close(draw(pipe, **options), denoised, rtol=0, atol=1e-5)
        assert not torch.allclose(raw, denoised, rtol=0, atol=1e-5)
        pipe = with_student(make_pipeline("none"))

        def remember(pipe, index, step, tensors):
            calls.append((index, step, tensors["latents"].clone()))
            return {}

        output = pipe(num_images=2, decoding="student", return_residual=True, callback_on_step_end=remember)
        assert [call[:2] for call in calls] == [(0, 0)]
        assert output.residual_mean.shape == (2,)
        assert bool((output.residual_mean > 0.01).all())

    def test_generation_and_the_command_line(self, tmp_path, capsys) -> None:
        folder = tmp_path / "pipeline"
        with_student(make_pipeline("class_prefix")).save_pretrained(folder)
        settings = {"pipeline": str(folder), "num": 4, "batch_size": 2, "guidance_scale": 2.0}
        generate_images(GenerationConfig(**settings, out=str(tmp_path / "a"), decoding="student"))
        record = read_record(tmp_path / "a")
        assert (record["settings"]["decoding"], record["settings"]["denoise"]) == ("student", False)
        command = ["generate", "--pipeline", str(folder), "--class", "church", "--decoding", "student"]
        main([*command, "--guidance", "2", "--out", str(tmp_path / "b.png"), "--seed", "1"])
        assert (tmp_path / "b.png").is_file()
        with pytest.raises(SystemExit):
            main([*command, "--guidance", "4", "--out", str(tmp_path / "c.png")])
        assert "guidance_scale is 4, but this student" in capsys.readouterr().err

    def test_sweeps_put_it_beside_its_flow(self, tmp_path) -> None:
        with_student(make_pipeline("class_prefix")).save_pretrained(tmp_path / "pipeline")
        gen = GenerationConfig(pipeline=str(tmp_path / "pipeline"), out=str(tmp_path / "sweep"), num=2, batch_size=2)
        config = SweepConfig(gen=gen, decoding=["sequential", "student"], match=True)
        rows = run_sweep(config, measure=lambda images: {"match_all": 0.5})
        taken = [(row["settings"]["decoding"], row["settings"]["denoise"]) for row in rows]
        assert taken == [("sequential", True), ("student", False)]

    def test_it_knows_its_flow_from_smaller_files(self, tmp_path) -> None:
        pipe = with_student(make_pipeline("none"))
        for dtype in (torch.float16, torch.bfloat16):
            folder = tmp_path / str(dtype)
            pipe.flow.to(dtype).save_pretrained(tmp_path / "flow")
            pipe.save_pretrained(folder)
            loaded = TARFlowPipeline.from_pretrained(folder)
            loaded.set_progress_bar_config(disable=True)
            loaded(num_images=1, decoding="student")
            pipe = with_student(make_pipeline("none"))
        with torch.no_grad():
            next(pipe.flow.parameters()).add_(1e-3)
        with pytest.raises(ValueError, match="this student is of another flow: the weights' SHA-256 begins with"):
            pipe(num_images=1, decoding="student")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"guidance_scale": 4.0},
                "guidance_scale is 4, but this student was trained with guidance scales from 1 to 3",
            ),
            ({"guidance_scale": 2.0, "guidance_method": "linear"}, "knows the guidance method 'gaussian' alone"),
            ({"guidance_scale": 2.0, "negative_prompt": "a red ring"}, "leave negative_prompt out"),
            ({"denoise": True}, "no noise left to remove: leave denoise=True out"),
            ({"decoder": "finetuned"}, "no noise left to remove: leave decoder='finetuned' out"),
            ({"denoise": "none", "decoder": "finetuned"}, "no noise left to remove: leave decoder='finetuned' out"),
        ],
    )
    def test_calls_that_do_not_fit(self, options, message) -> None:
        pipe = with_student(make_pipeline("prefix"))
        with pytest.raises(ValueError, match=message):
            pipe(CAPTIONS, decoding="student", **options)

    @pytest.mark.parametrize("denoise", [None, False, "none"])
    def test_no_noise_removal_has_three_names(self, denoise) -> None:
        pipe = with_student(make_pipeline("none"))
        assert len(pipe(decoding="student", denoise=denoise).images) == 1

    def test_pipelines_without_one(self) -> None:
        with pytest.raises(ValueError, match=r"no student: train one with tarflow train-student --pipeline FOLDER"):
            make_pipeline("none")(decoding="student")


class TestPairsUsedAgain:
    def pairs(self, first: int, count: int) -> Pairs:
        """Pairs whose numbers tell which they are."""
        numbers = torch.arange(first, first + count)
        latents = numbers[:, None, None, None].float().expand(-1, 2, 3, 3)
        states = latents[:, None].expand(-1, 4, -1, -1, -1)
        return Pairs(clean=latents, labels=numbers, cond=None, weight=numbers.float(), states=states)

    def test_all_of_a_pair_comes_back_together_and_the_oldest_goes(self) -> None:
        kept, chances = KeptPairs(5), torch.arange(50) / 50
        assert kept.among(self.pairs(0, 3), chances).labels.tolist() == [0, 1, 2]
        for first in (0, 3, 6):
            kept.add(self.pairs(first, 3))
        found = kept.among(self.pairs(9, 1), chances)
        assert found.cond is None
        assert found.labels[0] == 9
        assert sorted(set(found.labels[1:].tolist())) == [4, 5, 6, 7, 8]
        assert all(torch.equal(found.labels.float(), value) for value in (found.weight, found.clean[:, 1, 2, 0]))
        assert torch.equal(found.states[:, 3], found.clean)

    def test_more_than_are_kept(self) -> None:
        kept = KeptPairs(4)
        kept.add(self.pairs(0, 10))
        assert sorted(kept.kept["labels"].tolist()) == [6, 7, 8, 9]

    def test_they_are_read_as_they_were_written(self, tmp_path) -> None:
        kept, read = KeptPairs(6), KeptPairs(6)
        for first in (0, 3):
            kept.write(tmp_path / "pairs.safetensors")
            read.read(tmp_path / "pairs.safetensors", torch.device("cpu"))
            for one in (kept, read):
                one.add(self.pairs(first, 3))
            chances = torch.arange(12) / 12
            found = [one.among(self.pairs(9, 1), chances).labels.tolist() for one in (kept, read)]
            assert found[0] == found[1]


class TestTraining:
    def test_it_learns_the_way_back(self, tmp_path) -> None:
        pipe = tiny_pipeline(tmp_path / "pipeline")
        first = train(tmp_path / "pipeline", tmp_path / "a", "--steps", "1", "--save_to", str(tmp_path / "new"))
        last = train(tmp_path / "pipeline", tmp_path / "b", "--steps", "60", "--eval_every", "30", "--batch_size", "16")
        assert np.isfinite(last["psnr"])
        assert last["error_samples"] < 0.8 * first["error_samples"]
        assert last["error_noise"] < 0.8 * first["error_noise"]
        assert len(last["errors_by_block"]) == len(pipe.flow.blocks)
        assert (tmp_path / "b" / "samples" / "samples_00000030.png").is_file()
        trained = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
        trained.set_progress_bar_config(disable=True)
        assert trained.student.config.max_guidance_scale == 2
        assert trained(class_labels=[0, 1], decoding="student").images[0].size == (16, 16)
        settings = ["--pipeline", str(tmp_path / "pipeline"), "--out", str(tmp_path / "c"), "--batch_sizes", "[2]"]
        config, _ = parse_dataclass(StudentComparisonConfig, [*settings, "--repeats", "1", "--num", "4"])
        report = compare_student(config, trained)
        assert [row["timed"] for row in report["speed"]] == ["latents", "pictures"]
        assert report["errors"][-1] == pytest.approx(last["error_noise"], rel=0.5)
        assert {path.name for path in (tmp_path / "c").iterdir()} == {"student.json", "student.md", "samples.png"}
        assert files_of(tmp_path / "pipeline" / "flow") == files_of(tmp_path / "new" / "flow")

    @pytest.mark.parametrize(
        "options",
        [
            ["--alignment", "none", "--guidance_scale", "1"],
            ["--alignment", "states", "--target", "noisy"],
            ["--guidance", "extrapolated", "--data.flip", "true"],
            ["--own_share", "0.5", "--own_after", "0"],
            ["--patch_size", "4"],
            ["--reuse", "3", "--reuse_from", "20"],
        ],
    )
    def test_every_choice_has_its_effect(self, tmp_path, options) -> None:
        tiny_pipeline(tmp_path / "pipeline")
        results = [train(tmp_path / "pipeline", tmp_path / name, *more) for name, more in (("a", []), ("b", options))]
        assert np.isfinite(results[1]["psnr"])
        assert results[0]["psnr"] != results[1]["psnr"]

    @pytest.mark.parametrize("options", [[], ["--data.flip", "true"], ["--sample_posterior", "false", "--reuse", "2"]])
    def test_a_cache_of_latents_teaches_what_its_pictures_do(self, tmp_path, options) -> None:
        tiny_pipeline(tmp_path / "pipeline", "none")
        folder = {"source": "folder", "path": str(write_pictures(tmp_path / "pictures", 24, size=(16, 16)))}
        data = DataConfig(**folder, image_size=16, validation_fraction=0.3)
        vae = VaeConfig(name=str(tmp_path / "pipeline" / "vae"))
        cache = CacheConfig(output=str(tmp_path / "cache"), data=data, vae=vae, dtype="float32", flip=True)
        cache_latents(cache)
        sources = {
            "pictures": ["--data.source", "folder", "--data.path", folder["path"], "--data.validation_fraction", "0.3"],
            "cache": ["--data.source", "latents", "--data.path", cache.output],
        }
        found, students = {}, {}
        for name, source in sources.items():
            target = tmp_path / f"{name}_pipeline"
            found[name] = train(
                tmp_path / "pipeline", tmp_path / f"{name}_run", *source, *options, "--save_to", str(target)
            )
            students[name] = load_file(next((target / "student").glob("*.safetensors")))
        assert found["cache"]["error_noise"] == pytest.approx(found["pictures"]["error_noise"], rel=1e-3)
        # The pictures themselves are not there: the decoder's are what is rebuilt.
        assert np.isfinite(found["cache"]["psnr"])
        assert found["cache"]["psnr"] != found["pictures"]["psnr"]
        for key, value in students["pictures"].items():
            torch.testing.assert_close(students["cache"][key], value, rtol=0, atol=1e-3)

    def test_caches_that_do_not_fit(self, tmp_path) -> None:
        tiny_pipeline(tmp_path / "pipeline", "none")
        pictures = str(write_pictures(tmp_path / "pictures", 8, size=(32, 32)))
        for name, vae, size, message in (
            ("other", save_autoencoder(tmp_path / "vae"), 16, "encoded by another autoencoder than that of"),
            ("larger", str(tmp_path / "pipeline" / "vae"), 32, r"has latents of 8 × 8, but the cache's are 16 × 16"),
        ):
            data = DataConfig(source="folder", path=pictures, image_size=size, validation_fraction=0)
            cache = CacheConfig(output=str(tmp_path / name), data=data, vae=VaeConfig(name=vae))
            cache_latents(cache)
            with pytest.raises(ValueError, match=message):
                train(tmp_path / "pipeline", tmp_path / "run", "--data.source", "latents", "--data.path", cache.output)
        assert not (tmp_path / "run").exists()

    def test_own_samples_come_in_the_later_part_of_shortened_runs(self, tmp_path, monkeypatch) -> None:
        tiny_pipeline(tmp_path / "pipeline")
        begun, take = [], Stepper.take
        monkeypatch.setattr(
            StudentObjective, "put_own_samples", lambda self, pictures, step, sample_ids: begun.append(step)
        )
        monkeypatch.setattr(Stepper, "take", lambda self, batches, step, total: take(self, batches, step, 4))
        train(tmp_path / "pipeline", tmp_path / "a", "--own_share", "0.5")
        assert begun == [2, 3, 4, 5]

    def test_decoded_pictures_can_count_too(self, tmp_path) -> None:
        tiny_pipeline(tmp_path / "pipeline")
        save_file(mobilenet_v2().state_dict(), tmp_path / "mobilenet_v2.safetensors")
        options = ["--perceptual", "5", "--perceptual_weights", str(tmp_path / "mobilenet_v2.safetensors")]
        options += ["--perceptual_pictures", "4"]
        results = [train(tmp_path / "pipeline", tmp_path / name, *more) for name, more in (("a", []), ("b", options))]
        assert np.isfinite(results[1]["psnr"])
        assert results[0]["psnr"] != results[1]["psnr"]

    def test_unconditional_flows_have_students(self, tmp_path) -> None:
        tiny_pipeline(tmp_path / "pipeline", "none")
        assert np.isfinite(train(tmp_path / "pipeline", tmp_path / "a")["psnr"])
        with pytest.raises(ValueError, match=r"unconditional: there is no guidance, but guidance_scale is 2\.0"):
            train(tmp_path / "pipeline", tmp_path / "b", "--guidance_scale", "2")

    def test_resuming_is_bit_identical(self, tmp_path) -> None:
        options = ["--checkpoint_every", "3", "--data.flip", "true", "--own_share", "0.5", "--accumulation", "2"]
        options += ["--reuse", "2", "--reuse_from", "36"]
        for name in ("whole", "parts"):
            tiny_pipeline(tmp_path / name)
            train(tmp_path / name, tmp_path / f"run_{name}", *options)
        shutil.rmtree(tmp_path / "run_parts" / "checkpoints" / "step_00000006")
        shutil.rmtree(tmp_path / "parts")
        tiny_pipeline(tmp_path / "parts")
        train(tmp_path / "parts", tmp_path / "run_parts", *options, "--resume", "latest")
        assert files_of(tmp_path / "whole") == files_of(tmp_path / "parts")
        with pytest.raises(ValueError, match=r"student\.width is 64 there and 32 here"):
            train(tmp_path / "parts", tmp_path / "run_parts", *options, "--resume", "latest", "--width", "32")
        for setting, value, message in (
            ("reuse", "1", "reuse is 2 there and 1"),
            ("reuse_from", "40", "reuse_from is 36 there and 40"),
        ):
            with pytest.raises(ValueError, match=f"{message} here"):
                train(tmp_path / "parts", tmp_path / "run_parts", *options, "--resume", "latest", f"--{setting}", value)
        pairs = tmp_path / "run_parts" / "checkpoints" / "step_00000006" / "pairs_0.safetensors"
        pairs.write_bytes(pairs.read_bytes()[:100])
        with pytest.raises(ValueError, match=r"pairs_0\.safetensors' cannot be read, it is damaged or cut off"):
            train(tmp_path / "parts", tmp_path / "run_parts", *options, "--resume", "latest")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--data.image_size", "32"], r"has pictures of 16 pixels, but data\.image_size is 32"),
            (["--num_layers", "2"], "num_layers must be at least 3, one more than the states of the flow"),
            (["--perceptual", "1"], "perceptual needs weights of mobilenet_v2: set perceptual_weights"),
            (["--unguided_share", "2"], r"unguided_share must be in \[0, 1\], got 2"),
            (["--reuse", "0"], "reuse must be at least 1, got 0"),
            (["--guidance_scale", "0.5"], r"guidance_scale must be at least 1 \(off\), got 0\.5"),
        ],
    )
    def test_bad_settings(self, tmp_path, options, message) -> None:
        tiny_pipeline(tmp_path / "pipeline")
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "pipeline", tmp_path / "a", *options)
        assert not (tmp_path / "a").exists()

    def test_shipped_configurations_are_valid(self) -> None:
        for path in sorted((ROOT / "configs").glob("student_*.yaml")):
            config, _ = parse_dataclass(StudentConfig, ["--config", str(path)])
            assert config.folder == Path("runs") / f"{path.stem.removeprefix('student_')}_student"


def test_a_copy_does_not_replace_another_pipeline(tmp_path) -> None:
    tiny_pipeline(tmp_path / "pipeline")
    other = TARFlowPipeline.from_pretrained(tmp_path / "pipeline")
    torch.nn.init.normal_(other.flow.blocks[0].proj_in.weight)
    other.save_pretrained(tmp_path / "other")
    before = files_of(tmp_path / "other")
    with pytest.raises(ValueError, match="a pipeline with another flow"):
        train(tmp_path / "pipeline", tmp_path / "run", "--save_to", str(tmp_path / "other"))
    assert files_of(tmp_path / "other") == before
