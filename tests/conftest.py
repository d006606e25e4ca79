"""What every test may ask for, and how the tests see the machine: one thread each, nothing told to anyone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Before torch and Ray are imported, and inherited by every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("RAY_ADDRESS", None)  # no test joins a cluster that it did not start
# Worker processes find the package, and programs that pip put beside Python, installed and activated or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A small Ray cluster on this machine, for this test run alone."""
    from mta_ray.cluster import ClusterConfig, connect

    with connect(ClusterConfig(cpus=2, object_store_mib=150)):
        yield


@pytest.fixture
def tiny_model():  # noqa: ANN201
    """A function (seed) -> a random two-layer Llama of width 64 with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mta_ray.model.backbone import Backbone, embedded_path, fingerprint

    def make(seed: int = 0) -> Backbone:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=30522,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=101,
            eos_token_id=102,
        )
        model = LlamaForCausalLM(config).eval()
        return Backbone(model, AutoTokenizer.from_pretrained(embedded_path()), "tiny", fingerprint(model))

    return make
