"""Models: shapes read from Hugging Face configs, one ragged transformer, loading, tokenizers.

Importing `shapes` or `zoo` loads no torch; `loader.load_model` is where a model comes to life.
"""
