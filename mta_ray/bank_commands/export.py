"""`mta bank export`: an anchor, or a user's fused and stacked adapter, as one PEFT folder that vLLM loads too."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field

from mta_ray.artifacts import open_artifact
from mta_ray.bank_commands.place import BankPlace
from mta_ray.lora.adapter import Adapter, from_bytes
from mta_ray.lora.bank import Bank, load_bank
from mta_ray.lora.export import VLLM_RANKS, export, vllm_rank
from mta_ray.lora.fusion import stack
from mta_ray.lora.fusion_config import FusionConfig
from mta_ray.object_store import told
from mta_ray.personalize.base_model import open_base
from mta_ray.personalize.merge_then_adapt import fused_adapter
from mta_ray.pipeline.adapt_users import KIND, read_states
from mta_ray.serving.banks import Banks
from mta_ray.serving.database import DatabaseConfig, open_existing
from mta_ray.serving.identity import DEFAULT_TENANT, UserId
from mta_ray.serving.served_bank import ServedBank
from mta_ray.serving.user_state import ANY_BANK, UserStack
from mta_ray.serving.user_store import UnknownUser, UserStore


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig(BankPlace):
    """One adapter of a bank as a PEFT folder: an anchor's, or a user's."""

    out: str
    """The folder to write; it must not be there yet."""
    anchor: str | None = None
    """An anchor's id, as `mta bank show` lists it."""
    user: str | None = None
    """Or a user's id, whose route and stack lie in `states` or in `database`."""
    states: str | None = None
    """The `user-states` artifact of adapt-users."""
    database: str | None = None
    """Or the service's store, a file or URL, in which this bank is published."""
    tenant: str = DEFAULT_TENANT
    """Whose user it is, in `database`."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How the service weighs anchors, for a user of `database` whose route is not kept."""
    base: str | None = None
    """The `base` artifact that the bank was built on; its model is named in the folder."""
    pad_rank: bool = False
    """Add zeros up to the next rank that vLLM takes as --max-lora-rank."""

    def __post_init__(self) -> None:
        BankPlace.__post_init__(self)
        if (self.anchor is None) == (self.user is None):
            raise ValueError("whose adapter? give --anchor ID or --user ID, one of them")
        if self.user is not None and (self.states is None) == (self.database is None):
            raise ValueError("where is the user kept? give --states PATH or --database URL, one of them")
        if self.fusion.mode != "exact":
            raise ValueError("only fusion mode exact is served, and exported; leave fusion.mode out")


def export_adapter(config: ExportConfig) -> str:
    """Where the adapter lies, of which rank, and what vLLM must be told."""
    # 1. the adapter
    path = config.path
    bank = load_bank(path)
    notes: list[str] = []
    if config.anchor is not None:
        adapter = _of_anchor(bank, config.anchor)
    elif config.states is not None:
        adapter = _of_states(config, path, bank)
    else:
        adapter = _of_database(config, path, bank, notes)

    # 2. the model it belongs to
    source = ""
    if config.base is not None:
        base = open_base(config.base)
        if base.fingerprint != bank.base_fingerprint:
            raise ValueError(
                f"the bank was built on base {bank.base_fingerprint[:12]}, {config.base} is {base.fingerprint[:12]}; "
                "give the base that it was built on"
            )
        source = str(base.path / "model") if base.mode == "full" else base.source
        if base.mode == "adapter":
            notes.append(f"merge the base's own adapter into the model first: {base.path / 'adapter'}")

    # 3. the folder
    folder = export(adapter, config.out, base_model=source, pad_rank=config.pad_rank)
    rank, needed = str(adapter.rank), vllm_rank(adapter.rank)
    if config.pad_rank and needed != adapter.rank:
        rank += f", padded to {needed}"
    if needed is None:
        notes.append(f"vLLM takes no rank above {VLLM_RANKS[-1]}; PEFT does")
    else:
        notes.append(f"vLLM: --enable-lora --max-lora-rank {needed} --lora-modules NAME={folder}")
    return "\n".join([f"{folder}: rank {rank}, {len(adapter.factors)} modules", *notes])


def _of_anchor(bank: Bank, anchor: str) -> Adapter:
    if anchor not in bank.anchor_ids:
        raise ValueError("no anchor of the bank has this id; `mta bank show` lists them")
    return bank.adapter(bank.anchor_ids.index(anchor))


def _of_states(config: ExportConfig, path: str, bank: Bank) -> Adapter:
    assert config.states is not None and config.user is not None
    made_with = open_artifact(config.states, kind=KIND, verify=False).inputs.get("bank", "")
    digest = open_artifact(path, kind="bank", verify=False).hash
    if made_with != digest:
        raise ValueError(
            f"{told(config.states)} was made with bank {made_with[:12]}, this one is {digest[:12]}; give that bank, or "
            "run adapt-users with this one"
        )
    state = read_states(config.states, [config.user]).get(config.user)
    if state is None:
        raise ValueError(f"{told(config.states)} has no user of this id; adapt-users --everybody adapts all of them")
    fused = fused_adapter(state.route, bank, "exact")
    return fused if state.stack is None else stack(fused, state.stack)


def _of_database(config: ExportConfig, path: str, bank: Bank, notes: list[str]) -> Adapter:
    """What the service would answer with: the route, kept or computed as it would be, and the stack if it is fit."""
    assert config.database is not None and config.user is not None
    user = UserId(tenant=config.tenant, id=config.user)
    digest = open_artifact(path, kind="bank", verify=False).hash
    with closing(open_existing(DatabaseConfig(url=config.database))) as database:
        served = _served(Banks(database), bank, digest, config.fusion)
        store = UserStore(database)
        try:
            state = store.read(user)
        except UnknownUser:
            raise ValueError(f"tenant {config.tenant} has no user of this id; --tenant names another one") from None
        kept = store.read_stack(user)
    if state.items and state.item_sum.encoder != bank.encoder:
        raise ValueError(
            f"the user's history was encoded by {state.item_sum.encoder!r}, the bank's encoder is {bank.encoder!r}; "
            "a request to the service encodes it anew"
        )
    route = served.kept(state) or served.compute(state)
    if route is None and state.items:
        raise ValueError("no anchor of the bank is in service; publish another bank")
    slots = served.slots_of(route) if route is not None else served.cold_start()
    if slots is None:
        raise ValueError("no anchor of the bank is in service; publish another bank")
    if route is None:
        notes.append("the user has no history: every anchor alike")
    fused = fused_adapter(slots, bank, "exact")
    if kept is None:
        notes.append("the user has no stack: the fused anchors alone")
        return fused
    if kept.bank_version not in (ANY_BANK, served.version) or kept.base_fingerprint != bank.base_fingerprint:
        notes.append("the user's stack was trained on another bank and is left out, as the service does")
        return fused
    return stack(fused, _adapter(kept))


def _served(banks: Banks, bank: Bank, digest: str, fusion: FusionConfig) -> ServedBank:
    for version in banks.versions():
        published = banks.get(version)
        if published.bank.hash == digest:
            return ServedBank(
                version=version,
                bank=bank,
                anchors=published.bank.anchors,
                retired=published.retired_slots,
                fusion=fusion,
            )
    raise ValueError(
        f"bank {digest[:12]} is not published in this database; give one that is, or `mta bank publish` it"
    )


def _adapter(kept: UserStack) -> Adapter:
    if kept.kind != "lora":
        raise ValueError(f"the user's stack is of kind {kept.kind!r}, and only a LoRA can be exported")
    return from_bytes(kept.tensors, kept.scale)
