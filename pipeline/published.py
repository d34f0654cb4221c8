"""What the configuration of a published checkpoint says: a JSON of the model class's arguments, or STARFlow's YAML of
script arguments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tarflow.flows.conversion import family_of, is_starflow, model_arguments

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
        noise_std: of the training noise, the highest of iTARFlow's levels; None if not said.
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
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))  # YAML contains JSON
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the config {str(path)!r}: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and isinstance(content.get("arguments"), list):
        if not all(isinstance(entry, dict) for entry in content["arguments"]):
            raise ValueError(f"the list 'arguments' of the config {str(path)!r} has entries other than 'name: value'")
        try:
            return published_from_yaml(content["arguments"], vae_factor)
        except (TypeError, IndexError) as error:
            raise ValueError(f"a value in the config {str(path)!r} is empty or of a wrong type: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model", content), dict):
        raise ValueError(
            f"the config {str(path)!r} is neither a JSON of model arguments nor a YAML with a list 'arguments'"
        )
    model = content.get("model", content)
    family = family_of(model)
    if content.get("family", family) != family:
        raise ValueError(f"the config says family {content['family']!r}, but has the arguments of {family!r}")
    model = {key: value for key, value in model.items() if key != "noise_std"}
    if not is_starflow(model) or "txt_dim" in model:
        model_arguments(model)  # unknown or missing arguments are an error here, not later
    noise_std = content.get("noise_std", content.get("sample_noise_level"))
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
