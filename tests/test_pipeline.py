import json
import warnings

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel

import diffusers_vsdm
from diffusers_vsdm import AdaptiveDiagonalDrift, BridgePipeline, DataNormalizer, MLPModel, VSDMPipeline, VSDMScheduler


def randomize(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def vectors(solver="heun", normalizer=True, **settings):
    scheduler = VSDMScheduler.from_power_law(clip_sample=False, solver=solver, prior_type="marginal", **settings)
    drift = AdaptiveDiagonalDrift((2,))
    drift.set_lambda(torch.tensor([0.7, 1 / 3], dtype=torch.float64))
    drift.fit_moments(torch.randn(100, 2))
    scheduler.set_drift(drift)
    data = torch.randn(100, 2) * torch.tensor([3.0, 20.0]) + 5
    pipeline = VSDMPipeline(
        randomize(MLPModel(2, 100, 16, 2)), scheduler, DataNormalizer.from_data(data) if normalizer else None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images(channels=3, **settings):
    unet = randomize(
        UNet2DModel(
            sample_size=8,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            layers_per_block=1,
        )
    )
    pipeline = VSDMPipeline(unet, VSDMScheduler(**settings))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def samples(pipeline, drawn=None):
    return pipeline(3, drawn or generator(), num_inference_steps=5, output_type="np").samples


def test_batches_with_more_samples_than_times_are_no_other():
    """The network embeds each of its times once; those that are no integers one by one."""
    network, sample = randomize(MLPModel(2, 10, 16, 2)), torch.randn(40, 2)
    timesteps, results = torch.randint(10, (40,)), []
    for times in (timesteps, timesteps[:, None], timesteps.float()):
        network.zero_grad()
        output = network(sample, times).sample
        output.square().sum().backward()
        results.append((output, *(parameter.grad for parameter in network.parameters())))
    for once, column, one_by_one in zip(*results, strict=True):
        torch.testing.assert_close(once, one_by_one)
        assert torch.equal(once, column)


@pytest.mark.parametrize("solver", ["ddpm", "heun"])
@pytest.mark.parametrize("loader", [VSDMPipeline, DiffusionPipeline])
@pytest.mark.parametrize("batch_size", [5, 300])
def test_samples_are_bit_identical_after_loading(tmp_path, solver, loader, batch_size):
    pipeline = vectors(solver)
    before = pipeline(batch_size, generator(), num_inference_steps=10).samples
    pipeline.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is VSDMPipeline
    assert np.array_equal(loaded(batch_size, generator(), num_inference_steps=10).samples, before)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_vsdm", "VSDMScheduler"]
    assert index["unet"] == ["diffusers_vsdm", "MLPModel"]


def test_images_load_without_a_normalizer(tmp_path):
    pipeline = images()
    before = pipeline(2, generator(), num_inference_steps=4, output_type="pt").images
    pipeline.save_pretrained(tmp_path)
    loaded = VSDMPipeline.from_pretrained(tmp_path)
    assert loaded.normalizer is None
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(loaded(2, generator(), num_inference_steps=4, output_type="pt").images, before)


def test_gives_the_images_of_the_ddpm_pipeline():
    ours = images(clip_sample=True)
    stock = DDPMPipeline(ours.unet, DDPMScheduler())
    stock.set_progress_bar_config(disable=True)
    expected = stock(2, generator(2), num_inference_steps=6, output_type="np").images
    actual = ours(2, generator(2), num_inference_steps=6, output_type="np").images
    assert np.abs(expected - actual).max() < 2e-5


def test_progress_of_a_run():
    pipeline = vectors()
    seen = []

    def callback(pipe, index, timestep, tensors):
        assert pipe is pipeline
        seen.append((index, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0} if index == 6 else {}

    output = pipeline(3, generator(), num_inference_steps=4, callback_on_step_end=callback)
    assert [k for _, k, _ in seen] == [99, 74, 74, 49, 49, 24, 24] and len(seen) == 2 * 4 - 1
    np.testing.assert_allclose(output.samples, pipeline.normalizer.mean.expand(3, 2))


def test_trajectory_runs_from_the_prior_to_the_samples_by_whole_steps():
    pipeline = vectors()
    output = pipeline(3, generator(), num_inference_steps=4, return_trajectory=True)
    assert output.trajectory.shape == (5, 3, 2)
    np.testing.assert_array_equal(output.trajectory[-1], output.samples)
    pipeline.scheduler.set_timesteps(4)
    prior = pipeline.scheduler.sample_prior((3, 2), generator())
    torch.testing.assert_close(output.trajectory[0], pipeline.normalizer.denormalize(prior))
    samples, trajectory = pipeline(3, generator(), num_inference_steps=4, return_trajectory=True, return_dict=False)
    assert np.array_equal(samples, output.samples) and torch.equal(trajectory, output.trajectory)


def test_latents_and_timesteps():
    pipeline = vectors("ddim")
    pipeline.scheduler.set_timesteps(timesteps=[80, 30, 5])
    latents = pipeline.scheduler.sample_prior((3, 2), generator())
    given = pipeline(3, timesteps=[80, 30, 5], latents=latents).samples
    assert np.array_equal(given, pipeline(3, generator(), timesteps=[80, 30, 5]).samples)


def test_a_list_of_generators_makes_samples_independent_of_the_batch():
    pipeline = vectors("ddpm")
    whole = pipeline(4, [generator(i) for i in range(4)], num_inference_steps=5).samples
    parts = [pipeline(2, [generator(i), generator(i + 1)], num_inference_steps=5).samples for i in (0, 2)]
    np.testing.assert_allclose(whole, np.concatenate(parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_image_outputs(channels):
    pipeline = images(channels)
    pil = pipeline(2, generator(), num_inference_steps=2)
    assert pil.images is pil.samples and isinstance(pil.images[0], PIL.Image.Image) and pil.images[0].size == (8, 8)
    array = pipeline(2, generator(), num_inference_steps=2, output_type="np").images
    tensor = pipeline(2, generator(), num_inference_steps=2, output_type="pt").images
    assert array.shape == (2, 8, 8, channels) and tensor.shape == (2, channels, 8, 8)
    assert np.array_equal(np.moveaxis(array, -1, 1), tensor) and 0 <= array.min() and array.max() <= 1
    assert pil.images[0].mode == ("L" if channels == 1 else "RGB")


def test_channels_that_are_no_colours_come_as_arrays():
    pipeline = images(2)
    assert pipeline(1, num_inference_steps=2).samples.shape == (1, 8, 8, 2)
    with pytest.raises(ValueError, match="pil"):
        pipeline(1, num_inference_steps=2, output_type="pil")


def test_latent_output_is_the_last_sample_as_it_is():
    pipeline, seen = vectors(), []

    def note(pipe, index, timestep, tensors):
        seen.append((pipe.num_timesteps, tensors["latents"]))

    settings = {"num_inference_steps": 5, "callback_on_step_end": note}
    latents = pipeline(6, generator(), output_type="latent", **settings).samples
    assert len(seen) == seen[0][0] == 9 and torch.equal(seen[-1][1], latents)
    samples = pipeline(6, generator(), output_type="pt", **settings).samples
    torch.testing.assert_close(pipeline.normalizer.normalize(samples), latents)


def test_default_number_of_steps_fits_the_table():
    pipeline = vectors("ddim", num_train_timesteps=20)
    assert pipeline(1).samples.shape == (1, 2) and len(pipeline.scheduler.timesteps) == 20
    pipeline = vectors("ddim")
    pipeline(1)
    assert len(pipeline.scheduler.timesteps) == 50


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"output_type": "pil"}, "pil"),
        ({"output_type": "jpg"}, "output_type"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 3, "generator": [torch.Generator()]}, "generator"),
        ({"latents": torch.zeros(1, 3)}, "latents"),
        ({"num_inference_steps": 101}, "between 1 and 100"),
        ({"num_inference_steps": 0}, "between 1 and 100"),
        ({"num_inference_steps": 3, "timesteps": [3]}, "at most one"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "prompt"),
    ],
)
def test_bad_arguments_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        vectors()(**arguments)


