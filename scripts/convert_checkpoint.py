"""Make a pipeline folder of a published TARFlow or STARFlow checkpoint.

    python -m tarflow.scripts.convert_checkpoint --checkpoint starflow_3B_t2i_256x256.pth \\
        --config starflow_3B_t2i_256x256.yaml --output starflow_3B --dtype bfloat16 \\
        --vae stabilityai/sd-vae-ft-ema --text-encoder google/flan-t5-xl

CONFIG is the YAML that came with a STARFlow checkpoint, or a JSON of the published model class's arguments, for
example {"in_channels": 3, "img_size": 256, "patch_size": 8, "channels": 768, "num_blocks": 8, "layers_per_block": 8,
"num_classes": 3} for TARFlow.
"""

from __future__ import annotations

import argparse

from tarflow.common.command import ending
from tarflow.pipeline.conversion import DTYPES, LICENCE_NOTE, convert_checkpoint


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="published .pth file")
    parser.add_argument("--config", required=True, help="YAML or JSON, see above")
    parser.add_argument("--output", required=True, help="the new pipeline folder")
    parser.add_argument("--vae", help="folder or hub id of the autoencoder; left out if not given")
    parser.add_argument("--text-encoder", help="folder or hub id of the T5 encoder; left out if not given")
    parser.add_argument("--class-names", help="text file with a name per line, or JSON list")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the flow and the text encoder; the checkpoint's if not given"
    )
    parser.add_argument(
        "--noise-std",
        type=float,
        help="of the training noise, if neither the config nor the end of the file name (…_0.07.pth) says it",
    )
    with ending():
        output = convert_checkpoint(**vars(parser.parse_args(argv)))
    print(f"{output}\n\n{LICENCE_NOTE}")


if __name__ == "__main__":
    main()
