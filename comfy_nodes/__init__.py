"""The ComfyUI nodes of lego-pipeline, one module per stage; the work is done by `lego_pipeline`."""

from comfy_api.latest import ComfyExtension, io

from . import adapter, condition, curate, enhance, example, frames, load, sample, score
from .packages import explained

NODES: list[type[io.ComfyNode]] = [
    *load.NODES,
    *example.NODES,
    *enhance.NODES,
    *frames.NODES,
    *condition.NODES,
    *sample.NODES,
    *curate.NODES,
    *score.NODES,
]
for node in NODES:
    node.execute = classmethod(explained(node.execute.__func__))


class LegoExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def on_load(self) -> None:
        adapter.register_folder()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def comfy_entrypoint() -> ComfyExtension:
    """Called by ComfyUI once."""
    return LegoExtension()
