"""Pushing and loading by name, against a server on loopback that speaks the Hub's protocol (`tests/hub_server.py`)."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

from diffusers_vsdm import BridgePipeline, VSDMPipeline
from diffusers_vsdm.hub.cards import render_card
from diffusers_vsdm.hub.publishing import publish
from diffusers_vsdm.trainer import TrainingConfig, train
from diffusers_vsdm.trainer.bridge import train_bridge
from diffusers_vsdm.trainer.bridge_report import write_bridge_report
from diffusers_vsdm.trainer.report import write_report

from .hub_server import Hub
from .processes import ROOT, run_python
from .test_bridge_trainer import tiny as tiny_bridge
from .test_classes import conditional
from .test_images import TINY as TINY_IMAGES
from .test_images import picture
from .test_pipeline import generator
from .test_ways_in import SAMPLE, WAYS


SCRIPT = ROOT / "training" / "train_vsdm.py"
TINY = {
    "standardize": True,
    "max_train_steps": 20,
    "sa_stages": 2,
    "sa_trajectories": 8,
    "num_train_samples": 500,
    "train_batch_size": 32,
    "model_width": 8,
    "num_eval_samples": 50,
    "num_likelihood_samples": 0,
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = Hub(tmp_path_factory.mktemp("hub"))
    server.start()
    yield server
    server.process.kill()


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    """This process as a client of the server, with an empty cache."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", "token-alice")
    return hub.api()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model's folder, with what a long run leaves beside it."""
    folder = tmp_path_factory.mktemp("runs") / "spiral"
    config = TrainingConfig(output_dir=str(folder), **TINY)
    write_report(config, train(config))
    for name in ("checkpoint-10/state.safetensors", "logs/vsdm/events", "validation/step-10.png", "unet/.hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for others")
    return folder


PUSHED = {
    ".gitattributes",
    "README.md",
    "drift.png",
    "metrics.json",
    "model_index.json",
    "normalizer/config.json",
    "normalizer/diffusion_pytorch_model.safetensors",
    "pipeline.py",
    "samples.png",
    "scheduler/scheduler_config.json",
    "scheduler/vsdm.drift/drift.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


def test_a_private_run_is_pushed_and_loads_in_every_way(hub, tmp_path, monkeypatch):
    """The command line from its first flag to samples of a fresh process; only what a model is leaves the machine."""
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in TINY.items()]
    flags += ["--push_to_hub", "--hub_model_id=private-spiral", "--hub_private_repo", "--hub_tag=v1"]
    flags += ["--output_dir=outputs/secret-place", "--checkpointing_steps=10", "--logger=tensorboard"]
    outcome = run_python([SCRIPT, *flags], tmp_path, hub.environment(tmp_path / "home"))
    assert outcome.returncode == 0 and "It is on the Hub" in outcome.stdout, outcome.stderr
    assert "token-alice" not in outcome.stdout + outcome.stderr

    repo_id = "alice/private-spiral"
    assert set(hub.api().list_repo_files(repo_id)) == PUSHED
    assert [tag.name for tag in hub.api().list_repo_refs(repo_id).tags] == ["v1"]
    for user in (None, "bob"):
        with pytest.raises(RepositoryNotFoundError):
            hub.api(user).model_info(repo_id)
    for name in PUSHED:
        path = hub.api().hf_hub_download(repo_id, name, cache_dir=tmp_path / "cache")
        content = Path(path).read_bytes()
        assert b"secret-place" not in content and str(tmp_path).encode() not in content, name
        assert b"token-alice" not in content, name

    local = VSDMPipeline.from_pretrained(tmp_path / "outputs" / "secret-place")
    namespace = {"pipeline": local}
    monkeypatch.chdir(tmp_path)
    exec(SAMPLE, namespace)
    expected = np.load("samples.npy")
    for number, (way, code) in enumerate(WAYS.items()):
        folder = tmp_path / f"way-{number}"
        folder.mkdir()
        # Diffusers asks for a library that it does not know before it reads the remote code
        known = "import diffusers_vsdm\n" if way == "custom_pipeline" else ""
        code = known + code.replace("'model'", f"{repo_id!r}") + SAMPLE
        outcome = run_python(["-c", code], folder, hub.environment(folder / "home"))
        assert outcome.returncode == 0, (way, outcome.stderr[-2000:])
        assert np.array_equal(np.load(folder / "samples.npy"), expected), way


