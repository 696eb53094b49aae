"""A head on the pooled output of any layer, for architectures whose configuration does not offer it.

`put_pooling` changes a model in place, without a line per architecture:

- the output of a layer is pooled over its tokens, patches or pixels (`cls`, `mean` or `max`; `mean` and `max` leave out
  a text's padding, and class and register tokens of an image model), and the pooled vector is written to all positions.
  Whatever the architecture does then to pick a vector (the first token, the last token, the mean over the pixels), it
  finds this one;
- the layers above it are left out: modules without parameters stand in their places and hand on their input;
- the last linear layer reads the vector standardized over the training examples, whatever the scale of that layer;
- where several layers are read (`others`), the pooled vectors of those below are put before that of the top one, right
  before the last layer. Linear heads on each of them, averaged, are one linear head on all: see `PooledLinear.parts`.

`features.pooled_layer` finds out where the output is and what is above it, and verifies the changed model.

The configuration says what was changed (`POOLING_KEY`), and `heads.class_with_head` makes a class that builds it. Plain
`AutoModelFor…` does not read the key: it stops with an error about the shape of `weight` (see `PooledLinear`), instead
of a warning about missing weights and random predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hf_transfer.layers.pass_through import PassThrough

POOLING_KEY = "hf_transfer_pooling"  # in the configuration
CLS, MEAN, MAX = "cls", "mean", "max"


@dataclass(frozen=True)
class PoolingSpec:
    """What is pooled, how, and what is left out.

    Attributes:
        pooling: `cls`, `mean` or `max`.
        layer: name of the layer group that is read.
        path: the module whose output is pooled, in the model without an adapter.
        is_input: whether its input is meant instead.
        leaf: number of the tensor among those that it returns (or takes).
        batch: axis of the examples.
        channel: axis of the features.
        width: number of features.
        is_text: whether the positions are those of the tokens, of which `attention_mask` says which are padding.
        skipped: positions that `mean` and `max` leave out.
        left_out: (path, length of the tuple that it returned; 0 for a tensor) of the modules that hand on their input.
        head: path of the last linear layer.
        others: layers below that are read too, from the bottom; nothing is left out for them.
    """

    pooling: str
    layer: str
    path: str
    is_input: bool
    leaf: int
    batch: int
    channel: int
    width: int
    is_text: bool
    skipped: tuple[int, ...]
    left_out: tuple[tuple[str, int], ...]
    head: str
    others: tuple[PoolingSpec, ...] = ()

    @classmethod
    def of(cls, config: Any) -> PoolingSpec | None:
        """What a configuration says; None if the model reads what its architecture reads."""
        said = vars(config).get(POOLING_KEY)
        return None if said is None else cls._from(said)

    @classmethod
    def _from(cls, said: Mapping[str, Any]) -> PoolingSpec:
        lists = {"skipped": tuple(said["skipped"]), "left_out": tuple((path, int(n)) for path, n in said["left_out"])}
        others = tuple(cls._from(one) for one in said.get("others", ()))  # an earlier version had none
        return cls(**{**said, **lists, "others": others})

    def to_dict(self) -> dict[str, Any]:
        """As the configuration holds it."""
        lists = {"skipped": list(self.skipped), "left_out": [list(one) for one in self.left_out]}
        return {**asdict(self), **lists, "others": [one.to_dict() for one in self.others]}

    @property
    def parts(self) -> tuple[PoolingSpec, ...]:
        """The layers that are read, from the bottom."""
        return (*self.others, self)

    def pooled(self, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(examples, width): the output of the layer, pooled.

        Args:
            value: that output.
            mask: (examples, positions), not zero at tokens; None if every position counts.
        """
        rows = self._rows(value)
        real = None if mask is None or not self.is_text else mask.bool()
        if self.pooling == CLS:
            first = 0 if real is None else real.int().argmax(1)
            return rows[torch.arange(len(rows), device=rows.device), first]
        if self.skipped:
            rows = rows[:, [i for i in range(rows.shape[1]) if i not in self.skipped]]
        if self.pooling == MAX:
            return (rows if real is None else rows.masked_fill(~real[..., None], -math.inf)).amax(1)
        if real is None:
            return rows.mean(1)
        return rows.masked_fill(~real[..., None], 0).sum(1) / real.sum(1).clamp(min=1)[:, None]

    def _rows(self, value: torch.Tensor) -> torch.Tensor:
        """(examples, positions, width)."""
        positions = [i for i in range(value.dim()) if i not in (self.batch, self.channel)]
        return value.permute(self.batch, *positions, self.channel).flatten(1, -2)

    def spread(self, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The pooled vector at every position, in the shape of `value`."""
        pooled = self.pooled(value, mask).to(value.dtype)
        shape = [1] * value.dim()
        shape[self.batch], shape[self.channel] = pooled.shape
        pooled = pooled if self.batch < self.channel else pooled.T
        return pooled.reshape(shape).expand(value.shape).contiguous()


class PooledLinear(nn.Module):
    """The last layer of the head: standardizes what it reads, then a linear layer. Maps (…, width) to (…, outputs).

    Args:
        width: of what it reads.
        outputs: number of logits.
        bias: whether the linear layer has one.
        parts: widths of the vectors that it reads one after the other; None for one.

    Attributes:
        parts: likewise. A head that is solved for is the average of one on each of them.
    """

    mean: torch.Tensor
    sd: torch.Tensor
    weight: torch.Tensor

    def __init__(self, width: int, outputs: int, bias: bool = True, parts: Sequence[int] | None = None):
        super().__init__()
        self.parts = tuple(parts or (width,))
        self.output = nn.Linear(width, outputs, bias=bias)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("sd", torch.ones(width))
        # Of another shape than the weight of the layer that it replaces: see the module.
        self.register_buffer("weight", torch.zeros(1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.output((features - self.mean) / self.sd)
        return logits

    @torch.no_grad()
    def standardize(self, features: torch.Tensor) -> None:
        """Take mean and standard deviation from (examples, width).

        A standard deviation is at least a tenth of the median of its part: a unit that few examples activate would be
        an outlier.
        """
        own = features.double().std(0, correction=0).split(self.parts)
        sd = torch.cat([sd.clamp(min=0.1 * float(sd.median())) for sd in own])
        self.mean.copy_(features.double().mean(0))
        self.sd.copy_(torch.where(sd > 0, sd, 1.0))


class _Pool:
    """Hooks that pool. Hooks are no modules: paths, names of weights and layer groups stay what they are."""

    def __init__(self, spec: PoolingSpec):
        self.spec = spec
        self.mask: torch.Tensor | None = None
        self.others = [_Kept(self, one) for one in spec.others]

    def see(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before the model: which tokens are padding."""
        mask = kwargs.get("attention_mask")
        self.mask = mask if torch.is_tensor(mask) and mask.dim() == 2 else None

    def after(self, _: nn.Module, args: Any, output: Any) -> Any:
        return self._changed(output)

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._changed((args, kwargs))

    def _changed(self, values: Any) -> Any:
        leaves, structure = pytree.tree_flatten(values)
        leaves[self.spec.leaf] = self.spec.spread(leaves[self.spec.leaf], self.mask)
        return pytree.tree_unflatten(leaves, structure)

    def gather(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Before the last layer: the vectors of the other layers come first."""
        features = args[0]
        vectors = [one.take().to(features.dtype) for one in self.others]
        shape = (len(features), *[1] * (features.dim() - 2), -1)
        spread = [v.reshape(shape).expand(*features.shape[:-1], -1) for v in vectors]
        return torch.cat([*spread, features], -1), *args[1:]


class _Kept:
    """Hooks that keep the pooled vector of another layer until the last layer asks for it."""

    def __init__(self, pool: _Pool, spec: PoolingSpec):
        self.pool, self.spec = pool, spec
        self.vector: torch.Tensor | None = None

    def after(self, _: nn.Module, args: Any, output: Any) -> None:
        self._keep(output)

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self._keep((args, kwargs))

    def _keep(self, values: Any) -> None:
        self.vector = self.spec.pooled(pytree.tree_flatten(values)[0][self.spec.leaf], self.pool.mask)

    def take(self) -> torch.Tensor:
        vector, self.vector = self.vector, None
        if vector is None:  # a replay from stored activations, say, begins above it
            raise RuntimeError(f"the head reads {self.spec.layer} too, which was not called")
        return vector


def put_pooling(model: Any, spec: PoolingSpec) -> Callable[[], None]:
    """Make a model read the pooled output of a layer, in place, with a new last layer; its configuration notes it.

    Returns:
        What takes the change back.
    """
    before = [(path, model.get_submodule(path)) for path, _ in spec.left_out]
    for path, items in spec.left_out:
        model.set_submodule(path, PassThrough(items))
    pool = _Pool(spec)
    handles = [model.register_forward_pre_hook(pool.see, with_kwargs=True)] if spec.is_text else []
    hooks: list[_Pool | _Kept] = [*pool.others, pool]
    for hook in hooks:
        layer = model.get_submodule(hook.spec.path)
        if hook.spec.is_input:
            handles.append(layer.register_forward_pre_hook(hook.before, with_kwargs=True))
        else:
            handles.append(layer.register_forward_hook(hook.after))
    last, widths = model.get_submodule(spec.head), [one.width for one in spec.parts]
    with last.weight.device:
        made = PooledLinear(sum(widths), last.out_features, last.bias is not None, widths)
    if spec.others:
        made.register_forward_pre_hook(pool.gather)
    model.set_submodule(spec.head, made.to(last.weight.dtype))
    setattr(model.config, POOLING_KEY, spec.to_dict())

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for path, module in (*before, (spec.head, last)):
            model.set_submodule(path, module)
        vars(model.config).pop(POOLING_KEY, None)

    return undo
