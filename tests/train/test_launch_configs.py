"""Launch configurations for accelerate: parsed by its own loader and launcher. FSDP and DeepSpeed are not run here."""

from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

ROOT = Path(__file__).parents[2]
KINDS = {
    "one_gpu": DistributedType.NO,
    "eight_gpus": DistributedType.MULTI_GPU,
    "two_nodes": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}
FILES = {name: ROOT / "train" / "configs" / f"accelerate_{name}.yaml" for name in KINDS}


def launch(name: str, *arguments: str) -> Namespace:
    """What `accelerate launch` makes of a file and flags."""
    args = launch_command_parser().parse_args(["--config_file", str(FILES[name]), *arguments, "script.py"])
    return _validate_launch_command(args)[0]


def test_every_launch_configuration_is_tested() -> None:
    assert set((ROOT / "train" / "configs").glob("accelerate_*.yaml")) == set(FILES.values())


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FILES[name]))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type == KINDS[name]
    assert not config.use_cpu


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_accelerate_launch_knows_every_key_of_its_section(name: str) -> None:
    known = {action.dest for action in launch_command_parser()._actions}
    content = yaml.safe_load(FILES[name].read_text())
    for section in ("fsdp_config", "deepspeed_config"):
        assert set(content.get(section, {})) <= known


@pytest.mark.parametrize("name", KINDS)
def test_it_is_short_and_names_the_line_that_starts_it(name: str) -> None:
    lines = FILES[name].read_text().splitlines()
    assert len(lines) <= 30
    assert f"accelerate launch --config_file train/configs/{FILES[name].name} " in "\n".join(lines)


def test_the_launcher_takes_the_settings_over() -> None:
    assert not launch("one_gpu").multi_gpu
    eight = launch("eight_gpus")
    assert (eight.multi_gpu, eight.num_processes, eight.num_machines) == (True, 8, 1)
    nodes = launch("two_nodes", "--machine_rank", "1", "--main_process_ip", "192.0.2.7")
    assert (nodes.multi_gpu, nodes.num_processes, nodes.num_machines) == (True, 16, 2)
    assert (nodes.machine_rank, nodes.main_process_ip) == (1, "192.0.2.7")
    fsdp = launch("fsdp2")
    assert (fsdp.use_fsdp, fsdp.fsdp_version, fsdp.fsdp_auto_wrap_policy) == (True, 2, "SIZE_BASED_WRAP")
    assert fsdp.fsdp_cpu_ram_efficient_loading is False
    for stage in (2, 3):
        zero = launch(f"zero{stage}")
        assert (zero.use_deepspeed, zero.zero_stage, zero.gradient_accumulation_steps) == (True, stage, 1)


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_what_was_not_run_says_so(name: str) -> None:
    assert "Only parsed so far, not run" in FILES[name].read_text()
