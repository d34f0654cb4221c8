"""How often pictures are told by their captions: the share whose own caption comes first among a hundred, or in five.

    tarflow evaluate captions --model runs/captions --samples samples
    tarflow evaluate captions --model runs/captions --data.source folder --data.path pictures.zip

The first measures what `tarflow evaluate fid gen` drew, the second real held-out pictures, which are the most that one can
expect. The model is one that `tarflow train-captions` trained, or any CLIP model of Transformers. Only numbers of the same
model, captions and --among can be compared.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from tarflow.cli.parsing import read_settings
from tarflow.common.checks import AtLeastOne, at_least, check_ranges
from tarflow.common.command import ending
from tarflow.common.files import check_writable, write_json
from tarflow.data.config import DataConfig
from tarflow.data.place import status_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionScoreConfig:
    """What to measure.

    Attributes:
        model: folder that ``tarflow train-captions`` wrote, or folder or hub id of a CLIP model of Transformers.
        samples: a folder that ``tarflow evaluate fid gen`` wrote.
        data: real pictures with captions, instead of samples.
        split: of the data.
        num: the first so many pictures; None takes all.
        among: of so many different captions the right one is to be found.
        remove: a regular expression; what it finds in captions is left out, as in training.
        batch_size: pictures at once.
        out: JSON file of the result.
    """

    model: str
    samples: str | None = None
    data: DataConfig | None = None
    split: Literal["train", "validation"] = "validation"
    num: AtLeastOne | None = None
    among: Annotated[int, at_least(2)] = 100
    remove: str | None = None
    batch_size: AtLeastOne = 64
    out: str | None = None

    def __post_init__(self) -> None:
        check_ranges(self)
        if (self.samples is None) == (self.data is None):
            raise ValueError(
                "give either samples, a folder of tarflow evaluate fid gen, or a section of data (--data.source …)"
            )


def main(
    argv: list[str] | None = None, prog: str = "tarflow evaluate captions", description: str | None = __doc__
) -> None:
    """Measure and print; errors end as `ending` says.

    Args:
        argv: the settings; None takes those of the command line.
        prog, description: how the help calls this, and what it says of it.
    """
    with ending():
        config, _ = read_settings(CaptionScoreConfig, argv, description, prog, check_paths)
        from tarflow.evaluation.features.caption_ranks import caption_score, score_lines, without
        from tarflow.pipeline.loading.device import best_device

        images, captions = pictures_and_captions(config)
        captions = without(captions, config.remove)
        score = caption_score(images, captions, config.model, config.among, config.batch_size, best_device())
        print(score_lines(score), flush=True)  # first: what is printed is not lost
        if config.out is not None:
            write_json(
                config.out, dataclasses.asdict(score) | {"settings": dataclasses.asdict(config)}, nan_as_null=True
            )


def pictures_and_captions(config: CaptionScoreConfig) -> tuple[Any, list[str]]:
    """The pictures, with a caption for each.

    Raises:
        ValueError: if there are none.
    """
    from tarflow.evaluation.images.sets import open_images
    from tarflow.evaluation.samples.told import read_conditions

    if config.samples is not None:
        images = open_images(config.samples, num=config.num)
        folder = Path(config.samples).expanduser()
        kind, captions = read_conditions(images, folder if folder.is_dir() else folder.parent)
        if kind != "caption":
            raise ValueError(f"{config.samples!r} was drawn from classes: captions are needed")
        return images, captions
    assert config.data is not None
    shown: Any = open_images(config.data, config.split, num=config.num)
    return shown, shown.captions()


def check_paths(config: CaptionScoreConfig) -> None:
    """Refuse samples that are not there, and a result that cannot be written.

    Raises:
        ValueError: that names the path.
    """
    if config.samples is not None:
        status_of(config.samples)
    if config.out is not None:
        check_writable(config.out)
