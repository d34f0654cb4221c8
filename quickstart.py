"""Train a small latent flow on drawings, save it as a pipeline, draw a captioned grid and check what it drew.

    python quickstart.py                                           # captions; about 8 minutes on 2 CPU cores
    python quickstart.py --config configs/quickstart_class.yaml    # class labels

Further arguments go to the training, for example ``--train.max_minutes 20``. After Ctrl-C the same command goes on.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import torch

from tarflow import TARFlowPipeline
from tarflow.cli.quiet import hush_libraries
from tarflow.common.command import ending
from tarflow.common.files import write_picture
from tarflow.data.drawings import CLASS_NAMES, all_captions
from tarflow.evaluation.samples.match import (
    captioned_grid,
    drawn_caption_shares,
    drawn_class_shares,
    generate,
    round_trip_error,
)
from tarflow.pipeline.loading.device import best_device
from tarflow.training.flow.arguments import parse_config
from tarflow.training.flow.config import RunConfig
from tarflow.training.flow.trainer import flow_trainer
from tarflow.training.loop.stopping import exit_status

#: What training may have measured of held-out pictures, and how it is said.
LIKELIHOODS = {
    "latent_nats_per_dim": "held-out latent nats per dim",
    "pixel_nats_per_dim": "held-out pixel nats per dim",
    "bits_per_dim": "held-out bits per dim",
}


def main(argv: list[str]) -> None:
    started = time.perf_counter()
    if "--config" not in argv and not any(argument.startswith("--config=") for argument in argv):
        argv = ["--config", "configs/quickstart_text.yaml", *argv]
    hush_libraries()
    with ending():
        config, resolved = parse_config(["--resume", "auto", *argv], __doc__)
        metrics = flow_trainer(config, resolved).run()
        trained = time.perf_counter()
        if metrics.get("stopped"):  # from outside, before a pipeline was saved; the training has said how to go on
            raise SystemExit(exit_status(metrics))
        rows = {"pipeline": f"{config.output}/pipeline"}
        rows |= {"training curves": f"tensorboard --logdir {config.output}/logs"}
        rows |= {LIKELIHOODS[name]: f"{metrics[name]:.4f}" for name in LIKELIHOODS if name in metrics}
        print("drawing a grid, and samples to check", flush=True)
        rows |= draw_and_check(config)
        if (
            not config.log.checkpoint_every
        ):  # an interruption's checkpoint is of no use any more: the next run is a new one
            shutil.rmtree(config.loop.folder / "checkpoints", ignore_errors=True)
    rows["time"] = f"{trained - started:.0f} s training, {time.perf_counter() - trained:.0f} s drawing"
    print()
    for name, value in rows.items():
        print(f"{name:<30} {value}")


def draw_and_check(config: RunConfig) -> dict[str, str]:
    """Draw a captioned grid with a run's pipeline of drawings, and check what it drew; returns rows to print."""
    pipe = TARFlowPipeline.from_pretrained(f"{config.output}/pipeline").to(best_device())
    pipe.set_progress_bar_config(disable=True)
    conditioning = pipe.flow.config.conditioning
    if config.data.source != "drawings" or conditioning == "none":
        return {"captioned grid": "none: only drawings by caption or class can be checked"}
    if conditioning == "prefix":
        shown = [all_captions()[3 * i + i % 3] for i in range(36)]  # every shape and colour, backgrounds in turn
        images = generate(pipe, {"prompt": shown}, 36, seed=1)
        shares = drawn_caption_shares(pipe)
        cond, _ = pipe.encode_prompt(shown[:8], pipe.device, do_classifier_free_guidance=False)
        error = round_trip_error(pipe.flow, cond=cond)
    else:
        shown = list(CLASS_NAMES)
        images = generate(pipe, {"class_labels": shown}, 36, seed=1)
        shares = drawn_class_shares(pipe)
        error = round_trip_error(pipe.flow, class_labels=torch.arange(8, device=pipe.device))
    grid = Path(config.output, "grid.png")
    write_picture(grid, captioned_grid(images, shown))
    rows = {"captioned grid": str(grid), "sampler's round-trip error": f"{error:.1e}"}
    return rows | {f"samples that match, {name}": f"{share:.1%}" for name, share in shares.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