@pytest.mark.parametrize("prior", ["", "moons"])
def test_a_bridge_is_pushed_whole_and_its_card_works(client, tmp_path, prior):
    """Both networks; what its card shows is run as it stands."""
    settings = {"prior_dataset_name": "moons", "ddpm_beta_schedule": "brownian", "sigma_max": 1.0} if prior else {}
    config = tiny_bridge(
        output_dir=str(tmp_path / "bridge"),
        dataset_name="8gaussians",
        num_eval_samples=50,
        standardize=not prior,
        **settings,
    )
    result = train_bridge(config)
    write_bridge_report(result)
    publish(tmp_path / "bridge", "alice/bridge")
    folder = client.snapshot_download("alice/bridge", cache_dir=tmp_path / "cache")
    found = BridgePipeline.from_pretrained(folder)
    for name in ("unet", "forward_unet"):
        mine, theirs = getattr(result.pipeline, name), getattr(found, name)
        theirs = theirs.state_dict()
        assert all(np.array_equal(tensor, theirs[name]) for name, tensor in mine.state_dict().items())
    card = (Path(folder) / "README.md").read_text()
    namespace = {}
    code = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)[1]
    exec(code.replace("alice/bridge", folder), namespace)
    assert namespace["latents"].shape == (1000, 2)
    assert "Bridge" in card and ("`moons`" in card) == bool(prior) and "control energy" in card
    assert "import BridgePipeline" in (tmp_path / "bridge" / "pipeline.py").read_text()


def test_a_model_of_classes_comes_back_from_the_hub(hub, client, tmp_path):
    pipeline = conditional()
    pipeline.save_pretrained(tmp_path / "classes")
    publish(tmp_path / "classes", "alice/classes")
    arguments = {"num_inference_steps": 3, "output_type": "np", "class_labels": [0, 2], "guidance_scale": 3.0}
    code = f"""
import numpy, torch
from diffusers_vsdm import VSDMPipeline
torch.set_num_threads(1)  # as here: kernels round by it
pipeline = VSDMPipeline.from_pretrained("alice/classes")
numpy.save("samples.npy", pipeline(2, torch.Generator().manual_seed(0), **{arguments}).samples)
"""
    outcome = run_python(["-c", code], tmp_path, hub.environment(tmp_path / "home"))
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert np.array_equal(np.load(tmp_path / "samples.npy"), pipeline(2, generator(), **arguments).samples)


def test_revisions_tags_and_a_name_that_exists(client, trained, tmp_path):
    publish(trained, "alice/versions")
    publish(trained, "versions", revision="experiment", tag="v2", commit_message="another")
    refs = client.list_repo_refs("alice/versions")
    heads = {branch.name: branch.target_commit for branch in refs.branches}
    assert set(heads) == {"main", "experiment"} and heads["main"] != heads["experiment"]
    assert {tag.name: tag.target_commit for tag in refs.tags} == {"v2": heads["experiment"]}
    with pytest.raises(HfHubHTTPError, match="409|already exists"):
        publish(trained, "alice/versions", tag="v2")
    with pytest.raises(HfHubHTTPError, match="rights"):
        publish(trained, "bob/versions")
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        publish(tmp_path, "alice/nothing")
    assert set(client.list_repo_files("alice/versions")) == PUSHED


def test_pipelines_and_schedulers_push_themselves(hub, trained, tmp_path):
    """By the methods of Diffusers, in half precision too; a component is swapped for the one on the Hub."""
    code = f"""
import torch
from diffusers_vsdm import VSDMPipeline, VSDMScheduler
pipeline = VSDMPipeline.from_pretrained({str(trained)!r})
pipeline.push_to_hub("alice/halves")
pipeline.to(dtype=torch.float16).push_to_hub("alice/halves", variant="fp16")
pipeline.scheduler.push_to_hub("alice/scheduler")
half = VSDMPipeline.from_pretrained("alice/halves", variant="fp16", dtype=torch.float16)
assert half.unet.dtype == torch.float16 and half.scheduler.drift.lam.dtype == torch.float64
scheduler = VSDMScheduler.from_pretrained("alice/scheduler")
assert torch.equal(scheduler.drift.lam, half.scheduler.drift.lam)
swapped = VSDMScheduler.from_config(scheduler.config, solver="trig")
other = VSDMPipeline.from_pretrained("alice/halves", scheduler=swapped)
assert other(3, num_inference_steps=4, output_type="np").samples.shape == (3, 2)
"""
    outcome = run_python(["-c", code], tmp_path, hub.environment(tmp_path / "home"))
    assert outcome.returncode == 0, outcome.stderr[-2000:]


def test_what_is_written_by_hand_survives(client, trained):
    """On the Hub and here: sections before, between and after, and metadata."""
    publish(trained, "alice/card")
    card = ModelCard.load(client.hf_hub_download("alice/card", "README.md"))
    assert 'from_pretrained("alice/card")' in card.text and card.data.eval_results
    text = card.content.replace("## Drift", "By hand, before.\n\n## Drift") + "\nBy hand, after.\n"
    text = text.replace("license: apache-2.0", "license: mit\nlanguage: en").replace("lambda:", "something wrong:")
    client.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="alice/card")
    publish(trained, "alice/card")
    again = ModelCard.load(client.hf_hub_download("alice/card", "README.md"))
    assert "By hand, before.\n\n## Drift" in again.text and again.text.endswith("By hand, after.\n")
    assert "something wrong" not in again.text
    assert again.data.license == "mit" and again.data.language == "en"
    assert again.data.eval_results == card.data.eval_results

    here = trained / "README.md"
    here.write_text(here.read_text() + "\nWritten here.\n")
    publish(trained, "alice/card")
    final = ModelCard.load(client.hf_hub_download("alice/card", "README.md")).text
    assert final.endswith("By hand, after.\n\nWritten here.\n")

    record = json.loads((trained / "metrics.json").read_text())
    record["config"]["license"] = "bsd-3-clause"  # as if --license had been given
    assert render_card(trained, record).data.license == "bsd-3-clause"


