"""Node with the frames that travel with the package, so that a workflow runs before anybody has an own frame."""

from comfy_api.latest import io, ui

from lego_pipeline.checkpoints import FRAMES

from .frames import to_image


class LegoLoadFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoLoadFrame",
            display_name="LEGO Load Example Frame",
            category="LEGO/load",
            description="One of the package's rendered kitchen frames, which the embedded checkpoint has never seen. "
            "For a frame of your own use Load Image, with a checkpoint trained on such frames.",
            search_aliases=["example", "kitchen", "sample frame", "lego"],
            inputs=[
                io.Int.Input("number", default=0, min=0, max=9999, tooltip="Which frame, counted from 0."),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The frame before the action."),
                io.String.Output(display_name="action", tooltip="An action that fits the frame, as a label."),
                io.Image.Output(display_name="truth", tooltip="The frame in which the renderer shows that action."),
            ],
        )

    @classmethod
    def execute(cls, number: int) -> io.NodeOutput:
        from lego_pipeline.data.manifest import read_manifest

        rows = read_manifest(FRAMES)
        if number >= len(rows):
            raise ValueError(f"`number` must be at most {len(rows) - 1}, got {number}; there are {len(rows)} frames.")
        row = rows[number]
        frame = to_image([row["image_0"]])
        return io.NodeOutput(frame, row["action"], to_image([row["image_1"]]), ui=ui.PreviewImage(frame, cls=cls))


NODES = [LegoLoadFrame]
