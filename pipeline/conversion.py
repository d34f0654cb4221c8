"""Published checkpoints as pipeline folders.

A published model comes as a ``.pth`` state dict with either a JSON of the model class's arguments or STARFlow's YAML of
script arguments. The weights never are in memory as a whole: the file is mapped, and written shard by shard.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tarflow.common.files import write_json
from tarflow.flows.conversion import convert_state_dict, family_of, is_starflow, model_arguments
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.call.walk import check_levels
from tarflow.pipeline.loading.folder import is_unused, usual_rights, written_into
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.pipeline.published import Published, read_published_config
from tarflow.pipeline.text.encoding import embedding_width
from tarflow.pipeline.text.loading import load_text_encoder
from tarflow.vae.codec import LatentCodec, load_autoencoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9
#: A shard is at most this part of the whole, so that converting needs little memory whatever the size.
SHARD_PART = 8
WEIGHTS_NAME = "diffusion_pytorch_model{suffix}.safetensors"

#: The published guidance of each family, see `Guidance`.
GUIDANCE = {"tarflow": "linear", "starflow": "gaussian", "itarflow": "linear_scale"}
#: Of iTARFlow: the lowest noise level of its recipes, and the steps that its samples take down while it is trained.
LOWEST_LEVEL, PUBLISHED_STEPS = 0.01, 10

LICENCE_NOTE = """The weights that Apple published come under the Apple Machine Learning Research Model License Agreement
(LICENSE_MODEL beside the published code): research purposes only, no commercial use. Read it before using or passing
on this folder. Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model
License Agreement. Weights that others trained come under their own terms."""


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """A checkpoint's state dict, mapped and not read where the format allows.

    Raises:
        ValueError: if the file is missing, damaged, or holds anything but tensors by name.
    """
    try:
        if str(path).endswith(".safetensors"):
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip(path))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"cannot read the checkpoint {str(path)!r} (damaged, or not a checkpoint): {reason}"
        ) from error
    except Exception as error:  # safetensors raises a class of its own
        raise ValueError(f"cannot read the checkpoint {str(path)!r}: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(state, dict) or not state:
        raise ValueError(f"the checkpoint {str(path)!r} holds {type(state).__name__}, expected tensors by name")
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the checkpoint {str(path)!r} holds a {type(value).__name__} under {name!r}, expected tensors only"
            )
    # Left by wrappers of the model when it was saved.
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}


def is_zip(path: str | Path) -> bool:
    """Whether the file is in torch's present format, which can be mapped."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def complete(model: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Model arguments with ``txt_dim`` from the weights, if they lack it.

    Raises:
        ValueError: if the checkpoint is of the other family.
    """
    leveled = any(".time_embed." in name for name in state)
    if leveled != (family_of(model) == "itarflow"):
        holds, described = ("an iTARFlow", "another") if leveled else ("another", "an iTARFlow")
        raise ValueError(f"the config describes {described} model, but the checkpoint holds {holds} one")
    names = {name.split(".")[-1] for name in state} | {name.split(".")[-2] for name in state if "." in name}
    if is_starflow(model) and names & {"class_embed"}:
        raise ValueError("the config describes a STARFlow model, but the checkpoint holds a TARFlow model")
    if not is_starflow(model) and names & {"sos_embed", "proj_txt", "freqs_cos"}:
        raise ValueError("the config describes a TARFlow model, but the checkpoint holds a STARFlow model")
    if not is_starflow(model) or "txt_dim" in model:
        return model
    widths = {value.shape[1] for name, value in state.items() if name.endswith("proj_txt.weight") and value.ndim == 2}
    if model["txt_size"] and len(widths) != 1:
        raise ValueError(
            f"the config has conditions of {model['txt_size']} tokens, but the checkpoint has "
            f"{'none' if not widths else f'several widths of them, {sorted(widths)}'}"
        )
    return {**model, "txt_dim": widths.pop() if widths else 0}


def load_published(checkpoint: str | Path, config: str | Path) -> tuple[TARFlowModel, dict[str, Any]]:
    """A published model in memory, and its published arguments."""
    published, state = read_published_config(config), read_tensors(checkpoint)
    arguments = complete(published.model, state)
    with torch.device("meta"):
        model = TARFlowModel(**model_arguments(arguments))
    model.load_state_dict(convert_state_dict(state, arguments), strict=True, assign=True)
    return model.eval(), arguments


def text_parts(
    text_encoder: str, arguments: dict[str, Any], dtype: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A text encoder and its tokenizer for a model of these arguments.

    Raises:
        ValueError: if the model takes no captions, or others.
    """
    if arguments["conditioning"] != "prefix":
        raise ValueError(f"the model has the conditioning {arguments['conditioning']!r} and takes no text encoder")
    encoder, tokenizer = load_text_encoder(text_encoder)
    if embedding_width(encoder) != arguments["cond_dim"]:
        raise ValueError(
            f"the text encoder {text_encoder!r} gives {embedding_width(encoder)} numbers per token, "
            f"but the checkpoint takes {arguments['cond_dim']}"
        )
    return encoder.to(DTYPES[dtype] if dtype else encoder.dtype), tokenizer


