"""`tarflow export`: a pipeline copied in 16 bits."""

from __future__ import annotations

from tarflow.cli.parsing import CommandParser, loading
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.pipeline.loading.place import locate

DESCRIPTION = """Copy a pipeline with its weights in 16 bits, as the shipped ones are.

  tarflow export --pipeline runs/NAME/pipeline --output models/NAME

What the output folder has of other files, such as cards (README.md) and example prompts, stays there. Loading gives
float32 again. What has 16 bits already, such as a large text encoder, keeps them."""


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("tarflow export", DESCRIPTION)
    parser.add_argument("--pipeline", required=True, metavar="DIR", help="folder, shipped name or hub id")
    parser.add_argument(
        "--output",
        required=True,
        metavar="DIR",
        help="folder of the copy; a pipeline there is replaced, other files stay",
    )
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16", help="of the weights")
    parser.add_argument("--without-denoiser", action="store_true", help="leave the flow's learned denoiser out")
    args = parser.parse_args(argv)
    with ending():
        locate(args.pipeline)
        check_writable(args.output, folder=True)
        loading()
        import torch

        from tarflow.pipeline.export import export

        size = export(args.pipeline, args.output, getattr(torch, args.dtype), not args.without_denoiser)
    print(f"{args.output}: {size / 1e6:.1f} MB")