def test_a_hub_that_cannot_be_reached_is_not_one_without_a_card(client, trained, monkeypatch):
    """Else what was written there by hand would be lost."""
    publish(trained, "alice/unreachable")

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(HfApi, "hf_hub_download", fail)
    with pytest.raises(LocalEntryNotFoundError):
        publish(trained, "alice/unreachable")


def test_the_card_s_code_runs_as_printed(hub, client, trained, tmp_path):
    publish(trained, "alice/as-printed")
    text = Path(client.hf_hub_download("alice/as-printed", "README.md")).read_text()
    code = "".join(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
    assert code.count("samples = ") == 2
    code += "assert samples.shape == (1000, 2)"
    outcome = run_python(["-c", code], tmp_path, hub.environment(tmp_path / "home"))
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    command = re.search(r"^accelerate launch .*", text, flags=re.MULTILINE)[0]
    assert "--standardize" in command and "--max_train_steps 20" in command and str(trained.parent) not in text


@pytest.mark.parametrize("token", [None, "token-bob", "nonsense"])
def test_a_push_that_is_not_allowed_ends_before_the_training(hub, tmp_path, token):
    flags = ["--push_to_hub", "--hub_model_id=alice/not-yours", f"--output_dir={tmp_path / 'model'}"]
    environment = hub.environment(tmp_path / "home", user=None) | ({"HF_TOKEN": token} if token else {})
    outcome = run_python([SCRIPT, *flags], tmp_path, environment)
    assert outcome.returncode == 1 and "Traceback" not in outcome.stderr
    assert {None: "Invalid username", "token-bob": "rights", "nonsense": "Invalid user token"}[token] in outcome.stderr
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize("moment", ["PUT ", "/commit/"])
def test_a_server_that_goes_away_leaves_nothing_half_visible(hub, client, trained, moment):
    repo_id = f"alice/broken-{moment.strip(' /').replace('/', '-').lower()}"
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path.name != "README.md"}
    (hub.folder / "dies_at").write_text(moment)
    try:
        with pytest.raises(Exception, match="disconnected|reset|uploading"):
            publish(trained, repo_id)
    finally:
        hub.process.wait(timeout=60)
        (hub.folder / "dies_at").unlink()
        hub.start()
    assert client.list_repo_files(repo_id) == [".gitattributes"]
    assert all(path.read_bytes() == content for path, content in before.items())
    publish(trained, repo_id)
    assert set(client.list_repo_files(repo_id)) == PUSHED


def test_a_damaged_file_is_named(hub, client, trained, tmp_path):
    publish(trained, "alice/damaged")
    path = "scheduler/vsdm.drift/drift.safetensors"
    (info,) = client.get_paths_info("alice/damaged", path)
    stored = hub.folder / "large" / "alice/damaged" / info.lfs.sha256
    content = bytearray(stored.read_bytes())
    content[-9] ^= 1  # a last digit of lambda's neighbours, the length stays
    stored.write_bytes(bytes(content))
    code = "from diffusers_vsdm import VSDMPipeline; VSDMPipeline.from_pretrained('alice/damaged')"
    outcome = run_python(["-c", code], tmp_path, hub.environment(tmp_path / "home"))
    assert outcome.returncode and "drift_sha256 differs" in outcome.stderr


def test_trains_on_a_data_set_by_its_name(hub, tmp_path):
    """As image data sets are kept on the Hub, tables of pictures for each split; the same run as from the folder."""
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(2)})
    for split, seeds in {"train": range(9), "test": range(20, 23)}.items():
        rows = {"img": [picture(seed) for seed in seeds], "label": [seed % 2 for seed in seeds]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"rows/data/{split}-00000-of-00001.parquet")
    hub.api().create_repo("alice/pictures", repo_type="dataset", private=True)
    hub.api().upload_folder(repo_id="alice/pictures", repo_type="dataset", folder_path=tmp_path / "rows")

    settings = TINY_IMAGES | {"model": "tiny", "class_conditional": True}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags += ["--dataset_name=alice/pictures", "--output_dir=model"]
    outcome = run_python([SCRIPT, *flags], tmp_path, hub.environment(tmp_path / "home"))
    assert outcome.returncode == 0, outcome.stderr
    found = json.loads((tmp_path / "model" / "metrics.json").read_text())["metrics"]
    local = train(
        TrainingConfig(train_data_dir=str(tmp_path / "rows"), output_dir=str(tmp_path / "other"), **settings)
    )
    assert found["final_loss"] == pytest.approx(local.final_loss, rel=1e-4)

    # a private one is none for others
    code = "from diffusers_vsdm.data.images import load_images; load_images('alice/pictures')"
    outcome = run_python(["-c", code], tmp_path, hub.environment(tmp_path / "bob", "bob"))
    assert "'alice/pictures' could not be loaded" in outcome.stderr.splitlines()[-1]
