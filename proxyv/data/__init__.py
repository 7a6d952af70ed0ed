"""Conversations to tensors: templates, sources, the dataset and the collator."""
