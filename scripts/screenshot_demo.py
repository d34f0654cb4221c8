"""A picture of the web page after a drawing, for the README.

    python -m tarflow.scripts.screenshot_demo --pipeline drawings_text --prompt "a small blue ring on a light background"

It serves the page on a free port of this machine, draws in a Chromium without a window, and saves what is seen.
"""

from __future__ import annotations

from pathlib import Path

from tarflow.cli.parsing import CommandParser
from tarflow.common.command import ending
from tarflow.common.files import check_writable, replaced
from tarflow.demo.page import build, start
from tarflow.demo.screenshot import draw, free_port, opened
from tarflow.pipeline.opening import open_pipeline


def main(argv: list[str] | None = None) -> None:
    parser = CommandParser("screenshot_demo.py", __doc__)
    parser.add_argument("--pipeline", required=True, help="a folder or a shipped pipeline's name")
    parser.add_argument("--prompt", help="for pipelines that draw from captions")
    for name, default in {"seed": 0, "images": 4, "width": 1280, "height": 860}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("docs/demo.png"))
    options = parser.parse_args(argv)
    with ending():
        check_writable(options.out)
        app = start(build(open_pipeline(options.pipeline)), "127.0.0.1", free_port())
        with opened(app.local_url, options.width, options.height) as page:
            draw(page, options.prompt, options.seed, options.images)
            with replaced(options.out) as temporary:
                page.screenshot(path=temporary, type="png")
        app.close(verbose=False)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
