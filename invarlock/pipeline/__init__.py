"""From a configuration to a verdict: ``run`` edits a model under guard, ``compare`` judges an edit of somebody else."""

from invarlock.core.progress import Progress
from invarlock.pipeline.attempts import RunResult
from invarlock.pipeline.comparison import compare
from invarlock.pipeline.quantizing import run
from invarlock.pipeline.streaming import run_streamed

__all__ = ["Progress", "RunResult", "compare", "run", "run_streamed"]
