"""Runs the training scripts as processes of their own, kills them, and starts them again within a second.

Importing torch, diffusers and transformers takes several seconds, so this process imports them once and forks. It
reads one JSON object a line from standard input and answers with one. It runs `processes` copies of a script (several
find each other as under `torchrun`) and kills them at the moment that `kill` describes, or lets them end.

    {"script": "train_ldm", "arguments": [...], "processes": 1, "log": "FILE", "kill": null, "file_size": null}
    {"exit_codes": [0], "states": [before, after], "unfinished": false}

`kill`: {"states": after that many new states (null: at once), "saving": wait until a state is being written, "delay":
seconds from there, "gap": seconds between the processes' deaths}. `file_size`: most bytes of a file, as a full disk.
"""

import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

MODULES = ("train.train_ldm", "train.tune_vlm", "lego_pipeline.vlm.llava", "accelerate.utils.fsdp_utils")


def last_state(folder: Path) -> int:
    """Step of the newest state, -1 for none."""
    numbers = [path.name.removeprefix("step-") for path in folder.glob("step-*")] if folder.is_dir() else []
    return max([int(number) for number in numbers if number.isdigit()], default=-1)


def is_saving(folder: Path) -> bool:
    return any(folder.glob("*.unfinished"))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(job: dict[str, Any], rank: int, port: int) -> int:
    """Forks one process of a job; returns its number."""
    number = os.fork()
    os.setpgid(number, number)  # a group that is killed with the workers it starts; made by whoever comes first
    if number:
        return number
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"], "LOCAL_WORLD_SIZE": job["processes"]}
    if job["processes"] > 1:
        os.environ |= {name: str(value) for name, value in world.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if job["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], job["file_size"]))
    code = 70
    try:
        script = importlib.import_module(f"train.{job['script']}")
        sys.argv = [f"{job['script']}.py", *map(str, job["arguments"])]
        name = "".join(part.title() for part in job["script"].split("_"))
        script.run(script.main, getattr(script, f"{name}Config"), script.__doc__)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(kill: dict[str, Any], state: Path, numbers: list[int]) -> None:
    """Returns when it is time to kill, or when a process has ended by itself."""
    before, deadline = last_state(state), None
    while not any(os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT) for number in numbers):
        has_states = kill["states"] is None or last_state(state) >= max(before, 0) + kill["states"]
        if deadline is None and has_states and (not kill["saving"] or is_saving(state)):
            deadline = time.monotonic() + kill["delay"]
        if deadline is not None and time.monotonic() >= deadline:
            return
        time.sleep(0.0005)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One job from start to end; see the module."""
    arguments = job["arguments"]
    state = Path(arguments[arguments.index("--output-dir") + 1]) / "state"
    before, port = last_state(state), free_port()
    numbers = [start(job, rank, port) for rank in range(job["processes"])]
    unfinished = False
    if job["kill"] is not None:
        wait_for(job["kill"], state, numbers)
        unfinished = is_saving(state)
        for number in sorted(numbers, reverse=job["kill"]["gap"] < 0):
            os.killpg(number, signal.SIGKILL)
            time.sleep(abs(job["kill"]["gap"]))
    codes = [os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) for number in numbers]
    return {"exit_codes": codes, "states": [before, last_state(state)], "unfinished": unfinished}


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
