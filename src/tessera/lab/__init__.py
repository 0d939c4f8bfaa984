"""Training and experiments: tasks, models to train, the training loop, and measurements of memories.

The extra ``lab`` brings what it needs (``pip install 'tessera[lab]'``). The rest of Tessera, the core, works without it and
never imports it: `tests/test_imports.py` holds that.
"""
