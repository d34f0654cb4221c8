"""LatentDecoder: the decoder half of an autoencoder, which can be trained while the whole one stays as it is."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder
from torch import Tensor, nn

from tarflow.common.dtypes import kept_default_dtype

#: What the decoder half takes of the settings of Diffusers' ``AutoencoderKL``, under the same names.
SETTINGS = (
    "latent_channels",
    "out_channels",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "norm_num_groups",
    "use_post_quant_conv",
    "mid_block_add_attention",
)


class LatentDecoder(ModelMixin, ConfigMixin):
    """Raw latents → images, with the parts and the weights' names of Diffusers' ``AutoencoderKL``.

    Args: as of ``AutoencoderKL``.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 4,
        out_channels: int = 3,
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=out_channels,
            up_block_types=tuple(up_block_types),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            act_fn=act_fn,
            mid_block_add_attention=mid_block_add_attention,
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> LatentDecoder:
        """As of `ModelMixin`; an error leaves the process's default dtype as it was."""
        with kept_default_dtype():
            return super().from_pretrained(*args, **options)

    @classmethod
    def from_autoencoder(cls, vae: Any) -> LatentDecoder:
        """A copy of an autoencoder's decoder, on its device and in its dtype.

        Raises:
            ValueError: if it is no ``AutoencoderKL``.
        """
        if not isinstance(vae, AutoencoderKL):
            raise ValueError(
                f"a decoder can be taken out of an AutoencoderKL only, but this autoencoder is {type(vae).__name__}"
            )
        decoder = cls(**{name: vae.config[name] for name in SETTINGS})
        weights = {name: value for name, value in vae.state_dict().items() if name in decoder.state_dict()}
        decoder.load_state_dict(weights)
        if vae.dtype != decoder.dtype:
            decoder.to(vae.dtype)
        return decoder.to(vae.device).eval()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights of the layer that makes the pixels."""
        return self.decoder.conv_out.weight

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) → images (B, 3, h·f, w·f), about [−1, 1], not clipped."""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))

    def decode(self, latents: Tensor) -> Tensor:
        """The same by the name that an autoencoder has for it."""
        return self(latents)
