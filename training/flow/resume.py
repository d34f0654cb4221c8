"""What a flow's training must have in common with the checkpoint that it goes on from."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from tarflow.data.latents import CachedLatents
from tarflow.data.stream.stream import Stream
from tarflow.flows.trajectory.kinds import KINDS
from tarflow.flows.trajectory.names import FLOW
from tarflow.training.flow.config import RunConfig, is_joint
from tarflow.training.flow.setup import Parts
from tarflow.training.loop.checkpoint import check_invariants


def check_state(path: Path, state: dict[str, Any], invariants: dict[str, Any]) -> None:
    """Whether a run can go on from a checkpoint.

    Args:
        path, state: the checkpoint and its run.json.
        invariants: what must be the same in the run: the complete arguments of its model as "flow", "ema_decays",
            "images_per_step", whether it is "sharded", under FSDP, and by names of their own those of "joint", None if
            the autoencoder is frozen, those of "lora", None if no adapter is trained, and of the "order" of cached latents,
            None if all of one cache are mixed; what their numbers mean,
            "classes" and "tokens" (see `meaning`); the hash of the frozen "autoencoder", None if there is none, and the
            "noise" by names, None for many levels of it; `data_invariants` as "data".

    Raises:
        ValueError: that names the first difference, and what to do.
    """
    invariants, name = json.loads(json.dumps(invariants)), str(path)
    there, here = state.get("kind", FLOW), invariants.get("kind", FLOW)
    if there != here:
        raise ValueError(f"the checkpoint {name!r} is of flow.kind {there!r}, not {here!r}: set it so")
    # A setting that one of the two does not name has its default, also in checkpoints from before there was the setting.
    defaults = {key: value.default for key, value in inspect.signature(KINDS[here]).parameters.items()}
    defaults = json.loads(json.dumps(defaults))
    for key in sorted(set(invariants["flow"]) | set(state["flow"])):
        there, here = (flow.get(key, defaults.get(key)) for flow in (state["flow"], invariants["flow"]))
        if there != here:
            raise ValueError(
                f"the checkpoint {name!r} has another architecture: flow.{key} is {there!r} there and {here!r} here"
            )
    if state["ema_decays"] != invariants["ema_decays"]:
        raise ValueError(
            f"the checkpoint {name!r} has the EMA decays {state['ema_decays']}, not {invariants['ema_decays']}"
        )
    if state["images_per_step"] != invariants["images_per_step"]:
        raise ValueError(
            f"the checkpoint {name!r} was trained with {state['images_per_step']} pictures a step, not "
            f"{invariants['images_per_step']}: set train.batch_size and train.accumulation to the same with these processes"
        )
    check_meaning(path, state, invariants)
    check_latents(path, state, invariants)
    check_order(path, state, invariants)
    check_pictures(path, state.get("data") or {}, invariants.get("data") or {})
    here, there = invariants.get("joint") or {}, state.get("joint") or {}
    if bool(here) != bool(there):
        ways = "joint" if there else "frozen"
        raise ValueError(f"the checkpoint {name!r} was trained with vae.train {ways!r}: set it to that")
    check_invariants(path, there, {key: here.get(key) for key in sorted(set(here) | set(there))})
    here, there = invariants.get("lora") or {}, state.get("lora") or {}
    if bool(here) != bool(there):
        was = f"is of an adapter of lora.rank {there['lora.rank']}" if there else "is of no adapter (lora.rank 0)"
        raise ValueError(f"the checkpoint {name!r} {was}: set lora.rank to that")
    check_invariants(path, there, here)
    check_invariants(path, state.get("noise_levels") or {}, invariants.get("noise_levels") or {})
    if state["sharded"] != invariants["sharded"]:
        ways = "with FSDP" if state["sharded"] else "without FSDP"
        raise ValueError(
            f"the checkpoint {name!r} was written {ways}: resume it that way, or start from its pipeline folder "
            "with init_from"
        )


def check_latents(path: Path, state: dict[str, Any], invariants: dict[str, Any]) -> None:
    """Whether latents and their noise are the same; checkpoints from before these were kept pass.

    Raises:
        ValueError: that names the first difference.
    """
    there, here = state.get("autoencoder"), invariants.get("autoencoder")
    if None not in (there, here) and there != here:
        raise ValueError(
            f"the checkpoint {str(path)!r} was trained on latents of another autoencoder than vae.name and the data give: "
            "resume with that one, or start anew in another output"
        )
    if state.get("noise") and invariants.get("noise"):
        check_invariants(path, state["noise"], invariants["noise"])


def data_invariants(config: RunConfig, parts: Parts) -> dict[str, Any]:
    """What a run that goes on must have alike of its pictures and their order, by name; streams have their own, and so have
    caches that are not mixed whole."""
    found: dict[str, Any] = {"train.seed": config.train.seed}
    if not (config.vae.pixels or is_joint(config)):
        found["vae.sample_posterior"] = config.vae.sample_posterior
    if isinstance(parts.train, Stream):
        return found
    if isinstance(parts.train, CachedLatents):
        if parts.train.order is not None:
            return found
        found["caches of the hashes"] = parts.train.fingerprints
    held_out = 0 if parts.validation is None else len(parts.validation)
    return {**found, "training pictures": len(parts.train), "held-out pictures": held_out}


def check_pictures(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Whether pictures and their order are the same; of what a checkpoint does not tell nothing is said.

    Raises:
        ValueError: that names the first difference.
    """
    for name, value in here.items():
        if there.get(name, value) != value:
            raise ValueError(
                f"the checkpoint {str(path)!r} was trained with {name} {there[name]}, but here it is {value}, which makes "
                "another run: resume with the same, or start from its pipeline with init_from"
            )


