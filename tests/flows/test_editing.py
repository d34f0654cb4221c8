"""The exact-flow tools: on small flows against definitions and integrals, and as methods of a pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import condition_of, perturb, random_images, small_model
from PIL import Image
from pipelines import CAPTIONS, make_pipeline

from tarflow.evaluation.likelihood.out_of_distribution import roc, typicality
from tarflow.flows.editing import HeldFlow, interpolate, metropolis, resample
from tarflow.flows.likelihood import log_prob, token_log_prob
from tarflow.flows.model import TARFlowModel

MODELS = [
    {"conditioning": "prefix"},
    {"conditioning": "class_prefix", "first_order": "row_major"},
    {"start_token": False, "positions": "learned", "learned_prior": True},
    {"deep_order": "coarse_to_fine"},
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def double_model(**options: object) -> TARFlowModel:
    model = perturb(small_model(**options), 0.05).double()
    if model.prior_variance is not None:
        model.prior_variance.copy_(0.5 + torch.rand_like(model.prior_variance))
    return model


@pytest.mark.parametrize("options", MODELS)
def test_shares_of_tokens_sum_to_the_log_prob(options: dict) -> None:
    model = double_model(**options)
    x, condition = random_images(model, 3), condition_of(model, 3)
    shares = token_log_prob(model, x, **condition)
    assert shares.shape == (3, 2, 2)
    torch.testing.assert_close(shares.sum((1, 2)), log_prob(model, x, **condition))


@pytest.mark.parametrize("path", ["spherical", "linear"])
def test_a_path_has_its_ends_and_the_priors_norm(path: str) -> None:
    a, b = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    points = interpolate(a, b, 5, path)
    torch.testing.assert_close(points[0], a)
    torch.testing.assert_close(points[-1], b)
    assert (points.flatten(1).norm(dim=1) / a.numel() ** 0.5 - 1).abs().max() < 0.05
    torch.testing.assert_close(interpolate(a, a, 3, "spherical"), a.expand(3, -1, -1, -1))


def test_resampling_keeps_the_prior() -> None:
    z, noise = torch.randn(2, 100_000, dtype=torch.float64)
    assert torch.equal(resample(z, noise, 0), z)
    assert torch.equal(resample(z, noise, 1), noise)
    assert float(resample(z, noise, 0.5).std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("options", MODELS)
def test_the_held_flow_is_a_flow_of_the_hole(options: dict) -> None:
    model = double_model(**options)
    reference, condition = random_images(model, 2), condition_of(model, 2)
    hole = torch.tensor([[[False, True], [True, False]], [[True, False], [False, False]]])
    held = HeldFlow(model, reference, hole, **condition)
    noise = torch.randn(2, 4, 8, dtype=torch.float64) * held.hole
    x, log_det = held.inverse(noise)
    known = ~hole.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(x)
    assert torch.equal(x[known], reference[known])
    back, log_det_back = held.forward(x)
    torch.testing.assert_close(back, noise)
    torch.testing.assert_close(log_det_back, log_det)
    places = held.hole[1].expand(4, 8)

    def of_hole(values: torch.Tensor) -> torch.Tensor:  # of the second picture
        full = noise.clone()
        full[1, places] = values
        return model.patchify(held.inverse(full)[0])[0][1, places]

    values = noise[1, places]
    columns = [(of_hole(values + e) - of_hole(values - e)) / 2e-5 for e in 1e-5 * torch.eye(8, dtype=torch.float64)]
    torch.testing.assert_close(torch.stack(columns).slogdet()[1], -log_det[1], rtol=1e-6, atol=1e-6)


#: Densities of one number are integrated from −LINE to LINE, with steps of 0.005.
LINE = 20


def two_tokens(blocks: tuple[int, ...], chains: int, place: int) -> tuple[HeldFlow, torch.Tensor, torch.Tensor]:
    """A flow of two numbers, one of them known; draws from the exact conditional of the other, (chains, 1, 1, 2); and
    its distribution function on a line from −LINE to LINE."""
    model = TARFlowModel(in_channels=1, sample_size=2, layers_per_block=blocks, width=32, head_dim=32, soft_clip=1)
    perturb(model, 0.2).double().eval()
    line = torch.linspace(-LINE, LINE, 400 * LINE + 1, dtype=torch.float64)
    points = torch.full((len(line), 2), 0.7, dtype=torch.float64)
    points[:, place] = line
    with torch.no_grad():
        density = torch.cat([log_prob(model, part.view(-1, 1, 1, 2)).exp() for part in points.split(5000)])
    function = density.cumsum(0) / density.sum()
    assert density[0] + density[-1] < 1e-6 * density.max(), "the line is too short"
    x = torch.full((chains, 1, 1, 2), 0.7, dtype=torch.float64)
    x[..., place] = line[torch.searchsorted(function, torch.rand(chains, 1, 1, dtype=torch.float64))]
    hole = torch.zeros(chains, 1, 2, dtype=torch.bool)
    hole[..., place] = True
    reference = torch.full_like(x, 0.7)
    reference[..., place] = x[..., place].median()
    return HeldFlow(model, reference, hole), x, function


def distance(samples: torch.Tensor, function: torch.Tensor) -> float:
    """Kolmogorov–Smirnov distance of samples to a distribution function from −LINE to LINE."""
    places = ((samples.sort()[0] + LINE) * 200).round().long().clamp(0, len(function) - 1)
    return float((function[places] - (torch.arange(len(samples)) + 0.5) / len(samples)).abs().max())


@pytest.mark.parametrize("place", [0, 1])
def test_the_chain_keeps_the_exact_conditional(place: int) -> None:
    held, x, function = two_tokens((1, 1, 1), 2000, place)
    limit = 1.95 / 2000**0.5  # which one set of exact draws in a thousand exceeds
    assert distance(x[..., place].flatten(), function) < limit

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(2000, 2, 1, dtype=torch.float64), torch.rand(2000, dtype=torch.float64)

    chain = metropolis(held, x, draw, 4, 0.8)
    assert 0.05 < chain.acceptance.mean() < 0.999
    assert (chain.x != x)[..., place].float().mean() > 0.2
    assert torch.equal(chain.x[..., 1 - place], x[..., 1 - place])
    assert distance(chain.x[..., place].flatten(), function) < limit
    torch.testing.assert_close(chain.log_prob[-1], log_prob(held.model, chain.x).detach())


def test_one_block_fills_a_last_token_exactly() -> None:
    held, x, function = two_tokens((1,), 2000, 0)  # in reversed order token 0 is the last
    filled, _ = held.inverse(torch.randn(2000, 2, 1, dtype=torch.float64))
    assert distance(filled[..., 0].flatten(), function) < 1.95 / 2000**0.5
    chain = metropolis(held, x, lambda: (torch.randn(2000, 2, 1), torch.rand(2000)), 3, 1.0)
    assert chain.acceptance.min() == 1


def test_roc_and_typicality() -> None:
    low, high, auc = roc(torch.tensor([1.0, 2, 3, 4]), torch.tensor([3.5, 5, 6, 2]))
    assert auc == pytest.approx((3 + 4 + 4 + 1.5) / 16)
    assert (low[0], high[0], low[-1], high[-1]) == (0, 0, 1, 1)
    assert auc == pytest.approx(float(torch.trapezoid(high, low)))
    assert typicality(torch.tensor([1.0, 3, 6]), torch.tensor([2.0, 4])).tolist() == [2, 0, 3]


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return make_pipeline("prefix")


@pytest.fixture(scope="module")
def classes():
    torch.manual_seed(0)
    return make_pipeline()


PICTURES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))


def test_encode_leads_back_and_can_be_drawn_again(pipe) -> None:
    for noise in (True, False):
        out = pipe.encode(PICTURES, CAPTIONS, generator=seeded(), noise=noise)
        assert out.z.shape == (2, 8, 4, 4)
        assert out.error.max() < 1e-4
    again = pipe(CAPTIONS, latents=out.z, denoise=False, output_type="latent", decoding="sequential").images
    torch.testing.assert_close(again, out.latents, atol=1e-4, rtol=0)
    pil = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in PICTURES]
    torch.testing.assert_close(pipe.encode(pil, CAPTIONS, noise=False).z, out.z)
    pipe.flow.double()
    try:
        assert pipe.encode(PICTURES, CAPTIONS, generator=seeded()).error.max() < 1e-12
    finally:
        pipe.flow.float()


def test_likelihood_has_a_map(pipe) -> None:
    out = pipe.log_likelihood(PICTURES, CAPTIONS, generator=seeded())
    latents = pipe.encode(PICTURES, CAPTIONS, generator=seeded()).latents
    cond, _ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    torch.testing.assert_close(out.log_prob, log_prob(pipe.flow, latents, cond=cond))
    torch.testing.assert_close(out.map.sum((1, 2)), out.log_prob)
    torch.testing.assert_close(out.nats_per_dim, -out.log_prob / 128)


def test_interpolation_variation_and_swap(classes) -> None:
    latents = classes.encode(PICTURES, class_labels=[0, 2], generator=seeded(), noise=False).latents
    own = classes.remove_noise(latents, True, torch.tensor([0, 2]))
    options = {"generator": seeded(), "noise": False, "output_type": "latent"}
    path = classes.interpolate(PICTURES[0], PICTURES[1], 3, class_labels=0, **options).images
    torch.testing.assert_close(path[0], own[0], atol=1e-4, rtol=0)
    assert path.shape == (3, 8, 4, 4)
    same = classes.vary(PICTURES, 0.0, class_labels=[0, "gas pump"], **options).images
    torch.testing.assert_close(same, own, atol=1e-4, rtol=0)
    first, second = (
        classes.vary(pictures, 1.0, class_labels=1, generator=seeded(3), noise=False, output_type="latent").images
        for pictures in (PICTURES, 255 - PICTURES)
    )
    torch.testing.assert_close(first, second)
    swapped = classes.swap(PICTURES, source_labels=[0, 2], target_labels=[0, 2], **options).images
    torch.testing.assert_close(swapped, own, atol=1e-4, rtol=0)
    assert (classes.swap(PICTURES, source_labels=[0, 2], target_labels=1, **options).images - own).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["fill", "metropolis"])
def test_inpainting_keeps_what_is_not_masked(pipe, method: str) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 20))
    made = np.array(mask) > 127
    options = {"method": method, "passes": 2, "steps": 3, "output_type": "np"}
    outs = [pipe.inpaint(PICTURES, mask, CAPTIONS, generator=seeded(seed), **options) for seed in (1, 1, 2)]
    first, again, other = ((out.images * 255).round().astype(np.uint8) for out in outs)
    original = PICTURES.permute(0, 2, 3, 1).numpy()
    assert np.array_equal(first[:, ~made], original[:, ~made])
    assert np.array_equal(first, again)
    assert not np.array_equal(first[:, made], other[:, made])
    changed = PICTURES.clone()
    changed[:, :, torch.from_numpy(made)] = 7  # what the mask hides is not seen
    hidden = pipe.inpaint(changed, mask, CAPTIONS, generator=seeded(1), **options).images
    np.testing.assert_allclose(hidden, outs[0].images, atol=1e-4)
    if method == "metropolis":
        assert outs[0].log_prob.shape == (4, 2)
        assert 0 <= outs[0].acceptance.min() <= outs[0].acceptance.max() <= 1


def test_temperature_and_best_of(classes) -> None:
    def drawn(temperature: float) -> torch.Tensor:
        options = {"denoise": False, "output_type": "latent", "decoding": "sequential"}
        return classes(class_labels=0, generator=seeded(), temperature=temperature, **options).images

    z = torch.randn(1, 8, 4, 4, generator=seeded())
    expected, _ = classes.flow.inverse(0.5 * z, class_labels=torch.tensor([0]))
    torch.testing.assert_close(drawn(0.5), expected)
    assert not torch.equal(drawn(0.5), drawn(1.0))
    out = classes.best_of(4, class_labels="church", generator=seeded(), output_type="pt")
    assert out.images.shape == (4, 3, 32, 32)
    assert out.log_prob.tolist() == sorted(out.log_prob.tolist(), reverse=True)


HALF = torch.arange(32).expand(32, 32) > 15


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("encode", {"image": PICTURES[..., 1:]}, r"has 32 × 31 pixels, the model takes 32 × 32"),
        ("encode", {"image": Image.new("RGB", (40, 32))}, r"has 32 × 40 pixels.*fit=True"),
        ("encode", {"image": Image.new("RGBA", (32, 32))}, "transparent"),
        ("encode", {"image": "cat.png"}, "must be a PIL picture, a list of them, or a tensor, got str"),
        ("encode", {"image": PICTURES.float()}, "8-bit numbers, or real ones from 0 to 1"),
        (
            "encode",
            {"image": PICTURES, "prompt_embeds": torch.zeros(2, 8, 15)},
            r"shape \(2, L, 16\), got \(2, 8, 15\)",
        ),
        ("encode", {"image": PICTURES, "prompt": ["a", "b", "c"]}, "prompt has 3 entries for 2 images"),
        ("encode", {"image": PICTURES, "class_labels": 1}, "takes no class labels"),
        ("interpolate", {"first": PICTURES[0], "second": PICTURES[1], "steps": 1}, "at least 2 steps"),
        ("interpolate", {"first": PICTURES[0], "second": PICTURES[1], "path": "x"}, "spherical, linear, got 'x'"),
        ("vary", {"image": PICTURES, "strength": 1.5}, "from 0 to 1, got 1.5"),
        ("inpaint", {"image": PICTURES, "mask": HALF[1:]}, r"image's 32 × 32 pixels, got the shape \(31, 32\)"),
        ("inpaint", {"image": PICTURES, "mask": HALF | True}, "selects all pixels"),
        ("inpaint", {"image": PICTURES, "mask": HALF & False}, "selects no pixel"),
        ("inpaint", {"image": PICTURES, "mask": torch.eye(32).roll(4, 0) + (torch.arange(32) % 8 == 0)}, "leave one"),
        ("inpaint", {"image": PICTURES, "mask": HALF, "method": "magic"}, "fill, metropolis, got 'magic'"),
        ("inpaint", {"image": PICTURES, "mask": HALF, "passes": 0}, "passes must be at least 1"),
        ("inpaint", {"image": PICTURES, "mask": HALF, "method": "metropolis", "step_size": 0}, "above 0, at most 1"),
        ("best_of", {"num": 0, "prompt": "a"}, "num must be at least 1"),
        ("__call__", {"prompt": "a", "temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_bad_input(pipe, tool: str, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(pipe, tool)(**arguments)


def test_pictures_are_fitted_if_asked(pipe) -> None:
    wide = Image.new("RGB", (80, 40), "red")
    assert pipe.encode(wide, "a red ring", fit=True).z.shape == (1, 8, 4, 4)


def test_other_blocks_have_a_likelihood_but_no_map() -> None:
    pipe = make_pipeline("none", block="coupling")
    assert pipe.log_likelihood(PICTURES).map is None
    with pytest.raises(ValueError, match="for autoregressive blocks; this model has others"):
        pipe.inpaint(PICTURES, HALF)
