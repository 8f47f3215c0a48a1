"""Fresh Python processes that do not wait for torch: they are forked from a server that has imported it."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
# slow to import, and deaf to the environment: what reads its variables when it is imported, as the Hub's client does,
# is left to the new process
LIBRARIES = (
    "jinja2",
    "matplotlib.figure",
    "pandas",
    "pyarrow.dataset",
    "scipy.stats",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
)
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(list(LIBRARIES))


def run_python(arguments, cwd=ROOT, env=None, timeout=180) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`, of a script or `-c code`.

    Raises:
        subprocess.TimeoutExpired: The process is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ if env is None else env)
        process = FORKSERVER.Process(target=_become, args=(list(map(str, arguments)), str(cwd), environment, folder))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        output, errors = (Path(folder, name).read_text() for name in ("output", "errors"))
    return subprocess.CompletedProcess(arguments, process.exitcode, output, errors)


# both are past their last exchange when either leaves; what the interpreter's end does after it is not ours
ENDED = """
from pathlib import Path
from diffusers_vsdm.trainer.processes import process_state
process_state().wait_for_everyone()
process_state().destroy_process_group()
Path(__file__).with_name(f"{process_state().process_index}.ended").touch()
"""


def run_two(code: str, folder: Path, *arguments: object) -> None:
    """Two processes of a script with this code, by torchrun on CPUs, that find the package and these tests.

    Unlike forks of `debug_launcher`, in which Accelerate never ends the group of processes.

    Raises:
        AssertionError: One did not come to the end; with all that both said.
    """
    script = folder / "script.py"
    script.write_text(code + ENDED)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}", "OMP_NUM_THREADS": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *arguments]
    outcome = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=180)
    ended = [(folder / f"{index}.ended").exists() for index in range(2)]
    assert all(ended), f"{ended}\n{outcome.stdout}\n{outcome.stderr}"


def _become(arguments: list[str], cwd: str, environment: dict[str, str], folder: str) -> None:
    """Take the place of `python ARGUMENTS`."""
    for number, name in enumerate(("output", "errors"), 1):
        os.dup2(os.open(Path(folder, name), os.O_CREAT | os.O_WRONLY), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [*filter(None, paths), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
