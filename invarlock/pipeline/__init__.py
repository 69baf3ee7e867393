"""From a configuration to a verdict: ``run`` edits a model under guard, ``compare`` judges an edit of somebody else.

``make_reference`` measures a baseline once for many of either.
"""

from invarlock.core.progress import Progress
from invarlock.pipeline.attempts import RunResult
from invarlock.pipeline.comparison import compare
from invarlock.pipeline.quantizing import run
from invarlock.pipeline.reference.making import make_reference
from invarlock.pipeline.streaming import run_streamed

__all__ = ["Progress", "RunResult", "compare", "make_reference", "run", "run_streamed"]
