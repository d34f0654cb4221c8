"""`tarflow demo`: the web page."""

from __future__ import annotations

import importlib.util

from tarflow.cli.parsing import PIPELINE_HELP, CommandParser, loading
from tarflow.pipeline.loading.place import default_pipeline, locate

DESCRIPTION = """Draw on a web page, which this machine serves until Ctrl-C is pressed. It needs Gradio:
pip install 'tarflow[demo]'

  tarflow demo --pipeline runs/emoji_text/pipeline"""


def parser() -> CommandParser:
    parser = CommandParser("tarflow demo", DESCRIPTION)
    add = parser.add_argument
    add(
        "--pipeline",
        metavar="DIR",
        help=PIPELINE_HELP,
    )
    add("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0 lets other machines in")
    add("--port", type=int, default=7860, metavar="N", help="port to serve at")
    add("--open", action="store_true", help="open the page in this machine's browser")
    add("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    return parser


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if not 0 < args.port < 2**16:
        raise ValueError(f"--port must be 1 to 65535, got {args.port}")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs Gradio: pip install 'tarflow[demo]'")
    locate(args.pipeline or default_pipeline())
    loading()
    # Imported here: it takes seconds, for which wrong options need not wait.
    from tarflow.cli.quiet import quiet_libraries
    from tarflow.demo.page import serve

    quiet_libraries()
    serve(args.pipeline, args.host, args.port, args.open, args.device)
