"""Random numbers of trainings: each has the distribution that it is said to have, and none tells of another."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from draws import CLASSES, COUNT, CPU, LIMIT, SHAPE, Codec, assert_independent, parts, pictures, run_config
from torch import Tensor

from tarflow.data.images import background_colour
from tarflow.training.autoencoder.mixture import Mixture
from tarflow.training.autoencoder.task import AutoencoderTask
from tarflow.training.flow.inputs import InputMaker
from tarflow.training.loop.batches import StepSampler
from tarflow.training.loop.component import noisy_latents, posterior_of
from tarflow.training.loop.draws import Purpose, counted_noise, draw_chances, draw_noise, sample_seed
from tarflow.training.student.objective import StudentObjective


def assert_normal(values: Tensor) -> None:
    values = values.double()
    assert abs(float(values.mean())) < LIMIT / values.numel() ** 0.5
    assert float(values.std()) == pytest.approx(1, abs=LIMIT / (2 * values.numel()) ** 0.5)
    assert float(values.pow(4).mean()) == pytest.approx(3, abs=LIMIT * (96 / values.numel()) ** 0.5)
    deviations = values.flatten(1).std(0)  # of each number of a picture
    assert float((deviations - 1).abs().max()) < LIMIT / (2 * len(values)) ** 0.5


def assert_share(values: Tensor, share: float) -> None:
    error = (share * (1 - share) / len(values)) ** 0.5
    assert float(values.double().mean()) == pytest.approx(share, abs=LIMIT * error)


def test_numbers_of_all_purposes_are_independent() -> None:
    places = range(COUNT)
    normal = {name: draw_noise(0, 7, places, (16,), CPU, name) for name in get_args(Purpose)}
    chances = {f"chance of {name}": draw_chances(0, 7, places, CPU, name) for name in get_args(Purpose)}
    for values in normal.values():
        assert_normal(values)
    for values in chances.values():
        assert float(values.min()) >= 0 and float(values.max()) < 1
        assert float(values.mean()) == pytest.approx(0.5, abs=LIMIT / (12 * COUNT) ** 0.5)
        assert float(values.std()) == pytest.approx(12**-0.5, abs=0.01)
        assert_share(values < 0.1, 0.1)
    uniform = draw_noise(0, 7, places, (3,), CPU, "noise", uniform=True)
    assert float(uniform.mean()) == pytest.approx(0.5, abs=LIMIT / (12 * uniform.numel()) ** 0.5)
    assert_independent(**normal, **chances)
    assert_independent(uniform=uniform, posterior=normal["posterior"], **chances)


def test_numbers_of_places_and_steps_are_independent() -> None:
    steps = torch.stack([draw_noise(0, step, range(4), (8,), CPU, "noise") for step in range(-1, 5000)])
    chances = torch.stack([draw_chances(0, step, range(4), CPU, "drop") for step in range(-1, 5000)])
    assert_normal(steps)
    assert_independent(noise=steps, chances=chances)  # of places, in a step
    later = {"later": steps[1:], "later chances": chances[1:]}  # of steps, at a place
    assert_independent(noise=steps[:-1], chances=chances[:-1], **later)
    other = torch.stack([draw_noise(1, step, range(4), (8,), CPU, "noise") for step in range(-1, 5000)])
    assert_independent(noise=steps, other_seed=other)


def test_numbers_that_are_made_at_once_are_independent_too() -> None:
    """As on CUDA devices, here on the CPU."""
    places, keys = range(COUNT), {name: sample_seed(0, 7, -1, name) for name in get_args(Purpose)}
    normal = {name: counted_noise(key, places, (16,), CPU) for name, key in keys.items()}
    for values in normal.values():
        assert_normal(values)
    uniform = counted_noise(keys["noise"], places, (3,), CPU, uniform=True)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    assert float(uniform.mean()) == pytest.approx(0.5, abs=LIMIT / (12 * uniform.numel()) ** 0.5)
    assert float(uniform.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert_independent(**normal)
    steps = torch.stack([counted_noise(sample_seed(0, step, -1, "noise"), range(4), (8,), CPU) for step in range(5000)])
    assert_normal(steps)
    assert_independent(noise=steps[:-1], later=steps[1:])


def test_numbers_that_are_made_at_once_depend_on_places_alone() -> None:
    whole = counted_noise(5, range(8), (3, 5), CPU)
    assert whole.shape == (8, 3, 5) and whole.dtype == torch.float32
    assert torch.equal(counted_noise(5, [6, 2], (3, 5), CPU), whole[[6, 2]])
    assert not torch.equal(counted_noise(6, range(8), (3, 5), CPU), whole)


def test_draws_are_functions_of_their_arguments() -> None:
    whole = draw_noise(3, 5, range(8), (4,), CPU, "noise")
    assert torch.equal(draw_noise(3, 5, [6, 2], (4,), CPU, "noise"), whole[[6, 2]])
    assert torch.equal(draw_chances(3, 5, [6, 2], CPU, "flip"), draw_chances(3, 5, range(8), CPU, "flip")[[6, 2]])
    several = itertools.product((0, 1), (-1, 0, 1), range(20), get_args(Purpose))
    seeds = [sample_seed(*arguments) for arguments in several]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def read(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Training noise and posterior's draws, (COUNT, 4, 4) each, and which are mirrored, of `Codec`'s latents with σ
    0.001."""
    flipped = latents[:, 0, 0, 0] < 0
    plain = torch.where(flipped[:, None, None], latents[:, 0].flip(-1), latents[:, 0])
    means = to_means(pictures())[:, 0]
    noise = (plain - means) / 1e-3
    return torch.where(flipped[:, None, None], noise.flip(-1), noise), latents[:, 1] / 1e6, flipped


