"""The systems that LEGO is compared with, by one interface, so that a table like the paper's can be filled.

`copy` needs no model, `instruct-pix2pix` an InstructPix2Pix folder, `sdedit` and `proxedit` a text-to-image folder,
`diffusers` the folder of any edit pipeline. The label-only twin is a LegoPipeline folder, see `parts`.
"""

from lego_pipeline.baselines.base import Baseline, with_arguments
from lego_pipeline.baselines.copied_input import CopiedInput
from lego_pipeline.baselines.edit_pipeline import EditPipeline
from lego_pipeline.baselines.instruct_pix2pix import InstructPix2Pix
from lego_pipeline.baselines.proxedit import ProxEdit
from lego_pipeline.baselines.sdedit import SdEdit

BASELINES: dict[str, type[Baseline]] = {
    "copy": CopiedInput,
    "instruct-pix2pix": InstructPix2Pix,
    "sdedit": SdEdit,
    "proxedit": ProxEdit,
    "diffusers": EditPipeline,
}

__all__ = ["BASELINES", "Baseline", "with_arguments"]