def training_noise(checkpoint: str | Path, published: Published) -> float:
    """σ of the training noise: the configuration's, else the number that ends the published file name, else 0."""
    if published.noise_std is not None:
        return published.noise_std
    found = re.search(r"_(\d+\.\d+)\.\w+$", Path(checkpoint).name)
    return float(found[1]) if found else 0.0


def levels_of(arguments: dict[str, Any], noise_std: float, min_noise_std: float | None) -> tuple[float, float] | None:
    """The noise levels of a model with these arguments; None if it knows one.

    Raises:
        ValueError: if the highest is not known, or the lowest is given for a model of one level.
    """
    if not arguments.get("noise_conditioning"):
        if min_noise_std is not None:
            raise ValueError(f"--min-noise-std is {min_noise_std:g}, but the model knows one noise level: leave it out")
        return None
    if not noise_std:
        raise ValueError(
            "neither the config nor the file name says the highest noise level of the training: give it by --noise-std "
            "(published: 0.3, 0.5 and 0.7 for 64, 128 and 256 pixels)"
        )
    return check_levels((LOWEST_LEVEL if min_noise_std is None else min_noise_std, noise_std))


def convert_checkpoint(
    checkpoint: str | Path,
    config: str | Path,
    output: str | Path,
    vae: str | None = None,
    text_encoder: str | None = None,
    class_names: str | Path | None = None,
    dtype: str | None = None,
    noise_std: float | None = None,
    min_noise_std: float | None = None,
) -> Path:
    """Write a published checkpoint as a pipeline folder.

    Args:
        checkpoint: ``.pth`` (or ``.safetensors``) state dict.
        config: see `read_published_config`.
        output: the new folder, which may be there if it is empty; its own README.md stays.
        vae, text_encoder: folder or hub id of each; left out of the pipeline if None.
        class_names: a text file with a name per line, or a JSON list.
        dtype: of the flow and the text encoder, a key of `DTYPES`; None keeps the checkpoint's.
        noise_std: of the training noise, the highest of iTARFlow's levels; None takes the config's, else the number that
            ends the published file name.
        min_noise_std: the lowest of iTARFlow's levels; None is `LOWEST_LEVEL`.

    Raises:
        ValueError: if anything does not fit; then nothing is written.
        OSError: if the folder cannot be written; then it is not there.
    """
    output, checkpoint = Path(output).expanduser(), Path(checkpoint).expanduser()
    if not is_unused(output):
        raise ValueError(f"the output {str(output)!r} exists already; remove it or name another")
    autoencoder = load_autoencoder(vae)
    factor = LatentCodec(autoencoder).factor if autoencoder is not None else 8
    published, state = read_published_config(config, factor), read_tensors(checkpoint)
    published = replace(published, model=complete(published.model, state))
    arguments = model_arguments(published.model)
    convert_state_dict(state, published.model, only=())  # checks all, makes none
    saved_dtype = DTYPES[dtype] if dtype else most_common_dtype(state)
    del state
    id2label = read_class_names(class_names, arguments["num_classes"])
    noise_std = training_noise(checkpoint, published) if noise_std is None else noise_std
    levels = levels_of(arguments, noise_std, min_noise_std)
    encoder, tokenizer = (None, None) if text_encoder is None else text_parts(text_encoder, arguments, dtype)
    pipe = TARFlowPipeline(
        # A stand-in; the real one is written shard by shard.
        flow=TARFlowModel(noise_conditioning=arguments.get("noise_conditioning", False)),
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        noise_std=noise_std,
        noise_levels=levels,
        num_inference_steps=1 if levels is None else PUBLISHED_STEPS,
        id2label=id2label,
        max_sequence_length=published.model.get("txt_size") or 128,
        guidance_scale=1 + published.guidance_weight,
        guidance_method=GUIDANCE[family_of(published.model)],
        caption_template=published.caption_template,
    )
    with written_into(output) as temporary:
        pipe.save_pretrained(temporary)
        shutil.rmtree(temporary / "flow")
        write_flow(checkpoint, published.model, temporary / "flow", saved_dtype)
        usual_rights(temporary / "flow")
        if not (output / "README.md").exists():
            (temporary / "README.md").write_text(model_card(checkpoint, dtype), encoding="utf-8")
    return output


