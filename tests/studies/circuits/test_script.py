"""The script of issue 19, as it is written there, and that of the page on circuits."""

import pytest

import headwise as hw


def test_the_script_runs_as_written():
    model, task = hw.load("words-2l"), hw.RepeatedTokens(n=32, length=25, seed=0)
    edges = hw.edge_scores(model, task, "logit_diff")
    fast = hw.edge_scores(model, task, "logit_diff", estimator="eap-ig", steps=5)
    circuit = hw.Circuit.top(edges.mean("example"), n=20)
    kept = hw.measure(model, task, circuit, "logit_diff")
    study = hw.CircuitStudy(task, "logit_diff").run(model)
    assert edges["score"].dims == fast["score"].dims == ("edge", "example")
    assert {"sender", "receiver"} <= {*edges.coords}
    assert len(circuit) == 20
    assert hw.from_json(hw.to_json(circuit)) == circuit == circuit | hw.Circuit()
    assert circuit & hw.Circuit() == circuit - circuit == hw.Circuit()
    empty = kept["baseline_logit_diff"].sel(run="corrupted").mean()
    whole = kept["baseline_logit_diff"].sel(run="clean").mean()
    shown = study["numbers"]["faithfulness"].sel(selection="abs", edges=20)
    assert float((kept["logit_diff"].mean() - empty) / (whole - empty)) == pytest.approx(float(shown), abs=1e-5)
    assert float(study["curve"]["cpr"]) == pytest.approx(0.926, abs=5e-4)
    assert float(study["curve"]["cmd"]) == pytest.approx(0.089, abs=5e-4)
    assert float(study["random"]["cpr"].sel(kind="any edges").mean()) == pytest.approx(0.251, abs=0.01)
    assert float(study["random"]["cmd"].sel(kind="any edges").mean()) == pytest.approx(0.748, abs=0.01)
    assert float(study["circuit"]["faithfulness"]) >= 0.9
    assert float(study["circuit"]["p"]) == pytest.approx(1 / 21)
