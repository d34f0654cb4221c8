"""Published checkpoints as pipeline folders.

A published model comes as a ``.pth`` state dict with either a JSON of the model class's arguments or STARFlow's YAML of
script arguments. The weights never are in memory as a whole: the file is mapped, and written shard by shard.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tarflow.common.files import write_json
from tarflow.flows.conversion import convert_state_dict, is_starflow, model_arguments
from tarflow.flows.model import TARFlowModel
from tarflow.pipeline.loading.folder import is_unused, usual_rights, written_into
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline
from tarflow.pipeline.text.encoding import embedding_width
from tarflow.pipeline.text.loading import load_text_encoder
from tarflow.vae.codec import LatentCodec, load_autoencoder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_SHARD_BYTES = 5 * 10**9
#: A shard is at most this part of the whole, so that converting needs little memory whatever the size.
SHARD_PART = 8
WEIGHTS_NAME = "diffusion_pytorch_model{suffix}.safetensors"

LICENCE_NOTE = """The weights that Apple published come under the Apple Machine Learning Research Model License Agreement
(LICENSE_MODEL beside the published code): research purposes only, no commercial use. Read it before using or passing
on this folder. Apple Machine Learning Research Model is licensed under the Apple Machine Learning Research Model
License Agreement. Weights that others trained come under their own terms."""

#: STARFlow's YAML keys that the model class takes under another or the same name, and the script's defaults.
YAML_MODEL = {
    "channel_size": ("in_channels", 3),
    "patch_size": ("patch_size", 4),
    "channels": ("channels", 512),
    "rope": ("rope", 0),
    "sos": ("sos", 0),
    "txt_size": ("txt_size", 0),
    "seq_order": ("seq_order", "R2L"),
    "head_dim": ("head_dim", 64),
    "num_heads": ("num_heads", None),
    "num_kv_heads": ("num_kv_heads", None),
    "cond_top_only": ("cond_top_only", 0),
    "use_softplus": ("use_softplus", 0),
    "use_final_norm": ("use_final_norm", 0),
    "soft_clip": ("soft_clip", 0),
    "norm_type": ("norm_type", "layer_norm"),
    "use_bias": ("use_bias", 1),
    "use_qk_norm": ("use_qk_norm", 0),
    "use_post_norm": ("use_post_norm", 0),
    "use_swiglu": ("use_swiglu", 0),
    "top_block_channels": ("top_block_channels", None),
    "pt_seq_len": ("pt_seq_len", None),
    "learnable_self_denoiser": ("learnable_self_denoiser", 0),
    "conditional_denoiser": ("conditional_denoiser", 0),
}
#: Keys that are read here, but are no arguments of the model class.
YAML_READ = (
    *("img_size", "blocks", "layers_per_block", "noise_std", "cfg", "vae"),
    *("mix_aspect", "fps_cond", "cond_noise_level"),
)
#: Keys that change neither the weights nor the images.
YAML_TRAINING = (
    "nvp",  # the published script does not pass it on
    *("train_seed", "data", "logdir", "dataset", "wds", "no_flip", "caption_column", "text", "vae_decoder_factor"),
    *("finetuned_vae", "noise_type", "batch_size", "acc", "fp8", "use_8bit_adam", "epochs", "epoch_length", "lr"),
    *("min_lr", "drop_label", "drop_image", "resume_path", "resume_epoch", "warmup_steps", "fsdp", "fsdp_text_encoder"),
    *("gradient_checkpoint", "gradient_checkpoint_mlp", "compile", "latent_norm_regularization", "loss_scaling"),
    *("grad_clip", "grad_skip", "dry_run", "wandb_name", "save_every", "sample_freq", "num_samples"),
    *("sample_batch_size", "secondary_dataset", "secondary_img_size", "secondary_vid_size", "secondary_batch_size"),
    "secondary_ratio",
)
#: Keys of parts that are not implemented here; they must be off. ``adaln`` and ``use_mm_attn`` never had an effect.
YAML_OFF = (
    *("adaln", "use_mm_attn", "use_pretrained_lm", "noise_embed_denoiser", "temporal_causal", "shallow_block_local"),
    *("denoiser_window", "local_attn_window", "vid_size", "last_frame_cond", "video_to_video"),
)


@dataclass(frozen=True)
class Published:
    """What a published configuration says.

    Attributes:
        model: arguments of the published model class; a YAML does not tell ``txt_dim``.
        noise_std: of the training noise; None if not said.
        guidance_weight: w of the published sampling; 0 is off.
        caption_template: with {prompt} and {aspect_ratio}; None is the caption alone.
    """

    model: dict[str, Any]
    noise_std: float | None = None
    guidance_weight: float = 0.0
    caption_template: str | None = None


def read_published_config(path: str | Path, vae_factor: int = 8) -> Published:
    """Read a JSON of model arguments (itself, or under "model") or a YAML of STARFlow's script arguments.

    Args:
        path: the file.
        vae_factor: pixels per latent position, for a YAML, which gives the size in pixels.

    Raises:
        ValueError: if the file cannot be read, or says what is not implemented here.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))  # YAML contains JSON
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the config {str(path)!r}: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and isinstance(content.get("arguments"), list):
        return published_from_yaml(content["arguments"], vae_factor)
    if not isinstance(content, dict) or not isinstance(content.get("model", content), dict):
        raise ValueError(
            f"the config {str(path)!r} is neither a JSON of model arguments nor a YAML with a list 'arguments'"
        )
    model = content.get("model", content)
    family = "starflow" if is_starflow(model) else "tarflow"
    if content.get("family", family) != family:
        raise ValueError(f"the config says family {content['family']!r}, but has the arguments of {family!r}")
    model = {key: value for key, value in model.items() if key != "noise_std"}
    if not is_starflow(model) or "txt_dim" in model:
        model_arguments(model)  # unknown or missing arguments are an error here, not later
    noise_std = content.get("noise_std")
    return Published(model, None if noise_std is None else float(noise_std))


