"""Keys of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import setting

ADAPTERS = ("none", "lora", "dora", "rslora", "ia3", "adalora", "vera", "ln_tuning", "prompt", "prefix", "bottleneck")
LOW_RANK = ("lora", "dora", "rslora", "adalora")


@dataclass
class AdapterArguments:
    """The keys of an adapter: small trained parts in a frozen backbone. `hf_transfer.adapters` attaches it."""

    adapter: dict[str, Any] | str | None = setting(
        "none",
        "none, lora, dora, rslora, ia3, adalora, vera, ln_tuning, prompt, prefix, bottleneck, or any peft "
        "configuration as a mapping, e.g. {peft_type: LOHA, r: 4}",
        resume="fixed",
        card="changed",
    )
    lora_r: int = setting(
        8,
        "rank of lora, dora and rslora; target rank of adalora",
        above=0,
        used_by=LOW_RANK,
        resume="fixed",
        card="changed",
    )
    lora_alpha: float | None = setting(
        None,
        "the update is scaled by lora_alpha / lora_r (default: 2 * lora_r)",
        above=0,
        used_by=LOW_RANK,
        resume="fixed",
        card="changed",
    )
    lora_dropout: float = setting(
        0.0,
        "dropout probability before the low-rank update",
        minimum=0,
        below=1,
        used_by=LOW_RANK,
        resume="fixed",
        card="changed",
    )
    lora_target_modules: list[str] | None = setting(
        None,
        "modules to adapt, by full name, suffix or regular expression (default: every linear layer and ungrouped "
        "convolution in the blocks; for ln_tuning, the norms)",
        used_by=("mapping", *(a for a in ADAPTERS if a not in ("none", "prompt", "prefix"))),
        resume="fixed",
        card="changed",
    )
    lora_plus_ratio: float | None = setting(
        None,
        "LoRA+: ratio of lora_B's learning rate to lora_A's, e.g. 16",
        above=0,
        used_by=("mapping", *LOW_RANK),
        resume="plan",
        card="changed",
    )

    @property
    def is_adapted(self) -> bool:
        return self.adapter not in (None, "none")


def with_adapter(strategy: str | None, adapter: Any) -> Any:
    """The adapter that `strategy` and `adapter` mean together: `strategy: lora` is `full` with one."""
    return "lora" if strategy == "lora" and adapter in (None, "none") else "none" if adapter is None else adapter
