"""The difference of two banks, against dense matrices in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from small_banks import drawn_adapter, drawn_bank

from mta_ray.lora.adapter import Adapter, Factors
from mta_ray.lora.bank_diff import compare, different_settings, relative_change


def dense(adapter: Adapter) -> np.ndarray:
    """ΔW of all modules in one vector."""
    parts = [adapter.scale * f.up.numpy() @ f.down.numpy() for _, f in sorted(adapter.factors.items())]
    return np.concatenate([part.ravel() for part in parts]).astype(np.float64)


def test_the_change_is_the_norm_of_the_dense_difference():
    a, b = drawn_adapter(1, scale=2.0), drawn_adapter(2, rank=3, scale=0.5)
    wanted = np.linalg.norm(dense(b) - dense(a)) / np.linalg.norm(dense(a))
    assert relative_change(a, b) == pytest.approx(wanted, rel=1e-6)


def test_a_small_change_keeps_its_digits_and_none_is_zero():
    a = drawn_adapter(1)
    near = Adapter(
        factors={m: Factors(down=f.down.double(), up=f.up.double() * (1 + 1e-9)) for m, f in a.factors.items()},
        scale=2.0,
    )
    assert relative_change(a, near) == pytest.approx(1e-9, rel=1e-4)
    assert relative_change(a, a) == pytest.approx(0, abs=1e-14)
    # the same ΔW by other factors: no change
    turned = Adapter(factors={m: Factors(down=f.down * 4, up=f.up / 4) for m, f in a.factors.items()}, scale=2.0)
    assert relative_change(a, turned) == pytest.approx(0, abs=1e-7)


def test_a_module_that_one_lacks_is_zero_there_and_other_shapes_are_another_model():
    a = drawn_adapter(1)
    module = "layers.0.q"
    part = Adapter(factors={module: a.factors[module]}, scale=a.scale)
    other = np.linalg.norm(dense(Adapter(factors={"layers.1.q": a.factors["layers.1.q"]}, scale=a.scale)))
    assert relative_change(a, part) == pytest.approx(other / np.linalg.norm(dense(a)), rel=1e-6)
    wide = Adapter(factors={module: Factors(down=a.factors[module].down[:, :3], up=a.factors[module].up)}, scale=1.0)
    assert relative_change(part, wide) is None


def test_anchors_are_matched_by_id_wherever_they_stand():
    a, b = drawn_bank((1, 2, 3)), drawn_bank((3, 5, 1), ids=("user-3", "user-5", "user-1"))
    diff = compare(a, b)
    assert (diff.added, diff.removed, set(diff.moved)) == (("user-5",), ("user-2",), {"user-1", "user-3"})
    assert diff.moved["user-1"] == pytest.approx(0, abs=1e-7)
    assert diff.is_same_base and diff.is_same_encoder and diff.ranks == (2, 2)
    other = compare(a, replace(b, base_fingerprint="g", encoder="h"))
    assert not other.is_same_base and not other.is_same_encoder


def test_settings_differ_by_dotted_name():
    a = {"train": {"rank": 8, "steps": 40}, "anchors": 14, "old": True}
    b = {"train": {"rank": 8, "steps": 50}, "anchors": 14, "new": None}
    assert different_settings(a, b) == {"train.steps": (40, 50), "old": (True, None)}