def check_order(path: Path, state: dict[str, Any], invariants: dict[str, Any]) -> None:
    """Whether cached latents come in the same order; checkpoints from before this was kept pass.

    Raises:
        ValueError: that names the first difference.
    """
    if "order" not in state:
        return
    usual = {"caches": None, "weights": None, "shuffle_shards": 0, "pictures": None}
    there, here = ({**usual, **(facts["order"] or {})} for facts in (state, invariants))
    for key in ("weights", "shuffle_shards"):
        if there[key] != here[key]:
            raise ValueError(
                f"the checkpoint {str(path)!r} was trained with data.{key} {there[key]!r}, but it is {here[key]!r} here, "
                "which is another order of pictures: set it to that"
            )
    if None not in (there["caches"], here["caches"]) and there["caches"] != here["caches"]:
        raise ValueError(
            f"the checkpoint {str(path)!r} was trained on other caches than data.path names: they were made anew, or come in "
            "another order; resume with the same, or start from its pipeline with init_from"
        )
    if None not in (there["pictures"], here["pictures"]) and there["pictures"] != here["pictures"]:
        counts = (" and ".join(f"{count:,}" for count in facts["pictures"]) for facts in (there, here))
        raise ValueError(
            "the checkpoint {!r} was trained on caches of {} pictures, but they have {} now, in another order, as tarflow "
            "cache-latents has gone on with them; start from its pipeline with init_from".format(str(path), *counts)
        )


def check_meaning(path: Path, state: dict[str, Any], invariants: dict[str, Any]) -> None:
    """Whether the numbers of classes and tokens mean the same; checkpoints from before these were kept pass.

    Raises:
        ValueError: that names the first difference.
    """
    kinds = (("classes", "class", "the same class folders or names"), ("tokens", "token", "the same captions"))
    for name, what, remedy in kinds:
        there, here = state.get(name), invariants.get(name)
        if name not in state or there == here:
            continue
        if not isinstance(there, list) or not isinstance(here, list):
            raise ValueError(
                f"the checkpoint {str(path)!r} was trained with other {name} than this run has: resume with {remedy}, "
                "or start anew in another output"
            )
        places = range(max(len(there), len(here)))
        place = next(place for place in places if there[place : place + 1] != here[place : place + 1])
        names = (repr(known[place]) if place < len(known) else "none" for known in (there, here))
        was, is_now = names
        raise ValueError(
            f"the checkpoint {str(path)!r} was trained with other {name}: {what} {place} is {was} there and {is_now} "
            f"here; resume with {remedy}, or start anew in another output"
        )
