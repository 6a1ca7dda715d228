"""Serves the page on this machine, without a call to any other."""

import os
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lego_pipeline.app.page import Example, build_page
from lego_pipeline.app.painter import Painter

FONT = ("system-ui", "sans-serif")  # Gradio's own would be asked for from a font server
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.grid-wrap.fixed-height { min-height: 0; height: auto; max-height: none; }
#drift figcaption { font-size: 13px; opacity: 0.75; }
#frame img { width: 100%; height: 100%; object-fit: contain; }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
#examples .grid-container { gap: 4px; padding: 4px; }
#examples .caption-label { font-size: 10px; padding: 0 4px; right: 2px; bottom: 2px; max-width: 95%; }
"""


def prepare_gradio(folder: Path) -> None:
    """Loads Gradio with its calls home switched off.

    Args:
        folder: where it keeps what is uploaded; the caller removes it.

    Raises:
        ImportError: it is missing.
    """
    # Both are read on import.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'`lego app` needs Gradio ({error}); install it: pip install "lego-pipeline[app]"'
        ) from error


@contextmanager
def listen(host: str, port: int) -> Generator[socket.socket]:
    """A socket that listens; port 0 takes any that is free.

    Raises:
        ValueError: the port is no port or taken, or the host is not one of this machine's.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"`--port` must be from 0 to 65535, got {port}.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        opened = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(
            f"`--host` and `--port` must be an address of this machine that is free, got {host}:{port} "
            f"({error.strerror or error}); pass another, such as --port {port % 65535 + 1}."
        ) from error
    with opened:
        yield opened


def serve(
    painter: Painter,
    listening: socket.socket,
    folder: Path,
    *,
    title: str,
    note: str = "",
    examples: Sequence[Example] = (),
    ready: Callable[[], Any] = lambda: None,
) -> None:
    """Serves the page until the process is interrupted or terminated.

    Args:
        painter: the model.
        listening: from `listen`.
        folder: where pictures go; the caller removes it.
        title, note, examples: of `build_page`.
        ready: called when the page can be opened.
    """
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    page = build_page(painter, folder, title=title, note=note, examples=examples)
    page.queue(default_concurrency_limit=None, api_open=False)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        app_kwargs={"openapi_url": None},
        show_error=True,
        max_file_size="64mb",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        pwa=False,
        ssr_mode=False,
        mcp_server=False,
        theme=gr.themes.Default(font=FONT, font_mono=("ui-monospace", "monospace")),
        css=CSS,
    )

    # Gradio checks that a file which a visitor names was uploaded only on a page that it launched itself. Without that
    # any picture of this machine could be asked for as a frame.
    page.has_launched = True

    ready()  # the socket listens already; who comes now is answered in a moment
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Open pages hold a connection each; they are not waited for.
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)).run([listening])
    except KeyboardInterrupt:
        return
