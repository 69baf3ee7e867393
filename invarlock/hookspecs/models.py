"""A model: the adapter that loads it is asked for all the rest."""

from __future__ import annotations

from typing import Any

from invarlock.hookspecs.marker import Options, hookspec


@hookspec(firstresult=True)
def invarlock_load_model(model_id: str, device: str, options: Options) -> Any:
    """Load a model.

    :called: once per run: on the adapter that ``model.adapter`` names, with ``auto`` on one after the other.
    :param model_id: ``model.id`` of the configuration: a path or an id on a hub.
    :param device: ``model.device``: "auto", "cpu", "cuda", "cuda:1", "mps".
    :param options: ``dtype``, ``trust_remote_code``, ``revision``, and ``stream``: true where weights stay on disk.
    :returns: a ``torch.nn.Module``, or None for an id that is not the adapter's. Stops at the first non-None result.
    :raises: an adapter asked for by name ends the run (exit code 3, or 2 for a ``UsageError`` or an ``OSError``); with
        ``auto`` a ``UsageError`` ends it too, and any other exception is logged and the next adapter asked.

    Example, an adapter for ids such as ``folder:path/to/checkpoint``::

        @hookimpl
        def invarlock_load_model(model_id):
            from transformers import AutoModelForCausalLM

            owned = model_id.startswith("folder:")
            return AutoModelForCausalLM.from_pretrained(model_id.removeprefix("folder:")) if owned else None
    """


@hookspec(firstresult=True)
def invarlock_load_tokenizer(model_id: str, options: Options) -> Any:
    """Load the model's own tokenizer.

    :called: once per run, or per checkpoint of a comparison, if text has to become windows or the model is to be saved.
    :param model_id: ``model.id``.
    :param options: ``trust_remote_code`` and ``revision``.
    :returns: a tokenizer like those of transformers; None: use ``AutoTokenizer``. Stops at the first non-None result.
    :raises: the run ends before anything is measured.

    Example, an adapter whose tokenizer lies in a folder of its own::

        from transformers import AutoModelForCausalLM, AutoTokenizer

        @hookimpl
        def invarlock_load_model(model_id):
            return AutoModelForCausalLM.from_pretrained(model_id)

        @hookimpl
        def invarlock_load_tokenizer(model_id):
            return AutoTokenizer.from_pretrained(f"{model_id}/tokenizer")
    """


@hookspec(firstresult=True)
def invarlock_describe(model: Any) -> dict[str, Any] | None:
    """Describe the model for guards and the report.

    :called: once, after loading.
    :param model: the loaded model.
    :returns: a dict of plain values: model_type, model_class, n_layer, n_head, ...; None: use the default, which reads
        the model's ``config``. Stops at the first non-None result.
    :raises: the run ends before anything is measured.

    Example, a wrapper that adds to the description of any adapter::

        @hookimpl(wrapper=True)
        def invarlock_describe(model):
            described = yield
            return {**described, "megabytes": sum(p.nbytes for p in model.parameters()) / 1e6}
    """


@hookspec(firstresult=True)
def invarlock_snapshot(model: Any) -> Any:
    """Keep all that is needed to restore the model bit for bit.

    :called: once per run, before the first guard sees the model.
    :param model: the baseline.
    :returns: anything; it is handed to ``invarlock_restore`` as it is. None: let the default do both, with a temporary
        folder of tensors. Stops at the first non-None result.
    :raises: the run ends before the edit.

    Example, an adapter that keeps the baseline in memory::

        from transformers import AutoModelForCausalLM

        @hookimpl
        def invarlock_load_model(model_id):
            return AutoModelForCausalLM.from_pretrained(model_id)

        @hookimpl
        def invarlock_snapshot(model):
            return {name: tensor.clone() for name, tensor in model.state_dict().items()}

        @hookimpl
        def invarlock_restore(model, snapshot):
            model.load_state_dict(snapshot)
            return True
    """


@hookspec(firstresult=True)
def invarlock_restore(model: Any, snapshot: Any) -> Any:
    """Restore the model to its state at ``invarlock_snapshot``.

    :called: after a rollback, an abort, an exception or Ctrl-C, and to undo what a guard changed. The pipeline compares
        fingerprints afterwards: a baseline that is not restored bit for bit is an error of the adapter.
    :param model: the model to restore, in place.
    :param snapshot: the result of ``invarlock_snapshot``.
    :returns: True when it was restored; None: use the default. Stops at the first non-None result.
    :raises: the run ends.

    Example, a wrapper that reports when the baseline is restored::

        import sys

        @hookimpl(wrapper=True)
        def invarlock_restore():
            restored = yield
            print("the baseline is back", file=sys.stderr)
            return restored
    """
