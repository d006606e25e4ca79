"""A sound bank has no problems; each kind of damage is named, all of it at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_banks import drawn_bank, saved

from mta_ray.lora.bank import Bank, save_bank
from mta_ray.lora.bank_check import problems_of


def of(bank: Bank, tmp_path, **facts) -> list[str]:  # noqa: ANN001
    save_bank(bank, tmp_path / "bank", settings={}, inputs={})
    return problems_of(tmp_path / "bank")


def test_a_sound_bank_has_none(tmp_path):
    assert of(drawn_bank(), tmp_path) == []
    assert of(drawn_bank((1,)), tmp_path) == []


def test_every_damaged_file_is_named(tmp_path):
    bank = tmp_path / "bank"
    saved(bank)
    file = bank / "factors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    (bank / "center.npy").unlink()
    problems = problems_of(bank)
    assert len(problems) == 2
    assert "center.npy" in problems[0] and "factors.safetensors: checksum" in problems[1]


def test_values_are_looked_at(tmp_path):
    bank = drawn_bank((1, 2, 3, 4))
    up = {m: t.clone() for m, t in bank.up.items()}
    up["layers.0.q"][1, 0, 0] = float("nan")
    for tensor in up.values():
        tensor[2] = 0
    embeddings = bank.embeddings.copy()
    embeddings[3] *= 1.1
    problems = of(replace(bank, up=up, embeddings=embeddings), tmp_path)
    assert problems == [
        "layers.0.q: values that are not finite, in anchor 1 (counted from 0)",
        "all-zero adapters, never trained: anchor 2 (counted from 0)",
        "embeddings that are not of length 1: anchor 3 (counted from 0)",
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"anchor_ids": ("a", "b", "b")}, "names 3 anchors, 2 of them different"),
        ({"center": np.full(5, np.inf, np.float32)}, "do not fit, or the centre is not finite"),
        ({"scale": 0.0}, "the scale is 0.0"),
        ({"facts": {"losses": [[1.0]], "task": "t"}}, "holds losses of 1 anchors, wanted 3"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, problem):
    problems = of(replace(drawn_bank(), **change), tmp_path)
    assert len(problems) == 1 and problem in problems[0]


def test_factors_that_lack_a_side_or_have_another_shape(tmp_path):
    bank = drawn_bank()
    down = dict(bank.down) | {"layers.1.q": torch.ones(3, 1, 6)}
    up = {"layers.0.q": bank.up["layers.0.q"], "layers.1.q": torch.ones(3, 10, 1)}
    problems = of(replace(bank, down=down, up=up), tmp_path)
    assert (
        len(problems) == 1 and "layers.1.q has factors (3, 1, 6) and (3, 10, 1), wanted (3, 2, fan_in)" in problems[0]
    )
