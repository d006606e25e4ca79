"""Fitting a step's line, and the file of service times."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from mta_ray.population.capacity.service_times import (
    ProcessTime,
    ServiceTimes,
    StepSample,
    StepTime,
    fit_step,
    read_times,
    write_times,
)

TRUE = StepTime(fixed_ms=4.0, row_ms=0.3, prompt_ms=0.8, prompt_token_ms=0.05)


def samples(noise: float) -> list[StepSample]:
    rng = np.random.default_rng(0)
    mixtures = [(rows, prompts, prompts * each) for rows in (0, 1, 4, 16) for prompts in (0, 1, 3) for each in (8, 64)]
    return [
        StepSample(rows=r, prompts=p, prompt_tokens=t, ms=TRUE.of(r, p, t) * float(np.exp(rng.normal(0, noise))))
        for r, p, t in mixtures
        if r or p
    ]


def test_the_line_is_found_again() -> None:
    fit = fit_step(samples(0.0), python_share=0.5)
    found = (fit.step.fixed_ms, fit.step.row_ms, fit.step.prompt_ms, fit.step.prompt_token_ms)
    assert found == pytest.approx((4.0, 0.3, 0.8, 0.05))
    assert fit.step.python_share == 0.5 and fit.r2 == pytest.approx(1.0) and fit.error_p95 < 1e-6


def test_noise_is_told() -> None:
    fit = fit_step(samples(0.1))
    assert fit.step.fixed_ms == pytest.approx(4.0, rel=0.15)
    assert 0.02 < fit.error_p50 < 0.15


def test_too_few_or_impossible_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        fit_step(samples(0.0)[:5])
    with pytest.raises(ValueError, match="no time"):
        fit_step([*samples(0.0), StepSample(rows=1, prompts=0, prompt_tokens=0, ms=0.0)])


def test_a_file_gives_the_same_times_back(tmp_path: Path) -> None:
    ingress = ProcessTime(request_ms=2.0, token_ms=0.25)
    times = ServiceTimes(step=TRUE, ingress=ingress, away_ms=1.0, longer=((2.0, 1.1), (8.0, 1.4)), source="here")
    write_times(tmp_path / "times.json", times, {"note": "not read"})
    assert read_times(tmp_path / "times.json") == times


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "holds no service times"),
        ("[]", "holds no service times"),
        ('{"step": {}}', "holds no service times"),
        (json.dumps({"times": {"step": {"fixed": 1.0}}}), "fixed"),
        (json.dumps({"times": {"away_ms": -1.0}}), "away_ms"),
        (json.dumps({"times": {"longer": [[4, 1.1], [2, 1.2]]}}), "longer"),
        (json.dumps({"times": {"longer": [[1, 1.1]]}}), "longer"),
        (json.dumps({"times": {"longer": [[2, 0.0]]}}), "longer"),
        (json.dumps({"times": {"longer": [2, 1.1]}}), "longer"),
        (json.dumps({"times": {}}), "lacks step.fixed_ms, step.row_ms, step.prompt_ms, step.prompt_token_ms, source"),
        (json.dumps({"times": {"step": {"fixed_ms": 3.0}, "source": "here"}}), "lacks step.row_ms"),
        (json.dumps({"times": {"step": asdict(TRUE)}}), "lacks source"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "times.json").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        read_times(tmp_path / "times.json")


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no service times at"):
        read_times(tmp_path / "times.json")
