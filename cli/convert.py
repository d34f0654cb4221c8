"""`tarflow convert`: published checkpoints as pipelines."""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import CommandParser, loading
from tarflow.common.command import ending
from tarflow.common.files import check_writable

DESCRIPTION = """Make a pipeline folder of a published TARFlow, STARFlow or iTARFlow checkpoint.

  tarflow convert --checkpoint starflow_3B_t2i_256x256.pth \\
      --config starflow_3B_t2i_256x256.yaml --output starflow_3B --dtype bfloat16 \\
      --vae stabilityai/sd-vae-ft-ema --text-encoder google/flan-t5-xl

CONFIG is the YAML that came with a STARFlow checkpoint, or a JSON of the published model class's arguments, for
example {"in_channels": 3, "img_size": 256, "patch_size": 8, "channels": 768, "num_blocks": 8, "layers_per_block": 8,
"num_classes": 3} for TARFlow. iTARFlow's has "patch_sizes" instead of "patch_size", and "channels" and
"layers_per_block" may be lists."""


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("tarflow convert", DESCRIPTION)
    parser.add_argument("--checkpoint", required=True, help="published .pth file")
    parser.add_argument("--config", required=True, help="YAML or JSON, see above")
    parser.add_argument("--output", required=True, help="the new pipeline folder")
    parser.add_argument("--vae", help="folder or hub id of the autoencoder; left out if not given")
    parser.add_argument("--text-encoder", help="folder or hub id of the T5 encoder; left out if not given")
    parser.add_argument("--class-names", help="text file with a name per line, or JSON list or dictionary")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the flow and the text encoder; the checkpoint's if not given",
    )
    parser.add_argument(
        "--noise-std",
        type=float,
        help="of the training noise (the highest level of iTARFlow), if neither the config nor the end of the file name (…_0.07.pth) says it",
    )
    parser.add_argument("--min-noise-std", type=float, help="the lowest level of iTARFlow; 0.01 if not given")
    args = parser.parse_args(argv)
    with ending():
        for name in ("checkpoint", "config"):
            path = Path(getattr(args, name)).expanduser()
            if not path.is_file():
                raise ValueError(f"--{name}: there is no file {str(path)!r}")
        check_writable(args.output, folder=True)
        loading()
        from tarflow.pipeline.conversion import LICENCE_NOTE, convert_checkpoint

        output = convert_checkpoint(**vars(args))
    print(f"{output}\n\n{LICENCE_NOTE}")
