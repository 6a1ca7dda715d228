"""What every training loop here shares: the order of samples, starting, resuming, saving, stopping in time, logging.

A step is a pure function of (weights, seed, step number): the samples of a step and its random numbers are derived
from the step number, so a run that was killed and goes on computes what an uninterrupted one would have. accelerate
writes the weights and moments; what its own restore leaves open (it swallows a failing one, writes in place and keeps
the position nowhere) is settled here.
"""

from lego_pipeline.training.launch import (
    check_number,
    check_processes,
    check_settings,
    long_waits,
    resume_settings,
    start_accelerator,
    write_run_files,
)
from lego_pipeline.training.order import SampleOrder, sample_generator, seed_of
from lego_pipeline.training.state import cut_log
from lego_pipeline.training.steps import ResumableEma, ResumableSteps, SaveError

__all__ = [
    "ResumableEma",
    "ResumableSteps",
    "SampleOrder",
    "SaveError",
    "check_number",
    "check_processes",
    "check_settings",
    "cut_log",
    "long_waits",
    "resume_settings",
    "sample_generator",
    "seed_of",
    "start_accelerator",
    "write_run_files",
]
