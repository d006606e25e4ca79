"""`mta bank ...` from the door, on folders and on a real S3 server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mta_ray.artifacts import open_artifact, publish
from mta_ray.benchmarks.marked_users import make_bank, make_base, random_adapter, tiny_llama
from mta_ray.cli import BAD_INPUT, OK, main
from mta_ray.lora.adapter import Adapter, from_bytes, load_peft, to_bytes
from mta_ray.lora.bank import load_bank
from mta_ray.lora.bank_store import version_of
from mta_ray.model.backbone import load_backbone
from mta_ray.object_store import open_store
from mta_ray.pipeline.adapt_users import KIND
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import DatabaseConfig, open_database
from mta_ray.serving.identity import UserId
from mta_ray.serving.served_bank import describe
from mta_ray.serving.user_state import ItemSum, UserStack
from mta_ray.serving.user_store import UserStore

ROOT = Path(__file__).resolve().parents[2]
NAME = "ann/../..\t"  # a user's id is data: it is in no path


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its base artifact and two banks of six anchors."""
    home = tmp_path_factory.mktemp("banks")
    make_base(home / "base", tiny_llama(home / "model"))
    make_bank(home / "one", str(home / "model"), seed=1)
    make_bank(home / "two", str(home / "model"), seed=2, anchors=("anna", "bert", "cleo"))
    return home


def run(capsys: pytest.CaptureFixture[str], *args: str | Path, code: int = OK) -> str:
    """What the command prints: its answer, or where it fails its message."""
    assert main(["bank", *map(str, args)]) == code
    told = capsys.readouterr()
    return told.out if code == OK else told.err


def own_adapter(home: Path, seed: int) -> Adapter:
    """A user's own, as it is kept: rounded."""
    drawn = random_adapter(load_backbone(str(home / "model")), rank=1, generator=torch.Generator().manual_seed(seed))
    return from_bytes(to_bytes(drawn), drawn.scale)


def routed_sum(home: Path, slots: list[int], weights: list[float], own: Adapter | None) -> dict[str, torch.Tensor]:
    """Σ w ΔW of the anchors and the stack's ΔW on top, dense, module by module."""
    bank = load_bank(home / "one")
    total = {}
    for module in bank.up:
        parts = [
            w * bank.scale * bank.up[module][s] @ bank.down[module][s] for s, w in zip(slots, weights, strict=True)
        ]
        total[module] = sum(parts) + (own.delta(module) if own else 0)
    return total


def assert_exported(folder: Path, rank: int, wanted: dict[str, torch.Tensor]) -> None:
    adapter = load_peft(folder)
    assert adapter.rank == rank and adapter.scale == 1.0
    for module, delta in wanted.items():
        torch.testing.assert_close(adapter.delta(module), delta, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_a_bank_goes_into_a_store_is_looked_at_and_leaves(home, tmp_path, capsys, request, where):
    store = str(tmp_path / "store") if where == "folder" else f"{request.getfixturevalue('s3')}/store"
    one, two = (version_of(open_artifact(home / name, kind="bank").hash) for name in ("one", "two"))
    assert "holds no bank" in run(capsys, "list", "--store", store)

    # 1. in
    assert run(capsys, "import", "--bank", home / "one", "--store", store) == f"{store}/{one}\n"
    assert "there already" in run(capsys, "import", "--bank", home / "one", "--store", store)
    run(capsys, "import", "--bank", home / "two", "--store", store)

    # 2. looked at
    listed = json.loads(run(capsys, "list", "--store", store, "--json"))
    assert {one["version"]: one["anchors"] for one in listed} == {one: 6, two: 3}
    told = run(capsys, "list", "--store", store).splitlines()
    assert len(told) == 3 and told[0].split() == ["version", "created", "anchors", "rank", "base", "MiB", "task"]
    shown = run(capsys, "show", "--store", store, "--version", one[:6])
    assert "anna" in shown and "setting seed" in shown
    facts = json.loads(run(capsys, "show", "--bank", f"{store}/{one}", "--json"))
    assert facts["settings"] == {"seed": 1} and [a["user_id"] for a in facts["anchors_by_slot"]][:2] == ["anna", "bert"]
    assert "is whole" in run(capsys, "verify", "--store", store, "--version", one)

    # 3. compared
    diff = json.loads(run(capsys, "diff", "--a", one, "--b", two, "--store", store, "--json"))
    assert diff["removed"] == ["dora", "emil", "faye"] and diff["added"] == [] and diff["is_same_base"]
    assert diff["settings"] == {"seed": [1, 2]}
    a, b = (load_bank(home / name).adapter(0) for name in ("one", "two"))
    moved = np.concatenate([(b.delta(m) - a.delta(m)).numpy().ravel() for m in sorted(a.factors)])
    before = np.concatenate([a.delta(m).numpy().ravel() for m in sorted(a.factors)])
    assert diff["moved"]["anna"] == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(before), rel=1e-5)
    assert "3 kept, 3 removed, 0 added" in run(capsys, "diff", "--a", f"{store}/{one}", "--b", home / "two")

    # 4. out
    newest = listed[0]["version"]
    other = ({one, two} - {newest}).pop()
    assert f"{other}" in run(capsys, "prune", "--store", store, "--keep", "1", "--dry-run")
    assert len(json.loads(run(capsys, "list", "--store", store, "--json"))) == 2
    assert json.loads(run(capsys, "prune", "--store", store, "--keep", "1", "--json"))["removed"] == [other]
    assert [one["version"] for one in json.loads(run(capsys, "list", "--store", store, "--json"))] == [newest]


