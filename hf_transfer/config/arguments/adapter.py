"""Keys of adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_transfer.config.fields import key

ADAPTERS = ("none", "lora", "dora", "rslora", "ia3", "adalora", "vera", "ln_tuning", "prompt", "prefix", "bottleneck")


@dataclass
class AdapterArguments:
    """The keys of an adapter: small trained parts in a frozen backbone. `hf_transfer.adapters` attaches it."""

    adapter: dict[str, Any] | str | None = key(
        "none",
        "none, lora, dora, rslora, ia3, adalora, vera, ln_tuning, prompt, prefix, bottleneck, or any configuration of "
        "peft as a mapping, e.g. {peft_type: LOHA, r: 4}",
    )
    lora_r: int = key(8, "rank of lora, dora and rslora; target rank of adalora")
    lora_alpha: float | None = key(None, "the update is scaled by lora_alpha / lora_r (default: 2 * lora_r)")
    lora_dropout: float = key(0.0, "dropout before the low-rank update, as a share")
    lora_target_modules: list[str] | None = key(
        None,
        "modules to adapt, by full name, end of name or pattern (default: every linear layer and ungrouped convolution "
        "in the blocks; for ln_tuning, the norms)",
    )
    lora_plus_ratio: float | None = key(None, "LoRA+: lora_B learns at so many times the rate of lora_A, e.g. 16")

    @property
    def is_adapted(self) -> bool:
        return self.adapter not in (None, "none")


def with_adapter(strategy: str | None, adapter: Any) -> Any:
    """The adapter that `strategy` and `adapter` mean together: `strategy: lora` is `full` with one."""
    return "lora" if strategy == "lora" and adapter in (None, "none") else "none" if adapter is None else adapter
