"""The built-in model: synthetic instrument panels, and the training of a small model that reads them.

Not installed with the package; run the modules from the repository root, e.g. ``python -m panel.scenes``.
"""
