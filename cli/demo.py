"""`tarflow demo`: the web page."""

from __future__ import annotations

import importlib.util

from tarflow.cli.parsing import CommandParser

DESCRIPTION = """Draw on a web page, which this machine serves until Ctrl-C is pressed.

  tarflow demo --pipeline runs/emoji_text/pipeline"""


def parser() -> CommandParser:
    parser = CommandParser("tarflow demo", DESCRIPTION, "--pipeline DIR")
    parser.add_argument("--pipeline", required=True, metavar="DIR", help="a folder, a shipped name or a hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860, metavar="N", help="port to serve at")
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if not 0 < args.port < 2**16:
        raise ValueError(f"--port must be 1 to 65535, got {args.port}")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the web page needs gradio, which is not installed: pip install 'tarflow[demo]'")
    from tarflow.demo.page import serve  # imported here: gradio is optional

    serve(args.pipeline, args.host, args.port, args.open)
