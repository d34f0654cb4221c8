"""Likelihood of held-out pictures: exact where it can be, and named so that nobody mixes them up."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import perturb

from tarflow import TARFlowModel, TARFlowPipeline
from tarflow.data.config import DataConfig
from tarflow.data.drawings import CLASS_NAMES
from tarflow.data.images import Images
from tarflow.evaluation.likelihood.held_out import evaluate_likelihood
from tarflow.flows.likelihood import bits_per_dim, dequantize
from tarflow.pipeline.conditions import check_class_names
from tarflow.vae.codec import load_autoencoder


def pixel_pipeline(**options) -> TARFlowPipeline:
    arguments = {"in_channels": 3, "sample_size": 8, "patch_size": 4, "layers_per_block": (1, 1), "width": 64}
    return TARFlowPipeline(TARFlowModel(**{**arguments, "head_dim": 32, **options}).eval())


def drawings(size: int = 8) -> Images:
    return Images(DataConfig(image_size=size), "validation")


def test_bits_per_dim_of_a_unit_normal() -> None:
    images, count, draws = drawings(), 6, 5
    result = evaluate_likelihood(
        pixel_pipeline(), images, count, draws, importance=draws, seed=2
    )  # a new flow: identity
    total, bound = [], []
    for i in range(count):
        nats = []
        for draw in range(draws):
            noise = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed((2 * 1_000_003 + i) * 1_009 + draw))
            x = dequantize(images[i]["image"], noise).double()
            nats.append(float((0.5 * x.pow(2) + 0.5 * math.log(2 * math.pi)).sum()))
        total.append(sum(nats) / draws / x.numel())
        smallest = min(nats)
        bound.append((smallest - math.log(sum(math.exp(smallest - n) for n in nats) / draws)) / x.numel())
    assert result.name == "bits_per_dim"
    assert result.mean == pytest.approx(bits_per_dim(sum(total) / count), rel=1e-5)
    assert result.bound == pytest.approx(bits_per_dim(sum(bound) / count), rel=1e-5)
    assert result.bound < result.mean
    expected = torch.tensor(total).std() / math.sqrt(count) / math.log(2)
    assert result.standard_error == pytest.approx(float(expected), rel=1e-3)


def test_batch_size_does_not_matter() -> None:
    pipe = pixel_pipeline(conditioning="class_vectors", num_classes=36, positions="learned")
    perturb(pipe.flow)
    results = [evaluate_likelihood(pipe, drawings(), 5, 2, batch_size=batch_size) for batch_size in (2, 5)]
    assert results[0].mean == pytest.approx(results[1].mean, rel=1e-6)
    without = evaluate_likelihood(pipe, drawings(), 5, 2, with_condition=False)
    assert without.mean != results[0].mean


def test_latent_models_give_nats_per_latent_dim() -> None:
    flow = TARFlowModel(sample_size=4, layers_per_block=(1,), width=64, head_dim=32)
    pipe = TARFlowPipeline(flow.eval(), load_autoencoder("drawings_emoji_f8c8"), noise_std=0.3)
    result = evaluate_likelihood(pipe, drawings(32), 4, 2)
    assert result.name == "latent_nats_per_dim"
    assert result.bound is None
    with pytest.raises(ValueError, match="this one models latents"):
        evaluate_likelihood(pipe, drawings(32), 4, importance=2)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"pictures of 8 pixels, but data\.image_size is 16"):
        evaluate_likelihood(pixel_pipeline(), drawings(16))
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        evaluate_likelihood(pixel_pipeline(), drawings(), 2, draws=0)
    with pytest.raises(ValueError, match="has 1 channels; pictures have 3"):
        evaluate_likelihood(pixel_pipeline(in_channels=1), drawings(), 2)


def test_classes_under_other_numbers_are_refused() -> None:
    names = dict(enumerate(reversed(CLASS_NAMES)))
    pipe = pixel_pipeline(conditioning="class_vectors", num_classes=36, positions="learned")
    pipe.register_to_config(id2label=names)
    with pytest.raises(ValueError, match="the class 'red circle' is number 35 of the model, but 0 of the data"):
        evaluate_likelihood(pipe, drawings(), 2, 1)
    assert math.isfinite(evaluate_likelihood(pipe, drawings(), 2, 1, with_condition=False).mean)


def test_classes_of_one_name() -> None:
    pipe = pixel_pipeline(conditioning="class_vectors", num_classes=3, positions="learned")
    pipe.register_to_config(id2label={0: "crane", 1: "tench", 2: "crane"})
    check_class_names(pipe, ("crane", "tench", "crane"))
    with pytest.raises(ValueError, match="the class 'tench' is number 1 of the model, but 0 of the data"):
        check_class_names(pipe, ("tench", "crane"))
    with pytest.raises(ValueError, match="the class 'crane' is number 2 of the model, but 1 of the data"):
        check_class_names(pipe, ("crane", "crane", "tench"))
    assert pipe.labels == {"crane 0": 0, "tench": 1, "crane 2": 2}
    with pytest.raises(ValueError, match="unknown class name 'crane'; known are crane 0, tench, crane 2"):
        pipe(class_labels="crane")


def test_unknown_names_are_other_names_only_of_all_classes() -> None:
    pipe = pixel_pipeline(conditioning="class_vectors", num_classes=3, positions="learned")
    pipe.register_to_config(id2label={0: "tench", 1: "church", 2: "gas pump"})
    check_class_names(pipe, ("n01", "n02", "n03"))
    check_class_names(pipe, ("tench", "church"))
    check_class_names(pixel_pipeline(), ("a", "b"))
    with pytest.raises(
        ValueError, match="the model has 3 classes, and the data 2, of which the model does not know 'n01'"
    ):
        check_class_names(pipe, ("n01", "n02"))
