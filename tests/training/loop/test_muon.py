"""Muon: matrices are stepped along nearly orthogonal updates, all else by AdamW."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from autoencoders import small_autoencoder
from decoders import finetune, tiny_pipeline
from helpers import ROOT, small_model
from torch import Tensor, nn
from trainings import train

from tarflow.common.arguments import parse_dataclass
from tarflow.training.flow.arguments import parse_config
from tarflow.training.loop.config import OptimConfig
from tarflow.training.loop.muon import Muon, orthogonalised
from tarflow.training.loop.optimizer import hidden_matrices, make_optimizer
from tarflow.training.student.config import StudentConfig


def weights(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(2, 48, 48), (3, 16, 64), (1, 1, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_are_near_one_and_vectors_stay(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.linspace(0.05, 1, shape[1])
    found = orthogonalised((u * values @ v).to(dtype)).float()
    left = u.mT @ found @ v.mT  # diagonal where the singular vectors are kept
    assert torch.linalg.svdvals(found).min() > 0.6
    assert torch.linalg.svdvals(found).max() < 1.3
    assert (left - torch.diag_embed(left.diagonal(dim1=1, dim2=2))).abs().max() < (
        0.06 if dtype == torch.bfloat16 else 1e-3
    )


@pytest.mark.parametrize("shape", [(48, 48), (24, 96), (96, 24)])
def test_steps_are_those_of_torchs_muon(shape: tuple[int, int]) -> None:
    (ours,), (theirs,) = weights(shape), weights(shape)
    muon = Muon([{"params": [ours], "muon": True}], lr=2e-3, weight_decay=0.1)
    other = torch.optim.Muon([theirs], lr=2e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = theirs.detach().clone()
    for seed in range(3):
        set_gradients([ours], seed)
        set_gradients([theirs], seed)
        muon.step()
        other.step()
    # Both iterate in bfloat16 and are about as far from exact numbers as from each other.
    assert (ours - theirs).norm() < 0.06 * (theirs - before).norm()


def test_pieces_are_matrices_of_their_own() -> None:
    (joined,) = weights((3 * 16, 32))
    parts = [nn.Parameter(part.clone()) for part in joined.detach().chunk(3)]
    set_gradients([joined], 5)
    assert joined.grad is not None
    for part, gradient in zip(parts, joined.grad.chunk(3), strict=True):
        part.grad = gradient.clone()
    Muon([{"params": [joined], "muon": True, "pieces": [3]}]).step()
    Muon([{"params": parts, "muon": True}]).step()
    assert torch.allclose(joined, torch.cat(parts), atol=1e-4)


def test_other_groups_are_stepped_by_adamw_and_have_rates_of_their_own() -> None:
    ours, theirs = weights((8, 8), (5,)), weights((8, 8), (5,))
    muon = Muon([{"params": [ours[0]], "muon": True, "lr": 0.0}, {"params": [ours[1]], "lr": 1e-2}])
    adamw = torch.optim.AdamW([theirs[1]], lr=1e-2, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        muon.step()
        adamw.step()
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


def test_a_run_goes_on_to_the_bit() -> None:
    def made(start: list[Tensor]) -> tuple[list[nn.Parameter], Muon]:
        parameters = [nn.Parameter(tensor.clone()) for tensor in start]
        return parameters, Muon([{"params": parameters[:2], "muon": True}, {"params": parameters[2:]}])

    def steps(parameters: list[nn.Parameter], muon: Muon, seeds: range) -> None:
        for seed in seeds:
            set_gradients(parameters, seed)
            muon.step()

    start = [weight.detach() for weight in weights((8, 24), (24, 8), (5,))]
    whole, muon = made(start)
    steps(whole, muon, range(4))
    half, first = made(start)
    steps(half, first, range(2))
    rest, second = made([weight.detach() for weight in half])
    second.load_state_dict(first.state_dict())
    steps(rest, second, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(whole, rest, strict=True))


def test_parameters_without_gradients_stay() -> None:
    used, unused = weights((8, 8), (8, 8))
    before = unused.detach().clone()
    muon = Muon([{"params": [used, unused], "muon": True}])
    set_gradients([used], 0)
    muon.step()
    assert torch.equal(unused, before)
    assert unused not in muon.state


@pytest.mark.parametrize(("shape", "pieces"), [((8,), 1), ((9, 8), 2)])
def test_what_is_no_matrix_is_refused(shape: tuple[int, ...], pieces: int) -> None:
    with pytest.raises(ValueError, match=rf"{pieces} matrices for Muon cannot be made of a tensor \({shape[0]},"):
        Muon([{"params": weights(shape), "muon": True, "pieces": [pieces]}])


def test_hidden_matrices_of_a_flow_are_those_of_its_layers() -> None:
    model = small_model()
    pieces, names = hidden_matrices(model), {name: parameter for name, parameter in model.named_parameters()}
    hidden = {name: pieces[id(parameter)] for name, parameter in names.items() if id(parameter) in pieces}
    assert {name.rpartition(".layers.")[2].partition(".")[2] for name in hidden} == {
        "attention.qkv.weight",
        "attention.proj.weight",
        "mlp.up.weight",
        "mlp.down.weight",
    }
    assert all(names[name].shape[0] % count == 0 for name, count in hidden.items())
    attention = next(part for part in model.modules() if hasattr(part, "qkv"))
    assert pieces[id(attention.qkv.weight)] == attention.heads + 2 * attention.kv_heads


def test_hidden_kernels_of_an_autoencoder_are_inside() -> None:
    vae = small_autoencoder()
    pieces = hidden_matrices(vae)
    hidden = {name for name, parameter in vae.named_parameters() if id(parameter) in pieces}
    assert any("resnets" in name for name in hidden)
    assert not [name for name in hidden if name.startswith(("encoder.conv", "decoder.conv", "quant", "post_quant"))]
    assert all(name.endswith(".weight") and "norm" not in name for name in hidden)


def test_rates_and_decays_are_of_their_own_and_both_parts_are_clipped_together() -> None:
    model = small_model()
    optim = OptimConfig(name="muon", lr=1e-3, muon_lr=4e-3, weight_decay=0.1, muon_weight_decay=0.0, muon_momentum=0.9)
    groups = [{"params": list(model.parameters()), "lr": 5e-4, "peak_lr": 5e-4}]
    muon = make_optimizer(groups, optim, model)
    others, hidden = muon.param_groups
    assert (others["peak_lr"], others["weight_decay"], others["muon"]) == (5e-4, 0.1, False)
    assert (hidden["peak_lr"], hidden["weight_decay"], hidden["momentum"]) == (2e-3, 0.0, 0.9)
    assert others["clip_with"] == hidden["clip_with"]
    assert len(others["params"]) + len(hidden["params"]) == len(list(model.parameters()))


def test_the_settings_make_a_flow_learn_with_it(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, "--optim.name", "muon", "--train.steps", "2", "--log.checkpoint_every", "1")
    groups = trainer.task.learner.optimizer.param_groups
    assert [group["muon"] for group in groups] == [False, True]
    with pytest.raises(ValueError, match=r"was trained with optim\.name 'muon', not 'adamw': set it to that"):
        train(tmp_path, "--train.steps", "3", "--resume", "latest")


def test_a_decoder_learns_with_it(tmp_path: Path) -> None:
    tiny_pipeline(tmp_path / "pipeline")
    found = [
        finetune(
            tmp_path / "pipeline", tmp_path / name, "--save_to", str(tmp_path / f"{name}_pipeline"), "--optimizer", name
        )
        for name in ("adamw", "muon")
    ]
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim.name", "lion"], r"optim\.name must be one of 'adamw', 'muon', got 'lion'"),
        (["--optim.muon_lr", "1e-3"], r"optim\.muon_lr is 0\.001, but the optimizer is 'adamw'"),
        (
            ["--optim.muon_lr", "1e-3", "--optim.muon_momentum", "0.9"],
            r"has no such setting: set optim\.muon_lr null, optim\.muon_momentum 0\.95$",
        ),
        (["--optim.name", "muon", "--optim.muon_lr", "0"], r"optim\.muon_lr must be positive, got 0"),
        (
            ["--optim.name", "muon", "--lora.rank", "4", "--init_from", "drawings_class"],
            r"optim\.name is 'muon', which is for whole matrices, but lora\.rank 4 trains an adapter: set optim\.name adamw$",
        ),
        (
            [
                "--config",
                str(ROOT / "configs/quickstart_class.yaml"),
                "--lora.rank",
                "4",
                "--init_from",
                "drawings_class",
            ],
            r"set optim\.name adamw, optim\.muon_lr null, optim\.muon_weight_decay null, optim\.muon_momentum 0\.95$",
        ),
    ],
)
def test_settings_that_do_not_fit_get_a_sentence(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(["--data", "{}", "--output", "run", *options])


def test_settings_of_other_networks_are_called_otherwise() -> None:
    base = ["--pipeline", "drawings_class", "--data", "{}"]
    with pytest.raises(ValueError, match=r"^muon_momentum is 0\.5, but the optimizer is 'adamw'"):
        parse_dataclass(StudentConfig, [*base, "--muon_momentum", "0.5"])
    config, _ = parse_dataclass(StudentConfig, [*base, "--optimizer", "muon", "--muon_momentum", "0.5"])
    assert config.loop(Path("run")).optim.name == "muon"


def test_a_network_without_hidden_matrices_is_refused() -> None:
    layer = nn.Linear(4, 4)
    groups = [{"params": list(layer.parameters()), "peak_lr": 1e-3}]
    with pytest.raises(ValueError, match="hidden matrices, of which what is trained here has none"):
        make_optimizer(groups, OptimConfig(name="muon"), layer)