def test_a_stock_scheduler_serves_a_neutral_process_and_no_other():
    pipeline = vectors("ddim")
    with pytest.raises(ValueError, match="belongs to a drift"):
        VSDMPipeline(pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config))
    pipeline.scheduler.set_drift(None)
    stock = VSDMPipeline(pipeline.unet, DDIMScheduler.from_config(pipeline.scheduler.config))
    stock.set_progress_bar_config(disable=True)
    assert stock(2, generator(), num_inference_steps=3).samples.shape == (2, 2)


def test_works_in_inference_mode(tmp_path):
    pipeline = vectors()
    pipeline.save_pretrained(tmp_path)
    expected = pipeline(3, generator(), num_inference_steps=4).samples
    with torch.inference_mode():
        loaded = _quiet(VSDMPipeline.from_pretrained(tmp_path))
        assert np.array_equal(loaded(3, generator(), num_inference_steps=4).samples, expected)
        loaded.scheduler.drift.set_lambda(3.0)
        assert not np.array_equal(loaded(3, generator(), num_inference_steps=4).samples, expected)


def _quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_given_latents_are_no_reason_to_warn():
    pipeline = vectors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline(2, latents=torch.randn(2, 2), num_inference_steps=2)


def test_a_network_of_any_size_takes_its_shape_from_the_drift():
    pipeline = images()
    pipeline.unet.register_to_config(sample_size=None)
    with pytest.raises(ValueError, match="sample_size"):
        pipeline(1, num_inference_steps=1)
    pipeline.scheduler.set_drift(AdaptiveDiagonalDrift((3, 16, 16)))
    assert pipeline(1, num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_drift_and_normalizer_exact(tmp_path, dtype):
    pipeline = vectors()
    pipeline.save_pretrained(tmp_path)
    exact = pipeline.scheduler.drift.lam, pipeline.normalizer.mean.clone(), pipeline.normalizer.std.clone()
    for half in (VSDMPipeline.from_pretrained(tmp_path, dtype=dtype), pipeline.to(dtype)):
        half.set_progress_bar_config(disable=True)
        assert half.unet.dtype == dtype
        assert torch.equal(half.scheduler.drift.lam, exact[0]) and half.scheduler.drift.lam.dtype == torch.float64
        assert torch.equal(half.normalizer.mean, exact[1]) and torch.equal(half.normalizer.std, exact[2])
        assert np.isfinite(half(4, generator(), num_inference_steps=5).samples).all()


def test_offload_hooks_change_nothing():
    """The hooks themselves; the accelerator that they offload from is the CPU here."""
    pipeline = vectors()
    before, lam = pipeline(20, generator(), num_inference_steps=5).samples, pipeline.scheduler.drift.lam.clone()
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the hooks are set anew after a call
        assert np.array_equal(pipeline(20, generator(), num_inference_steps=5).samples, before)
    assert torch.equal(pipeline.scheduler.drift.lam, lam) and lam.dtype == torch.float64


def test_components_are_known_to_diffusers():
    from diffusers.pipelines import pipeline_loading_utils as tables

    for name in tables.LOADABLE_CLASSES["diffusers_vsdm"]:
        assert hasattr(diffusers_vsdm, name) and name in tables.ALL_IMPORTABLE_CLASSES


def test_a_moved_table_is_reported(monkeypatch):
    from diffusers.pipelines import pipeline_loading_utils as tables

    from diffusers_vsdm.hub import registration

    monkeypatch.delattr(tables, "LOADABLE_CLASSES")
    with pytest.raises(ImportError, match="moved the tables"):
        registration.register(diffusers_vsdm, ("VSDMScheduler",), ())


def test_a_scheduler_that_does_not_fit_is_refused_when_it_is_assigned():
    pipeline = vectors()
    kept = pipeline.scheduler
    with pytest.raises(ValueError, match="DDIMScheduler.*drift"):
        pipeline.scheduler = DDIMScheduler.from_config(kept.config)
    assert pipeline.scheduler is kept
    plain = images()
    plain.scheduler = DDIMScheduler()  # which fits a process without a drift
    assert plain(1, num_inference_steps=2).images
    bridge = BridgePipeline(pipeline.unet, kept, pipeline.normalizer)
    with pytest.raises(ValueError, match="must be a VSDMScheduler"):
        bridge.scheduler = DDIMScheduler()


def test_arrays_will_do_for_tensors():
    pipeline = vectors()
    drawn = pipeline(3, generator(), num_inference_steps=5).samples
    assert isinstance(drawn, np.ndarray)
    for measure in (lambda x: pipeline.log_likelihood(x).value, lambda x: pipeline.likelihood_bound(x, 2).total):
        assert measure(drawn).shape == (3,)
    torch.testing.assert_close(
        pipeline.log_likelihood(drawn).value, pipeline.log_likelihood(torch.from_numpy(drawn)).value
    )
    noise = pipeline.scheduler.sample_prior((3, 2), generator())
    settings = {"num_inference_steps": 5}
    same = (pipeline(3, latents=latents, **settings).samples for latents in (noise, noise.numpy()))
    np.testing.assert_array_equal(*same)
    bridge = BridgePipeline(pipeline.unet, pipeline.scheduler, pipeline.normalizer)
    assert bridge.encode(drawn)[0].shape == (3, 2)


def test_inference_mode_leaves_nothing_that_training_cannot_use():
    pipeline = vectors()
    x = torch.randn(4, 2, generator=generator())
    with torch.inference_mode():
        pipeline(2, num_inference_steps=3)
        inside = pipeline.log_likelihood(x.clone()).value
        pipeline.scheduler.get_score(x, torch.tensor([3, 5, 7, 9]), x)
    torch.testing.assert_close(inside, pipeline.log_likelihood(x).value)
    k = torch.tensor([3, 5, 7, 9])
    noisy = pipeline.scheduler.add_noise(x, torch.randn_like(x), k)
    pipeline.scheduler.get_score(pipeline.unet(noisy, k).sample, k, noisy).square().sum().backward()
    assert all(p.grad is not None for p in pipeline.unet.parameters())
