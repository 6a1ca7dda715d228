"""Entry of the ComfyUI node pack: ComfyUI loads this file when the repository is a folder of `custom_nodes`.

No other code imports it. ComfyUI gives it the folder's path as module name, so the nodes are reached by a relative
import, while the library is always the one package `lego_pipeline`: the installed one, or this checkout's.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("folder_paths") and find_spec("comfy"):  # in ComfyUI; test runners look at this file too
    if not find_spec("comfy_api") or not find_spec("comfy_api.latest"):
        raise ImportError(
            "lego-pipeline must have ComfyUI 0.16.3 or newer, got one without `comfy_api.latest`; update it."
        )
    if not find_spec("lego_pipeline"):
        sys.path.append(str(Path(__file__).parent))

    WEB_DIRECTORY = "./comfy_nodes/web"  # the nodes' help pages

    from .comfy_nodes import comfy_entrypoint  # noqa: F401  # ty: ignore[import-not-found]
