"""Decoder halves of autoencoders, which can be trained while the whole ones stay as they are."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderTiny
from torch import Tensor, nn

from tarflow.common.dtypes import kept_default_dtype
from tarflow.vae.taef2 import AutoencoderTAEF2, pool_blocks


class DecoderHalf(ModelMixin, ConfigMixin):
    """Raw latents → images, with the parts and the weights' names of an autoencoder, and of its settings those that its
    decoder has. `LatentDecoder` and `TAEF2Decoder` are the ones.

    Attributes:
        whole: the autoencoder's class.
    """

    whole: ClassVar[type[Any]]

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Self:
        """As of `ModelMixin`; an error leaves the process's default dtype as it was."""
        with kept_default_dtype():
            return super().from_pretrained(*args, **options)

    @classmethod
    def from_autoencoder(cls, vae: Any) -> Self:
        """A copy of an autoencoder's decoder, on its device and in its dtype.

        Raises:
            ValueError: if the autoencoder is of another class than `whole`.
        """
        if type(vae) is not cls.whole:
            raise ValueError(f"this decoder is of an {cls.whole.__name__}, but the autoencoder is {type(vae).__name__}")
        settings = list(inspect.signature(cls.__init__).parameters)[1:]
        decoder = cls(**{name: vae.config[name] for name in settings})
        weights = {name: value for name, value in vae.state_dict().items() if name in decoder.state_dict()}
        decoder.load_state_dict(weights)
        if vae.dtype != decoder.dtype:
            decoder.to(vae.dtype)
        return decoder.to(vae.device).eval()

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights of the layer that makes the pixels."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) → images (B, 3, h·f, w·f), by the name that an autoencoder has for it."""
        return self(latents)


class LatentDecoder(DecoderHalf):
    """The decoder of Diffusers' ``AutoencoderKL``.

    Args: as of ``AutoencoderKL``.
    """

    whole = AutoencoderKL
    decoder: Decoder

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

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights of the layer that makes the pixels."""
        return self.decoder.conv_out.weight

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) → images (B, 3, h·f, w·f), about [−1, 1], not clipped."""
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


class TAEF2Decoder(DecoderHalf):
    """The decoder of an `AutoencoderTAEF2`.

    Args: as of `AutoencoderTAEF2`.
    """

    whole = AutoencoderTAEF2
    decoder: DecoderTiny

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
    ):
        super().__init__()
        self.decoder = DecoderTiny(
            in_channels=latent_channels,
            out_channels=3,
            num_blocks=tuple(num_decoder_blocks),
            block_out_channels=tuple(reversed(block_out_channels)),
            upsampling_scaling_factor=2,
            act_fn="relu",
            upsample_fn="nearest",
        )
        pool_blocks(self.decoder, num_decoder_blocks)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weights of the layer that makes the pixels."""
        return self.decoder.layers[-1].weight

    def forward(self, latents: Tensor) -> Tensor:
        """Raw latents (B, 32, h, w) → images (B, 3, 8h, 8w), about [−1, 1], not clipped."""
        return self.decoder(latents)


def decoder_of(vae: Any) -> DecoderHalf:
    """A copy of an autoencoder's decoder, on its device and in its dtype.

    Raises:
        ValueError: if none is known of such an autoencoder.
    """
    halves: tuple[type[DecoderHalf], ...] = (LatentDecoder, TAEF2Decoder)
    for half in halves:
        if type(vae) is half.whole:
            return half.from_autoencoder(vae)
    names = " or an ".join(half.whole.__name__ for half in halves)
    raise ValueError(f"a decoder can be taken out of an {names} only, but this autoencoder is {type(vae).__name__}")
