"""Launch scripts: what they call, with stand-ins for the commands that are not here."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml

from sharding import multihost
from sharding.multihost import Given

LAUNCH = Path(__file__).resolve().parent.parent / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_launch_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


def test_the_jobset_names_as_many_processes_as_it_starts():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(environment["JAX_NUM_PROCESSES"]) == spec["parallelism"] == spec["completions"]
    address = environment["JAX_COORDINATOR_ADDRESS"].replace("$(JOBSET_NAME)", jobset["metadata"]["name"])
    assert address == f"infinite-jax-{job['name']}-0-0.infinite-jax:8476"
    found = multihost.explicit(Given(), environment | {"JAX_COORDINATOR_ADDRESS": address, "JOB_COMPLETION_INDEX": "1"})
    assert found == (address, 2, 1)


def called(script: str, *arguments: str, folder: Path, stand_in: str, **environment: str) -> list[str]:
    """The calls that a launch script makes of a command, in order of their text; a stand-in notes them."""
    (folder / stand_in).write_text(
        "#!/bin/sh\n"
        'echo "${JAX_COORDINATOR_ADDRESS-} ${JAX_NUM_PROCESSES-} ${JAX_PROCESS_ID-} ${JAX_LOCAL_DEVICE_IDS-} '
        '${CUDA_VISIBLE_DEVICES-}|$*" >> "$CALLS"\n'
    )
    (folder / stand_in).chmod(0o755)
    base = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    subprocess.run([LAUNCH / script, *arguments], env=base | environment, check=True)
    lines = (folder / "calls").read_text().splitlines()
    (folder / "calls").unlink()
    return sorted(lines)


def test_launch_scripts_start_or_continue(tmp_path):
    here = {"folder": tmp_path, "stand_in": "python"}
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").touch()
    fresh = f"-m infinite_jax.train run.dir={tmp_path}/new mesh.fsdp=2"
    assert called("start.sh", f"{tmp_path}/new", "mesh.fsdp=2", **here) == [f"    |{fresh}"]
    assert called("start.sh", str(begun), "mesh.fsdp=2", **here) == [f"    |-m infinite_jax.resume {begun}"]
    assert called("one_gpu.sh", f"{tmp_path}/new", "mesh.fsdp=2", **here, GPU="3") == [f"    3|{fresh}"]
    assert called("process_per_gpu.sh", f"{tmp_path}/new", "mesh.fsdp=2", **here, GPUS="2") == [
        f"127.0.0.1:8476 2 {i} {i} |{fresh}" for i in (0, 1)
    ]
    names = {name: name.lower() for name in ("TPU", "ZONE", "CLUSTER", "PROJECT", "IMAGE", "NAME", "STORAGE")}
    (call,) = called("tpu_vm.sh", "/runs/a", "domains=a b", folder=tmp_path, stand_in="gcloud", **names)
    assert "ssh tpu --zone=zone --worker=all" in call and call.endswith(r"launch/start.sh /runs/a domains=a\ b")
    (call,) = called("gke_xpk.sh", "--tpu-type=v5p-32", "--", "x=1", folder=tmp_path, stand_in="xpk", **names)
    assert "--tpu-type=v5p-32" in call and call.endswith("--command=launch/start.sh /runs/name x=1")
