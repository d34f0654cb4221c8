"""Serving the page over a pipeline's folder, and a sentence for each way in which that does not work."""

from __future__ import annotations

import signal
import socket
from typing import TYPE_CHECKING

from tarflow.flows.trajectory.kinds import check_flow_kind
from tarflow.pipeline.loading.place import default_pipeline
from tarflow.pipeline.opening import open_pipeline
from tarflow.pipeline.pipeline_tarflow import TARFlowPipeline

if TYPE_CHECKING:
    import gradio as gr

#: Larger files are not taken.
LARGEST_UPLOAD = "50mb"


def serve(
    pipeline: str | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    open_browser: bool = False,
    device: str | None = None,
) -> None:
    """Serve the page until Ctrl+C or SIGTERM, which also delete what was uploaded.

    Args:
        pipeline: a folder, a shipped name or a hub id; None is `default_pipeline`.
        host, port: to listen at. Only programs of this machine can reach 127.0.0.1; with "0.0.0.0" the network can.
        open_browser: also open it.
        device: "cpu", "cuda" and so on; None is the best there is.

    Raises:
        ValueError: without Gradio, or if there is no such pipeline or device.
        OSError: if the port is taken or the host is none of this machine's.
    """
    check_gradio()
    name = pipeline or default_pipeline()
    check_address(host, port)
    pipe = open_pipeline(name, device)
    check_flow_kind(pipe.flow, "the page is")
    app = start(build(pipe), host, port, open_browser)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"the page over {name!r} is at {app.local_url} (Ctrl+C ends it)", flush=True)
    app.block_thread()


def build(pipe: TARFlowPipeline) -> gr.Blocks:
    """The page over a `TARFlowPipeline` that is on its device."""
    check_gradio()
    from tarflow.demo import layout  # imported here: Gradio takes seconds, and is optional

    return layout.build(pipe)


def start(app: gr.Blocks, host: str, port: int, open_browser: bool = False) -> gr.Blocks:
    """Serve a built page in a thread; ``app.close()`` ends it."""
    import gradio as gr

    from tarflow.demo import style

    theme = gr.themes.Default(
        primary_hue="teal", secondary_hue="teal", neutral_hue="slate", font=style.FONTS, font_mono=style.MONOSPACE
    )
    theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
    )
    app.launch(
        server_name=host,
        server_port=port,
        inbrowser=open_browser,
        share=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size=LARGEST_UPLOAD,
        theme=theme,
        css=style.CSS,
        head=style.HEAD,
    )
    return app


def check_gradio() -> None:
    """An error that says how to install Gradio if it is missing."""
    try:
        import gradio  # noqa: F401 (takes seconds, and only the page needs it)
    except ImportError as error:
        raise ValueError("the page needs Gradio: pip install 'tarflow[demo]'") from error


def check_address(host: str, port: int) -> None:
    """Whether one can listen there.

    Raises:
        ValueError: for a port that is none.
        OSError: if the port is taken, or the host is none of this machine's.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"the port must be 1 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
    except OSError as error:
        raise OSError(f"cannot listen at port {port} of {host!r} ({error.strerror}): take another port") from error
