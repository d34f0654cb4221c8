"""python -m tarflow.demo [--pipeline FOLDER] [--host 127.0.0.1] [--port 7860] [--device cpu]"""

from __future__ import annotations

import argparse
import sys

from tarflow.demo.page import serve


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tarflow.demo", description="A local web page over a pipeline.")
    parser.add_argument("--pipeline", help="a folder or a shipped pipeline's name (default: emoji, or the quick start)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is the whole network's")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--device", help="cpu, cuda or mps; the best there is if not given")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    options = parser.parse_args(argv)
    try:
        serve(options.pipeline, options.host, options.port, options.open, options.device)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