def published_from_yaml(entries: list[dict[str, Any]], vae_factor: int) -> Published:
    """The configuration in a YAML's list of single settings."""
    given = {key: value for entry in entries for key, value in entry.items()}
    for key in given:
        if key not in (*YAML_MODEL, *YAML_READ, *YAML_TRAINING, *YAML_OFF):
            raise ValueError(f"unknown key {key!r} in the YAML; if it does not change the model, remove it")
    for key in YAML_OFF:
        if given.get(key) not in (None, 0, "0", ""):
            raise ValueError(f"the YAML has {key}: {given[key]}, which is not implemented here")
    model = {name: given.get(key, default) for key, (name, default) in YAML_MODEL.items()}
    layers = [int(number) for number in str(given.get("layers_per_block", 8)).split()]
    model["layers_per_block"] = layers[0] if len(layers) == 1 else layers
    model["num_blocks"] = int(given.get("blocks", 4)) if len(layers) == 1 else len(layers)
    factor = vae_factor if given.get("vae") else 1
    model["img_size"] = int(given.get("img_size", 32)) // factor
    noise_std = float(given.get("noise_std", 0.3))
    template = "{prompt}"
    if given.get("fps_cond"):
        template = f"An image:\n{template}\n"
    if given.get("cond_noise_level"):
        template = f"Noise Level {int(noise_std * 1000)}:\n{template}"
    if given.get("mix_aspect"):
        template = f"{template}\n in a {{aspect_ratio}} aspect ratio.\n"
    weight = float(str(given.get("cfg", 0)).split()[0])
    return Published(model, noise_std, weight, None if template == "{prompt}" else template)


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


def convert_checkpoint(
    checkpoint: str | Path,
    config: str | Path,
    output: str | Path,
    vae: str | None = None,
    text_encoder: str | None = None,
    class_names: str | Path | None = None,
    dtype: str | None = None,
    noise_std: float | None = None,
) -> Path:
    """Write a published checkpoint as a pipeline folder.

    Args:
        checkpoint: ``.pth`` (or ``.safetensors``) state dict.
        config: see `read_published_config`.
        output: the new folder, which may be there if it is empty; its own README.md stays.
        vae, text_encoder: folder or hub id of each; left out of the pipeline if None.
        class_names: a text file with a name per line, or a JSON list.
        dtype: of the flow and the text encoder, a key of `DTYPES`; None keeps the checkpoint's.
        noise_std: of the training noise; None takes the config's, else the number that ends the published file name.

    Raises:
        ValueError: if anything does not fit; then nothing is written.
        OSError: if the folder cannot be written; then it is not there.
    """
    output = Path(output)
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
    encoder, tokenizer = (None, None) if text_encoder is None else text_parts(text_encoder, arguments, dtype)
    pipe = TARFlowPipeline(
        flow=TARFlowModel(),  # a stand-in; the real one is written shard by shard
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokenizer,
        noise_std=training_noise(checkpoint, published) if noise_std is None else noise_std,
        id2label=id2label,
        max_sequence_length=published.model.get("txt_size") or 128,
        guidance_scale=1 + published.guidance_weight,
        guidance_method="gaussian" if is_starflow(published.model) else "linear",
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
    """Names by label from a text file or JSON list.

    Raises:
        ValueError: if the file cannot be read, or has not one name for each class.
    """
    if path is None:
        return None
    try:
        text = Path(path).read_text(encoding="utf-8")
        names = json.loads(text) if str(path).endswith(".json") else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the class names {str(path)!r}: {error}") from error
    names = [str(name) for name in names if str(name)]
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
