"""Keys of a run that ends at a budget of time or money."""

from __future__ import annotations

from dataclasses import dataclass

from hf_transfer.config.fields import setting

IDLE = ("usd_per_hour", "prices_file")  # they say what a budget is worth, and ask for none


@dataclass
class StoppingArguments:
    """What a run may take. Stages and schedule follow the measured time per step, so that it ends annealed."""

    max_hours: float | None = setting(
        None,
        "hours of training after which the run ends, annealed: stages and schedule are re-planned from the measured "
        "time per step; num_train_epochs is the upper limit",
        above=0,
        resume="plan",
    )
    max_usd: float | None = setting(
        None,
        "dollars after which the run ends, as with max_hours, at usd_per_hour or the GPU's price in prices_file",
        above=0,
        resume="plan",
    )
    usd_per_hour: float | None = setting(
        None,
        "price of one device in dollars per hour (default: on demand, of the GPU in prices_file)",
        above=0,
        resume="free",
    )
    prices_file: str | None = setting(None, "YAML file with GPU prices (default: ours)", resume="free")


def wants_budget(keys: StoppingArguments) -> bool:
    """Whether the run has a budget."""
    return keys.max_hours is not None or keys.max_usd is not None


def budget_seconds(keys: StoppingArguments, devices: int) -> float | None:
    """Seconds of training that the keys allow; None without a budget.

    Args:
        keys: with `usd_per_hour` if there is `max_usd`.
        devices: number of devices that the run pays for.
    """
    hours = [] if keys.max_hours is None else [keys.max_hours]
    if keys.max_usd is not None:
        assert keys.usd_per_hour is not None, "checked before"
        hours.append(keys.max_usd / (keys.usd_per_hour * devices))
    return 3600 * min(hours) if hours else None


def in_keys(keys: StoppingArguments) -> str:
    """The budget as it was asked for."""
    given = {"max_hours": keys.max_hours, "max_usd": keys.max_usd}
    return ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
