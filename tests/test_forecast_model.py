"""The network of a forecaster: units, encoders, denoisers."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from diffusers_vsdm.models.denoisers import DENOISERS, DenoiserSizes
from diffusers_vsdm.models.encoders import ENCODERS
from diffusers_vsdm.models.series_units import LEAST_SCALE, MOST_UNITS, SCALINGS

from .forecasting import AHEAD, CONTEXT, generator, model, randomized, series


pytestmark = pytest.mark.filterwarnings("error::FutureWarning")


# units --------------------------------------------------------------------------------------------------------------


def window(forecaster, seed=0, batch=3, d=2):
    rows = forecaster.history_length + AHEAD
    values = torch.stack([torch.from_numpy(series(rows, d, seed + i)) for i in range(batch)])
    return values, torch.rand(batch, rows, 2, generator=generator(seed)) - 0.5


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(SCALINGS),
    st.sampled_from([0, 1, 3]),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(0, 1000),
)
@example("standard", 0, [1], 362)  # jumps after a quiet past
def test_units_are_undone_by_location_and_scale(scaling, differencing, lags, seed):
    forecaster = model(scaling=scaling, differencing=differencing, lags=lags)
    values, calendar = window(forecaster, seed)
    values = values / 3  # mostly within the bound where the scale is 1
    _, z = forecaster.units.windows(values, calendar)
    units = forecaster.units.scale(values)
    again = forecaster.units.locations(values, units) + units.scale * z
    known, inside = values[:, forecaster.units.reach :], z.abs() < MOST_UNITS
    assert z.abs().max() <= MOST_UNITS and inside.float().mean() > 0.5
    assert forecaster.units.reach == max(*lags, differencing) and z.shape == (3, CONTEXT + AHEAD, 2)
    torch.testing.assert_close(again[inside], known[inside], rtol=1e-5, atol=1e-4)
    assert ((known - again) * z >= 0)[~inside].all()  # the truth lies beyond the bound


@pytest.mark.parametrize("differencing", [0, 2])
def test_scales_are_what_they_are_called(differencing):
    history = model(differencing=differencing).history_length
    values = torch.from_numpy(series(history + AHEAD))[None]
    past = values[0, :history].numpy()
    past = past[differencing:] - past[:-differencing] if differencing else past
    found = {name: model(scaling=name, differencing=differencing).units.scale(values) for name in SCALINGS}
    np.testing.assert_allclose(found["mean"].scale[0, 0], np.abs(past).mean(0))
    np.testing.assert_allclose(found["standard"].scale[0, 0], past.std(0))
    np.testing.assert_allclose(found["standard"].location[0, 0], 0 if differencing else past.mean(0))
    assert (found["none"].scale == 1).all() and (found["none"].location == 0).all()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("differencing", [0, 1, 3])
def test_nothing_of_the_future_is_read(scaling, differencing):
    """But for the scale, which is of the history: so what changes comes after it, or the scale is taken as it was."""
    forecaster = model(scaling=scaling, differencing=differencing, missing_indicators=True, lags=[1, 3])
    values, calendar = window(forecaster)
    units = forecaster.units.scale(values)
    inputs, z = forecaster.units.windows(values, calendar)
    for time in (forecaster.units.reach + 2, forecaster.history_length + 1):
        other = values.clone()
        other[:, time:] = 3 * torch.randn_like(other[:, time:]) + 7
        other[:, time + 1] = torch.nan
        seen = forecaster.units.inputs(
            other, calendar[:, forecaster.units.reach :], units, forecaster.units.locations(other, units)
        )
        upto = time - forecaster.units.reach
        assert torch.equal(seen[:, : upto + 1], inputs[:, : upto + 1])
        assert not torch.equal(seen[:, upto + 1], inputs[:, upto + 1])
    other_inputs, other_z = forecaster.units.windows(other, calendar)  # all of its changes are after the history
    assert torch.equal(other_inputs[:, : upto + 1], inputs[:, : upto + 1])
    assert torch.equal(other_z[:, :upto], z[:, :upto]) and not torch.equal(other_z[:, upto], z[:, upto])


def test_inputs_are_lags_indicators_size_and_calendar():
    forecaster = model(missing_indicators=True, lags=[3, 1], scaling="mean")
    forecaster.typical_scale.copy_(torch.tensor([2.0, 5.0]))
    values, calendar = window(forecaster)
    values[0, 5, 1] = torch.nan
    inputs, z = forecaster.units.windows(values, calendar)
    scale = forecaster.units.scale(values).scale
    parts = inputs.split([4, 4, 2, 2], dim=2)
    for time in range(forecaster.units.reach, values.shape[1]):
        i = time - forecaster.units.reach
        lagged = torch.cat([values[:, time - 1], values[:, time - 3]], dim=1) / scale[:, 0].repeat(1, 2)
        torch.testing.assert_close(parts[0][:, i], lagged.nan_to_num().float())
        assert torch.equal(parts[1][:, i], lagged.isnan().float())
        torch.testing.assert_close(parts[2][:, i], (scale[:, 0] / torch.tensor([2.0, 5.0])).log().float())
        assert torch.equal(parts[3][:, i], calendar[:, time])
        assert torch.equal(z[:, i].isnan(), values[:, time].isnan())
    assert parts[1].sum() == 2  # read once by each lag


def test_a_difference_to_a_missing_value_is_missing():
    forecaster = model(differencing=2, missing_indicators=True)
    values, calendar = window(forecaster)
    values[1, 5, 0] = torch.nan
    inputs, z = forecaster.units.windows(values, calendar)
    assert z.isnan().nonzero().tolist() == [[1, 5 - 2, 0], [1, 7 - 2, 0]]
    assert inputs.isfinite().all()
    indicators = inputs[1, :, 4:8].unflatten(1, (2, 2))[..., 0]  # (time, lag, the first series)
    expected = torch.zeros_like(indicators)
    expected[[4, 5], [0, 1]] = 1  # as the value 1 and 2 times before
    expected[5] = 1  # and as what the difference is to: of lag 2 these are one
    assert torch.equal(indicators, expected)


@pytest.mark.parametrize("differencing", [0, 1])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("level", [0.0, 3.0, torch.nan])
def test_a_window_that_rests_has_a_scale(scaling, differencing, level):
    forecaster = model(scaling=scaling, differencing=differencing)
    forecaster.typical_scale.copy_(torch.tensor([2.0, 40.0]))
    values = torch.full((1, forecaster.history_length, 2), level, dtype=torch.float64)
    scale = forecaster.units.scale(values).scale[0, 0]
    if scaling == "none":
        expected = torch.ones(2)
    elif level != level:
        expected = forecaster.typical_scale
    elif scaling == "mean" and not differencing:
        expected = torch.maximum(LEAST_SCALE * forecaster.typical_scale, torch.tensor(level))
    else:
        expected = LEAST_SCALE * forecaster.typical_scale
    torch.testing.assert_close(scale.float(), expected)


def test_jumps_count_as_ten_units():
    forecaster = model(scaling="none")
    values, calendar = torch.zeros(1, forecaster.history_length + AHEAD, 2), torch.zeros(1, 12, 2)
    values[0, 7] = torch.tensor([1e4, -1e4])
    inputs, z = forecaster.units.windows(values, calendar)
    assert z[0, 5].tolist() == [10, -10] and inputs[0, 6, :2].tolist() == [10, -10]


def test_bad_settings_of_a_model():
    for name, value in [("num_series", 0), ("prediction_length", 0), ("context_length", -1)]:
        with pytest.raises(ValueError, match=f"`{name}`"):
            model(**({"d": value} if name == "num_series" else {name: value}))
    for wrong in ({"lags": []}, {"lags": [0, 1]}, {"differencing": -1}):
        with pytest.raises(ValueError, match="`lags`.*`differencing`"):
            model(**wrong)
    for name in ("scaling", "encoder_type", "denoiser_type"):
        with pytest.raises(ValueError, match=f"`{name}`.*'what'"):
            model(**{name: "what"})
    forecaster = model()
    with pytest.raises(ValueError, match="`condition`.*`inputs`"):
        forecaster(torch.zeros(1, 2), 3)
    with pytest.raises(ValueError, match=r"`sample`.*\(3, 2\)"):
        forecaster(torch.zeros(2, 2), 3, condition=torch.zeros(3, 12))


# networks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoding_goes_on_from_a_state(kind):
    forecaster = randomized(model(encoder_type=kind))
    inputs = torch.randn(3, CONTEXT + AHEAD, 8, generator=generator())
    with torch.no_grad():
        whole, _ = forecaster.encode(inputs)
        found, state = forecaster.encode(inputs[:, :CONTEXT])
        parts = [found]
        for i in range(CONTEXT, CONTEXT + AHEAD):
            found, state = forecaster.encode(inputs[:, i : i + 1], state)
            parts.append(found)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert whole.shape == (3, CONTEXT + AHEAD, 8 + 4) and torch.equal(whole[..., 8:], inputs[..., :4])
    assert whole[:, 1:, :8].sub(whole[:, :-1, :8]).abs().amax((0, 2)).min() > 1e-3  # it knows where it is


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_does_not_look_ahead(kind):
    forecaster = randomized(model(encoder_type=kind))
    inputs = torch.randn(2, 8, 8, generator=generator()).requires_grad_()
    (gradient,) = torch.autograd.grad(forecaster.encode(inputs)[0][:, 4].sum(), inputs)
    assert (gradient[:, 5:] == 0).all() and (gradient[:, :5].abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_repeated_state_is_each_window_several_times_in_a_row(kind):
    forecaster = randomized(model(encoder_type=kind))
    first, then = torch.randn(2, 5, 8, generator=generator()), torch.randn(6, 1, 8, generator=generator(1))
    with torch.no_grad():
        state = forecaster.encoder.repeat(forecaster.encode(first)[1], 3)
        found = forecaster.encode(then, state)[0]
        for row in range(6):
            _, alone = forecaster.encode(first[row // 3 : row // 3 + 1])
            expected = forecaster.encode(then[row : row + 1], alone)[0]
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", DENOISERS)
@pytest.mark.parametrize("d", [1, 2, 3, 8])
def test_denoisers_of_few_and_more_series(kind, d):
    network = randomized(DENOISERS[kind](DenoiserSizes(d, 6, 3, 20, 4, 8, 8))).eval()
    x, hidden, known = (torch.randn(5, *shape, generator=generator(i)) for i, shape in enumerate([(d,), (6,), (3, d)]))
    k = torch.tensor([0, 3, 7, 12, 19])
    with torch.no_grad():
        output = network(x, k, hidden, known)
        assert output.shape == (5, d) and output.isfinite().all()
        order = torch.tensor([3, 0, 4, 1, 2])
        permuted = network(x[order], k[order], hidden[order], known[order])
        torch.testing.assert_close(permuted, output[order], rtol=1e-4, atol=1e-5)
        for at in (7, torch.tensor(7), torch.full((5,), 7)):
            torch.testing.assert_close(network(x, at, hidden, known)[2], output[2], rtol=1e-4, atol=1e-5)
        for changed in ((x + 1, k, hidden, known), (x, k, hidden + 1, known), (x, k, hidden, known + 1)):
            assert (network(*changed) - output).abs().amax(1).min() > 0
        assert (network(x, k.flip(0), hidden, known) - output).abs()[[0, 1, 3, 4]].amax(1).min() > 0


@pytest.mark.parametrize("kind", DENOISERS)
def test_each_series_knows_all_others_in_a_ring_of_eight(kind):
    """With as many layers as by default."""
    network = randomized(DENOISERS[kind](DenoiserSizes(8, 6, 1, 20, 8, 8, 8))).eval()
    x = torch.randn(1, 8, generator=generator()).requires_grad_()
    hidden, known = torch.zeros(1, 6), torch.zeros(1, 1, 8)
    jacobian = torch.autograd.functional.jacobian(lambda x: network(x, 3, hidden, known)[0], x)[:, 0]
    assert (jacobian.abs() > 0).all()
