"""The judgement of an edit: each guard in the order of guards.order; a call reaches this guard and every wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from invarlock.hookspecs.marker import Options, hookspec


@hookspec(firstresult=True)
def invarlock_observe(model: Any, adapter: Any, policy: Options, guard: str) -> Mapping[str, Any] | None:
    """Ask for the inputs and outputs of modules.

    :called: before each of the two forward passes, the baseline's and the edited model's; also where a reference holds
        the baseline's.
    :param model: the model as it will be run.
    :param adapter: the model's adapter.
    :param policy: the guard's options.
    :param guard: the guard's name, for wrappers.
    :returns: a tap for each module name, or None: a callable ``tap(module, args, kwargs, output)`` with a method
        ``result()``, called for the preview windows; it must change nothing. A tap to which the first windows suffice
        has the number of their ``positions`` as an attribute: the edited model is run over no more preview windows
        than taps look at. Results that are plain data and tensors can be kept in a reference, in place of the
        baseline's pass. Stops at the first non-None result.
    :raises: an error of that guard, which counts as abort; so is anything but taps by module name.

    Example, a guard that looks at the largest output of each MLP block::

        class Largest(list):
            def __call__(self, module, args, kwargs, output):
                self.append(output.abs().max().item())

            def result(self):
                return max(self)

        @hookimpl
        def invarlock_observe(model):
            return {name: Largest() for name, module in model.named_modules() if name.endswith("mlp")}

        @hookimpl
        def invarlock_validate(context):
            before, after = context["observations"]["baseline"], context["observations"]["edited"]
            grown = [name for name in after if after[name] > 2 * before[name]]
            return {"passed": not grown, "action": "warn" if grown else "continue", "message": f"grown: {grown}"}
    """


@hookspec(firstresult=True)
def invarlock_prepare(model: Any, adapter: Any, calib: Any, policy: Options, guard: str) -> Mapping[str, Any] | None:
    """Look at the baseline.

    :called: before the edit.
    :param model: the baseline. Whatever of it ``invarlock_validate`` needs has to be copied: the edit is in place.
    :param adapter: the model's adapter.
    :param calib: the preview windows: an iterable of batches, dicts of ``input_ids`` and ``attention_mask``. Its
        attribute ``comparing`` is True where another checkpoint is compared: ``context["baseline_weights"]`` will then
        have the baseline's weights, and ``context["edit"]["modules"]`` names those that differ.
    :param policy: the guard's options.
    :param guard: the guard's name, for wrappers.
    :returns: a dict with ``ready``, True or False; None counts as ready. Stops at the first non-None result.
    :raises: abort before the edit, once the others are prepared; so for any ``ready`` but True.

    Example, a guard that compares the norm of each parameter with the baseline's::

        norms = {}

        @hookimpl
        def invarlock_prepare(model):
            norms.update({name: p.norm().item() for name, p in model.named_parameters()})
            return {"ready": bool(norms), "largest": max(norms.values())}

        @hookimpl
        def invarlock_validate(model):
            moved = [n for n, p in model.named_parameters() if abs(p.norm().item() - norms[n]) > norms[n] / 100]
            return {"passed": not moved, "action": "warn" if moved else "continue", "message": f"moved: {moved}"}
    """


@hookspec(firstresult=True)
def invarlock_validate(model: Any, adapter: Any, context: Mapping[str, Any], guard: str) -> Mapping[str, Any] | None:
    """Judge the edited model.

    :called: after the edit: on all guards, whatever one of them says, unless ``guards.fail_fast`` is set.
    :param model: the edited model. A change of it, of its modules' hooks and attributes, of its configuration or its
        tokenizer is undone and named, as an error of the guard.
    :param adapter: the model's adapter.
    :param context: ``baseline`` and ``edited`` (what the passes measured), ``edit`` (the ``plan``, a dict that has
        ``rules`` where it is a list of them, and what it did to each module), ``limit`` (``eval.max_pm_ratio``, the
        largest ratio of the metric to accept), ``policy``, ``observations`` (what taps collected) and ``tokenizers``,
        of both sides, ``attempt``, ``device``, ``rank``.
    :param guard: the guard's name, for wrappers.
    :returns: a dict: ``passed`` (bool), ``action`` ("continue", "warn", "rollback", "abort"), ``message``, ``metrics``
        (a dict of figures), ``warnings`` (a list of texts). "continue" goes with ``passed`` False only where
        ``metrics["measured"]`` is False, too: then the guard has no opinion. Lists are cut to 10,000 entries, tensors
        of more than 1,000 numbers to their shape, with a warning. Stops at the first non-None result.
    :raises: an error of that guard, which counts as abort, with the traceback in the report; so for a result without
        ``passed``, an unknown or a contradicting action, or ``metrics`` that hold what is no data.

    Example, a timer around every guard::

        import sys, time

        @hookimpl(wrapper=True)
        def invarlock_validate(guard):
            started = time.perf_counter()
            result = yield
            print(f"{guard} took {time.perf_counter() - started:.2f} s", file=sys.stderr)
            return result
    """
