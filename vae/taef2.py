"""AutoencoderTAEF2: Diffusers' tiny autoencoder with the middle blocks of TAEF2."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderTiny, ModelMixin  # noqa: F401 (Diffusers loads classes of modules that have ModelMixin)
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

#: Files of TAEF2 as its author publishes it, by part.
ORIGINAL = {"encoder": "taef2_encoder.safetensors", "decoder": "taef2_decoder.safetensors"}


class PooledBlock(AutoencoderTinyBlock):
    """A block that first adds a branch whose group norm sees the whole picture.

    Args:
        channels: in and out.
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, "relu")
        inner = 4 * channels
        self.pool = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.GroupNorm(4, inner),
            nn.ReLU(),
            nn.Conv2d(inner, channels, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.pool(x))


def pool_blocks(decoder: DecoderTiny, num_blocks: tuple[int, ...]) -> None:
    """Exchange the blocks of a tiny decoder's lowest resolution, its first, for `PooledBlock`."""
    for index in range(2, 2 + num_blocks[0]):  # after a convolution and its activation
        decoder.layers[index] = PooledBlock(decoder.layers[0].out_channels)


class AutoencoderTAEF2(AutoencoderTiny):
    """TAEF2, a small autoencoder for the latents of FLUX.2: 32 channels, an eighth of the picture's sides, no posterior.

    Diffusers' ``AutoencoderTiny``, whose blocks of the lowest resolution are `PooledBlock` here. Source: TAESD's repository
    (Ollin Boer Bohan, MIT licence).

    Args:
        latent_channels: of the raw latents.
        block_out_channels: of each resolution, from pictures to latents.
        num_encoder_blocks: of each resolution, from pictures to latents.
        num_decoder_blocks: of each resolution, from latents to pictures.
        scaling_factor: of the raw latents.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        scaling_factor: float = 1.0,
    ):
        own = dict(self.config)
        super().__init__(
            latent_channels=latent_channels,
            encoder_block_out_channels=tuple(block_out_channels),
            decoder_block_out_channels=tuple(reversed(block_out_channels)),
            num_encoder_blocks=tuple(num_encoder_blocks),
            num_decoder_blocks=tuple(num_decoder_blocks),
            scaling_factor=scaling_factor,
        )
        self._internal_dict = FrozenDict(own)  # without the settings of AutoencoderTiny that follow from these
        last = len(self.encoder.layers) - 1
        for index in range(last - num_encoder_blocks[-1], last):
            self.encoder.layers[index] = PooledBlock(block_out_channels[-1])
        pool_blocks(self.decoder, num_decoder_blocks)

    @classmethod
    def from_original(cls, folder: str | Path) -> AutoencoderTAEF2:
        """From a folder with the two files of `ORIGINAL`, in float32.

        Raises:
            ValueError: if they are damaged or of another autoencoder.
        """
        vae = cls()
        for part, file in ORIGINAL.items():
            path = Path(folder, file)
            # The original decoder's first entry is a clamp without weights, which Diffusers has outside the layers.
            first = 1 if part == "decoder" else 0
            try:
                named = {tuple(name.split(".", 1)): value.float() for name, value in load_file(path).items()}
                weights = {f"layers.{int(index) - first}.{rest}": value for (index, rest), value in named.items()}
                getattr(vae, part).load_state_dict(weights)
            except (SafetensorError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{str(path)!r} is no {part} of TAEF2: {' '.join(str(error).split())[:300]}"
                ) from error
        return vae


def is_original(folder: str | Path) -> bool:
    """Whether a folder has TAEF2 as its author publishes it."""
    return all(Path(folder, file).is_file() for file in ORIGINAL.values())
