"""The training loop, and the recipes of the demo model, language models, vision transformers and memories."""
