"""The pictures that the pipeline `emoji` is trained on, from archives of captioned emoji.

    python -m tarflow.scripts.emoji_pictures emoji72_captions.zip emoji72_more.zip --out pictures

Each archive, or folder, has a metadata.jsonl with the columns file_name, text (an emoji's name), style and keywords. What is
written is a folder of 64 x 64 pixels with captions, for `tarflow cache-latents --data.source folder --data.path pictures`.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import CommandParser
from tarflow.common.command import ending
from tarflow.common.files import check_writable
from tarflow.experiments.emoji_pictures import write_emoji_pictures


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("emoji_pictures.py", __doc__)
    parser.add_argument("sources", nargs="+", help="archives or folders of captioned emoji")
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    options = parser.parse_args(argv)
    with ending():
        out = options.out.expanduser()
        check_writable(out, folder=True)
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{str(options.out)!r} is not empty: give a new folder")
        pictures = write_emoji_pictures(options.sources, out)
    print(f"wrote {pictures:,} pictures to {options.out}")


if __name__ == "__main__":
    main()