def write_flow(checkpoint: str | Path, model: dict[str, Any], folder: Path, dtype: torch.dtype) -> None:
    """Write the flow's config.json and weights in Diffusers' format; the checkpoint is mapped anew for each shard."""
    with torch.device("meta"):
        flow = TARFlowModel(**model_arguments(model))
    flow.save_config(folder)
    tensors = {name: value.to(storage_dtype(name, dtype)) for name, value in flow.state_dict().items()}
    total = sum(value.numel() * value.element_size() for value in tensors.values())
    largest = max(value.numel() * value.element_size() for value in tensors.values())
    shards = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern=WEIGHTS_NAME,
        max_shard_size=min(MAX_SHARD_BYTES, max(total // SHARD_PART, largest, 10**8)),
    )
    for file_name, names in shards.filename_to_tensors.items():
        part = convert_state_dict(read_tensors(checkpoint), model, only=set(names))
        part = {name: value.to(storage_dtype(name, dtype)).contiguous() for name, value in part.items()}
        save_file(part, folder / file_name, metadata={"format": "pt"})
        del part
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        name = WEIGHTS_NAME.format(suffix="") + ".index.json"
        write_json(folder / name, index)


def storage_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The prior's variance stays in float32."""
    return torch.float32 if name == "prior_variance" else dtype


def most_common_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """The dtype of most of the checkpoint's numbers."""
    counts: dict[torch.dtype, int] = {}
    for value in state.values():
        if value.is_floating_point():
            counts[value.dtype] = counts.get(value.dtype, 0) + value.numel()
    return max(counts, key=lambda dtype: counts[dtype])


def read_class_names(path: str | Path | None, count: int) -> dict[int, str] | None:
    """Names by label from a text file, or from a JSON list or dictionary.

    Raises:
        ValueError: if the file cannot be read, or has not one name for each class.
    """
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        names = json.loads(text) if str(path).endswith(".json") else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the class names {str(path)!r}: {error}") from error
    if isinstance(names, dict):  # by number, as configurations of Transformers have them
        numbers = [str(number) for number in range(len(names))]
        if names.keys() != set(numbers):
            raise ValueError(f"the numbers of the classes in {str(path)!r} are not those from 0 to {len(names) - 1}")
        names = [names[number] for number in numbers]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the class names {str(path)!r} are no JSON list of texts: give one, or a name per line")
    names = [name for name in names if name]
    if len(names) != count:
        raise ValueError(f"the file {str(path)!r} names {len(names)} classes, but the model has {count}")
    return dict(enumerate(names))


def model_card(checkpoint: str | Path, dtype: str | None) -> str:
    """The folder's README.md: what was changed, and the licence of published weights."""
    cast = f", and cast to {dtype}" if dtype else ""
    return f"""# {Path(checkpoint).stem}

Converted from `{Path(checkpoint).name}`: tensors renamed{cast}; no other change. Use it with
`TARFlowPipeline.from_pretrained`.

## Licence of the weights

{LICENCE_NOTE}
"""
