"""Stand-ins: calls of chosen modules go to a handler, while hooks, attributes and parameter names stay."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from hf_transfer.features.cut import CallKey

# (which call, the module's own forward, positional arguments, keyword arguments) -> output
Handler = Callable[[CallKey, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def patched(model: nn.Module, names: Sequence[str], handler: Handler) -> Iterator[None]:
    """Within the context, calls of the named modules go to `handler`.

    The `forward` of the module instances is replaced, and restored at the end. Calls are counted from the beginning of
    each forward pass of `model`.
    """
    counts: Counter[str] = Counter()
    modules = {name: model.get_submodule(name) for name in names}

    def stand_in(name: str, own_forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            key = (name, counts[name])
            counts[name] += 1
            return handler(key, own_forward, args, kwargs)

        return forward

    before = {name: vars(modules[name]).get("forward") for name in names}
    hook = model.register_forward_pre_hook(lambda *_: counts.clear(), prepend=True)
    try:
        for name in names:
            modules[name].forward = stand_in(name, modules[name].forward)
        yield
    finally:
        hook.remove()
        for name, own_forward in before.items():
            if own_forward is None:
                modules[name].__dict__.pop("forward", None)
            else:
                modules[name].forward = own_forward