def to_means(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


@pytest.mark.parametrize("cached", [False, True])
def test_flow_batches(cached: bool) -> None:
    config = run_config("--data.flip", "true", "--train.noise_std", "0.001")
    batch: dict[str, Any] = {"label": torch.zeros(COUNT).long()}
    if cached:
        for name, images in (("", pictures()), ("_flipped", pictures().flip(-1))):
            batch[f"latent_mean{name}"], batch[f"latent_std{name}"] = Codec().encode_posterior(to_means(images))
    else:
        batch["image"] = pictures()
    inputs = InputMaker(config, parts(), CPU).training(batch, 5, range(COUNT))
    noise, posterior, flipped = read(inputs["latents"].double())
    dropped = inputs["class_labels"] == CLASSES
    assert_normal(posterior)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)  # read to three digits
    assert_share(flipped, 0.5)
    assert_share(dropped, 0.1)
    assert_independent(noise=noise, posterior=posterior, flipped=flipped, dropped=dropped)
    for chosen in (dropped, ~dropped, flipped, ~flipped):  # as an encoded decision would show itself
        assert float((noise[chosen].flatten(1).std(0) - 1).abs().max()) < LIMIT / (2 * int(chosen.sum())) ** 0.5


def test_flow_batches_of_pixels_with_uniform_noise() -> None:
    config = run_config("--data.flip", "true", "--vae.name", "none", "--train.noise", "uniform")
    batch = {"image": pictures(), "label": torch.zeros(COUNT).long()}
    inputs = InputMaker(config, parts(), CPU).training(batch, 5, range(COUNT))
    levels = (inputs["latents"].double() + 1) * 128  # 8-bit numbers with their noise
    noise = levels - levels.floor()
    flipped, dropped = levels[:, 0, 0, 0] < 128, inputs["class_labels"] == CLASSES
    assert float(noise.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(noise.std()) == pytest.approx(12**-0.5, abs=0.01)
    assert_share(flipped, 0.5)
    assert_independent(noise=noise, flipped=flipped, dropped=dropped)


def test_joint_batches() -> None:
    config = run_config("--data.flip", "true", "--vae.train", "joint", "--train.noise_std", "0")
    batch = {"image": pictures(), "label": torch.zeros(COUNT).long()}
    inputs = InputMaker(config, parts(), CPU).training(batch, 5, range(COUNT))
    flipped, dropped = inputs["images"][:, 0, 0, 0] < 0, inputs["class_labels"] == CLASSES
    assert_normal(inputs["noise"])
    assert_share(flipped, 0.5)
    assert_share(dropped, 0.1)
    assert_independent(noise=inputs["noise"], flipped=flipped, dropped=dropped)


class TwoColours:
    """A source of a picture that is mirrored at random."""

    config = SimpleNamespace(flip=True)

    def __init__(self, value: int):
        self.value = value

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = torch.full((3, 1, 2), self.value)
        image[0, 0, 0], image[1] = 255, index
        return {"image": image, "skipped": []}


def test_autoencoder_batches() -> None:
    mixture = Mixture([TwoColours(1), TwoColours(2)], [1, 3], seed=0)
    images = torch.stack([mixture[place]["image"] for place in range(COUNT)])
    second, flipped, chosen = images[:, 2, 0, 0] == 2, images[:, 0, 0, 1] == 255, images[:, 1, 0, 0]
    assert_share(second, 0.75)
    assert_share(flipped, 0.5)
    task: Any = object.__new__(AutoencoderTask)
    task.config, task.latent_shape = SimpleNamespace(seed=0, kl_weight=1.0), SHAPE
    task.accelerator = SimpleNamespace(device=CPU)
    decoded, *_ = task.decode(lambda images, noise: (noise, noise, noise), {"image": pictures()}, 5, range(COUNT))
    assert_normal(decoded)
    backgrounds = torch.tensor([background_colour("random", 0, index) for index in range(COUNT)])
    is_white = (backgrounds == 255).all(1)
    assert_share(is_white, 0.5)
    assert_independent(noise=decoded, second=second, flipped=flipped, chosen=chosen, white=is_white)


def student_objective(guidance: str) -> Any:
    """One without networks, for its draws."""
    objective: Any = object.__new__(StudentObjective)
    flow = SimpleNamespace(
        config=SimpleNamespace(conditioning="class_prefix"), device=CPU, null_label=CLASSES, scale_noise=lambda z: z
    )
    objective.pipe = SimpleNamespace(
        codec=Codec(), flow=flow, config=SimpleNamespace(noise_std=1e-3), noise_levels=None
    )
    objective.accelerator = SimpleNamespace(device=CPU, autocast=nullcontext)
    objective.config = SimpleNamespace(
        seed=0,
        data=SimpleNamespace(flip=True),
        sample_posterior=True,
        unguided_share=0.2,
        guidance=guidance,
        own_share=1.0,
        target="clean",
    )
    objective.largest_weight, objective.null_cond = 2.0, None
    return objective


def test_student_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = student_objective("extrapolated")
    batch = {"image": pictures(), "label": torch.zeros(COUNT).long()}
    found = objective.pictures(batch, 5, range(COUNT))
    noise, posterior, flipped = read(found.noisy.double())
    dropped, unguided = found.labels == CLASSES, found.weight == 0
    assert_normal(posterior)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert_share(flipped, 0.5)
    assert_share(unguided, 0.2)
    assert_share(dropped, 0.1)
    weights = found.weight[~unguided] / 2
    assert float(weights.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(weights.std()) == pytest.approx(12**-0.5, abs=0.01)
    draws = {"noise": noise, "posterior": posterior, "flipped": flipped}
    assert_independent(**draws, unguided=unguided)
    assert_independent(**draws, dropped=dropped)
    guided = {name: values[~unguided] for name, values in draws.items()}
    assert_independent(**guided, weight=found.weight[~unguided])

    # Its own samples, of a noise that is none of the pictures'.
    monkeypatch.setattr("tarflow.training.student.objective.score_denoise", lambda flow, noisy, sigma, **_: noisy)
    priors = []
    objective.network = lambda z, labels, cond, weight: priors.append(z) or torch.zeros_like(z)
    objective.put_own_samples(found, 5, range(COUNT))
    own_noise = found.noisy / 1e-3
    assert_normal(priors[0])
    assert_normal(own_noise)
    assert_independent(**draws, prior=priors[0], own_noise=own_noise, unguided=unguided)


def test_decoder_batches() -> None:
    pipe: Any = SimpleNamespace(codec=Codec(), config=SimpleNamespace(noise_std=1e-3))
    config: Any = SimpleNamespace(seed=0, sample_posterior=True)
    accelerator: Any = SimpleNamespace(device=CPU, autocast=nullcontext)
    flipped = draw_chances(0, 5, range(COUNT), CPU, "flip") < 0.5
    posterior = posterior_of(pipe, accelerator, {"image": pictures()}, flipped)
    noisy = noisy_latents(pipe, config, posterior, 5, range(COUNT))
    noise, posterior, found = read(noisy.double())
    assert torch.equal(found, flipped)
    assert_normal(posterior)
    assert_independent(noise=noise, posterior=posterior, flipped=flipped)


def test_orders_of_epochs_are_independent() -> None:
    sampler = StepSampler([range(16)], 16, 0, 1, 1, 0, 0, 3000)
    orders = torch.tensor(list(sampler)).double()  # (epochs, 16)
    spread = orders.mean(0) - 7.5
    assert float(spread.abs().max()) < LIMIT * (255 / 12 / 3000) ** 0.5
    noise = torch.stack([draw_noise(0, step, range(1), (8,), CPU, "noise")[0] for step in range(3000)])
    assert_independent(first=orders[:-1, 0], second=orders[1:, 0], noise=noise[1:])
