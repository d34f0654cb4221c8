"""`tarflow generate`: its options. The drawing itself is in `tarflow.cli.drawing`."""

from __future__ import annotations

import argparse
import math
import re

from tarflow.cli.parsing import PIPELINE_HELP, CommandParser, loading
from tarflow.cli.pictures import Target
from tarflow.cli.subjects import subjects_of
from tarflow.pipeline.call.aspect import ASPECT_RATIOS
from tarflow.pipeline.call.choices import DECODERS, DECODINGS, DENOISE, NOISE_REMOVALS, WALKS
from tarflow.pipeline.loading.place import default_pipeline, facts_of, locate

DESCRIPTION = """Draw pictures: from captions, from classes, or from nothing, as the pipeline was trained.

  tarflow generate "a red heart, noto style" --out heart.png
  tarflow generate "a red heart, noto style" "thumbs up, noto style" --num 8 --pipeline emoji --out drawn/
  tarflow generate --class "blue ring" --class 5 --num 4 --seed 1 --pipeline drawings_class --out grid.png

Several pictures become a grid in one file, with a row for each caption or class; a folder (a name that ends with /)
gets a file for each. Existing files of the same name are replaced."""

#: One folder gets no more: beyond that, `tarflow evaluate fid gen` can be interrupted and continued.
MOST_IMAGES = 100_000
MOST_SEED = 2**32


def parser() -> CommandParser:
    parser = CommandParser("tarflow generate", DESCRIPTION, "[CAPTION …] --out PATH")
    add = parser.add_argument
    add("prompt", nargs="*", metavar="CAPTION", help="captions, for a pipeline that draws from captions")
    add("--pipeline", metavar="DIR", help=PIPELINE_HELP)
    add("--lora", metavar="DIR", help="a LoRA adapter for the pipeline: a folder, a file or a hub id")
    add("--out", required=True, metavar="PATH", help="x.png, .jpg or .webp; or folder/")
    add("--class", dest="classes", action="append", metavar="NAME", help="name or number of a class; may be repeated")
    add("--num", type=int, default=1, metavar="N", help="pictures of each caption or class")
    add("--seed", type=int, metavar="N", help="the same seed draws the same picture i for any --num (default: a new "
        "one each time, which is printed)")  # fmt: skip
    add("--guidance-scale", "--guidance", dest="guidance", type=float, metavar="SCALE", help="how closely to follow caption or class; 1 is off (default: "
        "the pipeline's own)")  # fmt: skip
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: the empty caption)")
    add("--size", metavar="WxH", help="width and height in pixels (default: the training size)")
    add("--aspect-ratio", choices=ASPECT_RATIOS, help="width to height, at the training size's area, instead of --size")
    add("--decoding", choices=DECODINGS, default="auto", help="how the flow is inverted: sequential, exact to rounding; "
        "jacobi and gs_jacobi, many tokens at once; auto, the fastest of these here, within 0.001; fast, within 0.1; or "
        "student, one pass of the pipeline's student")  # fmt: skip
    add("--denoise", choices=DENOISE, help="how the training noise is removed before decoding: not at all, by a score "
        "step or a learned denoiser (default: the pipeline's own way)")  # fmt: skip
    add("--decoder", choices=DECODERS, help="what decodes: the autoencoder's decoder, or the pipeline's finetuned one, "
        "which removes the noise itself (default: the pipeline's own)")  # fmt: skip
    add("--num-inference-steps", "--steps", dest="steps", type=int, metavar="N", help="in how many steps a flow of many "
        "noise levels removes the noise of its samples (default: the pipeline's own; 1 is the score step); of a trajectory "
        "model one of the numbers that it was trained with (default: its first)")  # fmt: skip
    add("--noise-level", type=float, metavar="SIGMA", help="the level that it draws at (default: the highest)")
    add("--walk", choices=WALKS, help="from level to level by Euler's steps, or with fresh noise at each (default: the "
        "pipeline's scheduler)")  # fmt: skip
    add("--temperature", type=float, metavar="FACTOR", help="factor on the noise: below 1 pictures are plainer and likelier "
        "(default: the pipeline's own)")  # fmt: skip
    add("--decode-with", choices=tuple(NOISE_REMOVALS), help="--denoise and --decoder in one word")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_intermixed_args(argv)
    check(args)
    target = Target(args.out)
    args.pipeline = args.pipeline or default_pipeline()
    facts = facts_of(locate(args.pipeline))
    if facts is not None:
        subjects_of(facts, args)
    loading()
    from tarflow.cli.drawing import draw  # imported here: it takes seconds, for which wrong options need not wait

    draw(args, target)


def check(args: argparse.Namespace) -> None:
    """What can be said of the options without the pipeline; ``size`` becomes (width, height).

    Raises:
        ValueError: with one sentence.
    """
    if any(not prompt.strip() for prompt in args.prompt):
        raise ValueError('the caption is empty: say what to draw, for example "a red heart, noto style"')
    if args.prompt and args.classes:
        raise ValueError("give either captions or --class, not both")
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    total = args.num * max(1, len(args.prompt), len(args.classes or ()))
    if total > MOST_IMAGES:
        raise ValueError(f"{total:,} pictures are too many for one call, which draws at most {MOST_IMAGES:,}")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--num-inference-steps must be at least 1, got {args.steps}")
    if args.seed is not None and not 0 <= args.seed < MOST_SEED:
        raise ValueError(f"--seed must be 0 to {MOST_SEED - 1}, got {args.seed}")
    if args.guidance is not None and not 1 <= args.guidance < math.inf:
        raise ValueError(f"--guidance-scale must be at least 1 (off), got {args.guidance:g}")
    if args.noise_level is not None and not 0 < args.noise_level < math.inf:
        raise ValueError(f"--noise-level must be positive, got {args.noise_level:g}")
    if args.temperature is not None and not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature must be positive, got {args.temperature:g}")
    if args.decode_with is not None:
        if args.denoise is not None or args.decoder is not None:
            raise ValueError("give either --decode-with, or --denoise and --decoder")
        args.denoise, args.decoder = NOISE_REMOVALS[args.decode_with]
    if args.denoise in ("score", "learned") and args.decoder == "finetuned":
        raise ValueError(
            f"--decoder finetuned removes the noise itself: leave --denoise {args.denoise} out, or take --decoder vae"
        )
    if args.size is None:
        return
    if args.aspect_ratio is not None:
        raise ValueError("give either --size or --aspect-ratio, not both")
    match = re.fullmatch(r"(\d+)[x×](\d+)", args.size.lower())
    if match is None:
        raise ValueError(f"--size must be width x height in pixels, for example 128x64, got {args.size!r}")
    args.size = int(match[1]), int(match[2])
