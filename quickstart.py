"""Train a small latent flow on drawings, save it as a pipeline, draw a captioned grid and check what it drew.

    python quickstart.py                                           # captions; about 8 minutes on 2 CPU cores
    python quickstart.py --config configs/quickstart_class.yaml    # class labels

Further arguments go to the training, for example ``--train.max_minutes 20``.
"""

from __future__ import annotations

import sys
import time

import torch

from tarflow import TARFlowPipeline
from tarflow.data.drawings import CLASS_NAMES
from tarflow.evaluation.match import (
    all_captions,
    caption_shares,
    captioned_grid,
    class_shares,
    generate,
    round_trip_error,
)
from tarflow.pipeline.device import best_device
from tarflow.training.arguments import fail, parse_config
from tarflow.training.trainer import Trainer


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    if "--config" not in argv and not any(argument.startswith("--config=") for argument in argv):
        argv = ["--config", "configs/quickstart_text.yaml", *argv]
    try:
        config, resolved = parse_config(argv, __doc__)
        metrics = Trainer(config, resolved).run()
    except (ValueError, OSError) as error:
        fail(error)
    trained = time.perf_counter()

    folder = f"{config.output}/pipeline"
    pipe = TARFlowPipeline.from_pretrained(folder).to(best_device())
    pipe.set_progress_bar_config(disable=True)
    with_text = config.text.kind != "none"
    if with_text:
        shown = [all_captions()[3 * i + i % 3] for i in range(36)]  # every shape and colour, backgrounds in turn
        images = generate(pipe, {"prompt": shown}, 36, seed=1)
        shares = caption_shares(pipe)
        cond, _ = pipe.encode_prompt(shown[:8], None, pipe.device, 1, False)
        error = round_trip_error(pipe.flow, cond=cond)
    else:
        shown = list(CLASS_NAMES)
        images = generate(pipe, {"class_labels": shown}, 36, seed=1)
        shares = class_shares(pipe)
        error = round_trip_error(pipe.flow, class_labels=torch.arange(8, device=pipe.device))
    grid = f"{config.output}/grid.png"
    captioned_grid(images, shown).save(grid)

    finished = time.perf_counter()
    print(f"\npipeline                       {folder}")
    print(f"captioned grid                 {grid}")
    print(f"training curves                tensorboard --logdir {config.output}/logs")
    print(f"held-out latent nats per dim   {metrics['latent_nats_per_dim']:.4f}")
    print(f"sampler's round-trip error     {error:.1e}")
    for name, share in shares.items():
        print(f"samples that match, {name:<10} {share:.1%}")
    print(f"time                           {trained - started:.0f} s training, {finished - trained:.0f} s drawing")


if __name__ == "__main__":
    main(sys.argv[1:])
