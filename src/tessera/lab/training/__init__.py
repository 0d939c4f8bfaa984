"""One loop, and what it trains: the demo model, language models, vision transformers and memories."""
