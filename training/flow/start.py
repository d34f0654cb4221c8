"""Training that starts from a saved pipeline: fine-tuning, and going on at another size."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import T5EncoderModel

from tarflow.flows.model import TARFlowModel
from tarflow.flows.resize import resized_model
from tarflow.flows.trajectory.kinds import FlowModel, name_of
from tarflow.models import AUTOENCODERS
from tarflow.pipeline.opening import load_pipeline
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.pipeline.text.options import TextOptions
from tarflow.training.flow.config import TextConfig, VaeConfig
from tarflow.training.flow.text import load_text
from tarflow.vae.codec import autoencoder_hash, load_autoencoder, weights_hash


@dataclass
class Start:
    """What a pipeline gives to a run.

    Attributes:
        pipeline: in float32.
        name: its folder or hub id, for errors.
    """

    pipeline: TARFlowPipeline
    name: str

    @property
    def statistics(self) -> tuple[list[float], list[float]] | None:
        """Mean and standard deviation of the latents' channels, which the flow was trained with."""
        config = self.pipeline.config
        return None if config.latents_mean is None else (list(config.latents_mean), list(config.latents_std))

    def check_autoencoder(self, other: Any) -> None:
        """An error if the run's autoencoder (or its hash; None for pixels) is not the pipeline's."""
        if not self.has_autoencoder(other):
            raise ValueError(
                f"the pipeline {self.name!r} has another autoencoder than vae.name and the data give: give "
                f"{self.vae_options()}, and of cached latents those of that autoencoder"
            )

    def check_posterior(self, given: VaeConfig) -> None:
        """An error if pictures would get the noise of an autoencoder that was trained along twice."""
        if not self.pipeline.config.denoise and given.sample_posterior:
            raise ValueError(
                f"the autoencoder of {self.name!r} was trained along, and the noise of its posterior is train.noise_std: set "
                "vae.sample_posterior false"
            )

    def vae_options(self) -> str:
        """The options by which a run has the pipeline's own autoencoder."""
        if self.pipeline.vae is None:
            return "--vae.name none"
        hashes = {autoencoder_hash(load_autoencoder(name)): name for name in AUTOENCODERS}
        if (shipped := hashes.get(autoencoder_hash(self.pipeline.vae))) is not None:
            return f"--vae.name {shipped}"
        return f"--vae.name {shlex.quote(self.name)} --vae.subfolder vae"

    def vae_differs(self, given: VaeConfig) -> bool:
        """Whether settings name another autoencoder than the pipeline's."""
        return not self.has_autoencoder(load_autoencoder(given.name, given.subfolder))

    def has_autoencoder(self, other: Any) -> bool:
        """Whether an autoencoder (or its hash; None for pixels) is the pipeline's."""
        own = None if self.pipeline.vae is None else autoencoder_hash(self.pipeline.vae)
        return own == (other if other is None or isinstance(other, str) else autoencoder_hash(other))

    def text(self, config: TextConfig) -> tuple[Any, Any]:
        """Text encoder and tokenizer: a small encoder is the pipeline's, a pretrained one is loaded anew."""
        if config.kind == "pretrained":
            options = TextOptions.of(self.pipeline.config.get("text_options"))
            for name, value in asdict(options).items():
                if value != (given := getattr(config, name)):
                    raise ValueError(
                        f"text.{name} is {given!r}, but the pipeline {self.name!r} was trained with {value!r}: set it so"
                    )
            encoder, tokenizer = load_text(config, ())
            own = self.pipeline.text_encoder
            if own is not None and weights_hash(own) != weights_hash(encoder):
                raise ValueError(f"the pipeline {self.name!r} has another text encoder than text.name, {config.name!r}")
            return encoder, tokenizer
        if config.kind == "none":
            return None, None
        own = self.pipeline.text_encoder
        if own is None:
            raise ValueError(f"text.kind is 'small', but the pipeline {self.name!r} has no text encoder")
        if not isinstance(own, T5EncoderModel) or self.pipeline.config.get("text_options"):
            raise ValueError(
                f"text.kind is 'small', but the pipeline {self.name!r} has a pretrained {type(own).__name__}: set it to "
                "'pretrained', and text.name"
            )
        return own.requires_grad_(True), self.pipeline.tokenizer

    def flow_settings(self, given: dict[str, Any], vae: VaeConfig | None = None) -> dict[str, Any]:
        """The flow section: the pipeline's settings, which given ones must equal; sizes follow from the data.

        Args:
            given: the settings of the run.
            vae: those of its autoencoder, to say at once if that differs too; None where the data have their own.

        Raises:
            ValueError: that names all settings that differ, and the options that mend them.
        """
        own: dict[str, Any] = {"kind": name_of(self.pipeline.flow), **self.pipeline.flow.arguments}
        kind, others = own["kind"], []
        for key, value in sorted(given.items(), key=lambda pair: pair[0] != "kind"):
            if key not in own and "kind" not in others:
                raise ValueError(
                    f"flow.{key} is {value}, but the pipeline {self.name!r} has a model of kind {kind!r}, which does not "
                    "have it: take it out of the configuration"
                )
            found = list(own[key]) if isinstance(own.get(key), tuple) else own.get(key)
            if key in own and key != "sample_size" and found != value:
                others.append(key)
        if others:
            said = ", ".join(f"flow.{key} is {as_typed(given[key])}" for key in others)
            options = " ".join(f"--flow.{key} {shlex.quote(as_typed(own[key]))}" for key in others) + ", or "
            if "kind" in others:
                options = ""  # as other settings of that kind would stay
            more = ""
            if vae is not None and self.vae_differs(vae):
                more = f"; its autoencoder is another than vae.name too: give {self.vae_options()}"
            raise ValueError(
                f"{said}, but the pipeline {self.name!r} has {', '.join(as_typed(own[key]) for key in others)}: give "
                f"{options}--flow '{{}}' for its flow as it is{more}"
            )
        sizes = {"sample_size": given["sample_size"]} if "sample_size" in given else {}
        return {key: value for key, value in own.items() if key != "sample_size"} | sizes

    def differences(self, text: TextConfig, names: Sequence[str] | None) -> list[str]:
        """What a run has otherwise than the pipeline and may have, a sentence each.

        Args:
            text: of the run.
            names: of the data's classes, None if the flow is not told them.

        Raises:
            ValueError: for a class of the pipeline that has another number in the data: it would begin as another class.
        """
        config, found = self.pipeline.config, []
        if text.kind != "none" and text.max_length != config.max_sequence_length:
            found.append(
                f"captions are cut after {text.max_length} tokens (text.max_length), the pipeline {self.name!r} was trained "
                f"with {config.max_sequence_length}"
            )
        known = [name for _, name in sorted((config.id2label or {}).items(), key=lambda pair: int(pair[0]))]
        if not known or names is None:
            return found
        for number, name in enumerate(names):
            if name in known and known.index(name) != number:
                raise ValueError(
                    f"the class {name!r} has the number {number} in the data and {known.index(name)} in the pipeline "
                    f"{self.name!r}, so it would begin as {known[number]!r}: name the folders so that they sort as the "
                    f"pipeline's classes do ({', '.join(known)})"
                )
        others = [f"{name!r} begins as {old!r}" for name, old in zip(names, known, strict=False) if name != old]
        if others:
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            found.append(f"classes that the pipeline {self.name!r} does not know: {', '.join(others[:5])}{more}")
        return found


def as_typed(value: Any) -> str:
    """A setting as one types it: true, null, [1, 2], name."""
    return value if isinstance(value, str) else json.dumps(value)


def load_start(name: str) -> Start:
    """Open a pipeline to start from.

    Raises:
        ValueError: if there is none, or it cannot be opened.
    """
    try:
        return Start(load_pipeline(name), name)
    except ValueError as error:
        raise ValueError(f"cannot start from {name!r}: {error}") from error


def model_for_size(start: Start, arguments: dict[str, Any]) -> FlowModel:
    """The pipeline's flow, with positions rescaled if the data has another size."""
    flow, size = start.pipeline.flow.train(), arguments["sample_size"]
    if flow.config.sample_size == size:
        return flow
    if not isinstance(flow, TARFlowModel):
        raise ValueError(
            f"the trajectory model of {start.name!r} is of latents of {flow.config.sample_size}, not {size}"
        )
    return resized_model(flow, size)
