"""What a run with a trained autoencoder shows beside the likelihood: reconstructions and the spread of the means."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from tarflow.data.images import to_model, to_uint8
from tarflow.evaluation.reconstruction.quality import psnr
from tarflow.training.flow.config import RunConfig, noise_std
from tarflow.training.flow.report import HeldOut
from tarflow.training.loop.draws import draw_noise
from tarflow.vae.codec import LatentCodec, channel_statistics, channel_sums


@torch.no_grad()
def reconstruction_metrics(
    held_out: HeldOut, codec: LatentCodec, config: RunConfig, accelerator: Accelerator
) -> dict[str, float]:
    """Of the held-out pictures, divided among the processes; every process calls this.

    Returns:
        ``psnr`` and ``noisy_psnr``, dB, means over pictures decoded from the means and from the latents with the noise
        that the flow sees; ``means_std``, the standard deviation of the means in the flow's units, mean over channels.
    """
    ratios, sums = torch.zeros(3), torch.zeros(3, 1, dtype=torch.float64)
    for batch, sample_ids, counted in held_out.batches:
        originals = batch["image"][:counted]
        if not counted:
            continue
        means = codec.encode(to_model(originals.to(accelerator.device)))
        noise = draw_noise(
            config.train.seed, -1, sample_ids[:counted], tuple(means.shape[1:]), means.device, "held out"
        )
        for place, latents in enumerate((means, means + noise_std(config) * noise)):
            ratios[place] += psnr(to_uint8(codec.decode(latents)).cpu(), originals).sum()
        ratios[2] += counted
        sums = sums + channel_sums(means)
    reduced = accelerator.reduce(torch.cat([ratios, sums.flatten().float()]).to(accelerator.device), "sum").cpu()
    _, std = channel_statistics(reduced[3:].view(3, -1))
    clean, noisy, pictures = reduced[:3].tolist()
    return {"psnr": clean / pictures, "noisy_psnr": noisy / pictures, "means_std": sum(std) / len(std)}