def test_damage_is_told_whole_with_code_2(home, s3, capsys):
    place = run(capsys, "import", "--bank", home / "one", "--store", f"{s3}/store").strip()
    run(capsys, "verify", "--bank", place)
    store, digest = open_store(place), open_artifact(home / "one", kind="bank").hash
    content = store.read(f"{digest}/factors.safetensors")
    store.write(f"{digest}/factors.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    store.remove(f"{digest}/center.npy")
    told = run(capsys, "verify", "--bank", place, code=BAD_INPUT)
    assert told.startswith(f"mta bank verify: {place}: 2 things are wrong")
    assert f"{place}/{digest} lacks center.npy" in told and "factors.safetensors: checksum" in told
    assert "is damaged and was not taken" in run(
        capsys, "import", "--bank", place, "--store", f"{s3}/b", code=BAD_INPUT
    )


def test_a_killed_import_leaves_no_version_and_the_next_one_completes(home, s3, s3_server, capsys):
    command = [sys.executable, "-m", "mta_ray.cli", "bank", "import", "--bank", str(home / "one"), "--store", s3]
    with subprocess.Popen(command, cwd=ROOT) as process:
        s3_server.watch(lambda n: os.kill(process.pid, signal.SIGKILL) if n == 3 else None)
        assert process.wait(timeout=600) == -signal.SIGKILL
    s3_server.watch(None)
    assert open_store(s3).names() and json.loads(run(capsys, "list", "--store", s3, "--json")) == []
    run(capsys, "import", "--bank", home / "one", "--store", s3)
    (version,) = json.loads(run(capsys, "list", "--store", s3, "--json"))
    run(capsys, "verify", "--store", s3, "--version", version["version"])


def test_a_published_bank_is_never_pruned(home, tmp_path, capsys):
    store, database = str(tmp_path / "store"), str(tmp_path / "service.db")
    banks = []
    for seed in (3, 4, 5):
        make_bank(tmp_path / f"bank-{seed}", str(home / "model"), seed=seed, anchors=("anna", "bert"))
        manifest = tmp_path / f"bank-{seed}" / "manifest.json"
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"created_at": f"2026-01-0{seed}"}))
        banks.append(run(capsys, "import", "--bank", manifest.parent, "--store", store).strip())
    missing = run(capsys, "prune", "--store", store, "--keep", "1", "--database", database, code=BAD_INPUT)
    assert "no database is at" in missing and not Path(database).exists()
    told = run(
        capsys, "publish", "--bank", banks[0], "--base", home / "base", "--store", database, "--version", "the-first"
    )
    assert "bank the-first is in force" in told
    pruned = json.loads(run(capsys, "prune", "--store", store, "--keep", "1", "--database", database, "--json"))
    assert [f"{store}/{version}" for version in pruned["removed"]] == [banks[1]]


