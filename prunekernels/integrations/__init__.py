"""Callbacks for training libraries, one module each: lightning, transformers, ultralytics. None is imported before it
is asked for.
"""
