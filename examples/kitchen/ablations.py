"""Train the rows of the kitchen's table that are no LEGO; `examples.kitchen.report` then draws up the table.

    python -m examples.kitchen.ablations --run-dir runs/kitchen --max-minutes 60

The run directory is that of `examples.kitchen.train`, finished. All rows start from the same untrained UNet and have
the same settings and seed as LEGO. `label_only` (InstructPix2Pix: no VLM) has as many samples as LEGO. The rows
between, in which parts of the VLM's embeddings are left out of training or the projections stay random as in the
released code, have `--small-steps` each, and so has `both`, the LEGO that they are to be compared with. Running the
command again goes on where it ended.
"""

from dataclasses import dataclass
from pathlib import Path

from examples.kitchen.train import Chain, OutOfTime, TrainKitchenConfig, ldm_command
from lego_pipeline.config import run

FOLDER = "ablations"  # in the run directory
SMALL = {  # flags of train_ldm.py, and parts of the condition as examples.kitchen.systems names them
    "description": (("--vlm-parts", "none"), "description"),
    "description + image": (("--vlm-parts", "image"), "description+image"),
    "description + text": (("--vlm-parts", "text"), "description+text"),
    "projections frozen": (("--freeze-projections",), "description+image+text"),
    "both": ((), "description+image+text"),
}


@dataclass(kw_only=True)
class AblationsConfig:
    run_dir: Path = Path("runs/kitchen")
    ldm_steps: int = TrainKitchenConfig.ldm_steps  # of LEGO and of label only, 48 samples each
    small_steps: int = 1042  # of the rows between, 50,000 samples
    max_minutes: float = 0.0  # end this slice earlier, saved; 0 = run to the end
    seed: int = 0


def folder_of(row: str) -> str:
    """Of a row, in the run directory."""
    return f"{FOLDER}/{row.replace(' + ', '_').replace(' ', '_')}"


def main(config: AblationsConfig) -> None:
    chain = Chain(config.run_dir, config.max_minutes, config.seed)
    start, cache = chain.run / "start", ("--cache", chain.run / "cache")
    rows: dict[str, tuple[int, tuple]] = {
        "label only": (config.ldm_steps, ("--embeddings", "none", "--vlm-dropout", "0")),
        **{name: (config.small_steps, (*cache, *flags)) for name, (flags, _) in SMALL.items()},
    }
    try:
        for name, (steps, flags) in rows.items():
            chain.train(folder_of(name), *ldm_command(chain.data, start, steps), *flags)
    except OutOfTime:
        print(f"the slice's {config.max_minutes:g} minutes are over; the same command goes on from here")


if __name__ == "__main__":
    run(main, AblationsConfig, __doc__)