def test_an_anchor_is_exported(home, tmp_path, capsys):
    told = run(
        capsys,
        "export",
        "--bank",
        home / "one",
        "--anchor",
        "bert",
        "--out",
        tmp_path / "bert",
        "--base",
        home / "base",
    )
    assert f"{tmp_path / 'bert'}: rank 4, 4 modules" in told and "--max-lora-rank 8 " in told
    assert_exported(tmp_path / "bert", 4, routed_sum(home, [1], [1.0], None))
    config = json.loads((tmp_path / "bert" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(home / "model")


def test_a_user_of_an_artifact_is_exported(home, tmp_path, capsys, caplog):
    own = own_adapter(home, 3)
    row = {"user_id": NAME, "slots": [5, 0], "weights": [0.75, 0.25], "stack": to_bytes(own), "scale": own.scale}
    digest = open_artifact(home / "one", kind="bank").hash
    with publish(tmp_path / "states", kind=KIND, settings={}, inputs={"bank": digest}) as draft:
        pq.write_table(pa.Table.from_pylist([row | {"bytes": 1, "seconds": 0.0}]), draft.path / "states.parquet")
    states = ("--states", tmp_path / "states", "--out", tmp_path / "out")
    told = run(capsys, "export", "--bank", home / "one", f"--user={NAME}", *states)
    assert "rank 9, 4 modules" in told and "--max-lora-rank 16 " in told
    assert_exported(tmp_path / "out", 9, routed_sum(home, [5, 0], [0.75, 0.25], own))
    assert "ann" not in told + caplog.text

    padded = ("--states", tmp_path / "states", "--out", tmp_path / "padded", "--pad-rank")
    assert "rank 9, padded to 16" in run(capsys, "export", "--bank", home / "one", f"--user={NAME}", *padded)
    assert_exported(tmp_path / "padded", 16, routed_sum(home, [5, 0], [0.75, 0.25], own))

    # what is wrong is said, and nothing is written
    states = ("--states", tmp_path / "states", "--out", tmp_path / "never")
    assert "no user of this id" in run(capsys, "export", "--bank", home / "one", "--user", "x", *states, code=BAD_INPUT)
    assert "was made with bank" in run(
        capsys, "export", "--bank", home / "two", f"--user={NAME}", *states, code=BAD_INPUT
    )
    assert not (tmp_path / "never").exists()


def test_a_user_of_the_service_is_exported_as_the_service_would_answer(home, tmp_path, capsys):
    bank = load_bank(home / "one")
    database = open_database(DatabaseConfig(url=str(tmp_path / "service.db")))
    new = describe(str(home / "one"), base_fingerprint=bank.base_fingerprint, tenant="acme", version="v1")
    Banks(database).publish(new)
    store, user = UserStore(database), UserId(tenant="acme", id=NAME)
    mean = bank.center + 0.3 * bank.embeddings[2] + 0.2 * bank.embeddings[4]
    total = ItemSum(total=mean.astype(np.float32), items=1, encoder=bank.encoder)
    state = store.append_history(user, [_item()], total, task="movie_tagging")
    own = own_adapter(home, 4)
    kept = UserStack(
        tensors=to_bytes(own),
        kind="lora",
        rank=1,
        scale=own.scale,
        base_fingerprint=bank.base_fingerprint,
        bank_version="v1",
        history_version=state.version,
    )
    store.put_stack(user, kept)
    Banks(database).retire(UserId(tenant="acme", id="faye"))
    args = ("--database", tmp_path / "service.db", "--tenant", "acme", f"--user={NAME}", "--fusion.k", "3")
    told = run(capsys, "export", "--bank", home / "one", *args, "--out", tmp_path / "out")
    assert "rank 13, 4 modules" in told

    # the method's formula: softmax of cosines / 0.1 over the nearest three that are in service
    centred = (mean - bank.center) / np.linalg.norm(mean - bank.center)
    cosines = bank.embeddings[:5] @ centred
    slots = np.argsort(-cosines)[:3]
    shares = np.exp(cosines[slots] / 0.1)
    assert_exported(tmp_path / "out", 13, routed_sum(home, slots.tolist(), (shares / shares.sum()).tolist(), own))

    # nobody of that name, nobody's bank, and a user without a history or a stack
    wrong = run(
        capsys, "export", "--bank", home / "one", *args[:2], "--user", "x", "--out", tmp_path / "x", code=BAD_INPUT
    )
    assert "tenant default has no user of this id" in wrong
    wrong = run(capsys, "export", "--bank", home / "two", *args, "--out", tmp_path / "x", code=BAD_INPUT)
    assert "is not published in this database" in wrong
    store.drop_stack(user)
    assert "the fused anchors alone" in run(
        capsys, "export", "--bank", home / "one", *args, "--out", tmp_path / "fused"
    )
    assert load_peft(tmp_path / "fused").rank == 12
    database.close()


def test_what_is_asked_must_be_whole(home, tmp_path, capsys):
    assert "which bank?" in run(capsys, "show", code=BAD_INPUT)
    assert "which bank?" in run(capsys, "verify", "--bank", "a", "--store", "b", code=BAD_INPUT)
    out = ("--bank", home / "one", "--out", tmp_path / "out")
    assert "whose adapter?" in run(capsys, "export", *out, code=BAD_INPUT)
    assert "where is the user kept?" in run(capsys, "export", *out, "--user", "a", code=BAD_INPUT)
    assert "no anchor of the bank" in run(capsys, "export", *out, "--anchor", "zoe", code=BAD_INPUT)
    assert "nothing there" in run(capsys, "show", "--bank", tmp_path / "none", code=BAD_INPUT)
    other = make_base(tmp_path / "base", _other_model(tmp_path))
    wrong = run(capsys, "export", *out, "--anchor", "anna", "--base", other, code=BAD_INPUT)
    assert "give the base that it was built on" in wrong
    assert not (tmp_path / "out").exists()
    assert main(["bank", "--help"]) == OK
    assert "mta bank prune" in capsys.readouterr().out


def _item():  # noqa: ANN202
    from mta_ray.lamp.users import HistoryItem

    return HistoryItem(id="1", content="robots", target="sci-fi")


def _other_model(folder: Path) -> str:
    from transformers import LlamaForCausalLM

    path = tiny_llama(folder / "other")
    model = LlamaForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    model.save_pretrained(path)
    return path
