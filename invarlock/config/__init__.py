"""The configuration of a run: what keys there are (``schema``) and how a file becomes them (``loading``)."""
