"""Speech encoder-decoder models: composed, trained, evaluated, shipped."""

__version__ = "0.1.0"
