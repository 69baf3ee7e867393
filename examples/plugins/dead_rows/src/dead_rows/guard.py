"""The guard ``dead_rows``, as functions: an edit may not leave an output of a layer without a weight."""

from invarlock import hookimpl

_before = {}


@hookimpl
def invarlock_prepare(model):
    _before.clear()
    _before.update(dead_rows(model))
    return {"ready": True, "dead_rows": sum(_before.values())}


@hookimpl
def invarlock_validate(model, context):
    allowed = context["policy"].get("allowed", 0)
    new = {name: count - _before.get(name, 0) for name, count in dead_rows(model).items()}
    worse = sorted((name for name in new if new[name] > allowed), key=lambda name: -new[name])
    return {
        "passed": not worse,
        "action": "warn" if worse else "continue",
        "message": f"{sum(new[name] for name in worse)} rows of {len(worse)} weights have become zero",
        "metrics": {"suspects": [{"module": name, "evidence": f"{new[name]} rows"} for name in worse]},
    }


def dead_rows(model):
    """How many rows of each linear layer are all zero."""
    from torch import nn

    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: int((layer.weight == 0).all(dim=1).sum()) for name, layer in layers.items()}
